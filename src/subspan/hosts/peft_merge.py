"""An adapter folder and a model: what the adapter changes, and one model of both.

A merge is computed in float32 at least and cast once. A model that is a folder of safetensors is never held whole:
its files are read and written one after the other. A tied weight that is changed on one side only is untied, and
the config says so. A base that was quantized to train on is merged as what its codes stand for. The result is read
back and must give the logits of model and adapter, or it is not written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from subspan import io
from subspan import site as kinds
from subspan.adapt import Routed
from subspan.edit import Edit
from subspan.hosts import folders, jobs, quantizer, text
from subspan.hosts import transformers as host
from subspan.hosts.export import TOLERANCE
from subspan.hosts.peft import check_base
from subspan.hosts.peft_keys import some
from subspan.hosts.peft_read import INDEX, AdapterFolder, is_adapter, joined, read_one, shards
from subspan.hosts.peft_tokens import TokenRows
from subspan.hosts.transformers import LoadedModel
from subspan.hosts.vocabulary import ends, rows_in
from subspan.methods import build

_TOKENS = 64
# What float32, in which logits are compared, may add up to in a deep model.
_ROUNDING = 1e-5
_BESIDE = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
Track = Callable[[Iterable[Path]], Iterable[Path]]


@dataclass(frozen=True)
class Effect:
    """How far an adapter moves the logits of a model: at most, on average, and the largest logit without it."""

    largest: float
    mean: float
    logit: float


@dataclass(frozen=True)
class Merged:
    """Where a merged model lies, how many layers changed, whether it was streamed, and how true it is.

    `difference` is the largest difference from a logit of model and adapter as a share of the largest, None when
    it was not verified; `untied` names the weights that were tied and are no longer.
    """

    out: Path
    sites: int
    streamed: bool
    untied: tuple[str, ...]
    difference: float | None
    tolerance: float


def opened_with(model: str, saved: AdapterFolder, name: str = "default") -> tuple[LoadedModel, Edit]:
    """Open a model and put an adapter on it, in the precision and bits that it was trained on, else float32.

    Raises ValueError when the model is itself an adapter, and what the adapter's `put` raises.
    """
    refuse_adapter(model)
    return jobs.put_on(model, saved, name=name)


def refuse_adapter(model: str) -> None:
    """Raise ValueError for a model that is an adapter folder: its adapter would be active under the other one."""
    if is_adapter(model):
        raise ValueError(
            f"{model} is itself an adapter on its base, which would be active under the other one; "
            f"merge it first: subspan adapter merge MODEL {model} -o OUT"
        )


def refuse_gate(saved: AdapterFolder) -> None:
    """Raise ValueError, naming its sites, for an adapter that weighs experts anew for each input."""
    if saved.form == "subspan" and isinstance(build(saved.method, "adapter", **saved.args).join, Routed):
        raise ValueError(
            f"{saved.path} is {saved.method} on {some(saved.sites)}, which weighs its experts anew for each "
            "input, so there is no one weight to merge, convert or compare; keep it as an adapter, or train one "
            "with a weight, such as lora"
        )


@torch.no_grad()
def effect(model: str, saved: AdapterFolder) -> Effect:
    """Run a model on text without and with an adapter; raises ValueError when no logit changes."""
    loaded, done = opened_with(model, saved)
    ids = some_ids(loaded, saved)
    after = logits(loaded.model, ids)
    done.undo()
    before = logits(loaded.model, ids)
    moved = (after - before).abs()
    if not float(moved.max()) > 0:
        raise ValueError(
            f"{saved.path} changes no logit of {model} on {ids.numel()} tokens; it is untrained (lora_B is zero "
            "until the first step), or it was saved without its tensors"
        )
    return Effect(float(moved.max()), float(moved.mean()), float(before.abs().max()))


def merge_folder(
    model: str,
    saved: AdapterFolder,
    out: str | Path,
    *,
    verify: bool = True,
    force: bool = False,
    track: Track = iter,
) -> Merged:
    """Write the model with the adapter in its weights, in the precision that it has on disk.

    Raises ValueError for a model that is an adapter itself or is quantized by others, for `out` over model or
    adapter, for a gate, for an adapter of another model, and when the logits read back are not those of model
    and adapter; OUT is then not written. See `io.staged`.
    """
    refuse_adapter(model)
    refuse_gate(saved)
    apart(out, model, saved.path)
    stored = folders.stored_dtype(model)
    plan = _streamable(model, saved)
    with io.staged(out, force=force) as folder:
        if plan is None:
            untied = _merge_whole(model, saved, folder, stored)
        else:
            untied = plan.write(folder, track)
        difference, tolerance = (
            _verified(model, saved, folder, stored, out) if verify else (None, TOLERANCE[stored])
        )
    return Merged(Path(out), len(saved.sites), plan is not None, untied, difference, tolerance)


def apart(out: str | Path, *reads: str | Path) -> None:
    """Raise ValueError when `out` is one of the folders that are read, lies in one, or holds one."""
    target = Path(out).resolve()
    for read in reads:
        path = Path(read).resolve()
        if Path(read).exists() and (path.is_relative_to(target) or target.is_relative_to(path)):
            raise ValueError(f"{out} is where {read} lies, and nothing is merged in place; choose another output")


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """The logits (1, tokens, words) in float32."""
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found.float()


def some_ids(loaded: LoadedModel, saved: AdapterFolder | None = None) -> Tensor:
    """The first tokens (1, count) of the built-in text, at most 64 and no more than the model takes.

    The last of them, at most half, give way to tokens whose rows the adapter trained.
    """
    model: Any = loaded.model
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _TOKENS
    ids = text.encode(loaded.tokenizer, text.prose()[: 8 * _TOKENS])[: min(limit, _TOKENS)]
    also = TokenRows() if saved is None else saved.tokens
    rows = sorted({i for site in also.values for i in also.ids(site)})[: len(ids) // 2]
    return torch.cat([ids[: len(ids) - len(rows)], torch.tensor(rows, dtype=ids.dtype)])[None]


@dataclass(frozen=True)
class _Stream:
    """A merge file by file: old name -> file, what changes, and what is tied to what.

    `tables` are the tensors that get rows of single tokens, each with the site of these, and `rows` is the size
    that the vocabulary grows to, 0 if it does not.
    """

    model: Path
    blank: nn.Module
    saved: AdapterFolder
    files: Mapping[str, Path]
    extra: Mapping[str, str]
    untied: tuple[str, ...]
    tables: Mapping[str, str | None]
    rows: int

    def write(self, folder: Path, track: Track) -> tuple[str, ...]:
        """Write all files of the merged model; returns what was untied."""
        files = sorted(set(self.files.values()))
        sizes = [self._write_shard(file, folder) for file in track(files)]
        for file in sorted(self.model.iterdir()):
            if file.is_file() and file.suffix in _BESIDE and file.name not in (INDEX, io.ABOUT):
                shutil.copyfile(file, folder / file.name)
        if files[0].name != io.WEIGHTS:
            named = {key: file.name for key, file in self.files.items()}
            named |= {key: self.files[source].name for key, source in self.extra.items()}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(named.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if self.untied:
            _say(folder / "config.json", tie_word_embeddings=False)
        if self.rows:
            _say(folder / "config.json", vocab_size=self.rows)
        if (words := jobs.tokenizer_of(self.saved)) is not None:
            words.save_pretrained(folder)
        return self.untied

    def _write_shard(self, file: Path, folder: Path) -> int:
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata() or {"format": "pt"}
            tensors = {key: self._new(key, opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118
        for key, source in self.extra.items():
            if self.files[source] == file:
                tensors[key] = self._new(key, read_one(file, source))
        save_file(tensors, folder / file.name, metadata=metadata)
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def _new(self, key: str, old: Tensor) -> Tensor:
        if key in self.saved.whole:
            return self.saved.whole[key].to(old.dtype).contiguous()
        if key in self.tables:
            return self.saved.tokens.merged(key.rpartition(".")[0], self.tables[key], old)
        site = key.removesuffix(".weight")
        if site not in self.saved.sites or site == key:
            return old.clone()
        if not old.is_floating_point() or old.element_size() < 2:
            raise ValueError(f"{self.model}: {key} is stored as {old.dtype}; merge into the unquantized model")
        # A Conv1D keeps its matrix transposed.
        module = self.blank.get_submodule(site)
        kind = kinds.of(module)
        made = joined(self.saved, site, kind.view(module, old)).to(old.dtype)
        return kind.kept(module, made).contiguous()


def _streamable(model: str, saved: AdapterFolder) -> _Stream | None:
    """The merge file by file, or None for a model whose tensors do not lie on disk under the model's own names."""
    folder = Path(model)
    if model == "smollm2" or not folder.is_dir():
        return None
    blank = _blank(folder)
    if blank is None or quantizer.few_bits(saved.path):
        return None
    saved.fits(blank)
    files = shards(folder)
    touched = {f"{site}.weight" for site in saved.sites} | set(saved.whole)
    ties = {str(a): str(b) for a, b in (blank.all_tied_weights_keys or {}).items()}
    tables, rows = _tables(blank, saved)
    torn = {a: b for a, b in ties.items() if touched & {a, b} or tables.get(a) != tables.get(b)}
    touched |= tables.keys() - ties.keys()
    if any(b not in files for b in torn.values()) or not touched <= files.keys() | torn.keys():
        return None
    for site, base in saved.bases.items():
        key = torn.get(f"{site}.weight", f"{site}.weight")
        check_base(saved.path, site, base, read_one(files[key], key))
    extra = {a: b for a, b in torn.items() if a not in files}
    return _Stream(folder, blank, saved, files, extra, tuple(torn), tables, rows)


def _tables(blank: Any, saved: AdapterFolder) -> tuple[dict[str, str | None], int]:
    """The tensors that rows of single tokens change, each with the site whose rows it gets, and the new size.

    Where the vocabulary grows these are all tables and the head's bias, else the size is 0.
    """
    if not saved.tokens.values:
        return {}, 0
    placed, there = saved.tokens.fits(blank), ends(blank)
    grows = saved.tokens.size if saved.tokens.size > rows_in(blank) else 0
    wanted = {name: placed.get(name) for name in there.sources if grows or name in placed}
    tables = {f"{name}.weight": source for name, source in wanted.items()}
    if grows and there.head is not None and kinds.bias(blank.get_submodule(there.head)) is not None:
        tables[f"{there.head}.bias"] = None
    return tables, grows


def _blank(folder: Path) -> Any:
    """The model of a folder without memory for its weights, or None when subspan compressed it."""
    host.stored_dtype(folder)  # its errors for a bad folder
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if quantizer.ours(config):
        return None
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantized; merge into the unquantized model, and quantize the result again")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _merge_whole(model: str, saved: AdapterFolder, folder: Path, stored: torch.dtype) -> tuple[str, ...]:
    loaded, _ = opened_with(model, saved)
    merged: Any = loaded.model
    few = quantizer.few_bits(saved.path)
    if few:  # what they stand for is rounded once, with the adapter in it
        folders.cast(merged, torch.promote_types(few["dtype"], torch.float32))
    jobs.fold(merged)
    if few:
        quantizer.widen(merged)
    folders.cast(merged, stored)
    untied = _untie(merged)
    host.save_folder_extras(merged, loaded.tokenizer, folder)
    io.write_tensors(folder / io.WEIGHTS, folders.untied(merged))
    if untied:
        _say(folder / "config.json", tie_word_embeddings=False)
    return untied


def _untie(model: Any) -> tuple[str, ...]:
    """Forget the ties of a model whose two sides are no longer one tensor; returns the names that had one."""
    state = model.state_dict(keep_vars=True)
    ties = dict(model.all_tied_weights_keys or {})
    torn = tuple(a for a, b in ties.items() if a in state and b in state and state[a] is not state[b])
    for name in torn:
        del model.all_tied_weights_keys[name]
    return torn


def _say(file: Path, **facts: Any) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= facts
    if isinstance(config.get("text_config"), dict):
        config["text_config"] |= facts
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _verified(
    model: str, saved: AdapterFolder, folder: Path, stored: torch.dtype, out: str | Path
) -> tuple[float, float]:
    """The difference of the logits read back, and what is allowed; raises ValueError beyond it."""
    loaded, _ = opened_with(model, saved)
    ids = some_ids(loaded, saved)
    folders.cast(loaded.model, torch.float32)
    wanted = logits(loaded.model, ids)
    tolerance = max(TOLERANCE[stored], _ROUNDING)
    if stored not in (torch.float32, torch.float64):
        rounded = logits(loaded.model.to(stored), ids)
        tolerance = max(tolerance, _distance(rounded, wanted))
    del loaded
    found = logits(folders.open_model(str(folder)).model, ids)
    difference = _distance(found, wanted)
    if not difference <= tolerance:  # nor NaN
        raise ValueError(
            f"{out} was not written: read back, its logits differ from those of {model} with {saved.path} by "
            f"{difference:.2g} of the largest, and {tolerance:.2g} is allowed; merge into a wider precision"
        )
    return difference, tolerance


def _distance(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())
