"""What a budget is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from subspan.budget.target import Bytes, Ranks, Target
from subspan.importance import Importance
from subspan.plan import Shapes

Spectra = Mapping[str, Tensor]
Scores = Mapping[str, float]
Spectrum = Literal["weight", "metric"]


class Budget(Protocol):
    """Give every site a rank between 1 and min(m, n)."""

    def __call__(self, spectra: Spectra, shapes: Shapes) -> Ranks:
        """Ranks from singular values (descending) and shapes, by site."""
        ...


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a study knows of its sites.

    `weight` are the weights' own singular values, `metric` those under the study's metric, `bits` those of a
    number of each site, `other_bytes` all that is no site; `ask` measures an importance on the study's data.
    """

    weight: Spectra
    metric: Spectra
    bits: Mapping[str, int]
    other_bytes: int
    ask: Callable[[Importance], Scores]

    def spectra(self, kind: Spectrum) -> Spectra:
        """The singular values of one kind."""
        return self.weight if kind == "weight" else self.metric

    def aim(self, target: Target) -> Target:
        """The target, told how many bytes a number takes."""
        return replace(target, bits=self.bits, other=self.other_bytes) if isinstance(target, Bytes) else target


@runtime_checkable
class Informed(Protocol):
    """A budget that looks at more than shapes and the weights' spectra."""

    @property
    def target(self) -> float | Target:
        """How small the model must become, or a share of energy."""
        ...

    @property
    def importance(self) -> Importance | None:
        """What it wants measured on data, if anything."""
        ...

    def on(self, evidence: Evidence) -> Budget:
        """The budget for what is known of one model."""
        ...


@dataclass(frozen=True, eq=False)
class Reading:
    """A budget that reads these spectra, whatever it is given."""

    budget: Budget
    spectra: Spectra

    def __call__(self, spectra: Spectra, shapes: Shapes) -> Ranks:
        """Ranks by site."""
        return self.budget(self.spectra, shapes)


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(allowed)}")
