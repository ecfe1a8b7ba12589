"""Intruder dimensions: leading singular vectors of a tuned weight that resemble none of the weight it came from.

Source: Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv:2410.21228.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subspan import linalg
from subspan.inspect.subspaces import Side
from subspan.linalg import SVD

TIE = 1e-6


@dataclass(frozen=True, eq=False)
class Intruders:
    """Among the leading singular vectors of a tuned weight, those that are new.

    `indices` count from 0; `similarity` (k,) is the largest cosine of each leading vector with the base's
    vectors; `energy` is the share of the tuned weight's squared norm that the intruders hold.
    """

    indices: tuple[int, ...]
    similarity: Tensor
    energy: float

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.indices)


def find_intruders(
    base: Tensor, tuned: Tensor, *, top: int = 10, epsilon: float = 0.5, side: Side = "left"
) -> Intruders:
    """Which of the `top` leading singular vectors of `tuned` have no cosine of epsilon or more in `base`.

        j is an intruder  <=>  max_i |<u_j(tuned), u_i(base)>| < epsilon

    for all i whose singular value is not zero: what the base never wrote is no vector of it. Where the base has
    equal singular values their vectors are arbitrary, so the cosine is that with the subspace they span. Two
    singular value decompositions; in float32 or wider. Raises ValueError for weights of different shapes.

    >>> base, spike = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), torch.ones(4, 4)
    >>> find_intruders(base, base).count, find_intruders(base, base + 9 * spike, epsilon=0.6).indices
    (0, (0,))
    """
    if base.shape != tuned.shape:
        raise ValueError(
            f"the base has shape {tuple(base.shape)} and the tuned weight {tuple(tuned.shape)}; they must be the "
            "same layer before and after"
        )
    return intruders_of(linalg.svd(base.detach()), linalg.svd(tuned.detach()), top=top, epsilon=epsilon, side=side)


def intruders_of(base: SVD, tuned: SVD, *, top: int = 10, epsilon: float = 0.5, side: Side = "left") -> Intruders:
    """`find_intruders` for decompositions that are at hand; the base's must be whole, the tuned one's need not."""
    if top < 1 or not 0 < epsilon <= 1:
        raise ValueError(f"top {top} and epsilon {epsilon}: give a count of 1 or more and a cosine in (0, 1]")
    new, old = (tuned.u, base.u) if side == "left" else (tuned.vh.mT, base.vh.mT)
    live, wanted = live_count(base), min(top, live_count(tuned))
    cosines = (old.double()[:, :live].mT @ new.double()[:, :wanted]).square()
    similarity = _pooled(cosines, base.s[:live]).sqrt()
    indices = tuple(torch.nonzero(similarity < epsilon).flatten().tolist())
    energy = tuned.s.double().square()
    share = float(energy[list(indices)].sum() / energy.sum()) if indices else 0.0
    return Intruders(indices, similarity, share)


def mitigate(base: Tensor, tuned: Tensor, *, scale: float = 0.75, top: int = 10, epsilon: float = 0.5) -> Tensor:
    """The tuned weight with its intruders' singular values scaled down, in the tuned weight's dtype.

        w = tuned + (scale - 1) sum_j s_j u_j v_j^T   over intruders j

    `scale` 1 changes nothing and 0 takes the intruders out.
    """
    parts = linalg.svd(tuned.detach())
    found = intruders_of(linalg.svd(base.detach()), parts, top=top, epsilon=epsilon)
    at = list(found.indices)
    lost = (parts.u[:, at] * parts.s[at]) @ parts.vh[at]
    return (linalg.wide(tuned.detach()) + (scale - 1) * lost).to(tuned.dtype)


def _pooled(squares: Tensor, s: Tensor) -> Tensor:
    """The largest squared cosine (k,) with vectors of equal singular value, from those (i, k) with each."""
    if not len(s):
        return squares.new_zeros(squares.shape[1])
    group = (s[:-1] - s[1:] > TIE * s[0]).long().cumsum(0)
    group = torch.cat([group.new_zeros(1), group])
    sums = squares.new_zeros(int(group[-1]) + 1, squares.shape[1]).index_add_(0, group, squares)
    return sums.amax(0)


def live_count(parts: SVD) -> int:
    """How many singular values are above round-off, max(m, n) eps of the largest."""
    # Through a Gram matrix they are known to 1e-8 of the largest at best, even in float64.
    eps = max(torch.finfo(parts.s.dtype).eps, 1e-9)
    return int((parts.s > max(parts.u.shape[-2], parts.vh.shape[-1]) * eps * parts.s.max()).sum())
