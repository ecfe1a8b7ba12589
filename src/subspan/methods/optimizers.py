"""Published optimizers, each a composition of the parts in `subspan.optim`."""

from __future__ import annotations

from collections.abc import Callable

from subspan.methods.registry import method
from subspan.optim import (
    Adam,
    Drop,
    Every,
    NormScale,
    Projected,
    Residual,
    Rows,
    Rule,
    Sign,
    Span,
    Subspace,
    keep,
    reset,
)

RAW_ADAM = Adam(eps=1e-6, eps_on="raw")


@method(kind="optimizer", paper="arXiv:1711.05101", status="limits")
def adamw(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Adam:
    """Adam with decoupled weight decay, as torch.optim.AdamW; the decay itself is an argument of `Optim`."""
    return Adam(b1, b2, eps)


@method(
    kind="optimizer",
    paper="arXiv:2403.03507",
    reference="jiaweizzhao/GaLore",
    status="transcript",
    deviates="weight decay acts before the step, not after it; signs of singular vectors are pinned",
)
def galore(*, rank: int | float = 128, every: int = 200, scale: float = 0.25, rule: Rule = RAW_ADAM) -> Projected:
    """Adam inside the gradient's top singular subspace, refreshed now and then; moments are kept as they are."""
    return Projected(Span(rank), Every(every, keep), rule, Drop(), scale=scale)


@method(
    kind="optimizer",
    paper="arXiv:2410.01623",
    reference="xichen-fy/Fira",
    status="transcript",
    deviates="the residual is the paper's exact complement, the authors' program has leak = 1 - scale; "
    "weight decay acts before the step, not after it; signs of singular vectors are pinned",
)
def fira(
    *,
    rank: int | float = 128,
    every: int = 200,
    scale: float = 0.25,
    rule: Rule = RAW_ADAM,
    limit: float | None = 1.01,
    leak: float = 0.0,
) -> Projected:
    """GaLore, and what its subspace misses, scaled column by column as Adam scaled the inside."""
    return Projected(Span(rank), Every(every, keep), rule, NormScale(limit, leak), scale=scale)


@method(
    kind="optimizer",
    paper="arXiv:2411.07837",
    reference="fzmushko/FRUGAL",
    status="transcript",
    deviates="the default subspace is random rows of the shorter side, where the paper's main runs take whole "
    "blocks; the transcript is of the program's svd mode, subspace=Span",
)
def frugal(
    *,
    rank: int | float = 0.25,
    every: int = 200,
    subspace: Callable[[int | float], Subspace] = Rows,
    rule: Rule = Adam(),
    residual: Residual = Sign(),
) -> Projected:
    """Adam on a changing part of each gradient, signs on the rest; moments begin anew at a refresh."""
    return Projected(subspace(rank), Every(every, reset), rule, residual)
