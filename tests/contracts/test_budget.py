"""Every budget keeps the Budget contract; WeLore and Energy equal their definitions, written out literally."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from subspan.budget import (
    BlockInfluence,
    Budget,
    Bytes,
    Energy,
    Err,
    LeastLoss,
    Owl,
    Ratio,
    Target,
    Uniform,
    WeLore,
)
from subspan.plan import break_even, numbers

Shapes = dict[str, tuple[int, int]]
Spectra = dict[str, Tensor]

# What data would say of each site; those of one name alike are alike.
SCORES = {
    "q": 0.4, "k": 0.1, "v": 0.3, "o": 0.2, "up": 0.25, "down": 0.15, "thin": 0.35, "a": 0.1, "b": 0.1, "c": 0.1,
}  # fmt: skip
# name -> the budget for a target
TARGETED: dict[str, Callable[[Target], Budget]] = {
    "uniform": Uniform,
    "energy": Energy,
    "welore": WeLore,
    "welore-grid": lambda t: WeLore(t, search="grid"),
    "welore-keep": lambda t: WeLore(t, nlrc="keep"),
    "welore-keep-grid": lambda t: WeLore(t, search="grid", nlrc="keep"),
    "welore-keep-break-even": lambda t: WeLore(t, nlrc="keep", gate="break_even"),
    "owl": lambda t: Owl(t, scores=SCORES),
    "block-influence": lambda t: BlockInfluence(t, cap=1 - 1e-9, scores=SCORES),
    "least-loss": lambda t: LeastLoss(t, by="relative"),
}
TARGETS: tuple[Target, ...] = (
    Err(0.0), Err(0.1), Err(0.3), Err(0.5), Err(0.7), Err(0.97), Ratio(0.1), Ratio(0.4), Ratio(0.8), Ratio(1.0),
    Bytes(4000), Bytes(10_000),
)  # fmt: skip
FIXED = {f"energy-{share}": Energy(share) for share in (0.01, 0.5, 0.9, 0.999, 1.0)}
BUDGETS: dict[str, Budget] = {
    **{f"{name}-{target}": make(target) for name, make in TARGETED.items() for target in TARGETS},
    **FIXED,
}
SHAPES: Shapes = {
    "q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16), "up": (40, 16), "down": (16, 40), "thin": (2, 30),
}  # fmt: skip


def weights(shapes: Shapes = SHAPES, seed: int = 0) -> Spectra:
    """Weights whose spectra fall at different speeds, as those of a trained model do."""
    g, found = torch.Generator().manual_seed(seed), {}
    for i, (name, (m, n)) in enumerate(shapes.items()):
        k = min(m, n)
        u, _ = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64, generator=g))
        v, _ = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=g))
        noise = 0.5 + torch.rand(k, dtype=torch.float64, generator=g)
        found[name] = u @ torch.diag(noise * torch.exp(-0.15 * i * torch.arange(k))) @ v.mT
    return found


def spectra_of(w: Spectra) -> Spectra:
    return {name: torch.linalg.svdvals(matrix) for name, matrix in w.items()}


def turned(found: Spectra) -> Spectra:
    """Every weight times a scale of its own, between two random rotations."""
    g, result = torch.Generator().manual_seed(1), {}
    for i, (name, w) in enumerate(found.items()):
        left, right = (torch.linalg.qr(torch.randn(k, k, dtype=w.dtype, generator=g)).Q for k in w.shape)
        result[name] = 10.0 ** (i - 3) * left @ w @ right
    return result


SPECTRA, TURNED = spectra_of(weights()), spectra_of(turned(weights()))
TOTAL = sum(len(s) for s in SPECTRA.values())
WHOLE = 4 * sum(m * n for m, n in SHAPES.values())


# ---- literal definitions: plain Python, no numpy, no bisection ----


def shares(s: Tensor) -> list[float]:
    low, high = min(s.tolist()), max(s.tolist())
    return [(x - low) / (high - low) for x in s.tolist()]


def quantile(values: list[float], q: float) -> float:
    ordered, at = sorted(values), q * (len(values) - 1)
    low = math.floor(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(values) - 1)] - ordered[low])


def welore_at(spectra: Spectra, shapes: Shapes, k: float, gate: str | None = None) -> dict[str, int]:
    ranks = {name: sum(t >= k for t in shares(s)) for name, s in spectra.items()}
    for name, rank in ranks.items():
        m, n = shapes[name]
        keeps = {None: False, "half": 2 * rank >= min(m, n), "break_even": 10 * rank * (m + n) > 9 * m * n}
        if keeps[gate]:
            ranks[name] = min(m, n)
    return ranks


def energy_at(spectra: Spectra, k: float) -> dict[str, int]:
    def rank(s: list[float]) -> int:
        total = math.fsum(x * x for x in s)
        return next(i for i in range(1, len(s) + 1) if math.fsum(x * x for x in s[:i]) >= k * total)

    return {name: rank(s.tolist()) for name, s in spectra.items()}


def removed(ranks: dict[str, int], shapes: Shapes) -> float:
    """The effective rank reduction, as a quotient of counts."""
    full = sum(min(shapes[name]) for name in ranks)
    return (full - sum(ranks.values())) / full


def kept(ranks: dict[str, int], shapes: Shapes) -> float:
    """The share of numbers stored."""
    after = sum(min(r * sum(shapes[name]), math.prod(shapes[name])) for name, r in ranks.items())
    return after / sum(math.prod(shapes[name]) for name in ranks)


def every_welore(spectra: Spectra, shapes: Shapes, gate: str | None = None) -> list[dict[str, int]]:
    """What every possible threshold gives, by brute force."""
    return [welore_at(spectra, shapes, k, gate) for k in sorted({t for s in spectra.values() for t in shares(s)})]


def every_energy(spectra: Spectra) -> list[dict[str, int]]:
    """What every possible share of energy gives, by brute force, one rank less at each step."""
    lost = {}
    for name, s in spectra.items():
        values = s.tolist()
        total = math.fsum(x * x for x in values)
        for rank in range(1, len(values)):
            lost[name, rank] = math.fsum(x * x for x in values[rank:]) / total
    found, ranks = [], {name: len(s) for name, s in spectra.items()}
    found.append(dict(ranks))
    for (name, rank), _ in sorted(lost.items(), key=lambda item: item[1]):
        ranks[name] = rank
        found.append(dict(ranks))
    return found


def largest_inside(ratio: float, possible: list[dict[str, int]]) -> float:
    """The largest share of numbers within the ratio, or the smallest there is."""
    reached = sorted(kept(ranks, SHAPES) for ranks in possible)
    return max((share for share in reached if share <= ratio + 1e-12), default=reached[0])


# ---- the contract of all budgets ----


@pytest.fixture(params=BUDGETS)
def budget(request) -> Budget:
    return BUDGETS[request.param]


def test_every_site_gets_a_possible_rank(budget):
    ranks = budget(SPECTRA, SHAPES)
    assert list(ranks) == list(SHAPES)
    assert all(type(ranks[name]) is int and 1 <= ranks[name] <= min(SHAPES[name]) for name in SHAPES)


def test_scale_and_rotation_of_the_weights_do_not_matter(budget):
    assert budget(TURNED, SHAPES) == budget(SPECTRA, SHAPES)


def test_a_sharper_spectrum_everywhere_alike_gives_equal_ranks(budget):
    shapes = dict.fromkeys("abc", (10, 12))
    spectra = {name: torch.linspace(3, 1, 10, dtype=torch.float64) ** 2 for name in shapes}
    assert len(set(budget(spectra, shapes).values())) == 1


def test_float32_spectra_give_the_same_ranks(budget):
    single = {name: s.float() for name, s in SPECTRA.items()}
    assert budget(single, SHAPES) == budget({name: s.double() for name, s in single.items()}, SHAPES)


@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize("kind", [Err, Ratio, Bytes])
def test_ranks_fall_as_the_target_asks_for_more(name, kind):
    targets = {
        Err: [Err(e / 25) for e in range(25)],
        Ratio: [Ratio(1 - r / 25) for r in range(25)],
        Bytes: [Bytes(WHOLE - 300 * i) for i in range(25)],
    }[kind]
    for less, more in pairwise(TARGETED[name](t)(SPECTRA, SHAPES) for t in targets):
        assert all(more[site] <= less[site] for site in SHAPES)


@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize("target", [Err(0.0), Ratio(1.0)], ids=repr)
def test_nothing_to_remove_keeps_every_rank(name, target):
    steep = {**SPECTRA, "o": 10.0 ** -torch.arange(16, dtype=torch.float64)}
    assert TARGETED[name](target)(steep, SHAPES) == {site: min(shape) for site, shape in SHAPES.items()}


def test_all_the_energy_is_every_rank():
    s = {"o": 10.0 ** -torch.arange(8, dtype=torch.float64)}
    assert Energy(1.0)(s, {"o": (8, 8)}) == {"o": 8}


@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize("value", [0.999, 0.9, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.001])
def test_a_ratio_is_never_exceeded_unless_nothing_reaches_it(name, value):
    ranks = TARGETED[name](Ratio(value))(SPECTRA, SHAPES)
    assert kept(ranks, SHAPES) <= value + 1e-12 or ranks == TARGETED[name](Err(1 - 1e-9))(SPECTRA, SHAPES)


@pytest.mark.parametrize("name", TARGETED)
def test_an_err_near_one_leaves_one_direction_of_all_that_may_be_cut(name):
    gate = {"welore-keep": "half", "welore-keep-grid": "half", "welore-keep-break-even": "break_even"}.get(name)
    smallest = welore_at(SPECTRA, SHAPES, 1.0, gate)
    assert set(smallest.values()) <= {1, 2}
    assert TARGETED[name](Err(1 - 1e-9))(SPECTRA, SHAPES) == smallest


@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize("share", [0.9, 0.75, 0.5, 0.25])
def test_bytes_of_like_numbers_are_a_ratio(name, share):
    count = int(share * WHOLE)
    told = Bytes(count + 1000, dict.fromkeys(SHAPES, 32), 1000)
    wanted = TARGETED[name](Ratio(count / WHOLE))(SPECTRA, SHAPES)
    assert TARGETED[name](told)(SPECTRA, SHAPES) == TARGETED[name](Bytes(count))(SPECTRA, SHAPES) == wanted


@pytest.mark.parametrize("name", TARGETED)
def test_more_bytes_than_there_are_keep_every_rank(name):
    full = {site: min(shape) for site, shape in SHAPES.items()}
    assert TARGETED[name](Bytes(WHOLE))(SPECTRA, SHAPES) == full
    assert TARGETED[name](Bytes(10 * WHOLE))(SPECTRA, SHAPES) == full


@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize("count", [11_000, 9_000, 6_000, 3_000])
def test_bytes_are_never_exceeded_whatever_a_number_takes(name, count):
    bits = dict(zip(SHAPES, (32, 16, 8, 16, 32, 16, 4), strict=True))
    target = Bytes(count, bits, 777)
    ranks = TARGETED[name](target)(SPECTRA, SHAPES)
    assert 777 + sum(numbers(r, *SHAPES[site]) * bits[site] // 8 for site, r in ranks.items()) <= count


@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_the_order_of_the_sites_does_not_matter(name, target):
    back = dict(reversed(SHAPES.items()))
    assert TARGETED[name](target)({site: SPECTRA[site] for site in back}, back) == TARGETED[name](target)(
        SPECTRA, SHAPES
    )


@pytest.mark.parametrize("count", [0, -5, 1.5, True, "9"])
def test_bytes_that_are_no_count_are_refused(count):
    with pytest.raises(ValueError, match=r"is not a whole number above 0; 100_000_000 is 100 MB"):
        Bytes(count)


def test_numbers_and_err_agree_with_their_counts():
    ranks = {name: min(2, min(shape)) for name, shape in SHAPES.items()}
    assert Err(0.5).reached(ranks, SHAPES) == pytest.approx(removed(ranks, SHAPES), abs=1e-15)
    assert Ratio(0.5).reached(ranks, SHAPES) == pytest.approx(1 - kept(ranks, SHAPES), abs=1e-15)
    assert all(numbers(r, *SHAPES[n]) <= math.prod(SHAPES[n]) for n, r in ranks.items())


# ---- definitions ----


@pytest.mark.parametrize("err", [0.1, 0.25, 0.5, 0.7, 0.99])
def test_uniform_err_is_a_rounded_share_of_each_full_rank(err):
    ranks = Uniform(Err(err))({}, SHAPES)
    for name, shape in SHAPES.items():
        wanted = (1 - err) * min(shape)
        assert abs(ranks[name] - wanted) <= 0.5 or (ranks[name] == 1 and wanted < 1)


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.8, 0.99])
def test_uniform_ratio_is_the_largest_rank_inside_the_share_that_is_worth_two_factors(ratio):
    ranks = Uniform(Ratio(ratio))({}, SHAPES)
    for name, (m, n) in SHAPES.items():
        assert (ranks[name] + 1) * (m + n) > min(ratio, 0.9) * m * n
        assert ranks[name] * (m + n) <= ratio * m * n or ranks[name] == 1


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.99, 0.9999])
def test_energy_is_the_smallest_rank_that_keeps_the_share(share):
    assert Energy(share)(SPECTRA, SHAPES) == energy_at(SPECTRA, share)


@pytest.mark.parametrize("share,rank", [(0.5, 1), (0.625, 2), (0.75, 3), (0.76, 4), (1.0, 5)])
def test_energy_reached_exactly_is_enough(share, rank):
    s = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0])
    assert Energy(share)({"a": s}, {"a": (5, 5)}) == {"a": rank}


@pytest.mark.parametrize("err", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_energy_reaches_the_nearest_possible_reduction(err, seed):
    spectra = spectra_of(weights(seed=seed))
    best = min(abs(removed(r, SHAPES) - err) for r in every_energy(spectra))
    assert abs(removed(Energy(Err(err))(spectra, SHAPES), SHAPES) - err) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("budget", [Energy, WeLore])
@pytest.mark.parametrize("err", [0.05, 0.3, 0.5, 0.8])
def test_a_single_large_matrix_is_cut_to_the_nearest_integer(err, budget):
    s = torch.linspace(1.2, 1.0, 4001, dtype=torch.float64)
    rank = budget(Err(err))({"a": s}, {"a": (4001, 4001)})["a"]
    assert abs(rank - (1 - err) * 4001) <= 1


@pytest.mark.parametrize("err", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_welore_is_the_pooled_quantile_to_the_integer(err, seed):
    spectra = spectra_of(weights(seed=seed))
    k = quantile([t for s in spectra.values() for t in shares(s)], err)
    ranks = WeLore(Err(err))(spectra, SHAPES)
    assert ranks == welore_at(spectra, SHAPES, k)
    assert abs(removed(ranks, SHAPES) - err) <= 1 / TOTAL + 1e-12


@pytest.mark.parametrize("err", [0.1, 0.3, 0.5, 0.7])
def test_one_number_counts_as_one_number_whatever_the_matrix(err):
    """Grouped-query k and v are shorter: the quantile is over numbers, not over matrices."""
    spectra = {"long": torch.linspace(1, 0, 90).double() ** 2, "short": torch.linspace(1, 0, 11).double() ** 2}
    shapes = {"long": (90, 90), "short": (11, 90)}
    k = quantile([t for s in spectra.values() for t in shares(s)], err)
    assert WeLore(Err(err))(spectra, shapes) == welore_at(spectra, shapes, k)


@pytest.mark.parametrize("err", [0.1, 0.2, 0.3, 0.5, 0.7, 0.8])
def test_welore_on_equal_spectra_is_uniform(err):
    shapes = dict.fromkeys("abc", (10, 12))
    spectra = {name: 2 * torch.linspace(3, 1, 10, dtype=torch.float64) ** 2 for name in shapes}
    assert WeLore(Err(err))(spectra, shapes) == Uniform(Err(err))(spectra, shapes)


@pytest.mark.parametrize("gate", ["half", "break_even"])
@pytest.mark.parametrize("nlrc", ["truncate", "keep"])
@pytest.mark.parametrize("err", [0.1, 0.3, 0.5, 0.7, 0.95])
def test_the_grid_is_the_first_multiple_of_five_thousandths_that_reaches_the_target(err, nlrc, gate):
    ladder = [welore_at(SPECTRA, SHAPES, i * 0.005, gate if nlrc == "keep" else None) for i in range(201)]
    first = next((ranks for ranks in ladder if removed(ranks, SHAPES) >= err), ladder[-1])
    assert WeLore(Err(err), search="grid", nlrc=nlrc, gate=gate)(SPECTRA, SHAPES) == first


@pytest.mark.parametrize("tenths", range(1, 10))
def test_the_grid_stops_when_the_target_is_reached_exactly(tenths):
    spectra, shapes = {"a": torch.arange(10.0).flip(0)}, {"a": (10, 10)}
    assert WeLore(Err(tenths / 10), search="grid")(spectra, shapes) == {"a": 10 - tenths}


@pytest.mark.parametrize("gate", ["half", "break_even"])
@pytest.mark.parametrize("err", [0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95])
def test_kept_matrices_are_whole_and_the_rest_reaches_the_nearest_reduction(err, gate):
    ranks = WeLore(Err(err), nlrc="keep", gate=gate)(SPECTRA, SHAPES)
    possible = every_welore(SPECTRA, SHAPES, gate)
    best = min(abs(removed(r, SHAPES) - err) for r in possible)
    assert ranks in possible
    assert abs(removed(ranks, SHAPES) - err) == pytest.approx(best, abs=1e-12)
    for name, rank in ranks.items():
        m, n = SHAPES[name]
        cut = 2 * rank < min(m, n) if gate == "half" else rank <= break_even(m, n)
        assert cut or rank == min(m, n)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("gate", [None, "half", "break_even"])
def test_welore_stores_as_much_as_a_ratio_allows(ratio, gate):
    budget = WeLore(Ratio(ratio)) if gate is None else WeLore(Ratio(ratio), nlrc="keep", gate=gate)
    best = largest_inside(ratio, every_welore(SPECTRA, SHAPES, gate))
    assert kept(budget(SPECTRA, SHAPES), SHAPES) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_energy_stores_as_much_as_a_ratio_allows(ratio):
    best = largest_inside(ratio, every_energy(SPECTRA))
    assert kept(Energy(Ratio(ratio))(SPECTRA, SHAPES), SHAPES) == pytest.approx(best, abs=1e-12)


def test_an_outlier_makes_a_matrix_look_low_rank():
    """The design of min-max normalisation, not a flaw: one large value pushes all others below the threshold."""
    flat = torch.linspace(2, 1, 8, dtype=torch.float64)
    spiked = flat.clone()
    spiked[0] = 100.0
    ranks = WeLore(Err(0.5))({"flat": flat, "spiked": spiked}, {"flat": (8, 8), "spiked": (8, 8)})
    assert ranks == {"flat": 7, "spiked": 1}


@pytest.mark.parametrize(
    "s", [torch.ones(4), torch.zeros(4), torch.tensor([2.0])], ids=["equal", "zero", "single"]
)
def test_a_spectrum_without_a_tail_is_refused_by_name(s):
    with pytest.raises(ValueError, match=r"head: all singular values equal .*leave the site out"):
        WeLore(Err(0.5))({"head": s}, {"head": (len(s), 9)})


@pytest.mark.parametrize("budget", [LeastLoss(Err(0.5)), Owl(Err(0.5)), BlockInfluence(Err(0.5))], ids=repr)
def test_a_budget_without_its_scores_says_how_to_get_them(budget):
    with pytest.raises(
        ValueError, match=r"q.*: make the plan with a study that was given batches, or pass scores="
    ):
        budget(SPECTRA, SHAPES)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LeastLoss(Err(0.5), by="luck"), "by 'luck' is unknown; choose one of loss, output, relative"),
        (
            lambda: LeastLoss(Err(0.5), spectrum="light"),
            "spectrum 'light' is unknown; choose one of weight, metric",
        ),
        (lambda: WeLore(Err(0.5), spectrum="light"), "spectrum 'light' is unknown"),
        (lambda: Energy(Err(0.5), spectrum="light"), "spectrum 'light' is unknown"),
        (lambda: Owl(Err(0.5), spread=-0.1), r"spread -0.1 is outside 0..1"),
        (lambda: BlockInfluence(Err(0.5), temperature=0.0), "temperature 0.0 is not above 0"),
        (lambda: BlockInfluence(Err(0.5), cap=1.0), r"cap 1.0 is outside \(0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
