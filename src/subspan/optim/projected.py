"""`Projected`: a rule that works in a subspace of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from subspan.linalg import wide
from subspan.optim.direction import Direction, dense
from subspan.optim.ldadam import LowRankAdam
from subspan.optim.refresh import Move, Refresh
from subspan.optim.residual import Drop, Residual, scaled
from subspan.optim.rule import Rule
from subspan.optim.rules import Chain
from subspan.optim.state import Scope, State, counter, placed
from subspan.optim.stored import Decoded, Stored
from subspan.optim.subspace import Subspace
from subspan.shards import spread

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
        if self.residual.orthonormal and not self.subspace.orthonormal:
            raise ValueError(
                f"Projected: {self.residual!r} needs an orthonormal frame, not {self.subspace!r}; use Span"
            )

    def init(self, g: Tensor, seed: int) -> State:
        """`frame.*`, `refresh.*`, `rule.*` and `residual.*`, and what `facts` tells.

        `clock` counts the steps done before the rule last began, `fits` the frames fitted so far, and `drift` is
        the share of the last frame that the newest one gave up.
        """
        if g.ndim < 2:
            raise ValueError(f"a subspace needs a matrix, not shape {tuple(g.shape)}; leave it to `other`")
        g = g.mT if self.flips(g) else g
        frame = self.subspace.init(g, seed)
        inner = self.rule.init(self.subspace.down(g, frame), seed)
        parts = {"frame": frame, "rule": inner, "residual": self.residual.init(g, seed)}
        parts["refresh"] = self.refresh.init(seed)
        own = {"clock": counter(), "fits": counter(), "drift": g.new_zeros(())}
        return own | {k: v for role, s in parts.items() for k, v in placed(role, s).items()}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """The step, in g's own orientation."""
        flips = self.flips(g)
        if flips:
            g, w = g.mT, w.mT
        frame, kept = Scope(s, "frame"), Scope(s, "residual")
        g = self.residual.enter(g, kept)
        r = self._look(g, s, t)
        d = dense(self.rule.update(r, Scope(s, "rule"), w, t - int(s["clock"])))
        up = partial(self.subspace.up, s=frame)
        step = self.residual.leave(d, r, g, kept, up=up, scale=self.scale)
        return step.mT if flips else step

    def squeeze(self, g: Tensor, s: State, t: int) -> Tensor | None:
        """All that `update` needs of g at step t, linear in g; None when it needs g itself.

        That is so when the frame is to be fitted, and always for a residual that looks outside the frame.
        """
        if self.residual.raw or self.refresh.due(Scope(s, "refresh"), t):
            return None
        return self.subspace.down(g.mT if self.flips(g) else g, Scope(s, "frame"))

    def answer(self, r: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """The step from what `squeeze` returned, or from sums and means of it; w has the weight's orientation."""
        flips = self.flips(w)
        d = dense(self.rule.update(r, Scope(s, "rule"), w.mT if flips else w, t - int(s["clock"])))
        step = self.subspace.up(scaled(d, self.scale), Scope(s, "frame"))
        return step.mT if flips else step

    def gain(self, s: State, t: int) -> float:
        """The inner rule's, at its own clock."""
        return self.rule.gain(Scope(s, "rule"), t - int(s["clock"]))

    def facts(self, w: Tensor, s: State) -> dict[str, Any]:
        """What a report says of a weight: side, rank, frames fitted, and the last one's drift in 0 .. 1."""
        x = w.mT if self.flips(w) else w
        rank = self.subspace.down(on_meta({"w": x})["w"], on_meta(Scope(s, "frame"))).shape[-2]
        return {
            "side": "right" if self.flips(w) else "left",
            "rank": rank,
            "refreshes": int(s["fits"]),
            "drift": float(s["drift"]) if self.subspace.orthonormal else None,
        }

    def flips(self, g: Tensor) -> bool:
        """Whether the columns of g (..., m, n) are compressed, so that the work is done on its transpose."""
        m, n = g.shape[-2:]
        return self.side == "right" or (self.side == "short" and m >= n) or (self.side == "long" and m < n)

    def _look(self, g: Tensor, s: State, t: int) -> Tensor:
        """Coordinates of g, in a new frame when one is due."""
        old, inner = Scope(s, "frame"), Scope(s, "rule")
        due = self.refresh.due(Scope(s, "refresh"), t)
        frame = self.subspace.fit(g, old, due)
        r = self.subspace.down(g, frame)
        if due:
            move = partial(self.subspace.move, old=old, new=frame)
            if int(s["fits"]) and self.subspace.orthonormal:
                s["drift"] = self._drift(r, move)
            if self.refresh.carry(self.rule, inner, fresh=lambda: self.rule.init(r, seed=t), move=move):
                s["clock"] = counter(t - 1)
            s["fits"] = s["fits"] + 1
        old.update(frame)
        return r

    def _drift(self, r: Tensor, move: Move) -> Tensor:
        """1 - |C|^2 / rank, where C turns the old frame's coordinates into the new one's."""
        eye = spread(torch.eye(r.shape[-2], dtype=r.dtype, device=r.device), r)
        turn = move(eye.expand(*r.shape[:-2], *eye.shape), degree=1)
        return 1 - turn.square().sum((-2, -1)).mean() / r.shape[-2]


def facts(rule: Rule, w: Tensor, s: State) -> dict[str, Any]:
    """`Projected.facts` of the subspace that a rule works in, however it is wrapped; nothing if there is none."""
    if isinstance(rule, Projected | LowRankAdam):
        return rule.facts(w, s)
    if isinstance(rule, Stored):
        return facts(rule.rule, w, Decoded(s, dict(rule.codecs), wide(w)))
    links = rule.links if isinstance(rule, Chain) else ()
    return {k: v for name, link in links for k, v in facts(link, w, Scope(s, name)).items()}


def on_meta(s: Mapping[str, Tensor]) -> State:
    """The same state without its values, in one piece."""
    return {key: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for key, x in s.items()}
