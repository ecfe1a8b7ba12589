"""Record weights stepped by the authors' APOLLO: `python record_apollo.py APOLLO_OUT.npz MINI_OUT.npz`.

Needs torch, transformers and the PyPI wheel apollo-torch 1.0.3 on PYTHONPATH (see README.md).
`bare_package` is shared with record_dct_adamw.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import numpy as np
import torch
from record_fira import limiter_factors, recording_max
from record_galore import SETTINGS, SHAPES, STEPS, draw, parameters, run, save

APOLLO = {"rank": 3, "scale": 1.0, "scale_type": "channel", "scale_front": False}
MINI = {"rank": 1, "scale": 128.0, "scale_type": "tensor", "scale_front": True}


def bare_package(name: str) -> None:
    """Make the submodules of a package importable without running its __init__, which needs CUDA packages."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"package {name!r} is not on PYTHONPATH (see README.md)")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package


def note_bases(projector: type, bases: list[np.ndarray]) -> None:
    """Append every matrix the peer draws, (shorter side, rank) on either side; the values are unchanged."""
    original = vars(projector)["get_orthogonal_matrix"]

    def noted(self: Any, weights: torch.Tensor, rank: int, type: str, seed: int) -> torch.Tensor:
        basis = original(self, weights, rank, type, seed)
        bases.append((basis if type == "left" else basis.t()).numpy().copy())
        return basis

    setattr(projector, "get_orthogonal_matrix", noted)


def by_name(bases: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Sort the noted matrices into one (refreshes, shorter side, rank) array a shape."""
    return {f"{name}.basis": np.stack(bases[i :: len(SHAPES)]) for i, name in enumerate(SHAPES)}


def record(path: str, variant: dict[str, Any], *, bases: list[np.ndarray], calls: list[float]) -> None:
    """Record one variant; `bases` and `calls` are filled by the patched peer."""
    bases.clear()
    calls.clear()
    arrays = draw(factors=1 + 0.5 * np.sin(np.arange(STEPS)))
    params = parameters(arrays)
    group = {
        "params": list(params.values()),
        "rank": variant["rank"],
        "proj": "random",
        "proj_type": "std",
        "scale": variant["scale"],
        "scale_type": variant["scale_type"],
        "update_proj_gap": SETTINGS["update_proj_gap"],
    }
    adam = {k: SETTINGS[k] for k in ("lr", "betas", "eps", "weight_decay")}
    adamw = importlib.import_module("apollo_torch.apollo").AdamW
    weights = run(adamw([group], scale_front=variant["scale_front"], **adam), params, arrays=arrays)
    save(path, arrays, weights, by_name(bases), limiter_factors(calls), SETTINGS | variant)


def main(apollo: str, mini: str) -> None:
    """Record APOLLO and APOLLO-Mini with the random projector on the shorter side."""
    bare_package("apollo_torch")
    bases: list[np.ndarray] = []
    calls: list[float] = []
    note_bases(importlib.import_module("apollo_torch.random_projector").GradientProjector, bases)
    vars(importlib.import_module("apollo_torch.apollo"))["max"] = recording_max(calls)
    record(apollo, APOLLO, bases=bases, calls=calls)
    record(mini, MINI, bases=bases, calls=calls)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
