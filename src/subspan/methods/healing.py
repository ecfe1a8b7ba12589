"""Published ways to choose what learns after a compression, and from what."""

from __future__ import annotations

from typing import Literal

from subspan.distill import Distill
from subspan.heal import Factors
from subspan.methods.registry import method


@method(kind="healing", paper="arXiv:2407.11239", reference="VITA-Group/welore", status="limits",
        deviates="norms stay frozen unless asked; the authors' code leaves them trainable")  # fmt: skip
def welore_peft(*, norms: bool = False) -> Factors:
    """Train only the low-rank components of a compressed model."""
    return Factors(norms=norms)


@method(kind="healing", paper="arXiv:2407.11239", reference="VITA-Group/welore", status="limits")
def full() -> Factors:
    """Train all of a compressed model, its factors included: the baseline of WeLore."""
    return Factors(rest=True)


@method(kind="healing", paper="arXiv:2310.10700", reference="guoyang9/PELA", status="limits",
        deviates="deviations below eps cost nothing, as the paper's bound says; the code pushes them up to eps "
        "(sides='both')")  # fmt: skip
def pela(
    *,
    features: float = 1.0,
    logits: float = 0.0,
    bound: float = 1.0,
    eps: float = 1e-3,
    sides: Literal["above", "both"] = "above",
) -> Factors:
    """Train all of a compressed model towards the features of the dense one, its weights held near."""
    return Factors(rest=True, loss=Distill(features=features, logits=logits, bound=bound, eps=eps, sides=sides))
