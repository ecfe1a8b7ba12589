"""Published fits are equal where their papers are, and lose what their papers say."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from subspan import io
from subspan.budget import Err, WeLore
from subspan.compress import Compression, compress, study
from subspan.fit import Svd, decompose
from subspan.hosts import jobs
from subspan.methods import build
from subspan.metric import AbsMean, Covariance, Fisher, Gram, Measure, Metric, Plain, collect
from subspan.plan import Plan

M, N = 8, 6
DATA: dict[str, Measure] = {"absmean": AbsMean(), "gram": Gram(), "covariance": Covariance()}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(rand(*p.shape, seed=i))
    return model.eval()


def layer(bias: bool = True) -> nn.Module:
    return filled(nn.Sequential(nn.Linear(N, M, bias=bias)).double())


def inputs() -> Tensor:
    """Correlated inputs (40, n) with a mean."""
    return 0.3 + rand(40, N, seed=1) @ torch.diag(torch.logspace(0.5, -1.5, N).double()) @ rand(N, N, seed=2)


def at(rank: int, measure: Measure) -> Compression:
    return Compression(lambda spectra, shapes: dict.fromkeys(shapes, rank), measure)


def cut(measure: Measure, rank: int, x: Tensor, **options: object) -> nn.Module:
    model = layer()
    compress(model, at(rank, measure), batches=list(x.split(7)), **options)
    return model[0]


# ---- which methods are one ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", range(1, N))
@pytest.mark.parametrize("name", ["lord", "afm"])
def test_lord_and_afm_are_the_principal_components_of_the_outputs(name, rank, bias):
    """W' = U U^T W and b' = (I - U U^T) E[y] + U U^T b, with U the top eigenvectors of the outputs' covariance."""
    model, x = layer(bias), inputs()
    with torch.no_grad():
        w, y = model[0].weight.clone(), model(x)
        b = model[0].bias.clone() if bias else torch.zeros(M).double()
        mean = y.mean(0)
        u = torch.linalg.eigh((y - mean).mT @ (y - mean)).eigenvectors[:, -rank:]
        keep = u @ u.mT
        compress(model, at(rank, build(name, "compression").measure), batches=list(x.split(7)))
        assert_close(model[0].weight, keep @ w, rtol=1e-10, atol=1e-10)
        assert_close(model[0].bias, mean - keep @ mean + keep @ b, rtol=1e-10, atol=1e-10)


def test_lord_and_afm_are_one_method():
    assert build("lord", "compression") == build("afm", "compression")


@pytest.mark.parametrize("rank", range(1, N))
def test_svd_llm_is_output_pca_without_the_mean(rank):
    model, x = layer(), inputs()
    w = model[0].weight.detach().clone()
    y = x @ w.mT
    u = torch.linalg.eigh(y.mT @ y).eigenvectors[:, -rank:]
    compress(model, at(rank, build("svd_llm", "compression").measure), batches=[x])
    assert_close(model[0].weight.detach(), u @ u.mT @ w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", range(1, N))
def test_on_inputs_of_mean_zero_lord_is_svd_llm(rank):
    x = torch.cat([inputs(), -inputs()])
    one, other = cut(Covariance(), rank, x), cut(Gram(), rank, x)
    assert_close(one.weight, other.weight, rtol=1e-10, atol=1e-10)
    assert_close(one.bias, other.bias, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("rank", range(1, N))
def test_lord_loses_the_discarded_eigenvalues_and_less_than_svd_llm(rank):
    x, before = inputs(), layer()
    with torch.no_grad():
        y = before(x)
        lost = {type(m): (cut(m, rank, x)(x) - y).square().sum() / len(x) for m in (Covariance(), Gram())}
    eigenvalues = torch.linalg.eigvalsh(torch.cov(y.mT, correction=0))
    assert_close(lost[Covariance], eigenvalues[:-rank].sum(), rtol=1e-9, atol=0.0)
    assert lost[Covariance] < lost[Gram]


def test_the_error_a_plan_predicts_under_covariance_is_that_of_the_outputs():
    model, x = layer(False), inputs()
    with torch.no_grad():
        y = model(x)
        plan, _ = compress(model, at(2, Covariance()), batches=[x])
        assert plan.sites["0"].bias == M
        error = (model(x) - y).norm() / (y - y.mean(0)).norm()
    assert plan.sites["0"].error == pytest.approx(float(error), rel=1e-9)


def test_a_gained_bias_is_counted_saved_and_opened(tmp_path):
    model, x = layer(False), inputs()
    plan, done = compress(model, at(2, Covariance()), batches=[x])
    assert (
        plan.bytes
        == (8 * M * N, 8 * (2 * (M + N) + M))
        == (8 * M * N, 8 * sum(map(Tensor.numel, model.parameters())))
    )
    assert Plan.from_dict(plan.to_dict()) == plan
    io.save(tmp_path, model, {})
    again = layer(False)
    io.load(tmp_path, again)
    assert torch.equal(again(x), model(x)) and not torch.equal(again(x), layer(False)(x))
    done.undo()
    assert torch.equal(model(x), layer(False)(x))


def test_at_full_rank_the_bias_does_not_move():
    w = rand(M, N)
    part = decompose(w, Metric(mean=rand(N)))
    assert torch.equal(part.shift(N), torch.zeros(M).double())
    for rank in range(1, N):
        assert_close(part.shift(rank), (w - part.cut(rank).dense()) @ rand(N), rtol=1e-10, atol=1e-12)


def test_asvd_without_its_exponent_is_svd():
    for rank in range(1, N):
        one, other = (cut(m, rank, inputs()) for m in (AbsMean(0.0), Plain()))
        assert_close(one.weight, other.weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", range(1, N))
def test_welore_asvd_is_asvd_at_the_ranks_of_welore(rank):
    model, x = filled(nn.Sequential(nn.Linear(N, M), nn.Linear(M, N)).double()), inputs()
    method = build("welore_asvd", "compression", target=Err(rank / N))
    taken = study(model, method.measure, batches=[x])
    plan = taken.plan(method.budget)
    assert plan.ranks() == study(model).plan(WeLore(Err(rank / N))).ranks()
    means = collect(model, [x], AbsMean(), dict(model.named_children()))
    for name, found in plan.ranks().items():
        op = Svd(found)(model[int(name)].weight.detach(), AbsMean().metric(means[name]))
        assert_close(taken.parts[name].cut(found).dense(), op.dense(), rtol=1e-10, atol=1e-10)


# ---- FWSVD ----


def test_fwsvd_is_its_formula():
    """SVD(W D) with D^2 the column sums of E[(dL/dW)^2], in two layers of a network with a loss."""
    model, x = filled(nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, N)).double()), inputs()

    def loss(net: nn.Module, rows: Tensor) -> Tensor:
        return (net(rows) - rows).square().mean()

    weights = {"0": model[0].weight, "2": model[2].weight}
    grads = [torch.autograd.grad(loss(model, row[None]), list(weights.values())) for row in x]
    wanted = {}
    for i, (name, w) in enumerate(weights.items()):
        d = torch.stack([g[i] for g in grads]).square().mean(0).sum(0).sqrt()
        u, s, vh = torch.linalg.svd(w.detach() * d)
        wanted[name] = (u[:, :3] * s[:3]) @ vh[:3] / d
    compress(model, at(3, build("fwsvd", "compression").measure), batches=[row[None] for row in x], loss=loss)
    for name, w in wanted.items():
        assert_close(model.get_submodule(name).weight.detach(), w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", range(1, N))
def test_fwsvd_does_not_feel_the_scale_of_the_loss(rank):
    ops = [cut(Fisher(), rank, inputs(), loss=lambda m, x, c=c: c * m(x).square().sum()) for c in (1e-3, 1.0, 1e3)]
    assert_close(ops[0].weight, ops[1].weight, rtol=1e-10, atol=1e-10)
    assert_close(ops[2].weight, ops[1].weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", range(1, N))
def test_where_the_loss_feels_all_columns_alike_fwsvd_is_svd(rank):
    signs = rand(7, N).sign()
    one = cut(Fisher(), rank, signs.repeat_interleave(7, 0), loss=lambda m, x: m(x).sum())
    assert_close(one.weight, cut(Plain(), rank, signs).weight, rtol=1e-10, atol=1e-10)


def test_for_a_loss_that_sums_outputs_fwsvd_weighs_by_the_gram_diagonal():
    """dL/dW = 1 x^T for one token, so f_j = m E[x_j^2]."""
    x, model = inputs(), layer()
    w = model[0].weight.detach().clone()
    compress(model, at(2, Fisher()), batches=list(x.split(1)), loss=lambda m, rows: m(rows).sum())
    gram = (x.mT @ x / len(x)).diagonal()
    assert_close(model[0].weight.detach(), Svd(2)(w, Metric(right=gram.sqrt())).dense(), rtol=1e-10, atol=1e-10)


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=30, num_key_value_heads=1, initializer_range=0.3, **sizes)
        return LlamaForCausalLM(config).double().eval()


def ids() -> Tensor:
    return torch.randint(30, (6, 2, 9), generator=torch.Generator().manual_seed(0))


def test_fwsvd_on_a_language_model_reads_its_own_loss():
    model, batches = llama(), ids()
    plan, taken = jobs.make_plan(model, "fwsvd", {"target": {"err": 0.5}}, batches=batches)
    name = "model.layers.1.mlp.down_proj"
    weight, f = model.get_submodule(name).weight, 0.0
    for batch in batches:
        logits = model(input_ids=batch).logits[:, :-1]
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        f = f + torch.autograd.grad(nll, weight)[0].square().sum(0) / len(batches)
    s = torch.linalg.svdvals(weight.detach() * f.sqrt())
    # transformers computes its loss in float32
    assert_close(taken.parts[name].s, s, rtol=1e-6, atol=0.0)
    assert plan.sites[name].error == pytest.approx(float(s[plan.sites[name].rank :].norm() / s.norm()), rel=1e-6)
