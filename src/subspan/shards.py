"""Tensors cut over processes: what `torch.distributed.tensor` does not decide by itself. No-ops on plain tensors.

Rules are plain torch operations, which DTensor dispatches. Left to the functions here: a sum that is still
pending on every process, numbers that all processes drew alike, and operations without a DTensor rule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

TENSORS = "torch.distributed.tensor"


def is_cut(x: Tensor) -> TypeGuard[DTensor]:
    """Whether x is a DTensor; their module, slow to import, is loaded if there is one.

    >>> is_cut(torch.ones(2))
    False
    """
    loaded = sys.modules.get(TENSORS)
    return loaded is not None and isinstance(x, loaded.DTensor)


def is_cut_along(x: Tensor, axis: int) -> bool:
    """Whether the processes hold different parts along an axis, counted from the end: -1, -2, ..."""
    return is_cut(x) and any(place.is_shard(x.ndim + axis) for place in x.placements)


def cut_alike(*xs: Tensor) -> bool:
    """Whether all are cut in one way, or none is."""
    ways = [(x.device_mesh, x.placements) if is_cut(x) else None for x in xs]
    return all(way == ways[0] for way in ways)


def cut_number(x: Tensor) -> int:
    """Which of the parts this process holds, from 0; copies of one part share a number."""
    number = 0
    if not is_cut(x):
        return number
    for i, place in enumerate(x.placements):
        if place.is_shard():
            number = number * x.device_mesh.size(i) + x.device_mesh.get_local_rank(i)
    return number


def spread(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that is the same on all processes, made to work with like; nothing is sent."""
    if is_cut(x) or not is_cut(like):
        return x
    places = [sys.modules[TENSORS].Replicate()] * like.device_mesh.ndim
    return rebuilt(x, like, places, x.shape)


def laid(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that is the same on all processes, cut as like is; nothing is sent."""
    x = spread(x, like)
    return x.redistribute(placements=like.placements) if is_cut(like) and is_cut(x) else x


def whole(x: Tensor) -> Tensor:
    """The plain tensor, gathered or summed from all processes: for what is small."""
    return x.full_tensor() if is_cut(x) else x


def settled(x: Tensor, axis: int | None = None) -> Tensor:
    """Pending sums done: the result cut along an axis (counted from the end), or, for None, whole everywhere."""
    if not is_cut(x) or not any(place.is_partial() for place in x.placements):
        return x
    module = sys.modules[TENSORS]
    place = module.Replicate() if axis is None else module.Shard(x.ndim + axis)
    return x.redistribute(placements=[place if old.is_partial() else old for old in x.placements])


def recut(x: Tensor, like: Tensor) -> Tensor:
    """The tensor cut as like is, if they have one shape."""
    if is_cut(x) and is_cut(like) and x.shape == like.shape and x.placements != like.placements:
        return x.redistribute(placements=like.placements)
    return x


def joined(x: Tensor, axis: int) -> Tensor:
    """The tensor with no process missing a part along an axis, counted from the end."""
    if not is_cut(x):
        return x
    here = sys.modules[TENSORS].Replicate()
    return x.redistribute(placements=[here if old.is_shard(x.ndim + axis) else old for old in x.placements])


def local(x: Tensor) -> Tensor:
    """This process's part, in the same memory."""
    return x.to_local() if is_cut(x) else x


def locally(f: Callable[[Tensor], Tensor], x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """f on each process's part, for an f that treats what is cut apart alike; `shape` is the whole result's."""
    if not is_cut(x):
        return f(x)
    return rebuilt(f(x.to_local()), x, x.placements, x.shape if shape is None else shape)


def by_rows(f: Callable[[Tensor], dict[str, Tensor]], x: Tensor) -> dict[str, Tensor]:
    """What f makes of x (..., m, n), for an f that treats each row alone; a vector is one row, held by all."""
    if not is_cut(x):
        return f(x)
    module = sys.modules[TENSORS]
    rows = module.Shard(x.ndim - 2) if x.ndim > 1 else module.Replicate()
    x = x.redistribute(placements=[rows if old.is_shard(x.ndim - 1) else old for old in x.placements])
    made = f(x.to_local())
    return {key: rebuilt(part, x, x.placements, (*x.shape[:-1], part.shape[-1])) for key, part in made.items()}


def from_rows(f: Callable[[dict[str, Tensor]], Tensor], s: Mapping[str, Tensor]) -> Tensor:
    """The tensor that f makes of what `by_rows` made, each row of it alone."""
    like = next(iter(s.values()))
    part = f({key: local(x) for key, x in s.items()})
    return rebuilt(part, like, like.placements, (*like.shape[:-1], part.shape[-1])) if is_cut(like) else part


def largest(x: Tensor, axis: int) -> Tensor:
    """The largest magnitudes along an axis, counted from the end."""
    if not is_cut(x):
        return torch.linalg.vector_norm(x, torch.inf, axis)  # type: ignore[no-any-return]
    part, shape = local(x).abs(), list(x.shape)
    del shape[axis]
    # a process without rows has no maximum of them
    part = part.amax(axis) if part.shape[axis] else part.sum(axis)
    module = sys.modules[TENSORS]
    along = x.ndim + axis

    def after(place: Any) -> Any:
        if not place.is_shard():
            return place
        return module.Partial("max") if place.dim == along else module.Shard(place.dim - (place.dim > along))

    return settled(rebuilt(part, x, [after(place) for place in x.placements], shape))


def zeros_beside(g: Tensor, width: int) -> Tensor:
    """Zeros (..., m, width) whose rows lie where those of g (..., m, n) do."""
    if not is_cut(g):
        return g.new_zeros(*g.shape[:-1], width)
    here = sys.modules[TENSORS].Replicate()
    places = [old if old.is_shard() and old.dim != g.ndim - 1 else here for old in g.placements]  # type: ignore[attr-defined]
    part = local(g)
    return rebuilt(part.new_zeros(*part.shape[:-1], width), g, places, (*g.shape[:-1], width))


def picked(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """The entries numbered by index (ascending) along an axis, -1 or -2.

    Where the processes hold different ones, each picks its own and the other axis of the result is cut instead.
    """
    if not is_cut(x):
        return x.index_select(axis, index)
    shape = list(x.shape)
    shape[axis] = len(index)
    if not is_cut_along(x, axis):
        return locally(lambda part: part.index_select(axis, index), x, shape)
    at, mine = here(index, x, axis)
    part = local(x)
    out = part.new_zeros([*part.shape[:-2], *(len(index) if a == axis else part.shape[a] for a in (-2, -1))])
    out.index_copy_(axis, mine, part.index_select(axis, at))
    pending = sys.modules[TENSORS].Partial()
    places = [pending if place.is_shard(x.ndim + axis) else place for place in x.placements]
    return settled(rebuilt(out, x, places, shape), -3 - axis)


def add_product(w: Tensor, left: Tensor, right: Tensor, *, alpha: float) -> None:
    """Add alpha left @ right to w in place: each process forms its own part, for which only factors move."""
    left, right = beside(left, w, -2), beside(right, w, -1)
    part = local(w)
    if w.ndim == 2:
        part.addmm_(left, right, alpha=alpha)
    else:
        part.add_(left @ right, alpha=alpha)


def beside(x: Tensor, w: Tensor, *axes: int) -> Tensor:
    """This process's part of x, cut as w is along its batch and these axes, and whole along the others."""
    if not is_cut(w):
        return x
    whole_here = sys.modules[TENSORS].Replicate()
    kept = {*range(w.ndim - 2), *(w.ndim + axis for axis in axes)}
    places = [old if any(old.is_shard(axis) for axis in kept) else whole_here for old in w.placements]
    x = spread(x, w)
    return local(x.redistribute(placements=places)) if is_cut(x) else x


def add_picked(w: Tensor, index: Tensor, x: Tensor, *, axis: int, alpha: float) -> None:
    """Add alpha x to the entries of w numbered by index (ascending) along an axis, -1 or -2, in place."""
    if not is_cut(w):
        w.index_add_(axis, index, x, alpha=alpha)
        return
    part = beside(x, w, -3 - axis)
    if is_cut_along(w, axis):
        index, mine = here(index, w, axis)
        part = part.index_select(axis, mine)
    local(w).index_add_(axis, index, part, alpha=alpha)


def among_zeros(x: Tensor, index: Tensor, size: int, *, axis: int) -> Tensor:
    """The tensor of that size along an axis, x at the numbers in index and zero elsewhere."""
    shape = list(x.shape)
    shape[axis] = size
    x = joined(x, axis)

    def filled(part: Tensor) -> Tensor:
        wide_shape = list(part.shape)
        wide_shape[axis] = size
        return part.new_zeros(wide_shape).index_copy_(axis, index, part)

    return locally(filled, x, shape)


def here(index: Tensor, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Of the numbers in index (ascending) those that this process holds of x: as its own, and their places."""
    held = numbers(x, axis)
    if not len(held):
        return held, held
    mine = torch.nonzero((index >= held[0]) & (index <= held[-1]))[:, 0]
    return index[mine] - held[0], mine


def numbers(x: Tensor, axis: int) -> Tensor:
    """The positions in the whole, ascending, of this process's entries along an axis, counted from the end."""
    count = torch.arange(x.shape[axis], device=local(x).device)
    if not is_cut(x):
        return count
    module = sys.modules[TENSORS]
    along = [module.Shard(0) if place.is_shard(x.ndim + axis) else module.Replicate() for place in x.placements]
    return local(module.distribute_tensor(count, x.device_mesh, along, src_data_rank=None))


def rebuilt(part: Tensor, like: Tensor, places: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """A DTensor of that shape from this process's part, laid out in memory as the part is."""
    if not is_cut(like):
        return part
    return type(like).from_local(
        part, like.device_mesh, places, run_check=False, shape=torch.Size(shape), stride=strides(part, shape)
    )


def strides(part: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a whole tensor that lies in memory in the order of its part's dimensions."""
    order = sorted(range(part.ndim), key=lambda axis: (part.stride(axis), -axis), reverse=True)
    steps, step = [0] * part.ndim, 1
    for axis in reversed(order):
        steps[axis] = step
        step *= max(shape[axis], 1)
    return tuple(steps)
