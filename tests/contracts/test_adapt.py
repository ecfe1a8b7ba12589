"""Joins, their folding, and the adapter module: forward is F.linear with the folded weight, for every sequence."""

import copy
import dataclasses
import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from subspan.adapt import (
    Adapted,
    Adapter,
    Add,
    FromWeight,
    KeepBase,
    Rescale,
    SubtractInit,
    ZeroLowRank,
    adapt,
    merge,
    per_rank,
    row_norms,
    trainable,
)
from subspan.ops import Dense, Diag, LinOp, LowRank, Scaled

JOINS = {
    "add": Add(),
    "add-scaled": Add(-0.7),
    "rescale": Rescale(),
    "rescale-scaled": Rescale(2.5),
}
PAIRS = list(itertools.product(JOINS, repeat=2))
TRIPLES = list(itertools.product(["add-scaled", "rescale-scaled"], repeat=3))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def base(m: int = 6, n: int = 5, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(n, m, bias=bias, dtype=torch.float64)
    layer.weight.data.copy_(rand(m, n, seed=seed))
    if bias:
        layer.bias.data.copy_(rand(m, seed=seed + 1))
    return layer


def delta(seed: int = 10) -> LowRank:
    return LowRank(rand(6, 2, seed=seed).requires_grad_(), rand(2, 5, seed=seed + 1).requires_grad_())


def move(module: nn.Module, seed: int = 3) -> None:
    """Pretend to train: every trainable tensor changes."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.3 * rand(*p.shape, seed=seed).to(p.dtype))


def bound(name: str, w: torch.Tensor, op: LinOp):
    join = JOINS[name].at(w, op)
    if isinstance(join, nn.Module):
        move(join)
    return join


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", JOINS)
@pytest.mark.parametrize(
    "op", [delta(), Dense(rand(6, 5)), Scaled(delta(), 0.2), LowRank(rand(5, 1), rand(1, 6)).T], ids=repr
)
def test_forward_is_weight(name, op, bias):
    layer, x = base(bias=bias), rand(2, 3, 5, seed=7)
    join = bound(name, layer.weight, op)
    assert_close(join.forward(layer, op, x), F.linear(x, join.weight(layer.weight, op), layer.bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_every_ordered_pair_of_joins_folds(names, bias):
    layer, x = base(bias=bias), rand(4, 5, seed=7)
    adapted = Adapted(layer)
    adapted.add("a", delta(10), JOINS[names[0]])
    move(adapted, 3)
    adapted.add("b", delta(20), JOINS[names[1]])
    move(adapted, 4)
    assert_close(adapted(x), F.linear(x, adapted.weight, adapted.bias), rtol=0, atol=1e-12)
    one, two = adapted.slot("a"), adapted.slot("b")
    for first, second in ((one, two), (two, one)):
        adapted.active = tuple("a" if slot is one else "b" for slot in (first, second))
        folded = second.join.weight(first.join.weight(layer.weight, first.op), second.op)
        assert_close(adapted.weight, folded, rtol=0, atol=0)
        assert_close(adapted(x), F.linear(x, folded, adapted.bias), rtol=0, atol=1e-12)
        assert_close(merge(adapted)(x), adapted(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "names", list(itertools.product(["add-scaled", "rescale-scaled"], repeat=3)), ids="-".join
)
def test_gradients_flow_through_a_fold_as_through_its_weight(names):
    adapted, x = Adapted(base()), rand(4, 5, seed=7)
    for i, name in enumerate(names):
        adapted.add(f"a{i}", delta(10 * i), JOINS[name])
        move(adapted, i)
    tensors = [p for _, p in trainable(adapted)]
    probe = rand(4, 6, seed=8)
    shortcut = torch.autograd.grad((adapted(x) * probe).sum(), tensors)
    definition = torch.autograd.grad((F.linear(x, adapted.weight, adapted.bias) * probe).sum(), tensors)
    assert len(tensors) == 2 * len(names) + sum(name.startswith("rescale") for name in names)
    for one, two in zip(shortcut, definition, strict=True):
        assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_a_new_zero_adapter_on_top_changes_nothing(names):
    adapted, x = Adapted(base()), rand(4, 5, seed=7)
    adapted.add("a", delta(), JOINS[names[0]])
    move(adapted)
    before = adapted(x)
    adapted.add("b", ZeroLowRank(2)("b", adapted.weight), JOINS[names[1]])
    assert_close(adapted(x), before, rtol=0, atol=0)


def test_add_is_the_sum_and_binds_to_itself():
    w, op = rand(6, 5), delta()
    assert Add(3.0).at(w, op) == Add(3.0)
    assert_close(Add(3.0).weight(w, op), w + 3 * op.u @ op.v)
    assert torch.equal(Add(0.0).weight(w, op), w)


def test_rescale_of_untouched_magnitude_is_add():
    w, op = rand(6, 5), delta()
    assert torch.equal(Rescale(2.0).at(w, op).weight(w, op), Add(2.0).weight(w, op))


def test_rescaled_rows_have_length_mu_whatever_the_length_of_the_sum():
    w, op = rand(6, 5), Dense(rand(6, 5, seed=1))
    mu = torch.arange(1.0, 7.0).double()
    join = Rescale(2.0, mu)
    assert_close(join.weight(w, op).norm(dim=1), mu)
    stretch = rand(6, seed=4).abs() + 0.1
    stretched = Dense(op.w * stretch[:, None])
    assert_close(join.weight(w * stretch[:, None], stretched), join.weight(w, op))


def test_the_norm_of_rescale_carries_no_gradient():
    layer, op, x = base(), delta(), rand(4, 5, seed=7)
    join = bound("rescale-scaled", layer.weight, op)
    probe = rand(4, 6, seed=8)
    (join.forward(layer, op, x) * probe).sum().backward()
    total = layer.weight + 2.5 * op.u @ op.v
    norm = total.norm(dim=1).detach()
    g = probe.T @ x
    gained = (join.mu / norm)[:, None] * g
    assert_close(join.mu.grad, (g * total).sum(1) / norm)
    assert_close(join.mu.grad, (probe * (x @ total.T)).sum(0) / norm)
    assert_close(op.u.grad, 2.5 * gained @ op.v.T)
    assert_close(op.v.grad, 2.5 * op.u.T @ gained)


def test_a_row_of_zeros_stays_zero_and_still_trains():
    layer, x = base(), rand(4, 5, seed=7)
    layer.weight.data[2] = 0
    adapted = Adapted(layer)
    adapted.add("a", ZeroLowRank(2)("a", layer.weight), Rescale())
    assert torch.equal(adapted(x), layer(x))
    adapted(x).square().sum().backward()
    grads = [p.grad for _, p in trainable(adapted)]
    assert all(bool(torch.isfinite(g).all()) for g in grads)
    assert adapted.slot("a").op.u.grad[2].norm() > 0


def test_rescale_binds_once_and_refuses_to_work_unbound():
    w, op = rand(6, 5), delta()
    join = Rescale(2.0).at(w, op)
    assert join.at(2 * w, op) is join
    with pytest.raises(ValueError, match=r"Rescale\(scale=2\.0\) has no magnitude yet; bind it"):
        Rescale(2.0).weight(w, op)
    with pytest.raises(ValueError, match="bind it"):
        Rescale(2.0).forward(base(), op, rand(3, 5))


def test_one_rescale_setting_serves_many_sites_without_sharing_state():
    setting = Rescale()
    one, two = setting.at(rand(6, 5), delta()), setting.at(2 * rand(6, 5), delta())
    assert setting.mu is None and one.mu is not two.mu


@pytest.mark.parametrize("name", JOINS)
def test_remainder_is_what_a_fresh_join_turns_back_into_the_weight(name):
    w, op = rand(6, 5), delta()
    rest = JOINS[name].remainder(w, op)
    assert_close(JOINS[name].at(rest, op).weight(rest, op), w)


@pytest.mark.parametrize("op", [delta(), Dense(rand(6, 5)), Scaled(delta(), 0.2)], ids=repr)
def test_row_norms_are_those_of_the_sum_without_gradient(op):
    w = rand(6, 5).requires_grad_()
    norms = row_norms(w, op, 1.5)
    assert_close(norms, (w + 1.5 * op.dense()).norm(dim=1))
    assert not norms.requires_grad
    assert_close(row_norms(w.bfloat16(), op, 0.0), w.bfloat16().float().norm(dim=1), check_dtype=False)


def test_per_rank_scales():
    assert per_rank(12.0, 4) == 3.0
    assert per_rank(12.0, 4, 0.5) == 6.0
    for alpha, rank in ((1.0, 0), (0.0, 4), (-1.0, 4), (float("nan"), 4), (float("inf"), 4)):
        with pytest.raises(ValueError, match=f"alpha {alpha} and rank {rank} must both be positive"):
            per_rank(alpha, rank)


def test_an_adapter_is_a_value_that_prints_itself():
    adapter = Adapter(FromWeight(4, scale=2.0), Add(2.0), SubtractInit())
    text = repr(adapter)
    assert eval(text) == adapter
    assert eval(repr(Adapter(ZeroLowRank(2), Rescale(0.5)))).join.scale == 0.5
    assert not re.search(r"0x[0-9a-f]+|function", repr(Adapter(ZeroLowRank(2), Rescale(0.5))))
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.base = KeepBase()


def test_subtract_leaves_the_remainder_and_the_original_alone():
    layer, x = base(), rand(4, 5, seed=7)
    before = copy.deepcopy(layer)
    adapted = Adapted(layer)
    adapted.add("a", op := delta(), Add(0.5), SubtractInit())
    assert_close(adapted.base.weight, before.weight - 0.5 * op.dense())
    assert_close(adapted(x), before(x), rtol=0, atol=1e-12)
    assert torch.equal(layer.weight, before.weight) and adapted.base is not layer
    assert not any(p.requires_grad for p in adapted.base.parameters())


def test_the_given_layer_keeps_training_and_its_frozen_double_shares_its_storage():
    layer, x = base(), rand(4, 5, seed=7)
    adapted = adapt(Adapter(ZeroLowRank(2), Add()))("site", layer)
    assert all(p.requires_grad for p in layer.parameters())
    assert not any(p.requires_grad for p in adapted.base.parameters())
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.add_(1)
    assert torch.equal(adapted(x), layer(x))
    assert Adapted(layer.requires_grad_(False)).base is layer


def test_subtract_on_top_of_another_adapter_is_refused_and_changes_nothing():
    adapted, x = Adapted(base()), rand(4, 5, seed=7)
    adapted.add("a", delta(), Rescale())
    before, keys = adapted(x), list(adapted.state_dict())
    with pytest.raises(ValueError, match=r"'b': SubtractInit\(\) changes the base under a"):
        adapted.add("b", delta(20), Add(), SubtractInit())
    assert torch.equal(adapted(x), before)
    assert list(adapted.state_dict()) == keys and adapted.active == ("a",)


@pytest.mark.parametrize(
    ("name", "match"),
    [("a", "'a' is already there"), ("a.b", "such as 'a_b_adapter'"), ("", "empty"), ("train", "torch uses")],
)
def test_bad_adapter_names_are_refused(name, match):
    adapted = Adapted(base())
    adapted.add("a", delta(), Add())
    with pytest.raises(ValueError, match=match):
        adapted.add(name, delta(), Add())
    assert list(adapted.adapters) == ["a"]


def test_an_op_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"'a': the op is \(5, 5\), the layer \(6, 5\)"):
        Adapted(base()).add("a", Diag(rand(5)), Add())


def test_active_chooses_and_orders_and_refuses_unknown_names():
    layer, x = base(), rand(4, 5, seed=7)
    adapted = Adapted(layer)
    adapted.add("a", delta(), Add())
    adapted.add("b", delta(20), Rescale())
    assert adapted.active == ("a", "b")
    adapted.active = ()
    assert torch.equal(adapted(x), layer(x)) and torch.equal(adapted.weight, layer.weight)
    adapted.active = ("b",)
    with pytest.raises(ValueError, match="no adapter 'c'; there are: a, b"):
        adapted.active = ("a", "c")
    with pytest.raises(ValueError, match="lists an adapter twice"):
        adapted.active = ("a", "a")
    assert adapted.active == ("b",)
    with pytest.raises(ValueError, match="none at all"):
        Adapted(base()).slot("a")


def test_adapting_twice_stacks_on_a_new_module_and_leaves_the_old_one_as_it_was():
    layer, x = base(), rand(4, 5, seed=7)
    one = adapt(Adapter(ZeroLowRank(2), Rescale()), "one")("site", layer)
    move(one)
    before = one(x)
    two = adapt(Adapter(FromWeight(2), Add()), "two")("site", one)
    assert two.base is one.base and two.slot("one") is one.slot("one")
    assert (one.active, two.active) == (("one",), ("one", "two"))
    assert torch.equal(one(x), before)
    assert_close(two.slot("two").op.dense(), FromWeight(2)("site", one.weight).dense())


def test_adapt_names_the_site_in_its_errors():
    make = adapt(Adapter(ZeroLowRank(2), Add()))
    with pytest.raises(TypeError, match=r"layers\.0\.norm: cannot adapt LayerNorm"):
        make("layers.0.norm", nn.LayerNorm(4))
    with pytest.raises(TypeError, match="embed: cannot adapt Embedding"):
        make("embed", nn.Embedding(4, 4, max_norm=1.0))
    with pytest.raises(ValueError, match=r"layers\.1: adapter 'default' is already there"):
        make("layers.1", make("layers.1", base()))
    with pytest.raises(ValueError, match=r"layers\.1: rank 9"):
        adapt(Adapter(ZeroLowRank(9), Add()))("layers.1", base())


@pytest.mark.parametrize("bias", [True, False])
def test_merge_makes_a_plain_layer_and_never_touches_the_adapted_one(bias):
    layer, x = base(bias=bias), rand(4, 5, seed=7)
    adapted = Adapted(layer)
    adapted.add("a", delta(), Rescale())
    move(adapted)
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    merged = merge(adapted.eval())
    assert type(merged) is nn.Linear and not merged.training
    assert_close(merged(x), adapted(x), rtol=0, atol=1e-12)
    assert all(p.requires_grad for p in merged.parameters())
    with torch.no_grad():
        for p in merged.parameters():
            p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())
    adapted.active = ()
    assert torch.equal(merge(adapted).weight, layer.weight)
    assert merge(adapted).weight.data_ptr() != layer.weight.data_ptr()


def test_merge_refuses_anything_else():
    with pytest.raises(TypeError, match="cannot merge Linear"):
        merge(base())


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merge_is_the_float32_sum_cast_once(dtype, factors):
    layer = base(64, 48).to(dtype)
    op = LowRank(0.02 * rand(64, 4).to(factors), rand(4, 48, seed=1).to(factors))
    adapted = Adapted(layer)
    adapted.add("a", op, Add(0.5))
    once = (layer.weight.float() + 0.5 * (op.u.float() @ op.v.float())).to(dtype)
    assert torch.equal(merge(adapted).weight, once)
    adapted.add("b", op, Add(0.25))
    twice = layer.weight.float() + 0.5 * (op.u.float() @ op.v.float())
    twice = (twice + 0.25 * (op.u.float() @ op.v.float())).to(dtype)
    assert torch.equal(merge(adapted).weight, twice)


@pytest.mark.parametrize("name", JOINS)
def test_half_precision_layers_get_float32_factors_and_start_exactly_at_the_base(name):
    layer, x = base(64, 48).bfloat16(), rand(4, 48, seed=7).bfloat16()
    adapted = adapt(Adapter(ZeroLowRank(4), JOINS[name]))("site", layer)
    assert {p.dtype for _, p in trainable(adapted)} == {torch.float32}
    assert torch.equal(adapted(x), layer(x))
    assert adapted(x).dtype == adapted.weight.dtype == torch.bfloat16
    assert torch.equal(adapted.weight, layer.weight)
    move(adapted)
    exact = x.double() @ adapted.folded(adapted.active).weight.double().T + layer.bias.double()
    assert_close(adapted(x).double(), exact, rtol=0, atol=2**-7 * exact.abs().max().item())


def test_trainable_lists_adapter_tensors_by_their_names_in_the_model():
    model = nn.Sequential(base(5, 5), nn.ReLU(), base(6, 5))
    with pytest.raises(ValueError, match="Sequential has 0 adapters"):
        trainable(model)
    model[2] = adapt(Adapter(ZeroLowRank(2), Rescale()), "a")("2", model[2])
    op = LowRank(nn.Parameter(rand(6, 1)), rand(1, 5))
    model[2].add("b", op, Add())
    names = [name for name, _ in trainable(model)]
    assert names == [f"2.adapters.{k}" for k in ("a.op.u", "a.op.v", "a.join.mu", "b.op.u")]
    assert all(dict(model.named_parameters())[name] is p for name, p in trainable(model))
    assert [name for name, _ in trainable(model[2])] == [name.removeprefix("2.") for name in names]


def test_an_adapted_layer_copies_and_loads_its_state():
    x = rand(4, 5, seed=7)
    one = Adapted(base())
    one.add("a", delta(), Rescale(2.0))
    one.add("b", delta(20), Add())
    move(one)
    two = Adapted(base(seed=50))
    two.add("a", delta(30), Rescale(2.0))
    two.add("b", delta(40), Add())
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(x), one(x)) and torch.equal(copy.deepcopy(one)(x), one(x))
    assert set(one.state_dict()) == {"base.weight", "base.bias", "adapters.a.join.mu"} | {
        f"adapters.{name}.op.{key}" for name in "ab" for key in "uv"
    }
