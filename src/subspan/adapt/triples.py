"""Triples u_i e_i v_i of an adapted layer: their tensors, their scores, their pruning, their orthogonality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from subspan.adapt.layer import Adapted, Slot
from subspan.linalg import wide
from subspan.ops import Dense, Diag, LinOp, Product
from subspan.shards import is_cut


class Triples(NamedTuple):
    """The trained tensors of u diag(e) v: u (m, rank), e (rank,), v (rank, n)."""

    u: nn.Parameter
    e: nn.Parameter
    v: nn.Parameter


# The axis of each tensor that counts triples.
AXES = {"u": 1, "e": 0, "v": 0}


def triples(op: LinOp) -> Triples | None:
    """The tensors of an op that is the product u diag(e) v and trains all three; None for any other."""
    if type(op) is not Product:
        return None
    match list(op.ops):
        case [Dense(w=nn.Parameter() as u), Diag(d=nn.Parameter() as e), Dense(w=nn.Parameter() as v)]:
            return Triples(u, e, v) if all(p.requires_grad for p in (u, e, v)) else None
    return None


class Sensitivity:
    """Running means of |p g| and of its distance from that mean, one number an entry of p, in float32 at least."""

    def __init__(self, p: Tensor) -> None:
        self.mean = torch.zeros_like(wide(p.detach()))
        self.spread = torch.zeros_like(self.mean)

    def update(self, p: Tensor, g: Tensor | None, b1: float, b2: float) -> None:
        """Count one step; no gradient counts as zero."""
        now = torch.zeros_like(self.mean) if g is None else (wide(p.detach()) * wide(g)).abs()
        self.mean.mul_(b1).add_(now, alpha=1 - b1)
        self.spread.mul_(b2).add_((now - self.mean).abs(), alpha=1 - b2)

    @property
    def score(self) -> Tensor:
        """mean * spread, of p's shape."""
        return self.mean * self.spread


class Site:
    """The triples of one adapted layer, what is known of them, and which are alive."""

    def __init__(self, slot: Slot, found: Triples) -> None:
        self.slot = slot
        self.triples = found
        self.senses = {key: Sensitivity(p) for key, p in found._asdict().items()}
        self.kept = torch.ones_like(found.e, dtype=torch.bool)

    def scores(self) -> Tensor:
        """The score of every triple, (rank,)."""
        u, e, v = (self.senses[key].score for key in AXES)
        return e + u.mean(0) + v.mean(1)

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name, sharing memory."""
        held = {f"{key}/{what}": t for key, s in self.senses.items() for what, t in vars(s).items()}
        return {**held, "kept": self.kept}

    def shrink(self) -> None:
        """Drop the triples that are not kept."""
        index = self.kept.nonzero().squeeze(1)
        cut(self.slot, self.triples, index)
        self.senses = {key: Sensitivity(p) for key, p in self.triples._asdict().items()}
        self.kept = self.kept[index]


@torch.no_grad()
def cut(slot: Slot, found: Triples, index: Tensor) -> None:
    """Leave only the triples of these numbers; the parameters stay the same objects."""
    for key, p in found._asdict().items():
        smaller = p.detach().index_select(AXES[key], index)
        # Autograd keeps a node with the old shape while any graph over p lives, and renews it for a new dtype.
        p.data = smaller.to(torch.float32 if p.dtype == torch.float16 else torch.float16)
        p.data, p.grad = smaller, None
    slot.op = Product([Dense(found.u), Diag(found.e), Dense(found.v)]).train(slot.training)


def cut_as_saved(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the adapters u diag(e) v of a model the ranks, where lower, of saved tensors of the same names."""
    for at, slot in model.named_modules():
        found = triples(slot.op) if isinstance(slot, Slot) else None
        saved = tensors.get(f"{at}.op.ops.1.d")
        if isinstance(slot, Slot) and found is not None and saved is not None and saved.ndim == 1:
            count = min(len(saved), len(found.e))
            cut(slot, found, torch.arange(count, device=found.e.device))


def deviation(x: Tensor) -> Tensor:
    """|x x^T - 1|_F for x (rank, n): 0 where the rows are orthonormal.

    >>> float(deviation(torch.tensor([[1.0, 0.0], [0.0, 3.0]])))
    8.0
    """
    norm: Tensor = torch.linalg.matrix_norm(x @ x.mT - torch.eye(len(x), dtype=x.dtype, device=x.device))
    return norm


def deviation_slope(x: Tensor) -> Tensor:
    """The gradient of `deviation`: 2 (x x^T - 1) x / |x x^T - 1|_F, and 0 where that divides by 0.

    >>> deviation_slope(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([[0., 0.],
            [0., 6.]])
    """
    gap = x @ x.mT - torch.eye(len(x), dtype=x.dtype, device=x.device)
    norm = torch.linalg.matrix_norm(gap)
    return torch.where(norm > 0, 2 * gap @ x / torch.where(norm > 0, norm, 1), 0)


def site_of(module: nn.Module, name: str) -> Site | None:
    """The triples of a module's adapter of that name, if it has any; raises ValueError for cut tensors."""
    if not isinstance(module, Adapted) or name not in module.adapters:
        return None
    slot = module.slot(name)
    found = triples(slot.op)
    if found is None:
        return None
    if any(is_cut(p) for p in found):
        raise ValueError("the triples are cut over processes; scores need whole tensors: shard the base only")
    return Site(slot, found)
