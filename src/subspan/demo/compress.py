"""Act two: the spectra of a real language model, two budgets, two ideas of closeness."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from subspan.budget import Budget, Err, Spectra, Uniform, WeLore
from subspan.compress import Study, study
from subspan.demo.act import Act, ordering
from subspan.demo.settings import Settings
from subspan.edit import shapes, sites
from subspan.hosts.meter import Meter
from subspan.hosts.score import decode_speed, perplexity
from subspan.hosts.text import encode, prose, windows
from subspan.hosts.transformers import LoadedModel
from subspan.inspect import perplexity_figure, rank_heatmap, spectra_figure, survey
from subspan.metric import Gram, Measure, Plain
from subspan.plan import Plan

TEXT = (
    "SmolLM2-135M-Instruct, a real language model. WeLore reads its spectra and gives every matrix its own rank; "
    "the uniform rule removes the same share everywhere. Each plan is carried out twice: by plain truncation of "
    "the weights, and under the Gram metric, which measures errors as they show in the outputs. "
    "Perplexity is on text used for nothing else."
)
BUDGETS: dict[str, type[Uniform] | type[WeLore]] = {"welore": WeLore, "uniform": Uniform}
MEASURED: dict[str, Measure] = {"plain": Plain(), "gram": Gram()}
CHOSEN = ("welore", "gram", 0.5)


@dataclass
class Texts:
    """Token windows of one corpus that do not overlap: for scoring, calibrating and healing."""

    scored: Tensor
    calibration: Tensor
    healing: Tensor


@dataclass(frozen=True)
class Scored:
    """One plan carried out and scored, then undone."""

    budget: str
    metric: str
    plan: Plan
    perplexity: float
    tokens_per_second: float

    @property
    def kept(self) -> float:
        """The share of the model's bytes that is left."""
        before, after = self.plan.bytes
        return after / before

    def record(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "budget": self.budget, "metric": self.metric, "err": self.plan.err, "ratio": self.plan.ratio,
            "bytes": self.plan.bytes[1], "bytes_kept": self.kept, "perplexity": self.perplexity,
            "tokens_per_second": self.tokens_per_second,
        }  # fmt: skip

    def row(self) -> list[str]:
        """A line of the table."""
        return [
            f"{self.budget} {self.metric}", f"{self.plan.err:.1%}", f"{self.plan.ratio:.1%}", f"{self.kept:.1%}",
            f"{self.plan.bytes[1] / 2**20:.0f}", number(self.perplexity), f"{self.tokens_per_second:.1f}",
        ]  # fmt: skip


@dataclass(frozen=True)
class Compressed:
    """What act three goes on with: the study and the plan of the strongest WeLore model under the Gram metric."""

    act: Act
    texts: Texts
    study: Study
    chosen: Scored
    dense: float


def split(loaded: LoadedModel, settings: Settings) -> Texts:
    """The first windows are scored, the next calibrate, all the rest may heal."""
    ids = encode(loaded.tokenizer, prose())
    first = settings.scored * settings.window
    then = first + settings.calibration * settings.window
    return Texts(
        windows(ids, settings.window, settings.scored),
        windows(ids, settings.window, settings.calibration, start=first),
        ids[then:],
    )


def bar(label: str) -> Any:
    """A progress bar for a study."""

    def wrap(names: Iterable[str]) -> Iterable[str]:
        return track(list(names), label, console=Console(stderr=True), transient=True)

    return wrap


def score(loaded: LoadedModel, texts: Texts, taken: Study, settings: Settings, metric: str) -> list[Scored]:
    """Every budget at every rank reduction, under one metric."""
    results = []
    for err in settings.errs:
        for name, kind in BUDGETS.items():
            budget: Budget = kind(Err(err))
            plan = taken.plan(budget, method=name, args={"target": {"err": err}, "metric": metric})
            with taken.apply(loaded.model, plan):
                ppl, speed = measured(loaded.model, texts, settings)
            results.append(Scored(name, metric, plan, ppl, speed))
    return results


def measured(model: nn.Module, texts: Texts, settings: Settings) -> tuple[float, float]:
    """Perplexity on the scored windows, and decoded tokens per second."""
    ppl = perplexity(model, texts.scored, progress=True)
    return ppl, decode_speed(model, texts.scored[0, :32], new_tokens=settings.decode, repeats=1)


def act_compress(loaded: LoadedModel, settings: Settings) -> Compressed:
    """Survey, plan, factorize and score."""
    texts = split(loaded, settings)
    dense, speed = measured(loaded.model, texts, settings)
    results: list[Scored] = []
    spectra: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for metric, measure in MEASURED.items():
        batches = (window[None].to(settings.device) for window in texts.calibration)
        with Meter() as meter:
            taken = study(
                loaded.model, measure, batches=batches, spectra=spectra, track=bar(f"decompose, {metric}")
            )
        spectra, seconds[metric] = dict(taken.spectra), meter.seconds
        results += score(loaded, texts, taken, settings, metric)
    chosen = next(r for r in results if (r.budget, r.metric, r.plan.args["target"]["err"]) == CHOSEN)
    act = Act("See and compress", TEXT)
    tabulate(act, texts, results, (dense, speed), results[0].plan.bytes[0])
    picture(act, loaded.model, spectra, chosen, results, dense)
    remark(act, settings, results, dense, seconds)
    act.data = {
        "dense": {"perplexity": dense, "tokens_per_second": speed}, "seconds": seconds,
        "calibration_tokens": texts.calibration.numel(), "scored_tokens": texts.scored.numel(),
        "plans": [r.record() for r in results], "ranks": chosen.plan.ranks(),
    }  # fmt: skip
    return Compressed(act, texts, taken, chosen, dense)


def tabulate(act: Act, texts: Texts, results: list[Scored], dense: tuple[float, float], whole: int) -> None:
    """The table of all plans, the dense model first."""
    first = ["dense", "0%", "100%", "100%", f"{whole / 2**20:.0f}", number(dense[0]), f"{dense[1]:.1f}"]
    columns = ["plan", "ranks cut", "numbers", "bytes", "MiB", "perplexity", "tokens/s"]
    caption = f"SmolLM2-135M compressed; perplexity on {texts.scored.numel():,} held-out tokens"
    act.tables.append((caption, columns, [first, *(r.row() for r in results)]))


def picture(
    act: Act, model: nn.Module, spectra: Spectra, chosen: Scored, results: list[Scored], dense: float
) -> None:
    """Spectra, ranks and what they cost, with the survey by matrix type as a table."""
    seen = survey(model, spectra=spectra, err=CHOSEN[2])
    types = [
        [
            kind,
            f"{t.count}",
            f"{t.stable_rank:.0%}",
            f"{t.effective_rank:.0%}",
            f"{t.tail_index:.2f}",
            f"{t.lrc:.0%}",
        ]
        for kind, t in seen.types().items()
    ]
    columns = ["type", "count", "stable rank", "effective rank", "tail index", "low-rank"]
    act.tables.append(
        (
            f"Spectra by type: mean ranks in % of the full rank; low-rank by WeLore at {CHOSEN[2]:.0%}",
            columns,
            types,
        )
    )
    act.figures.append((f"Normalised singular values of {len(spectra)} matrices", spectra_figure(spectra)))
    heat = rank_heatmap(chosen.plan.ranks(), shapes(sites(model)))
    act.figures.append((f"Share of the rank that WeLore keeps at {CHOSEN[2]:.0%} rank reduction", heat))
    points: dict[str, list[tuple[float, float]]] = {}
    for r in results:
        points.setdefault(f"{r.budget}, {r.metric}", []).append((r.kept, r.perplexity))
    act.figures.append(("Perplexity against the bytes that are kept", perplexity_figure(points, dense)))


def remark(act: Act, settings: Settings, results: list[Scored], dense: float, seconds: dict[str, float]) -> None:
    """What shows, and what does not."""
    ppl = {(r.budget, r.metric, r.plan.args["target"]["err"]): r.perplexity for r in results}
    for metric in seconds:
        for err in settings.errs:
            claim = f"WeLore's ranks beat uniform ones at {err:.0%} under the {metric} metric"
            act.notes.append(ordering(["welore", "uniform"], [ppl[b, metric, err] for b in BUDGETS], claim))
    claim = "The Gram metric beats plain truncation of the same WeLore plan"
    act.notes.append(ordering(["gram", "plain"], [ppl["welore", m, CHOSEN[2]] for m in ("gram", "plain")], claim))
    act.notes.append(
        "Rank reduction is not compression: matrices whose rank stays above break-even are stored dense, so at 30 "
        "% of the ranks only a few per cent of the bytes are gone. Compare plans by bytes."
    )
    act.notes.append("Factorized in " + ", ".join(f"{s:.0f} s ({m})" for m, s in seconds.items()) + ".")


def number(ppl: float) -> str:
    """A perplexity with as many digits as it deserves."""
    return f"{ppl:.2f}" if ppl < 1000 else f"{ppl:.2g}"
