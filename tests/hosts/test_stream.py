"""Compressed from its files block by block, a model is what it becomes in memory."""

import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from subspan.budget import BlockInfluence, Energy, Err, LeastLoss, Owl, Ratio, Uniform, WeLore
from subspan.compress import Compression, OneShot, study
from subspan.edit import shapes, sites
from subspan.hosts import jobs, journal, outline, relay, shardfile, stream
from subspan.hosts.outline import MANY, Piece, Watched
from subspan.importance import BlockCosine, Outliers, Sensitivity
from subspan.metric import MEASURES, collect
from subspan.ops import LowRank, OpLinear
from subspan.plan import Plan
from subspan.walk import Blockwise, Call, Recorded, Tape

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA = {**SIZES, "num_key_value_heads": 2}
MODELS = {
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "biased": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=3)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None,
                   eos_token_id=None)),
}  # fmt: skip
IDS = torch.arange(2 * 12).reshape(2, 12) * 37 % 300
WINDOWS = torch.randint(300, (6, 1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """A kill is survived without it; only a power cut is not."""
    for place in (shardfile, journal):
        monkeypatch.setattr(place, "to_disk", lambda path: None)


def precision(kind):
    return torch.float32 if kind == "mixtral" else torch.float64  # torch has no grouped product in float64


@pytest.fixture(scope="module")
def folders(tmp_path_factory, words):
    """Folders of float64 models in shards, each made once."""
    root = tmp_path_factory.mktemp("shards")

    def once(kind):
        if not (root / kind).exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = MODELS[kind]().to(precision(kind))
                for name, p in model.named_parameters():
                    if name.endswith("bias"):
                        nn.init.normal_(p)
            model.save_pretrained(root / kind, max_shard_size="40KB")
            words.save_pretrained(root / kind)
        return root / kind

    return once


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def asked(method, metric=None, target=Err(0.5)):
    return {"method": method, "args": jobs.encode(target, metric)}


def in_memory(folder, how, *, sequential=False, select=None):
    full = jobs.opened(str(folder), dtype=str(precision(folder.name)).removeprefix("torch."), device="cpu")
    walk = Blockwise() if sequential else OneShot()
    plan, _ = jobs.do_method(full.model, how["method"], how["args"], select=select, batches=WINDOWS, walk=walk)
    return plan, logits(full.model)


def low_rank(model):
    layers = [m.op for m in model.modules() if isinstance(m, OpLinear)]
    return [op for op in layers if isinstance(op, LowRank)]


def check_same(folder, out, how, *, sequential=False, select=None):
    """The same plan with the same errors, and a folder that loads to the same numbers."""
    lean = stream.opened(folder)
    got = stream.compress(lean, out, **how, batches=WINDOWS, sequential=sequential, select=select)
    plan, expected = in_memory(folder, how, sequential=sequential, select=select)
    assert got.to_dict() == plan.to_dict()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(loaded), expected)
    assert all(op.u.mT.is_contiguous() for op in low_rank(loaded))  # as decoding wants them
    assert not out.with_name(f"{out.name}.partial").exists()
    assert all(p.is_meta for p in lean.model.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_plain_truncation_of_any_architecture_is_the_one_in_memory(kind, folders, tmp_path):
    check_same(folders(kind), tmp_path / "out", asked("svd"))


@pytest.mark.parametrize("method", ["welore", "svd_llm", "asvd", "owl", "block_influence"])
def test_every_budget_and_measure_gives_what_it_gives_in_memory(method, folders, tmp_path):
    check_same(folders("tied"), tmp_path / "out", asked(method))


@pytest.mark.parametrize(
    "kind, method", [("tied", "svd_llm"), ("biased", "lord"), ("neox", "asvd"), ("gpt2", "svd_llm")]
)
def test_calibrated_through_compressed_blocks_it_is_blockwise(kind, method, folders, tmp_path):
    check_same(folders(kind), tmp_path / "out", asked(method), sequential=True)


def test_a_head_that_is_no_block_and_a_pattern(folders, tmp_path):
    check_same(folders("biased"), tmp_path / "out", asked("svd"), select="lm_head|*.q_proj|*.1.*")


def test_a_plan_made_elsewhere_is_followed(folders, tmp_path):
    how = asked("least_loss")
    plan, expected = in_memory(folders("tied"), how)
    Plan.to_json(plan, tmp_path / "plan.json")
    lean = stream.opened(folders("tied"))
    with pytest.raises(ValueError, match=r"how much the loss feels .*--stream, or make the plan elsewhere"):
        stream.compress(lean, tmp_path / "no", **how, batches=WINDOWS)
    made = stream.compress(
        lean, tmp_path / "out", **how, plan=Plan.from_json(tmp_path / "plan.json"), batches=WINDOWS
    )
    assert made.to_dict() == plan.to_dict()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


def test_a_folder_keeps_its_precision_unless_told(folders, tmp_path, words):
    model = AutoModelForCausalLM.from_pretrained(folders("tied"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    words.save_pretrained(tmp_path / "half")
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        out = tmp_path / str(expected)
        stream.compress(stream.opened(tmp_path / "half", dtype=dtype), out, **asked("svd"))
        stored = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
        assert {t.dtype for t in stored.values()} == {expected}
        kept = stored["model.embed_tokens.weight"]
        assert torch.equal(kept, model.model.embed_tokens.weight.to(expected))


def test_what_is_finished_is_found_and_not_done_again(folders, tmp_path, monkeypatch):
    lean = stream.opened(folders("tied"))
    plan = stream.compress(lean, tmp_path / "out", **asked("svd"))
    monkeypatch.setattr(stream.Stream, "cut", lambda *_, **__: pytest.fail("done again"))
    assert stream.compress(stream.opened(folders("tied")), tmp_path / "out", **asked("svd")) == plan


# ---- parts


def test_the_hidden_states_of_a_relay_are_the_models_own(folders):
    """Blocks are filled one at a time, and what enters and leaves each is what a whole model computes."""
    lean, full = stream.opened(folders("tied")), jobs.opened(str(folders("tied")), dtype="float64", device="cpu")
    source = shardfile.Source(lean.model, shardfile.Shards(folders("tied")))
    blocks = relay.stack_of(lean.model, ["model.layers.1.mlp.up_proj"])
    assert blocks == ["model.layers.0", "model.layers.1"]
    runner = relay.record(source, blocks, WINDOWS, jobs.forward)
    assert isinstance(runner, relay.Relay) and all(p.is_meta for p in lean.model.parameters())
    with torch.no_grad():
        true = [full.model(w, output_hidden_states=True, use_cache=False).hidden_states for w in WINDOWS]
    for i, block in enumerate(blocks):
        assert all(torch.equal(x, states[i]) for x, states in zip(runner.hidden, true, strict=True))
        with source.filled(source.names(block)):
            runner.advance(i, lean.model.get_submodule(block))
    assert all(torch.equal(x, states[2]) for x, states in zip(runner.hidden, true, strict=True))


def test_a_tape_keeps_the_calls_of_a_chain_and_can_end_it():
    blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    tape, x = Tape(["0", "1"], ends=True), torch.ones(1, 2)
    tape.enter(0)(blocks[0], (x,), {})
    tape.leave(0)(blocks[0], (), y := blocks[0](x))
    with pytest.raises(Recorded):
        tape.enter(1)(blocks[1], (y,), {})
    assert [call.slot for call in tape.calls] == [0, 0]
    assert torch.equal(Call((None,), {}, 0, x).run(blocks[0]), y)


BUDGETS = [
    (Uniform(Err(0.5)), set(), []), (Uniform(Ratio(0.5)), set(), []), (WeLore(Err(0.5)), {"weight"}, []),
    (WeLore(Err(0.5), spectrum="metric"), {"metric"}, []), (Energy(0.9), {"weight"}, []),
    (Owl(Err(0.5)), set(), [Outliers()]), (BlockInfluence(Err(0.5)), set(), [BlockCosine()]),
    (LeastLoss(Err(0.5)), {"metric"}, [Sensitivity()]), (LeastLoss(Err(0.5), by="output"), {"metric"}, []),
]  # fmt: skip


@pytest.mark.parametrize("budget, kinds, scores", BUDGETS, ids=lambda value: repr(value)[:40])
def test_what_a_budget_reads_is_found_without_weights(budget, kinds, scores, folders):
    model = stream.opened(folders("tied")).model
    found = sites(model)
    lean = outline.lean_study(model, found, MEASURES["gram"])
    assert outline.wants(Compression(budget), lean, shapes(found)) == (kinds, scores)


def test_a_lean_study_with_spectra_plans_as_a_whole_one(folders):
    full = jobs.opened(str(folders("tied")), dtype="float64", device="cpu").model
    whole = study(full, MEASURES["covariance"], batches=WINDOWS, forward=jobs.forward)
    model = stream.opened(folders("tied")).model
    lean = outline.lean_study(model, sites(model), MEASURES["covariance"])
    assert (lean.bits, lean.biases, lean.other_bytes) == (whole.bits, whole.biases, whole.other_bytes)
    known = {n: {"weight": whole.spectra[n], "metric": part.s} for n, part in whole.parts.items()}
    told = outline.with_spectra(lean, known, {})
    for budget in (LeastLoss(Err(0.5), by="output"), WeLore(Ratio(0.7))):
        assert told.plan(budget) == whole.plan(budget)


def test_watched_spectra_say_that_they_are_read():
    seen = []
    spectra = Watched({"a": torch.ones(2)}, lambda: seen.append(1))
    assert len(spectra) == 1 and not seen
    assert list(spectra) == ["a"] and torch.equal(spectra["a"], torch.ones(2)) and len(seen) == 2


def test_portions_hold_everything_once_and_no_more_than_allowed():
    size = {str(i): (i * 7919) % MANY for i in range(1, 40)} | {"huge": 3 * MANY}
    found = list(outline.portions(size))
    assert [name for names in found for name in names] == list(size)
    assert all(len(names) == 1 or sum(size[n] for n in names) <= MANY for names in found)


def test_every_tensor_is_in_one_piece_and_every_site_in_one_group(folders):
    lean = stream.opened(folders("tied"))
    changed = list(sites(lean.model))
    made = outline.pieces(lean.model, changed)
    assert isinstance(made[0], Piece) and [p.where for p in made] == ["", *(f"model.layers.{i}" for i in range(3))]
    assert sorted(n for p in made for n in p.names) == sorted(set(lean.model.state_dict()) - {"lm_head.weight"})
    assert [n for p in made for names in p.groups.values() for n in names] == changed
    assert outline.place_of(changed[0], sites(lean.model)[changed[0]]) == changed[0]


def test_files_are_read_whole_and_in_pieces(folders, monkeypatch):
    shards = shardfile.Shards(folders("tied"))
    whole = {n: t for file in folders("tied").glob("*.safetensors") for n, t in load_file(file).items()}
    assert set(shards.files) == set(whole)
    monkeypatch.setattr(shardfile, "CHUNK", 800)
    for name, tensor in whole.items():
        assert torch.equal(shards.read(name), tensor)
        parts = list(shards.pieces(name))
        assert torch.equal(torch.cat(parts), tensor.flatten()) and max(p.numel() for p in parts) <= 100


def test_copies_in_another_precision_are_written_as_safetensors(folders, tmp_path):
    source = shardfile.Source(stream.opened(folders("neox"), dtype=torch.float16).model,
                              shardfile.Shards(folders("neox")))  # fmt: skip
    names = shardfile.stored_names(source.model)
    extra = {"new": torch.arange(5, dtype=torch.int64)}
    shardfile.publish_copies(tmp_path / "all.safetensors", source, names, extra)
    expected = AutoModelForCausalLM.from_pretrained(folders("neox"), dtype=torch.float16).state_dict()
    found = load_file(tmp_path / "all.safetensors")
    assert torch.equal(found.pop("new"), extra["new"]) and set(found) == set(names)
    assert all(torch.equal(t, expected[n]) for n, t in found.items())
    assert list(tmp_path.iterdir()) == [tmp_path / "all.safetensors"]
    shardfile.publish_index(tmp_path, [tmp_path / "all.safetensors"])
    index = json.loads((tmp_path / shardfile.INDEX).read_text())
    assert set(index["weight_map"]) == {*names, "new"}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in [*found.values(), extra["new"]])


def test_published_tensors_and_json_come_back_and_failures_leave_nothing(tmp_path):
    shardfile.publish_tensors(tmp_path / "t", {"a": torch.eye(3).mT}, {"x": [1, None]})
    tensors, about = shardfile.read_published(tmp_path / "t")
    assert torch.equal(tensors["a"], torch.eye(3)) and about == {"x": [1, None]}
    shardfile.publish_json(tmp_path / "j", {"x": 1})
    with pytest.raises(TypeError):
        shardfile.publish_json(tmp_path / "j", {"x": object()})
    assert json.loads((tmp_path / "j").read_text()) == {"x": 1}
    assert {p.name for p in tmp_path.iterdir()} == {"t", "j"}
    with pytest.raises(RuntimeError), shardfile.published(tmp_path / "new") as beside:
        beside.write_text("half")
        raise RuntimeError
    assert not (tmp_path / "new").exists()


def test_without_weights_ties_and_buffers_are_as_ever():
    with shardfile.weightless():
        model = MODELS["tied"]()
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.is_meta
    expected = dict(MODELS["tied"]().named_buffers())
    assert all(torch.equal(b, expected[n]) for n, b in model.named_buffers())
    assert shardfile.first_names(model)["lm_head.weight"] == "model.embed_tokens.weight"
    new = torch.ones(300, 32)
    shardfile.put(model.lm_head.weight, new)
    assert torch.equal(model.model.embed_tokens.weight, new)


def test_the_statistics_of_a_block_are_those_of_the_whole_model(folders):
    """A sum over windows in the same order: the very same bits."""
    lean, full = stream.opened(folders("tied")), jobs.opened(str(folders("tied")), dtype="float64", device="cpu")
    source = shardfile.Source(lean.model, shardfile.Shards(folders("tied")))
    runner = relay.record(source, ["model.layers.0"], WINDOWS, jobs.forward)
    name, measure = "model.layers.0.mlp.down_proj", MEASURES["gram"]
    whole = collect(full.model, WINDOWS, measure, {name: sites(full.model)[name]}, forward=jobs.forward)
    block = lean.model.get_submodule("model.layers.0")
    with source.filled(source.names("model.layers.0")):
        part = collect(block, runner.calls(0), measure, {name: sites(lean.model)[name]}, forward=runner.run)
    assert_close(part[name], whole[name], rtol=0, atol=0)


def test_nothing_that_was_filled_stays(folders):
    source = shardfile.Source(stream.opened(folders("tied")).model, shardfile.Shards(folders("tied")))
    with source.filled(source.names("model.layers.0")):
        held = weakref.ref(source.model.get_parameter("model.layers.0.mlp.up_proj.weight").untyped_storage())
    assert held() is None or held().device.type == "meta"
    assert all(p.is_meta for p in source.model.parameters())


# ---- memory

PEAK = """
import logging, sys, torch
logging.disable(logging.WARNING)
import transformers.models.llama.modeling_llama
from subspan.budget import Err
from subspan.hosts import jobs, stream

def memory(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

folder, out, method = sys.argv[1:]
torch.linalg.svd(torch.randn(64, 64))
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
lean, args = stream.opened(folder), jobs.encode(Err(0.3))
batches = jobs.calibration(lean, jobs.decode(method, args), ["@prose"], limit=4096, window=512,
                           device=torch.device("cpu"))
stream.compress(lean, out, method=method, args=args, batches=batches)
print(memory("VmHWM") - before)
"""


@pytest.mark.full
@pytest.mark.smollm2
@pytest.mark.parametrize("method", ["svd", "svd_llm"])
def test_no_more_is_held_than_a_block_its_statistics_and_one_gibibyte(method, tmp_path, smollm2):
    """The issue's bound; SmolLM2 has 540 MB of weights, 14 MB in a block, and 113 MB in the embedding."""
    smollm2.model.save_pretrained(tmp_path / "m", max_shard_size="100MB")
    smollm2.tokenizer.save_pretrained(tmp_path / "m")
    run = [sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path / "m"), str(tmp_path / "out"), method]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    block = sum(p.nbytes for p in smollm2.model.model.layers[0].parameters())
    statistics = 4 * (3 * 576**2 + 1536**2) if method == "svd_llm" else 0
    assert int(done.stdout) < block + statistics + 2**29, "half of what is allowed"
