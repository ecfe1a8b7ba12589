"""`Optim`: the one torch optimizer of this library, and its only place that knows about parameters."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, overload

import torch
from torch import Tensor

from subspan.linalg import wide
from subspan.optim.rule import Rule
from subspan.optim.rules import Adam
from subspan.optim.state import State, counter
from subspan.select import pick

Where = str | Callable[[str, Tensor], bool]

TABLES = ("*embed*", "wte", "wpe", "lm_head", "head", "score", "classifier")


def hidden_matrices(name: str, p: Tensor) -> bool:
    """Whether p is a matrix between hidden layers: two dimensions, and no embedding or output head by its name.

    >>> [hidden_matrices(name, torch.ones(2, 2)) for name in ("layers.0.q_proj.weight", "lm_head.weight")]
    [True, False]
    """
    return p.ndim == 2 and not any(fnmatchcase(part, table) for part in name.split(".") for table in TABLES)


class Optim(torch.optim.Optimizer):
    """Steps named parameters: `rule` those that `where` selects, `other` the rest.

        p <- (1 - lr * weight_decay) p,   p <- p - lr * gain * update

    `where` is a pattern over names (see `subspan.select`) or a function of (name, parameter). Parameters in half
    precision have state in float32, and are rounded once a step. Random frames follow from `seed` and the
    parameter's name, so they do not depend on order or device. State is flat tensors, so a saved `state_dict()`
    loads with weights_only=True; it belongs to names, not to positions. Raises TypeError for parameters without
    names and ValueError for duplicates, a pattern that matches nothing, or a negative lr or weight_decay.

    >>> model = torch.nn.Linear(3, 2)
    >>> opt = Optim(model.named_parameters(), Adam(), lr=1e-3)
    >>> [(g["role"], g["param_names"]) for g in opt.param_groups]
    [('rule', ['weight']), ('other', ['bias'])]
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, Tensor]],
        rule: Rule,
        *,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        other: Rule = Adam(),
        where: Where = hidden_matrices,
        seed: int = 0,
    ) -> None:
        if not float(lr) >= 0 or not weight_decay >= 0:
            raise ValueError(f"Optim: lr={lr!r} and weight_decay={weight_decay!r} must not be negative")
        named = checked(named_params)
        chosen = selected(named, where)
        self.rules = {"rule": rule, "other": other}
        self.seed = seed
        members = {
            role: [(n, p) for n, p in named.items() if (n in chosen) == (role == "rule")] for role in self.rules
        }
        groups: list[dict[str, Any]] = [{"params": m, "role": role} for role, m in members.items() if m]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rules": self.rules, "seed": self.seed}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add {"params": [(name, p), ...], "role": "rule" or "other"}; raises ValueError for any other role."""
        if param_group.get("role") not in self.rules:
            raise ValueError(
                f"a group needs a role, one of {', '.join(self.rules)}, not {param_group.get('role')!r}"
            )
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient; a closure is called first and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, p, group in self._members():
            if p.grad is not None:
                self._advance(name, p, p.grad, group)
        return loss

    def _members(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                yield name, p, group

    def _advance(self, name: str, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if grad.is_sparse:
            raise ValueError(f"{name}: sparse gradients are not supported; build the embedding with sparse=False")
        rule, g, s = self.rules[group["role"]], wide(grad), self.state[p]
        try:
            if "step" not in s:
                s |= {"step": counter(), **self._blank(name, g, rule)}
            t = int(s["step"]) + 1
            d = rule.update(g, s, p, t)
            s["step"] += 1  # only now: a refused gradient must not use up the step at which a frame is due
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        lr, decay = group["lr"], group["weight_decay"]
        if decay:
            p.mul_(1 - lr * decay)
        if isinstance(lr, Tensor):
            p.add_(d * lr, alpha=-rule.gain(s, t))
        else:
            p.add_(d, alpha=-lr * rule.gain(s, t))

    def _blank(self, name: str, g: Tensor, rule: Rule) -> State:
        return rule.init(g, zlib.crc32(name.encode()) ^ self.seed)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved `state_dict()` of the same parameters, in any order, under the same rules.

        Tensors keep the precision they were saved in and move to their parameter's device. Raises ValueError
        listing names that are missing, unexpected or in another role, and state that another rule has written.
        """
        index, saved_groups = by_name(state_dict)
        roles = {name: group["role"] for name, group in saved_groups.items()}
        compare({name: group["role"] for name, _, group in self._members()}, roles)
        state = {}
        for name, p, group in self._members():
            if index[name] in state_dict["state"]:
                state[p] = {k: placed_near(p, v) for k, v in state_dict["state"][index[name]].items()}
                self._check_state(name, p, state[p], self.rules[group["role"]])
        groups = [
            {**saved_groups[g["param_names"][0]], "params": [index[n] for n in g["param_names"]]}
            | {"param_names": g["param_names"]}
            for g in self.param_groups
        ]
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(state)

    def _check_state(self, name: str, p: Tensor, s: State, rule: Rule) -> None:
        precision = torch.float64 if p.dtype == torch.float64 else torch.float32
        blank = self._blank(name, torch.empty(p.shape, dtype=precision, device="meta"), rule)
        want = {key: tuple(x.shape) for key, x in blank.items()} | {"step": ()}
        have = {key: tuple(x.shape) for key, x in s.items()}
        if want != have:
            raise ValueError(
                f"{name}: the saved state {have} was not written by {rule!r}, whose state is {want}; "
                "build Optim with the rule it was saved from"
            )

    def report(self) -> list[dict[str, Any]]:
        """One row a parameter: name, shape, role, the rule that steps it, and the bytes of its state so far."""
        return [
            {
                "name": name,
                "shape": tuple(p.shape),
                "role": group["role"],
                "rule": repr(self.rules[group["role"]]),
                "bytes": storage_bytes(self.state[p].values() if p in self.state else ()),
            }
            for name, p, group in self._members()
        ]

    def state_bytes(self) -> int:
        """The memory that all state holds, each storage counted once and whole."""
        return storage_bytes(x for s in self.state.values() for x in s.values())


def checked(named_params: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Parameters by name, after complaints about what cannot be stepped."""
    named: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for item in named_params:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise TypeError("Optim takes (name, parameter) pairs; pass model.named_parameters()")
        name, p = item
        if name in named or id(p) in seen:
            raise ValueError(f"{name} is given twice (as {seen.get(id(p), name)}); pass each parameter once")
        if p.is_complex():
            raise TypeError(f"{name} is complex; step torch.view_as_real of it, under that name")
        named[name], seen[id(p)] = p, name
    if not named:
        raise ValueError("Optim got no parameters; an iterator that was read before is empty")
    return named


def selected(named: dict[str, Tensor], where: Where) -> set[str]:
    """The names that `where` selects; only the default may select none."""
    if isinstance(where, str):
        return set(pick(named, where, what="parameter"))
    found = {name for name, p in named.items() if where(name, p)}
    if not found and where is not hidden_matrices:
        raise ValueError(f"{where!r} selects no parameter; there are: {', '.join(named)}")
    return found


def by_name(state_dict: dict[str, Any]) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """From a saved state: each parameter's number, and the group it was in."""
    groups = state_dict["param_groups"]
    if not all("param_names" in group and "role" in group for group in groups):
        raise ValueError("this state holds no parameter names, so it was not saved by Optim; start without it")
    rows = [
        (name, i, group) for group in groups for name, i in zip(group["param_names"], group["params"], strict=True)
    ]
    return {name: i for name, i, _ in rows}, {name: group for name, _, group in rows}


def compare(have: dict[str, str], saved: dict[str, str]) -> None:
    """Raise ValueError unless both hold the same names in the same roles."""
    faults = {
        "missing": [name for name in have if name not in saved],
        "unexpected": [name for name in saved if name not in have],
        "in another role": [name for name in have if saved.get(name, have[name]) != have[name]],
    }
    found = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
    if found:
        raise ValueError(f"the saved state is of other parameters ({found}); build Optim as when it was saved")


def placed_near(p: Tensor, x: Tensor) -> Tensor:
    """A copy of x on p's device, in x's own precision; counters stay on the CPU."""
    counts = x.ndim == 0 and x.dtype == torch.int64
    return x.detach().to("cpu" if counts else p.device, copy=True)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
