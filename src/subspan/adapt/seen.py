"""Starts that look at data first: at the inputs of a layer, or at the gradients of its weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from subspan.adapt.data import HELD, FromData, Sites, Solver, gradients, principal, shared_out, size_of
from subspan.adapt.init import FromWeight, trained
from subspan.adapt.starts import UpdateCore
from subspan.compress import Calibration
from subspan.linalg import SVD, check_rank, require_finite, wide
from subspan.ops import Dense, LinOp, LowRank, Product, Scaled, Sum, Zero


@dataclass(frozen=True)
class TopInputs(FromData):
    """u @ v = 0 with u (m, k) zero and v (k, n) the first k principal directions of the inputs, both trained.

        k = how many of the site's shares of variance are among the (sites * rank) largest of all,  k <= rho * rank

    Ranks come to `rank` on average, and are `rank` everywhere for rho = 1; a site may get none, and then the zero
    op (Paischer et al., 2024). `solver` as in `FromWeight`.
    """

    rank: int
    rho: float = 2.0
    solver: Solver = "exact"
    seed: int = 0
    shares: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        FromWeight(self.rank, solver=self.solver)
        if not self.rho >= 1:
            raise ValueError(f"rho {self.rho} must be at least 1: no site gets more than rho * rank")

    @property
    def ranks(self) -> dict[str, int]:
        """Site -> its rank, of those it has seen."""
        return {name: op.rank if isinstance(op, LowRank) else 0 for name, op in self.seen.items()}

    def most(self, site: str, m: int, n: int) -> int:
        """The largest rank of a weight (m, n); raises ValueError for a `rank` outside 1..min(m, n)."""
        check_rank(self.rank, m, n, site)
        return min(round(self.rho * self.rank), m, n)

    def look(self, model: nn.Module, sites: Sites, data: Calibration, *, most: int = HELD) -> Self:
        """The start with the directions of the inputs, and the shares of the variance that it weighed."""
        sizes = {name: size_of(name, module) for name, module in sites.items()}
        counts = {name: self.most(name, *size) for name, size in sizes.items()}
        found = principal(model, sites, data, counts, solver=self.solver, seed=self.seed, most=most)
        shares = {name: part.shares for name, part in found.items()}
        seen: dict[str, LinOp] = {}
        for name, rank in shared_out(shares, self.rank * len(sites)).items():
            seen[name] = _from_right(found[name].rows[:rank], *sizes[name])
        return replace(self, seen=seen, shares=shares)

    def shell(self, site: str, w: Tensor, parts: Mapping[str, Tensor]) -> LinOp:
        """Zeros of the saved rank, which is none without tensors; raises ValueError for one above the largest."""
        m, n = w.shape
        rank = parts["op.v"].shape[0] if "op.v" in parts else 0
        if rank > self.most(site, m, n):
            raise ValueError(f"{site}: a saved rank of {rank} is above rho * rank = {self.most(site, m, n)}")
        return _from_right(wide(w[:0]).new_zeros(rank, n), m, n)


def _from_right(v: Tensor, m: int, n: int) -> LinOp:
    return trained(v.new_zeros(m, len(v)), v.clone()) if len(v) else Zero(m, n).to(v)


@dataclass(frozen=True)
class FromGradient(FromData):
    """A start that is read off the mean gradient of each weight by itself."""

    @abstractmethod
    def make(self, site: str, g: Tensor) -> LinOp:
        """The op from one gradient (m, n)."""

    def look(self, model: nn.Module, sites: Sites, data: Calibration, *, most: int = HELD) -> Self:
        """The start with the ops; of each gradient only those are kept."""
        self.refuse({name: size_of(name, module) for name, module in sites.items()})
        return replace(self, seen={n: self.make(n, g) for n, g in gradients(model, sites, data, most=most)})

    def refuse(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError for sizes that it cannot give an op for, before any batch is run."""
        for name, (m, n) in sizes.items():
            self.shell(name, torch.empty(m, n, device="meta"), {})


def leading(site: str, g: Tensor, rank: int, solver: Solver, seed: int) -> SVD:
    """The `rank` leading singular triples of a gradient; raises ValueError for NaN, Inf and a gradient of zero."""
    require_finite(g, f"gradient of {site}")
    if not bool(g.any()):
        raise ValueError(f"{site}: its gradient is zero on all of the data; leave it out with '!{site}'")
    # Only directions and ratios matter, and squares of small gradients underflow.
    u, s, vh = FromWeight(rank, solver=solver, seed=seed).triples(site, g / g.abs().max())
    return SVD(u[:, :rank], s[:rank], vh[:rank])


@dataclass(frozen=True)
class GradientSpan(FromGradient):
    """u v - u0 v0 = 0 with u = u0 (m, rank) and v = v0 (rank, n) from different singular vectors of the gradient.

        v = c V_{1..rank}^T,   u = c U_{rank+1..2 rank},   c = m^(1/4) / sqrt(gamma), or 1 for scaling "unit"

    u and v train. A step of size eta of gradient descent then moves the weight, to first order, by
    -eta (scale c)^2 G_{2 rank}, the best approximation of the gradient of twice the rank (Wang et al., 2024).
    Where the authors take the start out of the base weight, its frozen double u0 v0 is taken out of the op: the
    same function without a second copy of the weight, at twice the product. `solver` as in `FromWeight`.
    """

    rank: int
    gamma: float = 16.0
    scaling: Literal["stable", "unit"] = "stable"
    solver: Solver = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        FromWeight(self.rank, scale=self.gamma, solver=self.solver)
        if self.scaling not in ("stable", "unit"):
            raise ValueError(f"scaling {self.scaling!r} is neither 'stable' nor 'unit'")

    def make(self, site: str, g: Tensor) -> LinOp:
        """The op from one gradient (m, n)."""
        r = self.rank
        u, _, vh = leading(site, g, 2 * r, self.solver, self.seed)
        c = 1.0 if self.scaling == "unit" else g.shape[0] ** 0.25 / self.gamma**0.5
        return _moved(c * u[:, r:], c * vh[:r])

    def shell(self, site: str, w: Tensor, parts: Mapping[str, Tensor]) -> LinOp:
        """Zeros of this rank; raises ValueError unless 1 <= rank <= min(m, n) / 2."""
        m, n = w.shape
        if not 1 <= self.rank <= min(m, n) // 2:
            raise ValueError(
                f"{site}: rank {self.rank} is outside 1..min({m}, {n}) / 2 = {min(m, n) // 2}: it takes twice as "
                "many singular vectors; choose one inside"
            )
        like = wide(w[:0])
        return _moved(like.new_zeros(m, self.rank), like.new_zeros(self.rank, n))


def _moved(u: Tensor, v: Tensor) -> Sum:
    # In one layout, as they will be loaded: in another the two would round differently.
    u, v = u.contiguous(), v.contiguous()
    return Sum([trained(u, v), Scaled(LowRank(u.clone(), v.clone()), -1.0)])


@dataclass(frozen=True)
class GradientStep(FromGradient):
    """u v = -G_rank / (gamma S_1), a step along the best rank-`rank` part of the gradient; both train.

        u = -U sqrt(S / (gamma S_1)),   v = sqrt(S / (gamma S_1)) V^T

    The base stays, so the start moves the function, and no scaling of the loss changes how far: gamma does
    (Zhang et al., 2025). `solver` as in `FromWeight`.
    """

    rank: int
    gamma: float = 128.0
    solver: Solver = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        FromWeight(self.rank, scale=self.gamma, solver=self.solver)

    def make(self, site: str, g: Tensor) -> LinOp:
        """The op from one gradient (m, n)."""
        u, s, vh = leading(site, g, self.rank, self.solver, self.seed)
        root = (s / (s[0] * self.gamma)).sqrt()
        return trained(-u * root, root[:, None] * vh)

    def shell(self, site: str, w: Tensor, parts: Mapping[str, Tensor]) -> LinOp:
        """Zeros of this rank; raises ValueError for one outside 1..min(m, n)."""
        (m, n), like = w.shape, wide(w[:0])
        check_rank(self.rank, m, n, site)
        return trained(like.new_zeros(m, self.rank), like.new_zeros(self.rank, n))


@dataclass(frozen=True)
class SignStep(FromGradient):
    """`UpdateCore` of the mean gradient: a trained core in the frame of AdamW's first step, of size `rate`.

    It starts at that step, or with `keep_output` at zero, where the function stays.
    """

    rank: int
    rate: float = 1e-5
    scale: float = 1.0
    keep_output: bool = False
    solver: Solver = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        UpdateCore(self.rank, {}, self.rate, self.scale, self.solver)

    @torch.no_grad()
    def make(self, site: str, g: Tensor) -> LinOp:
        """The op from one gradient (m, n)."""
        start = UpdateCore(self.rank, {site: g}, self.rate, self.scale, self.solver, self.seed)
        left, core, right = start(site, g).ops
        return Product([left, Dense(nn.Parameter(0 * core.dense())) if self.keep_output else core, right])

    def shell(self, site: str, w: Tensor, parts: Mapping[str, Tensor]) -> LinOp:
        """Zeros of this rank; raises ValueError for one outside 1..min(m, n)."""
        (m, n), like = w.shape, wide(w[:0])
        check_rank(self.rank, m, n, site)
        core = nn.Parameter(like.new_zeros(self.rank, self.rank))
        return Product([Dense(like.new_zeros(m, self.rank)), Dense(core), Dense(like.new_zeros(self.rank, n))])
