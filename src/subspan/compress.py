"""Compression: a budget gives ranks, a measure says what is close, the best factors take the weights' place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from subspan import linalg
from subspan.budget import Budget
from subspan.edit import Edit, edit, linears, shapes, sites
from subspan.fit import Decomposition, decompose
from subspan.metric import Batches, Forward, Measure, Plain, call, collect
from subspan.ops import Dense, LinOp, OpLinear
from subspan.plan import Plan, SitePlan, site_plan
from subspan.select import Select
from subspan.threads import spread

Item = TypeVar("Item")
Track = Callable[[Iterable[Item]], Iterable[Item]]


@dataclass(frozen=True, slots=True)
class Compression:
    """A published compression method: `budget` sizes it by the weights' spectra, `measure` says what is close."""

    budget: Budget
    measure: Measure = field(default_factory=Plain)


@dataclass(frozen=True, eq=False)
class Study:
    """A model's sites taken apart once, so that any number of plans can be made and applied.

    `spectra` are the weights' own singular values, which budgets read; `parts` the decompositions under
    `measure`, which predict errors and give factors.
    """

    measure: Measure
    spectra: Mapping[str, Tensor]
    parts: Mapping[str, Decomposition]
    bits: Mapping[str, int]
    other_bytes: int

    def plan(self, budget: Budget, *, method: str = "custom", args: Mapping[str, Any] | None = None) -> Plan:
        """Ranks for a budget, with what they cost and the errors they make."""
        shape = {name: (p.left.shape[0], p.right.shape[1]) for name, p in self.parts.items()}
        ranks = budget(self.spectra, shape)
        if absent := [name for name in shape if name not in ranks]:
            raise ValueError(f"{budget!r} gives no rank to {', '.join(absent[:3])}; a budget must size every site")
        rows: dict[str, SitePlan] = {
            name: site_plan(shape[name], ranks[name], part.error, bits=self.bits[name], where=name)
            for name, part in self.parts.items()
        }
        return Plan(method, dict(args or {}), rows, self.other_bytes)

    def apply(self, model: nn.Module, plan: Plan) -> Edit:
        """Put the planned ops in place of the linear layers; `undo()` of the result puts the layers back."""
        if not plan.sites:
            raise ValueError("the plan has no sites; make one with `subspan plan`")
        plan.check(shapes(linears(model)))
        sites(model, lambda name: name in plan.sites)
        if unknown := [name for name in plan.sites if name not in self.parts]:
            raise ValueError(f"the plan names {', '.join(unknown[:3])}, which this study left out; study them too")
        changed = [name for name, site in plan.sites.items() if site.form != "keep"]

        def make(name: str, layer: nn.Module) -> nn.Module:
            site, part = plan.sites[name], self.parts[name]
            weight, bias = layer.get_parameter("weight"), dict(layer.named_parameters()).get("bias")
            op: LinOp = part.cut(site.rank, name)
            return OpLinear((op if site.form == "lowrank" else Dense(op.dense().detach())).to(weight.dtype), bias)

        return edit(model, changed, make)


def study(
    model: nn.Module,
    measure: Measure | None = None,
    *,
    select: Select | None = None,
    batches: Batches | None = None,
    forward: Forward = call,
    track: Track[str] = iter,
    spectra: Mapping[str, Tensor] | None = None,
) -> Study:
    """Take the selected layers apart: collect statistics if the measure needs them, then decompose each weight.

    `batches` are calibration inputs, run through the model by `forward`; `track` wraps the list of sites, for a
    progress bar; `spectra` may hand over singular values already computed. Raises ValueError naming the site
    for a weight with NaN or Inf, and when data is needed but not given.
    """
    measure = measure or Plain()
    found = sites(model, select)
    for name, layer in found.items():
        linalg.require_finite(layer.weight, f"the weight of {name}")
    means: Mapping[str, Tensor] = {}
    if measure.needs_data:
        if batches is None:
            raise ValueError(
                f"{measure!r} reads the metric of {next(iter(found))} and {len(found) - 1} more sites off data: "
                "pass calibration batches (command line: --calibrate)"
            )
        means = collect(model, batches, measure, found, forward=forward)

    def take(name: str) -> tuple[Decomposition, Tensor]:
        w = found[name].weight.detach()
        part = decompose(w, measure.metric(means.get(name)))
        if spectra is not None and name in spectra:
            return part, spectra[name]
        return part, linalg.svdvals(w) if measure.needs_data else part.s

    both = dict(zip(track(list(found)), spread(take, found), strict=True))
    parts, own = {n: part for n, (part, _) in both.items()}, {n: s for n, (_, s) in both.items()}
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    weights = sum(layer.weight.numel() * layer.weight.element_size() for layer in found.values())
    bits = {name: 8 * layer.weight.element_size() for name, layer in found.items()}
    return Study(measure, own, parts, bits, everything - weights)


def compress(
    model: nn.Module,
    method: Compression,
    *,
    select: Select | None = None,
    batches: Batches | None = None,
    forward: Forward = call,
    track: Track[str] = iter,
) -> tuple[Plan, Edit]:
    """Plan and apply in one go; the plan says what was done, the edit undoes it.

    >>> import torch
    >>> from subspan.budget import Err, Uniform
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> plan, _ = compress(net, Compression(Uniform(Err(0.5))))
    >>> plan.ranks()
    {'0': 4, '1': 4}
    """
    taken = study(model, method.measure, select=select, batches=batches, forward=forward, track=track)
    plan = taken.plan(method.budget)
    return plan, taken.apply(model, plan)
