"""The shortcuts of a low-rank op u v: its sum with a layer in place, and row norms that never form the sum."""

from __future__ import annotations

import sys
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.linalg import wide
from subspan.shards import beside, is_cut, joined, local, rebuilt, spread, whole

PLAIN = (Tensor, nn.Parameter)
# A norm^2 below this share of (|w| + |scale| a)^2, a = sqrt(sum_l u_l^2 |v_l|^2), is computed again from the row
# itself: what is left has a relative error of at most about 1 / (2 SHARE) roundings of the products.
SHARE = 1 / 16


def bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else: no hook and no replaced forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def eager(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors outside torch.func: only then may a fresh result be changed in place."""
    if torch.compiler.is_compiling():
        return True
    # vmap and jvp refuse to write what carries a batch or a tangent into what does not.
    return not torch._C._are_functorch_transforms_active() and all(type(t) in PLAIN for t in tensors)


def sum_lowrank(y: Tensor, x: Tensor, u: Tensor, v: Tensor, scale: float, *, fresh: bool) -> Tensor:
    """y + scale * (x v^T) u^T with one product more than y; backward keeps x, x v^T, u and v.

        y (tokens, m), x (tokens, n), u (m, rank), v (rank, n)

    A `fresh` y, which nobody else looks at, is overwritten. The graph is cut at x v^T (tokens, rank), as in Zhu
    et al., 2025, section 4.
    """
    inner = F.linear(x, v)
    right = u.to(inner.dtype).t()
    y = y.to(inner.dtype)
    return y.addmm_(inner, right, alpha=scale) if fresh else torch.addmm(y, inner, right, alpha=scale)


def lengths(w: Tensor) -> Tensor:
    """|w| of every row of w (m, n), (m,); a half-precision matrix is widened some rows at a time."""
    if wide(w[:0]).dtype == w.dtype:
        norms: Tensor = torch.linalg.vector_norm(w, dim=-1)
        return norms
    return torch.cat([torch.linalg.vector_norm(part.float(), dim=-1) for part in _blocks(w)])


def _blocks(w: Tensor, entries: int = 2**20) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = w.split(max(1, entries // max(1, w.shape[1])))  # type: ignore[no-untyped-call]
    return parts


def uncast(device: str) -> AbstractContextManager[object]:
    """A block without autocast, on any kind of device."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def norms_lowrank(w: Tensor, u: Tensor, v: Tensor, scale: float, length: Tensor | None = None) -> Tensor:
    """|w + scale * u v| of every row, (m,), with O(m rank + rank^2) memory beside w and the factors.

        |w_j|^2 + 2 scale <u_j, w_j v^T> + scale^2 u_j (v v^T) u_j^T

    w (m, n), u (m, rank), v (rank, n); `length` is |w| of every row where that is known. Half precision comes
    in, float32 goes out. Only w v^T and |w| are computed in the precision of w, all the rest in float64. With
    E = |w_j| + |scale| sqrt(sum_l u_jl^2 |v_l|^2) the square is wrong by a few roundings of E^2; rows where it
    comes out below E^2 / 16, because the terms cancel, are added up and measured as they are, a few at a time:
    a float32 norm is right to 1e-6 of itself, also where the sum is small against its terms. (Scaling DoRA,
    2026, arXiv:2603.22276.)
    """
    if torch.compiler.is_compiling():
        measured: Tensor = _norms_lowrank_op(w.detach(), u.detach(), v.detach(), scale)
        return measured
    if is_cut(w) or is_cut(u) or is_cut(v):
        return _norms_cut(spread(w, u if is_cut(u) else v), u, v, scale)
    with torch.no_grad(), uncast(w.device.type):
        return _norms(w, wide(u), wide(v), scale, lengths(w) if length is None else length)


def _norms_cut(w: Tensor, u: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same for tensors cut over processes: each measures its own rows, for which only factors move."""
    w = joined(w, -1)
    part = norms_lowrank(local(w), beside(u, w, -2), whole(v), scale)
    return rebuilt(part, w, w.placements, (w.shape[0],)) if is_cut(w) else part


def _norms(w: Tensor, u: Tensor, v: Tensor, scale: float, length: Tensor) -> Tensor:
    # MPS has no float64, and gets the accuracy of the terms.
    exact = torch.float32 if w.device.type == "mps" else torch.float64
    v = v.to(torch.promote_types(length.dtype, u.dtype))
    both = v, v.to(exact)
    gram = both[1] @ both[1].t()
    rows = [part.shape[0] for part in _blocks(w)]
    parts = zip(w.split(rows), u.split(rows), length.split(rows), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([_norms_of(w, u, both, gram, scale, length) for w, u, length in parts])


def _norms_of(
    w: Tensor, u: Tensor, v: tuple[Tensor, Tensor], gram: Tensor, scale: float, length: Tensor
) -> Tensor:
    """The norms of some rows; v is given twice, the second in the better precision."""
    cross = w.to(v[0].dtype).mm(v[0].t()).to(gram.dtype)
    u, long = u.to(gram.dtype), length.to(gram.dtype)
    mixed = torch.addmm(cross, u, gram, beta=2 * scale, alpha=scale**2)
    total = torch.linalg.vecdot(mixed, u).add_(long.square())
    spread = long + abs(scale) * torch.mv(torch.mul(u, u, out=mixed), gram.diagonal()).sqrt_()
    norms: Tensor = total.clamp_min(0).sqrt().to(v[0].dtype)
    weak = total < SHARE * spread.square()
    return norms if w.is_meta or not bool(weak.any()) else _measured(norms, weak, w, u, v[1], scale)


def _measured(norms: Tensor, weak: Tensor, w: Tensor, u: Tensor, v: Tensor, scale: float) -> Tensor:
    """The norms, with those of the weak rows measured on the sum itself."""
    few = max(8, u.numel() // w.shape[1])
    for rows in _blocks(weak.nonzero(), few):
        at = rows.squeeze(-1)
        part = torch.addmm(w[at].to(u.dtype), u[at], v, alpha=scale)
        norms[at] = torch.linalg.vector_norm(part, dim=-1).to(norms.dtype)
    return norms


@torch.library.custom_op("subspan::norms_lowrank", mutates_args=())
def _norms_lowrank_op(w: Tensor, u: Tensor, v: Tensor, scale: float) -> Tensor:
    """What torch.compile sees: one opaque operation, because the rows to measure depend on values."""
    with uncast(w.device.type):
        return _norms(w, wide(u), wide(v), scale, lengths(w))


@_norms_lowrank_op.register_fake
def _(w: Tensor, u: Tensor, v: Tensor, scale: float) -> Tensor:
    return w.new_empty(w.shape[0], dtype=torch.promote_types(wide(w[:0]).dtype, wide(u[:0]).dtype))


@dataclass(frozen=True)
class Seen:
    """What the norms were computed from, and they themselves."""

    w: weakref.ref[Tensor]
    version: tuple[int, int]
    length: Tensor
    factors: tuple[Tensor, Tensor, Tensor] | None = None

    def knows(self, w: Tensor) -> bool:
        """Whether w is that very tensor, on the same memory, and no operation has written to it."""
        return self.w() is w and self.version == (w.data_ptr(), w._version)

    def norms(self, u: Tensor, v: Tensor) -> Tensor | None:
        """The norms that belong to these values of u and v."""
        if self.factors is None:
            return None
        old_u, old_v, norms = self.factors
        return norms if _equal(old_u, u) and _equal(old_v, v) else None


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.device == two.device and torch.equal(one, two)


class Norms:
    """`norms_lowrank` that remembers |w| of a weight that stays, and the norms of a sum that stays.

    |w| is used again for the very same parameter, unless an operation has written to it since (its version
    counter) or its memory has moved. A write through `w.data` is not seen: call `forget`, or switch the module's
    `train` mode, after one. Nothing is remembered in a process that cuts a model by `fully_shard`, which gathers
    weights into the same parameter without a trace. The norms are used again only when u and v are equal to what
    they were, entry by entry, as they are between the micro-batches of a step, or when a checkpoint computes a
    layer twice. A copy and a pickle begin with nothing remembered.
    """

    def __init__(self) -> None:
        self._seen: Seen | None = None

    def __reduce__(self) -> tuple[type[Norms], tuple[()]]:
        return Norms, ()

    def forget(self) -> None:
        """Remember nothing."""
        self._seen = None

    def __call__(self, w: Tensor, u: Tensor, v: Tensor, scale: float) -> Tensor:
        """|w + scale * u v| of every row, (m,)."""
        if not stays(w):
            return norms_lowrank(w, u, v, scale)
        seen = self._seen
        if seen is None or not seen.knows(w):
            with torch.no_grad():
                seen = Seen(weakref.ref(w), (w.data_ptr(), w._version), lengths(w))
        known = seen.norms(u, v)
        if known is None:
            known = norms_lowrank(w, u, v, scale, seen.length)
            seen = Seen(seen.w, seen.version, seen.length, (u.detach().clone(), v.detach().clone(), known))
        self._seen = seen
        return known


def stays(w: Tensor) -> bool:
    """Whether w is an ordinary parameter whose changes can be noticed."""
    return (
        not torch.compiler.is_compiling()
        and type(w) is nn.Parameter
        and not (w.is_meta or w.is_inference() or torch._C._are_functorch_transforms_active())
        and not gathers()
    )


def gathers() -> bool:
    """Whether `fully_shard` (FSDP2) was used in this process.

    It writes gathered weights with the version counters kept, so a changed part shows in nothing but the numbers.
    """
    loaded: Any = sys.modules.get("torch.distributed.fsdp")
    return loaded is not None and _mixed(loaded.FSDPModule)


def _mixed(kind: type) -> bool:
    """Whether some module class derives from this one, as `fully_shard` makes them."""
    children: list[type] = kind.__subclasses__()
    return any(issubclass(child, nn.Module) or _mixed(child) for child in children)
