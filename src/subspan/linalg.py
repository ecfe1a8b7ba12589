"""Pure functions of tensors: factorizations, whitening and effective ranks.

Every function accepts leading batch dimensions. Half precision comes in, float32 goes out (`wide`): a
factorization in bfloat16 is noise. Singular vectors have pinned signs, because kept moments feel them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from subspan.shards import is_cut_along, joined, laid, locally, settled, whole


class SVD(NamedTuple):
    """a = u diag(s) vh with u (..., m, k), s (..., k) descending, vh (..., k, n), k = min(m, n) or less."""

    u: Tensor
    s: Tensor
    vh: Tensor


class Whitened(NamedTuple):
    """Lower triangular `factor` with factor @ factor.mT = h + ridge * mean(diag h) * I."""

    factor: Tensor
    ridge: float


def wide(a: Tensor) -> Tensor:
    """The tensor in a precision LAPACK can work with: float64 stays, everything else becomes float32."""
    return a if a.dtype in (torch.float32, torch.float64) else a.float()


def pin_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Flip pairs of singular vectors so that the largest entry of every column of u is positive.

    >>> u, vh = pin_signs(torch.tensor([[0.6], [-0.8]]), torch.tensor([[1.0, 0.0]]))
    >>> u[1, 0].item() > 0, vh[0, 0].item()
    (True, -1.0)
    """
    top = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True))
    sign = torch.where(top < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, vh * sign.mT


def svd(a: Tensor) -> SVD:
    """Reduced singular value decomposition with pinned signs.

    When LAPACK's divide and conquer does not converge the matrix is decomposed again in float64, and then
    through its Gram matrix. Raises ValueError for NaN or Inf.

    >>> svd(torch.diag(torch.tensor([2.0, 3.0]))).s
    tensor([3., 2.])
    """
    a = wide(a)
    require_finite(a)
    for attempt in (a, a.double()):
        try:
            u, s, vh = torch.linalg.svd(attempt, full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        u, vh = pin_signs(u, vh)
        return SVD(u.to(a.dtype), s.to(a.dtype), vh.to(a.dtype))
    return svd_gram(a)


def svdvals(a: Tensor) -> Tensor:
    """Singular values (..., k), descending; falls back to `svd` when LAPACK does not converge."""
    a = wide(a)
    require_finite(a)
    try:
        values: Tensor = torch.linalg.svdvals(a)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values = svd(a).s
    return values


def svd_gram(a: Tensor) -> SVD:
    """The decomposition from an eigenproblem of the smaller Gram matrix, computed in float64.

        a^T a = v diag(s^2) v^T,   u diag(s) = a v

    Several times faster than `svd` on large matrices. The Gram matrix squares the condition number: singular
    values below 1e-8 of the largest are noise, and their vectors are merely orthonormal.
    """
    a = wide(a)
    require_finite(a)
    if a.shape[-2] < a.shape[-1]:
        flipped = svd_gram(a.mT)
        u, vh = pin_signs(flipped.vh.mT, flipped.u.mT)
        return SVD(u, flipped.s, vh)
    x = a.double()
    _, v = torch.linalg.eigh(x.mT @ x)
    v = v.flip(-1)
    u, tri = torch.linalg.qr(x @ v)
    diag = tri.diagonal(dim1=-2, dim2=-1)
    u = u * torch.where(diag < 0, -1.0, 1.0).unsqueeze(-2)
    s, order = diag.abs().sort(dim=-1, descending=True)
    u = u.gather(-1, order.unsqueeze(-2).expand_as(u))
    v = v.gather(-1, order.unsqueeze(-2).expand_as(v))
    u, vh = pin_signs(u, v.mT)
    return SVD(u.to(a.dtype), s.to(a.dtype), vh.to(a.dtype))


def svd_random(
    a: Tensor,
    rank: int,
    *,
    iters: int = 2,
    oversample: int = 8,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SVD:
    """The leading `rank` singular triples by randomized subspace iteration (Halko et al., 2011).

    `start` (..., n, k) replaces the random test matrix: pass the last right basis to warm-start.
    Exact when the matrix has at most rank + oversample non-zero singular values.
    """
    a = wide(a)
    require_finite(a)
    m, n = a.shape[-2:]
    check_rank(rank, m, n)
    width = min(rank + oversample, m, n)
    fresh = width if start is None else max(width - start.shape[-1], 0)
    omega = torch.randn(*a.shape[:-2], n, fresh, dtype=a.dtype, device=a.device, generator=generator)
    if start is not None:
        omega = torch.cat([start.to(a), omega], dim=-1)
    q = qr(a @ omega)
    for _ in range(iters):
        q = qr(a @ qr(a.mT @ q))
    u, s, vh = svd(q.mT @ a)
    u, vh = pin_signs((q @ u)[..., :rank], vh[..., :rank, :])
    return SVD(u, s[..., :rank], vh)


def qr(a: Tensor) -> Tensor:
    """Orthonormal columns spanning those of a (..., m, k); unique, as the triangular diagonal is >= 0."""
    a = wide(a)
    q, tri = torch.linalg.qr(whole(a))
    unique = q * torch.where(tri.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)
    return laid(unique, a)


def orth(a: Tensor) -> Tensor:
    """Orthonormal columns spanning those of a (..., m, k), as `qr` gives them, by two Cholesky factorizations.

    Nearly all matrix products, so several times faster than Householder's `qr`, which takes over where the
    columns are too close to dependent for it.

    >>> orth(torch.tensor([[3.0], [4.0]])).mT
    tensor([[0.6000, 0.8000]])
    """
    x: Tensor = settled(wide(a))
    if x.shape[-2] < x.shape[-1]:
        return qr(x)
    a, x = x, x / torch.linalg.vector_norm(x, dim=-2, keepdim=True)  # 0 / 0 is NaN, which the test below catches
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex(whole(x.mT @ x))
        safe = factor.diagonal(dim1=-2, dim2=-1).amin() > torch.finfo(x.dtype).eps ** 0.25
        if bool(info.any()) or not bool(safe):
            return qr(a)
        substitute = partial(torch.linalg.solve_triangular, factor.mT, upper=True, left=False)
        x = locally(substitute, joined(x, -1))
    return x


def orthogonal_iteration(a: Tensor, start: Tensor, turns: int) -> Tensor:
    """Orthonormal columns (..., m, k) after `turns` of q <- orth(a a^T q), from start (..., m, k).

    Column i tends to the i-th left singular vector of a (..., m, n) like (s_{i+1} / s_i)^(2 turns); a start
    that already was near stays near, so signs and order last.
    """
    q = start
    for _ in range(turns):
        z = settled(a.mT @ q)
        # Only the columns' directions matter; without this the square of a small gradient underflows.
        norm = torch.linalg.vector_norm(z, dim=-2, keepdim=True)
        q = orth(a @ (z / norm.clamp_min(torch.finfo(z.dtype).tiny)))
    return q


def polar(g: Tensor, steps: int = 5, eps: float = 0.0) -> Tensor:
    """A fast approximation of the nearest semi-orthogonal matrix by the quintic Newton-Schulz iteration.

        x = g / (|g| + eps),   x <- a x + (b x x^T + c (x x^T)^2) x

    Singular values land near 1, about [0.7, 1.2], not on it; `polar_exact` is the limit. Scale invariant where
    eps is 0 (a zero g then stays zero).
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # quintic with maximal slope at 0 (Jordan, 2024)
    if g.shape[-2] > g.shape[-1]:
        return polar(g.mT, steps, eps).mT
    x: Tensor = wide(g)
    if is_cut_along(x, -2):
        return laid(polar(whole(x), steps, eps), x)
    norm = torch.linalg.matrix_norm(x, keepdim=True) + eps
    x = x / torch.where(norm == 0, 1.0, norm)
    for _ in range(steps):
        gram = settled(x @ x.mT)
        x = combined(x, a, combined(gram, b, gram, c, gram), 1.0, x)
    return x


def combined(y: Tensor, beta: float, a: Tensor, alpha: float, b: Tensor) -> Tensor:
    """beta y + alpha a @ b in one pass, for matrices or batches of them."""
    if y.ndim == 2:
        return torch.addmm(y, a, b, beta=beta, alpha=alpha)
    batch = y.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3)
    return torch.baddbmm(*batch, beta=beta, alpha=alpha).view(y.shape)


def polar_exact(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, u @ vh of the singular value decomposition."""
    u, _, vh = svd(whole(g))
    return laid(u @ vh, g)


def whiten(h: Tensor, ridge: float = 0.0) -> Whitened:
    """Cholesky factor of a positive semi-definite matrix h (..., n, n), in float64.

        factor factor^T = h + ridge * mean(diag h) * I

    A singular h (fewer tokens than columns, dead inputs) gets the smallest ridge of 1e-9, 1e-8, ... 1e-2 that
    lets the factorization succeed; the result says which. An all-zero h counts as the identity.

    >>> whiten(4 * torch.eye(2)).factor.diagonal()
    tensor([2., 2.], dtype=torch.float64)
    """
    x = h.double()
    require_finite(x)
    mean = x.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    empty = (x == 0).flatten(-2).all(-1)[..., None, None]
    x, mean = torch.where(empty, eye, x), torch.where(mean == 0, 1.0, mean)
    for attempt in (ridge, *(10.0**p for p in range(-9, -1) if 10.0**p > ridge)):
        factor, info = torch.linalg.cholesky_ex(x + attempt * mean * eye)
        # A pivot at round-off level "succeeds", but its inverse amplifies noise.
        faint = factor.diagonal(dim1=-2, dim2=-1).square() < 1e-13 * mean[..., 0]
        if not bool(info.any()) and not bool(faint.any()):
            return Whitened(factor, attempt)
    raise ValueError(f"matrix of shape {tuple(h.shape)} is not positive semi-definite, even with ridge 1e-2")


def solve_right(v: Tensor, factor: Tensor) -> Tensor:
    """`v @ inverse(factor)` for a diagonal (n,) or square (n, n) factor; triangular ones are substituted."""
    dtype = torch.promote_types(wide(v).dtype, wide(factor).dtype)
    v, factor = v.to(dtype), factor.to(dtype)
    if factor.ndim == 1:
        return v / factor
    solution: Tensor
    if torch.equal(factor, factor.tril()):
        solution = torch.linalg.solve_triangular(factor, v, upper=False, left=False)
    else:
        solution = torch.linalg.solve(factor, v, left=False)
    return solution


def stable_rank(s: Tensor) -> Tensor:
    """Frobenius over spectral norm, squared, from singular values s (..., k): sum s^2 / max s^2.

    >>> stable_rank(torch.tensor([1.0, 1.0, 1.0])).item()
    3.0
    """
    energy: Tensor = s.double().square()
    return energy.sum(-1) / energy.amax(-1).clamp_min(torch.finfo(torch.float64).tiny)


def entropy_rank(s: Tensor) -> Tensor:
    """Effective rank exp(-sum p log p) with p = s / sum s (Roy and Vetterli, 2007); 0 for a zero matrix."""
    total = s.double().sum(-1, keepdim=True)
    p = s.double() / torch.where(total == 0, 1.0, total)
    rank = torch.special.entr(p).sum(-1).exp()
    return torch.where(total[..., 0] == 0, 0.0, rank)


def energy_rank(s: Tensor, energy: float) -> Tensor:
    """The smallest k whose leading singular values hold the given share of sum s^2.

    >>> energy_rank(torch.tensor([3.0, 1.0]), 0.9).item()
    1
    """
    cumulative = s.double().square().cumsum(-1)
    goal = energy * cumulative[..., -1:]
    return ((cumulative < goal * (1 - 1e-12)).sum(-1) + 1).clamp_max(s.shape[-1])


def tail_index(s: Tensor, top: float = 0.5) -> Tensor:
    """Hill's estimate of the power-law exponent of the largest `top` share of singular values.

        1 / alpha = mean_{i <= k} log(s_i / s_{k+1})

    Small means heavy-tailed: a few directions dominate.
    """
    x = s.double().sort(dim=-1, descending=True).values
    k = min(max(int(top * x.shape[-1]), 1), x.shape[-1] - 1)
    if k < 1:
        return torch.full(x.shape[:-1], torch.inf, dtype=torch.float64)
    tiny = torch.finfo(torch.float64).tiny
    logs = x[..., :k].clamp_min(tiny).log() - x[..., k : k + 1].clamp_min(tiny).log()
    return 1.0 / logs.mean(-1)


def check_rank(rank: int, m: int, n: int, where: str = "matrix") -> None:
    """Raise ValueError unless 1 <= rank <= min(m, n)."""
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"{where}: rank {rank} is outside 1..min({m}, {n}) = {min(m, n)}; choose one inside")


def require_finite(a: Tensor, where: str = "matrix") -> None:
    """Raise ValueError naming the first NaN or Inf."""
    if not bool(whole(torch.isfinite(a).all())):
        a = whole(a)
        at = tuple(torch.nonzero(~torch.isfinite(a))[0].tolist())
        raise ValueError(f"{where} of shape {tuple(a.shape)} holds {a[at].item()} at {at}; repair or leave it out")
