"""What training will hold, parameter by parameter, reckoned on the meta device before anything is allocated.

State is what `Rule.init` makes for a gradient without storage, so no formula can drift from a method. The
workspace is the most that two steps of `Optim` on one such parameter hold beside weight, gradient and state:
the first, which fits a frame, and a plain one. Checks of values are answered so that the steps go on, and
what a LAPACK or CUDA routine allocates for itself is not seen.

With N shards the rows of every parameter are cut as FSDP2 cuts them: ceil(m / N) of m rows lie on device 0, the
fullest, which is the one reckoned. Of the state, tensors that follow the rows are cut with them: those with a
dimension of size m that changes with m. All else is whole on every device (codes of flattened blocks, too), and so
is the workspace, since a matrix has to be gathered to be decomposed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from subspan.linalg import wide
from subspan.optim.meter import Peak
from subspan.optim.optimizer import Optim, Where, checked, hidden_matrices, selected
from subspan.optim.recipe import Recipe, unpacked
from subspan.optim.rule import Rule
from subspan.optim.rules import Adam
from subspan.optim.state import State, counter

Role = Literal["rule", "other", "asleep", "frozen"]
Shape = tuple[int, ...]

COLUMNS = {
    "weights": "weight_bytes", "gradients": "gradient_bytes", "moments": "moment_bytes", "basis": "basis_bytes",
    "state": "state_bytes", "AdamW state": "adamw_state_bytes", "workspace": "workspace_bytes",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that a rule holds for one parameter: its state in three parts, and the workspace of a step.

    `basis` is all under a `frame.`, seeds and indices included; `other` what is under a `residual.`, and single
    numbers such as counters; `moments` the rest. `workspace` is None where a step needs values.
    """

    moments: int = 0
    basis: int = 0
    other: int = 0
    workspace: int | None = 0

    @property
    def state(self) -> int:
        """All three parts."""
        return self.moments + self.basis + self.other


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter: bytes of its weight and gradient, what its rule holds, and what AdamW would hold."""

    name: str
    shape: Shape
    dtype: str
    role: Role
    rule: str
    weight: int
    gradient: int
    ours: Held
    adamw: Held

    @property
    def size(self) -> str:
        """The shape as people read it."""
        return "x".join(map(str, self.shape)) or "1"

    @property
    def pays(self) -> bool:
        """Whether the rule's state is smaller than AdamW's."""
        return self.ours.state < self.adamw.state

    @property
    def reason(self) -> str:
        """Why it does not pay; empty where it does."""
        if self.pays:
            return ""
        if self.role != "rule":
            return "frozen: no gradient, no state" if self.role == "frozen" else "stepped by the other rule"
        if self.ours.state == self.adamw.state:
            return "the state is as large as AdamW's"
        return (
            f"a basis of {self.ours.basis:,} bytes and moments of {self.ours.moments:,} outweigh AdamW's "
            f"{self.adamw.state:,}; choose a smaller rank, or leave it to AdamW by `where`"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name, "shape": list(self.shape), "dtype": self.dtype, "role": self.role,
            "rule": self.rule, **tally([self]), "pays": self.pays, "reason": self.reason,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ledger:
    """A row for every parameter, on the fullest of `shards` devices; made by `ledger`."""

    rows: tuple[Row, ...]
    shards: int = 1

    @property
    def totals(self) -> dict[str, int | None]:
        """Sums over all parameters; of the workspaces the largest, as parameters are stepped one by one."""
        return tally(self.rows)

    @property
    def ratio(self) -> float:
        """State bytes as a share of AdamW's; 1 where nothing has state."""
        ours, adamw = sum(row.ours.state for row in self.rows), sum(row.adamw.state for row in self.rows)
        return ours / adamw if adamw else 1.0

    def groups(self) -> list[tuple[Row, ...]]:
        """Rows that differ in nothing but the name."""
        alike: dict[object, list[Row]] = {}
        for row in self.rows:
            key = row.shape, row.dtype, row.role, row.rule, row.gradient
            alike.setdefault(key, []).append(row)
        return [tuple(rows) for rows in alike.values()]

    def remarks(self) -> list[str]:
        """A sentence for every kind of parameter that the rule steps and where it does not pay."""
        place = f"on device 0 of {self.shards}, " if self.shards > 1 else ""
        return [
            f"{place}no saving on {len(rows)} of {rows[0].size} ({tails(rows, 3)}): {rows[0].reason}"
            for rows in self.groups()
            if rows[0].role == "rule" and not rows[0].pays
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: shards, totals, ratio, and one row a parameter."""
        rows = [row.to_dict() for row in self.rows]
        return {"shards": self.shards, "totals": self.totals, "ratio": self.ratio, "parameters": rows}

    def table(self, name: str = "optimizer") -> Table:
        """A printable table in MiB: parameters alike on one line, and the totals beside AdamW's."""
        where = f"on device 0 of {self.shards}" if self.shards > 1 else "on one device"
        table = Table(title=f"{name}: MiB {where}", box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("parameters", overflow="fold", min_width=30)
        for column in COLUMNS:
            table.add_column(column, justify="right")
        table.add_column("pays", justify="right")
        for rows in self.groups():
            row = rows[0]
            verdict = ("yes" if row.pays else "no") if row.role == "rule" else row.rule or row.role
            table.add_row(f"{len(rows)} of {row.size}: {tails(rows, 2)}", *cells(tally(rows)), verdict)
        table.add_section()
        table.add_row(f"all, by {name}", *cells(self.totals), f"{self.ratio:.1%}")
        peer = tally(replace(row, ours=row.adamw) for row in self.rows)
        table.add_row("all, by AdamW", *cells(peer), "100.0%")
        return table


def ledger(
    named_params: Iterable[tuple[str, Tensor]],
    rule: Rule | Recipe,
    *,
    other: Rule | None = None,
    where: Where = hidden_matrices,
    shards: int = 1,
) -> Ledger:
    """Reckon what `Optim(named_params, rule, other=other, where=where)` will hold; see the head of this module.

    Only names, shapes and precisions are read, so parameters may be on the meta device. Gradients are in the
    weight's precision, state is in float32 at least. Layers that a recipe lets sleep are those of its first draw.
    Raises what `Optim` raises for the same arguments, and ValueError for shards < 1.

    >>> found = ledger(torch.nn.Linear(6, 4).named_parameters(), Adam())
    >>> found.totals["weight_bytes"], found.totals["state_bytes"], found.ratio
    (112, 240, 1.0)
    """
    if shards < 1:
        raise ValueError(f"ledger: shards={shards!r} is less than 1; 1 is a single device")
    named = checked(named_params)
    chosen = selected(named, where)
    recipe = unpacked(rule, other)
    rules: Mapping[Role, Rule] = {"rule": recipe.rule, "other": recipe.other}
    asleep = {name for name, moves in recipe.awake.draw(named, seed=0, steps=0).items() if not moves}
    known: dict[object, tuple[Held, Held]] = {}
    found = []
    for name, p in named.items():
        role: Role = "rule" if name in chosen else "other"
        if not p.requires_grad:
            role = "frozen"
        elif name in asleep and recipe.awake.state == "drop":
            role = "asleep"
        key = p.shape, p.dtype, role
        if key not in known:
            ours = held(rules[role], name, p, shards) if role in rules else Held()
            known[key] = ours, held(Adam(), name, p, shards) if role != "frozen" else Held()
        weight = first_rows(p.shape, shards) * p.shape[1:].numel() * p.element_size()
        holds = role in rules and name not in asleep and recipe.source.holds(p)
        found.append(
            Row(
                name, tuple(p.shape), str(p.dtype).removeprefix("torch."), role,
                repr(rules[role]).partition("(")[0] if role in rules else "",
                weight, weight if holds else 0, *known[key],
            )
        )  # fmt: skip
    return Ledger(tuple(found), shards)


def held(rule: Rule, name: str, p: Tensor, shards: int) -> Held:
    """What a rule holds for a parameter like p; raises ValueError naming it where the rule refuses its shape."""
    shape = tuple(p.shape)
    try:
        s = blank(rule, shape, p.dtype)
        follows = rows_of(rule, s, shape, p.dtype) if shards > 1 else {}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    sums = {"moments": 0, "basis": 0, "other": 0}
    for key, x in s.items():
        count = x.numel() // max(1, shape[0]) * first_rows(shape, shards) if follows.get(key) else x.numel()
        sums[part(key, x)] += count * x.element_size()
    return Held(**sums, workspace=workspace(rule, shape, p.dtype))


def blank(rule: Rule, shape: Shape, dtype: torch.dtype) -> State:
    """The state of a parameter before its first step, on the meta device, with the counter `Optim` adds."""
    g = wide(torch.empty(shape, dtype=dtype, device="meta"))
    return {"step": counter(), **rule.init(g, 0)}


def rows_of(rule: Rule, s: State, shape: Shape, dtype: torch.dtype) -> dict[str, bool]:
    """Whether each entry of a state has a dimension that is the rows': of their size, and changing with it."""
    if not shape:
        return {}
    m = shape[0]
    try:
        taller = blank(rule, (m + 1, *shape[1:]), dtype)
    except ValueError:
        return {}
    return {
        key: any(a == m and b == m + 1 for a, b in zip(x.shape, taller[key].shape, strict=False))
        for key, x in s.items()
        if key in taller
    }


def first_rows(shape: Shape, shards: int) -> int:
    """How many rows of a tensor the first shard has, as torch.chunk cuts them; a single number is one row.

    >>> first_rows((10, 4), 4), first_rows((2,), 4), first_rows((), 4)
    (3, 1, 1)
    """
    return -(-shape[0] // shards) if shape else 1


def part(key: str, x: Tensor) -> str:
    """The part of the state that an entry belongs to.

    >>> [part(key, torch.zeros(2)) for key in ("rule.mu", "rule.frame.index", "residual.error")]
    ['moments', 'basis', 'other']
    """
    scopes = key.split(".")[:-1]
    if "frame" in scopes:
        return "basis"
    return "other" if "residual" in scopes or x.ndim == 0 else "moments"


def workspace(rule: Rule, shape: Shape, dtype: torch.dtype) -> int | None:
    """The most bytes that a step on such a parameter holds beside weight, gradient and state.

    None where a step needs values, or where `Optim` alone cannot make one.
    """
    for answer in (True, False):
        try:
            return dry_steps(rule, shape, dtype, Peak(answer=answer))
        except (RuntimeError, ValueError, TypeError, AttributeError):
            continue
    return None


def dry_steps(rule: Rule, shape: Shape, dtype: torch.dtype, live: Peak) -> int:
    """The peak over the first and the second step on the meta device, counted by `live`."""
    made = []
    with live:
        p = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        p.grad = torch.empty_like(p)
        optimizer = Optim([("parameter", p)], rule, lr=1.0, where="*")
        for _ in range(2):
            live.most = live.now
            optimizer.step()
            made.append(live.most - live.now)
    return max(made)


def tally(rows: Iterable[Row]) -> dict[str, int | None]:
    """Sums of bytes over rows, and the largest of the workspaces; None if one is not known."""
    rows = tuple(rows)
    ours, adamw = [row.ours for row in rows], [row.adamw for row in rows]
    return {
        "weight_bytes": sum(row.weight for row in rows),
        "gradient_bytes": sum(row.gradient for row in rows),
        "moment_bytes": sum(h.moments for h in ours),
        "basis_bytes": sum(h.basis for h in ours),
        "other_bytes": sum(h.other for h in ours),
        "state_bytes": sum(h.state for h in ours),
        "adamw_state_bytes": sum(h.state for h in adamw),
        "workspace_bytes": largest(h.workspace for h in ours),
        "adamw_workspace_bytes": largest(h.workspace for h in adamw),
    }


def largest(counts: Iterable[int | None]) -> int | None:
    """The maximum; None as soon as one is not known."""
    known = list(counts)
    return max((c for c in known if c is not None), default=0) if None not in known else None


def cells(sums: Mapping[str, int | None]) -> list[str]:
    """What `tally` found, in MiB, for the table's columns."""
    shown = [sums[key] for key in COLUMNS.values()]
    return ["?" if count is None else f"{count / 2**20:,.2f}" for count in shown]


def tails(rows: Iterable[Row], most: int) -> str:
    """The last parts of the names, each once."""
    names = [row.name.removesuffix(".weight").split(".") for row in rows]
    found = list(dict.fromkeys(".".join(n[-2:]) if n[-1] == "bias" else n[-1] for n in names))
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
