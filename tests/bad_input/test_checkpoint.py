"""Processes that are killed, files that are cut or swapped, checkpoints of something else, runs without end."""

import gc
import inspect
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

import subspan.methods.optimizers  # noqa: F401  (registers the presets)
from subspan import io
from subspan.methods import methods
from subspan.optim import Adam, Every, Optim, Projected, Span, checkpoint

FILES = (io.WEIGHTS, checkpoint.STATE, io.ABOUT)


def preset(name, **given):
    build = methods("optimizer")[name].build
    takes = inspect.signature(build).parameters
    settings = {"rank": 3, "every": 4, "layers": 1} | given
    return build(**{key: value for key, value in settings.items() if key in takes})


def net(width=7, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 6)).to(dtype)


def optimizer(model, rule=None, **settings):
    return Optim(model.named_parameters(), rule or preset("galore"), **{"lr": 1e-2} | settings)


def train(model, opt, steps):
    for t in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(t)).to(model[0].weight.dtype)

        def loss(x=x):
            return model(x).square().mean()

        if opt.recipe.source.backward:
            opt.zero_grad()
            loss().backward()
            opt.step()
        else:
            opt.step(loss)


def ran(steps, rule=None):
    model = net()
    opt = optimizer(model, rule)
    train(model, opt, range(steps))
    return model, opt


def everything(model, opt):
    """All that loading could change, copied."""
    state = {key: x.clone() for key, x in {**model.state_dict(), **checkpoint.flat(opt)}.items()}
    return state, [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]


def check_refused(folder, model, opt, match, error=ValueError):
    """Loading fails with these words, and weights, state and groups are what they were."""
    state, groups = everything(model, opt)
    with pytest.raises(error, match=match):
        checkpoint.load(folder, model, opt)
    after, after_groups = everything(model, opt)
    assert after.keys() == state.keys() and all(torch.equal(x, state[key]) for key, x in after.items())
    assert after_groups == groups


@pytest.fixture
def saved(tmp_path):
    """A run of six steps, in tmp_path / "run"."""
    checkpoint.save(tmp_path / "run", *ran(6))
    return tmp_path / "run"


# ---- killed

SAVING = """
import itertools, os, sys, torch
from subspan.methods.optimizers import galore
from subspan.optim import Optim, checkpoint

torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
opt = Optim(model.named_parameters(), galore(rank=4), lr=1e-2, unmoved="allow")
opt.state_dict()  # which imports half of torch, once and not in every fork

def saved_for_ever(i):
    for i in itertools.count(i):
        for p in model.parameters():
            p.data.fill_(i)
        os.write(1, f"begins {os.getpid()} {i}\\n".encode())  # whole or not at all
        checkpoint.save(sys.argv[1], model, opt, extra={"i": i})

for line in sys.stdin:
    child = os.fork()
    if not child:
        saved_for_ever(int(line))
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def killed(server, first, wait):
    """Let a fork of the server save `first` and what follows; kill it some time later. The last that it began."""
    print(first, file=server.stdin, flush=True)
    line = server.stdout.readline()
    while line.split()[2] != str(first + 1):  # it has saved once
        line = server.stdout.readline()
    time.sleep(wait)
    os.kill(int(line.split()[1]), signal.SIGKILL)
    while line != "ended\n":
        last, line = int(line.split()[2]), server.stdout.readline()
    return last


def check_whole(folder, begun):
    """The newest checkpoint loads, is of one moment, and is the one that was last begun, or the one before."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    opt = Optim(model.named_parameters(), preset("galore", rank=4, every=200), lr=1.0)
    i = checkpoint.load(folder, model, opt)["i"]
    assert {x for p in model.parameters() for x in p.detach().unique().tolist()} == {float(i)}
    assert opt.param_groups[0]["lr"] == 1e-2
    assert i in (begun - 1, begun)
    return i == begun


def test_killed_at_any_moment_the_last_checkpoint_or_the_next_one_loads(tmp_path):
    """Two dozen processes, each killed at a random moment of its saving."""
    draw, pipe = random.Random(0), subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-c", SAVING, str(tmp_path)]
    with subprocess.Popen(start, stdin=pipe, stdout=pipe, text=True, env=environment) as server:
        newer = [check_whole(tmp_path, killed(server, 1000 * n, draw.uniform(0, 0.02))) for n in range(1, 25)]
        server.stdin.close()
    assert len(newer) == 24 and not all(newer), "some were killed before their checkpoint had its name"
    model = net()
    checkpoint.save(tmp_path, model, optimizer(model))
    assert len(list(tmp_path.iterdir())) == 1, "what was left by killed processes is gone"


STEPS = (
    (Path, "mkdir"),
    (io, "save_file"),
    (Path, "write_text"),
    (os, "fsync"),
    (Path, "rename"),
    (shutil, "rmtree"),
)


@pytest.mark.parametrize("keep", [1, 2])
def test_stopped_between_any_two_operations_on_files_a_whole_checkpoint_loads(tmp_path, monkeypatch, keep):
    """Every point at which a process can end, in order: after the n-th operation nothing more happens."""

    class Ended(BaseException):
        pass

    left = [0]

    def counted(operation):
        def run(*args, **kwargs):
            if left[0] == 0:
                raise Ended
            left[0] -= 1
            return operation(*args, **kwargs)

        return run

    model, opt = ran(2)
    checkpoint.save(tmp_path / "from", model, opt, extra={"i": 0})
    checkpoint.save(tmp_path / "from", model, opt, extra={"i": 1}, keep=keep)
    for place, name in STEPS:
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    seen, ended = [], True
    for allowed in range(60):
        left[0] = -1
        folder = tmp_path / f"to{allowed}"
        shutil.copytree(tmp_path / "from", folder)
        left[0], ended = allowed, False
        try:
            checkpoint.save(folder, model, opt, extra={"i": 2}, keep=keep)
        except Ended:
            ended = True
        left[0] = -1
        seen.append(checkpoint.load(folder, model, opt)["i"])
        checkpoint.save(folder, model, opt, extra={"i": 3}, keep=keep)
        assert checkpoint.load(folder, model, opt)["i"] == 3
        assert len(list(folder.iterdir())) == keep
        if not ended:
            break
    assert not ended and len(seen) > 10
    assert seen == sorted(seen) and set(seen) == {1, 2}, "first the old one, from one rename on the new one"


def test_a_full_disk_keeps_the_checkpoint_that_is_there(saved, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = checkpoint.newest(saved)
    monkeypatch.setattr(io, "save_file", full)
    with pytest.raises(OSError, match=r"disk full while writing .*free space"):
        checkpoint.save(saved, *ran(1))
    assert list(saved.iterdir()) == [before]


# ---- damaged


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_anywhere_is_named(saved, name):
    path = checkpoint.newest(saved) / name
    content, (model, opt) = path.read_bytes(), ran(2)
    lengths = {0, 1, 7, 8, 9, 100, len(content) // 3, len(content) // 2, len(content) - 9, len(content) - 2}
    for length in lengths:
        path.write_bytes(content[:length])
        check_refused(saved, model, opt, rf"{re.escape(name)} is (damaged|not the file)")
    path.write_bytes(content)
    checkpoint.load(saved, model, opt)


@pytest.mark.parametrize("name", FILES[:2])
def test_one_changed_bit_is_found(saved, name):
    path = checkpoint.newest(saved) / name
    content, (model, opt) = path.read_bytes(), ran(2)
    for at in (len(content) - 1, len(content) * 2 // 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        check_refused(saved, model, opt, rf"{re.escape(name)} is (damaged|not the file)")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_found(saved, name):
    """Names and shapes agree; only the step is another."""
    other = checkpoint.save(saved.parent / "later", *ran(7))
    shutil.copy(other / name, checkpoint.newest(saved) / name)
    check_refused(saved, *ran(2), rf"\.safetensors is not the file that {io.ABOUT} beside it was written with")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved, name):
    (checkpoint.newest(saved) / name).unlink()
    message = "holds no checkpoint; give the folder" if name == io.ABOUT else rf"{re.escape(name)} does not exist"
    check_refused(saved, *ran(2), message, FileNotFoundError)


def test_a_folder_of_something_else_is_refused(tmp_path):
    model, opt = ran(1)
    check_refused(tmp_path / "nowhere", model, opt, "nowhere holds no checkpoint", FileNotFoundError)
    with io.staged(tmp_path / "model") as folder:
        io.save(folder, model)
    check_refused(tmp_path / "model", model, opt, "is a saved model, not a checkpoint; use subspan.io.load")
    with io.staged(tmp_path / "half") as folder:
        io.save(folder, model, {"kind": "checkpoint"})
    check_refused(tmp_path / "half", model, opt, r"subspan\.json is damaged: it has no optimizer, groups")


def test_a_newer_format_is_refused(saved):
    path = checkpoint.newest(saved) / io.ABOUT
    path.write_text(path.read_text().replace('"format": 1,', '"format": 99,'))
    check_refused(saved, *ran(2), "format 99, .*upgrade subspan")


# ---- of something else


@pytest.mark.parametrize(
    "rule, message",
    [
        (preset("galore", rank=2), r"\(rule\.subspace\.rank: 3 saved, 2 here\)"),
        (preset("galore", every=5), r"\(rule\.refresh\.every: 4 saved, 5 here\)"),
        (preset("fira"), r"\(rule\.residual: Drop saved, NormScale here\)"),
        (preset("galore", rule=Adam(b2=0.9)), r"rule\.rule\.b2: 0\.999 saved, 0\.9 here; .*eps_on"),
        (Adam(), r"\(rule: Projected saved, Adam here\)"),
        (preset("muon"), r"\(rule: Projected saved, Chain here\)"),
        (preset("mezo"), r"rule: Projected saved, Sgd here; source: Backprop saved, Spsa here; other: Adam"),
    ],
    ids=["rank", "every", "residual", "inner", "adam", "muon", "mezo"],
)
def test_another_method_is_refused_by_what_differs(saved, rule, message):
    model, opt = ran(2, rule)
    check_refused(
        saved, model, opt, f"was saved by another optimizer .*{message}.*build Optim with the saved settings"
    )


def test_another_seed_or_rounding_is_refused(saved):
    model = net()
    check_refused(saved, model, optimizer(model, seed=1), r"\(seed: 0 saved, 1 here\)")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: net(8), r"0\.weight: float32 \(7, 5\) saved, float32 \(8, 5\) here; 0\.bias: .*; 2\.weight"),
        (lambda: net()[:1], r"\((2\.weight|2\.bias) unexpected; (2\.weight|2\.bias) unexpected\)"),
        (lambda: net().append(nn.Linear(6, 6)), r"\(3\.weight missing; 3\.bias missing\)"),
        (lambda: net(dtype=torch.bfloat16), r"0\.weight: float32 \(7, 5\) saved, bfloat16 \(7, 5\) here"),
        (lambda: nn.Sequential(*(nn.Linear(5, 5) for _ in range(9))), r"; and 13 more\)"),
    ],
    ids=["wider", "shorter", "longer", "precision", "deeper"],
)
def test_another_model_is_refused_by_what_differs(saved, make, message):
    model = make()
    check_refused(saved, model, optimizer(model), f"is of another model .*{message}")


def test_other_parameters_of_the_same_model_are_refused(saved):
    model = net()
    few = Optim(list(model.named_parameters())[:2], preset("galore"), lr=1e-2)
    check_refused(saved, model, few, r"unexpected: 2\.weight, 2\.bias")
    roles = Optim(model.named_parameters(), preset("galore"), lr=1e-2, where="0.weight")
    check_refused(saved, model, roles, r"in another role: 2\.weight")


def test_a_plain_state_of_another_rank_names_the_entries():
    rules = [Projected(Span(rank), Every(4), Adam()) for rank in (3, 2)]
    (_, one), (_, two) = (ran(2, rule) for rule in rules)
    match = (
        r"0\.weight: the saved state \(.*with frame\.q \(5, 3\).*without frame\.q \(5, 2\).*\) "
        r"was not written by Projected\(.*build Optim with the rule it was saved from"
    )
    with pytest.raises(ValueError, match=match):
        two.load_state_dict(one.state_dict())


# ---- without end


def grown(name, steps):
    """What each quarter of `steps` steps leaves behind: Python bytes, bytes of the process, tensors, state."""
    model = nn.ModuleDict({"layers": nn.ModuleList([net()])})
    named = [(name, p) for name, p in model.named_parameters()]
    opt = Optim(named, preset(name, every=10), lr=1e-4)
    process = psutil.Process()

    def measured():
        gc.collect()
        tensors = sum(1 for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
        return tracemalloc.get_traced_memory()[0], process.memory_info().rss, tensors, opt.state_bytes()

    tracemalloc.start()
    try:
        train(model["layers"][0], opt, range(500))  # what is made once
        marks = [measured()]
        for _ in range(4):
            train(model["layers"][0], opt, range(steps // 4))
            marks.append(measured())
    finally:
        tracemalloc.stop()
    return [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(marks)]


def check_bounded(name, steps):
    """No tensor more, and not one small object a step; returns what the process took in each quarter.

    What leaks, leaks in every quarter. The tracer takes a block from before its time, freed and taken again, for
    a new one, but not in all of them.
    """
    python, process, tensors, state = zip(*grown(name, steps), strict=True)
    assert not any((*tensors, *state))
    assert min(python) < 28 * steps / 4
    return process


@pytest.mark.parametrize("name", ["galore", "mezo", "lisa"])
def test_a_thousand_steps_do_not_grow(name):
    check_bounded(name, 1000)


@pytest.mark.full
@pytest.mark.parametrize("name", list(methods("optimizer")))
def test_ten_thousand_steps_do_not_grow(name):
    """What leaks, leaks in every quarter; the allocator takes pages now and then, and not in all of them."""
    assert min(check_bounded(name, 10_000)) < 41 * 10_000 / 4
