"""A damaged, foreign or newer folder is refused by from_pretrained with a line that says the way out."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers import auto

from subspan import io
from subspan.budget import Ratio
from subspan.compress import compress
from subspan.hosts import quantizer
from subspan.methods import build

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
SITE = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    compress(model, build("svd", "compression", target=Ratio(0.5)))
    quantizer.attach(model)
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def check_refused(folder, match, error=ValueError, **options):
    with pytest.raises(error, match=match):
        AutoModelForCausalLM.from_pretrained(folder, **options)


def describe_otherwise(folder, change):
    """Change the quantization_config of a folder."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def rewrite(folder, change):
    """Change the tensors of a folder."""
    tensors = load_file(folder / io.WEIGHTS)
    change(tensors)
    io.write_tensors(folder / io.WEIGHTS, tensors)


AGAIN = "copy or save the folder again"
CONFIGS = {
    "newer": (lambda c: c.update(format=2, library="9.9"), r"format 2, written by subspan 9\.9.*upgrade subspan"),
    "no sites": (lambda c: c.pop("sites"), rf"config\.json is damaged: it names no format and sites.*{AGAIN}"),
    "sites of no use": (lambda c: c["sites"].update({SITE: 3}), rf"damaged.*{AGAIN}"),
    "no op": (lambda c: c["sites"][SITE].pop("op"), rf"damaged.*{AGAIN}"),
    "format as text": (lambda c: c.update(format="1"), rf"damaged.*{AGAIN}"),
    "unknown key": (lambda c: c.update(bits=4), rf"unknown keys bits.*{AGAIN}"),
    "unknown op": (lambda c: c["sites"][SITE]["op"].update(kind="Butterfly"), "unknown op 'Butterfly'.*upgrade"),
    "no tensor": (lambda c: c["sites"][SITE]["op"].pop("u"), rf"damaged: {SITE} describes no op.*{AGAIN}"),
    "no dtype": (lambda c: c["sites"][SITE]["op"]["u"].update(dtype="nn"), rf"damaged: {SITE} describes.*{AGAIN}"),
    "negative": (
        lambda c: c["sites"][SITE]["op"]["u"].update(tensor=[-1, 3]),
        rf"damaged: {SITE} describes no op.*{AGAIN}",
    ),
    "other site": (
        lambda c: c["sites"].update({"model.layers.7.mlp.up_proj": c["sites"][SITE]}),
        rf"compresses 1 layers that LlamaForCausalLM lacks \(model\.layers\.7\.mlp\.up_proj\).*{AGAIN}",
    ),
    "a bias that is not there": (
        lambda c: c["sites"][SITE].update(bias=True),
        rf"1 tensors are missing or of another shape \({SITE}\.bias\).*{AGAIN}",
    ),
    "other size": (
        lambda c: c["sites"][SITE]["op"]["v"]["tensor"].__setitem__(1, 17),
        rf"{SITE}: config\.json says an op of \(24, 17\), the model has \(24, 16\);.*{AGAIN}",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_describes_no_such_model(folder, name):
    change, match = CONFIGS[name]
    describe_otherwise(folder, change)
    check_refused(folder, match)


def test_a_model_of_other_sizes(folder):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 32}))
    check_refused(folder, rf"says an op of \(16, 24\), the model has \(16, 32\);.*{AGAIN}")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_weights_cut_short(folder, share):
    file = folder / io.WEIGHTS
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    check_refused(folder, r"model\.safetensors \(\d+ bytes\) is cut short or damaged.*copy it again")


def test_weights_that_are_something_else(folder):
    (folder / io.WEIGHTS).write_bytes(b"\x80\x04pickle of something" * 50)
    check_refused(folder, r"model\.safetensors .* is cut short or damaged.*copy it again")


def test_a_tensor_of_a_site_is_missing(folder):
    rewrite(folder, lambda tensors: tensors.pop(f"{SITE}.op.u"))
    check_refused(folder, rf"small does not fit its config.json: 1 tensors are missing.*{SITE}\.op\.u.*{AGAIN}")


def test_a_tensor_of_a_site_has_another_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({f"{SITE}.op.u": torch.ones(3, 3)}))
    check_refused(folder, "ignore_mismatched_sizes", RuntimeError)  # after a table that names it
    check_refused(folder, rf"of another shape \({SITE}\.op\.u\).*{AGAIN}", ignore_mismatched_sizes=True)


def test_the_dense_weights_of_the_original_are_not_taken_for_it(folder, tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / io.WEIGHTS).replace(folder / io.WEIGHTS)
    check_refused(folder, rf"28 tensors are missing.*model\.layers\.0\.self_attn\.q_proj\.op\..*{AGAIN}")


def test_without_the_import_transformers_names_the_method(folder, monkeypatch):
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "subspan")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "subspan")
    with pytest.raises(ValueError, match="Unknown quantization type, got subspan"):
        auto.AutoQuantizationConfig.from_dict({"quant_method": "subspan", "sites": {}})


def test_a_plain_model_is_not_compressed_while_loading(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "plain")
    given = quantizer.SubspanConfig({})
    check_refused(tmp_path / "plain", "compressed already.*`subspan compress`", quantization_config=given)
