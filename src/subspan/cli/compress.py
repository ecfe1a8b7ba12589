"""`subspan compress`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

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
from subspan.edit import Edit
from subspan.hosts import folders, jobs
from subspan.hosts import stream as streaming
from subspan.inspect import compression_report, measured_errors, write_page
from subspan.plan import Plan
from subspan.walk import Blockwise

HELP_STREAM = (
    "Never hold the whole model: block by block from safetensors files. What is finished lies in OUT.partial, and "
    "the same command goes on from there. Share the work with torchrun --nproc-per-node N -m subspan compress ..."
)
HELP_DTYPE = "The precision the model is loaded in: by default float32, with --stream that of its files."
HELP_REPORT = "Write a page there: ranks, and predicted errors against those on the calibration text."
EXAMPLE = "subspan compress smollm2 --method svd_llm --err 0.3 --calibrate @prose -o out"
Blocks = Annotated[
    bool, typer.Option("--blockwise", help="Calibrate every block through the ones already compressed.")
]


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
    blockwise: Blocks = False,
    stream: Annotated[bool, typer.Option("--stream", help=HELP_STREAM)] = False,
    report: Annotated[Path | None, typer.Option("--report", metavar="FILE", help=HELP_REPORT)] = None,
    force: Force = False,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Annotated[DType | None, typer.Option("--dtype", help=HELP_DTYPE)] = None,
    debug: Debug = False,
) -> Result:
    """Replace layers by low-rank ones, by a plan or by a method, and save the model.

    OUT is a model folder like any other: give it to `subspan eval`, `finetune` or `inspect`.
    """
    sizes = {"ratio": ratio, "err": err, "energy": energy, "bytes": bytes}
    require_one_way(sizes, plan=plan, method=method, metric=metric, select=select)
    if stream and report is not None:
        raise typer.BadParameter("--report needs the whole model in memory; leave it out, or leave out --stream")
    # A stream looks for itself: what is there may be its own work, finished or not.
    jobs.vacant(out, force=force or stream, reads=[model, *([plan] if plan else []), *(calibrate or [])])
    given = None if plan is None else jobs.read_plan(plan)
    name = given.method if given else str(method)
    args = given.args if given else jobs.encode(jobs.target_of(**sizes), metric)
    made = jobs.decode(name, args)
    jobs.require_data(name, made, calibrate)
    note_unused(name, calibrate, needed=made.needs_data)
    track = bar("decomposing")
    if stream:
        lean = streaming.opened(model, dtype=None if dtype is None else getattr(torch, dtype))
        batches = jobs.calibration(lean, made, calibrate, limit=tokens, window=window, device=jobs.place(device))
        given = streaming.compress(
            lean, out, method=name, args=args, plan=given, select=select, batches=batches, sequential=blockwise,
            device=jobs.place(device), track=track, force=force,
        )  # fmt: skip
        return written(out, given)
    loaded = jobs.opened(model, dtype=dtype or DType.float32, device=device, seed=seed, merged=True)
    batches = jobs.calibration(loaded, made, calibrate, limit=tokens, window=window)
    walk: Walk = Blockwise() if blockwise else OneShot()
    if given:
        given, done = jobs.follow_plan(loaded.model, given, batches=batches, track=track, walk=walk)
    else:
        given, done = jobs.do_method(
            loaded.model, name, args, select=select, batches=batches, track=track, walk=walk
        )
    if report is not None:
        write_page(compression_report(given, on_calibration(done, batches), model=str(model), seed=seed), report)
    folders.save_model(out, loaded, {"method": given.method, "plan": given.to_dict()}, force=force)
    return written(out, given)


def written(out: Path, plan: Plan) -> Result:
    """What there is to say of a folder that is finished; only the first process of several says it."""
    if os.environ.get("RANK", "0") != "0":
        raise typer.Exit
    files = sorted(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    what = files[0].name if len(files) == 1 else f"{len(files)} safetensors files"
    done = f"wrote {out}: {what} {'has' if len(files) == 1 else 'have'} {mebibytes(size)}"
    return Result(
        {"out": str(out), "file_bytes": size, "plan": plan.to_dict()}, (plan.table(LIMIT), *plan.remarks(), done)
    )


def on_calibration(done: Edit, batches: Tensor | None) -> dict[str, float]:
    """The errors of the new layers on the calibration text, if there is any, by site."""
    if batches is None:
        return {}
    return measured_errors(done.model, done.swaps, list(batches), forward=jobs.forward)


def require_one_way(
    sizes: Mapping[str, object], *, plan: object, method: object, metric: object, select: object
) -> None:
    """Raise typer.BadParameter unless there is a plan, which settles the rest, or a method and a size."""
    if one_of(plan=plan, method=method) == "method":
        one_of(**sizes)
        return
    given = {**sizes, "metric": metric, "select": select}
    names = [f"--{name}" for name, value in given.items() if value is not None]
    if names:
        raise typer.BadParameter(f"--plan already settles {', '.join(names)}; leave out one or the other")
