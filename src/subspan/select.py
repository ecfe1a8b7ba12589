"""One small language for naming the parts of a model: `*.q_proj|*.v_proj`, `!lm_head`, or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

Select = str | Callable[[str], bool]


def matcher(select: Select) -> Callable[[str], bool]:
    """Turn a pattern into a test of names.

    Alternatives are separated by `|`; `*` and `?` are wildcards that also cross dots; alternatives that begin
    with `!` exclude and win over the others; only exclusions means "everything but".

    >>> wanted = matcher("*.q_proj|*.v_proj|!layers.0.*")
    >>> wanted("layers.1.q_proj"), wanted("layers.0.q_proj"), wanted("layers.1.k_proj")
    (True, False, False)
    """
    if callable(select):
        return select
    parts = [part.strip() for part in select.split("|") if part.strip()]
    if not parts or "!" in parts:
        raise ValueError("an empty pattern selects nothing; use '*' for everything")
    refused = [part[1:].strip() for part in parts if part.startswith("!")]
    wanted = [part for part in parts if not part.startswith("!")] or ["*"]

    def test(name: str) -> bool:
        return any(fnmatchcase(name, p) for p in wanted) and not any(fnmatchcase(name, p) for p in refused)

    return test


def pick(names: Iterable[str], select: Select, *, what: str) -> list[str]:
    """The selected names, in order; raises ValueError listing what exists when none matches."""
    names = list(names)
    test = matcher(select)
    found = [name for name in names if test(name)]
    if not found:
        have = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
        raise ValueError(f"{select!r} matches no {what}; there are: {have or 'none at all'}")
    return found
