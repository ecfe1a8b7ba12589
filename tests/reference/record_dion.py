"""Record weights stepped by the authors' Dion optimizers: `python record_dion.py OUT.npz`.

Needs torch and the folder that holds the package `dion` on PYTHONPATH (see README.md).
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import torch
from record_galore import SEED, SHAPES, STEPS, draw, parameters, run, save
from record_muon import edited

SETTINGS = {"lr": 0.01, "mu": 0.95, "weight_decay": 0.0, "epsilon": 1e-8}
RANK = 3
SHORTER = 8


def keep_float64(module: Any, **casts: int) -> None:
    """Turn the casts to float32 in the named functions of the module into casts to float64."""
    for name, count in casts.items():
        vars(module)[name] = edited(vars(module)[name], old="torch.float32", new="torch.float64", count=count)


def simple() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Run dion_simple, which never transposes; return the data with q0, and the weights."""
    module = importlib.import_module("dion.dion_simple")
    keep_float64(module, dion_update=2)
    arrays = draw(factors=[1.0] * STEPS)
    params = parameters(arrays)
    optimizer = module.Dion(list(params.values()), rank=RANK, **SETTINGS)
    torch.manual_seed(SEED)
    for name, p in params.items():
        optimizer._init_opt_state_dion(p, optimizer.state[p])
        arrays[f"{name}.q0"] = optimizer.state[p]["Q"].numpy().copy()
    return arrays, run(optimizer, params, arrays=arrays)


def reference(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run dion_reference, which transposes wide matrices, from the same q0; return the weights.

    For wide that is tall's q0: transposed, wide is a tall matrix and its Q has as many rows.
    """
    module = importlib.import_module("dion.dion_reference")
    keep_float64(module, dion_update=1, orthogonalize=4)
    params = parameters(arrays)
    optimizer = module.Dion(list(params.values()), rank_fraction=RANK / SHORTER, qr_method="qr", **SETTINGS)
    for name, p in params.items():
        optimizer._init_opt_state_dion(p, optimizer.state[p], RANK / SHORTER, 1)
        start = arrays["tall.q0" if name == "wide" else f"{name}.q0"]
        if optimizer.state[p]["Q"].shape != start.shape:
            raise ValueError(f"{name}: Q has shape {tuple(optimizer.state[p]['Q'].shape)}, expected {start.shape}")
        optimizer.state[p]["Q"] = torch.from_numpy(start.copy())
    return run(optimizer, params, arrays=arrays)


def check_agreement(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Fail unless both programs agree where neither transposes."""
    for name in SHAPES.keys() - {"wide"}:
        apart = np.abs(ours[f"{name}.w"] - theirs[f"{name}.w"]).max()
        if apart > 1e-13:
            raise ValueError(
                f"{name}: dion_simple and dion_reference differ by {apart}, expected 0 up to rounding"
            )


def main(path: str) -> None:
    """Record dion_simple, and for wide also dion_reference's transposed run."""
    torch.compiler.set_stance("force_eager")
    torch.set_default_dtype(torch.float64)
    arrays, weights = simple()
    others = reference(arrays)
    check_agreement(weights, others)
    turned = {"wide.transposed.q0": arrays["tall.q0"], "wide.transposed.w": others["wide.w"]}
    save(path, arrays, weights, turned, SETTINGS, {"rank": RANK})


if __name__ == "__main__":
    main(sys.argv[1])
