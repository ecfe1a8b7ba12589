"""Experts whose weights were slices of 3-D parameters, and are ops or adapted layers now."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from subspan.ops.layer import OpLayer


class Filling(Protocol):
    """What stands where one expert's slice was: a module, such as an `OpLinear`, that knows its dense matrix."""

    @property
    def weight(self) -> Tensor:
        """The matrix (m, n)."""


class Slice(nn.Linear):
    """One expert's matrix (m, n), in the memory of the 3-D parameter that it is a slice of, as a linear layer.

    Nobody calls it: its `Stacked` owner reads the weight. It trains if it is told to.

    >>> Slice(torch.ones(2, 3), trains=False)
    Slice(in_features=3, out_features=2, bias=False)
    """

    def __init__(self, w: Tensor, *, trains: bool) -> None:
        super().__init__(w.shape[1], w.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(w.detach(), requires_grad=trains)


class Stacked:
    """Mixed into the class of a module that lost 3-D parameters: it finds their matrices under the old names.

    `self.up[i]` is the matrix of the submodule `self.<i>.up`, so that `experts.3.up.op.u` names a factor. The
    module's own forward, whatever it does, then works as before. With ops that saves memory at rest, and on disk;
    the matrices are formed once in each call, and each time they are asked for outside of one. In training,
    autograd keeps those of a call for its backward pass: checkpoint layers where that copy of weights is too much.
    """

    stacks: tuple[str, ...]
    _formed: dict[str, Tensor] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward makes of it."""
        self._formed = {}
        try:
            return cast(Any, super()).forward(*args, **kwargs)
        finally:
            self._formed = None

    def stack(self, key: str) -> Tensor:
        """The 3-D tensor that stood under this name, formed anew outside of `forward`."""
        if self._formed is None:
            return form(cast(nn.Module, self), key)
        if key not in self._formed:
            self._formed[key] = form(cast(nn.Module, self), key)
        return self._formed[key]


def form(owner: nn.Module, key: str) -> Tensor:
    """The experts' matrices, stacked as the owner keeps them: (experts, out, in), or transposed."""
    slices = torch.stack([cast(Filling, layer).weight for layer in expert_layers(owner, key)])
    return slices.mT.contiguous() if transposed(owner) else slices


def transposed(owner: nn.Module) -> bool:
    """Whether a module says that its 3-D parameters are (experts, in, out)."""
    return vars(owner).get("is_transposed", False) is True


def expert_layers(owner: nn.Module, key: str) -> list[OpLayer]:
    """The layers of the experts that a stack is made of, in order."""
    experts = [child for name, child in owner.named_children() if name.isdigit()]
    return [cast(OpLayer, child.get_submodule(key)) for child in experts]


def stacked(owner: nn.Module, layers: Mapping[str, Sequence[nn.Module]]) -> nn.Module:
    """A double of a module that lost some 3-D parameters, given by name, one `Filling` for each of their experts.

    All else is shared with the given module, which is not changed.
    """
    held = cast(Stacked, owner).stacks if isinstance(owner, Stacked) else ()
    base = type(owner).__mro__[2] if isinstance(owner, Stacked) else type(owner)
    new = _double(owner, _kind(base, tuple(sorted((*held, *layers)))))
    for key, ops in layers.items():
        del new._parameters[key]
        for i, layer in enumerate(ops):
            before = new._modules.get(str(i))
            every = {**(dict(before.named_children()) if before else {}), key: layer}
            # In one order, whatever order they came in.
            new._modules[str(i)] = nn.ModuleDict(dict(sorted(every.items())))
    return new


def unstacked(owner: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A double of a stacked module with ordinary 3-D parameters again, given by name."""
    new = _double(owner, type(owner).__mro__[2])
    for name in [name for name in new._modules if name.isdigit()]:
        del new._modules[name]
    for key, tensor in tensors.items():
        new.register_parameter(key, nn.Parameter(tensor.detach().contiguous()))
    return new


def whole(owner: nn.Module) -> nn.Module:
    """A double of a stacked module with its 3-D parameters again, if nothing but linear layers is left of them.

    With an op or an adapter on any expert, it is the module itself.
    """
    if not isinstance(owner, Stacked):
        return owner
    plain = all(isinstance(layer, nn.Linear) for key in owner.stacks for layer in expert_layers(owner, key))
    return unstacked(owner, {key: form(owner, key) for key in owner.stacks}) if plain else owner


def _double(owner: nn.Module, kind: type[nn.Module]) -> nn.Module:
    new = copy.copy(owner)
    for name, value in vars(owner).items():
        if isinstance(value, dict):
            vars(new)[name] = copy.copy(value)
    new.__class__ = kind
    return new


@cache
def _kind(base: type[nn.Module], keys: tuple[str, ...]) -> type[nn.Module]:
    """The class of a module that lost these parameters."""

    def product(key: str) -> property:
        return property(lambda self: self.stack(key))

    body: dict[str, Any] = {key: product(key) for key in keys}
    return type(f"Stacked{base.__name__}", (Stacked, base), {"stacks": keys, "__module__": __name__, **body})
