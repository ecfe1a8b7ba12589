"""Orthogonal steps: what Muon and Dion keep exactly, and what they are at an extreme setting."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan import linalg
from subspan.methods.optimizers import dion, muon
from subspan.optim import (
    ErrorFeedback,
    Every,
    Momentum,
    Nesterov,
    Optim,
    Polar,
    Power,
    Projected,
    Sgd,
    ShapeScale,
    Span,
    UnitRows,
    chain,
    dense,
    rotate,
)

SHAPES = [(7, 5), (5, 7), (6, 6), (12, 3)]
TALL = {(7, 5): math.sqrt(1.4), (5, 7): 1.0, (6, 6): 1.0, (12, 3): 2.0}
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def gradients(shape, steps=8, seed=0):
    return torch.randn(steps, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def steps(rule, grads, seed=0):
    """gain * update at each step, and the state after it."""
    s, w, out = dict(rule.init(grads[0], seed)), torch.zeros_like(grads[0]), []
    for t, g in enumerate(grads, 1):
        d = dense(rule.update(g, s, w, t))
        out.append((d * rule.gain(s, t), {k: v.clone() for k, v in s.items()}))
    return out


def directions(rule, grads):
    return torch.stack([d for d, _ in steps(rule, grads)])


@every_shape
def test_exact_muon_steps_have_one_singular_value(shape):
    """Each is the factor of the shape, whatever the gradients."""
    for d in directions(muon(solver="exact"), gradients(shape) * 1e-3):
        s = torch.linalg.svdvals(d)
        assert_close(s, torch.full_like(s, TALL[shape]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("by, want", [("tall", 2.0), ("ratio", 2.0), ("adam", 0.2 * math.sqrt(12))])
def test_a_shape_scales_the_step(by, want):
    grads = gradients((12, 3))
    assert_close(directions(chain(shape=ShapeScale(by), d=Sgd()), grads), want * grads, rtol=1e-14, atol=0)


def test_orthogonal_steps_by_adams_size_have_root_mean_square_a_fifth():
    """A semi-orthogonal (m, n) matrix has squares that add up to min(m, n), so its rms is 1 / sqrt(max(m, n))."""
    for shape in SHAPES:
        d = directions(muon(solver="exact", scale=ShapeScale("adam")), gradients(shape))
        rms = d.square().mean((-2, -1)).sqrt()
        assert_close(rms, torch.full_like(rms, 0.2), rtol=1e-12, atol=0)


@every_shape
@pytest.mark.parametrize("solver", ["products", "exact"])
def test_muon_in_a_full_orthonormal_frame_is_muon(shape, solver):
    """polar(p^T x) = p^T polar(x) for orthogonal p, and a moment turned with the frame is the same moment."""
    grads = gradients(shape)
    link = chain(momentum=Nesterov(), polar=Polar(solver=solver))
    inside = Projected(Span(1.0, "exact"), Every(3, rotate), link)
    framed = chain(inside=inside, shape=ShapeScale("tall"))
    assert_close(directions(framed, grads), directions(muon(solver=solver), grads), rtol=0, atol=1e-8)


@pytest.mark.parametrize("factor", [1e8, 1e-8])
def test_muon_ignores_the_gradients_scale(factor):
    """Without eps exactly; with it as long as norms are far above it."""
    grads = gradients((7, 5))
    free = chain(momentum=Nesterov(), polar=Polar(eps=0.0))
    assert_close(directions(free, factor * grads), directions(free, grads), rtol=0, atol=1e-11)
    moved = (directions(muon(), 1e-8 * grads) - directions(muon(), grads)).abs().max()
    assert moved > 0.1


def test_muon_moves_no_weight_whose_gradient_is_zero():
    assert torch.equal(directions(muon(), torch.zeros(3, 4, 6)), torch.zeros(3, 4, 6))


@every_shape
def test_no_momentum_and_no_iteration_is_the_normalised_gradient(shape):
    grads = gradients(shape)
    rule = chain(momentum=Nesterov(0.0), polar=Polar(steps=0, eps=0.0))
    norm = grads.norm(dim=(-2, -1), keepdim=True)
    assert_close(directions(rule, grads), grads / norm, rtol=1e-14, atol=0)


def test_nesterov_is_torchs_up_to_the_averages_factor():
    """torch: buf <- mu buf + g, d = g + mu buf; ours is (1 - mu) times that."""
    grads, mu = gradients((7, 5)), 0.9
    trace = []
    for make in (
        lambda p: torch.optim.SGD([p], lr=0.01 * (1 - mu), momentum=mu, nesterov=True),
        lambda p: Optim([("w", p)], Nesterov(mu), lr=0.01),
    ):
        p = nn.Parameter(torch.zeros(7, 5, dtype=torch.float64))
        opt = make(p)
        for g in grads:
            p.grad = g.clone()
            opt.step()
        trace.append(p.detach())
    assert_close(*trace, rtol=0, atol=1e-15)


@every_shape
@pytest.mark.parametrize("side", ["left", "long"])
def test_dion_keeps_in_its_momentum_all_but_what_it_stepped(shape, side):
    """M + (1 - mu) p r = M_before + g, where the step is p with the rows of r made of length 1."""
    grads, mu = gradients(shape), 0.8
    turn = side == "long" and shape[0] < shape[1]
    before = torch.zeros_like(grads[0])
    for (d, s), g in zip(steps(dion(rank=3, mu=mu, side=side), grads), grads, strict=True):
        m = s["inside.residual.error"]
        m = m.mT if turn else m
        p, unit = s["inside.frame.p"], (d.mT if turn else d) * math.sqrt(shape[1] / shape[0])
        total = before + g
        r = p.mT @ (total.mT if turn else total)
        assert_close(p.mT @ p, torch.eye(3, dtype=torch.float64))
        assert_close(m + (1 - mu) * (p @ r).mT if turn else m + (1 - mu) * p @ r, total)
        lengths = r.norm(dim=-1, keepdim=True)
        assert_close(unit, p @ (r / (lengths + 1e-8)), rtol=0, atol=1e-12)
        assert_close((p.mT @ unit).norm(dim=-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
        before = m


@every_shape
def test_dion_of_full_rank_without_momentum_keeps_nothing(shape):
    _, s = steps(dion(rank=min(shape), mu=0.0, side="long"), gradients(shape))[-1]
    assert s["inside.residual.error"].abs().max() < 1e-13


@every_shape
def test_dion_of_full_rank_on_one_gradient_tends_to_exact_muon(shape):
    """Power steps on a constant matrix find its singular vectors, and unit rows of diag(s) vh are vh."""
    k = min(shape)
    u, v = (torch.linalg.qr(gradients((n, k), 1, seed=n)[0]).Q for n in shape)
    g = u @ torch.diag(3.0 ** -torch.arange(k, dtype=torch.float64)) @ v.mT
    d = directions(dion(rank=k), g.expand(20, *shape))[-1]  # each step shrinks the error 9 times
    assert_close(d, math.sqrt(shape[0] / shape[1]) * linalg.polar_exact(g), rtol=0, atol=1e-5)
    short = directions(dion(rank=k), g.expand(3, *shape))[-1]
    assert (d - short).abs().max() > 1e-4


def test_power_steps_with_error_feedback_are_powersgd():
    """What is stepped is p p^T (g + error), with p from the last coordinates, not unit, which span the same."""
    grads = gradients((7, 5))
    rule = Projected(Power(2), Every(1), Sgd(), ErrorFeedback(), side="left")
    q, error = rule.init(grads[0], 0)["frame.q"], torch.zeros(7, 5, dtype=torch.float64)
    for (d, _), g in zip(steps(rule, grads), grads, strict=True):
        total = g + error
        p = torch.linalg.qr(total @ q).Q
        q = total.mT @ p
        error = total - p @ q.mT
        assert_close(d, p @ q.mT, rtol=0, atol=1e-12)


def test_power_and_span_agree_while_the_gradient_stands_still():
    """Both then take q <- orth(g g^T q); from one start they are one basis, with momentum or without."""
    g = gradients((7, 5), 1)[0]
    power, span = Power(3), Span(3)
    s = power.fit(g, power.init(g, 0), True)
    other = {"q": s["p"], "seed": torch.tensor(0), "draw": torch.tensor(1)}
    for _ in range(5):
        s, other = power.fit(g, s, True), span.fit(g, other, True)
        assert_close(s["p"], other["q"], rtol=0, atol=1e-6)  # Span starts from q and a trace of noise


def test_a_full_power_frame_with_rotated_momentum_is_momentum():
    grads = gradients((7, 5))
    rule = Projected(Power(1.0), Every(2, rotate), Momentum())
    assert_close(directions(rule, grads), directions(Momentum(), grads), rtol=0, atol=1e-10)


def test_power_recovers_from_a_gradient_of_zeros():
    g = gradients((7, 2), 1)[0] @ gradients((2, 5), 1, seed=1)[0]
    power = Power(2)
    s = power.fit(torch.zeros_like(g), power.init(g, 0), True)
    assert_close(s["p"].mT @ s["p"], torch.eye(2, dtype=torch.float64))
    for _ in range(2):
        s = power.fit(g, s, True)
    assert_close(power.up(power.down(g, s), s).dense(), g)


def test_unit_rows_leave_a_row_of_zeros_alone():
    g = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    assert_close(directions(UnitRows(), g[None])[0], g / 5, rtol=0, atol=1e-8)
