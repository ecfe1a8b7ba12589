"""Other people's optimizers as plain step functions, on given parameters."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

Step = Callable[[], Any]
NEVER = 10**9


def adamw(named: Mapping[str, torch.Tensor]) -> Step:
    """A step of torch's fused AdamW."""
    return torch.optim.AdamW(list(named.values()), lr=1e-3, weight_decay=0.0, fused=True).step


def without_bitsandbytes() -> None:
    """Both packages import bitsandbytes for 8-bit classes that are not used here."""
    for name in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer", "bitsandbytes.functional"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = object  # type: ignore[attr-defined]
    sys.modules["bitsandbytes.optim"].optimizer = sys.modules["bitsandbytes.optim.optimizer"]  # type: ignore


def groups(named: Mapping[str, torch.Tensor], **low: object) -> list[dict[str, object]]:
    """Hidden matrices under `low`, the rest plain."""
    hidden = [p for name, p in named.items() if name.startswith("layers")]
    rest = [p for name, p in named.items() if not name.startswith("layers")]
    return [{"params": rest}, {"params": hidden, **low}]


def galore(named: Mapping[str, torch.Tensor], gap: int = NEVER) -> Step:
    """A step of galore-torch."""
    without_bitsandbytes()
    from galore_torch import GaLoreAdamW

    low = {"rank": 128, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW(groups(named, **low), lr=1e-3, weight_decay=0.0, no_deprecation_warning=True).step


def apollo(named: Mapping[str, torch.Tensor], rank: int = 128) -> Step:
    """A step of apollo-torch: channels at any rank but 1, which is APOLLO-Mini."""
    without_bitsandbytes()
    from apollo_torch.apollo import AdamW

    mini = rank == 1
    low = {"rank": rank, "update_proj_gap": NEVER, "proj": "random", "proj_type": "std"}
    low |= {"scale": 128 if mini else 1, "scale_type": "tensor" if mini else "channel"}
    return AdamW(
        groups(named, **low), lr=1e-3, weight_decay=0.0, scale_front=mini, no_deprecation_warning=True
    ).step
