"""`subspan export`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from subspan.cli.common import Debug, Device, DType, Force, Json, Model, Out, Result
from subspan.hosts import jobs
from subspan.hosts.export import export_dense, export_peft

EXAMPLE = "subspan export out --to dense -o dense"


class Target(StrEnum):
    """What an export can be."""

    dense = "dense"
    peft = "peft"


To = Annotated[
    Target,
    typer.Option(
        "--to", help="Ordinary weights; or OUT/base and OUT/adapter, a LoRA of PEFT.", show_default=False
    ),
]
Stored = Annotated[
    DType | None, typer.Option("--dtype", help="The precision of the export; by default the model's on disk.")
]


def run(
    model: Model,
    to: To,
    out: Out,
    force: Force = False,
    as_json: Json = False,
    device: Device = "cpu",
    dtype: Stored = None,
    debug: Debug = False,
) -> Result:
    """Write a compressed model for software that does not know subspan.

    The export is read back, and is kept only if it gives the model's logits. An adapter on the model is merged.
    """
    jobs.vacant(out, force=force, reads=[model])
    kept = dtype or str(jobs.stored_dtype(model)).removeprefix("torch.")
    loaded = jobs.opened(model, dtype=kept, device=device, merged=True)
    export = export_dense if to is Target.dense else export_peft
    done = export(loaded, out, force=force)
    said = f"wrote {out}: its logits differ from the model's by {done.difference:.1e} of the largest"
    return Result(
        {"out": str(out), "to": str(to), "difference": done.difference, "tolerance": done.tolerance},
        (f"{said} ({done.tolerance:g} allowed)",),
    )
