"""Two models side by side: what tuning or compression did to every weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import inf, isfinite
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from subspan import linalg, site
from subspan.adapt import Adapted
from subspan.compress import Track
from subspan.inspect.intruders import intruders_of, live_count
from subspan.inspect.subspaces import subspace_overlap
from subspan.inspect.survey import grid, parse_site
from subspan.inspect.traces import comparison_figure
from subspan.ops import OpLayer, OpLinear
from subspan.select import Select, pick
from subspan.threads import spread

Weights = Mapping[str, Tensor]
Matrix = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Change:
    """One matrix before (a) and after (b).

    `change` is |b - a| / |a|; `left` and `right` are overlaps of the leading singular subspaces; `spectra` is
    |s_b - s_a| / |s_a|, never above `change`; effective ranks are entropy's; `intruders` counts new directions.
    """

    shape: tuple[int, int]
    change: float
    spectra: float
    left: float
    right: float
    intruders: int
    effective_a: float
    effective_b: float
    rank_b: int

    @property
    def full(self) -> int:
        """The largest rank the shape allows."""
        return min(self.shape)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Site -> what changed; sites of one model only, or of two shapes, are in `skipped` with the reason."""

    rows: Mapping[str, Change]
    skipped: Mapping[str, str]
    top: int
    epsilon: float

    def types(self) -> dict[str, dict[str, float]]:
        """Matrix type -> means over its matrices; intruders are summed."""
        groups: dict[str, list[Change]] = {}
        for name, row in self.rows.items():
            groups.setdefault(parse_site(name)[1], []).append(row)
        return {kind: _means(rows) for kind, rows in groups.items()}

    def table(self, limit: int | None = None) -> Table:
        """One line per site, `limit` lines at most, the most changed first."""
        table = grid("site", "shape", "change", "spectra", "left", "right", "intruders", "effective", "rank",
                     title=self._title())  # fmt: skip
        order = sorted(self.rows.items(), key=lambda item: -item[1].change)
        for name, row in order[:limit]:
            table.add_row(
                name, f"{row.shape[0]} x {row.shape[1]}", f"{row.change:.2%}", f"{row.spectra:.2%}",
                f"{row.left:.3f}", f"{row.right:.3f}", str(row.intruders),
                f"{row.effective_a:.1f} > {row.effective_b:.1f}", f"{row.rank_b}/{row.full}",
            )  # fmt: skip
        left = len(self.rows) - len(order[:limit])
        notes = [f"{left} more sites, all less changed; --json prints all"] if left else []
        notes += [f"not compared: {name}, {why}" for name, why in list(self.skipped.items())[:3]]
        notes += [f"and {len(self.skipped) - 3} more not compared"] if len(self.skipped) > 3 else []
        table.caption = "\n".join(notes) or None
        return table

    def by_type(self) -> Table:
        """One line per matrix type: means, and the number of intruders."""
        table = grid("type", "matrices", "change", "spectra", "left", "right", "intruders", "effective",
                     title=self._title())  # fmt: skip
        for kind, mean in self.types().items():
            table.add_row(
                kind, f"{mean['count']:.0f}", f"{mean['change']:.2%}", f"{mean['spectra']:.2%}",
                f"{mean['left']:.3f}", f"{mean['right']:.3f}", f"{mean['intruders']:.0f}",
                f"{mean['effective_a']:.1%} > {mean['effective_b']:.1%}",
            )  # fmt: skip
        return table

    def figure(self) -> Figure:
        """Relative change and overlap of leading subspaces by block, a line per matrix type."""
        points = {name: (row.change, (row.left + row.right) / 2) for name, row in self.rows.items()}
        return comparison_figure(points, self.top)

    def data(self) -> dict[str, Any]:
        """Plain values for json; what is not finite becomes None."""
        return {
            "top": self.top,
            "epsilon": self.epsilon,
            "sites": {name: {**_finite(asdict(row)), "shape": list(row.shape)} for name, row in self.rows.items()},
            "types": {kind: _finite(mean) for kind, mean in self.types().items()},
            "skipped": dict(self.skipped),
        }

    def _title(self) -> str:
        same = sum(row.change == 0 for row in self.rows.values())
        return f"{len(self.rows)} matrices, {same} unchanged; subspaces of the leading {self.top} directions"


def compare(
    a: nn.Module | Weights,
    b: nn.Module | Weights,
    *,
    select: Select | None = None,
    top: int = 16,
    epsilon: float = 0.5,
    track: Track[str] = iter,
) -> Comparison:
    """What differs between the weights of a model before (a) and after (b), site by site.

    Models may hold plain linear, compressed and adapted layers, whose dense weights are compared; mappings from
    names to weights (m, n) will do as well. `select` chooses names; by default the layers in numbered blocks.
    Intruders are leading left singular vectors of b without a cosine of `epsilon` in a. Raises ValueError when
    the two have no layer in common, and naming a weight with NaN or Inf.

    >>> found = compare({"0.q": torch.eye(2)}, {"0.q": 2 * torch.eye(2)}, top=2)
    >>> found.rows["0.q"].change, found.rows["0.q"].left
    (1.0, 1.0)
    """
    if top < 1:
        raise ValueError(f"top {top} is no number of directions; give 1 or more")
    before, after = dense_weights(a, select), dense_weights(b, select)
    names = [name for name in before if name in after]
    if not names:
        raise ValueError(
            f"the models have no layer of one name in common: the first has {_some(before)}, the second "
            f"{_some(after)}"
        )
    skipped = {name: "only in the first" for name in before if name not in after}
    skipped |= {name: "only in the second" for name in after if name not in before}

    def work(name: str) -> Change | str:
        x, y = before[name]().detach(), after[name]().detach()
        if x.shape != y.shape:
            return "{} x {} in the first and {} x {} in the second".format(*x.shape, *y.shape)
        return changed(x, y, top=top, epsilon=epsilon, where=name)

    found = dict(zip(track(names), spread(work, names), strict=True))
    skipped |= {name: row for name, row in found.items() if isinstance(row, str)}
    return Comparison({n: row for n, row in found.items() if isinstance(row, Change)}, skipped, top, epsilon)


def changed(a: Tensor, b: Tensor, *, top: int = 16, epsilon: float = 0.5, where: str = "the weight") -> Change:
    """What happened to one matrix (m, n); one decomposition when the two are equal, else two.

    A leading subspace is cut to the numerical rank, so that directions which a low-rank weight does not have
    are not compared.
    """
    shape = (a.shape[0], a.shape[1])
    before, after = linalg.wide(a.detach()), linalg.wide(b.detach())
    for w, which in ((before, "before"), (after, "after")):
        linalg.require_finite(w, f"{where} {which}")
    one = linalg.svd_gram(before)
    if torch.equal(before, after):
        effective = float(linalg.entropy_rank(one.s))
        return Change(shape, 0.0, 0.0, 1.0, 1.0, 0, effective, effective, live_count(one))
    two = linalg.svd_gram(after)
    k = max(1, min(top, live_count(one), live_count(two)))
    norm = float(before.double().norm())
    return Change(
        shape=shape,
        change=_over(float((after.double() - before.double()).norm()), norm),
        spectra=_over(float((two.s.double() - one.s.double()).norm()), norm),
        left=subspace_overlap(one.u[:, :k], two.u[:, :k]),
        right=subspace_overlap(one.vh[:k].mT, two.vh[:k].mT),
        intruders=intruders_of(one, two, top=top, epsilon=epsilon).count,
        effective_a=float(linalg.entropy_rank(one.s)),
        effective_b=float(linalg.entropy_rank(two.s)),
        rank_b=live_count(two),
    )


def dense_weights(model: nn.Module | Weights, select: Select | None = None) -> dict[str, Matrix]:
    """How to come by the matrices (m, n) that `compare` looks at, by name, without holding them all at once.

    Raises ValueError when the pattern selects none.
    """
    found = _inside(model) if isinstance(model, nn.Module) else _given(model)
    if select is not None:
        return {name: found[name][0] for name in pick(found, select, what="layer")}
    usual = {name: make for name, (make, wanted) in found.items() if wanted}
    numbered = {name: make for name, make in usual.items() if any(part.isdigit() for part in name.split("."))}
    return numbered or usual


def _given(weights: Weights) -> dict[str, tuple[Matrix, bool]]:
    return {name: (partial(_itself, w), True) for name, w in weights.items() if w.ndim == 2}


def _inside(model: nn.Module) -> dict[str, tuple[Matrix, bool]]:
    """Every matrix of a model, and whether it is looked at without being named."""
    found: dict[str, tuple[Matrix, bool]] = {}
    outer: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{taken}.") for taken in outer):
            continue
        if isinstance(module, OpLayer | Adapted):
            outer.append(name)
            weight = module.op.dense if isinstance(module, OpLayer) else partial(getattr, module, "matrix")
            found[name] = weight, isinstance(module, OpLinear | Adapted)
        else:
            for own, part in site.sites_of(name, module).items():
                found[own] = partial(site.matrix, part), site.of(part).usual
    return found


def _itself(w: Tensor) -> Tensor:
    return w


def _over(change: float, norm: float) -> float:
    return change / norm if norm else inf if change else 0.0


def _means(rows: list[Change]) -> dict[str, float]:
    return {
        "count": float(len(rows)),
        "change": fmean(row.change for row in rows),
        "spectra": fmean(row.spectra for row in rows),
        "left": fmean(row.left for row in rows),
        "right": fmean(row.right for row in rows),
        "intruders": float(sum(row.intruders for row in rows)),
        "effective_a": fmean(row.effective_a / row.full for row in rows),
        "effective_b": fmean(row.effective_b / row.full for row in rows),
        "rank_b": fmean(row.rank_b / row.full for row in rows),
    }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as json can hold them."""
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in values.items()}


def _some(names: Mapping[str, object]) -> str:
    return ", ".join(list(names)[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "") or "none"
