"""What the processes of these tests do: `python workers.py JOB WORLD FOLDER`. Results are files in the folder.

One start a job, whose processes are forked: importing torch takes longer than all the steps.
"""

from __future__ import annotations

import functools
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # FSDP imports it, in every process, if the first one has not
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subspan.codec import Bf16, Factored, Int4, Int4Rank1, Int8
from subspan.methods import optimizers as methods
from subspan.optim import Adam, ErrorFeedback, Optim, Projected, Span, Staggered, rotate, stored
from subspan.optim.reduce import Traffic, reduce_projected

STEPS, HALF, LR = 20, 10, 0.01
SMALL = {"rank": 2, "every": 7}
EIGHT = {"mu": Int8(block=4), "nu": Int8(block=4, signed=False)}

# name: what makes the rule. The moments of a subspace are stored too, where a codec is what is tested.
RULES = {
    "adamw": Adam,
    "galore": functools.partial(methods.galore, **SMALL),
    "galore_exact": functools.partial(methods.galore, **SMALL, solver="exact"),
    "galore_float32": functools.partial(methods.galore, **SMALL),
    "galore_int8": lambda: methods.galore(**SMALL, rule=stored(Adam(), **EIGHT)),
    "rotated_error_feedback": lambda: Projected(Span(2), Staggered(4, rotate), Adam(), ErrorFeedback()),
    "fira": functools.partial(methods.fira, **SMALL),
    "frugal": functools.partial(methods.frugal, rank=0.4, every=7),
    "apollo": functools.partial(methods.apollo, **SMALL),
    "dct_adamw": functools.partial(methods.dct_adamw, rank=2),
    "muon": methods.muon,
    "dion": functools.partial(methods.dion, rank=2),
    "ldadam": functools.partial(methods.ldadam, rank=2),
    "adafactor": methods.adafactor,
    "factored": lambda: stored(Adam(), mu=Bf16(), nu=Factored()),
    "int4": lambda: stored(Adam(), mu=Int4(block=4), nu=Int4Rank1()),
}
# Every new shape and precision costs DTensor seconds a process, so some are only tried with two or with four.
LEFT_OUT = {2: ("galore_exact", "rotated_error_feedback", "dion", "ldadam", "adafactor"), 4: ("galore_float32",)}
SAVED = ("adamw", "galore", "frugal", "galore_int8")


def build(name: str = "") -> nn.Sequential:
    """Matrices (10, 6), (5, 10) and (3, 5): cut by 4, the last part of each is short or empty."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 3))
    return model if name.endswith("float32") else model.double()


def optimizer(model: nn.Module, name: str) -> Optim:
    return Optim(model.named_parameters(), RULES[name](), lr=LR, weight_decay=0.1)


class Zoo(nn.Module):
    """A model a rule, all cut together, so that they share the few collectives of forward and backward."""

    def __init__(self, **models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)

    def __getitem__(self, name: str) -> nn.Module:
        return self.models[name]

    def forward(self, t: int) -> torch.Tensor:
        """The sum of their losses at step t."""
        return sum(model(batch(t, next(model.parameters()))).square().mean() for model in self.models.values())


def zoo(names: tuple[str, ...]) -> tuple[Zoo, dict[str, Optim]]:
    """Models and their optimizers, cut over the processes if there are several."""
    models = Zoo(**{name: build(name) for name in names})
    if dist.is_initialized():
        for name in names:
            if name.endswith("float32"):  # what is cut together has one precision
                cut(models[name])
        cut(models)
    return models, {name: optimizer(models[name], name) for name in names}


def cut(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def batch(t: int, like: torch.Tensor) -> torch.Tensor:
    """This process's share of the 8 inputs of step t."""
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    parts = dist.get_world_size() if dist.is_initialized() else 1
    return x.chunk(parts)[dist.get_rank() if parts > 1 else 0].to(like.dtype)


def train(models: Zoo, opts: dict[str, Optim], first: int, last: int) -> None:
    """Steps first + 1 ... last, of each model by its own optimizer."""
    for t in range(first, last):
        for opt in opts.values():
            opt.zero_grad()
        models(t).backward()
        for opt in opts.values():
            opt.step()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def layout(opt: Optim) -> dict[str, dict[str, tuple[int, int]]]:
    """By parameter and entry of the state: how many numbers it has, and how many of them are here."""
    names = {p: name for group in opt.param_groups for name, p in zip(group["param_names"], group["params"])}
    return {
        names[p]: {
            key: (x.numel(), (x.to_local() if isinstance(x, DTensor) else x).numel()) for key, x in s.items()
        }
        for p, s in opt.state.items()
    }


def states(models: Zoo, opts: dict[str, Optim], names: tuple[str, ...]) -> dict[str, dict]:
    pairs = {name: get_state_dict(models[name], opts[name]) for name in names}
    return {name: {"model": weights, "optim": state} for name, (weights, state) in pairs.items()}


def resumed(folder: Path) -> dict:
    """The second half of the steps, from the checkpoint of four processes."""
    models, opts = zoo(SAVED)
    saved = states(models, opts, SAVED)
    dcp.load(saved, checkpoint_id=folder / "checkpoint")
    for name, parts in saved.items():
        set_state_dict(models[name], opts[name], model_state_dict=parts["model"], optim_state_dict=parts["optim"])
    train(models, opts, HALF, STEPS)
    return {name: whole(models[name]) for name in SAVED}


class Sent(TorchDispatchMode):
    """The collectives of functional torch, each with the numbers it gives to every process."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first to its parts: what they send comes by here again
        out = func(*args, **(kwargs or {}))
        name = func.__name__.removesuffix(".default")
        if func.namespace in ("_c10d_functional", "c10d") and not name.startswith(("wait", "_wrap")):
            self.calls.append(
                (name, max(x.numel() for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)))
            )
        return out


def fsdp(folder: Path, world: int) -> dict:
    models, opts = zoo(tuple(name for name in RULES if name not in LEFT_OUT[world]))
    train(models, opts, 0, HALF)
    if world == 4:
        dcp.save(states(models, opts, SAVED), checkpoint_id=folder / "checkpoint")
    train(models, opts, HALF, STEPS)
    out = {
        name: {"weights": whole(models[name]), "layout": layout(opt), "bytes": opt.state_bytes()}
        for name, opt in opts.items()
    }
    return out | ({"sent": tall_traffic(), "nan": poisoned_fsdp()} if world == 4 else {"loaded": resumed(folder)})


def tall_traffic() -> dict:
    """The collectives of galore's step on a (64, 16) matrix: one that fits the frame, one that does not."""
    torch.manual_seed(0)
    model = cut(nn.Sequential(nn.Linear(16, 64, bias=False, dtype=torch.float64)))
    opt = Optim(model.named_parameters(), methods.galore(rank=2, every=3), lr=LR)
    calls = []
    for _ in range(4):
        opt.zero_grad()
        model(torch.randn(4, 16, dtype=torch.float64)).square().mean().backward()
        with Sent() as sent:
            opt.step()
        calls.append(sent.calls)
    return {"plain": calls[2], "refresh": calls[3]}


def poisoned_fsdp() -> dict[str, list[str]]:
    """What every process says of a NaN at step 8, when a frame is due: in a loss, or in one part of a gradient."""
    models, opts = zoo(("galore",))
    train(models, opts, 0, 7)
    out, chosen = {}, dist.get_rank() == 1
    for place in ("loss", "part"):  # a step that was refused leaves no trace, so the next one starts as it did
        opts["galore"].zero_grad()
        (models(7) * (float("nan") if chosen and place == "loss" else 1.0)).backward()
        if chosen and place == "part":
            models["galore"][0].weight.grad.to_local()[0, 0] = float("nan")
        out[place] = agreed(opts["galore"])
    return out


def agreed(opt: Optim) -> list[str]:
    """From every process: its error, and how often its parameters were stepped."""
    try:
        opt.step()
        said = "no error"
    except ValueError as error:
        said = str(error)
    steps = [int(opt.state[p]["step"]) for group in opt.param_groups for p in group["params"]]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, f"{said} after {steps}")
    return everyone


def ddp(folder: Path, world: int) -> dict:
    out = {}
    for name in ("galore", "fira"):
        for way in ("whole", "projected"):
            models, opts, traffic = copies(name, projected=way == "projected")
            train(models, opts, 0, STEPS)
            state = {n: opts[name].state[p] for n, p in models[name].module.named_parameters()}
            frames = {n: s["frame.q"] for n, s in state.items() if "frame.q" in s}
            everyone: list = [None] * world
            dist.all_gather_object(everyone, (whole(models[name].module), frames))
            out[name, way] = everyone
            out[name, way, "traffic"] = traffic and (traffic.sent, traffic.whole, traffic.saved)
    return out | {"nan": [poisoned_ddp(step, projected=projected) for step in (8,) for projected in (False, True)]}


def copies(name: str, *, projected: bool) -> tuple[Zoo, dict[str, Optim], Traffic | None]:
    """A model whose copies on all processes are kept alike by DDP."""
    model = DistributedDataParallel(build(name))
    opt = optimizer(model.module, name)  # by the names it has alone: frames are drawn by name
    return Zoo(**{name: model}), {name: opt}, reduce_projected(model, opt) if projected else None


def poisoned_ddp(step: int, *, projected: bool) -> list[str]:
    """What every process says when the loss of process 1 is NaN at that step."""
    models, opts, _ = copies("galore", projected=projected)
    train(models, opts, 0, step - 1)
    opts["galore"].zero_grad()
    (models(step - 1) * (float("nan") if dist.get_rank() == 1 else 1.0)).backward()
    return agreed(opts["galore"])


def alone(folder: Path, world: int) -> dict:
    models, opts = zoo(tuple(RULES))
    train(models, opts, 0, STEPS)
    out = {name: {"weights": whole(models[name]), "bytes": opt.state_bytes()} for name, opt in opts.items()}
    return out | {"loaded": resumed(folder)}


JOBS = {"fsdp": fsdp, "ddp": ddp, "alone": alone}


def work(rank: int, job: str, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(f"{folder}/{job}{world}.store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    out = JOBS[job](Path(folder), world)
    if rank == 0:
        torch.save(out, f"{folder}/{job}{world}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if arguments[1] == 1:
        work(0, *arguments)
    else:
        mp.start_processes(work, arguments, nprocs=arguments[1], start_method="fork")
