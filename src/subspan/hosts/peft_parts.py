"""Ops as the tensors that PEFT keeps of them, for types other than LoRA, and the fields that go with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from subspan.adapt import Add, Rotate, Slot
from subspan.adapt.multiply import divisors
from subspan.adapt.starts import near_factor
from subspan.linalg import wide
from subspan.ops import (
    BlockCayley,
    Dense,
    Diag,
    Entries,
    Hadamard,
    Kron,
    LinOp,
    LowRank,
    Product,
    Stacked,
    Transposed,
)
from subspan.ops.base import hold

Parts = dict[str, Tensor]
Slots = Mapping[str, Slot]
T = TypeVar("T")
HADA, LOKR = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("lokr_w1", "lokr_w2")
# PEFT divides AdaLoRA's alpha by the rank plus this.
EDGE = 1e-5


@dataclass(frozen=True)
class Written:
    """What PEFT keeps of an adapter: tensors by site, tensors of all sites, ranks, scales and further fields."""

    parts: Mapping[str, Parts]
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    fields: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)


class BlockSeries(BlockCayley):
    """Block-diagonal, every block the first terms of (I + Q) (I - Q)^-1 = I + 2 Q + 2 Q^2 + ..., Q = -Q^T.

    PEFT calls this Cayley-Neumann. The power after which it stops, 3 at least unless there are fewer terms, enters
    once and not twice, so the blocks are orthogonal only near Q = 0. q (blocks, size (size - 1) / 2) as in
    `BlockCayley`; `terms` counts I.

    >>> BlockSeries(torch.tensor([[0.1]]), 2).dense()
    tensor([[ 1.0000,  0.2000],
            [-0.2000,  1.0000]])
    """

    def __init__(self, q: Tensor, terms: int = 5) -> None:
        super().__init__(q)
        self.terms = terms

    def blocks(self) -> Tensor:
        """The blocks (blocks, size, size), in float32 at least."""
        q, size = wide(self.q), self.size
        i, j = torch.triu_indices(size, size, 1, device=q.device)
        flat = q.new_zeros(len(q), size * size).index_copy(1, i * size + j, q)
        upper = flat.view(len(q), size, size)
        skew = power = upper - upper.mT
        total = torch.eye(size, dtype=q.dtype, device=q.device).expand_as(skew)
        last = 1 if self.terms < 3 else max(3, self.terms - 1)
        for k in range(1, last + 1 if self.terms > 1 else 1):
            power = skew if k == 1 else power @ skew
            total = total + (1.0 if k == last > 1 else 2.0) * power
        return total


def scale_of(site: str, slot: Slot) -> float:
    """The scale of a plain sum; raises ValueError for another join."""
    if type(slot.join) is not Add:
        raise ValueError(f"{site}: {type(slot.op).__name__} joined by {type(slot.join).__name__} is not in PEFT")
    return slot.join.scale


def only(values: Mapping[str, T], what: str) -> T:
    """The one value of all sites; raises ValueError when they differ.

    >>> only({"a": 4, "b": 4}, "rank")
    4
    """
    one, *others = dict.fromkeys(values.values())
    if others:
        site = next(s for s, value in values.items() if value == others[0])
        raise ValueError(
            f"{what} is {others[0]} at {site} and {one} elsewhere, and PEFT keeps one for all layers; "
            "approximate it with `subspan adapter convert --to lora --rank N`"
        )
    return one


def detached(op: LinOp, names: Iterable[str]) -> Parts:
    """The tensors of low-rank or dense ops as PEFT's parts."""
    found = dict(op.named_parameters())
    return {new: found[old].detach() for new, old in zip(names, found, strict=True)}


def write_loha(slots: Slots) -> Written:
    """Hadamard products as hada_w1_a (m, rank), hada_w1_b (rank, n), and the same of w2.

    Raises ValueError where the two products have two ranks.
    """
    ranks, parts = {}, {}
    for site, slot in slots.items():
        op = cast_to(Hadamard, site, slot)
        if op.one.rank != op.two.rank:
            raise ValueError(f"{site}: LoHa's ranks are {op.one.rank} and {op.two.rank}; PEFT keeps one for both")
        ranks[site], parts[site] = op.one.rank, detached(op, HADA)
    return Written(parts, ranks, {site: scale_of(site, slot) for site, slot in slots.items()})


def kron_parts(op: Kron) -> Parts:
    """Both sides of a Kronecker product: a matrix as lokr_wN, a product as lokr_wN_a and lokr_wN_b."""
    parts: Parts = {}
    for name, side in zip(LOKR, (op.a, op.b), strict=True):
        if isinstance(side, LowRank):
            parts |= {f"{name}_a": side.u.detach(), f"{name}_b": side.v.detach()}
        else:
            parts[name] = side.dense().detach()
    return parts


def split(size: int, factor: int) -> int:
    """The rows of LoKr's first side for a layer of that size: the factor where it divides, else the nearest below.

    >>> split(24, 8), split(24, -1)
    (8, 4)
    """
    return factor if factor > 0 and size % factor == 0 else near_factor(size, factor)


def lokr_shapes(m: int, n: int, *, rank: int, factor: int, both: bool) -> dict[str, tuple[int, ...]]:
    """The tensors that PEFT makes for a layer (m, n): a side is a product where rank < half its larger size."""
    p, q = split(m, factor), split(n, factor)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns), may in ((LOKR[0], (p, q), both), (LOKR[1], (m // p, n // q), True)):
        if may and rank < max(rows, columns) / 2:
            shapes |= {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}
        else:
            shapes[name] = (rows, columns)
    return shapes


def write_lokr(slots: Slots) -> Written:
    """Kronecker products, with the factor and the ranks by which PEFT makes the same tensors.

    Raises ValueError when no factor gives the sizes of every site, or no rank the shapes.
    """
    ops = {site: cast_to(Kron, site, slot) for site, slot in slots.items()}
    top = max(max(op.a.shape) for op in ops.values())
    usual = _usual_rank(ops.values())
    for factor in (-1, *range(1, top + 1)):
        if any((split(op.shape[0], factor), split(op.shape[1], factor)) != op.a.shape for op in ops.values()):
            continue
        for both in (False, True):
            found = {site: _lokr_rank(op, factor, both, usual) for site, op in ops.items()}
            ranks = {site: rank for site, rank in found.items() if rank is not None}
            if len(ranks) == len(ops):
                scales = {site: scale_of(site, slot) for site, slot in slots.items()}
                fields = {"decompose_factor": factor, "decompose_both": both}
                return Written({site: kron_parts(op) for site, op in ops.items()}, ranks, scales, fields)
    sizes = sorted({f"{op.a.shape} kron {op.b.shape}" for op in ops.values()})
    raise ValueError(
        f"no rank and decompose_factor of PEFT's LoKr give {', '.join(sizes[:4])}; "
        "write it with save_kohya, or approximate it with `subspan adapter convert --to lora --rank N`"
    )


def _usual_rank(ops: Iterable[Kron]) -> int:
    told = [side.rank for op in ops for side in (op.b, op.a) if isinstance(side, LowRank)]
    return Counter(told).most_common(1)[0][0] if told else 1


def _lokr_rank(op: Kron, factor: int, both: bool, usual: int) -> int | None:
    """A rank for which PEFT makes the tensors of this product, None if there is none."""
    sides = [side for side in (op.a, op.b) if isinstance(side, LowRank)]
    ceiling = math.ceil(max(*op.a.shape, *op.b.shape) / 2)
    wanted = {name: tuple(t.shape) for name, t in kron_parts(op).items()}
    choices = [sides[0].rank] if sides else [usual, math.ceil(max(op.b.shape) / 2), ceiling]
    shapes = (rank for rank in choices if lokr_shapes(*op.shape, rank=rank, factor=factor, both=both) == wanted)
    return next(shapes, None)


def write_shira(slots: Slots) -> Written:
    """Sparse changes as shira_weight (k,) and shira_indices (2, k), rows above columns.

    Raises ValueError unless k = rank (m + n) with one rank for all sites, as PEFT has it.
    """
    parts, ranks = {}, {}
    for site, slot in slots.items():
        op = cast_to(Entries, site, slot)
        rank, rest = divmod(len(op.index), sum(op.shape))
        if rest or not rank:
            raise ValueError(
                f"{site}: {len(op.index)} entries of a layer {op.shape} are no multiple of {sum(op.shape)}, "
                "which is what PEFT's SHiRA trains; choose the entries by rank"
            )
        rows = torch.stack([op.index // op.n, op.index % op.n]).to(torch.int32)
        ranks[site] = rank
        parts[site] = {"shira_weight": scale_of(site, slot) * op.values.detach(), "shira_indices": rows}
    only(ranks, "SHiRA's rank")
    return Written(parts, ranks, dict.fromkeys(ranks, 1.0), {"mask_type": "random"})


def oft_block(n: int, *, blocks: int, block: int) -> int:
    """The block that PEFT takes for n inputs: the divisor of n nearest to what is asked, the lower of two.

    `blocks` asks for their number instead when it is not 0.

    >>> oft_block(24, blocks=0, block=7), oft_block(24, blocks=5, block=0)
    (6, 6)
    """
    asked = min(blocks or block, n)
    near = min(divisors(n), key=lambda d: (abs(d - asked), d))
    return n // near if blocks else near


def write_oft(slots: Slots) -> Written:
    """Rotations as oft_R.weight (blocks, size (size - 1) / 2), with a block size that PEFT turns into theirs.

    Raises ValueError when no one block size does, and for rotations of two kinds.
    """
    turns: dict[str, BlockCayley] = {}
    for site, slot in slots.items():
        turns[site] = cast_turn(site, slot)
    terms = only({s: t.terms if isinstance(t, BlockSeries) else 0 for s, t in turns.items()}, "OFT's series")
    sizes = {turn.shape[0]: turn.size for turn in turns.values()}
    mixed = len({(turn.shape[0], turn.size) for turn in turns.values()}) > len(sizes)
    asked = [] if mixed else _asked(sizes)
    if not asked:
        raise ValueError(f"no oft_block_size or r of PEFT gives the blocks {sizes} by inputs; choose one for all")
    fields: dict[str, Any] = {"r": asked[0], "oft_block_size": asked[1], "use_cayley_neumann": bool(terms)}
    if terms:
        # Before this release the same fields meant another series.
        fields |= {"num_cayley_neumann_terms": terms, "peft_version": "0.18.0"}
    parts = {site: {"oft_R.weight": turn.q.detach()} for site, turn in turns.items()}
    return Written(parts, dict.fromkeys(parts, 1), dict.fromkeys(parts, 1.0), fields)


def _asked(sizes: Mapping[int, int]) -> list[int]:
    """The number of blocks and their size, one of them 0, that give these sizes by inputs; [] if none does."""
    # The largest block says most plainly what was asked for; outside of these ranges nothing more is found.
    counts = [n // size for n, size in sizes.items()]
    choices = [(0, block) for block in range(max(sizes.values()), min(sizes.values()) - 1, -1)]
    choices += [(blocks, 0) for blocks in range(min(counts), max(counts) + 1)]
    for blocks, block in choices:
        if all(oft_block(n, blocks=blocks, block=block) == size for n, size in sizes.items()):
            return [blocks, block]
    return []


def cast_turn(site: str, slot: Slot) -> BlockCayley:
    """The rotation of a site; raises ValueError for another join."""
    if not isinstance(slot.join, Rotate):
        raise ValueError(f"{site}: {type(slot.join).__name__} is no rotation; one folder holds one type")
    return slot.join.bound()


def write_vera(slots: Slots) -> Written:
    """Scaled random products as vera_lambda_b (m,), vera_lambda_d (rank,) and the widest vera_A, vera_B of all.

    PEFT's layers take the head of one A and one B. Heads that differ by a number are made equal, and the number
    goes into vera_lambda_d. Raises ValueError where they differ otherwise.
    """
    ops = {site: cast_to(Product, site, slot).ops for site, slot in slots.items()}
    ranks = {site: op[1].shape[1] for site, op in ops.items()}
    only(ranks, "VeRA's rank")
    lefts = {site: op[1].dense().detach() for site, op in ops.items()}
    rights = {site: op[3].dense().detach() for site, op in ops.items()}
    b, a = max(lefts.values(), key=len), max(rights.values(), key=lambda t: t.shape[1])
    parts: dict[str, Parts] = {}
    for site, op in ops.items():
        m, n = slots[site].op.shape
        number = (
            scale_of(site, slots[site]) * ratio(site, lefts[site], b[:m]) * ratio(site, rights[site], a[:, :n])
        )
        vectors = [diagonal(site, one) for one in (op[0], op[2])]
        parts[site] = {"vera_lambda_b": vectors[0], "vera_lambda_d": vectors[1] * number}
    shared = {"vera_A": a.contiguous(), "vera_B": b.contiguous()}
    return Written(parts, ranks, dict.fromkeys(ranks, 1.0), {"save_projection": True}, shared)


def ratio(site: str, one: Tensor, head: Tensor) -> float:
    """The number that turns a head of the shared matrix into the site's own; raises ValueError if none does."""
    number = 1.0 if torch.equal(one, head) else float((one.double() * head).sum() / head.double().square().sum())
    if number != 1.0 and (one - number * head).abs().max() > 1e-6 * one.abs().max():
        raise ValueError(
            f"{site}: its random matrix is no head of the one PEFT shares between all layers; "
            "approximate it with `subspan adapter convert --to lora --rank N`"
        )
    return number


def diagonal(site: str, op: LinOp) -> Tensor:
    """The numbers of a diagonal op; raises ValueError for another."""
    if not isinstance(op, Diag):
        raise ValueError(f"{site}: {type(op).__name__} stands where VeRA and AdaLoRA have a diagonal")
    return op.d.detach()


def paired(left: Tensor, bases: int) -> Tensor:
    """The random columns in the order in which PEFT pairs them with rows of A, or back, (m, bases rank).

    PEFT counts ranks within bases on one side and bases within ranks on the other.

    >>> paired(torch.arange(6)[None], 2)
    tensor([[0, 3, 1, 4, 2, 5]])
    """
    return torch.unflatten(left, 1, (bases, -1)).mT.flatten(1)


def write_randlora(slots: Slots) -> Written:
    """Stacked random products as randlora_lambda (rank, bases), randlora_gamma (bases, short), and shared A, B.

    Raises ValueError where the random matrices of two sites are not heads of the same A and B: with layers of
    several smaller sizes, ours never are.
    """
    parts: dict[str, Parts] = {}
    lefts, rights, ranks = {}, {}, {}
    for site, slot in slots.items():
        tall = slot.op.op if isinstance(slot.op, Transposed) else slot.op
        left, stack = tall.ops if isinstance(tall, Product) else (None, None)
        if not isinstance(left, LinOp) or not isinstance(stack, Stacked):
            raise ValueError(f"{site}: {type(slot.op).__name__} is no RandLoRA; one folder holds one type")
        bases, ranks[site] = stack.rows.shape
        # The same reordering, of ranks within bases, undoes itself with the counts exchanged.
        lefts[site] = torch.unflatten(paired(left.dense().detach(), bases), 1, (bases, -1))
        rights[site] = stack.op.dense().detach()[:, None]
        own = {"randlora_lambda": stack.rows.detach().mT, "randlora_gamma": stack.columns.detach()}
        parts[site] = {name: t.contiguous() for name, t in own.items()}
    rank, scales = only(ranks, "RandLoRA's rank"), {site: scale_of(site, slot) for site, slot in slots.items()}
    only(scales, "RandLoRA's scale")
    tallest, widest = (max(slot.op.shape[side] for slot in slots.values()) for side in (0, 1))
    long, short = max(tallest, widest), min(tallest, widest)
    some = next(iter(lefts.values()))
    a, b = some.new_zeros(rank, 1, short), some.new_zeros(long, math.ceil(short / rank), rank)
    # What no site reaches stays zero and is never read.
    for site in slots:
        b[: lefts[site].shape[0], : lefts[site].shape[1]] = lefts[site]
        a[..., : rights[site].shape[2]] = rights[site]
    for site, head in lefts.items():
        right = rights[site]
        if not torch.equal(head, b[: head.shape[0], : head.shape[1]]) or (a[..., : right.shape[2]] - right).any():
            raise ValueError(
                f"{site}: its random bases are no heads of those that PEFT shares between all layers; "
                "approximate it with `subspan adapter convert --to lora --rank N`"
            )
    return Written(parts, ranks, scales, {"save_projection": True}, {"randlora_A": a, "randlora_B": b})


def write_adalora(slots: Slots) -> Written:
    """Three factors as lora_B (m, rank), lora_E (rank, 1) and lora_A (rank, n), with the ranks kept of init_r."""
    ops = {site: cast_to(Product, site, slot).ops for site, slot in slots.items()}
    ranks = {site: op[1].shape[0] for site, op in ops.items()}
    scales = {site: scale_of(site, slot) for site, slot in slots.items()}
    first, top = next(iter(scales.values())), max(1, *ranks.values())
    parts = {
        site: {
            "lora_A": op[2].dense().detach(), "lora_B": op[0].dense().detach(),
            "lora_E": diagonal(site, op[1])[:, None] * (scales[site] / first),
        }
        for site, op in ops.items()
    }  # fmt: skip
    kept = {f"{site}.lora_E": [True] * rank + [False] * (top - rank) for site, rank in ranks.items()}
    fields = {
        "target_r": top, "total_step": 1, "lora_alpha": first * (top + EDGE),
        "rank_pattern": None if set(ranks.values()) == {top} else kept,
    }  # fmt: skip
    return Written(parts, dict.fromkeys(ranks, top), dict.fromkeys(ranks, 1.0), fields)


Kind = TypeVar("Kind", bound=LinOp)


def cast_to(kind: type[Kind], site: str, slot: Slot) -> Kind:
    """The op of a site as one of that class; raises ValueError for another."""
    if not isinstance(slot.op, kind):
        raise ValueError(
            f"{site}: {type(slot.op).__name__} stands among {kind.__name__}s; one folder has one type"
        )
    return slot.op


def dense_of(t: Tensor) -> Dense:
    """A frozen matrix over the tensor's own memory."""
    return Dense(hold(t))
