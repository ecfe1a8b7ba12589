"""Compressed models for software that does not know subspan: dense weights, or a base with a PEFT adapter.

Each export is read back from its files and must give the logits of the model it came from, or it is not written.
They are compared in float32 at least, on the first tokens of a built-in text. A float16 or bfloat16 export may
move them to `TOLERANCE`, or as far as running the model itself in that precision moves them.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan import io
from subspan.edit import edit
from subspan.hosts import folders, quantizer, text
from subspan.hosts import transformers as host
from subspan.hosts.transformers import LoadedModel
from subspan.ops import Dense, LinOp, LowRank, OpLinear, Scaled, Sum

# Of the largest logit: rounding of a product in another order, through all layers.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
BASE, ADAPTER = "base", "adapter"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_TOKENS = 64


@dataclass(frozen=True)
class Exported:
    """Where an export lies, its largest difference from a logit of the model, and what is allowed.

    Both are shares of the largest logit.
    """

    out: Path
    difference: float
    tolerance: float


def export_dense(loaded: LoadedModel, out: str | Path, *, force: bool = False) -> Exported:
    """Write an ordinary transformers folder, each compressed layer multiplied back into one matrix.

    The model is left as it was. Raises ValueError for a model that carries an adapter and for logits that are
    not the model's, and what `io.staged` raises; OUT is then not written.
    """
    check = _check_for(loaded)
    with io.staged(out, force=force) as folder:
        with quantizer.densify(loaded.model):
            _write(loaded, folder)
        read = host.load_folder(folder, dtype=check.wanted.dtype, device=check.ids.device)
        return check(read.model, Path(out))


def export_peft(loaded: LoadedModel, out: str | Path, *, force: bool = False) -> Exported:
    """Write OUT/base, a transformers folder, and OUT/adapter, a LoRA in PEFT's layout: together the model.

    A low-rank layer u v becomes a zero weight in the base and the adapter's factors lora_B = u, lora_A = v; what
    else an op adds to it stays in the base, and so does every op without factors. Scales are 1. Raises as
    `export_dense` does, and ValueError for a model without low-rank layers.
    """
    split = {name: _split(layer.op) for name, layer in quantizer.layers(loaded.model).items()}
    factors = {name: factor for name, (_, factor) in split.items() if factor is not None}
    if not factors:
        raise ValueError(f"{loaded.source} has no low-rank layer that could be an adapter; export it --to dense")
    check = _check_for(loaded)
    found = quantizer.layers(loaded.model)
    with io.staged(out, force=force) as folder:
        (folder / BASE).mkdir()
        with edit(loaded.model, list(found), lambda name, _: _remainder(found[name], split[name][0])):
            _write(loaded, folder / BASE)
        _write_adapter(folder / ADAPTER, factors, base=Path(out).resolve() / BASE)
        read = host.load_folder(folder / BASE, dtype=check.wanted.dtype, device=check.ids.device).model
        put_peft(read, folder / ADAPTER)
        return check(read, Path(out))


def put_peft(model: nn.Module, folder: str | Path) -> None:
    """Put a folder's LoRA on the linear layers it names, in place: w + (alpha / r) lora_B lora_A.

    Reads what `export_peft` writes. Raises ValueError for other tensors or other layers.
    """
    config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    tensors = io.read_tensors(Path(folder) / TENSORS)
    prefix, a, b = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
    names = [key.removeprefix(prefix).removesuffix(a) for key in tensors if key.endswith(a)]
    expected = {f"{prefix}{name}{end}" for name in names for end in (a, b)}
    if set(tensors) != expected or set(names) != set(config["target_modules"]):
        raise ValueError(f"{folder}: the tensors are not those of a LoRA on its target_modules; export it again")

    def make(name: str, layer: nn.Module) -> nn.Module:
        rank, alpha = (config[f"{kind}_pattern"].get(name, config[of]) for kind, of in _PATTERNS)
        v, u = tensors[f"{prefix}{name}{a}"], tensors[f"{prefix}{name}{b}"]
        if v.shape[0] != rank:
            raise ValueError(f"{folder}: {name} has rank {v.shape[0]}, the config says {rank}; export it again")
        weight = layer.get_parameter("weight")
        factors = LowRank(u.to(weight), v.to(weight))
        return OpLinear(
            Sum([Dense(weight), Scaled(factors, alpha / rank)]), dict(layer.named_parameters()).get("bias")
        )

    edit(model, names, make)


_PATTERNS = (("rank", "r"), ("alpha", "lora_alpha"))


def _write(loaded: LoadedModel, folder: Path) -> None:
    host.save_folder_extras(loaded.model, loaded.tokenizer, folder)
    io.write_tensors(folder / io.WEIGHTS, folders.untied(loaded.model))


def _split(op: LinOp) -> tuple[Tensor | None, LowRank | None]:
    """An op as (remainder, u v), whose sum it is; None for nothing."""
    if isinstance(op, LowRank):
        return None, op
    if isinstance(op, Scaled):
        rest, factor = _split(op.op)
        return (
            None if rest is None else op.scale * rest,
            None if factor is None else LowRank(op.scale * factor.u.detach(), factor.v.detach()),
        )
    if isinstance(op, Sum):
        parts = [_split(part) for part in op.ops]
        rests, factors = [r for r, _ in parts if r is not None], [f for _, f in parts if f is not None]
        u, v = ([getattr(f, side).detach() for f in factors] for side in "uv")
        return (
            torch.stack(rests).sum(0) if rests else None,
            LowRank(torch.cat(u, dim=1), torch.cat(v)) if factors else None,
        )
    return op.dense().detach(), None


def _remainder(layer: OpLinear, rest: Tensor | None) -> nn.Linear:
    """What stands in the base where a compressed layer stood."""
    like = next(p for p in layer.op.parameters() if p.is_floating_point())
    weight = like.new_zeros(layer.op.shape) if rest is None else rest.to(like.dtype)
    return quantizer.plain(weight, layer.bias)


def _write_adapter(folder: Path, factors: Mapping[str, LowRank], *, base: Path) -> None:
    """The two files of a LoRA folder; ranks other than the commonest go into the patterns."""
    folder.mkdir()
    usual = Counter(factor.rank for factor in factors.values()).most_common(1)[0][0]
    other = {name: factor.rank for name, factor in factors.items() if factor.rank != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "revision": None,
        "auto_mapping": None, "inference_mode": True, "r": usual, "lora_alpha": usual, "rank_pattern": other,
        "alpha_pattern": other, "target_modules": list(factors), "modules_to_save": None, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "init_lora_weights": True,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    sides = {"lora_A": "v", "lora_B": "u"}
    tensors = {
        f"base_model.model.{name}.{side}.weight": getattr(factor, part)
        for name, factor in factors.items()
        for side, part in sides.items()
    }
    io.write_tensors(folder / TENSORS, tensors)


@dataclass(frozen=True)
class _Check:
    """A few real tokens (1, count), what the model says to them, and how far an export may be from that."""

    ids: Tensor
    wanted: Tensor
    tolerance: float

    def __call__(self, model: nn.Module, out: Path) -> Exported:
        difference = self.distance(_logits(model, self.ids))
        if not difference <= self.tolerance:  # nor NaN
            raise ValueError(
                f"{out} was not written: read back, its logits differ from the model's by {difference:.2g} of the "
                f"largest, and {self.tolerance:.2g} is allowed; export it in a wider precision"
            )
        return Exported(out, difference, self.tolerance)

    def distance(self, logits: Tensor) -> float:
        """The largest difference, over the largest logit."""
        return float((logits.to(self.wanted.dtype) - self.wanted).abs().max() / self.wanted.abs().max())


def _check_for(loaded: LoadedModel) -> _Check:
    model: Any = loaded.model
    dtype, device = model.dtype, next(model.parameters()).device
    ids = text.encode(loaded.tokenizer, text.prose()[: 8 * _TOKENS])[None, :_TOKENS].to(device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _TOKENS
    ids, wide = ids[:, :limit], torch.promote_types(dtype, torch.float32)
    exact = copy.deepcopy(model).to(wide) if wide != dtype else model
    check = _Check(ids, _logits(exact, ids), TOLERANCE[dtype])
    if exact is model:
        return check
    return replace(check, tolerance=max(check.tolerance, check.distance(_logits(model, ids))))


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found
