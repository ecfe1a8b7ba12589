"""`Optim`: the one torch optimizer of this library, and its only place that knows about parameters."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor

from subspan.linalg import wide
from subspan.optim.awake import settle
from subspan.optim.direction import Direction
from subspan.optim.projected import Projected, facts
from subspan.optim.recipe import Recipe, unpacked
from subspan.optim.rule import Rule
from subspan.optim.rules import Adam
from subspan.optim.saved import by_name, compare, placed_near, require_alike
from subspan.optim.source import Gradient
from subspan.optim.state import State, counter, mixed, storage_bytes
from subspan.optim.write import Rounding, move, require_rounding
from subspan.select import pick
from subspan.shards import is_cut, whole

Where = str | Callable[[str, Tensor], bool]

TABLES = ("*embed*", "wte", "wpe", "lm_head", "head", "score", "classifier")


def hidden_matrices(name: str, p: Tensor) -> bool:
    """Whether p is a matrix between hidden layers: two dimensions, and no embedding or output head by its name.

    >>> [hidden_matrices(name, torch.ones(2, 2)) for name in ("layers.0.q_proj.weight", "lm_head.weight")]
    [True, False]
    """
    return p.ndim == 2 and not any(fnmatchcase(part, table) for part in name.split(".") for table in TABLES)


class Ready(NamedTuple):
    """A parameter at the start of its step t: its name, itself, its gradient in full precision, its state."""

    name: str
    p: Tensor
    g: Tensor
    s: State
    t: int


class Optim(torch.optim.Optimizer):
    """Steps named parameters: `rule` those that `where` selects, `other` the rest.

        p <- (1 - lr * weight_decay) p,   p <- p - lr * gain * update

    `where` is a pattern over names (see `subspan.select`) or a function of (name, parameter). Parameters in half
    precision have state in float32, and are rounded once a step. Random frames follow from `seed` and the
    parameter's name, so they do not depend on order or device. State is flat tensors, so a saved `state_dict()`
    loads with weights_only=True; it belongs to names, not to positions. Raises TypeError for parameters without
    names and ValueError for duplicates, a pattern that matches nothing, or a negative lr or weight_decay.

    `maximize` climbs. `rounding="stochastic"` rounds bfloat16 weights up or down with the odds of the distance,
    so that steps smaller than their spacing still count on average.

    A `Recipe` in place of the rule also says where gradients come from, which parameters move, and `other`.

    >>> model = torch.nn.Linear(3, 2)
    >>> opt = Optim(model.named_parameters(), Adam(), lr=1e-3)
    >>> [(g["role"], g["param_names"]) for g in opt.param_groups]
    [('rule', ['weight']), ('other', ['bias'])]
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, Tensor]],
        rule: Rule | Recipe,
        *,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        other: Rule | None = None,
        where: Where = hidden_matrices,
        seed: int = 0,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        unmoved: Literal["refuse", "allow"] = "refuse",
    ) -> None:
        if not float(lr) >= 0 or not weight_decay >= 0:
            raise ValueError(f"Optim: lr={lr!r} and weight_decay={weight_decay!r} must not be negative")
        named = checked(named_params)
        require_rounding(rounding, named)
        if unmoved not in ("refuse", "allow"):
            raise ValueError(f"Optim: unmoved={unmoved!r}; use 'refuse' or 'allow'")
        chosen = selected(named, where)
        self.recipe = unpacked(rule, other)
        self.rules = {"rule": self.recipe.rule, "other": self.recipe.other}
        self.seed, self.rounding, self.watch = seed, rounding, unmoved == "refuse"
        members = {
            role: [(n, p) for n, p in named.items() if (n in chosen) == (role == "rule")] for role in self.rules
        }
        groups: list[dict[str, Any]] = [
            # a tensor rate of its own: schedulers write into it, group by group
            {"params": m, "role": role, "lr": lr.clone() if isinstance(lr, Tensor) else lr}
            for role, m in members.items()
            if m
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "steps": 0})
        self._settle()

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("rules", "recipe", "asleep", "seed", "rounding", "watch")}
        return {**super().__getstate__(), **own}

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
        """Step every parameter that has a gradient; a closure is called first and its value returned.

        The first step with lr > 0 raises RuntimeError for parameters that have no gradient, or that did not
        move though theirs is not zero, unless unmoved="allow"; those that could move have then moved.
        """
        if closure is None and self._prepared():
            return None
        awake = [(name, p) for name, p, _ in self._members() if name not in self.asleep]
        loss, gradient = self.recipe.source.gradients(closure, awake, seed=self.seed, steps=self.steps)
        watch = self.watch and any(float(group["lr"]) > 0 for group in self.param_groups)
        self.watch = self.watch and not watch
        stuck = [fault for group in self.param_groups for fault in self._step_group(group, gradient, watch)]
        for group in self.param_groups:
            group["steps"] += 1
        self._settle()
        require_moved(stuck)
        return cast("float | None", loss)

    @torch.no_grad()
    def squeeze(self, name: str, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor | None:
        """All that p's next step needs of its gradient, linear in it; None where that is the gradient itself."""
        rule = self.rules[group["role"]]
        ready = self._ready(name, p, grad, rule)
        return rule.squeeze(ready.g, ready.s, ready.t) if isinstance(rule, Projected) else None

    @torch.no_grad()
    def advance(self, name: str, p: Tensor, x: Tensor, group: dict[str, Any], *, squeezed: bool = False) -> None:
        """Step p alone: by its gradient x, or by what `squeeze` said of it. p.grad is neither read nor freed."""
        rule = self.rules[group["role"]]
        ready = self._ready(name, p, x, rule)
        if squeezed and isinstance(rule, Projected):
            self._write(ready, rule, rule.answer(ready.g, ready.s, p, ready.t), group)
        elif isinstance(rule, Adam) and rule.fits(p, ready.g, ready.s):
            self._fused([ready], rule, group)
        else:
            self._advance(ready, rule, group)

    def _prepared(self) -> bool:
        """Whether the first step is one that moves nothing: then it only makes the state, and is not counted.

        With zero gradients and lr 0, torch.distributed.checkpoint asks for the state that it is about to load.
        """
        if self.state or any(float(group["lr"]) for group in self.param_groups):
            return False
        known = [(n, p, p.grad, g) for n, p, g in self._members() if p.grad is not None and n not in self.asleep]
        if not known or any(bool(whole(grad.any())) for _, _, grad, _ in known):
            return False
        for name, p, grad, group in known:
            rule = self.rules[group["role"]]
            lay_out(self._ready(name, p, grad, rule), rule)
        return True

    @property
    def steps(self) -> int:
        """Calls of `step` so far."""
        return max(int(group["steps"]) for group in self.param_groups)

    def _settle(self) -> None:
        named = {name: p for name, p, _ in self._members()}
        self.asleep = settle(self.recipe.awake, named, self.state, seed=self.seed, steps=self.steps)

    def _step_group(self, group: dict[str, Any], gradient: Gradient, watch: bool) -> list[str]:
        """Step the members that have a gradient; when watched, one by one, returning those that stand still."""
        rule, stuck = self.rules[group["role"]], []
        batch: list[Ready] = []
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if name in self.asleep:
                continue
            grad = gradient(name, p)
            if grad is None:
                stuck += [f"{name} has no gradient"] if watch else []
                continue
            # A slope may be near zero by chance: there, only half precision counts as too coarse.
            compares = watch and (self.recipe.source.backward or p.element_size() < 4)
            before = p.clone() if compares else None
            ready = self._ready(name, p, grad, rule)
            if isinstance(rule, Adam) and rule.fits(p, ready.g, ready.s):
                batch.append(ready)
            else:
                self._advance(ready, rule, group)
            if watch or not self.recipe.source.backward:
                self._fused(batch, rule, group)
                batch.clear()
            still = before is not None and torch.equal(before, p) and float(group["lr"]) > 0
            if still and bool(whole(grad.any())):
                stuck.append(too_coarse(name, p, group))
            del grad, ready  # or the next one would be made beside it
        self._fused(batch, rule, group)
        return stuck

    def _members(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                yield name, p, group

    def _ready(self, name: str, p: Tensor, grad: Tensor, rule: Rule) -> Ready:
        """What a step needs, the state made if it is the first."""
        if grad.is_sparse:
            raise ValueError(f"{name}: sparse gradients are not supported; build the embedding with sparse=False")
        g, s = wide(grad), self.state[p]
        if "step" not in s:
            with named_errors(name):
                s |= {"step": counter(), **self._blank(name, g, rule)}
        return Ready(name, p, g, s, int(s["step"]) + 1)

    def _fused(self, batch: list[Ready], rule: Rule, group: dict[str, Any]) -> None:
        if not batch or not isinstance(rule, Adam):
            return
        lr = -float(group["lr"]) if group["maximize"] else float(group["lr"])
        columns = [b.p for b in batch], [b.g for b in batch], [b.s for b in batch], [b.t for b in batch]
        rule.fused(*columns, lr=lr, decay=group["weight_decay"])
        for b in batch:
            b.s["step"] += 1

    def _advance(self, ready: Ready, rule: Rule, group: dict[str, Any]) -> None:
        name, p, g, s, t = ready
        with named_errors(name):
            d = rule.update(g, s, p, t)
        self._write(ready, rule, d, group)

    def _write(self, ready: Ready, rule: Rule, d: Direction, group: dict[str, Any]) -> None:
        """Decay and move the weight; only now count the step: a refused gradient must not use one up."""
        name, p, _, s, t = ready
        s["step"] += 1
        lr = float(group["lr"])
        keep = 1 - lr * group["weight_decay"]
        alpha = (lr if group["maximize"] else -lr) * rule.gain(s, t)
        move(p, d, alpha, keep, self.rounding, seed=mixed(self._seed(name), t))

    def _blank(self, name: str, g: Tensor, rule: Rule) -> State:
        return rule.init(g, self._seed(name))

    def _seed(self, name: str) -> int:
        return zlib.crc32(name.encode()) ^ self.seed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved `state_dict()` of the same parameters, in any order, under the same rules.

        Tensors keep the precision they were saved in and move to their parameter's device. Raises ValueError
        listing names that are missing, unexpected or in another role, and state that another rule has written.
        """
        index, saved_groups = by_name(state_dict)
        roles = {name: group["role"] for name, group in saved_groups.items()}
        compare({name: group["role"] for name, _, group in self._members()}, roles)
        for group in self.param_groups:
            require_one_rate(group["param_names"], saved_groups)
        state = {}
        for name, p, group in self._members():
            if saved := state_dict["state"].get(index[name]):
                blank = self._matched_blank(name, p, saved, self.rules[group["role"]])
                state[p] = {k: placed_near(p, v, like=blank[k]) for k, v in saved.items()}
        groups = [
            {"steps": 0, **saved_groups[g["param_names"][0]], "params": [index[n] for n in g["param_names"]]}
            | {"param_names": g["param_names"]}
            for g in self.param_groups
        ]
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(state)
        self.watch = self.watch and not state  # the first step of a run that goes on is none to check
        self._settle()

    def _matched_blank(self, name: str, p: Tensor, s: State, rule: Rule) -> State:
        precision = torch.float64 if p.dtype == torch.float64 else torch.float32
        g = torch.zeros_like(p, dtype=precision, device=None if is_cut(p) else "meta")
        blank = {"step": counter(), **self._blank(name, g, rule)}
        require_alike(name, rule, s, blank)
        return blank

    def report(self) -> list[dict[str, Any]]:
        """One row a parameter: name, shape, role, its rule, bytes of state and steps so far.

        For a rule in a subspace also its side and rank, the frames fitted so far (`refreshes`), and `drift`: the
        share, 0 to 1, of its directions that the last refresh gave up. None where there is nothing to say.
        """
        return [self._row(name, p, group) for name, p, group in self._members()]

    def _row(self, name: str, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        rule, s = self.rules[group["role"]], self.state.get(p, {})
        blank = dict.fromkeys(("side", "rank", "refreshes", "drift"))
        told = facts(rule, p, s) if s else {}
        return {
            "name": name,
            "shape": tuple(p.shape),
            "role": group["role"],
            "rule": repr(rule),
            "bytes": storage_bytes(s.values()),
            "steps": int(s["step"]) if s else 0,
            **blank,
            **told,
        }

    def state_bytes(self) -> int:
        """The memory that all state holds, each storage counted once and whole."""
        return storage_bytes(x for s in self.state.values() for x in s.values())


def lay_out(ready: Ready, rule: Rule) -> None:
    """Give a blank state the layout in memory that updates leave, which decides how later sums round."""
    trial = {key: x.clone() for key, x in ready.s.items()}
    for t in (1, 2):
        rule.update(ready.g, trial, ready.p, t)
    for key, x in trial.items():
        ready.s[key] = torch.empty_like(x).copy_(ready.s[key])


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


def too_coarse(name: str, p: Tensor, group: dict[str, Any]) -> str:
    """What to say of a parameter that its step was lost on."""
    return f"{name} is {p.dtype}, too coarse for steps at lr {float(group['lr']):g}"


def require_moved(stuck: list[str]) -> None:
    """Raise RuntimeError when there is something to say of the first step."""
    if stuck:
        raise RuntimeError(
            f"after the first step these have not moved: {'; '.join(stuck)}. Leave them out of named_params, "
            "or pass unmoved='allow'"
        )


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """A ValueError from inside says first which parameter it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def require_one_rate(names: list[str], saved: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError for a group some of whose members were saved with another learning rate than the others."""
    rates = {name: float(saved[name]["lr"]) for name in names}
    first = names[0]
    other = next((name for name in names if rates[name] != rates[first]), None)
    if other is not None:
        raise ValueError(
            f"{first} was saved with learning rate {rates[first]:g} and {other} with {rates[other]:g}, and here "
            "they are in one group; split the groups as when it was saved (`hasten` does so for lora_plus)"
        )
