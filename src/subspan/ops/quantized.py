"""A matrix of few bits an entry, which is formed anew for every product and kept for none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from subspan.codec import NF4, Even8
from subspan.linalg import wide
from subspan.ops.base import LinOp, hold

CODES: dict[str, tuple[int, type[Even8] | type[NF4]]] = {"int8": (8, Even8), "nf4": (4, NF4)}


class Quantized(LinOp):
    """A matrix (m, n) of codes and scales, by blocks along its rows.

        w_ij ~ scale[i, j // block] level[codes_ij]

    `code` names the levels: "nf4" has 16 (`codec.NF4`), "int8" 255 (`codec.Even8`). The codes are bytes: (m, n),
    or for nf4 (m, ceil(n / 2)), two entries in each. The scales (m, ceil(n / block)) have the matrix's precision.
    A product forms the matrix, in float32 at least with one cast, and so does its backward pass. Kept for that are
    codes and scales, and the input only where scales train; the codes never change. Raises ValueError for a code
    that there is not, and for shapes that do not fit.

    >>> op = quantize(torch.tensor([[-2.0, 0.0, 0.3, 1.0]]))
    >>> op.dense(), op.codes.shape
    (tensor([[-2.0000,  0.0000,  0.3219,  0.8814]]), torch.Size([1, 2]))
    """

    codes: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, n: int, code: str = "nf4", block: int = 64) -> None:
        super().__init__()
        bits = bits_of(code, block)
        wanted = (len(codes), -(-n * bits // 8)), (len(codes), -(-n // block))
        if (tuple(codes.shape), tuple(scale.shape)) != wanted:
            raise ValueError(
                f"Quantized: codes {tuple(codes.shape)} and scale {tuple(scale.shape)} are no {len(codes)} rows "
                f"of {n} in {code} by blocks of {block}, which are {wanted[0]} and {wanted[1]}; use quantize(w)"
            )
        self.register_buffer("codes", codes)
        self.scale = hold(scale)
        self.n, self.code, self.block = n, code, block
        self.shape = (len(codes), n)

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_to(x, False)

    def back(self, x: Tensor) -> Tensor:
        return self._apply_to(x, True)

    def _apply_to(self, x: Tensor, back: bool) -> Tensor:
        y: Tensor = _Formed.apply(x, self.codes, self.scale, (self.n, self.code, self.block), back)  # type: ignore[no-untyped-call]
        return y

    def dense(self) -> Tensor:
        return decoded(self.codes, self.scale, self.n, self.code, self.block)

    def extra_repr(self) -> str:
        """The shape and how it is stored."""
        return f"{self.shape[0]}, {self.n}, code={self.code!r}, block={self.block}"


def bits_of(code: str, block: int = 64) -> int:
    """The bits of an entry; raises ValueError for a code that there is not, and for a block that it cannot have.

    >>> bits_of("nf4"), bits_of("int8")
    (4, 8)
    """
    if code not in CODES:
        raise ValueError(f"Quantized: there is no code {code!r}; use {' or '.join(map(repr, CODES))}")
    bits = CODES[code][0]
    if block < 1 or block * bits % 8:
        raise ValueError(f"Quantized: block={block!r} of {bits} bits each are no whole bytes; give an even one")
    return bits


@torch.no_grad()
def quantize(w: Tensor, code: str = "nf4", block: int = 64) -> Quantized:
    """The matrix w (m, n) in few bits: each entry the nearest level of its block, scaled by the block's largest.

    Nothing of it trains. Raises ValueError for NaN or infinite entries, and as `Quantized` does.
    """
    bits = bits_of(code, block)
    if w.ndim != 2 or not w.isfinite().all():
        raise ValueError(f"quantize: w {tuple(w.shape)} must be a matrix of finite numbers")
    n = w.shape[1]
    made = CODES[code][1](block).encode(F.pad(w.detach(), (0, n % 2)) if bits == 4 else w.detach())
    # The largest of a block is one of its entries, so that this cast loses nothing.
    return Quantized(made["codes"], made["absmax"].to(w.dtype), n, code, block)


def decoded(codes: Tensor, scale: Tensor, n: int, code: str, block: int) -> Tensor:
    """The matrix (m, n) of codes and scales, in the precision of the scales."""
    parts = {"codes": codes, "tail": codes[:, :0], "absmax": wide(scale)}
    return CODES[code][1](block).decode(parts)[:, :n].to(scale.dtype)


class _Formed(torch.autograd.Function):
    """x times the transpose of a quantized matrix, or the matrix, formed for both passes and kept for none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, facts: tuple[int, str, int], back: bool
    ) -> Tensor:
        ctx.save_for_backward(codes, scale, x if ctx.needs_input_grad[2] else None)
        ctx.facts, ctx.back, ctx.dtype = facts, back, x.dtype
        w = decoded(codes, scale, *facts)
        return x @ w if back else F.linear(x, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, x = ctx.saved_tensors
        down = ds = None
        if ctx.needs_input_grad[0]:
            # Under autocast g is narrower than the scales.
            w = decoded(codes, scale, *ctx.facts).to(g.dtype)
            down = (F.linear(g, w) if ctx.back else g @ w).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            left, right = (x, g) if ctx.back else (g, x)
            full = left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])
            with torch.enable_grad():
                s = scale.detach().requires_grad_()
                (ds,) = torch.autograd.grad(decoded(codes, s, *ctx.facts), s, full.to(s.dtype))
        return down, None, ds, None, None
