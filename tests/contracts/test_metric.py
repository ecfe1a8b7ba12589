"""Every metric keeps the Metric contract, every measure the Measure contract; `collect` equals the definition."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from subspan.metric import (
    MEASURES,
    AbsMean,
    Covariance,
    Fisher,
    Gram,
    Measure,
    Metric,
    Plain,
    collect,
    evaluating,
    reported_loss,
)

M, N = 5, 4


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def positive(size: int) -> Tensor:
    return rand(size).abs() + 0.1


def square(size: int) -> Tensor:
    return rand(size, size) + 3 * torch.eye(size, dtype=torch.float64)


METRICS: dict[str, Callable[[], Metric]] = {
    "plain": lambda: Metric(),
    "left-diagonal": lambda: Metric(left=positive(M)),
    "right-diagonal": lambda: Metric(right=positive(N)),
    "diagonals": lambda: Metric(left=positive(M), right=positive(N)),
    "left-full": lambda: Metric(left=square(M)),
    "right-full": lambda: Metric(right=square(N)),
    "full": lambda: Metric(left=square(M), right=square(N)),
    "left-lower": lambda: Metric(left=square(M).tril()),
    "left-upper": lambda: Metric(left=square(M).triu()),
    "right-lower": lambda: Metric(right=square(N).tril()),
    "left-diagonal-right-full": lambda: Metric(left=positive(M), right=square(N)),
}


def matrix(factor: Tensor | None, size: int) -> Tensor:
    if factor is None:
        return torch.eye(size, dtype=torch.float64)
    return torch.diag(factor) if factor.ndim == 1 else factor


@pytest.fixture(params=METRICS)
def metric(request) -> Metric:
    return METRICS[request.param]()


def test_apply_is_multiplication_from_both_sides(metric):
    w = rand(M, N)
    assert_close(metric.apply(w), matrix(metric.left, M) @ w @ matrix(metric.right, N))
    assert_close(metric.apply_left(w), matrix(metric.left, M) @ w)


def test_solve_left_inverts_apply_left_on_both_sides(metric):
    u = rand(M, 3)
    assert_close(metric.solve_left(metric.apply_left(u)), u)
    assert_close(metric.apply_left(metric.solve_left(u)), u)


def test_a_diagonal_equals_its_dense_matrix(metric):
    w, other = rand(M, N), rand(M, N, seed=1)
    dense = Metric(matrix(metric.left, M), matrix(metric.right, N))
    assert_close(dense.apply(w), metric.apply(w))
    assert_close(dense.solve_left(w), metric.solve_left(w))
    assert dense.error(w, other) == pytest.approx(metric.error(w, other), rel=1e-12)


def test_error_is_its_definition(metric):
    w, other = rand(M, N), rand(M, N, seed=1)
    left, right = matrix(metric.left, M), matrix(metric.right, N)
    expected = torch.linalg.norm(left @ (w - other) @ right) / torch.linalg.norm(left @ w @ right)
    assert metric.error(w, other) == pytest.approx(float(expected), rel=1e-12)


def test_error_of_the_weight_is_zero_and_of_zero_is_one(metric):
    w = rand(M, N)
    assert metric.error(w, w) == 0.0
    assert metric.error(w, torch.zeros_like(w)) == 1.0


def test_error_does_not_feel_a_common_scale(metric):
    w, other = rand(M, N), rand(M, N, seed=1)
    assert metric.error(1e-3 * w, 1e-3 * other) == pytest.approx(metric.error(w, other), rel=1e-12)


def test_error_of_a_zero_weight_is_zero(metric):
    zero = torch.zeros(M, N, dtype=torch.float64)
    assert metric.error(zero, zero) == 0.0


def test_error_in_bfloat16_is_that_of_the_same_values_in_float64(metric):
    w, other = (256 * rand(M, N)).bfloat16(), rand(M, N, seed=1).bfloat16()
    assert metric.error(w, other) == pytest.approx(metric.error(w.double(), other.double()), rel=1e-5)


def literal_gram(x: Tensor) -> Tensor:
    return sum((torch.outer(row, row) for row in x), torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)) / len(x)


def literal_absmean(x: Tensor) -> Tensor:
    return sum((row.abs() for row in x), torch.zeros(x.shape[1], dtype=x.dtype)) / len(x)


def literal_second(x: Tensor) -> Tensor:
    return literal_gram(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))


# measure -> (the statistic's mean over tokens x (tokens, n), right @ right.mT of the metric read off that mean)
DATA: dict[str, tuple[Measure, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gram": (Gram(), literal_gram, lambda h: h),
    "gram-ridge": (
        Gram(ridge=0.1),
        literal_gram,
        lambda h: h + 0.1 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype),
    ),
    "absmean": (AbsMean(), literal_absmean, lambda a: torch.diag((a.sqrt() + 1e-6) ** 2)),
    "absmean-1": (AbsMean(alpha=1.0, eps=0.0), literal_absmean, lambda a: torch.diag(a**2)),
    "covariance": (Covariance(), literal_second, lambda h: h[:-1, :-1] - torch.outer(h[-1, :-1], h[-1, :-1])),
    "absmean-0": (AbsMean(alpha=0.0, eps=0.0), literal_absmean, lambda a: torch.eye(len(a), dtype=a.dtype)),
}


class Attention(nn.Module):
    """q, k and v read one tensor, o another, and a dropout would disturb them both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(N, N) for _ in range(4))
        self.drop = nn.Dropout(0.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.tanh(x))
        return self.o(torch.tanh(self.q(x) * self.k(x) + self.v(x)))


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def inputs_of(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """What really reaches every linear layer in eval mode, (tokens, n), recorded layer by layer."""
    found: dict[str, list[Tensor]] = {name: [] for name in linears(model)}
    hooks = [
        m.register_forward_hook(lambda _m, a, _y, name=name: found[name].append(a[0].detach().clone()))
        for name, m in linears(model).items()
    ]
    model.eval()
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in rows]) for name, rows in found.items()}


@pytest.fixture(params=DATA)
def row(request) -> tuple[Measure, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return DATA[request.param]


def test_the_folded_statistic_is_additive_over_tokens(row):
    measure, literal, _ = row
    x, y = rand(7, N), rand(3, N, seed=1)
    assert_close(measure.fold(torch.cat([x, y])), measure.fold(x) + measure.fold(y))
    assert_close(measure.fold(x) / 7, literal(x))


def test_the_metric_is_what_the_measure_says(row):
    measure, literal, squared = row
    mean = literal(rand(20, N))
    metric = measure.metric(mean)
    right = matrix(metric.right, N)
    assert metric.left is None
    assert_close(right @ right.mT, squared(mean))


def test_collect_is_the_mean_over_the_inputs_that_reach_each_site(row):
    measure, literal, _ = row
    model, batches = Attention().train(), [rand(2, 3, N), rand(1, 7, N, seed=1), rand(4, N, seed=2)]
    means = collect(model, batches, measure, linears(model))
    for name, x in inputs_of(model, batches).items():
        assert_close(means[name], literal(x), msg=name)


def test_collect_does_not_feel_how_tokens_are_batched(row):
    measure, x, model = row[0], rand(12, N), Attention()
    whole = collect(model, [x], measure, linears(model))
    for batches in (list(x.split(1)), list(x.split(5)), [x.reshape(3, 4, N)], iter(x.split(2))):
        parts = collect(model, batches, measure, linears(model))
        for name in whole:
            assert_close(parts[name], whole[name])


@dataclass
class Counting:
    """A Gram that counts how often it is asked."""

    calls: list[int] = field(default_factory=list)
    needs = "inputs"

    def fold(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return x.mT @ x

    def metric(self, mean: Tensor | None) -> Metric:
        return Metric()


def test_sites_with_one_input_share_one_accumulator():
    model, measure = Attention(), Counting()
    means = collect(model, [rand(6, N), rand(3, N)], measure, linears(model))
    assert means["q"] is means["k"] is means["v"]
    assert means["o"] is not means["q"]
    assert measure.calls == [6, 6, 3, 3]


class Flow(nn.Module):
    """Two layers and any dataflow between them."""

    def __init__(self, flow: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(N, N), nn.Linear(N, N)
        self.flow = flow
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.flow(self.a, self.b, x.clone())


FLOWS: dict[str, Callable[[nn.Module, nn.Module, Tensor], Tensor]] = {
    "chain": lambda a, b, x: b(a(x)),
    "one input": lambda a, b, x: a(x) + b(x),
    "recurrent": lambda a, b, x: b(a(a(x))),
    "twice the same input": lambda a, b, x: a(x) + b(a(x)),
    "equal but not the same tensor": lambda a, b, x: a(x) + b(x.clone()),
    "the first sees more": lambda a, b, x: a(x) + b(x) + a(3 * x),
    "changed in place between": lambda a, b, x: a(x) + b(x.mul_(3)),
    "another tensor between": lambda a, b, x: a(x) + a(2 * x) + a(3 * x) + b(x),
}


@pytest.mark.parametrize("flow", FLOWS)
def test_any_dataflow_gives_each_site_its_own_inputs(flow):
    """Refusing a dataflow that cannot be shared is allowed; a wrong statistic is not."""
    model, batches = Flow(FLOWS[flow]), [rand(5, N), rand(2, N)]
    try:
        means = collect(model, batches, Gram(), linears(model))
    except ValueError as refusal:
        assert "shares its input" in str(refusal)
        return
    for name, x in inputs_of(model, batches).items():
        assert_close(means[name], literal_gram(x), msg=name)


def test_a_layer_called_by_keyword_is_seen():
    model = Flow(lambda a, b, x: b(a(input=x)))
    x = rand(5, N)
    assert_close(collect(model, [x], Gram(), {"a": model.a})["a"], literal_gram(x))


def test_a_single_unbatched_vector_is_one_token():
    model, x = Attention().eval(), rand(N)
    assert_close(collect(model, [x], Gram(), {"q": model.q})["q"], literal_gram(torch.tanh(x)[None]))


def test_mappings_are_keywords_and_forward_can_be_replaced():
    model, x = Attention().eval(), rand(5, N)
    plain = collect(model, [x], Gram(), linears(model))
    named = collect(model, [{"x": x}], Gram(), linears(model))
    own = collect(model, [(x, "label")], Gram(), linears(model), forward=lambda m, pair: m(pair[0]))
    for name in plain:
        assert torch.equal(named[name], plain[name])
        assert torch.equal(own[name], plain[name])


def test_half_precision_inputs_are_summed_in_float32():
    model, x = nn.Sequential(nn.Linear(N, N)).bfloat16(), rand(4096, N).bfloat16()
    mean = collect(model, [x], Gram(), {"0": model[0]})["0"]
    assert mean.dtype == torch.float32
    assert_close(mean.double(), literal_gram(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_collect_leaves_no_trace_even_after_an_error(fails):
    model = Attention().train()
    model.drop.eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}

    def forward(m: nn.Module, x: Tensor) -> object:
        m(x)
        if fails:
            raise RuntimeError("the data ran away")
        return None

    if fails:
        with pytest.raises(RuntimeError, match="ran away"):
            collect(model, [rand(5, N)], Gram(), linears(model), forward=forward)
    else:
        collect(model, [rand(5, N)], Gram(), linears(model), forward=forward)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert {name: m.training for name, m in model.named_children()} == {
        "q": True, "k": True, "v": True, "o": True, "drop": False,
    }  # fmt: skip


def test_evaluating_lasts_as_long_as_it_is_asked_to():
    model = Attention().train()
    model.drop.eval()
    with pytest.raises(RuntimeError, match="midway"), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise RuntimeError("midway")
    assert [m.training for m in model.modules()] == [m is not model.drop for m in model.modules()]


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_the_model_is_restored(training):
    model = Attention().train(training)
    collect(model, [rand(5, N)], Gram(), linears(model))
    assert all(m.training is training for m in model.modules())


def test_an_unreached_site_is_named():
    model = Flow(lambda a, b, x: a(x))
    with pytest.raises(ValueError, match=r"no calibration batch reached b;.*leave the site out"):
        collect(model, [rand(5, N)], Gram(), linears(model))


def test_no_batches_at_all_reach_no_site():
    model = Attention()
    with pytest.raises(ValueError, match="no calibration batch reached q"):
        collect(model, [], Gram(), linears(model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("measure", [Gram(), AbsMean()], ids=repr)
def test_bad_inputs_are_named_by_the_site_that_gets_them(bad, measure):
    model = Flow(lambda a, b, x: b(a(x) * bad))
    with pytest.raises(ValueError, match=r"input statistic of b .*(nan|inf)"):
        collect(model, [rand(5, N)], measure, linears(model))


@pytest.mark.parametrize("name", [name for name, m in MEASURES.items() if m.needs != "nothing"])
def test_a_measure_of_data_without_data_says_what_to_pass(name):
    with pytest.raises(ValueError, match="calibration batches"):
        MEASURES[name].metric(None)


def test_plain_is_the_identity_and_needs_no_data():
    metric = Plain().metric(None)
    assert (metric.left, metric.right, metric.mean) == (None, None, None)
    assert Plain().needs == "nothing"


# ---- gradients ----


def squared_error(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1.0).square().sum()


def gradients_of(model: nn.Module, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """The gradient of every weight for every batch, by autograd, in eval mode."""
    model.eval()
    found = linears(model)
    rows = [torch.autograd.grad(squared_error(model, x), [m.weight for m in found.values()]) for x in batches]
    return {name: [row[i] for row in rows] for i, name in enumerate(found)}


def test_fisher_is_the_mean_over_batches_of_squared_gradients_summed_over_rows():
    model, batches = Attention().train(), [rand(3, N), rand(1, 7, N, seed=1), rand(4, N, seed=2)]
    means = collect(model, batches, Fisher(), linears(model), loss=squared_error)
    for name, grads in gradients_of(model, batches).items():
        f = torch.stack([g.square().sum(0) for g in grads]).mean(0)
        assert_close(means[name], f, rtol=1e-12, atol=0.0, msg=name)
        assert_close(Fisher().metric(means[name]).right, f.sqrt(), rtol=1e-12, atol=0.0)


def test_fisher_does_not_feel_the_scale_of_the_loss():
    model, x = Attention(), [rand(5, N)]
    one, other = (
        collect(model, x, Fisher(), linears(model), loss=lambda m, b, c=c: c * squared_error(m, b))
        for c in (1.0, 3.0)
    )
    for name in one:
        assert_close(other[name], 9 * one[name])


def test_fisher_counts_evenly_what_no_loss_feels():
    assert torch.equal(Fisher().metric(torch.zeros(N)).right, torch.ones(N).double())


def test_at_most_one_gradient_is_held_and_none_stays():
    model = Attention().train()
    model.q.weight.requires_grad_(False)
    model.k.weight.grad = torch.full((N, N), 7.0).double()
    kept, weights, held = model.k.weight.grad, [m.weight for m in linears(model).values()], []

    class Watching(Counting):
        needs = "gradients"

        def fold(self, x: Tensor) -> Tensor:
            held.append(sum(w.grad is not None for w in weights))
            return x

    with torch.no_grad():
        collect(model, [rand(5, N), rand(2, N)], Watching(), linears(model), loss=squared_error)
    assert held == [1] * 8
    assert model.k.weight.grad is kept and sum(p.grad is not None for p in model.parameters()) == 1
    assert not model.q.weight.requires_grad and sum(not p.requires_grad for p in model.parameters()) == 1
    assert all(m.training for m in model.modules())
    assert not any(w._post_accumulate_grad_hooks for w in weights)


def test_the_loss_a_model_reports_is_the_one_gradients_are_taken_of():
    class Reporting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Attention().eval()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
            y = self.net(x)
            return SimpleNamespace(loss=None if labels is None else (y - labels).square().sum())

    model, x = Reporting(), rand(5, N)
    batch = {"x": x, "labels": torch.ones(5, N).double()}
    found = collect(model, [batch], Fisher(), linears(model))
    for name, grads in gradients_of(model.net, [x]).items():
        assert_close(found[f"net.{name}"], grads[0].square().sum(0))
    assert reported_loss(model, batch).item() == squared_error(model.net, x).item()
    with pytest.raises(ValueError, match=r"Reporting reports no loss for this batch.*`labels`.*loss="):
        collect(model, [{"x": x}], Fisher(), linears(model))


@pytest.mark.parametrize("batches", [[], [rand(5, N)]], ids=["no batch", "unfelt"])
def test_a_weight_that_no_loss_feels_is_named(batches):
    model = Flow(lambda a, b, x: a(x))
    with pytest.raises(ValueError, match=r"no calibration batch reached .*leave the site out"):
        collect(model, batches, Fisher(), linears(model), loss=squared_error)


def test_a_batch_that_no_weight_feels_counts_as_a_gradient_of_zero():
    model = Flow(lambda a, b, x: b(a(x)) if x.sum() > 0 else x)
    x = rand(5, N).abs()
    one = collect(model, [x], Fisher(), linears(model), loss=squared_error)
    two = collect(model, [x, -x], Fisher(), linears(model), loss=squared_error)
    for name in one:
        assert_close(two[name], one[name] / 2)


def test_a_bad_gradient_is_named_by_its_weight():
    model = Flow(lambda a, b, x: b(a(x)) * float("nan"))
    with pytest.raises(ValueError, match=r"gradient statistic of a .*nan"):
        collect(model, [rand(5, N)], Fisher(), linears(model), loss=squared_error)


# ---- the mean ----


def test_covariance_is_that_of_the_inputs_even_where_the_mean_is_large():
    x = rand(50, N) + torch.tensor([0.0, 1.0, 1e3, 1e5]).double()
    metric = Covariance().metric(Covariance().fold(x.float()) / 50)
    x = x.float().double()
    assert metric.mean is not None and metric.right is not None
    assert_close(metric.mean, x.mean(0), rtol=1e-12, atol=0.0)
    assert_close(metric.right @ metric.right.mT, torch.cov(x.mT, correction=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("measure", [Gram, Covariance])
def test_a_negative_ridge_is_refused(measure):
    with pytest.raises(ValueError, match=r"ridge -1 is negative; .*e\.g\. 1e-3"):
        measure(ridge=-1)
