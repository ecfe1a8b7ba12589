"""`FusedBackward`: gradients are used, or squeezed, and freed while the backward pass still runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.utils.hooks import RemovableHandle

from subspan.optim.fusable import (
    NormKind,
    Slot,
    asks,
    hooked,
    norm_kind,
    require_alike,
    require_apart,
    require_passes,
    require_settings,
    require_squeezable,
    slots_of,
)
from subspan.optim.gradients import carrier, mean_over, size, total
from subspan.optim.optimizer import Optim, require_moved, too_coarse
from subspan.optim.state import storage_bytes


class FusedBackward:
    """Steps `opt` from hooks of the backward pass, so that no or few whole gradients exist at a time.

        fused = FusedBackward(opt)
        for batch in batches:
            loss(batch).backward()
            fused.step()            # once an optimizer step, where opt.step() was; opt.step() itself is refused

    At once (nothing asked): each parameter moves inside its hook and its gradient is freed; for every rule, bit
    for bit what opt.step() does. `fused.step()` closes the step and fills in `norm`.

    Deferred (`accumulate` > 1, `clip` or an enabled `scaler`): the hook keeps down(g), which is linear in g, adds
    it up over the micro-batches and frees g; `fused.step()` moves the weights. Only parameters of other rules
    (role "other") and those whose frame is due at this step keep their gradient whole until then: with `Every`
    that is all of them at step 1 and once an interval, with `Staggered` at step 1, and then a few at a time.
    Gradients are summed, as torch does: divide the loss by `accumulate` for a mean. Rules that need every gradient
    whole are refused here. Code that reads or changes `.grad` after backward() sees little or nothing; clip here.

    `norm` is the norm of the gradient over all parameters, before clipping, and `norm_kind` says of what:
    "exact", of the gradient itself, in one pass whenever accumulate = 1 on one process, as each is seen whole
    before it is squeezed; scaling coordinates by min(1, clip / (norm + 1e-6)) is then exactly
    clip_grad_norm_ and opt.step(). "projected", with accumulate > 1 or a process group: of what was kept, which is
    at most the exact one, and equal to it where nothing was outside the frames. The norm of a sum needs the whole
    sum, so no second pass could make that exact. "none" (`norm` is None): such a case with frames that are not
    orthonormal. passes=2 clips exactly at once, for every rule, at the price of a second backward pass:

        with fused.measuring():
            loss(batch).backward()  # frees every gradient, moves nothing
        loss(batch).backward()      # the same batch again, with the same random numbers
        fused.step()

    With a `scaler` the loop is torch's: scaler.scale(loss).backward(), scaler.step(fused), scaler.update().

    With a process `group` do not wrap the model in DistributedDataParallel: its all-reduce comes after these
    hooks. They take the mean over the group themselves, of coordinates where those are enough, blocking; all
    ranks must use the same parameters in the same order. Parameters start as rank 0's; buffers are left alone.
    `sent_bytes` counts what the last step gave to all-reduce, `whole_bytes` what whole gradients are.

    Parameters on several devices work. Raises ValueError for what cannot be combined.

    >>> from subspan.optim import Adam
    >>> model = torch.nn.Linear(3, 2)
    >>> fused = FusedBackward(Optim(model.named_parameters(), Adam(), lr=1e-3))
    >>> model(torch.ones(1, 3)).sum().backward()
    >>> model.weight.grad is None
    True
    >>> fused.step()
    >>> round(float(fused.norm) ** 2, 3)
    8.0
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves scale and overflow to `step`

    def __init__(
        self,
        opt: Optim,
        *,
        accumulate: int = 1,
        clip: float | None = None,
        scaler: GradScaler | None = None,
        passes: Literal[1, 2] = 1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        require_settings(accumulate=accumulate, clip=clip, passes=passes)
        asked = asks(accumulate=accumulate, clip=clip if passes == 1 else None, scaler=scaler)
        require_passes(passes, clip=clip, accumulate=accumulate, scaler=scaler, group=group)
        require_apart(scaler, group)
        self.opt, self.accumulate, self.clip, self.scaler, self.passes = opt, accumulate, clip, scaler, passes
        self.deferred = bool(asked)
        self.slots = slots_of(opt)
        if self.deferred:
            require_squeezable(opt, asked)
        self._group = group
        self.norm_kind: NormKind = norm_kind(opt, partly=accumulate > 1 or group is not None, clip=clip)
        self.norm: Tensor | None = None
        self.sent_bytes, self._sent = 0, 0
        self.whole_bytes = sum(slot.p.nbytes for slot in self.slots)
        self._stuck: list[str] = []
        self._measuring, self._finishing = False, False
        self._measured: Tensor | None = None
        if group is not None:
            require_alike(opt, self.slots, group, accumulate=accumulate)
            for slot in self.slots:
                dist.broadcast(slot.p.data, src=dist.get_global_rank(group, 0), group=group)
        self._handles: list[RemovableHandle] = [opt.register_step_pre_hook(self._refuse_step)]
        self._handles += [hooked(slot.p, partial(self._hook, slot)) for slot in self.slots]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.discard()
        self.remove()

    def remove(self) -> None:
        """Take the hooks away; raises RuntimeError, having done so, if a backward pass was not stepped."""
        for handle in self._handles:
            handle.remove()
        pending = any(slot.fires for slot in self.slots)
        self.discard()
        if pending:
            raise RuntimeError("FusedBackward was removed between backward() and step(); call step() or discard()")

    def discard(self) -> None:
        """Drop the gradients since the last step, and the coordinates that were kept of them."""
        for slot in self.slots:
            slot.clear()
        self._measured, self._sent = None, 0
        self._stuck.clear()

    def held_bytes(self) -> int:
        """The memory of all gradients and coordinates that are kept at this moment."""
        return storage_bytes(x for slot in self.slots for x in (slot.r, slot.p.grad) if x is not None)

    @torch.no_grad()
    def step(self, *, partial: bool = False) -> None:
        """Finish one optimizer step, after `accumulate` backward passes; partial=True allows fewer.

        Raises RuntimeError for another number of passes, under a scaler that did not call this, and at the first
        step, as `Optim.step` does, for parameters that got no gradient or did not move.
        """
        scale, overflow = self._scaling()
        self._require_passes(partial)
        for slot in self.slots:
            slot.require_untouched()
            self._reduce_kept(slot)
        self.norm = self._norm(scale)
        if overflow:
            self.discard()
            return
        self._require_same_norm()
        if self.deferred:
            self._apply(self._factor(self.norm, scale))
        self._close()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """For passes=2: backward passes inside only measure the gradient's norm, and free it."""
        if self.passes != 2:
            raise RuntimeError("FusedBackward.measuring() is the first of two passes; construct with passes=2")
        if any(slot.fires for slot in self.slots):
            raise RuntimeError("FusedBackward.measuring() came between backward() and step(); call step() first")
        self._measuring = True
        try:
            yield
            self._measured = self._norm(None)
        finally:
            self._measuring = False
            for slot in self.slots:
                slot.clear()
        if self._measured is None:
            raise RuntimeError("FusedBackward.measuring() saw no backward pass; call backward() inside it")

    @property
    def param_groups(self) -> list[dict[str, list[Tensor]]]:
        """What GradScaler reads: tensors whose .grad is what was kept, and norms of what was not."""
        kept = [slot.p for slot in self.slots if slot.p.grad is not None]
        rest = [x for slot in self.slots for x in (slot.r, slot.norm) if x is not None]
        return [{"params": kept + [carrier(x) for x in rest]}]

    # ---- during the backward pass

    @torch.no_grad()
    def _hook(self, slot: Slot, p: Tensor) -> None:
        g = self._gradient(slot)
        if self._measuring:
            slot.norm, p.grad = size(g), None
            return
        factor = self._second_pass_factor(slot)
        slot.fires += 1
        if self._group is None and (self.accumulate == 1 or self.scaler is not None):
            # Sums of norms are as finite as all they saw, which is what a scaler asks.
            slot.norm = size(g) if slot.norm is None else slot.norm + size(g)
        squeezes = self.deferred or self._group is not None
        r = self.opt.squeeze(slot.name, p, g, self._group_of(slot)) if squeezes else None
        if self.deferred:
            self._keep(slot, r)
        else:
            self._at_once(slot, g if r is None else r, factor, squeezed=r is not None)

    def _gradient(self, slot: Slot) -> Tensor:
        if slot.p.grad is None:
            raise RuntimeError(
                f"{slot.name}: another hook has taken the gradient; remove() the other FusedBackward first"
            )
        done = slot.norm is not None if self._measuring else slot.fires == self.accumulate
        if done:
            slot.p.grad = None
            raise RuntimeError(
                f"{slot.name} has a gradient of one backward pass more than accumulate={self.accumulate}; call "
                "step() in between (with a scaler: scaler.step(fused)), or discard() to drop the earlier ones"
            )
        return slot.p.grad

    def _keep(self, slot: Slot, r: Tensor | None) -> None:
        if r is not None:
            slot.r = r if slot.r is None else slot.r.add_(r)
            slot.p.grad = None
        else:
            slot.keep_whole()
        if slot.fires == self.accumulate:
            self._reduce_kept(slot)

    def _at_once(self, slot: Slot, x: Tensor, factor: Tensor | None, *, squeezed: bool) -> None:
        if self._group is not None:
            self._reduce(x)
            slot.norm = size(x)
        if factor is not None:
            x.mul_(factor.to(x.device))
        self._move(slot, x, squeezed=squeezed)
        slot.p.grad = None

    def _move(self, slot: Slot, x: Tensor, *, squeezed: bool) -> None:
        group = self._group_of(slot)
        before = slot.p.clone() if self._watches() else None
        self.opt.advance(slot.name, slot.p, x, group, squeezed=squeezed)
        if before is not None and torch.equal(before, slot.p) and float(group["lr"]) > 0 and bool(x.any()):
            self._stuck.append(too_coarse(slot.name, slot.p, group))

    def _group_of(self, slot: Slot) -> dict[str, Any]:
        """Looked up each time: a loaded state brings new groups."""
        group = self.opt.param_groups[slot.group] if slot.group < len(self.opt.param_groups) else {"params": ()}
        if slot.index >= len(group["params"]) or group["params"][slot.index] is not slot.p:
            raise RuntimeError(f"{slot.name} is in another group than when FusedBackward was made; make it anew")
        return group

    def _second_pass_factor(self, slot: Slot) -> Tensor | None:
        if self.passes == 1:
            return None
        if self._measured is None:
            slot.p.grad = None
            raise RuntimeError("with passes=2 the first backward() goes inside `with fused.measuring():`")
        return self._factor(self._measured, None)

    # ---- at the step

    def _scaling(self) -> tuple[Tensor | None, bool]:
        """What GradScaler.step has put here: the scale still in the gradients, and whether they overflowed."""
        scale, overflow = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        if self.scaler is None and overflow is not None:
            raise RuntimeError("FusedBackward knows of no scaler; construct it with scaler=")
        if self.scaler is not None and overflow is None:
            raise RuntimeError("gradients are scaled; call scaler.step(fused), which calls fused.step()")
        return scale, bool(overflow)

    def _require_passes(self, partial: bool) -> None:
        fires = max(slot.fires for slot in self.slots)
        if not fires:
            raise RuntimeError("step() found no gradient; call it once after backward()")
        if fires < self.accumulate and not partial:
            raise RuntimeError(
                f"step() came after {fires} of accumulate={self.accumulate} backward passes; call it once an "
                "optimizer step, or step(partial=True) where the data ends"
            )
        if sum(len(group["params"]) for group in self.opt.param_groups) != len(self.slots):
            raise RuntimeError("the optimizer got more parameters since FusedBackward was made; make it anew")

    def _norm(self, scale: Tensor | None) -> Tensor | None:
        """The norm over all parameters, each device's summed there; without waiting for any."""
        seen = self.accumulate == 1 and self._group is None
        found = [self._norm_of(slot, seen=seen) for slot in self.slots]
        norms = [x for x in found if x is not None]
        if self.norm_kind == "none" or not norms:
            return None
        norm = total(norms)
        return norm if scale is None else norm / scale.to(norm.device)

    def _norm_of(self, slot: Slot, *, seen: bool) -> Tensor | None:
        if seen or not self.deferred:
            return slot.norm
        kept = slot.p.grad if slot.r is None else slot.r
        return None if kept is None else size(kept)

    def _factor(self, norm: Tensor | None, scale: Tensor | None) -> Tensor | None:
        """What gradients are multiplied by: torch's factor for clipping, over the scale."""
        factor = None if scale is None else 1 / scale
        if self.clip is None or norm is None:
            return factor
        clip = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        return clip if factor is None else clip * factor.to(clip.device)

    def _require_same_norm(self) -> None:
        if self._measured is not None and self.norm is not None:
            first, second = float(self._measured), float(self.norm)
            if not math.isclose(first, second, rel_tol=1e-2):
                raise RuntimeError(
                    f"the two passes saw gradients of norm {first:g} and {second:g}, so the clipping was wrong, "
                    "and the weights have moved; give both the same batch and random numbers (dropout)"
                )

    def _apply(self, factor: Tensor | None) -> None:
        """Move by coordinates; gradients kept whole are left to opt.step(), unless one by one is asked."""
        near: dict[torch.device, Tensor] = {}
        for slot in self.slots:
            x = slot.p.grad if slot.r is None else slot.r
            if x is None:
                continue
            if factor is not None:
                x.mul_(near.setdefault(x.device, factor.to(x.device)))
            if slot.r is not None or self._watches():
                self._move(slot, x, squeezed=slot.r is not None)
                slot.r = slot.p.grad = None

    def _close(self) -> None:
        """Let opt.step() step what is left, so that schedulers and hooks see a step; then forget."""
        watch = self._watches()
        silent = [s.name for s in self.slots if watch and not s.fires and s.name not in self.opt.asleep]
        stuck = [f"{name} has no gradient" for name in silent] + self._stuck
        still_watching, self.opt.watch, self._finishing = self.opt.watch and not watch, False, True
        try:
            self.opt.step()
        finally:
            self.opt.watch, self._finishing = still_watching, False
        self.sent_bytes = self._sent
        self.discard()
        require_moved(stuck)

    def _watches(self) -> bool:
        return self.opt.watch and any(float(group["lr"]) > 0 for group in self.opt.param_groups)

    def _refuse_step(self, *_: object) -> None:
        if not self._finishing:
            raise RuntimeError(
                "opt.step() was called while FusedBackward holds its gradients; call fused.step(), "
                "scaler.step(fused), or fused.remove() first"
            )

    # ---- several processes

    def _reduce_kept(self, slot: Slot) -> None:
        kept = slot.p.grad if slot.r is None else slot.r
        if self._group is not None and kept is not None and not slot.reduced:
            self._reduce(kept)
            slot.reduced = True
            if slot.r is None:
                slot.keep_whole()

    def _reduce(self, x: Tensor) -> None:
        if self._group is not None:
            self._sent += mean_over(self._group, x)
