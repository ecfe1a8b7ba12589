"""Claim: under the Gram metric WeLore's ranks score better than uniform ones, at 10 to 70 % rank reduction.

SmolLM2-135M, float32; 8 windows of 512 tokens of pydoc_data.topics are scored, the next 32 calibrate.

    python bench/compression.py [--out bench/results/compression.json] [--errs 0.1 0.2 ...]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from subspan.demo.compress import act_compress
from subspan.demo.settings import full
from subspan.hosts.folders import open_model
from subspan.hosts.meter import Meter
from subspan.inspect import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/compression.json"))
    parser.add_argument("--errs", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    args = parser.parse_args()
    settings = replace(full(0), errs=tuple(args.errs), calibration=32)
    with Meter() as meter:
        act = act_compress(open_model("smollm2", progress=True), settings).act
    act.show(Console())
    cost = {"seconds": meter.seconds, "peak_rss": meter.peak}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**act.data, **cost, "environment": environment(0)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
