"""Record weights stepped by transformers' Adafactor: `python record_adafactor.py OUT.npz`.

Needs torch and transformers (see README.md).
"""

from __future__ import annotations

import importlib
import sys

import numpy as np
from record_galore import STEPS, draw, parameters, run, save

SETTINGS = {
    "lr": 0.01,
    "eps": (1e-30, 1e-3),
    "clip_threshold": 1.0,
    "decay_rate": -0.8,
    "weight_decay": 0.0,
}
OFF = {"beta1": None, "scale_parameter": False, "relative_step": False, "warmup_init": False}


def main(path: str) -> None:
    """Record factored Adafactor with an external step size and no first moment."""
    adafactor = importlib.import_module("transformers.optimization").Adafactor
    arrays = draw(factors=1 + 0.5 * np.sin(np.arange(STEPS)))
    params = parameters(arrays)
    optimizer = adafactor(list(params.values()), **SETTINGS, **OFF)
    save(path, arrays, run(optimizer, params, arrays=arrays), SETTINGS)


if __name__ == "__main__":
    main(sys.argv[1])
