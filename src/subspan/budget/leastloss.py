"""The budget of this library: what loses least for every number stored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from subspan.budget.base import Budget, Evidence, Reading, Scores, Spectra, Spectrum, choice
from subspan.budget.spectral import Numbers, squares
from subspan.budget.target import Bytes, Ranks, Target, bisect
from subspan.importance import Importance, Sensitivity
from subspan.plan import Shapes, break_even

Counts = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class LeastLoss:
    """The ranks that lose least for what is stored; a budget of this library, not a published one.

        minimise  sum_i weight_i sum_{j > rank_i} s_ij^2     where  sum_i cost_i(rank_i)  meets the target
        cost = rank (m + n) up to break-even,  m n at full rank;  ranks in between cost more than they are worth

    `s` are the singular values under the study's metric, so that under `Gram` a sum of s^2 is the mean square
    error of the outputs. `by` is what that error is weighed with: `loss`, how much the loss feels it
    (`Sensitivity`, so that the sum is the predicted rise of the loss); `output`, all alike; `relative`,
    1 / sum s^2.

    One path from rank 1 everywhere to all ranks takes the steps of the lower convex hulls by what they save per
    number, and the target says where to stop. At the costs where a hull step ends the ranks are the optimum;
    in between, the error exceeds it by less than the next hull step saves (a single rank, or the last part of
    one matrix, which then gets as many more ranks below break-even as still fit).
    """

    target: Target
    by: Literal["loss", "output", "relative"] = "loss"
    spectrum: Spectrum = "metric"
    scores: Scores = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        choice("by", self.by, ("loss", "output", "relative"))
        choice("spectrum", self.spectrum, ("weight", "metric"))

    @property
    def importance(self) -> Importance | None:
        """How much the loss feels each site, if errors are weighed by that."""
        return Sensitivity() if self.by == "loss" else None

    def on(self, evidence: Evidence) -> Budget:
        """This budget, with the spectra and scores of one model."""
        scores = evidence.ask(Sensitivity()) if self.by == "loss" else {}
        aimed = replace(self, target=evidence.aim(self.target), scores=scores)
        return Reading(aimed, evidence.spectra(self.spectrum))

    def __call__(self, spectra: Spectra, shapes: Shapes) -> Ranks:
        """Ranks by site; raises ValueError for a site without score."""
        path = Path(shapes, {name: self.errors(name, spectra) for name in shapes}, self.prices(shapes))
        return bisect(path.ranks, path.count, self.target, shapes)

    def errors(self, name: str, spectra: Spectra) -> Numbers:
        """The weighed error of one site at rank 1, 2, ... min(m, n)."""
        if self.by == "loss" and name not in self.scores:
            raise ValueError(
                f"{self!r} needs to know how much the loss feels {name}: make the plan with a study that was "
                "given batches, or pass scores= or by='output'"
            )
        energy = squares(spectra[name])
        weight = {"loss": self.scores.get(name, 1.0), "output": 1.0, "relative": 1 / (energy.sum() or 1.0)}[
            self.by
        ]
        result: Numbers = weight * np.append(np.cumsum(energy[:0:-1])[::-1], 0.0)
        return result

    def prices(self, shapes: Shapes) -> dict[str, float]:
        """What a number of each site costs."""
        bits = self.target.bits if isinstance(self.target, Bytes) else {}
        return {name: bits.get(name, 32) / 32 for name in shapes}


class Path:
    """Ever more ranks, one step after the other, the one that saves most error per cost first."""

    def __init__(self, shapes: Shapes, errors: dict[str, Numbers], prices: dict[str, float]) -> None:
        self.names = list(shapes)
        steps = [_steps(*shapes[name], errors[name], prices[name]) for name in self.names]
        self.first = np.array([min(min(m, n), 1 if break_even(m, n) else min(m, n)) for m, n in shapes.values()])
        gain, turn, rank = (np.concatenate([step[i] for step in steps]) for i in range(3))
        site = np.repeat(np.arange(len(steps)), [len(step[0]) for step in steps])
        order = np.lexsort((turn, -gain))
        self.site, self.rank = site[order], rank[order].astype(np.int64)
        # Equal sites take equal steps together.
        new = (np.diff(gain[order]) != 0) | (np.diff(turn[order]) != 0)
        self.ends = np.append(np.flatnonzero(new) + 1, len(order)) if len(order) else np.zeros(0, np.int64)

    @property
    def count(self) -> int:
        """How many levels there are, both ends included."""
        return len(self.ends) + 1

    def ranks(self, level: int) -> Ranks:
        """The ranks with all but the last `level` steps taken."""
        taken = len(self.ends) - level
        end = int(self.ends[taken - 1]) if taken else 0
        found = self.first.copy()
        np.maximum.at(found, self.site[:end], self.rank[:end])
        return {name: int(rank) for name, rank in zip(self.names, found, strict=True)}


def _steps(m: int, n: int, error: Numbers, price: float) -> tuple[Numbers, Numbers, Counts]:
    """Of one site: what each step saves per cost, its turn within a step of the hull, the rank it leads to."""
    most = break_even(m, n)
    if not most:
        return np.zeros(0), np.zeros(0), np.zeros(0, np.int64)
    rank = np.append(np.arange(1, most + 1), min(m, n))
    cost, left = price * np.append(rank[:-1] * (m + n), m * n), np.append(error[:most], 0.0)
    corner = _hull(cost, left)
    length = np.diff(corner)
    gain = -np.diff(left[corner]) / np.diff(cost[corner])
    turn = np.concatenate([np.arange(k) for k in length])
    return np.repeat(gain, length), turn.astype(np.float64), rank[1:]


def _hull(x: Numbers, y: Numbers) -> Counts:
    """The corners of the lower convex hull of points with ascending x."""
    corner: list[int] = []
    for i in range(len(x)):
        while len(corner) > 1:
            a, b = corner[-2], corner[-1]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            corner.pop()
        corner.append(i)
    return np.array(corner)
