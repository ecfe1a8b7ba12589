"""`subspan inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subspan import io
from subspan.cli.common import (
    LIMIT,
    Debug,
    Device,
    DType,
    Force,
    Json,
    Model,
    Precision,
    Result,
    Seed,
    Select,
    bar,
)
from subspan.hosts import jobs
from subspan.inspect import Report, Survey, rank_heatmap, spectra_figure, survey

EXAMPLE = "subspan inspect smollm2 --err 0.3 -o runs/inspect"
COLUMNS = ("site", "shape", "stable rank", "effective rank", "tail index", "90 % rank", "rank", "class")


def run(
    model: Model,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Write report.html and report.json there.")
    ] = None,
    err: Annotated[float, typer.Option("--err", help="The rank reduction at which layers are classed.")] = 0.5,
    every: Annotated[bool, typer.Option("--all", help=f"Print every layer, not the first {LIMIT}.")] = False,
    select: Select = None,
    force: Force = False,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Precision = DType.float32,
    debug: Debug = False,
) -> Result:
    """Show what a model's weights look like: spectra, effective ranks, what is low-rank."""
    if out is not None:
        jobs.vacant(out, force=force, reads=[model])
    loaded = jobs.opened(model, dtype=dtype, device=device, seed=seed, merged=True)
    found = survey(loaded.model, select=select, err=err, track=bar("singular values"))
    page = None if out is None else write(report(found, model, seed), out, force)
    data = {"model": model, **found.to_dict(), "report": None if page is None else str(page)}
    tables = (found.by_type(), found.table(None if every else LIMIT))
    return Result(data, tables if page is None else (*tables, f"report: {page}"))


def report(found: Survey, model: str, seed: int) -> Report:
    """The survey as a page."""
    page = Report("Spectra and ranks", model, seed=seed, data={"model": model, **found.to_dict()})
    page.section("By type of matrix", f"Ranks and classes are WeLore's at a rank reduction of {found.err:.0%}.")
    page.figure("Singular values of every matrix.", spectra_figure(found.spectra))
    ranks = {name: row.rank for name, row in found.rows.items()}
    page.figure("Rank kept in every matrix.", rank_heatmap(ranks, {n: row.shape for n, row in found.rows.items()}))
    page.section("By layer")
    rows = [
        (
            name,
            "{} x {}".format(*r.shape),
            r.stable_rank,
            r.effective_rank,
            r.tail_index,
            r.energy_rank,
            r.rank,
            r.kind,
        )
        for name, r in found.rows.items()
    ]
    page.table("Every matrix.", COLUMNS, rows)
    return page


def write(page: Report, out: Path, force: bool) -> Path:
    """Both files or none."""
    with io.staged(out, force=force) as folder:
        name = page.write(folder).name
    return out / name
