"""How subspaces lie to each other: overlaps, principal angles, gradients compared over checkpoints.

A subspace is given by a frame: a matrix with orthonormal columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from subspan import linalg

Side = Literal["left", "right"]


class Frames(NamedTuple):
    """The leading singular vectors of a matrix (m, n): `left` (m, k), `right` (n, k), and all singular values."""

    left: Tensor
    right: Tensor
    s: Tensor

    def of(self, side: Side, rank: int | None = None) -> Tensor:
        """The frame of one side, or its first `rank` columns."""
        return (self.left if side == "left" else self.right)[:, :rank]


def leading_frames(a: Tensor, rank: int) -> Frames:
    """The leading `rank` singular vectors of a (m, n), or as many as there are.

    >>> leading_frames(torch.diag(torch.tensor([1.0, 5.0])), 1).left.mT
    tensor([[0., 1.]])
    """
    u, s, vh = linalg.svd(a)
    return Frames(u[:, :rank].clone(), vh[:rank].mT.clone(), s)


def subspace_overlap(a: Tensor, b: Tensor) -> float:
    """How much of the smaller of two subspaces lies in the other, between 0 and 1.

        |a^T b|_F^2 / min(j, k)

    for frames a (n, j) and b (n, k): the mean squared cosine of the principal angles. Two random subspaces
    overlap by max(j, k) / n on average, which `chance_overlap` gives. Raises ValueError for frames of another
    height, and for columns that are not orthonormal.

    >>> subspace_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
    0.5
    """
    a, b = _frame(a, "the first"), _frame(b, "the second")
    _same_height(a, b)
    return float((a.mT @ b).square().sum() / min(a.shape[1], b.shape[1]))


def chance_overlap(j: int, k: int, n: int) -> float:
    """The mean `subspace_overlap` of uniformly random subspaces of R^n with j and k dimensions.

    >>> chance_overlap(8, 8, 64)
    0.125
    """
    if not 1 <= min(j, k) <= max(j, k) <= n:
        raise ValueError(f"subspaces of {j} and {k} dimensions do not fit into {n}; give 1 to {n} for each")
    return max(j, k) / n


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """The principal angles between frames a (n, j) and b (n, k), in radians, ascending, (min(j, k),).

    From sines and cosines both, so that small angles are as exact as large ones (Bjorck and Golub, 1973).

    >>> principal_angles(torch.eye(3)[:, :2], torch.eye(3)[:, 1:]).rad2deg()
    tensor([ 0., 90.], dtype=torch.float64)
    """
    a, b = _frame(a, "the first"), _frame(b, "the second")
    _same_height(a, b)
    a, b = (a, b) if a.shape[1] >= b.shape[1] else (b, a)
    inner = a.mT @ b
    cosines = torch.linalg.svdvals(inner)
    sines = torch.linalg.svdvals(b - a @ inner).flip(0)
    return torch.atan2(sines, cosines)


def captured(g: Tensor, frame: Tensor, side: Side = "left") -> float:
    """The share of the energy of g (m, n) in the subspace of a frame of its rows' or columns' space.

        |q^T g|_F^2 / |g|_F^2   on the left,   |g q|_F^2 / |g|_F^2   on the right

    This is what a projected optimizer with the basis q sees of the gradient g. NaN for a zero g.
    """
    q, x = _frame(frame, "the given"), g.detach().double()
    x = x if side == "left" else x.mT
    _same_height(q, x)
    return float((q.mT @ x).square().sum() / x.square().sum())


def gradient_cosine_matrix(gradients: Sequence[Tensor]) -> Tensor:
    """The cosines (t, t) between gradients of one matrix at t checkpoints, on the same batch.

        <vec G_i, vec G_j> / (|G_i| |G_j|)

    Summed in float64; NaN in the row and column of a zero gradient. Source: arXiv:2407.11239, figure 2.
    Raises ValueError for gradients of different shapes.

    >>> gradient_cosine_matrix([torch.ones(2, 2), 3 * torch.ones(2, 2), -torch.ones(2, 2)])[0]
    tensor([ 1.,  1., -1.], dtype=torch.float64)
    """
    _same_shape(gradients)
    flat = [g.detach().flatten() for g in gradients]
    inner = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for i, left in enumerate(flat):
        x = left.double()
        for j in range(i + 1):
            inner[i, j] = inner[j, i] = x @ flat[j].double()
    norms = inner.diagonal().sqrt()
    return inner / torch.outer(norms, norms)


def gradient_subspace_trace(gradients: Sequence[Tensor], top: int = 100) -> Tensor:
    """The leading singular values of the gradients at t checkpoints, each row over its largest, (t, top).

    A row that falls at once is a gradient of few directions. Zero gradients give rows of zeros. The same on
    weights shows what they become. Source: arXiv:2407.11239, figure 3.
    """
    _same_shape(gradients)
    rows = [linalg.svdvals(g.detach())[:top].double().cpu() for g in gradients]
    return torch.stack([row / row.max().clamp_min(torch.finfo(torch.float64).tiny) for row in rows])


def overlap_matrix(frames: Sequence[Tensor]) -> Tensor:
    """The `subspace_overlap` (t, t) of every two of t frames of one space."""
    got = torch.eye(len(frames), dtype=torch.float64)
    for i, a in enumerate(frames):
        for j, b in enumerate(frames[:i]):
            got[i, j] = got[j, i] = subspace_overlap(a, b)
    return got


def steadiness(frames: Sequence[Tensor]) -> list[float]:
    """The overlap of each frame with the next, (t - 1): near 1 where the subspace has come to rest."""
    return [subspace_overlap(a, b) for a, b in pairwise(frames)]


def _frame(q: Tensor, which: str) -> Tensor:
    if q.ndim != 2 or not 1 <= q.shape[1] <= q.shape[0]:
        raise ValueError(f"{which} frame has shape {tuple(q.shape)}; it must be (n, k) with 1 <= k <= n")
    x = linalg.wide(q.detach()).double()
    off = float((x.mT @ x - torch.eye(x.shape[1], dtype=x.dtype, device=x.device)).abs().max())
    # Half precision rounds an entry by 2^-8 of itself.
    if not off <= 2e-2:
        raise ValueError(
            f"the columns of {which} frame of shape {tuple(q.shape)} are not orthonormal: q^T q is off the "
            f"identity by {off:.2g}; pass it through subspan.linalg.qr first"
        )
    return x


def _same_height(a: Tensor, b: Tensor) -> None:
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"{tuple(a.shape)} and {tuple(b.shape)} do not live in one space; heights must agree")


def _same_shape(gradients: Sequence[Tensor]) -> None:
    kinds = list(dict.fromkeys(tuple(g.shape) for g in gradients))
    if len(kinds) != 1:
        raise ValueError(
            f"gradients of shapes {kinds or 'none'} were given; they must all be of one matrix, one at least"
        )
