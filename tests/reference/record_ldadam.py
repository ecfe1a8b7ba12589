"""Record weights stepped by the authors' LDAdam: `python record_ldadam.py OUT.npz`.

Needs torch and the folder that holds the package `ldadamw_torch` on PYTHONPATH (see README.md).
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from record_galore import STEPS, draw, parameters, pin_signs, save

ADAM = {"lr": 0.01, "betas": (0.908, 0.99), "eps": 1e-8, "weight_decay": 0.0}
LDADAM = {"rank": 3, "rho": 0.908}


def without_cast(function: Callable[..., Any], *, cast: str, instead: str) -> Callable[..., Any]:
    """Recompile the peer's function with its one cast to float32 removed."""
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(cast) != 1:
        raise ValueError(f"{function.__qualname__} holds {source.count(cast)} of {cast!r}, expected 1")
    namespace: dict[str, Any] = {}
    exec(source.replace(cast, instead), function.__globals__, namespace)
    return namespace[function.__name__]


def patch(module: Any) -> None:
    """Keep the SVD and the QR in float64, and pin the signs of the vectors that both return."""
    projector = module.projector
    svd = without_cast(projector.get_orthogonal_matrix_svd, cast="matrix.float()", instead="matrix")
    qr = without_cast(module.Gram_Schmidt, cast="matrix.to(dtype=torch.float32)", instead="matrix")

    def pinned_svd(self: Any, grad: torch.Tensor, svd_lowrank: bool = False) -> None:
        svd(self, grad, svd_lowrank=svd_lowrank)
        self.ortho_matrix = pin_signs(self.ortho_matrix, side=self.proj_type)

    projector.get_orthogonal_matrix_svd = pinned_svd
    module.Gram_Schmidt = lambda matrix: pin_signs(qr(matrix), side="left")


def accumulate(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, torch.nn.Parameter],
    *,
    arrays: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Weights and errors after each step; a backward pass adds to .grad, where the peer left its error."""
    found: dict[str, list[np.ndarray]] = {f"{name}.{key}": [] for name in params for key in ("w", "error")}
    for t in range(STEPS):
        optimizer.zero_grad()
        for name, p in params.items():
            g = torch.from_numpy(arrays[f"{name}.g"][t].copy())
            p.grad = g if p.grad is None else p.grad.add_(g)
        optimizer.step()
        for name, p in params.items():
            found[f"{name}.w"].append(p.detach().numpy().copy())
            found[f"{name}.error"].append(p.grad.numpy().copy())
    return {key: np.stack(values) for key, values in found.items()}


def record(arrays: Mapping[str, np.ndarray], *, error_feedback: bool) -> dict[str, np.ndarray]:
    """Step a fresh optimizer, all parameters in one low-rank group."""
    params = parameters(arrays)
    group = {"params": list(params.values()), "enable_lowrank": True}
    ldadam = importlib.import_module("ldadamw_torch.ldadamw").LDAdamW
    return accumulate(ldadam([group], error_feedback=error_feedback, **ADAM, **LDADAM), params, arrays=arrays)


def main(path: str) -> None:
    """Record LDAdam with one power step a step, with and without error feedback."""
    patch(importlib.import_module("ldadamw_torch.projector"))
    arrays = draw(factors=[1.0] * STEPS)
    without = record(arrays, error_feedback=False)
    plain = {f"{key}.no_error": value for key, value in without.items() if key.endswith(".w")}
    save(path, arrays, record(arrays, error_feedback=True), plain, ADAM, LDADAM)


if __name__ == "__main__":
    main(sys.argv[1])
