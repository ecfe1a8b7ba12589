"""What an act of the demo leaves behind, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from subspan.inspect import Report


@dataclass
class Act:
    """A title, what it asks, tables, figures, remarks, and the numbers for programs."""

    title: str
    text: str
    tables: list[tuple[str, Sequence[str], list[list[Any]]]] = field(default_factory=list)
    figures: list[tuple[str, Figure]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def show(self, console: Console) -> None:
        """Print the tables and remarks."""
        for caption, columns, rows in self.tables:
            table = Table(title=caption, title_justify="left")
            for index, column in enumerate(columns):
                table.add_column(column, justify="right" if index else "left")
            for row in rows:
                table.add_row(*(str(cell) for cell in row))
            console.print(table)
        for note in self.notes:
            console.print(f"  {note}")

    def report(self, report: Report, key: str) -> None:
        """Add everything to the report."""
        report.section(self.title, self.text)
        for caption, columns, rows in self.tables:
            report.table(caption, list(columns), rows)
        for caption, figure in self.figures:
            report.figure(caption, figure)
        report.note("\n\n".join(self.notes))
        report.data[key] = self.data


def mib(count: float) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:.1f} MiB"


def ordering(names: Sequence[str], values: Sequence[float], claim: str) -> str:
    """Whether the values grow along the names, as a published result says they do."""
    digits = next((d for d in range(3, 10) if len({f"{v:.{d}g}" for v in values}) == len(values)), 3)
    rows = [(name, f"{value:.{digits}g}") for name, value in sorted(zip(names, values, strict=True), key=_second)]
    shown = " ".join(rows[0]) + "".join(
        f" {'=' if before == text else '<'} {name} {text}" for (_, before), (name, text) in pairwise(rows)
    )
    holds = all(a < b for a, b in pairwise(values))
    return f"{claim}: {'shows here' if holds else 'does NOT show here'} ({shown})."


def _second(pair: tuple[str, float]) -> float:
    return pair[1]
