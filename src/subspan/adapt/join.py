"""How an op meets an existing weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from subspan.linalg import wide
from subspan.ops import LinOp
from subspan.ops.base import hold


class Layer(Protocol):
    """Anything linear that a join can stand on: `nn.Linear`, or the fold of a layer and earlier adapters."""

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in)."""

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), if any."""

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., in) -> (..., out)."""


class Join(Protocol):
    """How a weight w (m, n) and an op of the same shape become one weight.

    `weight` is the definition, `forward` a shortcut that never forms it. Joins with trained tensors are modules,
    whose constructor arguments, attributes and state-dict keys share one name, as an op's do.
    """

    def at(self, w: Tensor, op: LinOp) -> Join:
        """The join bound to one site: itself, unless it has tensors to initialise there."""

    def weight(self, w: Tensor, op: LinOp) -> Tensor:
        """The joined weight (m, n); half precision comes in, float32 goes out."""

    def forward(self, base: Layer, op: LinOp, x: Tensor) -> Tensor:
        """What a layer of that weight and the base's bias makes of x: (..., n) -> (..., m)."""

    def remainder(self, w: Tensor, op: LinOp) -> Tensor:
        """The base weight that a freshly bound join turns back into w."""


def per_rank(alpha: float, rank: int, power: float = 1.0) -> float:
    """The scale alpha / rank**power; raises ValueError unless rank >= 1 and alpha is positive and finite.

    >>> per_rank(16.0, 4), per_rank(16.0, 4, 0.5)
    (4.0, 8.0)
    """
    if rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"scale alpha / rank**{power}: alpha {alpha} and rank {rank} must both be positive")
    scale: float = alpha / rank**power
    return scale


@dataclass(frozen=True)
class Add:
    """w + scale * op."""

    scale: float = 1.0

    def at(self, w: Tensor, op: LinOp) -> Add:
        """Nothing to bind: itself."""
        return self

    def weight(self, w: Tensor, op: LinOp) -> Tensor:
        """w + scale * op, (m, n)."""
        return wide(w) + self.scale * wide_dense(op)

    def forward(self, base: Layer, op: LinOp, x: Tensor) -> Tensor:
        """base(x) + scale * op(x)."""
        return base(x) + self.scale * apply(op, x)

    def remainder(self, w: Tensor, op: LinOp) -> Tensor:
        """w - scale * op, (m, n)."""
        return wide(w) - self.scale * wide_dense(op)


class Rescale(nn.Module):
    """The sum w + scale * op with every row stretched to a trained length mu (m,).

        diag(mu / |w + scale * op|_row) (w + scale * op)        (Liu et al., 2024, eq. 5)

    The norm carries no gradient (their section 4.3). A row of zeros stays zero until the op moves it.
    `at` sets mu to the present norms, so that nothing changes at first; before that, using the join raises
    ValueError.
    """

    def __init__(self, scale: float = 1.0, mu: Tensor | None = None) -> None:
        super().__init__()
        self.scale = float(scale)
        self.mu = None if mu is None else hold(mu)

    def extra_repr(self) -> str:
        """The scale."""
        return f"scale={self.scale}"

    def at(self, w: Tensor, op: LinOp) -> Rescale:
        """A new join with trainable mu = |w + scale * op|_row; one that already has its mu stays itself."""
        if self.mu is not None:
            return self
        return Rescale(self.scale, nn.Parameter(row_norms(w, op, self.scale)))

    def gain(self, norm: Tensor) -> Tensor:
        """mu / norm, (m,); 1 where the norm is 0."""
        if self.mu is None:
            raise ValueError(f"{self!r} has no magnitude yet; bind it to a weight with at(w, op)")
        alive = norm > 0
        # Divide by a harmless number first: where() alone would still send 0 * inf = nan back to mu.
        return torch.where(alive, self.mu / torch.where(alive, norm, 1.0), 1.0)

    def weight(self, w: Tensor, op: LinOp) -> Tensor:
        """diag(mu / norm) (w + scale * op), (m, n)."""
        gain = self.gain(row_norms(w, op, self.scale))
        return gain.unsqueeze(-1) * Add(self.scale).weight(w, op)

    def forward(self, base: Layer, op: LinOp, x: Tensor) -> Tensor:
        """base(x) + (gain - 1) * (base(x) - bias) + gain * scale * op(x)."""
        with torch.no_grad():
            norm = row_norms(base.weight, op, self.scale)
        gain = self.gain(norm)
        y = base(x)
        linear = y if base.bias is None else y - base.bias
        # As a difference from 1, a gain of 1 leaves the base output as it is, bit for bit.
        return y + (gain - 1).to(y.dtype) * linear + (gain * self.scale).to(y.dtype) * apply(op, x)

    def remainder(self, w: Tensor, op: LinOp) -> Tensor:
        """w - scale * op, (m, n)."""
        return Add(self.scale).remainder(w, op)


@torch.no_grad()
def row_norms(w: Tensor, op: LinOp, scale: float) -> Tensor:
    """|w + scale * op| of every row, (m,), without gradient; half precision comes in, float32 goes out.

    >>> from subspan.ops import Dense
    >>> row_norms(torch.tensor([[3.0, 0.0]]), Dense(torch.tensor([[0.0, 2.0]])), 2.0)
    tensor([5.])
    """
    norms: Tensor = torch.linalg.vector_norm(Add(scale).weight(w, op), dim=-1)
    return norms


def apply(op: LinOp, x: Tensor) -> Tensor:
    """op(x) in the op's own precision, returned in that of x: float32 adapters stand on a bfloat16 layer."""
    own = next((p.dtype for p in op.parameters() if p.is_floating_point()), x.dtype)
    y: Tensor = op(x.to(own)).to(x.dtype)
    return y


def wide_dense(op: LinOp) -> Tensor:
    """The op's matrix (m, n), multiplied out in float32 also when its factors are stored in half precision."""
    stored = {k: t for k, t in (*op.named_parameters(), *op.named_buffers()) if t.is_floating_point()}
    if all(t is wide(t) for t in stored.values()):
        return op.dense()
    dense: Tensor = functional_call(_Dense(op), {f"op.{k}": wide(t) for k, t in stored.items()})
    return dense


class _Dense(nn.Module):
    """An op whose forward is `dense`, the only form that `functional_call` can call."""

    def __init__(self, op: LinOp) -> None:
        super().__init__()
        self.op = op

    def forward(self) -> Tensor:
        return self.op.dense()
