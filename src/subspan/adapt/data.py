"""What starts of adapters see of data: principal directions of inputs, and gradients, a few sites at a time."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from subspan import site as kinds
from subspan.adapt.init import FromWeight
from subspan.adapt.layer import Adapted, Adapter, Sharing
from subspan.adapt.layers import require, shape
from subspan.compress import Calibration
from subspan.linalg import pin_signs, wide
from subspan.metric import Covariance, Measure, Metric, Need
from subspan.ops import LinOp, Zero

HELD = 2**30
Sites = Mapping[str, nn.Module]
Solver = Literal["exact", "gram", "random"]


@dataclass(frozen=True)
class FromData(Sharing):
    """A start that must look at data before it can give an op: `look` does, and returns one that has `seen`.

    One that does not `reads` data looks at all sites together, to share tensors between them.
    """

    seen: Mapping[str, LinOp] = field(default_factory=dict, repr=False, compare=False, kw_only=True)
    reads: ClassVar[bool] = True

    @abstractmethod
    def look(self, model: nn.Module, sites: Sites, data: Calibration, *, most: int = HELD) -> Self:
        """The same start with an op for each site, reading at most about `most` bytes of statistics at a time."""

    @abstractmethod
    def shell(self, site: str, w: Tensor, parts: Mapping[str, Tensor]) -> LinOp:
        """An op of zeros in the shapes of a saved one; `parts` are its tensors, such as `op.u`."""

    def __call__(self, site: str, w: Tensor) -> LinOp:
        """A copy of the op for one site and weight w (m, n); raises ValueError for a site that it has not seen."""
        return self._copy(site, w, {})

    def begin(self) -> Callable[[str, Tensor], LinOp]:
        """The same; without data, the copies share tensors where the ops do."""
        memo: dict[int, Any] = {}
        return self if self.reads else lambda site, w: self._copy(site, w, memo)

    def _copy(self, site: str, w: Tensor, memo: dict[int, Any]) -> LinOp:
        op = self.seen.get(site)
        if op is None or op.shape != tuple(w.shape):
            found = "has seen nothing of it" if op is None else f"has seen a layer of {op.shape} there"
            here, what = ("this model's data", ", data") if self.reads else ("this model", "")
            raise ValueError(
                f"{site}, {tuple(w.shape)}: {self!r} {found}; let it look at {here} with "
                f"prepare(adapter, model, sites{what})"
            )
        return copy.deepcopy(op, memo).to(wide(w[:0]))

    @property
    def idle(self) -> set[str]:
        """The sites that got no rank, and so need no adapter."""
        return {name for name, op in self.seen.items() if isinstance(op, Zero)}


def prepare(
    adapter: Adapter, model: nn.Module, sites: Sites, data: Calibration = Calibration(), *, most: int = HELD
) -> Adapter:
    """Let the adapter's start look at the data that reaches the sites; one that needs none is returned as it is.

    The batches are run in as few passes as keep the statistics below `most` bytes. Raises ValueError without
    batches, for a layer that cannot be looked at, and what `metric.collect` raises.

    >>> from subspan.methods.adapters import eva
    >>> net, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), torch.eye(4)
    >>> made = prepare(eva(rank=1), net, dict(net.named_children()), Calibration([x]))
    >>> made.op("0", net[0].weight).shape
    (3, 4)
    """
    op = adapter.op
    if not isinstance(op, FromData):
        return adapter
    if op.reads and data.batches is None:
        raise ValueError(f"{op!r} looks at data first: pass batches to prepare (command line: --data)")
    # A pass that follows would find an iterator empty.
    batches = list(data.batches) if isinstance(data.batches, Iterator) else data.batches
    return replace(adapter, op=op.look(model, sites, replace(data, batches=batches), most=most))


def remembered(adapter: Adapter, tensors: Mapping[str, Tensor], name: str = "default") -> Adapter:
    """The adapter as it is to be filled from saved tensors, which say what its start saw.

    Its op is then of zeros, in the shapes of the tensors of each site. Raises ValueError, when put on a layer, for
    tensors that no such start can have made.
    """
    op = adapter.op
    if not isinstance(op, FromData):
        return adapter
    return replace(adapter, op=Remembered(op, tensors, name))


@dataclass(frozen=True)
class Remembered(Sharing):
    """A start that makes ops of zeros in the shapes of saved tensors; what two sites share is one parameter."""

    start: FromData
    tensors: Mapping[str, Tensor] = field(repr=False)
    name: str = "default"

    def __call__(self, site: str, w: Tensor) -> LinOp:
        """The op for one site and weight w (m, n)."""
        return self.begin()(site, w)

    def begin(self) -> Callable[[str, Tensor], LinOp]:
        """The same, with a parameter for each tensor that is saved."""
        made: dict[int, nn.Parameter] = {}

        def shell(site: str, w: Tensor) -> LinOp:
            inside = f"{site}.adapters.{self.name}."
            parts = {key.removeprefix(inside): t for key, t in self.tensors.items() if key.startswith(inside)}
            op = self.start.shell(site, w, parts)
            for key, p in list(op.named_parameters()):
                at, _, leaf = key.rpartition(".")
                if f"op.{key}" in parts:
                    setattr(op.get_submodule(at), leaf, made.setdefault(id(parts[f"op.{key}"]), p))
            return op

        return shell


def size_of(name: str, module: nn.Module) -> tuple[int, int]:
    """The shape (m, n) of the matrix that an adapter sees; raises `NotAdaptable` where none can stand."""
    if isinstance(module, Adapted):
        return module.out_features, module.in_features
    require({name: module})
    return shape(module)


def rounds(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """The names in order, in parts whose sizes come to at most `most`; a larger one is a part of its own.

    >>> list(rounds({"a": 2, "b": 2, "c": 5, "d": 1}, 4))
    [['a', 'b'], ['c'], ['d']]
    """
    part: list[str] = []
    total = 0
    for name, size in sizes.items():
        if part and total + size > most:
            yield part
            part, total = [], 0
        part.append(name)
        total += size
    if part:
        yield part


@dataclass(frozen=True, slots=True)
class MeanGradient:
    """The gradient of the loss by the weight itself, (m, n); as a metric it weighs nothing."""

    needs: ClassVar[Need] = "gradients"

    def fold(self, x: Tensor) -> Tensor:
        """The gradient of one batch, in float32 at least."""
        return wide(x)

    def metric(self, mean: Tensor | None) -> Metric:
        """The identity."""
        return Metric()


def gradients(
    model: nn.Module, sites: Sites, data: Calibration, *, most: int = HELD
) -> Iterator[tuple[str, Tensor]]:
    """Each site's gradient (m, n) of the loss, averaged over the batches, one after another.

    Held at once are the sums and means of as many sites as take `most` bytes, and one gradient more: further sites
    wait for another pass through the batches. Raises ValueError for a layer without a weight of its own, and what
    `metric.collect` raises.
    """
    for name, module in sites.items():
        size_of(name, module)
        if kinds.kind_of(module) is None:
            raise ValueError(
                f"{name} is an {type(module).__name__}, whose weight is no parameter and so gets no gradient; "
                "merge it first, or choose an adapter that looks at inputs, such as eva"
            )
    # A mean beside its sum.
    sizes = {n: 2 * m.numel() * wide(m[:0]).element_size() for n, m in _matrices(sites).items()}
    yield from _read(model, sites, data, MeanGradient(), sizes, most)


def _matrices(sites: Sites) -> dict[str, Tensor]:
    return {name: kinds.matrix(module) for name, module in sites.items()}


def _read(
    model: nn.Module, sites: Sites, data: Calibration, measure: Measure, sizes: Mapping[str, int], most: int
) -> Iterator[tuple[str, Tensor]]:
    for part in rounds(sizes, most):
        means = dict(data.read(model, measure, {name: sites[name] for name in part}))
        for name in part:
            yield name, means.pop(name)


@dataclass(frozen=True, slots=True, eq=False)
class Principal:
    """The first directions of a layer's inputs: orthonormal `rows` (k, n), and their `shares` (k,) of variance."""

    rows: Tensor
    shares: Tensor


def principal(
    model: nn.Module,
    sites: Sites,
    data: Calibration,
    counts: Mapping[str, int],
    *,
    solver: Solver = "exact",
    seed: int = 0,
    most: int = HELD,
) -> dict[str, Principal]:
    """The `counts[site]` leading principal components of what reaches each site, over all tokens of all batches.

    The covariance is exact, in float64; held at once are those of as many sites as take `most` bytes. Sites that
    are given the very same tensor share one.
    """
    width = {name: size_of(name, module)[1] for name, module in sites.items()}
    sizes = {name: 2 * 8 * (n + 1) ** 2 for name, n in width.items()}
    like = wide(next(model.parameters())[:0].detach())
    found: dict[str, Principal] = {}
    last: tuple[Tensor, Principal] | None = None
    widest = max(counts.values(), default=1)
    for name, both in _read(model, sites, data, Covariance(), sizes, most):
        if len(both) != width[name] + 1:
            raise ValueError(
                f"{name} is a convolution in groups, whose inputs are those of several matrices; leave it out "
                f"with '!{name}', or choose an adapter that looks at gradients, such as lora_ga"
            )
        if last is None or last[0] is not both:
            last = both, components(both, min(widest, len(both) - 1), solver=solver, seed=seed, where=name)
        k = counts[name]
        found[name] = Principal(last[1].rows[:k].to(like), last[1].shares[:k].cpu())
    return found


def components(both: Tensor, k: int, *, solver: Solver = "exact", seed: int = 0, where: str = "") -> Principal:
    """The k leading principal components from the mean (n + 1, n + 1) of z z^T for z = (x, 1).

    >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    >>> components(Covariance().fold(x) / 2, 1)
    Principal(rows=tensor([[1., 0.]], dtype=torch.float64), shares=tensor([1.], dtype=torch.float64))
    """
    second, first = both[:-1, :-1], both[-1, :-1]
    c = second - torch.outer(first, first)
    if solver == "exact":
        values, v = torch.linalg.eigh(c)
        values, v = values.flip(-1)[:k], v.flip(-1)[:, :k]
    else:
        _, s, vh = FromWeight(k, solver=solver, seed=seed).triples(where, c)
        values, v = s[:k], vh[:k].mT
    total = c.diagonal().sum().clamp_min(0)
    shares = torch.where(total > 0, values.clamp_min(0) / total, 0.0)
    return Principal(pin_signs(v, v.mT)[1].contiguous(), shares)


def shared_out(shares: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """How many of the `total` largest of all shares (descending) are each site's; equal ones go to the first.

    >>> shared_out({"a": torch.tensor([0.9, 0.1]), "b": torch.tensor([0.5, 0.3])}, 2)
    {'a': 1, 'b': 1}
    """
    pool = torch.cat([x.double().cpu() for x in shares.values()])
    if not 0 <= total <= len(pool):
        raise ValueError(f"cannot choose {total} of {len(pool)} components; ask for 0..{len(pool)}")
    owner = torch.repeat_interleave(torch.tensor([len(x) for x in shares.values()]))
    chosen = owner[pool.argsort(descending=True, stable=True)[:total]]
    counts = torch.bincount(chosen, minlength=len(shares)).tolist()
    return dict(zip(shares, counts, strict=True))
