"""Claim: one optimizer step costs less than the peers' on the same tensors, as a ratio in one process.

8 blocks of {4 x (512, 512), 2 x (1376, 512), (512, 1376)} and two (32000, 512) tables on plain Adam; float32,
rank 128, two threads. Ours and the peer's step take turns; medians and quartiles of the ratio are written.
Also: the slowest step of an interval with staggered refreshes, the memory that a step takes beside weights,
gradients and state, how much of the exact subspace a refresh finds, and how the cost grows.

    pip install --no-deps galore-torch==1.0 apollo-torch==1.0.3
    python bench/step_time.py [--out bench/results/step_time.json] [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import peers
from subspan.inspect import environment
from subspan.methods import build
from subspan.optim import Gaussian, Optim, Span, Staggered
from subspan.optim.meter import Peak

NEVER = peers.NEVER


def parameters(*, width: int = 512, blocks: int = 8, tables: int = 2) -> dict[str, torch.Tensor]:
    """Named tensors with gradients, the same every time; a gradient's spectrum falls like 1 / i."""
    generator = torch.Generator().manual_seed(0)
    tall = 8 * round(width * 8 / 3 / 8 + 0.5)
    layer = [(width, width)] * 4 + [(tall, width)] * 2 + [(width, tall)]
    shapes = {f"layers.{b}.w{i}": shape for b in range(blocks) for i, shape in enumerate(layer)}
    shapes |= {f"embed.{i}": (32000, width) for i in range(tables)}
    named = {}
    for name, shape in shapes.items():
        p = torch.nn.Parameter(torch.randn(*shape, generator=generator) * 0.02)
        p.grad = torch.randn(*shape, generator=generator)
        named[name] = p
    return named


def ours(method: str, named: dict[str, torch.Tensor] | None = None, **args: object) -> Callable[[], None]:
    """A step of ours, after a first one that made state and bases."""
    opt = Optim((named or parameters()).items(), build(method, "optimizer", **args), lr=1e-3)
    opt.step()
    return opt.step


def begun(step: peers.Step) -> peers.Step:
    """The step, after a first one."""
    step()
    return step


def seconds(step: Callable[[], Any]) -> float:
    """One call's wall time."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def pair(one: Callable[[], Any], two: Callable[[], Any], rounds: int) -> dict[str, float]:
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


def against_peers(n: int) -> dict[str, dict[str, float]]:
    """The rows that have a peer."""
    few = max(3, n // 5)
    return {
        "AdamW / torch fused AdamW": pair(ours("adamw"), begun(peers.adamw(parameters())), n),
        "GaLore step / galore-torch": pair(ours("galore", every=NEVER), begun(peers.galore(parameters())), n),
        "Fira step / galore-torch": pair(ours("fira", every=NEVER), begun(peers.galore(parameters())), n),
        "GaLore refresh / galore-torch": pair(
            ours("galore", every=1), begun(peers.galore(parameters(), gap=1)), few
        ),
        "APOLLO step / apollo-torch": pair(ours("apollo", every=NEVER), begun(peers.apollo(parameters())), n),
        # The peer keeps its random matrix; the preset draws ours again from its seed, and this row keeps it too.
        "APOLLO step, matrix kept / apollo-torch": pair(
            ours("apollo", every=NEVER, subspace=Gaussian), begun(peers.apollo(parameters())), n
        ),
        "APOLLO-Mini step / apollo-torch": pair(
            ours("apollo_mini", every=NEVER), begun(peers.apollo(parameters(), rank=1)), n
        ),
    }


def staggered(every: int = 200) -> dict[str, float]:
    """The slowest step of an interval over the median one, in ms and as a ratio; the same with all at once."""
    rows = {}
    for name, refresh in {"staggered": Staggered, "all at once": None}.items():
        step = ours("galore", every=every, **({"refresh": refresh} if refresh else {}))
        times = [seconds(step) for _ in range(every)]
        median = statistics.median(times)
        ordered = sorted(times)
        rows[name] = {
            "median_ms": 1e3 * median,
            "slowest_ms": 1e3 * ordered[-1],
            "fifth_slowest_ms": 1e3 * ordered[-5],
            "ratio": ordered[-1] / median,
        }
    # What this machine does to a step that has no refresh at all: the noise of the rows above.
    step = ours("galore", every=NEVER)
    times = [seconds(step) for _ in range(every)]
    rows["no refresh"] = {
        "median_ms": 1e3 * statistics.median(times),
        "slowest_ms": 1e3 * max(times),
        "fifth_slowest_ms": 1e3 * sorted(times)[-5],
        "ratio": max(times) / statistics.median(times),
    }
    return rows


def memory(methods: Iterable[str]) -> dict[str, dict[str, float]]:
    """The most bytes a step holds beside weights, gradients and state, over the largest matrix."""
    named = parameters()
    largest = max(p.numel() * p.element_size() for p in named.values())
    rows = {}
    for method in methods:
        opt = Optim(parameters().items(), build(method, "optimizer"), lr=1e-3)
        opt.step()
        with Peak() as peak:
            opt.step()
        rows[method] = {"extra_mib": peak.most / 2**20, "over_largest_matrix": peak.most / largest}
    return rows


def captured() -> dict[str, float]:
    """Energy inside a warm power frame over that inside the exact one, when the gradient is drawn anew."""
    generator = torch.Generator().manual_seed(0)
    shares: dict[str, list[float]] = {"power, 1 sweep": [], "power, 2 sweeps": []}
    spans = {"power, 1 sweep": Span(128), "power, 2 sweeps": Span(128, sweeps=2)}
    frames: dict[str, Any] = {}
    signal = torch.randn(512, 64, generator=generator) @ torch.randn(64, 1376, generator=generator) / 8
    for _ in range(6):
        g = signal + torch.randn(512, 1376, generator=generator)
        best = torch.linalg.svdvals(g)[:128].square().sum()
        for name, span in spans.items():
            frames[name] = span.fit(g, frames.get(name) or span.init(g, 0), True)
            shares[name].append(float(span.down(g, frames[name]).square().sum() / best))
    return {name: min(values) for name, values in shares.items()}


def growth(n: int) -> list[dict[str, Any]]:
    """Median step times in ms of GaLore against rank, width and number of blocks; no tables."""
    rows = []
    base = {"rank": 128, "width": 512, "blocks": 8}
    changes = [{}, *({"rank": r} for r in (16, 64, 256)), *({"width": w} for w in (256, 1024))]
    for change in [*changes, *({"blocks": b} for b in (2, 4, 16))]:
        case = base | change
        named = parameters(width=case["width"], blocks=case["blocks"], tables=0)
        row: dict[str, Any] = dict(case)
        for method in ("galore", "fira"):
            step = ours(method, named, rank=case["rank"], every=NEVER)
            row[f"{method}_ms"] = 1e3 * statistics.median(seconds(step) for _ in range(n))
        step = ours("galore", named, rank=case["rank"], every=1)
        row["refresh_ms"] = 1e3 * statistics.median(seconds(step) for _ in range(max(3, n // 3)))
        rows.append(row)
    return rows


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    table = Table("what", "ours ms", "peer ms", "ratio", "quartiles")
    for name, r in results["against peers"].items():
        quartiles = f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}"
        table.add_row(name, f"{r['ours_ms']:.0f}", f"{r['peer_ms']:.0f}", f"{r['ratio']:.2f}", quartiles)
    Console().print(table)
    for title in ("interval of 200 steps", "memory of a step", "share of the exact subspace's energy", "growth"):
        Console().print(f"[bold]{title}")
        Console().print(results[title])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/step_time.json"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(2)
    results = {
        "against peers": against_peers(args.rounds),
        "interval of 200 steps": staggered(),
        "memory of a step": memory(("adamw", "galore", "fira", "frugal", "apollo", "apollo_mini")),
        "share of the exact subspace's energy": captured(),
        "growth": growth(args.rounds),
    }
    show(results)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: metadata.version(name) for name in ("galore-torch", "apollo-torch")}
    out = {"rounds": args.rounds, "results": results, "peers": versions, "environment": environment(0)}
    args.out.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
