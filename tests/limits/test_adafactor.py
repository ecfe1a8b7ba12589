"""Second moments in less memory: factored ones are Adafactor's, and Adam in few bits stays near Adam."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan.codec import Factored
from subspan.methods.optimizers import adafactor, adam4bit, adam8bit
from subspan.optim import Adam, Clip, FixedDecay, Optim, RisingDecay, Rms, Sgd, chain, dense, stored

BITS = {8: adam8bit(), 4: adam4bit()}


def gradients(shape, steps=12, seed=0):
    return torch.randn(steps, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(make, grads, rate=None):
    """Weights after each step; `rate` gives the step size from the weight and t."""
    p = nn.Parameter(torch.ones_like(grads[0]))
    opt = make(p)
    trace = []
    for t, g in enumerate(grads, 1):
        p.grad = g.clone()
        if rate is not None:
            opt.param_groups[0]["lr"] = rate(p, t)
        opt.step()
        trace.append(p.detach().clone())
    return torch.stack(trace)


def ours(rule, lr=0.01):
    return lambda p: Optim([("w", p)], rule, lr=lr, where="w")


def directions(rule, grads):
    s, w = dict(rule.init(grads[0], 0)), torch.zeros_like(grads[0])
    return torch.stack([dense(rule.update(g, s, w, t)).clone() * rule.gain(s, t) for t, g in enumerate(grads, 1)])


@pytest.mark.parametrize("rule", [adafactor(), chain(rms=Rms(), clip=Clip())], ids=["factored", "whole"])
def test_adafactor_with_relative_steps_is_torchs(rule):
    """torch's step size is max(1e-3, rms(w)) min(lr, 1 / sqrt(t)); it factors matrices and not vectors."""
    grads = gradients((7, 5) if "Factored" in repr(rule) else (7,))

    def rate(p, t):
        return max(1e-3, float(p.detach().square().mean().sqrt())) * min(0.01, t**-0.5)

    peer = run(lambda p: torch.optim.Adafactor([p], lr=0.01, eps=(1e-30, 1e-3), weight_decay=0.0), grads)
    assert_close(run(ours(rule), grads, rate), peer, rtol=0, atol=1e-12)


def test_factors_are_exact_for_squares_of_rank_one():
    """Then the factored second moment is the whole one, and adafactor is its rule without factors."""
    pattern = torch.outer(gradients((7,), 1)[0], gradients((5,), 1, seed=1)[0])
    grads = pattern * gradients((1, 1), 12, seed=2)
    whole = chain(rms=Rms(), clip=Clip())
    assert_close(directions(adafactor(), grads), directions(whole, grads), rtol=1e-12, atol=0)
    other = gradients((7, 5))
    assert (directions(adafactor(), other) - directions(whole, other)).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(7, 5), (9,), (3, 4, 6)], ids=str)
@pytest.mark.parametrize("limit", [0.3, 1.0])
def test_no_step_is_longer_than_the_limit(shape, limit):
    """And a shorter one is left as it is."""
    grads = gradients(shape) * torch.tensor([0.01, 10.0] * 6, dtype=torch.float64).view(-1, *[1] * len(shape))
    axes = (-2, -1) if len(shape) > 1 else (-1,)
    rms = grads.square().mean(axes, keepdim=True).sqrt()
    clipped = directions(Clip(limit), grads)
    assert clipped.square().mean(axes).sqrt().max() <= limit * (1 + 1e-14)
    assert torch.equal(clipped[::2], grads[::2])
    assert_close(clipped[1::2], grads[1::2] * limit / rms[1::2], rtol=1e-14, atol=0)


def test_adafactors_steps_are_within_its_limit_and_reach_it():
    grads = gradients((7, 5)) * (1 + 0.9 * torch.sin(torch.arange(12.0).double()))[:, None, None]
    rms = directions(adafactor(clip=0.9), grads).square().mean((-2, -1)).sqrt()
    assert rms.max() <= 0.9 * (1 + 1e-14)
    assert 3 <= (rms > 0.9 * (1 - 1e-14)).sum() < 12


def test_the_first_step_of_a_rising_decay_is_the_sign():
    grads = gradients((7, 5), 1)
    assert_close(directions(Rms(), grads), grads.sign(), rtol=1e-14, atol=0)


def test_a_fixed_decay_is_adam_without_first_moment():
    """Both without eps; Adam's raw quotient has no correction of bias either."""
    grads = gradients((7, 5))
    raw = Adam(b1=0.0, b2=0.95, eps=0.0, eps_on="raw")
    gains = torch.tensor([raw.gain({}, t) for t in range(1, 13)], dtype=torch.float64)
    peer = directions(raw, grads) / gains[:, None, None]
    assert_close(directions(Rms(FixedDecay(0.95)), grads), peer, rtol=1e-12, atol=0)


def test_rising_decay_is_the_mean_at_power_one():
    """b = 1 - 1/t averages all squares alike."""
    grads = gradients((7, 5))
    mean = grads.square().cumsum(0) / torch.arange(1.0, 13).double()[:, None, None]
    assert_close(directions(Rms(RisingDecay(1.0)), grads), grads / mean.sqrt(), rtol=1e-12, atol=0)


def test_a_gradient_of_zeros_is_no_step():
    zeros = torch.zeros(3, 4, 6)
    assert torch.equal(directions(adafactor(), zeros), zeros)


def test_adafactor_keeps_a_row_and_a_column():
    p = nn.Parameter(torch.ones(40, 24))
    p.grad = torch.ones(40, 24)
    opt = ours(adafactor())(p)
    opt.step()
    assert opt.state_bytes() == 4 * (40 + 24) + 8  # and the step


@pytest.mark.parametrize(
    "bits, state", [(8, 2 * 64 * 512 + 2 * 64 * 2 * 4), (4, 64 * 512 + 64 * 4 * 4 + (64 + 512) * 4)]
)
def test_state_of_few_bits_is_counted_in_bytes(bits, state):
    """8: a byte a moment, a float32 for every 256. 4: half a byte, a float32 for every 128, and two maxima's."""
    p = nn.Parameter(torch.ones(64, 512))
    p.grad = torch.ones(64, 512)
    opt = ours(BITS[bits])(p)
    opt.step()
    assert opt.state_bytes() == state + 8


@pytest.mark.parametrize("bits", BITS)
def test_few_bits_are_near_adam_by_the_codes_error(bits):
    """Gradients of one size: the second moment is stored exactly, the first with at most half a gap of error.

    A stored mu is off by no more than delta absmax, delta being the half of the widest gap between levels. It is
    read once a step, so the error obeys e_t <= b1 (e_{t-1} + delta absmax_{t-1}), and so does the step's times c1.
    """
    rule, b1 = BITS[bits], 0.9
    codec = dict(rule.codecs)["mu"]
    levels = torch.tensor((-1.0, *codec.levels), dtype=torch.float64)  # -1 is nearest to the lowest
    delta = max(float(levels.diff()[1:].max()) / 2, float(levels[1] + 1))
    grads = gradients((4, 300), steps=40).sign()
    few, full = directions(rule, grads), directions(Adam(), grads)
    bound, most = 0.0, 0.0
    for t, (a, b) in enumerate(zip(few, full, strict=True), 1):
        c1 = 1 - b1**t
        error = float((a - b).abs().max())
        assert error * c1 <= bound * (1 + 1e-6) + 1e-12
        most = max(most, error)
        bound = b1 * (bound + delta * float(a.abs().max()) * c1)
    assert most > delta / 10


def test_adam_whose_moments_need_no_rounding_is_adam():
    """One entry a row is its own largest: positive means and all squares are stored exactly, up to the cast."""
    grads = gradients((9, 1)).abs()
    exact = run(ours(chain(unfused=Adam())), grads)
    for rule in BITS.values():
        assert_close(run(ours(rule), grads), exact, rtol=0, atol=1e-12)


def test_clipping_a_factored_adam_is_a_chain():
    grads = gradients((7, 5))
    rule = chain(adam=stored(Adam(), nu=Factored()), clip=Clip(math.inf), plain=Sgd())
    assert torch.equal(directions(rule, grads), directions(stored(Adam(), nu=Factored()), grads))
