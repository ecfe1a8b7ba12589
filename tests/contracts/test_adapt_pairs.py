"""Every pair of joins, on every kind of layer: the forward is that of the layer with the folded matrix."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from subspan.adapt import (
    Adapted,
    Adapter,
    Add,
    Rescale,
    Rotate,
    Routed,
    ZeroExperts,
    ZeroLowRank,
    adapt,
    merge,
    trainable,
)
from subspan.adapt.starts import Nothing, SparseEntries, ZeroHadamard, ZeroKron, ZeroTriples
from subspan.ops import quantize
from subspan.site import of

M, N = 8, 6
# Each join with an op of another class, so that pairs of joins are pairs of ops too.
JOINS = {
    "add low-rank": Adapter(ZeroLowRank(2), Add(0.7)),
    "add kron": Adapter(ZeroKron(1), Add(-1.3)),
    "add entries": Adapter(SparseEntries(1), Add()),
    "rescale low-rank": Adapter(ZeroLowRank(2), Rescale(2.5)),
    "rescale hadamard": Adapter(ZeroHadamard(2), Rescale()),
    "rotate": Adapter(Nothing(), Rotate(3)),
    "rotate triples": Adapter(ZeroTriples(2), Rotate(2)),
}
GATE = Adapter(ZeroExperts(2, 3), Routed(1.5, 3, 2))
PAIRS = list(itertools.product(JOINS, repeat=2))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def few_bits(layer: nn.Linear) -> nn.Module:
    return of(layer).rebuild(layer, quantize(layer.weight.detach(), "int8", 2), layer.bias.detach())


LAYERS = {
    "linear": (lambda: nn.Linear(N, M), lambda: rand(2, 5, N, seed=9)),
    "conv1d of transformers": (lambda: Conv1D(M, N), lambda: rand(2, 5, N, seed=9)),
    "convolution": (lambda: nn.Conv1d(4, M, 3, stride=2, groups=2), lambda: rand(2, 4, 9, seed=9)),
    "embedding": (lambda: nn.Embedding(M, N), lambda: torch.arange(8).view(2, 4)),
}


def made(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    build, inputs = LAYERS[kind]
    layer, x = build(), inputs()
    for i, p in enumerate(layer.parameters()):
        p.data = rand(*p.shape, seed=i)
    return layer.to(dtype), x.to(dtype) if x.is_floating_point() else x


def put(layer: nn.Module, *adapters: Adapter) -> Adapted:
    """The adapters one on another, each off its start."""
    module = layer
    for i, adapter in enumerate(adapters):
        module = adapt(adapter, "ab"[i])("site", module)
        with torch.no_grad():
            for k, (name, p) in enumerate(trainable(module)):
                if f".{'ab'[i]}." in f".{name}":
                    p.add_(0.3 * rand(*p.shape, seed=10 * i + k).to(p.dtype))
    assert isinstance(module, Adapted)
    return module


def folded(layer: nn.Module, w: Tensor, x: Tensor) -> Tensor:
    """What an ordinary layer makes of x with another matrix, through torch alone."""
    kept = w.mT if isinstance(layer, Conv1D) else w.reshape(layer.weight.shape)
    return functional_call(layer, {"weight": kept}, (x,))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("names", PAIRS, ids=" on ".join)
def test_a_pair_of_joins_is_the_layer_with_the_folded_matrix(names, kind):
    layer, x = made(kind)
    adapted = put(layer, *(JOINS[name] for name in names))
    one, two = adapted.slot("a"), adapted.slot("b")
    start = layer.weight.mT if isinstance(layer, Conv1D) else layer.weight.flatten(1)
    for first, second, active in ((one, two, ("a", "b")), (two, one, ("b", "a"))):
        adapted.active = active
        w = second.join.weight(first.join.weight(start, first.op), second.op)
        assert_close(adapted.matrix, w, rtol=0, atol=1e-12)
        assert_close(adapted(x), folded(layer, w, x), rtol=0, atol=1e-12)
        assert_close(merge(adapted)(x), adapted(x), rtol=0, atol=1e-12)
        assert (adapted(x) - layer(x)).abs().max() > 1e-2


@pytest.mark.parametrize("names", PAIRS, ids=" on ".join)
def test_in_float32_to_a_millionth(names):
    layer, x = made("linear", torch.float32)
    adapted = put(layer, *(JOINS[name] for name in names))
    merged = merge(adapted)(x)
    assert_close(adapted(x), merged, rtol=0, atol=1e-6 * float(merged.detach().abs().max()))


@pytest.mark.parametrize("names", PAIRS, ids=" on ".join)
def test_gradients_flow_through_a_pair_as_through_its_matrix(names):
    layer, x = made("linear")
    adapted = put(layer, *(JOINS[name] for name in names))
    tensors, probe = [p for _, p in trainable(adapted)], rand(2, 5, M, seed=8)
    found = torch.autograd.grad((adapted(x) * probe).sum(), tensors, allow_unused=True)
    wanted = torch.autograd.grad((folded(layer, adapted.matrix, x) * probe).sum(), tensors, allow_unused=True)
    for one, two in zip(found, wanted, strict=True):
        assert_close(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("names", [("add low-rank", "rescale low-rank"), ("rotate", "rescale hadamard")], ids=str)
def test_a_pair_on_few_bits_is_the_layer_of_what_the_codes_stand_for(names):
    layer, x = made("linear", torch.float32)
    small = few_bits(layer)
    adapted = put(small, *(JOINS[name] for name in names))
    merged = merge(adapted)
    assert type(merged) is nn.Linear
    assert_close(adapted(x), merged(x), rtol=0, atol=1e-6 * float(merged(x).detach().abs().max()))


def routed(x: Tensor, join: Routed, u: Tensor, v: Tensor) -> Tensor:
    """What a gate adds, expert by expert."""
    p = torch.softmax(x @ join.router.T, -1)
    kept = torch.where(p >= p.topk(join.top, -1).values[..., -1:], p, 0.0)
    gates, rank = kept / kept.sum(-1, keepdim=True), len(v) // join.experts
    return join.scale * sum(
        gates[..., i : i + 1] * (x @ v[i * rank : (i + 1) * rank].T @ u[:, i * rank : (i + 1) * rank].T)
        for i in range(join.experts)
    )


@pytest.mark.parametrize("name", [name for name in JOINS if not name.startswith("rescale")])
@pytest.mark.parametrize("above", [True, False], ids=["gate above", "gate below"])
def test_a_gate_and_a_join_that_reads_no_weight_are_their_sum(name, above):
    layer, x = made("linear")
    adapted = put(layer, *([JOINS[name], GATE] if above else [GATE, JOINS[name]]))
    gate, other = (adapted.slot(n) for n in ("ba" if above else "ab"))
    w = other.join.weight(layer.weight, other.op)
    if above or not isinstance(other.join, Rotate):
        seen = x
    else:  # what stands above turns the inputs of all that is below, and its own op reads turned ones
        seen = x @ other.join.bound().dense()
    wanted = folded(layer, w, x) + routed(seen, gate.join, gate.op.u, gate.op.v)
    assert_close(adapted(x), wanted, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="no one weight to merge"):
        merge(adapted)


def test_two_gates_add_what_each_adds():
    layer, x = made("linear")
    adapted = put(layer, GATE, GATE)
    slots = [adapted.slot(n) for n in "ab"]
    wanted = layer(x) + sum(routed(x, s.join, s.op.u, s.op.v) for s in slots)
    assert_close(adapted(x), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in JOINS if name.startswith("rescale")])
def test_lengths_are_refused_above_a_gate_and_taken_below(name):
    layer, x = made("linear")
    gated = put(layer, GATE)
    with pytest.raises(ValueError, match=r"^site: adapter 'b': Rescale.*cannot stand on a gate"):
        adapt(JOINS[name], "b")("site", gated)
    adapted = put(layer, JOINS[name], GATE)
    low, gate = adapted.slot("a"), adapted.slot("b")
    wanted = folded(layer, low.join.weight(layer.weight, low.op), x)
    assert_close(adapted(x), wanted + routed(x, gate.join, gate.op.u, gate.op.v), rtol=0, atol=1e-12)
