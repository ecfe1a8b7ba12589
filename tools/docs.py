"""Write docs/methods.md, the table of published methods; a test fails when it is stale."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from subspan.methods import Method, methods

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"

HEAD = """# Methods

Written by `make docs` from the registry that the library and the command line read; edit the presets, not this
page. *Parts* is the value a preset returns with its default arguments: what prints is what runs.

*Status* says how a method was verified. `transcript`: equal to recorded steps of the authors' own program, see
`tests/reference`. `limits`: equal to a simpler method at extreme settings. `unverified`: neither yet.
"""


def link(text: str) -> str:
    """A paper on arXiv or a repository on GitHub as a link; other text as it is."""
    if arxiv := re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", text):
        return f"[{text}](https://arxiv.org/abs/{arxiv[1]})"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return f"[{text}](https://github.com/{text})"
    return text


def row(cells: Iterable[str]) -> str:
    """One line of a table; a bar inside a cell is escaped, in code as well."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def entry(method: Method) -> str:
    """What a method is, in a line, and where it departs from its paper."""
    note = f" Deviates: {method.deviates.rstrip('.')}." if method.deviates else ""
    return f"- **{method.name}**: {method.summary}{note}"


def page(records: Iterable[Method]) -> str:
    """The whole page, sorted by kind and name."""
    records = sorted(records, key=lambda m: (m.kind, m.name))
    table = [row(["name", "kind", "paper", "reference", "status", "parts"]), "|---" * 6 + "|"]
    table += [row([m.name, m.kind, link(m.paper), link(m.reference), m.status, f"`{m.value}`"]) for m in records]
    return "\n".join([HEAD, *table, "", "## In a line each", "", *map(entry, records), ""])


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(methods().values()), encoding="utf-8")


if __name__ == "__main__":
    main()
