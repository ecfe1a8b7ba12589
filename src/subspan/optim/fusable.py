"""What a fused backward pass can do for an optimizer, and the reasons for what it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from subspan.optim.optimizer import Optim
from subspan.optim.projected import Projected
from subspan.optim.rule import Rule
from subspan.optim.source import Backprop

NormKind = Literal["exact", "projected", "none"]

TOUCHED = (
    "its gradient was changed after backward(), perhaps by zero_grad() or clip_grad_norm_(), which do not see "
    "what hooks have squeezed; use discard() and clip= instead"
)


@dataclass(slots=True, eq=False)
class Slot:
    """A parameter, where it is among the groups, and what is known of its gradient since the last step."""

    name: str
    p: Tensor
    group: int
    index: int
    fires: int = 0
    r: Tensor | None = None
    norm: Tensor | None = None
    reduced: bool = False
    whole: Tensor | None = None
    version: int = 0

    def clear(self) -> None:
        """Forget all of it, p.grad too."""
        self.p.grad = self.r = self.norm = self.whole = None
        self.fires, self.reduced = 0, False

    def keep_whole(self) -> None:
        """Remember p.grad, which is to stay; raises RuntimeError if it is not the one that was remembered."""
        if self.whole is not None and self.p.grad is not self.whole:
            raise RuntimeError(f"{self.name}: {TOUCHED}")
        if self.p.grad is not None:
            self.whole, self.version = self.p.grad, self.p.grad._version

    def require_untouched(self) -> None:
        """Raise RuntimeError when p.grad was replaced or changed in place, other than by GradScaler."""
        if self.whole is not None and (self.p.grad is not self.whole or self.whole._version != self.version):
            raise RuntimeError(f"{self.name}: {TOUCHED}")


def slots_of(opt: Optim) -> list[Slot]:
    """One a parameter; raises TypeError or ValueError for an optimizer or a parameter that takes no hook."""
    if not isinstance(opt, Optim):
        raise TypeError(f"FusedBackward steps subspan's Optim, not {type(opt).__name__}")
    if not opt.recipe.source.backward:
        raise ValueError(
            f"FusedBackward: {opt.recipe.source!r} has no backward pass to hook into, and makes its gradients one "
            "at a time anyway; use opt.step(closure)"
        )
    if not isinstance(opt.recipe.source, Backprop):
        raise ValueError(
            f"FusedBackward: {opt.recipe.source!r} changes gradients after backward(), such as both of a pair at "
            "once, and a hook sees them one by one, before that; use opt.step()"
        )
    found = []
    for i, group in enumerate(opt.param_groups):
        for j, (name, p) in enumerate(zip(group["param_names"], group["params"], strict=True)):
            if type(p) not in (Tensor, Parameter):
                raise ValueError(
                    f"FusedBackward: {name} is a {type(p).__name__}; a hook would see one shard of its gradient, "
                    "which no local frame is right for; use opt.step()"
                )
            if not p.is_leaf or not (p.requires_grad or name in opt.asleep):
                raise ValueError(f"FusedBackward: {name} gets no gradient; leave it out of the optimizer")
            if p.grad is not None:
                raise ValueError(f"FusedBackward: {name} has a gradient already; call opt.zero_grad() first")
            found.append(Slot(name, p, i, j))
    return found


def hooked(p: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call hook(p) whenever p.grad has been accumulated; p may be asleep now."""
    wants, register = p.requires_grad, cast("Any", p.register_post_accumulate_grad_hook)
    p.requires_grad_(True)
    handle: RemovableHandle = register(hook)
    p.requires_grad_(wants)
    return handle


def squeezable(rule: Rule) -> bool:
    """Whether coordinates are all that the rule needs between refreshes."""
    return isinstance(rule, Projected) and not rule.residual.raw


def norm_kind(opt: Optim, *, partly: bool, clip: float | None) -> NormKind:
    """What the norm is of; raises ValueError where there is none to clip by."""
    rules = [opt.rules[group["role"]] for group in opt.param_groups]
    kept = [rule for rule in rules if isinstance(rule, Projected) and squeezable(rule)]
    if not partly or not kept:
        return "exact"
    if all(rule.subspace.orthonormal for rule in kept):
        return "projected"
    if clip is not None:
        raise ValueError(
            "FusedBackward: clip needs a norm, and coordinates in frames that are not orthonormal have another "
            "one than the gradient; leave clip out, or use accumulate=1 without group"
        )
    return "none"


def asks(*, accumulate: int, clip: float | None, scaler: GradScaler | None) -> list[str]:
    """What of the settings puts steps off until the last gradient is known."""
    return [
        name
        for name, asked in (
            (f"accumulate={accumulate}", accumulate > 1),
            (f"clip={clip}", clip is not None),
            ("scaler", scaler is not None),
        )
        if asked
    ]


def require_settings(*, accumulate: int, clip: float | None, passes: int) -> None:
    """Raise ValueError for a number outside its range."""
    if accumulate < 1:
        raise ValueError(f"FusedBackward: accumulate={accumulate!r} is less than 1; it counts backward passes")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"FusedBackward: clip={clip!r}; use a finite norm above 0, or None")
    if passes not in (1, 2):
        raise ValueError(f"FusedBackward: passes={passes!r}; use 1 or 2")


def require_passes(
    passes: int,
    *,
    clip: float | None,
    accumulate: int,
    scaler: GradScaler | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Raise ValueError for what two passes cannot do."""
    if passes == 1:
        return
    reasons = {
        "clip=None: the norm is exact in one pass, a second only serves to clip": clip is None,
        f"accumulate={accumulate}: the norm of a sum needs the whole sum": accumulate > 1,
        "scaler: an overflow of the second pass would be seen after weights have moved": scaler is not None,
        "group: each rank would measure its own gradient, not the mean": group is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"FusedBackward: passes=2 cannot be combined with {reason}; use passes=1")


def require_apart(scaler: GradScaler | None, group: dist.ProcessGroup | None) -> None:
    """Raise ValueError when both are given."""
    if scaler is not None and group is not None:
        raise ValueError(
            "FusedBackward: scaler and group cannot be combined, since ranks could disagree about an overflow; "
            "train in bfloat16, which needs no scaler, or use DistributedDataParallel and opt.step()"
        )


def require_squeezable(opt: Optim, asked: list[str]) -> None:
    """Raise ValueError unless coordinates are enough for the rule: otherwise deferring steps frees nothing."""
    roles = {group["role"] for group in opt.param_groups}
    if "rule" in roles and squeezable(opt.rules["rule"]):
        return
    what = f"{opt.rules['rule']!r} needs every gradient whole" if "rule" in roles else "no matrix is projected"
    remedies = {"a": "accumulate=1", "c": "passes=2 to clip", "s": "no scaler (bfloat16)"}
    remedy = ", ".join(remedies[one[0]] for one in asked)
    raise ValueError(
        f"FusedBackward: with {' and '.join(asked)} steps wait for the last gradient, and {what}, so none "
        f"could be freed; use {remedy}, or a rule like galore, or leave gradients in .grad and call opt.step()"
    )


def require_alike(opt: Optim, slots: list[Slot], group: dist.ProcessGroup, *, accumulate: int) -> None:
    """Raise ValueError on every rank of a group unless all are set up alike."""
    mine = {
        "seed": opt.seed,
        "recipe": repr(opt.recipe),
        "accumulate": accumulate,
        "parameters": [slot.name for slot in slots],
        "steps done": [int(opt.state[slot.p].get("step", 0)) for slot in slots],
    }
    ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, mine, group=group)
    for word, value in ranks[0].items():
        if any(rank[word] != value for rank in ranks):
            raise ValueError(
                f"FusedBackward: ranks differ in {word}: {[rank[word] for rank in ranks]}; build Optim and "
                "FusedBackward alike on all of them"
            )
