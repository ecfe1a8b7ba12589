"""Record layers trained by the authors' own adapters: `python record_adapters.py METHOD SCRATCH OUT.npz`.

METHOD is lora_ga, lora_one, lora_sb, moe_lora or paca. Needs torch, transformers and peft 0.21.2; SCRATCH holds
the authors' programs, as README.md says.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import math
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from record_galore import SEED, STEPS, save
from torch import Tensor, nn

M, N, TOKENS = 12, 8, 6
Arrays = dict[str, np.ndarray]


def draw(**more: tuple[int, ...]) -> Arrays:
    """The layer, its inputs and targets of every step, and what else is asked for, standard normal, float64."""
    rng = np.random.default_rng(SEED)
    shapes = {
        "w0": (M, N),
        "bias": (M,),
        "x": (STEPS, 2, TOKENS, N),
        "z": (STEPS, 2, TOKENS, M),
        "g": (M, N),
        **more,
    }
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def layer(arrays: Arrays) -> nn.Linear:
    """The layer."""
    made = nn.Linear(N, M).double()
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(arrays["w0"]))
        made.bias.copy_(torch.from_numpy(arrays["bias"]))
    return made


def wrapped(arrays: Arrays, rank: int, alpha: float, *, rslora: bool = False) -> Any:
    """peft's LoRA layer on it, alone."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], use_rslora=rslora)
    return peft.get_peft_model(nn.Sequential(layer(arrays)), config).double().base_model.model[0]


def compiled(path: Path, name: str, swaps: Mapping[str, str], known: Mapping[str, Any]) -> Callable[..., Any]:
    """One function of a file, alone, with words replaced that it must hold."""
    text = path.read_text(encoding="utf-8")
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name)
    source = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    for old, new in swaps.items():
        if old not in source:
            raise ValueError(f"{name} of {path} does not hold {old!r}")
        source = source.replace(old, new)
    namespace: dict[str, Any] = dict(known)
    exec(source, namespace)
    return namespace[name]


class Settings(dict):
    """A configuration as hydra gives it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def trained(
    module: nn.Module, params: list[Tensor], optimizer: Any, weight: Callable[[], Tensor], arrays: Arrays
) -> Arrays:
    """The outputs and the weight before each step on mean |y - z|^2, and the weight at the end."""
    outputs, weights = [], []
    for t in range(STEPS):
        x, z = (torch.from_numpy(arrays[name][t]) for name in "xz")
        weights.append(weight().detach().numpy().copy())
        for p in params:
            p.grad = None
        y = module(x)
        (y - z).square().mean().backward()
        outputs.append(y.detach().numpy().copy())
        optimizer.step()
    weights.append(weight().detach().numpy().copy())
    return {"y": np.stack(outputs), "w": np.stack(weights)}


def gradient_start(
    program: Path, direction: str, gamma: float, swaps: Mapping[str, str], *more: Any
) -> tuple[Any, ...]:
    """LoRA-GA and LoRA-One: the function that starts a layer from the gradient `g`, then AdamW."""
    arrays, rank, alpha = draw(), 2, 4.0
    module = wrapped(arrays, rank, alpha, rslora=True)
    known = {"torch": torch, "math": math, "log": logging.getLogger()}
    reinit = compiled(program, "reinit_lora_modules", {".cuda()": "", ".float()": "", **swaps}, known)
    config = Settings(mode="gradient", direction=direction, scale="stable", stable_gamma=gamma)
    torch.manual_seed(SEED)
    with torch.no_grad():
        reinit(
            "base_model.model.0", module, config, *more, named_grads={"0.weight": torch.from_numpy(arrays["g"])}
        )
    a, b, scale = module.lora_A.default.weight, module.lora_B.default.weight, module.scaling["default"]
    base = module.get_base_layer().weight
    start = {name: t.detach().numpy().copy() for name, t in {"a0": a, "b0": b, "base": base}.items()}
    optimizer = torch.optim.AdamW([a, b], lr=0.01, weight_decay=0.0)
    run = trained(module, [a, b], optimizer, lambda: base + scale * b @ a, arrays)
    return arrays, start | run, {"rank": rank, "alpha": alpha, "gamma": gamma, "lr": 0.01}


def lora_ga(scratch: Path) -> tuple[Any, ...]:
    """Four times the rank are all singular values, so that the sketch of the decomposition is exact."""
    return gradient_start(scratch / "LoRA-GA/reproduce/run_exp.py", "ArB2r", 16.0, {})


def lora_one(scratch: Path) -> tuple[Any, ...]:
    """Here the program sketches by 512, more than the layer has."""
    swaps = {"q=512": f"q={N}"}
    return gradient_start(scratch / "LoRA-One/run_exp.py", "LoRA-One", 128.0, swaps, {})


def lora_sb(scratch: Path) -> tuple[Any, ...]:
    """The frame of the step -rate sign(g), then AdamW on the core."""
    arrays, rank, rate = draw(), 3, 1e-2
    utils = scratch / "lora-sb/utils"
    swaps = {"torch.bfloat16": "torch.float64", "torch.float32": "torch.float64", "n_iter=10": "n_iter=500"}
    svd = compiled(utils / "svd_utils.py", "get_svd_grad", swaps, {"torch": torch})
    known = {"torch": torch, "get_svd_grad": svd}
    replacement = compiled(utils / "initialization_utils.py", "get_replacement_module_grad", {}, known)
    module = wrapped(arrays, rank, rank)
    step = -rate * torch.sign(torch.from_numpy(arrays["g"]))
    encoder, decoder, core = replacement(step.T, "svd", {"svd": {"rank": rank}})
    latent = importlib.util.spec_from_file_location("latent_utils", utils / "latent_utils.py")
    utilities = importlib.util.module_from_spec(latent)
    latent.loader.exec_module(utilities)
    module.lora_A.default.weight = nn.Parameter(encoder.T, requires_grad=False)
    module.lora_B.default.weight = nn.Parameter(decoder.T, requires_grad=False)
    module.default_lora_latent_mapping = nn.Linear(rank, rank, bias=False).double()
    module.default_lora_latent_mapping.weight.data = core
    module.forward = types.MethodType(utilities.forward_latent, module)
    r = module.default_lora_latent_mapping.weight
    a, b, base = module.lora_A.default.weight, module.lora_B.default.weight, module.get_base_layer().weight
    run = trained(module, [r], torch.optim.AdamW([r], lr=0.01, weight_decay=0.0), lambda: base + b @ r @ a, arrays)
    return arrays, run, {"rank": rank, "rate": rate, "lr": 0.01}


def paca(scratch: Path) -> tuple[Any, ...]:
    """Three columns, then AdamW on them."""
    arrays, rank, alpha = draw(), 3, 6.0
    folder = scratch / "paca/peft/src/peft/tuners/paca"
    package = types.ModuleType("peft.tuners.paca")
    package.__path__ = [str(folder)]
    sys.modules["peft.tuners.paca"] = package
    sys.modules["peft.tuners.paca.config"] = types.SimpleNamespace(PacaConfig=object)
    program = importlib.import_module("peft.tuners.paca.layer")
    torch.manual_seed(SEED)
    # It writes its columns into the weight at every call but each 2 * gradient_accumulation_steps-th.
    module = program.Linear(
        layer(arrays), "default", r=rank, paca_alpha=alpha, gradient_accumulation_steps=10**6
    ).double()
    for p in module.get_base_layer().parameters():
        p.requires_grad_(False)
    p, index, scale = module.paca_w["default"], module.paca_indices["default"], module.scaling["default"]

    def weight() -> Tensor:
        return module.get_base_layer().weight.index_copy(1, index, scale * p)

    run = trained(module.train(), [p], torch.optim.AdamW([p], lr=0.01, weight_decay=0.0), weight, arrays)
    return arrays, run | {"index": index.numpy()}, {"rank": rank, "alpha": alpha, "lr": 0.01}


def moe_lora(scratch: Path) -> tuple[Any, ...]:
    """Two of four experts, stepped by the scaled descent of the authors, the gate by plain descent."""
    rank, experts, top, alpha = 2, 4, 2, 4.0
    arrays = draw(a=(experts, rank, N), b=(experts, M, rank), gate=(experts, N))
    sys.path.insert(0, str(scratch / "MoELoRA_Riemannian"))
    program, optimizers = importlib.import_module("moe_lora"), importlib.import_module("custom_optimizer")
    module = wrapped(arrays, rank, alpha)
    module.__class__ = program.MoELoRA
    module.set_moe(number_experts=experts, top_k=top)
    module.double().descent_strategy = "moe-riemannian"
    with torch.no_grad():
        module.gate.weight.copy_(torch.from_numpy(arrays["gate"]))
        for i in range(experts):
            module.lora_A[i].weight.copy_(torch.from_numpy(arrays["a"][i]))
            module.lora_B[i].weight.copy_(torch.from_numpy(arrays["b"][i]))
    pairs = [*(one.weight for one in module.lora_A), *(one.weight for one in module.lora_B)]
    optimizers.SGDr.number_experts = experts
    steps = [optimizers.SGDr(pairs, lr=0.05, optimizer_reg=1e-6), optimizers.SGD([module.gate.weight], lr=0.05)]
    both = types.SimpleNamespace(step=lambda: [one.step() for one in steps])
    run = trained(
        module, [*pairs, module.gate.weight], both, lambda: torch.cat([p.flatten() for p in pairs]), arrays
    )
    return arrays, run, {"rank": rank, "experts": experts, "top": top, "alpha": alpha, "lr": 0.05, "damping": 1e-6}


def main(method: str, scratch: str, path: str) -> None:
    """Record one of them."""
    found = {f.__name__: f for f in (lora_ga, lora_one, lora_sb, moe_lora, paca)}[method](Path(scratch))
    save(path, *found)


if __name__ == "__main__":
    main(*sys.argv[1:])
