"""A mixture of low-rank experts is what it says for each token, its gradient rescaled where it should be."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan import io
from subspan.adapt import (
    Adapted,
    Adapter,
    Add,
    FromWeight,
    Rescale,
    Rotate,
    Routed,
    ZeroExperts,
    ZeroLowRank,
    adapt,
    merge,
    mixture,
    trainable,
)
from subspan.adapt.routed import weighed
from subspan.edit import edit
from subspan.hosts.peft import save_peft
from subspan.hosts.peft_change import as_lora
from subspan.hosts.peft_read import read_adapter
from subspan.methods.adapters import lora, moe_lora, riemannian_lora
from subspan.ops import Dense, LowRank
from subspan.optim import Adam, Equivalent, Momentum, Optim, Paired, PerExpert, Preconditioned, Recipe, Sgd
from subspan.optim.pairs import apart

M, N, RANK, EXPERTS = 7, 6, 2, 4
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(m: int = M, n: int = N) -> nn.Linear:
    made = nn.Linear(n, m, dtype=torch.float64)
    for p in made.parameters():
        p.data.copy_(rand(*p.shape))
    return made


def preset(top: int = 2, experts: int = EXPERTS, power: float = 0.5) -> Adapter:
    return Adapter(ZeroExperts(RANK, experts), Routed(1.5, experts, top, power))


def put(adapter: Adapter, base: nn.Module | None = None) -> Adapted:
    made = adapt(adapter)("site", layer() if base is None else base)
    assert isinstance(made, Adapted)
    return made


def moved(model: nn.Module, seed: int = 3) -> nn.Module:
    with torch.no_grad():
        for i, (_, p) in enumerate(trainable(model)):
            p.add_(rand(*p.shape, seed=seed + i).to(p.dtype))
    return model


def plain(adapted: Adapted, x: torch.Tensor, soft: bool = False, still: bool = False) -> torch.Tensor:
    """The definition, expert by expert: softmax, the mask, the division; `soft` by the identity of the paper."""
    slot = adapted.slot("default")
    join, (u, v) = slot.join, (slot.op.u, slot.op.v)
    p = torch.softmax(x @ join.router.T, -1)
    mask = torch.zeros_like(p).scatter(-1, p.topk(join.top, -1).indices, 1.0)
    gates = p * mask / (p * mask).sum(-1, keepdim=True)
    y = adapted.base(x)
    x = x.detach() if still else x
    rank = len(v) // join.experts
    for i in range(join.experts):
        own = slice(i * rank, (i + 1) * rank)
        out, g = join.scale * (x @ v[own].T) @ u[:, own].T, gates[..., i : i + 1]
        root = g.detach() ** join.power
        y = y + (root * out + (g - root) * out.detach() if soft else g * out)
    return y


def grads(y: torch.Tensor, adapted: Adapted, *more: torch.Tensor) -> dict[str, torch.Tensor]:
    probe = rand(*y.shape, seed=9)
    names, tensors = zip(*trainable(adapted), strict=True)
    found = torch.autograd.grad((y * probe).sum(), (*tensors, *more))
    return dict(zip((*(n.rpartition(".")[2] for n in names), "x"), found, strict=False))


# ---- the function


@pytest.mark.parametrize("top", [1, 2, EXPERTS])
@pytest.mark.parametrize("shape", [(N,), (5, N), (2, 3, N)], ids=str)
def test_the_output_is_the_sum_of_gated_experts(top, shape):
    adapted, x = moved(put(preset(top))), rand(*shape, seed=5)
    assert_close(adapted(x), plain(adapted, x), **CLOSE)


@pytest.mark.parametrize("top", [1, 2, EXPERTS])
def test_gates_are_the_largest_probabilities_over_their_sum(top):
    adapted, x = moved(put(preset(top))), rand(50, N, seed=5)
    join = adapted.slot("default").join
    gates, p = join.gates(x), torch.softmax(x @ join.router.T, -1)
    assert_close(gates.sum(-1), torch.ones(50).double())
    assert ((gates > 0).sum(-1) == top).all()
    kept = torch.where(gates > 0, p, 0.0)
    assert_close(gates, kept / kept.sum(-1, keepdim=True))
    assert (torch.where(gates > 0, p, 2.0).min(-1).values >= torch.where(gates > 0, 0.0, p).max(-1).values).all()


def test_an_expert_that_is_not_chosen_contributes_nothing_and_gets_nothing():
    adapted, x = moved(put(preset())), rand(1, N, seed=5)
    slot = adapted.slot("default")
    before, off = adapted(x), int((slot.join.gates(x)[0] == 0).nonzero()[0])
    found = grads(before, adapted)
    own = slice(off * RANK, (off + 1) * RANK)
    assert not found["u"][:, own].any() and not found["v"][own].any() and not found["router"][off].any()
    with torch.no_grad():
        slot.op.u[:, own] = 1e6
    assert torch.equal(adapted(x), before)


def test_it_starts_at_the_base():
    base, x = layer(), rand(5, N)
    assert torch.equal(put(preset(), base)(x), base(x))


def test_experts_are_drawn_as_lora_is_and_the_router_by_site_and_seed_alone():
    w = rand(M, N)
    assert torch.equal(ZeroExperts(RANK, 1)("a", w).v, ZeroLowRank(RANK)("a", w).v)
    many = ZeroExperts(3, 5)("a", w)
    assert torch.equal(many.dense(), torch.zeros(M, N).double()) and many.v.shape == (15, N)
    cases = (0, w.dtype, "a"), (0, torch.float32, "a"), (0, w.dtype, "b"), (1, w.dtype, "a")
    ops = [(s, w.to(d), ZeroExperts(1, 4)(site, w.to(d))) for s, d, site in cases]
    routers = [Routed(seed=s).at(x, op).router for s, x, op in ops]
    assert torch.allclose(routers[0].float(), routers[1])
    assert not torch.allclose(routers[0], routers[2]) and not torch.allclose(routers[0], routers[3])
    assert routers[0].abs().max() <= N**-0.5 < 1.5 * routers[0].abs().max()


# ---- the gradient


def test_of_one_token_an_expert_gets_the_plain_gradient_over_the_root_of_its_gate():
    adapted, x = moved(put(preset())), rand(1, N, seed=5)
    gates = adapted.slot("default").join.gates(x)[0]
    found, by_hand = grads(adapted(x), adapted), grads(plain(adapted, x), adapted)
    assert_close(found["router"], by_hand["router"], **CLOSE)
    for i in gates.nonzero().flatten():
        own, root = slice(i * RANK, (i + 1) * RANK), gates[i].sqrt()
        assert 0.05 < root < 0.95
        assert_close(found["u"][:, own], by_hand["u"][:, own] / root, **CLOSE)
        assert_close(found["v"][own], by_hand["v"][own] / root, **CLOSE)


@pytest.mark.parametrize("power", [0.5, 0.25, 1.0])
def test_gradients_are_those_of_the_papers_identity_and_of_the_plain_mixture_below_and_beside_it(power):
    adapted, x = moved(put(preset(power=power))), rand(8, N, seed=5).requires_grad_()
    found, true = grads(adapted(x), adapted, x), grads(plain(adapted, x), adapted, x)
    soft = grads(plain(adapted, x, soft=True, still=True), adapted)
    assert all(found[name].norm() > 0 for name in ("u", "v", "router", "x"))
    for name in ("u", "v"):
        assert_close(found[name], soft[name], **CLOSE)
        assert torch.allclose(found[name], true[name], **CLOSE) == (power == 1)
    for name in ("router", "x"):
        assert_close(found[name], true[name], **CLOSE)


def test_a_plain_mixture_has_the_gradient_of_its_value_by_finite_differences():
    x, u, v = rand(3, 5, seed=1), rand(4, 6, seed=2), rand(6, 5, seed=3)
    gates = torch.softmax(rand(3, 2, seed=4), -1)
    assert torch.autograd.gradcheck(mixture, [t.requires_grad_() for t in (x, u, v, gates)])
    assert torch.equal(weighed(torch.ones(1, 4), torch.tensor([[2.0, 3.0]])), torch.tensor([[2.0, 2.0, 3.0, 3.0]]))


# ---- the step


def net(adapter: Adapter) -> nn.Module:
    model = nn.Sequential(layer(8, N), nn.Tanh(), layer(5, 8))
    edit(model, ["0", "2"], adapt(adapter))
    return model


def walk(model: nn.Module, optimizer: Optim, steps: int = 4) -> dict[str, torch.Tensor]:
    for t in range(steps):
        optimizer.zero_grad()
        model(rand(6, N, seed=50 + t)).square().mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in trainable(model)}


def test_one_expert_is_riemannian_lora():
    args = {"rank": RANK, "alpha": 4.0}
    one, two = moe_lora(experts=1, top=1, **args), riemannian_lora(**args)
    a, b = (walk(model, p.optimizer(trainable(model), lr=0.01)) for p in (one, two) for model in [net(p)])
    for name, p in b.items():
        assert_close(a[name], p, rtol=1e-9, atol=1e-11)
        assert p.norm() > 0
    assert all(torch.equal(a[k], dict(trainable(net(one)))[k]) for k in a if k.endswith("router"))


def pieces(seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    shapes = ((M, RANK), (RANK, N)) * 2
    return [tuple(rand(*s, seed=seed + 10 * i + k) for k, s in enumerate(shapes)) for i in range(3)]


@pytest.mark.parametrize("law", [Preconditioned(0.1), Equivalent(2.0, 0.1)], ids=repr)
def test_a_law_sees_each_expert_alone(law):
    parts = pieces()
    u, v, gu, gv = (torch.cat([p[k] for p in parts], 1 - k % 2) for k in range(4))
    du, dv = PerExpert(law, 3)(u, v, gu, gv)
    for i, part in enumerate(parts):
        a, b = law(*part)
        own = slice(i * RANK, (i + 1) * RANK)
        assert_close(du[:, own], a, **CLOSE)
        assert_close(dv[own], b, **CLOSE)
    assert not torch.allclose(du, law(u, v, gu, gv)[0])
    assert torch.equal(apart(u, -1, 3)[1], parts[1][0]) and torch.equal(apart(v, -2, 3)[2], parts[2][1])
    alone = PerExpert(law, 1)(u, v, gu, gv)
    assert all(torch.equal(a, b) for a, b in zip(alone, law(u, v, gu, gv), strict=True))


def test_great_damping_is_plain_descent_of_the_rescaled_gradient():
    def after(recipe, lr):
        model = moved(net(preset()))
        return walk(model, Optim(trainable(model), recipe, lr=lr, where="*.u|*.v", other=Sgd()), 1)

    big = Recipe(Sgd(), Paired(PerExpert(Preconditioned(1e9), EXPERTS)))
    one, two = after(big, 1e-2 * 1e9), after(Recipe(Sgd()), 1e-2)
    for name in one:
        if not name.endswith("router"):
            assert_close(one[name], two[name], rtol=0, atol=1e-8)


def test_without_damping_a_trajectory_is_the_same_in_every_gauge_of_every_expert():
    one, two = moved(net(preset())), moved(net(preset()))
    with torch.no_grad():
        for i in (0, 2):
            op = two[i].slot("default").op
            for e in range(EXPERTS):
                own, r = slice(e * RANK, (e + 1) * RANK), rand(RANK, RANK, seed=e) + 3 * torch.eye(RANK).double()
                op.u[:, own], op.v[own] = op.u[:, own] @ r, torch.linalg.solve(r, op.v[own])
    for model in (one, two):
        recipe = Recipe(Momentum(0.5), Paired(PerExpert(Preconditioned(0.0), EXPERTS)))
        walk(model, Optim(trainable(model), recipe, lr=1e-3))
    x = rand(9, N, seed=77)
    assert_close(one(x), two(x), rtol=1e-8, atol=1e-9)


def test_the_preset_cuts_its_pairs_as_its_gate_does():
    made = moe_lora(rank=3, experts=5, top=2, damping=0.25)
    assert made.op == ZeroExperts(3, 5) and (made.join.experts, made.join.top) == (5, 2)
    assert made.rule == Recipe(Adam(), Paired(PerExpert(Preconditioned(0.25), 5)))
    assert made.join.scale == 16 / 3


# ---- what it stands on, and what stands on it


@pytest.mark.parametrize("other", [Add(0.7), Rotate(3)], ids=repr)
@pytest.mark.parametrize("below", [True, False], ids=["below", "above"])
def test_joins_that_read_no_weight_stack_on_either_side(other, below):
    x, base = rand(5, N, seed=5), layer()
    more = Adapter(ZeroLowRank(1), other)
    first, second = (more, preset()) if below else (preset(), more)
    adapted = adapt(second, "two")("site", adapt(first, "one")("site", base))
    moved(adapted)
    gated, plain_one = adapted.slot("two" if below else "one"), adapted.slot("one" if below else "two")
    turned = x if isinstance(other, Add) or below else plain_one.join.bound().back(x)
    alone = copy.deepcopy(adapted)
    alone.active = ("one",) if below else ("two",)
    assert_close(adapted(x), alone(x) + gated.join.forward(Nothing(), gated.op, turned), **CLOSE)


class Nothing:
    """A layer of zeros."""

    weight, bias = torch.zeros(M, N).double(), None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], M)


def test_a_join_that_reads_the_weight_is_refused_on_a_gate_and_changes_nothing():
    adapted, x = moved(put(preset())), rand(5, N)
    before = adapted(x)
    with pytest.raises(
        ValueError, match=r"'b': Rescale\(.*cannot stand on a gate: Routed.*no one weight.*as lora"
    ):
        adapted.add("b", LowRank(rand(M, 1), rand(1, N)), Rescale())
    assert torch.equal(adapted(x), before) and adapted.active == ("default",)
    below = adapt(preset(), "gate")("site", put(Adapter(ZeroLowRank(1), Rescale())))
    assert_close(below(x), layer()(x), **CLOSE)


def test_a_start_on_a_gate_looks_at_the_weight_without_it():
    adapted = moved(put(preset()))
    stacked = adapt(Adapter(FromWeight(2), Add()), "two")("site", adapted)
    assert torch.equal(stacked.slot("two").op.u, FromWeight(2)("site", layer().weight).u)
    assert torch.equal(adapted.ground, layer().weight)


def test_there_is_no_weight_to_merge_or_to_export(tmp_path):
    adapted = moved(put(preset()))
    reason = r"Routed\(scale=1\.5.*weighs its experts anew for each input, so it has no one weight to merge"
    for ask in (merge, lambda a: a.weight, lambda a: a.slot("default").join.remainder(a.base.weight, None)):
        with pytest.raises(ValueError, match=reason):
            ask(adapted)
    for ask in (merge, lambda a: a.weight):
        with pytest.raises(ValueError, match=f"^site: {reason}"):
            ask(adapted)
    with pytest.raises(ValueError, match="LowRank joined by Routed is no LoRA"):
        save_peft(nn.Sequential(adapted), tmp_path / "peft")
    about = {"kind": "adapter", "method": "moe_lora", "args": {"rank": RANK, "experts": EXPERTS, "top": 2}}
    base = {"source": "none", "sha256": "", "dtype": "float64"}
    made = put(moe_lora(**about["args"]))
    tensors = {f"site.adapters.default.{k}": t for k, t in made.slot("default").state_dict().items()}
    io.write_tensors(tmp_path / io.WEIGHTS, tensors)
    io.write_about(tmp_path, {**about, "base": base, "sites": ["site"]})
    saved = read_adapter(tmp_path)
    assert saved.reads_base and set(saved.tensors) == set(tensors)
    for rank in (None, 2):
        with pytest.raises(ValueError, match="no one weight to merge, to export"):
            as_lora(saved, lambda site: layer().weight, rank)


@pytest.mark.parametrize(
    "module, words",
    [
        (nn.Conv2d(4, 4, 2, dtype=torch.float64), "looks up or convolves"),
        (nn.Embedding(9, 4, dtype=torch.float64), "looks up or convolves"),
    ],
    ids=["conv", "embedding"],
)
def test_a_gate_needs_a_linear_layer(module, words):
    with pytest.raises(ValueError, match=rf"^site: adapter 'default': Routed\(.*{words}.*such as lora"):
        adapt(preset())("site", module)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Routed(top=0), r"top 0 is outside 1\.\.4"),
        (lambda: Routed(experts=2, top=3), r"top 3 is outside 1\.\.2"),
        (lambda: Routed(power=0.0), "power 0.0 is outside"),
        (lambda: ZeroExperts(2, 0), "experts 0 must be at least 1"),
        (lambda: ZeroExperts(9, 2)("h.0", rand(M, N)), r"h\.0: rank 9 is outside"),
        (lambda: PerExpert(Preconditioned(), 0), "experts=0 must be at least 1"),
        (lambda: PerExpert(Preconditioned(), 3)(*pieces()[0]), "inner size of 2 is no 3 experts"),
        (lambda: Routed().at(rand(M, N), Dense(rand(M, N))), r"Dense is not cut.*ZeroExperts\(rank, 4\)"),
        (lambda: Routed().at(rand(M, N), ZeroLowRank(3)("a", rand(M, N))), "LowRank of inner size 3 is not cut"),
        (lambda: Routed().gates(rand(2, N)), "no router yet; bind it"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ---- precision


def test_a_half_precision_layer_starts_exactly_at_the_base_and_gates_in_full():
    base, x = layer(32, 24).bfloat16(), rand(9, 24).bfloat16()
    adapted = put(preset(), base)
    assert {p.dtype for _, p in trainable(adapted)} == {torch.float32}
    assert torch.equal(adapted(x), base(x)) and adapted(x).dtype == torch.bfloat16
    assert adapted.slot("default").join.gates(x).dtype == torch.float32
    moved(adapted)
    exact = plain(copy.deepcopy(adapted).double(), x.double())
    assert_close(adapted(x).double(), exact, rtol=0, atol=2**-7 * exact.abs().max().item())


def test_autocast_mixes_in_half_and_gates_in_full():
    adapted, x = moved(put(preset(), layer(32, 24).float())), rand(9, 24).float()
    whole = adapted(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted(x)
        assert torch.equal(adapted.slot("default").join.gates(x), adapted.slot("default").join.gates(x.float()))
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), whole, rtol=0, atol=2**-6 * whole.abs().max().item())
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in trainable(adapted))


def test_copies_pickles_and_states_come_back(tmp_path):
    adapted, x = moved(put(preset())), rand(5, N)
    torch.save(adapted.state_dict(), tmp_path / "state.pt")
    fresh = adapt(preset())("elsewhere", layer())
    assert not torch.allclose(fresh(x), adapted(x))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(x), adapted(x)) and torch.equal(copy.deepcopy(adapted)(x), adapted(x))


def test_lora_beside_it_is_not_touched_by_the_gate():
    model = nn.Sequential(put(preset()), put(lora(rank=2), layer(5, M)))
    assert [n for n, _ in trainable(model)] == [
        "0.adapters.default.op.u", "0.adapters.default.op.v", "0.adapters.default.join.router",
        "1.adapters.default.op.u", "1.adapters.default.op.v",
    ]  # fmt: skip
