"""`subspan compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subspan.cli.common import (
    LIMIT,
    Bytes,
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
    Out,
    Precision,
    Ratio,
    Result,
    Seed,
    Select,
    Tokens,
    Window,
    bar,
    mebibytes,
    note_unused,
    one_of,
)
from subspan.compress import OneShot, Walk
from subspan.hosts import folders, jobs
from subspan.io import WEIGHTS
from subspan.walk import Blockwise

EXAMPLE = "subspan compress smollm2 --method svd_llm --err 0.3 --calibrate @prose -o out"


def run(
    model: Model,
    out: Out,
    plan: Annotated[Path | None, typer.Option("--plan", help="Do what this file of `subspan plan` says.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Or plan with this method, and do it.")] = None,
    ratio: Ratio = None,
    err: Err = None,
    energy: Energy = None,
    bytes: Bytes = None,
    metric: Metric = None,
    select: Select = None,
    calibrate: Calibrate = None,
    tokens: Tokens = 8192,
    window: Window = None,
    blockwise: Annotated[
        bool, typer.Option("--blockwise", help="Calibrate every block through the ones already compressed.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Precision = DType.float32,
    debug: Debug = False,
) -> Result:
    """Replace layers by low-rank ones, by a plan or by a method, and save the model.

    OUT is a model folder like any other: give it to `subspan eval`, `finetune` or `inspect`.
    """
    sizes = {"ratio": ratio, "err": err, "energy": energy, "bytes": bytes}
    if one_of(plan=plan, method=method) == "plan":
        refuse_with_plan(**sizes, metric=metric, select=select)
    else:
        one_of(**sizes)
    jobs.vacant(out, force=force, reads=[model, *([plan] if plan else []), *(calibrate or [])])
    given = None if plan is None else jobs.read_plan(plan)
    name = given.method if given else str(method)
    args = given.args if given else jobs.encode(jobs.target_of(**sizes), metric)
    made = jobs.decode(name, args)
    jobs.require_data(name, made, calibrate)
    note_unused(name, calibrate, needed=made.needs_data)
    loaded = jobs.opened(model, dtype=dtype, device=device, seed=seed, merged=True)
    batches = jobs.calibration(loaded, made, calibrate, limit=tokens, window=window)
    track = bar("decomposing")
    walk: Walk = Blockwise() if blockwise else OneShot()
    if given:
        given, _ = jobs.follow_plan(loaded.model, given, batches=batches, track=track, walk=walk)
    else:
        given, _ = jobs.do_method(loaded.model, name, args, select=select, batches=batches, track=track, walk=walk)
    folders.save_model(out, loaded, {"method": given.method, "plan": given.to_dict()}, force=force)
    size = (out / WEIGHTS).stat().st_size
    done = f"wrote {out}: {WEIGHTS} has {mebibytes(size)}"
    return Result({"out": str(out), "file_bytes": size, "plan": given.to_dict()}, (given.table(LIMIT), done))


def refuse_with_plan(**given: object) -> None:
    """A plan already says all this."""
    names = [f"--{name}" for name, value in given.items() if value is not None]
    if names:
        raise typer.BadParameter(f"--plan already settles {', '.join(names)}; leave out one or the other")
