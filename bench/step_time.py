"""Claim: one optimizer step costs less than the peers' on the same tensors, as a ratio in one process.

8 blocks of {4 x (512, 512), 2 x (1376, 512), (512, 1376)} and two (32000, 512) tables on plain Adam; float32,
rank 128, two threads. Ours and the peer's step take turns; medians and quartiles of the ratio are written.

    pip install --no-deps galore-torch==1.0
    python bench/step_time.py [--out bench/results/step_time.json] [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from subspan.inspect import environment
from subspan.methods import build
from subspan.optim import Optim

SHAPES = [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
NEVER = 10**9


def parameters() -> dict[str, torch.Tensor]:
    """Named tensors with gradients, the same every time."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{b}.w{i}": shape for b in range(8) for i, shape in enumerate(SHAPES)}
    shapes |= {f"embed.{i}": (32000, 512) for i in range(2)}
    named = {}
    for name, shape in shapes.items():
        p = torch.nn.Parameter(torch.randn(*shape, generator=generator) * 0.02)
        p.grad = torch.randn(*shape, generator=generator)
        named[name] = p
    return named


def ours(method: str, **args: object) -> Callable[[], None]:
    """A step of ours, after a first one that made state and bases."""
    opt = Optim(parameters().items(), build(method, **args), lr=1e-3)
    opt.step()
    return opt.step


def adamw() -> Callable[[], None]:
    """A step of torch's fused AdamW."""
    opt = torch.optim.AdamW(list(parameters().values()), lr=1e-3, weight_decay=0.0, fused=True)
    opt.step()
    return opt.step


def galore(gap: int) -> Callable[[], None]:
    """A step of galore-torch."""
    # Its package imports bitsandbytes for an 8-bit class that is not used here.
    sys.modules.setdefault("bitsandbytes", types.ModuleType("bitsandbytes"))
    optim = sys.modules.setdefault("bitsandbytes.optim", types.ModuleType("bitsandbytes.optim"))
    base = types.ModuleType("bitsandbytes.optim.optimizer")
    base.Optimizer2State = object  # type: ignore[attr-defined]
    sys.modules.setdefault("bitsandbytes.optim.optimizer", base)
    optim.optimizer = base  # type: ignore[attr-defined]
    from galore_torch import GaLoreAdamW

    named = parameters()
    low = [p for name, p in named.items() if name.startswith("layers")]
    rest = [p for name, p in named.items() if not name.startswith("layers")]
    group = {"params": low, "rank": 128, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    opt = GaLoreAdamW([{"params": rest}, group], lr=1e-3, weight_decay=0.0, no_deprecation_warning=True)
    opt.step()
    return opt.step


def seconds(step: Callable[[], None]) -> float:
    """One call's wall time."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def pair(one: Callable[[], None], two: Callable[[], None], rounds: int) -> dict[str, float]:
    """Both in turns: medians in ms, and median and quartiles of the ratio."""
    rows = [(seconds(one), seconds(two)) for _ in range(rounds + 2)][2:]
    ratios = sorted(a / b for a, b in rows)
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ours_ms": 1e3 * statistics.median(a for a, _ in rows),
        "peer_ms": 1e3 * statistics.median(b for _, b in rows),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/step_time.json"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(2)
    n = args.rounds
    results = {
        "AdamW / torch fused AdamW": pair(ours("adamw"), adamw(), n),
        "GaLore step / galore-torch": pair(ours("galore", every=NEVER), galore(NEVER), n),
        "Fira step / galore-torch": pair(ours("fira", every=NEVER), galore(NEVER), n),
        "GaLore refresh / galore-torch": pair(ours("galore", every=1), galore(1), max(3, n // 5)),
    }
    table = Table("what", "ours ms", "peer ms", "ratio", "quartiles")
    for name, r in results.items():
        quartiles = f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}"
        table.add_row(name, f"{r['ours_ms']:.0f}", f"{r['peer_ms']:.0f}", f"{r['ratio']:.2f}", quartiles)
    Console().print(table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    peers = {"galore-torch": metadata.version("galore-torch")}
    out = {"rounds": n, "results": results, "peers": peers, "environment": environment(0)}
    args.out.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
