"""`subspan finetune`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from subspan.cli.common import (
    Batch,
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
from subspan.hosts import folders, jobs, keep, lessons, samples, text
from subspan.hosts.transformers import LoadedModel
from subspan.inspect import Report, loss_curves, write_page
from subspan.methods import find
from subspan.optim import checkpoint

EXAMPLE = "subspan finetune smollm2 --method lora --data @code --steps 20 -o runs/lora"

Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="MODEL",
        help="The dense model that pela learns from; by default the one that MODEL was compressed from.",
    ),
]


HELP_DATA = (
    "What to learn from: UTF-8 text, @prose or @code; or .jsonl with a row for each sample, "
    '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}]}, of which '
    "completions and the assistant's turns are learnt. Give the option again for more files."
)
Learned = Annotated[list[str], typer.Option("--data", metavar="FILE", help=HELP_DATA)]
ValidateEvery = Annotated[int, typer.Option("--validate-every", min=1, help="Steps between validations.")]
Patience = Annotated[
    int | None, typer.Option("--patience", min=1, help="Stop after so many validations that are no better.")
]
Best = Annotated[
    bool, typer.Option("--best/--last", help="Save the state of the lowest validation loss, or the last one.")
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option("--checkpoint-every", min=1, help="Steps between checkpoints in OUT.partial, for --resume."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the checkpoint of the same command, if there is one.")
]
Page = Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write a page with the loss curves.")]
Alpha = Annotated[float | None, typer.Option("--alpha", help="An adapter's scale is alpha / rank.")]


def run(
    model: Model,
    out: Out,
    data: Learned,
    method: Annotated[str, typer.Option("--method", help="An adapter, healing method or optimizer of the list.")],
    select: Select = None,
    rank: Rank = None,
    alpha: Alpha = None,
    every: Every = None,
    teacher: Teacher = None,
    lr: Rate = None,
    steps: Steps = 100,
    batch: Batch = 4,
    window: Window = None,
    validate_every: ValidateEvery = 100,
    patience: Patience = None,
    best: Best = True,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    report: Page = None,
    force: Force = False,
    as_json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Precision = DType.float32,
    debug: Debug = False,
) -> Result:
    """Train an adapter, the low-rank parts, or all weights of a model on your text.

    The text may also be prompts with completions, or conversations, as rows of jsonl. The last tenth is held out,
    and what is saved is the best state by it. An adapter is saved alone and names its base; the other kinds save
    the whole model. In train.json lies every loss.
    """
    find(method)
    master = lessons.teacher_for(method, model, teacher)
    jobs.vacant(out, force=force, reads=[model, *data, *([] if master is None else [master])])
    partial = room(out, resume=resume, force=force) if resume or checkpoint_every else None
    count = None if rank is None else lessons.parse_rank(rank)
    loaded = jobs.opened(model, dtype=dtype, device=device, seed=seed)
    found = material(loaded, data, window)
    above = None if master is None else jobs.opened(master, dtype=dtype, device=device, merged=True).model
    look = lessons.glance(found, batch, seed=seed, device=jobs.device_of(loaded.model))
    learns = lessons.learning(
        loaded.model, method, steps=steps, select=select, rank=count, alpha=alpha, every=every, teacher=above,
        look=look,
    )  # fmt: skip
    rate = lessons.default_lr(method, scratch=False) if lr is None else lr
    about = {"method": method, "args": learns.args, "lr": rate, "seed": seed, "data": data}
    about |= {} if master is None else {"teacher": master}
    facts = {
        **about, "model": model, "select": select, "steps": steps, "batch": batch, "dtype": str(dtype.value),
        "validate_every": validate_every, "patience": patience, "best": best, "tokens": digest(found),
    }  # fmt: skip
    keeping = keep.Keeping(best, patience, partial, checkpoint_every, resume, facts)
    history = lessons.fit(
        loaded.model, learns, found, steps=steps, batch=batch, lr=rate, seed=seed, label=method,
        every=validate_every, keeping=keeping,
    )  # fmt: skip
    save(out, loaded, learns, about, notes=lessons.diary(history, about), force=force)
    if partial is not None:
        keep.clear(partial)
    if report is not None:
        write_page(page(history, method, seed), report)
    return told(out, title(method, steps, history), about, lessons.summary(history, learns))


def told(out: Path, what: str, about: dict[str, Any], result: dict[str, Any]) -> Result:
    """What a run came to, for people and for programs."""
    return Result({"out": str(out), **about, **result}, (outcome(what, result), f"wrote {out}"))


def title(method: str, steps: int, history: keep.History) -> str:
    """What was run, and what was kept where that is not the last state.

    >>> title("lora", 9, keep.History(train=[(8, 1.0)], best=(4, 0.5)))
    'lora, stopped after 8 of 9 steps, the best after step 4 kept'
    """
    made = history.train[-1][0]
    told = f"{method}, {steps} steps" if made == steps else f"{method}, stopped after {made} of {steps} steps"
    if history.best is None or history.best[0] == made:
        return told
    return f"{told}, the best after step {history.best[0]} kept"


def room(out: Path, *, resume: bool, force: bool) -> Path:
    """The folder of the checkpoints, free for use; raises what `keep.vacate` raises."""
    folder = out.with_name(f"{out.name}.partial")
    keep.vacate(folder, resume=resume, force=force)
    if resume:
        here = checkpoint.newest(folder)
        note(f"no checkpoint in {folder}; beginning anew" if here is None else f"going on from {here}")
    return folder


def material(loaded: LoadedModel, data: list[str], window: int | None) -> lessons.Split | samples.Rows:
    """What to train and to validate on; raises what reading it raises.

    Unless told, samples may be longer than windows of text: a batch is only as long as its longest sample.
    """
    if not samples.is_jsonl(data):
        length = jobs.window_for(loaded.model, window, usual=128)
        content = text.read(data)
        note(f"training on {len(content):,} characters")
        return lessons.split(jobs.tokens(loaded.tokenizer, content), length)
    length = jobs.window_for(loaded.model, window, usual=1024)
    found = samples.read(data, loaded.tokenizer, length)
    rows = samples.split(found.samples)
    note(f"training on {len(rows.train):,} samples, validating on {len(rows.validation):,}")
    if found.cut:
        left = f", and {found.dropped:,} left out, as nothing to learn was left" if found.dropped else ""
        note(
            f"{found.cut:,} samples are longer than {length} tokens: they were cut{left}; --window sets the length"
        )
    return rows


def digest(data: lessons.Split | samples.Rows) -> str:
    """sha256 of all token ids and of what is learnt."""
    if isinstance(data, samples.Rows):
        found = [x for sample in [*data.train, *data.validation] for x in sample]
    else:
        found = [data.train, data.validation.flatten()]
    sums = hashlib.sha256(torch.tensor([len(x) for x in found]).numpy().tobytes())
    sums.update(torch.cat(found).numpy().tobytes())
    return sums.hexdigest()


def save(
    out: Path,
    loaded: LoadedModel,
    learns: lessons.Learning,
    about: dict[str, Any],
    *,
    notes: dict[str, Any],
    force: bool,
) -> None:
    """Write what was trained: an adapter alone, anything else as a whole model."""
    if learns.kind == "adapter":
        folders.save_adapter(
            out, loaded.model, method=about["method"], args=learns.args, source=loaded.source,
            about=about, notes=notes, force=force,
        )  # fmt: skip
    else:
        folders.save_model(out, loaded, about, notes=notes, force=force)


def page(history: keep.History, method: str, seed: int) -> Report:
    """A report with the loss on the batches and on the validation data."""
    made = Report(f"Fine-tuning with {method}", seed=seed, data={"history": vars(history)})
    curves = {"training": history.train, "validation": history.validation}
    made.figure("Loss on each batch, and on what was held out.", loss_curves(curves, "nats per token"))
    rows = [(step, f"{loss:.4f}") for step, loss in history.validation]
    made.table("Validation.", ("step", "nats per token"), rows)
    if history.best is not None:
        made.note(f"Kept is the state after step {history.best[0]}, at {history.best[1]:.4f} nats per token.")
    return made
