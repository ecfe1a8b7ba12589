"""The page of `finetuning.py`: tables of every method, and scores against trained numbers and against step time.

python bench/finetuning_page.py [bench/results/finetuning.json]
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from subspan.inspect import Report, write_page
from subspan.inspect.plots import Style, canvas, entitle, label_ends, number, styles

TITLES = {
    "classes": (
        "Telling sources apart",
        "MiniLM tells of which of 12 packages a piece of source is. The classifier on top is that of the dense "
        "encoder, and stays.",
    ),
    "prose": ("Modelling a text", "SmolLM2 on the help of the Python language, in windows of 64 tokens."),
}


class Result(NamedTuple):
    """A method at one size: the mean of its seeds and how far they are apart."""

    method: str
    numbers: int
    rate: float
    loss: float
    apart: float
    accuracy: float | None
    rates: tuple[float, ...]
    args: dict[str, Any]


def results(rows: dict[str, Any], task: str) -> list[Result]:
    """Every method that has two scored runs at one rate, by its size; the best first."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for key, row in rows.items():
        parts = key.split(" | ")
        if parts[0] == task and len(parts) == 5:
            found.setdefault((parts[1], parts[2]), {}).setdefault(parts[3], []).append(row)
    made = []
    for (method, _), by_rate in found.items():
        for rate, runs in by_rate.items():
            if len(runs) < 2 or not all(run["score"] for run in runs):
                continue
            losses = [run["score"]["loss"] for run in runs]
            right = [run["score"]["accuracy"] for run in runs if "accuracy" in run["score"]]
            made.append(
                Result(
                    method, runs[0]["numbers"], float(rate), statistics.mean(losses), max(losses) - min(losses),
                    statistics.mean(right) if right else None, tuple(sorted(map(float, by_rate))), runs[0]["args"],
                )
            )  # fmt: skip
    return sorted(made, key=lambda one: one.loss)


def score_figure(found: list[Result], floor: float) -> Figure:
    """Score against trained numbers, a line for each method with more sizes than one."""
    figure, axes = canvas(0.19 * len({one.method for one in found}) + 2)
    look: dict[str, Style] = styles(one.method for one in found)
    ends: dict[str, tuple[float, float, str]] = {}
    for name, style in look.items():
        mine = sorted((one for one in found if one.method == name), key=lambda one: one.numbers)
        xs, ys = [one.numbers for one in mine], [one.loss for one in mine]
        axes.plot(xs, ys, color=style.color, ls=style.dash, lw=1.2, marker="o", ms=3.5)
        ends[f"{name}: {number(ys[-1])}"] = (xs[-1], ys[-1], style.color)
    fit(axes, [one.loss for one in found])
    axes.set_xscale("log")
    axes.set(xlabel="trained numbers (log scale)", ylabel="nats on other texts")
    entitle(axes, f"Untrained {number(floor)}; {found[0].method} ends lowest, at {number(found[0].loss)}")
    label_ends(axes, ends)
    return figure


def fit(axes: Any, heights: list[float]) -> None:
    """Leave room above and below for the labels, and none for more."""
    pad = 0.12 * (max(heights) - min(heights)) or 0.01
    axes.set_ylim(min(heights) - pad, max(heights) + pad)


def time_figure(found: list[Result], times: dict[str, float], floor: float) -> Figure:
    """Score against the time of a step, as a multiple of LoRA's; the largest size of each method."""
    shown = {one.method: one for one in sorted(found, key=lambda one: one.numbers) if one.method in times}
    figure, axes = canvas(0.19 * len(shown) + 2)
    look = styles(shown)
    ends: dict[str, tuple[float, float, str]] = {}
    for name, one in shown.items():
        axes.plot([times[name]], [one.loss], color=look[name].color, marker="o", ms=5, ls="")
        ends[f"{name}: {times[name]:.2f}"] = (times[name], one.loss, look[name].color)
    fit(axes, [one.loss for one in shown.values()])
    axes.set(xlabel="time of a step over LoRA's", ylabel="nats on other texts")
    entitle(axes, f"Score against step time: lower and to the left is better; untrained {number(floor)}")
    label_ends(axes, ends)
    return figure


def size(args: dict[str, Any]) -> str:
    """The arguments that set a size."""
    return ", ".join(f"{k} {v}" for k, v in args.items() if k != "alpha") or "all"


def page(data: dict[str, Any]) -> Report:
    """Everything, from top to bottom."""
    report = Report("Fine-tuning by every adapter", "at equal trained numbers", data=data)
    for task, (title, text) in TITLES.items():
        found = results(data["rows"], task)
        if not found:
            continue
        start = data["rows"][f"{task} | nothing"]["score"]
        times = {
            key.split(" | ")[1]: row["ratio"] for key, row in data["times"].items() if key.startswith(f"{task} |")
        }
        told = f", {start['accuracy']:.1%} right" if "accuracy" in start else ""
        report.section(
            title,
            f"{text} {data['settings']['steps'][task]} steps; before, {start['loss']:.4f} nats{told}. Two seeds.",
        )
        report.figure("Score against trained numbers.", score_figure(found, start["loss"]))
        if times:
            report.figure("Score against the time of a step.", time_figure(found, times, start["loss"]))
        lines = [
            [one.method, size(one.args), f"{one.numbers / 1e3:,.0f} k", f"{one.rate:.2g}", f"{one.loss:.4f}",
             f"{one.apart:.4f}", "" if one.accuracy is None else f"{one.accuracy:.1%}",
             f"{times[one.method]:.2f}" if one.method in times else "",
             " ".join(f"{rate:.1g}" for rate in one.rates)]
            for one in found
        ]  # fmt: skip
        columns = [
            "method",
            "size",
            "trained",
            "rate",
            "nats",
            "seeds apart",
            "right",
            "step / LoRA's",
            "rates tried",
        ]
        report.table("Every method, the best first.", columns, lines)
    report.note(
        "A short run by one schedule on one kind of text: differences smaller than the seeds' say nothing, "
        "and an order here is not one on other tasks or after longer training."
    )
    return report


def write(data: dict[str, Any], path: Path) -> Path:
    """Write the page."""
    return write_page(page(data), path)


if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results/finetuning.json")
    print(write(json.loads(source.read_text()), source.with_suffix(".html")))
