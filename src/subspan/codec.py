"""Codecs: how one tensor is stored between steps, or on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """A way to store a tensor as a few named tensors.

    `through` says whether the value is read back before it is used in the step that wrote it: True where the
    stored form is the method's definition (Factored), False where it is only a cheaper copy (Bf16).
    """

    @property
    def through(self) -> bool:
        """Whether a written value is used as it will be read."""

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """The named tensors that stand for x."""

    def decode(self, s: Mapping[str, Tensor]) -> Tensor:
        """A fresh tensor of the encoded shape; the caller chooses its precision."""


@dataclass(frozen=True, slots=True)
class Bf16:
    """Store in bfloat16, half the bytes of float32.

    >>> Bf16().decode(Bf16().encode(torch.tensor([1.0, 1.001])))
    tensor([1., 1.])
    """

    through: ClassVar[bool] = False

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """`{"bf16": x}` rounded to bfloat16."""
        return {"bf16": x.bfloat16()}

    def decode(self, s: Mapping[str, Tensor]) -> Tensor:
        """The stored values as float32."""
        return s["bf16"].float()


@dataclass(frozen=True, slots=True)
class Factored:
    """Store a non-negative matrix as its row and column sums (Shazeer and Stern, 2018, arXiv:1804.04235).

        x_ij ~ row_i col_j / sum row

    Both sums are kept exactly, so a moving average of matrices is the moving average of their sums.
    Raises ValueError for a tensor of fewer than two dimensions.

    >>> x = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    >>> Factored().decode(Factored().encode(x))
    tensor([[3., 4.],
            [6., 8.]])
    """

    through: ClassVar[bool] = True

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """`{"row": (..., m), "col": (..., n)}` for x (..., m, n)."""
        if x.ndim < 2:
            raise ValueError(f"Factored stores matrices, not a tensor of shape {tuple(x.shape)}; leave it out")
        return {"row": x.sum(-1), "col": x.sum(-2)}

    def decode(self, s: Mapping[str, Tensor]) -> Tensor:
        """The rank-one matrix with the stored sums; zero where all sums are zero."""
        row, col = s["row"], s["col"]
        total = row.sum(-1, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
        return (row / total).unsqueeze(-1) * col.unsqueeze(-2)
