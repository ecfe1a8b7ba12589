"""`Projected`: a rule that works in a subspace of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from subspan.optim.refresh import Refresh
from subspan.optim.residual import Drop, Residual
from subspan.optim.rule import Rule
from subspan.optim.state import Scope, State, counter, placed
from subspan.optim.subspace import Subspace

Side = Literal["short", "long", "left", "right"]


@dataclass(frozen=True, slots=True)
class Projected:
    """Look at the gradient in a subspace, let a rule answer there, and bring the answer back.

        r = down(g),   d = rule(r),   step = scale * up(d) + residual

    `side` names the dimension that is compressed: "left" the rows, "right" the columns, "short" the smaller one
    (columns of a square), "long" the other. Residuals and subspaces only know the left; the right is the left of
    the transpose. The frame fitted at a step is used at that step. It is itself a rule, so it nests.
    """

    subspace: Subspace
    refresh: Refresh
    rule: Rule
    residual: Residual = Drop()
    side: Side = "short"
    scale: float = 1.0
    degree: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        if self.side not in ("short", "long", "left", "right"):
            raise ValueError(f"Projected: side={self.side!r}; use 'short', 'long', 'left' or 'right'")

    def init(self, g: Tensor, seed: int) -> State:
        """`frame.*`, `rule.*` and `residual.*`, and `clock`: the steps done before the rule last began."""
        if g.ndim < 2:
            raise ValueError(f"a subspace needs a matrix, not shape {tuple(g.shape)}; leave it to `other`")
        g = g.mT if self.flips(g) else g
        frame = self.subspace.init(g, seed)
        inner = self.rule.init(self.subspace.down(g, frame), seed)
        parts = {"frame": frame, "rule": inner, "residual": self.residual.init(g, seed)}
        return {"clock": counter()} | {k: v for role, s in parts.items() for k, v in placed(role, s).items()}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Tensor:
        """The step, in g's own orientation."""
        flips = self.flips(g)
        if flips:
            g, w = g.mT, w.mT
        old, inner, kept = Scope(s, "frame"), Scope(s, "rule"), Scope(s, "residual")
        g = self.residual.enter(g, kept)
        due = self.refresh.due(g, old, t)
        frame = self.subspace.fit(g, old, due)
        up = partial(self.subspace.up, s=frame)
        r = self.subspace.down(g, frame)
        move = partial(self.subspace.move, old=old, new=frame)
        if due and self.refresh.carry(self.rule, inner, fresh=lambda: self.rule.init(r, seed=t), move=move):
            s["clock"] = counter(t - 1)
        old.update(frame)
        d = self.rule.update(r, inner, w, t - int(s["clock"]))
        u = self.residual.leave(up(d * self.scale), g, r, d, up, kept)
        return u.mT if flips else u

    def gain(self, s: State, t: int) -> float:
        """The inner rule's, at its own clock."""
        return self.rule.gain(Scope(s, "rule"), t - int(s["clock"]))

    def flips(self, g: Tensor) -> bool:
        """Whether the columns of g (..., m, n) are compressed, so that the work is done on its transpose."""
        m, n = g.shape[-2:]
        return self.side == "right" or (self.side == "short" and m >= n) or (self.side == "long" and m < n)
