"""Record weights stepped by the authors' GaLore optimizer: `python record_galore.py OUT.npz`.

Needs torch, transformers and the PyPI wheel galore-torch 1.0 on PYTHONPATH (see README.md).
The helpers below are shared with record_fira.py and record_frugal.py.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

SHAPES = {"tall": (12, 8), "wide": (8, 12), "square": (8, 8)}
STEPS = 10
SEED = 0
SETTINGS = {
    "rank": 3,
    "update_proj_gap": 4,
    "scale": 0.25,
    "lr": 0.01,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.0,
}


def draw(*, factors: Sequence[float]) -> dict[str, np.ndarray]:
    """Draw initial weights and gradients, gradient t multiplied by factors[t]."""
    rng = np.random.default_rng(SEED)
    arrays: dict[str, np.ndarray] = {}
    for name, shape in SHAPES.items():
        arrays[f"{name}.w0"] = rng.standard_normal(shape)
        grads = rng.standard_normal((STEPS, *shape))
        arrays[f"{name}.g"] = grads * np.asarray(factors)[:, None, None]
    return arrays


def stub(dotted: str, **attributes: Any) -> None:
    """Put an empty module in place of one that the peer imports but this run never calls."""
    parts = dotted.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    sys.modules[dotted].__dict__.update(attributes)


def pin_signs(basis: torch.Tensor, *, side: str) -> torch.Tensor:
    """Make the largest-magnitude entry of every column (left) or row (right) positive."""
    along = 0 if side == "left" else 1
    largest = basis.gather(along, basis.abs().argmax(dim=along, keepdim=True))
    return basis * largest.sign()


def without_float_cast(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Recompile the peer's function with its one cast to float32 removed."""
    source = textwrap.dedent(inspect.getsource(function))
    cast = "module_params.data.float()"
    if source.count(cast) != 1:
        raise ValueError(f"{function.__qualname__} holds {source.count(cast)} of {cast!r}, expected 1")
    namespace: dict[str, Any] = {}
    exec(source.replace(cast, "module_params.data"), function.__globals__, namespace)
    return namespace[function.__name__]


def patch_basis(projector: type, *, method: str) -> None:
    """Keep the peer's SVD in the gradient's dtype and pin the signs of the vectors it returns."""
    original = without_float_cast(getattr(projector, method))

    def pinned(self: Any, weights: torch.Tensor, rank: int, type: str) -> torch.Tensor:
        return pin_signs(original(self, weights, rank, type), side=type)

    setattr(projector, method, pinned)


def parameters(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.nn.Parameter]:
    """Make one float64 parameter per shape from the drawn initial weights."""
    return {name: torch.nn.Parameter(torch.from_numpy(arrays[f"{name}.w0"].copy())) for name in SHAPES}


def run(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, torch.nn.Parameter],
    *,
    arrays: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Step the optimizer over the drawn gradients and return the weights after each step."""
    weights: dict[str, list[np.ndarray]] = {name: [] for name in params}
    for t in range(STEPS):
        for name, p in params.items():
            p.grad = torch.from_numpy(arrays[f"{name}.g"][t].copy())
        optimizer.step()
        for name, p in params.items():
            weights[name].append(p.detach().numpy().copy())
    return {f"{name}.w": np.stack(w) for name, w in weights.items()}


def save(path: str, *groups: Mapping[str, Any]) -> None:
    """Write all groups of arrays and scalar settings into one .npz file."""
    merged = {key: np.asarray(value) for group in groups for key, value in group.items()}
    np.savez_compressed(path, **merged)


def main(path: str) -> None:
    """Record GaLore with proj_type "std"."""
    stub("bitsandbytes.optim.optimizer", Optimizer2State=torch.optim.Optimizer)
    adamw = importlib.import_module("galore_torch.adamw")
    patch_basis(
        importlib.import_module("galore_torch.galore_projector").GaLoreProjector,
        method="get_orthogonal_matrix",
    )
    arrays = draw(factors=[1.0] * STEPS)
    params = parameters(arrays)
    group_keys = ("rank", "update_proj_gap", "scale")
    group = {"params": list(params.values()), "proj_type": "std"} | {k: SETTINGS[k] for k in group_keys}
    adam = {k: v for k, v in SETTINGS.items() if k not in group_keys}
    optimizer = adamw.AdamW([group], no_deprecation_warning=True, **adam)
    save(path, arrays, run(optimizer, params, arrays=arrays), SETTINGS)


if __name__ == "__main__":
    main(sys.argv[1])
