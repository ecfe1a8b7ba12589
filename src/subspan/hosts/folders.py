"""Any model by one name: `smollm2`, a transformers folder, or a folder that subspan saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan import io
from subspan.adapt import Adapted, Adapter, adapt, remembered
from subspan.adapt.layer import Slot
from subspan.adapt.tokens import carries_rows
from subspan.adapt.triples import cut_as_saved
from subspan.edit import edit
from subspan.hosts import quantizer
from subspan.hosts import transformers as host
from subspan.hosts.transformers import LoadedModel
from subspan.methods import build
from subspan.ops.experts import Slice, Stacked, expert_layers, transposed


def open_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> LoadedModel:
    """Load a model by name, whatever kind of folder it is: plain, compressed, or an adapter and its base.

    Raises what `hosts.transformers.load` raises, and ValueError when an adapter's base is not the one that it
    was trained on.
    """
    folder = Path(name)
    if name == "smollm2" or not (folder / io.ABOUT).is_file():
        return host.load(name, dtype=dtype, device=device, progress=progress)
    about = io.read_about(folder)
    if about.get("kind") != "adapter":
        return host.load(name, dtype=dtype, device=device, progress=progress)
    trained_in = getattr(torch, about["base"]["dtype"])
    base = open_model(about["base"]["source"], dtype=trained_in, device=device, progress=progress)
    if few := quantizer.few_bits(folder):
        quantizer.narrow(base.model, few["bits"], block=few["block"])
    put_adapter(base.model, folder, about)
    cast(base.model, dtype)
    base.model.to(device)
    return replace(base, source=str(folder))


def stored_dtype(name: str | Path) -> torch.dtype:
    """The precision that a model lies in on disk; float32 when its folder does not say."""
    folder = Path(name)
    if name != "smollm2" and (folder / io.ABOUT).is_file():
        about = io.read_about(folder)
        if about.get("kind") == "adapter":
            return stored_dtype(about["base"]["source"])
    return torch.float32 if name == "smollm2" else host.stored_dtype(folder)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring saved tensors to a dtype; what is computed, like rotary frequencies, keeps its precision."""
    own = added(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and name not in own:
            tensor.data = tensor.data.to(dtype)


def save_model(
    out: str | Path,
    loaded: LoadedModel,
    about: Mapping[str, Any] | None = None,
    *,
    notes: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write a whole model, compressed sites included, as a folder that `open_model` takes; see `io.staged`.

    After `import subspan.hosts.transformers` the folder also loads by `from_pretrained`: its config.json says
    what stands at each site, and subspan.json only where the model came from. `notes` are json files to lie
    beside it, by name. Raises ValueError for a model that carries an adapter.
    """
    sites = list(quantizer.describe(loaded.model))
    with io.staged(out, force=force) as folder:
        host.save_folder_extras(loaded.model, loaded.tokenizer, folder)
        io.write_tensors(folder / io.WEIGHTS, untied(loaded.model))
        io.write_about(folder, {"kind": "model", "source": loaded.source, "sites": sites, **(about or {})})
        write_notes(folder, notes)
    return Path(out)


def untied(model: Any) -> dict[str, Tensor]:
    """The tensors to store: once for those that transformers ties again, as copies for other views."""
    tensors, tied = io.unique(model)
    again = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    copies = {alias: tensors[name].clone() for alias, name in tied.items() if not {alias, name} <= again}
    return tensors | copies


def save_adapter(
    out: str | Path,
    model: nn.Module,
    *,
    method: str,
    args: Mapping[str, Any],
    source: str,
    about: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write only what was added to the base: the adapters' tensors, the preset that made them, the base's hash.

    Raises ValueError for a model without adapters.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}
    sites = list(found)
    if not sites:
        raise ValueError(f"{type(model).__name__} carries no adapter; adapt it first")
    for site, adapted in found.items():
        names = list(adapted.adapters)
        if carries_rows(adapted):
            raise ValueError(
                f"{site} has rows of single tokens that train, which only a folder of PEFT holds; save it with "
                "keep.save_whole or save_peft"
            )
        if names != ["default"]:
            raise ValueError(
                f"{site} carries the adapters {', '.join(names)}; a folder holds one, named 'default'"
            )
    with io.staged(out, force=force) as folder:
        own = added(model)
        io.write_tensors(folder / io.WEIGHTS, own, tied=True)
        dtype = next(p.dtype for name, p in model.named_parameters() if name not in own)
        where = str(Path(source).resolve()) if Path(source).is_dir() else source
        base = {"source": where, "sha256": fingerprint(model), "dtype": str(dtype).removeprefix("torch.")}
        what = {"kind": "adapter", "method": method, "args": dict(args), "base": base, "sites": sites}
        experts = [site for site, adapted in found.items() if isinstance(adapted.origin, Slice)]
        more = {"experts": experts} if experts else {}
        io.write_about(folder, {**what, **more, **(about or {})})
        write_notes(folder, notes)
    return Path(out)


def write_notes(folder: Path, notes: Mapping[str, Any] | None) -> None:
    """Write each note as json under its name."""
    for name, content in (notes or {}).items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def put_adapter(model: nn.Module, folder: Path, about: Mapping[str, Any]) -> None:
    """Put a saved adapter on its base, strictly; the model is left as it was on any error."""
    found = fingerprint(model)
    tensors = io.read_tensors(folder / io.WEIGHTS)
    done = edit(model, about["sites"], adapt(rebuilt(about, tensors)))
    try:
        if found != about["base"]["sha256"]:
            raise ValueError(
                f"{folder} was trained on other weights than {about['base']['source']} has now (sha256 "
                f"{found[:12]} instead of {about['base']['sha256'][:12]}); give it the base it was made for"
            )
        cut_as_saved(model, tensors)
        io.fill(added(model), tensors, str(folder))
    except BaseException:
        done.undo()
        raise


def rebuilt(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter that a folder describes, to be filled with its tensors; these say what data taught its start."""
    adapter: Adapter = build(about["method"], "adapter", **about["args"])
    return remembered(adapter, tensors)


def added(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters, by their names in the model."""
    slots = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, Slot))
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if name.startswith(slots)}


def fingerprint(model: nn.Module) -> str:
    """sha256 over all weights as they were before any adapter, in float32."""
    slots = added(model)
    state = {name: t for name, t in model.state_dict().items() if name not in slots}
    for site, module in model.named_modules():
        if isinstance(module, Adapted):
            for name in module.base.state_dict(prefix=f"{site}.base."):
                del state[name]
            state |= module.origin.state_dict(prefix=f"{site}.")
    digest = hashlib.sha256()
    for name, parts in sorted(unsliced(model, state).items()):
        digest.update(name.encode())
        for part in parts:
            digest.update(part.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def unsliced(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """A state in which 3-D parameters whose experts stand apart have their old names, as one part an expert."""
    made = {name: [tensor] for name, tensor in state.items()}
    for place, owner in quantizer.stacks(model).items():
        inside = f"{place}." if place else ""
        for key in owner.stacks if isinstance(owner, Stacked) else ():
            names = [f"{inside}{i}.{key}.weight" for i in range(len(expert_layers(owner, key)))]
            if all(name in made for name in names):
                parts = [made.pop(name)[0] for name in names]
                made[f"{inside}{key}"] = [part.mT for part in parts] if transposed(owner) else parts
    return made
