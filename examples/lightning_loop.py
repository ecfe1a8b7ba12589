"""GaLore under Lightning: a run resumed from Lightning's checkpoint ends equal to the uninterrupted one."""

import tempfile
from collections import OrderedDict
from pydoc_data.topics import topics
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from subspan import Optim, build

TEXT = torch.tensor(list("\n\n".join(topics.values()).encode()))
CONTEXT, STEPS, HALF = 8, 200, 110  # 110 lies between two refreshes


class Bytes(pl.LightningModule):
    """Tells a byte of text from those before it; of its matrices only `hidden` is projected, by their names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        first = OrderedDict(embed=nn.Embedding(256, 16), flat=nn.Flatten(), hidden=nn.Linear(16 * CONTEXT, 64))
        self.net = nn.Sequential(OrderedDict(**first, act=nn.GELU(), head=nn.Linear(64, 256)))
        self.losses: list[float] = []

    def training_step(self, _: Tensor) -> Tensor:
        # Lightning does not skip what a plain DataLoader gave before, so the step's number picks the text.
        random = torch.Generator().manual_seed(self.global_step)
        windows = TEXT.unfold(0, CONTEXT + 1, 1)[torch.randint(len(TEXT) - CONTEXT, (64,), generator=random)]
        loss = nn.functional.cross_entropy(self.net(windows[:, :-1]), windows[:, -1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        rule = build("galore", rank=8, every=20, scale=1.0)
        optimizer = Optim(self.named_parameters(), rule, lr=2e-2, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> tuple[nn.Module, nn.Module, list[float]]:
    """An uninterrupted model, a resumed one, and the losses of the first."""
    whole, resumed = Bytes(seed=0), Bytes(seed=1)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with tempfile.TemporaryDirectory() as folder:
        for model, start in (whole, None), (resumed, f"{folder}/half.ckpt"):
            save = pl.callbacks.ModelCheckpoint(folder, filename="half", every_n_train_steps=HALF)
            trainer = pl.Trainer(accelerator="cpu", max_steps=STEPS, callbacks=[save], **quiet)
            trainer.fit(model, DataLoader(range(STEPS)), ckpt_path=start, weights_only=True)
            print(f"{len(model.losses)} steps: loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    print(f"resumed run equals: {all(torch.equal(p, q) for p, q in pairs)}")
    return whole, resumed, whole.losses


if __name__ == "__main__":
    main()
