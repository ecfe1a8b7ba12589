"""A model with a forward that nobody could guess is compressed through `forward=`, as the example does."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from subspan.metric import Gram, collect

FILE = Path(__file__).parents[2] / "examples" / "custom_forward.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_custom_forward", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_run_as_a_script_says_that_data_helps(tmp_path):
    done = subprocess.run(
        [sys.executable, FILE], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["plain", "gram"]
    assert lines[-1] == "what reaches the layers helps: True"
    assert list(tmp_path.iterdir()) == []


def test_what_reaches_the_layers_matters_fivefold(example):
    with torch.random.fork_rng():
        errors = example.main()
    assert errors["gram"] < errors["plain"] / 5


def test_the_hook_runs_the_model_and_without_it_the_batches_do_not_fit(example):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = example.Pendulum().double()
        state = torch.randn(5, example.WIDTH).double()
    found = collect(model, [(state, 0.3)], Gram(), {"up": model.up}, forward=example.run)["up"]
    total, x = torch.zeros_like(found), state
    with torch.no_grad():
        for _ in range(example.STEPS):
            total += x.mT @ x
            x = x + 0.1 * (model.down(torch.tanh(model.up(x))) - 0.3 * x)
    assert_close(found, total / (5 * example.STEPS), rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError):
        collect(model, [(state, 0.3)], Gram(), {"up": model.up})
