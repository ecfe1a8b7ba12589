"""Budgets that give a whole block one share, by how much the block matters on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from subspan.budget.base import Budget, Evidence, Scores, Spectra
from subspan.budget.spectral import share_rank
from subspan.budget.target import Ranks, Target, bisect
from subspan.importance import BlockCosine, Importance, Outliers, block_of
from subspan.plan import Shapes

LEVELS = 1 << 24


@dataclass(frozen=True, slots=True)
class Owl:
    """Blocks with more outliers keep more (arXiv:2310.05175, there for pruned entries).

        keep_l = 2 spread (D_l - min D) / (max D - min D) - its mean over blocks + c,   inside 0..1

    D_l is the share of block l's |w_ij| |x_j| above `outlier` times their mean. c is 1 - the target's reduction
    where blocks are alike and nothing is clipped; otherwise it is what meets the target.
    """

    target: Target
    spread: float = 0.08
    outlier: float = 5.0
    scores: Scores = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 1:
            raise ValueError(
                f"spread {self.spread} is outside 0..1; it is half of how far shares differ, e.g. 0.08"
            )

    @property
    def importance(self) -> Importance:
        """The share of outliers in each block."""
        return Outliers(self.outlier)

    def on(self, evidence: Evidence) -> Budget:
        """This budget, with the scores of one model."""
        return replace(self, target=evidence.aim(self.target), scores=evidence.ask(self.importance))

    def __call__(self, spectra: Spectra, shapes: Shapes) -> Ranks:
        """Ranks by site; raises ValueError for a site without score."""
        d = by_block(self.scores, shapes, repr(self))
        low, high = min(d.values()), max(d.values())
        raised = {name: 2 * self.spread * (x - low) / ((high - low) or 1.0) for name, x in d.items()}
        mean = sum(raised.values()) / len(raised)
        base = {name: x - mean for name, x in raised.items()}
        first, last = 1 - min(base.values()), -max(base.values())

        def keep(step: float) -> dict[str, float]:
            return {name: min(max(x + first + step * (last - first), 0.0), 1.0) for name, x in base.items()}

        return shared(keep, self.target, shapes)


@dataclass(frozen=True, slots=True)
class BlockInfluence:
    """Blocks that turn their input more keep more (ShortGPT, arXiv:2403.03853; as in MoDeGPT, arXiv:2408.09632).

        influence_l = 1 - mean over tokens of cos(input_l, output_l)
        removed_l = blocks * removed * softmax(-influence / temperature)_l

    What a block would lose above `cap` is spread over the others in proportion. `removed` is the target's
    reduction where blocks are alike; otherwise it is what meets the target.
    """

    target: Target
    temperature: float = 0.1
    cap: float = 0.8
    scores: Scores = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature {self.temperature} is not above 0; a small one sets blocks apart, e.g. 0.1"
            )
        if not 0 < self.cap < 1:
            raise ValueError(f"cap {self.cap} is outside (0, 1); it is the most that a block may lose, e.g. 0.8")

    @property
    def importance(self) -> Importance:
        """How much each block turns its input."""
        return BlockCosine()

    def on(self, evidence: Evidence) -> Budget:
        """This budget, with the scores of one model."""
        return replace(self, target=evidence.aim(self.target), scores=evidence.ask(self.importance))

    def __call__(self, spectra: Spectra, shapes: Shapes) -> Ranks:
        """Ranks by site; raises ValueError for a site without score."""
        influence = by_block(self.scores, shapes, repr(self))
        low = min(influence.values())
        weight = {name: float(np.exp((low - x) / self.temperature)) for name, x in influence.items()}

        def keep(step: float) -> dict[str, float]:
            return {name: 1 - x for name, x in capped(weight, step * self.cap, self.cap).items()}

        return shared(keep, self.target, shapes)


def capped(weight: Mapping[str, float], mean: float, cap: float) -> dict[str, float]:
    """Shares in proportion to weights, of this mean; what would be above the cap is spread over the others.

    >>> capped({"a": 3.0, "b": 1.0, "c": 1.0}, 0.25, 0.35)
    {'a': 0.35, 'b': 0.2, 'c': 0.2}
    """
    found: dict[str, float] = {}
    rest, free = mean * len(weight), dict(weight)
    while free:
        each = rest / max(sum(free.values()), 1e-300)
        over = [name for name, x in free.items() if each * x > cap]
        if not over:
            return {name: found.get(name, each * x) for name, x in weight.items()}
        for name in over:
            found[name] = cap
            rest -= cap
            del free[name]
    return dict.fromkeys(weight, cap)


def by_block(scores: Scores, shapes: Shapes, what: str) -> dict[str, float]:
    """The score of each block; raises ValueError for a site that has none."""
    if absent := [name for name in shapes if name not in scores]:
        raise ValueError(
            f"{what} needs the importance of {', '.join(absent[:3])}: make the plan with a study that was given "
            "batches, or pass scores="
        )
    return {block_of(name): scores[name] for name in shapes}


def shared(keep: Callable[[float], Mapping[str, float]], target: Target, shapes: Shapes) -> Ranks:
    """Ranks by the block shares that meet the target, `keep` falling as its argument goes from 0 to 1."""

    def at(level: int) -> Ranks:
        shares = keep(level / (LEVELS - 1))
        return {name: share_rank(shares[block_of(name)], *shape, target) for name, shape in shapes.items()}

    return bisect(at, LEVELS, target, shapes)
