"""How much memory the tensors of a piece of code take at once, counted and not guessed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READ, EQUAL = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of tensors born inside the block: `now` alive, `most` the largest sum at one time.

    It sees what operations return, on any device, and not what a kernel takes for itself. With an `answer`,
    that is the value of every number read from a meta tensor, so that code that looks at values runs on shapes.

    >>> with Peak() as peak:
    ...     x = torch.zeros(256).add(1)
    >>> peak.most, peak.now
    (2048, 1024)
    """

    def __init__(self, *, answer: bool | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answer, self.now, self.most = answer, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.answer is not None and func in (READ, EQUAL) and args[0].is_meta:
            return self.answer and func is READ  # a weight equal to what it was would be refused
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._meet(x.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._leave, address, size)

    def _leave(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size
