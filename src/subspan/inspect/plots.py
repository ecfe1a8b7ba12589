"""Figures: spectra, ranks, losses and perplexities. Pure functions that return a matplotlib `Figure`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, log10
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from torch import Tensor

from subspan.inspect.survey import parse_site
from subspan.plan import Shapes

INK = "#2b2d31"
FAINT = "#8a8d93"
# Okabe and Ito's palette, told apart by the colour-blind, without yellow and black: one fades on white paper,
# the other on a dark screen.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDTH = 7.0


class Style(NamedTuple):
    """How one series is drawn, in every figure it appears in."""

    color: str
    dash: Any


Styles = Mapping[str, Style]
Curves = Mapping[str, Sequence[tuple[float, float]]]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A colour and a dash for each name, in order; names beyond the seventh share colours but not dashes.

    Pass one such table to several figures that show different subsets of the same series.

    >>> styles(["adam", "galore"])["galore"].color
    '#e69f00'
    """
    unique = list(dict.fromkeys(names))
    count, dashes = len(PALETTE), len(DASHES)
    return {name: Style(PALETTE[i % count], DASHES[i // count % dashes]) for i, name in enumerate(unique)}


def spectra_figure(spectra: Mapping[str, Tensor], *, style: Styles | None = None) -> Figure:
    """Every matrix's singular values over its largest, against the index over the last; one colour per type."""
    require(spectra, "spectra")
    kinds = ordered(parse_site(name)[1] for name in spectra)
    style = complete(style, kinds)
    figure, axes = canvas(4.2)
    width = 1.2 if len(spectra) <= 16 else 0.7
    sums: dict[str, list[float]] = {kind: [] for kind in kinds}
    for name, s in spectra.items():
        kind, y = parse_site(name)[1], normalised(s)
        sums[kind].append(float(y.mean()))
        x = np.arange(len(y)) / max(len(y) - 1, 1)
        look = style[kind]
        first = len(sums[kind]) == 1
        axes.plot(x, y, color=look.color, ls=look.dash, lw=width, alpha=0.75, label=kind if first else "_")
    area = {kind: float(np.mean(sums[kind])) for kind in kinds}
    fast, slow = min(area, key=area.__getitem__), max(area, key=area.__getitem__)
    seen = f"{fast} falls fastest, {slow} slowest" if fast != slow else f"all {fast}"
    entitle(axes, f"Singular values of {len(spectra)} {plural(len(spectra), 'matrix', 'matrices')}: {seen}")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="index / last index", ylabel="singular value / largest")
    legend = axes.legend(*in_order(axes, kinds), frameon=False, labelcolor=INK, fontsize=9, loc="upper right")
    for line in legend.get_lines():
        line.set(linewidth=2.5, alpha=1)
    return figure


def rank_heatmap(ranks: Mapping[str, int], shapes: Shapes) -> Figure:
    """Rank kept over full rank, in percent: a row per block, a column per matrix type, missing cells blank.

    Sites that share a block and a type, such as experts, are pooled into one cell. Raises ValueError for a site
    without a shape.
    """
    require(ranks, "ranks")
    share, blocks, kinds = pooled(ranks, shapes)
    figure, axes = canvas(1.0 + 0.23 * max(len(blocks), 2))
    colours = colormaps["cividis"]
    axes.imshow(np.ma.masked_invalid(share), cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for row, column in zip(*np.nonzero(np.isfinite(share)), strict=True):
        value = share[row, column]
        light = np.dot(colours(value)[:3], (0.299, 0.587, 0.114)) > 0.45
        paint = "#111111" if light else "#ffffff"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=paint)
    entitle(axes, rank_title(ranks, shapes))
    axes.xaxis.tick_top()
    wide = sum(len(kind) + 2 for kind in kinds) > 90
    turn = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if wide else {}
    axes.set_xticks(range(len(kinds)), kinds, **turn)
    axes.set_yticks(range(len(blocks)), ["none" if block is None else str(block) for block in blocks])
    axes.set_ylabel("block")
    axes.tick_params(length=0, labelsize=8)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def rank_title(ranks: Mapping[str, int], shapes: Shapes) -> str:
    """The share of rank kept overall, and the two sites that keep least and most."""
    share = {name: rank / min(shapes[name]) for name, rank in ranks.items()}
    overall = sum(ranks.values()) / sum(min(shapes[name]) for name in ranks)
    low, high = min(share, key=share.__getitem__), max(share, key=share.__getitem__)
    if f"{share[low]:.0%}" == f"{share[high]:.0%}":
        return f"Rank kept, % of full: {overall:.0%} everywhere"
    ends = f"from {share[low]:.0%} ({short(low)}) to {share[high]:.0%} ({short(high)})"
    return f"Rank kept, % of full: {overall:.0%} overall, {ends}"


def loss_curves(curves: Curves, ylabel: str, *, style: Styles | None = None) -> Figure:
    """One line per run, step against loss, labelled at its end with its last value."""
    require(curves, "curves")
    style = complete(style, list(curves))
    figure, axes = canvas(3.8)
    last: dict[str, tuple[float, float]] = {}
    labels: dict[str, tuple[float, float, str]] = {}
    for name, points in curves.items():
        xs, ys = columns(points, name)
        axes.plot(xs, ys, color=style[name].color, ls=style[name].dash, lw=1.6)
        last[name] = end(points, name)
        labels[end_label(points, name)] = (*last[name], style[name].color)
    best = min(last, key=lambda name: last[name][1])
    rest = "ends lowest, at" if len(last) > 1 else "ends at"
    entitle(axes, f"{ylabel[:1].upper()}{ylabel[1:]}: {best} {rest} {number(last[best][1])}")
    axes.set(xlabel="step", ylabel=ylabel)
    axes.margins(x=0)
    axes.set_xlim(right=max(x for x, _ in last.values()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    label_ends(axes, labels)
    return figure


def perplexity_figure(points: Curves, dense: float, *, style: Styles | None = None) -> Figure:
    """Perplexity, on a log scale, against the share of bytes kept, which falls to the right; dense is a line.

    Raises ValueError for a perplexity of zero or less.
    """
    require(points, "points")
    style = complete(style, list(points))
    figure, axes = canvas(4.0)
    ends: dict[str, tuple[float, float, str]] = {f"dense: {number(dense)}": (float("nan"), dense, FAINT)}
    heights, shares = [dense], [100.0]
    for name, given in points.items():
        xs, ys = columns(sorted(((100 * x, y) for x, y in given), reverse=True), name)
        axes.plot(xs, ys, color=style[name].color, ls=style[name].dash, lw=1.6, marker="o", ms=4)
        heights, shares = heights + [y for y in ys if isfinite(y)], shares + list(xs)
        line = list(zip(xs, ys, strict=True))
        ends[end_label(line, name)] = (*end(line, name), style[name].color)
    if min(heights) <= 0:
        raise ValueError(f"perplexity {min(heights)} is not above 0; it is the exponential of a mean loss")
    axes.axhline(dense, color=FAINT, lw=1, ls=(0, (4, 2)), zorder=1)
    low, high = log10(min(heights)), log10(max(heights))
    pad = 0.06 * (high - low) or 0.05
    axes.set_yscale("log")
    axes.set(
        ylim=(10 ** (low - pad), 10 ** (high + pad)),
        xlabel="bytes kept, % (fewer to the right)",
        ylabel="perplexity (log scale)",
    )
    span = max(shares) - min(shares) or 1.0
    axes.set_xlim(max(shares) + 0.02 * span, min(shares) - 0.02 * span)
    axes.yaxis.set(major_locator=FixedLocator(log_ticks(*axes.get_ylim())), minor_locator=NullLocator())
    axes.yaxis.set(major_formatter=FuncFormatter(lambda y, _: f"{y:,.6g}"), minor_formatter=NullFormatter())
    entitle(axes, perplexity_title(points, dense))
    label_ends(axes, ends)
    return figure


def perplexity_title(points: Curves, dense: float) -> str:
    """Which series does best at the smallest size, and how far above dense."""
    smallest = min(x for given in points.values() for x, _ in given)
    # Plans of one target miss it by a rank or two each, so sizes are compared as they are printed.
    same = f"{smallest:.0%}"
    there = {name: y for name, given in points.items() for x, y in given if f"{x:.0%}" == same and isfinite(y)}
    if not there:
        return f"Perplexity down to {smallest:.0%} of the bytes (dense {number(dense)})"
    best = min(there, key=there.__getitem__)
    verb = "is lowest," if len(there) > 1 else "reaches"
    return (
        f"At {smallest:.0%} of the bytes {best} {verb} {number(there[best])} ({there[best] / dense:.3g} x dense)"
    )


def error_figure(predicted: Mapping[str, float], measured: Mapping[str, float]) -> Figure:
    """Measured against predicted relative error of every site, on log axes with the diagonal; a colour per type.

    Only sites whose two errors are above 0 are shown; raises ValueError when there is none.
    """
    sites = [name for name, error in predicted.items() if error > 0 and measured.get(name, 0.0) > 0]
    require(dict.fromkeys(sites), "the set of sites with both a predicted and a measured error")
    kinds = ordered(parse_site(name)[1] for name in sites)
    style = styles([*TYPES, *kinds])  # so that a type has one colour in all such figures
    figure, axes = canvas(5.0)
    for kind in kinds:
        mine = [name for name in sites if parse_site(name)[1] == kind]
        x, y = [100 * predicted[n] for n in mine], [100 * measured[n] for n in mine]
        axes.scatter(x, y, s=20, color=style[kind].color, alpha=0.8, lw=0, label=kind)
    values = [100 * errors[name] for name in sites for errors in (predicted, measured)]
    low, high = min(values) / 1.15, max(values) * 1.15
    axes.plot([low, high], [low, high], color=FAINT, lw=1, ls=(0, (4, 2)), zorder=1)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set(xlabel="predicted error, % (log scale)", ylabel="measured error, % (log scale)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set(major_locator=FixedLocator(log_ticks(low, high)), minor_locator=NullLocator())
        axis.set(major_formatter=FuncFormatter(lambda v, _: f"{v:,.6g}"), minor_formatter=NullFormatter())
    axes.grid(axis="x", color=FAINT, alpha=0.25, lw=0.6)
    odds = {name: measured[name] / predicted[name] for name in sites}
    worst = max(sites, key=lambda name: abs(log10(odds[name])))
    middle = float(np.median(list(odds.values())))
    entitle(
        axes, f"Measured over predicted error: {middle:.3g} in the middle, {odds[worst]:.3g} at {short(worst)}"
    )
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def canvas(height: float) -> tuple[Figure, Any]:
    """An empty figure of the common width with one quiet pair of axes."""
    figure = Figure(figsize=(WIDTH, height), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    quieten(axes)
    return figure, axes


def quieten(axes: Any) -> None:
    """Axes without a frame, with pale lines across."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(axis="y", color=FAINT, alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)


def entitle(axes: Any, text: str) -> None:
    """A bold left-aligned title, broken into lines that fit the figure."""
    axes.set_title(fill(text, 78), loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=10)


def label_ends(axes: Any, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write each label (x, y, colour) right of the axes beside its line's end, pushed apart where they touch."""
    names = [name for name, (_, y, _) in ends.items() if isfinite(y)]
    scale = axes.yaxis.get_transform()
    low, high = scale.transform(np.array(axes.get_ylim()))
    at = [(float(scale.transform(np.array([ends[name][1]]))[0]) - low) / (high - low) for name in names]
    gap = 14 / (axes.figure.get_figheight() * 72 - 80)
    edge = axes.get_xlim()[1]
    for name, y in zip(names, spread(at, gap), strict=True):
        x, value, color = ends[name]
        start = (edge if not isfinite(x) else x, value)
        thread = {
            "arrowstyle": "-",
            "color": color,
            "lw": 0.7,
            "alpha": 0.7,
            "shrinkA": 1,
            "shrinkB": 2,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            name, start, (1.05, y), textcoords="axes fraction", va="center", fontsize=9,
            color=INK, arrowprops=thread, annotation_clip=False,
        )  # fmt: skip


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """The nearest positions, in least squares and in the same order, that are `gap` apart.

    >>> spread([0.5, 0.5], 0.1), spread([0.2, 0.8], 0.1)
    ([0.45, 0.55], [0.2, 0.8])
    """
    order = sorted(range(len(positions)), key=positions.__getitem__)
    # Subtracting i * gap turns the problem into isotonic regression, which pooling adjacent violators solves.
    pools: list[list[float]] = []
    for i, at in enumerate(order):
        pools.append([positions[at] - i * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    level = [float(np.mean(pool)) for pool in pools for _ in pool]
    result = [0.0] * len(positions)
    for i, at in enumerate(order):
        result[at] = level[i] + i * gap
    return result


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ends of a log axis: few steps of 1, 2, 5, or even ones when close."""
    decades = range(int(np.floor(log10(low))), int(np.ceil(log10(high))) + 1)
    for digits in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        ticks = [d * 10.0**p for p in decades for d in digits if low <= d * 10.0**p <= high]
        if len(ticks) <= 10:
            break
    if len(ticks) < 3:
        ticks = [float(t) for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    return ticks


def pooled(ranks: Mapping[str, int], shapes: Shapes) -> tuple[Any, list[int | None], list[str]]:
    """Share of rank kept (blocks, types), NaN where there is no site, and the names of rows and columns."""
    unknown = [name for name in ranks if name not in shapes]
    if unknown:
        raise ValueError(f"{unknown[0]} has a rank but no shape; pass the shapes of all {len(ranks)} ranked sites")
    where = {name: parse_site(name) for name in ranks}
    blocks = sorted({block for block, _ in where.values()}, key=lambda b: (b is None, b or 0))
    kinds = ordered(kind for _, kind in where.values())
    sums = np.zeros((2, len(blocks), len(kinds)))
    for name, (block, kind) in where.items():
        sums[:, blocks.index(block), kinds.index(kind)] += ranks[name], min(shapes[name])
    share = np.full(sums.shape[1:], np.nan)
    np.divide(sums[0], sums[1], out=share, where=sums[1] > 0)
    return share, blocks, kinds


def ordered(kinds: Iterable[str]) -> list[str]:
    """Unique matrix types: the usual ones in the usual order, then the others as they come."""
    unique = list(dict.fromkeys(kinds))
    return sorted(unique, key=lambda kind: TYPES.index(kind) if kind in TYPES else len(TYPES))


def complete(given: Styles | None, names: Sequence[str]) -> Styles:
    """The given styles, or new ones; raises ValueError naming a series that has none."""
    if given is None:
        return styles(names)
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"no style for {missing[0]!r}; make the table with styles([...]) over all series")
    return given


def columns(points: Iterable[tuple[float, float]], name: str) -> tuple[list[float], list[float]]:
    """Points as x and y; raises ValueError when there are none."""
    points = list(points)
    if not points:
        raise ValueError(f"series {name!r} has no points; leave it out")
    return [float(x) for x, _ in points], [float(y) for _, y in points]


def end(points: Sequence[tuple[float, float]], name: str) -> tuple[float, float]:
    """The last point with a finite y; raises ValueError when no point has one."""
    for x, y in reversed(points):
        if isfinite(y):
            return x, y
    raise ValueError(f"series {name!r} has no finite value; leave it out and say so in a note")


def end_label(points: Sequence[tuple[float, float]], name: str) -> str:
    """A series' name and last finite value, saying so when the series goes on without one."""
    x, y = end(points, name)
    return f"{name}: {number(y)}" + (", then not finite" if points[-1][0] != x else "")


def number(y: float) -> str:
    """Four digits, and never an exponent for large numbers.

    >>> number(12.3456), number(12345.6)
    ('12.35', '12,346')
    """
    return f"{y:,.0f}" if abs(y) >= 1000 else f"{y:.4g}"


def require(series: Mapping[str, Any], what: str) -> None:
    """Raise ValueError when there is nothing to draw."""
    if not series:
        raise ValueError(f"{what} is empty: there is nothing to draw; give one entry at least")


def normalised(s: Tensor) -> Any:
    """Singular values (k,) over the largest, as float64 numpy; zeros stay zeros."""
    y = s.detach().cpu().double().numpy()
    return y / max(float(y.max()), np.finfo(np.float64).tiny)


def in_order(axes: Any, names: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Legend handles and labels in the order of names."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    return [handles[name] for name in names], list(names)


def short(name: str) -> str:
    """Type and block of a site, for a title."""
    block, kind = parse_site(name)
    return name if block is None or kind.isdigit() else f"{kind} {block}"


def plural(count: int, one: str, many: str) -> str:
    """The word for this count."""
    return one if count == 1 else many
