"""Layers out of shared pools are LoRAs of gathered factors, and a pool is one parameter wherever it is used."""

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close

from subspan import io
from subspan.adapt import Adapted, Adapter, Add, SharedShards, Sharing, adapt, merge, prepare, trainable
from subspan.adapt.data import Remembered, remembered
from subspan.edit import edit
from subspan.hosts.folders import added, put_adapter, save_adapter
from subspan.hosts.peft_change import as_lora
from subspan.hosts.peft_read import read_adapter
from subspan.methods.adapters import lora, mos
from subspan.ops import Shards
from subspan.optim import Adam, Optim, checkpoint

LAYERS, WIDE, HIGH = 3, 8, 12


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Layers of three types: two that share a name but not a shape, and one alike in shape only."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.h = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDE, HIGH), "down": nn.Linear(HIGH, WIDE), "q": nn.Linear(WIDE, HIGH)})
            for _ in range(LAYERS)
        )
        self.head = nn.ModuleDict({"up": nn.Linear(WIDE, WIDE)})
        for i, p in enumerate(self.double().parameters()):
            p.data.copy_(0.3 * rand(*p.shape, seed=seed + i))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.h:
            x = x + layer["down"](torch.tanh(layer["up"](x)) * layer["q"](x))
        return self.head["up"](x)


SITES = [f"h.{i}.{key}" for i in range(LAYERS) for key in ("up", "down", "q")]
ARGS = {"rank": 3, "alpha": 6.0, "budget": 2, "parts": 2, "private": 1}
X = rand(5, WIDE, seed=99)


def put(model: nn.Module, adapter: Adapter, names: list[str] = SITES) -> nn.Module:
    found = {name: model.get_submodule(name) for name in names}
    edit(model, names, adapt(prepare(adapter, model, found)))
    return model


def made(**more) -> nn.Module:
    return put(Net(), mos(**ARGS | more))


def moved(model: nn.Module, seed: int = 3) -> nn.Module:
    with torch.no_grad():
        for i, (_, p) in enumerate(trainable(model)):
            p.add_(0.3 * rand(*p.shape, seed=seed + i).to(p.dtype))
    return model


def pair(model: nn.Module, name: str) -> tuple[Shards, Shards]:
    """The columns and the rows of a site."""
    left, right = model.get_submodule(name).slot("default").op.ops
    return left.op, right


def step(model: nn.Module) -> None:
    walk(model, Optim(trainable(model), Adam(), lr=0.01), 3)


def walk(model: nn.Module, optimizer: Optim, count: int) -> None:
    for t in range(count):
        optimizer.zero_grad()
        model(rand(5, WIDE, seed=t)).square().mean().backward()
        optimizer.step()


# ---- what it is


def test_it_starts_at_the_base_and_merges_to_what_it_says():
    model = made()
    assert torch.equal(model(X), Net()(X))
    moved(model)
    for name in SITES:
        adapted, (columns, rows) = model.get_submodule(name), pair(model, name)
        b = torch.stack([columns.pool[columns.index[2 * k : 2 * k + 2].long()].flatten() for k in range(3)], 1)
        a = torch.stack([rows.pool[rows.index[2 * k : 2 * k + 2].long()].flatten() for k in range(3)])
        assert_close(adapted.weight - adapted.base.weight, 6.0 / 3 * b @ a)
        assert torch.linalg.matrix_rank(b @ a) == 3
    folded, expected = copy.deepcopy(model), model(X)
    edit(folded, SITES, lambda name, m: merge(m))
    assert_close(folded(X), expected, rtol=0, atol=1e-12)


def test_types_are_names_and_shapes_and_a_type_trains_as_many_numbers_as_lora_of_the_budget():
    model = put(Net(), mos(**ARGS | {"rank": 2}), [*SITES, "head.up"])
    holders = {name: [id(s.pool) for s in pair(model, name)] for name in [*SITES, "head.up"]}
    groups = {tuple(ids): [n for n in holders if holders[n] == ids] for ids in holders.values()}
    assert sorted(groups.values()) == sorted(
        [[f"h.{i}.{key}" for i in range(LAYERS)] for key in ("up", "down", "q")] + [["head.up"]]
    )
    plain = put(Net(), lora(rank=2), [*SITES, "head.up"])
    assert sum(p.numel() for _, p in trainable(model)) == sum(p.numel() for _, p in trainable(plain))
    assert len(trainable(model)) == 2 * 4
    for ids, names in groups.items():
        m, n = model.get_submodule(names[0]).base.weight.shape
        pools = {id(s.pool): s.pool for s in pair(model, names[0])}
        assert set(pools) == set(ids) and sum(p.numel() for p in pools.values()) == 2 * len(names) * (m + n)


def test_private_rows_alone_are_lora_bit_for_bit():
    one, two = (
        put(Net(), mos(rank=2, alpha=4.0, budget=2, parts=1, private=2)),
        put(Net(), lora(rank=2, alpha=4.0)),
    )
    for name in SITES:
        assert torch.equal(pair(one, name)[1].dense(), two.get_submodule(name).slot("default").op.v)
    for model in (one, two):
        step(model)
    for name in SITES:
        a, b = one.get_submodule(name), two.get_submodule(name)
        assert_close(a.weight, b.weight, rtol=0, atol=1e-12)
        assert (a.weight - a.base.weight).norm() > 1e-3


# ---- which shards


@pytest.mark.parametrize("seed", [0, 5])
def test_a_layer_draws_common_shards_without_replacement_and_owns_the_rest(seed):
    model, common = made(seed=seed), (2 - 1) * LAYERS * 2
    seen = set()
    for i in range(LAYERS):
        for index in (s.index for s in pair(model, f"h.{i}.up")):
            drawn, own = index[:4].tolist(), index[4:].tolist()
            assert len(set(drawn)) == 4 and set(drawn) <= set(range(common))
            assert own == [common + 2 * i, common + 2 * i + 1]
            seen.add(tuple(drawn))
    assert len(seen) == 2 * LAYERS and index.dtype == torch.int32


def test_draws_follow_from_the_seed_and_the_site_alone():
    one, two, other = made(), made(), made(seed=1)
    model = Net()
    before = torch.get_rng_state()
    fewer = put(model, mos(**ARGS), [n for n in SITES if n.endswith("up")])
    assert torch.equal(torch.get_rng_state(), before)
    for name in SITES:
        a, b, c = (torch.cat([s.index for s in pair(m, name)]) for m in (one, two, other))
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert torch.equal(pair(one, name)[1].pool, pair(two, name)[1].pool)
        assert not torch.equal(pair(one, name)[1].pool, pair(other, name)[1].pool)
        if name.endswith("up"):
            assert torch.equal(a, torch.cat([s.index for s in pair(fewer, name)]))


def test_a_fresh_pool_is_uniform_within_one_over_the_root_of_the_whole_width():
    pool = SharedShards(4, 8, 4, 2).ops(("q", 400, 400), ["0.q", "1.q", "2.q"], torch.empty(0).double())["1.q"]
    left, right = pool.ops[0].op.pool, pool.ops[1].pool
    assert right.shape == (8 * 3 * 4, 100) and not left.any()
    assert right.abs().max() <= 400**-0.5
    assert_close(right.var().item(), 1 / 400 / 3, rtol=0.05, atol=0)


# ---- one parameter


def test_a_pool_gets_the_sum_of_what_its_layers_factors_get():
    model = moved(made())
    model(X).square().sum().backward()
    for key in ("up", "down", "q"):
        names = [f"h.{i}.{key}" for i in range(LAYERS)]
        want = [torch.zeros_like(s.pool) for s in pair(model, names[0])]
        for name in names:
            adapted = model.get_submodule(name)
            g = _gradient_of_the_weight(model, name)
            u, v = (s.dense() for s in pair(model, name))
            factors = (2 * g @ v.T).T, 2 * u @ g
            for total, s, factor in zip(want, pair(model, name), factors, strict=True):
                total.index_add_(0, s.index, factor.reshape(-1, s.pool.shape[1]))
            assert adapted.slot("default").join == Add(2.0)
        for s, total in zip(pair(model, names[0]), want, strict=True):
            assert_close(s.pool.grad, total, rtol=1e-9, atol=1e-10)


def _gradient_of_the_weight(model: nn.Module, name: str) -> torch.Tensor:
    dense = copy.deepcopy(model)
    edit(dense, SITES, lambda _, m: merge(m))
    dense(X).square().sum().backward()
    return dense.get_submodule(name).weight.grad


def test_private_rows_get_a_gradient_from_their_layer_only():
    model = moved(made())
    for i in range(LAYERS):
        model.zero_grad()
        model.get_submodule(f"h.{i}.up")(X).square().sum().backward()
        for s in pair(model, "h.0.up"):
            rows = s.pool.grad.abs().sum(1)
            private = rows[LAYERS * 2 :].view(LAYERS, 2)
            assert (private[i] > 0).all() and private.sum() == private[i].sum()
            assert (rows[: LAYERS * 2] > 0).sum() == 4


def test_the_optimizer_steps_a_pool_once_and_copies_stay_tied():
    model = made()
    named = trainable(model)
    assert len(named) == len({id(p) for _, p in named}) == 6
    other = copy.deepcopy(model)
    step(model)
    assert torch.equal(other(X), Net()(X)) and not torch.allclose(model(X), other(X))
    for key in ("up", "down", "q"):
        for m in (model, other, copy.deepcopy(model).float()):
            pools = {tuple(id(s.pool) for s in pair(m, f"h.{i}.{key}")) for i in range(LAYERS)}
            assert len(pools) == 1


def test_one_prepared_adapter_is_put_on_many_models_which_share_nothing():
    model = Net()
    start = prepare(mos(**ARGS), model, {name: model.get_submodule(name) for name in SITES})
    models = [Net(), Net()]
    for one in models:
        edit(one, SITES, adapt(start))
    step(models[0])
    assert torch.equal(models[1](X), Net()(X)) and not torch.allclose(models[0](X), models[1](X))


# ---- on disk


def test_a_folder_holds_each_pool_once_and_brings_back_the_tie_and_every_bit(tmp_path):
    model = moved(made())
    save_adapter(tmp_path / "a", model, method="mos", args=ARGS, source="none")
    with safe_open(tmp_path / "a" / io.WEIGHTS, "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    floats = sum(t.numel() for t in stored.values() if t.is_floating_point())
    assert floats == sum(p.numel() for _, p in trainable(model))
    fresh = Net()
    put_adapter(fresh, tmp_path / "a", io.read_about(tmp_path / "a"))
    assert torch.equal(fresh(X), model(X))
    for name in SITES:
        assert all(
            torch.equal(a.index, b.index) for a, b in zip(pair(fresh, name), pair(model, name), strict=True)
        )
    assert [(n, p.shape) for n, p in trainable(fresh)] == [(n, p.shape) for n, p in trainable(model)]
    for one in (fresh, model):
        step(one)
    assert torch.equal(fresh(X), model(X)) and len(added(fresh)) == 4 * len(SITES)


def test_a_folder_is_cut_to_plain_lora_without_any_error(tmp_path):
    model = moved(made())
    save_adapter(tmp_path / "a", model, method="mos", args=ARGS, source="none")
    base = Net()
    for rank in (None, 3):
        cut = as_lora(read_adapter(tmp_path / "a"), lambda site: base.get_submodule(site).weight, rank)
        assert cut.error == 0.0 and set(cut.errors.values()) == {0.0}
        for site, factor in cut.factors.items():
            adapted = model.get_submodule(site)
            assert factor.u.shape[1] == 3
            assert_close(adapted.weight, adapted.base.weight + factor.u @ factor.v, rtol=0, atol=1e-12)
    narrow = as_lora(read_adapter(tmp_path / "a"), lambda site: base.get_submodule(site).weight, 2)
    assert 0 < narrow.error < 1


def test_a_damaged_folder_says_what_it_lacks(tmp_path):
    model = moved(made())
    save_adapter(tmp_path / "a", model, method="mos", args=ARGS, source="none")
    tensors = io.read_tensors(tmp_path / "a" / io.WEIGHTS)
    del tensors["h.1.up.adapters.default.op.ops.1.index"]
    io.write_tensors(tmp_path / "a" / io.WEIGHTS, tensors, tied=True)
    with pytest.raises(ValueError, match=r"h\.1\.up: the saved adapter lacks op\.ops\.1\.index; copy or save"):
        put_adapter(Net(), tmp_path / "a", io.read_about(tmp_path / "a"))


def test_what_is_one_tensor_under_two_names_is_so_again_when_read(tmp_path):
    a, b = torch.ones(3), torch.ones(3)
    io.write_tensors(tmp_path / "x", {"one": a, "two": b, "three": a}, tied=True)
    found = io.read_tensors(tmp_path / "x")
    assert set(found) == {"one", "two", "three"} and all(torch.equal(t, a) for t in found.values())
    assert found["one"] is found["three"] and found["one"] is not found["two"]
    with pytest.raises(RuntimeError, match="share memory"):
        io.write_tensors(tmp_path / "y", {"one": a, "three": a})


def test_a_remembered_start_ties_only_what_was_saved_as_one():
    tensors = {}
    for site, pools in (("a.q", (0, 1)), ("b.q", (0, 2))):
        for key, i in zip(("op.ops.0.op.pool", "op.ops.1.pool"), pools, strict=True):
            tensors[f"{site}.adapters.default.{key}"] = POOLS[i]
    for site in ("a.q", "b.q"):
        for key in ("op.ops.0.op.index", "op.ops.1.index"):
            tensors[f"{site}.adapters.default.{key}"] = torch.tensor([0, 1], dtype=torch.int32)
    adapter = remembered(mos(rank=1, budget=1, parts=2), tensors)
    assert isinstance(adapter.op, Remembered) and issubclass(Remembered, Sharing)
    start, w = adapter.op.begin(), rand(4, 6)
    one, two = start("a.q", w), start("b.q", w)
    assert one.ops[0].op.pool is two.ops[0].op.pool and one.ops[1].pool is not two.ops[1].pool
    assert adapter.op("a.q", w).ops[0].op.pool is not one.ops[0].op.pool


POOLS = [torch.zeros(2, 2).double(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double()]


def test_a_run_goes_on_from_a_checkpoint_of_the_whole_model(tmp_path):
    model, fresh = made(), made()
    one, two = (Optim(trainable(m), Adam(), lr=0.01) for m in (model, fresh))
    walk(model, one, 3)
    checkpoint.save(tmp_path, model, one)
    checkpoint.load(tmp_path, fresh, two)
    for m, optimizer in ((model, one), (fresh, two)):
        walk(m, optimizer, 2)
    assert torch.equal(fresh(X), model(X)) and not torch.allclose(model(X), Net()(X))


# ---- what is refused


def test_a_start_that_has_not_seen_the_sites_says_how_to_show_them():
    with pytest.raises(
        ValueError, match=r"h\.0\.up, .*SharedShards\(.*this model with prepare\(adapter, model, sites\)"
    ):
        edit(Net(), SITES, adapt(mos(**ARGS)))


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"parts": 0}, "parts 0 must be at least 1"),
        ({"parts": 5}, r"h\.0\.up: parts 5 does not divide 12 and 8"),
        ({"private": 3}, r"private 3 is outside 0\.\.min\(budget, rank\), with budget 2"),
        ({"private": -1}, "private -1 is outside"),
        ({"budget": 0, "private": 0}, "budget 0"),
        ({"rank": 5}, r"h\.0\.up: rank 5 takes more.*the 3 layers.*a rank of at most 4"),
        ({"rank": 9}, r"h\.0\.up: rank 9 is outside"),
    ],
)
def test_settings_that_do_not_work_out_are_refused(args, match):
    with pytest.raises(ValueError, match=match):
        made(**args)


def test_shards_come_in_whole_rows():
    with pytest.raises(ValueError, match="3 shards are no rows of 2"):
        Shards(rand(4, 2), torch.tensor([0, 1, 2]), 2)
    assert isinstance(made().get_submodule("h.0.up"), Adapted)
