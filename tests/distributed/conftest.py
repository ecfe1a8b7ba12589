"""Runs of several processes, each started once for all tests that read its results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKERS = Path(__file__).with_name("workers.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """One worker for all that read the same runs."""
    for item in items:
        if "run" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """run(job, world): what process 0 of that job in workers.py found; four processes leave a checkpoint."""
    folder, found = tmp_path_factory.mktemp("distributed"), {}

    def once(job, world):
        if job == "alone" or (job, world) == ("fsdp", 2):
            once("fsdp", 4)
        if (job, world) not in found:
            command = [sys.executable, "-W", "ignore", str(WORKERS), job, str(world), str(folder)]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            kept = folder / f"{job}{world}.pt"
            found[job, world] = (
                torch.load(kept, weights_only=True) if done.returncode == 0 else done.stderr[-4000:]
            )
        assert not isinstance(found[job, world], str), found[job, world]
        return found[job, world]

    return once
