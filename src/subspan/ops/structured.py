"""Matrices with few numbers and a high rank: Kronecker, Hadamard, sparse, seeded, stacked, orthogonal."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from subspan.linalg import wide
from subspan.ops.base import LinOp, hold
from subspan.ops.basic import LowRank

Law = Literal["uniform", "ternary"]


class Zero(LinOp):
    """The matrix of zeros, (m, n): where a join does all the work.

    >>> Zero(2, 3)(torch.ones(3))
    tensor([0., 0.])
    """

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.m, self.n = m, n
        self.shape = (m, n)
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.m)

    def back(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.n)

    def dense(self) -> Tensor:
        return self.get_buffer("like").new_zeros(self.shape)


class Kron(LinOp):
    """a (p, q) kron b (s, t), a matrix of p s rows and q t columns that is applied without being formed.

    >>> from subspan.ops import Diag
    >>> Kron(Diag(torch.tensor([1.0, 2.0])), Diag(torch.tensor([1.0, 3.0])))(torch.ones(4))
    tensor([1., 3., 2., 6.])
    """

    a: LinOp
    b: LinOp

    def __init__(self, a: LinOp, b: LinOp) -> None:
        super().__init__()
        self.a = a
        self.b = b
        self.shape = (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        (p, q), (s, t) = self.a.shape, self.b.shape
        x = torch.unflatten(x, -1, (q, t))
        if q * s * (t + p) <= p * t * (q + s):
            return self.a(self.b(x).mT).mT.flatten(-2)
        return self.b(self.a(x.mT).mT).flatten(-2)

    def back(self, x: Tensor) -> Tensor:
        x = torch.unflatten(x, -1, (self.a.shape[0], self.b.shape[0]))
        return self.a.back(self.b.back(x).mT).mT.flatten(-2)

    def dense(self) -> Tensor:
        return torch.kron(self.a.dense(), self.b.dense())


class Hadamard(LinOp):
    """(one.u @ one.v) * (two.u @ two.v), entry by entry: rank up to one.rank * two.rank.

    It is applied as a product of that inner size where this is cheaper, else as a matrix that the backward pass
    forms anew, so that only factors are kept. Raises ValueError for two shapes.

    >>> Hadamard(LowRank(torch.ones(2, 1), torch.ones(1, 2)), LowRank(torch.eye(2), torch.eye(2))).dense()
    tensor([[1., 0.],
            [0., 1.]])
    """

    one: LowRank
    two: LowRank

    def __init__(self, one: LowRank, two: LowRank) -> None:
        super().__init__()
        if one.shape != two.shape:
            raise ValueError(f"Hadamard of {one.shape} and {two.shape}: both need one shape")
        self.one = one
        self.two = two
        self.shape = one.shape

    def forward(self, x: Tensor) -> Tensor:
        return self.across(x, self.one.u, self.one.v, self.two.u, self.two.v)

    def back(self, x: Tensor) -> Tensor:
        return self.across(x, self.one.v.mT, self.one.u.mT, self.two.v.mT, self.two.u.mT)

    def across(self, x: Tensor, u1: Tensor, v1: Tensor, u2: Tensor, v2: Tensor) -> Tensor:
        """x times the transpose of (u1 v1) * (u2 v2), the cheaper way."""
        m, n = self.shape
        if self.one.rank * self.two.rank * (m + n) <= m * n:
            return F.linear(x @ rows_kron(v1.mT, v2.mT), rows_kron(u1, u2))
        return _run(_Entrywise, x, u1, v1, u2, v2)

    def dense(self) -> Tensor:
        return self.one.dense() * self.two.dense()


def _run(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    y: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


def rows_kron(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker product of each row of a (m, p) with the same row of b (m, q), (m, p q).

    >>> rows_kron(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]))
    tensor([[1., 3., 2., 6.]])
    """
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)


class _Entrywise(torch.autograd.Function):
    """x times the transpose of (u1 v1) * (u2 v2), keeping x and the factors only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u1: Tensor, v1: Tensor, u2: Tensor, v2: Tensor) -> Tensor:
        ctx.save_for_backward(x, u1, v1, u2, v2)
        return F.linear(x, (u1 @ v1) * (u2 @ v2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        x, u1, v1, u2, v2 = ctx.saved_tensors
        x, g = x.to(u1.dtype), g.to(u1.dtype)  # under autocast they are narrower
        one, two = u1 @ v1, u2 @ v2
        full = g.flatten(0, -2).mT @ x.flatten(0, -2) if g.dim() > 1 else torch.outer(g, x)
        d1, d2 = full * two, full * one
        return g @ (one * two), d1 @ v1.mT, u1.mT @ d1, d2 @ v2.mT, u2.mT @ d2


class Entries(LinOp):
    """A sparse (m, n) matrix: values (k,) at the flat positions index (k,), each named once, zero elsewhere.

    Entry i lies in row index[i] // n and column index[i] % n. Few inputs are gathered; for many the matrix is
    formed, and formed anew in the backward pass. Raises ValueError unless index and values are alike.

    >>> Entries(torch.tensor([1, 2]), torch.tensor([5.0, 7.0]), 2, 2).dense()
    tensor([[0., 5.],
            [7., 0.]])
    """

    index: Tensor

    def __init__(self, index: Tensor, values: Tensor, m: int, n: int) -> None:
        super().__init__()
        if index.dim() != 1 or index.shape != values.shape:
            raise ValueError(f"Entries: index {tuple(index.shape)} and values {tuple(values.shape)} are not alike")
        self.register_buffer("index", index)
        self.values = hold(values)
        self.m, self.n = m, n
        self.shape = (m, n)

    def forward(self, x: Tensor) -> Tensor:
        return _sparse(x, self.index, self.values, self.m, self.n)

    def back(self, x: Tensor) -> Tensor:
        swapped = self.index % self.n * self.m + self.index // self.n
        return _sparse(x, swapped, self.values, self.n, self.m)

    def dense(self) -> Tensor:
        return _scattered(self.index, self.values, self.m, self.n)


def _scattered(index: Tensor, values: Tensor, m: int, n: int) -> Tensor:
    return values.new_zeros(m * n).index_add(0, index, values).view(m, n)


def _sparse(x: Tensor, index: Tensor, values: Tensor, m: int, n: int) -> Tensor:
    if x.numel() // n * len(values) > m * n:
        return _run(_Sparse, x, index, values, m, n)
    taken = x.index_select(-1, index % n) * values
    return taken.new_zeros(*x.shape[:-1], m).index_add(-1, index // n, taken)


class _Sparse(torch.autograd.Function):
    """x times the transpose of a sparse matrix, formed for both passes and kept for none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, values: Tensor, m: int, n: int) -> Tensor:
        ctx.save_for_backward(x, index, values)
        ctx.shape = (m, n)
        return F.linear(x, _scattered(index, values, m, n))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, index, values = ctx.saved_tensors
        x, g = x.to(values.dtype), g.to(values.dtype)  # under autocast they are narrower
        full = g.flatten(0, -2).mT @ x.flatten(0, -2) if g.dim() > 1 else torch.outer(g, x)
        down = g @ _scattered(index, values, *ctx.shape) if ctx.needs_input_grad[0] else None
        return down, None, full.flatten().index_select(0, index), None, None


class Columns(LinOp):
    """A matrix of n columns that is zero but for the columns index (k,), each named once: values (m, k).

    Applying it keeps the k chosen inputs for the backward pass, no others. Raises ValueError unless there is
    one index for each column of values.

    >>> Columns(torch.tensor([1]), torch.tensor([[5.0], [7.0]]), 2).dense()
    tensor([[0., 5.],
            [0., 7.]])
    """

    index: Tensor

    def __init__(self, index: Tensor, values: Tensor, n: int) -> None:
        super().__init__()
        if index.shape != values.shape[1:]:
            raise ValueError(f"Columns: index {tuple(index.shape)} does not fit values {tuple(values.shape)}")
        self.register_buffer("index", index)
        self.values = hold(values)
        self.n = n
        self.shape = (values.shape[0], n)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.index_select(-1, self.index), self.values)

    def back(self, x: Tensor) -> Tensor:
        y = x @ self.values
        return y.new_zeros(*x.shape[:-1], self.n).index_add(-1, self.index, y)

    def dense(self) -> Tensor:
        return self.values.new_zeros(self.shape).index_add(1, self.index, self.values)


class Seeded(LinOp):
    """A frozen random matrix (m, n) that its seed brings back: no file holds it, and equal ones share storage.

    `scale` is the standard deviation of its independent entries of mean zero: "uniform" on +-sqrt(3) scale, or
    "ternary", which is 0 in two thirds of the cases and +-sqrt(3) scale else. The draw is made on the CPU in
    float32, whatever the device, row after row: a lower matrix of the same seed is the head of a taller one.
    Raises ValueError for another law.

    >>> tall, low = Seeded(3, 5, 2), Seeded(3, 4, 2)
    >>> bool((tall.dense()[:4] == low.dense()).all()), len(tall.state_dict())
    (True, 0)
    """

    def __init__(self, seed: int, m: int, n: int, law: Law = "uniform", scale: float = 1.0) -> None:
        super().__init__()
        if law not in ("uniform", "ternary"):
            raise ValueError(f"law {law!r} is neither 'uniform' nor 'ternary'")
        self.seed, self.m, self.n, self.law, self.scale = seed, m, n, law, float(scale)
        self.shape = (m, n)
        # Says in which precision and on which device dense() is wanted.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def unit(self, like: Tensor) -> Tensor:
        """The entries before scaling, in the precision and on the device of a tensor; not to be written to."""
        key = (self.seed, self.n, self.law, like.dtype, like.device)
        drawn = _DRAWN.get(key)
        if drawn is None or drawn.shape[0] < self.m:
            drawn = _DRAWN[key] = _draw(self.seed, self.m, self.n, self.law, like)
        return drawn[: self.m]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unit(x)) * self.scale

    def back(self, x: Tensor) -> Tensor:
        return (x @ self.unit(x)) * self.scale

    def dense(self) -> Tensor:
        return self.unit(self.get_buffer("like")) * self.scale


# The tallest matrix drawn so far of each seed, width and law, for each precision and device.
_DRAWN: dict[tuple[int, int, str, torch.dtype, torch.device], Tensor] = {}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _draw(seed: int, m: int, n: int, law: str, like: Tensor) -> Tensor:
    # A matrix first drawn inside inference_mode could take no part in a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        drawn = torch.rand(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
        if law == "ternary":
            return (math.sqrt(3) * ((drawn >= 5 / 6).float() - (drawn < 1 / 6).float())).to(like)
        return (math.sqrt(3) * (2 * drawn - 1)).to(like)


class Stacked(LinOp):
    """The matrices diag(rows[i]) op diag(columns[i]) one above the other, with rows (k, r) and columns (k, n).

    The stack is formed for the product and again in the backward pass; kept are the op's matrix and the two
    scales. Raises ValueError where the shapes disagree.

    >>> from subspan.ops import Dense
    >>> Stacked(Dense(torch.ones(1, 2)), torch.tensor([[2.0], [3.0]]), torch.ones(2, 2)).dense()
    tensor([[2., 2.],
            [3., 3.]])
    """

    op: LinOp

    def __init__(self, op: LinOp, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        if (rows.shape[1], columns.shape[1]) != op.shape or len(rows) != len(columns):
            scales = f"rows {tuple(rows.shape)} and columns {tuple(columns.shape)}"
            raise ValueError(f"Stacked: {scales} do not scale {op.shape}")
        self.op = op
        self.rows = hold(rows)
        self.columns = hold(columns)
        self.shape = (rows.numel(), op.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return _run(_Stack, x, self.op.dense().to(x), self.rows, self.columns, False)

    def back(self, x: Tensor) -> Tensor:
        return _run(_Stack, x, self.op.dense().to(x), self.rows, self.columns, True)

    def dense(self) -> Tensor:
        return _stack(self.op.dense(), self.rows, self.columns)


def _stack(a: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return (rows.unsqueeze(-1) * a * columns.unsqueeze(-2)).flatten(0, 1)


class _Stack(torch.autograd.Function):
    """x times a stack of scaled matrices, or its transpose, keeping x, the one matrix and the scales."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, rows: Tensor, columns: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(x, a, rows, columns)
        ctx.back = back
        u = _stack(a, rows, columns)
        return x @ u if back else F.linear(x, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, a, rows, columns = ctx.saved_tensors
        x, a, g = (t.to(rows.dtype) for t in (x, a, g))  # under autocast they are narrower
        u = _stack(a, rows, columns)
        left, right = (x, g) if ctx.back else (g, x)
        full = left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])
        full = full.unflatten(0, rows.shape)
        down = (F.linear(g, u) if ctx.back else g @ u) if ctx.needs_input_grad[0] else None
        da = torch.einsum("krn,kr,kn->rn", full, rows, columns) if ctx.needs_input_grad[1] else None
        full = full * a
        return down, da, torch.einsum("krn,kn->kr", full, columns), torch.einsum("krn,kr->kn", full, rows), None


class BlockCayley(LinOp):
    """A block-diagonal orthogonal matrix, every block (I - Q) (I + Q)^-1 with Q = -Q^T.

    q (blocks, size (size - 1) / 2) holds the entries of each Q above its diagonal, row after row; at q = 0 the
    matrix is the identity. Half precision is solved in float32.

    >>> BlockCayley(torch.tensor([[1.0]])).dense()
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """

    def __init__(self, q: Tensor) -> None:
        super().__init__()
        self.q = hold(q)
        self.size = (1 + math.isqrt(1 + 8 * q.shape[1])) // 2
        if self.size * (self.size - 1) // 2 != q.shape[1]:
            raise ValueError(f"BlockCayley: {q.shape[1]} numbers fill no triangle; give size * (size - 1) / 2")
        self.shape = (q.shape[0] * self.size, q.shape[0] * self.size)

    def blocks(self) -> Tensor:
        """The orthogonal blocks (blocks, size, size), in float32 at least."""
        q, size = wide(self.q), self.size
        i, j = torch.triu_indices(size, size, 1, device=q.device)
        flat = q.new_zeros(len(q), size * size).index_copy(1, i * size + j, q)
        upper = flat.view(len(q), size, size)
        skew, one = upper - upper.mT, torch.eye(size, dtype=q.dtype, device=q.device)
        # Both factors commute, so the inverse may stand on either side.
        solved: Tensor = torch.linalg.solve(one + skew, one - skew)
        return solved

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.unflatten(x, -1, (len(self.q), self.size))
        return torch.einsum("...bj,bij->...bi", parts, self.blocks().to(x.dtype)).flatten(-2)

    def back(self, x: Tensor) -> Tensor:
        parts = torch.unflatten(x, -1, (len(self.q), self.size))
        return torch.einsum("...bi,bij->...bj", parts, self.blocks().to(x.dtype)).flatten(-2)

    def dense(self) -> Tensor:
        dense: Tensor = torch.block_diag(*self.blocks().to(self.q.dtype))  # type: ignore[no-untyped-call]
        return dense
