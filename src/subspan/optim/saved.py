"""Saved optimizer state: found by name, compared, and brought to where its parameter is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subspan.optim.rule import Rule
from subspan.shards import cut_alike, is_cut, laid, whole


def by_name(state_dict: dict[str, Any]) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """From a saved state: each parameter's number, and the group it was in."""
    groups = state_dict["param_groups"]
    if not all("param_names" in group and "role" in group for group in groups):
        raise ValueError("this state holds no parameter names, so it was not saved by Optim; start without it")
    rows = [
        (name, i, group) for group in groups for name, i in zip(group["param_names"], group["params"], strict=True)
    ]
    return {name: i for name, i, _ in rows}, {name: group for name, _, group in rows}


def compare(have: dict[str, str], saved: dict[str, str]) -> None:
    """Raise ValueError unless both hold the same names in the same roles."""
    faults = {
        "missing": [name for name in have if name not in saved],
        "unexpected": [name for name in saved if name not in have],
        "in another role": [name for name in have if saved.get(name, have[name]) != have[name]],
    }
    found = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
    if found:
        raise ValueError(f"the saved state is of other parameters ({found}); build Optim as when it was saved")


def require_alike(name: str, rule: Rule, saved: Mapping[str, Tensor], blank: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the entries in which a saved state is not one that the rule writes."""
    have, want = ([f"{key} {tuple(x.shape)}" for key, x in s.items()] for s in (saved, blank))
    found = [f"with {text}" for text in have if text not in want]
    found += [f"without {text}" for text in want if text not in have]
    if found:
        raise ValueError(
            f"{name}: the saved state ({', '.join(found)}) was not written by {rule!r}; "
            "build Optim with the rule it was saved from"
        )


def placed_near(p: Tensor, x: Tensor, *, like: Tensor) -> Tensor:
    """A copy of x on p's device, in x's own precision, cut as like is; counters stay on the CPU."""
    if cut_alike(x, like) and is_cut(x):
        return x.detach().clone()
    counts = x.ndim == 0 and x.dtype == torch.int64
    return laid(whole(x.detach()).to("cpu" if counts else p.device, copy=True), like)
