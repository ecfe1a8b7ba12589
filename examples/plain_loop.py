"""Fira in a plain loop: a run that is saved half way and resumed elsewhere ends equal to the uninterrupted one."""

import tempfile
from collections import OrderedDict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from subspan import Optim, build

TEXT = torch.tensor(list("\n\n".join(topics.values()).encode()))
CONTEXT, STEPS, HALF = 8, 200, 110  # 110 lies between two refreshes


def parts(seed: int) -> dict[str, Any]:
    """A model, its optimizer and schedule; of the matrices only `hidden` is projected, going by their names."""
    torch.manual_seed(seed)
    first = OrderedDict(embed=nn.Embedding(256, 16), flat=nn.Flatten(), hidden=nn.Linear(16 * CONTEXT, 64))
    model = nn.Sequential(OrderedDict(**first, act=nn.GELU(), head=nn.Linear(64, 256)))
    optimizer = Optim(model.named_parameters(), build("fira", rank=8, every=20), lr=1e-2, weight_decay=0.01)
    return {"model": model, "optimizer": optimizer, "schedule": CosineAnnealingLR(optimizer, STEPS)}


def train(run: dict[str, Any], steps: range) -> list[float]:
    """Train over the given steps, each on pieces of text that its number picks; returns the losses."""
    losses = []
    for step in steps:
        starts = torch.randint(len(TEXT) - CONTEXT, (64,), generator=torch.Generator().manual_seed(step))
        windows = TEXT.unfold(0, CONTEXT + 1, 1)[starts]
        loss = nn.functional.cross_entropy(run["model"](windows[:, :-1]), windows[:, -1])
        run["optimizer"].zero_grad()
        loss.backward()
        run["optimizer"].step()
        run["schedule"].step()
        losses.append(loss.item())
    print(f"steps {steps.start} to {steps.stop}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


def main() -> tuple[nn.Module, nn.Module, list[float]]:
    """An uninterrupted model, a resumed one, and the losses of the first."""
    whole, resumed = parts(seed=0), parts(seed=1)
    losses = train(whole, range(HALF))
    with tempfile.TemporaryDirectory() as folder:
        torch.save({name: part.state_dict() for name, part in whole.items()}, Path(folder) / "half.pt")
        for name, state in torch.load(Path(folder) / "half.pt", weights_only=True).items():
            resumed[name].load_state_dict(state)
    losses += train(whole, range(HALF, STEPS))
    train(resumed, range(HALF, STEPS))
    pairs = zip(whole["model"].parameters(), resumed["model"].parameters(), strict=True)
    print(f"resumed run equals: {all(torch.equal(p, q) for p, q in pairs)}")
    return whole["model"], resumed["model"], losses


if __name__ == "__main__":
    main()
