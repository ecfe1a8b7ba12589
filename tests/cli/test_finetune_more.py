"""`subspan finetune` with modules that train whole and with a base of few bits: what it writes opens as it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from subspan import io
from subspan.adapt import Adapted
from subspan.hosts import folders, jobs, keep, lessons, quantizer
from subspan.hosts.peft_merge import opened_with
from subspan.hosts.peft_read import read_adapter
from subspan.hosts.score import nll
from subspan.ops import Quantized

IDS = torch.arange(40)[None] * 7 % 300


@torch.no_grad()
def said(model):
    return model(input_ids=IDS).logits


def opened(path):
    return jobs.opened(str(path), dtype="float32", device="cpu").model


def check_alike(one, two, tolerance=1e-5):
    assert_close(one, two, rtol=0, atol=tolerance * float(two.abs().max()))


@pytest.fixture(scope="module")
def begin(tiny, page):
    """A run of four steps; the place to write to, and more, is to be added."""
    return ["finetune", tiny, "--method", "lora", "--rank", 2, "--data", page, "--steps", 4, "--window", 16,
            "--validate-every", 2, "--lr", 1e-2, "--batch", 2]  # fmt: skip


@pytest.fixture(scope="module")
def whole(good, begin, tmp_path_factory):
    """The folder of a run with its head and norm, and what was printed."""
    out = tmp_path_factory.mktemp("whole") / "a"
    return out, good(*begin, "--train-also", "lm_head|model.norm", "-o", out)


@pytest.fixture(scope="module", params=[4, 8])
def few(request, good, begin, tmp_path_factory):
    """The folder of a run on a base of few bits, what was printed, and the bits."""
    out = tmp_path_factory.mktemp("few") / "a"
    return out, good(*begin, "--base-bits", request.param, "-o", out), request.param


# ---- modules that train whole


def test_the_folder_of_peft_exports_to_dense_weights_of_the_same_logits(good, whole, tmp_path):
    good("export", whole[0], "--to", "dense", "-o", tmp_path / "dense")
    check_alike(said(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), said(opened(whole[0])))


def test_the_folder_of_peft_holds_the_modules_and_opens_with_the_loss_that_was_printed(good, whole, page):
    out, told = whole
    config = json.loads((out / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == sorted(told["train_also"]) == ["lm_head", "model.norm"]
    tensors = load_file(out / "adapter_model.safetensors")
    assert tensors["base_model.model.lm_head.weight"].shape == (300, 32)
    count = sum(t.numel() for t in tensors.values())
    assert told["parameters"] == count
    notes = json.loads((out / "train.json").read_text())
    assert notes["train_also"] == told["train_also"] and notes["validation"][-1][1] == told["validation_after"]
    ids = jobs.tokens(folders.open_model(config["base_model_name_or_path"]).tokenizer, page.read_text())
    found = nll(opened(out), lessons.split(ids, 16).validation).mean().item()
    assert found == pytest.approx(told["validation_after"], rel=1e-5)
    assert good("eval", out, "--text", page, "--window", 16)["perplexity"] > 1


def test_check_and_merge_carry_the_modules(good, whole, tiny, tmp_path):
    out, _ = whole
    checked = good("adapter", "check", tiny, out)
    assert checked["tensors"]["modules_to_save"] == {"count": 2, "numbers": 300 * 32 + 32}
    done = good("adapter", "merge", tiny, out, "-o", tmp_path / "merged")
    assert done["streamed"] and done["untied"] == []
    check_alike(said(folders.open_model(tmp_path / "merged").model), said(opened(out)))
    again = good("adapter", "convert", out, "--to", "peft", "-o", tmp_path / "again")
    assert torch.equal(said(opened(again["out"])), said(opened(out)))


def test_a_tied_head_is_told_of(cli, tiny, begin, tmp_path):
    loaded = folders.open_model(tiny)
    loaded.model.config.tie_word_embeddings = True
    loaded.model.tie_weights()
    loaded.model.save_pretrained(tmp_path / "tied")
    loaded.tokenizer.save_pretrained(tmp_path / "tied")
    done = cli("finetune", tmp_path / "tied", *begin[2:], "--train-also", "lm_head", "-o", tmp_path / "a")
    assert done.code == 0, done
    told = "lm_head shared its weight with model.embed_tokens; it has its own now, and model.embed_tokens keeps"
    assert "training whole: lm_head" in done.err and told in done.err
    model = opened(tmp_path / "a")
    base = folders.open_model(tmp_path / "tied").model
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)


def test_resume_is_the_same_to_the_bit(good, begin, whole, tmp_path, monkeypatch):
    args = [*begin, "--train-also", "lm_head|model.norm", "--checkpoint-every", 1, "-o", tmp_path / "a"]
    after = keep.Keeper.after

    def stop(self, step, history):
        after(self, step, history)
        if step == 2:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(keep.Keeper, "after", stop)
        with pytest.raises(AssertionError, match="killed"):
            good(*args)
    good(*args, "--resume")
    one, two = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "a", whole[0]))
    assert one.keys() == two.keys() and all(torch.equal(t, two[key]) for key, t in one.items())


# ---- a base of few bits


def test_an_adapter_on_a_base_of_few_bits_opens_on_such_a_base(few, tiny):
    out, told, bits = few
    assert told["quantized"] == {"bits": bits, "block": 64, "dtype": "float32"}
    assert io.read_about(out)["quantized"] == told["quantized"]
    model, (with_it, _) = opened(out), opened_with(str(tiny), read_adapter(out))
    assert torch.equal(said(model), said(with_it.model))
    held = [m.base for m in model.modules() if isinstance(m, Adapted)]
    assert len(held) == 14 and all(isinstance(base.op, Quantized) for base in held)
    plain = folders.open_model(tiny).model
    quantizer.narrow(plain, bits)
    q = "model.layers.1.mlp.up_proj"
    assert torch.equal(model.get_submodule(q).base.weight, plain.get_submodule(q).weight)


def test_training_on_few_bits_is_training_on_the_matrices_they_stand_for(tiny):
    data = lessons.split(torch.arange(900) * 37 % 300, 12)
    found = []
    for wide in (False, True):
        model = folders.open_model(tiny, dtype=torch.float64).model
        quantizer.narrow(model, 4)
        if wide:
            quantizer.widen(model)
        torch.manual_seed(0)
        learns = lessons.learning(model, "dora", steps=4, rank=2)
        lessons.fit(model, learns, data, steps=4, batch=2, lr=1e-2)
        found.append(folders.added(model))
    assert found[0].keys() == found[1].keys() and len(found[0]) == 3 * 14
    for name, t in found[0].items():
        assert_close(t, found[1][name], rtol=1e-9, atol=1e-12)


def test_without_its_bits_it_is_refused_as_on_another_base(few, tmp_path):
    assert torch.equal(said(folders.open_model(few[0]).model), said(opened(few[0])))
    folder = shutil.copytree(few[0], tmp_path / "a")
    about = io.read_about(folder)
    del about["quantized"]
    io.write_about(folder, about)
    with pytest.raises(ValueError, match="was trained on other weights"):
        folders.open_model(folder)


def test_merge_writes_an_ordinary_model_of_what_the_codes_stand_for(good, few, tiny, tmp_path):
    out, _, _ = few
    done = good("adapter", "merge", tiny, out, "-o", tmp_path / "merged")
    assert not done["streamed"] and done["difference"] < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    check_alike(said(merged), said(opened(out)))
    folded = jobs.opened(str(out), dtype="float32", device="cpu", merged=True).model
    assert torch.equal(folded.lm_head.weight, merged.lm_head.weight)
    check_alike(said(folded), said(merged))


def test_it_learns_on_and_goes_on_from_a_checkpoint(good, begin, few, tmp_path):
    out, told, bits = few
    assert told["validation_after"] < told["validation_before"]
    again = good(*begin, "--base-bits", bits, "--checkpoint-every", 2, "-o", tmp_path / "a")
    one, two = (io.read_tensors(path / io.WEIGHTS) for path in (tmp_path / "a", out))
    assert again["validation_after"] == told["validation_after"]
    assert one.keys() == two.keys() and all(torch.equal(t, two[key]) for key, t in one.items())


def test_a_model_of_few_bits_is_a_folder_like_any_compressed_one(few, tiny, tmp_path):
    bits = few[2]
    loaded = folders.open_model(tiny)
    quantizer.narrow(loaded.model, bits)
    folders.save_model(tmp_path / "q", loaded)
    again = folders.open_model(tmp_path / "q")
    assert torch.equal(said(again.model), said(loaded.model))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert torch.equal(said(stock), said(loaded.model))
    held = {name: t.dtype for name, t in load_file(tmp_path / "q" / io.WEIGHTS).items()}
    assert held["model.layers.0.mlp.up_proj.op.codes"] == torch.uint8
    assert held["model.layers.0.mlp.up_proj.op.scale"] == torch.float32
    half = folders.open_model(tmp_path / "q", dtype=torch.bfloat16).model
    op = half.get_submodule("model.layers.0.mlp.up_proj").op
    assert (op.codes.dtype, op.scale.dtype) == (torch.uint8, torch.bfloat16)
    quantizer.widen(stock)
    assert_close(said(stock), said(loaded.model), rtol=0, atol=1e-6)


def test_codes_that_are_missing_are_told(tiny, tmp_path):
    loaded = folders.open_model(tiny)
    quantizer.narrow(loaded.model, 4)
    folders.save_model(tmp_path / "q", loaded)
    tensors = load_file(tmp_path / "q" / io.WEIGHTS)
    del tensors["model.layers.0.mlp.up_proj.op.codes"]
    io.write_tensors(tmp_path / "q" / io.WEIGHTS, tensors)
    with pytest.raises(ValueError, match=r"up_proj\.op\.codes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")


# ---- refusals


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--method", "adamw", "--train-also", "lm_head"], ["--train-also is for adapters", "adamw is none"]),
        (["--method", "galore", "--base-bits", "4"], ["--base-bits is for adapters", "kind optimizer"]),
        (["--method", "lora", "--base-bits", "3"], ["3 bits is not known; use 4 or 8"]),
        (["--method", "pissa", "--base-bits", "4"], ["pissa changes the base", "without --base-bits"]),
        (["--method", "lora", "--train-also", "head"], ["matches no module that can train whole"]),
    ],
)
def test_options_that_do_not_go_together(check_refused, tiny, page, args, words, tmp_path):
    line = check_refused(words, "finetune", tiny, *args, "--data", page, "--window", 16, "-o", tmp_path / "a")
    assert line and not (tmp_path / "a").exists()
