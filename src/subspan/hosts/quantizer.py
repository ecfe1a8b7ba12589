"""Compressed models as transformers itself loads and saves them: the quantizer `subspan` of its registry.

`config.json` says under `quantization_config` what stands at each compressed site; the tensors lie in ordinary
safetensors files under the model's own names. No pickle, no remote code: only this module must be imported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from subspan import io, site
from subspan.adapt import Adapted
from subspan.edit import Edit, edit, matrices
from subspan.edit import sites as chosen
from subspan.ops import OpLayer, Quantized, quantize
from subspan.ops.experts import Stacked, expert_layers, transposed, unstacked
from subspan.ops.quantized import CODES, bits_of
from subspan.select import Select

METHOD = "subspan"
Sites = Mapping[str, Mapping[str, Any]]


@register_quantization_config(METHOD)
class SubspanConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What stands at each compressed site: `{"op": the op's spec, "bias": whether it has one}` by name.

    Raises ValueError when it is damaged, or was written by a newer version.
    """

    def __init__(
        self,
        sites: Sites | None = None,
        format: int = io.FORMAT,
        library: str | None = None,
        quant_method: str = METHOD,
        **rest: Any,
    ) -> None:
        if isinstance(format, int) and format > io.FORMAT:
            raise ValueError(
                f"the model's config.json has subspan format {format}, written by subspan {library}; this is "
                f"subspan {io.subspan_version()}, which reads up to {io.FORMAT}: upgrade subspan"
            )
        if not isinstance(format, int) or not isinstance(sites, Mapping) or not all(map(_row, sites.values())):
            raise _damaged("it names no format and sites, each with an op and a bias")
        if rest:
            raise _damaged(f"it has the unknown keys {', '.join(rest)}")
        self.quant_method = quant_method
        self.format = format
        self.library = library
        self.sites = dict(sites)


@register_quantizer(METHOD)
class SubspanQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds the compressed layers of a folder before transformers fills them, and describes them on saving.

    Raises ValueError when it is asked to compress a model while loading it.
    """

    def __init__(self, quantization_config: SubspanConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        if not self.pre_quantized:
            raise ValueError(
                "a SubspanConfig describes a model that is compressed already; compress one with "
                "`subspan compress`, and load the folder that it writes without a quantization_config"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **_: Any
    ) -> Any:
        for file in checkpoint_files or ():
            if str(file).endswith(".safetensors"):
                require_whole(Path(file))
        rebuild(model, self.quantization_config.sites, device="meta")
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # transformers marks what it has filled, and only warns of the rest.
        empty = [
            f"{at}.{name}"
            for at, layer in layers(model).items()
            for name, p in layer.state_dict(keep_vars=True).items()
            if not getattr(p, "_is_hf_initialized", False)
        ]
        if empty:
            raise ValueError(
                f"{model.name_or_path or 'the state'} does not fit its config.json: {len(empty)} tensors are "
                f"missing or of another shape ({', '.join(empty[:4])}); copy or save the folder again"
            )
        model.is_quantized = False  # the layers hold floats, so .half() and .float() need not be refused
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Describe the model as it now is, before save_pretrained writes config.json.

        Raises ValueError for a model that carries an adapter.
        """
        mark(model.config, model)
        if getattr(model.config, "quantization_config", None) is not None:
            self.quantization_config = model.config.quantization_config
        return None, {}

    def is_serializable(self) -> bool:
        """What was loaded can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers are ordinary matrix products."""
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        densify(model)
        return model


def attach(model: Any) -> None:
    """Let `model.save_pretrained` write a compressed model, one that was compressed in this process too.

    Raises ValueError for a model that carries an adapter.
    """
    model.hf_quantizer = SubspanQuantizer(SubspanConfig(describe(model), library=io.subspan_version()))
    model.hf_quantizer.get_state_dict_and_metadata(model)


def mark(config: Any, model: nn.Module) -> None:
    """Write into a config what is compressed in a model; one that is not loses our mark.

    Raises ValueError for a model that carries an adapter.
    """
    sites = describe(model)
    if sites:
        config.quantization_config = SubspanConfig(sites, library=io.subspan_version())
        if any(part in sites for part in _tied_modules(model)):
            config.tie_word_embeddings = False  # a compressed head has no weight to share
    elif ours(config):
        del config.quantization_config


def ours(config: Any) -> bool:
    """Whether a model's config has our mark, as a config or as read from json."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return bool(method == METHOD)


def describe(model: nn.Module) -> dict[str, io.Json]:
    """Compressed site -> {"op": spec, "bias": bool}; raises ValueError for a model that carries an adapter."""
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ValueError("the model carries an adapter; merge it first, or write the adapter with save_adapter")
    return {
        name: {"op": io.spec(layer.op), "bias": layer.bias is not None} for name, layer in layers(model).items()
    }


def layers(model: nn.Module) -> dict[str, OpLayer]:
    """The compressed layers by name, experts of 3-D parameters each alone."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OpLayer)}


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose compressed experts were 3-D parameters, by name."""
    return {name: module for name, module in model.named_modules() if issubclass(type(module), Stacked)}


def rebuild(model: Any, sites: Sites, *, device: str = "cpu") -> Edit:
    """Put compressed layers with uninitialised tensors where `sites` says, in place, in the model's precision.

    Raises ValueError for a site that the model lacks, for one of another size, and for an op that cannot be
    built; the model is left as it was.
    """
    here = _local(model, sites)
    found = matrices(model)
    if wrong := [name for name in here if name not in found]:
        raise ValueError(
            f"config.json compresses {len(wrong)} layers that {type(model).__name__} lacks "
            f"({', '.join(wrong[:4])}); it belongs to another model: copy or save the folder again"
        )

    done = edit(model, list(here), lambda name, old: _skeleton(name, old, here[name], device))
    for tied in [key for key in _tied(model) if key.rpartition(".")[0] in here]:
        del model.all_tied_weights_keys[tied]
    return done


def densify(model: nn.Module) -> Edit:
    """Replace every compressed layer by the ordinary one that stood there; the result's `undo()` puts them back.

    The product is taken in float32 at least and cast once.
    """
    owners, alone = stacks(model), single(model)

    def make(name: str, _: nn.Module) -> nn.Module:
        return dense(alone[name]) if name in alone else unstack(owners[name])

    return edit(model, [*alone, *owners], make)


def single(model: nn.Module) -> dict[str, OpLayer]:
    """The compressed layers that are no experts of a 3-D parameter, by name."""
    inside = tuple(f"{name}." if name else "" for name in stacks(model))
    return {name: layer for name, layer in layers(model).items() if not name.startswith(inside)}


@torch.no_grad()
def dense(layer: OpLayer) -> nn.Module:
    """The ordinary layer with the product as its weight, in the dtype of the op."""
    return layer.plain(_product(layer))


@torch.no_grad()
def unstack(owner: nn.Module) -> nn.Module:
    """The ordinary module with the products as 3-D parameters, in the dtype of the ops."""
    keys = owner.stacks if isinstance(owner, Stacked) else ()
    whole = {key: torch.stack([_product(layer) for layer in expert_layers(owner, key)]) for key in keys}
    return unstacked(owner, {key: w.mT if transposed(owner) else w for key, w in whole.items()})


def _product(layer: OpLayer) -> torch.Tensor:
    dtype = next(p.dtype for p in layer.op.parameters() if p.is_floating_point())
    wide = torch.promote_types(dtype, torch.float32)
    return copy.deepcopy(layer.op).to(wide).dense().to(dtype)


def narrow(model: nn.Module, bits: int, *, select: Select | None = None, block: int = 64) -> Edit:
    """Hold layers in 4 or 8 bits an entry, in place: those that `edit.sites` chooses, but no experts.

    Nothing of them trains. Embeddings, head and norms stay as they are. Raises ValueError for other bits, and what
    `edit.sites` and `ops.quantize` raise.
    """
    code = code_of(bits)
    found = {name: layer for name, layer in chosen(model, select).items() if site.of(layer).called}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has only experts to hold in {bits} bits, which are not quantized; leave the "
            "bits out"
        )

    def make(name: str, layer: nn.Module) -> nn.Module:
        bias = site.bias(layer)
        op = quantize(site.matrix(layer), code, block)
        return site.of(layer).rebuild(layer, op, None if bias is None else bias.detach())

    return edit(model, list(found), make)


def code_of(bits: int) -> str:
    """The code of `ops.Quantized` that has so many bits; raises ValueError when none has.

    >>> code_of(4), code_of(8)
    ('nf4', 'int8')
    """
    codes = {bits_of(code): code for code in CODES}
    if bits not in codes:
        raise ValueError(f"a base of {bits!r} bits is not known; use {' or '.join(map(str, sorted(codes)))}")
    return codes[bits]


def narrowed(layer: nn.Module) -> bool:
    """Whether a layer is held in few bits."""
    return isinstance(layer, OpLayer) and isinstance(layer.op, Quantized)


def widen(model: nn.Module) -> Edit:
    """Replace every layer that is held in few bits by the ordinary one of the matrix it stands for, in place."""
    found = {name: layer for name, layer in layers(model).items() if narrowed(layer)}
    return edit(model, list(found), lambda name, _: dense(found[name]))


def few_bits(folder: str | Path) -> io.Json | None:
    """What an adapter's folder says of a base that was quantized to train on: bits, block, and the dtype it had.

    None for one that was not. Raises ValueError when that is damaged.
    """
    said = io.read_about(folder).get("quantized") if (Path(folder) / io.ABOUT).is_file() else None
    if said is None:
        return None
    try:
        found = {"bits": int(said["bits"]), "block": int(said["block"]), "dtype": getattr(torch, said["dtype"])}
        code_of(found["bits"])
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise ValueError(
            f"{Path(folder) / io.ABOUT} is damaged: quantized is {said!r} ({problem}); save the adapter again"
        ) from None
    return found


def require_whole(file: Path) -> None:
    """Raise ValueError for a safetensors file that is cut short or damaged."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is cut short or damaged ({error}); "
            "copy it again, or save it again"
        ) from error


def _skeleton(name: str, old: nn.Module, row: Mapping[str, Any], device: str) -> OpLayer:
    shape, bias = tuple(site.matrix(old).shape), site.bias(old)
    try:
        with torch.device(device):
            op = io.build(row["op"])
            layer = site.of(old).rebuild(old, op, torch.empty(op.shape[0]) if row["bias"] else None)
    except (TypeError, AttributeError, RuntimeError, KeyError) as problem:
        raise _damaged(f"{name} describes no op ({problem})") from None
    unfit = bool(row["bias"]) < (bias is not None) or bool(row["bias"]) > site.of(old).biased
    if op.shape != shape or unfit:
        raise ValueError(
            f"{name}: config.json says an op of {op.shape}{' with a bias' if row['bias'] else ''}, the model has "
            f"{shape}{'' if bias is None else ' with a bias'}; "
            "it belongs to another model: copy or save the folder again"
        )
    return layer.to(site.parameter(old).dtype)


def _local(model: Any, sites: Sites) -> Sites:
    """Sites by the model's own names: a body alone lacks the prefix that it has under a head."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    have = {name for name, _ in model.named_modules()}
    if prefix.rstrip(".") in have:
        return {prefix + name if prefix + name in have else name: site for name, site in sites.items()}
    under = {name.removeprefix(prefix): site for name, site in sites.items() if name.startswith(prefix)}
    return under or sites


def _tied(model: Any) -> Mapping[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}


def _tied_modules(model: Any) -> set[str]:
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    return {key.rpartition(".")[0] for pair in pairs for key in pair}


def _row(row: object) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("op"), Mapping) and isinstance(row.get("bias"), bool)


def _damaged(why: str) -> ValueError:
    return ValueError(
        f"the quantization_config of subspan in the model's config.json is damaged: {why}; "
        "copy or save the folder again"
    )
