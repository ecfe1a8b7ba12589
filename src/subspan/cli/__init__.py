"""The command line. Verbs are imported only when they are called, so that help comes at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from inspect import getdoc
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from subspan.cli.common import Verb

VERBS = {
    "demo": "Train, compress, heal and compare small models; writes one html report.",
    "methods": "List the published methods this library is made of.",
    "inspect": "Show what a model's weights look like: spectra, effective ranks, what is low-rank; "
    "or how two differ.",
    "plan": "Choose ranks, or see what an optimizer will hold, before anything is changed.",
    "compress": "Replace layers by low-rank ones, by a plan or by a method, and save the model.",
    "adapter": "Check, convert, merge or compare adapters, PEFT's or subspan's own.",
    "export": "Write a compressed model for software that does not know subspan.",
    "train": "Train a small language model from scratch with any optimizer of the list.",
    "finetune": "Train an adapter, the low-rank parts, or all weights of a model on your text.",
    "eval": "Score a model on text: perplexity, and its speed if asked.",
}


class Lazy(TyperGroup):
    """Names every verb, and imports the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command in place of its one line of help."""
        if args[0] in VERBS:
            self.commands[args[0]] = load(args[0])
        return super().resolve_command(ctx, args)


def load(verb: str) -> Any:
    """Import a verb's module and make its command."""
    module = importlib.import_module(f"subspan.cli.{verb}")
    app = typer.Typer(name=verb, add_completion=False, rich_markup_mode="rich")
    parts: dict[str, Any] = getattr(module, "PARTS", {})
    if parts:
        about = app.callback(help=flowing(module.run), epilog=epilog(module.EXAMPLE), invoke_without_command=True)
        about(module.run)
    else:
        parts = {verb: (module.run, module.EXAMPLE)}
    for name, (run, example) in parts.items():
        app.command(name, cls=Verb, help=flowing(run), epilog=epilog(example))(run)
    return typer.main.get_command(app)


def flowing(run: Callable[..., Any]) -> str:
    """A function's docstring with each paragraph in one line, to be broken where the terminal ends.

    >>> def run(): "Words that\\n    go on.\\n\\n    And more."
    >>> flowing(run)
    'Words that go on.\\n\\nAnd more.'
    """
    return "\n\n".join(" ".join(part.split()) for part in (getdoc(run) or "").split("\n\n"))


def epilog(example: str) -> str:
    """The last words of a verb's help."""
    return f"[bold]Example:[/bold]\n\n[cyan]{example}[/cyan]"


def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Train, adapt, see, compress and heal models in low-rank subspaces."""
    if version:
        print(f"subspan {metadata.version('subspan')}")
        raise typer.Exit


def group() -> Any:
    """The command `subspan` with all its verbs."""
    app = typer.Typer(cls=Lazy, add_completion=False, rich_markup_mode="rich", invoke_without_command=True)
    app.callback()(root)
    made: Any = typer.main.get_command(app)
    made.commands.update({name: TyperCommand(name, help=line) for name, line in VERBS.items()})
    return made


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 if all is well, 1 for an error, 2 for wrong usage, 130 if interrupted."""
    given = list(sys.argv[1:] if args is None else args)
    group().main(args=given or ["--help"], prog_name="subspan")
