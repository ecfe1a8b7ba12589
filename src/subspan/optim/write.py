"""How a direction reaches a weight: once a step, in the weight's precision."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from subspan.optim.direction import Direction, add_to
from subspan.optim.state import mixed
from subspan.shards import cut_number, locally

Rounding = Literal["nearest", "stochastic"]


def move(p: Tensor, d: Direction, alpha: float, keep: float, rounding: Rounding, *, seed: int) -> None:
    """p <- keep * p + alpha * d, in place; half precision is computed in float32 and rounded once."""
    w = p if p.dtype in (torch.float32, torch.float64) else p.float()
    if keep != 1:
        w.mul_(keep)
    add_to(w, d, alpha)
    if w is p:
        return
    if rounding == "stochastic":
        generator = torch.Generator(p.device).manual_seed(mixed(seed, cut_number(p)))
        p.copy_(locally(partial(stochastic_bf16, generator=generator), w))
    else:
        p.copy_(w)


def stochastic_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to one of the two nearest bfloat16 values, so that the expected value is x.

    >>> stochastic_bf16(torch.tensor([1.0, torch.inf]), torch.Generator())
    tensor([1., inf], dtype=torch.bfloat16)
    """
    bits = x.view(torch.int32)
    low = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    up = (bits + low).bitwise_and_(-1 << 16).view(torch.float32)
    return torch.where(x.isfinite(), up, x).bfloat16()


def require_rounding(rounding: str, named: Mapping[str, Tensor]) -> None:
    """Raise ValueError for an unknown rounding, or a stochastic one that no bfloat16 weight could use."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"Optim: rounding={rounding!r}; use 'nearest' or 'stochastic'")
    if rounding == "stochastic" and not any(p.dtype == torch.bfloat16 for p in named.values()):
        raise ValueError("Optim: rounding='stochastic' is for bfloat16 weights, and there are none; leave it out")
