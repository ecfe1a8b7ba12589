"""The tensor names of a LoRA in PEFT's files, and what to say when they are not those of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from subspan.hosts.peft_config import PeftConfig

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
V, U, MU, BASE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".base_layer.weight"
REFUSED = {
    ".lora_embedding_A": "an adapter on an embedding",
    ".lora_embedding_B": "an adapter on an embedding",
    ".lora_B.bias": "a bias on lora_B",
    ".lora_E": "AdaLoRA's middle factor",
    ".trainable_tokens_delta": "trained token rows",
}


class Triple(NamedTuple):
    """What PEFT keeps of one site: u = lora_B (m, rank), v = lora_A (rank, n), and DoRA's mu (m,)."""

    u: Tensor
    v: Tensor
    mu: Tensor | None = None


class Sorted(NamedTuple):
    """The tensors of a file: those of each site, whole parameters by name, and copies of base weights by site."""

    sites: dict[str, Triple]
    whole: dict[str, Tensor]
    bases: dict[str, Tensor]


def peft_tensors(sites: Mapping[str, Triple], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under PEFT's names.

    >>> import torch
    >>> list(peft_tensors({"q": Triple(torch.ones(2, 1), torch.ones(1, 3))}, {"head.weight": torch.ones(1)}))
    ['base_model.model.q.lora_A.weight', 'base_model.model.q.lora_B.weight', 'base_model.model.head.weight']
    """
    named: dict[str, Tensor] = {}
    for site, triple in sites.items():
        named |= {f"{PREFIX}{site}{V}": triple.v, f"{PREFIX}{site}{U}": triple.u}
        if triple.mu is not None:
            named[f"{PREFIX}{site}{MU}"] = triple.mu
    return named | {f"{PREFIX}{name}": tensor for name, tensor in whole.items()}


def sort_tensors(
    tensors: Mapping[str, Tensor], config: PeftConfig, *, prefix: str = PREFIX, root: str = ""
) -> Sorted:
    """Sort a file's tensors by site; a name in the file is `prefix` + site, once `root` is put before the site.

    Raises ValueError for names that a LoRA of this config has not, for names it lacks, and for ranks other than
    the config's.
    """
    if strange := [key for key in tensors if not key.startswith(prefix)]:
        raise ValueError(
            f"{len(strange)} of {len(tensors)} tensor names do not begin with {prefix!r} ({some(strange)}); "
            f"give their beginning as prefix, such as prefix={_beginning(strange)!r}"
        )
    local = {root + key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    found = {
        end: {key.removesuffix(end): t for key, t in local.items() if key.endswith(end)}
        for end in (U, V, MU, BASE)
    }
    rest = {key: t for key, t in local.items() if not key.endswith((U, V, MU, BASE))}
    for end, what in REFUSED.items():
        if names := [key for key in rest if key.endswith(end)]:
            raise ValueError(f"{what} is not read ({some(names)}); merge it with peft's merge_and_unload")
    whole = {key: t for key, t in rest.items() if key.rpartition(".")[0].endswith(tuple(config.whole) or ("\0",))}
    sites = found[U].keys() | found[V].keys()
    wanted = {f"{site}{end}" for site in sites for end in ((U, V, MU) if config.dora else (U, V))}
    have = {f"{site}{end}" for end in (U, V, MU) for site in found[end]} | (rest.keys() - whole.keys())
    if wanted != have or not sites:
        raise ValueError(_difference(sorted(have - wanted), sorted(wanted - have)))
    triples = {
        site: Triple(found[U][site], found[V][site], found[MU].get(site)) for site in sorted(sites, key=_by_number)
    }
    _check_ranks(triples, config)
    return Sorted(triples, whole, found[BASE])


def _check_ranks(triples: Mapping[str, Triple], config: PeftConfig) -> None:
    for site, (u, v, mu) in triples.items():
        rank = config.rank_of(site)
        good = u.dim() == v.dim() == 2 and u.shape[1] == v.shape[0] == rank
        if not good or (mu is not None and mu.shape != u.shape[:1]):
            shapes = ", ".join(str(tuple(t.shape)) for t in (u, v, mu) if t is not None)
            raise ValueError(
                f"{site}: lora_B, lora_A{'' if mu is None else ' and the magnitude'} are {shapes}, but the config "
                f"says rank {rank}; config and tensors do not belong together: copy or save the folder again"
            )


def _difference(extra: list[str], missing: list[str]) -> str:
    if not extra and not missing:
        return "the file holds no LoRA tensor at all; copy or save the folder again"
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
