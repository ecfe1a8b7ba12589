"""Published adapters."""

from __future__ import annotations

import math

from subspan.adapt import (
    Adapter,
    Add,
    ColumnsOf,
    FromWeight,
    GradientSpan,
    GradientStep,
    Nothing,
    RandomBases,
    RandomBasis,
    Rescale,
    Rotate,
    Routed,
    SharedShards,
    SignStep,
    SparseEntries,
    SubtractInit,
    TopCore,
    TopInputs,
    ZeroExperts,
    ZeroHadamard,
    ZeroKron,
    ZeroLowRank,
    ZeroTriples,
    per_rank,
)
from subspan.adapt.starts import Pick
from subspan.methods.registry import method
from subspan.ops.structured import Law
from subspan.optim import Adam, Equivalent, Paired, PerExpert, Preconditioned, Recipe, Stepped


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


@method(
    kind="adapter",
    paper="arXiv:2402.12354",
    reference="nikhil-ghosh-berkeley/loraplus",
    status="limits",
    deviates="the ratio is 16, which the authors' program leaves open; embeddings have no rate of their own",
)
def lora_plus(*, rank: int = 8, alpha: float = 8.0, ratio: float = 16.0) -> Stepped:
    """LoRA whose zero factor learns `ratio` times as fast as the other."""
    return Stepped(ZeroLowRank(rank), Add(per_rank(alpha, rank)), ratio=ratio)


@method(
    kind="adapter",
    paper="arXiv:2407.18242",
    reference="mrflogs/LoRA-Pro",
    status="limits",
    deviates="Adam's moments are of the factors' new gradients, so state is as LoRA's; the authors' program keeps "
    "them for the whole weight, and splits that Adam's step",
)
def lora_pro(*, rank: int = 8, alpha: float = 16.0, damping: float = 1e-8) -> Stepped:
    """LoRA whose factors together follow the weight's gradient as nearly as they can."""
    scale = per_rank(alpha, rank)
    return Stepped(ZeroLowRank(rank), Add(scale), rule=Recipe(Adam(), Paired(Equivalent(scale, damping))))


@method(
    kind="adapter",
    paper="arXiv:2402.02347",
    reference="pilancilab/Riemannian_Preconditioned_LoRA",
    status="limits",
    deviates="both Gram matrices are from before the step, where the program's AdamW has moved the first factor; "
    "Adam corrects its bias and has eps 1e-8, the program's does not and has 1e-6",
)
def riemannian_lora(*, rank: int = 8, alpha: float = 8.0, damping: float = 1e-6) -> Stepped:
    """LoRA with each factor's gradient divided by the other's Gram matrix: no pair for a product is favoured."""
    return Stepped(
        ZeroLowRank(rank), Add(per_rank(alpha, rank)), rule=Recipe(Adam(), Paired(Preconditioned(damping)))
    )


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
    deviates="the core starts at zero, where the paper draws it with deviation 1e-5; exact decomposition; the "
    "singular values stand with the outputs, as in the paper's formula, and with the inputs in the program",
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
    status="transcript",
    deviates="starts as LyCORIS does (deviations 0.1 and 1); the paper and peft draw by He's rule",
)
def loha(*, rank: int = 8, alpha: float = 8.0) -> Adapter:
    """The entrywise product of two low-rank matrices: rank up to rank^2 for twice the numbers."""
    return Adapter(ZeroHadamard(rank), Add(per_rank(alpha, rank)))


@method(
    kind="adapter",
    paper="arXiv:2309.14859",
    reference="KohakuBlueleaf/LyCORIS",
    status="transcript",
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
    status="transcript",
    deviates="trains the change of the columns, from zero, not their values: the same function and steps, except "
    "under weight decay",
)
def paca(*, rank: int = 8, alpha: float = 8.0, pick: Pick = "random", seed: int = 0) -> Adapter:
    """Train whole columns of the weight; only their inputs are kept for the backward pass."""
    return Adapter(ColumnsOf(rank, pick, seed), Add(per_rank(alpha, rank)))


@method(
    kind="adapter",
    paper="arXiv:2410.07170",
    reference="ml-jku/EVA",
    status="limits",
    deviates="the principal components of all batches at once, where the authors update them batch by batch and "
    "stop early; every token that reaches a layer counts, padding too; the scale stays alpha / rank at every rank",
)
def eva(*, rank: int = 8, alpha: float = 8.0, rho: float = 2.0) -> Adapter:
    """Starts at the principal directions of the inputs; layers share out the ranks by explained variance."""
    return Adapter(TopInputs(rank, rho, solver="random"), Add(per_rank(alpha, rank)))


@method(
    kind="adapter",
    paper="arXiv:2407.05000",
    reference="Outsider565/LoRA-GA",
    status="transcript",
    deviates="a frozen double of the start is taken out of the change, not out of the base weight: the same "
    "function; no clipping of the start",
)
def lora_ga(*, rank: int = 8, alpha: float = 16.0, gamma: float = 16.0) -> Adapter:
    """Starts where its first step is the best low-rank form of a full fine-tuning step; needs gradients."""
    return Adapter(GradientSpan(rank, gamma, solver="random"), Add(per_rank(alpha, rank, 0.5)))


@method(
    kind="adapter",
    paper="arXiv:2502.01235",
    reference="YuanheZ/LoRA-One",
    status="transcript",
    deviates="trained by plain Adam, without the preconditioner of the paper's theory; as in the authors' code "
    "the factors share the square root of singular values divided by the largest",
)
def lora_one(*, rank: int = 8, alpha: float = 16.0, gamma: float = 128.0) -> Adapter:
    """Starts one low-rank step of gradient descent away from the base; needs gradients."""
    return Adapter(GradientStep(rank, gamma, solver="random"), Add(per_rank(alpha, rank, 0.5)))


@method(
    kind="adapter",
    paper="arXiv:2411.19557",
    reference="RaghavSinghal10/lora-sb",
    status="transcript",
    deviates="the first step's size is an argument, where the authors take the first learning rate of the warm-up",
)
def lora_sb(*, rank: int = 96, rate: float = 1e-5, keep_output: bool = False) -> Adapter:
    """Train a small core in the frozen frame of the first step of full fine-tuning; needs gradients."""
    return Adapter(SignStep(rank, rate, keep_output=keep_output, solver="random"), Add())


@method(
    kind="adapter",
    paper="arXiv:2303.10512",
    reference="huggingface/peft",
    status="limits",
    deviates="the scale is alpha / (start * rank), without 1e-5 in the divisor; the last choice falls on step "
    "steps - final exactly, as in peft; equal scores are told apart by position; budgets are exact where peft "
    "cuts off a float",
)
def adalora(*, rank: int = 8, start: float = 1.5, alpha: float = 16.0) -> Adapter:
    """Triples u e v that start at start * rank a site and end at rank on average, most where they matter."""
    first = math.ceil(start * rank)
    scale = per_rank(alpha, first)
    return Adapter(ZeroTriples(first, rank), Add(scale))


@method(
    kind="adapter",
    paper="arXiv:2502.15828",
    reference="THUDM/MoELoRA_Riemannian",
    status="transcript",
    deviates="inputs get the gradient of the mixture itself, where the program's carries 1/sqrt(gate) on to the "
    "layers below; one learning rate, where the program's gates have a far lower one; bias and Gram matrices as "
    "in riemannian_lora; no dropout; the transcript is of the program's scaled descent, not of its AdamW",
)
def moe_lora(
    *, rank: int = 4, alpha: float = 16.0, experts: int = 20, top: int = 10, damping: float = 1e-6
) -> Stepped:
    """A mixture of low-rank experts chosen for each token, each preconditioned on its own; it cannot be merged."""
    law = PerExpert(Preconditioned(damping), experts)
    join = Routed(per_rank(alpha, rank), experts, top)
    return Stepped(ZeroExperts(rank, experts), join, rule=Recipe(Adam(), Paired(law)))


@method(
    kind="adapter",
    paper="arXiv:2410.00938",
    reference="Forence1999/MoS",
    status="limits",
    deviates="rank, budget, parts and private are arguments, which the authors choose by task; no dropout",
)
def mos(
    *, rank: int = 8, alpha: float = 16.0, budget: int = 2, parts: int = 4, private: int = 1, seed: int = 0
) -> Adapter:
    """Low-rank changes laid together from shards of pools that all layers of a type share."""
    return Adapter(SharedShards(rank, budget, parts, private, seed), Add(per_rank(alpha, rank)))
