"""What adapters change, as matrices: cut to plain LoRA, and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from subspan import io
from subspan.hosts.peft_read import AdapterFolder, change
from subspan.hosts.peft_tokens import TokenRows
from subspan.hosts.peft_write import Factor, write_peft
from subspan.linalg import SVD, check_rank, svd, wide
from subspan.ops import Dense, LinOp, LowRank


@dataclass(frozen=True)
class Cut:
    """An adapter as plain LoRA: the factors by site, and how far they are from its change, relative to it."""

    factors: dict[str, Factor]
    errors: dict[str, float]
    error: float


@dataclass(frozen=True)
class Difference:
    """How two adapters differ at one site: the norms of both changes and of their difference, cosine, ranks.

    A norm is None where an adapter has nothing at the site; the cosine is None where a norm is 0 or missing.
    """

    one: float | None
    two: float | None
    apart: float
    cosine: float | None
    ranks: tuple[int, int]


@torch.no_grad()
def as_lora(saved: AdapterFolder, weight: Callable[[str], Tensor], rank: int | None = None) -> Cut:
    """The best LoRA of that rank for what an adapter changes at each site, in the norm of the change.

    Without a rank, an adapter that is low-rank keeps its factors. Raises ValueError for a rank outside
    1..min(m, n), for one that is missing and needed, and for modules saved whole and experts of 3-D parameters,
    which no LoRA holds.
    """
    experts = io.read_about(saved.path).get("experts") if saved.form == "subspan" else None
    if experts:
        raise ValueError(
            f"{saved.path} adapts {len(experts)} experts of 3-D parameters ({experts[0]}), for which PEFT has no "
            "LoRA; merge it instead"
        )
    if saved.whole or saved.tokens.values:
        what = f"saves {len(saved.whole)} tensors whole" if saved.whole else "has rows of single tokens"
        raise ValueError(f"{saved.path} {what}, which no LoRA holds; merge it instead")
    factors: dict[str, Factor] = {}
    errors: dict[str, float] = {}
    lost = total = 0.0
    for site in saved.sites:
        op = change(saved, site, weight(site) if saved.reads_base else None)
        low, dropped, size = _cut(op, site, rank)
        factors[site] = Factor(low.u.detach(), low.v.detach(), 1.0)
        errors[site] = (dropped / size) ** 0.5 if size else 0.0
        lost, total = lost + dropped, total + size
    return Cut(factors, errors, (lost / total) ** 0.5 if total else 0.0)


def write_lora(
    cut: Cut, out: str | Path, *, base: str | None, dtype: torch.dtype | None, force: bool = False
) -> Path:
    """Write a plain LoRA as a PEFT folder, its layers by their full names; see `io.staged`."""
    with io.staged(out, force=force) as folder:
        write_peft(folder, cut.factors, names=None, base=base, dtype=dtype)
    return Path(out)


@torch.no_grad()
def compare(one: AdapterFolder, two: AdapterFolder, weight: Callable[[str], Tensor]) -> dict[str, Difference]:
    """Site -> how two adapters differ there; sites of either.

    Rows of single tokens are compared as what they are, without the base, under a name that says so.
    """
    found: dict[str, Difference] = {}
    for site in dict.fromkeys((*one.sites, *two.sites)):
        ops = [
            change(saved, site, weight(site) if saved.reads_base else None) if site in saved.sites else None
            for saved in (one, two)
        ]
        found[site] = _difference(ops[0], ops[1])
    for site in dict.fromkeys((*one.tokens.values, *two.tokens.values)):
        ids = sorted({i for saved in (one, two) if site in saved.tokens.values for i in saved.tokens.ids(site)})
        rows = [_rows(saved.tokens, site, ids) if site in saved.tokens.values else None for saved in (one, two)]
        found[f"{site} (rows of tokens)"] = _difference(rows[0], rows[1])
    return found


def _rows(tokens: TokenRows, site: str, ids: list[int]) -> LinOp:
    """The rows of these tokens, zero where an adapter has none."""
    values = wide(tokens.values[site])
    index = torch.tensor([ids.index(i) for i in tokens.ids(site)])
    return Dense(values.new_zeros(len(ids), values.shape[1]).index_copy(0, index, values))


def triples(op: LinOp) -> SVD:
    """The singular triples of an op; of a low-rank one by way of its factors."""
    if not isinstance(op, LowRank):
        return svd(op.dense())
    (qu, ru), (qv, rv) = torch.linalg.qr(wide(op.u)), torch.linalg.qr(wide(op.v).mT)
    u, s, vh = svd(ru @ rv.mT)
    return SVD(qu @ u, s, vh @ qv.mT)


def _cut(op: LinOp, site: str, rank: int | None) -> tuple[LowRank, float, float]:
    """The op at that rank, the square of what is lost, and that of the whole."""
    if rank is not None:
        check_rank(rank, *op.shape, site)
    if isinstance(op, LowRank) and (rank is None or op.rank <= rank):
        return op, 0.0, inner(op, op)
    if rank is None:
        raise ValueError(f"{site}: the change has no factors; give the rank of the LoRA with --rank")
    u, s, vh = triples(op)
    root = s[:rank].sqrt()
    square = s.double().square()
    return LowRank(u[:, :rank] * root, root[:, None] * vh[:rank]), float(square[rank:].sum()), float(square.sum())


def inner(one: LinOp, two: LinOp) -> float:
    """The sum of products of all entries; for low-rank ops by way of their factors.

    >>> from subspan.ops import Dense
    >>> inner(Dense(torch.ones(2, 2)), Dense(2 * torch.ones(2, 2)))
    8.0
    """
    if isinstance(one, LowRank) and isinstance(two, LowRank):
        return float(((one.u.mT @ two.u).double() * (one.v @ two.v.mT).double()).sum())
    return float((one.dense().double() * two.dense().double()).sum())


def _difference(one: LinOp | None, two: LinOp | None) -> Difference:
    if one is not None and two is not None and one.shape != two.shape:
        raise ValueError(f"the adapters are for layers of {one.shape} and {two.shape}; they belong to two models")
    a, b = (None if op is None else max(inner(op, op), 0.0) ** 0.5 for op in (one, two))
    product = 0.0 if one is None or two is None else inner(one, two)
    apart = max((a or 0.0) ** 2 + (b or 0.0) ** 2 - 2 * product, 0.0) ** 0.5
    if one is not None and two is not None:
        apart = _apart(one, two)
    cosine = product / (a * b) if a and b else None
    return Difference(a, b, apart, cosine, (_rank(one), _rank(two)))


def _apart(one: LinOp, two: LinOp) -> float:
    if isinstance(one, LowRank) and isinstance(two, LowRank):
        if torch.equal(one.u, two.u) and torch.equal(one.v, two.v):
            return 0.0
        both = LowRank(torch.cat([one.u, -two.u], 1), torch.cat([one.v, two.v]))
        return float(triples(both).s.double().norm())
    return float((one.dense().double() - two.dense().double()).norm())


def _rank(op: LinOp | None) -> int:
    """How many singular values stand above rounding."""
    if op is None:
        return 0
    s = triples(op).s
    floor = max(op.shape) * torch.finfo(s.dtype).eps * float(s[:1].sum())
    return int((s > floor).sum())
