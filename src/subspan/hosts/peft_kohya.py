"""LoRA in the one-file form of kohya's scripts and LyCORIS: a layer's dots are underscores in its key.

PREFIX_model_layers_0_self_attn_q_proj.lora_down.weight   v (rank, n)
PREFIX_model_layers_0_self_attn_q_proj.lora_up.weight     u (m, rank)
PREFIX_model_layers_0_self_attn_q_proj.alpha              scale * rank, 0-d
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from subspan import io
from subspan.adapt import Adapted, Adapter, Add, adapt
from subspan.edit import Edit, edit
from subspan.hosts.peft import factor_of, layers_of
from subspan.hosts.peft_keys import some
from subspan.linalg import wide
from subspan.ops import LowRank, OpLinear

PREFIXES = ("lycoris", "lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_transformer")
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
REFUSED = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_mid": "a convolution's LoRA",
    "oft_": "OFT",
}


def save_kohya(model: nn.Module, file: str | Path, *, name: str = "default", prefix: str = "lora_unet") -> Path:
    """Write a LoRA of a model as one safetensors file.

    An adapter that changed the base when it started becomes a LoRA of twice its rank, as in `save_peft`. Raises
    ValueError for a model without that adapter, for one that is no LoRA, and for two layers of one key.
    """
    found = {site: m for site, m in layers_of(model).items() if isinstance(m, Adapted) and name in m.adapters}
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter {name!r}; adapt it first")
    flat(layers_of(model))
    tensors: dict[str, Tensor] = {}
    for site, module in found.items():
        factor = factor_of(site, module, name)
        key = site.replace(".", "_")
        if factor.mu is not None:
            raise ValueError(f"{site} is a DoRA; kohya's form of it is not written: write it with save_peft")
        rank = factor.u.shape[1]
        tensors |= {f"{prefix}_{key}{DOWN}": factor.v, f"{prefix}_{key}{UP}": factor.u}
        tensors[f"{prefix}_{key}{ALPHA}"] = torch.tensor(factor.scale * rank, dtype=factor.u.dtype)
    path = Path(file)
    beside = path.with_name(f".{path.name}.partial")
    try:
        io.write_tensors(beside, tensors)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def load_kohya(model: nn.Module, file: str | Path, *, name: str = "default", prefix: str | None = None) -> Edit:
    """Put the LoRA of a kohya or LyCORIS file on a model, in place, strictly.

    The prefix is found unless the file mixes several. Raises ValueError for keys that are not those of a LoRA on
    layers of this model, and for other shapes; the model is then left as it was.
    """
    tensors = io.read_tensors(file)
    begin = prefix or _prefix(tensors, file)
    keys = flat(layers_of(model))
    strange = [key for key in tensors if not key.startswith(f"{begin}_") or not key.endswith((DOWN, UP, ALPHA))]
    for key in strange:
        for mark, what in REFUSED.items():
            if f".{mark}" in key:
                raise ValueError(f"{file}: {key} belongs to {what}, which is not read in this form")
    names = dict.fromkeys(key.removeprefix(f"{begin}_").rpartition(".lora_")[0] for key in tensors if DOWN in key)
    missing = [key for n in names for end in (DOWN, UP) if (key := f"{begin}_{n}{end}") not in tensors]
    lost = [key for key in names if key not in keys]
    ends = {f"{begin}_{n}{end}" for n in names for end in (DOWN, UP, ALPHA)}
    strange += [key for key in tensors if key not in ends and key not in strange]
    report = (("unknown", strange), ("missing", missing), ("of layers the model lacks", lost))
    if wrong := [f"{len(rows)} {what} ({some(rows)})" for what, rows in report if rows]:
        raise ValueError(f"{file} is no LoRA for {type(model).__name__}: {', '.join(wrong)}")
    sites = {keys[n]: f"{begin}_{n}" for n in names}

    def put(site: str, module: nn.Module) -> nn.Module:
        return _put(site, module, {end: tensors.get(sites[site] + end) for end in (DOWN, UP, ALPHA)}, name)

    return edit(model, list(sites), put)


def flat(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Key -> linear layer; raises ValueError where two layers have one key, so that no key could be told.

    >>> flat({"a.b_c": nn.Linear(1, 1)})
    {'a_b_c': 'a.b_c'}
    """
    linear = [name for name, m in layers.items() if isinstance(m, nn.Linear | OpLinear | Adapted)]
    found = {name.replace(".", "_"): name for name in linear}
    if len(found) < len(linear):
        twice = [name for name in linear if found[name.replace(".", "_")] != name]
        raise ValueError(
            f"{some(twice)} has the same key as another layer once dots are underscores; use PEFT's form"
        )
    return found


def _put(site: str, module: nn.Module, parts: Mapping[str, Tensor | None], name: str) -> nn.Module:
    u, v, alpha = parts[UP], parts[DOWN], parts[ALPHA]
    if u is None or v is None or u.dim() != 2 or v.dim() != 2 or u.shape[1] != v.shape[0]:
        shapes = [None if t is None else tuple(t.shape) for t in (u, v)]
        raise ValueError(f"{site}: lora_up and lora_down are {shapes[0]} and {shapes[1]}; two matrices are read")
    like = wide(next((p for p in module.parameters() if p.is_floating_point()), u)[:0])
    # Without alpha the scale is 1: alpha is then the rank.
    scale = 1.0 if alpha is None else float(alpha) / u.shape[1]
    op = LowRank(*(nn.Parameter(t.to(like)) for t in (u, v)))
    return adapt(Adapter(lambda *_: op, Add(scale)), name)(site, module)


def _prefix(keys: Collection[str], file: str | Path) -> str:
    found = {next((p for p in PREFIXES if key.startswith(f"{p}_")), "") for key in keys}
    if len(found) != 1 or "" in found:
        raise ValueError(
            f"{file}: the keys begin with {', '.join(sorted(found - {''})) or 'no known prefix'}"
            f"{' and others' if '' in found and len(found) > 1 else ''}; give one file per model, or the prefix"
        )
    return found.pop()
