"""What all verbs share: their options, results on stdout, notes on stderr, errors in one red line."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich import progress
from rich.console import Console, RenderableType
from rich.table import Table
from typer.core import TyperCommand

Item = TypeVar("Item")
LIMIT, WIDTH = 20, 120
EXPECTED = (ValueError, OSError, RuntimeError, FloatingPointError, ImportError)


class DType(StrEnum):
    """The precisions a model can be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


HELP_MODEL = "A transformers folder, a folder that subspan saved, or smollm2."
HELP_SELECT = "Layers to work on, e.g. '*.q_proj|*.v_proj', or '!*.down_proj' for all but those."
HELP_FILES = "A UTF-8 text file, or @prose or @code; give the option again for more."
HELP_JSON = "Print the result as json on stdout, and nothing else there."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=HELP_MODEL, show_default=False)]
Select = Annotated[str | None, typer.Option("--select", metavar="PATTERN", help=HELP_SELECT)]
Calibrate = Annotated[
    list[str] | None,
    typer.Option("--calibrate", metavar="FILE", help=f"Text for methods that need data. {HELP_FILES}"),
]
Ratio = Annotated[float | None, typer.Option("--ratio", help="Keep this share of the numbers, in (0, 1].")]
Err = Annotated[float | None, typer.Option("--err", help="Remove this share of all ranks, in 0 to 1.")]
Energy = Annotated[float | None, typer.Option("--energy", help="Keep this share of every layer's sum of s^2.")]
Bytes = Annotated[
    int | None,
    typer.Option(
        "--bytes", metavar="SIZE", parser=lambda text: parse_bytes(text),
        help="Fit the whole model into this, e.g. 400MiB or 1.5GB.",
    ),
]  # fmt: skip
Metric = Annotated[
    str | None,
    typer.Option("--metric", help="What is close: plain, absmean or gram; by default the method's own."),
]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Calibration tokens, at most.")]
Window = Annotated[
    int | None, typer.Option("--window", min=2, help="Tokens in a window; by default what suits the model.")
]
Data = Annotated[list[str], typer.Option("--data", metavar="FILE", help=f"What to learn from. {HELP_FILES}")]
Rank = Annotated[
    str | None,
    typer.Option("--rank", metavar="N", help="A count such as 64, or for optimizers a share such as 0.25."),
]
Every = Annotated[
    int | None, typer.Option("--every", min=1, help="Steps between refreshes of an optimizer's subspace.")
]
Rate = Annotated[
    float | None, typer.Option("--lr", help="The learning rate; by default one that suits the method.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Training steps.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Windows in a step.")]
Length = Annotated[int, typer.Option("--window", min=2, help="Tokens in a window.")]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="The folder to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")]
Json = Annotated[bool, typer.Option("--json", help=HELP_JSON)]
Seed = Annotated[int, typer.Option("--seed", help="For everything random.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")]
Precision = Annotated[DType, typer.Option("--dtype", help="The precision the model is loaded in.")]
Debug = Annotated[bool, typer.Option("--debug", envvar="SUBSPAN_DEBUG", help="Show the traceback of an error.")]


@dataclass(frozen=True, slots=True)
class Result:
    """What a verb found: `data` for `--json`, `shown` for people."""

    data: Any
    shown: tuple[RenderableType, ...]


class Verb(TyperCommand):
    """A command whose function returns a `Result`; prints it, or the error that came instead."""

    def invoke(self, ctx: Any) -> None:
        """Run the verb. With --json nothing but the result or {"error": ...} reaches stdout."""
        as_json = ctx.params["as_json"]
        try:
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                result: Result = super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            complain(interrupted(ctx.params.get("out")), as_json)
            raise typer.Exit(130) from None
        except EXPECTED as problem:
            if ctx.params["debug"]:
                raise
            complain(explain(problem), as_json)
            raise typer.Exit(1) from None
        show(result, as_json)


def show(result: Result, as_json: bool) -> None:
    """Print a result on stdout."""
    if as_json:
        print(json.dumps(result.data, indent=1, allow_nan=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH  # a file or pipe has none of its own
    for item in result.shown:
        if isinstance(item, str):
            console.print(item, markup=False, soft_wrap=True)
        else:
            console.print(item)


def complain(message: str, as_json: bool) -> None:
    """Print an error: json on stdout, or one red line on stderr."""
    if as_json:
        print(json.dumps({"error": message}))
    else:
        Console(stderr=True, highlight=False).print(f"error: {message}", style="red", markup=False, soft_wrap=True)


def explain(problem: BaseException) -> str:
    """The message of an exception on one line.

    >>> explain(OSError(28, "disk full")), explain(FileNotFoundError(2, "no such file", "a.txt"))
    ('disk full', 'no such file: a.txt')
    """
    text = str(problem)
    if isinstance(problem, OSError) and problem.strerror:
        text = f"{problem.strerror}: {problem.filename}" if problem.filename else problem.strerror
    return " ".join(text.split()) or type(problem).__name__


def interrupted(out: Path | None) -> str:
    """What to say after Ctrl-C.

    >>> interrupted(Path("runs/a"))
    'interrupted; nothing was written to runs/a'
    """
    if out is not None and any(out.with_name(f"{out.name}.partial").glob("saved-*")):
        return f"interrupted; a checkpoint lies in {out}.partial: the same command with --resume goes on from it"
    if out is not None and out.with_name(f"{out.name}.partial").is_dir():
        return f"interrupted; what is finished lies in {out}.partial: the same command goes on from there"
    return "interrupted" if out is None else f"interrupted; nothing was written to {out}"


def note(text: str) -> None:
    """A remark on stderr."""
    Console(stderr=True, highlight=False).print(text, style="dim", markup=False, soft_wrap=True)


def bar(label: str) -> Callable[[Iterable[Item]], Iterable[Item]]:
    """A progress bar on stderr, to wrap what is looped over."""

    def wrap(items: Iterable[Item]) -> Iterable[Item]:
        return progress.track(items, label, console=Console(stderr=True), transient=True)

    return wrap


def facts(title: str, rows: Mapping[str, str]) -> Table:
    """A table of two columns."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def one_of(**given: object) -> str:
    """The name of the only option that was given; raises typer.BadParameter when none or several were."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        options = ", ".join(f"--{name}" for name in given)
        got = " and ".join(f"--{name}" for name in names) or "none"
        raise typer.BadParameter(f"give exactly one of {options}; got {got}")
    return names[0]


def note_unused(method: str, files: Sequence[str] | None, *, needed: bool) -> None:
    """Say so when calibration text was named in vain."""
    if files and not needed:
        note(f"{method} reads no data; --calibrate is not used")


def outcome(title: str, found: Mapping[str, Any]) -> Table:
    """What `jobs.summary` says, for people."""
    loss = f"{found['validation_before']:.4f} -> {found['validation_after']:.4f} nats per token"
    rows = {
        "validation": f"{loss}, perplexity {found['perplexity']:.2f}",
        "trained numbers": f"{found['parameters']:,}",
        "optimizer state": mebibytes(found["state_bytes"]),
        "speed": f"{found['tokens_per_second']:,.0f} tokens per second",
    }
    return facts(title, rows)


def parse_bytes(text: str) -> int:
    """A size as people write it; raises typer.BadParameter for anything else.

    >>> parse_bytes("100MB"), parse_bytes("1.5 KiB"), parse_bytes("7")
    (100000000, 1536, 7)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B|B)?", str(text).strip().upper())
    if not found:
        raise typer.BadParameter(f"{text!r} is not a size; write one such as 400MiB, 1.5GB or 123456789")
    number, unit, binary = found.groups()
    return int(Fraction(number) * (1024 if binary else 1000) ** (" KMGT".index(unit) if unit else 0))


def mebibytes(count: int) -> str:
    """Bytes as people read them.

    >>> mebibytes(3 * 2**19)
    '1.50 MiB'
    """
    return f"{count / 2**20:.2f} MiB"
