"""Ten steps equal those of peft's own optimizers, and those that the authors' programs made."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from subspan.adapt import adapt, trainable
from subspan.edit import edit
from subspan.hosts.peft_kohya import load_kohya, save_kohya
from subspan.methods import build
from subspan.methods.adapters import lora_ga, lora_one, lora_plus, lora_sb, moe_lora, paca, riemannian_lora
from subspan.optim import Adam, Optim, Recipe, Sgd

M, N, RANK, STEPS = 9, 7, 3, 10
DAMPING = 1e-6
PEERS = {
    "lora_plus": (
        lora_plus(rank=RANK, alpha=6.0, ratio=16.0),
        lambda model, lr: create_loraplus_optimizer(model, torch.optim.Adam, lr=lr, loraplus_lr_ratio=16.0),
    ),
    "riemannian_lora": (
        riemannian_lora(rank=RANK, alpha=6.0, damping=DAMPING),
        lambda model, lr: create_riemannian_optimizer(model, torch.optim.Adam, lr=lr, reg=DAMPING),
    ),
}


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 5)).double()


def ours(preset):
    """Two adapted layers, off their start: at zero a Gram matrix is the damping alone."""
    model = net()
    edit(model, ["0", "2"], adapt(preset))
    with torch.no_grad():
        for i, (_, p) in enumerate(trainable(model)):
            p.add_(0.3 * noise(*p.shape, seed=i))
    return model


@torch.no_grad()
def theirs(model):
    """peft's LoRA with the factors of ours."""
    made = peft.get_peft_model(net(), peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["0", "2"])).double()
    for name, layer in ((name, made.base_model.model.get_submodule(name)) for name in ("0", "2")):
        op = model.get_submodule(name).slot("default").op
        layer.lora_B["default"].weight.copy_(op.u)
        layer.lora_A["default"].weight.copy_(op.v)
    return made


def weights(model, optimizer, steps=STEPS):
    """The outputs for one input after each step of the mean square of the outputs for others."""
    found = []
    for t in range(steps):
        optimizer.zero_grad()
        model(noise(6, N, seed=100 + t)).square().mean().backward()
        optimizer.step()
        found.append(model(noise(4, N, seed=50)).detach())
    return torch.stack(found)


@pytest.mark.parametrize("name", PEERS)
def test_ten_steps_equal_those_of_pefts_optimizer(name):
    preset, peer = PEERS[name]
    model = ours(preset)
    other = theirs(model)
    before = model(noise(4, N, seed=50)).detach()
    one = weights(model, preset.optimizer(trainable(model), lr=0.01))
    two = weights(other, peer(other, 0.01))
    assert_close(one, two, rtol=0, atol=1e-9)
    assert (one[-1] - before).abs().median() > 1e-2


# ---- against what the authors' own programs recorded (README.md says how)

HERE = Path(__file__).parent


def recorded(method):
    with np.load(HERE / f"{method}.npz") as data:
        return {name: torch.from_numpy(data[name]) if data[name].ndim else data[name].item() for name in data}


def layer(data):
    made = nn.Linear(8, 12).double()
    with torch.no_grad():
        made.weight.copy_(data["w0"])
        made.bias.copy_(data["bias"])
    return made


def check_follows(adapted, step, data, weight=lambda adapted: adapted.weight, close=1e-10):
    """Outputs and weights along the recorded steps equal the recorded ones, which move."""
    for t in range(len(data["x"])):
        assert_close(weight(adapted).detach(), data["w"][t], rtol=0, atol=close)
        y = adapted(data["x"][t])
        assert_close(y.detach(), data["y"][t], rtol=0, atol=close)
        for _, p in trainable(adapted):
            p.grad = None
        (y - data["z"][t]).square().mean().backward()
        step()
    assert_close(weight(adapted).detach(), data["w"][-1], rtol=0, atol=close)
    assert (data["w"][-1] - data["w"][0]).abs().max() > 0.05


def adam(adapted, data):
    return Optim(trainable(adapted), Adam(), lr=data["lr"], where="*", weight_decay=0.0).step


def seeing(preset, data):
    """The preset after a look at the recorded gradient."""
    start = replace(preset.op, solver="exact")
    return replace(preset, op=replace(start, seen={"site": start.make("site", data["g"])}))


def test_lora_one_is_the_authors_start_and_their_run():
    data = recorded("lora_one")
    preset = lora_one(rank=data["rank"], alpha=data["alpha"], gamma=data["gamma"])
    adapted = adapt(seeing(preset, data))("site", layer(data))
    assert torch.equal(data["base"], data["w0"])
    check_follows(adapted, adam(adapted, data), data)


def test_lora_ga_is_the_authors_start_and_their_run_though_they_change_the_base():
    data = recorded("lora_ga")
    preset = lora_ga(rank=data["rank"], alpha=data["alpha"], gamma=data["gamma"])
    adapted = adapt(seeing(preset, data))("site", layer(data))
    pair, double = adapted.slot("default").op.ops
    with torch.no_grad():  # singular vectors have signs of their own, on each side
        for ours, theirs, axis in ((pair.u, data["b0"], 0), (pair.v, data["a0"], 1)):
            signs = (ours * theirs).sum(axis, keepdim=True).sign()
            assert_close(ours * signs, theirs, rtol=0, atol=1e-10)
            ours.mul_(signs)
        double.op.u.copy_(pair.u)
        double.op.v.copy_(pair.v)
    assert (data["base"] - data["w0"]).abs().max() > 0.1
    check_follows(adapted, adam(adapted, data), data)


def test_lora_sb_is_the_authors_frame_and_their_run():
    data = recorded("lora_sb")
    adapted = adapt(seeing(lora_sb(rank=data["rank"], rate=data["rate"]), data))("site", layer(data))
    check_follows(adapted, adam(adapted, data), data)


def test_paca_trains_the_columns_that_the_authors_train():
    data = recorded("paca")
    preset = paca(rank=data["rank"], alpha=data["alpha"])
    adapted = adapt(preset)("site", layer(data))
    op = adapted.slot("default").op
    op.index = data["index"].to(op.index.dtype)
    check_follows(adapted, adam(adapted, data), data)


def test_moe_lora_is_the_authors_mixture_under_their_scaled_descent():
    """Their AdamW corrects no bias and moves one factor before the other: the transcript is of their descent."""
    data = recorded("moe_lora")
    preset = moe_lora(**{name: data[name] for name in ("rank", "alpha", "experts", "top", "damping")})
    adapted = adapt(preset)("site", layer(data))
    slot = adapted.slot("default")
    with torch.no_grad():
        slot.op.v.copy_(data["a"].flatten(0, 1))
        slot.op.u.copy_(data["b"].movedim(0, 1).flatten(1))
        slot.join.router.copy_(data["gate"])
    rule = Recipe(Sgd(), preset.rule.source)
    optimizer = Optim(trainable(adapted), rule, lr=data["lr"], where="*.u|*.v", other=Sgd())

    def pairs(_):
        parts = slot.op.v, torch.unflatten(slot.op.u, 1, (data["experts"], -1)).movedim(1, 0)
        return torch.cat([part.flatten() for part in parts])

    check_follows(adapted, optimizer.step, data, pairs)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_a_file_of_lycoris_goes_on_as_lycoris_does_and_is_written_as_it_writes(method, tmp_path):
    data = recorded(method)
    keys = {key.partition(".")[2]: torch.as_tensor(t) for key, t in data.items() if key.startswith("before.")}
    save_file({key: t.contiguous() for key, t in keys.items()}, tmp_path / "before.safetensors")
    model = nn.Sequential(layer(data))
    load_kohya(model, tmp_path / "before.safetensors")
    slot, preset = model[0].slot("default"), build(method, "adapter", rank=data["rank"], alpha=data["alpha"])
    assert slot.join == preset.join
    fresh = adapt(preset)("site", layer(data)).slot("default")
    sizes = [{key: t.shape for key, t in one.state_dict().items()} for one in (fresh, slot)]
    assert sizes[0] == sizes[1]
    check_follows(model[0], adam(model[0], data), data, close=1e-6)  # it multiplies in float32
    written = load_file(save_kohya(model, tmp_path / "after.safetensors", prefix="lycoris"))
    assert written.keys() == keys.keys()
    for key, t in written.items():
        assert_close(t, torch.as_tensor(data[f"after.{key}"]).to(t), rtol=0, atol=1e-6)
