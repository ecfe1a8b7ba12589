"""Rules on the gradient as it is, and `chain`, which applies one after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from subspan.optim.direction import Direction, dense
from subspan.optim.rule import Rule
from subspan.optim.state import Scope, State, placed
from subspan.shards import cut_alike, local


@dataclass(frozen=True, slots=True)
class Sgd:
    """The gradient itself."""

    degree: ClassVar[Mapping[str, int]] = {}

    def init(self, g: Tensor, seed: int) -> State:
        """No state."""
        return {}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """g."""
        return g

    def gain(self, s: State, t: int) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Momentum:
    """A decaying sum of gradients: buf <- mu buf + g."""

    mu: float = 0.9
    degree: ClassVar[Mapping[str, int]] = {"buf": 1}

    def __post_init__(self) -> None:
        require_share("Momentum", "mu", self.mu)

    def init(self, g: Tensor, seed: int) -> State:
        """`buf` like g."""
        return {"buf": torch.zeros_like(g)}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """The new sum."""
        s["buf"] = s["buf"].mul_(self.mu).add_(g)
        return s["buf"]

    def gain(self, s: State, t: int) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Adam:
    """Gradient mean over root mean square (Kingma and Ba, 2015).

        mu <- b1 mu + (1 - b1) g,   nu <- b2 nu + (1 - b2) g * g

    `eps_on` says where eps enters: "corrected", as in torch.optim.AdamW, gives (mu / c1) / (sqrt(nu / c2) + eps)
    with c = 1 - b^t; "raw" gives mu / (sqrt(nu) + eps) and leaves sqrt(c2) / c1 to the step size (`gain`), as
    transformers' AdamW did and the programs derived from it.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_on: Literal["corrected", "raw"] = "corrected"
    degree: ClassVar[Mapping[str, int]] = {"mu": 1, "nu": 2}

    def __post_init__(self) -> None:
        require_share("Adam", "b1", self.b1)
        require_share("Adam", "b2", self.b2)
        if self.eps_on not in ("corrected", "raw"):
            raise ValueError(f"Adam: eps_on={self.eps_on!r} is neither 'corrected' nor 'raw'; use one of them")

    def init(self, g: Tensor, seed: int) -> State:
        """`mu` and `nu` like g."""
        return {"mu": torch.zeros_like(g), "nu": torch.zeros_like(g)}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """The quotient of moments, in one temporary."""
        s["mu"] = s["mu"].lerp_(g, 1 - self.b1)
        s["nu"] = s["nu"].mul_(self.b2).addcmul_(g, g, value=1 - self.b2)
        root = s["nu"].sqrt()
        if self.eps_on == "raw":
            root.add_(self.eps)
        else:
            c1 = 1 - self.b1**t
            root.mul_(c1 / math.sqrt(1 - self.b2**t)).add_(c1 * self.eps)
        return torch.div(s["mu"], root, out=root)

    def fits(self, w: Tensor, g: Tensor, s: State) -> bool:
        """Whether `fused` can step this weight."""
        alike = [local(x) for x in (w, g, s["mu"], s["nu"])]
        plain = all(type(x) in (Tensor, Parameter) and x.is_contiguous() and x.dtype == w.dtype for x in alike)
        plain = plain and cut_alike(w, g, s["mu"], s["nu"])
        return self.eps_on == "corrected" and plain and w.dtype in (torch.float32, torch.float64)

    def fused(
        self, ws: list[Tensor], gs: list[Tensor], states: list[State], ts: list[int], *, lr: float, decay: float
    ) -> None:
        """Step many weights by torch's one-pass kernel: what `update` and `gain` say, at a seventh of the time.

        For float32 and float64 tensors laid out alike, and eps on the corrected quotient. lr < 0 climbs.
        """
        steps = [torch.tensor(float(t - 1), device=w.device) for t, w in zip(ts, ws, strict=True)]
        adamw(
            [local(w) for w in ws],
            [local(g) for g in gs],
            [local(s["mu"]) for s in states],
            [local(s["nu"]) for s in states],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=self.b1,
            beta2=self.b2,
            lr=abs(lr),
            weight_decay=decay,
            eps=self.eps,
            maximize=lr < 0,
        )

    def gain(self, s: State, t: int) -> float:
        """The correction of bias that a raw quotient leaves to the step size."""
        if self.eps_on == "corrected":
            return 1.0
        return math.sqrt(1 - self.b2**t) / (1 - self.b1**t)


@dataclass(frozen=True, slots=True, repr=False)
class Chain:
    """Rules one after the other; build it with `chain`."""

    links: tuple[tuple[str, Rule], ...]

    def __repr__(self) -> str:
        return f"chain({', '.join(f'{name}={rule!r}' for name, rule in self.links)})"

    @property
    def degree(self) -> Mapping[str, int]:
        """The links' moments, `name.` before each."""
        return {f"{name}.{key}": d for name, rule in self.links for key, d in rule.degree.items()}

    def init(self, g: Tensor, seed: int) -> State:
        """The links' states, `name.` before each key."""
        return {k: v for name, rule in self.links for k, v in placed(name, rule.init(g, seed)).items()}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """Each link's direction is the next one's gradient."""
        d: Direction = g
        for name, rule in self.links:
            d = rule.update(dense(d), Scope(s, name), w, t)
        return d

    def gain(self, s: State, t: int) -> float:
        """The product of the links' gains."""
        return math.prod(rule.gain(Scope(s, name), t) for name, rule in self.links)


def chain(**rules: Rule) -> Chain:
    """Apply rules in order; their names, not positions, key the state.

    >>> chain(first=Momentum(), then=Sgd())
    chain(first=Momentum(mu=0.9), then=Sgd())
    """
    if not rules:
        raise ValueError("chain() holds no rule; name at least one: chain(adam=Adam())")
    return Chain(tuple(rules.items()))


def require_share(where: str, name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{where}: {name}={value!r} is outside [0, 1); a decay of 1 never forgets")
