"""Teaching a compressed model by the one it was made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from subspan import site
from subspan.edit import matrices
from subspan.linalg import wide
from subspan.ops import LowRank, OpLayer

Blocks = dict[str, list[Tensor]]


class Answer(Protocol):
    """What a model puts out: its own loss, and the logits (..., vocabulary)."""

    loss: Any
    logits: Any


Forward = Callable[[nn.Module, Any], Answer]


@dataclass(frozen=True, slots=True)
class Distill:
    """A loss that draws a compressed student to its dense teacher, in features, logits and weights.

        task L(student) + features mean_j MSE(f_j, f'_j) + logits MSE(z, z') + bound mean_i d_i^2

    f_j are the outputs of the numbered blocks, z the logits, those of the teacher with a prime, and every MSE is a
    mean over entries. d_i says how far the factors of layer i have left their weight: max(0, |u v - W|_max - eps),
    or |u v - W|_max - eps for `sides="both"`, which also pushes factors that are closer than eps away.
    A term of weight 0 is not computed. (Guo et al., 2024, arXiv:2310.10700.)

    Raises ValueError for a weight or eps that is negative or not finite, and when all weights are 0.
    """

    task: float = 1.0
    features: float = 1.0
    logits: float = 0.0
    bound: float = 1.0
    eps: float = 1e-3
    sides: Literal["above", "both"] = "above"

    def __post_init__(self) -> None:
        weights = {"task": self.task, "features": self.features, "logits": self.logits, "bound": self.bound}
        for name, value in {**weights, "eps": self.eps}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"Distill: {name} is {value}; it must be a finite number of at least 0")
        if not any(weights.values()):
            raise ValueError(f"Distill: {', '.join(weights)} are all 0, which is no loss; make one positive")
        if self.sides not in ("above", "both"):
            raise ValueError(f"Distill: sides {self.sides!r} is neither 'above' nor 'both'")

    def loss(self, student: nn.Module, teacher: nn.Module, batch: Any, forward: Forward) -> Tensor:
        """The loss on one batch, as a scalar; the teacher runs without gradients and is not changed.

        `forward(model, batch)` runs either model and returns an `Answer`. Raises ValueError when the two models
        do not fit together: other blocks, shapes or layers.
        """
        terms: list[Tensor] = []
        if self.task or self.features or self.logits:
            with blocks(student) as mine:
                answer = forward(student, batch)
            if self.task:
                terms.append(self.task * require(answer.loss, "loss", student))
        if self.features or self.logits:
            with torch.no_grad(), blocks(teacher) as theirs:
                taught = forward(teacher, batch)
            if self.features:
                terms.append(self.features * distance(mine, theirs))
            if self.logits:
                pair = (require(a.logits, "logits", m) for a, m in ((answer, student), (taught, teacher)))
                terms.append(self.logits * mse(*pair, where="the logits"))
        if self.bound:
            terms.append(self.bound * self.strain(student, teacher))
        return reduce(torch.add, terms)

    def strain(self, student: nn.Module, teacher: nn.Module) -> Tensor:
        """mean_i d_i^2 over the student's low-rank layers, a scalar.

        Raises ValueError when there are none, and when the teacher has no such layer of that shape.
        """
        ops = low_rank(student)
        if not ops:
            raise ValueError(
                f"{type(student).__name__} has no low-rank layer to hold near its weight; use bound=0"
            )
        taught = weights(teacher)
        beyond = [farthest(op, fitting(taught.get(n), name=n, shape=op.shape)) - self.eps for n, op in ops.items()]
        apart = torch.stack(beyond)
        return (apart.clamp(min=0) if self.sides == "above" else apart).square().mean()


def farthest(op: LowRank, weight: Tensor) -> Tensor:
    """max |u v - W| over all entries, a scalar, for a weight (m, n).

    Its gradient reaches one row of u and one column of v, those that meet in the entry, so that no gradient of the
    size of the weight is ever formed. Half precision is multiplied out in float32, also under autocast.

    >>> farthest(LowRank(torch.ones(2, 1), torch.ones(1, 2)), torch.tensor([[1.0, 3.0], [0.0, 1.5]])).item()
    2.0
    """
    with torch.autocast(weight.device.type, enabled=False):
        u, v, w = wide(op.u), wide(op.v), wide(weight.detach())
        with torch.no_grad():
            row, column = divmod(int((u @ v).sub_(w).abs_().argmax()), w.shape[1])
        return (u[row] @ v[:, column] - w[row, column]).abs()


def low_rank(model: nn.Module) -> dict[str, LowRank]:
    """The factors that stand for whole layers, by the layer's name."""
    layers = {name: m.op for name, m in model.named_modules() if isinstance(m, OpLayer)}
    return {name: op for name, op in layers.items() if isinstance(op, LowRank)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What each layer multiplies by, (out, in), by the layer's name: weights as matrices, and ops."""
    plain = {name: site.matrix(module) for name, module in matrices(model).items()}
    return plain | {name: m.op.dense() for name, m in model.named_modules() if isinstance(m, OpLayer)}


def fitting(weight: Tensor | None, *, name: str, shape: tuple[int, int]) -> Tensor:
    """The teacher's matrix at a layer; raises ValueError when it has none of that shape."""
    if weight is None or weight.shape != shape:
        there = "no such layer" if weight is None else tuple(weight.shape)
        raise ValueError(
            f"{name}: the student is {shape}, the teacher has {there}; teach by the very model that was compressed"
        )
    return weight


@contextmanager
def blocks(model: nn.Module) -> Iterator[Blocks]:
    """Collect what every numbered block puts out while the model runs, by name, one tensor for each call.

    A block is a numbered module (`layers.3`) that lies in no other; of several outputs it is the first.

    >>> net = nn.Sequential(nn.Identity(), nn.Flatten(0))
    >>> with blocks(net) as found:
    ...     _ = net(torch.ones(1, 2))
    >>> {name: [tuple(x.shape) for x in seen] for name, seen in found.items()}
    {'0': [(1, 2)], '1': [(2,)]}
    """
    found: Blocks = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            found.setdefault(name, []).append(first(output, name))

        return see

    hooks = [m.register_forward_hook(keep(name)) for name, m in model.named_modules() if numbered(name)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def numbered(name: str) -> bool:
    """Whether a name ends in its only number.

    >>> numbered("model.layers.3"), numbered("layers.3.experts.1"), numbered("lm_head")
    (True, False, False)
    """
    *above, last = name.split(".")
    return last.isdigit() and not any(part.isdigit() for part in above)


def first(output: Any, name: str) -> Tensor:
    """The hidden states in a block's output: itself, or the first of several."""
    several = tuple(output.values()) if isinstance(output, Mapping) else output
    x = several[0] if isinstance(several, tuple | list) and several else several
    if not isinstance(x, Tensor):
        raise ValueError(f"block {name} puts out {type(x).__name__}, not hidden states; use features=0")
    return x


def distance(mine: Blocks, theirs: Blocks) -> Tensor:
    """mean_j MSE(f_j, f'_j) over all calls of all blocks; raises ValueError when they are not the same calls."""
    if not mine:
        raise ValueError("the student has no numbered block whose output could be compared; use features=0")
    calls = [{name: len(seen) for name, seen in found.items()} for found in (mine, theirs)]
    if calls[0] != calls[1]:
        odd = next(name for name in {**mine, **theirs} if calls[0].get(name) != calls[1].get(name))
        mine_ran, theirs_ran = (ran.get(odd, 0) for ran in calls)
        raise ValueError(
            f"block {odd} ran {mine_ran} times in the student and {theirs_ran} in the teacher; teach by the very "
            "model that was compressed"
        )
    pairs = [(name, *pair) for name in mine for pair in zip(mine[name], theirs[name], strict=True)]
    return torch.stack([mse(x, y, where=f"block {name}") for name, x, y in pairs]).mean()


def mse(x: Tensor, y: Tensor, *, where: str) -> Tensor:
    """The mean squared difference of two tensors of one shape, in float32 at least, without gradient to y."""
    if x.shape != y.shape:
        raise ValueError(
            f"{where}: the student's shape is {tuple(x.shape)}, the teacher's {tuple(y.shape)}; teach by the very "
            "model that was compressed"
        )
    return mse_loss(wide(x), wide(y.detach()))


def require(value: Any, what: str, model: nn.Module) -> Tensor:
    """A tensor that the forward pass returned; raises ValueError when there is none."""
    if not isinstance(value, Tensor):
        raise ValueError(f"forward({type(model).__name__}) returned no {what}; return it, or give it no weight")
    return value
