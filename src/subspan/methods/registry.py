"""The list of published methods: docs, tests and the command line read only this."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Kind = Literal["optimizer", "adapter", "compression", "healing"]
Status = Literal["transcript", "limits", "unverified"]
Preset = TypeVar("Preset", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Method:
    """A published method: its source, how it was verified, and the function that builds its value."""

    name: str
    kind: Kind
    paper: str
    reference: str
    status: Status
    deviates: str
    build: Callable[..., Any]

    @property
    def summary(self) -> str:
        """The first line of the preset's docstring."""
        return (inspect.getdoc(self.build) or "").partition("\n")[0]

    @property
    def value(self) -> str:
        """The composition with default arguments, as it prints."""
        return repr(self.build())

    def row(self) -> dict[str, str]:
        """The record as plain strings, the shape that `subspan methods --json` prints."""
        return {
            "name": self.name,
            "kind": self.kind,
            "paper": self.paper,
            "reference": self.reference,
            "status": self.status,
            "value": self.value,
        }


_METHODS: dict[str, Method] = {}


def method(
    *, kind: Kind, paper: str, status: Status, reference: str = "", deviates: str = ""
) -> Callable[[Preset], Preset]:
    """Publish a preset under its function's name.

    `status` says how it was verified: `transcript` (equal to recorded steps of the authors' program),
    `limits` (equal to a simpler method at extreme settings), or `unverified`. `deviates` states where the
    defaults differ from the paper.
    """

    def register(preset: Preset) -> Preset:
        name = preset.__name__
        if name in _METHODS:
            raise ValueError(f"method {name!r} is already registered by {_METHODS[name].build.__module__}")
        _METHODS[name] = Method(name, kind, paper, reference, status, deviates, preset)
        return preset

    return register


def methods(kind: Kind | None = None) -> dict[str, Method]:
    """All published methods by name, or those of one kind."""
    return {name: m for name, m in sorted(_METHODS.items()) if kind in (None, m.kind)}


def find(name: str, kind: Kind | None = None) -> Method:
    """The method of that name; raises ValueError listing what exists."""
    known = methods(kind)
    if name not in known:
        raise ValueError(f"unknown {kind or ''} method {name!r}; there are: {', '.join(known)}".replace("  ", " "))
    return known[name]


def build(name: str, kind: Kind | None = None, **args: Any) -> Any:
    """Build a method's value from the arguments that are not None; an unknown one is named in the error."""
    found = find(name, kind)
    accepted = inspect.signature(found.build).parameters
    given = {key: value for key, value in args.items() if value is not None}
    for key in given:
        if key not in accepted:
            raise ValueError(f"{name} takes no {key!r}; it takes: {', '.join(accepted)}")
    return found.build(**given)
