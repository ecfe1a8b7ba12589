"""Directions: what a rule answers, added to a weight without being formed where a product says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from subspan.optim.state import by_columns
from subspan.shards import add_picked, add_product, among_zeros, beside, local, settled, spread


class Sparing(Protocol):
    """A matrix (..., m, n) known by how it is added to another; it is only read."""

    @property
    def mT(self) -> Sparing:
        """The transpose."""

    def add_to(self, w: Tensor, alpha: float) -> None:
        """w <- w + alpha * self, in place."""

    def dense(self) -> Tensor:
        """The matrix itself, in memory of its own."""


Direction = Tensor | Sparing
Lift = Callable[[Tensor], Sparing]


@dataclass(frozen=True, slots=True, eq=False)
class Low:
    """left @ right, (..., m, rank) times (..., rank, n)."""

    left: Tensor
    right: Tensor

    @property
    def mT(self) -> Low:
        """right^T @ left^T."""
        return Low(self.right.mT, self.left.mT)

    def add_to(self, w: Tensor, alpha: float) -> None:
        """One matrix product that accumulates into w."""
        add_product(w, self.left, self.right, alpha=alpha)

    def dense(self) -> Tensor:
        """The product, laid out like the larger factor, so that adding it runs along rows."""
        return matmul_as(self.left, self.right)


@dataclass(frozen=True, slots=True, eq=False)
class Picked:
    """x in the rows (axis -2) or columns (axis -1) numbered by index, zero in the others; `size` counts all."""

    index: Tensor
    x: Tensor
    size: int
    axis: int = -2

    @property
    def mT(self) -> Picked:
        """The same entries, rows for columns."""
        return Picked(self.index, self.x.mT, self.size, -3 - self.axis)

    def add_to(self, w: Tensor, alpha: float) -> None:
        """Only the picked entries are touched."""
        add_picked(w, self.index, self.x, axis=self.axis, alpha=alpha)

    def dense(self) -> Tensor:
        """x among zeros."""
        if by_columns(self.x):
            return self.mT._filled().mT
        return self._filled()

    def _filled(self) -> Tensor:
        return among_zeros(self.x, self.index, self.size, axis=self.axis)


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """x * by, entry by entry; `by` may have dimensions of size 1."""

    x: Tensor
    by: Tensor

    @property
    def mT(self) -> Times:
        """Both transposed."""
        return Times(self.x.mT, self.by.mT)

    def add_to(self, w: Tensor, alpha: float) -> None:
        """One pass over w and x."""
        along = [axis for axis in (-2, -1) if self.by.shape[axis] == w.shape[axis]]
        local(w).addcmul_(beside(self.x, w, -2, -1), beside(self.by, w, *along), value=alpha)

    def dense(self) -> Tensor:
        """The product."""
        return self.x * self.by


@dataclass(frozen=True, slots=True, eq=False)
class Both:
    """The sum of two directions."""

    one: Sparing
    two: Sparing

    @property
    def mT(self) -> Both:
        """Both transposed."""
        return Both(self.one.mT, self.two.mT)

    def add_to(self, w: Tensor, alpha: float) -> None:
        """One after the other."""
        self.one.add_to(w, alpha)
        self.two.add_to(w, alpha)

    def dense(self) -> Tensor:
        """The sum."""
        out = self.one.dense()
        self.two.add_to(out, 1.0)
        return out


def add_to(w: Tensor, d: Direction, alpha: float) -> None:
    """w <- w + alpha * d, in place."""
    if isinstance(d, Tensor):
        local(w).add_(beside(d, w, -2, -1), alpha=alpha)
    else:
        d.add_to(w, alpha)


def dense(d: Direction) -> Tensor:
    """The direction as a tensor; it may be part of a rule's state, so it is only to be read."""
    return d if isinstance(d, Tensor) else d.dense()


def matmul_as(a: Tensor, x: Tensor) -> Tensor:
    """a @ x with x's memory layout, so that adding the result to a transposed weight runs along its rows."""
    a, x = spread(a, x), spread(x, a)
    return settled(torch.matmul(x.mT, a.mT).mT if by_columns(x) else a @ x, -1)


def coordinates(q: Tensor, g: Tensor) -> Tensor:
    """q^T g, laid out by columns: a product with a tall left factor is a quarter faster than with a flat one."""
    q, g = spread(q, g), spread(g, q)
    return settled((g.mT @ q).mT, -1)
