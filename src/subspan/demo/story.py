"""The demo from beginning to end."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from subspan import io
from subspan.demo import settings as sizes
from subspan.demo.act import Act, mib
from subspan.demo.compress import act_compress
from subspan.demo.heal import act_heal
from subspan.demo.train import act_train
from subspan.hosts.folders import open_model
from subspan.hosts.meter import Meter, release
from subspan.inspect import Report


def run(
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> Path:
    """Run the three acts, print a table after each, and write report.html and report.json into `out`.

    The first act trains in float32 whatever the `dtype`, which is that of the language model.

    Returns the path of report.html. Raises FileExistsError for a non-empty `out` unless `force`.
    """
    settings = (sizes.quick if quick else sizes.full)(seed, device=device, dtype=dtype)
    console = Console()
    torch.manual_seed(seed)
    subtitle = "the quick version: sizes too small to conclude anything" if quick else ""
    report = Report("subspan: the low-rank life of a model", subtitle, seed=seed)
    with io.staged(out, force=force) as folder:
        with Meter() as meter:
            show(act_train(settings), "train", 1, console, report)
            release()
            loaded = open_model("smollm2", dtype=dtype, device=device, progress=True)
            compressed = act_compress(loaded, settings)
            show(compressed.act, "compress", 2, console, report)
            show(act_heal(loaded, compressed, settings), "heal", 3, console, report)
        report.data["demo"] = {"quick": quick, "seconds": meter.seconds, "peak_rss": meter.peak}
        report.write(folder)
    console.print(f"\n{meter.seconds:.0f} s, peak memory {mib(meter.peak)}")
    return Path(out) / "report.html"


def show(act: Act, key: str, number: int, console: Console, report: Report) -> None:
    """Print an act and add it to the report."""
    console.rule(f"Act {number}: {act.title}")
    act.show(console)
    act.report(report, key)
