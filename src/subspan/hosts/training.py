"""A plain training loop for language models: next-token loss, warm-up, cosine, validation, progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from subspan.hosts.keep import History as History
from subspan.hosts.keep import Keeper
from subspan.hosts.meter import Meter
from subspan.hosts.samples import Batch, Sample, inputs, mean_nll
from subspan.hosts.score import nll
from subspan.optim import Optim

# A scalar tensor; Any, as torch does not type `backward`.
Loss = Callable[[nn.Module, Any], Any]


def draw(ids: Tensor, *, length: int, batch: int, steps: int, seed: int = 0) -> Iterator[Tensor]:
    """`steps` batches (batch, length) of random windows of ids (tokens,), the same for the same seed."""
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {length}; give a longer text")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(ids) - length + 1, (batch,), generator=generator).tolist()
        yield torch.stack([ids[start : start + length] for start in starts])


def cosine(step: int, steps: int, *, warmup: int, floor: float = 0.1) -> float:
    """The factor on the learning rate: linear to 1 over `warmup` steps, then half a cosine down to `floor`.

    >>> cosine(0, 100, warmup=10), cosine(9, 100, warmup=10), round(cosine(100, 100, warmup=10), 6)
    (0.1, 1.0, 0.1)
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    validation: Tensor | Sequence[Sample] | None = None,
    every: int = 100,
    warmup: int | None = None,
    clip: float | None = 1.0,
    label: str = "training",
    progress: bool = False,
    after: Callable[[int], None] | None = None,
    loss: Loss | None = None,
    keeper: Keeper | None = None,
) -> History:
    """Step through the batches, windows of token ids (batch, length) or samples, and return what happened.

    It learns from `loss(model, batch)`, by default the model's own next-token loss.

    Validation is `measured` on `validation`, before the first step, each `every` steps and at the end;
    `after(step)` is called after every step. A `keeper` may stop the run early, puts the best state back at the
    end, writes checkpoints, and goes on from one: the batches already seen are skipped. Raises FloatingPointError
    when the loss is not finite, and RuntimeError when a parameter that wants gradients has not moved after the
    first step with a learning rate.
    """
    history = History()
    warmup = max(1, steps // 10) if warmup is None else warmup
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: cosine(t, steps, warmup=warmup))
    made = schedule.last_epoch = 0 if keeper is None else keeper.resume(history)
    watch = [] if made else still(optimizer)
    model.train()
    tokens, seconds, stopped = 0, 0.0, False
    with shown(progress) as bar:
        task = bar.add_task(label, total=steps, completed=made, loss="")
        for step, batch in islice(enumerate(batches, 1), made, None):
            if validation is not None and (step - 1) % every == 0:
                history.validation.append((step - 1, measured(model, validation)))
                stopped = keeper is not None and keeper.judge(*history.validation[-1])
            if stopped:
                break
            with Meter() as meter:
                found = advance(model, batch, optimizer, clip, loss or next_token)
            tokens, seconds = tokens + batch.numel(), seconds + meter.seconds
            history.peak_rss = max(history.peak_rss, meter.peak)
            history.train.append((step, found))
            if not math.isfinite(found):
                raise FloatingPointError(f"{label}: the loss is {found} at step {step}; lower the learning rate")
            schedule.step()
            if step == 1:
                moved(watch, label)
            if after is not None:
                after(step)
            if keeper is not None:
                keeper.after(step, history)
            bar.update(task, advance=1, loss=f"loss {found:.3f}")
    if validation is not None and not stopped:
        history.validation.append((steps, measured(model, validation)))
        if keeper is not None:
            keeper.judge(*history.validation[-1], last=True)
    history.tokens_per_second = tokens / seconds if seconds else 0.0
    history.state_bytes = state_bytes(optimizer)
    if keeper is not None:
        keeper.close(history)
    model.eval()
    return history


def measured(model: nn.Module, validation: Tensor | Sequence[Sample]) -> float:
    """The mean next-token loss on windows (count, length), or on what samples have to learn."""
    if isinstance(validation, Tensor):
        return nll(model, validation, batch=8).mean().item()
    return mean_nll(model, validation)


def shown(progress: bool) -> Progress:
    """A bar with the loss on stderr, or nothing."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not progress)


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """The mean next-token loss in nats that a language model gives itself on a batch of windows or samples."""
    found: Tensor = model(**inputs(batch)).loss
    return found


def advance(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    loss: Loss = next_token,
) -> float:
    """One step on one batch; returns its loss, and takes no step when that is not finite."""
    batch = batch.to(next(model.parameters()).device)
    if isinstance(optimizer, Optim) and not optimizer.recipe.source.backward:
        return float(optimizer.step(lambda: loss(model, batch)))
    found = loss(model, batch)
    value: float = found.item()
    if not math.isfinite(value):
        return value
    optimizer.zero_grad(set_to_none=True)
    found.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(wanting(optimizer), clip)
    optimizer.step()
    return value


def wanting(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that the optimizer steps."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def still(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor, Tensor]]:
    """Names, parameters, and a sample of each as it is now."""
    rows = []
    for group in optimizer.param_groups:
        names = group.get("param_names", [f"parameter {i}" for i in range(len(group["params"]))])
        rows += [(name, p, sample(p)) for name, p in zip(names, group["params"], strict=True)]
    return rows


def sample(p: Tensor) -> Tensor:
    """A copy of at most 4096 evenly spread entries."""
    flat = p.detach().flatten()
    return flat[:: max(1, -(-flat.numel() // 4096))].clone()


def moved(before: list[tuple[str, Tensor, Tensor]], label: str) -> None:
    """Raise RuntimeError naming the parameters that are where they were, though they had a gradient."""
    stuck = [
        name
        for name, p, old in before
        if p.grad is not None and bool(sample(p.grad).any()) and torch.equal(sample(p), old)
    ]
    if stuck:
        raise RuntimeError(
            f"{label}: {len(stuck)} parameters did not move in the first step, e.g. {', '.join(stuck[:3])}; "
            "is the learning rate too small for their precision?"
        )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, each storage once."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
