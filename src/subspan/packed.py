"""Tensors in a file that holds them narrower than they are used: in half precision, or matrices in 8 bits.

What was done is written beside them, and undone when they are read: in memory they are float32 again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.codec import Even8

KINDS = ("bfloat16", "float16", "int8")
BLOCK, FEW = 64, 256
CODES, LARGEST = ".codes", ".absmax"


@dataclass(frozen=True)
class Packed:
    """What a file holds, and how far off it is.

    `error` is the largest |t - kept| / |t| of a tensor; `bound` says what no entry can exceed.
    """

    tensors: dict[str, Tensor]
    error: float
    bound: str


def bound_of(kind: str) -> str:
    """How far off an entry can be; raises ValueError for a kind that there is not.

    >>> bound_of("int8")
    '1/254 of the largest of its 64 neighbours'
    """
    if kind == "int8":
        return f"1/254 of the largest of its {BLOCK} neighbours"
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no way to store factors; use {', '.join(KINDS)}")
    return f"{torch.finfo(getattr(torch, kind)).eps / 2:.1e} of itself"


@torch.no_grad()
def pack(tensors: Mapping[str, Tensor], kind: str) -> Packed:
    """Floating-point tensors as a file is to hold them; in 8 bits only matrices of 256 numbers or more.

    Raises ValueError for an unknown kind and for numbers that it cannot hold.
    """
    bound, held, worst = bound_of(kind), dict[str, Tensor](), 0.0
    for name, t in tensors.items():
        if not t.is_floating_point() or (kind == "int8" and (t.dim() < 2 or t.numel() < FEW)):
            held[name] = t
            continue
        made = _encoded(name, t, kind)
        back = unpack(made, kind)[name]
        if not bool(back.isfinite().all()):
            raise ValueError(f"{name} holds numbers that {kind} cannot hold; use bfloat16")
        size = float(t.double().norm())
        worst = max(worst, float((back.double() - t.double()).norm()) / size if size else 0.0)
        held |= made
    return Packed(held, worst, bound)


def unpack(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of a file that was packed so, in float32.

    Raises ValueError for an unknown kind, and where a part is missing.
    """
    bound_of(kind)
    if kind != "int8":
        return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    found = {name: t for name, t in tensors.items() if not name.endswith((CODES, LARGEST))}
    for name in (key.removesuffix(CODES) for key in tensors if key.endswith(CODES)):
        if name + LARGEST not in tensors:
            raise ValueError(f"{name + LARGEST} is missing, of which {name} is made; copy or save it again")
        codes = tensors[name + CODES]
        row = {"codes": codes.reshape(1, -1), "absmax": tensors[name + LARGEST]}
        found[name] = Even8(BLOCK).decode(row).reshape(codes.shape)
    return found


def _encoded(name: str, t: Tensor, kind: str) -> dict[str, Tensor]:
    if kind != "int8":
        return {name: t.to(getattr(torch, kind))}
    # As one row: the columns of a factor are fewer than a block.
    made = Even8(BLOCK).encode(t.float().reshape(1, -1))
    return {name + CODES: made["codes"].reshape(t.shape), name + LARGEST: made["absmax"]}
