"""Whatever is wrong is said in one line that names it and the way out; OUT is whole or not there at all."""

import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from subspan import io
from subspan.cli import finetune
from subspan.hosts import jobs, lessons

SVD = ["--method", "svd", "--err", 0.5]
FEW = ["--steps", 2, "--batch", 2, "--window", 32]
# Writes half of the weights, says so, and takes its time over the rest.
SLOW = """
import sys, time
from pathlib import Path
from subspan import io
from subspan.cli import main

def slow(tensors, path, metadata, real=io.save_file):
    real(tensors, path, metadata=metadata)
    data = Path(path).read_bytes()
    with open(path, "wb") as file:
        for at in range(0, len(data), len(data) // 20):
            file.write(data[at : at + len(data) // 20])
            file.flush()
            print("writing", flush=True)
            time.sleep(0.05)

io.save_file = slow
main(sys.argv[1:])
"""


@pytest.fixture
def copy(tiny, tmp_path):
    """The tiny model, to be damaged."""
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def full(monkeypatch):
    """No space is left for weights."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io, "save_file", refuse)


def writers(tiny, page):
    """Every verb that writes OUT, quick to run."""
    return {
        "inspect": ["inspect", tiny],
        "plan": ["plan", tiny, *SVD],
        "compress": ["compress", tiny, *SVD],
        "train": ["train", "--data", page, *FEW, "--vocab", 300, "--hidden", 32, "--layers", 1],
        "lora": ["finetune", tiny, "--method", "lora", "--data", page, *FEW],
        "adamw": ["finetune", tiny, "--method", "adamw", "--data", page, *FEW],
    }


WRITERS = list(writers("", ""))


def test_folders_that_are_no_models(check_refused, copy, tmp_path):
    check_refused(
        [str(tmp_path / "none"), "no such folder", "smollm2"], "eval", tmp_path / "none", "--text", "@prose"
    )
    (copy / "config.json").unlink()
    check_refused([str(copy), "no config.json", "save_pretrained"], "inspect", copy)


def test_a_safetensors_file_cut_in_half(check_refused, copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    check_refused([str(file), "cut short", "copy it again"], "plan", copy, *SVD)


def test_a_compressed_folder_cut_in_half(check_refused, good, tiny, tmp_path):
    good("compress", tiny, *SVD, "-o", tmp_path / "small")
    file = tmp_path / "small" / io.WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    check_refused([str(file), "cut short", "save it again"], "eval", tmp_path / "small", "--text", "@prose")


def test_a_weight_that_is_not_a_number(check_refused, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    check_refused(
        ["model.layers.1.mlp.up_proj.weight holds 1 of", "NaN", "save the weights again"], "inspect", copy
    )


@pytest.mark.parametrize("verb", ["inspect", "plan", "compress", "finetune"])
def test_a_pattern_that_matches_nothing_lists_what_there_is(verb, check_refused, tiny, page, tmp_path):
    more = {
        "inspect": [], "plan": SVD, "compress": [*SVD, "-o", tmp_path / "a"],
        "finetune": ["--method", "lora", "--data", page, "-o", tmp_path / "a"],
    }[verb]  # fmt: skip
    words = ["'*.query' matches no nn.Linear", "model.layers.0.self_attn.q_proj", "(15 in all)"]
    check_refused(words, verb, tiny, "--select", "*.query", *more)
    assert not (tmp_path / "a").exists()


def test_a_model_without_linear_layers(check_refused, good, tiny, tmp_path):
    good("compress", tiny, "--method", "svd", "--ratio", 0.5, "--select", "*", "-o", tmp_path / "all")
    words = ["LlamaForCausalLM has no nn.Linear", "its layers are: Embedding, LlamaRMSNorm, LowRank"]
    check_refused(words, "inspect", tmp_path / "all")
    check_refused(words, "plan", tmp_path / "all", *SVD)


@pytest.mark.parametrize(
    "given, words",
    [
        (["--ratio", 1.5], ["ratio 1.5 is outside (0, 1]", "e.g. 0.8"]),
        (["--err", -0.1], ["reduction -0.1 is outside [0, 1)", "0.3 removes"]),
        (["--energy", 0], ["energy 0.0 is outside (0, 1]", "e.g. 0.95"]),
        (["--err", 0.5, "--metric", "taxicab"], ["unknown metric 'taxicab'", "plain, absmean, gram"]),
    ],
)
def test_sizes_out_of_range(given, words, check_refused, tiny):
    check_refused(words, "plan", tiny, "--method", "svd", *given)


@pytest.mark.parametrize(
    "given, words",
    [
        (["lora", "--rank", 33], ["rank 33 is outside", "min(32, 32)", "choose one inside"]),
        (["lora", "--rank", "1.0"], ["rank 1.0 is a share", "lora takes a count, such as 8"]),
        (["lora", "--rank", "much"], ["rank 'much' is neither a count", "0.25"]),
        (["adamw", "--rank", "4"], ["adamw takes no 'rank'", "it takes: b1"]),
        (["galore", "--alpha", "4"], ["galore takes no 'alpha'", "it takes: rank"]),
        (["galore", "--select", "*.q_proj"], ["--select", "galore is none", "leave it out"]),
        (["welore_peft"], ["no low-rank layer", "compress it first"]),
        (["svd"], ["svd compresses", "subspan compress MODEL --method svd"]),
        (["magic"], ["unknown method 'magic'", "lora"]),
        (["lora", "--window", 65], ["--window 65", "64 positions", "use at most 64"]),
        (["lora", "--lr", 0], ["did not move", "learning rate"]),
    ],
)
def test_finetuning_that_cannot_be(given, words, check_refused, tiny, page, tmp_path):
    check_refused(words, "finetune", tiny, "--data", page, *FEW, "-o", tmp_path / "a", "--method", *given)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_lost(check_refused, tiny, page, tmp_path):
    args = ["--method", "adamw", "--data", page, "--lr", 1e30, *FEW, "--steps", 4, "--dtype", "float64"]
    check_refused(
        ["adamw: the loss is", "at step", "lower the learning rate"], "finetune", tiny, *args, "-o", tmp_path / "a"
    )


def test_sizes_of_a_new_model_that_do_not_fit(check_refused, page, tmp_path):
    args = ["train", "--data", page, "-o", tmp_path / "a"]
    check_refused(["hidden 30", "4 heads", "use e.g. 24"], *args, "--hidden", 30)
    check_refused(["unknown optimizer method 'lora'", "fira"], *args, "--optimizer", "lora")


def test_a_plan_for_another_model(check_refused, good, tiny, page, tmp_path):
    good("plan", tiny, *SVD, "-o", tmp_path / "plan.json")
    args = ["--steps", 1, "--batch", 2, "--window", 32, "--vocab", 300, "--heads", 2, "--data", page]
    good("train", *args, "--hidden", 16, "--layers", 2, "-o", tmp_path / "narrow")
    good("train", *args, "--hidden", 32, "--layers", 1, "-o", tmp_path / "flat")
    words = ["the plan says shape (32, 32), the model has (16, 16)", "plan again"]
    check_refused(words, "compress", tmp_path / "narrow", "--plan", tmp_path / "plan.json", "-o", tmp_path / "a")
    words = ["7 sites this model lacks", "model.layers.1.self_attn.q_proj", "made for another model"]
    check_refused(words, "compress", tmp_path / "flat", "--plan", tmp_path / "plan.json", "-o", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_plans_that_are_none(check_refused, good, tiny, tmp_path):
    file = tmp_path / "plan.json"
    go = ["compress", tiny, "--plan", file, "-o", tmp_path / "a"]
    check_refused([str(file), "no such plan", "subspan plan MODEL"], *go)
    file.write_text("{")
    check_refused([str(file), "is not json"], *go)
    file.write_text("{}")
    check_refused([str(file), "not a subspan plan", "make one with"], *go)
    plan = good("plan", tiny, *SVD)
    for broken in ({"target": {"err": 0.5, "ratio": 0.5}}, {"target": {"luck": 1}}, {"err": 0.5}, {"target": 0.5}):
        file.write_text(json.dumps({**plan, "args": broken}))
        check_refused(["do not describe a compression", "{'target': {'err': 0.5}}"], *go)


def test_texts_that_will_not_do(check_refused, tiny, tmp_path):
    file = tmp_path / "text.txt"
    score = ["eval", tiny, "--text", file]
    check_refused([str(file), "no such text file", "@prose"], *score)
    file.write_text("  \n")
    check_refused([str(file), "is empty", "give a file with text"], *score)
    file.write_bytes("Grüße".encode("latin-1"))
    check_refused([str(file), "not UTF-8", "convert the file"], *score)
    file.write_text("Only a few words.")
    check_refused(["the text has", "1 window(s) of length 64 need 64", "give a longer text"], *score)
    data = ["--method", "svd_llm", "--err", 0.5, "--calibrate", file]
    check_refused(["1 window(s) of length 64 need 64"], "plan", tiny, *data)
    file.write_text("Only a few words. " * 20)
    tune = ["finetune", tiny, "--method", "lora", "--data", file, "-o", tmp_path / "a"]
    check_refused(["1 window(s) of length 64 need 64", "give a longer text"], *tune)
    assert not (tmp_path / "a").exists()


def test_methods_that_need_data_say_how_to_give_some(check_refused, cli, tiny, tmp_path):
    words = ["asvd reads what matters off data", "--calibrate FILE"]
    check_refused(words, "plan", tiny, "--method", "asvd", "--err", 0.5)
    check_refused(words, "compress", tiny, "--method", "asvd", "--err", 0.5, "-o", tmp_path / "a")
    assert "--calibrate is not used" in cli("plan", tiny, *SVD, "--calibrate", "@prose").err


def test_devices_that_are_not_there(check_refused, tiny):
    check_refused(["device 'abacus' cannot be used", "use 'cpu'"], "inspect", tiny, "--device", "abacus")


def test_a_second_adapter_is_refused(check_refused, good, tiny, page, tmp_path):
    tune = ["--method", "lora", "--data", page, *FEW]
    good("finetune", tiny, *tune, "-o", tmp_path / "a")
    words = ["already carries an adapter", "subspan adapter merge BASE ADAPTER -o MERGED"]
    check_refused(words, "finetune", tmp_path / "a", *tune, "-o", tmp_path / "b")


def test_an_adapter_whose_base_has_changed(check_refused, good, copy, page, tmp_path):
    good("finetune", copy, "--method", "lora", "--data", page, *FEW, "-o", tmp_path / "a")
    tensors = {name: t + 1 for name, t in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    check_refused(
        ["trained on other weights", str(copy), "give it the base"], "eval", tmp_path / "a", "--text", "@prose"
    )


@pytest.mark.parametrize(
    "args",
    [
        ["plan", "x", "--method", "svd"],
        ["plan", "x", "--method", "svd", "--err", "0.5", "--ratio", "0.5"],
        ["compress", "x", "-o", "y"],
        ["compress", "x", "-o", "y", "--method", "svd"],
        ["compress", "x", "-o", "y", "--plan", "p", "--err", "0.5"],
        ["compress", "x", "--method", "svd", "--err", "0.5"],
        ["eval", "x"],
        ["eval", "x", "--text", "@prose", "--dtype", "int3"],
        ["train", "-o", "y", "--steps", "0"],
        ["teleport"],
    ],
)
def test_wrong_usage_is_code_2(args, cli):
    done = cli(*args)
    assert (done.code, done.out) == (2, "")
    assert "Usage: subspan" in done.err


@pytest.mark.parametrize("verb", WRITERS)
def test_what_is_there_stays_without_force(verb, check_refused, tiny, page, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "opened", None)  # no work is done before the refusal
    monkeypatch.setattr(lessons, "newborn", None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    check_refused([str(out), "not empty", "--force"], *writers(tiny, page)[verb], "-o", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.read_text() for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("verb", [verb for verb in WRITERS if verb != "plan"])
def test_force_replaces_all_of_it(verb, cli, tiny, page, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    done = cli(*writers(tiny, page)[verb], "-o", out, "--force")
    assert done.code == 0, done
    assert not (out / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_never_deletes_what_is_read_nor_where_one_stands(check_refused, copy, tmp_path, monkeypatch):
    inner = copy / "inner"
    inner.mkdir()
    for out in (copy, tmp_path):
        check_refused(
            [f"replacing {out} would delete", "choose another"], "compress", copy, *SVD, "-o", out, "--force"
        )
    monkeypatch.chdir(inner)
    check_refused([f"would delete {inner}"], "train", "-o", copy, "--force")
    assert (copy / "config.json").exists()


def test_a_plan_is_a_file(check_refused, good, tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    check_refused([f"{tmp_path / 'empty'} is a folder", "plan.json"], "plan", tiny, *SVD, "-o", tmp_path / "empty")
    good("plan", tiny, *SVD, "-o", tmp_path / "plan.json")
    check_refused(["plan.json exists", "--force"], "plan", tiny, *SVD, "-o", tmp_path / "plan.json")
    good("plan", tiny, "--method", "svd", "--err", 0.2, "-o", tmp_path / "plan.json", "--force")
    assert json.loads((tmp_path / "plan.json").read_text())["args"] == {"target": {"err": 0.2}}


@pytest.mark.parametrize("verb", WRITERS)
def test_a_place_that_cannot_be_written(verb, check_refused, tiny, page, tmp_path, monkeypatch):
    # Root may write anywhere, so the answer of the system is replaced.
    monkeypatch.setattr(jobs.os, "access", lambda path, mode: False)
    out = tmp_path / "deep" / "out"
    check_refused([f"cannot write to {tmp_path}", "choose an output"], *writers(tiny, page)[verb], "-o", out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["compress", "train", "lora", "adamw"])
def test_a_full_disk_leaves_nothing(verb, check_refused, full, tiny, page, tmp_path):
    check_refused(
        ["disk full", str(tmp_path / "out"), "free space"], *writers(tiny, page)[verb], "-o", tmp_path / "out"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_force_would_have_replaced(check_refused, full, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    check_refused(["disk full"], "compress", tiny, *SVD, "-o", tmp_path / "out", "--force")
    assert [path.read_text() for path in tmp_path.rglob("*.txt")] == ["old"]


def test_a_full_disk_leaves_no_half_plan(check_refused, tiny, tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs.Path, "write_text", refuse)
    check_refused(
        [str(tmp_path / "plan.json"), "No space left", "free space"],
        "plan",
        tiny,
        *SVD,
        "-o",
        tmp_path / "plan.json",
    )
    assert list(tmp_path.iterdir()) == []


def test_killed_while_writing_leaves_no_model(process, good, tiny, tmp_path):
    out = tmp_path / "out"
    child = process(SLOW, "compress", tiny, *SVD, "-o", out)
    assert child.stdout.readline() == "writing\n"
    time.sleep(random.Random().uniform(0, 0.5))
    assert not out.exists()
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    good("compress", tiny, *SVD, "-o", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted(cli, tiny, page, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune.lessons, "fit", stop)
    args = ["finetune", tiny, "--method", "lora", "--data", page, "-o", tmp_path / "a"]
    done = cli(*args)
    assert done.code == 130
    assert done.err.strip().endswith(f"error: interrupted; nothing was written to {tmp_path / 'a'}")
    assert cli(*args, "--json").json == {"error": f"interrupted; nothing was written to {tmp_path / 'a'}"}
    assert list(tmp_path.iterdir()) == []


def test_errors_as_json_and_as_tracebacks(cli, tiny, monkeypatch):
    done = cli("plan", tiny, "--method", "svd", "--ratio", 2, "--json")
    assert (done.code, done.err) == (1, "")
    assert done.json["error"].startswith("ratio 2.0 is outside (0, 1]")
    with pytest.raises(ValueError, match=r"ratio 2\.0"):
        cli("plan", tiny, "--method", "svd", "--ratio", 2, "--debug")
    monkeypatch.setenv("SUBSPAN_DEBUG", "1")
    with pytest.raises(ValueError, match=r"ratio 2\.0"):
        cli("plan", tiny, "--method", "svd", "--ratio", 2)


def test_a_fault_of_ours_is_not_dressed_up_as_an_error_of_the_user(cli, tiny, monkeypatch):
    monkeypatch.setattr(jobs, "opened", lambda *_, **__: torch.missing)
    with pytest.raises(AttributeError, match="missing"):
        cli("inspect", tiny)
