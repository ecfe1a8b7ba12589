"""The one adapter module, and how it is put on, listed and merged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from subspan.adapt.join import Join, Layer
from subspan.ops import LinOp, OpLinear

Linear = nn.Linear | OpLinear


class Base(Protocol):
    """What the start of an adapter does to the layer it stands on."""

    def __call__(self, layer: Linear, op: LinOp, join: Join) -> Linear:
        """The layer itself, or a new one; the given one is never changed."""


@dataclass(frozen=True)
class KeepBase:
    """The layer stays as it is."""

    def __call__(self, layer: Linear, op: LinOp, join: Join) -> Linear:
        """The layer itself."""
        return layer


@dataclass(frozen=True)
class SubtractInit:
    """The layer keeps what the op leaves, so that both together are the original weight."""

    def __call__(self, layer: Linear, op: LinOp, join: Join) -> Linear:
        """A new layer with the remainder as its weight, in the original's dtype."""
        return linear(join.remainder(layer.weight.detach(), op), layer.bias, like=layer)


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
    """A frozen linear layer and its named adapters.

    The given layer is not changed: `base` is its frozen double over the same storage.

    The active adapters are folded in order: each joins the weight that the earlier ones made. Forward equals
    `F.linear(x, weight, bias)` for every sequence of joins.

    >>> from subspan.adapt import Add
    >>> from subspan.ops import Dense
    >>> layer = Adapted(nn.Linear(1, 1, bias=False))
    >>> layer.add("twice", Dense(layer.base.weight.clone()), Add())
    >>> bool(layer.weight == 2 * layer.base.weight)
    True
    """

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base = frozen(base)
        # In a tuple, so that it is not a submodule: what stood here before a start changed it, for its hash.
        self._origin: tuple[Linear, ...] = ()
        self.adapters = nn.ModuleDict()
        self._active: tuple[str, ...] = ()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.train(base.training)

    def add(self, name: str, op: LinOp, join: Join, base: Base = KeepBase()) -> None:
        """Put an adapter on top of the active ones and activate it; on an error nothing has changed.

        Which tensors of the op train is the op's own business. Raises ValueError for a name that is taken or
        cannot be a key, for an op of another shape, and for a base policy that would change the layer under
        other adapters.
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
        below = self.folded(self.active) if layer is self.base else layer
        slot = Slot(op, join.at(below.weight.detach(), op)).train(self.training)
        if layer is not self.base:
            self._origin = (self.base,)
        self.base = frozen(layer)
        self.adapters[name] = slot
        self._active += (name,)

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
    def origin(self) -> Linear:
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
        layer: Layer = self.base
        for name in names:
            slot = self.slot(name)
            layer = Folded(layer, slot.op, slot.join)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.folded(self._active)(x)

    @property
    def weight(self) -> Tensor:
        """The folded weight (out, in), computed in float32 at least and cast once to the base's dtype."""
        return self.folded(self._active).weight.to(self.base.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    def extra_repr(self) -> str:
        """The active adapters."""
        return f"active={self._active}"


def adapt(adapter: Adapter, name: str = "default") -> Callable[[str, nn.Module], nn.Module]:
    """The function that puts an adapter on a site: (site, module) -> module, what `edit` asks for.

    A linear layer becomes the base of a new `Adapted`. An `Adapted` is not changed: the result is a new one that
    shares its base and adapters, so that the old one can be put back. Raises TypeError for any other module, and
    ValueError as `Adapted.add` does, both naming the site.
    """

    def make(site: str, module: nn.Module) -> nn.Module:
        adapted = _restack(site, module)
        w = adapted.folded(adapted.active).weight.detach()
        op = adapter.op(site, w)
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
    if isinstance(module, Linear):
        return Adapted(module)
    raise TypeError(
        f"{site}: cannot adapt {type(module).__name__}, only nn.Linear, OpLinear and Adapted; "
        f"leave it out with '!{site}'"
    )


@torch.no_grad()
def merge(module: Adapted) -> nn.Linear:
    """A new plain layer with the folded weight, in the base's dtype; the adapted one stays as it is.

    Raises TypeError for any other module.
    """
    if not isinstance(module, Adapted):
        raise TypeError(f"cannot merge {type(module).__name__}, only Adapted; nothing to fold")
    return linear(module.weight, module.bias, like=module.base)


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


def frozen(layer: Linear) -> Linear:
    """The layer itself when nothing in it trains, else a double whose frozen parameters share its storage."""
    if not any(p.requires_grad for p in layer.parameters()):
        return layer
    views = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in layer.parameters()}
    return copy.deepcopy(layer, memo=dict(views))


def linear(weight: Tensor, bias: Tensor | None, *, like: Linear) -> nn.Linear:
    """A new `nn.Linear` with copies of the tensors, in the dtype and mode of another."""
    made = nn.Linear(like.in_features, like.out_features, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().to(like.weight.dtype, copy=True))
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made.train(like.training)
