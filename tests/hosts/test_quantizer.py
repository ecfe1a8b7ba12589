"""A compressed folder is a transformers folder: it loads, generates and saves again, with the same numbers."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from subspan.adapt import adapt
from subspan.budget import Err, Ratio
from subspan.compress import compress, study
from subspan.edit import edit
from subspan.hosts import jobs, quantizer, transformers
from subspan.hosts.export import export_dense
from subspan.hosts.folders import open_model, save_model
from subspan.hosts.transformers import LoadedModel
from subspan.io import ABOUT, WEIGHTS
from subspan.methods import build
from subspan.ops import LowRank, OpLinear

IDS = torch.arange(2 * 12).reshape(2, 12) * 37 % 300
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA = {**SIZES, "num_key_value_heads": 2, "attention_bias": True}
MODELS = {
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, tie_word_embeddings=False)),
}
# Of the hidden size 32: low-rank, above break-even so dense, full so kept.
RANKS = {"q_proj": 5, "o_proj": 20, "up_proj": 7, "down_proj": 32, "query_key_value": 6, "dense_4h_to_h": 30}


def born(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]().eval()
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p)
    return model


def cut(model, select=None):
    def ranks(_, shapes):
        return {name: min(*shape, RANKS.get(name.rpartition(".")[2], 4)) for name, shape in shapes.items()}

    taken = study(model, select=select)
    plan = taken.plan(ranks)
    taken.apply(model, plan)
    return plan


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def tokens(model):
    return model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)


@pytest.fixture(params=MODELS)
def saved(request, tmp_path, words):
    """A compressed model, and the folder that we wrote of it."""
    model = born(request.param)
    cut(model)
    save_model(tmp_path / "small", LoadedModel(model, words, "tiny"))
    return model, tmp_path / "small"


def test_from_pretrained_gives_the_same_logits_and_the_same_text(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert {type(m.op) for m in quantizer.layers(model).values()} >= {LowRank}
    assert list(quantizer.layers(loaded)) == list(quantizer.layers(model))
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(tokens(loaded), tokens(model))


def test_so_it_does_after_save_pretrained_and_so_does_our_own_loader(saved, tmp_path, words):
    model, folder = saved
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    words.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / ABOUT).exists()
    assert torch.equal(logits(open_model(tmp_path / "again").model), logits(model))
    one, two = (load_file(place / WEIGHTS) for place in (folder, tmp_path / "again"))
    assert set(one) == set(two) and all(torch.equal(t, two[name]) for name, t in one.items())


def test_it_may_be_saved_in_shards(saved, tmp_path, words):
    model, folder = saved
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size=20_000)
    words.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(open_model(tmp_path / "shards").model), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_precision_is_the_cast_of_every_tensor(saved, dtype):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    state = model.state_dict()
    assert all(torch.equal(t, state[name].to(dtype)) for name, t in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(open_model(folder, dtype=dtype).model))


def test_loaded_models_cast_and_train_like_any_other(saved, tmp_path):
    _, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.float().parameters()} == {torch.float32}
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    assert [name for name, p in loaded.named_parameters() if p.grad is None] == []
    half = AutoModelForCausalLM.from_pretrained(folder).half()
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.float16
    assert all(torch.equal(t, half.state_dict()[name]) for name, t in again.state_dict().items())


def test_dequantize_makes_plain_layers_of_it(saved, tmp_path):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).dequantize()
    assert quantizer.layers(loaded) == {}
    torch.testing.assert_close(logits(loaded), logits(model.double()), rtol=1e-9, atol=1e-9)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(plain), logits(loaded))


@pytest.mark.parametrize("method", ["lord", "afm"])
def test_a_bias_that_the_fit_adds_to_a_model_without_one_is_loaded_too(method, tmp_path, words):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "attention_bias": False})).eval()
    jobs.do_method(model, method, jobs.encode(Err(0.6)), batches=IDS[None])
    found = quantizer.layers(model)
    assert found and all(layer.bias.any() for layer in found.values())
    save_model(tmp_path / "small", LoadedModel(model, words, "tiny"))
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path / "small"), open_model(tmp_path / "small").model):
        assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="bias"):  # a plain Llama has nowhere to put it
        export_dense(open_model(tmp_path / "small"), tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_tied_weights_are_stored_once_and_tied_again(tmp_path, words):
    model = born("tied")
    cut(model)
    save_model(tmp_path / "small", LoadedModel(model, words, "tiny"))
    assert "lm_head.weight" not in load_file(tmp_path / "small" / WEIGHTS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_compressed_head_leaves_the_embedding_as_it_was(tmp_path, words):
    model = born("tied")
    generator = torch.Generator().manual_seed(1)
    head = LowRank(torch.randn(300, 9, generator=generator), torch.randn(9, 32, generator=generator))
    edit(model, "lm_head", lambda *_: OpLinear(head), tied="share")
    save_model(tmp_path / "small", LoadedModel(model, words, "tiny"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(model))
    loaded.tie_weights()
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    assert model.config.tie_word_embeddings


def test_the_body_alone_loads_under_its_own_names(saved):
    model, folder = saved
    body = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        found, wanted = body(input_ids=IDS), model.base_model(input_ids=IDS)
    assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)


def test_what_was_compressed_in_this_process_is_saved_once_attached(tmp_path):
    model = born("untied")
    cut(model, "*.q_proj|*.up_proj")
    quantizer.attach(model)
    model.save_pretrained(tmp_path / "first")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "first")), logits(model))
    cut(model, "*.v_proj")
    model.save_pretrained(tmp_path / "second")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert len(quantizer.layers(loaded)) == 6
    assert torch.equal(logits(loaded), logits(model))


def test_save_pretrained_refuses_a_model_with_an_adapter(saved, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(saved[1])
    edit(loaded, list(quantizer.layers(loaded)), adapt(build("lora", rank=2)))
    with pytest.raises(ValueError, match=r"carries an adapter; merge it first"):
        loaded.save_pretrained(tmp_path / "out")


def test_a_skeleton_has_the_compressed_layers(saved):
    model, folder = saved
    built = transformers.skeleton(folder, dtype=torch.bfloat16)
    shapes = {name: (t.shape, torch.bfloat16) for name, t in model.named_parameters()}
    assert {name: (t.shape, t.dtype) for name, t in built.named_parameters()} == shapes


def test_one_import_is_enough_and_nothing_is_unpickled(saved):
    model, folder = saved
    names = {path.suffix for path in folder.iterdir()}
    assert names <= {".json", ".safetensors", ".jinja"}
    torch.save(logits(model), folder / "wanted.pt")
    script = (
        "import sys, torch, subspan.hosts.transformers; from transformers import AutoModelForCausalLM as A\n"
        "torch.set_num_threads(1)\n"
        "ids = torch.arange(2 * 12).reshape(2, 12) * 37 % 300\n"
        "model = A.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
        "assert torch.equal(model(input_ids=ids).logits, torch.load(sys.argv[1] + '/wanted.pt'))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("tie", ["tied", "untied"])
def test_the_file_has_the_bytes_of_the_plan_to_one_percent(tie, tmp_path, words):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": tie == "tied"}
        model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    plan, _ = compress(model, build("svd", "compression", target=Ratio(0.5)))
    save_model(tmp_path / "small", LoadedModel(model, words, "tiny"))
    size = (tmp_path / "small" / WEIGHTS).stat().st_size
    assert plan.bytes[1] < 0.7 * plan.bytes[0]
    assert abs(size / plan.bytes[1] - 1) < 0.01
