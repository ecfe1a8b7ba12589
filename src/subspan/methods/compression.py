"""Published ways to compress weights: a budget and a measure each."""

from __future__ import annotations

from subspan.budget import Err, Target, Uniform, WeLore
from subspan.compress import Compression
from subspan.methods.registry import method
from subspan.metric import AbsMean, Gram, Measure, Plain


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
def welore(*, target: Target = Err(0.5), measure: Measure = Plain()) -> Compression:
    """Let one threshold on normalised spectra choose every rank, then truncate."""
    return Compression(WeLore(target), measure)
