"""Record the authors' 4-bit codes and AdamW on the CPU: `python record_adam4bit.py OUT.npz`.

Needs torch, PyYAML, yacs and thu-ml/low-bit-optimizers at e3e2854 on PYTHONPATH (see README.md).
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record_adam8bit import SETTINGS, draw, run

# The authors' default, but rounded by their torch code instead of their CUDA kernel, and for small tensors too.
CONFIG = """
QUANT:
  M: {ENABLE: True, BITS: 4, GROUP_SIZE: 128, SCALE_TYPE: {DEFAULT: group}, QUANT_TYPE: {DEFAULT: nonlinear},
      ROUND_TYPE: nearest, THRESHOLD: 0}
  SQM: {ENABLE: True, BITS: 4, GROUP_SIZE: 128, SCALE_TYPE: {DEFAULT: rank1}, QUANT_TYPE: {DEFAULT: power-1},
        ROUND_TYPE: nearest, THRESHOLD: 0}
"""


def stub_compiled() -> None:
    """Put an empty module in place of the CUDA kernels, which rounding "nearest" never calls."""
    package, kernels = "lpmm.cpp_extension", "lpmm.cpp_extension.quantization"
    sys.modules |= {name: types.ModuleType(name) for name in (package, kernels)}
    sys.modules[package].__dict__["quantization"] = sys.modules[kernels]


def coded(x: torch.Tensor, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """The authors' codes and decoded values of x under one moment's settings."""
    functional = importlib.import_module("lpmm.functional")
    levels = functional.create_general_qmap(settings["quant_type"], settings["b"], settings["signed"])
    codes, scales = functional.vectorwise_quant(x, qmap=levels, shape=x.shape, **settings)
    decoded = functional.vectorwise_dequant(codes, qmap=levels, shape=x.shape, **settings, **scales)
    return {"codes": codes.reshape(x.shape).numpy(), "decoded": decoded.numpy(), "levels": levels.numpy()}


def main(path: str) -> None:
    """Record one encoding of each moment, then AdamW with both moments in 4 bits, without decay."""
    stub_compiled()
    adamw = importlib.import_module("lpmm.optim.adamw")
    arrays = draw()
    first = torch.from_numpy(arrays["g"][0])
    p = torch.nn.Parameter(torch.from_numpy(arrays["w0"].copy()))
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yml"
        config.write_text(f"OUTPUT: {folder}\n{CONFIG}")  # the program leaves a copy of its settings there
        optimizer = adamw.AdamW([p], qconfig=str(config), weight_decay=0.0, **SETTINGS)
    weights = run(optimizer, p, arrays["g"])
    moments = {"exp_avg": first, "exp_avg_sq": first.square()}
    if not all(optimizer.state[p][f"{name}_qstate"]["enable"] for name in moments):
        raise ValueError("a moment was kept in full; nothing was recorded")
    encoded = {
        f"{name}.{key}": value
        for name, x in moments.items()
        for key, value in coded(x, optimizer.get_qmetadata_by_state_name(name)).items()
    }
    np.savez_compressed(path, **arrays, **encoded, w=weights, **{k: np.asarray(v) for k, v in SETTINGS.items()})


if __name__ == "__main__":
    main(sys.argv[1])
