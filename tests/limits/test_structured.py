"""What each structured op, start and join adds to the theorems that all share."""

import hashlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from subspan.adapt import (
    Adapted,
    Adapter,
    Add,
    ColumnsOf,
    Nothing,
    RandomBases,
    RandomBasis,
    Rescale,
    Rotate,
    SparseEntries,
    SubtractInit,
    TopCore,
    UpdateCore,
    ZeroHadamard,
    ZeroKron,
    ZeroLowRank,
    adapt,
    merge,
    trainable,
)
from subspan.adapt.multiply import divisors
from subspan.adapt.starts import check_pick, near_factor, picked, sample
from subspan.linalg import svd
from subspan.methods.adapters import loha, lokr, lora_xs, oft, paca, randlora, shira, vera
from subspan.ops import (
    BlockCayley,
    Columns,
    Dense,
    Entries,
    Hadamard,
    Kron,
    LinOp,
    LowRank,
    Seeded,
    Stacked,
    Zero,
)
from subspan.ops.structured import rows_kron

M, N = 12, 9


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(m: int = M, n: int = N, dtype: torch.dtype = torch.float64) -> nn.Linear:
    made = nn.Linear(n, m, dtype=dtype)
    for p in made.parameters():
        p.data.copy_(rand(*p.shape))
    return made


def put(adapter: Adapter, base: nn.Linear | None = None, site: str = "site") -> Adapted:
    adapted = adapt(adapter)(site, layer() if base is None else base)
    assert isinstance(adapted, Adapted)
    return adapted


def moved(adapted: Adapted, seed: int = 3) -> Adapted:
    with torch.no_grad():
        for _, p in trainable(adapted):
            p.add_(0.3 * rand(*p.shape, seed=seed).to(p.dtype))
    return adapted


def change(adapted: Adapted) -> torch.Tensor:
    """What the adapter adds to the weight, scaled."""
    return (adapted.weight - adapted.base.weight).detach()


def gradients(adapted: Adapted) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients of a probed sum: of each trained tensor, and of the effective weight."""
    x, probe = rand(5, adapted.in_features, seed=7), rand(5, adapted.out_features, seed=8)
    found = torch.autograd.grad((adapted(x) * probe).sum(), [p for _, p in trainable(adapted)])
    return list(found), probe.T @ x


def rank(a: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(a, rtol=1e-10))


def kept(run: Callable[[], torch.Tensor]) -> list[tuple[int, ...]]:
    """Shapes of what autograd saves that is neither a parameter nor a view of one."""
    shapes: list[tuple[int, ...]] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        root = t if t._base is None else t._base
        if not isinstance(root, nn.Parameter):
            shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return shapes


# ---- lora_xs


def test_lora_xs_trains_a_core_between_frozen_top_singular_vectors():
    adapted = put(lora_xs(rank=3, alpha=6.0))
    left, core, right = adapted.slot("default").op.ops
    u, s, vh = svd(layer().weight.detach())
    assert_close(left.w, u[:, :3] * s[:3])
    assert_close(right.w, vh[:3])
    assert [p is core.w for _, p in trainable(adapted)] == [True]
    (found,), g = gradients(adapted)
    assert_close(found, 2 * left.w.T @ g @ right.w.T)


def test_lora_xs_with_the_core_at_one_doubles_the_top_part():
    adapted = put(lora_xs(rank=3, alpha=3.0))
    adapted.slot("default").op.ops[1].w.data.copy_(torch.eye(3))
    u, s, vh = svd(layer().weight.detach())
    assert_close(change(adapted), u[:, :3] * s[:3] @ vh[:3])


def test_lora_xs_of_full_rank_reaches_every_change():
    adapted, wanted = put(lora_xs(rank=N, alpha=float(N)), layer(N, N)), rand(N, N, seed=4)
    left, core, right = adapted.slot("default").op.ops
    core.w.data.copy_(torch.linalg.solve(left.w, wanted @ right.w.T))
    assert_close(change(adapted), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["gram", "random"])
def test_top_core_of_a_faster_solver_spans_the_same(solver):
    w = rand(40, 30) @ torch.diag(0.7 ** torch.arange(30).double())
    exact, fast = (TopCore(4, s)("site", w).ops for s in ("exact", solver))
    for one, two in ((exact[0].w, fast[0].w), (exact[2].w, fast[2].w)):
        assert_close(one, two, rtol=0, atol=1e-8)


# ---- lora_sb


def best(a: torch.Tensor, r: int) -> torch.Tensor:
    u, s, vh = svd(a)
    return u[:, :r] * s[:r] @ vh[:r]


@pytest.mark.parametrize("solver", ["exact", "gram", "random"])
def test_the_update_core_starts_with_the_best_form_of_the_first_step(solver):
    g, x = rand(M, N, seed=20), rand(4, N)
    start = UpdateCore(4, {"site": g}, rate=0.01, scale=2.0, solver=solver)
    adapted = put(Adapter(start, Add(2.0)))
    left, _, right = adapted.slot("default").op.ops
    for factor in (left.w.T, right.w):
        assert_close(factor @ factor.T, torch.eye(4).double(), rtol=0, atol=1e-9)
    assert_close(change(adapted), best(-0.01 * g.sign(), 4), rtol=0, atol=1e-4 if solver == "random" else 1e-9)
    (found,), g = gradients(adapted)
    assert_close(found, 2 * left.w.T @ g @ right.w.T)
    assert_close(left.w @ found @ right.w, 2 * left.w @ left.w.T @ g @ right.w.T @ right.w)
    shift = (adapted(x) - adapted.base(x)).abs().max()
    assert 0 < shift <= 0.01 * N**0.5 * M**0.5 * x.norm(dim=1).max()


def test_the_update_core_with_its_start_subtracted_changes_nothing():
    start = UpdateCore(4, {"site": rand(M, N, seed=20)}, rate=0.01)
    x, adapted = rand(4, N), put(Adapter(start, Add(), SubtractInit()))
    assert_close(adapted(x), layer()(x))
    assert "tensor" not in repr(start)


def test_orthonormal_sides_need_no_correction_of_the_core_gradient():
    g = rand(M, N, seed=20)
    left, _, right = UpdateCore(3, {"site": rand(M, N, seed=21)}, rate=1.0)("site", rand(M, N)).ops
    columns = torch.stack([(left.w[:, i, None] * right.w[None, j]).flatten() for i in range(3) for j in range(3)])
    nearest = torch.linalg.lstsq(columns.T, g.flatten()).solution.view(3, 3)
    assert_close(nearest, left.w.T @ g @ right.w.T)


# ---- seeded bases


def test_a_seed_brings_back_the_bits_in_another_process():
    code = (
        "import hashlib, torch; from subspan.ops import Seeded\n"
        "torch.manual_seed(5); torch.set_default_dtype(torch.float64)\n"
        "for law in ('uniform', 'ternary'):\n"
        "    print(hashlib.sha256(Seeded(7, 300, 16, law, 0.5).float().dense().numpy().tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    ours = [Seeded(7, 300, 16, law, 0.5).dense().numpy().tobytes() for law in ("uniform", "ternary")]
    assert done.stdout.split() == [hashlib.sha256(b).hexdigest() for b in ours]


@pytest.mark.parametrize("law", ["uniform", "ternary"])
def test_a_lower_seeded_matrix_is_the_head_of_a_taller_one(law):
    low = Seeded(100, 3, 7, law).dense().clone()
    tall = Seeded(100, 4001, 7, law).dense()
    assert torch.equal(tall[:3], low)
    assert torch.equal(Seeded(100, 3, 7, law).dense(), low)
    assert not torch.equal(Seeded(101, 3, 7, law).dense(), low)


@pytest.mark.parametrize("law", ["uniform", "ternary"])
def test_seeded_entries_have_mean_zero_and_the_deviation_asked_for(law):
    w = Seeded(0, 500, 400, law, 0.3).double().dense()
    assert abs(w.mean().item()) < 3 * 0.3 / 200_000**0.5
    assert_close(w.square().mean().item(), 0.09, rtol=0.01, atol=0)
    assert_close(w.abs().max().item(), 0.3 * 3**0.5, rtol=1e-4, atol=0)
    gram = w.T @ w / (500 * 0.09) - torch.eye(400)
    assert gram.abs().max() < 0.3
    if law == "ternary":
        assert w.abs().unique().numel() == 2
        assert_close((w == 0).double().mean().item(), 2 / 3, rtol=0.01, atol=0)


def test_equal_seeded_matrices_share_one_storage_and_copies_hold_none():
    x = torch.ones(11)
    one, two, low = Seeded(200, 20, 11), Seeded(200, 20, 11, scale=3.0), Seeded(200, 4, 11)
    assert one.unit(x).data_ptr() == two.unit(x).data_ptr() == low.unit(x).data_ptr()
    assert one.unit(x.double()).data_ptr() != one.unit(x).data_ptr()
    assert list(one.state_dict()) == list(one.parameters()) == []
    assert sum(b.numel() for b in one.buffers()) == 0


def test_seeded_draws_leave_the_global_generator_alone_and_do_not_heed_it():
    before = torch.get_rng_state()
    one = Seeded(300, 4, 4).dense().clone()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(Seeded(300, 5, 4).dense()[:4], one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_seeded_numbers_are_those_of_float32_rounded(dtype):
    assert torch.equal(Seeded(400, 6, 5).to(dtype).dense(), Seeded(400, 6, 5).dense().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_basis_first_drawn_in_inference_mode_still_trains(dtype):
    op = Seeded(500 + dtype.itemsize, 4, 3)
    x = torch.ones(3, dtype=dtype)
    with torch.inference_mode():
        op(x)
    x.requires_grad_()
    (op(x) * op(x)).sum().backward()
    assert_close(x.grad, 2 * op(x).detach() @ op.to(dtype).dense())


@pytest.mark.full
def test_seeded_compiles_into_one_graph_once_drawn():
    op, x = Seeded(600, 4, 3), torch.ones(2, 3)
    expected = op(x)
    assert torch.equal(torch.compile(op, backend="eager", fullgraph=True)(x), expected)


def nbytes(adapted: Adapted, path) -> int:
    own = {k: v for k, v in adapted.state_dict().items() if k.startswith("adapters.")}
    save_file(own, path)
    return path.stat().st_size


@pytest.mark.parametrize(
    ("make", "numbers"),
    [(lambda: vera(rank=500), 80 + 500), (lambda: randlora(rank=4), 15 * (4 + 60))],
    ids=["vera", "randlora"],
)
def test_files_hold_the_trained_numbers_and_no_basis(make, numbers, tmp_path):
    adapted = put(make(), layer(80, 60, torch.float32))
    assert sum(p.numel() for _, p in trainable(adapted)) == numbers
    assert 4 * numbers < nbytes(adapted, tmp_path / "a") < 4 * numbers + 400


# ---- vera


def test_vera_is_two_scales_around_shared_random_factors_with_gradients_in_closed_form():
    adapted = put(vera(rank=20, start=0.3, seed=2))
    b, left, d, right = adapted.slot("default").op.ops
    assert torch.equal(b.d, torch.zeros(M).double()) and torch.equal(
        d.d, torch.full((20,), 0.3, dtype=torch.float64)
    )
    moved(adapted)
    big, a = left.dense(), right.dense()
    assert_close(change(adapted), torch.diag(b.d) @ big @ torch.diag(d.d) @ a)
    (db, dd), g = gradients(adapted)
    assert_close(db, (g * (big @ torch.diag(d.d) @ a)).sum(1))
    assert_close(dd, ((big.T @ torch.diag(b.d) @ g) * a).sum(1))


def test_vera_layers_of_all_sizes_draw_from_two_streams_and_another_seed_from_others():
    small, tall = RandomBasis(6)("a", rand(5, 4)), RandomBasis(6)("b", rand(50, 4))
    assert torch.equal(small.ops[1].dense(), tall.ops[1].dense()[:5])
    assert torch.equal(small.ops[3].dense(), tall.ops[3].dense())
    wide = RandomBasis(6)("c", rand(5, 16))
    assert_close(2 * wide.ops[3].dense()[:, :4], small.ops[3].dense())
    other = RandomBasis(6, seed=1)("a", rand(5, 4))
    streams = [op.ops[i].dense().flatten()[:16] for op in (small, other) for i in (1, 3)]
    assert torch.linalg.matrix_rank(torch.stack(streams)) == 4


def test_random_factors_have_the_deviations_of_kaimings_rule():
    op = RandomBasis(300)("a", rand(200, 150))
    assert_close(op.ops[1].dense().std().item(), (2 / 300) ** 0.5, rtol=0.02, atol=0)
    assert_close(op.ops[3].dense().std().item(), (2 / 150) ** 0.5, rtol=0.02, atol=0)


# ---- randlora


@pytest.mark.parametrize("shape", [(M, N), (N, M), (10, 10)])
@pytest.mark.parametrize("law", ["uniform", "ternary"])
def test_randlora_is_the_sum_of_scaled_random_products_and_of_full_rank(shape, law):
    m, n = shape
    adapted = moved(put(randlora(rank=4, alpha=4.0, law=law), layer(m, n)))
    op = adapted.slot("default").op
    big, stacked = (op if m >= n else op.op).ops
    bases = big.dense().unflatten(1, (-1, 4))
    assert bases.shape[1] == -(-min(m, n) // 4) == len(stacked.rows)
    terms = [
        bases[:, i] @ torch.diag(stacked.rows[i]) @ stacked.op.dense() @ torch.diag(stacked.columns[i])
        for i in range(len(stacked.rows))
    ]
    total = torch.stack(terms).sum(0).detach()
    assert_close(change(adapted), total if m >= n else total.T)
    if law == "uniform":
        assert rank(total) == min(m, n)


def test_randlora_starts_with_rows_zero_and_columns_one_over_the_larger_count():
    for r, most in ((4, 60), (1, 60)):  # at rank 1 both counts are 60
        stacked = RandomBases(r)("site", rand(80, 60)).ops[1]
        assert torch.equal(stacked.rows, torch.zeros(60 // r, r).double())
        assert torch.equal(stacked.columns, torch.full((60 // r, 60), 1 / most, dtype=torch.float64))


def test_a_stack_keeps_its_one_matrix_and_its_scales():
    op = Stacked(Dense(rand(3, 40)), nn.Parameter(rand(13, 3)), nn.Parameter(rand(13, 40)))
    x = rand(7, 40).requires_grad_()
    for run in (lambda: op(x), lambda: op.back(rand(7, 39).requires_grad_())):
        assert max(shape[0] for shape in kept(run) if shape) <= 7


# ---- loha


def test_loha_has_at_most_and_generically_the_square_of_the_rank():
    adapted = moved(put(loha(rank=2, alpha=2.0)))
    assert rank(change(adapted)) == 4
    one = moved(put(loha(rank=1, alpha=1.0)))
    assert rank(change(one)) == 1


def test_loha_with_one_factor_of_ones_is_lora():
    adapted = moved(put(loha(rank=2, alpha=6.0)))
    op = adapted.slot("default").op
    op.one.u.data.fill_(1.0)
    op.one.v.data.fill_(0.5)
    assert_close(change(adapted), 3 * op.two.u @ op.two.v)


def test_loha_gradients_and_gauges():
    adapted, x = moved(put(loha(rank=2, alpha=6.0))), rand(4, N, seed=7)
    op = adapted.slot("default").op
    found, g = gradients(adapted)
    for side, other, (du, dv) in ((op.one, op.two, found[:2]), (op.two, op.one, found[2:])):
        assert_close(du, 3 * (g * other.dense()) @ side.v.T)
        assert_close(dv, 3 * side.u.T @ (g * other.dense()))
    before = adapted(x).detach()
    mix = rand(2, 2, seed=5) + 3 * torch.eye(2)
    with torch.no_grad():
        op.one.u.copy_(-2 * op.one.u @ mix)
        op.one.v.copy_(torch.linalg.solve(mix, op.one.v))
        op.two.u.div_(-2)
    assert_close(adapted(x), before)


def test_loha_starts_as_lycoris_does():
    op = ZeroHadamard(50)("site", rand(300, 400))
    for factor, deviation in ((op.one.u, 0.1), (op.one.v, 1.0), (op.two.v, 1.0)):
        assert_close(factor.std().item(), deviation, rtol=0.02, atol=0)
    assert torch.equal(op.two.u, torch.zeros(300, 50).double())


@pytest.mark.parametrize(("r", "most"), [(2, 30 * 8), (6, 30 * 6)], ids=["thin", "formed"])
def test_a_hadamard_product_keeps_no_matrix(r, most):
    w, x = rand(30, 30), rand(5, 30).requires_grad_()
    op = moved(put(Adapter(ZeroHadamard(r), Add()), layer(30, 30))).slot("default").op
    probe = rand(5, 30, seed=1)
    assert max(torch.Size(shape).numel() for shape in kept(lambda: op(x))) <= most < w.numel()
    found = torch.autograd.grad((op(x) * probe).sum(), [x, *op.parameters()])
    formed = torch.autograd.grad((x @ op.dense().T * probe).sum(), [x, *op.parameters()])
    for one, two in zip(found, formed, strict=True):
        assert_close(one, two)


def test_rows_kron_makes_the_hadamard_product_an_ordinary_product():
    a, b, c, d = rand(5, 2), rand(5, 3), rand(2, 4), rand(3, 4)
    assert_close(rows_kron(a, b) @ rows_kron(c.T, d.T).T, (a @ c) * (b @ d))


# ---- lokr


@pytest.mark.parametrize("shapes", [(2, 3, 4, 5), (1, 3, 4, 1), (4, 1, 1, 5), (3, 3, 2, 2)])
def test_kron_is_torchs(shapes):
    p, q, s, t = shapes
    a, b = rand(p, q), rand(s, t, seed=1)
    op, x = Kron(Dense(a), Dense(b)), rand(6, q * t)
    assert_close(op(x), x @ torch.kron(a, b).T)
    assert_close(op.back(rand(6, p * s)), rand(6, p * s) @ torch.kron(a, b))
    assert rank(op.dense()) == rank(a) * rank(b)


def test_sizes_are_split_by_the_divisor_nearest_below():
    sizes, factors = [127, 128, 250, 360, 512, 1024], [-1, 2, 4, 8, 16]
    assert [[near_factor(size, f) for f in factors] for size in sizes] == [
        [1, 1, 1, 1, 1],
        [8, 2, 4, 8, 8],
        [10, 2, 2, 5, 10],
        [18, 2, 4, 8, 15],
        [16, 2, 4, 8, 16],
        [32, 2, 4, 8, 16],
    ]
    assert all(size % near_factor(size, f) == 0 for size in range(1, 200) for f in (-1, 1, 3, 7))


@pytest.mark.parametrize(
    ("make", "kinds", "numbers"),
    [
        (ZeroKron(2), (Dense, LowRank), 6 * 5 + 2 * (8 + 6)),
        (ZeroKron(4), (Dense, Dense), 6 * 5 + 8 * 6),
        (ZeroKron(2, both=True), (LowRank, LowRank), 2 * (6 + 5) + 2 * (8 + 6)),
        (ZeroKron(2, factor=2), (Dense, LowRank), 2 * 2 + 2 * (24 + 15)),
    ],
)
def test_lokr_factors_its_parts_where_the_rank_is_below_half(make, kinds, numbers):
    op = make("site", rand(48, 30))
    assert (type(op.a), type(op.b)) == kinds
    assert op.shape == (48, 30) and sum(p.numel() for p in op.parameters()) == numbers
    assert torch.equal(op.dense(), torch.zeros(48, 30).double())
    assert (op.b.u if kinds[1] is LowRank else op.b.w).abs().sum() == 0
    rest = [p for p in op.parameters() if p.norm() > 0]
    assert len(rest) == len(list(op.parameters())) - 1
    assert all(p.abs().max() <= p.shape[1] ** -0.5 for p in rest)


def test_lokr_gradients_are_contractions_of_the_weights():
    adapted = moved(put(lokr(rank=3, alpha=6.0, factor=3)))
    op = adapted.slot("default").op
    (da, db), g = gradients(adapted)
    blocks = g.reshape(3, 4, 3, 3)
    assert_close(da, 2 * torch.einsum("isjt,st->ij", blocks, op.b.w))
    assert_close(db, 2 * torch.einsum("isjt,ij->st", blocks, op.a.w))


# ---- oft


@pytest.mark.parametrize("block", [3, 9])
def test_oft_turns_the_inputs_and_keeps_singular_values_and_angles(block):
    adapted = moved(put(oft(block=block)))
    w, joined, turn = adapted.base.weight.detach(), adapted.weight.detach(), adapted.slot("default").join.turn
    r = turn.dense().detach()
    assert_close(r.T @ r, torch.eye(N).double(), rtol=0, atol=1e-12)
    assert_close(torch.linalg.det(r).item(), 1.0, rtol=0, atol=1e-12)
    assert (r - torch.eye(N)).norm() > 0.3
    assert_close(joined, w @ r.T)
    assert_close(torch.linalg.svdvals(joined), torch.linalg.svdvals(w), rtol=0, atol=1e-12)
    assert_close(joined @ joined.T, w @ w.T, rtol=0, atol=1e-12)


def test_oft_of_one_block_reaches_every_rotation_by_less_than_a_half_turn():
    wanted = torch.linalg.matrix_exp(rand(5, 5) - rand(5, 5).T)
    one = torch.eye(5).double()
    skew = torch.linalg.solve(one + wanted, one - wanted)
    i, j = torch.triu_indices(5, 5, 1)
    assert_close(BlockCayley(skew[i, j][None]).dense(), wanted, rtol=0, atol=1e-10)


def test_the_cayley_blocks_are_the_formula():
    q = rand(3, 6)
    i, j = torch.triu_indices(4, 4, 1)
    for block, numbers in zip(BlockCayley(q).blocks(), q, strict=True):
        skew = torch.zeros(4, 4).double()
        skew[i, j] = numbers
        skew = skew - skew.T
        assert_close(block, (torch.eye(4) - skew) @ torch.linalg.inv(torch.eye(4) + skew))


def test_half_precision_rotations_are_solved_in_float32():
    q = rand(2, 6).bfloat16()
    assert_close(BlockCayley(q).blocks(), BlockCayley(q.float()).blocks(), rtol=0, atol=0)
    assert BlockCayley(q).dense().dtype == torch.bfloat16


JOINS = {"add": Add(-0.7), "rescale": Rescale(2.5), "rotate": Rotate(3)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("op", [Zero(M, N), LowRank(rand(M, 2), rand(2, N))], ids=["zero", "lowrank"])
def test_a_rotation_of_a_sum_is_forward_and_weight_alike(op, bias):
    base, x = nn.Linear(N, M, bias=bias, dtype=torch.float64), rand(2, 3, N)
    join = Rotate(3).at(base.weight, op)
    assert torch.equal(join.weight(base.weight, op), base.weight + op.dense())
    assert_close(join.weight(join.remainder(base.weight, op), op), base.weight)
    join.turn.q.data.copy_(rand(3, 3))
    assert_close(join.weight(base.weight, op), (base.weight + op.dense()) @ join.turn.dense().T)
    assert_close(join.forward(base, op, x), F.linear(x, join.weight(base.weight, op), base.bias))
    assert join.at(base.weight, op) is join


@pytest.mark.parametrize("names", [("rotate", other) for other in JOINS] + [(other, "rotate") for other in JOINS])
def test_a_rotation_folds_with_every_join(names):
    adapted, x = Adapted(layer()), rand(4, N, seed=7)
    for i, name in enumerate(names):
        adapted.add(f"a{i}", LowRank(rand(M, 2, seed=i), rand(2, N, seed=i + 5)), JOINS[name])
        moved(adapted, i) if any(p.requires_grad for p in adapted.parameters()) else None
    assert_close(adapted(x), F.linear(x, adapted.weight, adapted.bias), rtol=0, atol=1e-12)
    assert_close(merge(adapted)(x), adapted(x), rtol=0, atol=1e-12)


def test_a_rotation_binds_once_and_refuses_to_work_unbound_or_where_blocks_do_not_fit():
    with pytest.raises(ValueError, match=r"Rotate\(block=4\) has no rotation yet; bind it"):
        Rotate(4).weight(rand(M, N), Zero(M, N))
    with pytest.raises(ValueError, match=r"layers\.3: no block in 2\.\.4 divides 7 inputs; allow one of \[7\]"):
        put(oft(block=4), layer(M, 7), site="layers.3")
    with pytest.raises(ValueError, match="block 1 must be at least 2"):
        oft(block=1)


@pytest.mark.parametrize(
    ("n", "block", "size"), [(48, 32, 24), (48, 48, 48), (9, 32, 9), (10, 3, 2), (576, 32, 32)]
)
def test_blocks_are_the_largest_that_fill_the_inputs(n, block, size):
    join = Rotate(block).at(rand(2, n), Zero(2, n))
    assert (join.block, join.turn.size, tuple(join.turn.q.shape)) == (
        size,
        size,
        (n // size, size * (size - 1) // 2),
    )
    assert size == max(d for d in divisors(n) if d <= block)


# ---- shira and paca


@pytest.mark.parametrize("pick", ["random", "large", "small"])
def test_shira_changes_its_entries_and_no_other_bit(pick):
    adapted = moved(put(shira(rank=2, pick=pick)))
    op, w = adapted.slot("default").op, adapted.base.weight.detach()
    touched = torch.zeros(M * N, dtype=torch.bool).index_fill(0, op.index.long(), True).view(M, N)
    assert touched.sum() == len(op.index) == 2 * (M + N)
    assert torch.equal(adapted.weight[~touched], w[~touched])
    assert ((adapted.weight != w) == touched).all()
    if pick != "random":
        low, high = (w.abs()[touched], w.abs()[~touched])[:: 1 if pick == "small" else -1]
        assert low.max() <= high.min()


def test_shira_trains_the_gradients_of_its_entries_and_all_entries_are_full_training():
    adapted = moved(put(shira(rank=2)))
    (found,), g = gradients(adapted)
    assert_close(found, g.flatten()[adapted.slot("default").op.index])
    for make in (
        lambda w: Entries(torch.arange(w.numel()), nn.Parameter(torch.zeros_like(w).flatten()), *w.shape),
        lambda w: ColumnsOf(w.shape[1])("site", w),
    ):
        full = put(Adapter(lambda _, w, make=make: make(w), Add()))
        (found,), g = gradients(full)
        order = full.slot("default").op.index.argsort() if found.ndim > 1 else slice(None)
        assert_close(found[..., order].reshape(M, N), g)


def test_a_random_sparse_change_has_high_rank():
    adapted = moved(put(shira(rank=4), layer(40, 40)))
    assert rank(change(adapted)) > 36


def test_sparse_entries_keep_no_matrix_whichever_way_they_are_applied():
    op = moved(put(shira(rank=2), layer(30, 30))).slot("default").op
    for tokens in (2, 60):
        x = rand(tokens, 30).requires_grad_()
        most = max(torch.Size(shape).numel() for shape in kept(lambda x=x: op(x)))
        assert most <= max(tokens * 30, tokens * len(op.values) if tokens == 2 else 0)
        assert_close(op(x), x @ op.dense().T)
        assert_close(op.back(x), x @ op.dense())


def test_paca_trains_the_gradients_of_its_columns_and_leaves_the_others():
    adapted = moved(put(paca(rank=2, alpha=6.0)))
    op, w = adapted.slot("default").op, adapted.base.weight.detach()
    others = [j for j in range(N) if j not in op.index]
    (found,), g = gradients(adapted)
    assert_close(found, 3 * g[:, op.index])
    assert_close(change(adapted)[:, op.index], 3 * op.values.detach())
    assert len(others) == N - 2 and torch.equal(adapted.weight[:, others], w[:, others])


def test_paca_keeps_its_own_inputs_only():
    adapted = put(paca(rank=2, alpha=2.0))
    x = rand(50, N)
    numbers = [shape for shape in kept(lambda: adapted(x)) if len(shape) > 1]
    assert numbers == [(50, 2)]


@pytest.mark.parametrize("pick", ["large", "small"])
def test_paca_picks_columns_by_length(pick):
    w = rand(M, N) * torch.tensor([3.0, 1, 4, 1.5, 9, 2, 6, 5, 3.5])
    order = w.norm(dim=0).argsort(descending=pick == "large")
    assert ColumnsOf(3, pick)("site", w).index.tolist() == sorted(order[:3].tolist())


@pytest.mark.parametrize(("size", "count"), [(20, 4), (20, 15), (20, 20)])
def test_samples_are_sets_in_which_every_number_is_as_likely(size, count):
    source, draws = torch.Generator().manual_seed(0), 3000
    sets = torch.stack([sample(size, count, source) for _ in range(draws)])
    assert all(len(row.unique()) == count for row in sets)
    share = torch.bincount(sets.flatten(), minlength=size) / draws
    assert_close(share, torch.full((size,), count / size), rtol=0, atol=0.04)


def test_positions_are_saved_in_four_bytes():
    assert shira(rank=2).op("site", rand(M, N)).index.dtype == torch.int32
    assert paca(rank=2).op("site", rand(M, N)).index.dtype == torch.int32
    assert picked(rand(9), 9, "random", torch.Generator()).tolist() == list(range(9))


# ---- all


MADE: dict[str, Adapter] = {
    "lora_xs": lora_xs(rank=3, alpha=3.0),
    "vera": vera(rank=5),
    "randlora": randlora(rank=4, alpha=4.0),
    "loha": loha(rank=2, alpha=2.0),
    "lokr": lokr(rank=1, alpha=1.0),
    "oft": oft(block=4),
    "shira": shira(rank=2),
    "paca": paca(rank=2),
}


@pytest.mark.parametrize("name", MADE)
def test_on_bfloat16_layers_the_trained_numbers_are_float32_and_merge_is_forward(name):
    base = layer(16, 12, torch.bfloat16)
    adapted, x = put(MADE[name], base), rand(4, 12).bfloat16()
    assert {p.dtype for _, p in trainable(adapted)} == {torch.float32}
    assert torch.equal(adapted(x), base(x))
    moved(adapted)
    assert adapted(x).dtype == torch.bfloat16 == merge(adapted).weight.dtype
    assert_close(merge(adapted)(x).double(), adapted(x).double(), rtol=0.03, atol=0.1)


@pytest.mark.full
@pytest.mark.parametrize("tokens", [2, 60])
@pytest.mark.parametrize("name", MADE)
def test_adapters_compile_into_one_graph(name, tokens):
    adapted, x = moved(put(MADE[name], layer(16, 12, torch.float32))), rand(tokens, 12).float()
    expected = adapted(x)
    named = [p for _, p in trainable(adapted)]
    wanted = torch.autograd.grad(expected.square().sum(), named)
    torch.compiler.reset()  # other tests must not use up the limit of recompilations
    compiled = torch.compile(adapted, backend="aot_eager", fullgraph=True)(x)
    assert_close(compiled, expected)
    for one, two in zip(torch.autograd.grad(compiled.square().sum(), named), wanted, strict=True):
        assert_close(one, two)


@pytest.mark.parametrize("name", MADE)
def test_adapters_stand_on_each_other(name):
    adapted = moved(put(MADE[name], layer(12, 12)))
    x = rand(4, 12)
    before = adapted(x)
    on_top = adapt(Adapter(ZeroLowRank(2), Rescale()), "top")("site", adapted)
    assert_close(on_top(x), before, rtol=0, atol=1e-12)
    moved(on_top)
    assert_close(on_top(x), F.linear(x, on_top.weight, on_top.bias), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda w: TopCore(10)("layers.0", w), r"layers\.0: rank 10 is outside 1\.\.min\(12, 9\)"),
        (lambda w: TopCore(2)("layers.0", w / 0), r"layers\.0 of shape \(12, 9\) holds"),
        (lambda w: TopCore(2, "fast")("layers.0", w), "solver 'fast'"),
        (lambda w: UpdateCore(2, {}, 0.1)("layers.0", w), r"layers\.0: needs a gradient of \(12, 9\), got none"),
        (
            lambda w: UpdateCore(2, {"a": w.T}, 0.1)("a", w),
            r"a: needs a gradient of \(12, 9\), got one of \(9, 12\)",
        ),
        (lambda w: UpdateCore(2, {"a": w / 0}, 0.1)("a", w), "gradient of a of shape .* holds"),
        (lambda w: UpdateCore(2, {}, 0.0), "rate 0.0 must be positive"),
        (lambda w: RandomBasis(0)("layers.0", w), r"layers\.0: rank 0 must be at least 1"),
        (lambda w: RandomBases(10)("layers.0", w), r"layers\.0: rank 10 is outside"),
        (lambda w: RandomBases(3, "gauss")("layers.0", w), "law 'gauss' is neither"),
        (lambda w: ZeroHadamard(10)("layers.0", w), r"layers\.0: rank 10 is outside"),
        (lambda w: ZeroKron(0)("layers.0", w), r"layers\.0: rank 0 must be at least 1"),
        (lambda w: ZeroKron(2, factor=0), "factor 0 must be at least 1, or -1"),
        (lambda w: SparseEntries(6)("layers.0", w), r"layers\.0: rank 6 asks for 126 of 108 .* rank in 1\.\.5"),
        (lambda w: SparseEntries(2, "best"), "pick 'best' is none of"),
        (lambda w: ColumnsOf(10)("layers.0", w), r"layers\.0: cannot train 10 of 9 columns; choose 1\.\.9"),
        (lambda w: ColumnsOf(2, "best"), "pick 'best' is none of"),
        (lambda w: check_pick(""), "pick '' is none of"),
    ],
)
def test_impossible_starts_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make(rand(M, N))


def test_nothing_is_a_zero_op_of_the_layers_shape_and_precision():
    op: LinOp = Nothing()("site", rand(3, 2).bfloat16())
    assert torch.equal(op.dense(), torch.zeros(3, 2)) and not list(op.parameters())
    assert isinstance(Hadamard(LowRank(rand(3, 1), rand(1, 2)), LowRank(rand(3, 1), rand(1, 2))), LinOp)
    assert Columns(torch.arange(2), rand(3, 2), 4).shape == (3, 4)
