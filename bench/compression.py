"""Claims: what a metric is worth, what a budget is worth, and that ours loses less than WeLore's at equal bytes.

SmolLM2-135M, float32; 8 windows of 512 tokens of pydoc_data.topics are scored, the next 32 calibrate. Every
budget under the Gram metric at five rank reductions and five parameter ratios; every metric with uniform ranks at
the same ten; all of both at one of each; layer by layer against one shot; four budgets at no more than the bytes
that WeLore reached; and the same on a sentence encoder. Every row is written as it comes, so a run that was killed
goes on with --resume.

    python bench/compression.py [--out bench/results/compression.json] [--quick] [--resume]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import compression_page
from compression_encoder import encoder_rows
from subspan.budget import (
    BlockInfluence,
    Budget,
    Bytes,
    Energy,
    Err,
    LeastLoss,
    Owl,
    Ratio,
    Target,
    Uniform,
    WeLore,
)
from subspan.compress import Calibration, Study, study
from subspan.hosts.folders import open_model
from subspan.hosts.jobs import forward, loss
from subspan.hosts.meter import Meter
from subspan.hosts.score import perplexity
from subspan.hosts.text import encode, prose, windows
from subspan.hosts.transformers import LoadedModel
from subspan.importance import Sensitivity
from subspan.inspect import environment, measured_errors
from subspan.metric import MEASURES
from subspan.plan import Plan
from subspan.walk import Blockwise

BUDGETS: dict[str, Callable[[Target], Budget]] = {
    "uniform": Uniform,
    "energy": Energy,
    "welore": WeLore,
    "welore keep": lambda target: WeLore(target, nlrc="keep"),
    "owl": Owl,
    "block influence": BlockInfluence,
    "least loss": LeastLoss,
    "least loss, by output": lambda target: LeastLoss(target, by="output"),
}
TARGETS = {"err": (0.1, 0.2, 0.3, 0.4, 0.5), "ratio": (0.9, 0.8, 0.7, 0.6, 0.5)}
CROSSED = {"err": (0.3,), "ratio": (0.8,)}
WALKED = {"err": (0.3, 0.5), "ratio": (0.8,)}
KINDS: dict[str, Callable[[Any], Target]] = {"err": Err, "ratio": Ratio, "bytes": Bytes}
MATCHED = ("uniform", "energy", "least loss", "least loss, by output")
QUICK = "model.layers.0.*|model.layers.15.*|model.layers.29.*"


@dataclass(frozen=True)
class Case:
    """One row: `like` is WeLore's rank reduction whose bytes are the target, where they are."""

    budget: str
    metric: str
    kind: str
    value: float
    walk: str = "one shot"

    @property
    def key(self) -> str:
        """A name for the row, to find it again."""
        return f"{self.budget} | {self.metric} | {self.kind} {self.value:g} | {self.walk}"


@dataclass(frozen=True)
class Setting:
    """What is scored, on what, and how much of it."""

    loaded: LoadedModel
    scored: torch.Tensor
    calibration: torch.Tensor
    select: str | None

    @property
    def batches(self) -> list[torch.Tensor]:
        """Calibration windows, one to a batch."""
        return [window[None] for window in self.calibration]


def at(targets: dict[str, tuple[float, ...]]) -> Iterator[tuple[str, float]]:
    """All targets as pairs."""
    yield from ((kind, value) for kind, values in targets.items() for value in values)


def cases(metric: str, targets: dict[str, tuple[float, ...]], crossed: dict[str, tuple[float, ...]]) -> list[Case]:
    """The rows under one metric, each once; those of equal bytes come after the WeLore rows they follow."""
    found = [Case("uniform", metric, *pair) for pair in at(targets)]
    found += [Case(budget, metric, *pair) for budget in BUDGETS for pair in at(crossed)]
    if metric == "gram":
        found += [Case(budget, metric, *pair) for budget in BUDGETS for pair in at(targets)]
        found += [Case(budget, metric, "bytes of welore", value) for value in targets["err"] for budget in MATCHED]
        walked = {kind: tuple(v for v in WALKED[kind] if v in values) for kind, values in targets.items()}
        found += [Case("uniform", metric, *pair, "layer by layer") for pair in at(walked)]
    return list(dict.fromkeys(found))


class Table:
    """Rows that are on disk as soon as they are known."""

    def __init__(self, path: Path, about: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        fresh = {**about, "rows": [], "encoder": [], "studies": {}, "pictures": {}}
        old = json.loads(path.read_text()) if resume and path.exists() else fresh
        if any(old.get(key) != value for key, value in about.items()):
            raise SystemExit(f"{path} is of other settings ({about}); leave --resume out to begin anew")
        self.data: dict[str, Any] = old
        self.save()

    def find(self, case: Case) -> dict[str, Any] | None:
        """The row of a case, if it is there."""
        return next((row for row in self.data["rows"] if row["key"] == case.key), None)

    def save(self) -> None:
        """Write all that is known."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.path)


def bar(label: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A progress bar on stderr."""
    return lambda items: track(list(items), label, console=Console(stderr=True), transient=True)


def planned(case: Case, taken: Study, table: Table) -> Plan:
    """The plan of a case."""
    kind, value = case.kind, case.value
    if kind == "bytes of welore":
        like = table.find(Case("welore", "gram", "err", value))
        if like is None:
            raise ValueError(f"{case.key} comes before the WeLore row whose bytes it takes")
        kind, value = "bytes", like["bytes"]
    return taken.plan(BUDGETS[case.budget](KINDS[kind](value)), method=case.budget)


def row(case: Case, setting: Setting, taken: Study, table: Table) -> dict[str, Any]:
    """Plan, apply, score, undo."""
    start = time.perf_counter()
    plan = planned(case, taken, table)
    model = setting.loaded.model
    if case.walk == "one shot":
        done = taken.apply(model, plan)
    else:
        data = Calibration(setting.batches, forward, loss)
        plan, done = Blockwise().follow(model, plan, taken.measure, data=data, track=bar(case.key))
    with done:
        found = perplexity(model, setting.scored, progress=True)
    before, after = plan.bytes
    return {
        "key": case.key, "budget": case.budget, "metric": case.metric, "walk": case.walk, "target": case.kind,
        "value": case.value, "err": plan.err, "ratio": plan.ratio, "bytes": after, "bytes_kept": after / before,
        "perplexity": found, "predicted_error": overall(plan), "forms": forms(plan),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def overall(plan: Plan) -> float:
    """The root mean square of the sites' relative errors, each weighed by how many numbers the site has."""
    sizes = {name: site.shape[0] * site.shape[1] for name, site in plan.sites.items()}
    squares = sum(sizes[name] * site.error**2 for name, site in plan.sites.items())
    return (squares / sum(sizes.values())) ** 0.5


def forms(plan: Plan) -> dict[str, int]:
    """How many sites become what."""
    found = [site.form for site in plan.sites.values()]
    return {form: found.count(form) for form in dict.fromkeys(found)}


def pictures(setting: Setting, taken: Study, table: Table, value: float) -> dict[str, Any]:
    """WeLore's ranks and ours at its bytes, and our plan's predicted and measured errors, for the page."""
    model, found = setting.loaded.model, {}
    cases = {
        "welore": Case("welore", "gram", "err", value),
        "least loss": Case("least loss", "gram", "bytes of welore", value),
        "uniform": Case("uniform", "gram", "ratio", 0.8),
    }
    for name, case in cases.items():
        plan = planned(case, taken, table)
        done = taken.apply(model, plan)
        swaps = dict(done.swaps)
        through = measured_errors(model, swaps, list(setting.scored[:, None]), forward=forward)
        done.undo()
        alone = measured_errors(model, swaps, list(setting.scored[:, None]), forward=forward)
        found[name] = {
            "key": case.key,
            "ranks": plan.ranks(),
            "shapes": {site: list(s.shape) for site, s in plan.sites.items()},
            "predicted": {site: plan.sites[site].error for site in swaps},
            "measured": alone,
            "measured_through_compressed": through,
        }
    return found


def measure(name: str, setting: Setting, table: Table, wanted: list[Case], shared: dict[str, Any]) -> None:
    """One study, and all the rows made from it that are not there yet."""
    todo = [case for case in wanted if table.find(case) is None]
    if not todo and (name != "gram" or table.data["pictures"]):
        return
    with Meter() as meter:
        taken = study(
            setting.loaded.model, MEASURES[name], select=setting.select, batches=setting.batches, forward=forward,
            loss=loss, track=bar(f"decompose, {name}"), spectra=shared.get("spectra"),
        )  # fmt: skip
    shared["spectra"] = taken.spectra
    table.data["studies"][name] = {"seconds": meter.seconds, "peak_rss": meter.peak}
    taken.witness.told.update(shared.get("told", {}))
    if Sensitivity() not in taken.witness.told:
        with Meter() as meter:
            taken.witness.ask(Sensitivity())
        table.data["studies"]["sensitivity"] = {"seconds": meter.seconds, "peak_rss": meter.peak}
    shared["told"] = taken.witness.told
    for case in todo:
        table.data["rows"].append(row(case, setting, taken, table))
        table.save()
        latest = table.data["rows"][-1]
        Console().print(f"{case.key}: {latest['bytes_kept']:.1%} of the bytes, {latest['perplexity']:.2f}")
    if name == "gram":
        table.data["pictures"] = pictures(setting, taken, table, 0.3)
        table.save()


def opened(quick: bool) -> Setting:
    """The model and its windows."""
    loaded = open_model("smollm2", progress=True)
    length, scored, calibration = (128, 2, 4) if quick else (512, 8, 32)
    ids = encode(loaded.tokenizer, prose())
    return Setting(
        loaded,
        windows(ids, length, scored),
        windows(ids, length, calibration, start=scored * length),
        QUICK if quick else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/compression.json"))
    parser.add_argument("--quick", action="store_true", help="three blocks, two targets: does it run?")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = opened(args.quick)
    targets = {"err": (0.3,), "ratio": (0.8,)} if args.quick else TARGETS
    about = {
        "model": "SmolLM2-135M-Instruct", "scored_tokens": setting.scored.numel(),
        "calibration_tokens": setting.calibration.numel(), "quick": args.quick,
    }  # fmt: skip
    table = Table(args.out, about, resume=args.resume)
    if "dense" not in table.data:
        model = setting.loaded.model
        table.data["dense"] = {
            "perplexity": perplexity(model, setting.scored, progress=True),
            "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        }
    shared: dict[str, Any] = {}
    for name in ("plain", "gram", "absmean", "covariance", "fisher"):
        measure(name, setting, table, cases(name, targets, CROSSED), shared)
    if not table.data["encoder"]:
        table.data["encoder"] = encoder_rows(quick=args.quick)
    table.data["environment"] = environment(0)
    table.save()
    compression_page.write(table.data, args.out.with_suffix(".html"))


if __name__ == "__main__":
    main()
