"""Limits of compression: nothing removed is nothing changed, every prediction is what is then measured."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.budget import Energy, Err, Ratio, Target, Uniform, WeLore
from subspan.compress import Compression, compress, study
from subspan.methods import build, methods
from subspan.metric import AbsMean, Covariance, Fisher, Gram, Measure, Metric, Plain, collect
from subspan.ops import Dense, LowRank, OpLinear
from subspan.plan import Plan

PRESETS = sorted(methods("compression"))
MEASURES: dict[str, Measure] = {
    "plain": Plain(), "absmean": AbsMean(), "gram": Gram(), "gram-ridge": Gram(0.1), "covariance": Covariance(),
    "fisher": Fisher(),
}  # fmt: skip
TARGETS: tuple[Target, ...] = (Err(0.2), Err(0.7), Ratio(0.4), Ratio(0.9))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=30, num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.3, **sizes
        )
        return LlamaForCausalLM(config).double().eval()


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(30, (3, 4, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": batch, "labels": batch} for batch in ids]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batches()[0]).logits


def layer(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    """One 8 x 6 layer and correlated inputs (40, 6) for it."""
    model = nn.Sequential(nn.Linear(6, 8, bias=bias)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(rand(*p.shape, seed=i))
    x = rand(40, 6, seed=1) @ torch.diag(torch.logspace(0.5, -1.5, 6).double()) @ rand(6, 6, seed=2)
    return model.to(dtype), x.to(dtype)


# ---- nothing removed ----

NOTHING = {
    "uniform-err": Uniform(Err(0.0)),
    "uniform-ratio": Uniform(Ratio(1.0)),
    "energy-err": Energy(Err(0.0)),
    "energy-ratio": Energy(Ratio(1.0)),
    "energy-share": Energy(1.0),
    "welore-err": WeLore(Err(0.0)),
    "welore-ratio": WeLore(Ratio(1.0)),
    "welore-grid": WeLore(Err(0.0), search="grid"),
    "welore-keep": WeLore(Err(0.0), nlrc="keep"),
    "by hand": lambda spectra, shapes: {name: min(shape) for name, shape in shapes.items()},
}


@pytest.mark.parametrize("budget", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("measure", [Plain(), Gram()], ids=repr)
def test_a_budget_that_removes_nothing_changes_no_bit(llama, budget, measure):
    with torch.no_grad():  # a fast decay, where the last directions hold next to no energy
        down = llama.model.layers[0].mlp.down_proj.weight
        down.copy_(torch.diag(10.0 ** -torch.arange(16)).double() @ rand(16, 24))
    before, modules = logits(llama), dict(llama.named_modules())
    plan, done = compress(llama, Compression(budget, measure), batches=batches())
    assert {site.form for site in plan.sites.values()} == {"keep"}
    assert plan.err == 0.0 and plan.ratio == 1.0 and plan.bytes[0] == plan.bytes[1]
    assert {site.error for site in plan.sites.values()} == {0.0} and tuple(done) == ()
    assert torch.equal(logits(llama), before)
    assert all(module is modules[name] for name, module in llama.named_modules())


def test_full_rank_factors_are_the_layer_to_round_off(llama):
    before, taken = logits(llama), study(llama)
    kept = taken.plan(Uniform(Err(0.0))).sites
    rows = {name: replace(site, form="lowrank") for name, site in kept.items()}
    with taken.apply(llama, Plan("by hand", {}, rows)):
        assert all(isinstance(llama.get_submodule(name).op, LowRank) for name in rows)
        assert_close(logits(llama), before, rtol=1e-10, atol=1e-10)


# ---- every published method ----


@pytest.fixture(params=PRESETS)
def preset(request) -> str:
    return request.param


def test_there_are_published_methods():
    assert {"svd", "asvd", "svd_llm", "welore", "welore_asvd", "fwsvd", "lord", "afm"} <= set(PRESETS)


def test_a_preset_is_a_value_with_a_repr_that_says_all(preset):
    one, two = build(preset, "compression"), build(preset, "compression")
    assert isinstance(one, Compression)
    assert one == two and repr(one) == repr(two)
    assert not re.search(r"0x[0-9a-f]+|<", repr(one))
    assert repr(build(preset, "compression", target=Err(0.25))) != repr(one)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_a_preset_predicts_what_it_then_does(llama, preset, target):
    method = build(preset, "compression", target=target)
    taken = study(llama, method.measure, batches=batches())
    plan = taken.plan(method.budget)
    found = {name: llama.get_submodule(name) for name in plan.sites}
    means = collect(llama, batches(), method.measure, found)
    before, weights = logits(llama), {name: m.weight.detach() for name, m in found.items()}
    state = {name: p.clone() for name, p in llama.state_dict().items()}
    with taken.apply(llama, plan):
        assert bool(torch.isfinite(logits(llama)).all()) and not torch.equal(logits(llama), before)
        assert plan.bytes[1] == sum(p.numel() * p.element_size() for p in llama.parameters())
        for name, site in plan.sites.items():
            now, w = llama.get_submodule(name), weights[name]
            metric = method.measure.metric(means.get(name))
            assert metric.error(w, now.weight.detach()) == pytest.approx(site.error, abs=1e-6), name
            if site.form == "keep":
                assert now is found[name]
                continue
            assert isinstance(now.op, LowRank if site.form == "lowrank" else Dense), name
            assert float(torch.linalg.svdvals(now.weight)[site.rank :].max()) < 1e-10
            if metric.mean is None:
                assert now.bias is found[name].bias
            else:
                assert_close(now.bias, (weights[name] - now.weight) @ metric.mean, rtol=1e-9, atol=1e-12)
    assert torch.equal(logits(llama), before)
    assert list(llama.state_dict()) == list(state)
    assert all(torch.equal(p, state[name]) for name, p in llama.state_dict().items())


def test_a_preset_leaves_embeddings_head_and_norms_alone(llama, preset):
    kept = {name: m for name, m in llama.named_modules() if "proj" not in name}
    plan, _ = compress(llama, build(preset, "compression"), batches=batches())
    assert all(".layers." in name and name.endswith("_proj") for name in plan.sites) and len(plan.sites) == 14
    assert all(llama.get_submodule(name) is m for name, m in kept.items())
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


def test_a_preset_gives_the_same_model_every_time(llama, preset):
    method, seen = build(preset, "compression"), []
    for _ in range(2):
        plan, done = compress(llama, method, batches=batches())
        seen.append((plan, logits(llama)))
        done.undo()
    assert seen[0][0] == seen[1][0] and torch.equal(seen[0][1], seen[1][1])


def test_one_study_makes_and_applies_any_number_of_plans(llama, preset):
    method = build(preset, "compression")
    taken = study(llama, method.measure, batches=batches())
    plans = [taken.plan(type(method.budget)(Err(err))) for err in (0.6, 0.3, 0.6)]
    seen = []
    for plan in plans:
        with taken.apply(llama, plan):
            seen.append(logits(llama))
    assert plans[0] == plans[2] and torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


# ---- what the measures promise ----


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", range(1, 6))
def test_under_gram_the_predicted_error_is_that_of_the_outputs(bias, rank):
    model, x = layer(bias)
    with torch.no_grad():
        clean = x @ model[0].weight.mT
        y = model(x)
        plan, _ = compress(model, Compression(lambda s, shapes: {"0": rank}, Gram()), batches=[x[:13], x[13:]])
        error = torch.linalg.norm(model(x) - y) / torch.linalg.norm(clean)
    assert plan.sites["0"].error == pytest.approx(float(error), rel=1e-9)


@pytest.mark.parametrize("measure", [Plain(), AbsMean(), AbsMean(1.0), Gram(0.5)], ids=repr)
@pytest.mark.parametrize("rank", range(1, 6))
def test_no_other_measure_gives_better_outputs_than_gram(measure, rank):
    def error(chosen: Measure) -> float:
        model, x = layer()
        with torch.no_grad():
            y = model(x)
            compress(model, Compression(lambda s, shapes: {"0": rank}, chosen), batches=[x])
            return float(torch.linalg.norm(model(x) - y))

    assert error(Gram()) < error(measure)


@pytest.mark.parametrize("measure", [AbsMean(alpha=0.0), AbsMean(), Gram()], ids=repr)
def test_on_white_inputs_every_measure_is_plain(measure):
    x = 3 * torch.cat([torch.eye(6), -torch.eye(6)]).double()
    ops = []
    for chosen in (Plain(), measure):
        model, _ = layer()
        compress(model, Compression(lambda s, shapes: {"0": 3}, chosen), batches=[x])
        ops.append(model[0].weight)
    assert_close(ops[0], ops[1], rtol=1e-10, atol=1e-10)


def test_welore_ranks_come_from_the_weights_whatever_the_measure(llama):
    plans = []
    for measure in MEASURES.values():
        taken = study(llama, measure, batches=batches())
        plans.append(taken.plan(WeLore(Err(0.5))).ranks())
        for name, s in taken.spectra.items():
            assert_close(s, torch.linalg.svdvals(llama.get_submodule(name).weight.detach()))
    assert all(ranks == plans[0] for ranks in plans) and len(set(plans[0].values())) > 1


def test_welore_on_equal_spectra_is_uniform_svd():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(3))).double()
    s = torch.linspace(3, 1, 10).double()
    for linear in model:
        u, v = (torch.linalg.qr(rand(10, 10, seed=i)).Q for i in (1, 2))
        linear.weight.data = 7 * (u @ torch.diag(s) @ v)
    taken = study(model)
    for err in (0.3, 0.5, 0.7):
        assert taken.plan(WeLore(Err(err))).ranks() == taken.plan(Uniform(Err(err))).ranks()


# ---- what is handed in is used ----


def test_selected_sites_change_and_others_do_not(llama):
    others = {n: m for n, m in llama.named_modules() if n.endswith("_proj") and not n.endswith("v_proj")}
    plan, done = compress(llama, Compression(Uniform(Err(0.5))), select="*.v_proj")
    assert tuple(plan.sites) == tuple(done) == tuple(f"model.layers.{i}.self_attn.v_proj" for i in range(2))
    assert all(llama.get_submodule(name) is m for name, m in others.items())


def test_spectra_handed_over_are_the_ones_budgets_read(llama):
    taken = study(llama)
    assert study(llama, spectra=taken.spectra).plan(WeLore(Err(0.5))) == taken.plan(WeLore(Err(0.5)))
    flat = {name: torch.linspace(2, 1, len(s)).double() for name, s in taken.spectra.items()}
    lent = study(llama, AbsMean(), batches=batches(), spectra=flat)
    assert lent.plan(WeLore(Err(0.5))).ranks() == WeLore(Err(0.5))(
        flat, {n: (len(s), len(s)) for n, s in flat.items()}
    )


def test_track_sees_every_site_once(llama):
    seen: list[str] = []
    taken = study(llama, track=lambda names: [seen.append(name) or name for name in names])
    assert seen == list(taken.parts)


def test_the_bias_and_the_mode_stay(llama):
    model, _ = layer()
    bias = model[0].bias
    model.train()
    compress(model, Compression(Uniform(Err(0.5))))
    assert isinstance(model[0], OpLinear) and model[0].bias is bias and model[0].training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [2, 5])
def test_half_precision_is_computed_in_float32_and_cast_once(dtype, rank):
    model, _ = layer(dtype=dtype)
    single = layer(dtype=dtype)[0].float()
    for one in (model, single):
        compress(one, Compression(lambda s, shapes: {"0": rank}))
    for name, tensor in model[0].op.named_parameters():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, single[0].op.get_parameter(name).to(dtype)), name


def test_layers_that_are_read_by_their_weight_work_too():
    """`nn.MultiheadAttention` never calls its out_proj; it reads the weight."""
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval(), rand(2, 5, 8)
    twin = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    twin.load_state_dict(model.state_dict())
    plan, _ = compress(model, Compression(Uniform(Err(0.5))))
    with torch.no_grad():
        for name in plan.sites:
            twin.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
        assert_close(model(x), twin(x))


def test_fewer_tokens_than_columns_are_exact_on_these_tokens():
    model, x = layer()
    few = x[:3]
    with torch.no_grad():
        y = model(few)
        compress(model, Compression(lambda s, shapes: {"0": 3}, Gram()), batches=[few])
        assert_close(model(few), y, rtol=1e-6, atol=1e-6)


def test_the_metric_of_no_measure_is_the_frobenius_norm():
    model, _ = layer()
    w = model[0].weight.detach().clone()
    plan, _ = compress(model, Compression(lambda s, shapes: {"0": 2}))
    s = torch.linalg.svdvals(w)
    assert plan.sites["0"].error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-12)
    assert Metric().error(w, model[0].weight.detach()) == pytest.approx(plan.sites["0"].error, rel=1e-12)
