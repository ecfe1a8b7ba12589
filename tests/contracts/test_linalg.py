"""The pure functions of subspan.linalg: exact identities, limits and refusals."""

import math

import pytest
import torch
from torch.testing import assert_close

from subspan import linalg
from subspan.linalg import (
    check_rank,
    energy_rank,
    entropy_rank,
    orth,
    orthogonal_iteration,
    pin_signs,
    polar,
    polar_exact,
    qr,
    require_finite,
    solve_right,
    stable_rank,
    svd,
    svd_gram,
    svd_random,
    tail_index,
    whiten,
    wide,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


def lowrank(m: int, n: int, rank: int, seed: int = 0) -> torch.Tensor:
    return rand(m, rank, seed=seed) @ rand(rank, n, seed=seed + 1)


MATRICES = {
    "tall": rand(9, 5),
    "wide": rand(5, 9),
    "square": rand(6, 6),
    "column": rand(7, 1),
    "row": rand(1, 7),
    "batch": rand(2, 3, 6, 4),
    "wide-batch": rand(3, 4, 6),
    "rank-2": lowrank(8, 6, 2),
    "wide-rank-2": lowrank(6, 8, 2),
    "zero": torch.zeros(5, 3, dtype=torch.float64),
    "wide-zero": torch.zeros(3, 5, dtype=torch.float64),
    "one-zero-of-a-batch": torch.stack([rand(4, 3), torch.zeros(4, 3, dtype=torch.float64)]),
    "repeated": torch.cat([eye(4), torch.zeros(2, 4, dtype=torch.float64)]),
    "graded": qr(rand(6, 6)) * 10.0 ** -torch.arange(6) @ qr(rand(6, 6, seed=1)),
}
WELL = ("tall", "wide", "square", "column", "row", "batch", "wide-batch")


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("solve", [svd, svd_gram])
def test_svd_is_a_decomposition_into_orthonormal_factors(solve, name):
    a = MATRICES[name]
    k = min(a.shape[-2:])
    u, s, vh = solve(a)
    assert_close(u * s.unsqueeze(-2) @ vh, a, rtol=0, atol=1e-7 if solve is svd_gram else 1e-12)
    assert_close(u.mT @ u, eye(k).expand(*a.shape[:-2], k, k), rtol=0, atol=1e-12)
    assert_close(vh @ vh.mT, eye(k).expand(*a.shape[:-2], k, k), rtol=0, atol=1e-12)
    assert bool((s >= 0).all()) and bool((s.diff(dim=-1) <= 0).all())


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("solve", [svd, svd_gram])
def test_the_largest_entry_of_every_left_vector_is_positive(solve, name):
    u = solve(MATRICES[name]).u
    assert bool((u.gather(-2, u.abs().argmax(-2, keepdim=True)) > 0).all())


@pytest.mark.parametrize("name", ["batch", "wide-batch", "one-zero-of-a-batch"])
@pytest.mark.parametrize("solve", [svd, svd_gram])
def test_svd_of_a_batch_is_the_batch_of_svds(solve, name):
    a = MATRICES[name]
    for index in torch.cartesian_prod(*(torch.arange(n) for n in a.shape[:-2])).reshape(-1, a.ndim - 2):
        at = tuple(index.tolist())
        for whole, part in zip(solve(a), solve(a[at]), strict=True):
            assert_close(whole[at], part, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", WELL)
def test_gram_route_equals_the_direct_one_with_signs(name):
    for gram, direct in zip(svd_gram(MATRICES[name]), svd(MATRICES[name]), strict=True):
        assert_close(gram, direct, rtol=0, atol=1e-9)


def test_gram_route_finds_singular_values_above_its_noise_floor():
    assert_close(svd_gram(MATRICES["graded"]).s, 10.0 ** -torch.arange(6.0).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", WELL)
def test_lapack_signs_do_not_matter(name, monkeypatch):
    a = MATRICES[name]
    expected = svd(a)
    true = torch.linalg.svd
    flips = torch.where(torch.arange(min(a.shape[-2:])) % 2 == 0, -1.0, 1.0).double()

    def flipped(x, full_matrices):
        u, s, vh = true(x, full_matrices=full_matrices)
        return u * flips, s, vh * flips.unsqueeze(-1)

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    for a_part, b_part in zip(svd(a), expected, strict=True):
        assert_close(a_part, b_part, rtol=0, atol=0)


def test_pin_signs_keeps_the_product_and_is_idempotent():
    u, vh = rand(6, 3), rand(3, 5)
    pinned = pin_signs(u, vh)
    assert_close(pinned[0] @ pinned[1], u @ vh)
    for once, twice in zip(pinned, pin_signs(*pinned), strict=True):
        assert torch.equal(once, twice)


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_survives_lapack_not_converging(failures, dtype, monkeypatch):
    a = rand(7, 5).to(dtype)
    expected = svd(a)
    true, seen = torch.linalg.svd, []

    def failing(x, full_matrices):
        seen.append(x.dtype)
        if len(seen) <= failures:
            raise torch.linalg.LinAlgError("did not converge")
        return true(x, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    result = svd(a)
    assert seen == [dtype, torch.float64]
    for part, wanted in zip(result, expected, strict=True):
        assert_close(part, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (3, 20, 12)])
@pytest.mark.parametrize("iters", [0, 2])
def test_random_svd_is_exact_for_a_lowrank_matrix(shape, iters):
    a = rand(*shape[:-1], 3) @ rand(*shape[:-2], 3, shape[-1], seed=1)
    found = svd_random(a, 3, iters=iters, generator=torch.Generator().manual_seed(0))
    for part, wanted in zip(found, (svd(a).u[..., :3], svd(a).s[..., :3], svd(a).vh[..., :3, :]), strict=True):
        assert_close(part, wanted, rtol=0, atol=1e-9)


def test_random_svd_of_full_width_is_the_svd():
    a = rand(9, 6)
    for part, wanted in zip(svd_random(a, 6, oversample=0), svd(a), strict=True):
        assert_close(part, wanted, rtol=0, atol=1e-10)


def test_random_svd_warm_started_in_the_answer_needs_no_iterations():
    a = rand(30, 20)
    wanted = svd(a)
    found = svd_random(a, 4, iters=0, oversample=0, start=wanted.vh[:4].mT)
    assert_close(found.s, wanted.s[:4])
    assert_close(found.u, wanted.u[:, :4], rtol=0, atol=1e-10)
    assert_close(found.vh, wanted.vh[:4], rtol=0, atol=1e-10)


def test_random_svd_converges_with_its_iterations():
    a = qr(rand(40, 40)) * 0.8 ** torch.arange(40) @ qr(rand(40, 40, seed=1))
    wanted = svd(a).s[:5]
    errors = [
        (svd_random(a, 5, iters=i, oversample=2, generator=torch.Generator().manual_seed(0)).s - wanted).norm()
        for i in (0, 2, 8)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_random_svd_repeats_with_its_generator():
    a = rand(30, 20)
    one, two = (svd_random(a, 3, iters=0, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one.u, two.u)


@pytest.mark.parametrize("rank", [0, 7])
def test_random_svd_refuses_an_impossible_rank(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is outside 1\.\.min\(8, 6\) = 6"):
        svd_random(rand(8, 6), rank)


@pytest.mark.parametrize("name", ["tall", "square", "column", "batch"])
def test_qr_is_orthonormal_and_unique(name):
    a = MATRICES[name]
    q = qr(a)
    k = a.shape[-1]
    assert_close(q.mT @ q, eye(k).expand(*a.shape[:-2], k, k), rtol=0, atol=1e-12)
    tri = q.mT @ a
    assert_close(tri, tri.triu(), rtol=0, atol=1e-12)
    assert bool((tri.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert_close(qr(a @ torch.diag(torch.arange(1.0, k + 1).double())), q)


@pytest.mark.parametrize("name", WELL)
def test_polar_exact_is_the_nearest_semi_orthogonal_matrix(name):
    a = MATRICES[name]
    nearest = polar_exact(a)
    u, s, vh = svd(a)
    assert_close(nearest, u @ vh)
    distance = (a - nearest).square().sum((-2, -1))
    assert_close(distance, (s - 1).square().sum(-1))
    for seed in range(20):
        other = rand(*a.shape, seed=seed)
        other = qr(other) if a.shape[-2] >= a.shape[-1] else qr(other.mT).mT
        assert bool((distance <= (a - other).square().sum((-2, -1))).all())


@pytest.mark.parametrize("shape", [(64, 24), (24, 64), (100, 10), (4, 24, 64), (48, 32)])
def test_polar_brings_singular_values_near_one(shape):
    s = torch.linalg.svdvals(polar(rand(*shape)))
    assert s.min() > 0.6 and s.max() < 1.3


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_polar_keeps_singular_vectors_and_commutes_with_transpose(shape):
    g = rand(*shape)
    u, _, vh = svd(g)
    inner = u.mT @ polar(g) @ vh.mT
    assert_close(inner, inner.diagonal().diag(), rtol=0, atol=1e-10)
    assert_close(polar(g.mT), polar(g).mT, rtol=0, atol=0)
    assert torch.equal(polar(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("scale", [1e3, 1e-6, 1e-12])
def test_polar_ignores_scale(scale):
    g = rand(24, 10)
    assert_close(polar(scale * g), polar(g), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("shape", [(20, 6), (3, 20, 6)])
def test_whiten_factors_the_ridged_matrix(shape, ridge):
    x = rand(*shape)
    h = x.mT @ x
    factor, used = whiten(h, ridge)
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    assert used == ridge
    assert_close(factor @ factor.mT, h + ridge * mean * eye(6))
    assert torch.equal(factor, factor.tril())


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_whiten_of_a_singular_matrix_reports_the_ridge_it_needed(tokens):
    x = rand(tokens, 6)
    h = x.mT @ x
    factor, used = whiten(h)
    assert 1e-9 <= used <= 1e-2
    assert_close(factor @ factor.mT, h + used * h.diagonal().mean() * eye(6), rtol=0, atol=1e-12)
    assert bool(torch.isfinite(solve_right(eye(6), factor)).all())


def test_whiten_of_dead_inputs():
    h = torch.diag(torch.tensor([4.0, 0.0, 1.0]).double())
    factor, used = whiten(h)
    assert used > 0
    assert_close(factor @ factor.mT, h + used * h.diagonal().mean() * eye(3))


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3)])
def test_whiten_of_nothing_is_the_identity(shape):
    assert_close(whiten(torch.zeros(shape)).factor, eye(3).expand(shape))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_whiten_does_not_depend_on_units(scale):
    x = rand(4, 6)
    h = x.mT @ x
    assert_close(whiten(scale * h).factor, scale**0.5 * whiten(h).factor, rtol=1e-6, atol=0)
    assert whiten(scale * h).ridge == whiten(h).ridge


def test_whiten_refuses_an_indefinite_matrix():
    with pytest.raises(ValueError, match="not positive semi-definite"):
        whiten(torch.diag(torch.tensor([1.0, -1.0])))


def test_whitened_truncation_has_the_least_error_on_the_data():
    x, w = rand(50, 6) @ torch.diag(torch.arange(1.0, 7).double()), rand(5, 6)
    factor = whiten(x.mT @ x).factor
    u, s, vh = svd(w @ factor)
    kept = u[:, :2] * s[:2] @ solve_right(vh[:2], factor)
    least = torch.linalg.svdvals(x @ w.mT)[2:].norm()
    assert_close((x @ (w - kept).mT).norm(), least)


@pytest.mark.parametrize("kind", ["diagonal", "triangular", "square"])
def test_solve_right_multiplies_by_the_inverse(kind):
    v = rand(4, 5)
    full = rand(5, 5) + 3 * eye(5)
    factor = {"diagonal": full.diagonal(), "triangular": full.tril(), "square": full}[kind]
    dense = factor.diag() if kind == "diagonal" else factor
    assert_close(solve_right(v, factor), v @ torch.linalg.inv(dense))
    assert_close(solve_right(v @ dense, factor), v)


@pytest.mark.parametrize("factor", [rand(3, 5, 5), rand(3, 5, 5).tril() + 3 * eye(5)])
def test_solve_right_of_a_batch(factor):
    v = rand(3, 4, 5)
    assert_close(solve_right(v, factor), v @ torch.linalg.inv(factor))


@pytest.mark.parametrize("factor", [eye(3).tril().float(), torch.ones(3, 3) + torch.eye(3), torch.ones(3)])
def test_solve_right_of_half_precision_is_float32(factor):
    v = rand(2, 3).bfloat16()
    assert_close(solve_right(v, factor), solve_right(v.float(), factor))


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_equal_singular_values_count_themselves(k, scale):
    s = scale * torch.cat([torch.ones(k), torch.zeros(4)]).double()
    assert_close(stable_rank(s).item(), float(k))
    assert_close(entropy_rank(s).item(), float(k))
    assert energy_rank(s, 1.0).item() == k


def test_effective_ranks_in_closed_form():
    s = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 1.0]])
    assert_close(stable_rank(s), torch.tensor([10 / 9, 9 / 4]).double())
    entropies = [-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), -(0.8 * math.log(0.4) + 0.2 * math.log(0.2))]
    assert_close(entropy_rank(s), torch.tensor(entropies).double().exp())
    assert energy_rank(s, 0.9).tolist() == [1, 3]
    assert energy_rank(s, 0.91).tolist() == [2, 3]
    assert energy_rank(s, 4 / 9).tolist() == [1, 1]


def test_effective_ranks_of_nothing():
    zero = torch.zeros(4)
    assert (stable_rank(zero).item(), entropy_rank(zero).item(), energy_rank(zero, 0.9).item()) == (0.0, 0.0, 1)


def test_tail_index_in_closed_form():
    s = torch.tensor([0.0, -1.0, 2.0, 1.0]).double().exp()
    assert_close(tail_index(s).item(), 1 / 1.5)
    assert_close(tail_index(7 * s).item(), 1 / 1.5)
    assert tail_index(torch.ones(6)).item() == math.inf
    assert tail_index(torch.ones(1)).item() == math.inf


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_tail_index_recovers_the_exponent_of_a_power_law(alpha):
    s = torch.arange(1, 20001).double() ** (-1 / alpha)
    assert_close(tail_index(s, 0.2).item(), alpha, rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    "compute", [lambda a: svd(a).u, lambda a: svd_gram(a).s, lambda a: svd_random(a, 2).vh, qr, polar, polar_exact]
)
def test_half_precision_comes_in_and_float32_goes_out(compute):
    a = rand(6, 4).bfloat16()
    torch.manual_seed(0)
    found = compute(a)
    torch.manual_seed(0)
    assert found.dtype == torch.float32
    assert torch.equal(found, compute(a.float()))


def test_whiten_computes_in_float64():
    x = rand(9, 4).bfloat16().float()
    h = (x.mT @ x).bfloat16()
    assert whiten(h).factor.dtype == torch.float64
    assert torch.equal(whiten(h).factor, whiten(h.double()).factor)


def test_wide_keeps_float64_and_widens_the_rest():
    assert wide(double := torch.ones(1, dtype=torch.float64)) is double
    assert wide(single := torch.ones(1)) is single
    assert wide(torch.ones(1, dtype=torch.float16)).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("compute", [svd, svd_gram, lambda a: svd_random(a, 1), polar_exact, whiten])
def test_nan_and_inf_are_refused_with_their_place(compute, bad):
    a = eye(3)
    a[1, 2] = bad
    with pytest.raises(ValueError, match=rf"\(3, 3\) holds {bad} at \(1, 2\)"):
        compute(a)


def test_require_finite_and_check_rank_say_where():
    with pytest.raises(ValueError, match=r"layers\.0 of shape \(2,\) holds nan at \(1,\)"):
        require_finite(torch.tensor([0.0, math.nan]), "layers.0")
    with pytest.raises(ValueError, match=r"layers\.0: rank 3 is outside"):
        check_rank(3, 2, 5, "layers.0")
    assert linalg.check_rank(2, 2, 5) is None


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_orthogonal_iteration_spans_powers_of_the_matrix(turns):
    """q_t spans (a a^T)^t q_0, with orthonormal columns, whatever the scale of a."""
    a, start = rand(9, 6), qr(rand(9, 3, seed=1))
    power = qr(torch.linalg.matrix_power(a @ a.mT, turns) @ start)
    for scale in (1.0, 1e-160):
        q = orthogonal_iteration(scale * a, start, turns)
        assert_close(q.mT @ q, eye(3), rtol=0, atol=1e-13)
        assert_close(q @ q.mT, power @ power.mT, rtol=0, atol=1e-10)


def test_orthogonal_iteration_leaves_singular_vectors_where_they_are():
    """The frame of the leading singular vectors is a fixed point, signs and order included."""
    a = rand(8, 5)
    u = svd(a).u[:, :3]
    assert_close(orthogonal_iteration(a, u, 2), u, rtol=0, atol=1e-12)


def test_orth_is_qr_also_where_columns_nearly_depend():
    a = rand(9, 3)
    assert_close(orth(a), qr(a), rtol=0, atol=1e-13)
    a[:, 2] = a[:, 0] + 1e-13 * a[:, 1]
    assert torch.equal(orth(a), qr(a))
