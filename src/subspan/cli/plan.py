"""`subspan plan`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import nn

from subspan.cli.common import (
    HELP_FILES,
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
from subspan.compress import Calibration
from subspan.hosts import jobs, lessons, text, transformers
from subspan.hosts.foretold import foretold
from subspan.hosts.transformers import LoadedModel
from subspan.io import ABOUT
from subspan.methods import methods
from subspan.optim import hidden_matrices, ledger

EXAMPLE = "subspan plan smollm2 --method svd_llm --err 0.3 --calibrate @prose -o p.json"
COMPRESSION = (
    "ratio", "err", "energy", "bytes", "metric", "out", "select", "calibrate", "tokens", "window", "force",
)  # fmt: skip
TRAINING = ("rank", "every", "where", "shards", "data")
ADAPTER = ("select", "window", "tokens", "rank", "data")
Where = Annotated[
    str | None,
    typer.Option(
        "--where", metavar="PATTERN", help="Parameters it steps; by default the matrices between hidden layers."
    ),
]


def run(
    ctx: typer.Context,
    model: Model,
    method: Annotated[
        str | None, typer.Option("--method", help="A compression or adapter that `subspan methods` lists.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="Or an optimizer of the list: what will its training hold?")
    ] = None,
    rank: Rank = None,
    every: Every = None,
    where: Where = None,
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
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE", help=f"What an adapter will learn from. {HELP_FILES}"),
    ] = None,
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

    For a compression the plan is a table to print, to edit as a file and to give to `subspan compress --plan`. For
    an adapter it is the rank of each layer and what will train. With --optimizer it is the bytes that training
    will hold, beside AdamW's, and where a subspace does not pay.
    """
    if one_of(method=method, optimizer=optimizer) == "optimizer":
        refuse(ctx, (*COMPRESSION, "data"), "is for a compression's --method; leave it out with --optimizer")
        return training(
            model, str(optimizer), rank=rank, every=every, where=where, shards=shards, dtype=dtype, seed=seed
        )
    method = str(method)
    if method in methods("adapter"):
        refuse(ctx, {*COMPRESSION, *TRAINING} - {*ADAPTER}, "is not for adapters; leave it out")
        loaded = jobs.opened(model, dtype=dtype, device=device, seed=seed)
        return adapter(loaded, method, rank=rank, select=select, data=data, window=window, tokens=tokens)
    refuse(ctx, TRAINING, "is for --optimizer and for adapters; leave it out with --method of a compression")
    sizes = {"ratio": ratio, "err": err, "energy": energy, "bytes": bytes}
    one_of(**sizes)
    return compression(
        model, method, jobs.encode(jobs.target_of(**sizes), metric), out=out, select=select, calibrate=calibrate,
        tokens=tokens, window=window, force=force, seed=seed, device=device, dtype=dtype,
    )  # fmt: skip


def compression(
    model: str,
    method: str,
    args: jobs.Json,
    *,
    out: Path | None,
    select: str | None,
    calibrate: list[str] | None,
    tokens: int,
    window: int | None,
    force: bool,
    seed: int,
    device: str,
    dtype: DType,
) -> Result:
    """The ranks that `subspan compress --method METHOD` will choose, and what they cost."""
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


def adapter(
    loaded: LoadedModel,
    method: str,
    *,
    rank: str | None,
    select: str | None,
    data: list[str] | None,
    window: int | None,
    tokens: int,
) -> Result:
    """The ranks and trained numbers that `subspan finetune --method ADAPTER` will start with."""
    count = None if rank is None else lessons.parse_rank(rank)
    look = None
    if data is not None:
        length = jobs.window_for(loaded.model, window, usual=128)
        ids = jobs.tokens(loaded.tokenizer, text.read(data), max(tokens, length))
        batches = text.windows(ids, length).unsqueeze(1).to(jobs.device_of(loaded.model))
        look = Calibration(batches, jobs.forward, jobs.loss)
    found, args = foretold(loaded.model, method, select=select, rank=count, look=look)
    table = Table("layer", "out x in", "rank", "explains", "trained numbers")
    for name, row in list(found.items())[:LIMIT]:
        share = "-" if row.explains is None else f"{row.explains:.3f}"
        table.add_row(name, f"{row.shape[0]}x{row.shape[1]}", str(row.rank), share, f"{row.numbers:,}")
    total = sum(row.numbers for row in found.values())
    notes = [f"{len(found) - LIMIT} more layers; --json lists all"] if len(found) > LIMIT else []
    said = {"method": method, "args": args, "numbers": total, "sites": {n: r._asdict() for n, r in found.items()}}
    return Result(said, (table, *notes, f"{total:,} numbers train, in {len(found)} layers"))


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


def refuse(ctx: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise typer.BadParameter for options that belong to another part of this verb."""
    sources = {name: ctx.get_parameter_source(name) for name in sorted(names)}
    given = [f"--{name}" for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if given:
        raise typer.BadParameter(f"{', '.join(given)} {why}")
