"""Streaming that is killed at every moment, folders that are damaged, and jobs that are not the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from subspan.budget import Err
from subspan.hosts import jobs, journal, shardfile, stream, text
from subspan.hosts.journal import Journal, World

SIZES = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
WINDOWS = torch.randint(300, (3, 1, 20), generator=torch.Generator().manual_seed(1))
SVD = {"method": "svd", "args": jobs.encode(Err(0.5))}
GRAM = {"method": "svd_llm", "args": jobs.encode(Err(0.5)), "batches": WINDOWS}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    for place in (shardfile, journal):
        monkeypatch.setattr(place, "to_disk", lambda path: None)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).double().save_pretrained(tmp_path / "m", max_shard_size="20KB")
    words = text.train_tokenizer(text.prose()[:20_000], 300)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def run(folder, name="out", how=SVD, **more):
    return stream.compress(stream.opened(folder), folder.parent / name, **{**how, **more})


def check_refused(folder, match, how=SVD, kind=ValueError, **more):
    with pytest.raises(kind, match=match):
        run(folder, how=how, **more)
    assert not (folder.parent / "out").exists()


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# ---- killed

# Each process may do so many renames and removals and is killed before the next; one more after every four deaths.
MORTAL = """
import logging, os, shutil, signal, sys
logging.disable(logging.WARNING)
import torch
from subspan.budget import Err
from subspan.hosts import jobs, stream

folder, out, allowed, method, sequential, world = sys.argv[1:]
allowed, world = int(allowed), int(world)
torch.set_num_threads(1)
lean = stream.opened(folder)
batches = torch.randint(300, (3, 1, 20), generator=torch.Generator().manual_seed(1))
os.fsync = lambda handle: None

def mortal(operation):
    def act(*args, **kwargs):
        global allowed
        if allowed == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        allowed -= 1
        return operation(*args, **kwargs)
    return act

def job(rank, port):
    global allowed
    allowed += deaths // 4
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.replace, shutil.rmtree = mortal(os.replace), mortal(shutil.rmtree)
    stream.compress(lean, out, method=method, args=jobs.encode(Err(0.5)), batches=batches,
                    sequential=sequential == "yes")

def fork(rank, port):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        job(rank, port)
        code = 0
    finally:
        os._exit(code)

deaths = 0
while True:
    children = [fork(rank, 29700 + os.getpid() % 1000) for rank in range(world)]
    ended = [os.waitpid(child, 0)[1] for child in children]
    if not any(ended):
        break
    assert set(ended) == {signal.SIGKILL}, ended
    deaths += 1
print(deaths)
"""


def mortals(folder, out, allowed, how, *, sequential=False, world=1):
    """How many processes were killed before one came to the end."""
    words = [folder, out, allowed, how["method"], "yes" if sequential else "no", world]
    command = [sys.executable, "-W", "ignore", "-c", MORTAL, *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


def check_survives(folder, allowed, how, **more):
    out = folder.parent / "killed"
    deaths = mortals(folder, out, allowed, how, **more)
    more.pop("world", None)
    run(folder, "whole", how, **more)
    assert contents(out) == contents(folder.parent / "whole")
    assert not (folder.parent / "killed.partial").exists()
    return deaths


def test_killed_at_every_rename_it_ends_with_the_same_bytes(folder):
    assert check_survives(folder, 1, GRAM, sequential=True) > 20


@pytest.mark.full
@pytest.mark.parametrize("allowed", [1, 2, 3, 7])
@pytest.mark.parametrize("method", ["svd", "svd_llm", "welore", "owl"])
def test_killed_at_every_rename_with_every_pass(folder, allowed, method):
    how = {"method": method, "args": jobs.encode(Err(0.5)), "batches": WINDOWS}
    assert check_survives(folder, allowed, how) > 2


# ---- not the same job


def started(folder, how=SVD, **more):
    """A job that was stopped before its last step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.Stream, "close", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folder, how=how, **more)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"args": jobs.encode(Err(0.25))}, r"args: .*0\.5.* there, .*0\.25.* now"),
        ({"method": "welore"}, "method: svd there, welore now"),
        ({"select": "*.q_proj"}, r"select: None there, \*\.q_proj now"),
        ({"batches": WINDOWS}, "calibration: None there, "),
        ({"sequential": True}, "sequential: False there, True now"),
    ],
    ids=["target", "method", "select", "text", "walk"],
)
def test_an_unfinished_job_with_other_arguments_is_not_continued_unless_forced(folder, change, match):
    started(folder)
    check_refused(folder, f"out.partial holds an unfinished job .*{match}.*--force to begin anew", **change)
    forced = run(folder, force=True, **change)
    assert forced == run(folder, "fresh", **change)


def test_changed_weights_are_another_job(folder):
    started(folder)
    file = next(folder.glob("*.safetensors"))
    os.utime(file, ns=(0, 0))
    check_refused(folder, "weights: .* there, .* now")


def test_two_processes_do_not_work_in_one_place(folder):
    out = folder.parent / "out"
    facts = {"a": 1}
    first = Journal(out, facts, World())
    with pytest.raises(RuntimeError, match=r"another process works in .*out.partial; wait for it"):
        Journal(out, facts, World())
    first.close()
    second = Journal(out, facts, World())
    assert second.digest == first.digest and not second.complete
    second.clear()
    assert not second.folder.exists()


def test_what_is_not_ours_is_left_alone(folder):
    (folder.parent / "out.partial").mkdir()
    (folder.parent / "out.partial" / "mine").write_text("x")
    check_refused(folder, "in the way and no job of subspan", kind=FileExistsError)
    assert (folder.parent / "out.partial" / "mine").read_text() == "x"
    (folder.parent / "taken").mkdir()
    (folder.parent / "taken" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match=r"taken exists and is not empty; .* --force"):
        run(folder, "taken")
    assert contents(folder.parent / "taken") == {"mine": b"x"}
    run(folder, "taken", force=True)
    assert "subspan.json" in contents(folder.parent / "taken")


# ---- damaged folders


def test_a_missing_or_cut_shard_is_named(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    check_refused(folder, rf"{file.name} \(\d+ bytes\) is cut short or damaged")
    file.unlink()
    check_refused(
        folder, rf"{file.name}: .* names this shard, but it is missing; copy it again", kind=FileNotFoundError
    )


def test_an_index_that_is_wrong_is_refused(folder):
    index = folder / shardfile.INDEX
    good = json.loads(index.read_text())
    wrong = dict(good["weight_map"], ghost=next(iter(good["weight_map"].values())))
    index.write_text(json.dumps({"weight_map": wrong}))
    check_refused(folder, "says that .* holds ghost, which it does not")
    index.write_text(json.dumps({}))
    check_refused(folder, "index.json is damaged: 'weight_map'")
    index.unlink()
    check_refused(folder, "holds neither model.safetensors nor", kind=FileNotFoundError)


def rewritten(folder, change):
    for file in folder.glob("*.safetensors"):
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    held = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    (folder / shardfile.INDEX).write_text(json.dumps({"weight_map": held}))


Q = "model.layers.0.self_attn.q_proj.weight"
CHANGES = {
    "lacks tensors that the model needs .*q_proj": lambda t: {n: x for n, x in t.items() if n != Q},
    "holds tensors that the model does not know .*oth": lambda t: t | ({"oth": t[Q].clone()} if Q in t else {}),
    "of another shape than config.json says .*q_proj": lambda t: t | ({Q: t[Q][:4].clone()} if Q in t else {}),
    "the weight of .*q_proj.* holds nan": lambda t: t | ({Q: t[Q] * torch.nan} if Q in t else {}),
}


@pytest.mark.parametrize("match", CHANGES)
def test_weights_that_do_not_fit_are_refused(folder, match):
    rewritten(folder, CHANGES[match])
    check_refused(folder, match)


def test_what_cannot_be_streamed_is_refused_with_the_remedy(folder):
    for how in ({"method": "fwsvd", "args": jobs.encode(Err(0.5)), "batches": WINDOWS},):
        check_refused(folder, "reads gradients, .*leave out --stream, or choose another metric", how=how)
    check_refused(folder, "is in no numbered block.*--stream calibrates block by block", how=GRAM, select="*")
    check_refused(folder, "calibration batches .*--calibrate", how=GRAM, batches=None)
    with pytest.raises(ValueError, match=r"smollm2 lies in a package .*leave out --stream"):
        stream.opened("smollm2")


def test_an_unknown_model_type_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(ValueError, match="nonsense"):
        stream.opened(folder)


def test_a_full_disk_leaves_what_was_finished(folder, monkeypatch):
    whole = stream.publish_copies

    def full(path, source, names, finished):
        if finished:
            raise OSError(28, "No space left on device")
        whole(path, source, names, finished)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "publish_copies", full)
        check_refused(folder, "No space left", kind=OSError)
    kept = {p.name for p in Path(folder.parent, "out.partial").iterdir()}
    assert any(name.startswith("part-") for name in kept)
    assert run(folder) == run(folder, "fresh")
