"""Where an adapter's op comes from: (site, weight) -> op, as values that print and compare."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from subspan.linalg import SVD, check_rank, require_finite, svd, svd_gram, svd_random, wide
from subspan.ops import LowRank


def draw(site: str, seed: int) -> torch.Generator:
    """A generator of the site's own, so that a site's numbers do not depend on which others were adapted."""
    return torch.Generator().manual_seed(zlib.crc32(site.encode()) ^ seed)


@dataclass(frozen=True)
class ZeroLowRank:
    """u @ v = 0 with u (m, rank) zero and v (rank, n) uniform on +-1/sqrt(n), both trained.

    The draw is made on the CPU in float32 and is the same for every device and dtype. Half-precision weights get
    float32 factors.
    """

    rank: int
    seed: int = 0

    def __call__(self, site: str, w: Tensor) -> LowRank:
        """The op for one site and weight w (m, n); raises ValueError for a rank outside 1..min(m, n)."""
        m, n = w.shape
        check_rank(self.rank, m, n, site)
        like = wide(w[:0])
        v = torch.rand(self.rank, n, generator=draw(site, self.seed)).to(like)
        return trained(like.new_zeros(m, self.rank), (2 * v - 1) / n**0.5)


@dataclass(frozen=True)
class FromWeight:
    """scale * u @ v = the top or bottom `rank` singular triples of the weight, both factors trained.

        u = U sqrt(S / scale),   v = sqrt(S / scale) V^T

    `solver` is "exact", "gram" (several times faster; singular values below 1e-8 of the largest are noise) or
    "random" (fastest, top part only: subspace iteration from a seeded draw).
    """

    rank: int
    part: Literal["top", "bottom"] = "top"
    scale: float = 1.0
    solver: Literal["exact", "gram", "random"] = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in ("top", "bottom"):
            raise ValueError(f"part {self.part!r} is neither 'top' nor 'bottom'")
        if self.solver not in ("exact", "gram", "random"):
            raise ValueError(f"solver {self.solver!r} is none of 'exact', 'gram', 'random'")
        if (self.part, self.solver) == ("bottom", "random"):
            raise ValueError("solver 'random' finds only the top part; use 'exact' or 'gram' for the bottom")
        if not self.scale > 0:
            raise ValueError(f"scale {self.scale} must be positive: the factors share its square root")

    def __call__(self, site: str, w: Tensor) -> LowRank:
        """The op for one site and weight w (m, n); raises ValueError for a bad rank, NaN or Inf."""
        m, n = w.shape
        check_rank(self.rank, m, n, site)
        require_finite(w, site)
        u, s, vh = self.triples(site, w.detach())
        keep = slice(0, self.rank) if self.part == "top" else slice(len(s) - self.rank, None)
        root = (s[keep] / self.scale).sqrt()
        return trained(u[:, keep] * root, root[:, None] * vh[keep])

    def triples(self, site: str, w: Tensor) -> SVD:
        """The singular triples, by the chosen solver."""
        if self.solver == "exact":
            return svd(w)
        if self.solver == "gram":
            return svd_gram(w)
        width = min(self.rank + 8, *w.shape)
        start = torch.randn(w.shape[1], width, generator=draw(site, self.seed))
        return svd_random(w, self.rank, iters=16, start=start.to(w.device))


def trained(u: Tensor, v: Tensor) -> LowRank:
    """The op whose two factors both train."""
    return LowRank(nn.Parameter(u.contiguous()), nn.Parameter(v.contiguous()))
