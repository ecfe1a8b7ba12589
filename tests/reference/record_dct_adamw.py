"""Record weights stepped by the authors' DCT-AdamW: `python record_dct_adamw.py OUT.npz`.

Needs torch and the PyPI wheel ista-daslab-optimizers 1.1.15 on PYTHONPATH (see README.md).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from record_apollo import bare_package
from record_galore import SHAPES, STEPS, draw, parameters, run, save

ADAM = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
DCT = {"rank": 3, "update_proj_gap": 1, "ell_norm": 1}
MODES = {
    "keep": {"rotate_subspace": False, "use_ef": False},
    "rotate": {"rotate_subspace": True, "use_ef": False},
    "rotate_ef": {"rotate_subspace": True, "use_ef": True},
}


def without_float_cast(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Recompile the peer's cosine matrix so that it is computed in float64."""
    source, cast = inspect.getsource(function), ".to(torch.float)"
    if source.count(cast) != 1:
        raise ValueError(f"{function.__qualname__} holds {source.count(cast)} of {cast!r}, expected 1")
    namespace: dict[str, Any] = {}
    exec(source.replace(cast, ".to(torch.float64)"), function.__globals__, namespace)
    return namespace[function.__name__]


def rotate(self: Any, turn: torch.Tensor, w: torch.Tensor) -> None:
    """Replace the peer's product that is written over one of its own factors, undefined on a CPU."""
    w.copy_(w @ turn if self.is_right_proj else turn @ w)


def topk(*, input: torch.Tensor, k: int, sorted: bool) -> SimpleNamespace:
    """Return the k largest in ascending order of index; the peer asks for no order."""
    return SimpleNamespace(indices=torch.topk(input, k, sorted=sorted).indices.sort().values)


class AscendingTorch(ModuleType):
    """The torch that the peer's projector sees: topk is pinned, all else is torch's own."""

    topk = staticmethod(topk)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def patch(projection: Any, chosen: list[np.ndarray]) -> None:
    """Apply the three patches and note the chosen indices of every step."""
    projector = projection.FFTLowRankProjector
    original = projector.change_subspace

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        low = original(self, *args, **kwargs)
        chosen.append(self.indices_crt.numpy().astype(np.int64))
        return low

    projector.change_subspace = noted
    projector.rotate_subspace = rotate
    vars(projection)["torch"] = AscendingTorch("torch")
    dct = importlib.import_module("ista_daslab_optimizers.fft_low_rank.dct_adamw")
    vars(dct)["dct3_matrix"] = without_float_cast(vars(dct)["dct3_matrix"])


def record(mode: str, arrays: dict[str, np.ndarray], chosen: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Weights and indices of one mode, with the errors left at the end where it feeds them back."""
    chosen.clear()
    params = parameters(arrays)
    adamw = importlib.import_module("ista_daslab_optimizers.fft_low_rank.dct_adamw").DCTAdamW
    optimizer = adamw(list(params.values()), proj="dct", sim_type="matmul", **ADAM, **DCT, **MODES[mode])
    weights = run(optimizer, params, arrays=arrays)
    found = {f"{key}.{mode}": value for key, value in weights.items()}
    table = np.stack(chosen).reshape(STEPS, len(SHAPES), -1)
    found |= {f"{name}.index.{mode}": table[:, i] for i, name in enumerate(SHAPES)}
    if MODES[mode]["use_ef"]:
        found |= {f"{name}.error.{mode}": optimizer.state[p]["ef"].numpy() for name, p in params.items()}
    return found | {"basis": optimizer.Q.numpy()}


def main(path: str) -> None:
    """Record the matmul path: moments kept, rotated, and rotated with full-precision error feedback."""
    bare_package("ista_daslab_optimizers")
    chosen: list[np.ndarray] = []
    patch(importlib.import_module("ista_daslab_optimizers.fft_low_rank.fft_projector"), chosen)
    arrays = draw(factors=[1.0] * STEPS)
    save(path, arrays, *(record(mode, arrays, chosen) for mode in MODES), ADAM, DCT)


if __name__ == "__main__":
    main(sys.argv[1])
