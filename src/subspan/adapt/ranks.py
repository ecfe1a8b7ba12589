"""Ranks that move during training: triples u_i e_i v_i under a falling budget, kept where they matter.

In any loop:

    schedule = RankSchedule(model, AdaLora(rank=8, steps=3000, warmup=500, final=1500, every=10))
    schedule.attach(optimizer)      # from here on every optimizer.step() drives it, in any loop
    ...
    schedule.finish()               # the pruned triples are gone: smaller tensors, the same function
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from subspan.adapt.layer import Adapter
from subspan.adapt.starts import ZeroTriples
from subspan.adapt.triples import AXES, deviation, deviation_slope, site_of
from subspan.linalg import wide

KEY = "ranks"


@dataclass(frozen=True)
class AdaLora:
    """A number of triples that falls from all to `rank` a site on average (Zhang et al., 2023, arXiv:2303.10512).

        b(t) = floor(end + (all - end) (1 - (t - warmup) / (steps - final - warmup))^3)

    for warmup < t < steps - final, `all` before and `end` after. In between, each `every` steps, the triples of
    the lowest scores beyond b(t) are set to zero; they go on learning and may return until steps - final, when
    the choice is final. Steps count from 1. An entry p with gradient g scores mean * spread:

        mean <- b1 mean + (1 - b1) |p g|,   spread <- b2 spread + (1 - b2) | |p g| - mean |

    and the triple i scores e_i + mean_j u_ji + mean_j v_ij. `orth` weighs `RankSchedule.penalty`.
    Raises ValueError for a schedule that leaves no step to score in, and for averages outside 0..1.

    >>> rule = AdaLora(rank=2, steps=10, warmup=2, final=2)
    >>> [rule.budget(t, 20, 10) for t in range(1, 11)]
    [20, 20, 15, 12, 11, 10, 10, 10, 10, 10]
    """

    rank: int
    steps: int
    warmup: int = 0
    final: int = 0
    every: int = 1
    b1: float = 0.85
    b2: float = 0.85
    orth: float = 0.1

    def __post_init__(self) -> None:
        if self.rank < 1 or self.every < 1 or not self.orth >= 0:
            raise ValueError(f"{self}: rank and every must be at least 1, and orth not negative")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"{self}: b1 and b2 must be in 0..1, 1 excluded")
        if self.warmup < 0 or self.final < 0 or self.warmup >= self.settled or self.settled < 2:
            raise ValueError(
                f"{self}: warmup {self.warmup} and final {self.final} leave no step of {self.steps} to score "
                "triples in; take warmup + final below steps, final at most steps - 2, or more steps"
            )

    @staticmethod
    def over(rank: int, steps: int) -> AdaLora:
        """The usual shares of a run: a sixth of warm-up, the last half settled, some 300 moves at most.

        >>> AdaLora.over(8, 3000)
        AdaLora(rank=8, steps=3000, warmup=500, final=1500, every=10, b1=0.85, b2=0.85, orth=0.1)
        """
        final = max(0, min(steps // 2, steps - 2))
        return AdaLora(rank, steps, warmup=steps // 6, final=final, every=max(1, steps // 300))

    @property
    def settled(self) -> int:
        """The step at which the choice becomes final."""
        return self.steps - self.final

    def budget(self, t: int, full: int, end: int) -> int:
        """The triples that may be alive after step t, of `full` at first and `end` at last."""
        if t <= self.warmup:
            return full
        left, span = max(0, self.settled - t), self.settled - self.warmup
        # In whole numbers: a float cube may fall just below one, and its floor a triple short.
        return end + (full - end) * left**3 // span**3

    def chooses(self, t: int) -> bool:
        """Whether step t ends with a new choice of triples."""
        return t == self.settled or (self.warmup < t < self.settled and t % self.every == 0)


def planned(adapter: Adapter, steps: int) -> AdaLora | None:
    """The schedule that an adapter's start asks for in a run of so many steps; None for one whose rank stays."""
    start = adapter.op
    if not isinstance(start, ZeroTriples) or start.final is None:
        return None
    return AdaLora.over(start.final, steps)


class RankSchedule:
    """Moves the ranks of a model's adapters u diag(e) v by a rule, one `step` after every step of the optimizer.

    The sites are those whose adapter `name` is such a product (the preset `adalora`). Two ways to drive it:
    `attach` it to the optimizer, then any loop will do and the loss stays as it is; or add `penalty()` to the loss
    and call `step()` between `optimizer.step()` and `zero_grad()`. `finish` removes what was pruned.

    The scale of the join stays what it was at the start. Raises ValueError for a model without such adapters, for
    a final budget above the present ranks, and for tensors cut over processes.
    """

    def __init__(self, model: nn.Module, rule: AdaLora, *, name: str = "default") -> None:
        self.rule = rule
        self.sites = {at: site for at, m in model.named_modules() if (site := site_of(m, name)) is not None}
        if not self.sites:
            raise ValueError(
                f"{type(model).__name__} has no adapter {name!r} of the form u diag(e) v that trains; put the "
                "preset `adalora` on it first"
            )
        self.full, self.end = sum(self.ranks.values()), rule.rank * len(self.sites)
        if self.end > self.full:
            raise ValueError(
                f"rank {rule.rank} at {len(self.sites)} sites is {self.end} triples, above the {self.full} that "
                "are there; start with more or ask for fewer"
            )
        self._steps = torch.zeros((), dtype=torch.int64)
        self._optimizer: torch.optim.Optimizer | None = None
        self._handles: list[RemovableHandle] = []
        self._arrived: dict[str, Tensor] = {}
        self.finished = False

    @property
    def steps(self) -> int:
        """Steps so far."""
        return int(self._steps)

    @property
    def ranks(self) -> dict[str, int]:
        """The triples that are alive, by site."""
        return {at: int(site.kept.sum()) for at, site in self.sites.items()}

    def scores(self) -> dict[str, Tensor]:
        """The score of every triple by site, each (rank,)."""
        return {at: site.scores() for at, site in self.sites.items()}

    def penalty(self) -> Tensor:
        """orth * mean over all u and v of |u^T u - 1|_F and |v v^T - 1|_F: what to add to the loss by hand."""
        found = [deviation(wide(x)) for s in self.sites.values() for x in (s.triples.u.mT, s.triples.v)]
        return self.rule.orth * torch.stack(found).mean()

    # ---- driving

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Let the optimizer drive this schedule and carry its state; returns the schedule.

        The first backward pass of every step adds the exact gradient of `penalty()`, before clipping and before
        DDP averages; a step after it counts one here. The optimizer's `state_dict()` then holds the schedule, and
        its `load_state_dict` restores it, so Trainer and Lightning resume it unasked. A loss scaler would scale
        the penalty down: with one, take orth=0 and add the penalty to the loss. Raises ValueError where the
        optimizer does not step all triples, and when something is attached already.
        """
        if self._optimizer is not None or self.finished:
            raise ValueError("this schedule is attached or finished already; make a new one for another optimizer")
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [at for at, s in self.sites.items() if not {id(p) for p in s.triples} <= stepped]
        if missing:
            raise ValueError(
                f"the optimizer does not step the adapters of {', '.join(missing[:3])}"
                f"{' and more' if len(missing) > 3 else ''}; build it over `trainable(model)`"
            )
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]
        for at, site in self.sites.items():
            for key, p in site.triples._asdict().items():
                hook: Callable[[Tensor], None] = partial(self._arrive, f"{at}/{key}", key)
                self._handles.append(p.register_post_accumulate_grad_hook(hook))
        return self

    @torch.no_grad()
    def _arrive(self, at: str, key: str, p: Tensor) -> None:
        # Once a step, and not once a micro-batch: a gradient that is accumulated further stays the same tensor.
        if p.grad is None or self._arrived.get(at) is p.grad:
            return
        if key != "e" and self.rule.orth > 0:
            x = wide(p.detach())
            slope = deviation_slope(x.mT).mT if key == "u" else deviation_slope(x)
            p.grad.add_(slope.to(p.grad.dtype), alpha=self.rule.orth / (2 * len(self.sites)))
        self._arrived[at] = p.grad

    def _after(self, *_: Any) -> None:
        # A step without any backward pass only makes state, as torch.distributed.checkpoint asks for.
        if self._arrived:
            self.step()

    @torch.no_grad()
    def step(self) -> None:
        """Score the triples by the gradients of the step just taken; at times, choose, and zero the others' e.

        Raises RuntimeError when no triple has a gradient: it comes after `optimizer.step()`, before `zero_grad()`.
        """
        if self.finished:
            raise RuntimeError("this schedule is finished: the ranks stay; train on without calling it")
        t = self.steps + 1
        if t < self.rule.settled:
            self._score()
        self._steps += 1
        self._arrived.clear()
        if self.rule.chooses(t):
            self._choose(self.rule.budget(t, self.full, self.end))
        if self.rule.chooses(t) or t > self.rule.settled:
            for site in self.sites.values():
                site.triples.e.masked_fill_(~site.kept, 0)

    def _score(self) -> None:
        if all(p.grad is None for site in self.sites.values() for p in site.triples):
            raise RuntimeError(
                "no triple has a gradient; call step() after optimizer.step() and before zero_grad(), or attach it"
            )
        for site in self.sites.values():
            for key, p in site.triples._asdict().items():
                site.senses[key].update(p, p.grad, self.rule.b1, self.rule.b2)

    def _choose(self, budget: int) -> None:
        scores = torch.cat([site.scores().cpu().to(torch.float64) for site in self.sites.values()])
        kept = torch.ones(self.full, dtype=torch.bool)
        # Equal scores go by position, so that the number left is the budget exactly.
        kept[scores.argsort(stable=True)[: self.full - budget]] = False
        parts = kept.split([len(site.kept) for site in self.sites.values()])  # type: ignore[no-untyped-call]
        for site, part in zip(self.sites.values(), parts, strict=True):
            site.kept.copy_(part)

    # ---- state

    def state_dict(self) -> dict[str, Tensor]:
        """Steps, scores and the present choice as flat tensors that share memory; the weights are the model's."""
        held = {f"{at}/{key}": t for at, site in self.sites.items() for key, t in site.tensors().items()}
        return {"steps": self._steps, **held}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state; raises ValueError for one of other sites or ranks, and changes nothing."""
        have = self.state_dict()
        wrong = sorted({*have} ^ {*state}) + [k for k in have if k in state and state[k].shape != have[k].shape]
        if wrong:
            raise ValueError(
                f"the saved schedule is of other sites or ranks ({', '.join(wrong[:3])}, {len(wrong)} in all); "
                "build the adapter as when it was saved"
            )
        for key, t in have.items():
            t.copy_(state[key])

    def _save(self, _: Any, state: dict[str, Any]) -> None:
        # In the groups, because loaders that know the layout of a state pass on whatever a group holds.
        for group in state["param_groups"]:
            group[KEY] = self.state_dict()

    def _load(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        found = [group[KEY] for group in state["param_groups"] if KEY in group]
        if found:
            self.load_state_dict(found[0])
        groups = [{k: x for k, x in group.items() if k != KEY} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    # ---- the end

    @torch.no_grad()
    def finish(self, *optimizers: torch.optim.Optimizer) -> dict[str, int]:
        """Remove the pruned triples from the tensors, let go of the optimizer, and return the ranks by site.

        The parameters stay the same objects, smaller, and the function the same to rounding. The state of the
        attached and the given optimizers is cut alike where every tensor of it has the parameter's shape or is a
        single number; other state, such as moments in a subspace or packed in blocks, is dropped and begins anew
        with the next step. A site may be left with rank 0. Raises ValueError before the choice is final, and when
        a pruned triple has moved since the last step.
        """
        if self.finished:
            return self.ranks
        if self.steps < self.rule.settled:
            raise ValueError(
                f"the schedule is at step {self.steps}, and its choice is final at {self.rule.settled}; train on, "
                "or keep the adapter as it is: its full ranks are valid too"
            )
        moved = [at for at, s in self.sites.items() if bool(s.triples.e[~s.kept].any())]
        if moved:
            raise ValueError(
                f"pruned triples of {', '.join(moved[:3])} are not zero; call step() after every optimizer step"
            )
        steppers = {id(o): o for o in (self._optimizer, *optimizers) if o is not None}
        for site in self.sites.values():
            index, shapes = site.kept.nonzero().squeeze(1), [p.shape for p in site.triples]
            site.shrink()
            for p, axis, shape in zip(site.triples, AXES.values(), shapes, strict=True):
                for optimizer in steppers.values():
                    cut_state(optimizer, p, axis, index, shape)
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer, self.finished = [], None, True
        return self.ranks


def cut_state(optimizer: torch.optim.Optimizer, p: Tensor, axis: int, index: Tensor, shape: torch.Size) -> None:
    """Cut what an optimizer holds of p, which had that shape, to the rows or columns `index`, or drop it."""
    state = optimizer.state.get(p)
    if state is None:
        return
    held = {key: x for key, x in state.items() if isinstance(x, Tensor)}
    if any(x.shape != shape and x.numel() != 1 for x in held.values()):
        del optimizer.state[p]
        return
    state |= {key: x.index_select(axis, index.to(x.device)) for key, x in held.items() if x.shape == shape}
