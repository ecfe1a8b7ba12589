"""Adapters that are damaged, foreign or dangerous are refused with the reason, and the model stays as it was."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.adapt import Adapted, adapt
from subspan.edit import edit
from subspan.hosts.peft import load_peft, save_peft
from subspan.hosts.peft_change import as_lora
from subspan.hosts.peft_config import parse_config
from subspan.hosts.peft_kohya import flat, load_kohya, save_kohya
from subspan.hosts.peft_merge import apart, merge_folder, refuse_adapter
from subspan.hosts.peft_read import Weights, base_of, read_adapter, shards
from subspan.methods import build
from subspan.ops import Dense

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def llama(**sizes):
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).eval()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A LoRA of rank 2 on q_proj."""
    model = llama()
    edit(model, "*.q_proj", adapt(build("lora", "adapter", rank=2)))
    for module in model.modules():
        if isinstance(module, Adapted):
            torch.nn.init.ones_(module.slot("default").op.u)
    return save_peft(model, tmp_path_factory.mktemp("adapters") / "good")


def changed(good, out, *, tensors=None, **fields):
    """A copy of the folder with other fields, and its tensors passed through a function."""
    out.mkdir()
    config = json.loads((good / "adapter_config.json").read_text()) | fields
    (out / "adapter_config.json").write_text(json.dumps(config))
    found = load_file(good / "adapter_model.safetensors")
    save_file(tensors(found) if tensors else found, out / "adapter_model.safetensors")
    return out


def check_refused(folder, words, model=None, problem=ValueError, **args):
    """Loading fails with these words, and the model keeps its modules and tensors."""
    model = model or llama()
    modules = dict(model.named_modules())
    state = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(problem) as caught:
        load_peft(model, folder, **args)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())


def test_an_adapter_for_another_model_lists_the_shapes(good):
    wider = llama(hidden_size=32)
    check_refused(good, ["other shapes", "layers.0.self_attn.q_proj (16, 16) there, (32, 32) here"], wider)


def test_an_adapter_for_more_layers_names_them(good):
    check_refused(good, ["lacks", "layers.1.self_attn.q_proj", "another model"], llama(num_hidden_layers=1))


def test_an_adapter_for_fewer_layers_names_those_without_tensors(good):
    words = ["target_modules also names", "layers.2.self_attn.q_proj", "no tensors"]
    check_refused(good, words, llama(num_hidden_layers=3))


def test_a_body_under_another_name_gets_a_hint(good):
    model = torch.nn.Module()
    model.add_module("layers", llama().model.layers)
    check_refused(good, ["prefix='base_model.model.model.'"], model)
    load_peft(model, good, prefix="base_model.model.model.")
    assert isinstance(model.layers[0].self_attn.q_proj, Adapted)


def test_names_without_the_prefix_get_a_hint(good, tmp_path):
    strip = lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}  # noqa: E731
    folder = changed(good, tmp_path / "a", tensors=strip)
    check_refused(folder, ["do not begin with 'base_model.model.'", "prefix=''"])
    load_peft(model := llama(), folder, prefix="")
    assert isinstance(model.model.layers[0].self_attn.q_proj, Adapted)
    wrap = lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}  # noqa: E731
    check_refused(changed(good, tmp_path / "b", tensors=wrap), ["prefix='_orig_mod.base_model.model.'"])


def test_extra_and_missing_keys_are_shown(good, tmp_path):
    more = lambda t: t | {"base_model.model.lm_head.weight": torch.ones(2, 2)}  # noqa: E731
    check_refused(changed(good, tmp_path / "more", tensors=more), ["1 unknown", "lm_head.weight"])
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    less = lambda t: {k: v for k, v in t.items() if k != first}  # noqa: E731
    check_refused(
        changed(good, tmp_path / "less", tensors=less), ["1 missing", "layers.0.self_attn.q_proj.lora_A"]
    )
    check_refused(changed(good, tmp_path / "dora", use_dora=True), ["2 missing", "lora_magnitude_vector"])
    check_refused(changed(good, tmp_path / "none", tensors=lambda _: {}), ["no LoRA tensor"])
    raw = lambda t: {k.replace("lora_A", "lora_A.default"): v for k, v in t.items()}  # noqa: E731
    check_refused(changed(good, tmp_path / "raw", tensors=raw), ["2 unknown", "2 missing", "lora_A.default"])


def test_a_truncated_file_is_named(good, tmp_path):
    folder = changed(good, tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    check_refused(folder, ["adapter_model.safetensors", "damaged or cut short"])
    file.unlink()
    check_refused(folder, ["does not exist"], problem=FileNotFoundError)


def test_a_pickle_is_not_read(good, tmp_path):
    folder = changed(good, tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    check_refused(folder, ["pickle", "weights_only=True", "save_file"])
    with pytest.raises(ValueError, match="pickle"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "VERA"}, ["peft_type is 'VERA'", "LORA"]),
        ({"new_trick": 3}, ["new_trick is 3", "merge_and_unload"]),
        ({"use_qalora": True}, ["use_qalora is True"]),
        ({"lora_bias": True}, ["lora_bias is True"]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication is [[0, 2]]"]),
        ({"target_parameters": ["w"]}, ["target_parameters is ['w']"]),
        ({"ensure_weight_tying": True}, ["ensure_weight_tying is True"]),
        ({"trainable_token_indices": [1]}, ["trainable_token_indices is [1]"]),
        ({"bias": "all"}, ["bias is 'all'", "'none'"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["'pissa_niter_4'", "path_initial_model_for_weight_conversion"]),
        ({"init_lora_weights": "olora"}, ["'olora'"]),
        ({"init_lora_weights": "pissa", "use_dora": True}, ["only one of the two"]),
        ({"r": 0}, ["r is 0", "positive whole number"]),
        ({"r": 2.5}, ["r is 2.5"]),
        ({"lora_alpha": -1}, ["lora_alpha is -1"]),
        ({"rank_pattern": {"q_proj": "x"}}, ["q_proj is 'x'"]),
        ({"rank_pattern": [1]}, ["rank_pattern is [1]"]),
        ({"rank_pattern": {"q_proj": 3}}, ["(16, 2), (2, 16)", "says rank 3"]),
        ({"target_modules": "*.q"}, ["no regular expression"]),
        ({"target_modules": 3}, ["target_modules is 3"]),
        ({"target_modules": ["nothing"]}, ["matches no layer", "[nothing]", "there are"]),
        ({"target_modules": ["v_proj"]}, ["also names", "v_proj"]),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, ["layers.1", "does not name"]),
        ({"modules_to_save": ["nothing"]}, ["modules_to_save names nothing"]),
        ({"modules_to_save": ["lm_head"]}, ["lm_head.weight missing there, (64, 16) here"]),
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_would_change_the_meaning_are_refused(fields, words, good, tmp_path):
    check_refused(changed(good, tmp_path / "a", **fields), words)


def test_harmless_fields_are_not(good, tmp_path):
    folder = changed(
        good, tmp_path / "a", lora_dropout=0.5, peft_version="9", inference_mode=False, new=None, off={}
    )
    load_peft(model := llama(), folder)
    assert isinstance(model.model.layers[0].self_attn.q_proj, Adapted)
    assert parse_config({"peft_type": "LORA"}).rank == 8


def test_a_config_that_is_no_config(good, tmp_path):
    folder = changed(good, tmp_path / "a")
    for text in ("{", "[]"):
        (folder / "adapter_config.json").write_text(text)
        check_refused(folder, ["adapter_config.json", "copy it again"])
    (folder / "adapter_config.json").unlink()
    check_refused(folder, ["no adapter_config.json"], problem=FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="neither"):
        read_adapter(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_adapter(tmp_path / "nowhere")


def test_numbers_that_are_none(good, tmp_path):
    spoil = lambda t: {k: v * float("nan") for k, v in t.items()}  # noqa: E731
    check_refused(changed(good, tmp_path / "a", tensors=spoil), ["lora_A.weight holds NaN"])


def test_an_embedding_is_refused_by_name(good, tmp_path):
    more = lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 64)}  # noqa: E731
    check_refused(changed(good, tmp_path / "a", tensors=more), ["an adapter on an embedding", "embed_tokens"])


def test_a_base_weight_of_another_model_is_refused(good, tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    folder = changed(good, tmp_path / "a", tensors=lambda t: t | {key: torch.ones(16, 16)})
    check_refused(folder, ["base weight of model.layers.0.self_attn.q_proj", "trained on"])


def test_a_name_that_is_taken(good):
    model = llama()
    load_peft(model, good)
    check_refused(good, ["'default' is already there", "choose a name"], model)
    load_peft(model, good, name="second")
    assert model.model.layers[0].self_attn.q_proj.active == ("default", "second")
    check_refused(good, ["cannot be a state-dict key"], name="../up")


def test_a_start_that_changes_the_base_stands_alone(good, tmp_path):
    model = llama()
    load_peft(model, good)
    folder = changed(good, tmp_path / "a", init_lora_weights="pissa")
    check_refused(folder, ["merge those first"], model, name="second")


def test_what_peft_has_no_words_for_is_not_written(good, tmp_path):
    with pytest.raises(ValueError, match="no adapter 'default'"):
        save_peft(llama(), tmp_path / "a")
    load_peft(model := llama(), good)
    edit(model, ["model.layers.0.self_attn.q_proj"], adapt(build("dora", "adapter", rank=2), "two"))
    with pytest.raises(ValueError, match="DoRA on top of other adapters"):
        save_peft(model, tmp_path / "a", name="two")
    with pytest.raises(ValueError, match="no module nothing to save whole"):
        save_peft(model, tmp_path / "a", modules_to_save=["nothing"])
    model.model.layers[0].self_attn.q_proj.slot("default").op = Dense(torch.ones(16, 16))
    with pytest.raises(ValueError, match=r"Dense joined by Add is no LoRA.*--to lora"):
        save_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_rank_above_the_shape(good):
    for rank in (0, 17):
        with pytest.raises(ValueError, match=f"rank {rank} .*16"):
            as_lora(read_adapter(good), Weights("smollm2"), rank)


def test_a_base_that_is_not_here(good):
    with pytest.raises(ValueError, match="no local folder; give the base with --base"):
        base_of(read_adapter(good))


def test_nothing_is_merged_in_place_or_over_another_adapter(good, tmp_path):
    model = tmp_path / "model"
    llama().save_pretrained(model)
    saved = read_adapter(good)
    for out in (model, model / "deep", tmp_path):
        with pytest.raises(ValueError, match="in place"):
            merge_folder(str(model), saved, out, force=True)
    with pytest.raises(ValueError, match="in place"):
        apart(good, good)
    for act in (lambda: refuse_adapter(str(good)), lambda: merge_folder(str(good), saved, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"itself an adapter.*merge it first"):
            act()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../up.safetensors", "/etc/up.safetensors", "sub/up.safetensors"])
def test_a_shard_outside_the_folder_is_not_opened(name, good, tmp_path):
    model = tmp_path / "model"
    llama().save_pretrained(model, max_shard_size="10KB")
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="leaves the folder"):
        merge_folder(str(model), read_adapter(good), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_index_that_lies(tmp_path):
    model = tmp_path / "model"
    llama().save_pretrained(model, max_shard_size="10KB")
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"disagree about lm_head\.weight"):
        shards(model)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        shards(model)


def test_a_quantized_model_is_not_merged(good, tmp_path):
    model = tmp_path / "model"
    llama().save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized; merge into the unquantized"):
        merge_folder(str(model), read_adapter(good), tmp_path / "out")


def kohya(good, out, change):
    """A file of kohya's form with its tensors passed through a function."""
    load_peft(model := llama(), good)
    file = save_kohya(model, out)
    save_file(change(load_file(file)), file)
    return file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"lora_te_x.alpha": torch.ones(())}, ["lora_te, lora_unet", "one file per model"]),
        (lambda t: {f"other_{k}": v for k, v in t.items()}, ["no known prefix"]),
        (lambda t: t | {"lora_unet_x.hada_w1_a": torch.ones(1)}, ["hada_w1_a belongs to LoHa"]),
        (lambda t: t | {"lora_unet_x.lokr_w1": torch.ones(1)}, ["lokr_w1 belongs to LoKr"]),
        (
            lambda t: t | {"lora_unet_x.lora_down.weight": torch.ones(1)},
            ["1 missing", "of layers the model lacks"],
        ),
        (lambda t: t | {"lora_unet_x.alpha": torch.ones(())}, ["1 unknown (lora_unet_x.alpha)"]),
        (lambda t: {k: v[..., None, None] if v.dim() else v for k, v in t.items()}, ["two matrices are read"]),
        (lambda t: {k: v.repeat(2, 1) if "up" in k else v for k, v in t.items()}, ["(32, 16)", "(16, 16)"]),
    ],
)
def test_a_file_of_kohya_that_does_not_fit(change, words, good, tmp_path):
    file, model = kohya(good, tmp_path / "a.safetensors", change), llama()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"a\.safetensors|model\.layers") as caught:
        load_kohya(model, file)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert dict(model.named_modules()) == modules


def test_keys_that_two_layers_share_cannot_be_written():
    with pytest.raises(ValueError, match=r"a_b has the same key|a\.b has the same key"):
        flat({"a.b": torch.nn.Linear(1, 1), "a_b": torch.nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="no adapter"):
        save_kohya(llama(), "never.safetensors")


def test_a_module_to_save_whose_name_ends_others(good, tmp_path):
    body = llama().model
    load_peft(body, good, prefix="base_model.model.model.")
    with pytest.raises(ValueError, match=r"PEFT finds norm by the end of its name, .* layers\.0\.input"):
        save_peft(body, tmp_path / "a", modules_to_save=["norm"])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("fields", [{}, {"trainable_token_indices": {"lm_head": [1, 5]}}], ids=str)
def test_trained_rows_of_an_embedding_are_refused_and_not_dropped(fields, good, tmp_path):
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    folder = changed(good, tmp_path / "a", tensors=lambda t: t | {key: torch.ones(2, 16)}, **fields)
    words = ["trainable_token_indices is {"] if fields else ["trained token rows", "embed_tokens"]
    check_refused(folder, [*words, "merge_and_unload"])
