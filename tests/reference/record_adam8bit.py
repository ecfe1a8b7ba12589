"""Record bitsandbytes' 8-bit blocks and Adam on the CPU: `python record_adam8bit.py OUT.npz`.

Needs torch and the PyPI wheel bitsandbytes 0.50.2 on PYTHONPATH, unpacked without its compiled libraries: its
torch kernels round to the nearest level, but its compiled CPU kernel does not (README.md).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import torch

SHAPE, STEPS, SEED = (2, 512), 8, 0
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}


def draw() -> dict[str, np.ndarray]:
    """An initial weight and gradients whose entries differ in size by powers of ten, in float32."""
    rng = np.random.default_rng(SEED)
    sizes = 10.0 ** rng.uniform(-3, 0, SHAPE)
    arrays = {"w0": rng.standard_normal(SHAPE), "g": rng.standard_normal((STEPS, *SHAPE)) * sizes}
    return {name: a.astype(np.float32) for name, a in arrays.items()}


def blocks(x: torch.Tensor, *, signed: bool) -> dict[str, np.ndarray]:
    """bitsandbytes' codes, maxima and decoded values of x in blocks of 256."""
    functional = importlib.import_module("bitsandbytes.functional")
    codes, state = functional.quantize_blockwise(x, code=functional.create_dynamic_map(signed), blocksize=256)
    decoded = functional.dequantize_blockwise(codes, state)
    name = "signed" if signed else "unsigned"
    found = {"codes": codes, "absmax": state.absmax, "decoded": decoded, "levels": state.code}
    return {f"{name}.{key}": value.numpy() for key, value in found.items()}


def run(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, gradients: np.ndarray) -> np.ndarray:
    """The weight after each step on fixed gradients."""
    weights = []
    for g in gradients:
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        weights.append(p.detach().numpy().copy())
    return np.stack(weights)


def main(path: str) -> None:
    """Record one encoding of each map, then Adam with both moments in 8 bits."""
    optim = importlib.import_module("bitsandbytes.optim")
    if list(Path(optim.__file__).parents[1].glob("*.so")):
        raise ValueError("bitsandbytes has its compiled libraries; delete its *.so files from the unpacked wheel")
    arrays = draw()
    first = torch.from_numpy(arrays["g"][0])
    p = torch.nn.Parameter(torch.from_numpy(arrays["w0"].copy()))
    adam = optim.Adam8bit([p], min_8bit_size=1, **SETTINGS)
    weights = run(adam, p, arrays["g"])
    if adam.state[p]["state1"].dtype != torch.uint8:
        raise ValueError(f"the moments are {adam.state[p]['state1'].dtype}, not 8 bits; nothing was recorded")
    encoded = blocks(first, signed=True) | blocks(first.square(), signed=False)
    np.savez_compressed(path, **arrays, **encoded, w=weights, **{k: np.asarray(v) for k, v in SETTINGS.items()})


if __name__ == "__main__":
    main(sys.argv[1])
