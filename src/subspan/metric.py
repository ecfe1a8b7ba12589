"""What "close" means, and the statistics of data it is read from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from subspan import linalg, site
from subspan.watch import Watch, evaluating

Batches = Iterable[Any]
Forward = Callable[[nn.Module, Any], object]
Loss = Callable[[nn.Module, Any], Tensor]
Need = Literal["nothing", "inputs", "gradients"]


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """Closeness of an op to a weight w (m, n): error = |left (w - op) right|_F.

    `left` is None (identity), a diagonal (m,) or a matrix (m, m); `right` likewise with n. With `right` the
    Cholesky factor of the inputs' second moments E[x x^T], the error is the outputs' root mean square error.
    With `mean` (n,) the layer's bias takes up the error that the op makes there, (w - op) mean: for `right` a
    factor of the inputs' covariance the error is then the outputs', bias included. `ridge` is what had to be added
    to a singular statistic, as a share of the mean of its diagonal; 0 for none.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    mean: Tensor | None = None
    ridge: float = 0.0

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
    """How the metric of one site is read off what reaches it: its inputs, or the gradients of its weight."""

    @property
    def needs(self) -> Need:
        """What `fold` must see before `metric` can be called."""
        ...

    def fold(self, x: Tensor) -> Tensor:
        """The statistic of inputs (tokens, n), summed over tokens, or that of one batch's gradient (m, n)."""
        ...

    def metric(self, mean: Tensor | None) -> Metric:
        """The metric, from the statistic's mean over all tokens, or over all batches' gradients."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """Every entry of the weight counts the same: no data is needed."""

    needs: ClassVar[Need] = "nothing"

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
    needs: ClassVar[Need] = "inputs"

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
    needs: ClassVar[Need] = "inputs"

    def __post_init__(self) -> None:
        _require_share(self.ridge)

    def fold(self, x: Tensor) -> Tensor:
        """Sum of x x^T, (n, n)."""
        return x.mT @ x

    def metric(self, mean: Tensor | None) -> Metric:
        """A triangular matrix on the right."""
        white = linalg.whiten(_present(mean), self.ridge)
        return Metric(right=white.factor, ridge=white.ridge if white.ridge > self.ridge else 0.0)


@dataclass(frozen=True, slots=True)
class Covariance:
    """Like `Gram`, with the inputs' mean left to the bias: the principal components of the outputs.

        right right^T = C + ridge * mean(diag) * I,   C = E[x x^T] - E[x] E[x]^T,   bias + (w - op) E[x]

    The outputs' covariance is w C w^T, so their top eigenvectors U give op = U U^T w and the bias
    U U^T bias + (I - U U^T) E[y] of atomic feature mimicking (arXiv:2405.18146), with one statistic for all
    sites that share an input. Never worse than `Gram` on the data it was read off.
    """

    ridge: float = 0.0
    needs: ClassVar[Need] = "inputs"

    def __post_init__(self) -> None:
        _require_share(self.ridge)

    def fold(self, x: Tensor) -> Tensor:
        """Sum of z z^T for z = (x, 1), (n + 1, n + 1)."""
        # In float64, because C is a difference that cancels where the mean is large.
        z = nn.functional.pad(x.double(), (0, 1), value=1.0)
        return z.mT @ z

    def metric(self, mean: Tensor | None) -> Metric:
        """A triangular matrix on the right, and the mean."""
        both = _present(mean).double()
        second, first = both[:-1, :-1], both[-1, :-1]
        white = linalg.whiten(second - torch.outer(first, first), self.ridge)
        added = white.ridge if white.ridge > self.ridge else 0.0
        return Metric(right=white.factor, mean=first, ridge=added)


@dataclass(frozen=True, slots=True)
class Fisher:
    """Columns count by how much the loss feels them (FWSVD, arXiv:2207.00112).

        right = diag(f)^(1/2),   f_j = sum_i E[(dL/dw_ij)^2]

    The mean runs over calibration batches: with one sample in each it is the empirical Fisher information,
    with more it is less than that. A weight that no batch's loss feels counts evenly.
    """

    needs: ClassVar[Need] = "gradients"

    def fold(self, x: Tensor) -> Tensor:
        """Squares of a gradient (m, n), summed over rows, (n,)."""
        norms: Tensor = torch.linalg.vector_norm(x, dim=0, dtype=torch.float64)
        return norms.square()

    def metric(self, mean: Tensor | None) -> Metric:
        """A diagonal on the right."""
        root = _present(mean).double().sqrt()
        return Metric(right=torch.where(root.any(), root, 1.0))


def _require_share(ridge: float) -> None:
    if not ridge >= 0:
        raise ValueError(f"ridge {ridge} is negative; it is a share of the mean of the diagonal, e.g. 1e-3")


MEASURES: dict[str, Measure] = {
    "plain": Plain(), "absmean": AbsMean(), "gram": Gram(), "covariance": Covariance(), "fisher": Fisher(),
}  # fmt: skip


def _present(mean: Tensor | None) -> Tensor:
    if mean is None:
        raise ValueError("this metric is read off data: pass calibration batches (command line: --calibrate)")
    return mean


def call(model: nn.Module, batch: Any) -> object:
    """The default way to run a model: keywords for a mapping, one positional argument for anything else."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def reported_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model reports of itself, as those of transformers do for a batch with `labels`.

    Raises ValueError when it reports none.
    """
    loss = getattr(call(model, batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(model).__name__} reports no loss for this batch, and gradients need one; put `labels` into "
            "the batch, or pass loss=, a function of the model and a batch"
        )
    return loss


def collect(
    model: nn.Module,
    batches: Batches,
    measure: Measure,
    sites: Mapping[str, nn.Module],
    *,
    forward: Forward = call,
    loss: Loss = reported_loss,
    counts: dict[str, int] | None = None,
) -> dict[str, Tensor]:
    """Run the batches through the model and return each site's mean statistic, in float32 or wider.

    `forward` runs the model for a measure of inputs, `loss` for one of gradients; `counts` is told how many inputs
    each site had. Sites that receive the very same tensor (q, k and v of an attention) share one accumulator; of
    gradients no more than one is held at a time. Raises ValueError for a site that no batch reaches, or whose
    inputs or gradients hold NaN or Inf.
    """
    if measure.needs == "gradients":
        return _collect_gradients(model, batches, measure, sites, loss)
    site.require_inputs(sites, measure)
    tally = _Tally(measure)
    hooks = [m.register_forward_pre_hook(tally.hook(name), with_kwargs=True) for name, m in sites.items()]
    experts = dict(site.experts_of(sites))
    try:
        with evaluating(model), torch.no_grad(), Watch(experts, tally.see) if experts else nullcontext():
            for batch in batches:
                tally.seen.clear()
                forward(model, batch)
    finally:
        tally.seen.clear()
        for hook in hooks:
            hook.remove()
    means = {name: tally.mean(name) for name in sites}
    if counts is not None:
        counts.update({name: tally.count[tally.leader[name]] for name in sites})
    return means


def _collect_gradients(
    model: nn.Module, batches: Batches, measure: Measure, sites: Mapping[str, nn.Module], loss: Loss
) -> dict[str, Tensor]:
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in sites.items():
        holders.setdefault(site.parameter(module), []).append(name)
    sums: dict[str, Tensor] = {}
    count = 0

    def fold(weight: nn.Parameter) -> None:
        if weight.grad is None:
            return
        for name in holders[weight]:
            module = sites[name]
            new = measure.fold(site.of(module).view(module, weight.grad))
            sums[name] = sums[name] + new if name in sums else new
        weight.grad = None

    with evaluating(model), _learning(model, list(holders)), torch.enable_grad():
        listen = Tensor.register_post_accumulate_grad_hook
        hooks = [listen(w, fold) for w in holders]  # type: ignore[no-untyped-call]
        try:
            for batch in batches:
                felt = loss(model, batch)
                if felt.requires_grad:
                    torch.autograd.backward(felt)
                count += 1
        finally:
            for hook in hooks:
                hook.remove()
    for name in sites:
        if name not in sums:
            raise ValueError(f"no calibration batch reached {name}; use more data or leave the site out")
        linalg.require_finite(sums[name], f"the gradient statistic of {name}")
    return {name: sums[name] / count for name in sites}


@contextmanager
def _learning(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Only these weights want gradients for a while, and hold none; then all is as it was."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    held = [(w, w.grad) for w in weights]
    try:
        for p, _ in wanted:
            p.requires_grad_(False)
        for w in weights:
            w.grad = None
            w.requires_grad_(True)
        yield
    finally:
        for p, was in wanted:
            p.requires_grad_(was)
        for w, grad in held:
            w.grad = grad


class _Tally:
    """Running sums per group of sites that share an input."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.sums: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}
        self.leader: dict[str, str] = {}
        self.calls: dict[str, int] = {}
        self.seen: list[tuple[Tensor, int, object, str, int]] = []
        self.means: dict[str, Tensor] = {}

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            kind = site.of(module)
            way = kind.alike(module)
            call = self.calls[name] = self.calls.get(name, 0) + 1
            # The version tells a tensor from itself after a change in place.
            same = (seen for seen in self.seen if seen[0] is x and seen[1:3] == (x._version, way))
            first, its_call = next((seen[3:] for seen in same), (name, call))
            if self.leader.setdefault(name, first) != first or (first != name and its_call != call):
                raise self.refusal(name)
            if first == name:
                self.seen = [*self.seen[-1:], (x, x._version, way, name, call)]
                self.add(name, linalg.wide(kind.rows(module, x.detach())))

        return see

    def see(self, name: str, x: Tensor) -> None:
        """What reaches an expert, which shares it with none."""
        self.leader[name] = name
        self.calls[name] = self.calls.get(name, 0) + 1
        self.add(name, linalg.wide(x.detach()))

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
