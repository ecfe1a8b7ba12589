"""Ten steps equal those recorded from the authors' own programs (README.md says how)."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from subspan.methods.optimizers import fira, frugal, galore
from subspan.optim import Adam, Optim, Span

HERE = Path(__file__).parent
SHAPES = ("tall", "wide", "square")
RAW = Adam(eps=1e-6, eps_on="raw")

RULES = {
    "galore": galore(solver="exact", rank=3, every=4, scale=0.25, rule=RAW),
    "fira": fira(solver="exact", rank=3, every=4, scale=0.25, rule=RAW, limit=1.01, leak=0.75),
    "frugal": frugal(rank=0.375, every=4, subspace=partial(Span, solver="exact")),
}


def run(rule, data, *, lr=0.01):
    """Weights after every step, (steps, m, n) a shape."""
    params = {name: torch.nn.Parameter(torch.from_numpy(data[f"{name}.w0"].copy())) for name in SHAPES}
    opt = Optim(params.items(), rule, lr=lr)
    trace = {name: [] for name in SHAPES}
    for t in range(10):
        for name, p in params.items():
            p.grad = torch.from_numpy(data[f"{name}.g"][t].copy())
        opt.step()
        for name, p in params.items():
            trace[name].append(p.detach().clone())
    return {name: torch.stack(weights) for name, weights in trace.items()}


@pytest.mark.parametrize("method", RULES)
def test_ten_steps_equal_the_authors(method):
    with np.load(HERE / f"{method}.npz") as data:
        ours = run(RULES[method], data)
        for name in SHAPES:
            theirs = torch.from_numpy(data[f"{name}.w"])
            assert_close(ours[name], theirs, rtol=0, atol=1e-12)
            # ten steps move every weight by far more than the tolerance, or the equality would say nothing
            assert (theirs[-1] - torch.from_numpy(data[f"{name}.w0"])).abs().median() > 1e-3


def test_the_papers_complement_is_not_the_programs_residual():
    with np.load(HERE / "fira.npz") as data:
        exact = run(fira(solver="exact", rank=3, every=4, rule=RAW), data)["tall"]
        assert (exact - torch.from_numpy(data["tall.w"])).abs().max() > 1e-3
