"""Adapters trained as copies (DDP) and in parts (FSDP2): the numbers of one process, saved whole and filled in.

Run as a program, this file is what the processes do: `python test_adapters.py WORLD FOLDER`.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import peft
import pytest
import torch
import torch._dynamo  # FSDP imports it, in every process, if the first one has not
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from subspan import shards
from subspan.adapt import Adapted, adapt, trainable
from subspan.edit import edit
from subspan.hosts.peft import load_peft, save_peft
from subspan.hosts.peft_read import fill_peft
from subspan.methods import build
from subspan.optim import Adam, Optim

ADAPTERS = {
    "lora": {"rank": 3, "alpha": 6.0},
    "dora": {"rank": 3, "alpha": 6.0},
    "pissa": {"rank": 3, "alpha": 6.0},
    "lokr": {"rank": 1, "alpha": 4.0},
    "vera": {"rank": 5},
}
# PiSSA is written as another LoRA, and VeRA with the numbers of its seed: those are loaded, not filled in.
FILLED = ("lora", "dora", "lokr")
LESSONS, LR, WORDS, SITE = 5, 0.01, 40, "model.layers.1.mlp.down_proj"


# ---- what the processes do ----


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def llama() -> nn.Module:
    """The same weights in every process; their rows are cut by 4 into unequal parts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=WORDS, num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.3, **sizes
    )
    return LlamaForCausalLM(config).double()


def adapted(method: str, *, moved: bool = True) -> nn.Module:
    """A frozen LLaMA with an adapter, which is off its start, so that no gradient is zero."""
    model = llama()
    edit(model, None, adapt(build(method, "adapter", **ADAPTERS[method])))
    added = dict(trainable(model))
    for name, p in model.named_parameters():
        p.requires_grad_(name in added)
    for number, p in enumerate(added.values() if moved else ()):
        p.data.add_(0.1 * torch.randn(p.shape, generator=seeded(number), dtype=p.dtype))
    return model


def lesson(t: int) -> torch.Tensor:
    """This process's share of the 8 texts of step t."""
    ids = torch.randint(0, WORDS, (8, 6), generator=seeded(100 + t))
    return ids.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else ids


def said(model: nn.Module) -> torch.Tensor:
    """The logits of one text, the same for all processes."""
    with torch.no_grad():
        return model(input_ids=torch.arange(7)[None] * 5).logits.clone()


def sharded(model: nn.Module, *, layers: bool = True) -> nn.Module:
    """Cut over the processes, layer by layer and then the rest, or all in one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers if layers else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: shards.whole(p.detach()).clone() for name, p in model.named_parameters()}


def study(model: nn.Module, inner: nn.Module) -> list[float]:
    """A few steps of Adam; the losses of the whole batch."""
    opt, losses = Optim(trainable(inner), Adam(), lr=LR), []
    for t in range(LESSONS):
        opt.zero_grad()
        ids = lesson(t)
        logits = model(input_ids=ids).logits  # its own loss is in float32
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        opt.step()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses


def studied(model: nn.Module, inner: nn.Module) -> dict:
    """What a run leaves: losses, trained tensors, logits, a folded matrix, and whether the base kept its bits."""
    before = whole(inner)
    found = {"losses": study(model, inner), "said": said(inner)}
    after, added = whole(inner), {name for name, _ in trainable(inner)}
    found["adapter"] = {name: after[name] for name in sorted(added)}
    found["base kept"] = all(torch.equal(t, before[name]) for name, t in after.items() if name not in added)
    return found | {"matrix": shards.whole(inner.get_submodule(SITE).matrix.detach())}


def everyone(action: Callable[[], object]) -> list[str]:
    """From every process: the error that the action made."""
    try:
        action()
        told = "none"
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    all_told: list = [None] * dist.get_world_size()
    dist.all_gather_object(all_told, told)
    return all_told


def moved_base(model: nn.Module) -> list[torch.Tensor]:
    """Logits before and after somebody writes to the weights under the adapters, in both modes."""
    found = []
    for mode in (False, True):
        model.train(mode)
        found.append(said(model))
        for module in model.modules():
            if isinstance(module, Adapted):
                with torch.no_grad():
                    module.base.weight.mul_(1.5)
        found.append(said(model))
    return found


def in_processes(folder: Path, world: int) -> dict:
    """Every adapter as copies and in parts, saved and filled in again."""
    out: dict = {}
    for method in ADAPTERS:
        more = {"modules_to_save": ["lm_head"]} if method == "lora" else {}
        model = adapted(method)
        out[method, "ddp"] = studied(DistributedDataParallel(model), model)
        if dist.get_rank() == 0:
            save_peft(model, folder / f"{method}-ddp{world}", **more)
        # What is cut in one piece is whole after a forward pass: it is cut again before it is saved.
        model = sharded(adapted(method), layers=method != "lokr")
        out[method, "fsdp"] = studied(model, model)
        save_peft(model, folder / f"{method}-fsdp{world}", **more)
        out[method, "error"] = everyone(lambda model=model: save_peft(model, folder / f"{method}-fsdp{world}"))
        for source in (2, world) if method in FILLED else ():
            fresh = sharded(adapted(method, moved=False))
            fill_peft(fresh, folder / f"{method}-fsdp{source}")
            now, added = whole(fresh), {name for name, _ in trainable(fresh)}
            out[method, source] = {"adapter": {name: now[name] for name in sorted(added)}, "said": said(fresh)}
    return out | {"moved base": moved_base(sharded(adapted("dora")))}


def alone() -> dict:
    """What one process makes of the same texts."""
    out: dict = {}
    for method in ADAPTERS:
        model = adapted(method)
        out[method] = studied(model, model)
    return out | {"moved base": moved_base(adapted("dora"))}


def work(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(400, exit=True)  # where it hangs, if it does
    store = dist.FileStore(str(folder / f"{world}.store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=180))
    out = in_processes(folder, world)
    if rank == 0:
        torch.save(out, folder / f"{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


# ---- what they found ----


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def started(world: int, folder: Path) -> dict:
    """What process 0 of so many found."""
    command = [sys.executable, "-W", "ignore", __file__, str(world), str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=450, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"{world}.pt", weights_only=True)


@pytest.fixture(scope="session")
def two(places) -> dict:
    return started(2, places)


@pytest.fixture(scope="session")
def four(places, two) -> dict:
    return started(4, places)


@pytest.fixture(scope="session")
def one() -> dict:
    return alone()


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.full)])
def many(request) -> tuple[int, dict]:
    return request.param, request.getfixturevalue({2: "two", 4: "four"}[request.param])


pytestmark = [
    pytest.mark.xdist_group("adapters in processes"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def check_close(found: dict, wanted: dict, tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_training_is_that_of_one_process_on_the_same_batch(many, one, method, way):
    _, found = many
    run, wanted = found[method, way], one[method]
    assert run["losses"] == pytest.approx(wanted["losses"], rel=0, abs=1e-12)
    assert len(set(wanted["losses"])) == LESSONS
    check_close(run["adapter"], wanted["adapter"])
    check_close({"said": run["said"]}, {"said": wanted["said"]})


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_the_base_keeps_every_bit(many, one, method, way):
    assert many[1][method, way]["base kept"] and one[method]["base kept"]


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_folded_matrix_can_be_read_between_calls(many, one, method):
    torch.testing.assert_close(many[1][method, "fsdp"]["matrix"], one[method]["matrix"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_the_folder_of_all_processes_is_the_whole_adapter(many, one, places, method, way):
    world, found = many
    load_peft(model := llama(), places / f"{method}-{way}{world}")
    tolerance = 1e-12 if method != "pissa" else 1e-10  # its remainder is taken apart again
    check_close({"said": said(model)}, {"said": found[method, way]["said"]}, tolerance)
    theirs = peft.PeftModel.from_pretrained(llama(), places / f"{method}-{way}{world}").eval()
    torch.testing.assert_close(said(theirs).double(), one[method]["said"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [m for m in ADAPTERS if m not in ("pissa",)])
def test_copies_and_parts_are_written_alike(many, places, method):
    world, _ = many
    ddp, fsdp = (
        load_file(places / f"{method}-{way}{world}" / "adapter_model.safetensors") for way in ("ddp", "fsdp")
    )
    check_close(fsdp, ddp)


@pytest.mark.parametrize("method", FILLED)
def test_a_folder_fills_a_model_in_parts(many, two, method):
    world, found = many
    for source, wanted in ((world, found), (2, two)):  # whatever the number of parts it was saved from
        filled = found[method, source]
        check_same_bits(filled["adapter"], wanted[method, "fsdp"]["adapter"])
        check_close({"said": filled["said"]}, {"said": found[method, "fsdp"]["said"]})


def check_same_bits(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("method", ADAPTERS)
def test_what_stops_the_writing_process_is_told_to_all(many, method):
    first, *others = many[1][method, "error"]
    assert first.startswith("FileExistsError: ") and "exists and is not empty" in first
    assert others == [f"RuntimeError: process 0 could not write: {first}"] * (many[0] - 1)


def test_doras_norms_are_never_stale_under_fsdp(many, one):
    found = many[1]["moved base"]
    torch.testing.assert_close(torch.stack(found), torch.stack(one["moved base"]), rtol=0, atol=1e-12)
    assert min(float((a - b).abs().max()) for a, b in zip(found[::2], found[1::2], strict=True)) > 1e-3


if __name__ == "__main__":
    torch.set_num_threads(1)
    llama()  # loaded once, before the processes part
    mp.start_processes(work, (int(sys.argv[1]), Path(sys.argv[2])), nprocs=int(sys.argv[1]), start_method="fork")
