"""Compressed models for software that does not know subspan: dense weights, or a base with a PEFT adapter.

Each export is read back from its files and must give the logits of the model it came from, or it is not written.
They are compared in float32 at least, on the first tokens of a built-in text. A float16 or bfloat16 export may
move them to `TOLERANCE`, or as far as running the model itself in that precision moves them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan import io, site
from subspan.edit import edit
from subspan.hosts import folders, quantizer, text
from subspan.hosts import transformers as host
from subspan.hosts.peft import check_fits, layers_of, read_peft
from subspan.hosts.peft_write import Factor, write_peft
from subspan.hosts.transformers import LoadedModel
from subspan.ops import Dense, LinOp, LowRank, OpLayer, OpLinear, Scaled, Sum
from subspan.site import OpConv1D

# Of the largest logit: rounding of a product in another order, through all layers.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
BASE, ADAPTER = "base", "adapter"
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
    else an op adds to it stays in the base, and so does every op without factors. Scales are 1. Only linear
    layers can be adapters, and `Conv1D` ones where there are no others, as a LoRA knows one order of axes; the
    rest stays in the base, multiplied back. Raises as `export_dense` does, and ValueError for a model without
    low-rank layers.
    """
    found, owners = quantizer.single(loaded.model), quantizer.stacks(loaded.model)
    kind = next((k for k in (OpLinear, OpConv1D) if k in {type(layer) for layer in found.values()}), OpLinear)
    split = {name: _split(layer.op) for name, layer in found.items() if type(layer) is kind}
    factors = {name: factor for name, (_, factor) in split.items() if factor is not None}
    if not factors:
        raise ValueError(f"{loaded.source} has no low-rank layer that could be an adapter; export it --to dense")
    check = _check_for(loaded)

    def make(name: str, _: nn.Module) -> nn.Module:
        if name in split:
            return _remainder(found[name], split[name][0])
        return quantizer.unstack(owners[name]) if name in owners else quantizer.dense(found[name])

    with io.staged(out, force=force) as folder:
        (folder / BASE).mkdir()
        with edit(loaded.model, [*found, *owners], make):
            _write(loaded, folder / BASE)
        write_peft(
            folder / ADAPTER,
            {name: Factor(factor.u, factor.v, 1.0) for name, factor in factors.items()},
            names=list(layers_of(loaded.model)),
            base=str(Path(out).resolve() / BASE),
            kind=type(loaded.model),
            turned=kind is OpConv1D,
        )
        read = host.load_folder(folder / BASE, dtype=check.wanted.dtype, device=check.ids.device).model
        put_peft(read, folder / ADAPTER)
        return check(read, Path(out))


def put_peft(model: nn.Module, folder: str | Path) -> None:
    """Put a folder's LoRA on the linear layers it names, in place: w + (alpha / r) lora_B lora_A.

    Reads what `export_peft` writes. Raises ValueError for other tensors or other layers.
    """
    saved = read_peft(folder)
    check_fits(model, saved)

    def make(name: str, layer: nn.Module) -> nn.Module:
        u, v, _ = saved.sites[name]
        weight = site.matrix(layer)
        factors = LowRank(u.to(weight), v.to(weight))
        op = Sum([Dense(weight.detach()), Scaled(factors, saved.config.scale_of(name))])
        return site.of(layer).rebuild(layer, op, site.bias(layer))

    edit(model, list(saved.sites), make)


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


def _remainder(layer: OpLayer, rest: Tensor | None) -> nn.Module:
    """What stands in the base where a compressed layer stood."""
    like = next(p for p in layer.op.parameters() if p.is_floating_point())
    weight = like.new_zeros(layer.op.shape) if rest is None else rest.to(like.dtype)
    return layer.plain(weight)


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
