"""Gradients over parameters, devices and processes: their norm, their mean, and tensors that carry them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import vector_norm

from subspan.optim.state import by_columns


def size(x: Tensor) -> Tensor:
    """The norm of x, 0-dimensional, summed in float32 or better."""
    full = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    norm: Tensor = vector_norm(x, dtype=full)
    return norm


def total(norms: list[Tensor]) -> Tensor:
    """The norm of all from the norms of parts, on the first one's device."""
    wide = torch.float64 if any(x.dtype == torch.float64 for x in norms) else torch.float32
    by_device: dict[torch.device, list[Tensor]] = {}
    for x in norms:
        by_device.setdefault(x.device, []).append(x.to(wide))
    parts = [size(torch.stack(found)) for found in by_device.values()]
    return size(torch.stack([part.to(norms[0].device) for part in parts]))


def carrier(x: Tensor) -> Tensor:
    """A tensor of x's shape, without memory for it, whose .grad is x."""
    holder = x.new_empty(()).expand(x.shape)
    holder.grad = x
    return holder


def mean_over(group: dist.ProcessGroup, x: Tensor) -> int:
    """x <- its mean over the processes of a group; returns the bytes that this one gave."""
    x.div_(dist.get_world_size(group))
    flat = x.mT if x.ndim > 1 and by_columns(x) else x.contiguous()
    dist.all_reduce(flat, group=group)
    if flat.data_ptr() != x.data_ptr():
        x.copy_(flat)
    return flat.nbytes
