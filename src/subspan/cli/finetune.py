"""`subspan finetune`."""

from __future__ import annotations

import hashlib
from dataclasses import replace
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
    mebibytes,
    note,
    outcome,
)
from subspan.hosts import folders, jobs, keep, lessons, samples, text
from subspan.hosts.transformers import LoadedModel
from subspan.hosts.vocabulary import NewTokens, add_tokens
from subspan.inspect import Report, loss_curves, write_page
from subspan.methods import find
from subspan.optim import checkpoint
from subspan.optim.state import storage_bytes

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
TrainAlso = Annotated[
    str | None,
    typer.Option(
        "--train-also",
        metavar="PATTERN",
        help="Modules to train whole beside an adapter, e.g. 'lm_head|*norm'; OUT is then a folder of PEFT.",
    ),
]
Added = Annotated[
    str | None,
    typer.Option(
        "--new-tokens",
        metavar="A,B",
        help="Special tokens to add, e.g. '<think>,</think>', whose rows train beside an adapter; OUT is then a "
        "folder of PEFT with a tokenizer.",
    ),
]
BaseBits = Annotated[
    int | None, typer.Option("--base-bits", help="Hold the layers under an adapter in 4 or 8 bits, as QLoRA does.")
]


def run(
    model: Model,
    out: Out,
    data: Learned,
    method: Annotated[str, typer.Option("--method", help="An adapter, healing method or optimizer of the list.")],
    select: Select = None,
    rank: Rank = None,
    alpha: Alpha = None,
    train_also: TrainAlso = None,
    new_tokens: Added = None,
    base_bits: BaseBits = None,
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
    the whole model. With --train-also or --new-tokens it is a folder of PEFT. In train.json lies every loss.
    """
    require_adapter(method, train_also=train_also, new_tokens=new_tokens, base_bits=base_bits)
    master = lessons.teacher_for(method, model, teacher)
    jobs.vacant(out, force=force, reads=[model, *data, *([] if master is None else [master])])
    partial = room(out, resume=resume, force=force) if resume or checkpoint_every else None
    count = None if rank is None else lessons.parse_rank(rank)
    loaded, new = enlarged(jobs.opened(model, dtype=dtype, device=device, seed=seed), new_tokens)
    few = None if base_bits is None else narrowed(loaded, base_bits, str(dtype.value))
    found = material(loaded, data, window, new)
    above = None if master is None else jobs.opened(master, dtype=dtype, device=device, merged=True).model
    look = lessons.glance(found, batch, seed=seed, device=jobs.device_of(loaded.model))
    learns, modules = begun(
        loaded, method, few, train_also, new, steps=steps, select=select, rank=count, alpha=alpha, every=every,
        teacher=above, look=look,
    )  # fmt: skip
    rate = lessons.default_lr(method, scratch=False) if lr is None else lr
    about = {"method": method, "args": learns.args, "lr": rate, "seed": seed, "data": data}
    about |= known(teacher=master, quantized=few, train_also=modules or None, new_tokens=new and list(new.names))
    facts = {
        **about, "model": model, "select": select, "steps": steps, "batch": batch, "dtype": str(dtype.value),
        "validate_every": validate_every, "patience": patience, "best": best, "tokens": digest(found),
    }  # fmt: skip
    history = lessons.fit(
        loaded.model, learns, found, steps=steps, batch=batch, lr=rate, seed=seed, label=method,
        every=validate_every, keeping=keep.Keeping(best, patience, partial, checkpoint_every, resume, facts),
    )  # fmt: skip
    save(out, loaded, learns, about, modules=modules, notes=lessons.diary(history, about), force=force)
    keep.clear(partial)
    draw(report, history, method, seed)
    return told(out, title(method, steps, history), about, lessons.summary(history, learns))


def require_adapter(method: str, **given: object) -> None:
    """Raise ValueError for an option that only adapters have."""
    kind = find(method).kind
    if kind != "adapter" and (used := [name for name, value in given.items() if value is not None]):
        options = " and ".join(f"--{name.replace('_', '-')}" for name in used)
        raise ValueError(
            f"{options} is for adapters, and {method} is none (it is of the kind {kind}); leave it out"
        )


def known(**facts: object) -> dict[str, Any]:
    """Those that are not None."""
    return {name: fact for name, fact in facts.items() if fact is not None}


def narrowed(loaded: LoadedModel, bits: int, dtype: str) -> dict[str, Any]:
    """Hold the base in few bits, and say what that saves."""
    before = storage_bytes(loaded.model.state_dict().values())
    few = jobs.narrow_base(loaded.model, bits, dtype)
    after = storage_bytes(loaded.model.state_dict().values())
    note(f"the base takes {mebibytes(after)} instead of {mebibytes(before)}")
    return few


def enlarged(loaded: LoadedModel, new_tokens: str | None) -> tuple[LoadedModel, NewTokens | None]:
    """The model with the new tokens in its vocabulary, of which it is said where they are."""
    if new_tokens is None:
        return loaded, None
    made, new = add_tokens(loaded, [token.strip() for token in new_tokens.split(",")])
    named = ", ".join(f"{token} ({number})" for token, number in zip(new.names, new.ids, strict=True))
    place = f"grew by {new.grown} rows" if new.grown else "had rows to spare"
    note(f"new tokens: {named}; the vocabulary {place}")
    return made, new


def begun(
    loaded: LoadedModel,
    method: str,
    few: dict[str, Any] | None,
    train_also: str | None,
    new: NewTokens | None,
    **given: Any,
) -> tuple[lessons.Learning, list[str] | None]:
    """What learns, and the modules that learn whole with it, of which it is said what is no longer tied.

    None of modules where the adapter learns alone, without rows of tokens too.
    """
    learns = lessons.learning(loaded.model, method, **given)
    if few is not None:
        jobs.require_narrow(loaded.model, method)
    if new is not None:
        rows = keep.train_tokens(loaded.model, new.ids, new.start)
        learns = replace(learns, named=[*learns.named, *rows])
    if train_also is None:
        return learns, None if new is None else []
    whole = keep.train_whole(loaded.model, train_also)
    note(f"training whole: {', '.join(whole.modules)}")
    for name, other in whole.untied.items():
        note(f"{name} shared its weight with {other}; it has its own now, and {other} keeps the old one")
    return replace(learns, named=[*learns.named, *whole.named]), list(whole.modules)


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


def material(
    loaded: LoadedModel, data: list[str], window: int | None, new: NewTokens | None = None
) -> lessons.Split | samples.Rows:
    """What to train and to validate on; raises what reading it raises. New tokens that are not in it are named."""
    found = content(loaded, data, window)
    ids = torch.cat([sample.ids for sample in found.train]) if isinstance(found, samples.Rows) else found.train
    for token, number in zip(new.names, new.ids, strict=True) if new is not None else ():
        if not bool((ids == number).any()):
            note(f"{token} is nowhere in the training data; where it belongs is not learnt")
    return found


def content(loaded: LoadedModel, data: list[str], window: int | None) -> lessons.Split | samples.Rows:
    """The text in windows, or samples.

    Unless told, samples may be longer than windows of text: a batch is only as long as its longest sample.
    """
    if not samples.is_jsonl(data):
        length = jobs.window_for(loaded.model, window, usual=128)
        read = text.read(data)
        note(f"training on {len(read):,} characters")
        return lessons.split(jobs.tokens(loaded.tokenizer, read), length)
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
    modules: list[str] | None = None,
    notes: dict[str, Any],
    force: bool,
) -> None:
    """Write what was trained: an adapter alone, or with modules or rows of tokens for PEFT, else a whole model."""
    if modules is not None:
        keep.save_whole(out, loaded, modules, about, notes=notes, force=force)
    elif learns.kind == "adapter":
        folders.save_adapter(
            out, loaded.model, method=about["method"], args=learns.args, source=loaded.source,
            about=about, notes=notes, force=force,
        )  # fmt: skip
    else:
        folders.save_model(out, loaded, about, notes=notes, force=force)


def draw(file: Path | None, history: keep.History, method: str, seed: int) -> None:
    """Write the page, where one is asked for."""
    if file is not None:
        write_page(page(history, method, seed), file)


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
