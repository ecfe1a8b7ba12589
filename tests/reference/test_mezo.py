"""Ten steps of MeZO equal those recorded from the authors' own program (README.md says how)."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.testing import assert_close

from subspan.methods.optimizers import mezo
from subspan.optim import Optim, Recipe, Spsa

HERE = Path(__file__).parent
SHAPES = ("tall", "wide", "square")


@dataclass(frozen=True)
class Replayed(Spsa):
    """Spsa along recorded directions."""

    drawn: dict = field(default_factory=dict)

    def noise(self, name, p, *, seed, steps):
        return self.drawn[name][steps]


def test_ten_steps_equal_the_authors():
    with np.load(HERE / "mezo.npz") as data:
        theirs = {key: torch.from_numpy(value.copy()) for key, value in data.items()}
    params = {name: torch.nn.Parameter(theirs[f"{name}.w0"].clone()) for name in SHAPES}
    recipe = mezo(eps=float(theirs["zo_eps"]))
    source = Replayed(recipe.source.eps, recipe.source.copy, {name: theirs[f"{name}.z"] for name in SHAPES})
    opt = Optim(
        params.items(),
        Recipe(recipe.rule, source, other=recipe.other),
        lr=float(theirs["lr"]),
        weight_decay=float(theirs["weight_decay"]),
    )

    def closure():
        pairs = [(p, theirs[f"{name}.x"], theirs[f"{name}.y"]) for name, p in params.items()]
        return sum((x @ p.T - y).square().mean() for p, x, y in pairs)

    for t in range(10):
        loss = opt.step(closure)
        assert_close(loss, theirs["losses"][t].mean(), rtol=0, atol=1e-11)
        for name, p in params.items():
            assert_close(p.detach(), theirs[f"{name}.w"][t], rtol=0, atol=1e-12)
    # ten steps move every weight by far more than the tolerance, or the equality would say nothing
    assert all((p.detach() - theirs[f"{n}.w0"]).abs().median() > 1e-3 for n, p in params.items())
