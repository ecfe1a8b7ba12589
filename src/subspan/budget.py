"""Sizes to ranks: one rank for every site, from spectra and one target for the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from subspan.plan import Shapes, break_even, numbers

Spectra = Mapping[str, Tensor]
Ranks = dict[str, int]


class Budget(Protocol):
    """Give every site a rank between 1 and min(m, n)."""

    def __call__(self, spectra: Spectra, shapes: Shapes) -> Ranks:
        """Ranks from singular values (descending) and shapes, by site."""
        ...


@dataclass(frozen=True, slots=True)
class Err:
    """Target: the effective rank reduction 1 - sum of ranks / sum of full ranks, in [0, 1)."""

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < 1:
            raise ValueError(f"effective rank reduction {self.value} is outside [0, 1); 0.3 removes 30 % of ranks")

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

    def reached(self, ranks: Ranks, shapes: Shapes) -> float:
        """The share removed, so that it grows as ranks fall like `Err`."""
        kept = sum(numbers(rank, *shapes[name]) for name, rank in ranks.items())
        return 1 - kept / sum(m * n for m, n in (shapes[name] for name in ranks))


Target = Err | Ratio


def removed(target: Target) -> float:
    """What `target.reached` must come to."""
    return target.value if isinstance(target, Err) else 1 - target.value


def bisect(ranks_at: Callable[[int], Ranks], count: int, target: Target, shapes: Shapes) -> Ranks:
    """The ranks at the first of `count` levels (ever smaller ranks) whose reduction is nearest the target's."""
    goal, low, high = removed(target), 0, count - 1
    while low < high:
        middle = (low + high) // 2
        if target.reached(ranks_at(middle), shapes) < goal - 1e-12:
            low = middle + 1
        else:
            high = middle
    both = [ranks_at(max(low - 1, 0)), ranks_at(low)]
    if isinstance(target, Ratio):  # a ratio is a bound: fall short of it only when nothing reaches it
        return both[1]
    return min(both, key=lambda ranks: abs(target.reached(ranks, shapes) - goal))


@dataclass(frozen=True, slots=True)
class Uniform:
    """The same share everywhere: of every full rank (`Err`), or of every site's numbers (`Ratio`).

        Err:   rank = round((1 - err) min(m, n))        Ratio:   rank = floor(ratio m n / (m + n))

    >>> Uniform(Err(0.5))({}, {"a": (4, 8)}), Uniform(Ratio(0.75))({}, {"a": (4, 4)})
    ({'a': 2}, {'a': 1})
    """

    target: Target

    def __call__(self, spectra: Spectra, shapes: Shapes) -> Ranks:
        """Ranks; the spectra do not matter."""
        return {name: max(1, self.rank(*shape)) for name, shape in shapes.items()}

    def rank(self, m: int, n: int) -> int:
        """The rank of one m x n site."""
        if isinstance(self.target, Err):
            return round((1 - self.target.value) * min(m, n))
        return min(m, n) if self.target.value == 1 else int(self.target.value * m * n / (m + n))


@dataclass(frozen=True, slots=True)
class Energy:
    """The smallest rank that keeps a share of every site's sum s^2: a fixed share, or the one a target needs."""

    target: float | Target

    def __post_init__(self) -> None:
        if isinstance(self.target, float | int) and not 0 < self.target <= 1:
            raise ValueError(f"energy {self.target} is outside (0, 1]; it is the share of sum s^2 kept, e.g. 0.95")

    def __call__(self, spectra: Spectra, shapes: Shapes) -> Ranks:
        """Ranks by site."""
        target = self.target

        tails = {name: lost(s) for name, s in spectra.items()}

        def at(k: float) -> Ranks:
            return {name: 1 + int(np.count_nonzero(t > k)) for name, t in tails.items()}

        if isinstance(target, Err | Ratio):
            ladder = np.unique(np.concatenate([[-1.0], *tails.values()]))  # -1 keeps even directions of no energy
            return bisect(lambda i: at(float(ladder[i])), len(ladder), target, shapes)
        return at((1 - target) * (1 + 1e-12))  # a share that is reached exactly is reached after rounding, too


@dataclass(frozen=True, slots=True)
class WeLore:
    """One threshold on min-max normalised spectra gives every rank (arXiv:2407.11239).

        t = (s - min s) / (max s - min s) inside each matrix,   rank = #{t >= k}

    `search`: `exact` takes k as the Err-quantile of all t pooled, `grid` the first of 0, 0.005, 0.01, ... that
    reaches the target, as the paper does. `nlrc`: what becomes of a matrix that keeps half its rank or more:
    `truncate` cuts it too, `keep` leaves it whole and searches k again for those that are cut, to the nearest
    reachable reduction. `gate` is that half, or each shape's own `break_even`.
    """

    target: Target
    search: Literal["exact", "grid"] = "exact"
    nlrc: Literal["truncate", "keep"] = "truncate"
    gate: Literal["half", "break_even"] = "half"

    def __post_init__(self) -> None:
        allowed = {"search": ("exact", "grid"), "nlrc": ("truncate", "keep"), "gate": ("half", "break_even")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(values)}")

    def __call__(self, spectra: Spectra, shapes: Shapes) -> Ranks:
        """Ranks by site; raises ValueError for a matrix whose singular values are all equal."""
        levels = {name: normalised(s, name) for name, s in spectra.items()}

        def at(k: float) -> Ranks:
            ranks = {name: len(t) - int(np.searchsorted(t, k, side="left")) for name, t in levels.items()}
            return ranks if self.nlrc == "truncate" else self.gated(ranks, shapes)

        pool = np.sort(np.concatenate(list(levels.values())))
        if self.search == "grid":
            goal = removed(self.target)
            ladder = np.arange(0, 201) * 0.005
            return next((r for r in map(at, ladder) if self.target.reached(r, shapes) >= goal - 1e-12), at(1.0))
        if isinstance(self.target, Err) and self.nlrc == "truncate":
            return at(float(np.quantile(pool, self.target.value))) if self.target.value else at(0.0)
        ladder = np.unique(pool)
        return bisect(lambda i: at(float(ladder[i])), len(ladder), self.target, shapes)

    def gated(self, ranks: Ranks, shapes: Shapes) -> Ranks:
        """Full rank wherever the gate says the matrix is not low-rank."""
        return {name: r if self.lowrank(r, *shapes[name]) else min(shapes[name]) for name, r in ranks.items()}

    def lowrank(self, rank: int, m: int, n: int) -> bool:
        """Whether a matrix cut to this rank counts as a low-rank component (LRC)."""
        return rank < 0.5 * min(m, n) if self.gate == "half" else rank <= break_even(m, n)


def lost(s: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The share of sum s^2 that is lost at rank 1, 2, ... k - 1; zeros for a zero matrix."""
    energy = np.square(s.detach().cpu().double().numpy())
    tails = np.cumsum(energy[::-1])[::-1]
    result: np.ndarray[tuple[int], np.dtype[np.float64]] = tails[1:] / (tails[0] or 1.0)
    return result


def normalised(s: Tensor, where: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Singular values as (s - min) / (max - min), ascending, in float64."""
    x = np.sort(s.detach().cpu().double().numpy())
    if x[-1] == x[0]:
        raise ValueError(f"{where}: all singular values equal {x[0]:g}, so they have no tail; leave the site out")
    result: np.ndarray[tuple[int], np.dtype[np.float64]] = (x - x[0]) / (x[-1] - x[0])
    return result
