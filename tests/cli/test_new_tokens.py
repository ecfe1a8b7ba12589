"""`subspan finetune --new-tokens`: what it writes opens by name in every verb, and resumes bit for bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from subspan.cli import finetune
from subspan.hosts import folders, jobs, lessons, samples, text
from subspan.hosts.keep import Keeper
from subspan.hosts.transformers import LoadedModel
from subspan.hosts.vocabulary import NewTokens

IDS = torch.tensor([[*range(20), 300, 301]])


@torch.no_grad()
def said(model):
    return model(input_ids=IDS).logits


def opened(path, **given):
    return jobs.opened(str(path), dtype="float32", device="cpu", **given)


def check_alike(one, two, tolerance=1e-5):
    assert_close(one, two, rtol=0, atol=tolerance * float(two.abs().max()))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of prompts whose answers are thought about."""
    file = tmp_path_factory.mktemp("rows") / "data.jsonl"
    found = [{"prompt": f"{i}+{i}?", "completion": f"<think>{i}, {i}</think>{2 * i}"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


@pytest.fixture(scope="module")
def begin(tiny, rows):
    """A run of four steps; the place to write to, and more, is to be added."""
    return ["finetune", tiny, "--method", "lora", "--rank", 2, "--data", rows, "--steps", 4, "--lr", 1e-2,
            "--validate-every", 2, "--batch", 2, "--new-tokens", "<think>,</think>"]  # fmt: skip


@pytest.fixture(scope="module")
def made(good, begin, tmp_path_factory):
    """The folder of a run, and what was printed."""
    out = tmp_path_factory.mktemp("made") / "a"
    return out, good(*begin, "-o", out)


def test_the_run_says_what_it_did(made, cli, begin, tiny, page, tmp_path):
    out, printed = made
    assert printed["new_tokens"] == ["<think>", "</think>"] and "train_also" not in printed
    assert printed["validation_after"] < printed["validation_before"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [300, 301], "lm_head": [300, 301]}
    assert text.encode(opened(out).tokenizer, "<think>").tolist() == [300]
    again = [page if arg == begin[7] else arg for arg in begin]
    done = cli(*again, "--window", 16, "-o", tmp_path / "b")
    told = " ".join(done.err.split())
    assert done.code == 0, done
    assert "new tokens: <think> (300), </think> (301); the vocabulary grew by 2 rows" in told
    assert "<think> is nowhere in the training data" in told


def test_every_verb_opens_it(made, good, tiny, rows, tmp_path):
    out, _ = made
    model = opened(out).model
    found = good("adapter", "check", tiny, out)
    assert found["tensors"]["trainable_tokens_delta"] == {"count": 2, "numbers": 2 * 2 * 32}
    assert good("adapter", "diff", out, out)["same"]
    merged = good("adapter", "merge", tiny, out, "-o", tmp_path / "m")
    assert merged["difference"] <= merged["tolerance"] and merged["streamed"] and merged["untied"] == []
    check_alike(said(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), said(model))
    assert text.encode(folders.open_model(tmp_path / "m").tokenizer, "</think>").tolist() == [301]
    scores = [good("eval", path, "--text", rows, "--windows", 2)["nll"] for path in (out, tmp_path / "m")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    good("adapter", "convert", out, "--to", "peft", "-o", tmp_path / "p")
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "p"))
    assert one.keys() == two.keys()
    for key, t in one.items():
        check_alike(two[key], t, 1e-6)
    assert text.encode(opened(tmp_path / "p").tokenizer, "<think>").tolist() == [300]
    good("export", out, "--to", "dense", "-o", tmp_path / "e")
    check_alike(said(folders.open_model(tmp_path / "e").model), said(model))


def test_a_run_that_dies_goes_on_bit_for_bit(made, cli, good, begin, tmp_path):
    out, _ = made
    after = Keeper.after

    def die(self, step, history):
        after(self, step, history)
        if step == 3:
            raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, "after", die)
        assert cli(*begin, "--checkpoint-every", 1, "-o", tmp_path / "a").code != 0
    shutil.copytree(tmp_path / "a.partial", tmp_path / "b.partial")
    other = [arg.replace("</think>", "<stop>") if isinstance(arg, str) else arg for arg in begin]
    refused = cli(*other, "--resume", "-o", tmp_path / "b")
    assert refused.code == 1 and "new_tokens" in refused.err
    good(*begin, "--resume", "-o", tmp_path / "a")
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "a"))
    assert one.keys() == two.keys() and all(torch.equal(t, two[key]) for key, t in one.items())
    histories = [json.loads((folder / "train.json").read_text()) for folder in (out, tmp_path / "a")]
    assert histories[0]["train"] == histories[1]["train"] and histories[0]["best"] == histories[1]["best"]


def test_beside_a_module_that_trains_whole_on_a_base_of_few_bits(good, begin, tiny, tmp_path):
    found = good(*begin, "--train-also", "model.norm", "--base-bits", 8, "-o", tmp_path / "a")
    assert (found["train_also"], found["quantized"]["bits"]) == (["model.norm"], 8)
    model = opened(tmp_path / "a").model
    folded = opened(tmp_path / "a", merged=True).model
    check_alike(said(folded), said(model))
    assert folded.lm_head.weight.shape == (302, 32)
    good("adapter", "merge", tiny, tmp_path / "a", "-o", tmp_path / "m")
    check_alike(said(LlamaForCausalLM.from_pretrained(tmp_path / "m")), said(model))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--new-tokens", "e"], ["'e' is already a token"]),
        (["--new-tokens", "<a>,"], ["new token 2 of ['<a>', ''] is empty"]),
        (["--new-tokens", "<a>,<a>"], ["'<a>' is listed twice"]),
        (["--method", "adamw"], ["--new-tokens is for adapters, and adamw is none"]),
        (["--method", "lora_xs"], ["is no LoRA"]),
        (["--train-also", "lm_head"], ["lm_head carries an adapter and cannot train whole too"]),
        (["--select", "*"], ["lm_head carries an adapter, and rows of tokens stand alone; leave it out with"]),
    ],
)
def test_what_is_refused(check_refused, begin, more, words, tmp_path):
    args = [*begin, *more, "-o", tmp_path / "a"]
    check_refused(words, *args)
    assert not (tmp_path / "a").exists()


def test_the_parts_of_the_verb(tiny, begin, capsys):
    loaded = folders.open_model(tiny)
    assert finetune.enlarged(loaded, None) == (loaded, None)
    larger, new = finetune.enlarged(loaded, " <a> ,<b>")
    assert isinstance(larger, LoadedModel) and new.names == ("<a>", "<b>")
    found = finetune.material(larger, [str(begin[7])], None, NewTokens(("<a>",), (300,), ((1,),), 0))
    assert isinstance(found, samples.Rows) and "<a> is nowhere" in capsys.readouterr().err
    alike = finetune.content(larger, [str(begin[7])], None)
    assert finetune.digest(alike) == finetune.digest(found)
    assert lessons.default_lr("lora", scratch=False) == 1e-3
