"""Gradients of one fixed batch, watched at checkpoints of a training run."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspan import linalg, site
from subspan.edit import sites
from subspan.inspect.subspaces import (
    Frames,
    Side,
    captured,
    gradient_cosine_matrix,
    leading_frames,
    overlap_matrix,
    steadiness,
)
from subspan.metric import Loss, reported_loss
from subspan.select import Select
from subspan.watch import evaluating


@contextmanager
def undisturbed(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Evaluation mode with gradients of these layers; afterwards modes and random numbers are as they were."""
    wanted = {p: p.requires_grad for p in map(site.parameter, modules.values())}
    devices = range(torch.cuda.device_count())
    with evaluating(model), torch.random.fork_rng(devices), torch.enable_grad():
        try:
            for p in wanted:
                p.requires_grad_(True)
            yield
        finally:
            for p, was in wanted.items():
                p.requires_grad_(was)


def gradients(
    model: nn.Module, batch: Any, *, select: Select | None = None, loss: Loss = reported_loss
) -> dict[str, Tensor]:
    """The gradient (m, n) of every selected matrix on one batch, in evaluation mode.

    Neither `.grad`, hooks, modes nor random numbers are touched. Raises ValueError for a layer that the loss
    does not depend on.

    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> gradients(net, torch.tensor([[1.0, 2.0]]), loss=lambda model, x: model(x).sum())["0"]
    tensor([[1., 2.]])
    """
    found = sites(model, select)
    weights = list(dict.fromkeys(map(site.parameter, found.values())))
    with undisturbed(model, found):
        got = torch.autograd.grad(loss(model, batch), weights, allow_unused=True)
    by_weight = dict(zip(weights, got, strict=True))
    result: dict[str, Tensor] = {}
    for name, module in found.items():
        g = by_weight[site.parameter(module)]
        if g is None:
            raise ValueError(f"the loss does not depend on {name}; leave it out with '!{name}', or use other data")
        result[name] = site.of(module).view(module, g)
    return result


@dataclass(frozen=True, eq=False)
class Glimpse:
    """One matrix at one checkpoint: its gradient's norm and frames, and its weight's singular values.

    `whole` is the gradient itself, `sketch` a random projection of it; the one that was not asked for is None.
    """

    norm: float
    frames: Frames
    weight: Tensor | None
    whole: Tensor | None
    sketch: Tensor | None

    @property
    def nbytes(self) -> int:
        """What it takes to keep."""
        kept = (*self.frames, self.weight, self.whole, self.sketch)
        return sum(t.nbytes for t in kept if t is not None)


class GradientTrace:
    """What the gradients of a fixed batch do while a model trains; pass it as `after` to `hosts.training.train`.

        trace = GradientTrace(model, {"input_ids": ids, "labels": ids}, when=range(0, 401, 25))
        trace.record(0)
        train(model, batches, optimizer, steps=400, after=trace)
        trace.cosines("model.layers.0.self_attn.q_proj")

    At each checkpoint it costs one backward pass in evaluation mode and two singular value decompositions per
    matrix, and disturbs nothing: the run is the same to the bit. Per checkpoint and matrix (m, n) it keeps
    `rank` (m + n) + 2 min(m, n) numbers, and for the cosines either a sketch of `sketch` numbers, which is
    right to about 1 / sqrt(sketch), or, with `whole` a dtype, the m n numbers of the gradient in it.

    `when` is every how many steps to look, or at which.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        select: Select | None = None,
        rank: int = 16,
        when: int | Container[int] = 1,
        whole: torch.dtype | None = None,
        sketch: int = 4096,
        loss: Loss = reported_loss,
    ) -> None:
        if rank < 1 or sketch < 1 or (isinstance(when, int) and when < 1):
            raise ValueError(f"rank {rank}, sketch {sketch} and when {when} must all be 1 or more")
        self.model, self.batch, self.loss = model, batch, loss
        self.sites = sites(model, select)
        self.rank, self.when, self.whole, self.sketch = rank, when, whole, sketch
        self.moments: dict[int, dict[str, Glimpse]] = {}

    def __call__(self, step: int) -> None:
        """Record this step if it is one to look at."""
        if step % self.when == 0 if isinstance(self.when, int) else step in self.when:
            self.record(step)

    def record(self, step: int) -> None:
        """Look now, at the gradients of the fixed batch."""
        self.take(step, gradients(self.model, self.batch, select=lambda name: name in self.sites, loss=self.loss))

    def take(self, step: int, given: Mapping[str, Tensor]) -> None:
        """Keep gradients (m, n) that are at hand, by site; raises ValueError when one is missing or not finite."""
        missing = [name for name in self.sites if name not in given]
        if missing:
            raise ValueError(
                f"step {step}: no gradient of {missing[0]}; give one for each of {len(self.sites)} sites"
            )
        self.moments[step] = {name: self._glimpse(name, given[name].detach()) for name in self.sites}

    def _glimpse(self, name: str, g: Tensor) -> Glimpse:
        linalg.require_finite(g, f"the gradient of {name}")
        weight = linalg.svdvals(site.matrix(self.sites[name]).detach()).cpu()
        frames = Frames(*(t.cpu() for t in leading_frames(g, self.rank)))
        whole = None if self.whole is None else g.to(self.whole, copy=True).cpu()
        sketch = count_sketch(g, self.sketch) if self.whole is None else None
        return Glimpse(float(g.double().norm()), frames, weight, whole, sketch)

    @property
    def steps(self) -> list[int]:
        """The checkpoints, in the order of recording."""
        return list(self.moments)

    @property
    def nbytes(self) -> int:
        """What is kept so far."""
        return sum(glimpse.nbytes for moment in self.moments.values() for glimpse in moment.values())

    def glimpses(self, name: str) -> list[Glimpse]:
        """One site at all checkpoints; raises ValueError for a site that is not watched, or nothing recorded."""
        if name not in self.sites:
            raise ValueError(f"{name} is not watched; there are: {', '.join(list(self.sites)[:8])}")
        if not self.moments:
            raise ValueError("nothing was recorded yet; call record(step), or pass the trace to a training loop")
        return [moment[name] for moment in self.moments.values()]

    def cosines(self, name: str) -> Tensor:
        """The `gradient_cosine_matrix` (t, t) of a site, exact when gradients are kept whole."""
        seen = self.glimpses(name)
        return gradient_cosine_matrix([g.whole if g.sketch is None else g.sketch for g in seen])  # type: ignore[misc]

    def overlaps(self, name: str, side: Side = "left", rank: int | None = None) -> Tensor:
        """The overlap (t, t) of the leading singular subspaces of a site's gradients."""
        return overlap_matrix([g.frames.of(side, rank) for g in self.glimpses(name)])

    def steadiness(self, name: str, side: Side = "left", rank: int | None = None) -> list[float]:
        """The overlap of each checkpoint's subspace with the next one's, (t - 1)."""
        return steadiness([g.frames.of(side, rank) for g in self.glimpses(name)])

    def captures(self, name: str, side: Side = "left", rank: int | None = None) -> Tensor:
        """The energy share (t, t) of the gradient of column j in the subspace of row i.

        Raises ValueError when gradients are not kept whole.
        """
        seen = self.glimpses(name)
        if self.whole is None:
            raise ValueError("energies need whole gradients; make the trace with whole=torch.float32")
        rows = [
            [captured(g.whole, f.frames.of(side, rank), side) for g in seen if g.whole is not None] for f in seen
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def spectra(self, name: str) -> Tensor:
        """The singular values of a site's gradients, (t, min(m, n))."""
        return torch.stack([g.frames.s for g in self.glimpses(name)])

    def weight_spectra(self, name: str) -> Tensor:
        """The singular values of the weight, (t, min(m, n))."""
        return torch.stack([g.weight for g in self.glimpses(name) if g.weight is not None])


def count_sketch(g: Tensor, size: int, seed: int = 0) -> Tensor:
    """A random projection (size,) of all entries of g that keeps inner products in the mean, in float64.

    Every entry is added to one random place with a random sign; the same ones for the same number of entries.
    The standard error of a cosine is about 1 / sqrt(size) (Charikar, Chen and Farach-Colton, 2002).
    """
    generator = torch.Generator().manual_seed(seed)
    flat = g.detach().flatten().double().cpu()
    place = torch.randint(size, (len(flat),), generator=generator)
    sign = torch.randint(2, (len(flat),), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    return torch.zeros(size, dtype=torch.float64).index_add_(0, place, flat * sign)
