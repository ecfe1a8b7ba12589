"""Compressed models of five shapes, saved and loaded by transformers itself, bit for bit; and exported."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from subspan import io
from subspan.compress import study
from subspan.edit import edit
from subspan.hosts import export, quantizer
from subspan.hosts.folders import open_model, save_model
from subspan.hosts.jobs import do_method
from subspan.hosts.peft_config import CONFIG
from subspan.hosts.peft_keys import TENSORS
from subspan.hosts.transformers import LoadedModel
from subspan.ops import Dense, LowRank, OpConv, OpEmbedding, OpLinear

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
TEXT = {**WIDTH, "vocab_size": 300, "intermediate_size": 24, "max_position_embeddings": 64}
GQA = {**TEXT, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}


def gpt2() -> GPT2LMHeadModel:
    sizes = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ends, initializer_range=0.3))


# name -> (the model, how transformers loads it, what is compressed)
MODELS: dict[str, tuple[Callable[[], Any], Any, str | None]] = {
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**GQA, attention_bias=True, tie_word_embeddings=True)),
        AutoModelForCausalLM, None,
    ),
    "llama, table": (
        lambda: LlamaForCausalLM(LlamaConfig(**GQA, pad_token_id=3, tie_word_embeddings=False)),
        AutoModelForCausalLM, "*.q_proj|*.embed_tokens",
    ),
    "gpt2": (gpt2, AutoModelForCausalLM, "transformer.h.*|transformer.wpe"),
    "bert": (lambda: BertForMaskedLM(BertConfig(**TEXT)), AutoModelForMaskedLM, None),
    "vit": (
        lambda: ViTForImageClassification(
            ViTConfig(**WIDTH, intermediate_size=24, image_size=8, patch_size=4, num_labels=5)
        ),
        AutoModelForImageClassification, "vit.*",
    ),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**GQA, num_local_experts=3, num_experts_per_tok=2)),
        AutoModelForCausalLM, None,
    ),
    "mixtral, some": (
        lambda: MixtralForCausalLM(MixtralConfig(**GQA, num_local_experts=3, num_experts_per_tok=2)),
        AutoModelForCausalLM, "*.experts.1.down_proj|*.0.*.v_proj",
    ),
}  # fmt: skip
CAUSAL = [name for name in MODELS if MODELS[name][1] is AutoModelForCausalLM]
IDS = torch.arange(2 * 12).reshape(2, 12) * 37 % 300


def born(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name][0]().eval()
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                nn.init.normal_(p)
    return model


def cut(name: str) -> Any:
    """A model whose layers are low-rank, above break-even dense, and where they were full-rank kept."""
    model = born(name)
    taken = study(model, select=MODELS[name][2])
    ranks = {"o_proj": 12, "up_proj": 16, "value": 12}
    plan = taken.plan(
        lambda spectra, shapes: {key: min(ranks.get(key.rpartition(".")[2], 3), *s) for key, s in shapes.items()}
    )
    taken.apply(model, plan)
    return model


@torch.no_grad()
def logits(name: str, model: Any) -> Tensor:
    if name == "vit":
        draw = torch.Generator().manual_seed(0)
        return model(pixel_values=torch.randn(2, 3, 8, 8, generator=draw)).logits
    return model(input_ids=IDS).logits


def check_equal(one: Any, two: Any) -> None:
    """Two models have the same tensors under the same names."""
    have, wanted = one.state_dict(), two.state_dict()
    assert list(have) == list(wanted)
    assert all(torch.equal(have[key], wanted[key]) for key in wanted)


@pytest.fixture(params=MODELS)
def row(request) -> tuple[str, Any]:
    return request.param, cut(request.param)


def test_a_saved_model_comes_back_bit_for_bit_and_can_be_saved_again(row, tmp_path):
    name, model = row
    quantizer.attach(model)
    model.save_pretrained(tmp_path / "one")
    read, report = MODELS[name][1].from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(report.values()), report
    check_equal(read.eval(), model)
    assert torch.equal(logits(name, read), logits(name, model))
    read.save_pretrained(tmp_path / "two")
    check_equal(MODELS[name][1].from_pretrained(tmp_path / "two"), model)
    stored, again = (load_file(tmp_path / folder / io.WEIGHTS) for folder in ("one", "two"))
    assert stored.keys() == again.keys() and all(torch.equal(stored[key], again[key]) for key in stored)


def test_what_stands_at_each_site_is_what_stood_there_before_saving(row, tmp_path):
    name, model = row
    quantizer.attach(model)
    model.save_pretrained(tmp_path)
    read = MODELS[name][1].from_pretrained(tmp_path)
    have, wanted = quantizer.layers(read), quantizer.layers(model)
    assert [(key, type(m), type(m.op)) for key, m in have.items()] == [
        (key, type(m), type(m.op)) for key, m in wanted.items()
    ]
    kinds = {"vit": OpConv, "llama, table": OpEmbedding, "gpt2": OpEmbedding}
    assert any(isinstance(m, kinds.get(name, OpLinear)) for m in have.values())
    assert any(isinstance(m.op, LowRank) for m in have.values())
    listed = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["sites"]
    assert set(listed) == set(wanted)


def test_dense_again_it_is_the_ordinary_model(row):
    name, model = row
    before, modules = logits(name, model), dict(model.named_modules())
    plain = born(name)
    with quantizer.densify(model):
        assert [(key, type(m)) for key, m in model.named_modules()] == [
            (key, type(m)) for key, m in plain.named_modules()
        ]
        assert {key: t.shape for key, t in model.state_dict().items()} == {
            key: t.shape for key, t in plain.state_dict().items()
        }
        assert_close(logits(name, model), before, rtol=1e-4, atol=1e-4)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(logits(name, plain), logits(name, model))
    assert dict(model.named_modules()) == modules
    assert quantizer.stacks(model).keys() == {
        key.removesuffix(".act_fn") for key in modules if key.endswith("experts.act_fn")
    } & {key.partition("experts")[0] + "experts" for key in quantizer.layers(model)}


def test_experts_are_no_single_layers():
    model = cut("mixtral, some")
    assert list(quantizer.single(model)) == ["model.layers.0.self_attn.v_proj"]
    owner = model.model.layers[1].mlp.experts
    assert isinstance(owner.get_submodule("0.down_proj").op, Dense)
    plain = quantizer.unstack(owner)
    assert torch.equal(plain.down_proj.detach(), owner.down_proj.detach())


def test_a_config_of_another_model_is_refused(tmp_path):
    model = cut("mixtral")
    sites = quantizer.describe(model)
    other = born("mixtral, some")
    for module in other.model.layers:
        module.mlp.experts.num_experts = 2
    before = list(other.state_dict())
    with pytest.raises(
        ValueError, match=r"compresses 12 layers that MixtralForCausalLM lacks.*experts\.0\.gate_up"
    ):
        quantizer.rebuild(other, sites)
    assert list(other.state_dict()) == before
    sites["model.layers.0.mlp.experts.0.gate_up_proj"]["bias"] = True
    with pytest.raises(ValueError, match=r"experts\.0\.gate_up_proj: config\.json says an op of.*with a bias"):
        quantizer.rebuild(born("mixtral"), sites)


@pytest.fixture(params=CAUSAL)
def loaded(request, words) -> tuple[str, LoadedModel]:
    return request.param, LoadedModel(cut(request.param), words, "tiny")


def test_our_folder_opens_bit_for_bit(loaded, tmp_path):
    name, given = loaded
    save_model(tmp_path / "small", given)
    read = open_model(tmp_path / "small").model
    check_equal(read, given.model)
    assert torch.equal(logits(name, read), logits(name, given.model))


def test_dense_weights_load_in_software_that_knows_no_op(loaded, tmp_path):
    name, given = loaded
    done = export.export_dense(given, tmp_path / "out")
    assert done.difference <= done.tolerance
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert quantizer.layers(plain) == {}
    assert_close(logits(name, plain), logits(name, given.model), rtol=1e-4, atol=1e-3)


def test_an_adapter_holds_what_one_order_of_axes_can(loaded, tmp_path):
    name, given = loaded
    done = export.export_peft(given, tmp_path / "out")
    assert done.difference <= done.tolerance
    folder = tmp_path / "out" / export.ADAPTER
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    assert config["fan_in_fan_out"] is (name == "gpt2")
    single = quantizer.single(given.model)
    linear = {key for key, m in single.items() if isinstance(m, OpLinear) and isinstance(m.op, LowRank)}
    named = {key.rpartition(".lora_")[0].removeprefix("base_model.model.") for key in tensors}
    assert named == linear and len(linear) >= 1
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / export.BASE).eval()
    assert [type(m) for m in base.modules()] == [type(m) for m in born(name).modules()]
    assert all(not base.get_submodule(key).weight.any() for key in linear)


def test_the_jobs_of_the_command_line_take_any_of_them(loaded):
    _, given = loaded
    with quantizer.densify(given.model):
        plan, done = do_method(given.model, "svd", {"target": {"ratio": 0.5}})
        assert 0 < plan.ratio <= 0.5 and len(list(done)) > 0
        done.undo()


def test_an_adapter_on_a_compressed_conv1d_is_refused_where_it_cannot_be():
    model = born("gpt2")
    with pytest.raises(ValueError, match=r"'\*\.c_attn' matches no nn\.Linear; there are: lm_head"):
        edit(model, "*.c_attn", lambda name, old: old)
