"""Optimizers that project gradients, on whole weights and on the factors of adapters, in one run."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan.adapt import adapt, trainable
from subspan.edit import edit
from subspan.methods import build
from subspan.methods.optimizers import fira, galore
from subspan.optim import Adam, Optim, checkpoint

N, STEPS = 10, 6
RULES = {"galore": galore(rank=2, every=2, scale=1.0), "fira": fira(rank=2, every=2, scale=1.0)}
ADAPTERS = {"lora": {"rank": 4}, "dora": {"rank": 4}, "lokr": {"rank": 3, "factor": 2}}


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net(method):
    """A layer that trains whole, and one under an adapter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N)).double()
    edit(model, ["2"], adapt(build(method, "adapter", **ADAPTERS[method])))
    with torch.no_grad():
        for i, (_, p) in enumerate(trainable(model)):
            p.add_(0.2 * noise(*p.shape, seed=i))
    return model


def named(model):
    """The whole layer, and what the adapter trains."""
    return {"0.weight": model[0].weight}, dict(trainable(model))


def walk(model, opt, steps):
    losses = []
    for t in steps:
        opt.zero_grad()
        x = noise(16, N, seed=100 + t)
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def check_same_bits(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ADAPTERS)
def test_whole_weights_and_factors_are_projected_each_in_its_own_subspace(method, rule):
    model = net(method)
    whole, added = named(model)
    opt = Optim((whole | added).items(), RULES[rule], lr=1e-2, where=lambda _, p: p.ndim == 2 and min(p.shape) > 2)
    walk(model, opt, range(STEPS))
    wide = {name: p for name, p in (whole | added).items() if p.ndim == 2 and min(p.shape) > 2}
    assert "0.weight" in wide and len(wide) > 1
    for p in wide.values():
        q = opt.state[p]["frame.q"]
        assert_close(q.mT @ q, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-10)
        assert opt.state[p]["rule.mu"].numel() == 2 * max(p.shape)
    assert all("frame.q" not in opt.state[p] for name, p in added.items() if name not in wide)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ADAPTERS)
def test_each_part_moves_as_it_would_alone_and_the_base_stays(method, rule):
    together = net(method)
    whole, added = named(together)
    before = {name: p.clone() for name, p in together.named_parameters()}
    walk(together, Optim((whole | added).items(), RULES[rule], lr=1e-2, where="0.weight", other=Adam()), range(1))
    for part, (law, where) in enumerate(((RULES[rule], "0.weight"), (Adam(), "*"))):
        model = net(method)
        mine = named(model)[part]
        walk(model, Optim(mine.items(), law, lr=1e-2, where=where), range(1))
        now = dict(together.named_parameters())
        check_same_bits({n: now[n] for n in mine}, {n: dict(model.named_parameters())[n] for n in mine})
        assert all(not torch.equal(now[n], before[n]) for n in mine)
    moved = whole.keys() | added.keys()
    assert all(torch.equal(p, before[n]) for n, p in together.named_parameters() if n not in moved)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_of_both_learns_and_goes_on_bit_for_bit(rule, tmp_path):
    def start():
        model = net("dora")
        whole, added = named(model)
        return model, Optim((whole | added).items(), RULES[rule], lr=1e-2, where="0.weight|*.u", other=Adam())

    (straight, opt), (first, half), (second, rest) = start(), start(), start()
    losses = walk(straight, opt, [0] * 40)
    assert losses[-1] < 0.7 * losses[0]
    walk(first, half, [0] * 15)
    checkpoint.save(tmp_path, first, half)
    checkpoint.load(tmp_path, second, rest)
    walk(second, rest, [0] * 25)
    check_same_bits(straight.state_dict(), second.state_dict())
