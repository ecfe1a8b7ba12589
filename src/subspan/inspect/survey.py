"""What the weights of a model look like: spectra, effective ranks, and which matrices are low-rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from math import isfinite
from statistics import fmean
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from subspan import linalg, site
from subspan.budget import Err, Ranks, WeLore
from subspan.compress import Track
from subspan.edit import shapes, sites
from subspan.plan import Shapes
from subspan.select import Select
from subspan.threads import spread

Kind = Literal["LRC", "N-LRC", "flat"]
ENERGY = 0.9


@dataclass(frozen=True, slots=True)
class SurveyRow:
    """One matrix: effective ranks of its spectrum, and the rank and class WeLore gives it.

    `kind` is "LRC" when that rank is below half of min(m, n), else "N-LRC", and "flat" when all singular values
    are equal to within float32 round-off, so that there is no tail to cut (the rank is then the full one).
    """

    shape: tuple[int, int]
    stable_rank: float
    effective_rank: float
    tail_index: float
    energy_rank: int
    rank: int
    kind: Kind

    @property
    def full(self) -> int:
        """The largest rank the shape allows."""
        return min(self.shape)


@dataclass(frozen=True, slots=True)
class TypeMeans:
    """Means over all matrices of one type; the ranks as shares of each matrix's full rank."""

    count: int
    stable_rank: float
    effective_rank: float
    tail_index: float
    energy_rank: float
    rank: float
    lrc: float


@dataclass(frozen=True, eq=False)
class Survey:
    """Site -> what its spectrum says, with WeLore's classes at the effective rank reduction `err`."""

    rows: Mapping[str, SurveyRow]
    spectra: Mapping[str, Tensor]
    err: float

    def types(self) -> dict[str, TypeMeans]:
        """Matrix type (the last part of a site's name) -> means."""
        groups: dict[str, list[SurveyRow]] = {}
        for name, row in self.rows.items():
            groups.setdefault(parse_site(name)[1], []).append(row)
        return {kind: means(rows) for kind, rows in groups.items()}

    def table(self, limit: int | None = None) -> Table:
        """One line per site, `limit` lines at most; "90 %" is the rank that holds this share of the energy."""
        table = grid("site", "shape", "stable", "effective", "tail", "90 %", "rank", "class",
                     title=f"{len(self.rows)} matrices, classes at rank reduction {self.err:.0%}")  # fmt: skip
        for name, row in list(self.rows.items())[:limit]:
            table.add_row(
                name, f"{row.shape[0]} x {row.shape[1]}", f"{row.stable_rank:.1f}", f"{row.effective_rank:.1f}",
                f"{row.tail_index:.2f}", str(row.energy_rank), f"{row.rank}/{row.full}", row.kind,
            )  # fmt: skip
        if limit is not None and len(self.rows) > limit:
            table.caption = f"{len(self.rows) - limit} more sites; --json prints all"
        return table

    def by_type(self) -> Table:
        """One line per matrix type: means, ranks in percent of the full rank, and the share of LRC."""
        table = grid("type", "matrices", "stable", "effective", "tail", "90 %", "rank", "LRC",
                     title=f"Means by matrix type, classes at rank reduction {self.err:.0%}")  # fmt: skip
        for kind, mean in self.types().items():
            table.add_row(
                kind, str(mean.count), f"{mean.stable_rank:.1%}", f"{mean.effective_rank:.1%}",
                f"{mean.tail_index:.2f}", f"{mean.energy_rank:.1%}", f"{mean.rank:.1%}", f"{mean.lrc:.0%}",
            )  # fmt: skip
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values without the spectra; an infinite tail index becomes None, as json has no infinity."""
        return {
            "err": self.err,
            "sites": {name: {**plain(row), "shape": list(row.shape)} for name, row in self.rows.items()},
            "types": {kind: plain(mean) for kind, mean in self.types().items()},
        }


def survey(
    model: nn.Module,
    *,
    select: Select | None = None,
    err: float = 0.5,
    spectra: Mapping[str, Tensor] | None = None,
    track: Track[str] = iter,
) -> Survey:
    """Look at the selected layers: one pass of singular values, then every number from those.

    `spectra` may hand over singular values already computed, by site; `track` wraps the list of sites, for a
    progress bar. WeLore's one threshold is found over all sites that are not flat. Raises ValueError naming the
    site for a weight with NaN or Inf, and for a spectrum of another length than min(m, n).

    >>> net = nn.Linear(2, 2)
    >>> net.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
    >>> row = survey(nn.Sequential(net)).rows["0"]
    >>> row.energy_rank, row.rank, round(row.stable_rank, 3)
    (1, 1, 1.111)
    """
    found = sites(model, select)
    shape, given = shapes(found), dict(spectra or {})

    def own_values(name: str) -> Tensor:
        return known(given[name], name, shape[name]) if name in given else values(site.matrix(found[name]), name)

    own = dict(zip(track(list(found)), spread(own_values, found), strict=True))
    ranks = welore_ranks(own, shape, err)
    return Survey({name: survey_row(s, shape[name], ranks.get(name)) for name, s in own.items()}, own, err)


def survey_row(s: Tensor, shape: tuple[int, int], rank: int | None) -> SurveyRow:
    """The row of one spectrum s (k,), descending; rank None means flat."""
    kind: Kind = "flat" if rank is None else "LRC" if rank < 0.5 * min(shape) else "N-LRC"
    return SurveyRow(
        shape=shape,
        stable_rank=float(linalg.stable_rank(s)),
        effective_rank=float(linalg.entropy_rank(s)),
        tail_index=float(linalg.tail_index(s)),
        energy_rank=int(linalg.energy_rank(s, ENERGY)),
        rank=min(shape) if rank is None else rank,
        kind=kind,
    )


def welore_ranks(spectra: Mapping[str, Tensor], shape: Shapes, err: float) -> Ranks:
    """WeLore's ranks at this rank reduction for every spectrum that is not flat."""
    budget = WeLore(Err(err))
    sloped = {name: s for name, s in spectra.items() if not flat(s)}
    return budget(sloped, {name: shape[name] for name in sloped}) if sloped else {}


def flat(s: Tensor) -> bool:
    """Whether singular values s (k,) differ by no more than the round-off of float32 arithmetic."""
    return bool(s.max() - s.min() <= len(s) * torch.finfo(torch.float32).eps * s.max())


def values(w: Tensor, name: str) -> Tensor:
    """Singular values (k,) of a weight, on the CPU; raises ValueError naming the site for NaN or Inf."""
    linalg.require_finite(w, f"the weight of {name}")
    return linalg.svdvals(w.detach()).cpu()


def known(s: Tensor, name: str, shape: tuple[int, int]) -> Tensor:
    """A spectrum handed over, descending, on the CPU; raises ValueError when it cannot be this site's."""
    if tuple(s.shape) != (min(shape),):
        raise ValueError(
            f"{name}: the given spectrum has shape {tuple(s.shape)}, its {shape[0]} x {shape[1]} weight has "
            f"{min(shape)} singular values; leave it out of spectra to have them computed"
        )
    return s.detach().cpu().sort(descending=True).values


def parse_site(name: str) -> tuple[int | None, str]:
    """Block number (the first numeric part, if any) and matrix type (the last part) of a site's name.

    >>> parse_site("model.layers.3.self_attn.q_proj"), parse_site("lm_head")
    ((3, 'q_proj'), (None, 'lm_head'))
    """
    parts = name.split(".")
    return next((int(part) for part in parts if part.isdigit()), None), parts[-1]


def means(rows: Iterable[SurveyRow]) -> TypeMeans:
    """Means over rows, of which there must be one at least."""
    rows = list(rows)
    return TypeMeans(
        count=len(rows),
        stable_rank=fmean(row.stable_rank / row.full for row in rows),
        effective_rank=fmean(row.effective_rank / row.full for row in rows),
        tail_index=fmean(row.tail_index for row in rows),
        energy_rank=fmean(row.energy_rank / row.full for row in rows),
        rank=fmean(row.rank / row.full for row in rows),
        lrc=fmean(row.kind == "LRC" for row in rows),
    )


def plain(row: SurveyRow | TypeMeans) -> dict[str, Any]:
    """Fields as json can hold them."""
    got = asdict(row)
    return {f.name: None if isinstance(v := got[f.name], float) and not isfinite(v) else v for f in fields(row)}


def grid(*columns: str, title: str) -> Table:
    """A table whose first column is text, the only one to wrap, and whose others are numbers and classes."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for at, column in enumerate(columns):
        side: Literal["left", "right"] = "left" if at == 0 or column == "class" else "right"
        table.add_column(column, justify=side, no_wrap=at > 0, overflow="fold")
    return table
