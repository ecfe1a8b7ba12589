"""`subspan compress`."""

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
from subspan.hosts import folders, jobs
from subspan.io import WEIGHTS

EXAMPLE = "subspan compress smollm2 --method welore --err 0.3 -o runs/small"


def run(
    model: Model,
    out: Out,
    plan: Annotated[Path | None, typer.Option("--plan", help="Do what this file of `subspan plan` says.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Or plan with this method, and do it.")] = None,
    ratio: Ratio = None,
    err: Err = None,
    energy: Energy = None,
    metric: Metric = None,
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
    """Replace layers by low-rank ones, by a plan or by a method, and save the model.

    OUT is a model folder like any other: give it to `subspan eval`, `finetune` or `inspect`.
    """
    sizes = {"ratio": ratio, "err": err, "energy": energy}
    if one_of(plan=plan, method=method) == "plan":
        refuse_with_plan(**sizes, metric=metric, select=select)
    jobs.vacant(out, force=force, reads=[model, *([plan] if plan else []), *(calibrate or [])])
    if plan is not None:
        given = jobs.read_plan(plan)
        method, args = given.method, given.args
    else:
        target = one_of(**sizes)
        given, args = None, jobs.encode(jobs.TARGETS[target](sizes[target]), metric)
    made = jobs.decode(str(method), args)
    jobs.require_data(str(method), made, calibrate)
    note_unused(str(method), calibrate, needed=made.measure.needs_data)
    loaded = jobs.opened(model, dtype=dtype, device=device, merged=True)
    batches = jobs.calibration(loaded, made, calibrate, limit=tokens, window=window)
    if given is not None:
        jobs.follow_plan(loaded.model, given, batches=batches, track=bar("decomposing"))
    else:
        given, study = jobs.make_plan(
            loaded.model, str(method), args, select=select, batches=batches, track=bar("decomposing")
        )
        study.apply(loaded.model, given)
    folders.save_model(out, loaded, {"method": given.method, "plan": given.to_dict()}, force=force)
    size = (out / WEIGHTS).stat().st_size
    done = f"wrote {out}: {WEIGHTS} has {mebibytes(size)}"
    return Result({"out": str(out), "file_bytes": size, "plan": given.to_dict()}, (given.table(LIMIT), done))


def refuse_with_plan(**given: object) -> None:
    """A plan already says all this."""
    names = [f"--{name}" for name, value in given.items() if value is not None]
    if names:
        raise typer.BadParameter(f"--plan already settles {', '.join(names)}; leave out one or the other")
