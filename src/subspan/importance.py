"""How much each site matters, measured on data: one number a site, for budgets to weigh."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from subspan import linalg, site
from subspan.metric import Batches, Forward, Loss, Metric, Need, collect
from subspan.watch import evaluating

Sites = Mapping[str, nn.Module]
Hook = Callable[..., Any]


class Importance(Protocol):
    """Measure how much each site matters."""

    def __call__(
        self, model: nn.Module, sites: Sites, *, batches: Batches, forward: Forward, loss: Loss
    ) -> dict[str, float]:
        """One number for each site; raises ValueError for one that no batch reaches."""
        ...


@dataclass(frozen=True, slots=True)
class Outliers:
    """The share of a block's entries that stand out (OWL, arXiv:2310.05175), the same for all its sites.

    a_ij = |w_ij| (mean x_j^2)^(1/2),   D = #{a > factor * mean a} / #a   over all sites of the block
    """

    factor: float = 5.0

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"outlier factor {self.factor} is not above 0; entries count beyond that many means")

    def __call__(
        self, model: nn.Module, sites: Sites, *, batches: Batches, forward: Forward, loss: Loss
    ) -> dict[str, float]:
        """D of each site's block."""
        squares = collect(model, batches, _Square(), sites, forward=forward)
        blocks: dict[str, list[str]] = {}
        for name in sites:
            blocks.setdefault(block_of(name), []).append(name)

        def entries(name: str) -> Tensor:
            weight = linalg.wide(site.matrix(sites[name]).detach())
            return weight.abs() * squares[name].to(weight.dtype).sqrt()

        found = {}
        for block, names in blocks.items():
            count = sum(site.matrix(sites[name]).numel() for name in names)
            bar = self.factor * sum(float(entries(name).double().sum()) for name in names) / count
            found[block] = sum(int((entries(name) > bar).sum()) for name in names) / count
        return {name: found[block_of(name)] for name in sites}


@dataclass(frozen=True, slots=True)
class BlockCosine:
    """How far a block turns what goes through it (ShortGPT, arXiv:2403.03853), the same for all its sites.

    1 - mean over tokens of cos(input, output)
    """

    def __call__(
        self, model: nn.Module, sites: Sites, *, batches: Batches, forward: Forward, loss: Loss
    ) -> dict[str, float]:
        """The influence of each site's block; raises ValueError for a block that changes the size."""
        tally = _Tally()

        def see(block: str) -> Hook:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                y = output[0] if isinstance(output, tuple | list) else output
                if x.shape != y.shape:
                    raise ValueError(
                        f"{block} turns {tuple(x.shape)} into {tuple(y.shape)}, so no angle is between them; "
                        "leave its sites out or choose another budget"
                    )
                cosine = torch.cosine_similarity(x.double(), y.double(), dim=-1)
                tally.add(block, (1 - cosine).sum(), cosine.numel())

            return hook

        blocks = dict.fromkeys(block_of(name) for name in sites)
        hooks = {block: (model.get_submodule(block), see(block)) for block in blocks}
        with _watching(model, hooks, with_kwargs=True), torch.no_grad():
            for batch in batches:
                forward(model, batch)
        return {name: tally.mean(block_of(name)) for name in sites}


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How much the loss feels an error in a site's outputs y (tokens, m), whatever its direction.

        mean over batches of sum over tokens of |dL/dy|^2 / m

    Times the mean square of the error it is, but for a factor common to all sites, the rise of the loss to second
    order: with the Fisher information for the curvature, and the error's direction independent of the gradient's.
    """

    def __call__(
        self, model: nn.Module, sites: Sites, *, batches: Batches, forward: Forward, loss: Loss
    ) -> dict[str, float]:
        """The sensitivity of each site; gradients of the model's parameters are neither made nor touched."""
        site.require_calls(sites, self)
        tally, count = _Tally(), 0

        def see(name: str) -> Hook:
            def felt(grad: Tensor) -> None:
                tally.add(name, grad.detach().double().square().sum() / site.matrix(sites[name]).shape[0], 0)

            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                # A copy, because a leaf may not be written into by what follows.
                y = output if output.requires_grad else output.requires_grad_().clone()
                y.register_hook(felt)  # type: ignore[no-untyped-call]
                return y

            return hook

        hooks = {name: (module, see(name)) for name, module in sites.items()}
        with _frozen(model), _watching(model, hooks), torch.enable_grad():
            for batch in batches:
                torch.autograd.backward(loss(model, batch))
                count += 1
        return {name: tally.total(name) / count for name in sites}


def block_of(name: str) -> str:
    """The outermost numbered module a site is in, or the site itself where nothing is numbered.

    >>> block_of("model.layers.3.mlp.experts.0.up"), block_of("lm_head")
    ('model.layers.3', 'lm_head')
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: at + 1])


@dataclass(frozen=True, slots=True)
class _Square:
    """Columns count by the root mean square of their inputs."""

    needs: ClassVar[Need] = "inputs"

    def fold(self, x: Tensor) -> Tensor:
        return x.square().sum(0)

    def metric(self, mean: Tensor | None) -> Metric:
        return Metric(right=None if mean is None else mean.sqrt())


class _Tally:
    """Sums and counts by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor, count: int) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[name] = self.counts.get(name, 0) + count

    def total(self, name: str) -> float:
        if name not in self.sums:
            raise ValueError(
                f"no calibration batch reached {name}; use more data or leave the site out, and where batches are "
                "a generator that was read before, pass a list"
            )
        linalg.require_finite(self.sums[name], f"the importance of {name}")
        return float(self.sums[name])

    def mean(self, name: str) -> float:
        return self.total(name) / self.counts[name]


@contextmanager
def _watching(
    model: nn.Module, hooks: Mapping[str, tuple[nn.Module, Hook]], *, with_kwargs: bool = False
) -> Iterator[None]:
    """Forward hooks for a while, in eval mode."""
    handles = [module.register_forward_hook(hook, with_kwargs=with_kwargs) for module, hook in hooks.values()]
    try:
        with evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient for a while."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p, was in wanted:
            p.requires_grad_(was)
