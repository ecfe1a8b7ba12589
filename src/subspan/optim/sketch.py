"""Random combinations of a gradient's rows: `Sketch` keeps a seed, `Gaussian` the matrix itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from subspan.optim.direction import Low, coordinates, matmul_as
from subspan.optim.state import State, counter
from subspan.optim.subspace import count, draw_normal, require_rank


@dataclass(frozen=True, slots=True)
class Sketch:
    """Gaussian combinations of the rows, drawn anew at every refresh, of which only the seed is kept.

        q (m, rank) of N(0, 1 / rank),   down(g) = q^T g,   so that q q^T is I on average

    The matrix is made again whenever it is needed, on the CPU in float32, from the seed and the number of draws:
    it is the same on every device and after a resume, and holds no memory between steps. That costs about a
    nanosecond for each of its numbers on every device; `Gaussian` trades it for rank * m numbers of memory.
    `rank` counts columns or, as a float in (0, 1], is their share of the m rows. A batch shares one matrix.

    >>> from torch import ones
    >>> g = ones(4, 3)
    >>> sorted(Sketch(2).init(g, seed=0)), Sketch(2).down(g, Sketch(2).init(g, seed=0)).shape
    (['draw', 'height', 'seed'], torch.Size([2, 3]))
    """

    rank: int | float
    orthonormal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_rank("Sketch", self.rank)

    def init(self, g: Tensor, seed: int) -> State:
        """The height m, and the seed and number of draws."""
        return {"height": counter(g.shape[-2]), "seed": counter(seed), "draw": counter()}

    def fit(self, g: Tensor, s: State, due: bool) -> State:
        """The next draw when due."""
        return {**s, "draw": s["draw"] + 1} if due else dict(s)

    def down(self, g: Tensor, s: State) -> Tensor:
        """q^T g."""
        m, n = g.shape[-2:]
        return coordinates(gaussian(s, m, count(self.rank, m, min(m, n)), like=g), g)

    def up(self, x: Tensor, s: State) -> Low:
        """q x."""
        return Low(gaussian(s, int(s["height"]), x.shape[-2], like=x), x)

    def move(self, x: Tensor, old: State, new: State, degree: int) -> Tensor:
        """C x with C = new^T old (Flora's transfer), or (C * C) x."""
        turn = self.up(x, new).left.mT @ self.up(x, old).left
        return matmul_as(turn if degree == 1 else turn.square(), x)


@dataclass(frozen=True, slots=True)
class Gaussian:
    """The same combinations as `Sketch`, the matrix kept in the state: faster, for rank * m numbers of memory."""

    rank: int | float
    orthonormal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_rank("Gaussian", self.rank)

    def init(self, g: Tensor, seed: int) -> State:
        """`q` (m, rank), and the seed and number of draws."""
        m, n = g.shape[-2:]
        q = g.new_zeros(m, count(self.rank, m, min(m, n)))
        return {"q": q, "seed": counter(seed), "draw": counter()}

    def fit(self, g: Tensor, s: State, due: bool) -> State:
        """A new matrix when due."""
        if not due:
            return dict(s)
        drawn = {"seed": s["seed"], "draw": s["draw"] + 1}
        return {"q": gaussian(drawn, *s["q"].shape, like=g), **drawn}

    def down(self, g: Tensor, s: State) -> Tensor:
        """q^T g."""
        return coordinates(s["q"], g)

    def up(self, x: Tensor, s: State) -> Low:
        """q x."""
        return Low(s["q"], x)

    def move(self, x: Tensor, old: State, new: State, degree: int) -> Tensor:
        """C x with C = new^T old, or (C * C) x."""
        turn = new["q"].mT @ old["q"]
        return matmul_as(turn if degree == 1 else turn.square(), x)


def gaussian(s: State, m: int, rank: int, *, like: Tensor) -> Tensor:
    """The matrix (m, rank) of the frame's present draw, N(0, 1 / rank), in the precision and place of `like`."""
    if like.is_meta:  # where only its shape matters, and a seed has no value
        return like.new_empty(m, rank)
    return draw_normal(s, m, rank, deviation=rank**-0.5).to(like)
