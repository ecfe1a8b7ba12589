"""`subspan plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subspan.cli.common import (
    LIMIT,
    Calibrate,
    Debug,
    Device,
    DType,
    Energy,
    Err,
    Force,
    Json,
    Metric,
    Model,
    Precision,
    Ratio,
    Result,
    Seed,
    Select,
    Tokens,
    Window,
    bar,
    note,
    note_unused,
    one_of,
)
from subspan.hosts import jobs

EXAMPLE = "subspan plan smollm2 --method svd_llm --err 0.3 --calibrate @prose -o p.json"


def run(
    model: Model,
    method: Annotated[str, typer.Option("--method", help="A compression that `subspan methods` lists.")],
    ratio: Ratio = None,
    err: Err = None,
    energy: Energy = None,
    metric: Metric = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="PLAN.JSON", help="Write the plan to this file.")
    ] = None,
    select: Select = None,
    calibrate: Calibrate = None,
    tokens: Tokens = 8192,
    window: Window = None,
    force: Force = False,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Precision = DType.float32,
    debug: Debug = False,
) -> Result:
    """Choose a rank for every layer, before anything is changed.

    The plan is a table that you can print, edit as a file and give to `subspan compress --plan`.
    """
    one_of(ratio=ratio, err=err, energy=energy)
    args = jobs.encode(jobs.target_of(ratio=ratio, err=err, energy=energy), metric)
    made = jobs.decode(method, args)
    jobs.require_data(method, made, calibrate)
    note_unused(method, calibrate, needed=made.measure.needs_data)
    if out is not None:
        jobs.vacant(out, force=force, reads=[model])
    loaded = jobs.opened(model, dtype=dtype, device=device, seed=seed, merged=True)
    batches = jobs.calibration(loaded, made, calibrate, limit=tokens, window=window)
    plan, _ = jobs.make_plan(loaded.model, method, args, select=select, batches=batches, track=bar("decomposing"))
    if out is not None:
        note(f"wrote {jobs.write_plan(plan, out)}")
    return Result(plan.to_dict(), (plan.table(LIMIT),))
