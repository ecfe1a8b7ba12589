"""Every rule, subspace and residual obeys its protocol; every optimizer resumes bit for bit."""

import copy
import inspect
import zlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import subspan.methods.optimizers  # noqa: F401  (registers the presets)
from subspan.codec import Bf16, Factored
from subspan.methods import methods
from subspan.optim import (
    Adam,
    Clip,
    Cosine,
    Drop,
    ErrorFeedback,
    Every,
    FixedDecay,
    Gaussian,
    LowRankAdam,
    Momentum,
    Nesterov,
    NormScale,
    Optim,
    Polar,
    Power,
    Projected,
    Recipe,
    RisingDecay,
    Rms,
    Rows,
    Scaling,
    Sgd,
    ShapeScale,
    Sign,
    Sketch,
    Span,
    Staggered,
    UnitRows,
    chain,
    dense,
    hasten,
    hidden_matrices,
    keep,
    reset,
    rotate,
    stored,
)
from subspan.optim.direction import Both, Low, Picked, Times, add_to
from subspan.optim.write import stochastic_bf16

SHAPES = {"tall": (7, 5), "wide": (5, 7), "square": (6, 6)}
RAW = Adam(eps_on="raw")
RULES = {
    "sgd": Sgd(),
    "momentum": Momentum(),
    "adam": Adam(),
    "adam-raw": RAW,
    "chain": chain(first=Momentum(0.5), then=Adam()),
    "factored": stored(Adam(), nu=Factored()),
    "bf16": stored(Adam(), mu=Bf16()),
    "span-keep": Projected(Span(3), Every(2, keep), RAW, scale=0.25),
    "span-reset": Projected(Span(3), Every(2, reset), RAW, Sign(0.5)),
    "span-rotate": Projected(Span(0.5, "gram"), Every(2, rotate), Adam(), NormScale()),
    "span-random": Projected(Span(3, "random"), Every(2), Adam(), NormScale(None, leak=0.5)),
    "rows": Projected(Rows(0.5), Every(2, reset), Adam(), Sign()),
    "rows-rotate": Projected(Rows(2), Every(2, rotate), Momentum(), Drop(), side="long"),
    "feedback": Projected(Span(2), Every(2), Sgd(), ErrorFeedback(0.5), side="left"),
    "nested": Projected(Rows(4), Every(3, reset), Projected(Span(2), Every(2), RAW, Drop(), side="right")),
    "muon": chain(momentum=Nesterov(), polar=Polar(), shape=ShapeScale("adam")),
    "polar-exact": chain(polar=Polar(solver="exact"), unit=UnitRows()),
    "rms": Rms(FixedDecay(0.9)),
    "adafactor": chain(rms=stored(Rms(), nu=Factored()), clip=Clip(0.5), mean=Nesterov(0.5)),
    "dion": chain(
        shape=ShapeScale("ratio"),
        inside=Projected(Power(2), Every(1), UnitRows(), ErrorFeedback(0.95), side="left"),
    ),
    "power-rotate": Projected(Power(0.5), Every(2, rotate), Adam(), NormScale()),
    "sketch": Projected(Sketch(3), Every(2), RAW, Scaling(), scale=0.5),
    "sketch-rotate": Projected(Sketch(3), Every(2, rotate), Momentum()),
    "gaussian": Projected(Gaussian(0.5), Every(2, rotate), Momentum(), Scaling("tensor", None, 2.0)),
    "cosine": Projected(Cosine(3), Every(1, rotate), Adam(), ErrorFeedback()),
    "cosine-long": Projected(Cosine(0.5, "l2"), Every(2), Adam(), NormScale(), side="long"),
    "low-rank-adam": LowRankAdam(3),
    "low-rank-dropped": LowRankAdam(0.5, error="dropped"),
    "stored-projected": stored(Projected(Span(2), Every(2), Adam()), **{"frame.q": Bf16(), "rule.nu": Factored()}),
}
SUBSPACES = {
    "power": Span(3),
    "span": Span(3, "exact"),
    "span-full": Span(1.0, "exact"),
    "gram": Span(3, "gram"),
    "random": Span(3, "random"),
    "power-step": Power(3),
    "power-step-full": Power(1.0),
    "rows": Rows(3),
    "rows-full": Rows(1.0),
    "cosine": Cosine(3),
    "cosine-l2": Cosine(3, "l2"),
    "cosine-full": Cosine(1.0),
    "sketch": Sketch(3),
    "gaussian": Gaussian(3),
}
ORTHONORMAL = {name: subspace for name, subspace in SUBSPACES.items() if subspace.orthonormal}


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def directions(rule, grads, seed=11):
    """gain * update over a sequence of gradients, and the final state."""
    s = dict(rule.init(grads[0], seed))
    w = torch.zeros_like(grads[0])
    out = []
    for t, g in enumerate(grads, 1):
        d = dense(rule.update(g, s, w, t)).clone()
        out.append(d * rule.gain(s, t))
    return torch.stack(out), s


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_batch_is_a_loop(rule, shape):
    grads = noise(5, 3, *shape)
    together, _ = directions(rule, grads)
    for i in range(3):
        assert_close(together[:, i], directions(rule, grads[:, i])[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_reads_gradients_and_keeps_its_names(rule, shape):
    grads = noise(5, *shape)
    before = grads.clone()
    first = rule.init(grads[0], 0)
    _, s = directions(rule, grads)
    assert torch.equal(grads, before)
    assert {k: v.shape for k, v in s.items()} == {k: v.shape for k, v in first.items()}
    assert all(type(v) is torch.Tensor for v in s.values())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_value_prints_and_compares_as_what_it_is(rule):
    assert " at 0x" not in repr(rule)
    assert repr(copy.deepcopy(rule)) == repr(rule)
    assert hash(copy.deepcopy(rule)) == hash(rule) and copy.deepcopy(rule) == rule


@dataclass(frozen=True)
class Copying:
    """A codec without loss: only what a rule writes back survives it."""

    through: ClassVar[bool] = True

    def encode(self, x):
        return {"copy": x.clone()}

    def decode(self, s):
        return s["copy"].clone()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_writes_back_what_it_changes(rule):
    grads = noise(5, 7, 5)
    names = [k for k, v in rule.init(grads[0], 0).items() if v.is_floating_point()]
    if "Rotate()" in repr(rule):  # which refuses encoded moments
        names = [k for k in names if not k.startswith("rule.")]
    if names:
        through = stored(rule, **dict.fromkeys(names, Copying()))
        assert torch.equal(directions(through, grads)[0], directions(rule, grads)[0])


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (2, 6, 6)], ids=str)
@pytest.mark.parametrize("subspace", SUBSPACES.values(), ids=SUBSPACES)
def test_a_subspace_looks_and_lifts_by_one_matrix(subspace, shape):
    """<down(g), x> = <g, up(x)>; a move goes up from the old frame and down to the new."""
    g, h = noise(*shape), noise(*shape, seed=1)
    old = subspace.fit(g, subspace.init(g, 3), True)
    new = subspace.fit(h, old, True)
    r = subspace.down(g, old)
    assert r.shape == subspace.down(g, subspace.init(g, 3)).shape
    x = noise(*r.shape, seed=2)
    inside, outside = (r * x).sum((-2, -1)), (g * subspace.up(x, old).dense()).sum((-2, -1))
    assert_close(inside, outside, rtol=0, atol=1e-12)
    assert_close(subspace.move(x, old, new, 1), subspace.down(subspace.up(x, old).dense(), new))
    eye = torch.eye(r.shape[-2], dtype=g.dtype).expand(*g.shape[:-2], r.shape[-2], r.shape[-2])
    assert_close(subspace.move(x, old, new, 2), subspace.move(eye, old, new, 1).square() @ x)
    assert subspace.fit(h, old, False) == dict(old)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (2, 6, 6)], ids=str)
@pytest.mark.parametrize("subspace", ORTHONORMAL.values(), ids=ORTHONORMAL)
def test_a_subspace_is_orthonormal_coordinates(subspace, shape):
    g = noise(*shape)
    old = subspace.fit(g, subspace.init(g, 3), True)
    r = subspace.down(g, old)
    assert_close(subspace.down(subspace.up(r, old).dense(), old), r)
    rank = r.shape[-2]
    eye = torch.eye(rank, dtype=g.dtype).expand(*g.shape[:-2], rank, rank)
    assert_close(subspace.down(subspace.up(eye, old).dense(), old), eye)
    assert_close(subspace.up(eye, old).dense().mT @ subspace.up(eye, old).dense(), eye)
    for degree in (1, 2):
        assert_close(subspace.move(r, old, old, degree), r)


@pytest.mark.parametrize("solver", ["exact", "gram", "random"])
def test_span_holds_the_most_of_the_gradient(solver):
    g = noise(9, 6)
    span = Span(3, solver)
    r = span.down(g, span.fit(g, span.init(g, 0), True))
    best = torch.linalg.svdvals(g)[:3].square().sum()
    assert_close(r.square().sum(), best, rtol=1e-9, atol=0)


@pytest.mark.parametrize("subspace", [Span(3, "exact"), Span(3, "gram"), Span(3, "random")], ids=repr)
def test_span_frames_have_their_largest_entries_positive(subspace):
    g = noise(9, 6)
    q = subspace.fit(g, subspace.init(g, 0), True)["q"]
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()


def test_power_tends_to_the_singular_vectors_in_order_and_keeps_their_signs():
    u, v = torch.linalg.qr(noise(9, 6)).Q, torch.linalg.qr(noise(6, 6, seed=1)).Q
    g = u @ torch.diag(2.0 ** -torch.arange(6, dtype=torch.float64)) @ v.mT
    span = Span(3)
    s = span.fit(g, span.init(g, 0), True)
    for _ in range(12):  # each sweep shrinks the error (s_{i+1} / s_i)^2 = 4 times
        last, s = s, span.fit(g, s, True)
    assert_close((s["q"] * u[:, :3]).sum(0).abs(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(s["q"], last["q"], rtol=0, atol=1e-6)


def test_power_sees_what_its_last_basis_missed_entirely():
    g, h = torch.zeros(2, 12, 8, dtype=torch.float64)
    g[:6], h[6:] = noise(6, 8), noise(6, 2, seed=1) @ noise(2, 8, seed=2)
    span = Span(2)
    s = span.fit(h, span.fit(g, span.init(g, 0), True), True)
    assert_close(span.up(span.down(h, s), s).dense(), h)


def test_power_holds_a_gradient_however_small_or_deficient():
    g = noise(9, 1) @ noise(1, 6, seed=1)
    for scale in (1.0, 1e-20, 1e-120):
        s = Span(3).fit(g * scale, Span(3).init(g, 0), True)
        assert_close(s["q"].mT @ s["q"], torch.eye(3, dtype=torch.float64))
        assert_close(Span(3).up(Span(3).down(g, s), s).dense(), g)


def test_squares_of_aligned_coordinates_move_exactly():
    """With C a permutation (the same basis, reordered) (C * C) x reorders x."""
    old = {"q": torch.eye(4, dtype=torch.float64)[:, :3]}
    new = {"q": old["q"][:, [2, 0, 1]]}
    x = noise(3, 5).square()
    assert torch.equal(Span(3).move(x, old, new, 2), x[[2, 0, 1]])


def test_rows_depend_on_seed_and_draw_only():
    g = noise(50, 4)
    rows = Rows(0.2)
    one = rows.fit(g, rows.init(g, 5), True)
    two = rows.fit(g, one, True)
    assert torch.equal(rows.fit(g * 2, rows.init(g, 5), True)["index"], one["index"])
    assert not torch.equal(one["index"], two["index"])
    assert not torch.equal(rows.fit(g, rows.init(g, 6), True)["index"], one["index"])
    assert len(one["index"].unique()) == 10


def test_every_row_is_drawn_as_often_as_its_density_says():
    g = noise(8, 2)
    rows, hits = Rows(0.25), torch.zeros(8)
    s = rows.init(g, 0)
    for _ in range(2000):
        s = rows.fit(g, s, True)
        hits[s["index"]] += 1
    # five standard deviations of a binomial with p = 1/4 and 2000 draws
    assert (hits / 2000 - 0.25).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize(
    "subspace, rank",
    [(Span(99), 5), (Span(0.5), 2), (Span(0.01), 1), (Span(1), 1), (Span(1.0), 5), (Rows(1.0), 5), (Rows(9), 5)]
    + [(Cosine(0.5), 2), (Cosine(9), 5), (Sketch(0.5), 2), (Sketch(9), 5), (Gaussian(0.5), 2), (Gaussian(9), 5)],
    ids=repr,
)
def test_rank_is_a_count_or_a_share_of_the_rows(subspace, rank):
    g = noise(5, 7)
    assert subspace.down(g, subspace.init(g, 0)).shape[-2] == rank


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, -0.5])
@pytest.mark.parametrize("part", [Span, Rows, Power, Cosine, Sketch, Gaussian, LowRankAdam])
def test_an_impossible_rank_is_refused(part, rank):
    with pytest.raises(ValueError, match="neither an int >= 1 nor a float in"):
        part(rank)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Every(0), "less than 1"),
        (lambda: Span(2, "fast"), "use 'power', 'exact', 'gram' or 'random'"),
        (lambda: Projected(Span(2), Every(1), Sgd(), side="top"), "'short', 'long', 'left' or 'right'"),
        (lambda: Adam(b1=1.0), "b1=1.0 is outside"),
        (lambda: Adam(b2=-0.1), "b2=-0.1 is outside"),
        (lambda: Adam(eps_on="both"), "neither 'corrected' nor 'raw'"),
        (lambda: Momentum(1.5), "mu=1.5 is outside"),
        (lambda: Nesterov(1.0), "mu=1.0 is outside"),
        (lambda: Polar(steps=-1), "must not be negative"),
        (lambda: Polar(solver="svd"), "use 'products' or 'exact'"),
        (lambda: Polar().init(torch.ones(3), 0), "Polar needs a matrix"),
        (lambda: UnitRows(eps=0.0), "divided by zero"),
        (lambda: ShapeScale("wide"), "use 'tall', 'ratio' or 'adam'"),
        (lambda: ShapeScale().init(torch.ones(3), 0), "ShapeScale needs a matrix"),
        (lambda: Rms(eps=0.0), "divided by zero"),
        (lambda: FixedDecay(1.0), "b=1.0 is outside"),
        (lambda: RisingDecay(0.0), "nothing is ever kept"),
        (lambda: Clip(0.0), "allows no step"),
        (lambda: NormScale(limit=0.9), "use >= 1"),
        (lambda: Scaling(limit=0.9), "use >= 1"),
        (lambda: Scaling("row"), "use 'column' or 'tensor'"),
        (lambda: Cosine(2, "max"), "use 'l1' or 'l2'"),
        (lambda: LowRankAdam(2, rho=1.0), "rho=1.0 is outside"),
        (lambda: LowRankAdam(2, error="lost"), "use 'kept' or 'dropped'"),
        (lambda: LowRankAdam(2).init(torch.ones(3), 0), "needs a matrix"),
        (lambda: Projected(Sketch(2), Every(1), Sgd(), NormScale()), "needs an orthonormal frame"),
        (lambda: chain(), "holds no rule"),
        (lambda: stored(Adam(), gamma=Bf16()), r"no state \['gamma'\]; it has: mu, nu"),
        (lambda: stored(Adam()), "none named"),
        (lambda: Factored().encode(torch.ones(3)), "stores matrices"),
        (lambda: Projected(Span(2), Every(1), Sgd()).init(torch.ones(3), 0), "needs a matrix"),
    ],
)
def test_a_wrong_setting_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rotate_refuses_encoded_moments_at_the_first_step():
    rule = Projected(Span(2), Every(9, rotate), stored(Adam(), nu=Factored()))
    g = noise(5, 4)
    with pytest.raises(ValueError, match="keeps nu encoded, which rotate cannot turn"):
        rule.update(g, dict(rule.init(g, 0)), g, 1)


# ---- Optim


class Net(nn.Module):
    """Every kind of parameter: a table, a tall and a wide matrix, a bias and a norm, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)

    def forward(self, ids):
        return self.lm_head(self.norm(self.down(torch.relu(self.up(self.embed(ids))))))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def train(model, opt, steps):
    for t in steps:
        ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(t))
        opt.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1).double(), ids.flatten().roll(1)).backward()
        opt.step()


SMALL = {"rank": 3, "every": 4}


def preset(name):
    build = methods("optimizer")[name].build
    takes = inspect.signature(build).parameters
    made = build(**{k: v for k, v in SMALL.items() if k in takes})
    return made.rule if isinstance(made, Recipe) else made


ALL = {f"preset-{name}": preset(name) for name in methods("optimizer")} | RULES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ALL.values(), ids=ALL)
def test_a_saved_run_continues_bit_for_bit(rule, dtype, tmp_path):
    """Six steps, saved between two refreshes, five more: the uninterrupted run, and the saved one unharmed."""

    def optimizer(model):
        return Optim(model.named_parameters(), rule, lr=1e-2, weight_decay=0.1, seed=7)

    straight, first = net(dtype), net(dtype)
    train(straight, optimizer(straight), range(11))

    opt = optimizer(first)
    train(first, opt, range(6))
    torch.save({"model": first.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second = net(dtype)
    second.load_state_dict(saved["model"])
    resumed = optimizer(second)
    resumed.load_state_dict(saved["opt"])
    train(second, resumed, range(6, 11))
    for name, p in straight.named_parameters():
        assert torch.equal(p, dict(second.named_parameters())[name]), name
    assert any(not torch.equal(p, q) for p, q in zip(straight.parameters(), first.parameters(), strict=True))


def test_state_belongs_to_names_not_positions():
    one, two = net(), net()
    rule = preset("fira")
    opt = Optim(one.named_parameters(), rule, lr=1e-2)
    train(one, opt, range(3))
    two.load_state_dict(one.state_dict())
    other = Optim(reversed(list(two.named_parameters())), rule, lr=5.0)
    other.load_state_dict(opt.state_dict())
    train(one, opt, range(3, 6))
    train(two, other, range(3, 6))
    for name, p in one.named_parameters():
        assert torch.equal(p, dict(two.named_parameters())[name]), name
    assert other.param_groups[0]["lr"] == 1e-2


def test_loading_shares_no_memory_with_the_saved_state():
    model = net()
    opt = Optim(model.named_parameters(), Adam(), lr=1e-2)
    train(model, opt, range(2))
    saved = opt.state_dict()
    frozen = copy.deepcopy(saved)
    twin = Optim(model.named_parameters(), Adam(), lr=1e-2)
    twin.load_state_dict(saved)
    train(model, twin, range(2, 4))
    for i, s in frozen["state"].items():
        for key, value in s.items():
            assert torch.equal(value, saved["state"][i][key]), key


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda named: named[:-1], "unexpected: lm_head.weight"),
        (lambda named: [*named, ("extra", nn.Parameter(torch.ones(2)))], "missing: extra"),
    ],
)
def test_loading_other_parameters_is_refused_by_name(change, message):
    opt = Optim(net().named_parameters(), Adam(), lr=1e-2)
    other = Optim(change(list(net().named_parameters())), Adam(), lr=1e-2)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("other", [preset("frugal"), Adam(), Projected(Span(2), Every(4), RAW)], ids=repr)
def test_loading_another_rules_state_is_refused(other):
    model = net()
    opt = Optim(model.named_parameters(), preset("galore"), lr=1e-2)
    train(model, opt, range(1))
    with pytest.raises(ValueError, match=r"up\.weight: the saved state .* was not written by"):
        Optim(net().named_parameters(), other, lr=1e-2).load_state_dict(opt.state_dict())


def test_loading_into_other_roles_or_from_torch_is_refused():
    opt = Optim(net().named_parameters(), Adam(), lr=1e-2)
    with pytest.raises(ValueError, match=r"in another role: down\.weight"):
        Optim(net().named_parameters(), Adam(), lr=1e-2, where="up.weight").load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="was not saved by Optim"):
        opt.load_state_dict(torch.optim.AdamW(net().parameters()).state_dict())


def test_loading_two_learning_rates_into_one_group_is_refused():
    state = hasten(Optim(net().named_parameters(), Adam(), lr=0.1), 16, where="up.weight").state_dict()
    plain = Optim(net().named_parameters(), Adam(), lr=0.1)
    with pytest.raises(ValueError, match=r"saved with learning rate .* one group; split the groups"):
        plain.load_state_dict(state)
    twin = hasten(Optim(net().named_parameters(), Adam(), lr=0.5), 16, where="up.weight")
    twin.load_state_dict(state)
    rates = {name: g["lr"] for g in twin.param_groups for name in g["param_names"]}
    assert rates["up.weight"] == 16 * rates["down.weight"] == 1.6


def test_a_deep_copy_steps_alike():
    model = net()
    opt = Optim(model.named_parameters(), preset("frugal"), lr=1e-2, seed=3)
    train(model, opt, range(3))
    twin, twin_opt = copy.deepcopy((model, opt))
    train(model, opt, range(3, 6))
    train(twin, twin_opt, range(3, 6))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_default_rule_takes_hidden_matrices_only():
    opt = Optim(net().named_parameters(), preset("galore"), lr=1e-2)
    assert [row["name"] for row in opt.report() if row["role"] == "rule"] == ["up.weight", "down.weight"]
    names = [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "wpe.weight",
        "word_embeddings.weight",
        "head.weight",
    ]
    assert not any(hidden_matrices(name, torch.ones(2, 2)) for name in names)
    assert hidden_matrices("layers.0.head_mix.weight", torch.ones(2, 2))
    assert not hidden_matrices("layers.0.norm.weight", torch.ones(2))


def test_where_is_a_pattern_or_a_function():
    by_pattern = Optim(net().named_parameters(), Adam(), lr=1e-2, where="*.weight|!embed.*|!norm.*")
    by_function = Optim(
        net().named_parameters(), Adam(), lr=1e-2, where=lambda name, p: p.ndim == 2 and "embed" not in name
    )
    assert by_pattern.param_groups[0]["param_names"] == ["up.weight", "down.weight", "lm_head.weight"]
    assert by_function.param_groups[0]["param_names"] == ["up.weight", "down.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda m: Optim(m.parameters(), Adam(), lr=1.0), TypeError, r"pass model.named_parameters\(\)"),
        (lambda m: Optim([{"params": []}], Adam(), lr=1.0), TypeError, r"pass model.named_parameters\(\)"),
        (lambda m: Optim([], Adam(), lr=1.0), ValueError, "no parameters"),
        (
            lambda m: Optim([("a", m.up.bias), ("b", m.up.bias)], Adam(), lr=1.0),
            ValueError,
            r"b is given twice \(as a\)",
        ),
        (lambda m: Optim([("a", m.up.bias), ("a", m.norm.bias)], Adam(), lr=1.0), ValueError, "a is given twice"),
        (lambda m: Optim(m.named_parameters(), Adam(), lr=-1.0), ValueError, "lr=-1.0"),
        (lambda m: Optim(m.named_parameters(), Adam(), lr=float("nan")), ValueError, "lr=nan"),
        (lambda m: Optim(m.named_parameters(), Adam(), lr=1.0, weight_decay=-1), ValueError, "weight_decay=-1"),
        (
            lambda m: Optim(m.named_parameters(), Adam(), lr=1.0, where="*.query"),
            ValueError,
            "embed.weight, up.weight",
        ),
        (
            lambda m: Optim(m.named_parameters(), Adam(), lr=1.0, where=lambda n, p: False),
            ValueError,
            "embed.weight, up",
        ),
        (lambda m: Optim([("z", nn.Parameter(torch.ones(1) * 1j))], Adam(), lr=1.0), TypeError, "z is complex"),
        (
            lambda m: Optim(m.named_parameters(), Adam(), lr=1.0).add_param_group(
                {"params": [("x", torch.ones(1))]}
            ),
            ValueError,
            "a group needs a role, one of rule, other",
        ),
    ],
)
def test_bad_parameters_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(net())


def test_a_faulty_gradient_is_named():
    model = net()
    opt = Optim(model.named_parameters(), preset("galore"), lr=1e-2)
    model.down.weight.grad = torch.full_like(model.down.weight, torch.nan)
    with pytest.raises(ValueError, match=r"down\.weight: matrix of shape \(6, 9\) holds nan"):
        opt.step()
    opt = Optim(model.named_parameters(), preset("galore"), lr=1e-2, where="up.*")
    model.zero_grad()
    model.up.bias.grad = torch.ones_like(model.up.bias)
    with pytest.raises(ValueError, match=r"up\.bias: a subspace needs a matrix"):
        opt.step()
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="weight: sparse gradients"):
        Optim(sparse.named_parameters(), Adam(), lr=1e-2).step()


def test_a_refused_gradient_changes_nothing():
    model, fresh = net(), net()
    opt = Optim(model.named_parameters(), preset("galore"), lr=1e-2)
    model.up.weight.grad = torch.full_like(model.up.weight, torch.nan)
    with pytest.raises(ValueError, match="holds nan"):
        opt.step()
    train(model, opt, range(5))
    train(fresh, Optim(fresh.named_parameters(), preset("galore"), lr=1e-2), range(5))
    assert torch.equal(model.up.weight, fresh.up.weight)


def test_a_parameter_without_gradient_rests():
    model = net()
    opt = Optim(model.named_parameters(), Adam(), lr=1e-2, weight_decay=0.5, unmoved="allow")
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.up.bias.grad = torch.ones_like(model.up.bias)
    assert opt.step(lambda: 3.5) == 3.5
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["up.bias"]


def test_a_parameter_that_stands_still_is_an_error_that_names_it():
    model = net()
    opt = Optim(model.named_parameters(), Adam(), lr=1e-2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.up.bias.grad = None
    model.up.weight.grad = torch.zeros_like(model.up.weight)  # no reason to move is no fault
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"not moved: up\.bias has no gradient\. Leave"):
        opt.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {"up.bias", "up.weight"}
    opt.step()  # it is said once


def test_a_step_lost_to_rounding_is_an_error_and_stochastic_rounding_its_remedy():
    grad = torch.ones(64, 8, dtype=torch.bfloat16)
    near, odds = (nn.Parameter(torch.ones(64, 8, dtype=torch.bfloat16)) for _ in range(2))
    near.grad = odds.grad = grad
    with pytest.raises(RuntimeError, match=r"w is torch.bfloat16, too coarse for steps at lr 0\.0001"):
        Optim([("w", near)], Adam(), lr=1e-4).step()
    Optim([("w", odds)], Adam(), lr=1e-4, rounding="stochastic").step()
    assert set(odds.detach().unique().tolist()) == {1.0, 1 - 2**-8}


def test_the_check_waits_for_a_learning_rate_above_zero():
    p = nn.Parameter(torch.ones(3))
    opt = Optim([("w", p)], Adam(), lr=0.0)
    opt.step()
    opt.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="w has no gradient"):
        opt.step()


def test_stochastic_rounding_is_unbiased_and_repeatable():
    x = torch.full((100_000,), 1 + 2**-9)  # a quarter of the way from 1 to 1 + 2^-7
    draws = [stochastic_bf16(x, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert set(draws[0].unique().tolist()) == {1.0, 1 + 2**-7}
    # five standard deviations of 100,000 coins of probability 1/4
    assert abs((draws[0] != 1).double().mean() - 0.25) < 5 * (0.25 * 0.75 / 1e5) ** 0.5
    odd = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    assert torch.equal(stochastic_bf16(odd, torch.Generator()).float(), odd)
    assert stochastic_bf16(torch.tensor([torch.nan]), torch.Generator()).isnan()


def test_refreshes_are_staggered_one_an_interval():
    """Twenty names fall on phases of their own; each is due at step 1 and then exactly once an interval."""
    phases = []
    for i in range(20):
        refresh = Staggered(10)
        s = refresh.init(zlib.crc32(f"layers.{i}.weight".encode()))
        due = [t for t in range(1, 42) if refresh.due(s, t)]
        phases.append(due[-1] % 10)
        steps = [t for t in due if t > 1]
        assert due[0] == 1 and {b - a for a, b in pairwise(steps)} == {10} and steps[0] <= 11
    assert len(set(phases)) >= 6  # 20 fair throws over 10 fill fewer than 6 once in 10,000


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("subspace", [Span(3), Rows(3)], ids=repr)
def test_coordinates_are_enough_between_refreshes(subspace, shape):
    """`answer` on the mean of coordinates is `update` on the mean of gradients."""
    rule = Projected(subspace, Every(5), Momentum(), scale=0.5)
    first, a, b = noise(3, *shape)
    w = torch.zeros(shape, dtype=torch.float64)
    whole = dict(rule.init(first, 0))
    rule.update(first, whole, w, 1)
    small = {k: v.clone() for k, v in whole.items()}
    coordinates = [rule.squeeze(g, small, 2) for g in (a, b)]
    got = dense(rule.answer(sum(coordinates) / 2, small, w, 2))
    assert_close(got, dense(rule.update((a + b) / 2, whole, w, 2)))
    assert_close(small, whole)
    assert all(c.numel() == 3 * max(shape) for c in coordinates)
    assert rule.squeeze(a, small, 6) is None
    assert replace(rule, residual=Sign()).squeeze(a, small, 3) is None


def test_directions_add_what_they_are():
    x, by, w = noise(4, 6), noise(1, 6, seed=1), noise(4, 6, seed=2)
    low = Low(noise(4, 2, seed=3), noise(2, 6, seed=4))
    picked = Picked(torch.tensor([3, 0]), noise(2, 6, seed=5), 4)
    full = torch.zeros(4, 6, dtype=torch.float64)
    full[[3, 0]] = noise(2, 6, seed=5)
    for d, want in [
        (low, low.left @ low.right),
        (picked, full),
        (Times(x, by), x * by),
        (Both(low, picked), low.left @ low.right + full),
    ]:
        for one, it, start in ((d, want, w), (d.mT, want.mT, w.mT)):
            out = start.clone()
            add_to(out, one, -0.5)
            assert_close(out, start - 0.5 * it, rtol=0, atol=1e-15)
            assert_close(dense(one), it, rtol=0, atol=1e-15)


def test_half_precision_steps_in_float32_and_rounds_once():
    w = noise(6, 4).bfloat16()
    half, full = nn.Parameter(w.clone()), nn.Parameter(w.float())
    opts = [Optim([("w", p)], preset("fira"), lr=0.1) for p in (half, full)]
    half.grad = noise(6, 4, seed=1).bfloat16()
    full.grad = half.grad.float()
    for opt in opts:
        opt.step()
    assert torch.equal(half.detach(), full.detach().bfloat16())
    assert {x.dtype for x in opts[0].state[half].values()} == {torch.float32, torch.int64}


def test_lr_may_be_a_tensor_or_scheduled():
    one, two, three = net(), net(), net()
    train(one, Optim(one.named_parameters(), RAW, lr=0.03, weight_decay=0.1), range(4))
    train(
        two,
        Optim(two.named_parameters(), RAW, lr=torch.tensor(0.03, dtype=torch.float64), weight_decay=0.1),
        range(4),
    )
    opt = Optim(three.named_parameters(), RAW, lr=3.0, weight_decay=0.1)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.01)
    train(three, opt, range(4))
    for p, q, r in zip(one.parameters(), two.parameters(), three.parameters(), strict=True):
        assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert_close(p, r, rtol=1e-12, atol=1e-12)


def test_random_frames_depend_on_name_and_seed():
    def index(name, seed):
        p = nn.Parameter(noise(40, 60))
        p.grad = noise(40, 60, seed=1)
        opt = Optim([(name, p)], preset("frugal"), lr=1e-2, seed=seed)
        opt.step()
        assert int(opt.state[p]["frame.seed"]) == zlib.crc32(name.encode()) ^ seed
        return opt.state[p]["frame.index"].tolist()

    assert index("a", 0) == index("a", 0)
    assert len({tuple(index(name, seed)) for name in "ab" for seed in (0, 1)}) == 4


def test_galore_state_is_two_moments_a_basis_and_counters():
    p = nn.Parameter(noise(40, 24))
    p.grad = noise(40, 24, seed=1)
    opt = Optim([("w", p)], Projected(Span(5), Every(4), Adam()), lr=1e-2)
    opt.step()
    # moments, basis, drift; step, clock, fits, seed and draw
    assert opt.state_bytes() == 8 * (2 * 5 * 40 + 5 * 24 + 1) + 8 * 5
    assert opt.report() == [
        {
            "name": "w",
            "shape": (40, 24),
            "role": "rule",
            "rule": repr(opt.rules["rule"]),
            "bytes": opt.state_bytes(),
            "steps": 1,
            "side": "right",
            "rank": 5,
            "refreshes": 1,
            "drift": 0.0,
        }
    ]
