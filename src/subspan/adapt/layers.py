"""What an adapter can stand on: for each kind of layer its matrix, and what an adapted one does with its input.

A layer that multiplies the last axis of its input (`nn.Linear`, transformers' `Conv1D`, `OpLinear`) is given to
joins as it is, or as a `View`. A convolution multiplies patches, and a table is looked up: these become `Flat`.
One expert of a 3-D parameter is never called: its adapted matrix is read by the module that keeps them all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspan import site
from subspan.adapt.fast import uncast
from subspan.adapt.join import Add, Join, Layer
from subspan.ops import Columns, LinOp, OpConv, OpEmbedding, OpLayer, OpLinear, Transposed, factors
from subspan.ops.layer import Window

Linear = nn.Linear | OpLinear
Adaptable = Linear | OpConv | OpEmbedding | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding
KNOWN = "nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, their compressed forms, and Adapted"


class NotAdaptable(TypeError, ValueError):
    """A layer that no adapter can stand on: of the wrong type, and a wrong choice of whoever selected it."""


def refusal(module: nn.Module) -> str:
    """Why no adapter can stand on a layer; empty when one can.

    >>> refusal(nn.Conv2d(4, 4, 3, groups=2)), refusal(nn.Embedding(4, 2, max_norm=1.0))
    ('', 'it rescales its rows to max_norm as it looks them up')
    """
    if isinstance(module, OpLinear | OpConv | OpEmbedding):
        return ""
    kind = site.kind_of(module)
    if kind is None:
        return f"it is none of {KNOWN}, or has a forward of its own"
    # A convolution in groups is several matrices to a compression, and one tensor to change for an adapter.
    why = "" if isinstance(module, site.CONVOLUTIONS) else kind.refusal(module)
    return f"it {why}" if why else ""


def remedy(name: str, module: nn.Module) -> str:
    """The pattern that leaves a site out, and with an expert all of its fellows.

    >>> remedy("layers.0.norm", nn.LayerNorm(2))
    '!layers.0.norm'
    """
    if isinstance(module, site.Expert):
        place = name.removesuffix(f"{module.index}.{module.key}").rstrip(".").rpartition(".")[2]
        return f"!*{place}.*"
    return f"!{name}"


def require(found: Mapping[str, nn.Module]) -> None:
    """Raise `NotAdaptable` for the first site that no adapter can stand on, with the remedy."""
    for name, module in found.items():
        if why := refusal(module):
            raise NotAdaptable(
                f"{name}: cannot adapt {type(module).__name__}: {why}; leave it out with '{remedy(name, module)}'"
            )


def shape(layer: nn.Module) -> tuple[int, int]:
    """The shape (m, n) of a layer's matrix, which is not formed."""
    if isinstance(layer, OpLayer):
        return layer.op.shape
    m, n = site.matrix(layer).shape
    return m, n


def matrix(layer: nn.Module) -> Tensor:
    """A layer's matrix (m, n): as it lies in its parameter, or formed from its op.

    >>> matrix(nn.Conv2d(4, 6, 3, groups=2)).shape
    torch.Size([6, 18])
    """
    return layer.op.dense() if isinstance(layer, OpLayer) else site.matrix(layer)


def plain(layer: nn.Module, w: Tensor) -> nn.Module:
    """A new ordinary layer of the same kind, bias and mode with a copy of w (m, n), in the old matrix's dtype.

    All its parameters train.
    """
    if isinstance(layer, OpLayer):
        return layer.plain(w.detach().to(layer.op.dense().dtype, copy=True)).train(layer.training)
    if isinstance(layer, nn.Linear):
        return linear(w, layer.bias, like=layer)
    kind = site.of(layer)
    old = kind.parameter(layer)
    kept = kind.kept(layer, w.detach().to(old.dtype)).clone(memory_format=torch.contiguous_format)
    made = copy.deepcopy(layer, {id(old): nn.Parameter(kept)})
    return made.requires_grad_(True)


def linear(weight: Tensor, bias: Tensor | None, *, like: Linear) -> nn.Linear:
    """A new `nn.Linear` with copies of the tensors, in the dtype and mode of another."""
    made = nn.Linear(like.in_features, like.out_features, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().to(like.weight.dtype, copy=True))
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made.train(like.training)


@dataclass(frozen=True)
class View:
    """A layer that keeps its matrix in another order, as joins see it."""

    layer: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., n) -> (..., m)."""
        y: Tensor = self.layer(x)
        return y

    @property
    def weight(self) -> Tensor:
        """The matrix (m, n)."""
        return matrix(self.layer)

    @property
    def bias(self) -> Tensor | None:
        """The bias (m,), if any."""
        return self.layer._parameters.get("bias")


@dataclass(frozen=True)
class Table:
    """How an embedding uses its matrix (vocabulary, width): it looks rows up; that of padding gets no gradient."""

    padding: int | None = None
    by_frequency: bool = False

    def matrix(self, ids: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows of w (vocabulary, width): (...) -> (..., width)."""
        return F.embedding(ids, w, self.padding, scale_grad_by_freq=self.by_frequency)

    def op(self, ids: Tensor, op: LinOp) -> Tensor:
        """Rows of an op; of a low-rank one, and of one with few rows, without its matrix."""
        pair = None if self.by_frequency else factors(op)
        if isinstance(op, Transposed) and isinstance(op.op, Columns) and not self.by_frequency:
            rows = F.linear((ids.unsqueeze(-1) == op.op.index).to(op.op.values.dtype), op.op.values)
        elif pair is not None:
            rows = F.linear(F.embedding(ids, pair[0]), pair[1].mT)
        else:
            return self.matrix(ids, op.dense())
        if self.padding is None:
            return rows
        return torch.where((ids == self.padding).unsqueeze(-1), rows.detach(), rows)


@dataclass(frozen=True)
class Patches:
    """How a convolution uses its matrix (out, channels / groups * kernel): on every patch of its input."""

    window: Window

    def matrix(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution with w and a bias, in the precision of w."""
        return self.window.convolve(x.to(w.dtype), w, None if bias is None else bias.to(w.dtype))

    def op(self, x: Tensor, op: LinOp) -> Tensor:
        """The convolution with an op, in the op's own precision."""
        own = next((p.dtype for p in op.parameters() if p.is_floating_point()), x.dtype)
        return self.window.through(x.to(own), op)


Use = Table | Patches


def use_of(layer: nn.Module) -> Use | None:
    """How a layer uses its matrix; None for one that multiplies the last axis of its input with it."""
    if isinstance(layer, OpConv):
        return Patches(layer.window)
    if isinstance(layer, site.CONVOLUTIONS):
        return Patches(Window.of(layer))
    if isinstance(layer, OpEmbedding):
        return Table(layer.padding_idx)
    if isinstance(layer, nn.Embedding):
        return Table(layer.padding_idx, layer.scale_grad_by_freq)
    return None


@dataclass(frozen=True)
class Flat:
    """A convolution or a table with adapters joined to its matrix, in order.

    Where all joins are sums, so are the outputs: the layer's own and each op's. Any other join forms the joined
    matrix (m, n), in float32 at least, in each call; its gradient goes through it.
    """

    layer: nn.Module
    use: Use
    joined: tuple[tuple[LinOp, Join], ...]

    def __call__(self, x: Tensor) -> Tensor:
        """What a layer of that matrix makes of an input of the layer's own kind."""
        sums = [(op, join.scale) for op, join in self.joined if type(join) is Add]
        if len(sums) < len(self.joined):
            w = matrix(self.layer)
            joined = self.join(w)
            made = self.use.matrix(x, joined, self.bias)
            return made if joined.dtype == w.dtype else made.to(w.dtype)
        y: Tensor = self.layer(x)
        for op, scale in sums:
            y = torch.add(y, self.use.op(x, op).to(y.dtype), alpha=scale)
        return y

    @property
    def weight(self) -> Tensor:
        """The joined matrix (m, n)."""
        return self.join(matrix(self.layer))

    def join(self, w: Tensor) -> Tensor:
        """w (m, n) with the ops joined to it, without autocast."""
        with uncast(w.device.type):
            for op, join in self.joined:
                w = join.weight(w, op)
        return w

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        return self.layer._parameters.get("bias")


def seen(layer: nn.Module) -> Layer:
    """A layer as something with a matrix (m, n) and a bias."""
    return cast("Layer", layer) if isinstance(layer, Linear) else View(layer)
