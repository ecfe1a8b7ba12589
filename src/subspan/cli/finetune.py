"""`subspan finetune`."""

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
    Model,
    Out,
    Precision,
    Rank,
    Rate,
    Result,
    Seed,
    Select,
    Steps,
    Window,
    note,
    outcome,
)
from subspan.hosts import folders, jobs, lessons, text
from subspan.methods import find

EXAMPLE = "subspan finetune smollm2 --method lora --data @code --steps 20 -o runs/lora"

Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="MODEL",
        help="The dense model that pela learns from; by default the one that MODEL was compressed from.",
    ),
]


def run(
    model: Model,
    out: Out,
    data: Data,
    method: Annotated[str, typer.Option("--method", help="An adapter, healing method or optimizer of the list.")],
    select: Select = None,
    rank: Rank = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="An adapter's scale is alpha / rank.")] = None,
    every: Every = None,
    teacher: Teacher = None,
    lr: Rate = None,
    steps: Steps = 100,
    batch: Batch = 4,
    window: Window = None,
    force: Force = False,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Precision = DType.float32,
    debug: Debug = False,
) -> Result:
    """Train an adapter, the low-rank parts, or all weights of a model on your text.

    An adapter is saved alone and names its base; the other kinds save the whole model.
    """
    find(method)
    master = lessons.teacher_for(method, model, teacher)
    jobs.vacant(out, force=force, reads=[model, *data, *([] if master is None else [master])])
    count = None if rank is None else lessons.parse_rank(rank)
    loaded = jobs.opened(model, dtype=dtype, device=device, seed=seed)
    length = jobs.window_for(loaded.model, window, usual=128)
    content = text.read(data)
    note(f"training on {len(content):,} characters")
    found = lessons.split(jobs.tokens(loaded.tokenizer, content), length)
    above = None if master is None else jobs.opened(master, dtype=dtype, device=device, merged=True).model
    look = lessons.glance(found, batch, seed=seed, device=jobs.device_of(loaded.model))
    learns = lessons.learning(
        loaded.model, method, steps=steps, select=select, rank=count, alpha=alpha, every=every, teacher=above,
        look=look,
    )  # fmt: skip
    rate = lessons.default_lr(method, scratch=False) if lr is None else lr
    history = lessons.fit(loaded.model, learns, found, steps=steps, batch=batch, lr=rate, seed=seed, label=method)
    about = {"method": method, "args": learns.args, "lr": rate, "seed": seed, "data": data}
    about |= {} if master is None else {"teacher": master}
    notes = lessons.diary(history, about)
    if learns.kind == "adapter":
        folders.save_adapter(
            out, loaded.model, method=method, args=learns.args, source=loaded.source,
            about=about, notes=notes, force=force,
        )  # fmt: skip
    else:
        folders.save_model(out, loaded, about, notes=notes, force=force)
    result = lessons.summary(history, learns)
    return Result(
        {"out": str(out), **about, **result}, (outcome(f"{method}, {steps} steps", result), f"wrote {out}")
    )
