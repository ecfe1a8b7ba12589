"""How small a model must become: a share of ranks, a share of numbers, or bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from subspan.plan import Shapes, numbers

Ranks = dict[str, int]


@dataclass(frozen=True, slots=True)
class Err:
    """Target: the effective rank reduction 1 - sum of ranks / sum of full ranks, in [0, 1)."""

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < 1:
            raise ValueError(f"effective rank reduction {self.value} is outside [0, 1); 0.3 removes 30 % of ranks")

    @property
    def said(self) -> dict[str, float]:
        """The target as plain values, for the `args` of a plan."""
        return {"err": self.value}

    def goal(self, shapes: Shapes) -> float:
        """What `reached` must come to."""
        return self.value

    def reached(self, ranks: Ranks, shapes: Shapes) -> float:
        """The reduction these ranks make."""
        return 1 - sum(ranks.values()) / sum(min(shapes[name]) for name in ranks)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Target: the share of the sites' numbers that is kept, in (0, 1]."""

    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value <= 1:
            raise ValueError(f"ratio {self.value} is outside (0, 1]; it is the share of numbers kept, e.g. 0.8")

    @property
    def said(self) -> dict[str, float]:
        """The target as plain values, for the `args` of a plan."""
        return {"ratio": self.value}

    def goal(self, shapes: Shapes) -> float:
        """What `reached` must come to."""
        return 1 - self.value

    def reached(self, ranks: Ranks, shapes: Shapes) -> float:
        """The share removed, so that it grows as ranks fall like `Err`."""
        kept = sum(numbers(rank, *shapes[name]) for name, rank in ranks.items())
        return 1 - kept / sum(m * n for m, n in (shapes[name] for name in ranks))


@dataclass(frozen=True, slots=True)
class Bytes:
    """Target: the whole model fits into this many bytes.

    `bits` are those of a number of each site (32 where not told), `other` the bytes of all that is no site;
    a study fills in both.

    >>> Bytes(64, {"a": 16}).reached({"a": 1}, {"a": (4, 8)}), Bytes(64, {"a": 16}, other=40).goal({"a": (4, 8)})
    (0.625, 0.625)
    """

    count: int
    bits: Mapping[str, int] = field(default_factory=dict)
    other: int = 0

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"bytes {self.count!r} is not a whole number above 0; 100_000_000 is 100 MB")

    @property
    def said(self) -> dict[str, float]:
        """The target as plain values, for the `args` of a plan."""
        return {"bytes": self.count}

    def goal(self, shapes: Shapes) -> float:
        """What `reached` must come to; above 1 when even no site at all would be too much."""
        return 1 - (self.count - self.other) / self.size(
            {name: min(shape) for name, shape in shapes.items()}, shapes
        )

    def reached(self, ranks: Ranks, shapes: Shapes) -> float:
        """The share of the sites' bytes that is removed."""
        whole = self.size({name: min(shapes[name]) for name in ranks}, shapes)
        return 1 - self.size(ranks, shapes) / whole

    def size(self, ranks: Ranks, shapes: Shapes) -> int:
        """The sites' bytes at these ranks."""
        return sum(numbers(rank, *shapes[name]) * self.bits.get(name, 32) // 8 for name, rank in ranks.items())


Target = Err | Ratio | Bytes


def bisect(ranks_at: Callable[[int], Ranks], count: int, target: Target, shapes: Shapes) -> Ranks:
    """The ranks at the first of `count` levels (ever smaller ranks) whose reduction is nearest the target's.

    A ratio and bytes are bounds: they are exceeded only when the last level exceeds them too.
    """
    goal, low, high = target.goal(shapes), 0, count - 1
    while low < high:
        middle = (low + high) // 2
        if target.reached(ranks_at(middle), shapes) < goal - 1e-12:
            low = middle + 1
        else:
            high = middle
    both = [ranks_at(max(low - 1, 0)), ranks_at(low)]
    if not isinstance(target, Err):
        return both[1]
    return min(both, key=lambda ranks: abs(target.reached(ranks, shapes) - goal))
