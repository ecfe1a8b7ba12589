"""Published ways to compress weights: a budget and a measure each."""

from __future__ import annotations

from typing import Literal

from subspan.budget import BlockInfluence, Err, LeastLoss, Owl, Target, Uniform, WeLore
from subspan.compress import Compression
from subspan.methods.registry import method
from subspan.metric import AbsMean, Covariance, Fisher, Gram, Measure, Plain


@method(kind="compression", paper="Eckart and Young, 1936", status="limits")
def svd(*, target: Target = Err(0.5)) -> Compression:
    """Truncate every weight's singular value decomposition by the same share."""
    return Compression(Uniform(target), Plain())


@method(kind="compression", paper="arXiv:2312.05821", reference="hahnyuan/ASVD4LLM", status="limits",
        deviates="uniform ranks; the paper's search by perplexity is not part of it")  # fmt: skip
def asvd(*, target: Target = Err(0.5), alpha: float = 0.5) -> Compression:
    """Truncate after scaling every column by how large its inputs are."""
    return Compression(Uniform(target), AbsMean(alpha))


@method(kind="compression", paper="arXiv:2403.07378", reference="AIoT-MLSys-Lab/SVD-LLM", status="limits",
        deviates="one shot, without the closed-form update")  # fmt: skip
def svd_llm(*, target: Target = Err(0.5), ridge: float = 0.0) -> Compression:
    """Truncate where it hurts the outputs least, by whitening the inputs."""
    return Compression(Uniform(target), Gram(ridge))


@method(kind="compression", paper="arXiv:2407.11239", reference="VITA-Group/welore", status="limits")
def welore(
    *,
    target: Target = Err(0.5),
    measure: Measure = Plain(),
    search: Literal["exact", "grid"] = "exact",
    nlrc: Literal["truncate", "keep"] = "truncate",
    gate: Literal["half", "break_even"] = "half",
) -> Compression:
    """Let one threshold on normalised spectra choose every rank, then truncate."""
    return Compression(WeLore(target, search, nlrc, gate), measure)


@method(kind="compression", paper="arXiv:2407.11239", reference="VITA-Group/welore", status="limits",
        deviates="ranks come from the plain spectra, which the paper leaves open")  # fmt: skip
def welore_asvd(*, target: Target = Err(0.5), alpha: float = 0.5) -> Compression:
    """WeLore's ranks, then truncation after scaling every column by how large its inputs are."""
    return Compression(WeLore(target), AbsMean(alpha))


@method(kind="compression", paper="arXiv:2207.00112", status="limits",
        deviates="no training afterwards; columns that the loss does not feel get no floor")  # fmt: skip
def fwsvd(*, target: Target = Err(0.5)) -> Compression:
    """Truncate after scaling every column by how much the loss feels it."""
    return Compression(Uniform(target), Fisher())


@method(kind="compression", paper="arXiv:2309.14021", status="limits",
        deviates="one share for all layers; the paper's sweep by perplexity is not part of it")  # fmt: skip
def lord(*, target: Target = Err(0.5)) -> Compression:
    """Keep the principal components of every layer's outputs, with their mean in the bias."""
    return Compression(Uniform(target), Covariance())


@method(kind="compression", paper="arXiv:2405.18146", reference="yuhao318/Atomic_Feature_Mimicking",
        status="limits", deviates="linear layers only, one share for all; no training afterwards")  # fmt: skip
def afm(*, target: Target = Err(0.5)) -> Compression:
    """Mimic the outputs that data makes: their mean by the bias, their principal components by the factors."""
    return Compression(Uniform(target), Covariance())


@method(kind="compression", paper="arXiv:2310.05175", reference="luuyin/OWL", status="limits",
        deviates="the shares size ranks and not pruned entries; factors are fitted to the outputs")  # fmt: skip
def owl(
    *, target: Target = Err(0.5), spread: float = 0.08, outlier: float = 5.0, measure: Measure = Gram()
) -> Compression:
    """Let blocks with more outliers keep more, then truncate where it hurts the outputs least."""
    return Compression(Owl(target, spread, outlier), measure)


@method(kind="compression", paper="arXiv:2403.03853", status="limits",
        deviates="blocks are cut and not removed, shared out as in arXiv:2408.09632")  # fmt: skip
def block_influence(
    *, target: Target = Err(0.5), temperature: float = 0.1, cap: float = 0.8, measure: Measure = Gram()
) -> Compression:
    """Let blocks that turn their input more keep more, then truncate where it hurts the outputs least."""
    return Compression(BlockInfluence(target, temperature, cap), measure)


@method(kind="compression", paper="this library", status="limits")
def least_loss(
    *, target: Target = Err(0.5), by: Literal["loss", "output", "relative"] = "loss", measure: Measure = Gram()
) -> Compression:
    """Choose the ranks that raise the loss least, as predicted, for what is kept: our own, unpublished."""
    return Compression(LeastLoss(target, by), measure)
