"""Models of five shapes: nothing removed is nothing changed, a cut is a truncation, whatever the layers are."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from subspan import site
from subspan.budget import Err, Ratio, Uniform, WeLore
from subspan.compress import Calibration, Compression, OneShot, compress, study
from subspan.edit import matrices, sites
from subspan.importance import Outliers, Sensitivity
from subspan.metric import Covariance, Fisher, Gram, Measure, collect
from subspan.walk import Blockwise
from subspan.watch import Watch

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
TEXT = {**WIDTH, "vocab_size": 30, "intermediate_size": 24, "max_position_embeddings": 16}
GQA = {**TEXT, "num_key_value_heads": 2}
NO_DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def mixtral() -> MixtralForCausalLM:
    model = MixtralForCausalLM(MixtralConfig(**GQA, num_local_experts=3, num_experts_per_tok=2))
    model.set_experts_implementation("eager")  # the others have no float64
    return model


def gpt2() -> GPT2LMHeadModel:
    sizes = {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3))


def vit() -> ViTForImageClassification:
    sizes = {**WIDTH, **NO_DROP, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GQA, attention_bias=True, tie_word_embeddings=True)),
    "gpt2": gpt2,
    "bert": lambda: BertForMaskedLM(BertConfig(**TEXT, **NO_DROP)),
    "vit": vit,
    "mixtral": mixtral,
}
# The layers of one block that are taken unasked.
BLOCKS = {
    "llama": ["model.layers", 7],
    "gpt2": ["transformer.h", 4],
    "bert": ["bert.encoder.layer", 6],
    "vit": ["vit.layers", 6],
    "mixtral": ["model.layers", 4 + 3 * 2],
}
# Layers that are taken only by name.
MORE = {
    "llama": "model.layers.1.*",
    "gpt2": "transformer.h.*|transformer.wpe",
    "bert": "bert.encoder.*|*.position_embeddings|cls.predictions.transform.dense",
    "vit": "vit.*|classifier",
    "mixtral": "model.*|lm_head",
}


def born(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        for key, p in model.named_parameters():
            if key.endswith("bias"):
                nn.init.normal_(p)
    return model.double()


@pytest.fixture(params=MODELS)
def row(request) -> tuple[str, Any]:
    return request.param, born(request.param)


def batches(name: str) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    if name == "vit":
        images = torch.randn(3, 2, 3, 8, 8, dtype=torch.float64, generator=draw)
        return [{"pixel_values": x, "labels": torch.tensor([1, 4])} for x in images]
    ids = torch.randint(30, (3, 2, 9), generator=draw)
    cache = {} if name in ("bert", "vit") else {"use_cache": False}
    return [{"input_ids": x, "labels": x, **cache} for x in ids]


@torch.no_grad()
def logits(name: str, model: Any) -> Tensor:
    return model(**batches(name)[0]).logits


def at(rank: int) -> Callable[..., dict[str, int]]:
    return lambda spectra, shapes: {name: min(rank, *shape) for name, shape in shapes.items()}


def test_the_layers_of_the_blocks_are_taken_unasked(row):
    name, model = row
    stack, count = BLOCKS[name]
    found = sites(model)
    assert len(found) == 2 * count
    assert all(key.startswith(f"{stack}.") for key in found)
    own = {id(p) for key, p in model.named_parameters() if key.startswith(f"{stack}.") and p.ndim > 1}
    assert {id(site.parameter(m)) for m in found.values()} == own - {
        id(p)
        for key, p in model.named_parameters()
        if key.endswith("mlp.gate.weight")  # no layer of its own
    }


@pytest.mark.parametrize("more", [False, True])
def test_full_rank_factors_are_the_model(row, more):
    name, model = row
    before, taken = logits(name, model), study(model, select=MORE[name] if more else None)
    plan = taken.plan(Uniform(Err(0.0)))
    rows = {key: replace(site, form="lowrank") for key, site in plan.sites.items()}
    with taken.apply(model, replace(plan, sites=rows)) as done:
        assert len(list(done)) > 0 and not set(rows) & set(matrices(model))
        assert_close(logits(name, model), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(logits(name, model), before)


@pytest.mark.parametrize("rank", [3, 12])
@pytest.mark.parametrize("more", [False, True])
def test_a_cut_model_is_the_dense_one_with_truncated_weights(row, more, rank):
    name, model = row
    select, wanted = MORE[name] if more else None, copy.deepcopy(model)
    for module in sites(wanted, select).values():
        with torch.no_grad():
            u, s, v = torch.linalg.svd(site.matrix(module), full_matrices=False)
            site.matrix(module).copy_((u[:, :rank] * s[:rank]) @ v[:rank])
    taken = study(model, select=select)
    plan = taken.plan(at(rank))
    before = logits(name, model)
    with taken.apply(model, plan):
        assert not torch.equal(logits(name, model), before)
        assert_close(logits(name, model), logits(name, wanted), rtol=1e-12, atol=1e-12)
        assert plan.bytes[1] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert plan.bytes[0] == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("walk", [None, Blockwise()], ids=["one shot", "blockwise"])
@pytest.mark.parametrize("measure", [Gram(), Covariance()], ids=repr)
def test_errors_on_real_inputs_are_as_predicted(row, measure, walk):
    name, model = row
    if name == "mixtral" and isinstance(measure, Covariance):
        measure = Gram(0.01)  # an expert has no bias to take up a mean
    data, dense = batches(name), copy.deepcopy(model)
    method = Compression(Uniform(Ratio(0.5)), measure)
    means = collect(model, data, measure, sites(model))
    plan, _ = compress(model, method, batches=data, **({} if walk is None else {"walk": walk}))
    changed = [key for key, r in plan.sites.items() if r.form != "keep"]
    # Behind the first block a walk sees other inputs.
    for key in changed if walk is None else changed[:3]:
        new, old = model.get_submodule(key), matrices(dense)[key]
        error = measure.metric(means[key]).error(site.matrix(old).detach(), new.op.dense().detach())
        assert error == pytest.approx(plan.sites[key].error, abs=1e-6), key
        assert 0 <= plan.sites[key].error < 1


@pytest.mark.parametrize("measure", [Fisher()], ids=repr)
def test_gradients_reach_every_site(row, measure: Measure):
    name, model = row
    data = batches(name)
    found = sites(model)
    means = collect(model, data, measure, found)
    model.zero_grad()
    wanted: dict[str, Any] = dict.fromkeys(found, 0.0)
    for batch in data:
        model(**batch).loss.backward()
        for key, module in found.items():
            grad = site.of(module).view(module, site.parameter(module).grad)
            wanted[key] = wanted[key] + grad.square().sum(0)
        model.zero_grad()
    for key, total in wanted.items():
        assert_close(means[key], total / len(data), rtol=1e-9, atol=1e-12)


def test_budgets_that_ask_how_much_sites_matter_see_every_kind(row):
    name, model = row
    data, found = batches(name), sites(model)
    called = {key: m for key, m in found.items() if site.of(m).called}
    for importance, these in ((Outliers(), found), (Sensitivity(), called)):
        told = importance(model, these, batches=data, forward=lambda m, b: m(**b), loss=lambda m, b: m(**b).loss)
        assert set(told) == set(these) and all(0 <= value < float("inf") for value in told.values())
        assert len(set(told.values())) > 1
    plan, _ = compress(model, Compression(WeLore(Err(0.4))))
    assert plan.err == pytest.approx(0.4, abs=0.03)


# ---- experts ----


def literal(model: Any, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Second moments of what reaches each expert, by a forward pass of the experts written out."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(at: str) -> Callable[..., None]:
        def see(module: Any, args: tuple[Tensor, ...]) -> None:
            x, chosen, _ = args
            for e in range(module.num_experts):
                mine = x[(chosen == e).any(-1)]
                gate, up = (mine @ module.gate_up_proj[e].mT).chunk(2, dim=-1)
                for key, rows in (("gate_up_proj", mine), ("down_proj", module.act_fn(gate) * up)):
                    name = f"{at}.{e}.{key}"
                    sums[name] = sums.get(name, 0) + rows.mT @ rows
                    counts[name] = counts.get(name, 0) + len(rows)

        return see

    owners = {key: m for key, m in model.named_modules() if key.endswith("experts")}
    hooks = [m.register_forward_pre_hook(watch(key)) for key, m in owners.items()]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: total / counts[name] for name, total in sums.items()}


@pytest.mark.parametrize(("kernels", "dtype"), [("eager", torch.float64), ("grouped_mm", torch.float32)])
def test_what_reaches_an_expert_is_seen_in_its_products(kernels, dtype):
    model, data = born("mixtral").to(dtype), batches("mixtral")
    model.set_experts_implementation(kernels)
    found = collect(model, data, Gram(), sites(model, "*.experts.*"))
    wanted = literal(model, data)
    assert found.keys() == wanted.keys() and len(found) == 12
    tight = 1e-10 if dtype == torch.float64 else 1e-3
    for key, moment in wanted.items():
        assert_close(found[key], moment, rtol=tight, atol=tight)


def test_experts_that_are_copied_before_they_are_multiplied_are_not_seen():
    model = born("mixtral")
    model.set_experts_implementation("batched_mm")
    with pytest.raises(ValueError, match=r"no calibration batch reached .*experts\.0\.gate_up_proj"):
        compress(model, Compression(Uniform(Err(0.5)), Gram()), batches=batches("mixtral"))


def test_a_watch_splits_sorted_tokens_at_their_ends():
    seen: dict[str, Tensor] = {}
    watch, x = Watch({}, seen.__setitem__), torch.arange(10.0).reshape(5, 2)
    watch.split(x, {0: "a", 1: "b", 2: "c"}, torch.tensor([2, 2, 5]))
    assert seen.keys() == {"a", "c"} and torch.equal(seen["a"], x[:2]) and torch.equal(seen["c"], x[2:])


@pytest.mark.parametrize("walk", [OneShot(), Blockwise()], ids=["one shot", "blockwise"])
def test_an_expert_has_no_place_for_a_bias(walk):
    model, data = born("mixtral"), batches("mixtral")
    before = logits("mixtral", model)
    gains = r"experts\.0\.gate_up_proj has no place for the bias.*leave it out with '!model.*metric gram"
    with pytest.raises(ValueError, match=gains):
        compress(model, Compression(Uniform(Err(0.5)), Covariance()), batches=data, walk=walk)
    plan = study(model).plan(Uniform(Err(0.5)))
    with pytest.raises(ValueError, match=gains):
        walk.follow(model, plan, Covariance(), data=Calibration(data), track=iter)
    assert torch.equal(logits("mixtral", model), before)


def test_the_outputs_of_an_expert_are_not_seen():
    model, data = born("mixtral"), batches("mixtral")
    with pytest.raises(
        ValueError, match=r"experts\.0\.gate_up_proj is one expert.*outputs.*choose another budget"
    ):
        Sensitivity()(
            model, sites(model), batches=data, forward=lambda m, b: m(**b), loss=lambda m, b: m(**b).loss
        )
    found = {"x": nn.Linear(2, 2)}
    site.require_calls(found, "anything")


def test_experts_in_one_grouped_product_see_the_cut_weights_too():
    """The kernels that transformers takes by default, in float32."""
    model, data = born("mixtral").float(), batches("mixtral")[0]
    with torch.no_grad():
        model(**data)
        wanted = {}
        for kernels in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(kernels)
            with compress(model, Compression(Uniform(Ratio(0.5))))[1]:
                wanted[kernels] = model(**data).logits
    assert_close(wanted["batched_mm"], wanted["eager"], rtol=1e-4, atol=1e-4)
    assert_close(wanted["grouped_mm"], wanted["eager"], rtol=1e-4, atol=1e-4)
