"""LoRA, rsLoRA, DoRA and PiSSA as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`.

What is written here loads in peft 0.21.2 on the same base, and the other way round. Loading is strict: a tensor
too many or too few, another shape, or a field that would change the meaning is an error, and the model is left
as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan import io
from subspan.adapt import Adapted, Adapter, Add, FromWeight, Rescale, SubtractInit, adapt
from subspan.edit import Edit, Make, edit
from subspan.hosts.peft_config import AUTOMATIC, PeftConfig, read_config
from subspan.hosts.peft_keys import PICKLE, PREFIX, TENSORS, Triple, hint, some, sort_tensors
from subspan.hosts.peft_write import Factor, write_peft
from subspan.linalg import svd, wide
from subspan.ops import LinOp, LowRank, OpLinear, Scaled
from subspan.site import conv1d, kind_of, matrix


@dataclass(frozen=True)
class PeftFolder:
    """An adapter folder of PEFT, read and found consistent."""

    path: Path
    config: PeftConfig
    sites: Mapping[str, Triple]
    whole: Mapping[str, Tensor]
    bases: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Site -> (m, n)."""
        return {site: (t.u.shape[0], t.v.shape[1]) for site, t in self.sites.items()}

    def make(self, name: str) -> Make:
        """The function that puts this adapter on a layer: (site, module) -> module, for `edit`."""

        def put(site: str, module: nn.Module) -> nn.Module:
            u, v, mu = self.sites[site]
            scale = self.config.scale_of(site)
            weight = next((p for p in module.parameters() if p.is_floating_point()), u)
            u, v = (nn.Parameter(t.to(wide(weight[:0]))) for t in (u, v))
            if self.config.pissa:
                return _restart(site, module, name, LowRank(u, v), scale)
            join = Add(scale) if mu is None else Rescale(scale, nn.Parameter(mu.to(u)))
            return adapt(Adapter(lambda *_: LowRank(u, v), join), name)(site, module)

        return put


def _restart(site: str, module: nn.Module, name: str, op: LowRank, scale: float) -> nn.Module:
    """PiSSA's start, done again on the base it came from, and then the trained factors."""
    start = FromWeight(op.rank, scale=scale)
    made = adapt(Adapter(start, Add(scale), SubtractInit()), name)(site, module)
    if isinstance(made, Adapted):
        made.slot(name).op = op
    return made


def read_peft(folder: str | Path, *, prefix: str = PREFIX, root: str = "") -> PeftFolder:
    """Read an adapter folder of PEFT; a tensor's name is `prefix` + site, once `root` is put before the site.

    Raises FileNotFoundError for a missing folder or file, and ValueError for a pickle, for damage, and for
    tensors or fields that do not make one adapter.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not (folder / TENSORS).is_file() and (folder / PICKLE).is_file():
        raise ValueError(
            f"{folder / PICKLE} is a pickle, which can run any program, so it is not read; convert it "
            f"where you trust it: safetensors.torch.save_file(torch.load('{PICKLE}', weights_only=True), "
            f"'{TENSORS}')"
        )
    tensors = io.read_tensors(folder / TENSORS)
    try:
        found = sort_tensors(tensors, config, prefix=prefix, root=root)
    except ValueError as problem:
        raise ValueError(f"{folder / TENSORS}: {problem}") from None
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{folder / TENSORS}: {key} holds NaN, Inf or no floats; save the adapter again")
    return PeftFolder(folder, config, *found)


def load_peft(
    model: nn.Module, folder: str | Path, *, name: str = "default", prefix: str = PREFIX, root: str = ""
) -> Edit:
    """Put the adapter of a PEFT folder on a model, in place, as an adapter that trains on.

    Modules of `modules_to_save` are replaced by copies with the saved weights; a tied one is untied from its
    partner, which keeps its weight. Raises what `read_peft` and `put_peft` raise.
    """
    return put_peft(model, read_peft(folder, prefix=prefix, root=root), name)


def put_peft(model: nn.Module, saved: PeftFolder, name: str = "default") -> Edit:
    """Put an adapter that was read on a model, in place; `undo()` of the result takes it off.

    Raises ValueError when the model lacks a layer, has one of another shape, or has a layer that the config
    targets and the file does not hold, and when the name is taken; TypeError for a layer that cannot be adapted.
    """
    check_fits(model, saved)
    make = saved.make(name)
    whole = _by_module(saved.whole)

    def put(site: str, module: nn.Module) -> nn.Module:
        return make(site, module) if site in saved.sites else _replaced(module, whole[site])

    return edit(model, [*saved.sites, *whole], put)


def check_fits(model: nn.Module, saved: PeftFolder) -> None:
    """Raise ValueError unless a model has the layers of an adapter, in its shapes, and targets no other."""
    modules = layers_of(model)
    if lost := [site for site in saved.sites if site not in modules]:
        raise ValueError(
            f"{saved.path} adapts {len(lost)} layers that {type(model).__name__} lacks ({some(lost)})"
            f"{hint(lost, modules) or '; it belongs to another model'}"
        )
    have = {site: tuple(_weight(modules[site]).shape) for site in saved.sites}
    if other := [
        f"{site} {saved.shapes[site]} there, {have[site]} here"
        for site in have
        if have[site] != saved.shapes[site]
    ]:
        raise ValueError(
            f"{saved.path} was made for layers of other shapes: {some(other)}; it belongs to another model"
        )
    _check_targets(model, saved, modules)
    for site, base in saved.bases.items():
        if not (own := _weight(modules[site]).detach()).is_meta:
            check_base(saved.path, site, base, own.cpu())
    _check_whole(model, saved, modules)


def check_base(path: Path, site: str, saved: Tensor, own: Tensor) -> None:
    """Raise ValueError when the copy of a base weight that PEFT saved is not the model's own."""
    if saved.shape != own.shape or not torch.equal(saved.to(own.dtype), own):
        raise ValueError(
            f"{path} holds a base weight of {site} that is not the model's; give it the base it was trained on"
        )


def _check_targets(model: Any, saved: PeftFolder, modules: Mapping[str, nn.Module]) -> None:
    config = saved.config
    kinds = (nn.Linear, OpLinear, Adapted, *([turned] if (turned := conv1d()) else []))
    linear = [name for name, m in modules.items() if isinstance(m, kinds)]
    head = next((n for n, m in modules.items() if _is_head(model, m)), None)
    targeted = config.targeted(modules, linear, head)
    if config.targets is not None and not targeted:
        raise ValueError(
            f"{saved.path}: target_modules {_shown(config.targets)} matches no layer of {type(model).__name__}; "
            f"there are: {some(linear)}"
        )
    alone = saved.sites.keys() - targeted if config.targets is not None else set()
    if absent := sorted(targeted - saved.sites.keys()):
        raise ValueError(
            f"{saved.path}: target_modules also names {some(absent)}, and the file holds no tensors for them; "
            "it belongs to another model, or was saved in part"
        )
    if alone:
        raise ValueError(
            f"{saved.path} holds tensors for {some(sorted(alone))}, which target_modules "
            f"{_shown(config.targets)} does not name; correct one of the two"
        )


def _check_whole(model: nn.Module, saved: PeftFolder, modules: Mapping[str, nn.Module]) -> None:
    free = AUTOMATIC.get(saved.config.task or "", set())
    matched = {end: [name for name in modules if name.endswith(end)] for end in saved.config.whole}
    if lost := [end for end, names in matched.items() if not names and end not in free]:
        raise ValueError(f"{saved.path}: modules_to_save names {some(lost)}, which {type(model).__name__} lacks")
    wanted = {
        f"{name}.{key}": tuple(t.shape) for names in matched.values() for name in names
        for key, t in modules[name].state_dict().items()
    }  # fmt: skip
    have = {key: tuple(t.shape) for key, t in saved.whole.items()}
    if wanted != have:
        wrong = [f"{key} {have.get(key, 'missing')} there, {wanted.get(key, 'missing')} here"
                 for key in sorted(wanted.keys() | have.keys()) if wanted.get(key) != have.get(key)]  # fmt: skip
        raise ValueError(f"{saved.path}: modules_to_save does not fit the model: {some(wrong)}")


def save_peft(
    model: nn.Module,
    out: str | Path,
    *,
    name: str = "default",
    modules_to_save: Sequence[str] = (),
    base: str | None = None,
    rslora: bool = False,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write one adapter of a model as a folder that peft loads on the original base.

    LoRA and rsLoRA keep their factors. An adapter that changed the base when it started (PiSSA, MiLoRA) becomes
    a LoRA of twice the rank, u v - u0 v0, relative to the original. `modules_to_save` names modules that are
    written whole; `rslora` writes alpha for a scale of alpha / sqrt(rank). Raises ValueError for a model without
    that adapter, for one that is no LoRA or DoRA, and for a DoRA on top of another adapter; see `io.staged`.
    """
    found = {site: m for site, m in layers_of(model).items() if isinstance(m, Adapted) and name in m.adapters}
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter {name!r}; adapt it first")
    factors = {site: factor_of(site, module, name) for site, module in found.items()}
    with io.staged(out, force=force) as folder:
        write_peft(
            folder, factors, names=list(layers_of(model)), whole=_whole(model, modules_to_save), base=base,
            rslora=rslora, dtype=dtype, kind=type(model),
        )  # fmt: skip
    return Path(out)


@torch.no_grad()
def factor_of(site: str, module: Adapted, name: str = "default") -> Factor:
    """An adapter of one site as scale * u @ v (and mu) relative to the original base; raises as `save_peft`."""
    slot = module.slot(name)
    low = low_rank(slot.op)
    if low is None or not isinstance(slot.join, Add | Rescale):
        raise ValueError(
            f"{site}: {type(slot.op).__name__} joined by {type(slot.join).__name__} is no LoRA; "
            "approximate it with `subspan adapter convert --to lora --rank N`"
        )
    u, v, scale = low.u.detach(), low.v.detach(), slot.join.scale
    first = next(iter(module.adapters)) == name
    if isinstance(slot.join, Rescale):
        if not first or module.origin is not module.base or slot.join.mu is None:
            raise ValueError(
                f"{site}: adapter {name!r} is a DoRA on top of other adapters, "
                "which PEFT has not; merge those first"
            )
        return Factor(u, v, scale, slot.join.mu.detach())
    if first and module.origin is not module.base:
        taken = wide(module.origin.weight.detach()) - wide(module.base.weight.detach())
        a, s, bh = svd(taken)
        root = (s[: low.rank] / scale).sqrt()
        u = torch.cat([u, (-a[:, : low.rank] * root).to(u)], dim=1)
        v = torch.cat([v, (root[:, None] * bh[: low.rank]).to(v)])
    return Factor(u, v, scale)


def low_rank(op: LinOp) -> LowRank | None:
    """The op as one pair of factors, if it is that up to a number."""
    if isinstance(op, Scaled):
        inner = low_rank(op.op)
        return None if inner is None else LowRank(op.scale * inner.u.detach(), inner.v.detach())
    return op if isinstance(op, LowRank) else None


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, without the insides of adapted layers; tied ones under each of their names."""
    found = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." for name, m in found.items() if isinstance(m, Adapted | OpLinear))
    return {name: m for name, m in found.items() if name and not name.startswith(inside)}


def _whole(model: nn.Module, modules: Sequence[str]) -> dict[str, Tensor]:
    have = layers_of(model)
    if lost := [name for name in modules if name not in have]:
        raise ValueError(f"the model has no module {some(lost)} to save whole; give full names, such as 'lm_head'")
    return {f"{n}.{key}": t.clone() for n in modules for key, t in have[n].state_dict().items()}


def _by_module(whole: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in whole.items():
        module, _, leaf = key.rpartition(".")
        found.setdefault(module, {})[leaf] = tensor
    return found


def _replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    made = copy.deepcopy(module)
    for key, own in made.state_dict(keep_vars=True).items():
        own.data = tensors[key].to(own)
    return made


def _weight(module: nn.Module) -> Tensor:
    """The matrix (out, in) of a layer; empty for what is none."""
    if isinstance(module, Adapted | OpLinear):
        return module.weight
    return matrix(module) if kind_of(module) is not None else torch.empty(0)


def _is_head(model: Any, module: nn.Module) -> bool:
    find = getattr(model, "get_output_embeddings", None)
    return find is not None and find() is module


def _shown(targets: tuple[str, ...] | str | None) -> str:
    return repr(targets) if isinstance(targets, str) else f"[{some(targets or ())}]"
