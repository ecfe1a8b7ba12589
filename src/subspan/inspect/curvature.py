"""How the gradient of a layer lies to the curvature of the loss there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from subspan import linalg, site
from subspan.edit import sites
from subspan.inspect.gradients import undisturbed
from subspan.metric import Loss, reported_loss
from subspan.select import Select

Product = Callable[[Tensor], Tensor]
By = Literal["value", "magnitude"]


class Eigen(NamedTuple):
    """Leading eigenvalues (k,), eigenvectors (n, k), and the norms (k,) of h v - value v."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class Curvature(NamedTuple):
    """The gradient (n,) of one layer's matrix, flattened, and the product of its Hessian with a vector (n,)."""

    gradient: Tensor
    product: Product


@dataclass(frozen=True, eq=False)
class Alignment:
    """A gradient against the top of its layer's Hessian.

    `outside` is |(I - U U^T) g| / |g|: 0 when g lies in the span of the top eigenvectors U; `size` is the
    number of entries of g, `values` are the eigenvalues (k,) and `residuals` say how well they are known.
    """

    outside: float
    values: Tensor
    residuals: Tensor
    size: int

    @property
    def inside(self) -> float:
        """The share of the gradient's energy in the top eigenspace, 1 - outside^2."""
        return 1 - self.outside**2

    @property
    def chance(self) -> float:
        """What `outside` would be for a gradient of random direction, sqrt(1 - k / n)."""
        return sqrt(1 - len(self.values) / self.size)


def hessian_gradient_alignment(vectors: Tensor, g: Tensor) -> float:
    """The share of the norm of a gradient g outside the span of orthonormal eigenvectors U (n, k).

        |(I - U U^T) g| / |g|

    0 is full alignment, 1 is none; NaN for a zero g. That it goes to 0 over training is the claim of
    arXiv:2407.11239, version 2, theorem 2.2.

    >>> hessian_gradient_alignment(torch.eye(2)[:, :1], torch.tensor([3.0, 4.0]))
    0.8
    """
    u, x = vectors.detach().double(), g.detach().double().flatten()
    if u.ndim != 2 or u.shape[0] != len(x):
        raise ValueError(f"eigenvectors of shape {tuple(u.shape)} do not fit a gradient of {len(x)} entries")
    return float((x - u @ (u.mT @ x)).norm() / x.norm())


def lanczos(
    product: Product, start: Tensor, *, rank: int, steps: int = 40, by: By = "value", seed: int = 0
) -> Eigen:
    """The leading `rank` eigenpairs of a symmetric operator on R^n, after `steps` products.

    Every new direction is made orthogonal to all earlier ones, twice; where the space of powers of the start
    (n,) is exhausted, a random direction continues, so that n steps find everything. `by` sorts by value,
    largest first, or by magnitude. Memory is steps * n numbers. Raises ValueError unless 1 <= rank <= steps.
    """
    steps = min(steps, len(start))
    if not 1 <= rank <= steps:
        raise ValueError(f"rank {rank} needs at least as many steps, here {steps} in {len(start)} dimensions")
    basis, tri = _krylov(product, start, steps, torch.Generator().manual_seed(seed))
    values, inner = torch.linalg.eigh(tri[:steps, :steps])
    order = (values if by == "value" else values.abs()).argsort(descending=True)[:rank]
    inner = inner[:, order]
    vectors = basis.mT @ inner.to(basis)
    return Eigen(values[order], linalg.qr(vectors), (tri[steps, steps - 1] * inner[-1]).abs())


def _krylov(product: Product, start: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (steps, n) and the operator's tridiagonal form in it, one row larger."""
    basis = start.new_empty(steps, len(start))
    tri = torch.zeros(steps + 1, steps + 1, dtype=torch.float64)
    v = start / start.norm()
    for i in range(steps):
        basis[i] = v
        w = product(v)
        tri[i, i] = float(w.double() @ v.double())
        scale = float(w.double().norm())
        w = _cleared(w, basis[: i + 1])
        size = float(w.double().norm())
        if size <= 1e3 * torch.finfo(w.dtype).eps * max(scale, float(tri.abs().max())):
            size = 0.0
            fresh = torch.randn(len(start), generator=generator, dtype=torch.float64).to(start)
            w = _cleared(fresh, basis[: i + 1])
        tri[i, i + 1] = tri[i + 1, i] = size
        v = w / w.norm().clamp_min(torch.finfo(w.dtype).tiny)
    return basis, tri


def _cleared(w: Tensor, basis: Tensor) -> Tensor:
    """What of w is orthogonal to the rows of basis."""
    for _ in range(2):
        w = w - basis.mT @ (basis @ w)
    return w


def layer_curvature(model: nn.Module, batch: Any, name: str, *, loss: Loss = reported_loss) -> Curvature:
    """The gradient of one matrix on a batch, and products with the Hessian of the loss in that matrix alone.

    By backward through backward, in evaluation mode; attention runs by its plain formula, as the fast kernels
    have no second derivative. The products hold the graph of one pass until they are forgotten, and fail once
    the weights change in place. Raises ValueError for a layer that the loss does not depend on.
    """
    module = sites(model, name)[name]
    weight, view = site.parameter(module), site.of(module).view
    with undisturbed(model, {name: module}), sdpa_kernel(SDPBackend.MATH):
        (found,) = torch.autograd.grad(loss(model, batch), [weight], create_graph=True, allow_unused=True)
    if found is None:
        raise ValueError(f"the loss does not depend on {name}; choose another layer, or use another batch")
    g = view(module, found)

    def product(v: Tensor) -> Tensor:
        if not g.requires_grad:
            return torch.zeros_like(v)
        along = (g * v.view_as(g).to(g)).sum()
        wanted = weight.requires_grad
        try:
            (h,) = torch.autograd.grad(along, [weight.requires_grad_(True)], retain_graph=True, allow_unused=True)
        finally:
            weight.requires_grad_(wanted)
        return torch.zeros_like(v) if h is None else view(module, h).flatten().to(v)

    return Curvature(g.detach().flatten(), product)


def layer_alignment(
    model: nn.Module,
    batch: Any,
    name: str,
    *,
    rank: int = 10,
    steps: int = 40,
    by: By = "value",
    loss: Loss = reported_loss,
    seed: int = 0,
) -> Alignment:
    """The alignment of one layer's gradient with the top `rank` eigenvectors of its Hessian, by Lanczos.

    The start is random, not the gradient, which would find itself. Costs `steps` products, of two backward
    passes each.
    """
    g, product = layer_curvature(model, batch, name, loss=loss)
    start = torch.randn(len(g), generator=torch.Generator().manual_seed(seed)).to(linalg.wide(g))
    top = lanczos(product, start, rank=rank, steps=steps, by=by, seed=seed + 1)
    return Alignment(hessian_gradient_alignment(top.vectors, g), top.values, top.residuals, len(g))


def alignments(
    model: nn.Module,
    batch: Any,
    *,
    select: Select | None = None,
    rank: int = 10,
    steps: int = 40,
    by: By = "value",
    loss: Loss = reported_loss,
    seed: int = 0,
) -> dict[str, Alignment]:
    """`layer_alignment` of every selected layer, one after the other."""
    return {
        name: layer_alignment(model, batch, name, rank=rank, steps=steps, by=by, loss=loss, seed=seed)
        for name in sites(model, select)
    }
