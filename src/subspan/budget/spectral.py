"""Budgets that look at singular values only, or at nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from subspan.budget.base import Budget, Evidence, Reading, Spectra, Spectrum, choice
from subspan.budget.target import Err, Ranks, Ratio, Target, bisect
from subspan.importance import Importance
from subspan.plan import Shapes, break_even

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]


def share_rank(share: float, m: int, n: int, target: Target) -> int:
    """The rank that keeps a share of an m x n site's ranks (`Err`), or at most that share of its numbers.

    Of the numbers, it is never a rank that would not be worth two factors.
    """
    if isinstance(target, Err):
        return max(1, round(share * min(m, n)))
    return min(m, n) if share >= 1 else max(1, min(int(share * m * n / (m + n)), break_even(m, n)))


@dataclass(frozen=True, slots=True)
class Uniform:
    """The same share everywhere: of every full rank (`Err`), or of every site's numbers (`Ratio`, `Bytes`).

        Err:   rank = round((1 - err) min(m, n))        Ratio:   rank = floor(min(ratio, 0.9) m n / (m + n))

    >>> Uniform(Err(0.5))({}, {"a": (4, 8)}), Uniform(Ratio(0.75))({}, {"a": (4, 4)})
    ({'a': 2}, {'a': 1})
    """

    target: Target
    importance: ClassVar[Importance | None] = None

    def on(self, evidence: Evidence) -> Budget:
        """This budget, told how many bytes a number takes."""
        return replace(self, target=evidence.aim(self.target))

    def __call__(self, spectra: Spectra, shapes: Shapes) -> Ranks:
        """Ranks; the spectra do not matter."""
        share = 1 - self.target.goal(shapes) if not isinstance(self.target, Ratio) else self.target.value
        return {name: share_rank(share, *shape, self.target) for name, shape in shapes.items()}


@dataclass(frozen=True, slots=True)
class Energy:
    """The smallest rank that keeps a share of every site's sum s^2: a fixed share, or the one a target needs.

    `spectrum`: whether s are the singular values of the `weight`, or those under the study's `metric`.
    """

    target: float | Target
    spectrum: Spectrum = "weight"
    importance: ClassVar[Importance | None] = None

    def __post_init__(self) -> None:
        choice("spectrum", self.spectrum, ("weight", "metric"))
        if isinstance(self.target, float | int) and not 0 < self.target <= 1:
            raise ValueError(f"energy {self.target} is outside (0, 1]; it is the share of sum s^2 kept, e.g. 0.95")

    def on(self, evidence: Evidence) -> Budget:
        """This budget, reading its spectrum of the evidence."""
        target = self.target if isinstance(self.target, float | int) else evidence.aim(self.target)
        return Reading(replace(self, target=target), evidence.spectra(self.spectrum))

    def __call__(self, spectra: Spectra, shapes: Shapes) -> Ranks:
        """Ranks by site."""
        target = self.target

        tails = {name: lost(s) for name, s in spectra.items()}

        def at(k: float) -> Ranks:
            return {name: 1 + int(np.count_nonzero(t > k)) for name, t in tails.items()}

        if not isinstance(target, float | int):
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
    reachable reduction. `gate` is that half, or each shape's own `break_even`. `spectrum`: whether s are the
    singular values of the `weight`, as in the paper, or those under the study's `metric`.
    """

    target: Target
    search: Literal["exact", "grid"] = "exact"
    nlrc: Literal["truncate", "keep"] = "truncate"
    gate: Literal["half", "break_even"] = "half"
    spectrum: Spectrum = "weight"
    importance: ClassVar[Importance | None] = None

    def __post_init__(self) -> None:
        choice("search", self.search, ("exact", "grid"))
        choice("nlrc", self.nlrc, ("truncate", "keep"))
        choice("gate", self.gate, ("half", "break_even"))
        choice("spectrum", self.spectrum, ("weight", "metric"))

    def on(self, evidence: Evidence) -> Budget:
        """This budget, reading its spectrum of the evidence."""
        return Reading(replace(self, target=evidence.aim(self.target)), evidence.spectra(self.spectrum))

    def __call__(self, spectra: Spectra, shapes: Shapes) -> Ranks:
        """Ranks by site; raises ValueError for a matrix whose singular values are all equal."""
        levels = {name: normalised(s, name) for name, s in spectra.items()}

        def at(k: float) -> Ranks:
            ranks = {name: len(t) - int(np.searchsorted(t, k, side="left")) for name, t in levels.items()}
            return ranks if self.nlrc == "truncate" else self.gated(ranks, shapes)

        pool = np.sort(np.concatenate(list(levels.values())))
        if self.search == "grid":
            goal = self.target.goal(shapes)
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


def squares(s: Tensor) -> Numbers:
    """Squared singular values in float64."""
    result: Numbers = np.square(s.detach().cpu().double().numpy())
    return result


def lost(s: Tensor) -> Numbers:
    """The share of sum s^2 that is lost at rank 1, 2, ... k - 1; zeros for a zero matrix."""
    tails = np.cumsum(squares(s)[::-1])[::-1]
    result: Numbers = tails[1:] / (tails[0] or 1.0)
    return result


def normalised(s: Tensor, where: str) -> Numbers:
    """Singular values as (s - min) / (max - min), ascending, in float64."""
    x = np.sort(s.detach().cpu().double().numpy())
    if x[-1] == x[0]:
        raise ValueError(f"{where}: all singular values equal {x[0]:g}, so they have no tail; leave the site out")
    result: Numbers = (x - x[0]) / (x[-1] - x[0])
    return result
