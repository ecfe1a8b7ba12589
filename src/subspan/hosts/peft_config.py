"""What an `adapter_config.json` of PEFT says; fields as of peft 0.21.2."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subspan.hosts.peft_types import TYPES, Layout

CONFIG = "adapter_config.json"
# Rows of single tokens that train too.
FIELD = "trainable_token_indices"

# Fields that every type may have; the first that only say where an adapter comes from.
HARMLESS = frozenset({"auto_mapping", "peft_version", "revision", "inference_mode", "fan_in_fan_out"})
READ = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "target_modules", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "bias",
})  # fmt: skip
# Starts that leave the base weight as it is; PiSSA's can be done again, the others cannot.
KEEPING = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
AUTOMATIC = {"SEQ_CLS": {"classifier", "score"}, "TOKEN_CLS": {"classifier", "score"}}


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """An adapter of PEFT: its type, which layers, of what rank, at what scale, and the type's own options.

    >>> config = PeftConfig(rank=8, alpha=16.0, targets=("q_proj",), rank_pattern={"layers.0.q_proj": 4})
    >>> config.rank_of("model.layers.0.q_proj"), config.scale_of("model.layers.0.q_proj")
    (4, 4.0)
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str = ()
    whole: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    pissa: bool = False
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    base: str | None = None
    task: str | None = None
    kind: str = "LORA"
    options: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """How PEFT keeps this type."""
        return TYPES[self.kind]

    def rank_of(self, site: str) -> int:
        """The rank at a site: the first pattern that matches the end of its name, else the common one."""
        return int(_first(self.rank_pattern, site, self.rank))

    def alpha_of(self, site: str) -> float:
        """The alpha at a site, found as the rank is."""
        return float(_first(self.alpha_pattern, site, self.alpha))

    def scale_of(self, site: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) under rsLoRA."""
        scale: float = self.alpha_of(site) / self.rank_of(site) ** (0.5 if self.rslora else 1.0)
        return scale

    @property
    def method(self) -> str:
        """The preset of ours that this is."""
        if self.kind != "LORA":
            return self.layout.method
        return "dora" if self.dora else "pissa" if self.pissa else "rslora" if self.rslora else "lora"

    def targeted(self, names: Iterable[str], linear: Iterable[str], head: str | None = None) -> set[str]:
        """The names that `target_modules` selects.

        A list selects by the end of a name, a string is a regular expression for all of it, and "all-linear" is
        every name of `linear` but the head.
        """
        if self.targets is None:
            return set()
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            return {name for name in linear if name != head and not self._left_out(name)}
        return {name for name in names if name and self._wanted(name) and not self._left_out(name)}

    def _wanted(self, name: str) -> bool:
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        if name in (self.targets or ()):
            return True
        return _ends(name, self.targets or ()) and (self.layers is None or self._layer(name) in self.layers)

    def _layer(self, name: str) -> int | None:
        starts = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        found = next((m for start in starts if (m := re.match(rf"{start}\.(\d+)\.", name))), None)
        return int(found.group(1)) if found else None

    def _left_out(self, name: str) -> bool:
        if isinstance(self.excluded, str):
            refused = re.fullmatch(self.excluded, name) is not None
        else:
            refused = name in self.excluded or _ends(name, self.excluded)
        return refused or any(re.match(rf"(^|.*\.){re.escape(w)}($|\..*)", name) for w in self.whole)


def read_config(folder: str | Path) -> PeftConfig:
    """Read `adapter_config.json`.

    Raises FileNotFoundError when it is missing, and ValueError for damage, for a method that is not read, and
    for a field that would change what the adapter means, with its value.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; is it the folder that peft's save_pretrained wrote?")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{file} is not JSON ({problem}); copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not an object of fields; copy it again")
    try:
        return parse_config(found)
    except ValueError as problem:
        raise ValueError(f"{file}: {problem}") from None


def parse_config(found: Mapping[str, Any]) -> PeftConfig:
    """The fields of a config as a value; raises ValueError as `read_config` does."""
    kind = found.get("peft_type")
    if kind not in TYPES:
        raise ValueError(
            f"peft_type is {kind!r}; subspan reads {', '.join(TYPES)} (LORA with rslora, dora, pissa, eva): "
            "merge it with peft's merge_and_unload and use the whole model"
        )
    layout = TYPES[kind]
    _refuse(found, layout)
    targets, excluded = (found.get(key) for key in ("target_modules", "exclude_modules"))
    layers, init = found.get("layers_to_transform"), found.get("init_lora_weights", True)
    rank = _number(found, layout.rank, layout.default) if layout.rank else 1
    return PeftConfig(
        rank=rank,
        alpha=_number(found, layout.alpha, layout.default_alpha, whole=False) if layout.alpha else rank,
        targets=targets if targets is None else _names(targets, "target_modules"),
        excluded=_names(excluded or (), "exclude_modules"),
        whole=tuple(found.get("modules_to_save") or ()),
        rank_pattern=_pattern(found, "rank_pattern", whole=True) if layout.patterns else {},
        alpha_pattern=_pattern(found, "alpha_pattern", whole=False) if layout.patterns else {},
        rslora=bool(found.get("use_rslora")),
        dora=bool(found.get("use_dora")),
        pissa=kind == "LORA" and init == "pissa",
        layers=None if layers is None or layers == [] else (layers,) if isinstance(layers, int) else tuple(layers),
        layers_pattern=_patterns(found.get("layers_pattern")),
        base=found.get("base_model_name_or_path"),
        task=found.get("task_type"),
        kind=kind,
        options=layout.options(found),
        tokens=parse_tokens(found.get(FIELD)) if FIELD in layout.fields else {},
    )


def _refuse(found: Mapping[str, Any], layout: Layout) -> None:
    known = HARMLESS | READ | layout.harmless | layout.fields | {layout.rank, layout.alpha}
    if layout.patterns:
        known |= {"rank_pattern", "alpha_pattern"}
    if FIELD in layout.fields and found.get(FIELD) and not found.get("modules_to_save"):
        known |= {"ensure_weight_tying"}  # rows of tokens are tied in any case
    for key, value in found.items():
        if key not in known and value not in (None, False, {}, [], ()):
            kind = found["peft_type"]
            said = (
                "" if kind == "LORA" else f"peft_type is {kind!r}, one of {', '.join(TYPES)} that are read, but "
            )
            raise ValueError(
                f"{said}{key} is {value!r}, which changes what the adapter means and is not read; "
                "merge it with peft's merge_and_unload and use the whole model"
            )
    if found.get("bias", "none") != "none":
        raise ValueError(
            f"bias is {found['bias']!r}: it trains the biases of the base as well, and subspan's adapters leave "
            "the base alone; only 'none' is read: merge it with peft's merge_and_unload"
        )
    init = found.get("init_lora_weights", True)
    if layout is not TYPES["LORA"]:
        return
    if init not in (*KEEPING, "pissa"):
        raise ValueError(
            f"init_lora_weights is {init!r}, a start that changes the base weight in a way the folder does not "
            "keep; save it with peft's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    if init == "pissa" and found.get("use_dora"):
        raise ValueError("init_lora_weights is 'pissa' and use_dora is true; only one of the two is read")


def _number(found: Mapping[str, Any], key: str, default: float, *, whole: bool = True) -> Any:
    value = found.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value <= 0:
        raise ValueError(f"{key} is {value!r}; it must be a positive {'whole number' if whole else 'number'}")
    return value


def _pattern(found: Mapping[str, Any], key: str, *, whole: bool) -> dict[str, Any]:
    pattern = found.get(key) or {}
    if not isinstance(pattern, Mapping):
        raise ValueError(f"{key} is {pattern!r}; it must be an object of name -> number")
    for name in pattern:
        _regex(name, key)
    return {name: _number(pattern, name, 0, whole=whole) for name in pattern}


def _names(value: Any, key: str) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return _regex(value, key)
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} is {value!r}; it must be a list of names or one regular expression")
    return tuple(value)


def _regex(pattern: str, key: str) -> str:
    try:
        re.compile(pattern)
    except re.error as problem:
        raise ValueError(f"{key} has {pattern!r}, which is no regular expression ({problem})") from None
    return pattern


def _patterns(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _ends(name: str, wanted: Iterable[str]) -> bool:
    return any(name.endswith(f".{end}") for end in wanted)


def _first(patterns: Mapping[str, Any], site: str, default: float) -> Any:
    found = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", site))
    return next(found, default)


def parse_tokens(value: Any) -> dict[str, tuple[int, ...]]:
    """The ids by the end of a module's name, "" standing for the embeddings; raises ValueError for what are none.

    >>> parse_tokens([3, 5]), parse_tokens({"lm_head": [3]}), parse_tokens(None)
    ({'': (3, 5)}, {'lm_head': (3,)}, {})
    """
    if not value:
        return {}
    named = value if isinstance(value, Mapping) else {"": value}
    for ids in named.values():
        whole = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
        if not whole or not ids or len(set(ids)) < len(ids):
            raise ValueError(f"{FIELD} is {value!r}; it must list ids of tokens, each once, or name such lists")
    return {str(name): tuple(ids) for name, ids in named.items()}
