"""An adapter folder of PEFT, written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspan import io
from subspan.hosts.peft_config import CONFIG, PeftConfig
from subspan.hosts.peft_keys import TENSORS, Triple, peft_tensors
from subspan.hosts.peft_parts import Written
from subspan.hosts.peft_types import Layout


@dataclass(frozen=True)
class Factor:
    """scale * u @ v at one site, and DoRA's magnitude mu (m,)."""

    u: Tensor
    v: Tensor
    scale: float
    mu: Tensor | None = None


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
) -> None:
    """Write the two files of a PEFT adapter; `names` are all modules of the model it is for, if known.

    Ranks and alphas other than the commonest go into the patterns. `kind` is the model's class, and `turned` says
    that its weights are (in, out), as `Conv1D` has them. Raises ValueError when some sites have a magnitude and
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
        "use_dora": any(f.mu is not None for f in factors.values()),
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    sites = {site: _triple(factor, dtype).parts() for site, factor in factors.items()}
    io.write_tensors(folder / TENSORS, peft_tensors(sites, kept))


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
        "modules_to_save": modules or None,
    }  # fmt: skip
    for key, pattern, values in ((layout.rank, "rank_pattern", ranks), (layout.alpha, "alpha_pattern", alphas)):
        if key:
            usual = Counter(values.values()).most_common(1)[0][0]
            config |= {key: usual} | ({pattern: _named(values, usual, ranks)} if layout.patterns else {})
    (folder / CONFIG).write_text(json.dumps(config | dict(written.fields), indent=1) + "\n", encoding="utf-8")
    parts = {site: {k: _to(t, dtype) for k, t in own.items()} for site, own in written.parts.items()}
    io.write_tensors(folder / TENSORS, peft_tensors(parts, kept, shared))


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
