"""Joins that multiply the weight."""

from __future__ import annotations

from math import isqrt

from torch import Tensor, nn

from subspan.adapt.join import Add, Layer, apply
from subspan.linalg import wide
from subspan.ops import BlockCayley, LinOp


class Rotate(nn.Module):
    """The sum w + op with its inputs turned, in equal blocks of neighbours, by a trained orthogonal matrix R.

        (w + op) R^T,    R = diag of blocks (I - Q) (I + Q)^-1,    Q = -Q^T

    A block is as large as the number of inputs allows, `block` at most. The angles between the rows, and for
    op = 0 the singular values of w, stay what they were (Qiu et al., 2023).
    `at` sets Q to zero, so that nothing changes at first; before that, using the join raises ValueError.
    """

    turn: BlockCayley | None

    def __init__(self, block: int = 32, turn: BlockCayley | None = None) -> None:
        super().__init__()
        if block < 2:
            raise ValueError(f"Rotate: block {block} must be at least 2; one number cannot turn")
        self.block = block
        self.turn = turn

    def extra_repr(self) -> str:
        """The size of a block."""
        return f"block={self.block}"

    def at(self, w: Tensor, op: LinOp) -> Rotate:
        """A new join with a trainable Q for the inputs of w (m, n); one that already has its Q stays itself.

        Raises ValueError when no block above 1 and up to `block` divides the inputs.
        """
        if self.turn is not None:
            return self
        n = w.shape[-1]
        size = max(d for d in divisors(n) if d <= self.block)
        if size < 2:
            raise ValueError(f"no block in 2..{self.block} divides {n} inputs; allow one of {divisors(n)[1:]}")
        q = wide(w.detach()[:0]).new_zeros(n // size, size * (size - 1) // 2)
        return Rotate(size, BlockCayley(nn.Parameter(q)))

    def bound(self) -> BlockCayley:
        """The rotation; raises ValueError when the join has none yet."""
        if self.turn is None:
            raise ValueError(f"{self!r} has no rotation yet; bind it to a weight with at(w, op)")
        return self.turn

    def weight(self, w: Tensor, op: LinOp) -> Tensor:
        """(w + op) R^T, (m, n)."""
        return self.bound()(Add().weight(w, op))

    def forward(self, base: Layer, op: LinOp, x: Tensor) -> Tensor:
        """base(x R) + op(x R): the inputs are turned, not the weight."""
        turn = self.bound()
        turned = turn.back(x.to(turn.q.dtype)).to(x.dtype)
        y = base(turned)
        return y + apply(op, turned).to(y.dtype)

    def remainder(self, w: Tensor, op: LinOp) -> Tensor:
        """w - op, (m, n): a fresh rotation turns nothing."""
        return Add().remainder(w, op)


def divisors(n: int) -> list[int]:
    """The divisors of n in order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d < n]
