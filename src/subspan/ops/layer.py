"""The layers that hold an op where a layer with a weight stood."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from subspan.ops.base import LinOp, hold
from subspan.ops.basic import LowRank


class OpLayer(nn.Module):
    """A layer whose weight, seen as a matrix, is an op: what stands at a compressed site."""

    op: LinOp
    bias: nn.Parameter | None

    def __init__(self, op: LinOp, bias: Tensor | None = None) -> None:
        super().__init__()
        self.op = op
        self.bias = None if bias is None else hold(bias)

    def plain(self, weight: Tensor) -> nn.Module:
        """The ordinary layer of this matrix (m, n) and a copy of the bias, to take this one's place."""
        raise TypeError(f"{type(self).__name__} says not which layer it stands for; derive from OpLinear")


class OpLinear(OpLayer):
    """y = op(x) + bias: a compressed linear layer.

    In eval mode a low-rank op lies in memory as decoding reads it fastest, in train mode as optimizers and FSDP
    want it: call `train()` before `fully_shard`, which refuses the other way.
    """

    def __init__(self, op: LinOp, bias: Tensor | None = None) -> None:
        super().__init__(op, bias)
        self.out_features, self.in_features = op.shape

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and lay out a low-rank op for it."""
        if isinstance(self.op, LowRank):
            self.op.lay(by_columns=not mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(x)
        # Under autocast y is narrower than the bias, and would be widened by it.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), materialised on each access."""
        return self.op.dense()

    def plain(self, weight: Tensor) -> nn.Module:
        """An `nn.Linear`."""
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        return filled(made, weight, self.bias)


class OpEmbedding(OpLayer):
    """Rows of an op (vocabulary, width) by their numbers: u[ids] v for low rank, a compressed embedding.

    >>> import torch
    >>> OpEmbedding(LowRank(torch.ones(3, 1), torch.ones(1, 2)))(torch.tensor([2]))
    tensor([[1., 1.]])
    """

    def __init__(self, op: LinOp, *, padding_idx: int | None = None) -> None:
        super().__init__(op)
        self.num_embeddings, self.embedding_dim = op.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(self.op, LowRank):
            return F.linear(F.embedding(ids, self.op.u, self.padding_idx), self.op.v.mT)
        return F.embedding(ids, self.op.dense(), self.padding_idx)

    @property
    def weight(self) -> Tensor:
        """The dense weight (vocabulary, width), materialised on each access."""
        return self.op.dense()

    def plain(self, weight: Tensor) -> nn.Module:
        """An `nn.Embedding`."""
        made = nn.Embedding(*self.op.shape, padding_idx=self.padding_idx, device="meta")
        return filled(made, weight, None)


_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True, slots=True)
class Window:
    """Where a convolution looks: its matrix multiplies the patches of the input, all channels of each.

    In groups, the matrix is (m, channels / groups * kernel): each part of its rows multiplies the patches of its
    own part of the channels.
    """

    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    mode: str
    groups: int = 1

    @staticmethod
    def of(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Window:
        """The window of an ordinary convolution."""
        return Window(
            conv.in_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode,
            conv.groups,
        )  # fmt: skip

    @property
    def sides(self) -> list[int]:
        """What is added at the two ends of each axis, the last axis first, as `F.pad` wants it."""
        if not isinstance(self.padding, str):
            return [side for pad in reversed(self.padding) for side in (pad, pad)]
        spans = [d * (k - 1) * (self.padding == "same") for k, d in zip(self.kernel, self.dilation, strict=True)]
        return [side for span in reversed(spans) for side in (span // 2, span - span // 2)]

    def padded(self, x: Tensor) -> Tensor:
        """The input with its margins."""
        return F.pad(x, self.sides, mode="constant" if self.mode == "zeros" else self.mode)

    def rows(self, x: Tensor) -> Tensor:
        """Every patch of x (batch, channels, ...) as a row: (patches, channels * kernel), whatever the groups."""
        x, axes = self.padded(x if x.ndim == len(self.kernel) + 2 else x[None]), len(self.kernel)
        for axis, (k, step, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + axis, d * (k - 1) + 1, step)[..., ::d]
        return x.movedim(1, 1 + axes).reshape(-1, self.channels * math.prod(self.kernel))

    def kernels(self, w: Tensor) -> Tensor:
        """A matrix (m, channels / groups * kernel) as a convolution keeps it."""
        return w.reshape(w.shape[0], self.channels // self.groups, *self.kernel)

    def convolve(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution with the matrix w (m, channels / groups * kernel)."""
        kernel = self.kernels(w)
        inside: str | tuple[int, ...] = self.padding
        if self.mode != "zeros":
            x, inside = self.padded(x), (0,) * len(self.kernel)
        return _CONVOLVE[len(self.kernel)](x, kernel, bias, self.stride, inside, self.dilation, self.groups)

    def through(self, x: Tensor, op: LinOp, bias: Tensor | None = None) -> Tensor:
        """The convolution with an op for its matrix: if low-rank, a narrow one and then a 1 x 1.

        In groups, each has its own narrow one with the same v, and its own rows of u.
        """
        if not isinstance(op, LowRank):
            return self.convolve(x, op.dense(), bias)
        inner = self.convolve(x, op.v if self.groups == 1 else op.v.repeat(self.groups, 1))
        axes = len(self.kernel)
        return _CONVOLVE[axes](inner, op.u.reshape(*op.u.shape, *(1,) * axes), bias, groups=self.groups)


class OpConv(OpLayer):
    """A convolution whose matrix (out, channels * kernel) is an op: if low-rank, a narrow one and then a 1 x 1."""

    def __init__(self, op: LinOp, bias: Tensor | None = None, *, window: Window) -> None:
        super().__init__(op, bias)
        self.window = window
        self.out_channels, self.in_channels = op.shape[0], window.channels

    def forward(self, x: Tensor) -> Tensor:
        return self.window.through(x, self.op, self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, channels / groups, *kernel), materialised on each access."""
        return self.window.kernels(self.op.dense())

    def plain(self, weight: Tensor) -> nn.Module:
        """The ordinary convolution."""
        w = self.window
        kind: Any = _CONVOLUTION[len(w.kernel)]
        made = kind(
            w.channels, self.out_channels, w.kernel, w.stride, w.padding, w.dilation, w.groups,
            bias=self.bias is not None, padding_mode=w.mode, device="meta",
        )  # fmt: skip
        return filled(made, weight.reshape(made.weight.shape), self.bias)


def filled(made: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with this weight and a copy of this bias as its parameters."""
    made.register_parameter("weight", nn.Parameter(weight.detach().contiguous()))
    if bias is not None:
        made.register_parameter("bias", nn.Parameter(bias.detach().clone()))
    return made
