"""Mixtures of low-rank experts: a gate weighs them anew for every input."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from subspan.adapt.fast import uncast
from subspan.adapt.init import draw, trained
from subspan.adapt.join import Layer
from subspan.linalg import check_rank, wide
from subspan.ops import LinOp, LowRank, factors
from subspan.ops.base import hold


@dataclass(frozen=True)
class ZeroExperts:
    """sum over i of u_i v_i = 0: `experts` pairs as `ZeroLowRank` has them, side by side in one `LowRank`.

    Expert i has the columns i * rank, ..., i * rank + rank - 1 of u (m, experts * rank), and these rows of v. All
    train; together they may have more than min(m, n), as a gate keeps them apart.
    """

    rank: int
    experts: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError(f"ZeroExperts: experts {self.experts} must be at least 1")

    def __call__(self, site: str, w: Tensor) -> LowRank:
        """The op for one site and weight w (m, n); raises ValueError for a rank outside 1..min(m, n)."""
        m, n = w.shape
        check_rank(self.rank, m, n, site)
        like, count = wide(w[:0]), self.experts * self.rank
        v = torch.rand(count, n, generator=draw(site, self.seed)).to(like)
        return trained(like.new_zeros(m, count), (2 * v - 1) / n**0.5)


class Routed(nn.Module):
    """The layer and a mixture of low-rank experts, of which a trained gate chooses `top` for each input.

        base(x) + scale * sum_i g_i u_i v_i x,   g = softmax of the `top` largest of router x, 0 for all others

    The op is a `LowRank` whose inner size is cut evenly into experts, as by `ZeroExperts`; router is (experts, n).
    g equals softmax, then the mask, then the division by what is left.

    The factors get the gradient of the mixture with g_i^power in place of g_i: both factors' steps carry it, so
    with power 1, the plain mixture, the product moves by g_i^2 (Sun et al., 2025). The router and the input get
    the gradient of the mixture itself.

    There is no one weight for all inputs, so `weight` and `remainder` raise ValueError. `at` draws the router,
    uniform on +-1/sqrt(n), by the seed and by the signs of v, so that sites differ; before that, using the join
    raises ValueError.
    """

    def __init__(
        self,
        scale: float = 1.0,
        experts: int = 4,
        top: int = 2,
        power: float = 0.5,
        seed: int = 0,
        router: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top <= experts:
            raise ValueError(f"Routed: top {top} is outside 1..{experts}, the experts that a gate can choose from")
        if not 0 < power <= 1:
            raise ValueError(f"Routed: power {power} is outside 0..1; use 0.5, or 1.0 for a plain mixture")
        self.scale, self.experts, self.top = float(scale), experts, top
        self.power, self.seed = float(power), seed
        self.router = None if router is None else hold(router)

    def extra_repr(self) -> str:
        """The settings."""
        settings = f"scale={self.scale}, experts={self.experts}, top={self.top}"
        return f"{settings}, power={self.power}, seed={self.seed}"

    def at(self, w: Tensor, op: LinOp) -> Routed:
        """A new join with a trainable router for the inputs of w (m, n); one that has its router stays itself.

        Raises ValueError for an op that is no `LowRank` of so many experts.
        """
        _, v = self.pair(op)
        if self.router is not None:
            return self
        n, like = w.shape[-1], wide(w.detach()[:0])
        # Signs are the same in every precision; of numbers that are not there, on meta, none.
        signs = b"" if v.is_meta else (v.detach() > 0).cpu().numpy().tobytes()
        source = torch.Generator().manual_seed(zlib.crc32(signs) ^ self.seed)
        router = (2 * torch.rand(self.experts, n, generator=source).to(like) - 1) / n**0.5
        return Routed(self.scale, self.experts, self.top, self.power, self.seed, nn.Parameter(router))

    def pair(self, op: LinOp) -> tuple[Tensor, Tensor]:
        """The factors u and v of all experts; raises ValueError for an op that has no such factors."""
        found = factors(op)
        if found is None or found[1].shape[0] % self.experts:
            size = "" if found is None else f" of inner size {found[1].shape[0]}"
            raise ValueError(
                f"{self!r} weighs {self.experts} experts, and {type(op).__name__}{size} is not cut into so many; "
                f"start it with ZeroExperts(rank, {self.experts})"
            )
        return found

    def gates(self, x: Tensor) -> Tensor:
        """The weight of each expert for each input, (..., n) -> (..., experts), in the precision of the router."""
        if self.router is None:
            raise ValueError(f"{self!r} has no router yet; bind it to a weight with at(w, op)")
        with uncast(x.device.type):
            logits = F.linear(x.to(self.router.dtype), self.router)
            values, chosen = logits.topk(self.top, dim=-1)
            return torch.zeros_like(logits).scatter(-1, chosen, torch.softmax(values, -1))

    def weight(self, w: Tensor, op: LinOp) -> Tensor:
        """Raises ValueError, as there is none."""
        raise self._weightless()

    def remainder(self, w: Tensor, op: LinOp) -> Tensor:
        """Raises ValueError, as there is none."""
        raise self._weightless()

    def _weightless(self) -> ValueError:
        return ValueError(
            f"{self!r} weighs its experts anew for each input, so it has no one weight to merge, to export or "
            "for another adapter to change; keep it as an adapter of its own, or take one with a weight, such as "
            "lora"
        )

    def forward(self, base: Layer, op: LinOp, x: Tensor) -> Tensor:
        """base(x) + scale * the mixture, in the precision of base(x)."""
        u, v = self.pair(op)
        gates, y, device = self.gates(x), base(x), x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else u.dtype
        with uncast(device):
            flat = x.reshape(-1, x.shape[-1]), gates.flatten(0, -2) if gates.dim() > 1 else gates[None]
            x_, g_, u_, v_ = (t.to(dtype) for t in (*flat, u, v))
            mixed = mixture(x_, u_, v_, g_, self.power)
        return torch.add(y, mixed.view(*x.shape[:-1], len(u)).to(y.dtype), alpha=self.scale)


def mixture(x: Tensor, u: Tensor, v: Tensor, gates: Tensor, power: float = 1.0) -> Tensor:
    """sum_i g_i u_i v_i x, whose factors get the gradient that g_i^power would give them.

        x (tokens, n), u (m, experts * rank), v (experts * rank, n), gates (tokens, experts) -> (tokens, m)

    >>> x, u, v = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 10.0]]), torch.eye(2)
    >>> mixture(x, u, v, torch.tensor([[0.25, 0.75]]))
    tensor([[15.2500]])
    """
    mixed: Tensor = _Mixture.apply(x, u, v, gates, power)  # type: ignore[no-untyped-call]
    return mixed


def weighed(inner: Tensor, gates: Tensor) -> Tensor:
    """Each expert's own part of inner (tokens, experts * rank) times its gate.

    >>> weighed(torch.ones(1, 4), torch.tensor([[2.0, 3.0]]))
    tensor([[2., 2., 3., 3.]])
    """
    return (torch.unflatten(inner, -1, (gates.shape[-1], -1)) * gates.unsqueeze(-1)).flatten(-2)


class _Mixture(torch.autograd.Function):
    """The mixture; backward keeps x, its coordinates in all experts, and the gates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, v: Tensor, gates: Tensor, power: float) -> Tensor:
        inner = F.linear(x, v)
        ctx.save_for_backward(x, u, v, gates, inner)
        ctx.power = power
        return F.linear(weighed(inner, gates), u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, u, v, gates, inner = ctx.saved_tensors
        pulled, soft = g @ u, gates.pow(ctx.power)
        down = weighed(pulled, gates) @ v if ctx.needs_input_grad[0] else None
        of_gates = torch.unflatten(pulled * inner, -1, (gates.shape[-1], -1)).sum(-1)
        return down, g.mT @ weighed(inner, soft), weighed(pulled, soft).mT @ x, of_gates, None
