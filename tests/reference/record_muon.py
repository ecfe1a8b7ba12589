"""Record weights stepped by the author's Muon optimizer: `python record_muon.py OUT.npz`.

Needs torch and the folder that holds `muon.py` on PYTHONPATH (see README.md).
The helper `edited` is shared with record_dion.py.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from record_galore import STEPS, draw, parameters, run, save

SETTINGS = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0}
FIXED = {"nesterov": True, "ns_steps": 5}


def edited(function: Callable[..., Any], *, old: str, new: str, count: int) -> Callable[..., Any]:
    """Recompile the peer's function with `old` replaced by `new`, found exactly `count` times."""
    plain = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(plain))
    if source.count(old) != count:
        raise ValueError(f"{plain.__qualname__} holds {source.count(old)} of {old!r}, expected {count}")
    namespace: dict[str, Any] = {}
    exec(source.replace(old, new), plain.__globals__, namespace)
    return namespace[plain.__name__]


def check_fixed(update: Callable[..., torch.Tensor]) -> None:
    """Fail unless the peer's own defaults, which its class cannot change, are the ones stored."""
    defaults = {key: inspect.signature(update).parameters[key].default for key in FIXED}
    if defaults != FIXED:
        raise ValueError(f"muon_update has defaults {defaults}, expected {FIXED}")


def main(path: str) -> None:
    """Record SingleDeviceMuon with its Newton-Schulz iteration in float64."""
    muon = importlib.import_module("muon")
    check_fixed(muon.muon_update)
    name = "zeropower_via_newtonschulz5"
    vars(muon)[name] = edited(vars(muon)[name], old="G.bfloat16()", new="G", count=1)
    arrays = draw(factors=[1.0] * STEPS)
    params = parameters(arrays)
    optimizer = muon.SingleDeviceMuon(list(params.values()), **SETTINGS)
    save(path, arrays, run(optimizer, params, arrays=arrays), SETTINGS, FIXED)


if __name__ == "__main__":
    main(sys.argv[1])
