"""A fused backward pass is the plain loop: at once bit for bit, deferred to rounding; the rest is refused."""

import inspect
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close

import subspan.methods.optimizers  # noqa: F401  (registers the presets)
from subspan.codec import Bf16
from subspan.methods import methods
from subspan.optim import (
    Adam,
    ErrorFeedback,
    Every,
    FusedBackward,
    Momentum,
    Optim,
    Projected,
    RandomLayers,
    Recipe,
    Rows,
    Sgd,
    Sign,
    Span,
    Spsa,
    Staggered,
    chain,
    rotate,
    stored,
)

SMALL = {"rank": 3, "every": 4}


def preset(name, **options):
    build = methods("optimizer")[name].build
    takes = inspect.signature(build).parameters
    return build(**{k: v for k, v in (SMALL | options).items() if k in takes})


SQUEEZED = {
    "galore": preset("galore"),
    "staggered": preset("galore", refresh=Staggered),
    "rows": Projected(Rows(0.5), Every(3), Adam(), side="long"),
    "rotate": Projected(Span(2, "exact"), Every(4, rotate), Momentum(), scale=0.5),
    "nested": Projected(Rows(4), Every(3), Projected(Span(2), Every(2), Momentum()), side="right"),
}
WHOLE = {
    "chain": chain(first=Momentum(0.5), then=Adam()),
    "stored": stored(Adam(), mu=Bf16()),
    "stored-galore": stored(preset("galore"), **{"frame.q": Bf16()}),
    "feedback": Projected(Span(2), Every(2), Sgd(), ErrorFeedback(0.5)),
    "sign": Projected(Span(2), Every(3), Adam(), Sign(0.5)),
}
PRESETS = {f"preset-{name}": preset(name) for name in methods("optimizer")}
ALL = {name: rule for name, rule in PRESETS.items() if not isinstance(rule, Recipe)} | SQUEEZED | WHOLE
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


class Net(nn.Module):
    """Every kind of parameter: a table, a tall and a wide matrix, a bias, a norm, and a head that may be tied."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.norm(self.down(torch.relu(self.up(self.embed(ids))))))


def net(dtype=torch.float64, tied=False):
    torch.manual_seed(0)
    return Net(tied).to(dtype)


def loss_of(model, t, rows=slice(None)):
    ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(t))
    labels = ids.roll(1, 0)
    return nn.functional.cross_entropy(model(ids[rows]).flatten(0, 1).double(), labels[rows].flatten())


def optimizer(model, rule, **options):
    return Optim(model.named_parameters(), rule, **({"lr": 1e-2, "weight_decay": 0.1, "seed": 7} | options))


def true_norm(model):
    return torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()


def plain(model, opt, steps, accumulate=1, clip=None):
    """The plain loop; the norms of its gradients."""
    norms = []
    for t in steps:
        opt.zero_grad()
        for i in range(accumulate):
            (loss_of(model, 100 * t + i) / accumulate).backward()
        norms.append(true_norm(model))
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        opt.step()
    return torch.stack(norms)


def fuse(model, fused, steps):
    """The same with a fused backward pass; the norms that it says."""
    norms = []
    for t in steps:
        for i in range(fused.accumulate):
            (loss_of(model, 100 * t + i) / fused.accumulate).backward()
        fused.step()
        norms.append(fused.norm.clone())
    return torch.stack(norms)


def check_same_weights(one, two, **tolerance):
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert_close(p, q, **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m: f"{name}: {m}")


def held(model):
    return {name for name, p in model.named_parameters() if p.grad is not None}


# ---- at once


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ALL.values(), ids=ALL)
def test_at_once_is_the_plain_loop_bit_for_bit(rule, dtype):
    rounding = "stochastic" if dtype == torch.bfloat16 else "nearest"
    one, two = net(dtype), net(dtype)
    norms = plain(one, optimizer(one, rule, rounding=rounding), range(10))
    opt = optimizer(two, rule, rounding=rounding)
    fused = FusedBackward(opt)
    said = fuse(two, fused, range(10))
    check_same_weights(one, two)
    assert fused.norm_kind == "exact" and not fused.deferred
    rtol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
    assert_close(said.double(), norms, rtol=rtol, atol=0)
    assert opt.watch is False and [row["steps"] for row in opt.report()] == [10] * 7


def test_at_once_no_gradient_outlives_the_backward_pass():
    model = net()
    with FusedBackward(optimizer(model, preset("fira"))) as fused:
        before = {name: p.clone() for name, p in model.named_parameters()}
        alive = []
        for p in model.parameters():  # these hooks come after the fused ones
            p.register_post_accumulate_grad_hook(lambda _: alive.append(fused.held_bytes()))
        loss_of(model, 0).backward()
        assert alive == [0] * 7 and not held(model)
        assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
        fused.step()


def test_a_shared_parameter_steps_once_by_the_sum():
    one, two = net(tied=True), net(tied=True)
    norms = plain(one, optimizer(one, preset("galore")), range(6))
    said = fuse(two, FusedBackward(optimizer(two, preset("galore"))), range(6))
    check_same_weights(one, two)
    assert_close(said, norms, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "rule, accumulate", [(Adam(), 1), (preset("fira"), 1), (preset("galore"), 1), (preset("galore"), 2)], ids=str
)
def test_layers_fall_asleep_and_wake(rule, accumulate):
    models, drawn = [], set()
    for fuse_it in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6))).double()
        opt = optimizer(model, Recipe(rule, awake=RandomLayers(2, 3)))
        fused = FusedBackward(opt, accumulate=accumulate) if fuse_it else opt
        for t in range(12):
            for i in range(accumulate):
                x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * t + i), dtype=torch.float64)
                (model(x).square().mean() / accumulate).backward()
            drawn.add(opt.asleep)
            fused.step()
            opt.zero_grad()
        models.append(model)
    check_same_weights(*models, **({} if accumulate == 1 else TIGHT))
    assert len(drawn) == 4


# ---- deferred


@pytest.mark.parametrize("rule", SQUEEZED.values(), ids=SQUEEZED)
def test_accumulated_coordinates_are_accumulated_gradients(rule):
    one, two = net(), net()
    norms = plain(one, optimizer(one, rule), range(10), accumulate=4)
    fused = FusedBackward(optimizer(two, rule), accumulate=4)
    said = fuse(two, fused, range(10))
    check_same_weights(one, two, **TIGHT)
    assert fused.norm_kind == "projected"
    assert (said <= norms * (1 + 1e-12)).all() and (said < 0.999 * norms).any()


def test_half_precision_accumulates_coordinates_in_float32():
    model = net(torch.bfloat16)
    fused = FusedBackward(optimizer(model, preset("galore"), rounding="stochastic"), accumulate=2)
    fuse(model, fused, range(2))
    loss_of(model, 2).backward()
    kept = {slot.name: slot.r for slot in fused.slots if slot.r is not None}
    assert {name: r.dtype for name, r in kept.items()} == dict.fromkeys(
        ("up.weight", "down.weight"), torch.float32
    )


def test_between_refreshes_only_coordinates_are_kept():
    model = net()
    fused = FusedBackward(optimizer(model, preset("galore")), accumulate=2)
    rest = {"embed.weight", "up.bias", "norm.weight", "norm.bias", "lm_head.weight"}
    for t in range(1, 8):
        for i in range(2):
            loss_of(model, 10 * t + i).backward()
            due = {"up.weight", "down.weight"} if t in (1, 5) else set()
            assert held(model) == rest | due
            projected = 8 * (2 * 6 * 9 if due else 2 * 3 * 9)
            assert fused.held_bytes() == projected + 8 * (2 * 66 + 9 + 6 + 6)
        fused.step()
        assert not held(model) and fused.held_bytes() == 0


def test_staggered_refreshes_keep_few_gradients_whole_at_a_time():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(8))).double()
    rule = preset("galore", every=8, refresh=Staggered)
    fused = FusedBackward(optimizer(model, rule), accumulate=2)
    most = []
    for _ in range(17):
        for _ in range(2):
            model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
        most.append(len(held(model)))
        fused.step()
    assert most[0] == 8 and sum(most[1:9]) == sum(most[9:17]) == 8 and max(most[1:]) <= 4


@pytest.mark.parametrize("rule", SQUEEZED.values(), ids=SQUEEZED)
@pytest.mark.parametrize("clip", [0.3, 1e3])
def test_clipping_coordinates_by_the_exact_norm_is_clipping_gradients(rule, clip):
    one, two = net(), net()
    norms = plain(one, optimizer(one, rule), range(10), clip=clip)
    fused = FusedBackward(optimizer(two, rule), clip=clip)
    said = fuse(two, fused, range(10))
    check_same_weights(one, two, **TIGHT)
    assert fused.norm_kind == "exact"
    assert_close(said, norms, **TIGHT)
    assert bool((norms > 0.3).all())  # so that the small one clips


def test_the_projected_norm_is_exact_when_nothing_is_outside_the_frames():
    rule = Projected(Span(1.0), Every(4), Momentum(), scale=0.25)
    one, two = net(), net()
    norms = plain(one, optimizer(one, rule), range(8), accumulate=3, clip=0.2)
    fused = FusedBackward(optimizer(two, rule), accumulate=3, clip=0.2)
    said = fuse(two, fused, range(8))
    assert_close(said, norms, **TIGHT)
    check_same_weights(one, two, **TIGHT)


def test_the_projected_norm_is_that_of_what_was_kept():
    model = net()
    opt = optimizer(model, Projected(Span(2), Every(9), Sgd()))
    fused = FusedBackward(opt, accumulate=2, clip=1e-3)
    fuse(model, fused, [0])
    frames = {
        name: opt.state[p]["frame.q"].clone()
        for name, p in model.named_parameters()
        if p in opt.state and "frame.q" in opt.state[p]
    }
    twin = net()
    twin.load_state_dict(model.state_dict())
    for i in range(2):
        (loss_of(twin, 100 + i) / 2).backward()
    inside = {
        "up.weight": twin.up.weight.grad @ frames["up.weight"],
        "down.weight": frames["down.weight"].mT @ twin.down.weight.grad,
    }
    parts = [inside.get(name, p.grad).square().sum() for name, p in twin.named_parameters()]
    assert_close(fuse(model, fused, [1])[0], sum(parts).sqrt(), **TIGHT)


@pytest.mark.parametrize("rule", [preset("fira"), preset("adamw"), preset("galore"), WHOLE["chain"]], ids=repr)
def test_two_passes_clip_exactly_and_keep_no_gradient(rule):
    one, two = net(), net()
    norms = plain(one, optimizer(one, rule), range(6), clip=0.3)
    with FusedBackward(optimizer(two, rule), clip=0.3, passes=2) as fused:
        for t in range(6):
            before = two.up.weight.clone()
            with fused.measuring():
                loss_of(two, 100 * t).backward()
                assert not held(two) and torch.equal(two.up.weight, before)
            loss_of(two, 100 * t).backward()
            assert not held(two)
            fused.step()
            assert_close(fused.norm, norms[t], **TIGHT)
    check_same_weights(one, two, **TIGHT)


# ---- GradScaler


def scaled_run(model, opt, stepped, accumulate, clip=None):
    """Torch's loop with a scaler and an overflow at micro-step 3: scales, and whether weights moved, by step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    stepped = stepped(opt, scaler)
    scales, moved = [], []
    for t in range(8):
        before = [p.clone() for p in model.parameters()]
        for i in range(accumulate):
            blow = torch.inf if t * accumulate + i == 3 else 1.0
            scaler.scale(loss_of(model, 100 * t + i) / accumulate * blow).backward()
        if clip is not None and stepped is opt:
            scaler.unscale_(opt)
            clip_grad_norm_(model.parameters(), clip)
        scaler.step(stepped)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(any(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)))
        opt.zero_grad()
    return scales, moved


@pytest.mark.parametrize("accumulate, clip", [(1, None), (2, None), (1, 0.3)])
@pytest.mark.parametrize("rule", [SQUEEZED["galore"], SQUEEZED["rows"]], ids=["galore", "rows"])
def test_a_scaled_run_survives_an_overflow_like_the_plain_one(rule, accumulate, clip):
    one, two = net(), net()
    want = scaled_run(one, optimizer(one, rule), lambda opt, _: opt, accumulate, clip)
    got = scaled_run(
        two,
        optimizer(two, rule),
        lambda opt, scaler: FusedBackward(opt, accumulate=accumulate, scaler=scaler, clip=clip),
        accumulate,
    )
    assert got == want
    at = 3 // accumulate
    assert got[1] == [t != at for t in range(8)] and got[0][at] == got[0][at - 1] / 2
    check_same_weights(one, two, **TIGHT)


def test_an_overflow_outside_the_frame_is_seen():
    """The rows that the frame does not hold never reach the weights, but the scaler must know."""
    p = nn.Parameter(torch.ones(6, 8, dtype=torch.float64))
    opt = Optim([("w", p)], Projected(Rows(2), Every(9), Adam()), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    fused = FusedBackward(opt, scaler=scaler)
    for weight in (1.0, torch.inf):
        c = torch.ones(6, 8, dtype=torch.float64)
        if weight == torch.inf:
            outside = next(i for i in range(6) if i not in opt.state[p]["frame.index"].tolist())
            c[outside, 0] = weight
        before = p.clone()
        scaler.scale((p * c).sum()).backward()
        scaler.step(fused)
        scaler.update()
    assert scaler.get_scale() == 2.0 and torch.equal(p, before) and fused.held_bytes() == 0


def test_explicit_unscaling_is_not_done_twice():
    one, two = net(), net()
    plain(one, optimizer(one, SQUEEZED["galore"]), range(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fused = FusedBackward(optimizer(two, SQUEEZED["galore"]), scaler=scaler)
    for t in range(3):
        scaler.scale(loss_of(two, 100 * t)).backward()
        scaler.unscale_(fused)
        scaler.step(fused)
        scaler.update()
    check_same_weights(one, two, **TIGHT)


def test_a_disabled_scaler_changes_nothing():
    model = net()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    fused = FusedBackward(optimizer(model, preset("fira")), scaler=scaler)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(fused)
    assert not fused.deferred and not held(model)


# ---- what is refused


@dataclass(frozen=True)
class Slanted:
    """Coordinates in a frame that is not orthonormal."""

    span: Span = Span(2)
    orthonormal: ClassVar[bool] = False

    def init(self, g, seed):
        return self.span.init(g, seed)

    def fit(self, g, s, due):
        return self.span.fit(g, s, due)

    def down(self, g, s):
        return 2 * self.span.down(g, s)

    def up(self, x, s):
        return self.span.up(x / 2, s)

    def move(self, x, old, new, degree):
        return self.span.move(x, old, new, degree)


def scaler():
    return torch.amp.GradScaler("cpu")


@pytest.mark.parametrize(
    "rule, settings, message",
    [
        ("galore", {"accumulate": 0}, "accumulate=0 is less than 1"),
        ("galore", {"clip": 0.0}, "clip=0.0; use a finite norm above 0"),
        ("galore", {"clip": float("nan")}, "clip=nan"),
        ("galore", {"passes": 3}, "passes=3; use 1 or 2"),
        (
            "fira",
            {"accumulate": 2},
            "with accumulate=2 steps wait .*Projected.* needs every gradient whole.*use acc",
        ),
        ("frugal", {"clip": 1.0}, "with clip=1.0 steps wait .* use passes=2 to clip, or a rule like galore"),
        ("adamw", {"accumulate": 2, "scaler": scaler()}, r"accumulate=2 and scaler steps wait .* \(bfloat16\)"),
        ("galore", {"passes": 2}, "passes=2 cannot be combined with clip=None: the norm is exact in one pass"),
        ("galore", {"passes": 2, "clip": 1.0, "accumulate": 2}, "accumulate=2: the norm of a sum needs the whole"),
        ("galore", {"passes": 2, "clip": 1.0, "scaler": scaler()}, "passes=2 cannot be combined with scaler"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(rule, settings, message):
    with pytest.raises(ValueError, match=message):
        FusedBackward(optimizer(net(), preset(rule)), **settings)


@pytest.mark.parametrize("rule", WHOLE.values(), ids=WHOLE)
def test_rules_that_need_whole_gradients_cannot_accumulate_coordinates(rule):
    with pytest.raises(ValueError, match="needs every gradient whole, so none could be freed"):
        FusedBackward(optimizer(net(), rule), accumulate=2)


def test_what_has_no_matrix_to_project_saves_nothing():
    opt = Optim([("b", nn.Parameter(torch.ones(3)))], preset("galore"), lr=1.0)
    with pytest.raises(ValueError, match="no matrix is projected, so none could be freed"):
        FusedBackward(opt, accumulate=2)


def test_frames_that_are_not_orthonormal_have_no_norm_to_clip_a_sum_by():
    rule = Projected(Slanted(), Every(4), Momentum())
    with pytest.raises(ValueError, match="clip needs a norm, and coordinates in frames that are not orthonormal"):
        FusedBackward(optimizer(net(), rule), accumulate=2, clip=1.0)
    one, two = net(), net()
    plain(one, optimizer(one, rule), range(6), accumulate=2)
    fused = FusedBackward(optimizer(two, rule), accumulate=2)
    for t in range(6):
        for i in range(2):
            (loss_of(two, 100 * t + i) / 2).backward()
        fused.step()
    check_same_weights(one, two, **TIGHT)
    assert fused.norm is None and fused.norm_kind == "none"


def test_parameters_that_take_no_hook_are_refused_by_name():
    with pytest.raises(TypeError, match="steps subspan's Optim, not AdamW"):
        FusedBackward(torch.optim.AdamW(net().parameters()))
    with pytest.raises(ValueError, match=r"Spsa.* has no backward pass to hook into"):
        FusedBackward(optimizer(net(), Recipe(Sgd(), Spsa())))
    model = net()
    opt = optimizer(model, Adam())
    model.up.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"up\.bias gets no gradient"):
        FusedBackward(opt)
    model.up.bias.requires_grad_(True).grad = torch.ones(9, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"up\.bias has a gradient already"):
        FusedBackward(opt)


class Sharded(nn.Parameter):
    """Stands for a parameter of which this process holds a part."""


def test_a_sharded_parameter_is_refused():
    with pytest.raises(ValueError, match="w is a Sharded; a hook would see one shard"):
        FusedBackward(Optim([("w", Sharded(torch.ones(4, 4)))], preset("galore"), lr=1.0))


# ---- what is misused


def test_calls_in_the_wrong_order_are_errors():
    model = net()
    opt = optimizer(model, preset("galore"))
    fused = FusedBackward(opt, accumulate=2)
    with pytest.raises(RuntimeError, match=r"step\(\) found no gradient"):
        fused.step()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="after 1 of accumulate=2 backward passes"):
        fused.step()
    with pytest.raises(RuntimeError, match=r"opt\.step\(\) was called while FusedBackward holds"):
        opt.step()
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="one backward pass more than accumulate=2"):
        loss_of(model, 2).backward()
    with pytest.raises(RuntimeError, match=r"measuring\(\) is the first of two passes"), fused.measuring():
        pass
    with pytest.raises(RuntimeError, match=r"removed between backward\(\) and step\(\)"):
        fused.remove()
    plain(model, opt, [0])  # the hooks are gone
    assert not torch.equal(model.up.weight, net().up.weight)


@pytest.mark.parametrize(
    "touch",
    [
        lambda model, opt: opt.zero_grad(),
        lambda model, opt: opt.zero_grad(set_to_none=False),
        lambda model, opt: clip_grad_norm_(model.parameters(), 1.0),
    ],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_changing_the_gradients_that_are_left_is_an_error(touch, scaled):
    """Coordinates would not follow."""
    model, loops = net(), torch.amp.GradScaler("cpu", enabled=scaled)
    opt = optimizer(model, preset("galore"))
    fused = FusedBackward(opt, accumulate=2, scaler=loops)
    for t in range(2):
        for i in range(2):
            loops.scale(loss_of(model, 10 * t + i)).backward()
        if t:
            if scaled:
                loops.unscale_(fused)
            touch(model, opt)
            with pytest.raises(RuntimeError, match=r"embed\.weight: its gradient was changed after backward"):
                loops.step(fused)
        else:
            loops.step(fused)
            loops.update()
    fused.discard()
    loss_of(model, 20).backward()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="weight: its gradient was changed after backward"):
        loss_of(model, 21).backward()


def test_a_second_backward_at_once_is_an_error():
    model = net()
    FusedBackward(optimizer(model, preset("fira")))
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="one backward pass more than accumulate=1; call step"):
        loss_of(model, 1).backward()


def test_a_discarded_pass_leaves_no_trace():
    one, two = net(), net()
    plain(one, optimizer(one, preset("galore")), range(6), accumulate=2)
    fused = FusedBackward(optimizer(two, preset("galore")), accumulate=2)
    for t in range(6):
        loss_of(two, 7777 + t).backward()
        fused.discard()
        fuse(two, fused, [t])
    check_same_weights(one, two, **TIGHT)


def test_a_part_of_a_window_may_end_the_data():
    one, two = net(), net()
    plain(one, optimizer(one, preset("galore")), range(3))
    fused = FusedBackward(optimizer(two, preset("galore")), accumulate=4)
    for t in range(3):
        loss_of(two, 100 * t).backward()
        fused.step(partial=True)
    check_same_weights(one, two, **TIGHT)


def test_scaled_gradients_without_their_scaler_are_errors():
    model = net()
    told, untold = scaler(), scaler()
    fused = FusedBackward(optimizer(model, preset("galore")), scaler=told)
    told.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match=r"call scaler\.step\(fused\)"):
        fused.step()
    told.step(fused)
    fused.remove()
    fused = FusedBackward(optimizer(net(), preset("galore")))
    untold.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"knows of no scaler; construct it with scaler="):
        untold.step(fused)


def test_two_passes_must_come_both_and_alike():
    model = net()
    fused = FusedBackward(optimizer(model, preset("fira")), clip=1.0, passes=2)
    with pytest.raises(RuntimeError, match=r"the first backward\(\) goes inside `with fused\.measuring\(\):`"):
        loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="saw no backward pass"), fused.measuring():
        pass
    with pytest.raises(RuntimeError, match="one backward pass more"), fused.measuring():
        loss_of(model, 0).backward()
        loss_of(model, 0).backward()
    with fused.measuring():
        loss_of(model, 0).backward()
    (2 * loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match=r"two passes saw gradients of norm .* the weights have moved"):
        fused.step()


def test_two_on_one_optimizer_are_an_error():
    model = net()
    opt = optimizer(model, preset("fira"))
    first = FusedBackward(opt)
    FusedBackward(opt)
    with pytest.raises(RuntimeError, match="another hook has taken the gradient"):
        loss_of(model, 0).backward()
    first.discard()


def test_groups_that_change_afterwards_are_an_error():
    model = net()
    opt = optimizer(model, preset("galore"))
    fused = FusedBackward(opt)
    opt.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))], "role": "other"})
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="more parameters since FusedBackward was made"):
        fused.step()
    fused.discard()
    opt.param_groups = opt.param_groups[::-1]
    with pytest.raises(RuntimeError, match="is in another group than when"):
        loss_of(model, 0).backward()


# ---- nothing silent


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"clip": 1.0}], ids=str)
def test_a_parameter_whose_hook_never_fired_is_named(settings):
    model = net()
    model.extra = nn.Linear(4, 4, bias=False)
    fused = FusedBackward(optimizer(model, preset("galore")), **settings)
    with pytest.raises(RuntimeError, match=r"not moved: extra\.weight has no gradient\. Leave"):
        fuse(model, fused, [0])
    assert not torch.equal(model.up.weight, net().up.weight)  # those that could have moved
    fuse(model, fused, [1])  # it is said once


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}], ids=str)
def test_a_step_lost_to_rounding_is_an_error(settings):
    model = net(torch.bfloat16)
    fused = FusedBackward(optimizer(model, preset("galore"), lr=1e-5, weight_decay=0.0), **settings)
    with pytest.raises(RuntimeError, match=r"norm\.weight is torch\.bfloat16, too coarse for steps at lr 1e-05"):
        fuse(model, fused, [0])


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}], ids=str)
def test_no_reason_to_move_is_no_fault(settings):
    model = net()
    fused = FusedBackward(optimizer(model, preset("galore"), weight_decay=0.0), **settings)
    before = model.down.weight.clone()
    for t in range(fused.accumulate):
        (loss_of(model, t) + 0 * model.down.weight.sum()).backward(inputs=[model.up.weight])
        (model.down.weight * 0).sum().backward()
        (model.embed.weight.sum() + model.up.bias.sum() + model.norm.weight.sum()).backward()
        (model.norm.bias.sum() + model.lm_head.weight.sum()).backward()
    fused.step()
    assert torch.equal(model.down.weight, before) and not torch.equal(model.up.weight, net().up.weight)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"clip": 1.0}], ids=str)
def test_the_check_waits_for_a_learning_rate_and_knows_coordinates(settings):
    model = net()
    opt = optimizer(model, preset("galore"), lr=0.0)
    fused = FusedBackward(opt, **settings)
    fuse(model, fused, range(2))
    assert opt.watch
    for group in opt.param_groups:
        group["lr"] = 0.1
    fuse(model, fused, [2])
    assert not opt.watch


def test_a_refused_gradient_is_named_in_the_backward_pass():
    model = net()
    FusedBackward(optimizer(model, preset("galore")))
    with pytest.raises(ValueError, match=r"down\.weight: matrix of shape \(6, 9\) holds nan"):
        (loss_of(model, 0) * torch.nan).backward()


def test_a_schedule_sees_the_steps():
    one, two = net(), net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opts = [optimizer(model, preset("galore")) for model in (one, two)]
        schedules = [torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t) for opt in opts]
        fused = FusedBackward(opts[1], accumulate=2)
        for t in range(4):
            plain(one, opts[0], [t], accumulate=2)
            fuse(two, fused, [t])
            for schedule in schedules:
                schedule.step()
    check_same_weights(one, two, **TIGHT)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loaded_run_continues_under_a_standing_fusion(accumulate):
    straight, first, second = net(), net(), net()
    fuse(straight, FusedBackward(optimizer(straight, preset("galore")), accumulate=accumulate), range(9))
    opt = optimizer(first, preset("galore"))
    fuse(first, FusedBackward(opt, accumulate=accumulate), range(6))
    second.load_state_dict(first.state_dict())
    resumed = optimizer(second, preset("galore"), lr=5.0)
    fused = FusedBackward(resumed, accumulate=accumulate)
    resumed.load_state_dict(opt.state_dict())
    fuse(second, fused, range(6, 9))
    check_same_weights(straight, second)


# ---- several processes

RUNS = {
    "galore": (preset("galore"), {}),
    "fira": (preset("fira"), {}),
    "accumulate": (preset("galore"), {"accumulate": 2, "clip": 0.3}),
}


def worker(rank, folder):
    """One of two processes: each takes half of every batch."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    out = {}
    for name, (rule, settings) in RUNS.items():
        model = net()
        if rank:
            model.up.weight.data.zero_()  # rank 0's weights count
        fused = FusedBackward(optimizer(model, rule), group=dist.group.WORLD, **settings)
        norms, sent = [], []
        for t in range(10):
            for i in range(fused.accumulate):
                loss = loss_of(model, 100 * t + i, slice(2 * rank, 2 * rank + 2))
                (loss / fused.accumulate).backward()
            fused.step()
            norms.append(fused.norm)
            sent.append(fused.sent_bytes)
        out[name] = model.state_dict(), torch.stack(norms), sent, fused.whole_bytes, fused.norm_kind
        fused.remove()
    refused = ""
    try:
        FusedBackward(optimizer(net(), preset("galore"), seed=rank), group=dist.group.WORLD)
    except ValueError as error:
        refused = str(error)
    torch.save((out, refused), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    jobs = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=env) for rank in range(2)]
    try:
        codes = [job.wait(timeout=120) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert codes == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one_on_both_batches(ranks, name):
    rule, settings = RUNS[name]
    model = net()
    fused = FusedBackward(optimizer(model, rule), **settings)
    said = fuse(model, fused, range(10))
    for out, _ in ranks:
        weights, norms, _, _, kind = out[name]
        for key, p in model.state_dict().items():
            assert_close(weights[key], p, **TIGHT)
        assert kind == ("exact" if name == "fira" else "projected")
        if name == "galore":  # two processes know only the coordinates of the mean
            assert (norms <= said * (1 + 1e-12)).all()
        else:
            assert_close(norms, said, **TIGHT)
    for key in model.state_dict():
        assert torch.equal(ranks[0][0][name][0][key], ranks[1][0][name][0][key]), key


def test_coordinates_travel_instead_of_gradients(ranks):
    whole = 8 * (2 * 66 + 2 * 54 + 9 + 6 + 6)
    small = whole - 8 * 2 * 54 + 8 * 2 * 3 * 9
    for out, _ in ranks:
        for name in ("galore", "accumulate"):
            assert out[name][2] == [whole if t % 4 == 0 else small for t in range(10)]
        assert out["fira"][2] == [whole] * 10 == [out["fira"][3]] * 10


def test_ranks_that_are_not_alike_are_refused_on_each(ranks):
    assert [refused for _, refused in ranks] == [ranks[0][1]] * 2
    assert "ranks differ in seed: [0, 1]" in ranks[0][1]


def test_what_a_group_cannot_be_combined_with_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for settings, message in (
            ({"scaler": scaler()}, "scaler and group cannot be combined, since ranks could disagree"),
            ({"clip": 1.0, "passes": 2}, "group: each rank would measure its own gradient"),
        ):
            with pytest.raises(ValueError, match=message):
                FusedBackward(optimizer(net(), preset("galore")), group=dist.group.WORLD, **settings)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
