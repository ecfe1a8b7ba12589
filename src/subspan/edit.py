"""Finding and swapping modules: the only code that changes the structure of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from subspan import site
from subspan.ops import Dense, OpLinear
from subspan.ops.experts import Slice, stacked
from subspan.plan import Shapes
from subspan.select import Select, matcher, pick

Make = Callable[[str, nn.Module], nn.Module]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` by name; raises ValueError when the model has none."""
    found = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    if not found:
        raise _none(model, {})
    return found


def sharers(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> the names of all modules that hold it, for parameters held more than once."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in holders.items() if len(names) > 1}


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that `subspan.site` knows for a matrix, and every expert of a 3-D parameter, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found |= site.sites_of(name, module)
    return found


def sites(
    model: nn.Module,
    select: Select | None = None,
    *,
    tied: Literal["refuse", "share"] = "refuse",
    grouped: Literal["refuse", "take"] = "refuse",
) -> dict[str, nn.Module]:
    """The layers to work on, by name: `nn.Linear`, transformers' `Conv1D`, and the experts of 3-D parameters.

    By default those in numbered blocks (`layers.3.mlp.up_proj`) that share their weight with nobody, so never
    the embeddings or the head; all layers when nothing is numbered. Convolutions and embeddings are taken only
    when a pattern that is more than `*` and exclusions, or a function, names them. An explicit pattern that
    matches a tied layer raises ValueError, unless `tied="share"`, and so does one that matches nothing, or a
    layer that is no one matrix. A convolution in groups is several of those, and one tensor to an adapter, whose
    caller says `grouped="take"`.
    """
    found = matrices(model)
    usual = {name: m for name, m in found.items() if site.of(m).usual}
    if not usual and (select is None or not found):
        raise _none(model, found)
    listed = usual or found
    chosen = _select(model, listed if select is None or _broad(select) else found, listed, select, tied)
    site.require_matrices(chosen, grouped=grouped)
    return chosen


def shapes(found: Mapping[str, nn.Module]) -> Shapes:
    """Site -> (out, in)."""
    sizes = {name: site.matrix(m).shape for name, m in found.items()}
    return {name: (size[0], size[1]) for name, size in sizes.items()}


def _select(
    model: nn.Module,
    found: dict[str, nn.Module],
    usual: dict[str, nn.Module],
    select: Select | None,
    tied: Literal["refuse", "share"],
) -> dict[str, nn.Module]:
    """Choose among the layers found; an error names the usual ones."""
    if "" in found:
        raise ValueError(
            f"the model is itself an {site.of(found['']).label}, with no parent to swap it in; wrap it in "
            "nn.Sequential"
        )
    shared, what = sharers(model), " or ".join(dict.fromkeys(site.of(m).label for m in usual.values()))
    if select is None:
        alone = {name: m for name, m in found.items() if tied == "share" or id(site.parameter(m)) not in shared}
        blocks = {name: m for name, m in alone.items() if any(part.isdigit() for part in name.split("."))}
        if not alone:
            raise ValueError(f"every {what} of this model shares its weight; untie one or pass tied='share'")
        return blocks or alone
    test = matcher(select)
    names = [name for name in found if test(name)] or pick(usual, select, what=what)
    for name in names if tied == "refuse" else ():
        if others := [other for other in shared.get(id(site.parameter(found[name])), ()) if other != name]:
            raise ValueError(
                f"{name} shares its weight with {', '.join(others)}; leave it out with '!{name}', or pass "
                "tied='share' to change it here and leave the other as it is"
            )
    return {name: found[name] for name in names}


def _broad(select: Select) -> bool:
    """Whether a pattern only says `*`, and what it leaves out."""
    return isinstance(select, str) and {p.strip() for p in select.split("|") if p.strip()[:1] not in "!"} <= {"*"}


def _none(model: nn.Module, found: Mapping[str, nn.Module]) -> ValueError:
    kinds = sorted({type(m).__name__ for m in model.modules() if next(m.parameters(False), None) is not None})
    remedy = f"; name some of them, such as {next(iter(found))!r}, to work on these" if found else ""
    return ValueError(
        f"{type(model).__name__} has no nn.Linear; its layers are: {', '.join(kinds) or 'none'}{remedy}"
    )


@dataclass
class Edit:
    """What was swapped: name -> (the module that stood there, the module that stands there now)."""

    model: nn.Module
    swaps: dict[str, tuple[nn.Module, nn.Module]]

    def undo(self) -> None:
        """Put the very same objects back; raises RuntimeError when somebody else changed a site since."""
        for name, (_, new) in self.swaps.items():
            if _submodule(self.model, name) is not new:
                raise RuntimeError(f"{name} was changed again after this edit; undo the later edit first")
        for name, (old, _) in self.swaps.items():
            replace(self.model, name, old)
        self.swaps = {}

    def __enter__(self) -> Edit:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __iter__(self) -> Iterator[str]:
        return iter(self.swaps)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Set the submodule of that dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def edit(
    model: nn.Module,
    select: Select | Sequence[str] | None,
    make: Make,
    *,
    tied: Literal["refuse", "share"] = "refuse",
) -> Edit:
    """Swap every selected layer for `make(name, layer)`; on any error the model is left as it was.

    `select` is a pattern, a function of names, a list of exact names, or None for `sites`' default; all but a
    list choose among the `nn.Linear`. Names may be those of any module, and those of experts: their owner is then
    swapped for one that holds what `make` gives, which must have a `weight` of the expert's shape and no bias.

    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> with edit(net, "0", lambda name, layer: nn.Identity()):
    ...     print(net[0])
    Identity()
    """
    if isinstance(select, Sequence) and not isinstance(select, str):
        chosen = _named(model, select)
    else:
        found = dict[str, nn.Module](linears(model))
        chosen = _select(model, found, found, select, tied)
    done = Edit(model, {})
    try:
        for name, module in chosen.items():
            if not isinstance(module, site.Expert):
                _swap(done, name, module, make(name, module))
        for place, (owner, layers) in _experts(chosen, make).items():
            _swap(done, place, owner, stacked(owner, layers))
    except BaseException:
        done.undo()
        raise
    return done


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules and experts of these names."""
    found: dict[str, nn.Module | None] = {name: _submodule(model, name) for name in names}
    if None in found.values():
        every = matrices(model)
        found = {name: every.get(name) if module is None else module for name, module in found.items()}
    chosen = {name: module for name, module in found.items() if module is not None and module is not model}
    if absent := [name for name in names if name not in chosen]:
        have = ", ".join(n for n, _ in model.named_modules() if n)
        raise ValueError(f"the model has no module {absent[0]!r} to swap; there are: {have[:200]}")
    return chosen


def _swap(done: Edit, name: str, old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    replace(done.model, name, new)
    done.swaps[name] = (old, new)


def _experts(
    chosen: Mapping[str, nn.Module], make: Make
) -> dict[str, tuple[nn.Module, dict[str, list[nn.Module]]]]:
    """Name of an owner -> itself, and by parameter the layers of all its experts; one not chosen stays dense."""
    found: dict[str, tuple[nn.Module, dict[str, dict[int, nn.Module]]]] = {}
    for name, expert in site.experts_of(chosen):
        layer = make(name, expert)
        if not _fills(layer, expert):
            raise ValueError(
                f"{name} is one expert of a 3-D parameter, whose place only a layer with a weight of "
                f"{tuple(expert.weight.shape)} and without a bias can take, not this {type(layer).__name__}; "
                f"leave it out with '!{name}'"
            )
        place = name.removesuffix(f"{expert.index}.{expert.key}").rstrip(".")
        found.setdefault(place, (expert.owner, {}))[1].setdefault(expert.key, {})[expert.index] = layer
    return {
        place: (owner, {key: _filled_up(owner, key, layers) for key, layers in keys.items()})
        for place, (owner, keys) in found.items()
    }


def _fills(layer: nn.Module, expert: site.Expert) -> bool:
    """Whether a layer can stand for an expert."""
    if isinstance(layer, OpLinear):
        return layer.bias is None
    w = getattr(layer, "weight", None)
    shaped = isinstance(w, Tensor) and w.shape == expert.weight.shape
    return shaped and getattr(layer, "bias", None) is None


def _filled_up(owner: nn.Module, key: str, layers: Mapping[int, nn.Module]) -> list[nn.Module]:
    """The layers of all experts: of one that has none an op of its own beside other ops, else its bare slice."""
    trains = owner.get_parameter(key).requires_grad
    apart = all(isinstance(layer, OpLinear) for layer in layers.values())

    def kept(index: int) -> nn.Module:
        w = site.matrix(site.Expert(owner, key, index)).detach()
        return OpLinear(Dense(nn.Parameter(w.clone(), requires_grad=trains))) if apart else Slice(w, trains=trains)

    return [layers[i] if i in layers else kept(i) for i in range(len(owner.get_parameter(key)))]
