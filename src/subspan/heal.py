"""How a compressed model heals: which parameters learn, and from which loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from subspan.distill import Distill
from subspan.ops import LowRank, OpLayer

Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True, slots=True)
class Factors:
    """Train the factors of low-rank layers, the normalization weights too if `norms`, and all else too if `rest`.

    What does not train is frozen, and has no optimizer state: for the factors alone, Adam holds
    2 sum rank (m + n) numbers. They learn from the model's own loss, or from `loss` and a teacher.
    """

    norms: bool = False
    rest: bool = False
    loss: Distill | None = None

    def choose(self, model: nn.Module) -> Named:
        """Freeze the model but for the chosen parameters and return those by name.

        Raises ValueError when the model has no low-rank layer.
        """
        # Not those of adapters: they are no part of a compressed layer.
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, OpLayer)]
        ops = [name for at, m in layers for name, op in m.named_modules(prefix=at) if isinstance(op, LowRank)]
        if not ops:
            raise ValueError(f"{type(model).__name__} has no low-rank layer to train; compress it first")
        if self.rest:
            return only(model, {name for name, _ in model.named_parameters()})
        wanted = {f"{name}.{factor}" for name in ops for factor in ("u", "v")}
        if self.norms:
            wanted |= {
                name for name, p in model.named_parameters() if p.ndim == 1 and name.endswith("norm.weight")
            }
        return only(model, wanted)


def only(model: nn.Module, names: set[str]) -> Named:
    """Let exactly these parameters want gradients, and return them in the model's order."""
    chosen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name in names:
            chosen.append((name, parameter))
    return chosen
