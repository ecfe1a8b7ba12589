"""`subspan demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from subspan import demo
from subspan.cli.common import Debug, Device, DType, Force, Json, Out, Precision, Result, Seed
from subspan.hosts import jobs

EXAMPLE = "subspan demo --quick -o runs/demo"


def run(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and smaller models.")] = False,
    out: Out = Path("runs/demo"),
    force: Force = False,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Precision = DType.float32,
    debug: Debug = False,
) -> Result:
    """Train, compress, heal and compare small models; writes one html report."""
    jobs.vacant(out, force=force)
    page = demo.run(
        out, quick=quick, seed=seed, device=str(jobs.place(device)), dtype=getattr(torch, dtype), force=force
    )
    return Result({"report": str(page)}, (f"report: {page}",))
