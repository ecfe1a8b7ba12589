"""Predicted against measured errors of a compressed model, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from subspan import linalg, site
from subspan.inspect.plots import error_figure, rank_heatmap
from subspan.inspect.report import Report, environment, put
from subspan.inspect.survey import parse_site
from subspan.metric import Batches, Forward, call
from subspan.plan import Plan
from subspan.watch import evaluating

Swaps = Mapping[str, tuple[nn.Module, nn.Module]]
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]
ROWS = ("site", "shape", "rank", "form", "predicted error", "measured error", "reason")


def measured_errors(
    model: nn.Module, swaps: Swaps, batches: Batches, *, forward: Forward = call, centred: bool = False
) -> dict[str, float]:
    """How far each new layer's outputs are from the old one's, on inputs of the model as it is now, by site.

        (sum over tokens of |new(x) - old(x)|^2 / sum over tokens of |W x|^2)^(1/2)

    `swaps` are those of an `Edit`, name -> (old, new): before `undo` the inputs come through the compressed
    layers, after it (keep a copy of the swaps) through the dense ones, as predicted errors assume. The old bias
    is not part of W x; experts of one parameter count as one layer. `centred` divides by the spread of the
    outputs about their mean, as `Covariance` predicts.
    Raises ValueError for a site that no batch reaches, or whose outputs hold NaN or Inf.

    >>> old, new = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    >>> new.weight.data = 0.75 * old.weight.data
    >>> round(measured_errors(nn.Sequential(old), {"0": (old, new)}, [torch.eye(2)])["0"], 6)
    0.25
    """
    tallies, handles = {name: _Tally(centred) for name in swaps}, []
    try:
        for name, pair in swaps.items():
            present = model.get_submodule(name)
            if all(present is not module for module in pair):
                raise ValueError(
                    f"{name} is neither the old layer nor the new one; pass the swaps of its last edit"
                )
            handles.append(present.register_forward_hook(tallies[name].hook(*pair), with_kwargs=True))
        with evaluating(model), torch.no_grad():
            for batch in batches:
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: tally.error(name) for name, tally in tallies.items()}


class _Tally:
    """Sums over the tokens of one site."""

    def __init__(self, centred: bool) -> None:
        self.centred = centred
        self.count = 0
        self.off = self.whole = torch.zeros((), dtype=torch.float64)
        self.total: Tensor | None = None

    def hook(self, old: nn.Module, new: nn.Module) -> Hook:
        kind, bias = site.of(old), site.bias(old)

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            # The hooked layer has run already, and calling it again would call this hook.
            other = (new if module is old else old)(*args, **kwargs)
            was, now = (output, other) if module is old else (other, output)
            y = kind.outputs(old, was).double()
            self.add(kind.outputs(old, now).double() - y, y if bias is None else y - bias.double())

        return see

    def add(self, off: Tensor, y: Tensor) -> None:
        self.count += len(y)
        self.off = self.off.to(y.device) + off.square().sum()
        self.whole = self.whole.to(y.device) + y.square().sum()
        self.total = y.sum(0) + (0 if self.total is None else self.total)

    def error(self, name: str) -> float:
        if self.total is None:
            raise ValueError(f"no batch reached {name}; use more data or leave the site out")
        whole = self.whole - (self.total.square().sum() / self.count if self.centred else 0)
        linalg.require_finite(torch.stack([self.off, whole]), f"the squared errors and outputs of {name}")
        return float((self.off / whole).sqrt()) if whole > 0 else 0.0


def compression_report(plan: Plan, measured: Mapping[str, float], *, model: str = "", seed: int = 0) -> Report:
    """A page on one compressed model: ranks by block and type, predicted against measured errors, every layer.

    `measured` are errors by site, as of `measured_errors`; sites without one are left out of that figure.
    Write the page with its `write(folder)`.
    """
    before, after = plan.bytes
    page = Report("Compression", model, seed=seed, data={"plan": plan.to_dict(), "measured": dict(measured)})
    page.section("Size", plan.title())
    facts = [
        ("rank reduction", f"{plan.err:.1%}"),
        ("numbers kept in the layers", f"{plan.ratio:.1%}"),
        ("bytes of the whole model", f"{before:,} to {after:,} ({after / before:.1%})"),
    ]
    page.table("Three measures of size, which differ.", ("measure", "value"), facts)
    shapes = {name: row.shape for name, row in plan.sites.items()}
    page.figure("Rank kept in every matrix.", rank_heatmap(plan.ranks(), shapes))
    page.section("Errors", "Relative errors of the layers' outputs; predicted ones are those of the plan.")
    predicted = {name: row.error for name, row in plan.sites.items() if name in measured}
    if any(predicted.values()) and any(measured.values()):
        page.figure("Predicted against measured error of every layer.", error_figure(predicted, measured))
        page.table(
            "Errors by type of matrix, means.", ("type", "layers", *ROWS[4:6]), by_type(predicted, measured)
        )
    page.section("By layer")
    rows = [
        (
            name,
            "{} x {}".format(*s.shape),
            s.rank,
            s.form,
            f"{s.error:.2%}",
            _percent(measured.get(name)),
            s.reason,
        )
        for name, s in plan.sites.items()
    ]
    page.table("Every matrix.", ROWS, rows)
    return page


def by_type(predicted: Mapping[str, float], measured: Mapping[str, float]) -> list[tuple[str, int, str, str]]:
    """Type of matrix, how many there are, and their mean errors as text."""
    groups: dict[str, list[str]] = {}
    for name in predicted:
        groups.setdefault(parse_site(name)[1], []).append(name)
    return [
        (
            kind,
            len(names),
            _percent(fmean(predicted[n] for n in names)),
            _percent(fmean(measured[n] for n in names)),
        )
        for kind, names in groups.items()
    ]


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:.2%}"


def write_page(page: Report, file: str | Path) -> Path:
    """Write a page under any name, as one file of html; what was there is replaced when all is written."""
    file = Path(file)
    text = page.html(environment(page.seed))
    file.parent.mkdir(parents=True, exist_ok=True)
    return put(file, text)
