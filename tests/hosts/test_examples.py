"""The examples run as they are, and what they print is true."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*_loop.py"))


def imported(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", FOLDER / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_way_of_training_has_its_example():
    assert EXAMPLES == ["lightning_loop.py", "plain_loop.py", "trainer_loop.py"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_run_as_a_script_says_that_the_resumed_run_is_equal(tmp_path, name):
    done = subprocess.run(
        [sys.executable, FOLDER / name], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "resumed run equals: True"
    assert re.search(r"steps.*: loss \d\.\d{3} -> \d\.\d{3}\n", done.stdout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_models_of_an_example_are_equal_and_learned(name):
    example = imported(name)
    start = torch.get_rng_state()
    try:
        whole, resumed, losses = example.main()
    finally:
        torch.set_rng_state(start)
    for (key, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert p is not q and torch.equal(p, q), key
    assert len(losses) == example.STEPS
    # Bytes of this text that are told by how often they occur alone cost their entropy.
    share = torch.bincount(example.TEXT, minlength=256) / len(example.TEXT)
    assert sum(losses[-20:]) / 20 < torch.special.entr(share).sum().item()
