"""Optimizers that measure in a sketch, choose among cosines or follow their momentum, at their limits."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan.methods.optimizers import apollo, apollo_mini, dct_adamw, ldadam
from subspan.optim import (
    Adam,
    Cosine,
    ErrorFeedback,
    Every,
    Gaussian,
    LowRankAdam,
    Momentum,
    Optim,
    Projected,
    Rows,
    Scaling,
    Sgd,
    Sketch,
    Span,
    dense,
    keep,
    rotate,
)
from subspan.optim.cosine import cosines
from subspan.optim.state import storage_bytes

NEVER = 10**9
CPU = torch.device("cpu")
SHARP = Adam(eps=1e-30, eps_on="raw")
SHAPES = [(7, 5), (5, 7), (6, 6)]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def gradients(shape, steps=12, seed=0):
    return torch.randn(steps, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def steps(rule, grads, seed=0):
    """gain * update at each step, and the state after it."""
    s, w, out = dict(rule.init(grads[0], seed)), torch.zeros_like(grads[0]), []
    for t, g in enumerate(grads, 1):
        d = dense(rule.update(g, s, w, t))
        out.append((d * rule.gain(s, t), {k: v.clone() for k, v in s.items()}))
    return out


def short_first(x, shape):
    """x with the compressed side, the shorter or a square's columns, as rows."""
    return x if shape[0] < shape[1] else x.mT


# ---- APOLLO


@every_shape
@pytest.mark.parametrize("subspace", [Sketch, Gaussian])
def test_apollos_first_step_has_a_closed_form(shape, subspace):
    """At t = 1 and eps -> 0 Adam's answer is sign(r): every column g_j moves by sqrt(rank) g_j / |r_j|."""
    (g,) = gradients(shape, steps=1)
    rule = apollo(rank=3, rule=SHARP, subspace=subspace)
    ((d, s),) = steps(rule, g[None])
    x = short_first(g, shape)
    r = rule.subspace.down(x, {k.removeprefix("frame."): v for k, v in s.items()})
    assert_close(short_first(d, shape), x * math.sqrt(3) / r.norm(dim=0), rtol=1e-7, atol=0)


@every_shape
def test_minis_first_step_has_a_closed_form(shape):
    """sign(r) of n entries: the whole gradient moves by sqrt(scale n) / |r|."""
    (g,) = gradients(shape, steps=1)
    rule = apollo_mini(scale=2.0, rule=SHARP)
    ((d, s),) = steps(rule, g[None])
    r = rule.subspace.down(short_first(g, shape), {k.removeprefix("frame."): v for k, v in s.items()})
    assert_close(d, g * math.sqrt(2.0 * max(shape)) / r.norm(), rtol=1e-7, atol=0)


@every_shape
def test_apollo_moves_every_column_and_mini_the_whole_along_the_gradient(shape):
    grads = gradients(shape)
    for g, (d, _), (whole, _) in zip(
        grads, steps(apollo(rank=3, every=4), grads), steps(apollo_mini(every=4), grads), strict=True
    ):
        cosine = torch.cosine_similarity(short_first(d, shape), short_first(g, shape), dim=0)
        assert_close(cosine, torch.ones_like(cosine))
        assert_close(whole / whole.norm(), g / g.norm())
        ratio = short_first(d / g, shape)[0]
        assert ratio.max() > 1.1 * ratio.min()  # and apollo's columns do not move alike


@every_shape
def test_in_a_basis_of_all_rows_columns_move_as_far_as_adams(shape):
    """With A = I the probe is Adam itself: each column has the length of Adam's step there."""
    grads = gradients(shape)
    probe = apollo(rank=1.0, every=NEVER, subspace=Rows, rule=Adam(), limit=None)
    for (d, _), (adam, _) in zip(steps(probe, grads), steps(Adam(), grads), strict=True):
        assert_close(short_first(d, shape).norm(dim=0), short_first(adam, shape).norm(dim=0), rtol=1e-6, atol=0)


@every_shape
@pytest.mark.parametrize("by", ["column", "tensor"])
def test_a_gradient_scaled_as_plain_descent_is_itself(shape, by):
    grads = gradients(shape)
    rule = Projected(Sketch(3), Every(3), Sgd(), Scaling(by, None, factor=0.5), scale=4.0)
    for (d, _), g in zip(steps(rule, grads), grads, strict=True):
        assert_close(d, 2 * g, rtol=1e-6, atol=0)


@every_shape
@pytest.mark.parametrize("by", ["column", "tensor"])
def test_the_scaled_gradient_grows_slowly(shape, by):
    """From step to step the norm grows by 1.01 at most, with room for the 1e-8 in the limiter."""
    grads = gradients(shape) * (1 + 0.9 * torch.sin(torch.arange(12.0, dtype=torch.float64)))[:, None, None]
    before, limited = math.inf, 0
    for d, s in steps(Projected(Sketch(3), Every(4), Sgd(), Scaling(by), scale=3.0), grads):
        norm = d.norm() / 3.0
        assert norm <= 1.01 * before * (1 + 1e-7)
        assert_close(s["residual.norm"], norm)
        limited += bool(norm > 1.009 * before)
        before = norm
    assert limited >= 2


@every_shape
def test_where_the_scale_enters_matters_only_to_the_limiters_epsilon(shape):
    grads = gradients(shape)
    inner = Projected(Sketch(3), Every(4), Adam(), Scaling(factor=5.0))
    outer = Projected(Sketch(3), Every(4), Adam(), Scaling(), scale=5.0)
    for (one, _), (two, _) in zip(steps(inner, grads), steps(outer, grads), strict=True):
        assert_close(one, two, rtol=1e-6, atol=0)


@every_shape
@pytest.mark.parametrize("carry", [keep, rotate], ids=repr)
def test_a_sketch_and_its_stored_matrix_are_one_run(shape, carry):
    grads = gradients(shape)
    runs = [steps(Projected(s(3), Every(4, carry), Adam(), Scaling()), grads, seed=5) for s in (Sketch, Gaussian)]
    for (one, _), (two, _) in zip(*runs, strict=True):
        assert torch.equal(one, two)


def test_a_sketch_is_a_gaussian_of_variance_one_over_rank_new_at_every_draw():
    g = torch.zeros(400, 300, dtype=torch.float64)
    eye = torch.eye(100, dtype=torch.float64)
    sketch, draws = Sketch(100), []
    s = sketch.init(g, seed=3)
    for _ in range(2):
        s = sketch.fit(g, s, True)
        draws.append(sketch.up(eye, s).dense())
    for q in draws:
        # five standard deviations of the mean and of the mean square of 40,000 normal numbers
        assert abs(q.mean()) < 5 * 0.1 / 200
        assert abs(100 * q.square().mean() - 1) < 5 * math.sqrt(2) / 200
    assert abs((draws[0] * draws[1]).mean()) < 5 * 0.01 / 200
    assert torch.equal(draws[1], sketch.up(eye, s).dense())
    other = sketch.fit(g, sketch.init(g, seed=4), True)
    assert not torch.equal(sketch.up(eye, other).dense(), draws[0])


@pytest.mark.parametrize("rule, rank", [(apollo(rank=8), 8), (apollo_mini(), 1)], ids=["apollo", "mini"])
def test_apollo_holds_two_moments_and_numbers(rule, rank):
    """Two moments of rank rows, norm and drift; height, seed, draw, clock, fits and step: nothing grows with m."""
    p = nn.Parameter(torch.ones(40, 24))
    p.grad = torch.ones(40, 24)
    opt = Optim([("w", p)], rule, lr=1e-2)
    opt.step()
    assert opt.state_bytes() == 4 * (2 * rank * 40 + 2) + 8 * 6
    assert opt.report()[0]["rank"] == rank


# ---- DCT-AdamW


@pytest.mark.parametrize("size", [1, 2, 5, 64, 513])
def test_cosines_are_orthonormal_and_are_those_of_the_paper(size):
    d = cosines(size, torch.float64, CPU).mT
    assert_close(d @ d.mT, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    i, j = size - 1, size // 2
    want = math.sqrt((1 if i == 0 else 2) / size) * math.cos(math.pi * i * (2 * j + 1) / (2 * size))
    assert abs(d[i, j].item() - want) < 1e-12


@every_shape
def test_the_cosines_of_largest_energy_lose_least(shape):
    """|g - up(r)|^2 = |g|^2 - the chosen energies, and no other choice of two columns leaves less."""
    (g,) = gradients(shape, steps=1)
    subspace = Cosine(2, "l2")
    s = subspace.fit(g, subspace.init(g, 0), True)
    left = (g - subspace.up(subspace.down(g, s), s).dense()).square().sum()
    energy = (cosines(shape[0], torch.float64, CPU) @ g).square().sum(-1)
    assert_close(left, g.square().sum() - energy[s["index"]].sum())
    for pair in torch.combinations(torch.arange(shape[0])):
        assert left <= g.square().sum() - energy[pair].sum() + 1e-12


@every_shape
@pytest.mark.parametrize("carry", [keep, rotate], ids=repr)
def test_all_cosines_with_momentum_are_momentum(shape, carry):
    grads = gradients(shape)
    rule = dct_adamw(rank=1.0, carry=carry, rule=Momentum())
    for (d, _), (peer, _) in zip(steps(rule, grads), steps(Momentum(), grads), strict=True):
        assert_close(d, peer, rtol=0, atol=1e-12)


@pytest.mark.parametrize("degree", [1, 2])
def test_cosines_move_by_their_number_exactly(degree):
    """A kept number carries its row bit for bit, a new one starts at zero."""
    x = torch.rand(3, 4, dtype=torch.float64)
    old, new = torch.tensor([1, 3, 4]), torch.tensor([0, 1, 4])
    got = Cosine(3).move(x, {"index": old}, {"index": new}, degree)
    assert torch.equal(got, torch.stack([torch.zeros(4, dtype=torch.float64), x[0], x[2]]))


@every_shape
def test_fed_back_error_is_exactly_what_the_cosines_missed(shape):
    """up(r) + error = g + the error before."""
    grads = gradients(shape)
    before = torch.zeros(shape, dtype=torch.float64)
    for (d, s), g in zip(
        steps(dct_adamw(rank=2, rule=Sgd(), residual=ErrorFeedback()), grads), grads, strict=True
    ):
        error = short_first(s["residual.error"], shape)
        assert_close(d + error, g + before, rtol=0, atol=1e-13)
        before = error


def test_cosines_are_numbers_in_the_state():
    p = nn.Parameter(torch.ones(40, 24))
    p.grad = torch.ones(40, 24)
    opt = Optim([("w", p)], dct_adamw(rank=8), lr=1e-2)
    opt.step()
    # moments and drift; 8 numbers, height, clock, fits and step
    assert opt.state_bytes() == 4 * (2 * 8 * 40 + 1) + 8 * (8 + 4)


# ---- LDAdam


@every_shape
@pytest.mark.parametrize("rank", [1, 3])
def test_ldadam_conserves_the_first_moment(shape, rank):
    """q' mu' + (1 - b1) error' = b1 q mu + (1 - b1) (g + error), whatever the basis does."""
    grads = gradients(shape)
    flip = shape[0] > shape[1]
    mass, error = torch.zeros(2, *(shape[::-1] if flip else shape), dtype=torch.float64)
    for (_, s), g in zip(steps(ldadam(rank=rank), grads), grads, strict=True):
        given = 0.908 * mass + (1 - 0.908) * ((g.mT if flip else g) + error)
        mass, error = s["frame.q"] @ s["rule.mu"], s["residual.error"]
        assert_close(mass + (1 - 0.908) * error, given, rtol=0, atol=1e-12)


def test_ldadam_at_rank_one_is_adam_on_one_row():
    """One row has one direction: the basis is a sign, and nothing is ever lost."""
    grads = gradients((1, 7))
    for (d, s), (peer, _) in zip(steps(ldadam(), grads), steps(Adam(0.908, 0.99), grads), strict=True):
        assert_close(d, peer, rtol=0, atol=1e-12)
        assert s["residual.error"].abs().max() < 1e-12


@every_shape
def test_ldadam_at_full_rank_keeps_no_error_and_the_mean_of_adam(shape):
    grads = gradients(shape)
    flip = shape[0] > shape[1]
    for (_, s), (_, peer) in zip(steps(ldadam(rank=9), grads), steps(Adam(0.908, 0.99), grads), strict=True):
        assert s["residual.error"].abs().max() < 1e-12
        mean = s["frame.q"] @ s["rule.mu"]
        assert_close(mean.mT if flip else mean, peer["mu"], rtol=0, atol=1e-12)


@every_shape
def test_the_basis_of_ldadam_is_orthonormal_and_starts_at_the_gradients(shape):
    grads = gradients(shape)
    run = steps(ldadam(rank=2), grads)
    flip = shape[0] > shape[1]
    first = Span(2, "exact")
    x = grads[0].mT if flip else grads[0]
    q = first.fit(x, first.init(x, 0), True)["q"]
    assert_close(run[0][1]["frame.q"] @ run[0][1]["frame.q"].mT, q @ q.mT, rtol=0, atol=1e-12)
    for _, s in run:
        assert_close(s["frame.q"].mT @ s["frame.q"], torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-14)


def test_ldadam_without_interpolation_takes_a_power_step_on_the_gradient():
    grads = gradients((5, 7), steps=2)
    (_, one), (_, two) = steps(LowRankAdam(2, rho=0.0, error="dropped"), grads)
    want = torch.linalg.qr(grads[1] @ grads[1].mT @ one["frame.q"]).Q
    assert_close(two["frame.q"] @ two["frame.q"].mT, want @ want.mT, rtol=0, atol=1e-12)


def test_ldadam_without_error_holds_moments_and_a_basis():
    shape = (40, 24)
    rules = [ldadam(rank=8, error=error) for error in ("kept", "dropped")]
    kept, dropped = (storage_bytes(rule.init(torch.zeros(shape), 0).values()) for rule in rules)
    assert dropped == 4 * (2 * 8 * 40 + 8 * 24) and kept - dropped == 4 * 40 * 24
