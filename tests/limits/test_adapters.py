"""The theorems that every published adapter and every start of an op obeys, and what each one adds."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from subspan.adapt import (
    Adapted,
    Adapter,
    FromData,
    FromWeight,
    KeepBase,
    Rescale,
    Routed,
    SubtractInit,
    ZeroLowRank,
    adapt,
    merge,
    trainable,
)
from subspan.linalg import svd
from subspan.methods import adapters, methods
from subspan.methods.adapters import (
    adalora,
    dora,
    loha,
    lokr,
    lora,
    lora_plus,
    lora_pro,
    lora_xs,
    milora,
    oft,
    paca,
    pissa,
    randlora,
    riemannian_lora,
    rslora,
    shira,
    vera,
)

M, N, RANK = 12, 9, 3
PRESETS = {
    "lora": lambda: lora(rank=RANK, alpha=6.0),
    "rslora": lambda: rslora(rank=RANK, alpha=6.0),
    "lora_plus": lambda: lora_plus(rank=RANK, alpha=6.0),
    "lora_pro": lambda: lora_pro(rank=RANK, alpha=6.0),
    "riemannian_lora": lambda: riemannian_lora(rank=RANK, alpha=6.0),
    "adalora": lambda: adalora(rank=2, start=1.5, alpha=6.0),
    "dora": lambda: dora(rank=RANK, alpha=6.0),
    "pissa": lambda: pissa(rank=RANK, alpha=6.0),
    "milora": lambda: milora(rank=RANK, alpha=6.0),
    "lora_xs": lambda: lora_xs(rank=RANK, alpha=6.0),
    "vera": lambda: vera(rank=RANK),
    "randlora": lambda: randlora(rank=RANK, alpha=6.0),
    "loha": lambda: loha(rank=RANK, alpha=6.0),
    "lokr": lambda: lokr(rank=1, alpha=2.0),
    "oft": lambda: oft(block=RANK),
    "shira": lambda: shira(rank=RANK),
    "paca": lambda: paca(rank=RANK, alpha=6.0),
}
# A pair u, v of trained factors; all others are in test_structured.py too.
PAIRS = ["lora", "rslora", "lora_plus", "lora_pro", "riemannian_lora", "dora", "pissa", "milora"]
COUNTS = {
    "adalora": RANK * (M + N + 1),
    "dora": RANK * (M + N) + M,
    "lora_xs": RANK**2,
    "vera": M + RANK,
    "randlora": N // RANK * (RANK + N),
    "loha": 2 * RANK * (M + N),
    "lokr": 3 * 3 + 1 * (M // 3 + N // 3),
    "oft": N // RANK * RANK * (RANK - 1) // 2,
    "paca": RANK * M,
}
DRAWN = {*PAIRS, "adalora", "loha", "lokr", "shira", "paca"} - {"pissa", "milora"}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def base(bias: bool = True, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(N, M, bias=bias, dtype=torch.float64)
    for p in layer.parameters():
        p.data.copy_(rand(*p.shape, seed=seed))
    return layer


def put(adapter: Adapter, layer: nn.Linear | None = None, site: str = "site") -> Adapted:
    adapted = adapt(adapter)(site, base() if layer is None else layer)
    assert isinstance(adapted, Adapted)
    return adapted


def moved(adapted: Adapted, seed: int = 3) -> Adapted:
    with torch.no_grad():
        for _, p in trainable(adapted):
            p.add_(0.3 * rand(*p.shape, seed=seed).to(p.dtype))
    return adapted


@pytest.fixture(params=PRESETS)
def preset(request) -> Adapter:
    return PRESETS[request.param]()


def test_every_registered_adapter_is_here_or_starts_from_data():
    """Those that look first are in test_data_starts.py and test_pools.py, gates in test_routed.py."""
    made = {name: found.build() for name, found in methods("adapter").items()}
    blind = {name for name, a in made.items() if not isinstance(a.op, FromData) and not isinstance(a.join, Routed)}
    assert set(PRESETS) == blind
    assert all(methods("adapter")[name].build is getattr(adapters, name) for name in PRESETS)


@pytest.mark.parametrize("bias", [True, False])
def test_g1_it_starts_at_the_base(preset, bias):
    layer, x = base(bias), rand(4, N, seed=7)
    before = copy.deepcopy(layer)(x)
    after = put(preset, layer)(x)
    if preset.base == KeepBase():
        assert torch.equal(after, before)
    assert_close(after, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_g2_merging_is_the_forward(preset, bias):
    adapted, x = moved(put(preset, base(bias))), rand(2, 4, N, seed=7)
    assert_close(merge(adapted)(x), adapted(x), rtol=0, atol=1e-12)
    assert_close(F.linear(x, adapted.weight, adapted.bias), adapted(x), rtol=0, atol=1e-12)


def test_g2_in_float32(preset):
    layer = base().float()
    adapted, x = moved(put(preset, layer)), rand(4, N, seed=7).float()
    assert_close(merge(adapted)(x), adapted(x), rtol=0, atol=1e-5)


def gradients(adapted: Adapted) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients of a probed sum with respect to what trains, and to the effective weight."""
    x, probe = rand(4, N, seed=7), rand(4, M, seed=8)
    (adapted(x) * probe).sum().backward()
    names = {name.rpartition(".")[2]: p.grad for name, p in trainable(adapted)}
    return names, probe.T @ x


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "dora"])
def test_g3_gradients_are_those_of_the_weight_that_defines_the_adapter(name, start):
    adapted = put(PRESETS[name]()) if start else moved(put(PRESETS[name]()))
    names, tensors = zip(*trainable(adapted), strict=True)
    x, probe = rand(2, 4, N, seed=7).requires_grad_(), rand(2, 4, M, seed=8)
    found = torch.autograd.grad((adapted(x) * probe).sum(), (x, *tensors))
    y = F.linear(x, adapted.weight, adapted.bias)
    for which, one, two in zip(
        ("x", *names), found, torch.autograd.grad((y * probe).sum(), (x, *tensors)), strict=True
    ):
        assert_close(one, two, rtol=1e-10, atol=1e-12, msg=lambda text, which=which: f"{which}: {text}")
    assert found[0].norm() > 0 and any(g.norm() > 0 for g in found[1:])


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_g3_gradients_of_the_factors_in_closed_form(name, start):
    adapted = put(PRESETS[name]()) if start else moved(put(PRESETS[name]()))
    slot = adapted.slot("default")
    scale, u, v = slot.join.scale, slot.op.u.detach(), slot.op.v.detach()
    found, g = gradients(adapted)
    total = adapted.base.weight + scale * u @ v
    norm = total.norm(dim=1)
    gain = slot.join.mu.detach() / norm if name == "dora" else torch.ones(M).double()
    assert_close(found["u"], scale * gain[:, None] * g @ v.T)
    assert_close(found["v"], scale * u.T @ (gain[:, None] * g))
    assert_close(found["v"] @ v.T, u.T @ found["u"])
    assert adapted.base.weight.grad is None and adapted.base.bias.grad is None
    if name == "dora":
        assert_close(found["mu"], (g * total).sum(1) / norm)


@pytest.mark.parametrize("name", PRESETS)
def test_g4_what_trains_is_counted(name):
    count = sum(p.numel() for _, p in trainable(put(PRESETS[name]())))
    assert count == COUNTS.get(name, RANK * (M + N))


def test_g5_state_saves_and_loads(preset, tmp_path):
    adapted, x = moved(put(preset)), rand(4, N, seed=7)
    torch.save(adapted.state_dict(), tmp_path / "state.pt")
    fresh = put(preset, base(seed=9), site="elsewhere")
    assert not torch.allclose(fresh(x), adapted(x))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(x), adapted(x))


@pytest.mark.parametrize("name", PAIRS)
def test_g6_a_change_of_gauge_changes_nothing(name):
    adapted, x = moved(put(PRESETS[name]())), rand(4, N, seed=7)
    before = adapted(x).detach()
    mix = rand(RANK, RANK, seed=5) + 3 * torch.eye(RANK).double()
    op = adapted.slot("default").op
    with torch.no_grad():
        op.u.copy_(op.u @ mix)
        op.v.copy_(torch.linalg.solve(mix, op.v))
    assert_close(adapted(x), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PRESETS)
def test_an_adapter_is_deterministic_and_differs_between_sites_where_it_is_drawn(name):
    one, two, other = (put(PRESETS[name](), site=site).state_dict() for site in ("site", "site", "other"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one) == (name not in DRAWN)


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_at_the_start_only_the_zero_factor_moves(name):
    found, _ = gradients(put(PRESETS[name]()))
    assert torch.equal(found["v"], torch.zeros(RANK, N).double())
    assert found["u"].abs().min() > 0


@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_the_change_has_at_most_the_rank(name):
    adapted = moved(put(PRESETS[name]()))
    s = torch.linalg.svdvals(adapted.weight - adapted.base.weight)
    assert s[RANK - 1] > 1e-3 and s[RANK] < 1e-12


def test_scales_are_alpha_over_rank_or_its_root():
    assert lora(rank=4, alpha=6.0).join.scale == 1.5
    assert dora(rank=4, alpha=6.0).join.scale == 1.5
    assert rslora(rank=4, alpha=6.0).join.scale == 3.0
    assert rslora(rank=1, alpha=6.0) == lora(rank=1, alpha=6.0)
    assert pissa(rank=4, alpha=6.0).join.scale == pissa(rank=4, alpha=6.0).op.scale == 1.5
    assert pissa().join.scale == 1.0


@pytest.mark.parametrize("preset", [lora, rslora, dora, pissa, lora_xs, randlora, loha, lokr, paca])
@pytest.mark.parametrize(("rank", "alpha"), [(0, 1.0), (4, 0.0)])
def test_impossible_sizes_are_refused(preset, rank, alpha):
    with pytest.raises(ValueError, match=f"alpha {alpha} and rank {rank}"):
        preset(rank=rank, alpha=alpha)


def first_step(preset, rank: int, alpha: float) -> float:
    """Mean over draws of <-change of the weight, G> / |G|^2 after one step of gradient descent at rate 1."""
    sizes = []
    for draw in range(400):
        adapted = put(preset(rank=rank, alpha=alpha), site=str(draw))
        found, g = gradients(adapted)
        slot = adapted.slot("default")
        change = -slot.join.scale * found["u"] @ slot.op.v.detach()
        sizes.append((-(change * g).sum() / g.square().sum()).item())
    return sum(sizes) / len(sizes)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_rslora_takes_first_steps_of_one_size_at_every_rank_and_lora_does_not(rank):
    alpha = 3.0
    expected = alpha**2 / (3 * N)  # E[v^T v] = rank / (3 n) I for entries uniform on +-1/sqrt(n)
    assert_close(first_step(rslora, rank, alpha), expected, rtol=0.05, atol=0)
    assert_close(first_step(lora, rank, alpha), expected / rank, rtol=0.05, atol=0)


def test_dora_rows_have_the_trained_length():
    adapted = moved(put(PRESETS["dora"]()))
    assert_close(merge(adapted).weight.norm(dim=1), adapted.slot("default").join.mu)


def test_dora_with_magnitudes_bound_to_the_present_norms_is_lora():
    x = rand(4, N, seed=7)
    one, two = moved(put(PRESETS["dora"]())), put(PRESETS["lora"]())
    two.slot("default").op.load_state_dict(one.slot("default").op.state_dict())
    one.slot("default").join.mu.data.copy_(two.weight.norm(dim=1))
    assert_close(one(x), two(x), rtol=0, atol=1e-12)


def test_pissa_leaves_the_base_the_rest_of_the_spectrum():
    layer = base()
    s = torch.linalg.svdvals(layer.weight)
    adapted = put(PRESETS["pissa"](), layer)
    assert_close(torch.linalg.svdvals(adapted.base.weight)[: N - RANK], s[RANK:])
    assert_close(torch.linalg.matrix_norm(adapted.base.weight, 2), s[RANK])
    slot = adapted.slot("default")
    assert_close(slot.op.u.T @ slot.op.u, torch.diag(s[:RANK] / slot.join.scale), rtol=0, atol=1e-12)
    assert_close(slot.op.v @ slot.op.v.T, torch.diag(s[:RANK] / slot.join.scale), rtol=0, atol=1e-12)


def test_pissa_of_full_rank_leaves_nothing():
    adapted = put(pissa(rank=N, alpha=6.0))
    assert_close(adapted.base.weight, torch.zeros(M, N).double(), rtol=0, atol=1e-12)


def test_pissa_is_lora_of_twice_the_rank_on_the_original():
    layer, x = base(), rand(4, N, seed=7)
    adapted = put(PRESETS["pissa"](), layer)
    slot = adapted.slot("default")
    u, v = slot.op.u.detach().clone(), slot.op.v.detach().clone()
    moved(adapted)
    pair = torch.cat([slot.op.u, -u], dim=1), torch.cat([slot.op.v, v])
    assert_close(adapted(x), layer(x) + slot.join.scale * (x @ pair[1].T) @ pair[0].T, rtol=0, atol=1e-12)


def test_milora_leaves_the_base_its_best_approximation():
    layer = base()
    s = torch.linalg.svdvals(layer.weight)
    adapted = put(PRESETS["milora"](), layer)
    kept = torch.cat([s[:-RANK], torch.zeros(RANK)])
    assert_close(torch.linalg.svdvals(adapted.base.weight), kept, rtol=0, atol=1e-12)
    assert_close(torch.linalg.svdvals(layer.weight - adapted.base.weight)[:RANK], s[-RANK:])


@pytest.mark.parametrize("name", ["lora", "rslora", "pissa", "milora"])
def test_gradients_are_those_of_the_merged_layer_by_finite_differences(name):
    adapted, x = moved(put(PRESETS[name]())), rand(4, N, seed=7)
    op = adapted.slot("default").op

    def loss(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tensors = {"adapters.default.op.u": u, "adapters.default.op.v": v}
        return torch.func.functional_call(adapted, tensors, (x,)).square().sum()

    assert torch.autograd.gradcheck(loss, (op.u, op.v))


def test_dora_freezes_the_norm_so_its_gradient_ignores_the_pull_on_length():
    adapted = moved(put(PRESETS["dora"]()))
    found, g = gradients(adapted)
    slot = adapted.slot("default")
    total = (adapted.base.weight + slot.join.scale * slot.op.dense()).detach()
    norm = total.norm(dim=1, keepdim=True)
    gain = slot.join.mu.detach()[:, None] / norm
    along = (g * total).sum(1, keepdim=True) * total / norm**2
    true = slot.join.scale * (gain * (g - along)) @ slot.op.v.detach().T
    pull = slot.join.scale * (gain * along) @ slot.op.v.detach().T
    assert_close(found["u"] - true, pull)
    assert pull.norm() > 0.1 * true.norm()


def test_zero_lowrank_is_zero_uniform_and_its_own_at_every_site():
    w = torch.empty(300, 400, dtype=torch.float64)
    op = ZeroLowRank(50)("site", w)
    assert torch.equal(op.dense(), torch.zeros_like(w)) and op.rank == 50
    most = 1 / 400**0.5
    assert op.v.abs().max() <= most
    assert_close(op.v.var().item(), most**2 / 3, rtol=0.02, atol=0)
    assert_close(op.v.mean().item(), 0.0, rtol=0, atol=0.02 * most)
    assert torch.equal(ZeroLowRank(50)("site", w).v, op.v)
    assert torch.equal(ZeroLowRank(50)("site", w.float()).v, op.v.float())
    assert not torch.equal(ZeroLowRank(50)("other", w).v, op.v)
    assert not torch.equal(ZeroLowRank(50, seed=1)("site", w).v, op.v)


def test_drawing_an_adapter_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    for op in (ZeroLowRank(2), FromWeight(2), FromWeight(2, solver="random")):
        merge(adapt(Adapter(op, Rescale(), SubtractInit()))("site", base()))
    layer_made = torch.get_rng_state()
    torch.set_rng_state(before)
    for _ in range(3):
        base()
    assert torch.equal(torch.get_rng_state(), layer_made)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(
    ("part", "solver"),
    [("top", "exact"), ("top", "gram"), ("top", "random"), ("bottom", "exact"), ("bottom", "gram")],
)
def test_from_weight_holds_singular_triples_with_shared_square_root(part, solver, scale):
    w = rand(12, 9)
    s = svd(w).s[:3] if part == "top" else svd(w).s[-3:]
    op = FromWeight(3, part, scale, solver)("site", w)
    u, _, vh = svd(w)
    keep = slice(3) if part == "top" else slice(6, 9)
    assert_close(scale * op.dense(), u[:, keep] * s @ vh[keep], rtol=0, atol=1e-9)
    assert_close(op.u.T @ op.u, torch.diag(s / scale), rtol=0, atol=1e-9)
    assert_close(op.v @ op.v.T, torch.diag(s / scale), rtol=0, atol=1e-9)


def test_top_and_bottom_of_full_rank_are_the_weight():
    w = rand(7, 4)
    for part in ("top", "bottom"):
        assert_close(FromWeight(4, part)("site", w).dense(), w)
    assert_close(FromWeight(1)("s", w).dense() + FromWeight(3, "bottom")("s", w).dense(), w)


def test_the_random_solver_repeats():
    w = rand(40, 30)
    one, two = (FromWeight(3, solver="random")("site", w) for _ in range(2))
    assert torch.equal(one.u, two.u)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FromWeight(2, "middle"), "part 'middle'"),
        (lambda: FromWeight(2, solver="fast"), "solver 'fast'"),
        (lambda: FromWeight(2, "bottom", solver="random"), "only the top part"),
        (lambda: FromWeight(2, scale=0.0), "scale 0.0 must be positive"),
        (lambda: FromWeight(9)("layers.0", rand(6, 5)), r"layers\.0: rank 9 is outside 1\.\.min\(6, 5\)"),
        (lambda: ZeroLowRank(0)("layers.0", rand(6, 5)), r"layers\.0: rank 0 is outside"),
        (lambda: FromWeight(2)("layers.0", rand(6, 5) / 0), r"layers\.0 of shape \(6, 5\) holds"),
    ],
    ids=["part", "solver", "bottom-random", "scale", "rank-9", "rank-0", "nan"],
)
def test_impossible_starts_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
