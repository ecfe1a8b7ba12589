"""Fits made of fits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subspan.fit.base import Fit
from subspan.metric import Metric
from subspan.ops import LinOp, Sum


@dataclass(frozen=True, slots=True)
class Stack:
    """A sum of ops, each fitted to what the others leave, in `sweeps` rounds.

    op_i <- fit_i(w - sum_{j != i} op_j)
    """

    fits: tuple[Fit, ...]
    sweeps: int = 1

    def __call__(self, w: Tensor, metric: Metric = Metric()) -> LinOp:
        """The fitted sum."""
        parts: list[LinOp | None] = [None] * len(self.fits)
        for _ in range(self.sweeps):
            for i, fit in enumerate(self.fits):
                others = [part for j, part in enumerate(parts) if j != i and part is not None]
                rest = w - Sum(others).dense().detach() if others else w
                parts[i] = fit(rest, metric)
        return Sum([part for part in parts if part is not None])


def stack(*fits: Fit, sweeps: int = 1) -> Stack:
    """Fit a sum of ops, alternating `sweeps` times; raises ValueError without fits or sweeps."""
    if not fits or sweeps < 1:
        raise ValueError(f"stack needs at least one fit and one sweep, got {len(fits)} and {sweeps}")
    return Stack(fits, sweeps)
