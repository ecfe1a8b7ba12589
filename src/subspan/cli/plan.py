"""`subspan plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from subspan.cli.common import (
    LIMIT,
    Bytes,
    Calibrate,
    Debug,
    Device,
    DType,
    Energy,
    Err,
    Every,
    Force,
    Json,
    Metric,
    Model,
    Precision,
    Rank,
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
from subspan.hosts import jobs, lessons, transformers
from subspan.io import ABOUT
from subspan.optim import hidden_matrices, ledger

EXAMPLE = "subspan plan smollm2 --method svd_llm --err 0.3 --calibrate @prose -o p.json"
COMPRESSION = (
    "ratio", "err", "energy", "bytes", "metric", "out", "select", "calibrate", "tokens", "window", "force",
)  # fmt: skip
TRAINING = ("rank", "every", "where", "shards")


def run(
    ctx: typer.Context,
    model: Model,
    method: Annotated[
        str | None, typer.Option("--method", help="A compression that `subspan methods` lists.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="Or an optimizer of the list: what will its training hold?")
    ] = None,
    rank: Rank = None,
    every: Every = None,
    where: Annotated[
        str | None,
        typer.Option(
            "--where",
            metavar="PATTERN",
            help="Parameters it steps; by default the matrices between hidden layers.",
        ),
    ] = None,
    shards: Annotated[int, typer.Option("--shards", min=1, help="Devices that share the rows, as in FSDP2.")] = 1,
    ratio: Ratio = None,
    err: Err = None,
    energy: Energy = None,
    bytes: Bytes = None,
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
    """Choose ranks, or see what an optimizer will hold, before anything is changed.

    With --method the plan is a table to print, to edit as a file and to give to `subspan compress --plan`. With
    --optimizer it is the bytes that training will hold, beside AdamW's, and where a subspace does not pay.
    """
    if one_of(method=method, optimizer=optimizer) == "optimizer":
        refuse(ctx, COMPRESSION, "is for a compression's --method; leave it out with --optimizer")
        return training(
            model, str(optimizer), rank=rank, every=every, where=where, shards=shards, dtype=dtype, seed=seed
        )
    refuse(ctx, TRAINING, "is for --optimizer; leave it out with --method")
    method = str(method)
    sizes = {"ratio": ratio, "err": err, "energy": energy, "bytes": bytes}
    one_of(**sizes)
    args = jobs.encode(jobs.target_of(**sizes), metric)
    made = jobs.decode(method, args)
    jobs.require_data(method, made, calibrate)
    note_unused(method, calibrate, needed=made.needs_data)
    if out is not None:
        jobs.vacant(out, force=force, reads=[model])
    loaded = jobs.opened(model, dtype=dtype, device=device, seed=seed, merged=True)
    batches = jobs.calibration(loaded, made, calibrate, limit=tokens, window=window)
    plan, _ = jobs.make_plan(loaded.model, method, args, select=select, batches=batches, track=bar("decomposing"))
    if out is not None:
        note(f"wrote {jobs.write_plan(plan, out)}")
    return Result(plan.to_dict(), (plan.table(LIMIT), *plan.remarks()))


def training(
    model: str,
    optimizer: str,
    *,
    rank: str | None,
    every: int | None,
    where: str | None,
    shards: int,
    dtype: DType,
    seed: int,
) -> Result:
    """The bytes that `subspan finetune --method OPTIMIZER` will hold."""
    count = None if rank is None else lessons.parse_rank(rank)
    rule, args = lessons.rule(optimizer, steps=2000, rank=count, every=every)  # steps choose only when to refresh
    named = outline(model, dtype=dtype, seed=seed).named_parameters()
    found = ledger(named, rule, where=where or hidden_matrices, shards=shards)
    about = {"optimizer": optimizer, "args": args, "dtype": dtype.value}
    return Result(about | found.to_dict(), (found.table(optimizer), *found.remarks()))


def outline(model: str, *, dtype: DType, seed: int) -> nn.Module:
    """The model, without its weights where a transformers folder tells their shapes."""
    if model == "smollm2" or (Path(model) / ABOUT).is_file():
        return jobs.opened(model, dtype=dtype, device="cpu", seed=seed, merged=True).model
    with torch.device("meta"):
        return transformers.skeleton(model, dtype=getattr(torch, dtype))


def refuse(ctx: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Raise typer.BadParameter for options that belong to the other half of this verb."""
    sources = {name: ctx.get_parameter_source(name) for name in names}
    given = [f"--{name}" for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if given:
        raise typer.BadParameter(f"{', '.join(given)} {why}")
