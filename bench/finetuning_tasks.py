"""The two tasks of `finetuning.py`, and how each method comes to the same number of trained numbers.

classes: MiniLM tells from a piece of source which package or module of the standard library it stands in. The
classes are the 12 with the most text; a piece is 24 tokens of it, 600 of each class to teach, 10 to choose a rate
and 30 to score, drawn once. A text is the mean of its token vectors. A logistic regression on the dense encoder,
fitted once to 40 other pieces of each class, tells the classes and stays: every method starts from one score.

prose: SmolLM2 on the Python language help, windows of 64 tokens; from its last tenth, which is never taught, 4
choose a rate and 12 score.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

from compression_encoder import folder
from subspan.hosts import jobs, text
from subspan.hosts.score import nll
from subspan.hosts.training import draw, next_token
from subspan.hosts.transformers import load

CLASSES, TOKENS, MOST = 12, 24, 200_000
PIECES = [600, 40, 10, 30]
WINDOW = 64


@dataclass(frozen=True)
class Task:
    """A frozen model, what teaches it, and what tells how well it does."""

    model: nn.Module
    teach: Callable[[int, int], Iterator[Any]]  # steps and seed to batches
    forward: Callable[[nn.Module, Any], object]
    loss: Callable[[nn.Module, Any], Tensor]
    choose: Callable[[nn.Module], dict[str, float]]
    score: Callable[[nn.Module], dict[str, float]]


def sources() -> dict[str, str]:
    """The text of each package or module of the standard library, by name."""
    found: dict[str, list[str]] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not skip & set(parts) and not parts[0].startswith("_"):
            found.setdefault(parts[0].removesuffix(".py"), []).append(path.read_text("utf-8", errors="ignore"))
    return {name: "\n".join(texts) for name, texts in found.items()}


class Pieces(NamedTuple):
    """Token ids (pieces, tokens) and their classes (pieces,)."""

    ids: Tensor
    labels: Tensor


def pooled(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean vector (pieces, hidden) of the tokens (pieces, tokens)."""
    mean: Tensor = model(input_ids=ids).last_hidden_state.mean(1)
    return mean


def fitted(x: Tensor, y: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    """The logistic regression of classes y (texts,) on x (texts, hidden): weight and bias."""
    weight, bias = torch.zeros(CLASSES, x.shape[1], requires_grad=True), torch.zeros(CLASSES, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = cross_entropy(x @ weight.T + bias, y) + ridge * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def classes(batch: int = 16) -> Task:
    """Text classification by MiniLM."""
    texts = sources()
    names = sorted(sorted(texts, key=lambda name: -len(texts[name]))[:CLASSES])
    tokenizer = AutoTokenizer.from_pretrained(folder())
    generator = torch.Generator().manual_seed(0)
    parts: list[list[Tensor]] = [[], [], [], []]
    for name in names:
        ids = text.encode(tokenizer, texts[name][:MOST])
        pieces = text.windows(ids, TOKENS)
        pieces = pieces[torch.randperm(len(pieces), generator=generator)[: sum(PIECES)]]
        for part, mine in zip(parts, pieces.split(PIECES), strict=True):
            part.append(mine)
    labelled = [(torch.cat(part), torch.arange(CLASSES).repeat_interleave(len(part[0]))) for part in parts]
    model = AutoModel.from_pretrained(folder(), dtype=torch.float32, add_pooling_layer=False)
    model.eval().requires_grad_(False)

    def teach(steps: int, seed: int) -> Iterator[Pieces]:
        ids, labels = labelled[0]
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        for rows in order[: steps * batch].split(batch):
            yield Pieces(ids[rows], labels[rows])

    with torch.inference_mode():
        seen = pooled(model, labelled[1][0])
    weight, bias = fitted(seen.clone(), labelled[1][1])

    def logits(model: nn.Module, pieces: Pieces) -> Tensor:
        return pooled(model, pieces.ids) @ weight.T + bias

    def loss(model: nn.Module, pieces: Pieces) -> Tensor:
        return cross_entropy(logits(model, pieces), pieces.labels)

    def judged(ids: Tensor, labels: Tensor, model: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            found = torch.cat([pooled(model, some) for some in ids.split(60)]) @ weight.T + bias
        right = (found.argmax(-1) == labels).double().mean()
        return {"loss": cross_entropy(found, labels).item(), "accuracy": right.item()}

    choose, score = (partial(judged, *part) for part in labelled[2:])
    return Task(model, teach, logits, loss, choose, score)


def prose(batch: int = 2) -> Task:
    """Language modelling by SmolLM2."""
    loaded = load("smollm2")
    ids = jobs.tokens(loaded.tokenizer, text.prose())
    cut = len(ids) - len(ids) // 10
    held = text.windows(ids, WINDOW, 16, start=cut)

    def measured(windows: Tensor, model: nn.Module) -> dict[str, float]:
        return {"loss": nll(model, windows, batch=8).mean().item()}

    def teach(steps: int, seed: int) -> Iterator[Tensor]:
        return draw(ids[:cut], length=WINDOW, batch=batch, steps=steps, seed=seed)

    model = loaded.model.requires_grad_(False)
    return Task(model, teach, jobs.forward, next_token, partial(measured, held[:4]), partial(measured, held[4:]))


TASKS: dict[str, Callable[[], Task]] = {"classes": classes, "prose": prose}


def pairs(m: int, n: int, k: int) -> int:
    """The numbers of a low-rank pair."""
    return k * (m + n)


def ranked(k: int) -> dict[str, Any]:
    """Rank k with scale 1."""
    return {"rank": k, "alpha": float(k)}


class Way(NamedTuple):
    """The rate where a method's search begins, its numbers at a site (m, n) by size k, and k as its arguments."""

    rate: float
    numbers: Callable[[int, int, int], float] = pairs
    args: Callable[[int], dict[str, Any]] = ranked
    sizes: Sequence[int] = range(1, 257)


def tiled(m: int, n: int, k: int) -> int:
    """The numbers of RandLoRA's scales."""
    return math.ceil(min(m, n) / k) * (k + min(m, n))


WAYS = {
    "lora": Way(3e-3),
    "rslora": Way(3e-3),
    "lora_plus": Way(9e-4),
    "lora_pro": Way(3e-3),
    "riemannian_lora": Way(3e-3),
    "dora": Way(3e-3, lambda m, n, k: k * (m + n) + m),
    "pissa": Way(9e-4),
    "milora": Way(3e-3),
    "eva": Way(1e-3),
    "lora_ga": Way(3e-4, args=lambda k: {"rank": k}),
    "lora_one": Way(9e-4, args=lambda k: {"rank": k}),
    "adalora": Way(2.7e-2, lambda m, n, k: k * (m + n + 1), lambda k: {"rank": k, "alpha": 1.5 * k}),
    "lora_xs": Way(1e-3, lambda m, n, k: k * k),
    "lora_sb": Way(3e-3, lambda m, n, k: k * k, lambda k: {"rank": k}),
    "vera": Way(3e-2, lambda m, n, k: m + k, lambda k: {"rank": k}),
    "randlora": Way(1e-3, tiled, lambda k: {"rank": k, "alpha": 20.0 * k}),
    "loha": Way(3e-3, lambda m, n, k: 2 * k * (m + n)),
    "lokr": Way(9e-3, lambda m, n, k: 16 + k * (m + n) / 4, lambda k: ranked(k) | {"factor": 4}),
    "oft": Way(1e-3, lambda m, n, k: n * (k - 1) / 2, lambda k: {"block": k}, (2, 4, 8, 16, 32, 64)),
    "shira": Way(3e-4, args=lambda k: {"rank": k}),
    "paca": Way(2.7e-3, lambda m, n, k: k * m),
    "mos": Way(1e-3, args=lambda k: ranked(2 * k) | {"budget": k}),
    "moe_lora": Way(
        1e-3, lambda m, n, k: k * (m + 2 * n),
        lambda k: {"rank": 1, "alpha": 1.0, "experts": k, "top": math.ceil(k / 2)},
    ),
}  # fmt: skip
FULL = 3e-5


def sized(way: Way, shapes: Iterable[tuple[int, int]], wanted: int) -> int:
    """The size whose numbers over all sites come nearest to what is wanted."""
    sites = list(shapes)
    return min(way.sizes, key=lambda k: abs(sum(way.numbers(m, n, k) for m, n in sites) - wanted))
