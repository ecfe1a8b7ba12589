"""A matrix laid together from shards of a pool that other matrices draw on too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from subspan.ops.base import LinOp, hold


class Shards(LinOp):
    """A matrix (rank, n) each of whose rows is `parts` shards of a pool in a line.

        row k = pool[index[k parts]], ..., pool[index[k parts + parts - 1]]

    pool (shards, n / parts) may be the parameter of several such matrices, and gets the gradient of all; index
    (rank * parts,) of whole numbers is fixed. Raises ValueError for an index that gives no whole rows.

    >>> Shards(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0, 1, 1]), 2).dense()
    tensor([[3., 1.],
            [2., 2.]])
    """

    index: Tensor

    def __init__(self, pool: Tensor, index: Tensor, parts: int) -> None:
        super().__init__()
        if parts < 1 or len(index) % parts:
            raise ValueError(f"Shards: {len(index)} shards are no rows of {parts}; give a multiple of that")
        self.pool = hold(pool)
        self.register_buffer("index", index)
        self.parts = parts
        self.shape = (len(index) // parts, parts * pool.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense())

    def back(self, x: Tensor) -> Tensor:
        return x @ self.dense()

    def dense(self) -> Tensor:
        return torch.index_select(self.pool, 0, self.index).view(self.shape)
