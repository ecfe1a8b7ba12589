"""Codecs: how one tensor is stored between steps, or on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from subspan.shards import by_rows, from_rows, largest


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


def dynamic(bits: int, *, signed: bool) -> tuple[float, ...]:
    """The ascending levels of the dynamic map (Dettmers et al., 2022, arXiv:2110.02861), 2^bits in number.

    The unused leading zeros e of a code are a power 10^-e, the bits after its first one a share of [0.1, 1]:

        10^-e (0.1 + 0.9 (i + 1/2) / 2^f),   i = 0 ... 2^f - 1,   f = bits - 1 - e - signed,   e = 0 ... bits - 2

    with both signs, or, unsigned, one more bit of share (f). 0 and 1 complete them; -1 is not a level.

    >>> [round(level, 4) for level in dynamic(3, signed=True)]
    [-0.775, -0.325, -0.055, 0.0, 0.055, 0.325, 0.775, 1.0]
    """
    shares = [(e, bits - 1 - e - signed) for e in range(bits - 1)]
    above = [10.0**-e * (0.1 + 0.9 * (i + 0.5) / 2**f) for e, f in shares for i in range(2**f)]
    return tuple(sorted([-level for level in above if signed] + [0.0] + above + [1.0]))


DYNAMIC8, UNSIGNED8, DYNAMIC4 = dynamic(8, signed=True), dynamic(8, signed=False), dynamic(4, signed=True)
LINEAR4 = tuple((i + 1) / 16 for i in range(16))
EVEN8 = tuple((i - 127) / 127 for i in range(255))
# Appendix E of arXiv:2305.14314.
NORMAL4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Int8:
    """Store in 8 bits, by blocks along the rows (Dettmers et al., 2022, arXiv:2110.02861).

        x_i ~ absmax level[code_i],   absmax = max |x_i| over the block

    with the nearest of `dynamic`'s 256 levels; signed=False is for second moments and makes negative entries 0.
    One byte an entry and one absmax a block, in float32 (float64 for float64 x). Blocks lie inside the rows (the
    last dimension), the last of a row may be shorter: so a batch is stored as its members, and some rows as that
    part of the whole. The authors' program cuts the flattened tensor; the two agree where the row length is a
    multiple of `block`. An entry of -absmax shrinks by 0.7 %, for -1 is not a level. NaN or infinity in x makes
    every entry of its block NaN or infinite. Raises ValueError for a tensor without dimensions or block < 1.

    >>> Int8().decode(Int8().encode(torch.tensor([0.5, 2.0])))
    tensor([0.4953, 2.0000])
    """

    block: int = 256
    signed: bool = True
    through: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_block("Int8", self.block)

    @property
    def levels(self) -> tuple[float, ...]:
        """The 256 numbers a code stands for, ascending."""
        return DYNAMIC8 if self.signed else UNSIGNED8

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """`{"codes": (..., n) uint8, "absmax": (..., ceil(n / block))}` for x (..., n)."""
        return by_rows(self._encode, x)

    def decode(self, s: Mapping[str, Tensor]) -> Tensor:
        """The levels times their block's absmax, in its precision."""
        return from_rows(self._decode, s)

    def _encode(self, x: Tensor) -> dict[str, Tensor]:
        absmax, share = by_block(x, self.block, "Int8")
        return {"codes": nearest(share, self.levels), "absmax": absmax}

    def _decode(self, s: Mapping[str, Tensor]) -> Tensor:
        return looked_up(s, self.levels, self.block)


@dataclass(frozen=True, slots=True)
class Int4:
    """Store in 4 bits, two entries a byte, by blocks as in `Int8` (Li et al., 2023, arXiv:2309.01507).

    The 16 levels are `dynamic`'s; for signed=False they are 1/16, 2/16 ... 1, without 0, so that a second moment
    never becomes 0 where its block is not. An entry of -absmax shrinks by 11 %, for -1 is not a level. Raises
    ValueError for a tensor without dimensions or block < 1.

    >>> Int4(signed=False).decode(Int4(signed=False).encode(torch.tensor([0.0, 3.0, 8.0])))
    tensor([0.5000, 3.0000, 8.0000])
    """

    block: int = 128
    signed: bool = True
    through: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_block("Int4", self.block)

    @property
    def levels(self) -> tuple[float, ...]:
        """The 16 numbers a code stands for, ascending."""
        return DYNAMIC4 if self.signed else LINEAR4

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """`{"codes": (..., n // 2), "tail": (..., n % 2), "absmax": (..., ceil(n / block))}` for x (..., n)."""
        return by_rows(self._encode, x)

    def decode(self, s: Mapping[str, Tensor]) -> Tensor:
        """The levels times their block's absmax, in its precision."""
        return from_rows(self._decode, s)

    def _encode(self, x: Tensor) -> dict[str, Tensor]:
        absmax, share = by_block(x, self.block, "Int4")
        return {**paired(nearest(share, self.levels)), "absmax": absmax}

    def _decode(self, s: Mapping[str, Tensor]) -> Tensor:
        absmax = s["absmax"]
        return scaled(unpaired(s, self.levels, absmax.dtype), absmax, self.block)


@dataclass(frozen=True, slots=True)
class Int4Rank1:
    """Store a second moment in 4 bits by its row and column maxima (Li et al., 2023, arXiv:2309.01507).

        x_ij ~ min(row_i, col_j) level[code_ij],   row_i = max_j |x_ij|,   col_j = max_i |x_ij|

    with the levels 1/16, 2/16 ... 1: without 0, so no entry becomes 0 unless its row or column is. Leading
    dimensions are a batch (the authors' program takes maxima over all other dimensions), and x (n) is stored by
    Int4(block, signed=False). Some rows are not stored as in the whole, for the column maxima tie them. An
    infinite entry stays infinite, NaN makes its row and column NaN. Raises ValueError for a tensor without
    dimensions or block < 1.

    >>> x = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    >>> Int4Rank1().decode(Int4Rank1().encode(x))
    tensor([[3., 4.],
            [6., 8.]])
    """

    block: int = 128
    through: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_block("Int4Rank1", self.block)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Codes as `Int4`'s, and `{"row": (..., m), "col": (..., n)}` for x (..., m, n)."""
        if x.ndim < 2:
            return Int4(self.block, signed=False).encode(x)
        row, col = (largest(x, at).to(scale_type(x)) for at in (-1, -2))
        share = smaller(row, col)
        torch.div(x, share.masked_fill_(share == 0, 1), out=share)
        return {**by_rows(lambda part: paired(nearest(part, LINEAR4)), share), "row": row, "col": col}

    def decode(self, s: Mapping[str, Tensor]) -> Tensor:
        """The levels times the smaller maximum, in its precision."""
        if "row" not in s:
            return Int4(self.block, signed=False).decode(s)
        codes = {key: s[key] for key in ("codes", "tail")}
        share = from_rows(lambda parts: unpaired(parts, LINEAR4, s["row"].dtype), codes)
        return share.mul_(smaller(s["row"], s["col"]))


@dataclass(frozen=True, slots=True)
class Even8:
    """Store a weight in 8 bits: the nearest of 255 evenly spaced levels -1 ... 1, by blocks as in `Int8`.

        x_i ~ absmax (code_i - 127) / 127

    So 0 and +-absmax are kept, and no entry is off by more than absmax / 254 (Dettmers et al., 2022,
    arXiv:2208.07339, eq. 1, by blocks). Raises ValueError for a tensor without dimensions or block < 1.

    >>> Even8().decode(Even8().encode(torch.tensor([-2.0, 0.0, 0.5])))
    tensor([-2.0000,  0.0000,  0.5039])
    """

    block: int = 64
    levels: ClassVar[tuple[float, ...]] = EVEN8
    through: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_block("Even8", self.block)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """`{"codes": (..., n) uint8, "absmax": (..., ceil(n / block))}` for x (..., n)."""
        return by_rows(self._encode, x)

    def decode(self, s: Mapping[str, Tensor]) -> Tensor:
        """The levels times their block's absmax, in its precision."""
        return from_rows(self._decode, s)

    def _encode(self, x: Tensor) -> dict[str, Tensor]:
        absmax, share = by_block(x, self.block, "Even8")
        return {"codes": nearest(share, self.levels), "absmax": absmax}

    def _decode(self, s: Mapping[str, Tensor]) -> Tensor:
        return looked_up(s, self.levels, self.block)


@dataclass(frozen=True, slots=True)
class NF4:
    """Store a weight in 4 bits, two entries a byte, by blocks (Dettmers et al., 2023, arXiv:2305.14314).

    The 16 levels are quantiles of a normal distribution as a share of the largest, eight of them above 0 and seven
    below, with 0 and +-1 among them (their appendix E). Blocks are those of `Int8`. Raises ValueError for a tensor
    without dimensions or block < 1.

    >>> NF4().decode(NF4().encode(torch.tensor([-2.0, 0.0, 0.3])))
    tensor([-2.0000,  0.0000,  0.3219])
    """

    block: int = 64
    levels: ClassVar[tuple[float, ...]] = NORMAL4
    through: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_block("NF4", self.block)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """`{"codes": (..., n // 2), "tail": (..., n % 2), "absmax": (..., ceil(n / block))}` for x (..., n)."""
        return by_rows(self._encode, x)

    def decode(self, s: Mapping[str, Tensor]) -> Tensor:
        """The levels times their block's absmax, in its precision."""
        return from_rows(self._decode, s)

    def _encode(self, x: Tensor) -> dict[str, Tensor]:
        absmax, share = by_block(x, self.block, "NF4")
        return {**paired(nearest(share, self.levels)), "absmax": absmax}

    def _decode(self, s: Mapping[str, Tensor]) -> Tensor:
        absmax = s["absmax"]
        return scaled(unpaired(s, self.levels, absmax.dtype), absmax, self.block)


def require_block(where: str, block: int) -> None:
    """Raise ValueError unless block >= 1."""
    if block < 1:
        raise ValueError(f"{where}: block={block!r} holds no entry; give 1 or more")


@lru_cache(maxsize=64)
def table(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The levels and the midpoints between them, made once a device: a copy to a GPU would wait for it."""
    level = torch.tensor(levels, dtype=dtype, device=device)
    return level, (level[:-1] + level[1:]) / 2


def scale_type(x: Tensor) -> torch.dtype:
    """The precision of maxima: x's own, at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def blocks(x: Tensor, scale: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of x (..., n) and its scales: whole blocks (..., n // block, block), then what is left of each row."""
    whole, rest = divmod(x.shape[-1], block)
    if whole:
        yield torch.unflatten(x[..., : whole * block], -1, (whole, block)), scale[..., :whole, None]
    if rest:
        yield x[..., whole * block :].unsqueeze(-2), scale[..., whole:, None]


def by_block(x: Tensor, block: int, where: str) -> tuple[Tensor, Tensor]:
    """The largest magnitudes (..., ceil(n / block)) of the blocks, and x over them, contiguous."""
    if x.ndim == 0:
        raise ValueError(f"{where} stores rows, not a tensor of shape (); leave it out")
    # contiguous, for a projected gradient may be a transposed view and bucketize would copy it again
    share = x.to(scale_type(x), copy=True, memory_format=torch.contiguous_format)
    absmax = share.new_empty(*x.shape[:-1], -(-x.shape[-1] // block))
    for part, scale in blocks(share, absmax, block):
        scale.copy_(torch.linalg.vector_norm(part, float("inf"), -1, keepdim=True))
        part.div_(scale.masked_fill(scale == 0, 1))
    return absmax, share


def scaled(x: Tensor, absmax: Tensor, block: int) -> Tensor:
    """x, each block times its absmax, in place."""
    for part, scale in blocks(x, absmax, block):
        part.mul_(scale)
    return x


def looked_up(s: Mapping[str, Tensor], levels: tuple[float, ...], block: int) -> Tensor:
    """The levels (..., n) of codes of one byte, each block times its absmax."""
    codes, absmax = s["codes"], s["absmax"]
    level = table(levels, absmax.dtype, absmax.device)[0]
    return scaled(level.index_select(0, codes.reshape(-1).int()).view(codes.shape), absmax, block)


def nearest(share: Tensor, levels: tuple[float, ...]) -> Tensor:
    """The index of the nearest level, the lower one of two as near; the last one for NaN."""
    between = table(levels, share.dtype, share.device)[1]
    return torch.bucketize(share, between, out_int32=True).to(torch.uint8)


def paired(codes: Tensor) -> dict[str, Tensor]:
    """Codes below 16 as two a byte, the first one low, and the last of an odd row, so that shapes tell n."""
    even = codes.shape[-1] // 2 * 2
    low, high = codes[..., :even:2], codes[..., 1:even:2]
    return {"codes": low | high << 4, "tail": codes[..., even:].clone()}


def unpaired(s: Mapping[str, Tensor], levels: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The levels (..., n) of paired codes."""
    level = table(levels, dtype, s["codes"].device)[0]
    both = torch.stack([level.repeat(16), level.repeat_interleave(16)], -1)
    shape = *s["codes"].shape[:-1], 2 * s["codes"].shape[-1]
    x = both.index_select(0, s["codes"].reshape(-1).int()).view(shape)
    tail = s["tail"]
    return torch.cat([x, level[tail.long()]], -1) if tail.shape[-1] else x


def smaller(row: Tensor, col: Tensor) -> Tensor:
    """min(row_i, col_j), (..., m, n)."""
    return torch.minimum(row.unsqueeze(-1), col.unsqueeze(-2))
