"""Dense, diagonal and low-rank matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from subspan.ops.base import LinOp, hold


class Dense(LinOp):
    """A matrix stored as itself, w (m, n)."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = hold(w)
        self.shape = (w.shape[0], w.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)

    def back(self, x: Tensor) -> Tensor:
        return x @ self.w

    def dense(self) -> Tensor:
        return self.w


class Diag(LinOp):
    """A square diagonal matrix, d (n,)."""

    def __init__(self, d: Tensor) -> None:
        super().__init__()
        self.d = hold(d)
        self.shape = (d.shape[0], d.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.d

    def back(self, x: Tensor) -> Tensor:
        return x * self.d

    def dense(self) -> Tensor:
        return torch.diag(self.d)


class LowRank(LinOp):
    """u @ v with u (m, rank) and v (rank, n).

    >>> LowRank(torch.ones(3, 1), torch.ones(1, 2))(torch.tensor([1.0, 2.0]))
    tensor([3., 3., 3.])
    """

    def __init__(self, u: Tensor, v: Tensor) -> None:
        super().__init__()
        if u.shape[1] != v.shape[0]:
            raise ValueError(f"LowRank: u {tuple(u.shape)} and v {tuple(v.shape)} disagree about the rank")
        self.u = hold(u)
        self.v = hold(v)
        self.shape = (u.shape[0], v.shape[1])

    @property
    def rank(self) -> int:
        """The inner size, which bounds the rank."""
        return self.u.shape[1]

    def lay(self, *, by_columns: bool) -> None:
        """Lay out u in memory column after column, or else row after row; no number changes.

        A product with a single row reads it by columns in half the time. Optimizers and FSDP want rows.
        """
        if type(self.u.data) is Tensor:  # not a shard of one
            u = self.u.data.mT.contiguous().mT if by_columns else self.u.data.contiguous()
            if u.stride() != self.u.stride():
                self.u.data = u

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.v), self.u)

    def back(self, x: Tensor) -> Tensor:
        return (x @ self.u) @ self.v

    def dense(self) -> Tensor:
        return self.u @ self.v


def factors(op: LinOp) -> tuple[Tensor, Tensor] | None:
    """(u, v) of an op that is x -> (x v^T) u^T and nothing else, so that callers may compute that; else None.

    >>> factors(Dense(torch.ones(2, 2))) is None
    True
    """
    return (op.u, op.v) if type(op) is LowRank else None
