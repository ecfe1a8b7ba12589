"""Published ways to choose what learns after a compression."""

from __future__ import annotations

from subspan.heal import Factors
from subspan.methods.registry import method


@method(kind="healing", paper="arXiv:2407.11239", reference="VITA-Group/welore", status="limits",
        deviates="norms stay frozen unless asked; the authors' code leaves them trainable")  # fmt: skip
def welore_peft(*, norms: bool = False) -> Factors:
    """Train only the low-rank components of a compressed model."""
    return Factors(norms=norms)
