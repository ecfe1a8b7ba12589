"""`Cosine`: the gradient's largest coordinates in a fixed basis of cosines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from subspan import linalg
from subspan.optim.direction import Low, matmul_as
from subspan.optim.state import State, counter
from subspan.optim.subspace import count, require_rank
from subspan.shards import whole


@dataclass(frozen=True, slots=True)
class Cosine:
    """The columns of the cosine matrix along which the gradient is largest (Modoranu et al., 2025).

        D_ij = sqrt(2 / m) cos(pi i (2j + 1) / 2m),   row 0 times sqrt(1/2)

    Chosen are the `rank` columns of D whose coordinates, rows of D^T g, have the largest norms, "l1" or "l2";
    with "l2" the choice loses the least of |g|. Only their numbers are state. D is orthonormal and the same for
    all tensors of one height: it is kept outside the state, once a height, precision and device, for the life
    of the process. A fit costs the product D^T g; `down` then multiplies the chosen columns once more, a share
    rank / m of that. `rank` is a count (clamped to m) or, as a float in (0, 1], a share of the m columns.
    Source: arXiv:2505.17967.
    """

    rank: int | float
    norm: Literal["l1", "l2"] = "l1"
    orthonormal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rank("Cosine", self.rank)
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"Cosine: norm={self.norm!r}; use 'l1' or 'l2'")

    def init(self, g: Tensor, seed: int) -> State:
        """`index` (..., rank) ascending, and the height m."""
        m = g.shape[-2]
        first = torch.arange(count(self.rank, m, m), device=g.device)
        return {"index": first.expand(*g.shape[:-2], -1).clone(), "height": counter(m)}

    def fit(self, g: Tensor, s: State, due: bool) -> State:
        """The largest coordinates of this gradient when due."""
        if not due:
            return dict(s)
        linalg.require_finite(g)
        coordinates = matmul_as(cosines(g.shape[-2], g.dtype, g.device), g)
        score = whole(vector_norm(coordinates, 1 if self.norm == "l1" else 2, dim=-1))
        index = score.topk(s["index"].shape[-1]).indices.sort().values
        return {"index": index, "height": s["height"]}

    def down(self, g: Tensor, s: State) -> Tensor:
        """The chosen rows of D^T g."""
        return matmul_as(cosines(g.shape[-2], g.dtype, g.device)[s["index"]], g)

    def up(self, x: Tensor, s: State) -> Low:
        """The chosen columns of D, times x."""
        return Low(cosines(int(s["height"]), x.dtype, x.device)[s["index"]].mT, x)

    def move(self, x: Tensor, old: State, new: State, degree: int) -> Tensor:
        """A column chosen both times keeps its row, the others begin at zero. Exact for both degrees."""
        same = new["index"].unsqueeze(-1) == old["index"].unsqueeze(-2)
        return matmul_as(same.to(x.dtype), x)


@lru_cache
def cosines(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """D^T, the basis vectors as rows; shared, so only to be read.

    >>> d = cosines(4, torch.float64, torch.device("cpu"))
    >>> torch.allclose(d @ d.mT, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-15)
    True
    """
    i = torch.arange(size, dtype=torch.int64)
    turns = torch.outer(2 * i + 1, i) % (4 * size)  # whole turns taken off exactly, before any rounding
    rows = (turns.double() * (math.pi / (2 * size))).cos() * math.sqrt(2 / size)
    rows[:, 0] *= math.sqrt(0.5)
    return rows.to(device, dtype)
