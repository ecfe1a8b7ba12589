"""At an extreme setting an optimizer equals its simpler peer."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan.codec import Factored
from subspan.methods.optimizers import adamw, fira, frugal, galore
from subspan.optim import (
    Adam,
    ErrorFeedback,
    Every,
    Momentum,
    NormScale,
    Optim,
    Projected,
    Rows,
    Sgd,
    Sign,
    Span,
    chain,
    dense,
    keep,
    reset,
    rotate,
    stored,
)

NEVER = 10**9
SHAPES = [(7, 5), (5, 7), (6, 6)]
RAW = Adam(eps=1e-6, eps_on="raw")

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def gradients(shape, steps=12, seed=0):
    return torch.randn(steps, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(make, grads):
    """Weights after each step of an optimizer, from zero."""
    p = nn.Parameter(torch.ones_like(grads[0]))
    opt = make(p)
    trace = []
    for g in grads:
        p.grad = g.clone()
        opt.step()
        trace.append(p.detach().clone())
    return torch.stack(trace)


def ours(rule, *, lr=0.01, weight_decay=0.0):
    return lambda p: Optim([("w", p)], rule, lr=lr, weight_decay=weight_decay)


def steps(rule, grads):
    """gain * update at each step, and the state after it."""
    s, w, out = dict(rule.init(grads[0], 0)), torch.zeros_like(grads[0]), []
    for t, g in enumerate(grads, 1):
        d = dense(rule.update(g, s, w, t))
        out.append((d * rule.gain(s, t), {k: v.clone() for k, v in s.items()}))
    return out


@every_shape
def test_adamw_is_torchs(shape):
    grads = gradients(shape)
    peer = run(lambda p: torch.optim.AdamW([p], lr=0.01, weight_decay=0.3, betas=(0.8, 0.95)), grads)
    assert_close(run(ours(adamw(b1=0.8, b2=0.95), weight_decay=0.3), grads), peer, rtol=0, atol=1e-12)


def test_momentum_is_torchs():
    grads = gradients((7, 5))
    peer = run(lambda p: torch.optim.SGD([p], lr=0.01, momentum=0.9), grads)
    assert_close(run(ours(Momentum(0.9)), grads), peer, rtol=0, atol=1e-12)


def test_the_two_places_of_epsilon_differ_by_the_root_of_the_correction():
    """raw with eps * sqrt(1 - b2^t) is corrected with eps, at every t."""
    grads = gradients((7, 5), steps=1)
    eps = 1e-2
    corrected = steps(Adam(eps=eps), grads)[0][0]
    raw = steps(Adam(eps=eps * math.sqrt(1 - 0.999), eps_on="raw"), grads)[0][0]
    assert_close(raw, corrected, rtol=1e-12, atol=0)
    assert (steps(Adam(eps=eps, eps_on="raw"), grads)[0][0] - corrected).abs().max() > 1e-3


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_fused_kernel_is_the_rule(maximize, weight_decay):
    """Both are elementwise; they may only round apart, by a few units in the last place of w and of the step."""
    grads = gradients((7, 5))
    kernel, plain = (
        run(lambda p: Optim([("w", p)], rule, lr=0.01, weight_decay=weight_decay, maximize=maximize), grads)
        for rule in (Adam(), chain(unfused=Adam()))
    )
    assert_close(kernel, plain, rtol=0, atol=1e-14)


@every_shape
@pytest.mark.parametrize("carry", [keep, rotate], ids=repr)
def test_all_rows_never_refreshed_are_adam(shape, carry):
    grads = gradients(shape)
    projected = run(ours(Projected(Rows(1.0), Every(NEVER, carry), Adam())), grads)
    assert torch.equal(projected, run(ours(chain(unfused=Adam())), grads))


@every_shape
def test_all_rows_refreshed_with_rotate_are_adam(shape):
    grads = gradients(shape)
    projected = run(ours(Projected(Rows(1.0), Every(3, rotate), Adam())), grads)
    assert torch.equal(projected, run(ours(chain(unfused=Adam())), grads))


@every_shape
@pytest.mark.parametrize("solver", ["exact", "gram", "random"])
def test_a_full_span_with_rotated_momentum_is_momentum(shape, solver):
    grads = gradients(shape)
    rule = Projected(Span(1.0, solver), Every(3, rotate), Momentum())
    assert_close(run(ours(rule), grads), run(ours(Momentum()), grads), rtol=0, atol=1e-10)


def test_a_full_span_with_kept_momentum_is_not():
    """What `rotate` is for: the limit above fails without it."""
    grads = gradients((7, 5))
    rule = Projected(Span(1.0), Every(3, keep), Momentum())
    assert (run(ours(rule), grads) - run(ours(Momentum()), grads)).abs().max() > 1e-3


@pytest.mark.parametrize("side, rank", [("left", 7), ("right", 5), ("short", 5)])
def test_every_side_of_full_rank_is_the_identity(side, rank):
    grads = gradients((7, 5))
    rule = Projected(Rows(rank), Every(2), Sgd(), side=side, scale=0.5)
    assert_close(run(ours(rule), grads), run(ours(Sgd(), lr=0.005), grads), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape, short", [((7, 5), "right"), ((5, 7), "left"), ((6, 6), "right")])
def test_short_and_long_name_a_side(shape, short):
    grads = gradients(shape)
    long = {"left": "right", "right": "left"}[short]
    for name, side in (("short", short), ("long", long)):
        rules = [Projected(Span(2), Every(2), RAW, side=s) for s in (name, side)]
        assert torch.equal(run(ours(rules[0]), grads), run(ours(rules[1]), grads))


def test_the_right_side_is_the_left_of_the_transpose():
    grads = gradients((7, 5))
    right = run(ours(Projected(Span(2), Every(2, rotate), Adam(), NormScale(), side="right")), grads)
    left = run(ours(Projected(Span(2), Every(2, rotate), Adam(), NormScale(), side="left")), grads.mT.contiguous())
    assert_close(right, left.mT, rtol=0, atol=1e-12)


@every_shape
def test_galore_moves_in_rank_dimensions_between_refreshes(shape):
    trace = run(ours(galore(rank=2, every=4)), gradients(shape))
    for start in (0, 4):
        change = trace[start + 3] - trace[start]
        assert torch.linalg.matrix_rank(change, rtol=1e-10) == 2
    assert torch.linalg.matrix_rank(trace[7] - trace[3], rtol=1e-10) == 2
    assert torch.linalg.matrix_rank(trace[7] - trace[0], rtol=1e-10) == 4


@every_shape
def test_fira_at_full_rank_is_galore(shape):
    grads = gradients(shape)
    assert_close(
        run(ours(fira(rank=9, every=4)), grads), run(ours(galore(rank=9, every=4)), grads), rtol=0, atol=1e-10
    )


@every_shape
def test_fira_first_step_has_a_closed_form(shape):
    """At t = 1 and eps -> 0 Adam's answer is sign(r), so |d_j| = sqrt(rank) and phi_j = sqrt(rank) / |r_j|."""
    (g,) = gradients(shape, steps=1)
    x = g if shape[0] < shape[1] else g.mT
    u, _, _ = torch.linalg.svd(x, full_matrices=False)
    q = u[:, :2]
    r = q.T @ x
    want = 0.25 * q @ r.sign() + (x - q @ r) * (math.sqrt(2) / r.norm(dim=0))
    got = steps(fira(rank=2, solver="exact", rule=Adam(eps=1e-30, eps_on="raw")), g[None])[0][0]
    assert_close(got if shape[0] < shape[1] else got.mT, want, rtol=1e-6, atol=1e-8)


@every_shape
def test_firas_complement_is_orthogonal_to_the_basis_and_grows_slowly(shape):
    """Against GaLore, whose steps inside the subspace are Fira's own."""
    grads = gradients(shape) * (1 + 0.9 * torch.sin(torch.arange(12.0, dtype=torch.float64)))[:, None, None]
    both = zip(steps(fira(rank=2, every=4, limit=1.01), grads), steps(galore(rank=2, every=4), grads), strict=True)
    before, limited = math.inf, 0
    for t, ((whole, s), (inside, _)) in enumerate(both, 1):
        x = (whole - inside) / RAW.gain({}, t)
        q = s["frame.q"]
        assert_close(q.T @ (x if shape[0] < shape[1] else x.mT), torch.zeros(2, max(shape), dtype=x.dtype))
        assert x.norm() <= 1.01 * before * (1 + 1e-7)
        limited += bool(x.norm() > 1.009 * before)
        assert_close(s["residual.norm"], x.norm())
        before = x.norm()
    assert limited >= 2


def test_a_residual_without_limit_grows_freely():
    grads = gradients((7, 5)) * torch.tensor([1.0, 50.0] * 6, dtype=torch.float64)[:, None, None]
    rule = Projected(Span(2), Every(1), Sgd(), NormScale(None))
    (one, _), (two, s), *_ = steps(rule, grads)
    assert two.norm() > 20 * one.norm()
    assert "residual.norm" not in s


@every_shape
def test_a_complement_scaled_by_plain_descent_is_the_gradient(shape):
    """With rule = gradient phi is 1, so inside and outside add up to g (to the 1e-8 in phi's denominator)."""
    grads = gradients(shape)
    rule = Projected(Span(2), Every(3), Sgd(), NormScale(None))
    for (d, _), g in zip(steps(rule, grads), grads, strict=True):
        assert_close(d, g, rtol=1e-6, atol=1e-7)


@every_shape
def test_frugal_with_all_rows_never_refreshed_is_adamw(shape):
    grads = gradients(shape)
    peer = run(lambda p: torch.optim.AdamW([p], lr=0.01, weight_decay=0.3), grads)
    rule = frugal(rank=1.0, every=NEVER)
    assert_close(run(ours(rule, weight_decay=0.3), grads), peer, rtol=0, atol=1e-12)


@every_shape
def test_frugal_is_adam_on_the_drawn_rows_and_sign_elsewhere(shape):
    """Inside one interval every row follows one of two programs written out here."""
    grads = gradients(shape, steps=4)
    short = 0 if shape[0] < shape[1] else 1
    adam, rows = steps(Adam(), grads), steps(frugal(rank=2, every=NEVER), grads)
    for (full, _), (ours_, s), g in zip(adam, rows, grads, strict=True):
        chosen = torch.zeros(shape[short], dtype=torch.bool)
        chosen[s["frame.index"]] = True
        mask = chosen[:, None] if short == 0 else chosen[None, :]
        assert torch.equal(ours_, torch.where(mask, full, g.sign()))


def test_reset_restarts_everything_at_a_refresh():
    """After a refresh the run is that of a new optimizer fed the remaining gradients (the frame is g's alone)."""
    grads = gradients((7, 5))
    rule = Projected(Span(2, "exact"), Every(4, reset), RAW, Sign())
    whole, rest = steps(rule, grads), steps(rule, grads[4:])
    for (a, _), (b, _) in zip(whole[4:], rest, strict=True):
        assert_close(a, b, rtol=0, atol=1e-14)


@every_shape
def test_error_feedback_loses_nothing(shape):
    """What was stepped and what is kept add up to every gradient given; at full rank nothing is kept."""
    grads = gradients(shape)
    total = torch.zeros(shape, dtype=torch.float64)
    given = torch.zeros(shape, dtype=torch.float64)
    for (d, s), g in zip(steps(Projected(Span(2), Every(1), Sgd(), ErrorFeedback()), grads), grads, strict=True):
        total, given = total + d, given + g
        error = s["residual.error"]
        assert_close(total + (error if shape[0] < shape[1] else error.mT), given)
    _, s = steps(Projected(Span(1.0), Every(1), Sgd(), ErrorFeedback()), grads)[-1]
    assert s["residual.error"].abs().max() < 1e-12


def test_one_link_is_the_link_and_plain_links_compose():
    grads = gradients((7, 5))
    assert torch.equal(run(ours(chain(only=RAW)), grads), run(ours(RAW), grads))
    twice = run(ours(chain(a=Momentum(0.0), b=RAW, c=Sgd())), grads)
    assert torch.equal(twice, run(ours(RAW), grads))


def test_factored_adam_is_adam_for_gradients_of_one_pattern():
    pattern = torch.outer(gradients((7,), 1)[0], gradients((5,), 1, seed=1)[0])
    grads = pattern * gradients((1, 1), 12, seed=2)
    assert_close(run(ours(stored(Adam(), nu=Factored())), grads), run(ours(Adam()), grads), rtol=0, atol=1e-12)


def test_factored_adam_has_adafactors_second_moment():
    """Row and column means as moving averages of their own, put together by outer product over the mean."""
    grads = gradients((7, 5))
    row, col, mean = torch.zeros(7).double(), torch.zeros(5).double(), torch.zeros(7, 5).double()
    for t, ((d, _), g) in enumerate(zip(steps(stored(Adam(), nu=Factored()), grads), grads, strict=True), 1):
        row = 0.999 * row + 0.001 * g.square().mean(1)
        col = 0.999 * col + 0.001 * g.square().mean(0)
        mean = 0.9 * mean + 0.1 * g
        nu = torch.outer(row, col) / row.mean() / (1 - 0.999**t)
        assert_close(d, mean / (1 - 0.9**t) / (nu.sqrt() + 1e-8), rtol=1e-11, atol=1e-11)


def test_rules_nest():
    """All rows of all rows, each at its own side, is no projection at all."""
    grads = gradients((7, 5))
    rule = Projected(Rows(1.0), Every(NEVER), Projected(Rows(1.0), Every(NEVER), RAW, side="left"), side="right")
    assert torch.equal(run(ours(rule), grads), run(ours(RAW), grads))
