"""Act three: train a compressed model back, its low-rank parts alone or with LoRA of the same size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from subspan.adapt import adapt, trainable
from subspan.demo.act import Act, mib, ordering
from subspan.demo.compress import Compressed, number
from subspan.demo.settings import Settings
from subspan.edit import edit
from subspan.heal import Named, only
from subspan.hosts.score import perplexity
from subspan.hosts.training import History, draw, train
from subspan.hosts.transformers import LoadedModel
from subspan.inspect import loss_curves
from subspan.methods import build
from subspan.optim import Optim
from subspan.plan import Plan

TEXT = (
    "From the WeLore model of 50 % rank reduction: train only its low-rank components, or LoRA adapters on every "
    "linear layer with as many trained numbers, for the same steps on the same batches. All else stays frozen. "
    "Each learning rate is the best of two or three tried on the scored text: read the two as close, not ranked."
)
RATE = 2e-4
LORA_RATE = 1e-3


def lora_rank(plan: Plan, numbers: int) -> int:
    """The rank at which LoRA on every site trains about as many numbers, or the largest that all can have."""
    rank = round(numbers / sum(sum(site.shape) for site in plan.sites.values()))
    return max(1, min(rank, *(site.full for site in plan.sites.values())))


@contextmanager
def factors(model: nn.Module, _: Plan) -> Iterator[Named]:
    """The low-rank components; their values are put back at the end."""
    named = build("welore_peft").choose(model)
    saved = [p.detach().clone() for _, p in named]
    try:
        yield named
    finally:
        with torch.no_grad():
            for (_, p), old in zip(named, saved, strict=True):
                p.copy_(old)


@contextmanager
def lora(model: nn.Module, plan: Plan) -> Iterator[Named]:
    """LoRA on every site, with as many numbers as the low-rank components have; taken off at the end."""
    numbers = sum(p.numel() for _, p in build("welore_peft").choose(model))
    only(model, set())
    rank = lora_rank(plan, numbers)
    with edit(model, list(plan.sites), adapt(build("lora", rank=rank, alpha=float(rank)))):
        yield trainable(model)


def act_heal(loaded: LoadedModel, compressed: Compressed, settings: Settings) -> Act:
    """Heal the same model twice and score."""
    model, plan = loaded.model, compressed.chosen.plan
    ids, validation = compressed.texts.healing, compressed.texts.calibration[:2]
    rows = [["before", "", "", number(compressed.chosen.perplexity), "", ""]]
    curves: dict[str, History] = {}
    after: dict[str, float] = {}
    with compressed.study.apply(model, plan):
        for name, (who, rate) in {"low-rank components": (factors, RATE), "LoRA": (lora, LORA_RATE)}.items():
            with who(model, plan) as named:
                optimizer = Optim(named, build("adamw"), lr=rate)
                batches = draw(
                    ids, length=settings.heal_length, batch=1, steps=settings.heal_steps, seed=settings.seed
                )
                history = train(
                    model, batches, optimizer, steps=settings.heal_steps, validation=validation,
                    every=max(1, settings.heal_steps // 3), label=f"heal {name}", progress=True,
                )  # fmt: skip
                ppl = perplexity(model, compressed.texts.scored, progress=True)
                curves[name], after[name] = history, ppl
                trained = sum(p.numel() for _, p in named)
                rows.append([name, f"{trained / 1e6:.2f} M", mib(history.state_bytes), number(ppl),
                             f"{history.tokens_per_second:.0f}", mib(history.peak_rss)])  # fmt: skip
    return told(settings, compressed, rows, curves, after)


def told(
    settings: Settings,
    compressed: Compressed,
    rows: list[list[str]],
    curves: dict[str, History],
    after: dict[str, float],
) -> Act:
    """Table, figure and remarks."""
    act = Act("Heal", TEXT)
    columns = ["trained", "numbers", "optimizer state", "perplexity", "tokens/s", "peak RSS"]
    caption = f"{settings.heal_steps} steps of {settings.heal_length} tokens on the 50 % WeLore model"
    act.tables.append((caption, columns, rows))
    figure = loss_curves({n: h.validation for n, h in curves.items()}, "nats per token")
    act.figures.append(("Held-out loss while healing", figure))
    names = list(after)
    claim = "Training only the low-rank components heals better than LoRA of equal size"
    act.notes.append(ordering(names, [after[n] for n in names], claim))
    act.notes.append(
        f"The dense model scores {compressed.dense:.2f}; learning rates {RATE:g} and {LORA_RATE:g} (LoRA)."
    )
    act.data = {
        "before": compressed.chosen.perplexity, "after": after, "steps": settings.heal_steps,
        "tokens_per_step": settings.heal_length, "rates": {"low-rank components": RATE, "LoRA": LORA_RATE},
        "validation": {n: h.validation for n, h in curves.items()},
        "peak_rss": {n: h.peak_rss for n, h in curves.items()},
        "state_bytes": {n: h.state_bytes for n, h in curves.items()},
        "tokens_per_second": {n: h.tokens_per_second for n, h in curves.items()},
    }  # fmt: skip
    return act
