"""Samples to fine-tune on: rows of jsonl, as texts, as prompts with completions, or as conversations.

    {"text": "..."}                                                     all of it is learnt
    {"prompt": "...", "completion": "..."}                              the completion is learnt
    {"messages": [{"role": "user", "content": "..."}, ...]}             the assistant's turns are learnt

Other keys of a row are ignored. Every row is one sample and ends with the tokenizer's end-of-text token, if it has
one; texts and prompts begin with its start token, if the tokenizer puts one there by itself. Conversations are
written by the tokenizer's chat template; without one, as "role: content" and an empty line after each turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from subspan.hosts.text import encode

IGNORED = -100  # the label that transformers' losses leave out
HELD_OUT, MOST_HELD_OUT = 0.1, 256
ROLES = ("system", "user", "assistant", "tool")
FORMS = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}'
KEYS = {"text": ("text",), "messages": ("messages",), "prompt": ("prompt", "completion")}

Json = dict[str, Any]


class Sample(NamedTuple):
    """Token ids (length,), and the same ids as labels, -100 where nothing is learnt."""

    ids: Tensor
    labels: Tensor

    @property
    def learns(self) -> int:
        """The tokens that count in the loss; the first of a sample is given, never predicted."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class Padded:
    """A batch of samples filled up on the right: ids, labels and attention mask, each (batch, length)."""

    ids: Tensor
    labels: Tensor
    mask: Tensor

    def to(self, device: torch.device | str | None) -> Padded:
        """The batch on a device."""
        return Padded(self.ids.to(device), self.labels.to(device), self.mask.to(device))

    def numel(self) -> int:
        """Tokens, without those that fill up."""
        return int(self.mask.sum())


Batch = Tensor | Padded


class Rows(NamedTuple):
    """Samples to train on and to validate on."""

    train: list[Sample]
    validation: list[Sample]


class Found(NamedTuple):
    """The samples of some files; how many were cut at the window, and how many left out with nothing to learn."""

    samples: list[Sample]
    cut: int
    dropped: int


def is_jsonl(paths: Sequence[str | Path]) -> bool:
    """Whether the files hold rows, by their ending .jsonl; raises ValueError when only some do.

    >>> is_jsonl(["a.jsonl", "b.jsonl"]), is_jsonl(["a.txt"])
    (True, False)
    """
    ends = [str(path).lower().endswith(".jsonl") for path in paths]
    if any(ends) and not all(ends):
        raise ValueError(
            f"{', '.join(map(str, paths))}: some are .jsonl and some are plain text; give one kind, or put the "
            'text into rows {"text": ...}'
        )
    return any(ends)


def read(paths: Sequence[str | Path], tokenizer: Any, window: int) -> Found:
    """All rows of the files as samples of at most `window` tokens; longer ones lose their end.

    A sample that has nothing to learn left after the cut is left out. Raises FileNotFoundError for a missing file,
    and ValueError naming file and line of a row that cannot be used.
    """
    whole = [sample(row, tokenizer, where) for path in paths for where, row in rows(path)]
    cut = [Sample(s.ids[:window], s.labels[:window]) for s in whole]
    kept = [s for s in cut if s.learns]
    if not kept:
        raise ValueError(
            f"all {len(whole)} samples lose what is to be learnt when they are cut to {window} tokens; pass a "
            "longer --window, or shorten the prompts"
        )
    return Found(kept, sum(len(s.ids) > window for s in whole), len(cut) - len(kept))


def rows(path: str | Path) -> Iterator[tuple[str, Json]]:
    """Each row of a jsonl file with its place, "FILE, line N"; raises ValueError for a line that is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a .jsonl file with rows {FORMS}")
    # By bytes: json strings may hold other line ends of Unicode, which text mode would split at.
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise ValueError(f"{path} is empty; give rows {FORMS}")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            raise ValueError(f"{where} is empty; remove it, each line holds one row")
        yield where, parse(line, where)


def parse(line: bytes, where: str) -> Json:
    """One row; raises ValueError saying where for bytes that are not UTF-8, not json or no object."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {line[error.start]:#04x} at offset {error.start} is not UTF-8 ({error.reason}); "
            "convert the file to UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not json ({error}); write each row as one line: {FORMS}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}, not an object; write {FORMS}")
    return row


def sample(row: Mapping[str, Any], tokenizer: Any, where: str = "the row") -> Sample:
    """A row as a sample; raises ValueError saying where for one of no known form, or with nothing to learn."""
    forms = [form for form in KEYS if form in row]
    if len(forms) != 1:
        has, wrong = ", ".join(row) or "no keys", "two forms at once" if forms else "no known form"
        raise ValueError(f"{where} has {has}, which is {wrong}; write {FORMS}")
    if forms == ["messages"]:
        pieces = spoken(turns(row["messages"], where), tokenizer, where)
    else:
        given = [string(row.get(key), f"{where}: {key}") for key in KEYS[forms[0]]]
        pieces = [*((encode(tokenizer, part), False) for part in given[:-1]), (encode(tokenizer, given[-1]), True)]
        pieces = [(start(tokenizer), False), *pieces, (end(tokenizer), True)]
    ids = torch.cat([part for part, _ in pieces])
    labels = torch.cat([part if learnt else torch.full_like(part, IGNORED) for part, learnt in pieces])
    made = Sample(ids, labels)
    if not made.learns:
        raise ValueError(f"{where} has nothing to learn; give it a longer {forms[0]}, or remove it")
    return made


Pieces = list[tuple[Tensor, bool]]


def string(value: object, where: str) -> str:
    """The value, when it is a text; raises ValueError otherwise."""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {json.dumps(value)[:60]}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds {value[error.start]!a}, half of a surrogate pair; remove it") from error
    return value


def turns(messages: object, where: str) -> list[dict[str, str]]:
    """Messages after a check of their form; raises ValueError saying where."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages must be a list of at least one {{'role': ..., 'content': ...}}")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"{where}: message {i} must be an object with role and content")
        if message["role"] not in ROLES:
            raise ValueError(f"{where}: message {i} has the role {message['role']!r}; use {', '.join(ROLES)}")
        found.append({**message, "content": string(message["content"], f"{where}: message {i}: content")})
    if not any(message["role"] == "assistant" for message in found):
        raise ValueError(f"{where} has nothing to learn: no message is of the assistant; add its answer")
    return found


def spoken(messages: list[dict[str, str]], tokenizer: Any, where: str) -> Pieces:
    """A conversation in pieces, with whether each is learnt; raises what `templated` raises."""
    if getattr(tokenizer, "chat_template", None):
        return templated(messages, tokenizer, where)
    pieces: Pieces = [(start(tokenizer), False)]
    for message in messages:
        learnt = message["role"] == "assistant"
        said = f" {message['content']}"
        pieces.append((encode(tokenizer, f"{message['role']}:"), False))
        pieces.append((encode(tokenizer, said if learnt else f"{said}\n\n"), learnt))
        pieces += [(end(tokenizer), True), (encode(tokenizer, "\n\n"), False)] if learnt else []
    return pieces[:-1] if messages[-1]["role"] == "assistant" else pieces


def templated(messages: list[dict[str, str]], tokenizer: Any, where: str) -> Pieces:
    """A conversation as the tokenizer's chat template writes it; learnt is what follows the prompt for an answer.

    The ids are those of the whole text. Raises ValueError when the template refuses the conversation, or writes
    its beginning otherwise once more follows.
    """
    if messages[0]["role"] == "assistant":
        raise ValueError(
            f"{where} begins with the assistant, and a chat template answers somebody; put a user first"
        )
    whole = render(messages, tokenizer, where)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            heads = [render(messages[:i], tokenizer, where, prompt=prompt) for prompt in (True, False)]
            head = next((head for head in heads if whole.startswith(head)), None)
            tail = render(messages[: i + 1], tokenizer, where)
            if head is None or not whole.startswith(tail):
                raise ValueError(
                    f"{where}: the chat template writes message {i} otherwise once more follows, so what to learn "
                    "cannot be told; leave out the assistant's earlier turns, or use a template that keeps them"
                )
            spans.append((len(head), len(tail)))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor(found["input_ids"], dtype=torch.int64)
    learnt = [any(first <= begin < last for first, last in spans) for begin, _ in found["offset_mapping"]]
    pieces = [(ids[i : i + 1], flag) for i, flag in enumerate(learnt)]
    last = end(tokenizer)
    return pieces if len(last) == 0 or bool((ids[-2:] == last).any()) else [*pieces, (last, True)]


def render(messages: list[dict[str, str]], tokenizer: Any, where: str, *, prompt: bool = False) -> str:
    """The text of a conversation; raises ValueError saying where when the template refuses it."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except (TemplateError, ValueError) as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses the conversation ({error})") from error


def start(tokenizer: Any) -> Tensor:
    """The start token, (1,) where the tokenizer puts one before every text, else (0,)."""
    bos = getattr(tokenizer, "bos_token_id", None)
    given = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return torch.tensor([bos] if given else [], dtype=torch.int64)


def end(tokenizer: Any) -> Tensor:
    """The end-of-text token, (1,), or (0,) where there is none."""
    eos = getattr(tokenizer, "eos_token_id", None)
    return torch.tensor([] if eos is None else [eos], dtype=torch.int64)


def split(samples: list[Sample]) -> Rows:
    """Hold out the last tenth of the rows, at least one and at most 256; raises ValueError for a single row."""
    if len(samples) < 2:
        raise ValueError("there is 1 sample to learn from; give at least 2, as the last tenth is for validation")
    cut = len(samples) - max(1, int(HELD_OUT * len(samples)))
    return Rows(samples[:cut], samples[cut : cut + MOST_HELD_OUT])


def draw(samples: Sequence[Sample], *, batch: int, steps: int, seed: int = 0) -> Iterator[Padded]:
    """`steps` batches, each sample once before any comes again, in an order that depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch:
            order += torch.randperm(len(samples), generator=generator).tolist()
        yield pad([samples[i] for i in order[:batch]])
        del order[:batch]


def pad(samples: Sequence[Sample]) -> Padded:
    """A batch as long as its longest sample."""
    ids = pad_sequence([s.ids for s in samples], batch_first=True)
    labels = pad_sequence([s.labels for s in samples], batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(s.ids) for s in samples])
    return Padded(ids, labels, (torch.arange(ids.shape[1]) < lengths[:, None]).long())


def inputs(batch: Batch) -> dict[str, Tensor]:
    """What a language model is called with to give its loss on windows (batch, length), or on samples."""
    if isinstance(batch, Padded):
        return {"input_ids": batch.ids, "labels": batch.labels, "attention_mask": batch.mask}
    return {"input_ids": batch, "labels": batch}


def mean_nll(model: Any, samples: Sequence[Sample], *, batch: int = 8) -> float:
    """The mean negative log-likelihood in nats of all tokens that count, each with the same weight.

    Raises ValueError for ids that the model does not know, and when the mean is not finite.
    """
    vocab, highest = model.config.get_text_config().vocab_size, max(int(s.ids.max()) for s in samples)
    if highest >= vocab:
        raise ValueError(
            f"the token ids run up to {highest}, but the model knows 0 to {vocab - 1}; use its own tokenizer"
        )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        total = sum(sums(model, [pad(samples[i : i + batch]) for i in range(0, len(samples), batch)]))
    finally:
        for module, mode in modes:
            module.training = mode
    mean = total / sum(s.learns for s in samples)
    if not mean < float("inf"):
        raise ValueError(
            f"the validation loss is {mean}; look for NaN or Inf in the weights, or use a wider dtype"
        )
    return mean


@torch.inference_mode()
def sums(model: nn.Module, batches: Iterable[Padded]) -> list[float]:
    """The summed negative log-likelihood of each batch."""
    device, found = next(model.parameters()).device, []
    for given in batches:
        here = given.to(device)
        logits = model(input_ids=here.ids, attention_mask=here.mask, use_cache=False).logits[:, :-1]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = cross_entropy(
            wide.flatten(0, 1), here.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        found.append(loss.item())
    return found
