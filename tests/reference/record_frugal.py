"""Record weights stepped by the authors' FRUGAL optimizer: `python record_frugal.py OUT.npz`.

Needs torch, transformers and the folder that holds the package `frugal` on PYTHONPATH (see README.md).
"""

from __future__ import annotations

import importlib
import math
import sys

from record_galore import STEPS, draw, parameters, patch_basis, run, save

PROJECTION = {
    "density": 0.375,
    "update_gap": 4,
    "proj_params_lr_scale": 1.0,
    "inactive_lr_scale": 1.0,
}
ADAM = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def main(path: str) -> None:
    """Record FRUGAL: SVD projector, Adam inside, sign SGD outside, statistics reset at a refresh."""
    # The peer imports this private torch helper, gone from recent torch; on floats it was math.sqrt.
    vars(importlib.import_module("torch.optim.optimizer"))["_dispatch_sqrt"] = math.sqrt
    adamw = importlib.import_module("frugal.adamw")
    projector = importlib.import_module("frugal.galore_projector").GaLoreProjector
    patch_basis(projector, method="_get_orthogonal_matrix")
    arrays = draw(factors=[1.0] * STEPS)
    params = parameters(arrays)
    optimizer = adamw.GaloreAdamW(
        [{"params": list(params.values()), "is_proj_params": True}],
        reset_statistics=True,
        inactive_update_rule="sign_sgd",
        proj_side="std",
        proj_type="svd",
        no_deprecation_warning=True,
        **PROJECTION,
        **ADAM,
    )
    weights = run(optimizer, params, arrays=arrays)
    ranks = {optimizer.state[p]["projector"].rank for p in params.values()}
    if ranks != {3}:
        raise ValueError(f"density {PROJECTION['density']} gave ranks {ranks}, expected 3 for every shape")
    save(path, arrays, weights, PROJECTION, ADAM, {"rank": 3})


if __name__ == "__main__":
    main(sys.argv[1])
