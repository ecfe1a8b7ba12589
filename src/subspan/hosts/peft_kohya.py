"""LoRA, LoHa and LoKr in the one-file form of kohya's scripts and LyCORIS: dots of a layer's name are underscores.

PREFIX_model_layers_0_self_attn_q_proj.lora_down.weight   v (rank, n)
PREFIX_model_layers_0_self_attn_q_proj.lora_up.weight     u (m, rank)
PREFIX_model_layers_0_self_attn_q_proj.alpha              scale * rank, 0-d

LoHa has hada_w1_a (m, rank), hada_w1_b (rank, n), hada_w2_a and hada_w2_b instead, LoKr lokr_w1 (p, q) and
lokr_w2 (m / p, n / q), each also as a product of lokr_wN_a and lokr_wN_b. Where neither is a product, LyCORIS
takes a scale of 1, whatever alpha says.
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
from subspan.hosts.peft import factor_of, layers_of, type_of
from subspan.hosts.peft_config import PeftConfig
from subspan.hosts.peft_given import Given
from subspan.hosts.peft_keys import some
from subspan.hosts.peft_parts import HADA, LOKR, cast_to, kron_parts, scale_of, write_loha
from subspan.hosts.peft_types import TYPES
from subspan.linalg import wide
from subspan.ops import Kron, LowRank, OpLinear

PREFIXES = ("lycoris", "lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_transformer")
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
ENDS: dict[str, tuple[str, ...]] = {
    "LORA": (DOWN, UP),
    **{kind: tuple(f".{name}" for name in TYPES[kind].names) for kind in ("LOHA", "LOKR")},
}
REFUSED = {
    "dora_scale": "DoRA",
    "lora_mid": "a convolution's LoRA",
    "hada_t": "a convolution's LoHa",
    "lokr_t": "a convolution's LoKr",
    "oft_": "OFT",
}


def save_kohya(model: nn.Module, file: str | Path, *, name: str = "default", prefix: str = "lora_unet") -> Path:
    """Write a LoRA, LoHa or LoKr of a model as one safetensors file.

    A LoRA that changed the base when it started becomes one of twice its rank, as in `save_peft`. Raises
    ValueError for a model without that adapter, for one of another type, and for two layers of one key.
    """
    found = {site: m for site, m in layers_of(model).items() if isinstance(m, Adapted) and name in m.adapters}
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter {name!r}; adapt it first")
    flat(layers_of(model))
    kind = type_of(found, name)
    if kind not in ENDS:
        raise ValueError(f"adapter {name!r} is {TYPES[kind].label}, and kohya's form has LoRA, LoHa and LoKr only")
    tensors: dict[str, Tensor] = {}
    for site, module in found.items():
        begin = f"{prefix}_{site.replace('.', '_')}"
        parts = _lora_parts(site, module, name) if kind == "LORA" else _parts(kind, site, module, name)
        tensors |= {begin + end: t.contiguous() for end, t in parts.items()}
    path = Path(file)
    beside = path.with_name(f".{path.name}.partial")
    try:
        io.write_tensors(beside, tensors)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _lora_parts(site: str, module: Adapted, name: str) -> dict[str, Tensor]:
    factor = factor_of(site, module, name)
    if factor.mu is not None:
        raise ValueError(f"{site} is a DoRA; kohya's form of it is not written: write it with save_peft")
    alpha = torch.tensor(factor.scale * factor.u.shape[1], dtype=factor.u.dtype)
    return {DOWN: factor.v, UP: factor.u, ALPHA: alpha}


@torch.no_grad()
def _parts(kind: str, site: str, module: Adapted, name: str) -> dict[str, Tensor]:
    slot = module.slot(name)
    scale = scale_of(site, slot)
    if next(iter(module.adapters)) == name and module.origin is not module.base:
        raise ValueError(f"{site}: adapter {name!r} changed the base when it started, which this form cannot say")
    parts = write_loha({site: slot}).parts[site] if kind == "LOHA" else kron_parts(cast_to(Kron, site, slot))
    rank = rank_of(parts)
    if rank is None:
        parts["lokr_w1"], scale, rank = scale * parts["lokr_w1"], 1.0, 1
    like = next(iter(parts.values()))
    return {f".{end}": t for end, t in parts.items()} | {ALPHA: torch.tensor(scale * rank, dtype=like.dtype)}


def rank_of(parts: Mapping[str, Tensor]) -> int | None:
    """The rank that divides alpha in a LoHa or LoKr: that of the first product, None where there is none."""
    first = next((end for end in (HADA[0], f"{LOKR[0]}_a", f"{LOKR[1]}_a") if end in parts), None)
    return None if first is None else parts[first].shape[-1]


def load_kohya(model: nn.Module, file: str | Path, *, name: str = "default", prefix: str | None = None) -> Edit:
    """Put the LoRA, LoHa or LoKr of a kohya or LyCORIS file on a model, in place, strictly.

    The prefix is found unless the file mixes several. Raises ValueError for keys that are not those of one of
    them on layers of this model, and for other shapes; the model is then left as it was.
    """
    tensors = io.read_tensors(file)
    begin = prefix or _prefix(tensors, file)
    keys = flat(layers_of(model))
    kind = _kind(tensors, file)
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        site, dot, end = key.removeprefix(f"{begin}_").partition(".")
        if not key.startswith(f"{begin}_") or dot + end not in (*ENDS[kind], ALPHA):
            strange.append(key)
        else:
            parts.setdefault(site, {})[dot + end] = tensor
    strange += [f"{begin}_{site}{ALPHA}" for site, own in parts.items() if own.keys() == {ALPHA}]
    parts = {site: own for site, own in parts.items() if own.keys() != {ALPHA}}
    must = {site: _must(kind, own) for site, own in parts.items()}
    strange += [f"{begin}_{site}{end}" for site in parts for end in parts[site].keys() - must[site] - {ALPHA}]
    missing = [f"{begin}_{site}{end}" for site in parts for end in sorted(must[site] - parts[site].keys())]
    lost = [site for site in parts if site not in keys]
    report = (("unknown", strange), ("missing", missing), ("of layers the model lacks", lost))
    if wrong := [f"{len(rows)} {what} ({some(rows)})" for what, rows in report if rows]:
        label = TYPES[kind].label
        raise ValueError(f"{file} is no {label} for {type(model).__name__}: {', '.join(wrong)}")
    sites = {keys[site]: own for site, own in parts.items()}

    def put(site: str, module: nn.Module) -> nn.Module:
        one = _put if kind == "LORA" else _put_parts
        return one(site, module, sites[site], name)

    return edit(model, list(sites), put)


def _kind(tensors: Mapping[str, Tensor], file: str | Path) -> str:
    """The algorithm of a file; raises ValueError for what is not read, and for several."""
    found: dict[str, str] = {}
    for key in tensors:
        end = key[key.find(".") :]
        if what := next((what for mark, what in REFUSED.items() if f".{mark}" in key), None):
            raise ValueError(f"{file}: {key} belongs to {what}, which is not read in this form")
        if kind := next((kind for kind, ends in ENDS.items() if end in ends), None):
            found.setdefault(kind, key)
    kinds = iter(found)
    first = next(kinds, "LORA")
    if other := next(kinds, None):
        raise ValueError(
            f"{file}: {found[other]} belongs to {TYPES[other].label}, {found[first]} to {TYPES[first].label}; "
            "give one file per algorithm"
        )
    return first


def _must(kind: str, own: Mapping[str, Tensor]) -> set[str]:
    """The ends that a layer must have, given those it has."""
    if kind == "LORA":
        return {DOWN, UP}
    layout = TYPES[kind]
    plain = PeftConfig(rank=1, alpha=1.0, targets=None, kind=kind)
    return {f".{name}" for name in layout.must({end[1:] for end in own}, plain)}


def _put_parts(site: str, module: nn.Module, own: Mapping[str, Tensor], name: str) -> nn.Module:
    kind = "LOHA" if f".{HADA[0]}" in own else "LOKR"
    like = wide(next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))[:0])
    parts = {end[1:]: t.to(like) for end, t in own.items() if end != ALPHA}
    if wrong := [f"{end} {tuple(t.shape)}" for end, t in parts.items() if t.dim() != 2]:
        raise ValueError(f"{site}: {', '.join(wrong)}; only matrices are read")
    rank = rank_of(parts)
    alpha = 0.0 if rank is None or ALPHA not in own else float(own[ALPHA])
    # Where alpha is missing or 0, or has no rank to be divided by, the scale is 1.
    config = PeftConfig(rank=rank or 1, alpha=alpha or rank or 1, targets=None, kind=kind)
    op, join = TYPES[kind].read(Given(site, parts, {}, config, 0, 0))
    return adapt(Adapter(lambda *_: op, join), name)(site, module)


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


def _put(site: str, module: nn.Module, parts: Mapping[str, Tensor], name: str) -> nn.Module:
    u, v, alpha = parts[UP], parts[DOWN], parts.get(ALPHA)
    if u.dim() != 2 or v.dim() != 2 or u.shape[1] != v.shape[0]:
        shapes = [tuple(t.shape) for t in (u, v)]
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
