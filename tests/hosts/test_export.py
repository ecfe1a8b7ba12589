"""An export has the logits of the model it came from, read back by software that knows only its files."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from subspan import io
from subspan.adapt import adapt
from subspan.compress import study
from subspan.edit import edit
from subspan.hosts import export, quantizer
from subspan.hosts.export import export_dense, export_peft
from subspan.hosts.peft_keys import TENSORS
from subspan.hosts.transformers import LoadedModel
from subspan.methods import build
from subspan.ops import Dense, LowRank, OpLinear, Product, Scaled, Sum

IDS = torch.arange(2 * 12).reshape(2, 12) * 37 % 300
# Of the hidden size 32: low-rank, above break-even so dense, full so kept.
RANKS = {"q_proj": 5, "k_proj": 4, "v_proj": 4, "o_proj": 20, "gate_proj": 3, "up_proj": 4, "down_proj": 32}


def made(words, *, dtype=torch.float64, tie=True):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, **heads, tie_word_embeddings=tie, attention_bias=True, initializer_range=0.1)
        model = LlamaForCausalLM(config).eval()
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p)
    taken = study(model)
    taken.apply(model, taken.plan(lambda _, shapes: {name: RANKS[name.rpartition(".")[2]] for name in shapes}))
    return LoadedModel(model.to(dtype), words, "tiny")


@pytest.fixture
def loaded(words):
    return made(words)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def check_untouched(loaded, act):
    """The model has its modules and its logits afterwards, and no mark."""
    modules, before = dict(loaded.model.named_modules()), logits(loaded.model)
    result = act()
    assert dict(loaded.model.named_modules()) == modules
    assert torch.equal(logits(loaded.model), before)
    return result


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_dense_weights_load_anywhere_with_the_same_logits(words, tmp_path, dtype, tolerance, tie):
    loaded = made(words, dtype=dtype, tie=tie)
    done = check_untouched(loaded, lambda: export_dense(loaded, tmp_path / "out"))
    assert done.difference <= done.tolerance == export.TOLERANCE[dtype]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == dtype and quantizer.layers(plain) == {}
    assert set(load_file(tmp_path / "out" / io.WEIGHTS)) == set(
        LlamaForCausalLM(loaded.model.config).state_dict()
    ) - ({"lm_head.weight"} if tie else set())
    torch.testing.assert_close(logits(plain), logits(loaded.model), rtol=0, atol=tolerance)
    assert "subspan" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*config.json"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_every_weight_is_the_product_rounded_once(words, tmp_path, dtype):
    loaded = made(words, dtype=dtype)
    export_dense(loaded, tmp_path / "out")
    stored = load_file(tmp_path / "out" / io.WEIGHTS)
    for name, layer in quantizer.layers(loaded.model).items():
        u = layer.op
        wide = u.u.float() @ u.v.float() if isinstance(u, LowRank) else u.dense()
        assert torch.equal(stored[f"{name}.weight"], wide.to(dtype))


def by_hand(base, folder):
    """Base and adapter joined as PEFT's folder format says, into the base's weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert not (config["use_rslora"] or config["use_dora"] or config["fan_in_fan_out"])
    named = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors}
    for name in sorted(named):
        assert any(name == target or name.endswith(f".{target}") for target in config["target_modules"])
        a, b = (tensors.pop(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
        rank = config["rank_pattern"].get(name, config["r"])
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        weight = base.get_submodule(name).weight
        assert a.shape == (rank, weight.shape[1]) and b.shape == (weight.shape[0], rank) and alpha == rank
        weight.data += alpha / rank * (b @ a)
    assert tensors == {}
    return base


@pytest.mark.parametrize("tie", [True, False])
def test_base_and_adapter_together_are_the_model(words, tmp_path, tie):
    loaded = made(words, tie=tie)
    done = check_untouched(loaded, lambda: export_peft(loaded, tmp_path / "out"))
    assert done.difference <= done.tolerance
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    lowrank = {n for n, layer in quantizer.layers(loaded.model).items() if isinstance(layer.op, LowRank)}
    zero = {name.removesuffix(".weight") for name, p in base.named_parameters() if p.ndim == 2 and not p.any()}
    assert zero == lowrank and len(zero) == 10
    torch.testing.assert_close(
        logits(by_hand(base, tmp_path / "out" / "adapter")), logits(loaded.model), rtol=0, atol=1e-9
    )


def test_the_adapter_of_a_mixed_op_is_its_low_rank_part(loaded, tmp_path):
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / 8

    two = Sum([LowRank(random(32, 2), random(2, 32)), Scaled(LowRank(random(32, 3), random(3, 32)), -0.5)])
    mixed = Sum([Scaled(Dense(random(32, 32)), 3.0), two])
    chain = Product([Dense(random(32, 4)), Dense(random(4, 32))])
    ops = {"model.layers.0.self_attn.q_proj": mixed, "model.layers.1.self_attn.o_proj": chain}
    edit(loaded.model, list(ops), lambda name, old: OpLinear(ops[name], old.bias))
    export_peft(loaded, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    base = load_file(tmp_path / "out" / "base" / io.WEIGHTS)
    a, b = (tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
    assert len(a) == 5
    torch.testing.assert_close(b @ a, two.dense(), rtol=0, atol=1e-12)
    assert torch.equal(base["model.layers.0.self_attn.q_proj.weight"], mixed.ops[0].dense())
    assert torch.equal(base["model.layers.1.self_attn.o_proj.weight"], chain.dense())
    joined = by_hand(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base"), tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(joined), logits(loaded.model), rtol=0, atol=1e-9)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_peft_itself_reads_the_adapter(words, tmp_path, dtype):
    peft = importlib.import_module("peft")
    loaded = made(words, dtype=dtype)
    export_peft(loaded, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    joined = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert torch.equal(logits(joined), logits(loaded.model))
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")
    assert torch.equal(logits(auto), logits(loaded.model))
    torch.testing.assert_close(logits(auto.merge_and_unload()), logits(loaded.model), rtol=1e-4, atol=1e-4)


# ---- what is refused


@pytest.mark.parametrize("act", [export_dense, export_peft])
def test_an_export_that_reads_back_otherwise_is_not_kept(act, loaded, tmp_path, monkeypatch):
    real = io.write_tensors

    def spoiled(path, tensors):
        name = "model.layers.0.self_attn.o_proj.weight"
        real(path, {key: t + 0.01 if key == name else t for key, t in tensors.items()})

    monkeypatch.setattr(io, "write_tensors", spoiled)
    with pytest.raises(ValueError, match=r"out was not written: read back, its logits differ .* 1e-09 is allowed"):
        check_untouched(loaded, lambda: act(loaded, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_spoiled_adapter_is_not_kept(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_split", lambda op, real=export._split: (real(op)[0], _doubled(real(op)[1])))
    with pytest.raises(ValueError, match="was not written"):
        export_peft(loaded, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _doubled(factor):
    return factor and LowRank(2 * factor.u.detach(), factor.v.detach())


@pytest.mark.parametrize("act", [export_dense, export_peft])
def test_a_logit_that_is_not_a_number_is_refused(act, loaded, tmp_path):
    with torch.no_grad():
        loaded.model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"nan|NaN"):
        act(loaded, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_low_rank_layers_has_no_adapter(loaded, tmp_path):
    quantizer.densify(loaded.model)
    with pytest.raises(ValueError, match=r"no low-rank layer.*--to dense"):
        export_peft(loaded, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_merged_by_who_wants_that(loaded, tmp_path):
    edit(loaded.model, list(quantizer.layers(loaded.model)), adapt(build("lora", rank=2)))
    for act in (export_dense, export_peft):
        with pytest.raises(ValueError, match=r"adapter|low-rank"):
            act(loaded, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [lambda t: t.popitem(), lambda t: t.update(extra=torch.ones(2))])
def test_an_adapter_that_lacks_a_tensor_is_refused(change, loaded, tmp_path):
    export_peft(loaded, tmp_path / "out")
    folder = tmp_path / "out" / "adapter"
    tensors = load_file(folder / TENSORS)
    change(tensors)
    io.write_tensors(folder / TENSORS, tensors)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    with pytest.raises(ValueError, match=r"not those of its config|do not begin"):
        export.put_peft(base, folder)
