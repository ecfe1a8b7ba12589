"""How an op meets an existing weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from subspan.adapt.fast import Norms, bare, eager, norms_lowrank, sum_lowrank
from subspan.linalg import wide
from subspan.ops import LinOp, factors
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
        return added(base, op, self.scale, x)

    def remainder(self, w: Tensor, op: LinOp) -> Tensor:
        """w - scale * op, (m, n)."""
        return wide(w) - self.scale * wide_dense(op)


class Rescale(nn.Module):
    """The sum w + scale * op with every row stretched to a trained length mu (m,).

        diag(mu / |w + scale * op|_row) (w + scale * op)        (Liu et al., 2024, eq. 5)

    The norm carries no gradient (their section 4.3). A row of zeros stays zero until the op moves it.
    `at` sets mu to the present norms, so that nothing changes at first; before that, using the join raises
    ValueError.

    The norms of a low-rank op come from its factors (`fast.norms_lowrank`). The row norms of a base parameter are
    remembered while no operation writes to it, and so are those of the sum while the factors are equal. A write
    through `base.weight.data` is seen only after a call of `train` or `eval`, or a move.
    """

    def __init__(self, scale: float = 1.0, mu: Tensor | None = None) -> None:
        super().__init__()
        self.scale = float(scale)
        self.mu = None if mu is None else hold(mu)
        self._norms = Norms()

    def train(self, mode: bool = True) -> Self:
        """Set the mode and forget what was remembered."""
        self._norms.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._norms.forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

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
        """gain * base(x) + (1 - gain) * bias + gain * scale * op(x).

        A gain of 1 leaves base(x) + scale * op(x) as it is, bit for bit.
        """
        gain = self.gain(self.norms(base.weight, op))
        return stretched(added(base, op, self.scale, x), gain, base.bias)

    def norms(self, w: Tensor, op: LinOp) -> Tensor:
        """`row_norms` of the sum, or what is remembered of it."""
        pair = factors(op)
        if pair is None:
            return row_norms(w, op, self.scale)
        return self._norms(w, *pair, self.scale)

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
    pair = factors(op)
    if pair is not None:
        return norms_lowrank(w, *pair, scale)
    norms: Tensor = torch.linalg.vector_norm(Add(scale).weight(w, op), dim=-1)
    return norms


def added(base: Layer, op: LinOp, scale: float, x: Tensor) -> Tensor:
    """base(x) + scale * op(x): (..., n) -> (..., m), in the precision of base(x).

    The base's output is written over only where nobody else can see it: that of an ordinary `nn.Linear` without
    hooks.
    """
    pair = factors(op) if bare(op) else None
    if pair is None or not (torch.is_autocast_enabled(x.device.type) or x.dtype == pair[1].dtype):
        y = base(x)
        return torch.add(y, apply(op, x).to(y.dtype), alpha=scale)
    fresh = type(base) is nn.Linear and bare(base) and eager(x, base.weight, *pair)
    rows = x.reshape(-1, x.shape[-1])
    # Others may tell batch from length.
    y = base(rows) if fresh else base(x).reshape(rows.shape[0], op.shape[0])
    y = sum_lowrank(y, rows, *pair, scale, fresh=fresh)
    return y.view(*x.shape[:-1], op.shape[0])


def stretched(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """gain * (z - bias) + bias; exactly z where the gain is 1."""
    if z.dtype == gain.dtype:
        return z * gain if bias is None else torch.addcmul(bias * (1 - gain), z, gain)
    # A gain near 1 has few digits in half precision, its difference from 1 has all of them.
    return torch.addcmul(z, z if bias is None else z - bias.to(z.dtype), (gain - 1).to(z.dtype))


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
