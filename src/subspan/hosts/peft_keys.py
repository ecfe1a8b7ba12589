"""The tensor names of PEFT's files, and what to say when they are not those of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from subspan.hosts.peft_config import PeftConfig

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX, ALL = "base_model.model.", "base_model."
V, U, MU, BASE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", ".base_layer.weight"
TABLE_U, TABLE_V = "lora_embedding_A", "lora_embedding_B"
REFUSED = {
    ".lora_embedding_A": "an adapter on an embedding without its other factor",
    ".lora_embedding_B": "an adapter on an embedding without its other factor",
    ".lora_B.bias": "a bias on lora_B",
    ".lora_E": "AdaLoRA's middle factor",
    ".hada_t1": "a convolution's LoHa",
    ".lokr_t2": "a convolution's LoKr",
    ".oft_embedding_R.weight": "an adapter on an embedding",
}

GROUPED = (
    "is a convolution in {} groups, where PEFT's lora_A reads all channels for each group: "
    "that is no change of the weight, and PEFT cannot merge it"
)
TABLE_DORA = "is an embedding, of which PEFT's DoRA keeps one length a feature, ours one a token"


Parts = Mapping[str, Tensor]
# (channels, *kernel) of a convolution, () of an embedding, None of a linear layer.
Form = tuple[int, ...] | None


# Parts that are vectors; all others are matrices.
FLAT = frozenset({MU, "vera_lambda_b", "vera_lambda_d", "shira_weight"})


class Triple(NamedTuple):
    """What PEFT keeps of one site of a LoRA: u = lora_B (m, rank), v = lora_A (rank, n), and DoRA's mu (m,)."""

    u: Tensor
    v: Tensor
    mu: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """The tensors by their names."""
        return {V: self.v, U: self.u} | ({} if self.mu is None else {MU: self.mu})


class Sorted(NamedTuple):
    """The tensors of a file: of each site, of all sites, whole parameters, and copies of base weights by site.

    Those of a LoRA are matrices; `forms` says which sites PEFT keeps otherwise, and how.
    """

    sites: dict[str, dict[str, Tensor]]
    shared: dict[str, Tensor]
    whole: dict[str, Tensor]
    bases: dict[str, Tensor]
    forms: dict[str, tuple[int, ...]]


def peft_tensors(
    sites: Mapping[str, Parts], whole: Mapping[str, Tensor], shared: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors under PEFT's names.

    >>> import torch
    >>> sites = {"q": Triple(torch.ones(2, 1), torch.ones(1, 3)).parts()}
    >>> list(peft_tensors(sites, {"head.weight": torch.ones(1)}))
    ['base_model.model.q.lora_A.weight', 'base_model.model.q.lora_B.weight', 'base_model.model.head.weight']
    """
    named = {f"{PREFIX}{site}.{name}": tensor for site, parts in sites.items() for name, tensor in parts.items()}
    named |= {f"{ALL}{name}": tensor for name, tensor in (shared or {}).items()}
    return named | {f"{PREFIX}{name}": tensor for name, tensor in whole.items()}


def sort_tensors(
    tensors: Mapping[str, Tensor], config: PeftConfig, *, prefix: str = PREFIX, root: str = ""
) -> Sorted:
    """Sort a file's tensors by site; a name in the file is `prefix` + site, once `root` is put before the site.

    Raises ValueError for names that an adapter of this config has not, for names it lacks, and for ranks other
    than the config's.
    """
    shared, tensors = _shared(tensors, config)
    if strange := [key for key in tensors if not key.startswith(prefix)]:
        raise ValueError(
            f"{len(strange)} of {len(tensors)} tensor names do not begin with {prefix!r} ({some(strange)}); "
            f"give their beginning as prefix, such as prefix={_beginning(strange)!r}"
        )
    local = {root + key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    local, forms = flattened(local) if config.kind == "LORA" else (local, {})
    parts: dict[str, dict[str, Tensor]] = {}
    ends = tuple(f".{name}" for name in config.layout.names)
    for key, tensor in local.items():
        if end := next((end for end in ends if key.endswith(end)), ""):
            parts.setdefault(key.removesuffix(end), {})[end[1:]] = tensor
    bases = {key.removesuffix(BASE): t for key, t in local.items() if key.endswith(BASE)}
    rest = {key: t for key, t in local.items() if not key.endswith((*ends, BASE))}
    for end, what in REFUSED.items():
        if names := [key for key in rest if key.endswith(end)]:
            raise ValueError(f"{what} is not read ({some(names)}); merge it with peft's merge_and_unload")
    whole = {key: t for key, t in rest.items() if key.rpartition(".")[0].endswith(tuple(config.whole) or ("\0",))}
    wanted = {f"{site}.{name}" for site, own in parts.items() for name in config.layout.must(own.keys(), config)}
    have = {f"{site}.{name}" for site, own in parts.items() for name in own} | (rest.keys() - whole.keys())
    wanted |= set(config.layout.shared)
    have |= shared.keys()
    if wanted != have or not parts:
        raise ValueError(_difference(sorted(have - wanted), sorted(wanted - have), config.layout.label))
    sites = {site: parts[site] for site in sorted(parts, key=_by_number)}
    _check_shapes(sites, config)
    return Sorted(sites, shared, whole, bases, forms)


def flattened(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """The tensors of a LoRA with all factors as matrices u (m, rank) and v (rank, n), and the forms of sites.

    A convolution has lora_A (rank, channels, *kernel) and lora_B (m, rank, 1, ...), an embedding both factors
    transposed. What is no whole pair of those stays as it is. Raises ValueError for a convolution in groups
    and for a DoRA of an embedding.
    """
    flat, forms = dict(tensors), dict[str, tuple[int, ...]]()
    for key in tensors:
        if key.endswith(f".{TABLE_U}"):
            site = key.removesuffix(f".{TABLE_U}")
            pair = [tensors.get(f"{site}.{name}") for name in (TABLE_U, TABLE_V)]
            if (
                all(t is not None and t.dim() == 2 for t in pair)
                and not {f"{site}.{U}", f"{site}.{V}"} & flat.keys()
            ):
                for name, old in ((U, TABLE_U), (V, TABLE_V)):
                    flat[f"{site}.{name}"] = flat.pop(f"{site}.{old}").mT.contiguous()
                if f"{site}.{MU}" in tensors:
                    raise ValueError(f"{site} {TABLE_DORA}; it is not read")
                forms[site] = ()
        elif key.endswith(f".{V}"):
            site = key.removesuffix(f".{V}")
            u, v = tensors.get(f"{site}.{U}"), tensors[key]
            if u is not None and u.dim() == v.dim() > 2 and u.shape[2:].numel() == 1:
                if u.shape[1] < len(v) and len(v) % u.shape[1] == 0:
                    raise ValueError(f"{site} {GROUPED.format(len(v) // u.shape[1])}; it is not read")
                flat |= {f"{site}.{U}": u.flatten(1), key: v.flatten(1)}
                forms[site] = tuple(v.shape[1:])
                if (mu := tensors.get(f"{site}.{MU}")) is not None and mu.shape == (1, len(u), *u.shape[2:]):
                    flat[f"{site}.{MU}"] = mu.flatten()
    return flat, forms


def formed(parts: Parts, form: Form) -> Parts:
    """The matrices of a LoRA's site as PEFT keeps them for a layer of that form: what `flattened` undoes.

    >>> import torch
    >>> own = formed({U: torch.ones(4, 2), V: torch.ones(2, 12)}, (3, 2, 2))
    >>> [tuple(t.shape) for t in own.values()]
    [(2, 3, 2, 2), (4, 2, 1, 1)]
    """
    if form is None:
        return parts
    if not form:
        return {TABLE_U: parts[U].mT, TABLE_V: parts[V].mT}
    ones = (1,) * (len(form) - 1)
    kept = {V: torch.unflatten(parts[V], 1, form), U: torch.unflatten(parts[U], 1, (-1, *ones))}
    return kept | ({MU: parts[MU].reshape(1, -1, *ones)} if MU in parts else {})


def _shared(tensors: Mapping[str, Tensor], config: PeftConfig) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """The tensors of all sites, and the others; copies of the former under the names of layers are dropped."""
    found = {name: [key for key in tensors if key.split(".")[-1] == name] for name in config.layout.shared}
    shared = {name: tensors[min(keys, key=len)] for name, keys in found.items() if keys}
    for name, keys in found.items():
        if other := [key for key in keys if not torch.equal(tensors[key], shared[name])]:
            raise ValueError(f"{name} is shared by all layers, but {some(other)} differ; save the folder again")
    dropped = {key for keys in found.values() for key in keys}
    return shared, {key: t for key, t in tensors.items() if key not in dropped}


def _check_shapes(sites: Mapping[str, Parts], config: PeftConfig) -> None:
    """Raise ValueError where the tensors of a site contradict the config or one another."""
    layout = config.layout
    for site, parts in sites.items():
        shapes = ", ".join(str(tuple(parts[name].shape)) for name in sorted(parts, key=_shown_first))
        names = ", ".join(name.removesuffix(".weight") for name in sorted(parts, key=_shown_first))
        if kernels := [name for name, t in parts.items() if t.dim() > 2 and config.kind != "LORA"]:
            raise ValueError(
                f"{site}: {kernels[0]} is {tuple(parts[kernels[0]].shape)}, a convolution's {layout.label}, which "
                "is not read; merge it with peft's merge_and_unload"
            )
        facts = {"rank": config.rank_of(site)} | {k: v for k, v in config.options.items() if isinstance(v, int)}
        told = ", ".join(f"{key} {value}" for key, value in facts.items())
        wrong = (
            f"{site}: {names} are {shapes}, but the config says {told}; "
            "config and tensors do not belong together: copy or save the folder again"
        )
        if any(t.dim() != (1 if name in FLAT else 2) for name, t in parts.items()):
            raise ValueError(wrong)
        m, n = layout.sizes(parts)
        if m is None or n is None:
            continue
        wanted = layout.shapes(config, site, m, n)
        if any(tuple(t.shape) != wanted.get(name) for name, t in parts.items()):
            raise ValueError(wrong)


def _shown_first(name: str) -> tuple[bool, str]:
    return name != U, name


def _difference(extra: list[str], missing: list[str], label: str) -> str:
    if not extra and not missing:
        return f"the file holds no {label} tensor at all; copy or save the folder again"
    report = [
        f"{len(names)} {what} ({some(names)})"
        for what, names in (("unknown", extra), ("missing", missing))
        if names
    ]
    return f"the tensor names are not those of its config: {', '.join(report)}; copy or save the folder again"


def hint(sites: Iterable[str], names: Collection[str]) -> str:
    """What to give as prefix or root so that unknown sites become modules of a model; empty when nothing fits.

    >>> hint(["model.layers.0.q"], ["layers.0.q"])
    "; its names would fit with prefix='base_model.model.model.'"
    >>> hint(["layers.0.q"], ["model.layers.0.q"])
    "; its names would fit with root='model.'"
    """
    found: Counter[str] = Counter()
    for site in sites:
        longer = [name.removesuffix(site) for name in names if name.endswith(f".{site}")]
        shorter = [site.removesuffix(name) for name in names if name and site.endswith(f".{name}")]
        if longer:
            found[f"root={min(longer, key=len)!r}"] += 1
        elif shorter:
            found[f"prefix={PREFIX + min(shorter, key=len)!r}"] += 1
    return f"; its names would fit with {found.most_common(1)[0][0]}" if found else ""


def some(names: Iterable[object]) -> str:
    """A few of the names.

    >>> some("abcdef")
    'a, b, c, d and 2 more'
    """
    shown = [str(name) for name in names]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _beginning(keys: list[str]) -> str:
    before, found, _ = keys[0].partition(PREFIX)
    return before + found if found else ""


def _by_number(site: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in site.split(".")]
