"""`subspan inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subspan import io
from subspan.cli.common import (
    HELP_MODEL,
    LIMIT,
    Debug,
    Device,
    DType,
    Force,
    Json,
    Precision,
    Result,
    Seed,
    Select,
    bar,
)
from subspan.hosts import jobs
from subspan.inspect import Report, Survey, rank_heatmap, spectra_figure, survey
from subspan.inspect.compare import Comparison, compare

EXAMPLE = "subspan inspect smollm2 --err 0.3 -o runs/inspect"
COLUMNS = ("site", "shape", "stable rank", "effective rank", "tail index", "90 % rank", "rank", "class")
CHANGES = ("site", "shape", "change", "spectra", "left", "right", "intruders", "effective ranks", "rank")

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL...", help=f"{HELP_MODEL} Two of them with --compare.", show_default=False),
]


def run(
    models: Models,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Write report.html and report.json there.")
    ] = None,
    compared: Annotated[
        bool, typer.Option("--compare", help="Show what differs between two models: MODEL before, MODEL after.")
    ] = False,
    top: Annotated[
        int | None, typer.Option("--top", min=1, help="Leading directions to compare; 16 by default.")
    ] = None,
    err: Annotated[
        float | None, typer.Option("--err", help="The rank reduction at which layers are classed; 0.5 by default.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help=f"Print every layer, not the first {LIMIT}.")] = False,
    select: Select = None,
    force: Force = False,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Precision = DType.float32,
    debug: Debug = False,
) -> Result:
    """Show what a model's weights look like: spectra, effective ranks, what is low-rank; or how two differ."""
    require_count(models, compared)
    refuse_unused(compared, err=err, top=top)
    if out is not None:
        jobs.vacant(out, force=force, reads=models)
    loaded = [jobs.opened(m, dtype=dtype, device=device, seed=seed, merged=True).model for m in models]
    found: Survey | Comparison
    if compared:
        found = compare(*loaded, select=select, top=16 if top is None else top, track=bar("comparing"))
        require_common(found)
        data = {"models": models, **found.data()}
    else:
        half = 0.5 if err is None else err
        found = survey(loaded[0], select=select, err=half, track=bar("singular values"))
        data = {"model": models[0], **found.to_dict()}
    where = None if out is None else write(page_of(found, models, seed), out, force)
    data["report"] = None if where is None else str(where)
    tables = (found.by_type(), found.table(None if every else LIMIT))
    return Result(data, tables if where is None else (*tables, f"report: {where}"))


def page_of(found: Survey | Comparison, models: list[str], seed: int) -> Report:
    """The page of either half of this verb."""
    return report(found, models[0], seed) if isinstance(found, Survey) else changes(found, models, seed)


def require_count(models: list[str], compared: bool) -> None:
    """Raise typer.BadParameter unless there are two models to compare, or one to look at."""
    if compared and len(models) != 2:
        raise typer.BadParameter(
            f"--compare takes two models, before and after; got {len(models)}: {', '.join(models)}"
        )
    if not compared and len(models) != 1:
        raise typer.BadParameter(f"inspect takes one model, got {', '.join(models)}; add --compare to compare two")


def refuse_unused(compared: bool, **given: float | None) -> None:
    """Raise typer.BadParameter for an option of the other half of this verb."""
    name = "err" if compared else "top"
    if given[name] is not None:
        raise typer.BadParameter(f"--{name} is not used with{'' if compared else 'out'} --compare; leave it out")


def require_common(found: Comparison) -> None:
    """Raise ValueError when nothing could be compared, saying why for a few layers."""
    if not found.rows:
        both_first = sorted(found.skipped.items(), key=lambda item: item[1].startswith("only"))
        some = "; ".join(f"{name}, {why}" for name, why in both_first[:3])
        raise ValueError(
            f"the two models have no layer of one name and shape in common, so nothing can be compared: {some}; "
            "compare a model with a descendant of it"
        )


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


def changes(found: Comparison, models: list[str], seed: int) -> Report:
    """The comparison as a page."""
    before, after = models
    data = {"models": models, **found.data()}
    page = Report("Two models compared", f"{before}, then {after}", seed=seed, data=data)
    page.section(
        "By block",
        "Change is |b - a| / |a| of a weight a before and b after; overlap is that of the "
        f"{found.top} leading singular directions, 1 where they span the same space.",
    )
    page.figure("Change and overlap by block and type of matrix.", found.figure())
    page.section("By layer", "Intruders are leading left directions of b that a has nothing like.")
    rows = [
        (
            name,
            "{} x {}".format(*r.shape),
            f"{r.change:.2%}",
            f"{r.spectra:.2%}",
            r.left,
            r.right,
            r.intruders,
            f"{r.effective_a:.1f} > {r.effective_b:.1f}",
            f"{r.rank_b}/{r.full}",
        )
        for name, r in found.rows.items()
    ]
    page.table("Every matrix in both models.", CHANGES, rows)
    if found.skipped:
        page.table("Not compared.", ("site", "why"), list(found.skipped.items()))
    return page


def write(page: Report, out: Path, force: bool) -> Path:
    """Both files or none."""
    with io.staged(out, force=force) as folder:
        name = page.write(folder).name
    return out / name
