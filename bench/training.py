"""Claim: fused backward trains at the same speed with less memory, on the model of the demo's training act.

Every case runs in a process of its own, so that its peak resident memory is its own; the resident memory before
the model is built is subtracted. "gradients" is the most bytes of gradients and coordinates alive after a
backward pass.

    python bench/training.py [--out bench/results/training.json] [--steps 12]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from subspan.demo.settings import Settings
from subspan.demo.train import fresh
from subspan.hosts.meter import Meter, release
from subspan.inspect import environment
from subspan.methods import build
from subspan.optim import FusedBackward, Optim, Staggered

CASES = {
    "adamw": ("adamw", {}, None),
    "adamw, fused": ("adamw", {}, {}),
    "galore": ("galore", {"refresh": Staggered}, None),
    "galore, fused": ("galore", {"refresh": Staggered}, {}),
    "galore, fused, clipped": ("galore", {"refresh": Staggered}, {"clip": 1.0}),
    "galore, 4 micro-batches": ("galore", {"refresh": Staggered}, None),
    "galore, 4 micro-batches, fused": ("galore", {"refresh": Staggered}, {"accumulate": 4}),
    "fira": ("fira", {"refresh": Staggered}, None),
    "fira, fused": ("fira", {"refresh": Staggered}, {}),
}


def gradient_bytes(model: torch.nn.Module, fused: FusedBackward | None) -> int:
    """Whole gradients alive now, and the coordinates kept for a deferred step."""
    if fused is not None:
        return fused.held_bytes()
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def run(case: str, steps: int) -> dict[str, Any]:
    """Train and measure."""
    method, args, fusing = CASES[case]
    settings = Settings()
    torch.set_num_threads(2)
    base = psutil.Process().memory_info().rss
    model = fresh(settings)
    if method != "adamw":
        args = {"rank": settings.rank, "every": 200, **args}
    opt = Optim(model.named_parameters(), build(method, "optimizer", **args), lr=1e-3)
    fused = None if fusing is None else FusedBackward(opt, **fusing)
    micro = 4 if "micro" in case else 1
    generator = torch.Generator().manual_seed(0)
    times, peak, gradients = [], 0, 0
    for step in range(steps + 2):
        ids = torch.randint(settings.vocab, (micro, settings.batch // micro, settings.length), generator=generator)
        release()
        with Meter() as meter:
            start = time.perf_counter()
            for part in ids:
                (model(input_ids=part, labels=part).loss / micro).backward()
                gradients = max(gradients, gradient_bytes(model, fused) if step > 1 else 0)
            (fused or opt).step()
            opt.zero_grad()
            seconds = time.perf_counter() - start
        if step > 1:
            times.append(seconds)
            peak = max(peak, meter.peak)
    tokens = settings.batch * settings.length
    return {
        "tokens_per_second": tokens / statistics.median(times),
        "peak_mib": (peak - base) / 2**20,
        "gradients_mib": gradients / 2**20,
        "state_mib": opt.state_bytes() / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/training.json"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--case", choices=CASES, help="run one here and print json")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(args.case, args.steps)))
        return
    results = {}
    for case in CASES:
        command = [sys.executable, __file__, "--steps", str(args.steps), "--case", case]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[case] = json.loads(done.stdout.splitlines()[-1])
    table = Table("case", "tokens/s", "peak MiB above start", "gradients MiB", "state MiB")
    for case, row in results.items():
        table.add_row(case, *(f"{value:,.0f}" for value in row.values()))
    Console().print(table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"steps": args.steps, "results": results, "environment": environment(0)}, indent=1)
    )


if __name__ == "__main__":
    main()
