"""Sparse adapters in the weights of a model, changed from one to another in place, without rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subspan import site
from subspan.adapt.join import Add
from subspan.adapt.layer import Adapted
from subspan.edit import sharers
from subspan.linalg import wide
from subspan.ops import Entries


@dataclass(frozen=True)
class Change:
    """Some entries of a weight: their places in its memory (k,), what stood there, and what the adapter says."""

    weight: nn.Parameter
    at: Tensor
    old: Tensor
    new: Tensor

    def write(self, values: Tensor) -> None:
        """Put values (k,) at the places."""
        # Of the five ways that torch has, the fastest on a CPU.
        self.weight.put_(self.at, values)


class Switch:
    """A model and its sparse adapters (SHiRA), of which at most one is in the weights.

    A switch writes the old entries back as they were, so every bit is restored, and then the new ones, which are
    those of a merge: w + change in float32 at least, cast once. Nothing is added or subtracted on the way, and
    only the entries move. (Bhardwaj et al., 2024, arXiv:2406.13175.)

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> switch = Switch(model)
    >>> switch.add("one", {"0": Entries(torch.tensor([3]), torch.tensor([1.0]), 2, 2)})
    >>> switch.to("one")
    >>> switch.active
    'one'
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: str | None = None
        self._changes: dict[str, list[Change]] = {}
        self._versions: dict[nn.Parameter, int] = {}

    @torch.no_grad()
    def add(self, name: str, adapter: Mapping[str, Entries]) -> None:
        """Note an adapter, site -> the entries that it adds, as `entries` gives them; no weight changes.

        Raises ValueError for a name that is taken, an adapter without sites, a site that the model lacks or that
        is no layer of that shape with a contiguous weight of its own, and as `to` does.
        """
        if name in self._changes or not adapter:
            have = ", ".join(self._changes) or "none"
            raise ValueError(
                f"adapter {name!r} has {len(adapter)} sites; give one or more, and a name beside {have}"
            )
        modules, shared = dict(self.model.named_modules(remove_duplicate=False)), sharers(self.model)
        found = {place: _positions(place, modules.get(place), op, shared) for place, op in adapter.items()}
        active = self.active
        self.to(None)
        made = [_change(*found[place], op.values) for place, op in adapter.items()]
        self._check(made)
        self._changes[name] = made
        self.to(active)

    @torch.no_grad()
    def to(self, name: str | None) -> None:
        """Put an adapter in the place of the one in use, or, for None, leave the weights as they were.

        Raises ValueError for a name that was not added, and when somebody else wrote to a weight since: what
        belongs under the adapters is then not known.
        """
        if name is not None and name not in self._changes:
            raise ValueError(f"no adapter {name!r}; there are: {', '.join(self._changes) or 'none at all'}")
        leaving, coming = ([] if one is None else self._changes[one] for one in (self.active, name))
        self._check((*leaving, *coming))
        for change in leaving:
            change.write(change.old)
        for change in coming:
            change.write(change.new)
        self._versions |= {change.weight: change.weight._version for change in (*leaving, *coming)}
        self.active = name

    def _check(self, changes: Iterable[Change]) -> None:
        for change in changes:
            weight = change.weight
            if self._versions.setdefault(weight, weight._version) != weight._version:
                raise ValueError(
                    f"a weight {tuple(weight.shape)} was written to since the last switch ({self.active!r} is in "
                    "use); switch to None before weights are trained or loaded, and make a new Switch after"
                )


def _change(weight: nn.Parameter, at: Tensor, values: Tensor) -> Change:
    at, order = at.sort()
    old = weight.view(-1).index_select(0, at)
    return Change(weight, at, old, (wide(old) + values.to(old.device)[order]).to(old.dtype))


def _positions(
    place: str, module: nn.Module | None, op: Entries, shared: Mapping[int, list[str]]
) -> tuple[nn.Parameter, Tensor]:
    """A site's weight, and where in its memory an op's entries lie, (k,)."""
    if module is None or isinstance(module, Adapted) or site.kind_of(module) is None:
        what = "no module of the model" if module is None else f"a {type(module).__name__}"
        raise ValueError(f"{place} is {what}; sparse adapters are put into the weights of plain layers")
    weight, w = site.parameter(module), site.matrix(module)
    if w.shape != op.shape or not weight.is_contiguous():
        raise ValueError(
            f"{place}: the weight is {tuple(w.shape)} with strides {weight.stride()}, the entries are of "
            f"{op.shape}; the shapes must be equal and the weight contiguous"
        )
    if other := [name for name in shared.get(id(weight), ()) if name != place]:
        raise ValueError(f"{place} shares its weight with {', '.join(other)}, which would change too; untie them")
    index = op.index.long()
    return weight, (index // op.n * w.stride(0) + index % op.n * w.stride(1)).to(weight.device)


def entries(model: nn.Module, name: str = "default") -> dict[str, Entries]:
    """The sparse changes of an adapted model, site -> entries with the scale in their values.

    Raises ValueError for a model without that adapter, and for an op that is not `Entries` under a plain sum.
    """
    found = {place: m for place, m in model.named_modules() if isinstance(m, Adapted) and name in m.adapters}
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter {name!r}; adapt it first")
    made: dict[str, Entries] = {}
    for place, module in found.items():
        op, join = module.slot(name).op, module.slot(name).join
        if not isinstance(op, Entries) or type(join) is not Add:
            raise ValueError(
                f"{place}: {type(op).__name__} joined by {type(join).__name__} is no sparse sum; merge it instead"
            )
        made[place] = Entries(op.index, join.scale * op.values.detach(), op.m, op.n)
    return made
