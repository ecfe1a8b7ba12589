"""Adapters as PEFT keeps them, of the types in `peft_types`: `adapter_config.json`, `adapter_model.safetensors`.

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

from subspan import io, shards
from subspan.adapt import Adapted, Adapter, Add, FromWeight, SubtractInit, adapt
from subspan.adapt.layers import Use, use_of
from subspan.adapt.layers import matrix as matrix_of
from subspan.adapt.tokens import carries_rows
from subspan.edit import Edit, Make, edit
from subspan.hosts.peft_beyond import unlike_on
from subspan.hosts.peft_config import AUTOMATIC, PeftConfig, read_config
from subspan.hosts.peft_given import Given
from subspan.hosts.peft_keys import (
    MU,
    PICKLE,
    PREFIX,
    TENSORS,
    Form,
    Parts,
    Triple,
    U,
    V,
    hint,
    some,
    sort_tensors,
)
from subspan.hosts.peft_tokens import TokenRows, split_tokens, written_tokens
from subspan.hosts.peft_types import TYPES
from subspan.hosts.peft_write import check_modules as check_modules
from subspan.hosts.peft_write import (
    class_of,
    form_of,
    resharded,
    unlike,
    unwrapped,
    write_once,
    write_parts,
    write_peft,
)
from subspan.hosts.peft_write import factor_of as factor_of
from subspan.hosts.peft_write import layers_of as layers_of
from subspan.hosts.peft_write import low_rank as low_rank
from subspan.hosts.peft_write import type_of as type_of
from subspan.hosts.peft_write import written_as as written_as
from subspan.linalg import wide
from subspan.ops import LowRank, OpLayer, OpLinear
from subspan.site import conv1d, kind_of

INDEX = ".shira_indices"


@dataclass(frozen=True)
class PeftFolder:
    """An adapter folder of PEFT, read and found consistent.

    `parts` are the tensors of each site by PEFT's names, `shared` those of all sites. A LoRA's are matrices, also
    where PEFT keeps them otherwise: at the sites of `forms`.
    """

    path: Path
    config: PeftConfig
    parts: Mapping[str, Parts]
    shared: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    bases: Mapping[str, Tensor]
    forms: Mapping[str, tuple[int, ...]]
    tokens: TokenRows

    @property
    def sites(self) -> dict[str, Triple]:
        """The factors of a LoRA by site; raises ValueError for another type."""
        if self.config.kind != "LORA":
            raise ValueError(f"{self.path} is {self.config.layout.label}, which has no two factors")
        return {site: Triple(own[U], own[V], own.get(MU)) for site, own in self.parts.items()}

    @property
    def shapes(self) -> dict[str, tuple[int | None, int | None]]:
        """Site -> (m, n), None for what the tensors alone do not tell."""
        return {site: self.config.layout.sizes(own) for site, own in self.parts.items()}

    def make(self, name: str) -> Make:
        """The function that puts this adapter on a layer: (site, module) -> module, for `edit`."""

        # Layers of one precision and device hold the shared matrices once.
        cast: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}

        def put(site: str, module: nn.Module) -> nn.Module:
            like = wide(next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))[:0])
            own = _moved(self.parts[site], like)
            if (like.dtype, like.device) not in cast:
                cast[like.dtype, like.device] = _moved(self.shared, like)
            shared = cast[like.dtype, like.device]
            weight = _weight(module)
            m, n = weight.shape if weight.dim() == 2 else (0, 0)
            op, join = self.config.layout.read(Given(site, own, shared, self.config, m, n))
            # On an embedding PEFT starts an ordinary LoRA under this name.
            if self.config.pissa and isinstance(op, LowRank) and self.forms.get(site) != ():
                return _restart(site, module, name, op, self.config.scale_of(site))
            return adapt(Adapter(lambda *_: op, join), name)(site, module)

        return put


def _moved(tensors: Parts, like: Tensor) -> dict[str, Tensor]:
    return {key: t.to(like) if t.is_floating_point() else t.to(like.device) for key, t in tensors.items()}


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
        tokens, rest = split_tokens(tensors, config)
        found = sort_tensors(rest, config, prefix=prefix, root=root)
    except ValueError as problem:
        raise ValueError(f"{folder / TENSORS}: {problem}") from None
    for key, tensor in tensors.items():
        whole = key.endswith(INDEX)  # saved as floats on Windows
        if not (tensor.is_floating_point() or whole) or not tensor.isfinite().all():
            raise ValueError(f"{folder / TENSORS}: {key} holds NaN, Inf or no floats; save the adapter again")
    return PeftFolder(folder, config, *found, tokens.at(folder, prefix=prefix, root=root))


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

    A vocabulary that has to grow for rows of single tokens stays grown, by rows of zeros. Raises ValueError when
    the model lacks a layer, has one of another shape, or has a layer that the config targets and the file does not
    hold, and when the name is taken; TypeError for a layer that cannot be adapted.
    """
    check_fits(model, saved)
    make, whole = saved.make(name), _by_module(saved.whole)

    def put(site: str, module: nn.Module) -> nn.Module:
        return make(site, module) if site in saved.parts else _replaced(module, whole[site])

    done = edit(model, [*saved.parts, *whole], put)
    try:
        rows = saved.tokens.makers(model, name)
        done.swaps |= edit(model, list(rows), lambda site, module: rows[site](site, module)).swaps
    except BaseException:
        done.undo()
        raise
    return done


def check_fits(model: nn.Module, saved: PeftFolder) -> None:
    """Raise ValueError unless a model has the layers of an adapter, in its shapes, and targets no other."""
    modules = layers_of(model)
    if lost := [site for site in saved.parts if site not in modules]:
        raise ValueError(
            f"{saved.path} adapts {len(lost)} layers that {type(model).__name__} lacks ({some(lost)})"
            f"{hint(lost, modules) or '; it belongs to another model'}"
        )
    have = {site: tuple(_weight(modules[site]).shape) for site in saved.parts}
    for site in saved.parts:
        lora, below = saved.config.kind == "LORA", modules[site]
        below = below.base if isinstance(below, Adapted) else below
        if why := unlike(use_of(below), dora=saved.config.dora) if lora else unlike_on(saved.config.kind, below):
            raise ValueError(f"{saved.path}: {site} {why}; it is not read")
    if other := [f"{s} {wrong}" for s, size in have.items() if (wrong := _misfit(saved, modules[s], s, size))]:
        raise ValueError(
            f"{saved.path} was made for layers of other shapes: {some(other)}; it belongs to another model"
        )
    _check_targets(model, saved, modules)
    for site, base in saved.bases.items():
        if not (own := shards.whole(_weight(modules[site]).detach())).is_meta:
            check_base(saved.path, site, base, own.cpu())
    _check_whole(model, saved, modules)
    if twice := saved.tokens.fits(model).keys() & {*saved.parts, *_by_module(saved.whole)}:
        raise ValueError(f"{saved.path}: {some(twice)} has rows of tokens and more; only one of the two is read")


def _misfit(saved: PeftFolder, module: nn.Module, site: str, have: tuple[int, ...]) -> str:
    """How the tensors of a site contradict a layer of that shape, under their config; empty if they fit."""
    form, wanted_form = saved.forms.get(site), form_of(_use(module))
    if saved.config.kind == "LORA" and form != wanted_form:
        return f"{_named_form(form)} there, {_named_form(wanted_form)} here"
    told = saved.shapes[site]
    if len(have) != 2 or any(size is not None and size != own for size, own in zip(told, have, strict=True)):
        there = ", ".join("any" if size is None else str(size) for size in told)
        return f"({there}) there, {have} here"
    m, n = have
    wanted = saved.config.layout.shapes(saved.config, site, m, n)
    own = {name: tuple(t.shape) for name, t in saved.parts[site].items()}
    wrong = [f"{name} {size} there, {wanted.get(name, 'none')} here" for name, size in own.items()
             if wanted.get(name) != size]  # fmt: skip
    if not wrong and saved.shared and not _reached(saved, m, n):
        wrong = [f"{name} {tuple(t.shape)} there, too small for {have} here" for name, t in saved.shared.items()]
    return ", ".join(wrong)


def _reached(saved: PeftFolder, m: int, n: int) -> bool:
    """Whether the matrices of all sites are large enough for a layer (m, n)."""
    a, b = (saved.shared[name] for name in saved.config.layout.shared)
    if saved.config.kind == "VERA":
        return a.shape[0] == b.shape[-1] == saved.config.rank and len(b) >= m and a.shape[-1] >= n
    bases = -(-min(m, n) // saved.config.rank)
    ranks = a.shape[0] == b.shape[-1] == saved.config.rank
    return ranks and len(b) >= max(m, n) and b.shape[1] >= bases and a.shape[-1] >= min(m, n)


def check_base(path: Path, site: str, saved: Tensor, own: Tensor) -> None:
    """Raise ValueError when the copy of a base weight that PEFT saved is not the model's own."""
    if saved.shape != own.shape or not torch.equal(saved.to(own.dtype), own):
        raise ValueError(
            f"{path} holds a base weight of {site} that is not the model's; give it the base it was trained on"
        )


def _check_targets(model: Any, saved: PeftFolder, modules: Mapping[str, nn.Module]) -> None:
    config = saved.config
    kinds = (nn.Linear, OpLinear, Adapted, *([turned] if (turned := conv1d()) else []))
    linear = [name for name, m in modules.items() if isinstance(m, kinds) and _use(m) is None]
    head = next((n for n, m in modules.items() if _is_head(model, m)), None)
    targeted = config.targeted(modules, linear, head)
    if config.targets is not None and not targeted:
        raise ValueError(
            f"{saved.path}: target_modules {_shown(config.targets)} matches no layer of {type(model).__name__}; "
            f"there are: {some(linear)}"
        )
    alone = saved.parts.keys() - targeted if config.targets is not None else set()
    if absent := sorted(targeted - saved.parts.keys()):
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
    a LoRA of twice the rank, u v - u0 v0, relative to the original. The other types of `peft_types.TYPES` keep
    their tensors. `modules_to_save` names modules that are written whole; `rslora` writes alpha for a scale of
    alpha / sqrt(rank). A LoRA may stand on convolutions and embeddings, where it is PEFT's (`peft_write.unlike`).

    Where parameters are cut over processes (FSDP2), all processes must call this, for all are asked for their
    parts; the first one writes, and all return when the folder is there. Where every process has copies (DDP),
    one of them calls it. Raises ValueError for a model without that adapter, for one that PEFT has no type for or
    no config, and for a DoRA or a rotation on top of another adapter; see `io.staged`.
    """
    together, layers = resharded(model), layers_of(model)
    every = {site: m for site, m in layers.items() if isinstance(m, Adapted) and name in m.adapters}
    found = {site: m for site, m in every.items() if not carries_rows(m, name)}
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter {name!r}; adapt it first")
    kind, model_class = type_of(found, name, layers="all"), class_of(unwrapped(model)[""])
    names, whole = list(layers), _whole(model, modules_to_save)
    if kind == "LORA":
        factors = {site: factor_of(site, module, name) for site, module in found.items()}
        for site, factor in factors.items():
            if why := unlike(_use(found[site]), dora=factor.mu is not None):
                raise ValueError(f"{site} {why}; merge it first")
    else:
        written = written_as(kind, found, name)
    forms = {site: form_of(_use(module)) for site, module in found.items()}
    tokens = written_tokens(model, {site: m for site, m in every.items() if site not in found}, kind, name)

    def write() -> None:
        with io.staged(out, force=force) as folder:
            if kind == "LORA":
                write_peft(folder, factors, names=names, whole=whole, base=base, rslora=rslora, dtype=dtype,
                           kind=model_class, forms=forms, tokens=tokens)  # fmt: skip
            else:
                write_parts(folder, TYPES[kind], kind, written, names=names, whole=whole, base=base, dtype=dtype,
                            model=model_class, tokens=tokens)  # fmt: skip

    write_once(write, together=together)
    return Path(out)


def _whole(model: nn.Module, modules: Sequence[str]) -> dict[str, Tensor]:
    have = layers_of(model)
    check_modules(have, modules)
    return {f"{n}.{key}": shards.whole(t).clone() for n in modules for key, t in have[n].state_dict().items()}


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
    if isinstance(module, Adapted):
        return matrix_of(module.origin)
    return matrix_of(module) if kind_of(module) is not None or isinstance(module, OpLayer) else torch.empty(0)


def _use(module: nn.Module) -> Use | None:
    return use_of(module.base if isinstance(module, Adapted) else module)


def _named_form(form: Form) -> str:
    return "a linear layer" if form is None else f"a convolution of {form}" if form else "an embedding"


def _is_head(model: Any, module: nn.Module) -> bool:
    find = getattr(model, "get_output_embeddings", None)
    return find is not None and find() is module


def _shown(targets: tuple[str, ...] | str | None) -> str:
    return repr(targets) if isinstance(targets, str) else f"[{some(targets or ())}]"
