"""Record a layer trained by LyCORIS: `python record_lycoris.py METHOD OUT.npz`, METHOD being loha or lokr.

Needs torch and the PyPI wheel lycoris-lora 4.1.3 (see README.md).
"""

from __future__ import annotations

import importlib
import sys

import torch
from record_adapters import Arrays, N, draw, layer, trained
from record_galore import SEED, save, stub
from torch import nn

RANKS, ALPHA, LR = {"loha": 3, "lokr": 1}, 6.0, 0.01


def held(network: nn.Module, when: str) -> Arrays:
    """The tensors under the keys of LyCORIS's files."""
    return {f"{when}.{key}": t.detach().numpy().copy() for key, t in network.state_dict().items()}


def main(method: str, path: str) -> None:
    """Draw all its tensors, and train them with AdamW."""
    stub("einops", rearrange=None)
    stub("toml")
    lycoris = importlib.import_module("lycoris")
    arrays = draw()
    model = nn.Sequential(layer(arrays))
    network = lycoris.create_lycoris(
        model, 1.0, linear_dim=RANKS[method], linear_alpha=ALPHA, algo=method
    ).double()
    network.apply_to()
    params = [p for _, p in sorted(network.named_parameters())]
    torch.manual_seed(SEED)
    with torch.no_grad():
        for p in params:
            p.copy_(0.5 * torch.randn(p.shape, dtype=p.dtype))
    before = held(network, "before")
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0)

    @torch.no_grad()
    def weight() -> torch.Tensor:
        """As the forward pass has it: what `get_diff_weight` returns has the scale in it twice."""
        return (model(torch.eye(N).double()) - model(torch.zeros(1, N).double())).T

    run = trained(model, params, optimizer, weight, arrays)
    save(path, arrays, before, held(network, "after"), run, {"rank": RANKS[method], "alpha": ALPHA, "lr": LR})


if __name__ == "__main__":
    main(*sys.argv[1:])
