"""`Power`: a subspace that follows a gradient by one power step from its last coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from subspan import linalg
from subspan.optim.direction import Low, coordinates, matmul_as
from subspan.optim.state import State, counter
from subspan.optim.subspace import count, draw_normal, require_rank
from subspan.shards import settled, spread, zeros_beside


@dataclass(frozen=True, slots=True)
class Power:
    """One power step a refresh, from the right basis that the last one left (Vogels et al., 2019; Dion, 2025).

        p = orth(g q),   q <- g^T p, its columns of length 1

    `rank` counts vectors (clamped to the shorter side) or is a share of the m rows; the first q is standard
    normal. So p = orth(g last^T p) where `Span` takes orth(g g^T p): the same while the gradient stands still,
    else one product less and one gradient late. Keeps (m + n) rank numbers.

    >>> power, g = Power(1), torch.outer(torch.tensor([3.0, 4.0]), torch.ones(3))
    >>> power.fit(g, power.init(g, 0), True)["p"].abs().mT
    tensor([[0.6000, 0.8000]])
    """

    rank: int | float
    orthonormal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank("Power", self.rank)

    def init(self, g: Tensor, seed: int) -> State:
        """`p` (..., m, rank), empty, and `q` (..., n, rank), drawn."""
        m, n = g.shape[-2:]
        rank = count(self.rank, m, min(m, n))
        draw = draw_normal({"seed": counter(seed), "draw": counter()}, n, rank).to(g.device, g.dtype)
        return {"p": zeros_beside(g, rank), "q": spread(draw.expand(*g.shape[:-2], n, rank).clone(), g)}

    def fit(self, g: Tensor, s: State, due: bool) -> State:
        """Both bases when due; raises ValueError for NaN or Inf."""
        if not due:
            return dict(s)
        linalg.require_finite(g)
        p = linalg.orth(g @ s["q"])
        q = settled(g.mT @ p)
        # only directions matter; powers of a length would overflow
        return {"p": p, "q": q / vector_norm(q, dim=-2, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)}

    def down(self, g: Tensor, s: State) -> Tensor:
        """p^T g."""
        return coordinates(s["p"], g)

    def up(self, x: Tensor, s: State) -> Low:
        """p x."""
        return Low(s["p"], x)

    def move(self, x: Tensor, old: State, new: State, degree: int) -> Tensor:
        """C x with C = new^T old, or (C * C) x, as in `Span`."""
        turn = settled(new["p"].mT @ old["p"])
        return matmul_as(turn if degree == 1 else turn.square(), x)
