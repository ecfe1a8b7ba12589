"""Folders that come back in another process with the same logits, bit for bit, or are refused."""

import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from subspan import io
from subspan.adapt import Adapted, FromGradient, adapt, init, prepare, trainable
from subspan.compress import Calibration, study
from subspan.edit import edit
from subspan.hosts import jobs
from subspan.hosts.folders import added, open_model, put_adapter, save_adapter, save_model
from subspan.hosts.transformers import LoadedModel
from subspan.methods import build, find, methods
from subspan.ops import Dense, LowRank, OpLinear

IDS = torch.arange(2 * 24).reshape(2, 24) * 37 % 300
PRESETS = list(methods("adapter"))
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of the hidden size 32: low-rank, above break-even so dense, full so kept.
RANKS = {"q_proj": 5, "k_proj": 4, "v_proj": 16, "o_proj": 20, "gate_proj": 3, "up_proj": 30, "down_proj": 32}


def base(words: Any, *, dtype: torch.dtype = torch.float32, seed: int = 0, tie: bool = True) -> LoadedModel:
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(**sizes, **heads, tie_word_embeddings=tie, attention_bias=True, initializer_range=0.3)
        model = LlamaForCausalLM(config).eval()
    # As from_pretrained does it: the rotary frequencies stay in float32.
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, p if p.dtype == dtype else nn.Parameter(p.detach().to(dtype)))
    model.tie_weights()
    return LoadedModel(model, words, "tiny")


@torch.no_grad()
def shaken(tensors: list[torch.Tensor], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for t in tensors:
        t.add_(0.3 * torch.randn(t.shape, generator=generator).to(t))


def cut(model: nn.Module) -> None:
    def ranks(_: Any, shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
        return {name: min(*shape, RANKS[name.rpartition(".")[2]]) for name, shape in shapes.items()}

    taken = study(model)
    plan = taken.plan(ranks)
    assert {site.form for site in plan.sites.values()} == {"lowrank", "dense", "keep"}
    taken.apply(model, plan)


def adapted(model: nn.Module, preset: str, seed: int = 0) -> dict[str, Any]:
    takes = signature(find(preset).build).parameters
    sizes = {"rank": 3, "alpha": 4.0, "block": 4, "experts": 2, "top": 1}
    args = {key: value for key, value in sizes.items() if key in takes}
    made = build(preset, "adapter", **args)
    found = {name: model.get_submodule(name) for name in linears(model)}
    if isinstance(made.op, FromGradient):  # these refuse compressed layers
        found = {name: module for name, module in found.items() if isinstance(module, nn.Linear)}
    edit(model, list(found), adapt(prepare(made, model, found, Calibration([IDS], jobs.forward, jobs.loss))))
    shaken([p for _, p in trainable(model)], seed)
    return args


def linears(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if "layers." in n and isinstance(m, nn.Linear | OpLinear)]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@dataclass
class Shelf:
    """Folders written here, the logits of what was written, and those of what another process read."""

    root: Path
    expected: dict[str, torch.Tensor] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    read: dict[str, torch.Tensor] = field(default_factory=dict)

    def note(self, name: str, model: nn.Module, dtype: str = "float32") -> None:
        self.expected[name], self.dtypes[name] = logits(model), dtype

    def read_back(self) -> None:
        (self.root / "dtypes.json").write_text(json.dumps(self.dtypes))
        torch.save(IDS, self.root / "ids.pt")
        child = [sys.executable, "-c", CHILD, str(self.root)]
        done = subprocess.run(child, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        self.read = torch.load(self.root / "read.pt", weights_only=True)


CHILD = """
import json, sys, traceback
from pathlib import Path
import torch
from subspan.hosts.folders import open_model
torch.set_num_threads(1)
root = Path(sys.argv[1])
ids = torch.load(root / "ids.pt")
read = {}
for name, dtype in json.loads((root / "dtypes.json").read_text()).items():
    try:
        with torch.no_grad():
            read[name] = open_model(root / name, dtype=getattr(torch, dtype)).model(input_ids=ids).logits
    except Exception:
        read[name] = traceback.format_exc()
torch.save(read, root / "read.pt")
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, words) -> Shelf:
    found = Shelf(tmp_path_factory.mktemp("shelf"))
    for name, dtype in FLOATS.items():
        for tie in (True, False):
            loaded = base(words, dtype=dtype, tie=tie)
            cut(loaded.model)
            save_model(found.root / f"compressed-{name}-{tie}", loaded)
            found.note(f"compressed-{name}-{tie}", loaded.model, name)
    again = open_model(found.root / "compressed-float32-True")
    save_model(found.root / "resaved", again)
    found.note("resaved", again.model)
    for name, dtype in FLOATS.items():
        save_model(found.root / f"base-{name}", base(words, dtype=dtype))
        found.note(f"base-{name}", base(words, dtype=dtype).model, name)
    for preset in PRESETS:
        for under in ("base-float32", "base-bfloat16", "compressed-float32-True"):
            dtype = "bfloat16" if "bfloat16" in under else "float32"
            loaded = open_model(found.root / under, dtype=FLOATS[dtype])
            args = adapted(loaded.model, preset)
            name = f"{preset}-on-{under}"
            save_adapter(found.root / name, loaded.model, method=preset, args=args, source=loaded.source)
            found.note(name, loaded.model, dtype)
    found.read_back()
    return found


def check_equal(shelf: Shelf, name: str) -> None:
    read = shelf.read[name]
    assert isinstance(read, torch.Tensor), read
    assert read.dtype == shelf.expected[name].dtype and torch.equal(read, shelf.expected[name])


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_compressed_model_has_the_same_logits_in_another_process(shelf, dtype, tie):
    check_equal(shelf, f"compressed-{dtype}-{tie}")


@pytest.mark.parametrize("name", ["resaved", "base-float32", "base-bfloat16"])
def test_so_has_one_saved_again_and_one_that_is_not_compressed(shelf, name):
    check_equal(shelf, name)
    if name == "resaved":
        assert torch.equal(shelf.expected["resaved"], shelf.expected["compressed-float32-True"])


@pytest.mark.parametrize("under", ["base-float32", "base-bfloat16", "compressed-float32-True"])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_adapter_has_the_same_logits_in_another_process(shelf, preset, under):
    name = f"{preset}-on-{under}"
    assert not torch.equal(shelf.expected[name], shelf.expected[under])
    check_equal(shelf, name)


def test_the_three_forms_come_back_as_they_were(shelf):
    model = open_model(shelf.root / "compressed-float32-True").model
    found = {
        leaf: type(getattr(model.get_submodule(f"model.layers.1.{block}.{leaf}"), "op", None))
        for block, leaf in [("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp", "down_proj")]
    }
    assert found == {"q_proj": LowRank, "o_proj": Dense, "down_proj": type(None)}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("under", ["base-float32", "compressed-float32-True"])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_adapter_folder_holds_the_added_tensors_and_nothing_else(shelf, preset, under):
    folder = shelf.root / f"{preset}-on-{under}"
    model = open_model(folder).model
    stored = io.read_tensors(folder / io.WEIGHTS)
    assert set(stored) == set(added(model)) >= {name for name, _ in trainable(model)}
    assert all(torch.equal(p, stored[name]) for name, p in added(model).items())
    assert (folder / io.WEIGHTS).stat().st_size < (shelf.root / under / io.WEIGHTS).stat().st_size / 2
    assert sorted(p.name for p in folder.iterdir()) == sorted([io.WEIGHTS, io.ABOUT])


def test_opening_in_another_precision_converts_everything(shelf):
    model = open_model(shelf.root / "compressed-float32-True", dtype=torch.float64).model
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(
        logits(model), shelf.expected["compressed-float32-True"].double(), rtol=0, atol=1e-4
    )


# ---- what is refused


@pytest.fixture
def pair(tmp_path, words) -> tuple[Path, Path]:
    """A base on disk, and a LoRA for it."""
    save_model(tmp_path / "base", base(words))
    loaded = open_model(tmp_path / "base")
    args = adapted(loaded.model, "lora")
    save_adapter(tmp_path / "lora", loaded.model, method="lora", args=args, source=loaded.source)
    return tmp_path / "base", tmp_path / "lora"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / io.WEIGHTS)
    change(tensors)
    io.write_tensors(folder / io.WEIGHTS, tensors)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"],
    ids=["site", "bias", "elsewhere"],
)
def test_an_adapter_refuses_a_base_of_other_weights(pair, name):
    under, folder = pair
    trained_on = io.read_about(folder)["base"]["sha256"]
    rewrite(under, lambda tensors: tensors[name].view(-1)[3].add_(0.5))
    with pytest.raises(ValueError, match=r"trained on other weights than .*base.*the base it was made for") as e:
        open_model(folder)
    hashes = set(re.findall(r"\b[0-9a-f]{12}\b", str(e.value)))
    assert trained_on[:12] in hashes and len(hashes) == 2


def check_untouched(model: nn.Module, act: Callable[[], object], match: str) -> None:
    modules, state = dict(model.named_modules()), {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        act()
    assert dict(model.named_modules()) == modules and list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


def test_a_refused_adapter_leaves_the_model_as_it_was(pair):
    under, folder = pair
    about, model = io.read_about(folder), open_model(under).model
    unknown = {**about, "method": "butterfly"}
    check_untouched(model, lambda: put_adapter(model, folder, unknown), "unknown adapter method 'butterfly'")
    unfit = {**about, "args": {"rank": 33}}
    check_untouched(model, lambda: put_adapter(model, folder, unfit), r"layers\.0\.self_attn\.q_proj.*rank 33")
    elsewhere = {**about, "sites": ["model.layers.7.mlp.up_proj"]}
    check_untouched(model, lambda: put_adapter(model, folder, elsewhere), r"layers\.7\.mlp\.up_proj")
    name = "model.layers.0.mlp.up_proj.adapters.default.op.u"
    rewrite(folder, lambda tensors: tensors.update(extra=tensors.pop(name)))
    check_untouched(
        model, lambda: put_adapter(model, folder, about), r"1 missing \(.*op\.u\); 1 unexpected \(extra\)"
    )
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    check_untouched(model, lambda: put_adapter(model, folder, about), "trained on other weights")


def test_an_adapter_whose_base_is_gone_names_it(pair):
    under, folder = pair
    under.rename(under.with_name("moved"))
    with pytest.raises(FileNotFoundError, match=rf"{under}: no such folder"):
        open_model(folder)


def test_an_adapter_finds_a_base_that_was_given_by_a_relative_path(pair, tmp_path, monkeypatch):
    under, _ = pair
    monkeypatch.chdir(tmp_path)
    loaded = open_model(under.name)
    args = adapted(loaded.model, "lora")
    save_adapter("relative", loaded.model, method="lora", args=args, source=loaded.source)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(logits(open_model("../relative").model), logits(loaded.model))


def test_an_adapter_opens_in_another_precision_than_it_was_trained_in(pair):
    exact, rough = (logits(open_model(pair[1], dtype=dtype).model) for dtype in FLOATS.values())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.1 * exact.abs().max().item())


def test_an_adapter_that_changed_its_base_opens_where_the_svd_rounds_differently(pair, tmp_path, monkeypatch):
    # Another number of threads is enough for that, from sizes of a few hundred on.
    loaded = open_model(pair[0])
    args = adapted(loaded.model, "pissa")
    save_adapter(tmp_path / "pissa", loaded.model, method="pissa", args=args, source=loaded.source)
    exact = init.svd
    monkeypatch.setattr(init, "svd", lambda w: exact(w)._replace(s=exact(w).s * (1 + 1e-6)))
    found = logits(open_model(tmp_path / "pissa").model)
    torch.testing.assert_close(found, logits(loaded.model), rtol=0, atol=1e-3)


def test_what_cannot_be_opened_again_is_not_saved(pair, tmp_path):
    under, _ = pair
    plain, named, stacked = (open_model(under).model for _ in range(3))
    with pytest.raises(ValueError, match="LlamaForCausalLM carries no adapter; adapt it first"):
        save_adapter(tmp_path / "out", plain, method="lora", args={}, source=str(under))
    edit(named, None, adapt(build("lora", rank=2), "style"))
    with pytest.raises(ValueError, match="style"):
        save_adapter(tmp_path / "out", named, method="lora", args={"rank": 2}, source=str(under))
    done = edit(stacked, None, adapt(build("lora", rank=2)))
    edit(stacked, list(done), adapt(build("dora", rank=2), "second"))
    with pytest.raises(ValueError, match="second"):
        save_adapter(tmp_path / "out", stacked, method="lora", args={"rank": 2}, source=str(under))
    assert not (tmp_path / "out").exists()


def test_a_model_with_adapters_is_not_saved_as_a_whole(pair, tmp_path):
    loaded = open_model(pair[1])
    assert any(isinstance(m, Adapted) for m in loaded.model.modules())
    with pytest.raises(ValueError, match=r"adapter.*(merge|save_adapter)"):
        save_model(tmp_path / "out", loaded)
    assert not (tmp_path / "out").exists()


# ---- writing


def test_saving_over_the_folder_it_came_from_keeps_the_model(pair, words):
    under, _ = pair
    loaded = open_model(under)
    before = logits(loaded.model)
    with pytest.raises(FileExistsError, match="--force"):
        save_model(under, loaded)
    assert save_model(under, loaded, force=True) == under
    assert torch.equal(logits(loaded.model), before) and torch.equal(logits(open_model(under).model), before)
    assert sorted(p.name for p in under.parent.iterdir()) == ["base", "lora"]


def test_a_full_disk_leaves_the_old_folder(pair, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    under, folder = pair
    base_model, lora = open_model(under), open_model(folder)
    before = {p: p.read_bytes() for place in pair for p in place.rglob("*") if p.is_file()}
    monkeypatch.setattr(io, "save_file", full)
    with pytest.raises(OSError, match=r"disk full while writing .*base"):
        save_model(under, base_model, force=True)
    args = io.read_about(folder)["args"]
    with pytest.raises(OSError, match=r"disk full while writing .*lora"):
        save_adapter(folder, lora.model, method="lora", args=args, source=str(under), force=True)
    assert {p: p.read_bytes() for p in under.parent.rglob("*") if p.is_file()} == before


def test_about_is_kept_and_a_folder_without_json_goes_to_the_host(tmp_path, words):
    save_model(tmp_path / "out", base(words), {"plan": {"rank": 3}})
    about = io.read_about(tmp_path / "out")
    assert (about["plan"], about["kind"], about["source"]) == ({"rank": 3}, "model", "tiny")
    (tmp_path / "out" / io.ABOUT).unlink()
    assert torch.equal(logits(open_model(tmp_path / "out").model), logits(base(words).model))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_model(tmp_path / "nowhere")
