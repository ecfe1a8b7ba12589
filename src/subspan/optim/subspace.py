"""Subspaces: where a gradient is looked at. The basis stands on the left: g (..., m, n), q^T g (..., rank, n)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from subspan import linalg
from subspan.optim.state import State, counter


class Subspace(Protocol):
    """A frozen dataclass of settings; its state, the frame, is fitted to gradients and replaced as a whole."""

    def init(self, g: Tensor, seed: int) -> State:
        """A frame to be fitted before use; it has the shapes of every later one."""

    def fit(self, g: Tensor, s: State, due: bool) -> State:
        """The frame for this step, called at every step: a new one when due, otherwise usually s as it is."""

    def down(self, g: Tensor, s: State) -> Tensor:
        """Coordinates (..., rank, n) of g (..., m, n)."""

    def up(self, x: Tensor, s: State) -> Tensor:
        """The fresh tensor (..., m, n) whose coordinates are x (..., rank, n)."""

    def move(self, x: Tensor, old: State, new: State, degree: int) -> Tensor:
        """Coordinates in the new frame of what had x in the old; degree 2 for squares of coordinates."""


@dataclass(frozen=True, slots=True)
class Span:
    """The span of the leading left singular vectors of the gradient, each with its largest entry positive.

        q = u[:, :rank],   g = u diag(s) vh

    `rank` counts vectors (clamped to the shorter side) or, as a float in (0, 1], is their share of the m rows.
    `solver`: "exact"; "gram" from the eigenvectors of the Gram matrix, several times faster; "random" by
    randomized subspace iteration, faster still at small rank.

    >>> Span(2).down(torch.ones(4, 3), {"q": torch.eye(4)[:, :2]}).shape
    torch.Size([2, 3])
    """

    rank: int | float
    solver: Literal["exact", "gram", "random"] = "exact"

    def __post_init__(self) -> None:
        require_rank("Span", self.rank)
        if self.solver not in ("exact", "gram", "random"):
            raise ValueError(f"Span: solver={self.solver!r}; use 'exact', 'gram' or 'random'")

    def init(self, g: Tensor, seed: int) -> State:
        """`q` (..., m, rank), and what the random solver needs to go on after a resume."""
        m, n = g.shape[-2:]
        q = g.new_zeros(*g.shape[:-1], count(self.rank, m, min(m, n)))
        return {"q": q} if self.solver != "random" else {"q": q, "seed": counter(seed), "draw": counter()}

    def fit(self, g: Tensor, s: State, due: bool) -> State:
        """A new basis when due."""
        if not due:
            return dict(s)
        rank = s["q"].shape[-1]
        if self.solver == "random":
            start = draw_normal(s, g.shape[-1], min(rank + 8, *g.shape[-2:])).to(g)
            u = linalg.svd_random(g, rank, start=start.expand(*g.shape[:-2], *start.shape)).u
            return {"q": owned(u, rank), "seed": s["seed"], "draw": s["draw"] + 1}
        decompose = linalg.svd if self.solver == "exact" else linalg.svd_gram
        return {"q": owned(decompose(g).u, rank)}

    def down(self, g: Tensor, s: State) -> Tensor:
        """q^T g."""
        return matmul_as(s["q"].mT, g)

    def up(self, x: Tensor, s: State) -> Tensor:
        """q x."""
        return matmul_as(s["q"], x)

    def move(self, x: Tensor, old: State, new: State, degree: int) -> Tensor:
        """C x with C = new^T old, or (C * C) x: exact for squares of uncorrelated coordinates."""
        turn = new["q"].mT @ old["q"]
        return matmul_as(turn if degree == 1 else turn.square(), x)


@dataclass(frozen=True, slots=True)
class Rows:
    """Random rows of the gradient, drawn anew without replacement at every refresh.

    `rank` counts rows (clamped to m) or, as a float in (0, 1], is their share. Draws depend only on the seed
    and on how many were made, both in the state. A batch of matrices shares one choice.
    """

    rank: int | float

    def __post_init__(self) -> None:
        require_rank("Rows", self.rank)

    def init(self, g: Tensor, seed: int) -> State:
        """`index` (rank,) ascending, the height m, and the seed and number of draws."""
        m = g.shape[-2]
        index = torch.arange(count(self.rank, m, m), device=g.device)
        return {"index": index, "height": counter(m), "seed": counter(seed), "draw": counter()}

    def fit(self, g: Tensor, s: State, due: bool) -> State:
        """New rows when due."""
        if not due:
            return dict(s)
        order = torch.randperm(g.shape[-2], generator=generator(s))
        index = order[: len(s["index"])].sort().values.to(g.device)
        return {**s, "index": index, "draw": s["draw"] + 1}

    def down(self, g: Tensor, s: State) -> Tensor:
        """The chosen rows."""
        if by_columns(g):
            return g.mT.index_select(-1, s["index"]).mT
        return g.index_select(-2, s["index"])

    def up(self, x: Tensor, s: State) -> Tensor:
        """x in the chosen rows, zero elsewhere."""
        height = int(s["height"])
        if by_columns(x):
            flat = x.new_zeros(*x.shape[:-2], x.shape[-1], height)
            return flat.index_copy_(-1, s["index"], x.mT).mT
        return x.new_zeros(*x.shape[:-2], height, x.shape[-1]).index_copy_(-2, s["index"], x)

    def move(self, x: Tensor, old: State, new: State, degree: int) -> Tensor:
        """Rows chosen both times keep their values; the others become zero. Exact for both degrees."""
        return self.down(self.up(x, old), new)


def count(rank: int | float, m: int, most: int) -> int:
    """A number of basis vectors from a count, or from a share of m; between 1 and `most`."""
    wanted = rank if isinstance(rank, int) else round(rank * m)
    return max(1, min(wanted, most))


def require_rank(where: str, rank: int | float) -> None:
    """Raise ValueError unless rank is an int >= 1 or a float in (0, 1]."""
    if rank < 1 if isinstance(rank, int) else not 0 < rank <= 1:
        raise ValueError(
            f"{where}: rank={rank!r} is neither an int >= 1 nor a float in (0, 1], a share of the rows"
        )


def owned(u: Tensor, rank: int) -> Tensor:
    """The first columns in storage of their own: a view would keep, and save, all of u."""
    return u[..., :rank].clone(memory_format=torch.contiguous_format)


def generator(s: State) -> torch.Generator:
    """The CPU generator of draw number `s["draw"]`: the same on every device and after a resume."""
    mixed = int(s["seed"]) ^ (int(s["draw"]) * 0x9E3779B1)  # the golden ratio spreads small counts over 32 bits
    return torch.Generator().manual_seed(mixed & 0xFFFFFFFF)


def draw_normal(s: State, *shape: int) -> Tensor:
    """Standard normal float32 numbers for the frame's present draw."""
    return torch.randn(*shape, generator=generator(s))


def by_columns(x: Tensor) -> bool:
    """Whether x is the transpose of a contiguous tensor, as every gradient projected on its right side is."""
    return not x.is_contiguous() and x.mT.is_contiguous()


def matmul_as(a: Tensor, x: Tensor) -> Tensor:
    """a @ x with x's memory layout, so that adding the result to a transposed weight runs along its rows."""
    return (x.mT @ a.mT).mT if by_columns(x) else a @ x
