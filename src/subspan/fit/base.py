"""How a matrix becomes a structured one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from subspan.metric import Metric
from subspan.ops import LinOp


class Fit(Protocol):
    """Find an op close to w (m, n) under a metric."""

    def __call__(self, w: Tensor, metric: Metric = ...) -> LinOp:
        """The fitted op, of shape (m, n)."""
        ...
