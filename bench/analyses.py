"""Claim to check: on the demo's training run, do weights become low-rank as WeLore's paper says, by matrix type,
and do their gradients behave as it says?

Trains the demo's model with AdamW, looks at the gradients of one fixed batch at checkpoints, and writes what it
saw, as it came. Its times are no benchmark.

    OMP_NUM_THREADS=1 python bench/analyses.py [--out bench/results] [--steps 200] [--looks 16]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from subspan import linalg
from subspan.demo.settings import Settings
from subspan.demo.train import OTHER_RATE, RATES, corpus, fresh
from subspan.edit import shapes
from subspan.hosts.training import History, draw, train
from subspan.inspect import (
    Alignment,
    GradientTrace,
    Report,
    Survey,
    alignments,
    bar_figure,
    chance_overlap,
    cosine_heatmap,
    parse_site,
    rank_heatmap,
    spectra_over_time,
    survey,
    trace_figure,
    utilised_ranks,
)
from subspan.inspect.traces import between
from subspan.methods import build
from subspan.metric import call
from subspan.optim import Optim

LEAN = {"q_proj": 1, "k_proj": 1, "o_proj": 1, "gate_proj": 1, "v_proj": 0, "up_proj": 0, "down_proj": 0}
ERR = 0.5
RANK = 16
LOWER, UPPER = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")


class Watch:
    """Gradients at every checkpoint, and weights' ranks and alignments at some."""

    def __init__(self, model: nn.Module, batch: dict[str, Any], steps: int, looks: int, products: int) -> None:
        self.model, self.batch, self.products = model, batch, products
        at = sorted({round(steps * i / (looks - 1)) for i in range(looks)})
        self.trace = GradientTrace(model, batch, rank=RANK, when=frozenset(at), whole=torch.float32)
        self.middle = {0, at[len(at) // 2], steps}
        self.surveys: dict[int, Survey] = {}
        self.aligned: dict[int, dict[str, Alignment]] = {}

    def __call__(self, step: int) -> None:
        """Look, if it is time to."""
        before = len(self.trace.steps)
        self.trace(step)
        if len(self.trace.steps) == before:
            return
        spectra = {n: g.weight for n, g in self.trace.moments[step].items() if g.weight is not None}
        self.surveys[step] = survey(self.model, err=ERR, spectra=spectra)
        if step in self.middle and self.products:
            small = {key: value[:2, :64] for key, value in self.batch.items()}
            last = max(parse_site(name)[0] or 0 for name in self.trace.sites)
            self.aligned[step] = alignments(
                self.model,
                small,
                select=lambda name: parse_site(name)[0] in (0, last),
                rank=4,
                steps=self.products,
            )
        print(f"step {step}: looked", flush=True)


def spearman(x: list[float], y: list[float]) -> float:
    """The correlation of ranks, ties averaged."""
    both = []
    for values in (x, y):
        v = torch.tensor(values, dtype=torch.float64)
        both.append(((v[:, None] > v).sum(1) + (v[:, None] >= v).sum(1)).double())
    return float(torch.corrcoef(torch.stack(both))[0, 1])


def per_site(watch: Watch) -> dict[str, dict[str, float]]:
    """What is said of each matrix: how steady its gradients were, and what became of its weight."""
    trace, steps = watch.trace, watch.trace.steps
    first, last = watch.surveys[steps[0]].rows, watch.surveys[steps[-1]].rows
    got = {}
    for name, shape in shapes(trace.sites).items():
        late = {}
        for side, n in (("left", shape[0]), ("right", shape[1])):
            tail = trace.steadiness(name, side)
            luck = chance_overlap(RANK, RANK, n)
            late[side] = (fmean(tail[len(tail) // 2 :]) - luck) / (1 - luck)
        grad = trace.spectra(name)
        half = len(steps) // 2
        got[name] = {
            "steady left": late["left"],
            "steady right": late["right"],
            "steady": (late["left"] + late["right"]) / 2,
            "cosine": between(trace.cosines(name)),
            "late cosine": between(trace.cosines(name)[half:, half:]),
            "gradient rank": float(linalg.entropy_rank(grad[-1])) / min(shape),
            "rank": last[name].rank / min(shape),
            "rank at start": first[name].rank / min(shape),
            "effective": last[name].effective_rank / min(shape),
            "effective at start": first[name].effective_rank / min(shape),
        }
        got[name]["effective fall"] = got[name]["effective at start"] - got[name]["effective"]
        got[name]["rank fall"] = got[name]["rank at start"] - got[name]["rank"]
    return got


def by_type(sites: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Means over the matrices of a type."""
    kinds = list(dict.fromkeys(parse_site(name)[1] for name in sites))
    keys = list(next(iter(sites.values())))
    return {
        kind: {key: fmean(row[key] for name, row in sites.items() if parse_site(name)[1] == kind) for key in keys}
        for kind in kinds
    }


def order(types: dict[str, dict[str, float]], key: str) -> str:
    """Types from low to high in one number."""
    return " < ".join(f"{k} {types[k][key]:.3g}" for k in sorted(types, key=lambda k: types[k][key]))


def verdicts(sites: dict[str, dict[str, float]], types: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Each claim of the paper, whether it shows here, and the numbers."""
    names = list(sites)
    lean = {side: [types[k] for k in types if LEAN.get(k) == side] for side in (0, 1)}
    gap = {
        key: fmean(t[key] for t in lean[0]) - fmean(t[key] for t in lean[1]) for key in next(iter(types.values()))
    }

    few = [t["rank fall"] for k, t in types.items() if k in ("q_proj", "k_proj")]
    alone = min(few) - max(t["rank fall"] for k, t in types.items() if k not in ("q_proj", "k_proj"))

    def rho(x: str, y: str) -> float:
        return spearman([sites[n][x] for n in names], [sites[n][y] for n in names])

    return {
        "q, k, o, gate end with lower WeLore ranks than v, up, down": (gap["rank"] > 0, gap["rank"]),
        "the same at the start, when all weights were random": (gap["rank at start"] > 0, gap["rank at start"]),
        "q, k, o, gate lost more effective rank than v, up, down": (
            gap["effective fall"] < 0,
            -gap["effective fall"],
        ),
        "q, k, o, gate lost more WeLore rank than v, up, down": (gap["rank fall"] < 0, -gap["rank fall"]),
        "q and k alone lost more WeLore rank than all others": (alone > 0, alone),
        "gradients of q, k, o, gate differ more between checkpoints (lower cosine)": (
            gap["cosine"] > 0,
            gap["cosine"],
        ),
        "steadier gradient subspaces go with a larger fall of effective rank (Spearman > 0)": (
            rho("steady", "effective fall") > 0,
            rho("steady", "effective fall"),
        ),
        "steadier gradient subspaces go with lower WeLore ranks (Spearman < 0)": (
            rho("steady", "rank") < 0,
            rho("steady", "rank"),
        ),
        "steadier gradient subspaces go with a larger fall of WeLore's rank (Spearman > 0)": (
            rho("steady", "rank fall") > 0,
            rho("steady", "rank fall"),
        ),
        "gradient subspaces that keep turning go with a larger fall of WeLore's rank (Spearman > 0)": (
            rho("steady", "rank fall") < 0,
            -rho("steady", "rank fall"),
        ),
        "higher gradient cosines go with higher WeLore ranks (Spearman > 0)": (
            rho("cosine", "rank") > 0,
            rho("cosine", "rank"),
        ),
    }


def page(watch: Watch, history: History, settings: Settings, used: dict[str, float]) -> Report:
    """Everything that was seen, for people and for programs."""
    trace, steps = watch.trace, watch.trace.steps
    found = per_site(watch)
    types = by_type(found)
    claims = verdicts(found, types)
    last = max(parse_site(name)[0] or 0 for name in found)
    site = {(parse_site(n)[0], parse_site(n)[1]): n for n in found}
    report = Report(
        "Do weights become low-rank, and do gradients say so?",
        f"The demo's {settings.layers}-block model, {steps[-1]} steps of AdamW, one fixed batch looked at "
        f"{len(steps)} times",
        seed=settings.seed,
    )
    report.section(
        "What WeLore's paper says, and what shows here",
        "The paper (arXiv:2407.11239) trained LLaMA-130M for 25,000 steps; this run is far smaller and shorter, "
        "with one seed, so a claim that does not show here is not refuted, nor is one that shows proven. "
        "Differences are means over v, up, down minus means over q, k, o, gate, for losses the other way round, "
        "and for q and k alone the smaller of theirs minus the largest of the others'; correlations run over all "
        f"{len(found)} matrices.\n\n"
        f"Validation loss: {history.validation[0][1]:.3f} at first, {history.final:.3f} at last.\n\n"
        "A claim that holds at the start, on random weights, is about shapes and initialization, not learning: "
        "square random matrices have steeper spectra than wide ones. The learning rate falls to a tenth by a "
        "cosine, so late gradients agree in part because weights hardly move any more.\n\n"
        "The paper can be read two ways, and both readings are below: its title says that steady gradient "
        "subspaces make low-rank weights, its figures that q and k of the first block keep getting different "
        "gradients and become low-rank, while up and down of a late block saturate and do not.",
    )
    rows = [[claim, "yes" if holds else "NO", f"{number:+.3f}"] for claim, (holds, number) in claims.items()]
    report.table("Claims, as they came.", ["claim", "shows here", "difference or correlation"], rows)
    keys = ["rank at start", "rank", "effective at start", "effective", "steady left", "steady right", "cosine",
            "gradient rank"]  # fmt: skip
    report.table(
        f"By type. Ranks are shares of the full rank, WeLore's at a reduction of {ERR:.0%}; steadiness is "
        f"the overlap of the leading {RANK} directions between neighbours, second half (0 is chance).",
        ["type", *keys, "utilised"],
        [[kind, *(f"{t[k]:.3f}" for k in keys), f"{used[kind]:.3f}"] for kind, t in types.items()],
    )
    report.note(
        "\n\n".join(f"{key}: {order(types, key)}." for key in ("rank", "effective fall", "steady", "cosine"))
    )
    report.section("Weights")
    ranks = {n: [watch.surveys[s].rows[n].rank / min(shape) for s in steps] for n, shape in
             shapes(trace.sites).items()}  # fmt: skip
    report.figure("WeLore's rank over training, by type.", trace_figure(ranks, steps, "share of rank kept"))
    full = survey(watch.model, err=ERR)
    report.figure(
        "WeLore's ranks at the end.",
        rank_heatmap({n: r.rank for n, r in full.rows.items()}, {n: r.shape for n, r in full.rows.items()}),
    )
    report.section("Gradients of the fixed batch")
    pairs = steps[1:]
    for side in ("left", "right"):
        lines = {n: trace.steadiness(n, side) for n in found}
        report.figure(
            f"Overlap of the leading {RANK} {side} directions with those of the checkpoint before.",
            trace_figure(lines, pairs, f"overlap, {side}"),
        )
    chosen = {site[0, k]: trace.cosines(site[0, k]) for k in LOWER}
    chosen |= {site[last, k]: trace.cosines(site[last, k]) for k in UPPER}
    report.figure("Cosines of gradients between checkpoints.", cosine_heatmap(chosen, steps))
    shown = {
        site[0, "q_proj"]: trace.spectra(site[0, "q_proj"]),
        site[last, "up_proj"]: trace.spectra(site[last, "up_proj"]),
    }
    report.figure("Singular values of gradients over training.", spectra_over_time(shown, steps))
    if watch.aligned:
        align(report, watch)
    report.data.update(
        steps=steps, err=ERR, rank=RANK, sites=found, types=types, utilised=used,
        claims={k: {"shows": bool(h), "value": v} for k, (h, v) in claims.items()},
        validation=[list(p) for p in history.validation], trace_bytes=trace.nbytes,
        alignment={str(s): {n: {"outside": a.outside, "chance": a.chance, "values": a.values.tolist(),
                                "residuals": a.residuals.tolist()} for n, a in rows.items()}
                   for s, rows in watch.aligned.items()},
    )  # fmt: skip
    return report


def align(report: Report, watch: Watch) -> None:
    """Hessian-gradient alignment at the start, the middle and the end."""
    report.section(
        "Curvature",
        "The share of each gradient's norm that is outside the top 4 eigenvectors of its layer's Hessian, found "
        f"by {watch.products} Lanczos steps on a small batch, in the first and last block. The paper's second "
        "version says that it tends to 0.",
    )
    mean = {step: fmean(a.outside for a in rows.values()) for step, rows in watch.aligned.items()}
    loose = max(
        float((a.residuals / a.values.abs()).median()) for rows in watch.aligned.values() for a in rows.values()
    )
    report.note(
        f"Eigenpairs are rough: residuals are up to {loose:.0%} of the eigenvalue in the median of a layer. "
        "A gradient has as many entries as its layer has weights, so chance would leave all of it outside."
    )
    report.note("; ".join(f"step {step}: {value:.3f} on average" for step, value in mean.items()) + ".")
    rows = watch.aligned[max(watch.aligned)]
    report.figure(
        "Outside the top eigenspace, at the end.",
        bar_figure({n: a.outside for n, a in rows.items()}, "share of gradient outside"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--looks", type=int, default=16)
    parser.add_argument("--products", type=int, default=12, help="Lanczos steps; 0 leaves curvature out")
    args = parser.parse_args()
    settings = Settings(steps=args.steps)
    began = time.time()
    ids, held = corpus(settings)
    model = fresh(settings)
    batch = {"input_ids": held[:8, : settings.length], "labels": held[:8, : settings.length]}
    optimizer = Optim(model.named_parameters(), build("adamw"), lr=RATES["adamw"])
    for group in optimizer.param_groups:
        if group["role"] == "other":
            group["lr"] = OTHER_RATE
    watch = Watch(model, batch, args.steps, args.looks, args.products)
    watch(0)
    batches = draw(ids, length=settings.length, batch=settings.batch, steps=args.steps, seed=settings.seed)
    history = train(
        model, batches, optimizer, steps=args.steps, validation=held, every=max(1, args.steps // 3), after=watch
    )
    shares: dict[str, list[float]] = {}
    for name, one in utilised_ranks(model, [batch], forward=call).items():
        shares.setdefault(parse_site(name)[1], []).append(one.share)
    report = page(watch, history, settings, {kind: fmean(values) for kind, values in shares.items()})
    report.data["seconds"] = round(time.time() - began)
    folder = report.write(args.out / ".analyses").parent
    (folder / "report.html").replace(args.out / "analyses.html")
    (folder / "report.json").replace(args.out / "analyses.json")
    folder.rmdir()
    claims = json.loads((args.out / "analyses.json").read_text())["data"]["claims"]
    for claim, got in claims.items():
        print(f"{'yes' if got['shows'] else 'NO ':3} {got['value']:+.3f}  {claim}")


if __name__ == "__main__":
    main()
