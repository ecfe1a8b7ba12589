"""Run by torchrun: a straight run, and one that loses a worker and goes on: `restart_worker.py FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from subspan.methods.optimizers import galore
from subspan.optim import Optim, checkpoint

STEPS, LOST, EVERY = 11, 7, 3
DIED = "died"


def build() -> tuple[nn.Sequential, Optim, torch.optim.lr_scheduler.LRScheduler]:
    """The same on every worker."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    opt = Optim(model.named_parameters(), galore(rank=2, every=4), lr=0.05, weight_decay=0.1)
    return model, opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.9**t)


def run(folder: Path, name: str, *, die: bool) -> None:
    """Eleven steps from the last checkpoint in folder / name, which rank 0 writes after every third."""
    rank, places = dist.get_rank(), folder / name
    model, opt, schedule = build()
    start = 0
    if checkpoint.newest(places):
        extra = checkpoint.load(places, model, opt)
        start = extra["step"]
        schedule.load_state_dict(extra["schedule"])
    shared = DistributedDataParallel(model)
    for step in range(start, STEPS):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(100 * step + rank), dtype=torch.float64)
        opt.zero_grad()
        shared(x).square().mean().backward()
        if die and rank == 1 and step == LOST:
            (folder / DIED).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        opt.step()
        schedule.step()
        if rank == 0 and (step + 1) % EVERY == 0:
            checkpoint.save(places, model, opt, extra={"step": step + 1, "schedule": plain(schedule)})
    state = {**model.state_dict(), **checkpoint.flat(opt)}
    if rank == 0:
        torch.save({"start": start, "state": state}, folder / f"{name}.pt")


def plain(schedule: torch.optim.lr_scheduler.LRScheduler) -> dict[str, object]:
    """The schedule's state; its functions are not part of it."""
    return {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"} | {
        "lr_lambdas": [None]
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    if not (folder / "straight.pt").exists():
        run(folder, "straight", die=False)
    run(folder, "lost", die=not (folder / DIED).exists())
    dist.destroy_process_group()
