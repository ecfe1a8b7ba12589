"""A worker is lost; torchrun starts all again, they load the last checkpoint, and end where they would have."""

import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("restart_worker.py")


def test_a_lost_worker_costs_the_steps_since_the_last_checkpoint_and_changes_no_bit(tmp_path):
    """Two workers with DDP; one is killed in its eighth step, after checkpoints at 3 and 6."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--max-restarts", "1", str(WORKER), str(tmp_path)],
        # One store for all attempts would hand the new workers the addresses of the dead ones (torch 2.13).
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    straight, lost = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("straight", "lost"))
    assert (straight["start"], lost["start"]) == (0, 6)
    assert straight["state"].keys() == lost["state"].keys()
    assert [key for key, x in straight["state"].items() if not torch.equal(x, lost["state"][key])] == []
