"""Published optimizers, each a composition of the parts in `subspan.optim`."""

from __future__ import annotations

from collections.abc import Callable

from subspan.methods.registry import method
from subspan.optim import (
    Adam,
    Carry,
    Drop,
    Every,
    NormScale,
    Projected,
    Refresh,
    Residual,
    Rows,
    Rule,
    Sign,
    Solver,
    Span,
    Subspace,
    keep,
    reset,
)

Timing = Callable[[int, Carry], Refresh]
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
    deviates="the basis comes from one orthogonal iteration a refresh, warm-started; solver='exact' is the "
    "program's SVD, with pinned signs; weight decay acts before the step, not after it",
)
def galore(
    *,
    rank: int | float = 128,
    every: int = 200,
    scale: float = 0.25,
    rule: Rule = RAW_ADAM,
    solver: Solver = "power",
    refresh: Timing = Every,
) -> Projected:
    """Adam inside the gradient's top singular subspace, refreshed now and then; moments are kept as they are."""
    return Projected(Span(rank, solver), refresh(every, keep), rule, Drop(), scale=scale)


@method(
    kind="optimizer",
    paper="arXiv:2410.01623",
    reference="xichen-fy/Fira",
    status="transcript",
    deviates="the residual is the paper's exact complement, the authors' program has leak = 1 - scale; "
    "the basis and weight decay are as in galore",
)
def fira(
    *,
    rank: int | float = 128,
    every: int = 200,
    scale: float = 0.25,
    rule: Rule = RAW_ADAM,
    limit: float | None = 1.01,
    leak: float = 0.0,
    solver: Solver = "power",
    refresh: Timing = Every,
) -> Projected:
    """GaLore, and what its subspace misses, scaled column by column as Adam scaled the inside."""
    return Projected(Span(rank, solver), refresh(every, keep), rule, NormScale(limit, leak), scale=scale)


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
    refresh: Timing = Every,
) -> Projected:
    """Adam on a changing part of each gradient, signs on the rest; moments begin anew at a refresh."""
    return Projected(subspace(rank), refresh(every, reset), rule, residual)
