"""Reports: one self-contained html page for people and one json file for programs."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata, resources
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Literal

import jinja2
import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from subspan.inspect.plots import INK

NUMERIC = re.compile(r"[+\-−±<>~≈]?\s*[\d.,]+(e[+-]?\d+)?(\s*±\s*[\d.,]+)?\s*[%×x]?(\s?[A-Za-z/]{1,5})?")
BLANK = ("", "–", "-")


@dataclass(frozen=True, slots=True)
class Block:
    """One piece of a report, in the order it was added."""

    kind: Literal["section", "table", "figure", "note"]
    title: str = ""
    text: tuple[str, ...] = ()
    number: int = 0
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    right: tuple[bool, ...] = ()
    svg: Markup = field(default_factory=Markup)


@dataclass
class Report:
    """A report to be filled from top to bottom and then written; `data` holds its numbers for programs.

    >>> report = Report("Ranks")
    >>> report.table("Kept", ["site", "rank"], [["q_proj", 12]])
    >>> report.blocks[0].right
    (False, True)
    """

    title: str
    subtitle: str = ""
    seed: int = field(default=0, kw_only=True)
    data: dict[str, object] = field(default_factory=dict, kw_only=True)
    blocks: list[Block] = field(default_factory=list, init=False, repr=False)

    def section(self, title: str, text: str = "") -> None:
        """Begin a section; empty lines in the text separate paragraphs."""
        self.blocks.append(Block("section", title, paragraphs(text), self.count("section")))

    def table(self, caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a numbered table; columns of numbers go right. Raises ValueError for a row of wrong length."""
        for at, row in enumerate(rows):
            if len(row) != len(columns):
                raise ValueError(
                    f"table {caption!r}: row {at} has {len(row)} cells, {list(row)}, for {len(columns)} columns "
                    f"{list(columns)}; give one cell per column, '' where there is nothing"
                )
        cells = tuple(tuple(cell(value) for value in row) for row in rows)
        right = tuple(numeric([row[at] for row in cells]) for at in range(len(columns)))
        number = self.count("table")
        self.blocks.append(Block("table", caption, (), number, tuple(columns), cells, right))

    def figure(self, caption: str, fig: Figure) -> None:
        """Add a numbered figure as it looks now; later changes to it do not show."""
        number = self.count("figure")
        self.blocks.append(Block("figure", caption, number=number, svg=inline_svg(fig, f"f{number}", caption)))

    def note(self, text: str) -> None:
        """Add a set-off remark; empty lines separate paragraphs."""
        self.blocks.append(Block("note", text=paragraphs(text)))

    def count(self, kind: str) -> int:
        """The number the next block of this kind gets."""
        return 1 + sum(block.kind == kind for block in self.blocks)

    def write(self, folder: str | Path) -> Path:
        """Write `report.html` and `report.json` into the folder, which is made, and return the page's path.

        A report that is already there is replaced. Numbers that are not finite become null in json. Raises
        ValueError naming the entry of `data` that json cannot hold, and FileExistsError when folder is a file.
        """
        folder = Path(folder)
        if folder.is_file():
            raise FileExistsError(f"{folder} is a file, and a report needs a folder; give another name")
        facts = environment(self.seed)
        entry = {"title": self.title, "subtitle": self.subtitle, "data": self.data, "environment": facts}
        as_json = json.dumps(jsonable(entry, "report"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        as_html = self.html(facts)
        folder.mkdir(parents=True, exist_ok=True)
        put(folder / "report.json", as_json)
        return put(folder / "report.html", as_html)

    def html(self, facts: Mapping[str, object]) -> str:
        """The page; every text is escaped."""
        source = resources.files("subspan.inspect").joinpath("report.html").read_text(encoding="utf-8")
        engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        return engine.from_string(source).render(report=self, blocks=self.blocks, facts=facts)


def environment(seed: int) -> dict[str, object]:
    """What a reader needs to judge the numbers: versions, kind of machine, seed and date; no names or paths.

    >>> environment(3)["seed"]
    3
    """
    return {
        "subspan": metadata.version("subspan"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_count": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "date": datetime.now(UTC).date().isoformat(),
    }


def inline_svg(fig: Figure, prefix: str, label: str) -> Markup:
    """A figure as an svg element for a page: as wide as the page allows, ink in the colour of the text."""
    matplotlib_svg, page = {"svg.fonttype": "none", "svg.hashsalt": prefix}, StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context(matplotlib_svg):
        fig.savefig(page, format="svg", transparent=True, metadata=nothing)
    text = page.getvalue()
    text = text[text.index("<svg") :]
    size = f'style="max-width: {fig.get_figwidth() * 100:.0f}px" role="img" aria-label="{Markup.escape(label)}"'
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(rf"\b(fill|stroke): ?({INK}|#000000)\b", r"\1: currentColor", text)
    # Ids must differ between the figures of one page, or the clips of the first apply to all.
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text).replace("url(#", f"url(#{prefix}-")
    return Markup(text.replace("<svg", f"<svg {size}", 1))


def cell(value: object) -> str:
    """A table cell: four digits for floats, separators from 10,000 on, a dash for None.

    >>> cell(12345), cell(0.123456), cell(None), cell(True), cell("a")
    ('12,345', '0.1235', '–', 'yes', 'a')
    """
    if isinstance(value, Tensor | np.generic):
        value = value.item()
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        large = isfinite(value) and abs(value) >= 10_000
        return f"{value:,.0f}" if large else str(value) if isinstance(value, int) else f"{value:.4g}"
    return str(value)


def numeric(cells: Sequence[str]) -> bool:
    """Whether these cells are numbers, with units at most, apart from blanks.

    >>> numeric(["12.5 %", "-3 MiB", "–"]), numeric(["q_proj", "12"]), numeric(["1.00 ± 0.02"])
    (True, False, True)
    """
    full = [text for text in cells if text not in BLANK]
    return bool(full) and all(text in ("inf", "nan", "-inf") or NUMERIC.fullmatch(text) for text in full)


def jsonable(value: object, where: str) -> object:
    """Plain json values; raises ValueError saying where something else is."""
    if isinstance(value, np.generic | Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, float):
        return value if isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, list | tuple):
        return [jsonable(v, f"{where}[{at}]") for at, v in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: jsonable(v, f"{where}.{key}") for key, v in value.items()}
    raise ValueError(
        f"{where} is a {type(value).__name__}, which json cannot hold; store numbers, strings, lists or "
        "dicts with string keys (for a tensor, tolist())"
    )


def paragraphs(text: str) -> tuple[str, ...]:
    """Text split at empty lines."""
    return tuple(part.strip() for part in re.split(r"\n\s*\n", text) if part.strip())


def put(path: Path, text: str) -> Path:
    """Write beside the final name, then rename, so that a crash leaves the old file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(path)
