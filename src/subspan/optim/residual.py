"""Residuals: what becomes of the part of a gradient that its subspace misses. Shapes as in `subspace`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.linalg import vector_norm

from subspan.optim.state import State

Up = Callable[[Tensor], Tensor]


class Residual(Protocol):
    """A frozen dataclass of settings, called before and after the rule that works in the subspace."""

    def init(self, g: Tensor, seed: int) -> State:
        """The state for gradients like g."""

    def enter(self, g: Tensor, s: State) -> Tensor:
        """The gradient to project: g, or g and what was kept of earlier ones. Never overwrites g."""

    def leave(self, u: Tensor, g: Tensor, r: Tensor, d: Tensor, up: Up, s: State) -> Tensor:
        """The full direction, from the one inside the subspace.

        u (..., m, n) is scale * up(d) and may be overwritten; g is what `enter` returned, r (..., rank, n) its
        coordinates and d the rule's answer to them.
        """


@dataclass(frozen=True, slots=True)
class Drop:
    """What the subspace misses is lost."""

    def init(self, g: Tensor, seed: int) -> State:
        """No state."""
        return {}

    def enter(self, g: Tensor, s: State) -> Tensor:
        """g."""
        return g

    def leave(self, u: Tensor, g: Tensor, r: Tensor, d: Tensor, up: Up, s: State) -> Tensor:
        """u."""
        return u


@dataclass(frozen=True, slots=True)
class Sign:
    """The sign of what the subspace misses, a step without state (Zmushko et al., 2024, arXiv:2411.07837).

    u + scale * sign(g - up(r))
    """

    scale: float = 1.0

    def init(self, g: Tensor, seed: int) -> State:
        """No state."""
        return {}

    def enter(self, g: Tensor, s: State) -> Tensor:
        """g."""
        return g

    def leave(self, u: Tensor, g: Tensor, r: Tensor, d: Tensor, up: Up, s: State) -> Tensor:
        """u and the scaled sign."""
        return u.add_(up(r).sub_(g).sign_(), alpha=-self.scale)


@dataclass(frozen=True, slots=True)
class NormScale:
    """What the subspace misses, each column scaled as the rule scaled it inside (Chen et al., 2024).

        x = (g - (1 - leak) up(r)) * |d_j| / |r_j|,   x <- x / f,   f = max(|x| / |x_before|, limit) / limit

    The norm of x grows by at most the factor `limit` a step (None: freely) and may fall at once. The authors'
    program has leak = 1 - scale, since its up already holds the scale.
    """

    limit: float | None = 1.01
    leak: float = 0.0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"NormScale: limit={self.limit!r} would make every step shorter; use >= 1, or None")

    def init(self, g: Tensor, seed: int) -> State:
        """`norm` (...): |x| of the last step; infinite, so that the first is not limited."""
        return {} if self.limit is None else {"norm": g.new_full(g.shape[:-2], torch.inf)}

    def enter(self, g: Tensor, s: State) -> Tensor:
        """g."""
        return g

    def leave(self, u: Tensor, g: Tensor, r: Tensor, d: Tensor, up: Up, s: State) -> Tensor:
        """u + x."""
        ratio = vector_norm(d, dim=-2, keepdim=True) / (vector_norm(r, dim=-2, keepdim=True) + 1e-8)
        x = up(r).mul_(self.leak - 1).add_(g).mul_(ratio)
        if self.limit is not None:
            norm = vector_norm(x, dim=(-2, -1))
            f = (norm / (s["norm"] + 1e-8)).clamp_min(self.limit) / self.limit
            s["norm"] = norm / f
            x.div_(f[..., None, None])
        return x.add_(u)


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """What the subspace misses is added to the next gradient.

    error <- (g + error) - (1 - kept) up(r)          (Vogels et al., 2019, Alg. 1 has kept = 0)
    """

    kept: float = 0.0

    def init(self, g: Tensor, seed: int) -> State:
        """`error` like g."""
        return {"error": torch.zeros_like(g)}

    def enter(self, g: Tensor, s: State) -> Tensor:
        """g + error."""
        s["error"] = s["error"].add_(g)
        return s["error"]

    def leave(self, u: Tensor, g: Tensor, r: Tensor, d: Tensor, up: Up, s: State) -> Tensor:
        """u; keeps the error."""
        s["error"] = s["error"].sub_(up(r), alpha=1 - self.kept)
        return u
