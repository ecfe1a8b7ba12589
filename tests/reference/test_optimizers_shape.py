"""Ten steps of Muon, Dion and Adafactor equal those recorded from the authors' programs (README.md says how)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from subspan.methods.optimizers import adafactor, dion, muon
from subspan.optim import Optim

HERE = Path(__file__).parent
SHAPES = ("tall", "wide", "square")
Q0 = "inside.frame.q"
RUNS = {
    "muon": (muon(), 0.02),
    "dion": (dion(rank=3), 0.01),
    "adafactor": (adafactor(), 0.01),
}


def run(rule, data, name, *, lr, start=None):
    """Weights after every step, (10, m, n)."""
    p = torch.nn.Parameter(torch.from_numpy(data[f"{name}.w0"].copy()))
    opt = Optim([("w", p)], rule, lr=lr)
    if start is not None:
        saved = opt.state_dict()
        state = {"step": torch.tensor(0), **rule.init(p.detach(), 0)}
        assert state[Q0].shape == start.shape
        saved["state"][0] = state | {Q0: torch.from_numpy(start.copy())}
        opt.load_state_dict(saved)
    trace = []
    for g in data[f"{name}.g"]:
        p.grad = torch.from_numpy(g.copy())
        opt.step()
        trace.append(p.detach().clone())
    return torch.stack(trace)


def check_equal(ours, theirs, w0):
    """Equal to rounding, and moved by far more than the tolerance, or the equality would say nothing."""
    theirs = torch.from_numpy(theirs)
    assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert (theirs[-1] - torch.from_numpy(w0)).abs().median() > 1e-3


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("method", RUNS)
def test_ten_steps_equal_the_authors(method, name):
    rule, lr = RUNS[method]
    with np.load(HERE / f"{method}.npz") as data:
        start = data[f"{name}.q0"] if method == "dion" else None
        check_equal(run(rule, data, name, lr=lr, start=start), data[f"{name}.w"], data[f"{name}.w0"])


@pytest.mark.parametrize("name", SHAPES)
def test_on_the_longer_side_dion_is_the_program_that_transposes(name):
    turned = "wide.transposed" if name == "wide" else name
    with np.load(HERE / "dion.npz") as data:
        ours = run(dion(rank=3, side="long"), data, name, lr=0.01, start=data[f"{turned}.q0"])
        check_equal(ours, data[f"{turned}.w"], data[f"{name}.w0"])


def test_the_two_programs_of_dion_differ_on_wide_matrices():
    with np.load(HERE / "dion.npz") as data:
        apart = np.abs(data["wide.w"] - data["wide.transposed.w"]).max()
    assert apart > 1e-3
