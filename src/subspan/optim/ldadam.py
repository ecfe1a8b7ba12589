"""`LowRankAdam`: Adam in a subspace that follows its own momentum, with an exact account of what is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from subspan import linalg
from subspan.optim.direction import Direction, Low, dense, matmul_as
from subspan.optim.rules import Adam, require_share
from subspan.optim.state import State
from subspan.optim.subspace import count, owned, require_rank


@dataclass(frozen=True, slots=True)
class LowRankAdam:
    """Adam in a basis that takes one power step at every step (Robert et al., 2024, arXiv:2410.16103).

        a = g + error,   b = rho q mu / (1 - b1^t) + (1 - rho) a,   q' = orth(b b^T q),   r = q'^T a,   C = q'^T q
        error' = a - q' r + b1 / (1 - b1) (q mu - q' C mu)

    with t steps done before; the first basis is a's leading singular vectors. mu turns by C, and nu by (C * C)
    around the mean: uncorrelated old coordinates make it exact. What a turn takes from mu goes into the error:
    q' mu' + (1 - b1) error' = b1 q mu + (1 - b1) a. error="dropped" has none, and keeps no matrix like g.

    The basis needs the moment, the turn needs the time, and the error both frames; `Projected` keeps these
    apart, so this is a rule of its own. It works on the shorter side, the rows of a square.
    """

    rank: int | float = 16
    rho: float = 0.908
    adam: Adam = Adam(0.908, 0.99)
    error: Literal["kept", "dropped"] = "kept"
    degree: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        require_rank("LowRankAdam", self.rank)
        require_share("LowRankAdam", "rho", self.rho)
        if self.error not in ("kept", "dropped"):
            raise ValueError(f"LowRankAdam: error={self.error!r}; use 'kept' or 'dropped'")

    def init(self, g: Tensor, seed: int) -> State:
        """`frame.q`, `rule.mu`, `rule.nu` and, when kept, `residual.error`; the shorter side is on the left."""
        if g.ndim < 2:
            raise ValueError(f"a subspace needs a matrix, not shape {tuple(g.shape)}; leave it to `other`")
        x = g.mT if flips(g) else g
        m, n = x.shape[-2:]
        q = x.new_zeros(*x.shape[:-1], count(self.rank, m, min(m, n)))
        zero = torch.zeros_like(matmul_as(q.mT, x))
        error = {"residual.error": torch.zeros_like(x)} if self.error == "kept" else {}
        return {"frame.q": q, "rule.mu": zero, "rule.nu": zero.clone(), **error}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """The step, in g's own orientation."""
        linalg.require_finite(g)
        x, w = (g.mT, w.mT) if flips(g) else (g, w)
        if self.error == "kept":
            x = s["residual.error"].add_(x)
        q, mu = s["frame.q"], s["rule.mu"]
        new = self._basis(x, q, mu, t)
        r, turn = matmul_as(new.mT, x), new.mT @ q
        turned = matmul_as(turn, mu)
        if self.error == "kept":
            share = self.adam.b1 / (1 - self.adam.b1)
            Low(new, torch.add(r, turned, alpha=share)).add_to(x, -1.0)
            Low(q, mu).add_to(x, share)
            s["residual.error"] = x
        moments = {"mu": turned, "nu": self._squares(s["rule.nu"], mu, turned, turn, t)}
        d = self.adam.update(r, moments, w, t)
        s["frame.q"], s["rule.mu"], s["rule.nu"] = new, moments["mu"], moments["nu"]
        step = Low(new, dense(d))
        return step.mT if flips(g) else step

    def gain(self, s: State, t: int) -> float:
        """Adam's."""
        return self.adam.gain({}, t)

    def facts(self, w: Tensor, s: State) -> dict[str, Any]:
        """What a report says of a weight: side and rank; the frame is a new one at every step."""
        return {"side": "right" if flips(w) else "left", "rank": s["frame.q"].shape[-1]}

    def _basis(self, x: Tensor, q: Tensor, mu: Tensor, t: int) -> Tensor:
        """orth(b b^T q); b itself is never formed, as its first part is q times something."""
        if t == 1:
            return owned(linalg.svd_gram(x).u, q.shape[-1]).mT.contiguous().mT  # as later ones lie in memory
        past = self.rho / (1 - self.adam.b1 ** (t - 1))
        z = (1 - self.rho) * (x.mT @ q) + past * mu.mT
        # Only the columns' directions matter; without this the square of a small gradient underflows.
        z = z / torch.linalg.vector_norm(z, dim=-2, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
        return linalg.orth((1 - self.rho) * (x @ z) + q @ (past * (mu @ z)))

    def _squares(self, nu: Tensor, mu: Tensor, turned: Tensor, turn: Tensor, t: int) -> Tensor:
        """c2 |(C * C) (nu / c2 - (mu / c1)^2) + (C mu / c1)^2|, with c = 1 - b^(t - 1); zero at the first step."""
        ratio = (1 - self.adam.b2 ** (t - 1)) / (1 - self.adam.b1 ** (t - 1)) ** 2 if t > 1 else 0.0
        spread = nu.addcmul(mu, mu, value=-ratio)
        return matmul_as(turn.square(), spread).addcmul_(turned, turned, value=ratio).abs_()


def flips(g: Tensor) -> bool:
    """Whether the columns of g (..., m, n) are compressed: when there are fewer of them than rows."""
    return g.shape[-2] > g.shape[-1]
