"""When a frame is fitted again, and what becomes of the moments that were kept in the old one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from subspan.optim.rule import Rule
from subspan.optim.state import State, counter


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

    def init(self, seed: int) -> State:
        """What it remembers; every parameter has a seed of its own."""

    def due(self, s: State, t: int) -> bool:
        """Whether the frame is to be fitted to the gradient of step t = 1, 2, ..."""


@dataclass(frozen=True, slots=True)
class Every:
    """At steps 1, 1 + every, 1 + 2 every, ...

    >>> [t for t in range(1, 9) if Every(3).due({}, t)]
    [1, 4, 7]
    """

    every: int
    carry: Carry = keep

    def __post_init__(self) -> None:
        require_interval("Every", self.every)

    def init(self, seed: int) -> State:
        """Nothing."""
        return {}

    def due(self, s: State, t: int) -> bool:
        """(t - 1) divisible by every."""
        return (t - 1) % self.every == 0


@dataclass(frozen=True, slots=True)
class Staggered:
    """At step 1, and then once an interval, each parameter at a phase of its own.

    No step has to fit all frames at once; the phase follows from the parameter's name and the seed.

    >>> [t for t in range(1, 9) if Staggered(3).due({"phase": counter(1)}, t)]
    [1, 2, 5, 8]
    """

    every: int
    carry: Carry = keep

    def __post_init__(self) -> None:
        require_interval("Staggered", self.every)

    def init(self, seed: int) -> State:
        """`phase`, in 0 .. every - 1."""
        # Seeds of similar names are close; the golden ratio spreads them.
        return {"phase": counter((seed * 0x9E3779B1 & 0xFFFFFFFF) * self.every >> 32)}

    def due(self, s: State, t: int) -> bool:
        """t = 1, or t - 1 = phase modulo every."""
        return t == 1 or (t - 1) % self.every == int(s["phase"])


def require_interval(where: str, every: int) -> None:
    """Raise ValueError unless every >= 1."""
    if every < 1:
        raise ValueError(f"{where}: every={every!r} is less than 1; a huge number means never again")
