"""The least loss equals the optimum over every combination of ranks there is, up to one step of the hull."""

import itertools
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from subspan.budget import Bytes, Err, LeastLoss, Ratio, Target
from subspan.plan import break_even, numbers

Shapes = dict[str, tuple[int, int]]
Spectra = dict[str, Tensor]

SHAPES: Shapes = {
    "q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16), "up": (40, 16), "down": (16, 40), "thin": (2, 30),
}  # fmt: skip
WHOLE = 4 * sum(m * n for m, n in SHAPES.values())
SCORES = {"q": 0.4, "k": 0.1, "v": 0.3, "o": 0.2, "up": 0.25, "down": 0.15, "thin": 0.35}
TARGETS: tuple[Target, ...] = (
    Err(0.0), Err(0.1), Err(0.5), Err(0.97), Ratio(0.1), Ratio(0.4), Ratio(1.0), Bytes(4000), Bytes(10_000),
)  # fmt: skip


def falling(shapes: Shapes, seed: int = 0) -> Spectra:
    """Singular values that fall at different speeds, as those of a trained model do."""
    g, spectra = torch.Generator().manual_seed(seed), {}
    for i, (name, shape) in enumerate(shapes.items()):
        decay = torch.exp(-(0.15 + 0.25 * (i % 3)) * torch.arange(min(shape)))
        noise = 0.5 + torch.rand(min(shape), dtype=torch.float64, generator=g)
        spectra[name] = 3.0**-i * (noise * decay).sort(descending=True).values
    return spectra


SPECTRA = falling(SHAPES)


# ---- the least loss, against every combination of ranks there is ----

TINY: Shapes = {"a": (8, 14), "b": (16, 10), "c": (9, 20)}


def tiny(seed: int, by: str) -> tuple[Spectra, dict[str, float]]:
    spectra = falling(TINY, seed)
    total = {name: float(s.square().sum()) for name, s in spectra.items()}
    weight = {"output": dict.fromkeys(TINY, 1.0), "relative": {name: 1 / x for name, x in total.items()}}
    return spectra, weight.get(by, {"a": 0.2, "b": 3.0, "c": 40.0})


def everything(spectra: Spectra, weight: dict[str, float]) -> list[tuple[int, float, dict[str, int]]]:
    """Cost, error and ranks of every combination."""
    found = []
    for ranks in itertools.product(*(range(1, min(shape) + 1) for shape in TINY.values())):
        chosen = dict(zip(TINY, ranks, strict=True))
        cost = sum(numbers(r, *TINY[name]) for name, r in chosen.items())
        found.append((cost, error_of(chosen, spectra, weight), chosen))
    return found


def error_of(ranks: dict[str, int], spectra: Spectra, weight: dict[str, float]) -> float:
    return math.fsum(
        weight[name] * math.fsum(x * x for x in spectra[name].tolist()[r:]) for name, r in ranks.items()
    )


def at_price(price: float, every: list[tuple[int, float, dict[str, int]]]) -> tuple[int, float, dict[str, int]]:
    """The optimum where every number costs this much error."""
    return min(every, key=lambda row: (row[1] + price * row[0], row[0]))


BY = ["loss", "output", "relative"]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("seed", range(3))
def test_the_least_loss_is_the_optimum_at_any_price_of_a_number(seed, by):
    spectra, weight = tiny(seed, by)
    every = everything(spectra, weight)
    corners = {cost: ranks for cost, _, ranks in (at_price(10.0 ** (x / 20), every) for x in range(-160, 40))}
    assert len(corners) > 8
    for cost, ranks in corners.items():
        assert LeastLoss(Bytes(4 * cost), by, scores=weight)(spectra, TINY) == ranks


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("seed", range(3))
def test_between_prices_the_least_loss_is_off_by_less_than_one_step_of_the_hull(seed, by):
    spectra, weight = tiny(seed, by)
    every = everything(spectra, weight)
    corners = sorted({row[:2] for row in (at_price(10.0 ** (x / 20), every) for x in range(-160, 40))})
    for (cost, error), (above, better) in pairwise(corners):
        for room in range(cost, above):
            ranks = LeastLoss(Bytes(4 * room), by, scores=weight)(spectra, TINY)
            reached = error_of(ranks, spectra, weight)
            best = min(row[1] for row in every if row[0] <= room)
            assert sum(numbers(r, *TINY[name]) for name, r in ranks.items()) <= room
            assert best - 1e-12 <= reached <= error + 1e-12 and reached - best <= error - better + 1e-12


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_the_least_loss_never_stores_factors_that_do_not_pay(target, by):
    ranks = LeastLoss(target, by, scores=SCORES)(SPECTRA, SHAPES)
    assert all(r <= break_even(*SHAPES[name]) or r == min(SHAPES[name]) for name, r in ranks.items())


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("count", range(3000, WHOLE, 500))
def test_the_least_loss_leaves_no_room_for_another_rank(count, by):
    ranks = LeastLoss(Bytes(count), by, scores=SCORES)(SPECTRA, SHAPES)
    used = sum(4 * numbers(r, *SHAPES[name]) for name, r in ranks.items())
    assert used <= count < used + 4 * max(m + n for m, n in SHAPES.values())


def test_the_least_loss_of_equal_scores_is_that_of_the_outputs():
    for target in TARGETS:
        even = LeastLoss(target, scores=dict.fromkeys(SHAPES, 7.0))(SPECTRA, SHAPES)
        assert even == LeastLoss(target, by="output")(SPECTRA, SHAPES)


def test_a_site_whose_factors_never_pay_is_kept_whole():
    shapes = {"row": (1, 9), "two": (2, 2), "wide": (8, 9)}
    spectra = {name: torch.linspace(2, 1, min(shape)).double() for name, shape in shapes.items()}
    assert LeastLoss(Ratio(0.3), by="output")(spectra, shapes) == {"row": 1, "two": 2, "wide": 1}


def test_a_site_that_the_loss_does_not_feel_is_cut_first():
    shapes = {"felt": (8, 8), "idle": (8, 8)}
    spectra = {name: torch.linspace(2, 1, 8).double() for name in shapes}
    ranks = LeastLoss(Ratio(0.625), scores={"felt": 1.0, "idle": 0.0})(spectra, shapes)
    assert ranks == {"felt": 8, "idle": 1}
