"""Starts of ops that are more than one low-rank product: (site, weight) -> op, as values that print."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from subspan.adapt.init import FromWeight, draw
from subspan.adapt.multiply import divisors
from subspan.linalg import check_rank, require_finite, wide
from subspan.ops import (
    Columns,
    Dense,
    Diag,
    Entries,
    Hadamard,
    Kron,
    LinOp,
    LowRank,
    Product,
    Seeded,
    Stacked,
    Transposed,
    Zero,
)
from subspan.ops.structured import Law

Pick = Literal["random", "large", "small"]


@dataclass(frozen=True)
class Nothing:
    """The zero op, for joins that change the weight on their own."""

    def __call__(self, site: str, w: Tensor) -> Zero:
        """Zeros of the shape of w."""
        return Zero(*w.shape).to(wide(w[:0]))


@dataclass(frozen=True)
class TopCore:
    """left core right: the weight's top singular vectors, frozen, around a trained (rank, rank) core of zeros.

        left = U S (m, rank),   right = V^T (rank, n)

    `solver` as in `FromWeight`.
    """

    rank: int
    solver: Literal["exact", "gram", "random"] = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        FromWeight(self.rank, solver=self.solver)

    def __call__(self, site: str, w: Tensor) -> Product:
        """The op for one site and weight w (m, n); raises ValueError for a bad rank, NaN or Inf."""
        m, n = w.shape
        check_rank(self.rank, m, n, site)
        require_finite(w, site)
        u, s, vh = FromWeight(self.rank, solver=self.solver, seed=self.seed).triples(site, w.detach())
        left, right = u[:, : self.rank] * s[: self.rank], vh[: self.rank]
        core = nn.Parameter(left.new_zeros(self.rank, self.rank))
        return Product([Dense(left), Dense(core), Dense(right.contiguous())])


@dataclass(frozen=True)
class UpdateCore:
    """left core right: the best rank-`rank` form of the first step of AdamW, -rate * sign(gradient).

        left = U (m, rank), frozen,   core = diag(S) / scale, trained,   right = V^T (rank, n), frozen

    `gradients` holds one summed gradient (m, n) a site. The start moves the function by that step (Ponkshe et
    al., 2024); with `SubtractInit` it does not. `scale` is that of the join, `solver` as in `FromWeight`.
    """

    rank: int
    gradients: Mapping[str, Tensor] = field(repr=False)
    rate: float
    scale: float = 1.0
    solver: Literal["exact", "gram", "random"] = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        FromWeight(self.rank, scale=self.scale, solver=self.solver)
        if not self.rate > 0:
            raise ValueError(f"rate {self.rate} must be positive: it is the size of the first step")

    def __call__(self, site: str, w: Tensor) -> Product:
        """The op for one site and weight w (m, n); raises ValueError for a bad rank or no fitting gradient."""
        m, n = w.shape
        check_rank(self.rank, m, n, site)
        g = self.gradients.get(site)
        if g is None or g.shape != w.shape:
            found = "none" if g is None else f"one of {tuple(g.shape)}"
            raise ValueError(f"{site}: needs a gradient of {(m, n)}, got {found}; collect it over this model")
        require_finite(g, f"gradient of {site}")
        step = -self.rate * wide(g.detach()).sign().to(wide(w[:0]))
        u, s, vh = FromWeight(self.rank, solver=self.solver, seed=self.seed).triples(site, step)
        core = nn.Parameter(torch.diag(s[: self.rank] / self.scale))
        return Product([Dense(u[:, : self.rank].contiguous()), Dense(core), Dense(vh[: self.rank].contiguous())])


@dataclass(frozen=True)
class RandomBasis:
    """diag(b) B diag(d) A: random B (m, rank) and A (rank, n) from a seed, trained b = 0 and d = `start`.

    All layers take their first m or n rows of the same two streams of numbers; the deviations are sqrt(2 / rank)
    for B and sqrt(2 / n) for A. The rank may exceed both sizes of the weight.
    """

    rank: int
    start: float = 0.1
    seed: int = 0

    def __call__(self, site: str, w: Tensor) -> Product:
        """The op for one site and weight w (m, n); raises ValueError for a rank below 1."""
        (m, n), like = w.shape, wide(w[:0])
        if self.rank < 1:
            raise ValueError(f"{site}: rank {self.rank} must be at least 1")
        b = nn.Parameter(like.new_zeros(m))
        d = nn.Parameter(like.new_full((self.rank,), self.start))
        left = Seeded(2 * self.seed, m, self.rank, scale=math.sqrt(2 / self.rank)).to(like)
        right = Seeded(2 * self.seed + 1, n, self.rank, scale=math.sqrt(2 / n)).to(like)
        return Product([Diag(b), left, Diag(d), Transposed(right)])


@dataclass(frozen=True)
class RandomBases:
    """sum over i of B_i diag(rows_i) A diag(columns_i), of full rank: random B_i and A, trained scales.

    With long = max(m, n), short = min(m, n) and k = ceil(short / rank), each B_i is (long, rank) and the one A is
    (rank, short), both of deviation 1 and brought back by a seed; rows (k, rank) start at 0 and columns
    (k, short) at 1 / max(k, short). A wide weight gets the transpose.
    """

    rank: int
    law: Law = "uniform"
    seed: int = 0

    def __call__(self, site: str, w: Tensor) -> LinOp:
        """The op for one site and weight w (m, n); raises ValueError for a rank outside 1..min(m, n)."""
        (m, n), like = w.shape, wide(w[:0])
        check_rank(self.rank, m, n, site)
        long, short = max(m, n), min(m, n)
        count = math.ceil(short / self.rank)
        rows = nn.Parameter(like.new_zeros(count, self.rank))
        columns = nn.Parameter(like.new_full((count, short), 1 / max(count, short)))
        one = Seeded(2 * self.seed + 1, short, self.rank, self.law).to(like)
        many = Seeded(2 * self.seed, long, count * self.rank, self.law).to(like)
        tall = Product([many, Stacked(Transposed(one), rows, columns)])
        return tall if m >= n else Transposed(tall)


@dataclass(frozen=True)
class ZeroHadamard:
    """(one.u one.v) * (two.u two.v) = 0, all four trained.

    Gaussian one.u, one.v and two.v with deviations 0.1, 1 and 1, and two.u of zeros, as LyCORIS starts them.
    """

    rank: int
    seed: int = 0

    def __call__(self, site: str, w: Tensor) -> Hadamard:
        """The op for one site and weight w (m, n); raises ValueError for a rank outside 1..min(m, n)."""
        (m, n), like = w.shape, wide(w[:0])
        check_rank(self.rank, m, n, site)
        source = draw(site, self.seed)
        u, v, w2 = (torch.randn(size, self.rank, generator=source).to(like) for size in (m, n, n))
        one = LowRank(nn.Parameter(0.1 * u), nn.Parameter(v.T.contiguous()))
        return Hadamard(one, LowRank(nn.Parameter(torch.zeros_like(u)), nn.Parameter(w2.T.contiguous())))


@dataclass(frozen=True)
class ZeroKron:
    """a kron b = 0 with a (p, q), b (m / p, n / q), where p and q are the factors nearest below `factor`.

    `factor` -1 stands for the square root (see `near_factor`). b is a product of the given rank if that is below
    half of its larger size, else a matrix; with `both`, a likewise. What a product or matrix lacks to be zero is
    in b alone: b, or its left factor, starts at zero; the rest is uniform on +-1/sqrt(columns).
    """

    rank: int
    factor: int = -1
    both: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.factor != -1 and self.factor < 1:
            raise ValueError(f"factor {self.factor} must be at least 1, or -1 for the square root")

    def __call__(self, site: str, w: Tensor) -> Kron:
        """The op for one site and weight w (m, n); raises ValueError for a rank below 1."""
        (m, n), like = w.shape, wide(w[:0])
        if self.rank < 1:
            raise ValueError(f"{site}: rank {self.rank} must be at least 1")
        p, q = near_factor(m, self.factor), near_factor(n, self.factor)
        source = draw(site, self.seed)

        def uniform(rows: int, columns: int) -> nn.Parameter:
            drawn = 2 * torch.rand(rows, columns, generator=source) - 1
            return nn.Parameter((drawn / columns**0.5).to(like))

        def zero(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(like.new_zeros(rows, columns))

        s, t = m // p, n // q
        a_thin, b_thin = self.both and self.rank < max(p, q) / 2, self.rank < max(s, t) / 2
        a = LowRank(uniform(p, self.rank), uniform(self.rank, q)) if a_thin else Dense(uniform(p, q))
        b = LowRank(zero(s, self.rank), uniform(self.rank, t)) if b_thin else Dense(zero(s, t))
        return Kron(a, b)


def near_factor(size: int, factor: int = -1) -> int:
    """The smaller of the two factors that a size is split into, as LyCORIS splits it.

    The given factor or its complement if it divides, else the largest divisor up to it and to the square root;
    -1 asks for the divisor nearest below the root.

    >>> near_factor(128), near_factor(128, 4), near_factor(250, 16), near_factor(127, 8)
    (8, 4, 10, 1)
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor)
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    return max(d for d in divisors(size) if d <= limit)


@dataclass(frozen=True)
class SparseEntries:
    """rank * (m + n) trained entries of the weight, as many numbers as a low-rank pair has, all starting at zero.

    `pick` says which: "random", or those where the weight is "large" or "small" in magnitude.
    """

    rank: int
    pick: Pick = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_pick(self.pick)

    def __call__(self, site: str, w: Tensor) -> Entries:
        """The op for one site and weight w (m, n); raises ValueError for fewer than 1 or more than m n entries."""
        m, n = w.shape
        count = self.rank * (m + n)
        if not 1 <= count <= m * n:
            most = m * n // (m + n)
            raise ValueError(
                f"{site}: rank {self.rank} asks for {count} of {m * n} entries; choose a rank in 1..{most}"
            )
        index = picked(w.detach().abs().flatten(), count, self.pick, draw(site, self.seed))
        return Entries(index, nn.Parameter(wide(w[:0]).new_zeros(count)), m, n)


@dataclass(frozen=True)
class ColumnsOf:
    """`count` trained columns of the weight, as their change, starting at zero.

    `pick` says which: "random", or those of "large" or "small" length.
    """

    count: int
    pick: Pick = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_pick(self.pick)

    def __call__(self, site: str, w: Tensor) -> Columns:
        """The op for one site and weight w (m, n); raises ValueError for a count outside 1..n."""
        m, n = w.shape
        if not 1 <= self.count <= n:
            raise ValueError(f"{site}: cannot train {self.count} of {n} columns; choose 1..{n}")
        lengths = torch.linalg.vector_norm(wide(w.detach()), dim=0)
        index = picked(lengths, self.count, self.pick, draw(site, self.seed))
        return Columns(index, nn.Parameter(wide(w[:0]).new_zeros(m, self.count)), n)


def check_pick(pick: str) -> None:
    """Raises ValueError for an unknown way to pick."""
    if pick not in ("random", "large", "small"):
        raise ValueError(f"pick {pick!r} is none of 'random', 'large', 'small'")


def picked(scores: Tensor, count: int, pick: Pick, source: torch.Generator) -> Tensor:
    """The positions of `count` of the scores (size,) in rising order: a random set, the largest or the smallest.

    int32 where that suffices, since positions are saved.

    >>> picked(torch.tensor([3.0, 1.0, 2.0]), 2, "large", torch.Generator())
    tensor([0, 2], dtype=torch.int32)
    """
    if pick == "random":
        index = sample(len(scores), count, source).to(scores.device)
    else:
        index = scores.topk(count, largest=pick == "large").indices
    return index.sort().values.to(torch.int32 if len(scores) <= 2**31 else torch.int64)


def sample(size: int, count: int, source: torch.Generator) -> Tensor:
    """A uniformly random set of `count` of the first `size` numbers, on the CPU.

    >>> sample(5, 5, torch.Generator()).sort().values
    tensor([0, 1, 2, 3, 4])
    """
    if 4 * count >= size:
        return torch.randperm(size, generator=source)[:count]
    # Far cheaper than a permutation of a large weight; by symmetry every set is as likely as another.
    found = torch.unique(torch.randint(size, (2 * count,), generator=source))
    while len(found) < count:
        found = torch.unique(torch.cat([found, torch.randint(size, (count,), generator=source)]))
    kept: Tensor = found[torch.randperm(len(found), generator=source)[:count]]
    return kept


@dataclass(frozen=True)
class ZeroTriples:
    """u diag(e) v = 0 with e = 0 and Gaussian u (m, rank) and v (rank, n) of deviation `spread`, all trained.

    `final` is the mean rank that a schedule is to leave (see `ranks.RankSchedule`); None for a rank that stays.
    """

    rank: int
    final: int | None = None
    spread: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.final is not None and not 1 <= self.final <= self.rank:
            raise ValueError(f"final {self.final} is outside 1..{self.rank}, the rank to start with")

    def __call__(self, site: str, w: Tensor) -> Product:
        """The op for one site and weight w (m, n); raises ValueError for a rank outside 1..min(m, n)."""
        (m, n), like = w.shape, wide(w[:0])
        check_rank(self.rank, m, n, site)
        source = draw(site, self.seed)
        u = (self.spread * torch.randn(m, self.rank, generator=source)).to(like)
        v = (self.spread * torch.randn(self.rank, n, generator=source)).to(like)
        e = nn.Parameter(like.new_zeros(self.rank))
        return Product([Dense(nn.Parameter(u)), Diag(e), Dense(nn.Parameter(v))])
