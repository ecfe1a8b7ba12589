"""Rules that shape the whole direction: averages that look ahead, orthogonal steps, unit rows, sizes by shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from subspan import linalg
from subspan.optim.direction import Direction
from subspan.optim.rules import require_share
from subspan.optim.state import State, counter

PolarSolver = Literal["products", "exact"]


@dataclass(frozen=True, slots=True)
class Nesterov:
    """A moving average of gradients, seen one gradient ahead (Jordan, 2024).

    buf <- mu buf + (1 - mu) g,   d = mu buf + (1 - mu) g
    """

    mu: float = 0.95
    degree: ClassVar[Mapping[str, int]] = {"buf": 1}

    def __post_init__(self) -> None:
        require_share("Nesterov", "mu", self.mu)

    def init(self, g: Tensor, seed: int) -> State:
        """`buf` like g."""
        return {"buf": torch.zeros_like(g)}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """d, in one temporary."""
        s["buf"] = s["buf"].lerp_(g, 1 - self.mu)
        return torch.lerp(g, s["buf"], self.mu)

    def gain(self, s: State, t: int) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Polar:
    """The gradient with all its singular values near 1 (Jordan, 2024): u vh, for g = u diag(s) vh.

    `solver`: "products", `steps` of Newton-Schulz on g / (|g| + eps), which brings singular values to about
    [0.7, 1.2] where they were not tiny; "exact" by singular value decomposition, which ignores steps and eps. The
    scale of g does not matter while |g| is far above eps; a zero gradient has no exact factor, so "exact"
    answers with one of many. Raises ValueError for a gradient of fewer than two dimensions.

    >>> Polar(solver="exact").update(torch.diag(torch.tensor([3.0, 2.0])), {}, torch.ones(2, 2), 1)
    tensor([[1., 0.],
            [0., 1.]])
    """

    steps: int = 5
    eps: float = 1e-7
    solver: PolarSolver = "products"
    degree: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.eps >= 0:
            raise ValueError(f"Polar: steps={self.steps!r} and eps={self.eps!r} must not be negative")
        if self.solver not in ("products", "exact"):
            raise ValueError(f"Polar: solver={self.solver!r}; use 'products' or 'exact'")

    def init(self, g: Tensor, seed: int) -> State:
        """No state."""
        require_matrix("Polar", g)
        return {}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """A semi-orthogonal matrix, or nearly so."""
        return linalg.polar_exact(g) if self.solver == "exact" else linalg.polar(g, self.steps, eps=self.eps)

    def gain(self, s: State, t: int) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True, slots=True)
class UnitRows:
    """Every row divided by its length plus eps, as Dion does with its coordinates.

    >>> UnitRows().update(torch.tensor([[3.0, 4.0]]), {}, torch.ones(1, 2), 1)
    tensor([[0.6000, 0.8000]])
    """

    eps: float = 1e-8
    degree: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise ValueError(f"UnitRows: eps={self.eps!r} must be above 0, or a row of zeros is divided by zero")

    def init(self, g: Tensor, seed: int) -> State:
        """No state."""
        return {}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """g_ij / (|g_i| + eps)."""
        length: Tensor = vector_norm(g, dim=-1, keepdim=True)
        return g / (length + self.eps)

    def gain(self, s: State, t: int) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True, slots=True)
class ShapeScale:
    """A step size that follows from a matrix's shape (m, n); the direction stays g.

    `by`: "tall" sqrt(max(1, m / n)) (Muon; Jordan, 2024), "ratio" sqrt(m / n) (Dion; Ahn et al., 2025), "adam"
    0.2 sqrt(max(m, n)), which gives orthogonal steps the usual size of Adam's (Moonlight; Liu et al., 2025). It
    acts through `gain`, so in a chain around `Projected` it costs nothing and means the weight's own shape.

    >>> [round(ShapeScale().gain(ShapeScale().init(torch.ones(m, 2), 0), 1), 3) for m in (1, 2, 8)]
    [1.0, 1.0, 2.0]
    """

    by: Literal["tall", "ratio", "adam"] = "tall"
    degree: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        if self.by not in ("tall", "ratio", "adam"):
            raise ValueError(f"ShapeScale: by={self.by!r}; use 'tall', 'ratio' or 'adam'")

    def init(self, g: Tensor, seed: int) -> State:
        """`height` m and `width` n, as counters: reading them never waits for a device."""
        require_matrix("ShapeScale", g)
        m, n = g.shape[-2:]
        return {"height": counter(m), "width": counter(n)}

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """g."""
        return g

    def gain(self, s: State, t: int) -> float:
        """The factor."""
        m, n = int(s["height"]), int(s["width"])
        factors = {"tall": max(1.0, m / n), "ratio": m / n, "adam": 0.04 * max(m, n)}
        return float(factors[self.by] ** 0.5)


def require_matrix(where: str, g: Tensor) -> None:
    """Raise ValueError for fewer than two dimensions."""
    if g.ndim < 2:
        raise ValueError(f"{where} needs a matrix, not shape {tuple(g.shape)}; leave it to `other`")
