"""A run that is saved between two refreshes and loaded elsewhere is, bit for bit, the run that went on."""

import inspect
import json
import warnings
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import subspan.methods.optimizers  # noqa: F401  (registers the presets)
from subspan import io
from subspan.edit import edit
from subspan.methods import methods
from subspan.ops import LowRank, OpLinear
from subspan.optim import Adam, Every, Optim, Projected, Recipe, Span, checkpoint

SMALL = {"rank": 3, "every": 4, "layers": 1}
PRESETS = list(methods("optimizer"))
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Block(nn.Module):
    """A tall and a wide matrix, and a bias."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Numbered blocks between a table and a head, which may be one tensor."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def net(dtype=torch.float64, *, seed=0, tied=False):
    torch.manual_seed(seed)
    return Net(tied).to(dtype)


def preset(name):
    build = methods("optimizer")[name].build
    takes = inspect.signature(build).parameters
    return build(**{key: value for key, value in SMALL.items() if key in takes})


def optimizer(model, rule, **settings):
    return Optim(model.named_parameters(), rule, **{"lr": 1e-2, "weight_decay": 0.1, "seed": 7} | settings)


def train(model, opt, steps):
    for t in steps:
        ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(t))

        def loss(ids=ids):
            return nn.functional.cross_entropy(model(ids).flatten(0, 1).double(), ids.flatten().roll(1))

        if opt.recipe.source.backward:
            opt.zero_grad()
            loss().backward()
            opt.step()
        else:
            opt.step(loss)


def by_torch(folder, model, opt, other, resumed):
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, folder / "run.pt")
    saved = torch.load(folder / "run.pt", weights_only=True, map_location="cpu")
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])


def by_folder(folder, model, opt, other, resumed):
    checkpoint.save(folder, model, opt)
    checkpoint.load(folder, other, resumed)


def by_dcp(folder, model, opt, other, resumed, options=None):
    """As torch's own guide has it; the second call makes the state of `resumed` by a step with lr 0."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        state = get_optimizer_state_dict(model, opt, options=options)
        dcp.save({"model": model.state_dict(), "opt": state}, checkpoint_id=folder, no_dist=True)
        before = {name: x.clone() for name, x in other.state_dict().items()}
        saved = {"model": other.state_dict(), "opt": get_optimizer_state_dict(other, resumed, options=options)}
        check_equal(before, other.state_dict())
        dcp.load(saved, checkpoint_id=folder, no_dist=True)
    other.load_state_dict(saved["model"])
    set_optimizer_state_dict(other, resumed, saved["opt"], options=options)


ROUTES = {"torch": by_torch, "folder": by_folder, "dcp": by_dcp, "dcp-flat": partial(by_dcp, options=FLAT)}


def check_equal(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def check_continues(tmp_path, route, rule, make, **settings):
    """Eleven steps straight, against six, saved, and five more by a model and optimizer that began otherwise."""
    straight, first, second = make(), make(), make(seed=1)
    whole, opt, resumed = (optimizer(model, rule, **settings) for model in (straight, first, second))
    train(straight, whole, range(11))
    train(first, opt, range(6))
    route(tmp_path, first, opt, second, resumed)
    check_equal(first.state_dict(), second.state_dict())
    train(second, resumed, range(6, 11))
    check_equal(straight.state_dict(), second.state_dict())
    check_equal(checkpoint.flat(whole), checkpoint.flat(resumed))
    assert [row["steps"] for row in whole.report()] == [row["steps"] for row in resumed.report()]


# torch leaves out the optimizer state of parameters that sleep (requires_grad=False), so lisa needs another route.
PAIRS = [(name, route) for name in PRESETS for route in ROUTES if name != "lisa" or "dcp" not in route]


@pytest.mark.parametrize("name, route", PAIRS)
def test_every_preset_continues_bit_for_bit(tmp_path, name, route):
    check_continues(tmp_path, ROUTES[route], preset(name), net)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_continues_in_half_precision(tmp_path, name):
    check_continues(tmp_path, by_folder, preset(name), partial(net, torch.bfloat16))


@pytest.mark.parametrize("name", PRESETS)
def test_state_is_tensors_and_groups_are_plain(name):
    model = net()
    opt = optimizer(model, preset(name))
    train(model, opt, range(6))
    saved = opt.state_dict()
    assert all(type(x) is torch.Tensor for s in saved["state"].values() for x in s.values())
    assert json.loads(json.dumps(saved["param_groups"])) == saved["param_groups"]


@pytest.mark.parametrize("solver", ["power", "exact", "gram", "random"])
def test_a_frame_keeps_its_layout_in_the_file(tmp_path, solver):
    model = net()
    opt = optimizer(model, Projected(Span(3, solver), Every(4), Adam()))
    train(model, opt, range(6))
    twin = optimizer(net(), Projected(Span(3, solver), Every(4), Adam()))
    by_folder(tmp_path, model, opt, net(), twin)
    have, want = checkpoint.flat(twin), checkpoint.flat(opt)
    assert {key: x.stride() for key, x in have.items()} == {key: x.stride() for key, x in want.items()}
    check_equal(have, want)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    check_continues(tmp_path, by_folder, preset("galore"), partial(net, tied=True))
    stored = load_file(checkpoint.newest(tmp_path) / io.WEIGHTS)
    assert ("lm_head.weight" in stored) != ("embed.weight" in stored)


def test_a_tied_model_and_an_untied_one_are_two_models(tmp_path):
    for saved, here in ((True, False), (False, True)):
        one, two = net(tied=saved), net(tied=here)
        checkpoint.save(tmp_path, one, optimizer(one, Adam()))
        with pytest.raises(ValueError, match="of another model"):
            checkpoint.load(tmp_path, two, optimizer(two, Adam()))


@pytest.mark.parametrize("settings", [{"rounding": "stochastic"}, {"maximize": True, "unmoved": "allow"}], ids=str)
def test_settings_of_the_optimizer_come_back_or_are_checked(tmp_path, settings):
    check_continues(tmp_path, by_folder, preset("fira"), partial(net, torch.bfloat16), **settings)


def test_a_rate_that_is_a_tensor_stays_one(tmp_path):
    lr = torch.tensor(0.01, dtype=torch.float64)
    check_continues(tmp_path, by_folder, preset("galore"), net, lr=lr)
    resumed = optimizer(net(), preset("galore"), lr=lr * 3)
    checkpoint.load(tmp_path, net(), resumed)
    assert [torch.equal(group["lr"], lr) for group in resumed.param_groups] == [True, True]


def test_saved_before_the_first_step(tmp_path):
    model, straight = net(), net()
    checkpoint.save(tmp_path, model, optimizer(model, preset("galore")))
    resumed = optimizer(other := net(seed=1), preset("galore"))
    checkpoint.load(tmp_path, other, resumed)
    train(other, resumed, range(5))
    train(straight, optimizer(straight, preset("galore")), range(5))
    check_equal(straight.state_dict(), other.state_dict())


def test_asking_for_the_state_before_the_first_step_changes_no_step():
    """torch.distributed.checkpoint steps with zero gradients: no frame is fitted to them, no count moves."""
    one, two = net(), net()
    opt, asked = optimizer(one, preset("galore")), optimizer(two, preset("galore"))
    get_optimizer_state_dict(two, asked)
    assert asked.steps == 0 and {int(x) for key, x in checkpoint.flat(asked).items() if "step" in key} == {0}
    train(one, opt, range(6))
    train(two, asked, range(6))
    check_equal(one.state_dict(), two.state_dict())
    check_equal(checkpoint.flat(opt), checkpoint.flat(asked))


def test_a_first_step_at_rate_zero_counts_where_there_is_a_gradient():
    """A warm-up begins at lr 0: torch's AdamW takes moments from that step, and so does ours."""
    grads = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = (nn.Parameter(torch.ones(4)) for _ in range(2))
    opts = Optim([("w", ours)], Adam(), lr=0.0), torch.optim.AdamW([theirs], lr=0.0, weight_decay=0.0)
    for lr, g in zip((0.0, 0.1, 0.1), grads, strict=True):
        for p, opt in zip((ours, theirs), opts, strict=True):
            opt.param_groups[0]["lr"], p.grad = lr, g.clone()
            opt.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert opts[0].steps == 3


def test_a_run_that_goes_on_is_not_checked_as_a_first_step(tmp_path):
    """Late in a run rates are too small for bfloat16; only a first step that moves nothing is a mistake."""
    model = net(torch.bfloat16)
    opt = optimizer(model, Adam(), lr=0.1)
    train(model, opt, range(2))
    for group in opt.param_groups:
        group["lr"] = 1e-9
    train(model, opt, range(2, 3))
    other = net(torch.bfloat16)
    resumed = optimizer(other, Adam())
    by_folder(tmp_path, model, opt, other, resumed)
    train(other, resumed, range(3, 4))
    check_equal(model.state_dict(), other.state_dict())


def test_a_mapping_saves_the_trained_weights_only(tmp_path):
    def trained(model):
        return {name: p for name, p in model.named_parameters() if name.startswith("layers.1.")}

    model, other = net(), net(seed=1)
    opt, resumed = (Optim(trained(m).items(), preset("galore"), lr=1e-2) for m in (model, other))
    train(model, opt, range(6))
    checkpoint.save(tmp_path, trained(model), opt)
    frozen = {name: p.clone() for name, p in other.named_parameters() if name not in trained(other)}
    checkpoint.load(tmp_path, trained(other), resumed)
    check_equal(trained(model), trained(other))
    check_equal(frozen, {name: p.detach() for name, p in other.named_parameters() if name in frozen})
    assert load_file(checkpoint.newest(tmp_path) / io.WEIGHTS).keys() == trained(model).keys()


def test_a_checkpoint_of_a_compressed_model_is_a_model_folder_too(tmp_path):
    def compressed(seed=0):
        model = net(seed=seed)
        noise = torch.randn(2, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        op = LowRank(noise[0, :6].clone(), noise[1].mT.contiguous())
        edit(model, ["layers.1.down"], lambda name, layer: OpLinear(op, layer.bias))
        return model.requires_grad_(True)

    check_continues(tmp_path, by_folder, preset("galore"), compressed)
    model = net(seed=2)
    io.load(checkpoint.newest(tmp_path), model)
    first = compressed()
    train(first, optimizer(first, preset("galore")), range(6))
    check_equal(model.state_dict(), first.state_dict())


EXTRA = {
    "step": 6,
    "loss": 0.1 + 0.2,
    "best": None,
    "scheduler": {"last_epoch": 3, "base_lrs": [1e-3]},
    "on": True,
}


def test_what_was_added_and_random_state_come_back(tmp_path):
    model = net()
    opt = optimizer(model, Adam())
    torch.manual_seed(5)
    checkpoint.save(tmp_path, model, opt, extra=EXTRA, rng=True)
    want = torch.rand(4)
    torch.manual_seed(6)
    assert checkpoint.load(tmp_path, model, opt) == EXTRA
    assert torch.equal(torch.rand(4), want)
    checkpoint.save(tmp_path, model, opt)
    torch.manual_seed(6)
    want = torch.rand(4)
    torch.manual_seed(6)
    assert checkpoint.load(tmp_path, model, opt) == {}
    assert torch.equal(torch.rand(4), want), "random state that was not saved is left alone"


@pytest.mark.parametrize("value", [torch.ones(1), {1: 2}, (1, 2), {"f": len}], ids=repr)
def test_what_is_not_plain_is_refused_by_name(tmp_path, value):
    model = net()
    with pytest.raises(TypeError, match=r"note=.* is not plain"):
        checkpoint.save(tmp_path, model, optimizer(model, Adam()), extra={"note": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept_and_the_newest_is_loaded(tmp_path, keep):
    model = net()
    opt = optimizer(model, Adam())
    saved = [checkpoint.save(tmp_path, model, opt, extra={"i": i}, keep=keep) for i in range(5)]
    assert sorted(tmp_path.iterdir()) == saved[-keep:]
    assert checkpoint.newest(tmp_path) == saved[-1]
    for i, path in enumerate(saved):
        if path in saved[-keep:]:
            assert checkpoint.load(path, model, opt) == {"i": i}
    assert checkpoint.load(tmp_path, model, opt) == {"i": 4}
    with pytest.raises(ValueError, match="keep=0 would keep none"):
        checkpoint.save(tmp_path, model, opt, keep=0)


def test_folders_of_others_are_left_alone(tmp_path):
    names = ["saved-notes", "000001", "saved-000009", ".saved-000001.partial-mine", "checkpoint-500"]
    for name in names:
        (tmp_path / name).mkdir()
    model = net()
    for _ in range(2):
        checkpoint.save(tmp_path, model, optimizer(model, Adam()))
    assert {p.name for p in tmp_path.iterdir()} == {*names, "saved-000002"}


def test_loading_writes_into_the_tensors_that_are_there(tmp_path):
    """Views, graphs and other optimizers that hold the weights see the loaded ones."""
    model, other = net(), net(seed=1)
    held = {name: x.data_ptr() for name, x in other.state_dict().items()}
    by_folder(tmp_path, model, optimizer(model, Adam()), other, optimizer(other, Adam()))
    assert {name: x.data_ptr() for name, x in other.state_dict().items()} == held
    check_equal(model.state_dict(), other.state_dict())


def test_a_recipe_says_what_differs_wherever_it_is(tmp_path):
    model = net()
    checkpoint.save(tmp_path, model, optimizer(model, Recipe(Adam(), other=Adam(b1=0.8))))
    with pytest.raises(ValueError, match=r"\(other\.b1: 0\.8 saved, 0\.9 here; seed: 7 saved, 8 here\)"):
        checkpoint.load(tmp_path, model, optimizer(model, Adam(), seed=8))


def test_described_values_tell_presets_apart():
    seen = [json.dumps(checkpoint.described(preset(name))) for name in PRESETS]
    assert len(set(seen)) == len(seen)
    for text, name in zip(seen, PRESETS, strict=True):
        assert list(checkpoint.differing(json.loads(text), checkpoint.described(preset(name)))) == []
