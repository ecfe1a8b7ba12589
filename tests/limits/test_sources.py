"""Two losses along a random direction are, on average, the gradient; they need no more memory than inference."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan.codec import Bf16
from subspan.methods.optimizers import galore, mezo
from subspan.optim import Adam, Backprop, Momentum, Optim, Projected, Recipe, Sgd, Spsa, stored
from subspan.optim.meter import Peak

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(*shapes, dtype=torch.float64):
    return {
        f"layers.{i}.weight": nn.Parameter(noise(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)
    }


def inner(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def estimate(source, closure, named, *, seed=0, steps=0):
    """c z for every parameter, by name."""
    with torch.no_grad():
        _, gradient = source.gradients(closure, named.items(), seed=seed, steps=steps)
        return {name: gradient(name, p) for name, p in named.items()}


def directions(source, named, *, seed=0, steps=0):
    return {name: source.noise(name, p, seed=seed, steps=steps) for name, p in named.items()}


def test_on_a_linear_loss_the_estimate_is_the_slope_times_the_direction():
    named = weights((5, 3), (4,), ())
    slopes = [noise(*p.shape, seed=9 + i) for i, p in enumerate(named.values())]
    for eps in (1e-3, 0.1, 10.0):
        found = estimate(Spsa(eps), lambda: inner(slopes, named.values()), named)
        z = {name: x.double() for name, x in directions(Spsa(), named).items()}
        c = inner(slopes, z.values())
        for name in named:
            assert_close(found[name], c * z[name], rtol=1e-11, atol=0)


def test_the_slope_tends_to_the_directional_derivative_with_the_square_of_eps():
    named = weights((6, 4))
    (p,) = named.values()

    def closure():
        return (p.sin() * noise(6, 4, seed=5)).exp().sum()

    with torch.enable_grad():
        (g,) = torch.autograd.grad(closure(), [p])
    z = directions(Spsa(), named)["layers.0.weight"].double()
    errors = [
        float((estimate(Spsa(eps), closure, named)["layers.0.weight"] - (g * z).sum() * z).norm())
        for eps in (1e-2, 1e-3)
    ]
    assert errors[1] < 1e-4 and 90 < errors[0] / errors[1] < 110


def test_the_mean_over_seeds_is_the_gradient():
    """Five standard deviations: of c z, on a quadratic, the variance is |g|^2 + g_i^2."""
    named = weights((3, 2))
    (p,) = named.values()
    curve, draws = noise(6, 6, seed=3), 4000

    def closure():
        return (curve @ p.flatten()).square().sum() / 2

    g = (curve.mT @ curve @ p.detach().flatten()).view(3, 2)
    total = torch.zeros_like(g)
    for seed in range(draws):
        total += estimate(Spsa(), closure, named, seed=seed)["layers.0.weight"]
    bound = 5 * ((g.square().sum() + g.square()) / draws).sqrt()
    assert ((total / draws - g).abs() < bound).all()
    assert (bound < g.norm() / 8).all()


def test_directions_follow_from_seed_name_and_step_only():
    p = nn.Parameter(noise(30, 20))
    base = Spsa().noise("a", p, seed=1, steps=4)
    assert torch.equal(base, Spsa(0.5).noise("a", p.detach().bfloat16(), seed=1, steps=4))
    others = [
        Spsa().noise("b", p, seed=1, steps=4),
        Spsa().noise("a", p, seed=2, steps=4),
        Spsa().noise("a", p, seed=1, steps=5),
    ]
    for other in others:  # five standard deviations of a mean of 600 products of independent normals
        assert abs((base * other).mean()) < 5 / 600**0.5


@pytest.mark.parametrize(
    "rule", [Sgd(), Momentum(), Adam(), galore(rank=2, every=3), stored(Adam(), mu=Bf16())], ids=repr
)
def test_any_rule_steps_by_it_as_by_a_gradient_in_grad(rule):
    """One parameter at a time, never in .grad: bit for bit as if backward() had left c z there."""
    named, twins = weights((6, 4), (4, 6)), weights((6, 4), (4, 6))
    source = Spsa(1e-2, "always")
    opt = Optim(named.items(), Recipe(rule, source), lr=0.01, weight_decay=0.1, seed=3)
    twin = Optim(twins.items(), rule, lr=0.01, weight_decay=0.1, seed=3)
    target = noise(6, 6, seed=8)

    def loss_of(params):
        a, b = params.values()
        return (a @ b - target).square().sum()

    for step in range(7):
        found = estimate(source, lambda: loss_of(twins), twins, seed=3, steps=step)
        for name, p in twins.items():
            p.grad = found[name]
        twin.step()
        opt.step(lambda: loss_of(named))
    for name, p in named.items():
        assert torch.equal(p, twins[name]) and p.grad is None


def test_a_recipe_of_backprop_is_the_plain_rule():
    one, two = weights((6, 4)), weights((6, 4))
    opts = [Optim(one.items(), Adam(), lr=0.1), Optim(two.items(), Recipe(Adam(), Backprop()), lr=0.1)]
    for named, opt in zip((one, two), opts, strict=True):
        (p,) = named.values()
        for _ in range(3):
            opt.zero_grad()
            opt.step(lambda p=p: p.square().sum().backward())
    assert torch.equal(*one.values(), *two.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_leads_back_exactly_and_the_walk_drifts(dtype):
    named = {"w": nn.Parameter(noise(64, 64, dtype=dtype) * 0.02)}
    (p,) = named.values()
    before = p.detach().clone()

    def drift(copy, steps):
        with torch.no_grad():
            p.copy_(before)
        for t in range(steps):
            estimate(Spsa(copy=copy), lambda: p.sum(), named, steps=t)
        return float((p.detach() - before).double().norm() / before.double().norm())

    usual = {torch.float64: 1.2e-16, torch.float32: 6e-8, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert drift("always", 10) == 0
    assert 0.7 * usual < drift("never", 1) < 1.4 * usual
    assert drift("never", 100) < 14 * usual  # a random walk, so ten times the first step
    assert (drift("half", 10) == 0) == (dtype in (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("recipe", [mezo(), Recipe(Adam(), Spsa(1e-2))], ids=["mezo", "adam"])
def test_a_saved_run_continues_bit_for_bit(recipe, dtype, tmp_path):
    target = noise(6, 6, seed=8, dtype=dtype)

    def train(named, opt, steps):
        for _ in range(steps):
            a, b = named.values()
            opt.step(lambda: (a @ b - target).float().square().sum())

    def make(named):
        return Optim(named.items(), recipe, lr=1e-3, seed=7, unmoved="allow")

    straight, first, second = (weights((6, 4), (4, 6), dtype=dtype) for _ in range(3))
    train(straight, make(straight), 9)
    opt = make(first)
    train(first, opt, 4)
    torch.save({"model": first, "opt": opt.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    for name, p in second.items():
        p.data.copy_(saved["model"][name])
    resumed = make(second)
    resumed.load_state_dict(saved["opt"])
    assert resumed.steps == 4
    train(second, resumed, 5)
    for name, p in straight.items():
        assert torch.equal(p, second[name]) and not torch.equal(p, first[name])


@pytest.mark.parametrize("rule", [Sgd(), Adam()], ids=repr)
def test_a_step_holds_one_matrix_more(rule):
    """Nine matrices of unlike sizes: beside weights and state, never more than the largest."""
    named = weights(*((40 + i, 50) for i in range(9)), dtype=torch.float32)
    opt = Optim(named.items(), Recipe(rule, Spsa()), lr=1e-3, where="*")

    def closure():
        return sum(p.sum() for p in named.values())

    opt.step(closure)
    with Peak() as meter:
        start = meter.now
        opt.step(closure)
    largest = max(p.nbytes for p in named.values())
    spare = 16 * 8 * len(named)  # losses and counters
    assert largest <= meter.most - start <= largest + spare
    assert all(p.grad is None for p in named.values())


def test_mezo_learns_without_state_and_without_backward():
    named = weights((8, 5))
    (p,) = named.values()
    x, y = noise(32, 5, seed=1), noise(32, 8, seed=2)

    def closure():
        assert not torch.is_grad_enabled()
        return (x @ p.T - y).square().mean()

    best = (x @ torch.linalg.lstsq(x, y).solution - y).square().mean()
    opt = Optim(named.items(), mezo(), lr=0.05)
    first, *_, last = [float(opt.step(closure)) for _ in range(800)]
    assert (last - best) < 0.01 * (first - best)
    assert opt.state_bytes() == 8  # the counter of steps


def test_both_losses_see_the_same_dropout():
    named = weights((50, 40))
    (p,) = named.values()
    torch.manual_seed(1)
    found = estimate(Spsa(0.1), lambda: nn.functional.dropout(p, 0.5).sum(), named)["layers.0.weight"]
    torch.manual_seed(1)
    mask = nn.functional.dropout(torch.ones_like(p), 0.5)
    z = directions(Spsa(), named)["layers.0.weight"].double()
    assert_close(found, (mask * z).sum() * z, rtol=1e-11, atol=0)


def test_frozen_parameters_are_not_perturbed():
    named = weights((3, 2), (3, 2))
    held = named["layers.1.weight"].requires_grad_(False)
    seen = []
    opt = Optim(named.items(), mezo(), lr=0.1, unmoved="allow")
    opt.step(lambda: seen.append(held.clone()) or named["layers.0.weight"].sum())
    assert len(seen) == 2 and all(torch.equal(held, x) for x in seen)
    with pytest.raises(RuntimeError, match=r"layers\.1\.weight has no gradient"):
        Optim(named.items(), mezo(), lr=0.1).step(lambda: named["layers.0.weight"].sum())


def test_a_step_without_closure_is_refused():
    opt = Optim(weights((3, 2)).items(), mezo(), lr=0.1)
    with pytest.raises(ValueError, match=r"call step\(closure\), where closure\(\) returns the loss"):
        opt.step()


@pytest.mark.parametrize("fault", ["raise", "nan"])
def test_a_failed_step_leaves_the_weights_and_the_count(fault):
    named = weights((3, 2))
    (p,) = named.values()
    before, calls = p.detach().clone(), []

    def closure():
        calls.append(1)
        if len(calls) == 2 and fault == "raise":
            raise KeyError("the data ended")
        return p.sum() * (math.nan if len(calls) == 2 else 1)

    opt = Optim(named.items(), Recipe(Sgd(), Spsa(copy="always")), lr=0.1)
    with pytest.raises(
        KeyError if fault == "raise" else FloatingPointError, match=r"data ended|lower the learning"
    ):
        opt.step(closure)
    assert torch.equal(p, before) and opt.steps == 0 and len(calls) == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Spsa(0.0), "eps=0.0 is no distance"),
        (lambda: Spsa(math.nan), "eps=nan is no distance"),
        (lambda: Spsa(copy="all"), "use 'half', 'always' or 'never'"),
    ],
)
def test_a_wrong_setting_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_mezo_takes_rules_for_matrices_beside_another_for_the_rest():
    model = nn.Linear(6, 4).double()
    recipe = mezo(rule=galore(rank=2))
    opt = Optim(model.named_parameters(), recipe, lr=1e-3)
    opt.step(lambda: model(noise(3, 6)).square().sum())
    assert isinstance(recipe.rule, Projected) and set(opt.state[model.bias]) == {"step"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_lost_to_rounding_is_an_error_in_half_precision_only(dtype):
    """A slope near zero is no fault of float32; bfloat16 loses nearly every small step."""
    p = nn.Parameter(torch.ones(64, dtype=dtype))
    opt = Optim([("w", p)], mezo(), lr=1e-12)
    if dtype == torch.bfloat16:
        with pytest.raises(RuntimeError, match=r"w is torch\.bfloat16, too coarse"):
            opt.step(lambda: p.float().sum())
    else:
        opt.step(lambda: p.sum())
    assert (p - 1).abs().max() < 1e-6
