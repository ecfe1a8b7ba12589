"""An adapter folder of PEFT, written."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from subspan import io, shards
from subspan.adapt import Adapted, Add, Rescale, Routed, Slot
from subspan.adapt.layers import Patches, Table, Use, use_of
from subspan.adapt.layers import matrix as matrix_of
from subspan.hosts.peft_beyond import unlike_on
from subspan.hosts.peft_config import CONFIG, FIELD, PeftConfig
from subspan.hosts.peft_keys import GROUPED, TABLE_DORA, TENSORS, Form, Triple, formed, peft_tensors, some
from subspan.hosts.peft_parts import Written
from subspan.hosts.peft_types import TYPES, Layout, layout_of
from subspan.linalg import svd, wide
from subspan.ops import LinOp, LowRank, OpLinear, Scaled, Sum
from subspan.ops.experts import Slice

# What stands between a module and the name of the one that it wraps.
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


@dataclass(frozen=True)
class Factor:
    """scale * u @ v at one site, and DoRA's magnitude mu (m,)."""

    u: Tensor
    v: Tensor
    scale: float
    mu: Tensor | None = None


@dataclass(frozen=True)
class Tokens:
    """Rows of single tokens that trained too: what the config says of them, and the tensors without the prefix."""

    indices: list[int] | dict[str, list[int]] | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, Any]:
        """The config's field, none where no rows train."""
        return {} if self.indices is None else {FIELD: self.indices}

    def cast(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The tensors, in that precision if any."""
        return {key: _to(t, dtype) for key, t in self.tensors.items()}


def write_peft(
    folder: Path,
    factors: Mapping[str, Factor],
    *,
    names: Collection[str] | None,
    whole: Mapping[str, Tensor] | None = None,
    base: str | None = None,
    rslora: bool = False,
    dtype: torch.dtype | None = None,
    kind: type | None = None,
    turned: bool = False,
    forms: Mapping[str, Form] = {},
    tokens: Tokens | None = None,
) -> None:
    """Write the two files of a PEFT adapter; `names` are all modules of the model it is for, if known.

    Ranks and alphas other than the commonest go into the patterns. `kind` is the model's class, and `turned` says
    that its weights are (in, out), as `Conv1D` has them; `forms` are those of sites that are no linear layers.
    `tokens` are rows of single tokens that trained too. Raises ValueError when some sites have a magnitude and
    others have none.
    """
    if len({factor.mu is None for factor in factors.values()}) > 1:
        raise ValueError("some sites are DoRA and some are LoRA; one PEFT adapter is all the one or all the other")
    folder.mkdir(exist_ok=True)
    ranks = {site: f.u.shape[1] for site, f in factors.items()}
    alphas = {site: tidy(f.scale * ranks[site] ** (0.5 if rslora else 1.0)) for site, f in factors.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    kept = {key: t if dtype is None else t.to(dtype) for key, t in (whole or {}).items()}
    modules = sorted({key.rpartition(".")[0] for key in kept})
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": _task(kind), "auto_mapping": _auto(kind),
        "base_model_name_or_path": base, "revision": None, "inference_mode": True, "r": rank, "lora_alpha": alpha,
        "rank_pattern": _named(ranks, rank, factors), "alpha_pattern": _named(alphas, alpha, factors),
        "target_modules": list(factors) if names is None else targets(factors, names),
        "modules_to_save": modules or None, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": turned, "use_rslora": rslora, "init_lora_weights": True,
        "use_dora": any(f.mu is not None for f in factors.values()), **({} if tokens is None else tokens.fields),
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    sites = {s: formed(_triple(factor, dtype).parts(), forms.get(s)) for s, factor in factors.items()}
    io.write_tensors(folder / TENSORS, peft_tensors(sites, kept | ({} if tokens is None else tokens.cast(dtype))))


def write_parts(
    folder: Path,
    layout: Layout,
    kind: str,
    written: Written,
    *,
    names: Collection[str] | None,
    whole: Mapping[str, Tensor],
    base: str | None,
    dtype: torch.dtype | None,
    model: type | None,
    tokens: Tokens,
) -> None:
    """Write the two files of an adapter of a type other than LORA; arguments as of `write_peft`."""
    folder.mkdir(exist_ok=True)
    kept, shared = ({k: _to(t, dtype) for k, t in some.items()} for some in (whole, written.shared))
    modules = sorted({key.rpartition(".")[0] for key in kept})
    ranks = written.ranks
    alphas = {site: tidy(scale * ranks[site]) for site, scale in written.scales.items()}
    config: dict[str, Any] = {
        "peft_type": kind, "task_type": _task(model), "auto_mapping": _auto(model),
        "base_model_name_or_path": base, "revision": None, "inference_mode": True,
        "target_modules": list(ranks) if names is None else targets(ranks, names),
        "modules_to_save": modules or None, **tokens.fields,
    }  # fmt: skip
    for key, pattern, values in ((layout.rank, "rank_pattern", ranks), (layout.alpha, "alpha_pattern", alphas)):
        if key:
            usual = Counter(values.values()).most_common(1)[0][0]
            config |= {key: usual} | ({pattern: _named(values, usual, ranks)} if layout.patterns else {})
    (folder / CONFIG).write_text(json.dumps(config | dict(written.fields), indent=1) + "\n", encoding="utf-8")
    parts = {site: {k: _to(t, dtype) for k, t in own.items()} for site, own in written.parts.items()}
    io.write_tensors(folder / TENSORS, peft_tensors(parts, kept | tokens.cast(dtype), shared))


def _to(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return t.contiguous() if dtype is None or not t.is_floating_point() else t.to(dtype).contiguous()


def targets(sites: Iterable[str], names: Collection[str]) -> list[str] | str:
    """The shortest `target_modules` that selects these sites of a model and no other module.

    Last parts if they do, else whole names, else a regular expression.

    >>> targets(["0.q", "1.q"], ["0", "0.q", "0.k", "1.q"]), targets(["0.q"], ["0.q", "1.q"])
    (['q'], ['0.q'])
    """
    wanted = set(sites)
    for choice in (sorted({site.rpartition(".")[2] for site in wanted}), sorted(wanted)):
        if PeftConfig(rank=1, alpha=1.0, targets=tuple(choice)).targeted(names, ()) == wanted:
            return choice
    return "|".join(re.escape(site) for site in sorted(wanted))


def tidy(number: float) -> float:
    """A whole number as one, also when it is off by rounding.

    >>> tidy(16.000000000000004), tidy(0.3)
    (16, 0.3)
    """
    return round(number) if round(number) and abs(number - round(number)) < 1e-9 * abs(number) else number


def _triple(factor: Factor, dtype: torch.dtype | None) -> Triple:
    parts = (factor.u, factor.v, factor.mu)
    return Triple(*(t if dtype is None or t is None else t.to(dtype) for t in parts))  # type: ignore[arg-type]


def _named(values: Mapping[str, float], usual: float, sites: Collection[str]) -> dict[str, float]:
    """The unusual values by name; by an anchored expression where a name would match other sites too."""
    other = {site: value for site, value in values.items() if value != usual}
    loose = any(re.match(rf"(.*\.)?({key})$", site) for key in other for site in sites if site != key)
    return {f"^{re.escape(site)}": value for site, value in other.items()} if loose else other


def _task(kind: type | None) -> str | None:
    return "CAUSAL_LM" if kind is not None and kind.__name__.endswith("ForCausalLM") else None


def _auto(kind: type | None) -> dict[str, str] | None:
    if kind is None or _task(kind):
        return None
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def type_of(
    found: Mapping[str, Adapted], name: str = "default", *, layers: Literal["linear", "all"] = "linear"
) -> str:
    """PEFT's type of an adapter, LORA where no other fits.

    Raises ValueError for sites of two types, and, unless all `layers` will do, for one that is no linear layer.
    """
    if odd := [site for site, module in found.items() if use_of(module.base) is not None and layers == "linear"]:
        raise ValueError(
            f"{odd[0]}: adapters of convolutions and embeddings are not written in this form; merge them first"
        )
    if inside := [site for site, module in found.items() if isinstance(module.origin, Slice)]:
        raise ValueError(f"{inside[0]}: PEFT names no single expert of a 3-D parameter; merge these first")
    kinds = {site: layout_of(m.slot(name).op, m.slot(name).join) or "LORA" for site, m in found.items()}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{site} is {kind}" for site, kind in list(kinds.items())[:4])
        raise ValueError(f"a folder of PEFT has one type for all layers, but {told}; give them other names")
    return next(iter(kinds.values()))


@torch.no_grad()
def written_as(kind: str, found: Mapping[str, Adapted], name: str = "default") -> Written:
    """An adapter as the tensors and fields of one of PEFT's types; raises ValueError for what that cannot hold."""
    layout = TYPES[kind]
    for site, module in found.items():
        if why := unlike_on(kind, module.base):
            raise ValueError(f"{site} {why}; merge it first")
        if next(iter(module.adapters)) == name and module.origin is not module.base:
            raise ValueError(
                f"{site}: adapter {name!r} changed the base when it started, "
                f"which PEFT's {layout.label} cannot say; "
                "approximate it with `subspan adapter convert --to lora --rank N`"
            )
        if layout.turns and next(iter(module.adapters)) != name:
            raise ValueError(
                f"{site}: adapter {name!r} is {layout.label} on top of other adapters, which PEFT has not; "
                "merge those first"
            )
    if layout.write is None:
        raise ValueError(f"{kind} is written from its factors; see factor_of")
    return layout.write({site: gathered(module.slot(name)) for site, module in found.items()})


@torch.no_grad()
def factor_of(site: str, module: Adapted, name: str = "default") -> Factor:
    """An adapter of one site as scale * u @ v (and mu) relative to the original base; raises as `save_peft`."""
    slot = gathered(module.slot(name))
    low = low_rank(slot.op)
    if low is None or not isinstance(slot.join, Add | Rescale):
        remedy = (
            "its weight depends on the input, so keep it as an adapter of ours" if isinstance(slot.join, Routed)
            else "approximate it with `subspan adapter convert --to lora --rank N`"
        )  # fmt: skip
        what = f"{type(slot.op).__name__} joined by {type(slot.join).__name__}"
        raise ValueError(f"{site}: {what} is no LoRA; {remedy}")
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
        taken = _wide_matrix(module.origin) - _wide_matrix(module.base)
        a, s, bh = svd(taken)
        root = (s[: low.rank] / scale).sqrt()
        u = torch.cat([u, (-a[:, : low.rank] * root).to(u)], dim=1)
        v = torch.cat([v, (root[:, None] * bh[: low.rank]).to(v)])
    return Factor(u, v, scale)


def _wide_matrix(layer: nn.Module) -> Tensor:
    return wide(shards.whole(matrix_of(layer).detach()))


def low_rank(op: LinOp) -> LowRank | None:
    """The op as one pair of factors, if it is that up to a number."""
    if isinstance(op, Scaled):
        inner = low_rank(op.op)
        return None if inner is None else LowRank(op.scale * inner.u.detach(), inner.v.detach())
    if isinstance(op, Sum):
        parts = [part for part in map(low_rank, op.ops) if part is not None]
        if len(parts) == len(op.ops):
            return LowRank(torch.cat([p.u.detach() for p in parts], 1), torch.cat([p.v.detach() for p in parts]))
    return op if isinstance(op, LowRank) else None


def form_of(use: Use | None) -> Form:
    """How PEFT keeps the factors of a layer: (channels, *kernel) of a convolution, () of a table, else None.

    >>> form_of(use_of(torch.nn.Conv2d(3, 4, 2)))
    (3, 2, 2)
    """
    if isinstance(use, Patches):
        return (use.window.channels // use.window.groups, *use.window.kernel)
    return None if use is None else ()


def unlike(use: Use | None, *, dora: bool) -> str:
    """Why PEFT's LoRA on a layer is no change of its weight as ours is; empty where it is.

    >>> unlike(use_of(torch.nn.Conv2d(4, 4, 1, groups=2)), dora=False).partition(",")[0]
    'is a convolution in 2 groups'
    """
    if isinstance(use, Table):
        return TABLE_DORA if dora else ""
    if use is None:
        return ""
    window = use.window
    if window.groups > 1:
        return GROUPED.format(window.groups)
    reach = [(kernel, step) for kernel, step in zip(window.kernel, window.dilation, strict=True) if kernel > 1]
    if any(step > 1 for _, step in reach):
        return (
            f"is a convolution of dilation {window.dilation}, and PEFT's lora_A looks at neighbours without gaps: "
            "it computes other outputs than it merges"
        )
    if window.mode != "zeros" and any(window.sides):
        return (
            f"is a convolution with padding_mode {window.mode!r}, and PEFT's lora_A pads with zeros: "
            "that is no change of the weight"
        )
    return ""


def unwrapped(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by the names they have without DDP, `torch.compile` and checkpointing around them.

    >>> list(unwrapped(nn.Sequential(nn.ReLU())))
    ['', '0']
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    named = inner.named_modules(remove_duplicate=False)
    return {".".join(part for part in name.split(".") if part not in WRAPPERS): module for name, module in named}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, without the insides of adapted layers; tied ones under each of their names."""
    found = unwrapped(model)
    inside = tuple(f"{name}." for name, m in found.items() if isinstance(m, Adapted | OpLinear))
    return {name: m for name, m in found.items() if name and not name.startswith(inside)}


def check_modules(have: Mapping[str, nn.Module], modules: Sequence[str]) -> None:
    """Raise ValueError for modules to save that are not there, and where PEFT would take others for them too."""
    if lost := [name for name in modules if name not in have]:
        raise ValueError(f"the model has no module {some(lost)} to save whole; give full names, such as 'lm_head'")
    for other, name in ((other, name) for name in modules for other in have if other.endswith(name)):
        if other not in modules:
            raise ValueError(
                f"PEFT finds {name} by the end of its name, and would save {other} whole too; name both or none"
            )


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class of a model, or what it was before `fully_shard` made one of its own.

    >>> class_of(nn.ReLU()).__name__
    'ReLU'
    """
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed"))


def resharded(model: nn.Module) -> bool:
    """Whether parameters are cut over processes (FSDP2), once it gave back what a forward pass had gathered."""
    loaded: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if loaded is not None else ():
        if isinstance(module, loaded.FSDPModule):
            module.reshard()
    return any(shards.is_cut(p) for p in model.parameters())


def gathered(slot: Slot) -> Slot:
    """The op and join of an adapter, or a double with whole tensors where theirs are cut over processes."""
    parts = {
        id(p): nn.Parameter(shards.whole(p.detach()), p.requires_grad)
        for p in slot.parameters()
        if shards.is_cut(p)
    }
    return copy.deepcopy(slot, memo=dict(parts)) if parts else slot


def write_once(write: Callable[[], None], *, together: bool) -> None:
    """Call `write`; with all processes here `together`, only on the first, while the others wait.

    What stops the first process stops all of them; the others raise RuntimeError.
    """
    if not together:
        write()
        return
    problem: Exception | None = None
    if dist.get_rank() == 0:
        try:
            write()
        except Exception as found:
            problem = found
    said = [None if problem is None else f"{type(problem).__name__}: {problem}"]
    dist.broadcast_object_list(said, src=0)
    if problem is not None:
        raise problem
    if said[0] is not None:
        raise RuntimeError(f"process 0 could not write: {said[0]}")
