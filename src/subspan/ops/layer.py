"""The layer that holds an op where an `nn.Linear` stood."""

from __future__ import annotations

from torch import Tensor, nn

from subspan.ops.base import LinOp, hold


class OpLinear(nn.Module):
    """y = op(x) + bias: a compressed layer."""

    op: LinOp
    bias: nn.Parameter | None

    def __init__(self, op: LinOp, bias: Tensor | None = None) -> None:
        super().__init__()
        self.op = op
        self.bias = None if bias is None else hold(bias)
        self.out_features, self.in_features = op.shape

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(x)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in), materialised on each access."""
        return self.op.dense()
