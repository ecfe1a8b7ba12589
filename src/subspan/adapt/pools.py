"""Adapters of many layers out of a few pools that these share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from subspan import site as kinds
from subspan.adapt.data import HELD, FromData, Sites, size_of
from subspan.adapt.init import draw
from subspan.compress import Calibration
from subspan.linalg import check_rank, wide
from subspan.ops import LinOp, Product, Shards, Transposed

Role = tuple[str, int, int]


@dataclass(frozen=True)
class SharedShards(FromData):
    """u @ v = 0 of that rank, laid together from shards that the layers of a type share (Wang et al., 2024).

    A type is the layers (m, n) whose names end alike. It has two trained pools: one of shards (n / parts,), of
    which `parts` in a line are a row of v, and one of shards (m / parts,), for the columns of u. With L layers
    each pool has budget * L * parts shards, so that a type trains budget * L * (m + n) numbers, as LoRA of rank
    `budget` does.

    Of each layer's rows, `private` are made of shards of its own; the others of shards drawn at random, without
    replacement, from those that nobody owns. Rows and columns are drawn apart. What is drawn follows from the
    seed and the site's name, and is saved with the adapter. Shards for v start uniform on +-1/sqrt(n), those for
    u at zero.

    It looks at the sites, not at data: `prepare` it before use.
    """

    rank: int = 8
    budget: int = 2
    parts: int = 4
    private: int = 1
    seed: int = 0
    reads: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"parts {self.parts} must be at least 1")
        if not 0 <= self.private <= min(self.budget, self.rank) or self.budget < 1:
            raise ValueError(
                f"private {self.private} is outside 0..min(budget, rank), with budget {self.budget} and rank "
                f"{self.rank}; a layer owns no more rows than it has, and than the pools hold for it"
            )

    def look(self, model: nn.Module, sites: Sites, data: Calibration, *, most: int = HELD) -> Self:
        """The start with an op for each site, over pools for each type; the data is not looked at."""
        types: dict[Role, list[str]] = {}
        for name, module in sites.items():
            types.setdefault((name.rpartition(".")[2], *size_of(name, module)), []).append(name)
        seen: dict[str, LinOp] = {}
        for role, names in types.items():
            seen |= self.ops(role, names, like_of(sites[names[0]]))
        return replace(self, seen={name: seen[name] for name in sites})

    def ops(self, role: Role, names: Sequence[str], like: Tensor) -> dict[str, LinOp]:
        """The ops of the layers of one type; raises ValueError for sizes that do not work out."""
        what, m, n = role
        self.check(role, names)
        # As `ZeroLowRank` draws them, so that a pool of private rows is a LoRA.
        private = [self._drawn(name, self.private, n) for name in names]
        common = self._drawn(f"{what} ({m}, {n})", (self.budget - self.private) * len(names), n)
        right = nn.Parameter((2 * torch.cat([common, *private]).to(like) - 1) / n**0.5)
        left = nn.Parameter(like.new_zeros(len(right), m // self.parts))
        found: dict[str, LinOp] = {}
        for i, name in enumerate(names):
            columns, rows = (self._index(f"{side} of {name}", i, len(names)) for side in ("columns", "rows"))
            found[name] = _op(left, right, columns, rows, self.parts)
        return found

    def _drawn(self, what: str, rows: int, n: int) -> Tensor:
        """The shards of so many rows, uniform on 0..1."""
        return torch.rand(rows * self.parts, n // self.parts, generator=draw(what, self.seed))

    def _index(self, what: str, place: int, layers: int) -> Tensor:
        """Which shards of a pool a layer takes: first common ones, then its own."""
        common = (self.budget - self.private) * layers * self.parts
        taken = torch.randperm(common, generator=draw(what, self.seed))[: (self.rank - self.private) * self.parts]
        start = common + place * self.private * self.parts
        own = torch.arange(start, start + self.private * self.parts)
        return torch.cat([taken, own]).to(torch.int32)

    def check(self, role: Role, names: Sequence[str]) -> None:
        """Raise ValueError for a rank, a number of parts or a draw that a type of layers cannot have."""
        _, m, n = role
        check_rank(self.rank, m, n, names[0])
        if m % self.parts or n % self.parts:
            raise ValueError(
                f"{names[0]}: parts {self.parts} does not divide {m} and {n}, and a vector is cut into equal "
                "shards; choose a number that divides both"
            )
        most = self.private + (self.budget - self.private) * len(names)
        if self.rank > most:
            raise ValueError(
                f"{names[0]}: rank {self.rank} takes more different shards than the {len(names)} layers of its "
                f"type share with private {self.private} and budget {self.budget}; choose a rank of at most "
                f"{most}, a larger budget, or fewer private rows"
            )

    def shell(self, site: str, w: Tensor, parts: Mapping[str, Tensor]) -> LinOp:
        """Zeros in the shapes of the saved pools; raises ValueError where they are missing."""
        if missing := [key for key in SAVED if key not in parts]:
            raise ValueError(f"{site}: the saved adapter lacks {', '.join(missing)}; copy or save it again")
        left, columns, right, rows = (torch.zeros_like(parts[key], device=w.device) for key in SAVED)
        return _op(nn.Parameter(left), nn.Parameter(right), columns, rows, self.parts)


SAVED = ("op.ops.0.op.pool", "op.ops.0.op.index", "op.ops.1.pool", "op.ops.1.index")


def _op(left: Tensor, right: Tensor, columns: Tensor, rows: Tensor, parts: int) -> Product:
    return Product([Transposed(Shards(left, columns, parts)), Shards(right, rows, parts)])


def like_of(module: nn.Module) -> Tensor:
    """An empty tensor in the precision and on the device that adapters of a layer have."""
    if isinstance(module, kinds.Expert):
        return wide(kinds.parameter(module).detach().flatten()[:0])
    found = (p for p in module.parameters() if p.is_floating_point())
    return wide(next(found, torch.empty(0)).detach().flatten()[:0])
