"""What "close" means, and the statistics of data it is read from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from subspan import linalg

Batches = Iterable[Any]
Forward = Callable[[nn.Module, Any], object]


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """Closeness of an op to a weight w (m, n): error = |left (w - op) right|_F.

    `left` is None (identity), a diagonal (m,) or a matrix (m, m); `right` likewise with n. With `right` the
    Cholesky factor of the inputs' second moments E[x x^T], the error is the outputs' root mean square error.
    """

    left: Tensor | None = None
    right: Tensor | None = None

    def apply(self, w: Tensor) -> Tensor:
        """left @ w @ right."""
        return _times(self.right, self.apply_left(w).mT).mT if self.right is not None else self.apply_left(w)

    def apply_left(self, w: Tensor) -> Tensor:
        """left @ w."""
        return w if self.left is None else _times(self.left.mT if self.left.ndim > 1 else self.left, w)

    def solve_left(self, u: Tensor) -> Tensor:
        """inverse(left) @ u; raises ValueError for a singular left."""
        if self.left is None:
            return u
        factor = self.left if self.left.ndim == 1 else self.left.mT
        try:
            solution = linalg.solve_right(u.mT, factor).mT
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            solution = torch.full_like(u, torch.nan)
        if not bool(torch.isfinite(solution).all()):
            raise ValueError(
                f"the left metric of shape {tuple(self.left.shape)} is singular; add a small ridge to it"
            )
        return solution

    def error(self, w: Tensor, approximation: Tensor) -> float:
        """The relative error |left (w - approximation) right|_F / |left w right|_F; 0 for a zero weight."""
        w, approximation = linalg.wide(w), linalg.wide(approximation)
        total = self.apply(w).double().norm()
        return float(self.apply(w - approximation).double().norm() / total) if total else 0.0


def _times(factor: Tensor, w: Tensor) -> Tensor:
    """factor^T @ w for a diagonal or square factor, in the wider of the two precisions."""
    dtype = torch.promote_types(factor.dtype, linalg.wide(w).dtype)
    factor, w = factor.to(dtype), w.to(dtype)
    return factor[:, None] * w if factor.ndim == 1 else factor.mT @ w


class Measure(Protocol):
    """How the metric of one site is read off the inputs that reach it."""

    @property
    def needs_data(self) -> bool:
        """Whether statistics must be collected before `metric` can be called."""
        ...

    def fold(self, x: Tensor) -> Tensor:
        """The statistic of inputs x (tokens, n), summed over tokens."""
        ...

    def metric(self, mean: Tensor | None) -> Metric:
        """The metric, from the statistic's mean over all tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """Every entry of the weight counts the same: no data is needed."""

    needs_data = False

    def fold(self, x: Tensor) -> Tensor:
        """Nothing to remember."""
        return x.new_zeros(())

    def metric(self, mean: Tensor | None) -> Metric:
        """The identity."""
        return Metric()


@dataclass(frozen=True, slots=True)
class AbsMean:
    """Columns count by how large their inputs are (ASVD, arXiv:2312.05821).

    right = diag((mean |x|)^alpha + eps)
    """

    alpha: float = 0.5
    eps: float = 1e-6
    needs_data = True

    def fold(self, x: Tensor) -> Tensor:
        """Sum of |x|, (n,)."""
        return x.abs().sum(0)

    def metric(self, mean: Tensor | None) -> Metric:
        """A diagonal on the right."""
        return Metric(right=_present(mean).double() ** self.alpha + self.eps)


@dataclass(frozen=True, slots=True)
class Gram:
    """Errors count as they show in the outputs (SVD-LLM, arXiv:2403.07378).

    right right^T = E[x x^T] + ridge * mean(diag) * I
    """

    ridge: float = 0.0
    needs_data = True

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise ValueError(
                f"ridge {self.ridge} is negative; it is a share of the mean of the diagonal, e.g. 1e-3"
            )

    def fold(self, x: Tensor) -> Tensor:
        """Sum of x x^T, (n, n)."""
        return x.mT @ x

    def metric(self, mean: Tensor | None) -> Metric:
        """A triangular matrix on the right."""
        return Metric(right=linalg.whiten(_present(mean), self.ridge).factor)


MEASURES: dict[str, Measure] = {"plain": Plain(), "absmean": AbsMean(), "gram": Gram()}


def _present(mean: Tensor | None) -> Tensor:
    if mean is None:
        raise ValueError("this metric is read off data: pass calibration batches (command line: --calibrate)")
    return mean


def call(model: nn.Module, batch: Any) -> object:
    """The default way to run a model: keywords for a mapping, one positional argument for anything else."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def collect(
    model: nn.Module,
    batches: Batches,
    measure: Measure,
    sites: Mapping[str, nn.Module],
    *,
    forward: Forward = call,
) -> dict[str, Tensor]:
    """Run the batches through the model and return each site's mean statistic, in float32.

    Sites that receive the very same tensor (q, k and v of an attention) share one accumulator. Raises
    ValueError for a site that no batch reaches, or whose inputs hold NaN or Inf.
    """
    tally = _Tally(measure)
    hooks = [m.register_forward_pre_hook(tally.hook(name), with_kwargs=True) for name, m in sites.items()]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                tally.seen.clear()
                forward(model, batch)
    finally:
        tally.seen.clear()
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    return {name: tally.mean(name) for name in sites}


class _Tally:
    """Running sums per group of sites that share an input."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.sums: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}
        self.leader: dict[str, str] = {}
        self.calls: dict[str, int] = {}
        self.seen: list[tuple[Tensor, int, str, int]] = []
        self.means: dict[str, Tensor] = {}

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            call = self.calls[name] = self.calls.get(name, 0) + 1
            # The version tells a tensor from itself after a change in place.
            same = (seen for seen in self.seen if seen[0] is x and seen[1] == x._version)
            first, its_call = next(((s[2], s[3]) for s in same), (name, call))
            if self.leader.setdefault(name, first) != first or (first != name and its_call != call):
                raise self.refusal(name)
            if first == name:
                self.seen = [*self.seen[-1:], (x, x._version, name, call)]
                self.add(name, linalg.wide(x.detach()).reshape(-1, x.shape[-1]))

        return see

    def refusal(self, name: str) -> ValueError:
        return ValueError(
            f"{name} shares its input with {self.leader[name]} only sometimes; collect it on its own"
        )

    def add(self, name: str, x: Tensor) -> None:
        total = self.measure.fold(x)
        if name in self.sums:
            self.sums[name] += total
        else:
            self.sums[name] = total
        self.count[name] = self.count.get(name, 0) + x.shape[0]

    def mean(self, name: str) -> Tensor:
        if name not in self.leader:
            raise ValueError(f"no calibration batch reached {name}; use more data or leave the site out")
        first = self.leader[name]
        if self.calls[name] != self.calls[first]:
            raise self.refusal(name)
        if first not in self.means:
            self.means[first] = self.sums[first] / self.count[first]
            linalg.require_finite(self.means[first], f"the input statistic of {first}")
        return self.means[first]
