"""Layers asleep do not move, cost nothing, and wake as a resumed run expects; all awake is the plain optimizer."""

import copy

import pytest
import torch
from torch import nn

from subspan.methods.optimizers import lisa, mezo
from subspan.optim import Adam, All, Optim, RandomLayers, Recipe, ledger
from subspan.optim.awake import block

BLOCKS = 5


class Net(nn.Module):
    """A table, numbered blocks with a norm, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6, bias=False)) for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(self.norm(x))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def loss_of(model, step):
    ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(ids).flatten(0, 1).double(), ids.flatten().roll(1))


def train(model, opt, steps):
    for step in steps:
        opt.zero_grad()
        loss_of(model, step).backward()
        opt.step()


def optimizer(model, recipe, **settings):
    return Optim(model.named_parameters(), recipe, lr=1e-2, weight_decay=0.1, seed=7, **settings)


def awake_blocks(model):
    return {block(name) for name, p in model.named_parameters() if p.requires_grad} - {None}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("every", [1, 3, 10**9])
@pytest.mark.parametrize("state", ["drop", "keep"])
def test_all_layers_awake_is_adam_bit_for_bit(every, state):
    one, two = net(), net()
    train(one, optimizer(one, Adam()), range(7))
    train(two, optimizer(two, lisa(layers=BLOCKS, every=every, state=state)), range(7))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("state", ["drop", "keep"])
def test_a_sleeping_block_is_bit_identical_and_everything_else_moves(state):
    model = net()
    opt = optimizer(model, lisa(layers=2, every=3, state=state))
    slept = set()
    for step in range(12):
        awake, before = awake_blocks(model), snapshot(model)
        assert len(awake) == 2
        opt.zero_grad()
        loss_of(model, step).backward()
        assert {n for n, p in model.named_parameters() if p.grad is None} == set(opt.asleep)
        opt.step()
        for name, p in model.named_parameters():
            rests = block(name) is not None and block(name) not in awake
            assert torch.equal(p, before[name]) == rests, name
            slept |= {name} if rests else set()
        if step % 3 != 2:
            assert awake_blocks(model) == awake
    assert {block(name) for name in slept} == {f"layers.{i}" for i in range(BLOCKS)}


def test_a_stale_gradient_does_not_wake_a_layer():
    model = net()
    opt = optimizer(model, lisa(layers=1, every=100))
    loss_of(model, 0).backward()
    before = snapshot(model)
    for name, p in model.named_parameters():
        if name in opt.asleep:
            p.grad = torch.ones_like(p)
    opt.step()
    assert {n for n, p in model.named_parameters() if torch.equal(p, before[n])} == set(opt.asleep)


def test_state_is_that_of_the_awake_only_and_kept_state_goes_on():
    dropped, kept = net(), net()
    opts = [optimizer(m, lisa(layers=2, every=2, state=s)) for m, s in ((dropped, "drop"), (kept, "keep"))]
    for step in range(1, 13):
        for model, opt in zip((dropped, kept), opts, strict=True):
            train(model, opt, [step])
        stepped = {n: p for n, p in dropped.named_parameters() if p in opts[0].state}
        assert not set(stepped) & opts[0].asleep
        held = sum(2 * p.nbytes + 8 for p in stepped.values())  # two moments and a counter
        assert opts[0].state_bytes() == held
        if step % 2:
            assert set(stepped) == {n for n, _ in dropped.named_parameters()} - opts[0].asleep
    counts = {n: int(opts[1].state[p]["step"]) for n, p in kept.named_parameters() if p in opts[1].state}
    assert sum(counts[f"layers.{i}.0.weight"] for i in range(BLOCKS) if f"layers.{i}.0.weight" in counts) == 24
    assert counts["embed.weight"] == 12


@pytest.mark.parametrize(
    "recipe", [lisa(), lisa(layers=9), lisa(layers=1, every=1, state="keep"), mezo(), Adam()], ids=repr
)
def test_the_ledger_foretells_state_and_gradients(recipe):
    model = net()
    found, plain = (ledger(net().named_parameters(), x).totals for x in (recipe, Adam()))
    opt = optimizer(model, recipe)
    by_backward = opt.recipe.source.backward
    for step in range(60 if opt.recipe.awake.state == "keep" else 5):
        opt.zero_grad()
        if by_backward:
            loss_of(model, step).backward()
        grads = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        opt.step(None if by_backward else lambda: loss_of(model, 0))
        assert grads == found["gradient_bytes"]
    assert opt.state_bytes() == found["state_bytes"]
    assert found["adamw_state_bytes"] == plain["state_bytes"]


def test_a_layer_that_wakes_without_state_begins_anew():
    """Adam's first step has length lr in every entry, and so has the first after sleep unless state was kept."""
    off = {"drop": [], "keep": []}
    for state, found in off.items():
        model, seen, last = net(), set(), None
        recipe = lisa(layers=1, every=1, state=state, rule=Adam(eps=1e-30))
        opt = Optim(model.named_parameters(), recipe, lr=1e-2)
        for step in range(40):
            (name,) = awake_blocks(model)
            p = model.get_parameter(f"{name}.0.weight")
            before = p.detach().clone()
            train(model, opt, [step])
            if name in seen and name != last:
                found.append(float(((p.detach() - before).abs() - 1e-2).abs().max()))
            seen, last = seen | {name}, name
    assert len(off["drop"]) > 20 and max(off["drop"]) < 1e-12 and min(off["keep"]) > 1e-4


def test_every_block_is_drawn_as_often_as_its_share():
    names, draws = [f"h.{i}.w" for i in range(8)], 4000
    rule = RandomLayers(3, 10)
    hits, pairs = torch.zeros(8), 0
    for k in range(draws):
        drawn = rule.draw(names, seed=5, steps=10 * k + 9)
        assert drawn == rule.draw(names, seed=5, steps=10 * k) and sum(drawn.values()) == 3
        hits += torch.tensor([drawn[name] for name in names])
        pairs += drawn["h.0.w"] and drawn["h.1.w"]
    # five standard deviations: p = 3/8 for a block, 3/8 * 2/7 for two together, without replacement
    for count, p in [*((hit, 3 / 8) for hit in hits), (pairs, 3 / 28)]:
        assert abs(count / draws - p) < 5 * (p * (1 - p) / draws) ** 0.5


def test_draws_are_independent_of_each_other_and_of_the_seed():
    names, draws = [f"h.{i}.w" for i in range(4)], 4000
    rule = RandomLayers(1, 1)
    first = [rule.draw(names, seed=0, steps=k) for k in range(draws + 1)]
    other = [rule.draw(names, seed=1, steps=k) for k in range(draws)]
    for again in (first[1:], other):
        same = sum(a == b for a, b in zip(first, again, strict=False)) / draws
        assert abs(same - 1 / 4) < 5 * (1 / 4 * 3 / 4 / draws) ** 0.5


def test_draws_do_not_depend_on_the_order_of_names():
    names = [f"h.{i}.{kind}" for i in range(12) for kind in ("w", "b")]
    assert RandomLayers(3).draw(names, seed=2, steps=0) == RandomLayers(3).draw(names[::-1], seed=2, steps=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", ["drop", "keep"])
@pytest.mark.parametrize("saved_after", [5, 6])
def test_a_saved_run_continues_bit_for_bit_inside_an_interval(state, dtype, saved_after, tmp_path):
    recipe = lisa(layers=2, every=3, state=state)
    straight, first, second = net(dtype), net(dtype), net(dtype)
    train(straight, optimizer(straight, recipe), range(11))

    opt = optimizer(first, recipe)
    train(first, opt, range(saved_after))
    torch.save({"model": first.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second.load_state_dict(saved["model"])
    resumed = optimizer(second, recipe)
    resumed.load_state_dict(saved["opt"])
    assert resumed.asleep == opt.asleep and resumed.steps == saved_after
    assert awake_blocks(second) == awake_blocks(first)
    train(second, resumed, range(saved_after, 11))
    for name, p in straight.named_parameters():
        assert torch.equal(p, second.get_parameter(name)), name
    assert awake_blocks(second) == awake_blocks(straight)


def test_a_deep_copy_sleeps_alike():
    model = net()
    opt = optimizer(model, lisa(layers=1, every=2))
    train(model, opt, range(3))
    twin, twin_opt = copy.deepcopy((model, opt))
    train(model, opt, range(3, 8))
    train(twin, twin_opt, range(3, 8))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_new_optimizer_wakes_what_an_earlier_one_left_asleep():
    model = net()
    optimizer(model, lisa(layers=1))
    optimizer(model, lisa(layers=BLOCKS))
    assert all(p.requires_grad for p in model.parameters())


def test_spsa_moves_the_awake_only():
    model = net()
    opt = optimizer(model, Recipe(mezo().rule, mezo(eps=1e-2).source, RandomLayers(2, 4), mezo().other))
    for _ in range(3):
        before, asleep = snapshot(model), set(opt.asleep)
        opt.step(lambda: loss_of(model, 0))
        assert {n for n, p in model.named_parameters() if torch.equal(p, before[n])} == asleep
        assert len({block(name) for name in asleep}) == BLOCKS - 2


def test_the_first_step_asks_nothing_of_sleeping_layers():
    model = net()
    opt = optimizer(model, lisa(layers=1))
    train(model, opt, [0])
    assert len(opt.asleep) == 3 * (BLOCKS - 1) and not opt.watch
    fresh = optimizer(model, lisa(layers=1))
    with pytest.raises(RuntimeError, match=r"embed\.weight has no gradient") as refused:
        fresh.zero_grad()
        fresh.step()
    assert not any(name in str(refused.value) for name in fresh.asleep)


def test_all_governs_nothing():
    model = net()
    model.norm.weight.requires_grad_(False)
    Optim(model.named_parameters(), Recipe(Adam(), awake=All()), lr=1e-2)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["norm.weight"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RandomLayers(0), "count=0 is less than 1"),
        (lambda: RandomLayers(2, 0), "every=0 is less than 1"),
        (lambda: RandomLayers(state="reset"), "use 'drop' or 'keep'"),
        (
            lambda: Optim(nn.Linear(3, 2).named_parameters(), lisa(), lr=1.0),
            r"no parameter is in a numbered block such as layers\.3; there are: weight, bias",
        ),
    ],
)
def test_a_wrong_setting_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
