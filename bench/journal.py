"""Rows of a long bench, kept as they come, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subspan.inspect import environment

Row = dict[str, Any]


class Journal:
    """A json file of parts, each rows by name; all are dropped when the settings that decide them changed."""

    def __init__(self, out: Path, settings: Row, *parts: str) -> None:
        self.out, self.lock = out, threading.Lock()
        self.data: Row = {"settings": settings} | {part: {} for part in parts}
        if out.is_file():
            old = json.loads(out.read_text(encoding="utf-8"))
            if old["settings"] == settings:
                self.data |= old

    def row(self, part: str, key: str, make: Callable[[], Row]) -> Row:
        """The row of that name, made and written when it is not there; any thread may ask for another."""
        if key not in self.data[part]:
            made = make()
            with self.lock:
                self.data[part][key] = made
                self.write()
        found: Row = self.data[part][key]
        return found

    def write(self) -> None:
        """Write beside, then rename: whoever is killed leaves whole json."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(self.data | {"environment": environment(0)}, indent=1) + "\n")
        partial.replace(self.out)
