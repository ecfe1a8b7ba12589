"""Ten steps of APOLLO, DCT-AdamW and LDAdam equal those recorded from the authors' programs (see README.md)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from subspan.methods.optimizers import apollo, apollo_mini, dct_adamw, ldadam
from subspan.optim import Drop, ErrorFeedback, Optim, keep, rotate
from subspan.optim.direction import Low

HERE = Path(__file__).parent
SHAPES = ("tall", "wide", "square")


@dataclass(frozen=True, eq=False)
class Recorded:
    """The program's random matrices, one a refresh."""

    basis: torch.Tensor
    orthonormal: bool = False

    def init(self, g, seed):
        return {"q": torch.zeros_like(self.basis[0]), "draw": torch.tensor(0)}

    def fit(self, g, s, due):
        return {"q": self.basis[int(s["draw"])].clone(), "draw": s["draw"] + 1} if due else dict(s)

    def down(self, g, s):
        return s["q"].mT @ g

    def up(self, x, s):
        return Low(s["q"], x)

    def move(self, x, old, new, degree):
        return x


def run(rule, data, name, *, lr=0.01):
    """Weights after every step (steps, m, n), and the optimizer's last state."""
    p = torch.nn.Parameter(torch.from_numpy(data[f"{name}.w0"].copy()))
    opt = Optim([("w", p)], rule, lr=lr)
    trace = []
    for g in data[f"{name}.g"]:
        p.grad = torch.from_numpy(g.copy())
        opt.step()
        trace.append(p.detach().clone())
    return torch.stack(trace), opt.state[p]


def check_equal(ours, data, name, key):
    theirs = torch.from_numpy(data[key])
    assert_close(ours, theirs, rtol=0, atol=1e-12)
    # ten steps move every weight by far more than the tolerance, or the equality would say nothing
    assert (theirs[-1] - torch.from_numpy(data[f"{name}.w0"])).abs().median() > 1e-3


@pytest.mark.parametrize("name", SHAPES)
def test_apollo_is_the_authors_on_their_matrices(name):
    with np.load(HERE / "apollo.npz") as data:
        basis = torch.from_numpy(data[f"{name}.basis"]).double()
        rule = apollo(rank=3, every=4, subspace=lambda rank: Recorded(basis))
        check_equal(run(rule, data, name)[0], data, name, f"{name}.w")


@pytest.mark.parametrize("name", SHAPES)
def test_apollo_mini_is_the_authors_on_their_matrices(name):
    with np.load(HERE / "apollo_mini.npz") as data:
        basis = torch.from_numpy(data[f"{name}.basis"]).double()
        rule = apollo_mini(every=4, subspace=lambda rank: Recorded(basis))
        check_equal(run(rule, data, name)[0], data, name, f"{name}.w")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "mode, carry, residual",
    [("keep", keep, Drop()), ("rotate", rotate, Drop()), ("rotate_ef", rotate, ErrorFeedback())],
)
def test_dct_adamw_is_the_authors(mode, carry, residual, name):
    with np.load(HERE / "dct_adamw.npz") as data:
        ours, state = run(dct_adamw(rank=3, carry=carry, residual=residual), data, name)
        check_equal(ours, data, name, f"{name}.w.{mode}")
        assert state["frame.index"].tolist() == data[f"{name}.index.{mode}"][-1].tolist()
        if mode == "rotate_ef":
            error = state["residual.error"]
            error = error if name == "wide" else error.mT
            assert_close(error, torch.from_numpy(data[f"{name}.error.rotate_ef"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SHAPES)
def test_ldadam_is_the_authors(name):
    with np.load(HERE / "ldadam.npz") as data:
        ours, state = run(ldadam(rank=3), data, name)
        check_equal(ours, data, name, f"{name}.w")
        error = state["residual.error"]
        error = error.mT if name == "tall" else error
        # of size 6 and fed back at every step, so that rounding adds up: the record itself is right to 4e-14
        assert_close(error, torch.from_numpy(data[f"{name}.error"][-1]), rtol=0, atol=1e-12)
        check_equal(run(ldadam(rank=3, error="dropped"), data, name)[0], data, name, f"{name}.w.no_error")
