"""Steps that see both factors depend on their product alone; rates that differ differ by exactly their ratio."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan.adapt import Adapter, Add, Rescale, ZeroLowRank, adapt, trainable
from subspan.edit import edit
from subspan.hosts import lessons
from subspan.methods import build
from subspan.methods.adapters import dora, lora, lora_plus, lora_pro, riemannian_lora
from subspan.optim import (
    Adam,
    Backprop,
    Equivalent,
    FusedBackward,
    Momentum,
    Optim,
    Paired,
    Preconditioned,
    Recipe,
    Sgd,
    Stepped,
    checkpoint,
    hasten,
)
from subspan.optim.pairs import pairs_of, spectrum, sylvester, usual

M, N, RANK = 9, 7, 3
LAWS = {
    "preconditioned": Preconditioned(0.0),
    "damped": Preconditioned(0.3),
    "equivalent": Equivalent(damping=0.0),
    "equivalent-damped": Equivalent(2.0, 0.3),
}
EXACT = {name: law for name, law in LAWS.items() if law.damping == 0}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
exact_law = pytest.mark.parametrize("law", EXACT.values(), ids=EXACT)
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(*, m=M, n=N, rank=RANK, scale=1.0, seed=0):
    """u, v, the weight's gradient g, and those of the factors of w + scale u v."""
    u, v, g = noise(m, rank, seed=seed), noise(rank, n, seed=seed + 1), noise(m, n, seed=seed + 2)
    return u, v, g, scale * g @ v.mT, scale * u.mT @ g


def net(preset, dtype=torch.float64, *, seed=0):
    """Two adapted layers, their factors away from zero where `seed` is not None."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 5)).to(dtype)
    edit(model, ["0", "2"], adapt(preset))
    if seed is not None:
        with torch.no_grad():
            for i, (_, p) in enumerate(trainable(model)):
                p.add_(0.3 * noise(*p.shape, seed=seed + i).to(p.dtype))
    return model


def back(model, t=0):
    x = noise(6, N, seed=100 + t).to(next(model.parameters()).dtype)
    model.zero_grad()
    model(x).square().mean().backward()


def walk(model, opt, steps):
    for t in steps:
        back(model, t)
        opt.step()
    return [p.detach().clone() for _, p in trainable(model)]


def weights(model):
    return [model[i].weight.detach().clone() for i in (0, 2)]


# ---- what the laws say


@exact_law
def test_without_damping_the_step_depends_on_the_product_alone(law):
    """(u r, r^-1 v) moves the product as (u, v) does, for any invertible r, to first order: u dv + du v."""
    u, v, g, gu, gv = problem()
    du, dv = law(u, v, gu, gv)
    for seed in range(3):
        r = noise(RANK, RANK, seed=20 + seed)
        a, b = u @ r, torch.linalg.solve(r, v)
        da, db = law(a, b, g @ b.mT, a.mT @ g)
        assert_close(a @ db + da @ b, u @ dv + du @ v, **CLOSE)


@pytest.mark.parametrize("source, same", [(Paired(Preconditioned(0.0)), True), (Backprop(), False)], ids=repr)
def test_a_preconditioned_trajectory_is_the_same_in_every_gauge(source, same):
    """The new factors are (u r, r^-1 v) again, momentum included; plain ones are not."""
    r = noise(RANK, RANK, seed=9)
    one, two = net(lora(rank=RANK)), net(lora(rank=RANK))
    with torch.no_grad():
        for i in (0, 2):
            op = two[i].slot("default").op
            op.u.copy_(op.u @ r)
            op.v.copy_(torch.linalg.solve(r, op.v))
    for model in (one, two):
        walk(model, Optim(trainable(model), Recipe(Momentum(0.5), source), lr=0.01), range(5))
    assert all(torch.allclose(a, b, **CLOSE) == same for a, b in zip(weights(one), weights(two), strict=True))


def test_the_dependence_on_the_pair_vanishes_with_the_damping():
    u, v, g, _, _ = problem()
    r = torch.diag(torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64))
    a, b = u @ r, torch.linalg.solve(r, v)

    def gap(damping):
        law = Preconditioned(damping)
        (du, dv), (da, db) = law(u, v, g @ v.mT, u.mT @ g), law(a, b, g @ b.mT, a.mT @ g)
        return float((u @ dv + du @ v - a @ db - da @ b).norm())

    gaps = [gap(10.0**-k) for k in (1, 3, 5)]
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2] > 0


def test_great_damping_is_the_plain_gradient():
    u, v, _, gu, gv = problem()
    du, dv = Preconditioned(1e9)(u, v, gu, gv)
    assert_close(1e9 * du, gu, rtol=0, atol=1e-6)
    assert_close(1e9 * dv, gv, rtol=0, atol=1e-6)


def test_a_preconditioned_gradient_is_the_least_squares_one_of_its_factor():
    """u dv is the nearest to g of all that v can do, and du v of all that u can."""
    u, v, g, gu, gv = problem()
    du, dv = Preconditioned(0.0)(u, v, gu, gv)
    assert_close(dv, torch.linalg.lstsq(u, g).solution, **CLOSE)
    assert_close(du.mT, torch.linalg.lstsq(v.mT, g.mT).solution, **CLOSE)


@pytest.mark.parametrize("shape", [(9, 7, 3), (5, 8, 2), (6, 6, 1)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
def test_equivalent_gradients_are_the_least_squares_optimum_nearest_to_the_plain_ones(shape, scale):
    """Of all (du, dv) with the least |s (u dv + du v) - g|, the nearest to (gu, gv): lstsq's least shift."""
    m, n, rank = shape
    u, v, g, gu, gv = problem(m=m, n=n, rank=rank, scale=scale)
    eye = partial(torch.eye, dtype=u.dtype)
    turned = v.mT.clone(memory_format=torch.contiguous_format)  # torch.kron wants plain strides
    effect = scale * torch.cat([torch.kron(eye(m), turned), torch.kron(u, eye(n))], dim=1)
    near = torch.cat([gu.flatten(), gv.flatten()])
    shift = torch.linalg.lstsq(effect, g.flatten() - effect @ near, driver="gelsd").solution
    want_u, want_v = (near + shift).split([m * rank, rank * n])
    du, dv = Equivalent(scale, 0.0)(u, v, gu, gv)
    assert_close(du, want_u.view(m, rank), **CLOSE)
    assert_close(dv, want_v.view(rank, n), **CLOSE)


def test_no_other_choice_with_the_same_effect_is_nearer_to_the_plain_gradients():
    u, v, _, gu, gv = problem()
    du, dv = Equivalent(damping=0.0)(u, v, gu, gv)
    least = (du - gu).square().sum() + (dv - gv).square().sum()
    for seed in range(5):
        x = 1e-3 * noise(RANK, RANK, seed=50 + seed)
        a, b = du - u @ x, dv + x @ v
        assert_close(u @ b + a @ v, u @ dv + du @ v, **CLOSE)
        assert (a - gu).square().sum() + (b - gv).square().sum() > least


def test_the_equivalent_gradient_is_the_projection_on_the_tangent_space():
    u, v, g, gu, gv = problem(scale=2.0)
    du, dv = Equivalent(2.0, 0.0)(u, v, gu, gv)
    left, right = u @ torch.linalg.pinv(u), torch.linalg.pinv(v) @ v
    found = 2.0 * (u @ dv + du @ v)
    assert_close(found, left @ g + g @ right - left @ g @ right, **CLOSE)
    assert_close((g * found).sum(), found.square().sum(), **CLOSE)


def test_with_square_invertible_factors_the_equivalent_gradient_is_the_gradient():
    u, v, g, gu, gv = problem(m=5, n=5, rank=5)
    du, dv = Equivalent(damping=0.0)(u, v, gu, gv)
    assert_close(u @ dv + du @ v, g, rtol=0, atol=1e-9)


def test_the_scale_divides_by_its_square_and_does_nothing_else():
    u, v, _, gu, gv = problem()
    one, four = Equivalent(1.0, 0.1)(u, v, gu, gv), Equivalent(4.0, 0.1)(u, v, gu, gv)
    for a, b in zip(one, four, strict=True):
        assert torch.equal(a, 16 * b)


@every_law
def test_a_zero_factor_is_no_trouble(law):
    """As adapters begin: u = 0, so that v has no gradient, and u steps by gu (v v^T)^-1."""
    _, v, g, _, _ = problem()
    u = torch.zeros(M, RANK, dtype=v.dtype)
    du, dv = law(u, v, g @ v.mT, u.mT @ g)
    damped = v @ v.mT + law.damping * torch.eye(RANK, dtype=v.dtype)
    scale = law.scale if isinstance(law, Equivalent) else 1.0
    assert torch.equal(dv, torch.zeros_like(dv))
    assert_close(du, g @ v.mT @ torch.linalg.inv(damped) / scale**2, **CLOSE)


@every_law
def test_a_law_on_a_batch_is_a_loop(law):
    many = [problem(seed=10 * i) for i in range(3)]
    u, v, _, gu, gv = (torch.stack(x) for x in zip(*many, strict=True))
    du, dv = law(u, v, gu, gv)
    for i, (a, b, _, ga, gb) in enumerate(many):
        for got, want in zip((du[i], dv[i]), law(a, b, ga, gb), strict=True):
            assert_close(got, want, **CLOSE)


@exact_law
def test_factors_of_less_rank_than_columns_still_give_the_least_squares_effect(law):
    """In float32 rounding errors of the Gram matrix are no directions: the pseudo-inverse leaves them out."""
    for seed in range(20):
        u, v, g, _, _ = (x.float() for x in problem(seed=3 * seed))
        u[:, 2] = u[:, 0] + u[:, 1]
        du, dv = law(u, v, g @ v.mT, u.mT @ g)
        left = u.double() @ torch.linalg.pinv(u.double(), rtol=1e-5)
        right = torch.linalg.pinv(v.double()) @ v.double()
        if isinstance(law, Preconditioned):
            got, want = u @ dv, left @ g.double()
        else:
            got, want = u @ dv + du @ v, left @ g.double() + (g.double() - left @ g.double()) @ right
        assert_close(got, want.float(), rtol=0, atol=1e-3)


def test_sylvester_is_solved_in_the_frames_of_both_sides():
    a, b, c = noise(4, 4), noise(3, 3, seed=1), noise(4, 3, seed=2)
    left, right = a @ a.mT, b @ b.mT
    x = sylvester(spectrum(left), spectrum(right), c)
    assert_close(left @ x + x @ right, c, **CLOSE)
    assert_close(spectrum(left).inverse(0.5), torch.linalg.inv(left + 0.5 * torch.eye(4)), **CLOSE)


# ---- the source


@every_law
@pytest.mark.parametrize("rule", [Sgd(), Momentum(), Adam()], ids=repr)
def test_a_rule_follows_the_law(law, rule):
    """The steps are those of a plain optimizer that is given the law's gradients, both of the old factors."""
    one, two = net(lora(rank=RANK)), net(lora(rank=RANK))
    ours = Optim(trainable(one), Recipe(rule, Paired(law)), lr=0.01, other=rule)
    plain = Optim(trainable(two), rule, lr=0.01, other=rule)
    for t in range(4):
        back(one, t)
        back(two, t)
        with torch.no_grad():
            for pair in pairs_of(trainable(two)):
                pair.u.grad, pair.v.grad = law(pair.u, pair.v, pair.u.grad, pair.v.grad)
        ours.step()
        plain.step()
    for (name, p), (_, q) in zip(trainable(one), trainable(two), strict=True):
        assert torch.equal(p, q), name


def test_the_order_of_parameters_and_groups_does_not_matter():
    recipe = Recipe(Momentum(), Paired(Equivalent()))
    one, two = net(lora(rank=RANK)), net(lora(rank=RANK))
    a = walk(one, hasten(Optim(trainable(one), recipe, lr=0.01), 4.0), range(3))
    b = walk(two, hasten(Optim(reversed(trainable(two)), recipe, lr=0.01), 4.0), range(3))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_what_is_no_pair_passes_through():
    """DoRA's row lengths step as under the plain rule; its factors do not."""
    one, two = net(dora(rank=RANK)), net(dora(rank=RANK))
    for model, rule in ((one, Recipe(Adam(), Paired(Preconditioned()))), (two, Adam())):
        walk(model, Optim(trainable(model), rule, lr=0.01), range(1))
    same = {name: torch.equal(p, q) for (name, p), (_, q) in zip(trainable(one), trainable(two), strict=True)}
    assert {name.rpartition(".")[2]: equal for name, equal in same.items()} == {"u": False, "v": False, "mu": True}


def test_a_closure_is_called_and_its_loss_returned():
    model = net(lora(rank=RANK))
    opt = Optim(trainable(model), Recipe(Adam(), Paired(Equivalent())), lr=0.01)
    twin = copy.deepcopy(model)
    want = float(twin(noise(6, N, seed=100)).square().mean().detach())

    def closure():
        loss = model(noise(6, N, seed=100)).square().mean()
        loss.backward()
        return float(loss.detach())

    assert opt.step(closure) == want
    assert not torch.equal(weights(model)[0], weights(twin)[0])


def test_half_precision_factors_are_seen_in_float32():
    named = [(name, nn.Parameter(x.bfloat16())) for name, x in zip("uv", problem()[:2], strict=True)]
    for _, p in named:
        p.grad = noise(*p.shape, seed=7).bfloat16()
    _, gradient = Paired(Preconditioned()).gradients(None, named, seed=0, steps=0)
    with torch.no_grad():
        want = Preconditioned()(*(p.float() for _, p in named), *(p.grad.float() for _, p in named))
        assert all(torch.equal(gradient(n, p), w) for (n, p), w in zip(named, want, strict=True))
    assert Paired(Preconditioned()).holds(named[0][1])


PRESETS = {"lora_plus": lora_plus, "lora_pro": lora_pro, "riemannian_lora": riemannian_lora}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_a_saved_run_continues_bit_for_bit(name, dtype, tmp_path):
    preset = build(name, "adapter", rank=RANK)

    def begun(seed):
        model = net(preset, dtype, seed=seed)
        return model, preset.optimizer(trainable(model), lr=1e-3, weight_decay=0.1, rounding="nearest")

    (straight, whole), (first, opt), (second, resumed) = begun(None), begun(None), begun(3)
    walk(straight, whole, range(7))
    walk(first, opt, range(4))
    checkpoint.save(tmp_path, first, opt)
    checkpoint.load(tmp_path, second, resumed)
    walk(second, resumed, range(4, 7))
    walk(first, opt, range(4, 7))
    for (key, p), (_, q), (_, r) in zip(*map(trainable, (straight, first, second)), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r), key


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_starts_at_the_base_and_its_loss_falls(name):
    preset = build(name, "adapter", rank=RANK)
    model, plain = net(preset, seed=None), net(lora(rank=RANK), seed=None)
    x = noise(6, N, seed=100)
    assert torch.equal(model(x), plain(x))
    before = float(model(x).detach().square().mean())
    walk(model, preset.optimizer(trainable(model), lr=3e-3), [0] * 30)
    assert float(model(x).detach().square().mean()) < 0.5 * before


def test_an_ill_conditioned_pair_learns_as_fast_as_a_good_one():
    """Factors of very different sizes: the plain step crawls in one and leaps in the other, these do neither."""
    target = noise(M, RANK, seed=30) @ noise(RANK, N, seed=31)

    def left(rule, gauge, lr):
        u, v = nn.Parameter(noise(M, RANK) * gauge), nn.Parameter(noise(RANK, N, seed=1) / gauge)
        opt = Optim([("u", u), ("v", v)], rule, lr=lr, unmoved="allow")
        for _ in range(60):
            opt.zero_grad()
            (0.5 * (u @ v - target).square().sum()).backward()
            opt.step()
        return float((u @ v - target).detach().norm() / target.norm())

    scaled = Recipe(Sgd(), Paired(Preconditioned(0.0)))
    good, bad = left(scaled, 1.0, 0.3), left(scaled, 30.0, 0.3)
    assert good < 1e-3 and abs(good - bad) < 1e-9
    assert left(Sgd(), 30.0, 1e-4) > 0.2


# ---- refusals


def named(*pairs):
    return [(name, nn.Parameter(torch.ones(*shape))) for name, shape in pairs]


@pytest.mark.parametrize(
    "given, message",
    [
        (named(("w", (3, 2)), ("u", (3,))), r"no matrix is a factor u or v of a product; there are: w, u\. Adapt"),
        (named(("a.u", (3, 2)), ("b.v", (2, 3))), r"a\.u is stepped without a\.v"),
        (named(("a.v", (3, 2))), r"a\.v is stepped without a\.u"),
        (named(("a.u", (3, 2)), ("a.v", (3, 2))), r"a\.u \(3, 2\) and a\.v \(3, 2\) are no product"),
        (named(("a.u", (4, 3, 2)), ("a.v", (2, 3))), "are no product"),
        (named(("a.u", (4, 3, 2)), ("a.v", (5, 2, 3))), r"\(4, 3, 2\) and a\.v \(5, 2, 3\) are no product"),
    ],
    ids=["none", "left", "right", "shapes", "axes", "batch"],
)
def test_what_has_no_pairs_is_refused(given, message):
    opt = Optim(given, Recipe(Adam(), Paired(Preconditioned())), lr=0.1)
    for _, p in given:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert all(bool((p == 1).all()) for _, p in given)


def test_a_factor_without_gradient_is_refused_and_a_pair_without_is_left_alone():
    model = net(lora(rank=RANK))
    opt = Optim(trainable(model), Recipe(Adam(), Paired(Preconditioned())), lr=0.1, unmoved="allow")
    back(model)
    before = weights(model)
    model[0].slot("default").op.v.grad = None
    with pytest.raises(ValueError, match=r"0\..*\.v has no gradient and 0\..*\.u has one, and Preconditioned"):
        opt.step()
    model[0].slot("default").op.u.grad = None
    opt.step()
    after = weights(model)
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def test_a_fused_backward_pass_is_refused():
    model = net(lora(rank=RANK))
    opt = Optim(trainable(model), Recipe(Adam(), Paired(Equivalent())), lr=0.1)
    with pytest.raises(ValueError, match=r"FusedBackward: Paired\(law=Equivalent.* use opt\.step\(\)"):
        FusedBackward(opt)
    assert isinstance(FusedBackward(Optim(trainable(model), Recipe(Adam(), Backprop()), lr=0.1)), FusedBackward)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Preconditioned(-1.0), r"Preconditioned: damping=-1\.0; use 0"),
        (lambda: Equivalent(damping=float("nan")), "Equivalent: damping=nan; use 0"),
        (lambda: Equivalent(0.0), r"Equivalent: scale=0\.0 joins nothing"),
        (lambda: hasten(torch.optim.SGD([torch.ones(1)], 0.1), 0.0), r"ratio=0\.0 is no factor"),
        (lambda: hasten(torch.optim.SGD([torch.ones(1)], 0.1), 2.0), "does not know names"),
        (lambda: hasten(torch.optim.SGD(named(("w", (1,))), 0.1), 2.0), r"'\*\.u' matches no parameter"),
    ],
)
def test_a_setting_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rates_are_set_before_a_scheduler_reads_them():
    opt = Optim(trainable(net(lora(rank=RANK))), Adam(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0)
    with pytest.raises(ValueError, match="a scheduler already holds the learning rates"):
        hasten(opt, 2.0)


# ---- rates


def test_a_ratio_of_one_is_plain_lora():
    one, two = net(lora_plus(rank=RANK, ratio=1.0), seed=None), net(lora(rank=RANK), seed=None)
    a = walk(one, lora_plus(rank=RANK, ratio=1.0).optimizer(trainable(one), lr=0.01), range(5))
    b = walk(two, Optim(trainable(two), Adam(), lr=0.01), range(5))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    without_u = torch.optim.SGD(named(("w", (3, 2))), 0.1)
    assert hasten(without_u, 1.0) is without_u and len(without_u.param_groups) == 1


@pytest.mark.parametrize("rule", [Sgd(), Adam()], ids=repr)
def test_u_steps_exactly_sixteen_times_as_far(rule):
    """From zero, so that a step is the weight it leads to; sixteen is a power of two, so that nothing rounds."""
    one, two = net(lora(rank=RANK), seed=None), net(lora(rank=RANK), seed=None)
    walk(one, hasten(Optim(trainable(one), rule, lr=0.01, other=rule), 16.0), range(1))
    walk(two, Optim(trainable(two), rule, lr=0.01, other=rule), range(1))
    for (name, p), (_, q) in zip(trainable(one), trainable(two), strict=True):
        assert torch.equal(p, 16 * q if name.endswith(".u") else q), name
        assert bool(p.any())


def test_every_parameter_is_in_one_group_and_a_schedule_keeps_the_ratio():
    model = net(dora(rank=RANK))
    opt = hasten(Optim(trainable(model), Adam(), lr=0.01, weight_decay=0.1), 16.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t)
    walk(model, opt, range(1))
    schedule.step()
    rates = {name: group["lr"] for group in opt.param_groups for name in group["param_names"]}
    members = [name for group in opt.param_groups for name in group["param_names"]]
    assert sorted(members) == sorted(name for name, _ in trainable(model))
    assert rates == {name: 0.08 if name.endswith(".u") else 0.005 for name in rates}
    assert {group["weight_decay"] for group in opt.param_groups} == {0.1}
    assert all(len(group["params"]) == len(group["param_names"]) for group in opt.param_groups)


def test_rates_of_torch_s_optimizers_and_of_tensors_differ_as_well():
    given = named(("a.u", (3, 2)), ("a.v", (2, 3)), ("b.u", (3, 2)))
    opt = hasten(torch.optim.AdamW(given, lr=torch.tensor(0.25)), 4.0)
    assert [(g["param_names"], float(g["lr"])) for g in opt.param_groups] == [
        (["a.v"], 0.25),
        (["a.u", "b.u"], 1.0),
    ]
    alone = hasten(torch.optim.SGD(given, lr=0.25), 4.0, where="a.*|b.*")
    assert [group["lr"] for group in alone.param_groups] == [1.0]


def test_an_adapter_that_says_nothing_is_stepped_by_adam_at_one_rate():
    plain = Adapter(ZeroLowRank(2), Rescale(1.0))
    assert (usual(plain).rule, usual(plain).ratio) == (Adam(), 1.0)
    assert (usual(plain).op, usual(plain).base) == (plain.op, plain.base)
    own = lora_plus(rank=2)
    assert usual(own) is own and own == Stepped(ZeroLowRank(2), Add(4.0), ratio=16.0)
    assert lora_pro(rank=4, alpha=8.0).rule == Recipe(Adam(), Paired(Equivalent(2.0)))
    assert riemannian_lora(damping=0.1).rule == Recipe(Adam(), Paired(Preconditioned(0.1)))


@pytest.mark.parametrize("name, ratio", [("lora", 1.0), ("lora_plus", 16.0), ("lora_pro", 1.0)])
def test_the_command_line_trains_by_what_the_adapter_says(name, ratio, monkeypatch):
    """`finetune` builds its optimizer in `lessons.fit`: the preset's recipe, and u at its rate."""
    model = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 5))
    learns = lessons.learning(model, name, steps=3, rank=RANK)
    monkeypatch.setattr(lessons, "train", lambda model, batches, optimizer, **_: optimizer)
    opt = lessons.fit(model, learns, lessons.split(torch.arange(400), 8), steps=3, batch=2, lr=0.25)
    rates = {key.rpartition(".")[2]: g["lr"] for g in opt.param_groups for key in g["param_names"]}
    assert opt.recipe.rule == Adam() and rates == {"u": 0.25 * ratio, "v": 0.25}
    own = usual(build(name, "adapter", rank=RANK)).rule
    assert opt.recipe == (own if isinstance(own, Recipe) else Recipe(own))
