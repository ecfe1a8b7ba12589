"""When a frame is fitted again, and what becomes of the moments that were kept in the old one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from subspan.optim.rule import Rule
from subspan.optim.state import State


class Move(Protocol):
    """A subspace's `move` between two known frames."""

    def __call__(self, x: Tensor, *, degree: int) -> Tensor:
        """x, a moment of that degree, in the new frame."""


class Carry(Protocol):
    """What the inner rule's state does at a refresh; also called at the first step, when there is nothing yet."""

    def __call__(self, rule: Rule, s: State, *, fresh: Callable[[], State], move: Move) -> bool:
        """Change s in place; True when the rule's clock starts again.

        `fresh` makes the rule's first state, `move` turns a moment into the new frame.
        """


@dataclass(frozen=True, slots=True)
class Keep:
    """Moments stay as they are, whatever their coordinates now mean (GaLore)."""

    def __call__(self, rule: Rule, s: State, *, fresh: Callable[[], State], move: Move) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Reset:
    """The rule begins anew, with its clock (FRUGAL)."""

    def __call__(self, rule: Rule, s: State, *, fresh: Callable[[], State], move: Move) -> bool:
        s.update(fresh())
        return True


@dataclass(frozen=True, slots=True)
class Rotate:
    """Moments are turned into the new frame; raises ValueError when one of them is stored encoded."""

    def __call__(self, rule: Rule, s: State, *, fresh: Callable[[], State], move: Move) -> bool:
        encoded = [name for name in rule.degree if name not in s]
        if encoded:
            raise ValueError(
                f"{rule!r} keeps {', '.join(encoded)} encoded, which rotate cannot turn; use keep or reset"
            )
        for name, degree in rule.degree.items():
            s[name] = move(s[name], degree=degree)
        return False


keep = Keep()
reset = Reset()
rotate = Rotate()


class Refresh(Protocol):
    """When to fit the frame again; the first step is always due."""

    @property
    def carry(self) -> Carry:
        """What moments do then."""

    def due(self, g: Tensor, s: State, t: int) -> bool:
        """Whether the frame s is to be fitted to g at step t = 1, 2, ..."""


@dataclass(frozen=True, slots=True)
class Every:
    """At steps 1, 1 + every, 1 + 2 every, ...

    >>> import torch
    >>> [t for t in range(1, 9) if Every(3).due(torch.zeros(1), {}, t)]
    [1, 4, 7]
    """

    every: int
    carry: Carry = keep

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"Every: every={self.every!r} is less than 1; a huge number means never again")

    def due(self, g: Tensor, s: State, t: int) -> bool:
        """(t - 1) divisible by every."""
        return (t - 1) % self.every == 0
