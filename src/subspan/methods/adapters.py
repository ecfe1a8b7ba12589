"""Published adapters."""

from __future__ import annotations

from subspan.adapt import Adapter, Add, FromWeight, Rescale, SubtractInit, ZeroLowRank, per_rank
from subspan.methods.registry import method


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
