"""How well a language model predicts a text, and how fast it writes one."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["decode", "decode_speed", "nll", "perplexity"]


def perplexity(model: nn.Module, windows: Tensor, *, batch: int = 1, progress: bool = False) -> float:
    """Return the perplexity of a model on `windows` (count, length).

        exp( mean over windows of the mean of -log p(token | the window before it) )

    The first token of a window is given, not predicted. Raises what `nll` raises.
    """
    return nll(model, windows, batch=batch, progress=progress).mean().exp().item()


def nll(model: nn.Module, windows: Tensor, *, batch: int = 1, progress: bool = False) -> Tensor:
    """Return the mean negative log-likelihood of the next token in each window, (count,) in float64.

    `windows` (count, length >= 2) of token ids. One batch of logits is alive at a time. Raises ValueError for
    windows that the model cannot take, and for logits that are not finite.
    """
    _check_ids(model, windows)
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    starts = range(0, len(windows), batch)
    shown = track(
        starts,
        "scoring",
        console=Console(stderr=True),
        transient=True,
        disable=not progress,
        total=len(starts),
    )
    with _evaluating(model):
        scores = [_batch_nll(model, windows[start : start + batch]) for start in shown]
    result = torch.cat(scores)  # outside, so that it is no inference tensor
    if not result.isfinite().all():
        worst = int((~result.isfinite()).nonzero()[0])
        raise ValueError(
            f"window {worst}: its negative log-likelihood is {result[worst].item()}; "
            "the model's logits are not finite, so look for NaN or Inf in its weights, or use a wider dtype"
        )
    return result


def decode(model: nn.Module, prompt_ids: Tensor, *, new_tokens: int) -> tuple[Tensor, float]:
    """Continue a prompt greedily with a key-value cache, past any end-of-text token.

    `prompt_ids` (length,) or (1, length) -> the new tokens (new_tokens,), and the seconds of the
    new_tokens - 1 steps after the prompt's own.
    """
    prompt = prompt_ids.reshape(1, -1) if prompt_ids.ndim == 1 else prompt_ids
    if prompt.ndim != 2 or prompt.shape[0] != 1 or prompt.shape[1] < 1:
        raise ValueError(f"prompt_ids has shape {tuple(prompt_ids.shape)}; it must be (length,) or (1, length)")
    if new_tokens < 2:
        raise ValueError(f"new_tokens is {new_tokens}; it must be at least 2, one from the prompt and one timed")
    _check_vocabulary(model, prompt)
    device = _device(model)
    with _evaluating(model):
        out = model(input_ids=prompt.to(device, torch.int64), use_cache=True, logits_to_keep=1)
        found = [out.logits[:, -1:].argmax(-1)]
        start = _clock(device)
        for _ in range(new_tokens - 1):
            out = model(input_ids=found[-1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, -1:].argmax(-1))
        seconds = _clock(device) - start
    return torch.cat(found, dim=1)[0].cpu(), seconds


def decode_speed(model: nn.Module, prompt_ids: Tensor, *, new_tokens: int = 16, repeats: int = 3) -> float:
    """Return tokens per second of greedy decoding with a key-value cache, the median of `repeats`.

    Reading the prompt is not timed: the clock runs over `new_tokens` steps of one token each.
    """
    if repeats < 1 or new_tokens < 1:
        raise ValueError(f"repeats is {repeats} and new_tokens {new_tokens}; both must be at least 1")
    # One more token than timed steps: the first comes out of the prompt.
    times = [decode(model, prompt_ids, new_tokens=new_tokens + 1)[1] for _ in range(repeats)]
    return new_tokens / median(times)


def _batch_nll(model: nn.Module, ids: Tensor) -> Tensor:
    ids = ids.to(_device(model), torch.int64)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    # Window by window, because log-softmax allocates as much again as its input.
    rows = [_window_nll(row[:-1], target[1:]) for row, target in zip(logits, ids, strict=True)]
    return torch.stack(rows).double().cpu()


def _window_nll(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(wide, targets)


def _check_ids(model: nn.Module, windows: Tensor) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows has shape {tuple(windows.shape)}; it must be (count >= 1, length >= 2)")
    if windows.is_floating_point():
        raise ValueError(f"windows has dtype {windows.dtype}; it must hold token ids, as integers")
    _check_vocabulary(model, windows)


def _check_vocabulary(model: Any, ids: Tensor) -> None:
    vocab = model.config.get_text_config().vocab_size
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= vocab:
        raise ValueError(
            f"the token ids run from {low} to {high}, but the model knows 0 to {vocab - 1}; "
            "encode the text with the model's own tokenizer"
        )


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    # Module by module: a model being healed may have some in training mode and some not.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
