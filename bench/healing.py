"""Claim: training only the low-rank components heals a compressed model at least as well as LoRA and GaLore.

SmolLM2-135M, compressed by WeLore's ranks under the Gram metric, heals by each method on the same windows of
pydoc_data.topics, with AdamW and a cosine; LoRA trains as many numbers as the low-rank components have. Each
learning rate is the best of the few of `METHODS` after a short run, told on windows that are not scored. Windows
that score, calibrate, choose and teach are disjoint. Every run is a process of its own, so that its peak memory,
less what was there before the model, is its own; each is written as it ends, and a killed bench goes on.

    python bench/healing.py [--out bench/results/healing.json] [--steps 300] [--methods lora pela]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from rich.console import Console
from torch import Tensor, nn

from journal import Journal, Row
from subspan.budget import Err
from subspan.hosts import folders, jobs, lessons, text
from subspan.hosts.score import perplexity
from subspan.hosts.training import draw, train
from subspan.inspect import Report, loss_curves, write_page
from subspan.methods import build
from subspan.optim import Optim

METHODS = {
    "welore_peft": (2e-4, 6e-4),
    "lora": (5e-4, 1.5e-3),
    "galore": (2e-4, 6e-4),
    "full": (3e-5, 1e-4),
    "pela": (3e-5, 1e-4),
}
SCORED, WINDOW, CALIBRATION, CHOICE = 8, 512, 16, 8
# What decides the numbers: rows are kept only while these stay.
SETTINGS = ("model", "err", "steps", "probe", "window", "batch", "seed", "threads", "dtype", "device")


class Texts(NamedTuple):
    """Disjoint pieces of the text: windows that score, calibrate and choose, and the tokens that teach."""

    scored: Tensor
    calibration: Tensor
    choice: Tensor
    healing: Tensor


def texts(tokenizer: Any, window: int) -> Texts:
    """Cut the text: the first windows are scored, the next calibrate, the next choose, the rest teaches."""
    ids = jobs.tokens(tokenizer, text.prose())
    first, then = SCORED * WINDOW, (SCORED + CALIBRATION) * WINDOW
    last = then + CHOICE * window
    return Texts(
        text.windows(ids, WINDOW, SCORED),
        text.windows(ids, WINDOW, CALIBRATION, start=first),
        text.windows(ids, window, CHOICE, start=then),
        ids[last:],
    )


def compressed(args: argparse.Namespace) -> Row:
    """Compress the model into the work folder; returns perplexities and sizes."""
    loaded = jobs.opened(args.model, dtype=args.dtype, device=args.device, seed=args.seed)
    pieces = texts(loaded.tokenizer, args.window)
    dense = perplexity(loaded.model, pieces.scored)
    batches = pieces.calibration.unsqueeze(1).to(args.device)
    plan, _ = jobs.do_method(loaded.model, "welore", jobs.encode(Err(args.err), "gram"), batches=batches)
    folders.save_model(args.work / "model", loaded, {"plan": plan.to_dict()}, force=True)
    return {
        "dense": dense, "perplexity": perplexity(loaded.model, pieces.scored), "err": plan.err,
        "ratio": plan.ratio, "bytes_kept": plan.bytes[1] / plan.bytes[0],
    }  # fmt: skip


def lora_rank(model: nn.Module) -> int:
    """The rank at which LoRA on every layer of the blocks has as many numbers as the low-rank components."""
    numbers = sum(p.numel() for _, p in build("welore_peft").choose(model))
    layers: list[Any] = [model.get_submodule(name) for name in lessons.adaptable(model)]
    rank: int = round(numbers / sum(m.in_features + m.out_features for m in layers))
    most: int = min(min(m.in_features, m.out_features) for m in layers)
    return max(1, min(rank, most))


def prepared(model: nn.Module, args: argparse.Namespace, teacher: nn.Module | None) -> lessons.Learning:
    """What a method trains, and how, on the compressed model."""
    rank = lora_rank(model) if args.method == "lora" else None
    alpha = None if rank is None else float(rank)
    return lessons.learning(model, args.method, steps=args.steps, rank=rank, alpha=alpha, teacher=teacher)


def heal(args: argparse.Namespace) -> Row:
    """Train one method at one rate for `--steps`, and measure."""
    before = psutil.Process().memory_info().rss
    loaded = jobs.opened(str(args.work / "model"), dtype=args.dtype, device=args.device, seed=args.seed)
    source = lessons.teacher_for(args.method, str(args.work / "model"), None)
    master = None if source is None else jobs.opened(source, dtype=args.dtype, device=args.device).model
    pieces = texts(loaded.tokenizer, args.window)
    learns = prepared(loaded.model, args, master)
    history = train(
        loaded.model,
        draw(pieces.healing, length=args.window, batch=args.batch, steps=args.steps, seed=args.seed),
        Optim(learns.named, learns.rule, lr=args.rate, seed=args.seed),
        steps=args.steps, validation=pieces.choice, every=max(1, args.steps // 3), loss=learns.loss,
        label=f"{args.method} at {args.rate:g}", progress=True,
    )  # fmt: skip
    return {
        "method": args.method, "rate": args.rate, "steps": args.steps, "args": learns.args,
        "trained": sum(p.numel() for _, p in learns.named), "state_bytes": history.state_bytes,
        "peak_bytes": history.peak_rss - before, "tokens_per_second": history.tokens_per_second,
        "validation": history.validation,
        "perplexity": perplexity(loaded.model, pieces.scored) if args.score else None,
    }  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """The runs so far, and new ones, each in a process of its own."""

    journal: Journal
    args: argparse.Namespace

    def row(self, method: str, rate: float, steps: int, *, score: bool) -> Row:
        """The row of a run."""
        key = f"{method} at {rate:g} for {steps}" + (" scored" if score else "")
        more = ["--method", method, "--rate", str(rate), "--steps", str(steps), *(["--score"] if score else [])]
        return self.journal.row("rows", key, lambda: self.alone("heal", more))

    def start(self) -> Row:
        """The compressed model, made when it is not there."""
        if not (self.args.work / "model" / "config.json").is_file():
            self.journal.data["start"] = {}
        return self.journal.row("start", "compressed", lambda: self.alone("compress", []))

    def alone(self, what: str, more: list[str]) -> Row:
        """Run this file in a new process, which prints its row."""
        names = [name for name in SETTINGS if name not in ("steps", "probe")]
        same = [word for name in names for word in (f"--{name}", str(getattr(self.args, name)))]
        command = [sys.executable, __file__, "--do", what, "--work", str(self.args.work), *same, *more]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found: Row = json.loads(done.stdout.splitlines()[-1])
        return found


def best_rate(runs: Runs, method: str, args: argparse.Namespace) -> float:
    """The rate whose short run ends lowest on the windows to choose by."""
    rates = METHODS[method]
    ends = {rate: runs.row(method, rate, args.probe, score=False)["validation"][-1][1] for rate in rates}
    return min(ends, key=lambda rate: ends[rate])


def page(data: Row, chosen: dict[str, Row]) -> Report:
    """Table and picture."""
    start, settings = data["start"]["compressed"], data["settings"]
    report = Report("Healing a compressed language model", settings["model"], seed=settings["seed"], data=data)
    report.section(
        "The same model, healed in five ways",
        f"Compressed by WeLore's ranks under the Gram metric to {start['err']:.0%} less rank, which keeps "
        f"{start['bytes_kept']:.0%} of the bytes, then {settings['steps']} steps of {settings['batch']} windows "
        f"of {settings['window']} tokens.",
    )
    columns = ["trained", "rate", "numbers", "optimizer state", "peak memory", "tokens/s", "perplexity"]
    rows = [
        ["nothing: dense", "", "", "", "", "", start["dense"]],
        ["nothing", "", "", "", "", "", start["perplexity"]],
    ]
    for name, row in sorted(chosen.items(), key=lambda item: item[1]["perplexity"]):
        rows.append([
            name, f"{row['rate']:g}", f"{row['trained'] / 1e6:.1f} M", f"{row['state_bytes'] / 2**20:.0f} MiB",
            f"{row['peak_bytes'] / 2**20:.0f} MiB", f"{row['tokens_per_second']:.0f}", row["perplexity"],
        ])  # fmt: skip
    report.table("Perplexity on text that neither calibrated, chose a rate nor taught", columns, rows)
    curves = {name: [(float(x), y) for x, y in row["validation"]] for name, row in chosen.items()}
    report.figure("Held-out loss while healing", loss_curves(curves, "nats per token"))
    grids = "; ".join(f"{name} {', '.join(f'{r:g}' for r in METHODS[name])}" for name in chosen)
    report.note(
        f"Rates tried, for {settings['probe']} steps each: {grids}. Two rates and one seed tell near from far, "
        "and do not rank what is close. LoRA trains as many numbers as the low-rank components have. pela runs "
        "its teacher at each step, and holds it in memory."
    )
    return report


def parsed() -> argparse.Namespace:
    """The command line; what begins with `do` is for the processes that this one starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/healing.json"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "subspan-healing")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--err", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--probe", type=int, default=30)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--do", choices=["compress", "heal"], help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--score", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.set_num_threads(args.threads)
    if args.do:
        print(json.dumps((compressed if args.do == "compress" else heal)(args)))
        return
    journal = Journal(args.out, {name: getattr(args, name) for name in SETTINGS}, "start", "rows")
    runs = Runs(journal, args)
    runs.start()
    chosen = {
        method: runs.row(method, best_rate(runs, method, args), args.steps, score=True) for method in args.methods
    }
    report = page(journal.data, chosen)
    for block in report.blocks:
        if block.kind == "table":
            for row in (block.columns, *block.rows):
                Console().print(" | ".join(row))
    print(write_page(report, args.out.with_suffix(".html")))


if __name__ == "__main__":
    main()
