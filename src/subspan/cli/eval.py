"""`subspan eval`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from subspan.cli.common import (
    HELP_FILES,
    Debug,
    Device,
    DType,
    Json,
    Model,
    Precision,
    Result,
    Seed,
    Window,
    facts,
)
from subspan.hosts import jobs

EXAMPLE = "subspan eval smollm2 --text @prose --windows 4 --speed"


def run(
    model: Model,
    text: Annotated[list[str], typer.Option("--text", metavar="FILE", help=f"What to score. {HELP_FILES}")],
    window: Window = None,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="Only this many, from the start.")
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Also time greedy decoding.")] = False,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Precision = DType.float32,
    debug: Debug = False,
) -> Result:
    """Score a model on text: perplexity, and its speed if asked.

    The text is cut into windows; the first token of each is given, all others are predicted.
    """
    loaded = jobs.opened(model, dtype=dtype, device=device, seed=seed)
    score = jobs.evaluate(loaded, text, window=window, count=windows, speed=speed)
    rows = {
        "perplexity": f"{score.perplexity:.4f}",
        "nats per token": f"{score.nll:.4f}",
        "tokens scored": f"{score.tokens:,} in {score.windows} windows of {score.window}",
        "seconds": f"{score.seconds:.1f}",
    }
    if score.decode_tokens_per_second is not None:
        rows["decoding"] = f"{score.decode_tokens_per_second:.1f} tokens per second"
    return Result({"model": model, "text": text, **asdict(score)}, (facts(model, rows),))
