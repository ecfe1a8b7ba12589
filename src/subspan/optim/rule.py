"""The protocol of rules: how a gradient becomes a direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from subspan.optim.direction import Direction
from subspan.optim.state import State


class Rule(Protocol):
    """A frozen dataclass of hyper-parameters; its maths accepts leading batch dimensions.

    A rule may overwrite tensors of its state, must write every changed one back (`s["mu"] = mu`: an encoded
    state keeps only what is written), and never overwrites g. What `update` returns may be g or part of the
    state, so the caller only reads it. Rules are odd: the gradient -g gives the opposite step.
    """

    @property
    def degree(self) -> Mapping[str, int]:
        """The moments: state name -> 1 (moves like g when the frame turns) or 2 (like g * g)."""

    def init(self, g: Tensor, seed: int) -> State:
        """The state before the first step, for gradients like g; only shape, precision and device of g matter."""

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """The direction to descend at step t = 1, 2, ..., before `gain`."""

    def gain(self, s: State, t: int) -> float:
        """The factor of the whole step, applied last: where a method corrects bias in the step size."""
