"""Text that every machine with Python has, files of the user, and windows of tokens cut from either."""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

__all__ = ["code", "encode", "prose", "read", "train_tokenizer", "windows"]

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def prose() -> str:
    """Return the Python language help, about 450,000 characters of English, topics joined by a blank line.

    >>> prose().startswith('The "assert" statement')
    True
    """
    return "\n\n".join(topics.topics.values())


def code(limit_chars: int | None = None) -> str:
    """Return the standard library's sources in the order of their paths, cut after `limit_chars` characters.

    >>> len(code(1000))
    1000
    """
    if limit_chars is not None and limit_chars < 1:
        raise ValueError(f"limit_chars is {limit_chars}; it must be at least 1, or None for everything")
    parts: list[str] = []
    length = 0
    for path in _sources():
        parts.append(_decode(path))
        length += len(parts[-1]) + 2
        if limit_chars is not None and length >= limit_chars + 2:
            break
    return "\n\n".join(parts)[:limit_chars]


def read(paths: Sequence[str | Path]) -> str:
    """Read UTF-8 files, joined by a blank line; the names `@prose` and `@code` give the two corpora.

    Raises FileNotFoundError for a missing file, and ValueError for one that is empty or not UTF-8.
    """
    if isinstance(paths, (str, Path)):
        raise TypeError(f"paths is the one path {str(paths)!r}; give a list: [{str(paths)!r}]")
    if not paths:
        raise ValueError("no text was named; give at least one file, or @prose or @code")
    return "\n\n".join(_read(path) for path in paths)


def windows(ids: Tensor, length: int, count: int | None = None, start: int = 0) -> Tensor:
    """Cut `count` consecutive windows, or as many as there are, from the token `start` on.

    `ids` (tokens,) -> (count, length). Raises ValueError if the text is too short.

    >>> windows(torch.arange(7), 2, start=1).tolist()
    [[1, 2], [3, 4], [5, 6]]
    """
    if ids.ndim != 1:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; it must be one row of tokens, (tokens,)")
    if length < 1 or start < 0 or (count is not None and count < 1):
        raise ValueError(
            f"length {length}, count {count}, start {start}: length and count must be at least 1, start at least 0"
        )
    left = max(0, len(ids) - start)
    wanted = 1 if count is None else count
    if left < wanted * length:
        raise ValueError(
            f"the text has {len(ids)} tokens, {left} of them from token {start} on; {wanted} window(s) "
            f"of length {length} need {wanted * length}; give a longer text, shorter windows or fewer of them"
        )
    kept = left // length if count is None else count
    return ids[start : start + kept * length].reshape(kept, length)


def train_tokenizer(text: str, vocab: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab` tokens; it encodes any string without loss.

    Raises ValueError if `vocab` is below 256, the number of bytes, or the text is empty.
    """
    if vocab < 256:
        raise ValueError(f"vocab is {vocab}; byte-level BPE needs at least 256, one token for each byte")
    if not text:
        raise ValueError("the text is empty; give some to learn merges from")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def encode(tokenizer: Any, text: str) -> Tensor:
    """Turn text into (tokens,) int64 without adding special tokens.

    `tokenizer` is a `tokenizers.Tokenizer` or a transformers tokenizer.
    """
    if isinstance(tokenizer, Tokenizer):
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
    # verbose=False: a text longer than one context is the normal case here, not worth a warning.
    found = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(found["input_ids"], dtype=torch.int64)


def _sources() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED]
        found.extend(Path(folder, name) for name in files if name.endswith(".py"))
    for path in sorted(found, key=Path.as_posix):
        # _sysconfigdata is written when Python is built and differs from machine to machine.
        if not path.name.startswith("_sysconfigdata"):
            yield path


def _read(path: str | Path) -> str:
    if path == "@prose":
        return prose()
    if path == "@code":
        return code()
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the text files in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such text file; give a path, or @prose or @code")
    text = _decode(path)
    if not text.strip():
        raise ValueError(f"{path} is empty ({path.stat().st_size} bytes); give a file with text in it")
    return text


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.object[error.start]:#04x} at offset {error.start} is not UTF-8 "
            f"({error.reason}); convert the file to UTF-8"
        ) from error
