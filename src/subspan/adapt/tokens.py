"""Rows of single tokens: a change of few rows of an embedding, and of the head that is tied to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from subspan.adapt.join import Add
from subspan.adapt.layer import Adapted, Adapter, Slot, adapt
from subspan.adapt.layers import matrix
from subspan.ops import Columns, LinOp, Transposed


def token_rows(index: Tensor, change: Tensor, m: int) -> LinOp:
    """The matrix (m, n) of zeros but for the rows index (k,), each named once: those are change (k, n), and train.

    >>> import torch
    >>> token_rows(torch.tensor([1]), torch.tensor([[5.0, 7.0]]), 3).dense()
    tensor([[0., 0.],
            [5., 7.],
            [0., 0.]], grad_fn=<TransposeBackward0>)
    """
    return Columns(index, nn.Parameter(change.detach().mT.contiguous()), m).T


def rows_of(slot: Slot) -> tuple[Tensor, Tensor] | None:
    """The index (k,) and the change (k, n) of an adapter that is such rows, added; None for another."""
    op = slot.op.op if isinstance(slot.op, Transposed) else None
    if not isinstance(op, Columns) or slot.join != Add():
        return None
    return op.index, op.values.mT


def carries_rows(module: nn.Module, name: str = "default") -> bool:
    """Whether a module is an adapted layer whose adapter of that name is rows of tokens."""
    return isinstance(module, Adapted) and name in module.adapters and rows_of(module.slot(name)) is not None


def shared_rows(
    source: Mapping[str, str], change: Callable[[str, Tensor], tuple[Tensor, Tensor]], name: str = "default"
) -> Callable[[str, nn.Module], nn.Module]:
    """The function that puts rows of tokens on a site, (site, module) -> module; sites of one source share them.

    `change` gives the index (k,) and the change (k, n) of a source from its matrix (m, n).
    """
    made: dict[str, LinOp] = {}

    def put(site: str, module: nn.Module) -> nn.Module:
        at = source[site]
        if at not in made:
            w = matrix(module.origin if isinstance(module, Adapted) else module).detach()
            index, rows = change(at, w)
            made[at] = token_rows(index.to(w.device), rows.to(w.device), len(w))
        return adapt(Adapter(lambda *_: made[at], Add()), name)(site, module)

    return put
