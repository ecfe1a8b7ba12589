"""How many directions a matrix really has: effective ranks of spectra, and the rank that data makes use of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from subspan import linalg, site
from subspan.edit import sites
from subspan.metric import Batches, Forward, Gram, call, collect
from subspan.select import Select

Measure = Callable[[Tensor], float]
TINY = torch.finfo(torch.float64).tiny


def numerical_rank(s: Tensor) -> Tensor:
    """How many of s (..., k) are above the round-off of the largest, k eps max s."""
    return (s > s.shape[-1] * torch.finfo(s.dtype).eps * s.amax(-1, keepdim=True)).sum(-1)


def schatten_rank(s: Tensor, p: float) -> Tensor:
    """The Schatten-p norm over the largest singular value, to the power p: sum (s / max s)^p.

    The rank as p goes to 0, nuclear over spectral norm at p = 1, the stable rank at p = 2. Raises ValueError
    unless p > 0.

    >>> schatten_rank(torch.tensor([2.0, 1.0]), 1.0).item()
    1.5
    """
    if not p > 0:
        raise ValueError(f"p is {p}; a Schatten measure takes a power above 0; for the rank use numerical_rank")
    x = s.double()
    return (x / x.amax(-1, keepdim=True).clamp_min(TINY)).pow(p).sum(-1)


def nuclear_rank(s: Tensor) -> Tensor:
    """The squared ratio of nuclear and Frobenius norms, (sum s)^2 / sum s^2; 0 for a zero matrix.

    >>> nuclear_rank(torch.tensor([1.0, 1.0, 0.0])).item()
    2.0
    """
    x = s.double()
    return x.sum(-1).square() / x.square().sum(-1).clamp_min(TINY)


def participation_ratio(s: Tensor) -> Tensor:
    """The same ratio for energies, (sum s^2)^2 / sum s^4: the inverse Simpson index of s^2."""
    return nuclear_rank((s.double() / s.double().amax(-1, keepdim=True).clamp_min(TINY)).square())


def logdet_rank(s: Tensor, delta: float = 1e-2) -> Tensor:
    """The log-determinant surrogate of the rank, of s over its largest.

        sum log(1 + x^2 / delta) / log(1 + 1 / delta),   x = s / max s

    The rank as delta goes to 0, the stable rank as it grows. Raises ValueError unless delta > 0.
    """
    if not delta > 0:
        raise ValueError(f"delta is {delta}; it is a level of energy to tell from zero, such as 1e-2")
    x = s.double() / s.double().amax(-1, keepdim=True).clamp_min(TINY)
    return (x.square() / delta).log1p().sum(-1) / torch.tensor(1 / delta, dtype=torch.float64).log1p()


# All are k for k equal singular values beside zeros (energy 90 %: nine tenths of k, rounded up), and none sees
# a common scale. Source of the list: arXiv:2303.13635, section on the effective rank.
RANK_MEASURES: Mapping[str, Measure] = {
    "rank": lambda s: float(numerical_rank(s)),
    "energy 90 %": lambda s: float(linalg.energy_rank(s, 0.9)),
    "log-det": lambda s: float(logdet_rank(s)),
    "schatten 1/2": lambda s: float(schatten_rank(s, 0.5)),
    "entropy": lambda s: float(linalg.entropy_rank(s)),
    "nuclear": lambda s: float(nuclear_rank(s)),
    "nuclear / spectral": lambda s: float(schatten_rank(s, 1.0)),
    "participation": lambda s: float(participation_ratio(s)),
    "stable": lambda s: float(linalg.stable_rank(s)),
}


def rank_measures(s: Tensor) -> dict[str, float]:
    """Every effective rank of one spectrum s (k,) by name.

    >>> {name: round(value, 6) for name, value in rank_measures(torch.ones(10)).items()}["entropy"]
    10.0
    """
    return {name: measure(s) for name, measure in RANK_MEASURES.items()}


@dataclass(frozen=True, eq=False)
class Utilised:
    """What data makes of a weight w (m, n): the directions its inputs and its outputs fill.

    `inputs` (n, i) and `outputs` (m, o) are frames of their principal directions.
    """

    inputs: Tensor
    outputs: Tensor

    @property
    def rank(self) -> int:
        """The utilised rank, min(i, o)."""
        return min(self.inputs.shape[1], self.outputs.shape[1])

    @property
    def share(self) -> float:
        """The utilised rank over the full one."""
        return self.rank / min(self.inputs.shape[0], self.outputs.shape[0])

    def project(self, w: Tensor) -> Tensor:
        """The weight between the two projectors, o o^T w i i^T, of rank `rank` at most, in the dtype of w."""
        x = w.detach().double()
        return (self.outputs @ (self.outputs.mT @ x @ self.inputs) @ self.inputs.mT).to(w.dtype)


def utilised(w: Tensor, gram: Tensor, *, energy: float = 0.999) -> Utilised:
    """The utilised rank of a weight w (m, n) whose inputs have the second moments `gram` (n, n).

    Principal directions hold the share `energy` of E|x|^2 and of E|w x|^2. Moments are uncentred, and the
    layer's bias is left out. Source: arXiv:2407.04797. Raises ValueError for a share outside (0, 1] and for a
    gram of another size.

    >>> utilised(torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, 0.0]))).rank
    2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy {energy} is no share; give one in (0, 1], such as 0.999")
    if tuple(gram.shape) != (w.shape[1], w.shape[1]):
        raise ValueError(
            f"a weight of shape {tuple(w.shape)} needs second moments of shape {(w.shape[1], w.shape[1])}, got "
            f"{tuple(gram.shape)}; collect them from this layer's inputs"
        )
    x, h = w.detach().double(), gram.detach().double()
    return Utilised(_principal(h, energy), _principal(x @ h @ x.mT, energy))


def utilised_ranks(
    model: nn.Module,
    batches: Batches,
    *,
    select: Select | None = None,
    energy: float = 0.999,
    forward: Forward = call,
) -> dict[str, Utilised]:
    """The utilised rank of every selected layer on calibration batches; one Gram matrix per site."""
    found = sites(model, select)
    grams = collect(model, batches, Gram(), found, forward=forward)
    return {name: utilised(site.matrix(found[name]), grams[name], energy=energy) for name in found}


def mean_utilisation(found: Mapping[str, Utilised]) -> float:
    """The mean share of the full rank over layers (MLU); raises ValueError when there is none."""
    if not found:
        raise ValueError("no layer was given; the mean utilisation needs one at least")
    return fmean(one.share for one in found.values())


def _principal(h: Tensor, energy: float) -> Tensor:
    """The leading eigenvectors that hold a share of the trace of a positive semi-definite h (n, n)."""
    linalg.require_finite(h, "second moments")
    values, vectors = torch.linalg.eigh((h + h.mT) / 2)
    count = linalg.energy_rank(values.flip(0).clamp_min(0).sqrt(), energy)
    top: Tensor = vectors.flip(1)[:, : int(count)]
    return top
