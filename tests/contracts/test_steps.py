"""What torch's optimizers can do ours can: groups, schedules, climbing; and a step is small in memory."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan.codec import Bf16
from subspan.methods import build
from subspan.optim import (
    Adam,
    ErrorFeedback,
    Every,
    Momentum,
    Optim,
    Projected,
    Rows,
    Sgd,
    Span,
    Staggered,
    chain,
    stored,
)
from subspan.optim.meter import Peak


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def two(make, *, steps=6, before=lambda opt, t: None):
    """Weights (6, 4) and bias (6,) after some steps on fixed gradients."""
    params = {"layers.0.weight": nn.Parameter(noise(6, 4)), "layers.0.bias": nn.Parameter(noise(6, seed=1))}
    opt = make(params)
    for t in range(steps):
        before(opt, t)
        for i, p in enumerate(params.values()):
            p.grad = noise(*p.shape, seed=10 * t + i + 2)
        opt.step()
    return [p.detach() for p in params.values()]


def check_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_maximize_is_torchs(weight_decay):
    settings = {"lr": 0.03, "maximize": True, "weight_decay": weight_decay}
    for rule in (Adam(), chain(plain=Adam()), Projected(Rows(1.0), Staggered(100), Adam())):
        check_equal(
            two(lambda named, rule=rule: Optim(named.items(), rule, **settings)),
            two(lambda named: torch.optim.AdamW(named.values(), **settings)),
        )


def test_groups_have_settings_of_their_own():
    def ours(named):
        (weight, bias) = named.items()
        opt = Optim([weight], Adam(), lr=0.03, weight_decay=0.5)
        opt.add_param_group({"params": [bias], "role": "other", "lr": 0.01, "weight_decay": 0.0})
        return opt

    def theirs(named):
        weight, bias = named.values()
        opt = torch.optim.AdamW([weight], lr=0.03, weight_decay=0.5)
        opt.add_param_group({"params": [bias], "lr": 0.01, "weight_decay": 0.0})
        return opt

    check_equal(two(ours), two(theirs))


def test_a_tensor_rate_is_read_at_every_step():
    def halve(opt, t):
        for group in opt.param_groups:
            group["lr"] *= 0.5

    ours = two(
        lambda named: Optim(named.items(), Adam(), lr=torch.tensor(0.04, dtype=torch.float64)), before=halve
    )
    theirs = two(lambda named: torch.optim.AdamW(named.values(), lr=0.04, weight_decay=0.0), before=halve)
    check_equal(ours, theirs)


def test_schedulers_drive_every_group():
    def scheduled(make):
        def with_schedule(named):
            opt = make(named)
            opt.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 6)
            return opt

        return two(with_schedule, before=lambda opt, t: opt.schedule.step() if t else None)

    check_equal(
        scheduled(lambda named: Optim(named.items(), Adam(), lr=0.03)),
        scheduled(lambda named: torch.optim.AdamW(named.values(), lr=0.03, weight_decay=0.0)),
    )


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_leaves_nothing_behind(set_to_none):
    p = nn.Parameter(noise(6, 4))
    opt = Optim([("w", p)], Momentum(), lr=0.1)
    p.grad = noise(6, 4, seed=1)
    opt.step()
    opt.zero_grad(set_to_none=set_to_none)
    assert p.grad is None if set_to_none else not p.grad.any()
    (p * noise(6, 4, seed=2)).sum().backward()
    assert torch.equal(p.grad, noise(6, 4, seed=2))


METHODS = ("adamw", "galore", "fira", "frugal", "apollo", "apollo_mini")


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_step_holds_at_most_two_matrices_beside_state(method):
    """Beside weights, gradients and state, a step that fits no frame needs less than 2 x the largest matrix."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 64), (172, 64), (64, 172)] * 3 + [(1000, 64)]
    named = {f"layers.{i}.weight": nn.Parameter(torch.randn(s, generator=generator)) for i, s in enumerate(shapes)}
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=generator)
    opt = Optim(
        named.items(),
        build(method, "optimizer", **({} if method in ("adamw", "apollo_mini") else {"rank": 16})),
        lr=1e-3,
    )
    opt.step()
    with Peak() as peak:
        opt.step()
    assert peak.most <= 2 * max(p.nbytes for p in named.values())


@pytest.mark.parametrize(
    "rule",
    [build("dion", "optimizer", rank=3), stored(build("galore", "optimizer", rank=3), **{"frame.q": Bf16()})],
    ids=repr,
)
def test_a_report_looks_through_wrappers(rule):
    p = nn.Parameter(noise(6, 4))
    opt = Optim([("w", p)], rule, lr=0.1)
    p.grad = noise(6, 4, seed=1)
    opt.step()
    (row,) = opt.report()
    assert (row["rank"], row["refreshes"], row["drift"]) == (3, 1, 0.0)
    assert row["side"] == ("left" if "Power" in repr(rule) else "right")


def test_a_refused_gradient_leaves_the_fed_back_error_as_it_was():
    p = nn.Parameter(noise(6, 4))
    opt = Optim([("w", p)], Projected(Span(2), Every(1), Sgd(), ErrorFeedback()), lr=0.1)
    p.grad = noise(6, 4, seed=1)
    opt.step()
    error = opt.state[p]["residual.error"].clone()
    p.grad = torch.full_like(p, torch.nan)
    with pytest.raises(ValueError, match=r"w: matrix .* holds nan"):
        opt.step()
    assert torch.equal(opt.state[p]["residual.error"], error)


@pytest.mark.parametrize("method", ["apollo", "ldadam"])
def test_a_report_says_no_more_than_there_is(method):
    p = nn.Parameter(noise(6, 4))
    opt = Optim([("w", p)], build(method, "optimizer", rank=3), lr=0.1)
    for seed in (1, 2):
        p.grad = noise(6, 4, seed=seed)
        opt.step()
    (row,) = opt.report()
    assert (row["side"], row["rank"], row["drift"]) == ("right", 3, None)
