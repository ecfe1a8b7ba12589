"""`subspan train`."""

from __future__ import annotations

from typing import Annotated

import typer

from subspan.cli.common import (
    Batch,
    Data,
    Debug,
    Device,
    DType,
    Every,
    Force,
    Json,
    Length,
    Out,
    Precision,
    Rank,
    Rate,
    Result,
    Seed,
    Steps,
    note,
    outcome,
)
from subspan.hosts import folders, jobs, lessons, text

EXAMPLE = "subspan train --optimizer fira --steps 200 -o runs/tiny"


def run(
    out: Out,
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="An optimizer that `subspan methods` lists.")
    ] = "fira",
    data: Data = ["@prose"],  # noqa: B006
    rank: Rank = None,
    every: Every = None,
    lr: Rate = None,
    steps: Steps = 200,
    batch: Batch = 8,
    window: Length = 128,
    vocab: Annotated[int, typer.Option("--vocab", min=256, help="Tokens the tokenizer knows.")] = 2048,
    hidden: Annotated[int, typer.Option("--hidden", min=2, help="The model's width.")] = 192,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Its blocks.")] = 4,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Attention heads of a block.")] = 4,
    force: Force = False,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Precision = DType.float32,
    debug: Debug = False,
) -> Result:
    """Train a small language model from scratch with any optimizer of the list.

    The model is LLaMA-shaped, the last tenth of the text is held out for validation, and OUT is a model folder
    with its tokenizer and, in train.json, every loss.
    """
    jobs.vacant(out, force=force, reads=data)
    count = None if rank is None else lessons.parse_rank(rank)
    made, args = lessons.rule(optimizer, steps=steps, rank=count, every=every)
    content = text.read(data)
    note(f"training on {len(content):,} characters")
    loaded = lessons.newborn(
        content, vocab=vocab, hidden=hidden, layers=layers, heads=heads, window=window,
        dtype=dtype, device=device, seed=seed,
    )  # fmt: skip
    found = lessons.split(jobs.tokens(loaded.tokenizer, content), window)
    learns = lessons.Learning(list(loaded.model.named_parameters()), made, args, "optimizer")
    rate = lessons.default_lr(optimizer, scratch=True) if lr is None else lr
    history = lessons.fit(
        loaded.model, learns, found, steps=steps, batch=batch, lr=rate, seed=seed, label=optimizer
    )
    about = {"method": optimizer, "args": args, "lr": rate, "seed": seed, "data": data}
    folders.save_model(out, loaded, about, notes=lessons.diary(history, about), force=force)
    result = lessons.summary(history, learns)
    return Result(
        {"out": str(out), **about, **result}, (outcome(f"{optimizer}, {steps} steps", result), f"wrote {out}")
    )
