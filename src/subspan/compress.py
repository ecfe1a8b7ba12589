"""Compression: a budget gives ranks, a measure says what is close, the best factors take the weights' place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from subspan import linalg, site
from subspan.budget import Budget, Bytes, Evidence, Informed, Scores
from subspan.edit import Edit, edit, matrices, shapes, sites
from subspan.fit import Decomposition, decompose
from subspan.importance import Importance
from subspan.metric import Batches, Forward, Loss, Measure, Plain, call, collect, reported_loss
from subspan.ops import Dense, LinOp, OpLayer
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

    @property
    def needs_data(self) -> bool:
        """Whether the measure or the budget is read off calibration batches."""
        asks = isinstance(self.budget, Informed) and self.budget.importance is not None
        return asks or self.measure.needs != "nothing"


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Data to read a measure off: `forward` runs a model on a batch, `loss` is what gradients are taken of."""

    batches: Batches | None = None
    forward: Forward = call
    loss: Loss = reported_loss

    def read(
        self,
        model: nn.Module,
        measure: Measure,
        found: Mapping[str, nn.Module],
        counts: dict[str, int] | None = None,
    ) -> Mapping[str, Tensor]:
        """Each site's mean statistic, or none at all for a measure that needs nothing; `counts` is for `collect`.

        Raises ValueError without batches, and what `collect` raises.
        """
        if measure.needs == "nothing":
            return {}
        batches = self.present(measure, list(found))
        return collect(model, batches, measure, found, forward=self.forward, loss=self.loss, counts=counts)

    def present(self, measure: Measure, names: Sequence[str]) -> Batches:
        """The batches; raises ValueError without them, naming the measure and the sites that need them."""
        if self.batches is None:
            raise ValueError(
                f"{measure!r} reads the metric of {names[0]} and {len(names) - 1} more sites off data: "
                "pass calibration batches (command line: --calibrate)"
            )
        return self.batches


@dataclass(frozen=True, slots=True, eq=False)
class Witness:
    """What can still be asked of a model after it was taken apart: the importance of its sites, measured once."""

    model: nn.Module
    sites: Mapping[str, nn.Module]
    data: Calibration
    told: dict[Importance, Scores] = field(default_factory=dict)

    def ask(self, importance: Importance) -> Scores:
        """One number for each site.

        Raises ValueError without batches, and RuntimeError when the model is no longer the one that was studied.
        """
        if importance not in self.told:
            data, batches = self.data, self.data.batches
            if batches is None:
                raise ValueError(
                    f"{importance!r} is read off data: pass calibration batches (command line: --calibrate)"
                )
            now = {name: site.parameter(module) for name, module in matrices(self.model).items()}
            if changed := [name for name, m in self.sites.items() if now.get(name) is not site.parameter(m)]:
                raise RuntimeError(f"{changed[0]} was replaced after the study; undo that edit, or study again")
            self.told[importance] = importance(
                self.model, self.sites, batches=batches, forward=data.forward, loss=data.loss
            )
        return self.told[importance]


class Walk(Protocol):
    """In which order layers are calibrated, decomposed and replaced."""

    def compress(
        self, model: nn.Module, method: Compression, *, select: Select | None, data: Calibration, track: Track[str]
    ) -> tuple[Plan, Edit]:
        """Plan and apply a method; the plan says what was done, the edit undoes it."""
        ...

    def follow(
        self, model: nn.Module, plan: Plan, measure: Measure, *, data: Calibration, track: Track[str]
    ) -> tuple[Plan, Edit]:
        """Do what a plan says; the plan that comes back has the errors that were made."""
        ...


@dataclass(frozen=True, eq=False)
class Study:
    """A model's sites taken apart once, so that any number of plans can be made and applied.

    `spectra` are the weights' own singular values, which most budgets read; `parts` the decompositions under
    `measure`, which predict errors and give factors; `witness` measures what else a budget asks for; `ridges` are
    the ridges that singular statistics needed, with the number of tokens they were of.
    """

    measure: Measure
    spectra: Mapping[str, Tensor]
    parts: Mapping[str, Decomposition]
    bits: Mapping[str, int]
    other_bytes: int
    biases: Mapping[str, int]
    witness: Witness
    ridges: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def evidence(self) -> Evidence:
        """What budgets may look at; gained biases count as if every site gained its own."""
        gains = sum(self.bits[name] * count // 8 for name, count in self.biases.items())
        under = {name: part.s for name, part in self.parts.items()}
        return Evidence(self.spectra, under, self.bits, self.other_bytes + gains, self.witness.ask)

    def plan(self, budget: Budget, *, method: str = "custom", args: Mapping[str, Any] | None = None) -> Plan:
        """Ranks for a budget, with what they cost and the errors they make.

        Raises ValueError for a budget that cannot fit the model into the bytes asked for.
        """
        shape = {name: (p.left.shape[0], p.right.shape[1]) for name, p in self.parts.items()}
        ranks = (budget.on(self.evidence) if isinstance(budget, Informed) else budget)(self.spectra, shape)
        if absent := [name for name in shape if name not in ranks]:
            raise ValueError(f"{budget!r} gives no rank to {', '.join(absent[:3])}; a budget must size every site")
        rows: dict[str, SitePlan] = {}
        for name, part in self.parts.items():
            ridge, tokens = self.ridges.get(name, (0.0, 0))
            rows[name] = site_plan(
                shape[name], ranks[name], part.error, bits=self.bits[name], where=name, bias=self.biases[name],
                ridge=ridge, tokens=tokens,
            )  # fmt: skip
        asked = budget.target if isinstance(budget, Informed) else None
        said = (
            {}
            if asked is None
            else {"target": {"energy": asked} if isinstance(asked, float | int) else asked.said}
        )
        plan = Plan(method, dict(said if args is None else args), rows, self.other_bytes)
        if isinstance(asked, Bytes) and plan.bytes[1] > asked.count:
            raise ValueError(
                f"{budget!r} needs {plan.bytes[1]:,} bytes at least, {self.other_bytes:,} of them in no site; "
                f"{asked.count:,} are too few: allow more, select more sites, or take another budget"
            )
        return plan

    def apply(self, model: nn.Module, plan: Plan) -> Edit:
        """Put the planned ops in place of the layers; `undo()` of the result puts the layers back."""
        if not plan.sites:
            raise ValueError("the plan has no sites; make one with `subspan plan`")
        plan.check(shapes(matrices(model)))
        sites(model, lambda name: name in plan.sites)
        if unknown := [name for name in plan.sites if name not in self.parts]:
            raise ValueError(f"the plan names {', '.join(unknown[:3])}, which this study left out; study them too")
        changed = [name for name, site in plan.sites.items() if site.form != "keep"]

        return edit(model, changed, lambda n, layer: compressed(layer, plan.sites[n], self.parts[n], where=n))


def compressed(layer: nn.Module, row: SitePlan, part: Decomposition, *, where: str) -> OpLayer:
    """The layer with its weight cut as planned; the bias stays the very same unless the metric has a mean."""
    _require_room(layer, part, where)
    dtype, bias = site.parameter(layer).dtype, site.bias(layer)
    op: LinOp = part.cut(row.rank, where)
    shift = part.shift(row.rank)
    kept: Tensor | None = bias
    if shift is not None:
        new = (shift if bias is None else bias.detach() + shift).to(dtype)
        kept = nn.Parameter(new, requires_grad=bias is not None and bias.requires_grad)
    op = (op if row.form == "lowrank" else Dense(op.dense().detach())).to(dtype)
    for p in op.parameters():
        # As it will lie in memory when loaded: another order rounds otherwise.
        p.data = p.data.contiguous()
    return site.of(layer).rebuild(layer, op, kept)


def gained(layer: nn.Module, part: Decomposition) -> int:
    """How many numbers of bias the layer gains when it is cut."""
    return site.matrix(layer).shape[0] if part.mean is not None and site.bias(layer) is None else 0


def _require_room(layer: nn.Module, part: Decomposition, where: str) -> None:
    """Raise ValueError where a metric with a mean meets a layer that cannot have a bias."""
    if part.mean is not None and not site.of(layer).biased:
        raise ValueError(
            f"{where} has no place for the bias that a metric with a mean, such as covariance, gives it; leave it "
            f"out with '!{where}', or compress it with the metric gram"
        )


def study(
    model: nn.Module,
    measure: Measure | None = None,
    *,
    select: Select | None = None,
    batches: Batches | None = None,
    forward: Forward = call,
    loss: Loss = reported_loss,
    track: Track[str] = iter,
    spectra: Mapping[str, Tensor] | None = None,
) -> Study:
    """Take the selected layers apart: collect statistics if the measure needs them, then decompose each weight.

    `batches` are calibration inputs, run through the model by `forward`, or by `loss` for a measure of gradients;
    `track` wraps the list of sites, for a progress bar; `spectra` may hand over singular values already computed.
    Raises ValueError naming the site for a weight with NaN or Inf, and when data is needed but not given.
    """
    measure = measure or Plain()
    found = sites(model, select)
    for name, layer in found.items():
        linalg.require_finite(site.matrix(layer), f"the weight of {name}")
    data = Calibration(batches, forward, loss)
    counts: dict[str, int] = {}
    means = data.read(model, measure, found, counts)
    ridges: dict[str, tuple[float, int]] = {}

    def take(name: str) -> tuple[Decomposition, Tensor]:
        w = site.matrix(found[name]).detach()
        metric = measure.metric(means.get(name))
        if metric.ridge:
            ridges[name] = (metric.ridge, counts[name])
        part = decompose(w, metric)
        _require_room(found[name], part, name)
        if spectra is not None and name in spectra:
            return part, spectra[name]
        return part, part.s if measure.needs == "nothing" else linalg.svdvals(w)

    both = dict(zip(track(list(found)), spread(take, found), strict=True))
    parts, own = {n: part for n, (part, _) in both.items()}, {n: s for n, (_, s) in both.items()}
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    weights = sum(w.numel() * w.element_size() for w in map(site.matrix, found.values()))
    bits = {name: 8 * site.parameter(layer).element_size() for name, layer in found.items()}
    biases = {name: gained(layer, parts[name]) for name, layer in found.items()}
    return Study(measure, own, parts, bits, everything - weights, biases, Witness(model, found, data), ridges)


@dataclass(frozen=True, slots=True)
class OneShot:
    """All layers are calibrated through the model as it is, and then replaced at once."""

    def compress(
        self, model: nn.Module, method: Compression, *, select: Select | None, data: Calibration, track: Track[str]
    ) -> tuple[Plan, Edit]:
        """Study the model, plan, and apply the plan."""
        batches, measure = data.batches, method.measure
        taken = study(
            model, measure, select=select, batches=batches, forward=data.forward, loss=data.loss, track=track
        )
        plan = taken.plan(method.budget)
        return plan, taken.apply(model, plan)

    def follow(
        self, model: nn.Module, plan: Plan, measure: Measure, *, data: Calibration, track: Track[str]
    ) -> tuple[Plan, Edit]:
        """Study the layers that the plan changes, and apply it."""
        plan.check(shapes(matrices(model)))
        changed = {name for name, site in plan.sites.items() if site.form != "keep"}
        if not changed:
            return plan, Edit(model, {})
        chosen = changed.__contains__
        taken = study(
            model, measure, select=chosen, batches=data.batches, forward=data.forward, loss=data.loss, track=track
        )
        return plan, taken.apply(model, plan)


def compress(
    model: nn.Module,
    method: Compression,
    *,
    select: Select | None = None,
    batches: Batches | None = None,
    forward: Forward = call,
    loss: Loss = reported_loss,
    track: Track[str] = iter,
    walk: Walk = OneShot(),
) -> tuple[Plan, Edit]:
    """Plan and apply in one go; the plan says what was done, the edit undoes it.

    `walk` is the order in which it happens: all layers at once, or `subspan.walk.Blockwise`.

    >>> import torch
    >>> from subspan.budget import Err, Uniform
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> plan, _ = compress(net, Compression(Uniform(Err(0.5))))
    >>> plan.ranks()
    {'0': 4, '1': 4}
    """
    data = Calibration(batches, forward, loss)
    return walk.compress(model, method, select=select, data=data, track=track)
