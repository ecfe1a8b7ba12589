"""Steps that see both factors of a product u @ v, and learning rates that differ between them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from subspan.adapt import Adapter
from subspan.linalg import wide
from subspan.optim.optimizer import Optim
from subspan.optim.recipe import Recipe
from subspan.optim.rule import Rule
from subspan.optim.rules import Adam
from subspan.optim.source import Backprop, Closure, Gradient, Named
from subspan.select import pick
from subspan.shards import is_cut

AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)


class PairLaw(Protocol):
    """A frozen dataclass of settings; its maths accepts leading batch dimensions."""

    def __call__(self, u: Tensor, v: Tensor, gu: Tensor, gv: Tensor) -> tuple[Tensor, Tensor]:
        """What to step u (m, rank) and v (rank, n) by, from their gradients; it overwrites nothing."""


class Spectrum(NamedTuple):
    """A symmetric matrix q diag(s) q^T without negative eigenvalues; those that are rounding errors are zero."""

    q: Tensor
    s: Tensor

    def inverse(self, damping: float) -> Tensor:
        """(q diag(s) q^T + damping I)^-1; without damping, the pseudo-inverse.

        >>> spectrum(torch.tensor([[2.0, 0.0], [0.0, 0.0]])).inverse(0.0)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.0000]])
        """
        return (self.q * reciprocal(self.s + damping).unsqueeze(-2)) @ self.q.mT


def spectrum(gram: Tensor) -> Spectrum:
    """The eigenvectors and eigenvalues of a Gram matrix (..., rank, rank)."""
    s, q = torch.linalg.eigh(gram)
    floor = gram.shape[-1] * torch.finfo(gram.dtype).eps * s[..., -1:]
    return Spectrum(q, torch.where(s > floor, s, 0.0))


def reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return torch.where(x > 0, 1 / x, 0.0)


@dataclass(frozen=True, slots=True)
class Preconditioned:
    """Each gradient divided by the Gram matrix of the other factor (Zhang and Pilanci, 2024).

        gu <- gu (v v^T + d I)^-1,   gv <- (u^T u + d I)^-1 gv

    As the damping d goes to 0, the step of u @ v no longer depends on which of the pairs (u r, r^-1 v) stands for
    the product. Both Gram matrices are those before the step.
    """

    damping: float = 1e-6

    def __post_init__(self) -> None:
        require_damping("Preconditioned", self.damping)

    def __call__(self, u: Tensor, v: Tensor, gu: Tensor, gv: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients, in the shapes of the factors."""
        left, right = spectrum(u.mT @ u), spectrum(v @ v.mT)
        return gu @ right.inverse(self.damping), left.inverse(self.damping) @ gv


@dataclass(frozen=True, slots=True)
class Equivalent:
    """The gradients whose common effect on the weight is nearest to its own gradient g (Wang et al., 2024).

        minimise |s (u dv + du v) - g|,   then |du - gu|^2 + |dv - gv|^2

    The weight moves as the factors do, by s (u dv + du v), s being the `scale` that joins u @ v to it. g itself
    is not needed:

        dv = (u^T u)^-1 gv / s^2 + x v,   du = (I - p) gu (v v^T)^-1 / s^2 - u x,   p = u (u^T u)^-1 u^T
        u^T u x + x v v^T = -(u^T u)^-1 gv v^T / s^2

    (gu = s g v^T and gv = s u^T g, so both factors must have the gradients of one loss.) `damping` is added to the
    Gram matrices before they are inverted. The scale divides the whole step by s^2 and does nothing else: a rule
    such as Adam, which ignores the length of gradients, steps the same for every scale but for its eps.
    """

    scale: float = 1.0
    damping: float = 1e-8

    def __post_init__(self) -> None:
        require_damping("Equivalent", self.damping)
        if not 0 < self.scale < math.inf:
            raise ValueError(f"Equivalent: scale={self.scale!r} joins nothing; use that of the join, such as 1.0")

    def __call__(self, u: Tensor, v: Tensor, gu: Tensor, gv: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients, in the shapes of the factors."""
        left, right = spectrum(u.mT @ u), spectrum(v @ v.mT)
        inverse = left.inverse(self.damping)
        dv = inverse @ gv
        du = gu @ right.inverse(self.damping)
        du = du - u @ (inverse @ (u.mT @ du))
        x = sylvester(left, right, -dv @ v.mT)
        return (du - u @ x) / self.scale**2, (dv + x @ v) / self.scale**2


@dataclass(frozen=True, slots=True)
class PerExpert:
    """A law for u and v that hold several experts side by side: it sees the pair of each, one by one.

        u (m, experts * rank) as u_i (m, rank),   v (experts * rank, n) as v_i (rank, n)

    `adapt.Routed` mixes such experts. Raises ValueError for an inner size that they do not divide.

    >>> u, v = torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> PerExpert(Preconditioned(0.0), 2)(u, v, torch.ones_like(u), torch.ones_like(v))[0]
    tensor([[1.0000, 0.2500]])
    """

    law: PairLaw
    experts: int

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError(f"PerExpert: experts={self.experts!r} must be at least 1")

    def __call__(self, u: Tensor, v: Tensor, gu: Tensor, gv: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients, in the shapes of the factors."""
        if u.shape[-1] % self.experts:
            raise ValueError(
                f"PerExpert: an inner size of {u.shape[-1]} is no {self.experts} experts; give the number "
                "that the adapter has"
            )
        if self.experts == 1:
            return self.law(u, v, gu, gv)
        a, ga = (apart(t, -1, self.experts) for t in (u, gu))
        b, gb = (apart(t, -2, self.experts) for t in (v, gv))
        du, dv = self.law(a, b, ga, gb)
        return du.movedim(-3, -2).flatten(-2), dv.flatten(-3, -2)


def apart(t: Tensor, axis: int, experts: int) -> Tensor:
    """The experts along an axis of a factor as a batch: (m, experts * rank) -> (experts, m, rank) for axis -1."""
    return torch.unflatten(t, axis, (experts, -1)).movedim(axis - 1, -3)


def require_damping(where: str, damping: float) -> None:
    """Raise ValueError unless 0 <= damping < inf."""
    if not 0 <= damping < math.inf:
        raise ValueError(f"{where}: damping={damping!r}; use 0 or a small positive number, such as 1e-6")


def sylvester(left: Spectrum, right: Spectrum, c: Tensor) -> Tensor:
    """The x with left x + x right = c, least where several are.

    >>> sylvester(spectrum(torch.tensor([[2.0]])), spectrum(torch.tensor([[1.0]])), torch.tensor([[6.0]]))
    tensor([[2.]])
    """
    sums = left.s.unsqueeze(-1) + right.s.unsqueeze(-2)
    return left.q @ ((left.q.mT @ c @ right.q) * reciprocal(sums)) @ right.q.mT


class Pair(NamedTuple):
    """The factors of one product, by their names and themselves."""

    names: tuple[str, str]
    u: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Paired:
    """The gradients of backward(), those of factor pairs changed by a law that sees both; any rule follows.

    A pair is a matrix called `u` and one called `v` of the same module, as in the ops of adapters and of
    compressed layers; parameters of other names pass through. Both must be given to the optimizer, and have
    gradients. The gradients of a pair are held until both are stepped. Raises ValueError when there is no pair,
    for one factor without the other, and for factors cut over processes. There is no such source over `Spsa`:
    its gradients of u and v are not those of one product, which the laws rely on.

    >>> u, v = torch.tensor([[2.0], [0.0]]).requires_grad_(), torch.tensor([[1.0, 1.0]]).requires_grad_()
    >>> (u @ v).sum().backward()
    >>> optimizer = Optim([("u", u), ("v", v)], Recipe(Adam(), Paired(Preconditioned(0.0))), lr=0.1)
    >>> _, gradient = optimizer.recipe.source.gradients(None, [("u", u), ("v", v)], seed=0, steps=0)
    >>> gradient("u", u).flatten().tolist(), gradient("v", v).tolist()
    ([1.0, 1.0], [[0.5, 0.5]])
    """

    law: PairLaw
    backward: ClassVar[bool] = True

    def holds(self, p: Tensor) -> bool:
        """Its gradient is."""
        return True

    def gradients(self, closure: Closure | None, named: Named, *, seed: int, steps: int) -> tuple[Any, Gradient]:
        """The closure's loss, and `.grad` as the law has it."""
        named = list(named)
        pairs = {name: pair for pair in pairs_of(named) for name in pair.names}
        loss, raw = Backprop().gradients(closure, named, seed=seed, steps=steps)
        made: dict[str, Tensor] = {}

        def gradient(name: str, p: Tensor) -> Tensor | None:
            if name not in pairs:
                return raw(name, p)
            if name not in made:  # the first of its pair: neither factor has moved yet
                made.update(self._both(pairs[name], raw))
            return made.pop(name, None)

        return loss, gradient

    def _both(self, pair: Pair, raw: Gradient) -> dict[str, Tensor]:
        """The gradients of a pair by name, none where neither has one."""
        gu, gv = (raw(name, p) for name, p in zip(pair.names, (pair.u, pair.v), strict=True))
        if gu is None and gv is None:
            return {}
        if gu is None or gv is None:
            has, lacks = pair.names if gv is None else pair.names[::-1]
            raise ValueError(
                f"{lacks} has no gradient and {has} has one, and {self.law!r} needs both; train both factors, or "
                "step them by a plain rule"
            )
        changed = self.law(wide(pair.u), wide(pair.v), wide(gu), wide(gv))
        return dict(zip(pair.names, changed, strict=True))


def pairs_of(named: Iterable[tuple[str, Tensor]]) -> list[Pair]:
    """The factor pairs among named parameters; raises ValueError as `Paired` does.

    >>> [pair.names for pair in pairs_of([("a.u", torch.ones(3, 1)), ("a.v", torch.ones(1, 2))])]
    [('a.u', 'a.v')]
    """
    found = dict(named)
    pairs = []
    factors = [name for name, p in found.items() if name.rpartition(".")[2] in ("u", "v") and p.ndim > 1]
    for stem in dict.fromkeys(name[:-1] for name in factors):
        names = (f"{stem}u", f"{stem}v")
        lone = [name for name in names if name not in found]
        if lone:
            there = names[1 - names.index(lone[0])]
            raise ValueError(
                f"Paired: {there} is stepped without {lone[0]}; give the optimizer both, or a plain rule"
            )
        u, v = (found[name] for name in names)
        if u.ndim < 2 or u.ndim != v.ndim or u.shape[-1] != v.shape[-2] or u.shape[:-2] != v.shape[:-2]:
            raise ValueError(f"Paired: {names[0]} {tuple(u.shape)} and {names[1]} {tuple(v.shape)} are no product")
        if is_cut(u) or is_cut(v):
            raise ValueError(
                f"Paired: {names[0]} and {names[1]} are cut over processes, and a law needs them whole; use "
                "DistributedDataParallel"
            )
        pairs.append(Pair(names, u, v))
    if not pairs:
        raise ValueError(
            f"Paired: no matrix is a factor u or v of a product; there are: {', '.join(list(found)[:8])}. Adapt "
            "the model first, or use the rule alone"
        )
    return pairs


def hasten(optimizer: AnyOptimizer, ratio: float, *, where: str = "*.u") -> AnyOptimizer:
    """Step the parameters that `where` names at `ratio` times the learning rate, in groups of their own.

    It changes and returns the optimizer, ours or one of torch's. Call it before a scheduler is made, and again on
    an optimizer that a saved state is loaded into. Schedulers that multiply rates keep the ratio. Weight decay,
    being lr * weight_decay, grows too. By default these are the factors u, which start at zero in `ZeroLowRank`
    (Hayou et al., 2024). Raises ValueError for a ratio that is no positive number, for parameters without names, a
    pattern that matches nothing, and groups that a scheduler has seen.

    >>> optimizer = torch.optim.SGD([("a.u", torch.zeros(3, 1)), ("a.v", torch.ones(1, 2))], 0.1)
    >>> [(group["param_names"], group["lr"]) for group in hasten(optimizer, 16).param_groups]
    [(['a.v'], 0.1), (['a.u'], 1.6)]
    """
    if not 0 < ratio < math.inf:
        raise ValueError(f"hasten: ratio={ratio!r} is no factor of a learning rate; use one above 0, such as 16")
    if ratio == 1:
        return optimizer
    groups = list(optimizer.param_groups)
    if any("param_names" not in group for group in groups):
        raise ValueError("hasten: the optimizer does not know names; build it on model.named_parameters()")
    if any("initial_lr" in group for group in groups):
        raise ValueError("hasten: a scheduler already holds the learning rates; call this before making it")
    chosen = set(pick([n for group in groups for n in group["param_names"]], where, what="parameter"))
    for group in groups:
        split(optimizer, group, chosen, ratio)
    return optimizer


def split(optimizer: torch.optim.Optimizer, group: dict[str, Any], chosen: set[str], ratio: float) -> None:
    """Move the chosen members of a group to a faster one of their own."""
    members = list(zip(group["param_names"], group["params"], strict=True))
    quick = [(name, p) for name, p in members if name in chosen]
    slow = [(name, p) for name, p in members if name not in chosen]
    if not slow:
        group["lr"] = group["lr"] * ratio
    elif quick:
        group["param_names"], group["params"] = [name for name, _ in slow], [p for _, p in slow]
        rest = {key: value for key, value in group.items() if key not in ("param_names", "params", "lr")}
        optimizer.add_param_group({**rest, "params": quick, "lr": group["lr"] * ratio})


@dataclass(frozen=True)
class Stepped(Adapter):
    """An adapter that also says how it is trained: by which rule, and how much faster u than the rest.

    >>> from subspan.adapt import Add, ZeroLowRank
    >>> Stepped(ZeroLowRank(8), Add(2.0), ratio=16.0).ratio
    16.0
    """

    rule: Rule | Recipe = Adam()
    ratio: float = 1.0

    def optimizer(self, named: Named, *, lr: float, **settings: Any) -> Optim:
        """`Optim` over named parameters, such as `trainable(model)`; `settings` are its other arguments."""
        return hasten(Optim(named, self.rule, lr=lr, **settings), self.ratio)


def usual(adapter: Adapter) -> Stepped:
    """The adapter with a way to be trained: its own, or Adam at one rate.

    >>> from subspan.adapt import Add, ZeroLowRank
    >>> usual(Adapter(ZeroLowRank(8), Add())).rule
    Adam(b1=0.9, b2=0.999, eps=1e-08, eps_on='corrected')
    """
    if isinstance(adapter, Stepped):
        return adapter
    return Stepped(**{field.name: getattr(adapter, field.name) for field in fields(adapter)})
