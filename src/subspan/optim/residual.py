"""Residuals: what becomes of the part of a gradient that its subspace misses. Shapes as in `subspace`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from subspan.optim.direction import Both, Direction, Lift, Times
from subspan.optim.state import State, by_columns


class Residual(Protocol):
    """A frozen dataclass of settings, called before and after the rule that works in the subspace."""

    @property
    def raw(self) -> bool:
        """Whether it looks at more of the gradient than its coordinates."""

    @property
    def orthonormal(self) -> bool:
        """Whether it is only right for frames with down(up(x)) = x."""

    def init(self, g: Tensor, seed: int) -> State:
        """The state for gradients like g."""

    def enter(self, g: Tensor, s: State) -> Tensor:
        """The gradient to project: g, or g and what was kept of earlier ones. Never overwrites g."""

    def leave(self, d: Tensor, r: Tensor, g: Tensor, s: State, *, up: Lift, scale: float) -> Direction:
        """The full direction (..., m, n), from the one inside the subspace.

        d (..., rank, n) is the rule's answer to the coordinates r of g, which `enter` returned; all three are
        only read. Without a residual it is scale * up(d).
        """


@dataclass(frozen=True, slots=True)
class Drop:
    """What the subspace misses is lost."""

    raw: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = False

    def init(self, g: Tensor, seed: int) -> State:
        """No state."""
        return {}

    def enter(self, g: Tensor, s: State) -> Tensor:
        """g."""
        return g

    def leave(self, d: Tensor, r: Tensor, g: Tensor, s: State, *, up: Lift, scale: float) -> Direction:
        """scale * up(d)."""
        return up(scaled(d, scale))


@dataclass(frozen=True, slots=True)
class Sign:
    """The sign of what the subspace misses, a step without state (Zmushko et al., 2024, arXiv:2411.07837).

    scale * up(d) + weight * sign(g - up(r))
    """

    weight: float = 1.0
    raw: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = False

    def init(self, g: Tensor, seed: int) -> State:
        """No state."""
        return {}

    def enter(self, g: Tensor, s: State) -> Tensor:
        """g."""
        return g

    def leave(self, d: Tensor, r: Tensor, g: Tensor, s: State, *, up: Lift, scale: float) -> Direction:
        """The sign, formed, and the rest added to it."""
        out = g.neg()
        up(r).add_to(out, 1.0)
        out.sign_().mul_(-self.weight)
        up(d).add_to(out, scale)
        return out


@dataclass(frozen=True, slots=True)
class NormScale:
    """What the subspace misses, each column scaled as the rule scaled it inside (Chen et al., 2024).

        x = (g - (1 - leak) up(r)) * |d_j| / |r_j|,   x <- x / f,   f = max(|x| / |x_before|, limit) / limit

    The norm of x grows by at most the factor `limit` a step (None: freely) and may fall at once. The authors'
    program has leak = 1 - scale, since its up already holds the scale. x is never formed: up(r) is linear and
    the scaling acts on columns, so the step is up(scale d - (1 - leak) ratio r) + ratio g, and its norm follows
    from |g_j| and |r_j|, as g - up(r) and up(r) are orthogonal.
    """

    limit: float | None = 1.01
    leak: float = 0.0
    raw: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"NormScale: limit={self.limit!r} would make every step shorter; use >= 1, or None")

    def init(self, g: Tensor, seed: int) -> State:
        """`norm` (...): |x| of the last step; infinite, so that the first is not limited."""
        return {} if self.limit is None else {"norm": g.new_full(g.shape[:-2], torch.inf)}

    def enter(self, g: Tensor, s: State) -> Tensor:
        """g."""
        return g

    def leave(self, d: Tensor, r: Tensor, g: Tensor, s: State, *, up: Lift, scale: float) -> Direction:
        """scale * up(d) + x."""
        inside = columns_norm(r)
        ratio = columns_norm(d) / (inside + 1e-8)
        if self.limit is not None:
            outside = columns_norm(g).square() - (1 - self.leak**2) * inside.square()
            norm = vector_norm(ratio * outside.clamp_min(0).sqrt(), dim=(-2, -1))
            ratio = ratio / limited(norm, s, self.limit)[..., None, None]
        rest = scaled(d, scale).addcmul(r, ratio, value=self.leak - 1)
        return Both(up(rest), Times(g, ratio))


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """What the subspace misses is added to the next gradient.

    error <- (g + error) - (1 - kept) up(r)          (Vogels et al., 2019, Alg. 1 has kept = 0)
    """

    kept: float = 0.0
    raw: ClassVar[bool] = True
    orthonormal: ClassVar[bool] = False

    def init(self, g: Tensor, seed: int) -> State:
        """`error` like g."""
        return {"error": torch.zeros_like(g)}

    def enter(self, g: Tensor, s: State) -> Tensor:
        """g + error, fresh: should the frame refuse it, the error is still the old one."""
        return s["error"] + g

    def leave(self, d: Tensor, r: Tensor, g: Tensor, s: State, *, up: Lift, scale: float) -> Direction:
        """scale * up(d); keeps the error."""
        up(r).add_to(g, self.kept - 1)  # g is what `enter` made
        s["error"] = g
        return up(scaled(d, scale))


def scaled(d: Tensor, scale: float) -> Tensor:
    """scale * d, or d itself for 1."""
    return d if scale == 1 else d * scale


def columns_norm(g: Tensor) -> Tensor:
    """Norms (..., 1, n) of the columns of g (..., m, n)."""
    if by_columns(g):
        norms: Tensor = vector_norm(g, dim=-2, keepdim=True)
        return norms
    # Down the columns of a row-major matrix torch's norm takes four times as long as a product and a sum.
    squares: Tensor = vecdot(g, g, dim=-2).unsqueeze(-2)
    return squares.sqrt()


def limited(norm: Tensor, s: State, limit: float) -> Tensor:
    """The factor f >= 1 that divides a step of this norm; `s["norm"]` becomes what is left (Chen et al., 2024)."""
    f = (norm / (s["norm"] + 1e-8)).clamp_min(limit) / limit
    s["norm"] = norm / f
    return f
