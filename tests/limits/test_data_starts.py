"""Starts that look at data: what they see is exact, and what they start from is what their papers say."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.adapt import (
    Adapted,
    Add,
    FromData,
    FromGradient,
    GradientSpan,
    GradientStep,
    MeanGradient,
    Principal,
    SignStep,
    TopInputs,
    UpdateCore,
    adapt,
    gradients,
    merge,
    prepare,
    principal,
    remembered,
    trainable,
)
from subspan.adapt.data import components, rounds, shared_out, size_of
from subspan.adapt.layer import Adapter
from subspan.adapt.seen import leading
from subspan.cli import main
from subspan.compress import Calibration
from subspan.edit import edit, sites
from subspan.hosts import folders, jobs, lessons, score, text
from subspan.hosts.foretold import Foretold, foretold
from subspan.hosts.jobs import forward
from subspan.hosts.jobs import loss as nll
from subspan.hosts.text import prose
from subspan.hosts.training import draw
from subspan.io import read_about
from subspan.linalg import svd
from subspan.methods import build, find
from subspan.methods.adapters import eva, lora_ga, lora_one, lora_sb
from subspan.metric import Covariance, Metric
from subspan.ops import LowRank, OpLinear, Zero

M, N, RANK = 12, 10, 3
LOOKING = ["eva", "lora_ga", "lora_one", "lora_sb"]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Two layers on one input, and one on what they make; its data has a mean and few strong directions."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"q": (N, M), "k": (N, M), "o": (M, 11)}
        for i, (name, (n, m)) in enumerate(sizes.items()):
            layer = nn.Linear(n, m, dtype=torch.float64)
            layer.weight.data.copy_(rand(m, n, seed=i) / n**0.5)
            layer.bias.data.copy_(rand(m, seed=i + 9))
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x))


def batches(count: int = 3) -> list[torch.Tensor]:
    spread = torch.diag(2.0 ** -torch.arange(N, dtype=torch.float64))
    return [rand(2, 8, N, seed=20 + i) @ spread @ rand(N, N, seed=3) + 1.0 for i in range(count)]


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model(x), rand(11, seed=40).expand(*x.shape[:-1], 11))


def call(model: nn.Module, x: torch.Tensor) -> object:
    return model(x)


DATA = Calibration(batches(), call, loss)


@pytest.fixture
def net() -> Net:
    return Net()


def full_gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    """Of the loss over all batches as one."""
    model = copy.deepcopy(net)
    loss(model, torch.cat(batches())).backward()
    return {name: layer.weight.grad for name, layer in model.named_children()}


def looked(adapter: Adapter, net: nn.Module, data: Calibration = DATA, **settings: int) -> Adapter:
    return prepare(adapter, net, sites(net), data, **settings)


def check_same_up_to_sign(a: torch.Tensor, b: torch.Tensor) -> None:
    assert_close((a * b).sum(-1).abs(), torch.ones(len(a), dtype=a.dtype), rtol=0, atol=1e-9)


# What is collected.


@pytest.mark.parametrize("most", [2**30, 1])
def test_the_collected_gradients_are_those_of_the_full_batch(net, most):
    net.requires_grad_(False)
    expected = full_gradients(Net())
    found = dict(gradients(net, sites(net), DATA, most=most))
    assert list(found) == ["q", "k", "o"]
    for name, g in found.items():
        assert_close(g, expected[name], rtol=0, atol=1e-14)
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


def test_of_a_half_precision_model_gradients_are_summed_in_float32():
    net = Net().bfloat16()
    data = Calibration([b.bfloat16() for b in batches()], call, lambda m, x: m(x).float().square().mean())
    ones = [dict(gradients(net, sites(net), Calibration([b], call, data.loss)))["o"] for b in data.batches]
    mean = dict(gradients(net, sites(net), data))["o"]
    assert mean.dtype == torch.float32
    assert_close(mean, sum(ones) / 3, rtol=1e-6, atol=0)


def test_no_more_than_the_asked_bytes_of_gradients_are_held(net, monkeypatch):
    passes = []
    read = Calibration.read

    def counted(self, model, measure, found, counts=None):
        passes.append(list(found))
        return read(self, model, measure, found, counts)

    monkeypatch.setattr(Calibration, "read", counted)
    dict(gradients(net, sites(net), DATA, most=2 * 8 * (2 * M * N)))
    assert passes == [["q", "k"], ["o"]]


def test_rounds_keep_order_and_bounds():
    sizes = {str(i): i for i in range(1, 8)}
    parts = list(rounds(sizes, 9))
    assert [name for part in parts for name in part] == list(sizes)
    assert all(sum(sizes[n] for n in part) <= 9 for part in parts) and list(rounds({}, 9)) == []


def test_the_gradient_itself_is_the_statistic():
    g = rand(M, N)
    assert torch.equal(MeanGradient().fold(g), g)
    assert isinstance(MeanGradient().metric(g), Metric) and MeanGradient().metric(g).right is None


@pytest.mark.parametrize("most", [2**30, 1])
def test_the_directions_are_the_exact_principal_components_of_all_inputs(net, most):
    x = torch.cat(batches()).flatten(0, 1)
    hidden = (torch.tanh(net.q(x)) * net.k(x)).detach()
    found = principal(net, sites(net), DATA, {"q": 4, "k": 2, "o": 3}, most=most)
    for name, data, k in (("q", x, 4), ("k", x, 2), ("o", hidden, 3)):
        _, s, vh = torch.linalg.svd(data - data.mean(0), full_matrices=False)
        check_same_up_to_sign(found[name].rows, vh[:k])
        assert isinstance(found[name], Principal)
        assert_close(found[name].shares, (s.square() / s.square().sum())[:k], rtol=1e-9, atol=1e-14)


def test_a_random_solver_finds_the_same_directions(net):
    x = torch.cat(batches()).flatten(0, 1)
    both = Covariance().fold(x) / len(x)
    exact, quick = components(both, 3), components(both, 3, solver="random")
    assert_close(quick.rows, exact.rows, rtol=0, atol=1e-9)
    assert_close(quick.shares, exact.shares, rtol=1e-9, atol=0)


def test_constant_inputs_explain_nothing():
    x = torch.ones(5, N, dtype=torch.float64)
    assert torch.equal(components(Covariance().fold(x) / 5, 2).shares, torch.zeros(2, dtype=torch.float64))


# EVA.


def test_eva_starts_at_zero_along_the_principal_directions(net):
    adapter = looked(eva(rank=RANK, rho=1.0), net)
    x = torch.cat(batches()).flatten(0, 1)
    op = adapter.op("q", net.q.weight)
    vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2]
    check_same_up_to_sign(op.v, vh[:RANK])
    assert_close(op.v @ op.v.T, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not op.u.any() and op.u.requires_grad and op.v.requires_grad
    assert adapter.join == Add(8.0 / RANK)


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 3.0])
def test_eva_keeps_the_budget_and_gives_the_largest_shares(net, rho):
    op = looked(eva(rank=RANK, rho=rho), net).op
    assert sum(op.ranks.values()) == RANK * 3
    assert all(rank <= round(rho * RANK) for rank in op.ranks.values())
    inside = torch.cat([op.shares[name][:rank] for name, rank in op.ranks.items()])
    outside = torch.cat([op.shares[name][rank:] for name, rank in op.ranks.items()])
    assert len(outside) == 0 or inside.min() >= outside.max()
    assert all(0 < shares.sum() <= 1 + 1e-12 for shares in op.shares.values())
    if rho == 1:
        assert op.ranks == dict.fromkeys("qko", RANK)


def test_eva_moves_ranks_and_a_site_without_any_gets_the_zero_op(net):
    # The hidden inputs are one direction, which alone explains them; the others share the rest.
    with torch.no_grad():
        net.q.weight.zero_(), net.k.weight.zero_()
        net.q.weight[0] = net.k.weight[0] = rand(N, seed=5) / 50
    op = looked(eva(rank=1, rho=2.0), net).op
    assert op.ranks == {"q": 1, "k": 1, "o": 1}
    flat = {"q": torch.tensor([0.9, 0.8]), "k": torch.tensor([0.5, 0.1])}
    assert shared_out(flat, 2) == {"q": 2, "k": 0}
    seen = TopInputs(1, seen={"q": LowRank(rand(M, 2), rand(2, N)), "k": Zero(M, N)})
    assert seen.idle == {"k"} and seen.ranks == {"q": 2, "k": 0}
    assert torch.equal(adapt(Adapter(seen, Add()))("k", net.k)(batches()[0]), net.k(batches()[0]))


def test_sites_with_one_input_share_their_directions(net):
    op = looked(eva(rank=RANK), net).op
    q, k = op("q", net.q.weight), op("k", net.k.weight)
    rank = min(q.rank, k.rank)
    assert torch.equal(q.v[:rank], k.v[:rank]) and abs(q.rank - k.rank) <= 1


@pytest.mark.full
def test_peft_gives_eva_the_same_ranks_and_directions():
    peft = pytest.importorskip("peft")
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    ids = torch.arange(4 * 50).reshape(4, 50) * 37 % 300
    found = sites(model, "*.q_proj|*.k_proj|*.down_proj")
    op = prepare(eva(rank=4), model, found, Calibration([ids], forward, nll)).op
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.999),
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    peft.initialize_lora_eva_weights(theirs, [batch] * 3)
    rows = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): p
        for name, p in theirs.named_parameters() if "lora_A" in name
    }  # fmt: skip
    assert {name: len(p) for name, p in rows.items()} == {name: k for name, k in op.ranks.items() if k}
    assert op.idle == found.keys() - rows.keys() != set()
    for name, p in rows.items():
        # They stop when directions turn by a cosine of no less than tau.
        assert (op(name, found[name].weight).v * p).sum(-1).abs().min() > 0.999


# LoRA-GA.


@pytest.mark.parametrize("scaling", ["stable", "unit"])
def test_lora_ga_steps_along_the_best_gradient_of_twice_the_rank(net, scaling):
    scale, eta = 1.7, 1e-6
    adapter = looked(Adapter(GradientSpan(RANK, gamma=4.0, scaling=scaling), Add(scale)), net)
    g = full_gradients(net)["q"]
    found = adapt(adapter)("q", net.q)
    (found.weight * g).sum().backward()
    with torch.no_grad():
        before = found.weight.clone()
        for _, p in trainable(found):
            p -= eta * p.grad
    u, s, vh = svd(g)
    best = u[:, : 2 * RANK] * s[: 2 * RANK] @ vh[: 2 * RANK]
    c = 1.0 if scaling == "unit" else M**0.25 / 2.0
    assert_close((found.weight - before) / eta, -((scale * c) ** 2) * best, rtol=0, atol=1e-4 * float(s[0]))


def test_at_the_start_of_lora_ga_the_tangent_space_holds_twice_the_rank_of_the_gradient(net):
    pair = looked(Adapter(GradientSpan(RANK), Add()), net).op("o", net.o.weight).ops[0]
    g = full_gradients(net)["o"]
    left, right = torch.linalg.qr(pair.u)[0], torch.linalg.qr(pair.v.T)[0]
    p, q = left @ left.T, right @ right.T
    tangent = p @ g + g @ q - p @ g @ q
    assert_close(tangent.square().sum(), svd(g).s[: 2 * RANK].square().sum(), rtol=1e-10, atol=0)


def test_lora_ga_and_eva_start_at_the_base_bit_for_bit(net):
    x = batches()[0]
    before = net(x)
    for adapter in (looked(lora_ga(rank=RANK), net), looked(eva(rank=RANK), net)):
        with edit(net, list(sites(net)), adapt(adapter)):
            assert torch.equal(net(x), before)


def test_the_frozen_double_of_lora_ga_does_not_train(net):
    edit(net, list(sites(net)), adapt(looked(lora_ga(rank=RANK), net)))
    assert sum(p.numel() for _, p in trainable(net)) == sum(RANK * (m + n) for m, n in [(M, N), (M, N), (11, M)])


# LoRA-One.


def test_lora_one_starts_a_low_rank_step_down_the_gradient(net):
    gamma, scale = 64.0, 1.5
    adapter = looked(Adapter(GradientStep(RANK, gamma), Add(scale)), net)
    for name, g in full_gradients(net).items():
        layer = net.get_submodule(name)
        u, s, vh = svd(g)
        best = u[:, :RANK] * s[:RANK] @ vh[:RANK]
        moved = adapt(adapter)(name, layer).weight - layer.weight
        assert_close(moved, -scale / (gamma * s[0]) * best, rtol=0, atol=1e-12)
        pair = adapter.op(name, layer.weight)
        assert_close(pair.u.T @ pair.u, pair.v @ pair.v.T, rtol=0, atol=1e-12)
        assert_close((g * moved).sum(), -scale / (gamma * s[0]) * s[:RANK].square().sum(), rtol=1e-9, atol=0)


def test_lora_one_lowers_the_loss_and_does_not_feel_its_scale(net):
    x = torch.cat(batches())
    loud = Calibration(DATA.batches, call, lambda m, b: 1e-9 * loss(m, b))
    first, other = looked(lora_one(rank=RANK), net), looked(lora_one(rank=RANK), net, loud)
    assert_close(other.op("o", net.o.weight).dense(), first.op("o", net.o.weight).dense(), rtol=1e-6, atol=1e-12)
    before = loss(net, x)
    with edit(net, list(sites(net)), adapt(first)):
        assert loss(net, x) < before


# LoRA-SB.


def test_lora_sb_is_the_core_of_the_first_step_of_adamw(net):
    adapter = looked(Adapter(SignStep(RANK, rate=0.01, scale=2.0), Add(2.0)), net)
    for name, g in full_gradients(net).items():
        layer = net.get_submodule(name)
        product = adapter.op(name, layer.weight)
        direct = UpdateCore(RANK, {name: g}, 0.01, 2.0)(name, layer.weight)
        assert_close(product.dense(), direct.dense(), rtol=0, atol=1e-13)
        u, s, vh = svd(-0.01 * g.sign())
        assert_close(2.0 * product.dense(), u[:, :RANK] * s[:RANK] @ vh[:RANK], rtol=0, atol=1e-12)
        left, core, right = product.ops
        eye = torch.eye(RANK, dtype=torch.float64)
        assert_close(left.w.T @ left.w, eye, rtol=0, atol=1e-12)
        assert_close(right.w @ right.w.T, eye, rtol=0, atol=1e-12)
        assert [p.requires_grad for p in (left.w, core.w, right.w)] == [False, True, False]


def test_lora_sb_projects_the_gradient_onto_its_frame(net):
    scale = 3.0
    adapter = looked(Adapter(SignStep(RANK, scale=scale), Add(scale)), net)
    found, g = adapt(adapter)("q", net.q), rand(M, N, seed=50)
    (found.weight * g).sum().backward()
    left, core, right = (op.w for op in found.slot("default").op.ops)
    projected = left @ left.T @ g @ right.T @ right
    assert_close(left @ core.grad @ right, scale * projected, rtol=0, atol=1e-12)


def test_lora_sb_can_leave_the_function_alone_and_moves_it_by_one_step_else(net):
    x, rate = batches()[0], 1e-3
    before = net(x)
    with edit(net, list(sites(net)), adapt(looked(lora_sb(rank=RANK, rate=rate, keep_output=True), net))):
        assert torch.equal(net(x), before)
    adapter = looked(lora_sb(rank=RANK, rate=rate), net)
    for name, layer in sites(net).items():
        moved = merge(adapt(adapter)(name, layer)).weight - layer.weight
        assert 0 < moved.norm() <= rate * layer.weight.numel() ** 0.5


# All of them.


@pytest.mark.parametrize("method", LOOKING)
def test_the_weights_and_their_gradients_are_left_as_they_were(net, method):
    state = copy.deepcopy(net.state_dict())
    net.q.weight.grad = rand(M, N)
    kept = net.q.weight.grad
    looked(build(method, "adapter", rank=2), net)
    assert net.q.weight.grad is kept and net.training
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("method", LOOKING)
def test_looking_twice_in_any_number_of_passes_gives_the_same_start(net, method):
    once = looked(build(method, "adapter", rank=2), net)
    stream = looked(build(method, "adapter", rank=2), net, Calibration(iter(batches()), call, loss), most=1)
    for name, layer in sites(net).items():
        assert torch.equal(once.op(name, layer.weight).dense(), stream.op(name, layer.weight).dense())


@pytest.mark.parametrize("method", LOOKING)
def test_an_op_is_a_copy_of_its_own_in_the_precision_of_the_weight(net, method):
    op = looked(build(method, "adapter", rank=2), net).op
    assert isinstance(op, FromData) and isinstance(op, FromGradient) == (method != "eva")
    one, two = op("q", net.q.weight.bfloat16()), op("q", net.q.weight)
    assert {p.dtype for p in one.parameters()} == {torch.float32}
    for p in two.parameters():
        p.data.add_(1)
    assert_close(op("q", net.q.weight).dense(), one.dense().double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", LOOKING)
def test_saved_tensors_bring_back_the_shapes(net, method):
    adapter = looked(build(method, "adapter", rank=2), net)
    edit(net, list(sites(net)), adapt(adapter))
    tensors = folders.added(net)
    again = remembered(build(method, "adapter", rank=2), tensors)
    for name, layer in Net().named_children():
        blank = adapt(again)(name, layer).slot("default").op
        own = net.get_submodule(name).slot("default").op
        assert {k: t.shape for k, t in blank.state_dict().items()} == {
            k: t.shape for k, t in own.state_dict().items()
        }
        assert [p.requires_grad for p in blank.parameters()] == [p.requires_grad for p in own.parameters()]


def test_an_adapter_that_needs_no_data_is_returned_as_it_is(net):
    lora = build("lora", "adapter", rank=2)
    assert prepare(lora, net, sites(net), Calibration()) is lora and remembered(lora, {}) is lora


@pytest.mark.parametrize("method", LOOKING)
def test_without_data_it_says_so(net, method):
    adapter = build(method, "adapter", rank=2)
    with pytest.raises(ValueError, match="looks at data first: pass batches"):
        looked(adapter, net, Calibration())
    with pytest.raises(ValueError, match=r"q, \(12, 10\): .* has seen nothing of it; .*prepare"):
        edit(net, list(sites(net)), adapt(adapter))
    ready = looked(adapter, net)
    with pytest.raises(ValueError, match=r"has seen a layer of \(12, 10\) there"):
        ready.op("q", net.o.weight)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda net: looked(lora_ga(rank=6), net), r"q: rank 6 is outside 1..min\(12, 10\) / 2 = 5"),
        (lambda net: looked(lora_one(rank=11), net), r"q: rank 11 is outside 1..min\(12, 10\)"),
        (lambda net: looked(lora_sb(rank=11), net), r"q: rank 11 is outside 1..min\(12, 10\)"),
        (lambda net: looked(eva(rank=11), net), r"q: rank 11 is outside 1..min\(12, 10\)"),
        (lambda net: eva(rho=0.5), "rho 0.5 must be at least 1"),
        (lambda net: GradientSpan(2, scaling="odd"), "scaling 'odd' is neither"),
        (lambda net: lora_ga(gamma=0.0), "scale 0.0 must be positive"),
        (lambda net: lora_sb(rate=0.0), "rate 0.0 must be positive"),
        (lambda net: shared_out({"a": torch.ones(2)}, 3), "cannot choose 3 of 2 components"),
        (lambda net: size_of("a", nn.ReLU()), "a: cannot adapt ReLU"),
        (lambda net: leading("a", torch.zeros(2, 2), 1, "exact", 0), "a: its gradient is zero .* '!a'"),
        (lambda net: leading("a", rand(2, 2) / 0, 1, "exact", 0), "gradient of a of shape .* holds"),
        (
            lambda net: remembered(eva(rank=1), {"q.adapters.default.op.v": rand(3, N)}).op("q", net.q.weight),
            "q: a saved rank of 3 is above rho",
        ),
    ],
)
def test_refusals_say_where_and_what_is_allowed(net, act, words):
    with pytest.raises(ValueError, match=words):
        act(net)


def test_a_layer_whose_weight_is_no_parameter_has_no_gradient_but_inputs(net):
    net.q = OpLinear(LowRank(rand(M, 4), rand(4, N)), net.q.bias)
    found = {name: net.get_submodule(name) for name in "qko"}
    with pytest.raises(ValueError, match="q is an OpLinear, whose weight is no parameter"):
        prepare(lora_ga(rank=2), net, found, DATA)
    ranks = prepare(eva(rank=2), net, found, DATA).op.ranks
    assert sum(ranks.values()) == 6


def image_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_convolutions_are_looked_at_patch_by_patch(method):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 6, 2)).double()
    data, found = Calibration([rand(2, 3, 9, 9, seed=60)], call, image_loss), dict(net.named_children())
    made = prepare(build(method, "adapter", rank=2), net, found, data)
    before = net(data.batches[0])
    with edit(net, list(found), adapt(made)):
        assert_close(net(data.batches[0]), before, rtol=0, atol=1e-14)
    g = dict(gradients(net, found, data))["0"]
    assert_close(g, torch.autograd.grad(image_loss(net, data.batches[0]), net[0].weight)[0].flatten(1))
    if method == "eva":
        x = net[0](data.batches[0]).detach()
        patches = F.unfold(x, 2).mT.flatten(0, 1)
        rows = made.op("1", rand(6, 32)).v
        check_same_up_to_sign(rows, torch.linalg.svd(patches - patches.mean(0))[2][: len(rows)])


def test_a_convolution_in_groups_has_a_gradient_but_no_one_set_of_inputs():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)).double()
    data, found = Calibration([rand(2, 4, 7, 7)], call, image_loss), dict(net.named_children())
    with pytest.raises(ValueError, match=r"0 is a convolution in groups, .* '!0'"):
        prepare(eva(rank=2), net, found, data)
    made, before = prepare(lora_one(rank=2), net, found, data), image_loss(net, data.batches[0])
    with edit(net, ["0"], adapt(made)):
        assert image_loss(net, data.batches[0]) < before


# From the command line's side.


def test_what_is_looked_at_is_what_training_begins_with():
    split = lessons.split(torch.arange(3000) % 50, 16)
    seen = list(lessons.glance(split, 3, seed=5).batches)
    first = list(draw(split.train, length=16, batch=3, steps=20, seed=5))[: len(seen)]
    assert all(torch.equal(one, other) for one, other in zip(seen, first, strict=True)) and len(seen) > 1


@pytest.mark.parametrize("method", LOOKING)
def test_a_language_model_starts_from_its_training_text_and_is_saved(tmp_path, method):
    loaded = lessons.newborn("abc def " * 400, vocab=300, hidden=16, layers=1, heads=2, window=16)
    ids = torch.arange(2000) % 50
    split = lessons.split(ids, 16)
    base = folders.save_model(tmp_path / "base", loaded)
    learns = lessons.learning(loaded.model, method, steps=2, rank=2, look=lessons.glance(split, 2, seed=1))
    history = lessons.fit(loaded.model, learns, split, steps=2, batch=2, lr=0.01)
    assert history.train[0][1] != history.train[1][1]
    folders.save_adapter(tmp_path / "a", loaded.model, method=method, args=learns.args, source=str(base))
    again = folders.open_model(tmp_path / "a").model
    with torch.no_grad():
        assert torch.equal(again(ids[None, :16]).logits, loaded.model(ids[None, :16]).logits)
    kept = read_about(tmp_path / "a")["sites"]
    names = lessons.adaptable(folders.open_model(base).model)
    assert set(kept) <= set(names) and (method == "eva" or len(kept) == len(names))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a tiny model, and a text."""
    root = tmp_path_factory.mktemp("small")
    content = prose()[:6000]
    model = lessons.newborn(content, vocab=300, hidden=16, layers=2, heads=2, window=32)
    (root / "page.txt").write_text(content, encoding="utf-8")
    return folders.save_model(root / "model", model), root / "page.txt"


def printed(capsys, *args: object) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return out if end.value.code == 0 else err


def test_a_plan_shows_the_ranks_that_training_starts_with(small, capsys, tmp_path):
    base, page = small
    options = ["--method", "eva", "--rank", 3, "--data", page, "--window", 32]
    plan = json.loads(printed(capsys, "plan", base, *options, "--json"))
    assert sum(row["rank"] for row in plan["sites"].values()) == 3 * 14
    assert all(0 < row["explains"] <= 1 for row in plan["sites"].values())
    rows = plan["sites"].values()
    assert plan["numbers"] == sum(row["numbers"] for row in rows)
    assert all(row["numbers"] == row["rank"] * sum(row["shape"]) for row in rows)
    loaded = folders.open_model(base)
    look = Calibration(text.windows(jobs.tokens(loaded.tokenizer, text.read([page])), 32)[:, None], forward, nll)
    same, args = foretold(loaded.model, "eva", rank=3, look=look)
    assert {n: row._asdict() | {"shape": list(row.shape)} for n, row in same.items()} == plan["sites"]
    assert args == plan["args"] and isinstance(next(iter(same.values())), Foretold)
    assert not any(isinstance(m, Adapted) for m in loaded.model.modules())
    assert "numbers train, in 14 layers" in printed(capsys, "plan", base, *options)


def test_other_adapters_are_planned_too_and_foreign_options_refused(small, capsys):
    base, _ = small
    plan = json.loads(printed(capsys, "plan", base, "--method", "lora", "--rank", 2, "--json"))
    assert {row["rank"] for row in plan["sites"].values()} == {2}
    assert "--data" in printed(capsys, "plan", base, "--method", "eva", "--rank", 2)
    assert "not for adapters" in printed(capsys, "plan", base, "--method", "eva", "--err", 0.5)
    assert "--data" in printed(capsys, "plan", base, "--method", "svd", "--err", 0.5, "--data", "@prose")
    with pytest.raises(ValueError, match="is a share, and eva takes a count"):
        foretold(nn.Linear(2, 2), "eva", rank=0.5)


@pytest.mark.parametrize("method", LOOKING)
def test_finetune_starts_from_its_own_text(small, capsys, tmp_path, method):
    base, page = small
    few = ["--rank", 2, "--steps", 2, "--batch", 2, "--window", 32]
    done = printed(
        capsys, "finetune", base, "--method", method, "--data", page, *few, "-o", tmp_path / "a", "--json"
    )
    found = json.loads(done)
    again = folders.open_model(tmp_path / "a")
    split = lessons.split(jobs.tokens(again.tokenizer, text.read([page])), 32)
    assert score.nll(again.model, split.validation, batch=8).mean().item() == found["validation_after"]
    assert found["validation_after"] != found["validation_before"]


def test_layers_without_rank_are_left_out():
    loaded = lessons.newborn("abc def " * 400, vocab=300, hidden=16, layers=1, heads=2, window=16)
    names = lessons.adaptable(loaded.model)
    look = lessons.glance(lessons.split(torch.arange(2000) % 50, 16), 2)
    made, left = lessons.prepared(eva(rank=2, rho=8.0), loaded.model, names, look)
    assert left == [name for name in names if made.op.ranks[name]]
    assert sum(made.op.ranks[name] for name in left) == 2 * len(names)
    assert find("eva").build is eva
