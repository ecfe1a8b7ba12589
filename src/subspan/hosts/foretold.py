"""What an adapter would put on each layer of a model, before anything is changed."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from subspan.adapt import TopInputs, adapt, trainable
from subspan.adapt.data import size_of
from subspan.compress import Calibration
from subspan.hosts.jobs import Json
from subspan.hosts.lessons import adaptable, full_args, prepared, refuse_stack
from subspan.methods import build
from subspan.select import Select


class Foretold(NamedTuple):
    """What an adapter starts with on one layer: `explains` is the share of its inputs' variance, where known."""

    shape: tuple[int, int]
    rank: int | None
    explains: float | None
    numbers: int


def foretold(
    model: nn.Module,
    method: str,
    *,
    select: Select | None = None,
    rank: int | float | None = None,
    look: Calibration | None = None,
) -> tuple[dict[str, Foretold], Json]:
    """What `lessons.learning` would put on each layer, and the preset's arguments; the model stays as it is.

    One layer's adapter is there at a time. Raises what `learning` raises for an adapter.
    """
    if isinstance(rank, float):
        raise ValueError(f"rank {rank} is a share, and {method} takes a count, such as 8")
    refuse_stack(model, method)
    args = full_args(method, rank=rank)
    start, names = prepared(build(method, "adapter", **args), model, adaptable(model, select), look)
    op = start.op if isinstance(start.op, TopInputs) else None
    rows = {}
    for name in names:
        layer = adapt(start)(name, model.get_submodule(name))
        numbers = sum(p.numel() for _, p in trainable(layer))
        count = args.get("rank") if op is None else op.ranks[name]
        explains = None if op is None else float(op.shares[name][:count].sum())
        rows[name] = Foretold(size_of(name, layer), count, explains, numbers)
    return rows, args
