"""Figures of how weights and gradients change over training, and between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from subspan.inspect.plots import (
    FAINT,
    INK,
    WIDTH,
    canvas,
    entitle,
    normalised,
    ordered,
    quieten,
    require,
    short,
    styles,
)
from subspan.inspect.survey import parse_site

Series = Mapping[str, Sequence[float]]


def comparison_figure(points: Mapping[str, tuple[float, float]], top: int) -> Figure:
    """Site -> (relative change, overlap of the leading `top` directions), by block, a line per matrix type.

    Sites that share a block and a type, such as experts, are averaged.
    """
    require(points, "points")
    figure, (upper, lower) = panels(2, 5.6)
    for axes, at, scale in ((upper, 0, 100.0), (lower, 1, 1.0)):
        by_depth(axes, {name: scale * values[at] for name, values in points.items()})
    most, least = max(points, key=lambda n: points[n][0]), min(points, key=lambda n: points[n][1])
    if points[most][0] == 0:
        entitle(upper, f"All {len(points)} matrices are unchanged")
    else:
        entitle(
            upper,
            f"{short(most)} changed most, by {points[most][0]:.3g} of its norm; {short(least)} kept least of its "
            f"leading {top} directions, {points[least][1]:.0%}",
        )
    upper.set(ylabel="change, % of norm", ylim=(0, None))
    lower.set(ylabel=f"overlap of leading {top}", ylim=(-0.02, 1.04), xlabel="block")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(upper)
    return figure


def cosine_heatmap(matrices: Mapping[str, Tensor], steps: Sequence[int]) -> Figure:
    """Cosines (t, t) between gradients at checkpoints, one square for each of a few sites, on one scale."""
    require(matrices, "matrices")
    count = len(steps)
    across = min(3, len(matrices))
    down = -(-len(matrices) // across)
    figure = Figure(figsize=(WIDTH, 0.6 + down * (0.84 * WIDTH / across + 0.3)), dpi=100, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    image: Any = None
    for axes in grid.flat[len(matrices) :]:
        axes.set_visible(False)
    for axes, (name, matrix) in zip(grid.flat, matrices.items(), strict=False):
        if tuple(matrix.shape) != (count, count):
            raise ValueError(f"{name}: cosines of shape {tuple(matrix.shape)} do not fit {count} checkpoints")
        image = axes.imshow(matrix.numpy(), cmap=colormaps["RdBu_r"], vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"{short(name)}: mean {between(matrix):.2f}", fontsize=9.5, color=INK, loc="left")
        at = np.unique(np.linspace(0, count - 1, min(count, 4)).round().astype(int))
        axes.set_xticks(at, [f"{steps[i]:,}" for i in at])
        axes.set_yticks(at, [f"{steps[i]:,}" for i in at])
        axes.tick_params(colors=INK, labelsize=8, length=2)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("step", color=INK, fontsize=8.5)
    bar = figure.colorbar(image, ax=grid, shrink=0.7, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=8)
    means = {name: between(matrix) for name, matrix in matrices.items()}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    found = f"agree most in {short(high)}, least in {short(low)}" if low != high else f"of {short(low)}"
    figure.suptitle(
        f"Cosines of gradients at checkpoints {found}",
        x=0.01,
        ha="left",
        fontsize=10.5,
        fontweight="bold",
        color=INK,
    )
    return figure


def between(matrix: Tensor) -> float:
    """The mean of a square matrix off its diagonal; 1 for one checkpoint."""
    count = len(matrix)
    return float((matrix.sum() - matrix.trace()) / (count * (count - 1))) if count > 1 else 1.0


def trace_figure(lines: Series, steps: Sequence[int], ylabel: str, *, chance: float | None = None) -> Figure:
    """A value over steps, a line per site or type; sites of one type are averaged, each a thin line."""
    require(lines, "lines")
    kinds = ordered(parse_site(name)[1] for name in lines)
    style = styles(kinds)
    figure, axes = canvas(3.9)
    ends: dict[str, float] = {}
    for kind in kinds:
        rows = [values for name, values in lines.items() if parse_site(name)[1] == kind]
        if any(len(row) != len(steps) for row in rows):
            raise ValueError(f"{kind}: {[len(row) for row in rows]} values for {len(steps)} steps; give as many")
        mean, look = [fmean(column) for column in zip(*rows, strict=True)], style[kind]
        axes.plot(steps, mean, color=look.color, ls=look.dash, lw=1.7, label=kind)
        for row in rows if len(rows) > 1 else []:
            axes.plot(steps, row, color=look.color, lw=0.6, alpha=0.35, label="_")
        ends[kind] = mean[-1]
    if chance is not None:
        axes.axhline(chance, color=FAINT, lw=1, ls=(0, (4, 2)), label="by chance")
    low_kind, high_kind = min(ends, key=ends.__getitem__), max(ends, key=ends.__getitem__)
    found = f"highest at the end for {high_kind}, {ends[high_kind]:.3g}"
    found += f"; lowest for {low_kind}, {ends[low_kind]:.3g}" if low_kind != high_kind else ""
    entitle(axes, f"{ylabel[:1].upper()}{ylabel[1:]}: {found}")
    axes.set(xlabel="step", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    legend(axes)
    return figure


def spectra_over_time(spectra: Mapping[str, Tensor], steps: Sequence[int]) -> Figure:
    """Singular values (t, k) of a few sites over their largest, a heat map each: index down, checkpoint across."""
    require(spectra, "spectra")
    figure, made = panels(len(spectra), 3.3, across=True)
    image: Any = None
    share: dict[str, float] = {}
    for axes, (name, rows) in zip(made, spectra.items(), strict=True):
        if len(rows) != len(steps):
            raise ValueError(f"{name}: {len(rows)} spectra for {len(steps)} steps; give one for each")
        picture = np.stack([normalised(row) for row in rows])
        share[name] = float(picture[-1].mean())
        image = axes.imshow(picture.T, cmap=colormaps["cividis"], vmin=0, vmax=1, aspect="auto", origin="upper")
        at = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 3)).round().astype(int))
        axes.set_xticks(at, [f"{steps[i]:,}" for i in at])
        axes.set_title(short(name), fontsize=9.5, color=INK, loc="left")
        axes.grid(False)
        axes.set_xlabel("step")
    made[0].set_ylabel("index of singular value")
    bar = figure.colorbar(image, ax=made, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=8)
    low = min(share, key=share.__getitem__)
    figure.suptitle(
        f"Singular values over the largest: {short(low)} ends with the steepest fall", x=0.01, ha="left",
        fontsize=10.5, fontweight="bold", color=INK,
    )  # fmt: skip
    return figure


def bar_figure(values: Mapping[str, float], ylabel: str, *, chance: Mapping[str, float] | None = None) -> Figure:
    """One bar per matrix type, the mean over its sites, which are dots; short lines are what chance would give.

    For numbers of intruders and for alignments.
    """
    require(values, "values")
    kinds = ordered(parse_site(name)[1] for name in values)
    style = styles(kinds)
    groups = {kind: [v for name, v in values.items() if parse_site(name)[1] == kind] for kind in kinds}
    means = {kind: fmean(group) for kind, group in groups.items()}
    figure, axes = canvas(3.6)
    for at, kind in enumerate(kinds):
        axes.bar(at, means[kind], width=0.62, color=style[kind].color, alpha=0.8)
        spots = at + np.linspace(-0.18, 0.18, len(groups[kind])) if len(groups[kind]) > 1 else [at]
        axes.scatter(spots, groups[kind], s=12, color=INK, zorder=3)
        if chance is not None:
            level = fmean(v for name, v in chance.items() if parse_site(name)[1] == kind)
            axes.plot([at - 0.36, at + 0.36], [level, level], color=INK, lw=1.2, ls=(0, (2, 1)))
            axes.text(at, level, "chance", fontsize=7.5, ha="center", va="bottom", color=INK)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=min(0.0, *means.values()))
    high, low = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    found = f"most in {high}, {means[high]:.3g}; least in {low}, {means[low]:.3g}"
    entitle(axes, f"{ylabel[:1].upper()}{ylabel[1:]}: {found if high != low else f'{means[low]:.3g} everywhere'}")
    return figure


def by_depth(axes: Any, values: Mapping[str, float]) -> None:
    """A line per matrix type over blocks; sites outside blocks stand left of block 0."""
    kinds = ordered(parse_site(name)[1] for name in values)
    style = styles(kinds)
    for kind in kinds:
        groups: dict[int, list[float]] = {}
        for name, value in values.items():
            place, own = parse_site(name)
            if own == kind:
                groups.setdefault(-1 if place is None else place, []).append(value)
        x = sorted(groups)
        look = style[kind]
        y = [fmean(groups[place]) for place in x]
        axes.plot(x, y, color=look.color, ls=look.dash, lw=1.4, marker="o", ms=3.5, label=kind)


def panels(count: int, height: float, *, across: bool = False) -> tuple[Figure, list[Any]]:
    """An empty figure with several quiet axes, one above the other with one x axis, or side by side."""
    figure = Figure(figsize=(WIDTH, height), dpi=100, layout="constrained")
    grid = (1, count) if across else (count, 1)
    made = list(figure.subplots(*grid, squeeze=False, sharex=not across, sharey=False).flat)
    for axes in made:
        quieten(axes)
    return figure, made


def legend(axes: Any) -> None:
    """A legend right of the axes, when there is more than one entry."""
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0))
