"""`subspan methods`."""

from __future__ import annotations

from typing import Annotated, get_args

import typer
from rich.table import Table

from subspan.cli.common import Debug, Json, Result
from subspan.methods import methods
from subspan.methods.registry import Kind, Method

EXAMPLE = "subspan methods --kind adapter"
KINDS: tuple[Kind, ...] = get_args(Kind)


def run(
    kind: Annotated[str | None, typer.Option("--kind", help=f"Only these: {', '.join(KINDS)}.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """List the published methods this library is made of.

    Status says how a method was verified: transcript, equal to ten steps of its authors' own program; limits,
    equal to a simpler method at extreme settings.
    """
    wanted = next((known for known in KINDS if known == kind), None)
    if kind is not None and wanted is None:
        raise typer.BadParameter(f"--kind {kind!r} is none of {', '.join(KINDS)}")
    found = list(methods(wanted).values())
    return Result([m.row() for m in found], (table(found),))


def table(found: list[Method]) -> Table:
    """One line per method."""
    made = Table("name", "kind", "status", "paper", "made of", title=f"{len(found)} methods", title_justify="left")
    for m in found:
        made.add_row(
            m.name, m.kind, m.status, m.paper, f"{m.summary}\n[dim]{m.value.replace('[', chr(92) + '[')}[/dim]"
        )
    return made
