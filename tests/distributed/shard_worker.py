"""The functions of subspan.shards on tensors cut over two processes: `python shard_worker.py FOLDER`.

Every recipe runs twice, with plain tensors and with cut ones. Each process leaves RANK.pt in the folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from subspan import shards

WORLD, RANK = 2, 2
# The parts are equal, unequal, and none for the second process; None is a copy on both.
CASES = [
    *(((4, 6), axis) for axis in (-1, -2, None)),
    *(((5, 3), axis) for axis in (-1, -2)),
    ((1, 3), -2),
    *(((3, 4, 5), axis) for axis in (-1, -2, -3, None)),
]
Lay = Callable[..., Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(x: Tensor, axis: int | None) -> Tensor:
    return x.clone()


def cut(x: Tensor, axis: int | None, mesh: DeviceMesh) -> Tensor:
    place = Replicate() if axis is None else Shard(x.ndim + axis)
    return distribute_tensor(x.clone(), mesh, [place], src_data_rank=None)


def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def place(x: Tensor) -> int | str | None:
    """The axis x is cut along, from its end; None for copies."""
    if not isinstance(x, DTensor):
        return "plain"
    (at,) = x.placements
    return "pending" if at.is_partial() else at.dim - x.ndim if at.is_shard() else None


def indices(size: int) -> dict[str, Tensor]:
    """Every second number, and the last one alone, of which the first process has nothing."""
    return {"odd": torch.arange(size)[::2], "last": torch.arange(size)[-1:]}


def apart(x: Tensor) -> dict[str, Tensor]:
    return {"sums": x.cumsum(-1), "first": x[..., :1]}


def together(s: dict[str, Tensor]) -> Tensor:
    return s["sums"].diff(dim=-1, prepend=torch.zeros_like(s["first"])) * s["first"]


def layouts(lay: Lay, x: Tensor, axis: int | None) -> Iterator[tuple[str, Tensor]]:
    """What only moves: the value stays."""
    w, small = lay(x, axis), x[..., :1, :]
    yield "whole", shards.whole(w)
    yield "spread", shards.spread(x.clone(), w)
    yield "spread a row", shards.spread(small.clone(), w)
    yield "laid", shards.laid(x.clone(), w)
    for other in (-1, -2, None):
        yield f"recut {other}", shards.recut(w, lay(x, other))
    for other in (-1, -2):
        yield f"joined {other}", shards.joined(w, other)
    yield "recut another shape", shards.recut(w, lay(x[..., :1], None))


def sums(lay: Lay, x: Tensor, axis: int | None) -> Iterator[tuple[str, Tensor]]:
    """Sums over the cut axis, pending on both processes until they are settled."""
    w = lay(x, axis)
    yield "pending", w.mT @ w
    for other in (None, -1, -2):
        yield f"settled {other}", shards.settled(w.mT @ w, other)


def maps(lay: Lay, x: Tensor, axis: int | None) -> Iterator[tuple[str, Tensor]]:
    """Functions of parts, of rows, and maxima."""
    w = lay(x, axis)
    along = -2 if axis == -1 else -1
    yield "locally", shards.locally(lambda part: part.cumsum(along), w)
    shape = list(x.shape)
    shape[along] *= 2
    yield "locally wider", shards.locally(lambda part: torch.cat([part, part], along), w, shape)
    made = shards.by_rows(apart, w)
    yield from ((f"by_rows {key}", part) for key, part in made.items())
    yield "from_rows", shards.from_rows(together, made)
    row = shards.by_rows(apart, lay(x.flatten(), None if axis is None else -1))
    yield from ((f"by_rows {key} of a vector", part) for key, part in row.items())
    for other in (-1, -2):
        yield f"largest {other}", shards.largest(w, other)
    yield "zeros_beside", shards.zeros_beside(w, 7)


def products(lay: Lay, x: Tensor, axis: int | None) -> Iterator[tuple[str, Tensor]]:
    """w + alpha left @ right, the factors whole or cut in any way."""
    left, right = rand(*x.shape[:-1], RANK, seed=1), rand(*x.shape[:-2], RANK, x.shape[-1], seed=2)
    factors = {
        "plain": (left, right),
        "alike": (lay(left, axis), lay(right, axis)),
        "apart": (lay(left, -1), lay(right, -2)),
    }
    for name, (a, b) in factors.items():
        w = lay(x, axis)
        shards.add_product(w, a, b, alpha=-0.5)
        yield f"add_product {name}", w


def entries(lay: Lay, x: Tensor, axis: int | None) -> Iterator[tuple[str, Tensor]]:
    """Rows or columns picked out, put among zeros, and added."""
    for along in (-1, -2):
        for name, index in indices(x.shape[along]).items():
            w = lay(x, axis)
            some = shards.picked(w, index, along)
            yield f"picked {along} {name}", some
            yield f"among_zeros {along} {name}", shards.among_zeros(some, index, x.shape[along], axis=along)
            shards.add_picked(w, index, some, axis=along, alpha=3.0)
            yield f"add_picked {along} {name}", w
            w = lay(x, axis)
            shards.add_picked(w, index, full(some), axis=along, alpha=3.0)
            yield f"add_picked {along} {name} plain", w


RECIPES = (layouts, sums, maps, products, entries)


def parts(x: Tensor, axis: int | None, mesh: DeviceMesh) -> dict[str, object]:
    """What this process alone holds of x."""
    w, found = cut(x, axis, mesh), {}
    found["local"] = shards.local(w).clone()
    shards.local(w).mul_(2)
    found["doubled"] = full(w)
    for along in (-1, -2):
        found["numbers", along] = shards.numbers(w, along)
        found["here", along] = {
            name: shards.here(index, w, along) for name, index in indices(x.shape[along]).items()
        }
    for axes in ((), (-1,), (-2,), (-2, -1)):
        found["beside", axes] = shards.beside(x.clone(), w, *axes)
    found["cut_number"] = shards.cut_number(w)
    found["is_cut"] = shards.is_cut(w)
    found["is_cut_along"] = [along for along in range(-x.ndim, 0) if shards.is_cut_along(w, along)]
    others = {"same": w + 1, "copies": cut(x, None, mesh), "rows": cut(x, -2, mesh), "plain": x}
    found["cut_alike"] = [name for name, other in others.items() if shards.cut_alike(w, w, other)]
    return found


def sent(x: Tensor, axis: int | None, mesh: DeviceMesh) -> dict[str, int]:
    """How often the processes spoke to each other."""
    w, counts = cut(x, axis, mesh), {}
    same = shards.spread(x, w)
    does = {
        "spread": partial(shards.spread, x, w),
        "laid": partial(shards.laid, x, w),
        "laid copies": partial(shards.laid, same, w),
        "zeros_beside": partial(shards.zeros_beside, w, 7),
        "beside": partial(shards.beside, same, w, -2, -1),
        "here": partial(shards.here, torch.arange(1), w, -2),
        "whole": partial(shards.whole, w),
    }
    for name, f in does.items():
        with CommDebugMode() as mode:
            f()
        counts[name] = mode.get_total_counts()
    return counts


def turned(mesh: DeviceMesh, rank: int) -> dict[str, object]:
    """Parts that lie in memory by columns, and one sum that is pending, made into whole tensors."""
    x = rand(5, 3)
    like = cut(x, -2, mesh)
    columns = shards.rebuilt(like.to_local().mT.contiguous().mT, like, like.placements, x.shape)
    pending = shards.rebuilt(torch.full((3,), 1.0 + rank), like, [Partial()], (3,))
    flipped = cut(x.mT.contiguous(), -1, mesh)
    return {
        "x": x,
        "columns": full(columns),
        "columns.stride": columns.stride(),
        "pending": full(pending),
        "transposed part": shards.local(flipped).mT.contiguous(),
    }


def grid() -> dict[str, int]:
    """The numbers of parts over meshes of two dimensions: of copies of groups, and of groups of copies."""
    x, found = rand(4, 6), {}
    for shape in ((1, WORLD), (WORLD, 1)):
        mesh = DeviceMesh("cpu", torch.arange(WORLD).view(shape))
        for name, places in {
            "rows, columns": [Shard(0), Shard(1)],
            "copies, rows": [Replicate(), Shard(0)],
            "rows, copies": [Shard(0), Replicate()],
        }.items():
            found[shape, name] = shards.cut_number(distribute_tensor(x, mesh, places, src_data_rank=None))
    return found


def found_for(shape: tuple[int, ...], axis: int | None, mesh: DeviceMesh) -> dict[str, object]:
    x = rand(*shape)
    apart, alone = partial(cut, mesh=mesh), plain
    results = {}
    for recipe in RECIPES:
        pairs = zip(recipe(alone, x, axis), recipe(apart, x, axis), strict=True)
        results |= {name: (one, full(many), place(many)) for (name, one), (_, many) in pairs}
    return {"x": x, "results": results, "parts": parts(x, axis, mesh), "sent": sent(x, axis, mesh)}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    mesh = DeviceMesh("cpu", torch.arange(WORLD))
    found = {(shape, axis): found_for(shape, axis, mesh) for shape, axis in CASES}
    torch.save({"cases": found, "turned": turned(mesh, rank), "grid": grid()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(work, (sys.argv[1],), nprocs=WORLD, start_method="fork")
