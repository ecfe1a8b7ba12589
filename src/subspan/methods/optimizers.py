"""Published optimizers, each a composition of the parts in `subspan.optim`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from subspan.codec import Factored, Int4, Int4Rank1, Int8
from subspan.methods.registry import method
from subspan.optim import (
    Adam,
    Asleep,
    Carry,
    Chain,
    Clip,
    Cosine,
    Drop,
    ErrorFeedback,
    Every,
    LowRankAdam,
    Nesterov,
    NormScale,
    Polar,
    PolarSolver,
    Power,
    Projected,
    RandomLayers,
    Recipe,
    Refresh,
    Residual,
    RisingDecay,
    Rms,
    Rows,
    Rule,
    Scaling,
    Sgd,
    ShapeScale,
    Side,
    Sign,
    Sketch,
    Solver,
    Span,
    Spsa,
    Stored,
    Subspace,
    UnitRows,
    chain,
    keep,
    reset,
    stored,
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


@method(
    kind="optimizer",
    paper="Jordan et al., 2024, kellerjordan.github.io/posts/muon",
    reference="KellerJordan/Muon",
    status="transcript",
    deviates="products are in float32 (float64 for float64 weights), the program's in bfloat16",
)
def muon(
    *,
    mu: float = 0.95,
    steps: int = 5,
    solver: PolarSolver = "products",
    scale: ShapeScale = ShapeScale("tall"),
) -> Chain:
    """Momentum made orthogonal: every direction it has is followed at the same speed."""
    return chain(momentum=Nesterov(mu), polar=Polar(steps, solver=solver), shape=scale)


@method(
    kind="optimizer",
    paper="arXiv:2504.05295",
    reference="microsoft/dion",
    status="transcript",
    deviates="as dion_simple, which takes every matrix as it is; side='long' is dion_reference, which transposes "
    "wide ones. A float rank is a share of the compressed side, theirs of the shorter; the left basis is kept too",
)
def dion(
    *,
    rank: int | float = 128,
    mu: float = 0.95,
    side: Side = "left",
    scale: ShapeScale = ShapeScale("ratio"),
) -> Chain:
    """Orthogonal steps of low rank: what one power step finds of the momentum; what it misses stays in it."""
    inside = Projected(Power(rank), Every(1, keep), UnitRows(), ErrorFeedback(kept=mu), side=side)
    return chain(shape=scale, inside=inside)


@method(
    kind="optimizer",
    paper="arXiv:1804.04235",
    reference="huggingface/transformers",
    status="transcript",
    deviates="no first moment, relative step size or parameter scaling; vectors are left to `other`, where "
    "chain(rms=Rms(), clip=Clip()) is the same without factors",
)
def adafactor(*, decay: float = 0.8, clip: float = 1.0) -> Chain:
    """Gradients over root mean squares that are kept as row and column sums, no step longer than `clip`."""
    return chain(rms=stored(Rms(RisingDecay(decay)), nu=Factored()), clip=Clip(clip))


@method(
    kind="optimizer",
    paper="arXiv:2110.02861",
    reference="bitsandbytes-foundation/bitsandbytes",
    status="transcript",
    deviates="blocks lie inside the rows, the program cuts the flattened tensor and leaves small ones in float32; "
    "the transcript is of the program's torch kernels, as its compiled CPU kernel does not round to the nearest",
)
def adam8bit(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Stored:
    """Adam with both moments in 8 bits, by blocks of 256."""
    return stored(Adam(b1, b2, eps), mu=Int8(), nu=Int8(signed=False))


@method(
    kind="optimizer",
    paper="arXiv:2309.01507",
    reference="thu-ml/low-bit-optimizers",
    status="transcript",
    deviates="blocks lie inside the rows, the program cuts the flattened tensor and leaves small ones in float32; "
    "the transcript rounds by the program's torch code, its default is a CUDA kernel",
)
def adam4bit(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Stored:
    """Adam with both moments in 4 bits: the first by blocks of 128, the second by row and column maxima."""
    return stored(Adam(b1, b2, eps), mu=Int4(), nu=Int4Rank1())


@method(
    kind="optimizer",
    paper="arXiv:2412.05270",
    reference="zhuhanqing/APOLLO",
    status="transcript",
    deviates="the random matrices follow from the parameters' names and are not kept, the program's from their "
    "order, and the transcript replays those; weight decay acts before the step, not after it",
)
def apollo(
    *,
    rank: int | float = 128,
    every: int = 200,
    scale: float = 1.0,
    rule: Rule = RAW_ADAM,
    limit: float | None = 1.01,
    subspace: Callable[[int | float], Subspace] = Sketch,
    refresh: Timing = Every,
) -> Projected:
    """The gradient itself, each column scaled as Adam scales a random sketch of it; no basis is kept."""
    return Projected(subspace(rank), refresh(every, keep), rule, Scaling("column", limit), scale=scale**0.5)


@method(
    kind="optimizer",
    paper="arXiv:2412.05270",
    reference="zhuhanqing/APOLLO",
    status="transcript",
    deviates="random matrices and weight decay are as in apollo",
)
def apollo_mini(
    *,
    every: int = 200,
    scale: float = 128.0,
    rule: Rule = RAW_ADAM,
    limit: float | None = 1.01,
    subspace: Callable[[int | float], Subspace] = Sketch,
    refresh: Timing = Every,
) -> Projected:
    """APOLLO of rank 1 with one scale for the whole gradient: SGD's memory and two rows."""
    scaling = Scaling("tensor", limit, factor=scale**0.5)
    return Projected(subspace(1), refresh(every, keep), rule, scaling)


@method(
    kind="optimizer",
    paper="arXiv:2505.17967",
    reference="IST-DASLab/ISTA-DASLab-Optimizers",
    status="transcript",
    deviates="the basis vectors are D's columns, as on the program's matmul path; its FFT path takes the rows",
)
def dct_adamw(
    *,
    rank: int | float = 128,
    every: int = 1,
    carry: Carry = keep,
    rule: Rule = Adam(),
    residual: Residual = Drop(),
    refresh: Timing = Every,
) -> Projected:
    """Adam on the gradient's largest coordinates in a fixed basis of cosines, chosen anew at every step."""
    return Projected(Cosine(rank), refresh(every, carry), rule, residual)


@method(
    kind="optimizer",
    paper="arXiv:2410.16103",
    reference="IST-DASLab/LDAdam",
    status="transcript",
    deviates="the error is state of its own, where the program leaves it in .grad",
)
def ldadam(
    *,
    rank: int | float = 16,
    b1: float = 0.908,
    b2: float = 0.99,
    eps: float = 1e-8,
    rho: float = 0.908,
    error: Literal["kept", "dropped"] = "kept",
) -> LowRankAdam:
    """Adam in a basis that takes one power step at every step; what it loses is fed back."""
    return LowRankAdam(rank, rho, Adam(b1, b2, eps), error)


@method(
    kind="optimizer",
    paper="arXiv:2403.17919",
    reference="OptimalScale/LMFlow",
    status="limits",
    deviates="the state of a sleeping block is dropped, the program keeps it, as state='keep' does; a resumed run "
    "goes on with its draw, where in the program all blocks train until the next one",
)
def lisa(*, layers: int = 2, every: int = 20, rule: Rule = Adam(), state: Asleep = "drop") -> Recipe:
    """Adam on a few blocks at a time, drawn anew now and then, and on embeddings and head always."""
    return Recipe(rule, awake=RandomLayers(layers, every, state))


@method(
    kind="optimizer",
    paper="arXiv:2305.17333",
    reference="princeton-nlp/MeZO",
    status="transcript",
    deviates="z follows from each parameter's name, the program's from their order, and the transcript replays "
    "that; weights in half precision are restored from a copy; weight decay acts on biases and norms too",
)
def mezo(*, eps: float = 1e-3, rule: Rule = Sgd(), other: Rule = Sgd()) -> Recipe:
    """Training in the memory of inference: two losses along a random direction, and no backward pass."""
    return Recipe(rule, Spsa(eps), other=other)
