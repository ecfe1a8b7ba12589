"""`Scaling`: the gradient itself moves, and the subspace only measures how far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from subspan.optim.direction import Direction, Lift, Times
from subspan.optim.residual import columns_norm, limited, scaled
from subspan.optim.state import State


@dataclass(frozen=True, slots=True)
class Scaling:
    """The raw gradient, scaled as the rule scaled its coordinates (Zhu et al., 2024, arXiv:2412.05270).

        x = factor * g * |d_j| / |r_j|,   x <- x / f,   step = scale * x

    `by` says whose norms: "column", one ratio for every column; "tensor", one for the whole. f limits the growth
    of |x| as in `NormScale`; it sees `factor` and does not see Projected's `scale`. x is never formed: its norm
    follows from |g_j|, and the step is a product for one pass over weight and gradient.
    """

    by: Literal["column", "tensor"] = "column"
    limit: float | None = 1.01
    factor: float = 1.0
    raw: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.by not in ("column", "tensor"):
            raise ValueError(f"Scaling: by={self.by!r}; use 'column' or 'tensor'")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"Scaling: limit={self.limit!r} would make every step shorter; use >= 1, or None")

    def init(self, g: Tensor, seed: int) -> State:
        """`norm` (...): |x| of the last step; infinite, so that the first is not limited."""
        return {} if self.limit is None else {"norm": g.new_full(g.shape[:-2], torch.inf)}

    def enter(self, g: Tensor, s: State) -> Tensor:
        """g."""
        return g

    def leave(self, d: Tensor, r: Tensor, g: Tensor, s: State, *, up: Lift, scale: float) -> Direction:
        """scale * x; the frame is not needed again."""
        ratio = scaled(self._norms(d) / (self._norms(r) + 1e-8), self.factor)
        if self.limit is not None:
            norm = vector_norm(ratio * self._norms(g), dim=(-2, -1))
            ratio = ratio / limited(norm, s, self.limit)[..., None, None]
        return Times(g, scaled(ratio, scale))

    def _norms(self, x: Tensor) -> Tensor:
        """(..., 1, n), or (..., 1, 1) of the whole."""
        if self.by == "column":
            return columns_norm(x)
        whole: Tensor = vector_norm(x, dim=(-2, -1), keepdim=True)
        return whole
