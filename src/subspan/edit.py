"""Finding and swapping modules: the only code that changes the structure of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from subspan.plan import Shapes
from subspan.select import Select, pick

Make = Callable[[str, nn.Module], nn.Module]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every `nn.Linear` by name; raises ValueError when the model has none."""
    found = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    if not found:
        kinds = sorted({type(m).__name__ for m in model.modules() if next(m.parameters(False), None) is not None})
        raise ValueError(f"{type(model).__name__} has no nn.Linear; its layers are: {', '.join(kinds) or 'none'}")
    return found


def sharers(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> the names of all modules that hold it, for parameters held more than once."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in holders.items() if len(names) > 1}


def sites(
    model: nn.Module, select: Select | None = None, *, tied: Literal["refuse", "share"] = "refuse"
) -> dict[str, nn.Linear]:
    """The linear layers to work on, by name.

    By default those in numbered blocks (`layers.3.mlp.up_proj`) that share their weight with nobody, so never
    the embeddings or the head; all layers when nothing is numbered. An explicit pattern that matches a tied
    layer raises ValueError, unless `tied="share"`, and so does one that matches nothing.
    """
    found, shared = linears(model), sharers(model)
    if "" in found:
        raise ValueError(
            "the model is itself an nn.Linear, with no parent to swap it in; wrap it in nn.Sequential"
        )
    if select is None:
        alone = {name: m for name, m in found.items() if tied == "share" or id(m.weight) not in shared}
        blocks = {name: m for name, m in alone.items() if any(part.isdigit() for part in name.split("."))}
        if not alone:
            raise ValueError("every nn.Linear of this model shares its weight; untie one or pass tied='share'")
        return blocks or alone
    chosen = {name: found[name] for name in pick(found, select, what="nn.Linear")}
    for name, module in chosen.items():
        if id(module.weight) in shared and tied == "refuse":
            others = ", ".join(other for other in shared[id(module.weight)] if other != name)
            raise ValueError(
                f"{name} shares its weight with {others}; leave it out with '!{name}', or pass tied='share' "
                "to change it here and leave the other as it is"
            )
    return chosen


def shapes(found: dict[str, nn.Linear]) -> Shapes:
    """Site -> (out, in)."""
    return {name: (m.out_features, m.in_features) for name, m in found.items()}


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
    """Swap every selected linear layer for `make(name, layer)`; on any error the model is left as it was.

    `select` is a pattern, a function of names, a list of exact module names (which need not be linear layers),
    or None for `sites`' default.

    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> with edit(net, "0", lambda name, layer: nn.Identity()):
    ...     print(net[0])
    Identity()
    """
    if isinstance(select, Sequence) and not isinstance(select, str):
        chosen: dict[str, nn.Module] = {}
        for name in select:
            module = _submodule(model, name)
            if module is None or module is model:
                have = ", ".join(n for n, _ in model.named_modules() if n)
                raise ValueError(f"the model has no module {name!r} to swap; there are: {have[:200]}")
            chosen[name] = module
    else:
        chosen = dict(sites(model, select, tied=tied))
    done = Edit(model, {})
    try:
        for name, module in chosen.items():
            new = make(name, module)
            new.train(module.training)
            replace(model, name, new)
            done.swaps[name] = (module, new)
    except BaseException:
        done.undo()
        raise
    return done
