"""Act one: the same small model trained four ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.demo.act import Act, mib, ordering
from subspan.demo.settings import Settings
from subspan.edit import edit
from subspan.fit import Svd
from subspan.hosts.meter import release
from subspan.hosts.text import code, encode, prose, train_tokenizer, windows
from subspan.hosts.training import History, draw, train
from subspan.inspect import loss_curves
from subspan.methods import build
from subspan.ops import LowRank, OpLinear
from subspan.optim import Optim

TEXT = (
    "A LLaMA-shaped model learns English prose and Python source, from the same initial weights and the same "
    "batches in the same order. GaLore keeps Adam's moments in a subspace of each gradient; Fira adds back what "
    "that subspace misses; W = BA instead makes the weights themselves low-rank. Hidden learning "
    "rates were picked by hand, the lowest of two or three tried for each, on these same held-out windows and one "
    "seed; embeddings, head and norms take the same plain Adam steps in all four. The ordering depends on both."
)
RATES = {"adamw": 3e-4, "galore": 3e-3, "fira": 3e-3, "W = BA": 3e-4}
OTHER_RATE = 1e-2


def corpus(settings: Settings) -> tuple[Tensor, Tensor]:
    """Training tokens, and held-out windows from the last tenth of the prose and of the code."""
    texts = prose(), code(settings.code_chars)
    tokenizer = train_tokenizer("\n\n".join(texts), settings.vocab)
    train_ids, held = [], []
    for text in texts:
        ids = encode(tokenizer, text)
        cut = len(ids) * 9 // 10
        train_ids.append(ids[:cut])
        held.append(windows(ids[cut:], settings.length, 24))
    return torch.cat(train_ids), torch.cat(held)


def fresh(settings: Settings) -> nn.Module:
    """The model, with the same weights every time."""
    torch.manual_seed(settings.seed)
    heads = settings.hidden // 48 if settings.hidden % 48 == 0 else settings.hidden // 32
    config = LlamaConfig(
        vocab_size=settings.vocab, hidden_size=settings.hidden, intermediate_size=settings.hidden * 8 // 3,
        num_hidden_layers=settings.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=settings.length, tie_word_embeddings=False,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(settings.device)


def factorised(model: nn.Module, rank: int) -> nn.Module:
    """The model with every block weight replaced by the two factors of its best approximation."""

    def make(_: str, layer: nn.Module) -> nn.Module:
        op = Svd(rank)(layer.get_parameter("weight"))
        return OpLinear(LowRank(nn.Parameter(op.u.detach()), nn.Parameter(op.v.detach())))

    edit(model, None, make)
    return model


def contestants(settings: Settings) -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """Name -> the model and the rule that steps it."""
    every = max(10, settings.steps // 4)
    rank = settings.rank
    return {
        "adamw": lambda: (fresh(settings), build("adamw")),
        "galore": lambda: (fresh(settings), build("galore", rank=rank, every=every)),
        "fira": lambda: (fresh(settings), build("fira", rank=rank, every=every)),
        "W = BA": lambda: (factorised(fresh(settings), rank), build("adamw")),
    }


def act_train(settings: Settings) -> Act:
    """Train the four and compare loss, state, memory and speed."""
    ids, held = corpus(settings)
    histories: dict[str, History] = {}
    for name, make in contestants(settings).items():
        release()
        model, rule = make()
        optimizer = Optim(model.named_parameters(), rule, lr=RATES[name])
        for group in optimizer.param_groups:
            if group["role"] == "other":
                group["lr"] = OTHER_RATE
        batches = draw(ids, length=settings.length, batch=settings.batch, steps=settings.steps, seed=settings.seed)
        histories[name] = train(
            model, batches, optimizer, steps=settings.steps, validation=held,
            every=max(1, settings.steps // 6), label=f"train {name}", progress=True,
        )  # fmt: skip
        del model, optimizer
    return told(settings, histories, len(ids))


def told(settings: Settings, histories: dict[str, History], tokens: int) -> Act:
    """Tables, figure and remarks."""
    act = Act("Train in gradient subspaces", TEXT)
    rows = [
        [name, f"{h.final:.3f}", mib(h.state_bytes), mib(h.peak_rss), f"{h.tokens_per_second:.0f}"]
        for name, h in histories.items()
    ]
    columns = ["method", "validation loss", "optimizer state", "peak RSS", "tokens/s"]
    parameters = sum(p.numel() for p in fresh(settings).parameters())
    caption = f"Training {parameters / 1e6:.1f} M parameters for {settings.steps} steps, rank {settings.rank}"
    act.tables.append((caption, columns, rows))
    curves = loss_curves({n: h.validation for n, h in histories.items()}, "nats per token")
    act.figures.append(("Held-out loss while training", curves))
    losses = {name: h.final for name, h in histories.items()}
    pair = ["fira", "galore"]
    act.notes.append(ordering(pair, [losses[n] for n in pair], "Fira learns better than GaLore at the same rank"))
    pair = ["galore", "W = BA"]
    act.notes.append(ordering(pair, [losses[n] for n in pair], "GaLore learns better than factorised weights"))
    act.notes.append("Peak RSS is of the whole process, so it also holds the libraries and the corpus.")
    act.data = {
        "tokens": tokens, "rank": settings.rank, "parameters": parameters,
        "rates": RATES, "other_rate": OTHER_RATE,
        "runs": {n: {"validation": h.validation, "train": h.train, "state_bytes": h.state_bytes,
                     "peak_rss": h.peak_rss, "tokens_per_second": h.tokens_per_second}
                 for n, h in histories.items()},
    }  # fmt: skip
    return act
