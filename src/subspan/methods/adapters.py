"""Published adapters."""

from __future__ import annotations

from subspan.adapt import (
    Adapter,
    Add,
    ColumnsOf,
    FromWeight,
    Nothing,
    RandomBases,
    RandomBasis,
    Rescale,
    Rotate,
    SparseEntries,
    SubtractInit,
    TopCore,
    ZeroHadamard,
    ZeroKron,
    ZeroLowRank,
    per_rank,
)
from subspan.adapt.starts import Pick
from subspan.methods.registry import method
from subspan.ops.structured import Law


@method(
    kind="adapter",
    paper="arXiv:2106.09685",
    reference="microsoft/LoRA",
    status="limits",
    deviates="v is uniform on +-1/sqrt(n), as in the authors' code; the paper says Gaussian",
)
def lora(*, rank: int = 8, alpha: float = 8.0) -> Adapter:
    """Low-rank change of the weight that starts at zero."""
    return Adapter(ZeroLowRank(rank), Add(per_rank(alpha, rank)))


@method(kind="adapter", paper="arXiv:2312.03732", reference="huggingface/peft", status="limits")
def rslora(*, rank: int = 8, alpha: float = 8.0) -> Adapter:
    """Low-rank change whose first step has the same size at every rank."""
    return Adapter(ZeroLowRank(rank), Add(per_rank(alpha, rank, 0.5)))


@method(kind="adapter", paper="arXiv:2402.09353", reference="huggingface/peft", status="limits")
def dora(*, rank: int = 8, alpha: float = 16.0) -> Adapter:
    """Low-rank change of direction, full change of row norms."""
    return Adapter(ZeroLowRank(rank), Rescale(per_rank(alpha, rank)))


@method(
    kind="adapter",
    paper="arXiv:2404.02948",
    reference="GraphPKU/PiSSA",
    status="limits",
    deviates="rank 16 where the authors' scripts use 128; exact instead of randomized decomposition",
)
def pissa(*, rank: int = 16, alpha: float = 16.0) -> Adapter:
    """Train the principal singular triples of the weight, freeze the rest."""
    scale = per_rank(alpha, rank)
    return Adapter(FromWeight(rank, scale=scale), Add(scale), SubtractInit())


@method(kind="adapter", paper="arXiv:2406.09044", reference="sufenlp/MiLoRA", status="limits")
def milora(*, rank: int = 16, alpha: float = 16.0) -> Adapter:
    """Train the bottom singular triples of the weight; the base keeps the principal ones."""
    scale = per_rank(alpha, rank)
    return Adapter(FromWeight(rank, "bottom", scale), Add(scale), SubtractInit())


@method(
    kind="adapter",
    paper="arXiv:2405.17604",
    reference="MohammadrezaBanaei/LoRA-XS",
    status="limits",
    deviates="the core starts at zero, where the paper draws it with deviation 1e-5; exact decomposition",
)
def lora_xs(*, rank: int = 64, alpha: float = 64.0) -> Adapter:
    """Train only a small core between the weight's frozen top singular vectors."""
    return Adapter(TopCore(rank), Add(per_rank(alpha, rank)))


@method(
    kind="adapter",
    paper="arXiv:2310.11454",
    reference="huggingface/peft",
    status="limits",
    deviates="sqrt(2 / n) spreads A by the layer's own n, where peft takes the widest layer's",
)
def vera(*, rank: int = 256, start: float = 0.1, seed: int = 0) -> Adapter:
    """Train two vectors that scale frozen random factors, shared by all layers."""
    return Adapter(RandomBasis(rank, start, seed), Add())


@method(
    kind="adapter",
    paper="arXiv:2502.00987",
    reference="PaulAlbert31/RandLoRA",
    status="limits",
    deviates="alpha is 20 rank as in peft, where the authors take 2 rank / sqrt(bases); bases are divided by the "
    "deviation of their law, not of the draw",
)
def randlora(*, rank: int = 32, alpha: float = 640.0, law: Law = "uniform", seed: int = 0) -> Adapter:
    """A change of full rank: many frozen random products, their scales trained."""
    return Adapter(RandomBases(rank, law, seed), Add(per_rank(alpha, rank)))


@method(
    kind="adapter",
    paper="arXiv:2108.06098",
    reference="KohakuBlueleaf/LyCORIS",
    status="limits",
    deviates="starts as LyCORIS does (deviations 0.1 and 1); the paper and peft draw by He's rule",
)
def loha(*, rank: int = 8, alpha: float = 8.0) -> Adapter:
    """The entrywise product of two low-rank matrices: rank up to rank^2 for twice the numbers."""
    return Adapter(ZeroHadamard(rank), Add(per_rank(alpha, rank)))


@method(
    kind="adapter",
    paper="arXiv:2309.14859",
    reference="KohakuBlueleaf/LyCORIS",
    status="limits",
    deviates="alpha / rank also where neither factor is a product, as in peft; LyCORIS takes 1 there",
)
def lokr(*, rank: int = 8, alpha: float = 8.0, factor: int = -1, both: bool = False) -> Adapter:
    """A Kronecker product of a small matrix and a low-rank one."""
    return Adapter(ZeroKron(rank, factor, both), Add(per_rank(alpha, rank)))


@method(
    kind="adapter",
    paper="arXiv:2306.07280",
    reference="huggingface/peft",
    status="limits",
    deviates="the inverse is exact, where peft by default sums five terms of the series for -Q, which turns the "
    "other way; no bound on the angle; a block that does not fill the inputs becomes the next smaller that does",
)
def oft(*, block: int = 32) -> Adapter:
    """Turn the inputs of the weight by trained orthogonal blocks; its singular values stay."""
    return Adapter(Nothing(), Rotate(block))


@method(kind="adapter", paper="arXiv:2406.13175", reference="huggingface/peft", status="limits")
def shira(*, rank: int = 32, pick: Pick = "random", seed: int = 0) -> Adapter:
    """Train a few entries of the weight: rank (m + n) of them, in a fixed sparse pattern of high rank."""
    return Adapter(SparseEntries(rank, pick, seed), Add())


@method(
    kind="adapter",
    paper="arXiv:2503.01905",
    reference="WooSunghyeon/paca",
    status="limits",
    deviates="trains the change of the columns, from zero, not their values: the same function and steps, except "
    "under weight decay",
)
def paca(*, rank: int = 8, alpha: float = 8.0, pick: Pick = "random", seed: int = 0) -> Adapter:
    """Train whole columns of the weight; only their inputs are kept for the backward pass."""
    return Adapter(ColumnsOf(rank, pick, seed), Add(per_rank(alpha, rank)))
