"""Models on disk: every op and every tie comes back bit for bit, and no failure changes a model or a folder."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from subspan import io
from subspan.edit import edit
from subspan.hosts.peft_parts import BlockSeries
from subspan.ops import (
    BlockCayley,
    Columns,
    Dense,
    Diag,
    Entries,
    Hadamard,
    Kron,
    LinOp,
    LowRank,
    OpLinear,
    Product,
    Scaled,
    Seeded,
    Shards,
    Stacked,
    Sum,
    Transposed,
    Zero,
    quantize,
)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


ROWS: dict[str, Callable[[], LinOp]] = {
    "dense": lambda: Dense(rand(5, 4)),
    "diag": lambda: Diag(rand(4)),
    "lowrank": lambda: LowRank(rand(5, 2), rand(2, 4)),
    "sum": lambda: Sum([Dense(rand(5, 4)), LowRank(rand(5, 2), rand(2, 4))]),
    "product": lambda: Product([Dense(rand(5, 3)), Diag(rand(3)), Dense(rand(3, 4))]),
    "scaled": lambda: Scaled(LowRank(rand(5, 2), rand(2, 4)), -1.1),
    "transposed": lambda: Transposed(Dense(rand(4, 5))),
    "quantized": lambda: quantize(rand(5, 4), "nf4", 2),
    "nested": lambda: Sum(
        [
            Product([Diag(rand(5)), Dense(rand(5, 4)), Diag(rand(4, seed=1))]),
            Scaled(Transposed(Sum([LowRank(rand(4, 2), rand(2, 5)), Dense(rand(4, 5, seed=2))])), 1 / 3),
        ]
    ),
    "kron": lambda: Kron(Dense(rand(2, 3)), Diag(rand(2))),
    "hadamard": lambda: Hadamard(LowRank(rand(5, 1), rand(1, 4)), LowRank(rand(5, 2), rand(2, 4))),
    "entries": lambda: Entries(torch.tensor([1, 7, 19]), rand(3), 5, 4),
    "columns": lambda: Columns(torch.tensor([0, 3]), rand(5, 2), 4),
    "stacked": lambda: Stacked(Transposed(Seeded(1, 4, 2)), rand(3, 2), rand(3, 4)),
    "shards": lambda: Shards(rand(3, 2), torch.tensor([2, 0, 1, 1, 0, 2, 0, 1, 2, 2], dtype=torch.int32), 2),
    "cayley": lambda: BlockCayley(rand(2, 3)),
    "cayley, by a series": lambda: BlockSeries(rand(2, 3), 4),
    "zero": lambda: Zero(5, 4),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# The key under which a description names its op.
OP = next(key for key, value in io.spec(Diag(torch.ones(1))).items() if value == "Diag")


def kinds(kind: type = LinOp) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from kinds(child)


def parts(module: nn.Module) -> set[type]:
    return {type(m) for m in module.modules()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(two) and all(
        one[k].dtype == two[k].dtype and one[k].shape == two[k].shape and torch.equal(one[k], two[k]) for k in one
    )


# ---- ops


def test_the_rows_hold_every_op_of_the_library():
    library = {kind for kind in kinds() if kind.__module__.startswith("subspan.")}
    assert library == set().union(*(parts(row()) for row in ROWS.values())) & library


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_an_op_comes_back_from_its_description_and_its_tensors_bit_for_bit(name, dtype):
    op = ROWS[name]().to(dtype)
    described = json.loads(json.dumps(io.spec(op)))
    made = io.build(described)
    if Seeded in parts(op):  # a seed has no precision of its own
        made = made.to(dtype)
    made.load_state_dict(op.state_dict(), strict=True)
    assert io.spec(made) == described and made.shape == op.shape
    assert same(made.state_dict(), op.state_dict())
    x = rand(3, op.shape[1], seed=9, dtype=dtype)
    assert torch.equal(made(x), op(x)) and torch.equal(made.dense(), op.dense())


def test_an_op_of_mixed_precision_keeps_each():
    op = Product([Diag(rand(5)), LowRank(rand(5, 2, dtype=torch.bfloat16), rand(2, 4, dtype=torch.float32))])
    made = io.build(json.loads(json.dumps(io.spec(op))))
    assert {k: t.dtype for k, t in made.state_dict().items()} == {k: t.dtype for k, t in op.state_dict().items()}


def test_a_description_holds_no_numbers_of_the_tensors():
    text = json.dumps(io.spec(Dense(torch.full((2, 3), 0.123456))))
    assert json.loads(text) == {OP: "Dense", "w": {"tensor": [2, 3], "dtype": "float32"}}


def test_an_unknown_op_is_refused_with_what_is_known():
    with pytest.raises(
        ValueError, match=r"unknown op 'Butterfly'; this version knows BlockCayley, .*Dense, Diag, .*upgrade"
    ):
        io.build({OP: "Butterfly"})
    with pytest.raises(ValueError, match="unknown op 'Butterfly'"):
        io.build({OP: "Sum", "ops": [{OP: "Butterfly"}]})


# ---- whole models


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6, bias=False), nn.LayerNorm(6)).double()


def compressed(seed: int = 0) -> nn.Sequential:
    model = net(seed)
    ops = {"0": ROWS["nested"](), "2": LowRank(rand(6, 2, seed=seed), rand(2, 5, seed=seed + 1))}
    edit(model, list(ops), lambda name, layer: OpLinear(ops[name], layer.bias))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with io.staged(tmp_path / "saved") as folder:
        io.save(folder, compressed(), {"kind": "model"})
    return tmp_path / "saved"


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / io.ABOUT
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / io.WEIGHTS)
    change(tensors)
    io.write_tensors(folder / io.WEIGHTS, tensors)


def check_refused(folder: Path, model: nn.Module, match: str, error: type[Exception] = ValueError) -> None:
    """Loading fails with these words, and every module, parameter and number is the one that was there."""
    modules, params = dict(model.named_modules()), dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in params.items()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=match):
        io.load(folder, model)
    assert dict(model.named_modules()) == modules
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in params.items()}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert same(dict(model.state_dict()), state)


def test_a_model_comes_back_bit_for_bit_and_the_edit_undoes_it(saved):
    model, x = net(seed=1), rand(3, 4)
    before = [model[0], model[2]]
    done = io.load(saved, model)
    assert same(dict(model.state_dict()), dict(compressed().state_dict()))
    assert torch.equal(model(x), compressed()(x))
    done.undo()
    assert [model[0], model[2]] == before


def test_a_loaded_model_saves_to_the_same_bytes(saved, tmp_path):
    model = net(seed=1)
    io.load(saved, model)
    with io.staged(tmp_path / "again") as folder:
        io.save(folder, model, {"kind": "model"})
    for file in (io.WEIGHTS, io.ABOUT):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes()


def test_a_model_without_compressed_sites_comes_back_too(tmp_path):
    with io.staged(tmp_path / "plain") as folder:
        io.save(folder, net())
    model = net(seed=1)
    assert list(io.load(tmp_path / "plain", model)) == []
    assert same(dict(model.state_dict()), dict(net().state_dict()))


def test_saved_precision_wins_over_that_of_the_model(saved):
    model = net(seed=1).bfloat16()
    io.load(saved, model)
    assert same(dict(model.state_dict()), dict(compressed().state_dict()))


def test_the_json_names_sites_format_version_and_what_was_added(saved):
    about = io.read_about(saved)
    assert (about["format"], about["library"], about["kind"]) == (io.FORMAT, io.subspan_version(), "model")
    assert {name: (site["op"][OP], site["bias"]) for name, site in about["sites"].items()} == {
        "0": ("Sum", True),
        "2": ("LowRank", False),
    }


def tied() -> LlamaForCausalLM:
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    model, other = tied(), tied()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with io.staged(tmp_path / "tied") as folder:
        io.save(folder, model)
    stored = load_file(tmp_path / "tied" / io.WEIGHTS)
    assert ("lm_head.weight" in stored) != ("model.embed_tokens.weight" in stored)
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())
    io.load(tmp_path / "tied", other)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_a_tensor_and_its_transpose_in_one_storage_are_not_taken_for_tied(tmp_path):
    w = rand(4, 4)
    model = nn.Sequential(OpLinear(Dense(w)), OpLinear(Dense(w.T)))
    with io.staged(tmp_path / "views") as folder:
        io.save(folder, model)
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    io.load(tmp_path / "views", other)
    assert torch.equal(other[1].op.w, w.T)


def test_an_unknown_op_or_a_newer_format_leaves_the_model_alone(saved):
    sites = io.read_about(saved)["sites"]
    rewrite(saved, sites={**sites, "2": {"kind": "compressed", "op": {OP: "Butterfly"}, "bias": False}})
    check_refused(saved, net(seed=1), "unknown op 'Butterfly'")
    rewrite(saved, sites=sites, format=io.FORMAT + 1, library="9.9")
    check_refused(saved, net(seed=1), rf"format {io.FORMAT + 1}, written by subspan 9\.9; this is .*upgrade")


def test_a_missing_json_or_weights_file_is_named(saved):
    (saved / io.WEIGHTS).rename(saved / "away")
    check_refused(saved, net(), "model.safetensors does not exist", FileNotFoundError)
    (saved / io.ABOUT).unlink()
    check_refused(saved, net(), "has no subspan.json", FileNotFoundError)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": 1, "sites": {',
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{}",
        b'{"format": 1}',
        b'{"format": "x"}',
    ],
)
def test_a_damaged_json_is_named(saved, content):
    (saved / io.ABOUT).write_bytes(content)
    check_refused(saved, net(seed=1), r"subspan\.json")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_weights_file_cut_short_is_named(saved, share):
    content = (saved / io.WEIGHTS).read_bytes()
    (saved / io.WEIGHTS).write_bytes(content[: int(share * len(content))])
    check_refused(saved, net(seed=1), r"model\.safetensors is damaged or cut short")


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(saved):
    def change(tensors):
        tensors["extra"] = tensors.pop("2.op.u")
        tensors["3.weight"] = tensors["3.weight"][:5]

    retensor(saved, change)
    check_refused(
        saved,
        net(seed=1),
        r"1 missing \(2\.op\.u\); 1 unexpected \(extra\); 1 of another shape \(3\.weight\); load it into its own",
    )


def test_a_tensor_of_integers_for_a_trained_weight_is_refused_before_anything_changes(saved):
    retensor(saved, lambda tensors: tensors.update({"3.weight": torch.ones(6, dtype=torch.int64)}))
    check_refused(saved, net(seed=1), r"3\.weight")


def test_a_model_that_lacks_a_site_is_refused(saved):
    check_refused(saved, net(seed=1)[:2], r"has no module '2'|does not fit this model.*2\.op")


def test_another_architecture_is_refused(saved):
    wider = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6, bias=False), nn.LayerNorm(7)).double()
    check_refused(saved, wider, r"2 of another shape \(3\.(weight, 3\.bias|bias, 3\.weight)\)")


# ---- staged folders


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "a").write_bytes(b"old a")
    (out / "deep" / "b").write_bytes(b"old b")
    return out


def only_child(out: Path) -> bool:
    return [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_block_that_ends_well_takes_the_name_and_makes_parents(tmp_path):
    out = tmp_path / "x" / "y" / "out"
    with io.staged(out) as folder:
        (folder / "a").write_bytes(b"new")
        assert not out.exists() and folder.parent == out.parent
    assert contents(out) == {"a": b"new"} and only_child(out)


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt, FileNotFoundError, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_an_exception_leaves_what_was_there(tmp_path, old, problem, force):
    before = contents(old)
    out = old if force else tmp_path / "new"
    with pytest.raises(problem, match="mine") as raised, io.staged(out, force=force) as folder:
        (folder / "a").write_bytes(b"half")
        raise problem("mine")
    assert raised.value.__cause__ is not raised.value
    assert contents(old) == before and only_child(old)


def test_a_non_empty_folder_is_refused_without_force_and_replaced_with_it(old):
    before = contents(old)
    with pytest.raises(FileExistsError, match=r"out exists .*another output or pass --force"), io.staged(old):
        pytest.fail("the block must not run")
    assert contents(old) == before and only_child(old)
    with io.staged(old, force=True) as folder:
        (folder / "c").write_bytes(b"new")
        assert contents(old) == before
    assert contents(old) == {"c": b"new"} and only_child(old)


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with io.staged(tmp_path / "out") as folder:
        (folder / "a").write_bytes(b"new")
    assert contents(tmp_path / "out") == {"a": b"new"} and only_child(tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced(tmp_path, force):
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"/out ") as raised, io.staged(tmp_path / "out", force=force):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").read_bytes() == b"mine" and only_child(tmp_path / "out")
    assert "--force" not in str(raised.value), "force does not help here"


def test_a_link_to_a_folder_leaves_nothing_beside(old):
    link = old.parent / "link"
    link.symlink_to(old, target_is_directory=True)
    with io.staged(link, force=True) as folder:
        (folder / "c").write_bytes(b"new")
    assert contents(link) == {"c": b"new"}
    assert sorted(p.name for p in old.parent.iterdir()) == ["link", "out"]


def test_when_the_last_rename_fails_the_old_folder_is_back(old, monkeypatch):
    before, rename = contents(old), Path.rename

    def flaky(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", flaky)
    with pytest.raises(OSError, match="input/output"), io.staged(old, force=True) as folder:
        (folder / "c").write_bytes(b"new")
    assert old.is_dir() and contents(old) == before and only_child(old)


FULL = {
    "errno": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_is_explained_and_changes_nothing(old, monkeypatch, kind):
    def full(*_: object, **__: object) -> None:
        raise FULL[kind]

    monkeypatch.setattr(io, "save_file", full)
    before, fresh = contents(old), old.with_name("fresh")
    for out in (fresh, old):
        match = rf"disk full while writing .*{out.name}; .*free space"
        with pytest.raises(OSError, match=match) as raised, io.staged(out, force=True) as folder:
            io.save(folder, net())
        assert raised.value.errno == errno.ENOSPC
    assert contents(old) == before and only_child(old)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_forbidden_parent_is_explained(tmp_path, monkeypatch, number):
    def forbidden(self: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    match = r"cannot write to .*; choose an output folder you may write to"
    with pytest.raises(PermissionError, match=match), io.staged(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_forbidden_file_elsewhere_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(PermissionError, match=r"secret\.txt"), io.staged(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/secret.txt")


CHILD = """
import os, signal, sys
from subspan import io
sys.stdin.readline()
with io.staged(sys.argv[1]) as folder:
    (folder / "half").write_bytes(b"half")
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_output_and_the_next_one_cleans_up_but_spares_the_living(tmp_path):
    out, pipe = tmp_path / "out", subprocess.PIPE
    start = [sys.executable, "-c", CHILD, str(out)]
    living, dead = (subprocess.Popen(start, stdin=pipe, stdout=pipe, text=True) for _ in range(2))
    try:
        for process in (living, dead):
            print("begin", file=process.stdin, flush=True)
            assert int(process.stdout.readline()) == process.pid
        dead.communicate("die\n", timeout=60)
        assert dead.returncode == -signal.SIGKILL and not out.exists()
        staging = {p: tmp_path / f".out.partial-{p.pid}" for p in (dead, living)}
        assert all(contents(folder) == {"half": b"half"} for folder in staging.values())
        with io.staged(out) as folder:
            (folder / "a").write_bytes(b"whole")
        assert contents(out) == {"a": b"whole"}
        assert not staging[dead].exists() and contents(staging[living]) == {"half": b"half"}
    finally:
        living.kill()
        living.communicate()


def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_replaced_folder_that_a_killed_process_had_put_aside_is_cleaned_up(old):
    aside = old.with_name(f".out.old-{gone()}")
    aside.mkdir()
    (aside / "a").write_bytes(b"older")
    with io.staged(old, force=True) as folder:
        (folder / "c").write_bytes(b"new")
    assert contents(old) == {"c": b"new"} and only_child(old)


def test_leftovers_under_this_process_s_own_recycled_id_do_not_matter(old):
    for stage in ("partial", "old"):
        (old.with_name(f".out.{stage}-{os.getpid()}") / "stale").mkdir(parents=True)
    with io.staged(old, force=True) as folder:
        assert list(folder.iterdir()) == []
        (folder / "c").write_bytes(b"new")
    assert contents(old) == {"c": b"new"} and only_child(old)


def test_a_folder_of_somebody_else_with_a_similar_name_is_left_alone(tmp_path):
    (tmp_path / ".out.partial-notes").mkdir()
    with io.staged(tmp_path / "out") as folder:
        (folder / "a").write_bytes(b"new")
    assert contents(tmp_path / "out") == {"a": b"new"}
    assert (tmp_path / ".out.partial-notes").is_dir()
