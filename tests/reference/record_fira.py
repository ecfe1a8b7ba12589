"""Record weights stepped by the authors' Fira optimizer: `python record_fira.py OUT.npz`.

Needs torch, transformers and the PyPI package fira 1.0.2 on PYTHONPATH (see README.md).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from record_galore import SETTINGS, SHAPES, STEPS, draw, parameters, patch_basis, run, save


def recording_max(calls: list[float]) -> Callable[..., Any]:
    """Return the builtin max that also notes each result (the peer's only use is in its limiter)."""

    def noted(*values: Any) -> Any:
        result = max(*values)
        calls.append(float(result))
        return result

    return noted


def limiter_factors(calls: list[float]) -> dict[str, np.ndarray]:
    """Turn the noted maxima into the divisor of the residual, (steps,) a shape; step 0 has none."""
    table = np.asarray(calls).reshape(STEPS - 1, len(SHAPES)) / 1.01
    table = np.vstack([np.ones(len(SHAPES)), table])
    return {f"{name}.limiter": table[:, i] for i, name in enumerate(SHAPES)}


def main(path: str) -> None:
    """Record Fira with proj_type "std" and the leaky residual of the published code."""
    adamw = importlib.import_module("fira.fira_adamw")
    projector = importlib.import_module("fira.gradient_projection").GradientProjector
    patch_basis(projector, method="get_orthogonal_matrix")
    calls: list[float] = []
    vars(adamw)["max"] = recording_max(calls)
    arrays = draw(factors=1 + 0.5 * np.sin(np.arange(STEPS)))
    params = parameters(arrays)
    group = {
        "params": list(params.values()),
        "rank": SETTINGS["rank"],
        "update_proj_gap": SETTINGS["update_proj_gap"],
        "alpha": SETTINGS["scale"],
        "proj_type": "std",
    }
    adam = {k: SETTINGS[k] for k in ("lr", "betas", "eps", "weight_decay")}
    optimizer = adamw.AdamW([group], no_deprecation_warning=True, **adam)
    weights = run(optimizer, params, arrays=arrays)
    save(path, arrays, weights, limiter_factors(calls), SETTINGS)


if __name__ == "__main__":
    main(sys.argv[1])
