"""`reduce_projected`: processes that train copies of a model exchange coordinates instead of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from subspan.optim.optimizer import Optim
from subspan.optim.projected import Projected
from subspan.optim.source import Backprop
from subspan.optim.state import Scope


@dataclass(slots=True)
class Traffic:
    """Bytes that each process has given to be summed, and what whole gradients would have been.

    >>> print(Traffic(sent=250, whole=1000))
    250 of 1,000 bytes, 75.0% saved
    """

    sent: int = 0
    whole: int = 0

    @property
    def saved(self) -> int:
        """The difference."""
        return self.whole - self.sent

    def __str__(self) -> str:
        return f"{self.sent:,} of {self.whole:,} bytes, {self.saved / max(self.whole, 1):.1%} saved"


def reduce_projected(model: DistributedDataParallel, opt: Optim) -> Traffic:
    """Average only the coordinates of gradients whose step needs no more; returns a running count of bytes.

        mean_k(q^T g_k) = q^T mean_k(g_k)

    so the steps are those of whole gradients, up to rounding. p.grad becomes q q^T mean_k(g_k), whose coordinates
    are the same; it is shorter, which a limit on gradient norms will see. Whole gradients are averaged for
    parameters without a subspace, at a refresh, for residuals that look outside, and for frames that are not
    orthonormal. Call it once, before the first step; raises TypeError for a model that is not DDP's, and
    ValueError for a source that changes gradients after backward().
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"reduce_projected works on DistributedDataParallel(model), not {type(model).__name__}; wrap the "
            "model. With FSDP the optimizer keeps gradients cut, and needs no hook"
        )
    if not isinstance(opt.recipe.source, Backprop):
        raise ValueError(
            f"reduce_projected: {opt.recipe.source!r} changes whole gradients, which would be projected before "
            "that; leave the reduction to DistributedDataParallel"
        )
    exchange = Exchange(opt, model.process_group, Traffic())
    model.register_comm_hook(exchange, lambda state, bucket: averaged(state, bucket))  # torch reads annotations
    return exchange.traffic


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the hook knows."""

    opt: Optim
    group: dist.ProcessGroup
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class Parcel:
    """One gradient of a bucket, what is sent of it, and the rule's state where that is its coordinates."""

    g: Tensor
    x: Tensor
    rule: Projected | None
    frame: Scope | None

    def open(self, mean: Tensor) -> None:
        """Write the mean over processes into the gradient."""
        if self.rule is None or self.frame is None:
            self.g.copy_(mean.view_as(self.g))
            return
        lifted = self.rule.subspace.up(mean.view(self.x.shape), self.frame).dense()
        self.g.copy_(lifted.mT if self.rule.flips(self.g) else lifted)


class Bucket(Protocol):
    """What torch gives a hook: some parameters, their gradients, and the one tensor those are views of."""

    def parameters(self) -> list[Tensor]: ...
    def gradients(self) -> list[Tensor]: ...
    def buffer(self) -> Tensor: ...


@torch.no_grad()
def averaged(exchange: Exchange, bucket: Bucket) -> Future[Tensor]:
    """The hook: one sum over processes a bucket."""
    buffer = bucket.buffer()
    owners = {p: (name, group) for name, p, group in exchange.opt._members()}
    pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
    parcels = [parcel(exchange.opt, *owners.get(p, ("", {})), p, g) for p, g in pairs]
    flat = torch.cat([item.x.to(buffer.dtype).flatten() for item in parcels]).div_(exchange.group.size())
    exchange.traffic.sent += flat.nbytes
    exchange.traffic.whole += buffer.nbytes

    @torch.no_grad()
    def opened(done: Future[list[Tensor]]) -> Tensor:
        means = torch.split(done.value()[0], [item.x.numel() for item in parcels])
        for item, mean in zip(parcels, means, strict=True):
            item.open(mean.to(item.x.dtype))
        return buffer

    summed = dist.all_reduce(flat, group=exchange.group, async_op=True)
    future: Future[Tensor] = summed.get_future().then(opened)
    return future


def parcel(opt: Optim, name: str, group: dict[str, Any], p: Tensor, g: Tensor) -> Parcel:
    """What to send of one gradient."""
    rule = opt.rules[group["role"]] if group else None
    if isinstance(rule, Projected) and rule.subspace.orthonormal:
        x = opt.squeeze(name, p, g, group)
        if x is not None:
            return Parcel(g, x, rule, Scope(opt.state[p], "frame"))
    return Parcel(g, g, None, None)
