"""Rules on sizes alone: gradients over their root mean square, and a limit on the step's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from subspan.optim.direction import Direction
from subspan.optim.rules import require_share
from subspan.optim.state import State


class Decay(Protocol):
    """How much of an average is kept at step t = 1, 2, ...; a frozen dataclass."""

    def __call__(self, t: int) -> float:
        """A number in [0, 1)."""


@dataclass(frozen=True, slots=True)
class FixedDecay:
    """The same decay at every step."""

    b: float = 0.999

    def __post_init__(self) -> None:
        require_share("FixedDecay", "b", self.b)

    def __call__(self, t: int) -> float:
        return self.b


@dataclass(frozen=True, slots=True)
class RisingDecay:
    """1 - t^-power: 0 at first, so that an average needs no correction of bias (Shazeer and Stern, 2018).

    >>> [round(RisingDecay(0.8)(t), 3) for t in (1, 2, 100)]
    [0.0, 0.426, 0.975]
    """

    power: float = 0.8

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"RisingDecay: power={self.power!r} must be above 0, or nothing is ever kept")

    def __call__(self, t: int) -> float:
        return float(1 - t**-self.power)


@dataclass(frozen=True, slots=True)
class Rms:
    """The gradient over the root of its mean square, without a first moment (Shazeer and Stern, 2018).

        nu <- b nu + (1 - b) (g * g + eps),   d = g / sqrt(nu),   b = decay(t)

    eps is added to squares, so it is the square of the smallest gradient that counts. With FixedDecay it is
    RMSprop, whose first steps are too long by 1 / sqrt(1 - b^t).
    """

    decay: Decay = RisingDecay()
    eps: float = 1e-30
    degree: ClassVar[Mapping[str, int]] = {"nu": 2}

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise ValueError(f"Rms: eps={self.eps!r} must be above 0, or a zero gradient is divided by zero")

    def init(self, g: Tensor, seed: int) -> State:
        """`nu` like g."""
        return {"nu": torch.zeros_like(g)}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """The quotient, in one temporary."""
        b = self.decay(t)
        s["nu"] = s["nu"].mul_(b).addcmul_(g, g, value=1 - b).add_((1 - b) * self.eps)
        root = s["nu"].sqrt()
        return torch.div(g, root, out=root)

    def gain(self, s: State, t: int) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Clip:
    """A direction whose root mean square is above `rms` is made shorter, to it (Shazeer and Stern, 2018).

    d = g / max(1, rms(g) / limit), the root mean square taken over the last two dimensions, or over a vector

    >>> Clip(1.0).update(torch.tensor([3.0, 3.0]), {}, torch.ones(2), 1)
    tensor([1., 1.])
    """

    rms: float = 1.0
    degree: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        if not self.rms > 0:
            raise ValueError(f"Clip: rms={self.rms!r} must be above 0; a limit of 0 allows no step")

    def init(self, g: Tensor, seed: int) -> State:
        """No state."""
        return {}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """g, or g made shorter."""
        axes = tuple(range(-min(g.ndim, 2), 0))
        size = g.square().mean(axes, keepdim=True).sqrt()
        return g / (size / self.rms).clamp_min(1)

    def gain(self, s: State, t: int) -> float:
        """1."""
        return 1.0
