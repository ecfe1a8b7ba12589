"""Every fit keeps the Fit contract under every metric: Eckart-Young, full rank, equivariance, precision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from subspan import linalg
from subspan.fit import Fit, Svd, decompose, stack
from subspan.metric import AbsMean, Gram, Metric, collect

M, N = 7, 5


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def positive(size: int) -> Tensor:
    return rand(size).abs() + 0.1


def square(size: int) -> Tensor:
    return rand(size, size) + 3 * torch.eye(size, dtype=torch.float64)


METRICS: dict[str, Callable[[int, int], Metric]] = {
    "plain": lambda m, n: Metric(),
    "left-diagonal": lambda m, n: Metric(left=positive(m)),
    "right-diagonal": lambda m, n: Metric(right=positive(n)),
    "diagonals": lambda m, n: Metric(left=positive(m), right=positive(n)),
    "left-full": lambda m, n: Metric(left=square(m)),
    "right-full": lambda m, n: Metric(right=square(n)),
    "full": lambda m, n: Metric(left=square(m), right=square(n)),
    "triangular": lambda m, n: Metric(left=square(m).triu(), right=square(n).tril()),
}

# name -> the fit that is optimal at a rank >= 2
FITS: dict[str, Callable[[int], Fit]] = {
    "svd": lambda rank: Svd(rank),
    "svd-gram": lambda rank: Svd(rank, solver="gram"),
    "stack-of-two": lambda rank: stack(Svd(1), Svd(rank - 1)),
    "stack-swept": lambda rank: stack(Svd(rank - 1), Svd(1), sweeps=3),
}


@pytest.fixture(params=METRICS)
def metric_of(request) -> Callable[[int, int], Metric]:
    return METRICS[request.param]


@pytest.fixture
def metric(metric_of) -> Metric:
    return metric_of(M, N)


@pytest.fixture(params=FITS)
def fit(request) -> Callable[[int], Fit]:
    return FITS[request.param]


def loss(metric: Metric, w: Tensor, other: Tensor) -> float:
    return float(torch.linalg.norm(metric.apply(w - other)))


def discarded(metric: Metric, w: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(metric.apply(w))[rank:].norm())


@pytest.mark.parametrize("shape", [(M, N), (N, M)], ids=["tall", "wide"])
@pytest.mark.parametrize("rank", [2, 3])
def test_the_error_is_the_discarded_singular_values(fit, metric_of, rank, shape):
    w, metric = rand(*shape), metric_of(*shape)
    op = fit(rank)(w, metric).dense()
    assert loss(metric, w, op) == pytest.approx(discarded(metric, w, rank), rel=1e-10)
    assert float(torch.linalg.svdvals(op)[rank:].max()) < 1e-12 * float(torch.linalg.matrix_norm(op))


def test_no_competitor_of_that_rank_is_closer(fit, metric):
    w, count = rand(M, N), 200
    op = fit(2)(w, metric).dense()
    u, s, vh = linalg.svd(op)
    du, dv = rand(count, M, 2), rand(count, 2, N)
    near = [(u[:, :2] + step * du) @ (s[:2, None] * vh[:2] + step * dv) for step in (1e-4, 1e-2, 1.0)]
    seen, target = metric.apply(du @ dv), metric.apply(w)
    scale = (seen * target).sum((1, 2)) / seen.square().sum((1, 2))
    rivals = torch.cat([*near, scale[:, None, None] * (du @ dv)])
    assert float(torch.linalg.matrix_norm(metric.apply(w - rivals)).min()) > loss(metric, w, op)


def test_full_rank_is_exact(fit, metric):
    w = rand(M, N)
    assert_close(fit(N)(w, metric).dense(), w, rtol=1e-11, atol=1e-11)


def test_only_the_shape_of_a_metric_counts_not_its_scale(fit, metric):
    w = rand(M, N)
    scaled = Metric(
        None if metric.left is None else 1e3 * metric.left,
        None if metric.right is None else 1e-3 * metric.right,
    )
    assert_close(fit(2)(w, scaled).dense(), fit(2)(w, metric).dense(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_a_multiple_of_the_identity_is_plain(fit, scale):
    w, plain = rand(M, N), fit(2)(rand(M, N)).dense()
    eye_m, eye_n = scale * torch.eye(M, dtype=torch.float64), scale * torch.eye(N, dtype=torch.float64)
    for metric in (Metric(right=eye_n), Metric(left=eye_m), Metric(eye_m.diagonal(), eye_n.diagonal())):
        assert_close(fit(2)(w, metric).dense(), plain, rtol=1e-11, atol=1e-11)


def test_the_fit_scales_with_the_weight(fit, metric):
    w = rand(M, N)
    assert_close(fit(2)(-5 * w, metric).dense(), -5 * fit(2)(w, metric).dense(), rtol=1e-10, atol=1e-10)


def test_the_transposed_problem_has_the_transposed_answer(fit, metric):
    def turned(factor: Tensor | None) -> Tensor | None:
        return factor if factor is None or factor.ndim == 1 else factor.mT

    w = rand(M, N)
    other = fit(2)(w.mT, Metric(turned(metric.right), turned(metric.left))).dense().mT
    assert_close(other, fit(2)(w, metric).dense(), rtol=1e-10, atol=1e-10)


def test_a_weight_of_that_rank_is_its_own_fit(fit, metric):
    w = rand(M, 2) @ rand(2, N)
    assert_close(fit(3)(w, metric).dense(), w, rtol=1e-10, atol=1e-10)


def test_a_zero_weight_gives_the_zero_op(fit, metric):
    zero = torch.zeros(M, N, dtype=torch.float64)
    assert torch.equal(fit(2)(zero, metric).dense(), zero)


def test_the_weight_is_not_touched(fit, metric):
    w = rand(M, N).requires_grad_()
    op = fit(2)(w, metric)
    assert torch.equal(w, rand(M, N)) and w.grad is None
    assert not any(p.requires_grad and p.grad_fn is not None for p in op.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 3])
def test_half_precision_is_computed_in_float32_and_cast_once(metric, dtype, rank):
    w = rand(M, N).to(dtype)
    half, single = Svd(rank)(w, metric), Svd(rank)(w.float(), metric)
    assert half.u.dtype == half.v.dtype == dtype
    assert torch.equal(half.u, single.u.to(dtype)) and torch.equal(half.v, single.v.to(dtype))


@pytest.mark.parametrize("rank", [0, -1, N + 1])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(ValueError, match=r"rank -?\d+ is outside 1\.\.min\(7, 5\) = 5; choose"):
        Svd(rank)(rand(M, N))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_with_nan_or_inf_is_refused(fit, metric, bad):
    w = rand(M, N)
    w[1, 2] = bad
    with pytest.raises(ValueError, match=r"(nan|inf)"):
        fit(2)(w, metric)


@pytest.mark.parametrize("fits,sweeps", [((), 1), ((Svd(1),), 0), ((Svd(1),), -1)])
def test_a_stack_needs_fits_and_sweeps(fits, sweeps):
    with pytest.raises(ValueError, match="at least one fit and one sweep"):
        stack(*fits, sweeps=sweeps)


@pytest.mark.parametrize("a,b", [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("sweeps", [1, 4])
def test_two_stacked_svds_are_one(metric, a, b, sweeps):
    w = rand(M, N)
    both = stack(Svd(a), Svd(b), sweeps=sweeps)(w, metric).dense()
    assert_close(both, Svd(a + b)(w, metric).dense(), rtol=1e-10, atol=1e-10)


def test_one_decomposition_holds_every_rank(metric):
    w = rand(M, N)
    parts = decompose(w, metric)
    assert_close(parts.left @ parts.right, w, rtol=1e-11, atol=1e-11)
    for rank in range(1, N + 1):
        op = parts.cut(rank)
        assert op.rank == rank
        assert_close(op.dense(), Svd(rank)(w, metric).dense(), rtol=1e-12, atol=1e-12)
        assert parts.error(rank) == pytest.approx(metric.error(w, op.dense()), abs=1e-12)


def test_the_singular_values_are_shared_evenly():
    s = 10.0 ** -torch.arange(0, 10, 2, dtype=torch.float64)
    w = torch.linalg.qr(rand(M, N)).Q @ torch.diag(s) @ torch.linalg.qr(rand(N, N)).Q
    op = Svd(4)(w)
    assert_close(op.u.mT @ op.u, torch.diag(s[:4]), rtol=1e-7, atol=1e-12)
    assert_close(op.v @ op.v.mT, torch.diag(s[:4]), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("solver", ["exact", "gram"])
def test_a_metric_that_ignores_an_output_never_gives_nan(solver):
    left = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    w = rand(M, N)
    for metric in (Metric(left=left), Metric(left=torch.diag(left))):
        try:
            op = Svd(2, solver=solver)(w, metric).dense()
        except ValueError as refusal:
            assert "singular" in str(refusal)
        else:
            assert loss(metric, w, op) == pytest.approx(discarded(metric, w, 2), rel=1e-10)


# ---- whitening: what the Gram measure promises on data ----


def data(tokens: int) -> tuple[nn.Linear, Tensor]:
    """A layer, and correlated inputs for it whose directions differ a hundredfold in size."""
    layer = nn.Linear(N, M, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(rand(M, N))
    return layer, rand(tokens, N, seed=3) @ torch.diag(torch.logspace(0, -2, N).double()) @ rand(N, N, seed=4)


def whitened(layer: nn.Linear, x: Tensor) -> Metric:
    return Gram().metric(collect(layer, [x], Gram(), {"site": layer})["site"])


@pytest.mark.parametrize("rank", range(2, N))
def test_whitened_truncation_attains_the_optimum_on_activations(fit, rank):
    layer, x = data(40)
    w = layer.weight.detach()
    op = fit(rank)(w, whitened(layer, x)).dense()
    best = torch.linalg.svdvals(x @ w.mT)[rank:].norm()
    assert_close(torch.linalg.norm(x @ (w - op).mT), best, rtol=1e-10, atol=0.0)
    assert float(torch.linalg.norm(x @ (w - Svd(rank)(w).dense()).mT)) > 1.01 * float(best)


def test_whitened_truncation_is_output_pca(fit):
    layer, x = data(40)
    w = layer.weight.detach()
    y = x @ w.mT
    top = torch.linalg.eigh(y.mT @ y).eigenvectors[:, -2:]
    assert_close(fit(2)(w, whitened(layer, x)).dense(), top @ top.mT @ w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_fewer_tokens_than_columns_are_exact_at_the_rank_of_the_inputs(tokens):
    layer, x = data(tokens)
    w = layer.weight.detach()
    op = Svd(tokens)(w, whitened(layer, x)).dense()
    assert_close(x @ op.mT, x @ w.mT, rtol=1e-6, atol=1e-6)


def test_a_dead_input_column_does_no_harm():
    layer, x = data(40)
    x[:, 2] = 0.0
    w = layer.weight.detach()
    op = Svd(2)(w, whitened(layer, x)).dense()
    best = torch.linalg.svdvals(x @ w.mT)[2:].norm()
    assert_close(torch.linalg.norm(x @ (w - op).mT), best, rtol=1e-6, atol=0.0)


def test_absmean_with_exponent_zero_is_plain(fit):
    layer, x = data(40)
    measure, w = AbsMean(alpha=0.0), layer.weight.detach()
    metric = measure.metric(collect(layer, [x], measure, {"site": layer})["site"])
    assert_close(fit(2)(w, metric).dense(), fit(2)(w).dense(), rtol=1e-10, atol=1e-10)
