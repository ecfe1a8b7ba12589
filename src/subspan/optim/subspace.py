"""Subspaces: where a gradient is looked at. The basis stands on the left: g (..., m, n), q^T g (..., rank, n)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from subspan import linalg
from subspan.optim.direction import Low, Picked, Sparing, coordinates, matmul_as
from subspan.optim.state import State, by_columns, counter, mixed
from subspan.shards import laid, picked, settled, whole, zeros_beside

Solver = Literal["power", "exact", "gram", "random"]


class Subspace(Protocol):
    """A frozen dataclass of settings; its state, the frame, is fitted to gradients and replaced as a whole."""

    @property
    def orthonormal(self) -> bool:
        """Whether down(up(x)) = x, so that norms inside are norms outside."""

    def init(self, g: Tensor, seed: int) -> State:
        """A frame to be fitted before use; it has the shapes of every later one."""

    def fit(self, g: Tensor, s: State, due: bool) -> State:
        """The frame for this step, called at every step: a new one when due, otherwise usually s as it is."""

    def down(self, g: Tensor, s: State) -> Tensor:
        """Coordinates (..., rank, n) of g (..., m, n)."""

    def up(self, x: Tensor, s: State) -> Sparing:
        """The matrix (..., m, n) whose coordinates are x (..., rank, n); it holds x, not a copy."""

    def move(self, x: Tensor, old: State, new: State, degree: int) -> Tensor:
        """Coordinates in the new frame of what had x in the old; degree 2 for squares of coordinates."""


@dataclass(frozen=True, slots=True)
class Span:
    """The span of the gradient's leading left singular vectors, g = u diag(s) vh.

    `rank` counts vectors (clamped to the shorter side) or, as a float in (0, 1], is their share of the m rows.
    `solver`: "power", orthogonal iteration q <- orth(g g^T q), `sweeps` times from the last basis (two more
    from a random one at the start), whose columns tend to the singular vectors in order and hardly turn while
    the gradient does not: products only, and the only one that a sharded gradient needs no gathering for.
    "exact" by LAPACK; "gram" from the eigenvectors of the Gram matrix; "random" by randomized subspace
    iteration without memory. Those three pin signs: each column's largest entry is positive.

    >>> Span(2).down(torch.ones(4, 3), {"q": torch.eye(4)[:, :2]}).shape
    torch.Size([2, 3])
    """

    rank: int | float
    solver: Solver = "power"
    sweeps: int = 1
    orthonormal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank("Span", self.rank)
        if self.solver not in ("power", "exact", "gram", "random"):
            raise ValueError(f"Span: solver={self.solver!r}; use 'power', 'exact', 'gram' or 'random'")
        if self.sweeps < 1:
            raise ValueError(f"Span: sweeps={self.sweeps!r} is less than 1; no sweep looks at no gradient")

    def init(self, g: Tensor, seed: int) -> State:
        """`q` (..., m, rank), and what a random draw needs to go on after a resume."""
        m, n = g.shape[-2:]
        q = zeros_beside(g, count(self.rank, m, min(m, n)))
        draws = {} if self.solver in ("exact", "gram") else {"seed": counter(seed), "draw": counter()}
        return {"q": q, **draws}

    def fit(self, g: Tensor, s: State, due: bool) -> State:
        """A new basis when due."""
        if not due:
            return dict(s)
        rank = s["q"].shape[-1]
        if self.solver == "power":
            linalg.require_finite(g)
            drawn = {"seed": s["seed"], "draw": s["draw"] + 1}
            return {"q": linalg.orthogonal_iteration(g, self._start(g, s), self._turns(s)), **drawn}
        if self.solver == "random":
            start = draw_normal(s, g.shape[-1], min(rank + 8, *g.shape[-2:])).to(g.device, g.dtype)
            u = linalg.svd_random(whole(g), rank, start=start.expand(*g.shape[:-2], *start.shape)).u
            return {"q": laid(owned(u, rank), s["q"]), "seed": s["seed"], "draw": s["draw"] + 1}
        decompose = linalg.svd if self.solver == "exact" else linalg.svd_gram
        return {"q": laid(owned(decompose(whole(g)).u, rank), s["q"])}

    def down(self, g: Tensor, s: State) -> Tensor:
        """q^T g."""
        return coordinates(s["q"], g)

    def up(self, x: Tensor, s: State) -> Low:
        """q x."""
        return Low(s["q"], x)

    def move(self, x: Tensor, old: State, new: State, degree: int) -> Tensor:
        """C x with C = new^T old, or (C * C) x: exact for squares of uncorrelated coordinates."""
        turn = settled(new["q"].mT @ old["q"])
        return matmul_as(turn if degree == 1 else turn.square(), x)

    def _start(self, g: Tensor, s: State) -> Tensor:
        noise = draw_normal(s, *s["q"].shape[-2:]).to(g.device, g.dtype)
        noise = laid(noise.expand(s["q"].shape), s["q"])
        if not int(s["draw"]):
            return noise
        # A direction that the last basis misses exactly would stay unseen for ever.
        return s["q"].add(noise, alpha=(torch.finfo(g.dtype).eps / g.shape[-2]) ** 0.5)

    def _turns(self, s: State) -> int:
        return self.sweeps if int(s["draw"]) else self.sweeps + 2


@dataclass(frozen=True, slots=True)
class Rows:
    """Random rows of the gradient, drawn anew without replacement at every refresh.

    `rank` counts rows (clamped to m) or, as a float in (0, 1], is their share. Draws depend only on the seed
    and on how many were made, both in the state. A batch of matrices shares one choice.
    """

    rank: int | float
    orthonormal: ClassVar[bool] = True

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
            return picked(g.mT, s["index"], -1).mT
        return picked(g, s["index"], -2)

    def up(self, x: Tensor, s: State) -> Picked:
        """x in the chosen rows, zero elsewhere."""
        return Picked(s["index"], x, int(s["height"]))

    def move(self, x: Tensor, old: State, new: State, degree: int) -> Tensor:
        """Rows chosen both times keep their values; the others become zero. Exact for both degrees."""
        return self.down(self.up(x, old).dense(), new)


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
    return torch.Generator().manual_seed(mixed(int(s["seed"]), int(s["draw"])))


def draw_normal(s: State, *shape: int, deviation: float = 1.0) -> Tensor:
    """Normal float32 numbers of mean 0 for the frame's present draw."""
    return torch.empty(*shape, dtype=torch.float32).normal_(std=deviation, generator=generator(s))
