"""Safetensors files one tensor at a time: the weights of a model folder, read when asked for, and new files."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from subspan.hosts.quantizer import require_whole
from subspan.io import WEIGHTS, to_disk

INDEX = f"{WEIGHTS}.index.json"
CHUNK = 1 << 24
"""Bytes of a tensor that are copied at once."""
# The names of the safetensors format.
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class Shards:
    """The tensors of a transformers folder, in one safetensors file or many; none is kept.

    Raises FileNotFoundError for a missing index or shard, and ValueError for one that is damaged or cut short,
    and for an index that names a tensor its shard does not hold.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        named = None if (self.folder / WEIGHTS).is_file() else _index(index)
        files = {self.folder / name for name in ([WEIGHTS] if named is None else named.values())}
        self.files: dict[str, Path] = {}
        for file in sorted(files):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: {INDEX} names this shard, but it is missing; copy it again")
            require_whole(file)
            with safe_open(file, framework="pt") as content:
                held = set(content.keys())
            wanted = held if named is None else {n for n, f in named.items() if self.folder / f == file}
            if absent := sorted(wanted - held):
                raise ValueError(
                    f"{index} says that {file.name} holds {absent[0]}, which it does not ({len(absent)} such "
                    "tensors); index and shards are of different models: copy the folder again"
                )
            self.files |= dict.fromkeys(wanted, file)

    def read(self, name: str) -> Tensor:
        """A copy of one tensor."""
        with safe_open(self.files[name], framework="pt") as content:
            tensor: Tensor = content.get_tensor(name).clone()
        return tensor

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One tensor as flat pieces of at most `CHUNK` bytes, in order."""
        start, total = 0, 1
        while start < total:
            # Opened anew for each piece: what was read of a mapped file counts as memory until it is closed.
            with safe_open(self.files[name], framework="pt") as content:
                flat = content.get_tensor(name).reshape(-1)
                total, size = flat.numel(), CHUNK // flat.element_size()
                piece = flat[start : start + size].clone()
                del flat
            yield piece
            start += size

    def digest(self) -> str:
        """sha256 over the names, sizes and times of change of the files."""
        known = hashlib.sha256()
        for file in sorted(set(self.files.values())):
            at = file.stat()
            known.update(f"{file.name} {at.st_size} {at.st_mtime_ns}\n".encode())
        return known.hexdigest()


def _index(index: Path) -> dict[str, str]:
    if not index.is_file():
        raise FileNotFoundError(
            f"{index.parent} holds neither {WEIGHTS} nor {INDEX}; save the model there with save_pretrained "
            "(pickled weights are not read)"
        )
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{index} is damaged: {problem}; copy it again") from None
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{index} has no weight_map that names the shards; copy it again")
    return named


@contextmanager
def weightless() -> Iterator[None]:
    """Modules that are built inside get parameters on the meta device; buffers are computed as ever."""

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


class Source:
    """A model without weights and the shards that hold them: parts of it are filled for a while, and emptied.

    Raises ValueError when the shards lack a tensor of the model, hold one that it does not know, or one of
    another shape.
    """

    def __init__(self, model: Any, shards: Shards, *, device: torch.device | None = None) -> None:
        self.model = model
        self.shards = shards
        self.device = device or torch.device("cpu")
        self.first = first_names(model)
        self.keys: dict[str, str] = {}
        self.joins: dict[str, list[tuple[str, str]]] = {}
        self.extra: list[str] = []
        self.converters: dict[str, Any] = {}
        self.locate()
        self.require_fit()

    def locate(self) -> None:
        """Find each tensor's file by the names that it has now, or had when transformers wrote the folder."""
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        known = get_model_conversion_mapping(self.model)
        renamed = [one for one in known if isinstance(one, WeightRenaming)]
        joined = [one for one in known if isinstance(one, WeightConverter)]
        self.converters = {pattern: one for one in joined for pattern in one.source_patterns}
        # In the order in which the model's own names come, so that of two that are tied the first one counts.
        order = {name: i for i, name in enumerate(state)}
        for key in sorted(self.shards.files, key=lambda k: (order.get(k, len(order)), dot_natural_key(k))):
            name, pattern = (key, None) if key in state else rename_source_key(key, renamed, joined, prefix, state)
            if name not in state:
                self.extra.append(key)
            elif pattern is None:
                self.keys.setdefault(self.first[name], key)
            else:
                self.joins.setdefault(name, []).append((key, pattern))

    def require_fit(self) -> None:
        """Raise ValueError unless model and shards belong together."""
        where, state = self.shards.folder, self.model.state_dict()
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        have = {*self.keys, *self.joins}
        lacking = [owner for owner in dict.fromkeys(self.first.values()) if owner not in have]
        extra = [n for n in self.extra if not any(re.search(p, n) for p in ignored)]
        wrong = [n for n in self.keys if self.shape(n) != tuple(state[n].shape)]
        for names, what in (
            (extra, "holds tensors that the model does not know"),
            (lacking, "lacks tensors that the model needs"),
            (wrong, "holds tensors of another shape than config.json says"),
        ):
            if names:
                raise ValueError(
                    f"{where} {what} ({len(names)}, such as {', '.join(sorted(names)[:3])}); do config.json and "
                    "the weights belong together? Weights that transformers takes apart as it loads them "
                    "cannot be streamed: leave out --stream"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in its file."""
        key = self.keys[name]
        with safe_open(self.shards.files[key], framework="pt") as content:
            return tuple(content.get_slice(key).get_shape())

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of the model by its name there, in this precision if it is of floats."""
        tensor = self.joined(name) if name in self.joins else self.shards.read(self.keys[name])
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def joined(self, name: str) -> Tensor:
        """A tensor that lies in several parts in the files, put together as transformers does."""
        parts = self.joins[name]
        converter = copy.deepcopy(self.converters[parts[0][1]])
        for key, pattern in parts:
            converter.add_tensor(name, key, pattern, partial(self.shards.read, key))
        made = converter.convert(name, model=self.model, config=self.model.config)[name]
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor of the model as flat pieces in order, small ones if it lies in one part."""
        return iter([self.joined(name)]) if name in self.joins else self.shards.pieces(self.keys[name])

    def names(self, under: str) -> list[str]:
        """The tensors in a module, each once."""
        return [name for name in dict.fromkeys(self.first.values()) if f"{name}.".startswith(f"{under}.")]

    def fill(self, names: Iterable[str], read: Callable[[str, torch.dtype], Tensor] | None = None) -> list[str]:
        """Give these tensors of the model their values; returns those that were empty before."""
        done = []
        for name in names:
            holder, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(holder)
            have = module._parameters.get(leaf)
            if have is None:
                module._buffers[leaf] = (read or self.read)(name, module._buffers[leaf].dtype).to(self.device)
            elif have.is_meta:
                put(have, (read or self.read)(name, have.dtype).to(self.device))
                done.append(name)
        return done

    def empty(self, names: Iterable[str]) -> None:
        """Take the values of these parameters away."""
        for name in names:
            put(parameter := self.model.get_parameter(name), parameter.detach().to("meta"))

    @contextmanager
    def filled(
        self, names: Iterable[str], read: Callable[[str, torch.dtype], Tensor] | None = None
    ) -> Iterator[None]:
        """These tensors have their values for a while."""
        done: list[str] = []
        try:
            for name in names:
                done += self.fill([name], read)
            yield
        finally:
            self.empty(done)


def put(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Give a parameter another tensor, of another device too; whoever holds it goes on holding it."""
    new = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, new)  # type: ignore[no-untyped-call]


def first_names(model: nn.Module) -> dict[str, str]:
    """Every saved name -> the first name of the same tensor; buffers are never the same."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name) if isinstance(tensor, nn.Parameter) else name
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


def stored_names(model: Any) -> dict[str, str]:
    """The names to store a model's tensors under -> the names to read them by.

    Once for what transformers ties again as it loads, and once for every name of what else is shared.
    """
    tied = {name for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items() for name in pair}
    return {n: first for n, first in first_names(model).items() if n == first or not {n, first} <= tied}


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A file to write that takes its name only when it is whole and on the disk."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        to_disk(beside)
        os.replace(beside, path)
        to_disk(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def publish_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Write one safetensors file whole or not at all, with what is to be known about it."""
    said = {"format": "pt"} | ({} if about is None else {"subspan": json.dumps(about)})
    with published(path) as beside:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, beside, metadata=said)


def read_published(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors that `publish_tensors` wrote, and what was to be known."""
    with safe_open(path, framework="pt") as content:
        tensors = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
        return tensors, json.loads((content.metadata() or {}).get("subspan", "null"))


def publish_json(path: Path, content: Any) -> None:
    """Write a json file whole or not at all."""
    with published(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def publish_copies(
    path: Path, source: Source, names: Mapping[str, str], finished: Mapping[str, Tensor] | None = None
) -> None:
    """Write tensors of a model into a safetensors file, a piece at a time; `names` are new name -> name.

    `finished` are written as they are. The format: length of the header, header, numbers, all little-endian.
    """
    state, finished = source.model.state_dict(), finished or {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    kinds = {new: state[name] for new, name in names.items()} | dict(finished)
    # The widest first, so that every tensor begins at a multiple of the size of its numbers.
    order = sorted(kinds, key=lambda name: -kinds[name].element_size())
    for new in order:
        size = math.prod(kinds[new].shape) * kinds[new].element_size()
        shape = list(kinds[new].shape)
        header[new] = {"dtype": CODES[kinds[new].dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with published(path) as beside, beside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for new in order:
            _write(file, [finished[new]] if new in finished else source.pieces(names[new]),
                   kinds[new].dtype)  # fmt: skip


def _write(file: IO[bytes], pieces: Iterable[Tensor], dtype: torch.dtype) -> None:
    for piece in pieces:
        made = piece.detach().cpu().to(dtype if piece.is_floating_point() else piece.dtype).contiguous()
        file.write(made.reshape(-1).view(torch.uint8).numpy().data)


def publish_index(folder: Path, files: Sequence[Path]) -> None:
    """Write the index of shards as transformers reads it."""
    named: dict[str, str] = {}
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as content:
            named |= dict.fromkeys(content.keys(), file.name)
        with file.open("rb") as raw:
            total += file.stat().st_size - 8 - int.from_bytes(raw.read(8), "little")
    publish_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(named.items()))})
