"""Each op under each join, compiled whole, recomputed, and in half precision: the function that it is without."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

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
    trainable,
)
from subspan.adapt.starts import (
    ColumnsOf,
    Nothing,
    RandomBases,
    RandomBasis,
    SparseEntries,
    TopCore,
    ZeroHadamard,
    ZeroKron,
    ZeroTriples,
)
from subspan.ops import LinOp, LowRank, Product, Scaled, Seeded, Shards, Sum, Transposed, quantize
from subspan.site import of

M, N = 24, 16


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved_pair(site: str, w: Tensor) -> LinOp:
    """A pair and its frozen double, as LoRA-GA starts."""
    u, v = rand(len(w), 2, seed=1).to(w), rand(2, w.shape[1], seed=2).to(w)
    return Sum([LowRank(nn.Parameter(u), nn.Parameter(v)), Scaled(LowRank(u.clone(), v.clone()), -1.0)])


def pooled(site: str, w: Tensor) -> LinOp:
    """Factors laid together from pools, as MoS has them."""
    m, n = w.shape
    left, right = (nn.Parameter(rand(8, size // 2, seed=size).to(w)) for size in (m, n))
    index = torch.tensor([0, 3, 5, 6], dtype=torch.int32)
    return Product([Transposed(Shards(left, index, 2)), Shards(right, index.flip(0), 2)])


OPS = {
    "low-rank": ZeroLowRank(3),
    "core": TopCore(3),
    "triples": ZeroTriples(3),
    "kron": ZeroKron(1),
    "hadamard, few": ZeroHadamard(2),
    "hadamard, many": ZeroHadamard(8),
    "entries": SparseEntries(1),
    "columns": ColumnsOf(3),
    "seeded": RandomBasis(5),
    "stacked": RandomBases(4),
    "pair and double": moved_pair,
    "pools": pooled,
    "zero": Nothing(),
}
JOINS = {"add": Add(0.7), "rescale": Rescale(0.7), "rotate": Rotate(4)}
CASES = {f"{op}, {join}": Adapter(OPS[op], JOINS[join]) for op in OPS for join in JOINS}
del CASES["zero, add"]
CASES["experts, routed"] = Adapter(ZeroExperts(2, 4), Routed(0.7, 4, 2))
# One of each op and of each join; the others run with `make test-full`.
FAST = {f"{op}, add" for op in OPS} | {"low-rank, rescale", "zero, rotate", "experts, routed"}
FIRST = "low-rank, add"
BASES = {"linear": lambda layer: layer, "few bits": lambda layer: few_bits(layer)}
every_case = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.full] * (name not in FAST)) for name in CASES]
)


def few_bits(layer: nn.Linear) -> nn.Module:
    assert layer.bias is not None
    return of(layer).rebuild(layer, quantize(layer.weight.detach(), "nf4", 8), layer.bias.detach())


def put(case: str, base: str = "linear", dtype: torch.dtype = torch.float32) -> Adapted:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(N, M).to(dtype)
    adapted = adapt(CASES[case])("site", BASES[base](layer))
    with torch.no_grad():
        for i, (_, p) in enumerate(trainable(adapted)):
            p.add_(0.2 * rand(*p.shape, seed=i).to(p))
    assert isinstance(adapted, Adapted)
    return adapted


def gradients(adapted: Adapted, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    probe = rand(*y.shape, seed=8).to(y)
    return torch.autograd.grad((y * probe).sum(), [x, *(p for _, p in trainable(adapted))])


@pytest.mark.parametrize(
    ("case", "base"),
    [
        pytest.param(
            case, base, marks=[pytest.mark.full] * (case not in FAST or (base != "linear" and case != FIRST))
        )
        for case in CASES
        for base in BASES
    ],
)
def test_compiled_into_one_graph_it_computes_the_same(case, base):
    adapted, x = put(case, base), rand(2, 5, N, seed=7).requires_grad_()
    wanted = adapted(x)  # random numbers of a seed are drawn by now, which a graph cannot do
    torch.compiler.reset()
    y = torch.compile(adapted, backend="aot_eager", fullgraph=True)(x)
    assert_close(y, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))
    for one, two in zip(gradients(adapted, y, x), gradients(adapted, wanted, x), strict=True):
        assert_close(one, two, rtol=0, atol=1e-5 * max(1e-3, float(two.abs().max())))


@pytest.mark.parametrize("reentrant", [True, False])
@every_case
def test_recomputed_it_has_the_same_gradients_to_the_bit(case, reentrant):
    adapted, x = put(case), rand(2, 5, N, seed=7).requires_grad_()
    wanted = gradients(adapted, adapted(x), x)
    y = checkpoint(adapted, x, use_reentrant=reentrant)
    (y * rand(*y.shape, seed=8)).sum().backward()
    for p, two in zip([x, *(p for _, p in trainable(adapted))], wanted, strict=True):
        assert torch.equal(p.grad, two)


@pytest.mark.parametrize("base", BASES)
@every_case
def test_under_autocast_it_multiplies_in_half_and_trains_in_full(case, base):
    adapted, x = put(case, base), rand(40, N, seed=7).requires_grad_()
    exact = adapted(x)
    wanted = gradients(adapted, exact, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), exact, rtol=0, atol=2**-5 * float(exact.detach().abs().max()))
    for one, two in zip(gradients(adapted, y.float(), x), wanted, strict=True):
        assert one.dtype == torch.float32
        assert float((one - two).norm()) <= 2**-4 * float(two.norm())


def test_numbers_of_a_seed_that_are_not_drawn_yet_break_the_graph_and_nothing_else():
    op, x = Seeded(987_654_321, M, N), rand(3, N)
    torch.compiler.reset()
    y = torch.compile(op, backend="aot_eager")(x)
    assert torch.equal(y, op(x))
    torch.compiler.reset()
    assert torch.equal(torch.compile(op, backend="aot_eager", fullgraph=True)(x), y)
