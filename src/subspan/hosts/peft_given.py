"""One site of a folder of PEFT, as it was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from subspan.adapt import Add
from subspan.ops import LowRank


class Config(Protocol):
    """What the types read of a config; `PeftConfig` is one."""

    @property
    def rank(self) -> int:
        """The common rank."""

    @property
    def alpha(self) -> float:
        """The common alpha."""

    @property
    def dora(self) -> bool:
        """Whether the sites have magnitudes."""

    @property
    def options(self) -> Mapping[str, Any]:
        """What the type's own `options` took out of the fields."""

    def rank_of(self, site: str) -> int:
        """The rank at a site."""

    def scale_of(self, site: str) -> float:
        """The scale at a site."""


@dataclass(frozen=True)
class Given:
    """One site as it was read: its tensors, those of all sites, the config, and the layer's shape (m, n).

    What is made of the tensors of all sites is kept beside them.
    """

    site: str
    parts: Mapping[str, Tensor]
    shared: dict[str, Tensor]
    config: Config
    m: int
    n: int

    def train(self, name: str) -> nn.Parameter:
        """A part as a parameter that trains."""
        return nn.Parameter(self.parts[name])

    def pair(self, u: str, v: str) -> LowRank:
        """Two parts as u (m, rank) and v (rank, n)."""
        return LowRank(self.train(u), self.train(v))

    @property
    def add(self) -> Add:
        """The plain sum at the config's scale."""
        return Add(self.config.scale_of(self.site))
