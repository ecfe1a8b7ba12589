"""Claims: half the model decodes at least 1.3 times as fast, near break-even never 5 % slower; a plan's bytes are
those on disk; compressing takes seconds, not hours; and whitened truncation attains its theoretical loss.

SmolLM2-135M, float32, two threads. Decoding: batch 1, dense and compressed by turns in one process, the median of
the ratios. Costs against width and depth are of random LLaMAs, with plain SVD and under the Gram metric.

    python bench/compression_speed.py [--out bench/results/compression_speed.json] [--quick] [--only decode ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.budget import Bytes, Err, LeastLoss, Ratio, Uniform, WeLore
from subspan.compress import Study, study
from subspan.edit import sites
from subspan.hosts.folders import open_model, save_model
from subspan.hosts.jobs import forward
from subspan.hosts.meter import Meter
from subspan.hosts.score import decode_speed
from subspan.hosts.text import encode, prose, windows
from subspan.hosts.transformers import LoadedModel
from subspan.inspect import environment
from subspan.io import WEIGHTS
from subspan.metric import Gram, Measure, Plain, collect

PARTS = ("decode", "time", "disk", "theory", "scaling")
NEAR = ("model.layers.0.self_attn.q_proj", "model.layers.14.self_attn.o_proj", "model.layers.14.mlp.down_proj")


class Bench:
    """One model, its text, and how much is done."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.loaded: LoadedModel = open_model("smollm2", progress=True)
        self.ids = encode(self.loaded.tokenizer, prose())
        self.select = "model.layers.[0-2].*" if quick else None

    def batches(self, tokens: int) -> list[torch.Tensor]:
        """Calibration windows of 512 tokens."""
        return [window[None] for window in windows(self.ids, 512, tokens // 512)]

    def plain(self) -> tuple[Study, Meter]:
        """The study that needs no data, and what it took."""
        with Meter() as meter:
            taken = study(self.loaded.model, Plain(), select=self.select)
        return taken, meter

    def decode(self) -> dict[str, Any]:
        """Tokens per second by turns, at half of the numbers, near break-even, and at WeLore's ranks.

        Half of the model counts the embeddings, which stay as they are; half of the numbers only the sites'.
        """
        taken, _ = self.plain()
        model, prompt = self.loaded.model, self.ids[:32]
        turns, count = (2, 4) if self.quick else (9, 32)
        half = taken.plan(Uniform(Err(0.0))).bytes[0] // 2
        plans = {
            "half of the model": Uniform(Bytes(half)),
            "half of the numbers": Uniform(Ratio(0.5)),
            "99 % of the numbers": Uniform(Ratio(0.99)),
            "99 % of the numbers, by least loss": LeastLoss(Ratio(0.99), by="output"),
            "WeLore, 30 % of the ranks": WeLore(Err(0.3), nlrc="keep", gate="break_even"),
        }
        found: dict[str, Any] = {}
        for name, budget in plans.items():
            plan = taken.plan(budget)
            ratios, dense, small = [], [], []
            for _ in range(turns):
                dense.append(decode_speed(model, prompt, new_tokens=count, repeats=1))
                with taken.apply(model, plan):
                    small.append(decode_speed(model, prompt, new_tokens=count, repeats=1))
                ratios.append(small[-1] / dense[-1])
            forms = [site.form for site in plan.sites.values()]
            found[name] = {
                "ratio": plan.ratio, "err": plan.err, "forms": {form: forms.count(form) for form in set(forms)},
                "dense_tokens_per_second": statistics.median(dense),
                "tokens_per_second": statistics.median(small),
                "speedup": statistics.median(ratios), "speedups": ratios,
            }  # fmt: skip
        return found

    def time(self) -> dict[str, Any]:
        """Planning and applying: plain SVD, and svd_llm with 16k tokens."""
        model = self.loaded.model
        with Meter() as plain:
            taken = study(model, Plain(), select=self.select)
            done = taken.apply(model, taken.plan(Uniform(Ratio(0.8))))
        done.undo()
        tokens = 1024 if self.quick else 16_384
        with Meter() as whitened:
            taken = study(model, Gram(), select=self.select, batches=self.batches(tokens), forward=forward)
            done = taken.apply(model, taken.plan(Uniform(Ratio(0.8))))
        done.undo()
        return {
            "svd": {"seconds": plain.seconds, "peak_rss": plain.peak},
            "svd_llm": {"seconds": whitened.seconds, "peak_rss": whitened.peak, "tokens": tokens},
        }

    def disk(self) -> dict[str, Any]:
        """Bytes in the folder over bytes in the plan."""
        taken, _ = self.plain()
        found = {}
        for ratio in (0.8, 0.5):
            plan = taken.plan(Uniform(Ratio(ratio)))
            with taken.apply(self.loaded.model, plan), tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "small"
                save_model(out, self.loaded, {"method": "svd", "plan": plan.to_dict()})
                weights = (out / WEIGHTS).stat().st_size
            planned = plan.bytes[1]
            found[f"{ratio:.0%}"] = {"planned": planned, "on_disk": weights, "excess": weights / planned - 1}
        return found

    def theory(self) -> dict[str, Any]:
        """The largest relative deviation of |(W - W_r) X|_F^2 from the discarded s^2, in float32 and float64."""
        found = {}
        # Of fewer tokens than inputs the moments are singular, and the ridge they get is another loss.
        select, tokens = (NEAR[:1], 1024) if self.quick else (NEAR, 16_384)
        for dtype in (torch.float32, torch.float64):
            model = self.loaded.model.to(dtype)
            chosen = sites(model, select.__contains__)
            batches = self.batches(tokens)
            taken = study(model, Gram(), select=select.__contains__, batches=batches, forward=forward)
            # In float64 of both, so that the sum itself adds no error.
            moments = collect(model.double(), batches, Gram(), chosen, forward=forward)
            worst = 0.0
            for name, layer in chosen.items():
                part, gram = taken.parts[name], moments[name].double()
                for share in (0.25, 0.5, 0.75):
                    rank = int(share * min(layer.weight.shape))
                    off = layer.weight.detach().double() - part.cut(rank).dense().double()
                    loss = float(((off @ gram) * off).sum())
                    worst = max(worst, abs(loss / float(part.s[rank:].double().square().sum()) - 1))
            found[str(dtype).removeprefix("torch.")] = {"sites": len(chosen), "worst_deviation": worst}
        self.loaded.model.float()
        return found

    def scaling(self) -> dict[str, Any]:
        """Seconds against width at two blocks, and against depth at width 256."""
        widths, depths = ((64, 128), (1, 2)) if self.quick else ((128, 256, 512, 1024), (2, 4, 8, 16))
        cases = [(width, 2) for width in widths] + [(256, depth) for depth in depths]
        found = {}
        for width, depth in dict.fromkeys(cases):
            model = random_llama(width, depth)
            ids = torch.randint(512, (8, 1, 512), generator=torch.Generator().manual_seed(0))
            row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
            measures: dict[str, Measure] = {"svd": Plain(), "svd_llm": Gram()}
            for name, measure in measures.items():
                with Meter() as meter:
                    taken = study(model, measure, batches=list(ids), forward=forward)
                    taken.apply(model, taken.plan(Uniform(Ratio(0.5)))).undo()
                row[name] = meter.seconds
            found[f"width {width}, {depth} blocks"] = row
        return found


def random_llama(width: int, depth: int) -> LlamaForCausalLM:
    """A LLaMA of random weights, its head and vocabulary small."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=depth,
        num_attention_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def show(name: str, found: dict[str, dict[str, Any]]) -> None:
    """A part as a table."""
    columns = list(dict.fromkeys(key for row in found.values() for key in row if key != "speedups"))
    table = Table("", *columns, title=name)
    for label, row in found.items():
        table.add_row(label, *(number(row.get(key, "")) for key in columns))
    Console().print(table)


def number(value: object) -> str:
    """A cell."""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/compression_speed.json"))
    parser.add_argument("--quick", action="store_true", help="three blocks, a few tokens: does it run?")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="measure these parts")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.quick)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "decode": bench.decode, "time": bench.time, "disk": bench.disk, "theory": bench.theory,
        "scaling": bench.scaling,
    }  # fmt: skip
    data = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        data[name] = parts[name]()
        show(name, data[name])
        data |= {"quick": args.quick, "environment": environment(0)}
        args.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
