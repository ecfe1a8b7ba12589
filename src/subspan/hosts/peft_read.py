"""Any adapter folder, PEFT's or subspan's own: put on a model, or applied to one weight at a time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from subspan import io
from subspan import shards as cuts
from subspan.adapt import Adapted, Adapter, Add, KeepBase, Rescale, Slot, adapt, remembered
from subspan.adapt.join import wide_dense
from subspan.edit import Edit, Make, edit, matrices
from subspan.hosts import folders, quantizer
from subspan.hosts.peft import PeftFolder, check_fits, layers_of, low_rank, put_peft, read_peft
from subspan.hosts.peft_config import CONFIG
from subspan.hosts.peft_given import Given
from subspan.hosts.peft_keys import PICKLE, PREFIX, formed, peft_tensors, some
from subspan.hosts.peft_tokens import TokenRows
from subspan.hosts.peft_types import TYPES
from subspan.hosts.peft_write import resharded, tidy
from subspan.linalg import wide
from subspan.methods import build
from subspan.ops import Dense, LinOp, LowRank, Product

MARKS = tuple(sorted({name.partition("_")[0] + "_" for layout in TYPES.values() for name in layout.names}))
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """One adapter on disk.

    `args` are those of the method's preset, empty when ranks or scales differ between sites. `dtype` is the base's
    precision that the numbers depend on, None if they do not.
    """

    path: Path
    form: Literal["peft", "subspan"]
    method: str
    args: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    sites: tuple[str, ...]
    whole: Mapping[str, Tensor] = field(repr=False)
    bases: Mapping[str, Tensor] = field(repr=False)
    base: str | None
    dtype: torch.dtype | None
    reads_base: bool
    fits: Callable[[nn.Module], None] = field(repr=False)
    put: Callable[[nn.Module, str], Edit] = field(repr=False)
    make: Callable[[str], Make] = field(repr=False)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    forms: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    tokens: TokenRows = field(default=TokenRows(), repr=False)

    def kinds(self) -> dict[str, tuple[int, int]]:
        """Kind of tensor -> how many there are, and how many numbers they hold."""
        count: Counter[str] = Counter()
        size: Counter[str] = Counter()
        # A tensor of several sites counts once.
        once = {id(t): (key, t) for key, t in self.tensors.items()}
        for key, tensor in once.values():
            kind = self._kind(key)
            count[kind] += 1
            size[kind] += tensor.numel()
        return {kind: (count[kind], size[kind]) for kind in count}

    def _kind(self, key: str) -> str:
        if self.form == "subspan":
            return key.partition(".adapters.default.")[2]
        last = key.removesuffix(".weight").rpartition(".")[2]
        return last if last.startswith((*MARKS, "trainable_tokens_")) else "modules_to_save"


@torch.no_grad()
def fill_peft(
    model: nn.Module, folder: str | Path, *, name: str = "default", prefix: str = PREFIX, root: str = ""
) -> None:
    """Write the tensors of a PEFT folder into an adapter that a model already carries, in place.

    This is the way for a model cut over processes (FSDP2), whose layers cannot be swapped: put the same adapter
    on, cut the model, then fill it. Every process calls this, reads the folder and keeps its own part. Raises
    ValueError, with nothing written, when the model's adapter is of other sites, another kind, shape or scale, or
    changed the base when it started (PiSSA), and as `read_peft` and `check_fits` do.
    """
    saved = read_peft(folder, prefix=prefix, root=root)
    if saved.tokens.values:
        raise ValueError(f"{folder} has rows of single tokens, which are not filled in; put it on with load_peft")
    resharded(model)
    check_fits(model, saved)
    modules = layers_of(model)
    found = {site: m for site, m in modules.items() if isinstance(m, Adapted) and name in m.adapters}
    if other := sorted(found.keys() ^ saved.parts.keys()):
        raise ValueError(
            f"{folder} and adapter {name!r} of {type(model).__name__} stand on other layers ({some(other)}); "
            "put the adapter on those of the folder first"
        )
    pairs: list[tuple[Tensor, Tensor]] = []
    for site, module in found.items():
        m, n = module.out_features, module.in_features
        given = Given(site, saved.parts[site], dict(saved.shared), saved.config, m, n)
        fresh, slot = Slot(*saved.config.layout.read(given)), module.slot(name)
        changed = module.origin is not module.base or saved.config.pissa
        if why := "its start changed the base" if changed else _unlike(fresh, slot):
            raise ValueError(f"{folder}: {site} cannot be filled in, {why}; put the folder on with load_peft")
        new = fresh.state_dict()
        pairs += [(own, new[key]) for key, own in slot.state_dict(keep_vars=True).items()]
    for key, tensor in saved.whole.items():
        place, _, leaf = key.rpartition(".")
        pairs.append((modules[place].state_dict(keep_vars=True)[leaf], tensor))
    for own, tensor in pairs:
        own.copy_(cuts.laid(tensor.to(own.device, own.dtype), own))


def _unlike(fresh: Slot, slot: Slot) -> str:
    """How an adapter differs from another but for its numbers; empty if it does not."""
    kinds, others = ([type(m).__name__ for m in one.modules()] for one in (slot, fresh))
    if kinds != others or type(slot.join) is not type(fresh.join):
        return f"{' '.join(others[1:])} there and {' '.join(kinds[1:])} here"
    sizes, there = ({key: tuple(t.shape) for key, t in one.state_dict().items()} for one in (slot, fresh))
    if sizes != there:
        return f"{there} there and {sizes} here"
    scales = [one.join.scale for one in (fresh, slot) if isinstance(one.join, Add | Rescale)]
    if scales and not math.isclose(*scales, rel_tol=1e-9):
        return f"scale {scales[0]} there and {scales[1]} here"
    return ""


def is_adapter(name: str | Path) -> bool:
    """Whether a folder holds an adapter, of PEFT or of subspan.

    >>> is_adapter("smollm2")
    False
    """
    folder = Path(name)
    if any((folder / file).is_file() for file in (CONFIG, PICKLE)):
        return True
    return (folder / io.ABOUT).is_file() and io.read_about(folder).get("kind") == "adapter"


def read_adapter(path: str | Path, *, prefix: str = PREFIX, root: str = "") -> AdapterFolder:
    """Read an adapter folder of either kind; raises as `read_peft` does, and ValueError for a model's folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder of an adapter")
    if (folder / CONFIG).is_file() or (folder / PICKLE).is_file():
        return _of_peft(read_peft(folder, prefix=prefix, root=root))
    if not (folder / io.ABOUT).is_file():
        raise FileNotFoundError(f"{folder} holds neither {CONFIG} nor {io.ABOUT}; give the folder of an adapter")
    about = io.read_about(folder)
    if about.get("kind") != "adapter":
        raise ValueError(f"{folder} holds a whole model, no adapter; give the folder of an adapter")
    return _of_subspan(folder, about)


def _of_peft(saved: PeftFolder) -> AdapterFolder:
    config, layout = saved.config, saved.config.layout
    told = {(config.rank_of(site), config.alpha_of(site)) for site in saved.parts}
    known = {site: (m, n) for site, (m, n) in saved.shapes.items() if m is not None and n is not None}
    # Without the base the shapes of some types are unknown, and without shapes neither is what they change.
    blind = len(known) < len(saved.parts)
    rank, alpha = told.pop()
    kept = {site: formed(own, saved.forms.get(site)) for site, own in saved.parts.items()}
    one = replace(config, rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})
    args = {} if told or saved.tokens.values else layout.args(one, saved.shapes)
    return AdapterFolder(
        path=saved.path, form="peft", method=config.method, args={key: tidy(value) for key, value in args.items()},
        tensors=peft_tensors(kept, {**saved.whole, **saved.tokens.tensors}, saved.shared),
        sites=tuple(saved.parts), whole=saved.whole, bases=saved.bases, tokens=saved.tokens,
        base=config.base, dtype=None, reads_base=config.dora or config.pissa or blind,
        fits=lambda model: check_fits(model, saved), put=lambda model, name: put_peft(model, saved, name),
        make=saved.make, shapes=known, forms=saved.forms,
    )  # fmt: skip


def _of_subspan(folder: Path, about: Mapping[str, Any]) -> AdapterFolder:
    try:
        made: Adapter = build(about["method"], "adapter", **about["args"])
        base, sites = about["base"], tuple(about["sites"])
        source, dtype = str(base["source"]), getattr(torch, base["dtype"])
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{folder / io.ABOUT} is damaged ({problem!r}); save the adapter again") from None
    tensors = io.read_tensors(folder / io.WEIGHTS)
    adapter = remembered(made, tensors)
    inside = tuple(f"{site}.adapters.default." for site in sites)
    if extra := [key for key in tensors if not key.startswith(inside)]:
        raise ValueError(f"{folder} holds {len(extra)} tensors of no site ({some(extra)}); save the adapter again")
    simple = isinstance(adapter.join, Add) and isinstance(adapter.base, KeepBase)
    factors = all(key.endswith((".default.op.u", ".default.op.v")) for key in tensors)

    def make(name: str) -> Make:
        put_on = adapt(adapter, name)  # once, as sites may share tensors
        return lambda site, module: _filled(put_on(site, module), site, name, tensors, folder)

    def fits(model: nn.Module) -> None:
        modules = layers_of(model).keys() | matrices(model).keys()
        if lost := [site for site in sites if site not in modules]:
            raise ValueError(
                f"{folder} adapts {len(lost)} layers that {type(model).__name__} lacks ({some(lost)}); "
                "it belongs to another model"
            )

    def put(model: nn.Module, name: str) -> Edit:
        fits(model)
        if folders.fingerprint(model) != base["sha256"]:
            raise ValueError(
                f"{folder} was trained on other weights than this model has; give it the base it was made for: "
                f"{source}"
            )
        return edit(model, list(sites), make(name))

    return AdapterFolder(
        path=folder, form="subspan", method=about["method"], args=about["args"], tensors=tensors, sites=sites,
        whole={}, bases={}, base=source, dtype=dtype, reads_base=not (simple and factors),
        fits=fits, put=put, make=make,
    )  # fmt: skip


def _filled(module: nn.Module, site: str, name: str, tensors: Mapping[str, Tensor], folder: Path) -> nn.Module:
    if isinstance(module, Adapted):
        inside = f"{site}.adapters.default."
        own = {f"{inside}{key}": t for key, t in module.slot(name).state_dict(keep_vars=True).items()}
        io.fill(own, {key: t for key, t in tensors.items() if key.startswith(inside)}, str(folder))
    return module


@torch.no_grad()
def joined(saved: AdapterFolder, site: str, weight: Tensor) -> Tensor:
    """The weight of one site, (m, n) or (m, channels, *kernel), with the adapter in it, in float32 at least."""
    adapted = _on(saved, site, weight)
    return adapted.folded(adapted.active).weight.reshape(weight.shape)


@torch.no_grad()
def change(saved: AdapterFolder, site: str, weight: Tensor | None = None) -> LinOp:
    """What the adapter adds to one weight: its factors where it is low-rank, else the dense difference (m, n).

    The weight is not needed unless `reads_base`. Raises ValueError where it is and is missing, and for a site
    that is a convolution or an embedding, which a plain LoRA of linear layers does not know.
    """
    if site in saved.forms:
        kind = "a convolution" if saved.forms[site] else "an embedding"
        raise ValueError(f"{saved.path}: {site} is {kind}, whose change is not read by itself; merge it instead")
    if saved.reads_base and weight is None:
        raise ValueError(f"{saved.path}: what {saved.method} changes depends on the base weight; give the base")
    adapted = _on(saved, site, torch.zeros(_shape(saved, site)) if weight is None else weight)
    slot = adapted.slot("default")
    if type(slot.join) is not Add or adapted.origin is not adapted.base:
        if weight is None:
            raise ValueError(f"{saved.path}: {site} is no sum with a matrix of its own; give the base")
        return Dense(adapted.folded(adapted.active).weight - wide(weight))
    low = low_rank(slot.op) or thin(slot.op)
    if low is None:
        return Dense(slot.join.scale * wide_dense(slot.op).detach())
    return LowRank(slot.join.scale * low.u.detach(), low.v.detach())


def thin(op: LinOp) -> LowRank | None:
    """A product that narrows somewhere as two factors, None for other ops.

    >>> thin(Product([Dense(torch.ones(3, 1)), Dense(torch.ones(1, 2))])).shape
    (3, 2)
    """
    if not isinstance(op, Product) or len(op.ops) < 2:
        return None
    widths = [one.shape[1] for one in op.ops[:-1]]
    at = widths.index(min(widths)) + 1
    if widths[at - 1] >= min(op.shape):
        return None
    if not min(widths):  # AdaLoRA may leave nothing, but no LoRA has a rank of 0
        return LowRank(torch.zeros(op.shape[0], 1), torch.zeros(1, op.shape[1]))
    left, right = (wide_dense(Product(list(ops))).detach() for ops in (op.ops[:at], op.ops[at:]))
    return LowRank(left, right)


def _shape(saved: AdapterFolder, site: str) -> tuple[int, int]:
    if saved.form == "peft":
        return saved.shapes[site]
    u, v = (saved.tensors[f"{site}.adapters.default.op.{name}"] for name in "uv")
    return u.shape[0], v.shape[1]


def _on(saved: AdapterFolder, site: str, weight: Tensor) -> Adapted:
    dtype = saved.dtype or wide(weight[:0]).dtype
    w = weight.detach().flatten(1)
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w.to(dtype), requires_grad=False)
    made = saved.make("default")(site, layer)
    if not isinstance(made, Adapted):
        raise TypeError(f"{saved.path}: {site} became {type(made).__name__}, which is no adapted layer")
    return made


def base_of(saved: AdapterFolder, given: str | None = None) -> str:
    """The model an adapter is for: as given, else the one it names; raises ValueError when that is not here."""
    name = given or saved.base
    if name == "smollm2" or (name and Path(name).is_dir()):
        return name
    raise ValueError(
        f"{saved.path} names {saved.base!r} as its base, which is no local folder; give the base with --base MODEL"
    )


class Weights:
    """The weights of a model by site: out of its safetensors one at a time, or of the opened model."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.files = shards(Path(name)) if Path(name).is_dir() and not is_adapter(name) else {}
        self._model: nn.Module | None = None

    def __call__(self, site: str) -> Tensor:
        """The weight (m, n) of a site; raises ValueError for a site the model lacks."""
        key = f"{site}.weight"
        if key in self.files:
            return read_one(self.files[key], key)
        if self._model is None:
            self._model = folders.open_model(self.name, dtype=folders.stored_dtype(self.name)).model
        module = (matrices(self._model) | layers_of(self._model)).get(site)
        found = None if module is None else getattr(module, "weight", None)
        if not isinstance(found, Tensor):
            raise ValueError(f"{self.name} has no layer {site}; the adapter belongs to another model")
        return found.detach()


def read_one(file: Path, key: str) -> Tensor:
    """One tensor of a safetensors file; raises ValueError when it is damaged."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            found: Tensor = opened.get_tensor(key)
            return found
    except SafetensorError as problem:
        raise ValueError(f"{file} is damaged or cut short ({problem}); copy or save it again") from None


def shards(folder: Path) -> dict[str, Path]:
    """Tensor -> the safetensors file of a model's folder that holds it.

    Raises FileNotFoundError for a missing file, and ValueError for damage and for a shard outside the folder.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_keys(folder / SINGLE), folder / SINGLE)
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}; save it with save_pretrained")
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(key): str(name) for key, name in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is damaged: it has no weight_map; copy it again") from None
    for name in sorted(set(files.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{index} names the shard {name!r}, which leaves the folder; shards lie beside it")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: {INDEX} names this shard, but it is missing; copy it again")
    have = {key: name for name in set(files.values()) for key in _keys(folder / name)}
    if have != files:
        wrong = sorted(key for key in have.keys() | files.keys() if have.get(key) != files.get(key))
        raise ValueError(f"{index} and the shards disagree about {some(wrong)}; copy the folder again")
    return {key: folder / name for key, name in files.items()}


def _keys(file: Path) -> list[str]:
    quantizer.require_whole(file)
    with safe_open(str(file), framework="pt") as opened:
        return list(opened.keys())
