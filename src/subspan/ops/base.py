"""What a matrix is: the protocol every structured matrix obeys, and how to combine them."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn


def hold(tensor: Tensor) -> nn.Parameter:
    """The tensor as a parameter; one that is not yet a parameter is frozen unless it wants gradients."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


class LinOp(nn.Module, abc.ABC):
    """An m x n matrix known by what it does to a vector.

    Constructor arguments, attributes and state-dict keys share one name; each argument is a Tensor, a LinOp,
    a list of LinOps, or a plain number: `subspan.io` needs no other contract to save any op.
    """

    shape: tuple[int, int]

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply the matrix: (..., n) -> (..., m), never materialising it."""

    @abc.abstractmethod
    def back(self, x: Tensor) -> Tensor:
        """Apply the transpose: (..., m) -> (..., n)."""

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """The matrix itself, (m, n)."""

    @property
    def T(self) -> LinOp:
        """The transpose, sharing storage and gradients."""
        return self.op if isinstance(self, Transposed) else Transposed(self)

    def __add__(self, other: LinOp) -> Sum:
        return Sum([self, other])

    def __matmul__(self, other: LinOp) -> Product:
        return Product([self, other])

    def __mul__(self, scale: float) -> Scaled:
        return Scaled(self, scale)

    __rmul__ = __mul__


class Sum(LinOp):
    """op_1 + op_2 + ... of equal shapes."""

    ops: Sequence[LinOp]

    def __init__(self, ops: list[LinOp]) -> None:
        super().__init__()
        if len({op.shape for op in ops}) != 1:
            raise ValueError(f"Sum needs one or more ops of one shape, got {[op.shape for op in ops]}")
        self.ops = cast(Sequence[LinOp], nn.ModuleList(ops))
        self.shape = ops[0].shape

    def forward(self, x: Tensor) -> Tensor:
        return reduce(torch.add, (op(x) for op in self.ops))

    def back(self, x: Tensor) -> Tensor:
        return reduce(torch.add, (op.back(x) for op in self.ops))

    def dense(self) -> Tensor:
        return reduce(torch.add, (op.dense() for op in self.ops))


class Product(LinOp):
    """op_1 @ op_2 @ ..., applied from the right."""

    ops: Sequence[LinOp]

    def __init__(self, ops: list[LinOp]) -> None:
        super().__init__()
        if not ops:
            raise ValueError("Product needs at least one op, got none")
        for a, b in pairwise(ops):
            if a.shape[1] != b.shape[0]:
                raise ValueError(
                    f"Product of {a.shape} and {b.shape}: inner sizes {a.shape[1]} and {b.shape[0]} differ"
                )
        self.ops = cast(Sequence[LinOp], nn.ModuleList(ops))
        self.shape = (ops[0].shape[0], ops[-1].shape[1])

    def forward(self, x: Tensor) -> Tensor:
        for op in reversed(self.ops):
            x = op(x)
        return x

    def back(self, x: Tensor) -> Tensor:
        for op in self.ops:
            x = op.back(x)
        return x

    def dense(self) -> Tensor:
        total = self.ops[-1].dense()
        for op in reversed(self.ops[:-1]):
            total = op(total.mT).mT
        return total


class Scaled(LinOp):
    """scale * op with a fixed number."""

    op: LinOp

    def __init__(self, op: LinOp, scale: float) -> None:
        super().__init__()
        self.op = op
        self.scale = float(scale)
        self.shape = op.shape

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.op(x)

    def back(self, x: Tensor) -> Tensor:
        return self.scale * self.op.back(x)

    def dense(self) -> Tensor:
        return self.scale * self.op.dense()


class Transposed(LinOp):
    """The transpose of an op."""

    op: LinOp

    def __init__(self, op: LinOp) -> None:
        super().__init__()
        self.op = op
        self.shape = (op.shape[1], op.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.op.back(x)

    def back(self, x: Tensor) -> Tensor:
        return self.op(x)

    def dense(self) -> Tensor:
        return self.op.dense().mT
