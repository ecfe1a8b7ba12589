"""The page of `bench/compression.py`: every number of its json, with figures.

python bench/compression_page.py [bench/results/compression.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from subspan.inspect import Report, error_figure, perplexity_figure, rank_heatmap, write_page

Rows = list[dict[str, Any]]
COLUMNS = (
    "budget",
    "metric",
    "target",
    "rank reduction",
    "numbers kept",
    "bytes kept",
    "perplexity",
    "predicted error",
)
METRIC_NAMES = {
    "plain": "plain (SVD)", "absmean": "absmean (ASVD)", "gram": "gram (SVD-LLM)",
    "covariance": "covariance (LoRD, AFM)", "fisher": "fisher (FWSVD)",
}  # fmt: skip


def figures(ppl: float) -> str:
    """A perplexity with as many digits as it deserves."""
    return f"{ppl:.2f}" if ppl < 1000 else f"{ppl:.2g}"


def target(row: dict[str, Any]) -> str:
    """What a row was asked for."""
    return {"err": "rank reduction {:.0%}", "ratio": "numbers {:.0%}"}.get(
        row["target"], "bytes of WeLore at {:.0%}"
    ).format(row["value"])


def where(rows: Rows, **wanted: object) -> Rows:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def curves(rows: Rows, key: str, names: dict[str, str] | None = None) -> dict[str, list[tuple[float, float]]]:
    """Share of bytes and perplexity by the value of one column."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        found.setdefault((names or {}).get(row[key], row[key]), []).append((row["bytes_kept"], row["perplexity"]))
    return found


def cross(rows: Rows) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table of budgets by metrics for each target at which all of them were tried."""
    metrics = [name for name in METRIC_NAMES if where(rows, metric=name)]
    tables = []
    for kind, value in (("err", 0.3), ("ratio", 0.8)):
        here = where(rows, target=kind, value=value, walk="one shot")
        if not here:
            continue
        lines = []
        for budget in dict.fromkeys(row["budget"] for row in here):
            mine = {row["metric"]: row for row in where(here, budget=budget)}
            kept = f"{mine['gram']['bytes_kept']:.1%}" if "gram" in mine else ""
            lines.append([budget, kept, *(figures(mine[m]["perplexity"]) if m in mine else "" for m in metrics)])
        caption = f"Perplexity at {target(here[0])}: every budget under every metric."
        tables.append((caption, ["budget", "bytes kept, gram", *(METRIC_NAMES[m] for m in metrics)], lines))
    return tables


def equal_bytes(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """WeLore's rows and those of others that got the same bytes."""
    others = list(dict.fromkeys(row["budget"] for row in where(rows, target="bytes of welore")))
    lines = []
    for row in where(rows, budget="welore", metric="gram", target="err", walk="one shot"):
        same = {r["budget"]: r for r in where(rows, target="bytes of welore", value=row["value"])}
        cells = [figures(same[name]["perplexity"]) if name in same else "" for name in others]
        lines.append([f"{row['value']:.0%}", f"{row['bytes_kept']:.2%}", figures(row["perplexity"]), *cells])
    return ["WeLore's rank reduction", "bytes kept", "welore", *others], lines


def walks(rows: Rows) -> list[list[str]]:
    """Layer by layer against one shot, of the same plan."""
    lines = []
    for row in where(rows, walk="layer by layer"):
        wanted = {key: row[key] for key in ("budget", "metric", "target", "value")}
        one = where(rows, **wanted, walk="one shot")
        once = figures(one[0]["perplexity"]) if one else ""
        lines.append([row["budget"], target(row), once, figures(row["perplexity"])])
    return lines


def page(data: dict[str, Any]) -> Report:
    """Everything, from top to bottom."""
    rows, dense = data["rows"], data["dense"]["perplexity"]
    sized = [row for row in rows if row["walk"] == "one shot" and row["target"] in ("err", "ratio")]
    report = Report("Compression of a language model", data["model"], data=data)
    scored, calibrated = data["scored_tokens"], data["calibration_tokens"]
    report.section(
        "Perplexity against bytes",
        f"Perplexity on {scored:,} tokens that were used for nothing else; {calibrated:,} others calibrate. "
        f"The dense model has {dense:.2f}. A rank reduction is no share of bytes: a matrix whose two factors "
        "would hold over nine tenths of its numbers stays dense, so it costs as much as before and has lost "
        "accuracy for nothing.",
    )
    report.figure(
        "Every budget under the Gram metric.",
        perplexity_figure(curves(where(sized, metric="gram"), "budget"), dense),
    )
    by_metric = curves(where(sized, budget="uniform"), "metric", METRIC_NAMES)
    report.figure("Every metric with uniform ranks.", perplexity_figure(by_metric, dense))
    for table in cross(rows):
        report.table(*table)
    report.section(
        "At equal bytes",
        "Each budget of this table got at most the bytes that WeLore's plan took at that rank reduction, under "
        "the Gram metric; uniform ranks are factors everywhere or nowhere, and begin at 92 %. `least loss` is "
        "this library's own: it buys ranks where they lower the predicted loss most per number stored, and never "
        "a rank past break-even short of the whole matrix.",
    )
    report.table("Perplexity at equal bytes.", *equal_bytes(rows))
    if lines := walks(rows):
        report.table(
            "Layer by layer, through what is compressed already, against one shot.",
            ["budget", "target", "one shot", "layer by layer"], lines,
        )  # fmt: skip
    pictures(report, data["pictures"])
    encoder(report, data["encoder"])
    report.section("All rows")
    cells = [
        [r["budget"], r["metric"] + (", layer by layer" if r["walk"] != "one shot" else ""), target(r),
         f"{r['err']:.1%}", f"{r['ratio']:.1%}", f"{r['bytes_kept']:.2%}", figures(r["perplexity"]),
         f"{r['predicted_error']:.2%}"]
        for r in rows
    ]  # fmt: skip
    report.table("Every plan.", COLUMNS, cells)
    return report


def pictures(report: Report, found: dict[str, Any]) -> None:
    """Ranks by block and type, and predicted against measured errors."""
    if not found:
        return
    report.section("Ranks", "WeLore's ranks, and those of `least loss` with the same bytes.")
    for name in ("welore", "least loss"):
        mine = found[name]
        shapes = {site: tuple(shape) for site, shape in mine["shapes"].items()}
        report.figure(f"Rank kept: {name} ({mine['key']}).", rank_heatmap(mine["ranks"], shapes))
    report.section(
        "Predicted against measured error",
        "Relative error of each layer's outputs, predicted on the calibration text by the plan, measured on the "
        "scored text: with inputs of the dense model, as the prediction assumes, and of the compressed model.",
    )
    for name, mine in found.items():
        errors = mine["predicted"], mine["measured"]
        report.figure(f"{name}: inputs of the dense model ({mine['key']}).", error_figure(*errors))
    mine = found["least loss"]
    figure = error_figure(mine["predicted"], mine["measured_through_compressed"])
    report.figure(f"least loss: inputs through the compressed model ({mine['key']}).", figure)


def encoder(report: Report, rows: Rows) -> None:
    """The sentence encoder's table."""
    if not rows:
        return
    report.section("A sentence encoder", "MiniLM: cosine similarity of compressed and dense embeddings.")
    cells = [
        [r["budget"], r["metric"], f"{r['err']:.1%}", f"{r['bytes_kept']:.1%}", f"{r['cosine']:.4f}",
         f"{r['least_cosine']:.4f}"]
        for r in rows
    ]  # fmt: skip
    columns = ["budget", "metric", "rank reduction", "bytes kept", "mean cosine", "least cosine"]
    report.table("Closeness of embeddings on held-out sentences.", columns, cells)


def write(data: dict[str, Any], path: Path) -> Path:
    """Write the page."""
    return write_page(page(data), path)


if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results/compression.json")
    write(json.loads(source.read_text()), source.with_suffix(".html"))
