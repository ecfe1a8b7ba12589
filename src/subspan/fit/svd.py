"""The best low-rank approximation under a metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from subspan import linalg
from subspan.metric import Metric
from subspan.ops import LowRank

Solver = Literal["exact", "gram"]


@dataclass(frozen=True, slots=True, eq=False)
class Decomposition:
    """All the best approximations of one weight w (m, n) at once: `left @ right = w`, cut anywhere.

    With L w R = U S V^T the best rank-k matrix under |L (.) R|_F is L^-1 U_k S_k V_k^T R^-1, which equals
    (L^-1 U_k) (U_k^T L w): R need not be inverted, so a nearly singular R does no harm.
    left (m, k), s (k,) the singular values under the metric, right (k, n), mean (n,) the metric's own.
    """

    left: Tensor
    s: Tensor
    right: Tensor
    mean: Tensor | None = None

    def cut(self, rank: int, where: str = "matrix") -> LowRank:
        """The best op of this rank, its singular values shared evenly between the factors."""
        linalg.check_rank(rank, self.left.shape[0], self.right.shape[1], where)
        # Where s vanishes the split does not matter; the floor keeps it finite.
        root = self.s[:rank].clamp_min(self.s[0] * 1e-12 + 1e-30).sqrt().to(self.left.dtype)
        return LowRank(self.left[:, :rank] * root, self.right[:rank] / root[:, None])

    def shift(self, rank: int) -> Tensor | None:
        """What the bias gains beside `cut(rank)`: (w - cut) mean, (m,), or None for a metric without a mean."""
        if self.mean is None:
            return None
        return self.left[:, rank:] @ (self.right[rank:] @ self.mean.to(self.right.dtype))

    def error(self, rank: int) -> float:
        """The relative error of `cut(rank)`: sqrt(sum_{i > rank} s_i^2 / sum s_i^2)."""
        energy = self.s.double().square()
        total = energy.sum()
        return float((energy[rank:].sum() / total).sqrt()) if total else 0.0


def decompose(w: Tensor, metric: Metric = Metric(), *, solver: Solver = "exact") -> Decomposition:
    """Decompose w (m, n) under a metric, once for every rank, in w's precision (float32 for half precision)."""
    work = linalg.wide(w)
    factors = (linalg.svd if solver == "exact" else linalg.svd_gram)(metric.apply(work).to(work.dtype))
    left = metric.solve_left(factors.u).to(work.dtype)
    right = factors.u.mT @ metric.apply_left(work).to(work.dtype)
    return Decomposition(left, factors.s, right, metric.mean)


@dataclass(frozen=True, slots=True)
class Svd:
    """Truncated singular value decomposition: the optimum among matrices of this rank (Eckart, Young, 1936).

    >>> import torch
    >>> Svd(rank=1)(torch.eye(2)).rank
    1
    """

    rank: int
    solver: Solver = "exact"

    def __post_init__(self) -> None:
        if self.solver not in get_args(Solver):
            raise ValueError(f"solver {self.solver!r} is unknown; choose one of {', '.join(get_args(Solver))}")

    def __call__(self, w: Tensor, metric: Metric = Metric()) -> LowRank:
        """The optimum of |L (w - op) R|_F; raises ValueError for a rank outside 1..min(m, n)."""
        linalg.check_rank(self.rank, *w.shape)
        op = decompose(w, metric, solver=self.solver).cut(self.rank)
        return LowRank(op.u.to(w.dtype), op.v.to(w.dtype))
