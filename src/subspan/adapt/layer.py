"""The one adapter module, and how it is put on, listed and merged."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from subspan import shards
from subspan import site as sites
from subspan.adapt.fast import uncast
from subspan.adapt.join import Join, Layer
from subspan.adapt.layers import (
    Adaptable,
    Flat,
    Patches,
    View,
    matrix,
    plain,
    require,
    seen,
    shape,
    use_of,
)
from subspan.adapt.layers import Linear as Linear
from subspan.adapt.routed import Routed
from subspan.ops import LinOp
from subspan.ops.experts import Slice


class Base(Protocol):
    """What the start of an adapter does to the layer it stands on."""

    def __call__(self, layer: Adaptable, op: LinOp, join: Join) -> Adaptable:
        """The layer itself, or a new one; the given one is never changed."""


@dataclass(frozen=True)
class KeepBase:
    """The layer stays as it is."""

    def __call__(self, layer: Adaptable, op: LinOp, join: Join) -> Adaptable:
        """The layer itself."""
        return layer


@dataclass(frozen=True)
class SubtractInit:
    """The layer keeps what the op leaves, so that both together are the original weight."""

    def __call__(self, layer: Adaptable, op: LinOp, join: Join) -> Adaptable:
        """A new ordinary layer of its kind with the remainder as its matrix, in the original's dtype."""
        return cast("Adaptable", plain(layer, join.remainder(matrix(layer).detach(), op)))


class Sharing(ABC):
    """Where ops come from that may share tensors between sites."""

    @abstractmethod
    def begin(self) -> Callable[[str, Tensor], LinOp]:
        """The start, (site, weight) -> op, for the sites of one model, between which tensors are shared."""


@dataclass(frozen=True)
class Adapter:
    """An adapter as a value: where its op comes from, how the op joins the weight, what the base keeps."""

    op: Callable[[str, Tensor], LinOp]
    join: Join
    base: Base = KeepBase()


@dataclass(frozen=True)
class Folded:
    """A layer with one adapter joined to it, itself a layer: later adapters stand on it."""

    base: Layer
    op: LinOp
    join: Join

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the fold: (..., in) -> (..., out)."""
        return self.join.forward(self.base, self.op, x)

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), in float32 at least."""
        return self.join.weight(self.base.weight, self.op)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias


class Slot(nn.Module):
    """The op and the bound join of one adapter at one site."""

    op: LinOp
    join: Join

    def __init__(self, op: LinOp, join: Join) -> None:
        super().__init__()
        self.op = op
        self.join = join


class Adapted(nn.Module):
    """A frozen layer, seen as a matrix (m, n), and its named adapters.

    The given layer is not changed: `base` is its frozen double over the same storage. Its matrix is the one that
    `subspan.site` sees: that of a `Conv1D` is the transpose of its weight, that of a convolution (out, channels /
    groups * kernel), that of an embedding its table. What the host may read of a layer (`stride`, `padding_idx`)
    stands here too.

    The active adapters are folded in order: each joins the matrix that the earlier ones made. Forward equals that
    of a layer with the folded one, such as `F.linear(x, weight, bias)`, for every sequence of joins. Raises
    `NotAdaptable` for a layer of no such kind.

    An expert of a 3-D parameter becomes a `Slice` of it, and stands in a `Stacked` module that reads `weight`.

    >>> from subspan.adapt import Add
    >>> from subspan.ops import Dense
    >>> layer = Adapted(nn.Linear(1, 1, bias=False))
    >>> layer.add("twice", Dense(layer.base.weight.clone()), Add())
    >>> bool(layer.weight == 2 * layer.base.weight)
    True
    """

    site: str = ""
    """Where it stands in its model, for what it says when it fails; empty where nobody told."""

    def __init__(self, base: Adaptable | sites.Expert) -> None:
        super().__init__()
        require({"base": base})
        base = Slice(base.weight, trains=False) if isinstance(base, sites.Expert) else base
        self.base = frozen(base)
        # In a tuple, so that it is not a submodule: what stood here before a start changed it, for its hash.
        self._origin: tuple[Adaptable, ...] = ()
        self.adapters = nn.ModuleDict()
        self._active: tuple[str, ...] = ()
        self._use, self._direct = use_of(base), isinstance(base, Linear)
        self.out_features, self.in_features = shape(base)
        for name in facts(base).keys() - vars(self).keys() - set(dir(Adapted)):
            setattr(self, name, vars(base)[name])
        self.train(base.training)

    def add(self, name: str, op: LinOp, join: Join, base: Base = KeepBase()) -> None:
        """Put an adapter on top of the active ones and activate it; on an error nothing has changed.

        Which tensors of the op train is the op's own business. Raises ValueError for a name that is taken or
        cannot be a key, for an op of another shape, for a base policy that would change the layer under other
        adapters, for a gate on what is no called linear layer, and for a join that reads the weight on a gate.
        """
        self._check_name(name)
        if op.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"adapter {name!r}: the op is {op.shape}, the layer ({self.out_features}, {self.in_features})"
            )
        layer = base(self.base, op, join)
        if layer is not self.base and len(self.adapters):
            raise ValueError(
                f"adapter {name!r}: {base!r} changes the base under {', '.join(self.adapters)}; merge those first"
            )
        slot = self._bound(name, op, join, layer)
        if layer is not self.base:
            self._origin = (self.base,)
        self.base = frozen(layer)
        self.adapters[name] = slot
        self._active += (name,)

    def _bound(self, name: str, op: LinOp, join: Join, layer: Adaptable) -> Slot:
        """The op and the join bound to what it will stand on."""
        if isinstance(join, Routed) and (self._use is not None or isinstance(layer, Slice)):
            what = "an expert of a 3-D parameter is read" if self._use is None else "this looks up or convolves"
            raise ValueError(
                f"adapter {name!r}: {join!r} weighs experts by what a linear layer is called with, and {what}; "
                "leave such layers out, or take an adapter with one weight, such as lora"
            )
        below = self.folded(self.active) if layer is self.base else seen(layer)
        slot = Slot(op, join.at((self.ground if layer is self.base else below.weight).detach(), op))
        if any(isinstance(self.slot(one).join, Routed) for one in self.active):
            try:  # on nothing: whatever reads the weight below finds none
                with torch.no_grad():
                    slot.join.forward(below, op, matrix(self.base).new_zeros(1, self.in_features))
            except ValueError as error:
                raise ValueError(f"adapter {name!r}: {join!r} cannot stand on a gate: {error}") from error
        return slot.train(self.training)

    def _check_name(self, name: str) -> None:
        if name in self.adapters:
            raise ValueError(f"adapter {name!r} is already there; choose a name other than {list(self.adapters)}")
        if not name or "." in name or name in dir(self.adapters):
            raise ValueError(
                f"adapter name {name!r} cannot be a state-dict key (empty, dotted, or a name that torch uses); "
                f"choose another such as {name.replace('.', '_') + '_adapter'!r}"
            )

    def slot(self, name: str) -> Slot:
        """The op and bound join of one adapter; raises ValueError listing what exists."""
        if name not in self.adapters:
            raise ValueError(f"no adapter {name!r}; there are: {', '.join(self.adapters) or 'none at all'}")
        return cast("Slot", self.adapters[name])

    @property
    def origin(self) -> Adaptable:
        """The layer as it was before any adapter: the base, unless a start has changed that."""
        return self._origin[0] if self._origin else self.base

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters in use, in the order of folding; assign a tuple of names to change it."""
        return self._active

    @active.setter
    def active(self, names: Iterable[str]) -> None:
        names = tuple(names)
        for name in names:
            self.slot(name)
        if len(set(names)) < len(names):
            raise ValueError(f"active {names} lists an adapter twice; name each at most once")
        self._active = names

    def folded(self, names: Iterable[str]) -> Layer:
        """The base with the named adapters joined in order."""
        if self._use is not None:
            slots = [self.slot(name) for name in names]
            return Flat(self.base, self._use, tuple((slot.op, slot.join) for slot in slots))
        layer = cast("Layer", self.base) if self._direct else View(self.base)
        for name in names:
            slot = self.slot(name)
            layer = Folded(layer, slot.op, slot.join)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.folded(self._active)(x)

    @property
    def ground(self) -> Tensor:
        """The matrix (m, n) that a start looks at: folded of all active adapters but gates, which have none."""
        fixed = (name for name in self._active if not isinstance(self.slot(name).join, Routed))
        return self.folded(fixed).weight

    @property
    def matrix(self) -> Tensor:
        """The folded matrix (m, n), computed in float32 at least and cast once to the base's dtype.

        Raises ValueError, naming the site, when a gate is active.
        """
        w = matrix(self.base)
        try:
            with uncast(w.device.type):
                return shards.laid(self._whole().folded(self._active).weight.to(w.dtype), w)
        except ValueError as error:
            raise ValueError(f"{self.site}: {error}" if self.site else str(error)) from error

    def _whole(self) -> Adapted:
        """Itself; where parameters are cut over processes and other tensors are not, a double with all in one."""
        cut = [p for p in self.parameters() if shards.is_cut(p)]
        if not cut or next(self.buffers(), None) is None:
            return self
        parts = {id(p): nn.Parameter(shards.whole(p.detach()), requires_grad=False) for p in cut}
        return copy.deepcopy(self, memo=dict(parts))

    @property
    def weight(self) -> Tensor:
        """The folded matrix (m, n); that of a convolution as (out, channels / groups, *kernel)."""
        return self._use.window.kernels(self.matrix) if isinstance(self._use, Patches) else self.matrix

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, if it has one."""
        return sites.bias(self.base)

    def extra_repr(self) -> str:
        """The active adapters."""
        return f"active={self._active}"


def adapt(adapter: Adapter, name: str = "default") -> Callable[[str, nn.Module], nn.Module]:
    """The function that puts an adapter on a site: (site, module) -> module, what `edit` asks for.

    A layer becomes the base of a new `Adapted`. An `Adapted` is not changed: the result is a new one that shares
    its base and adapters, so that the old one can be put back. Ask once for each model: a start that shares
    tensors shares them between all sites of one such function. Raises `NotAdaptable`, which is a TypeError and a
    ValueError, for a module that `layers.refusal` refuses, and ValueError as `Adapted.add` does, naming the site.
    """

    start = adapter.op.begin() if isinstance(adapter.op, Sharing) else adapter.op

    def make(site: str, module: nn.Module) -> nn.Module:
        adapted = _restack(site, module)
        adapted.site = site
        op = start(site, adapted.ground.detach())
        try:
            adapted.add(name, op, adapter.join, adapter.base)
        except ValueError as error:
            raise ValueError(f"{site}: {error}") from error
        return adapted

    return make


def _restack(site: str, module: nn.Module) -> Adapted:
    if isinstance(module, Adapted):
        adapted = Adapted(module.base)
        adapted._origin = module._origin
        for name in module.adapters:
            adapted.adapters[name] = module.slot(name)
        adapted.active = module.active
        return adapted
    require({site: module})
    return Adapted(cast("Adaptable", module))


@torch.no_grad()
def merge(module: Adapted) -> nn.Module:
    """A new ordinary layer of the base's kind with the folded weight, in the base's dtype.

    The adapted one stays as it is. Raises TypeError for any other module.
    """
    if not isinstance(module, Adapted):
        raise TypeError(f"cannot merge {type(module).__name__}, only Adapted; nothing to fold")
    return plain(module.base, module.matrix)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The adapters' trained tensors with their names in the model; raises ValueError when there are none.

    Parameters outside adapters are never listed, whether they are frozen or not.
    """
    slots = [f"{name}." if name else "" for name, module in model.named_modules() if isinstance(module, Slot)]
    found = [(k, p) for k, p in model.named_parameters() if p.requires_grad and k.startswith(tuple(slots))]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has {len(slots)} adapters and none with a tensor that trains; adapt it first"
        )
    return found


def frozen(layer: Adaptable) -> Adaptable:
    """The layer itself when nothing in it trains, else a double whose frozen parameters share its storage."""
    if not any(p.requires_grad for p in layer.parameters()):
        return layer
    views = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in layer.parameters()}
    return copy.deepcopy(layer, memo=dict(views))


def facts(layer: nn.Module) -> dict[str, object]:
    """What a layer says about itself in plain values, such as its `stride` or `padding_idx`."""
    kinds = (int, float, str, tuple, type(None))
    return {key: v for key, v in vars(layer).items() if isinstance(v, kinds) and not key.startswith("_")}
