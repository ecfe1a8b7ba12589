"""Healing trains the low-rank parts and nothing else; LoRA stands on a compressed model without a trace."""

from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.adapt import Adapted, FromData, adapt, trainable
from subspan.compress import study
from subspan.distill import Distill
from subspan.edit import edit
from subspan.heal import Factors, only
from subspan.hosts.training import draw, state_bytes, train
from subspan.methods import build, find, methods
from subspan.ops import Dense, LowRank, OpLinear
from subspan.optim import Optim

IDS = torch.arange(2 * 12).reshape(2, 12) * 37 % 60
# Low-rank, above break-even so dense, full so kept.
RANKS = {"q_proj": 5, "k_proj": 3, "v_proj": 8, "o_proj": 16, "gate_proj": 3, "up_proj": 14, "down_proj": 24}


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    sizes = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).to(dtype).eval()


@pytest.fixture
def model() -> LlamaForCausalLM:
    made = llama()

    def ranks(_: Any, shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
        return {name: min(*shape, RANKS[name.rpartition(".")[2]]) for name, shape in shapes.items()}

    taken = study(made)
    taken.apply(made, taken.plan(ranks))
    return made


def factors(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Low-rank op -> (rank, m, n)."""
    return {n: (op.rank, *op.shape) for n, op in model.named_modules() if isinstance(op, LowRank)}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    after = model.state_dict()
    assert set(after) == set(before)
    return {name for name in before if not torch.equal(after[name], before[name])}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def heal(model: nn.Module, named: list[tuple[str, nn.Parameter]], steps: int = 3) -> Optim:
    optimizer = Optim(named, build("adamw"), lr=1e-2, weight_decay=0.1)
    train(model, draw(IDS.flatten(), length=12, batch=2, steps=steps), optimizer, steps=steps)
    return optimizer


def test_exactly_the_factors_of_low_rank_sites_want_gradients(model):
    kinds = {type(m.op) for m in model.modules() if isinstance(m, OpLinear)}
    assert kinds == {LowRank, Dense}
    wanted = {f"{name}.{factor}" for name in factors(model) for factor in "uv"}
    assert len(wanted) == 2 * 2 * 3
    named = Factors().choose(model)
    assert {name for name, _ in named} == wanted
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert all(dict(model.named_parameters())[name] is p for name, p in named)
    assert [name for name, _ in named] == [name for name, _ in model.named_parameters() if name in wanted]


def test_three_steps_move_the_factors_and_no_other_bit(model):
    before = snapshot(model)
    named = Factors().choose(model)
    heal(model, named)
    assert changed(model, before) == {name for name, _ in named}


def test_norms_add_the_norm_weights_and_no_more(model):
    norms = {name for name, m in model.named_modules() if type(m).__name__ == "LlamaRMSNorm"}
    assert len(norms) == 5
    before = snapshot(model)
    named = Factors(norms=True).choose(model)
    assert {n for n, _ in named} == {f"{n}.{f}" for n in factors(model) for f in "uv"} | {
        f"{name}.weight" for name in norms
    }
    heal(model, named)
    assert changed(model, before) == {name for name, _ in named}


def test_the_rest_is_all_there_is_and_tied_tensors_count_once(model):
    model.lm_head.weight = model.model.embed_tokens.weight
    before = snapshot(model)
    named = build("full").choose(model)
    assert build("full") == Factors(rest=True)
    assert [id(p) for _, p in named] == [id(p) for p in model.parameters()]
    assert all(p.requires_grad for p in model.parameters())
    optimizer = heal(model, named)
    assert changed(model, before) == set(before)
    numbers = sum(p.numel() for p in model.parameters())
    assert state_bytes(optimizer) == 8 * 2 * numbers + 8 * len(named)
    with pytest.raises(ValueError, match="no low-rank layer to train; compress it first"):
        build("full").choose(llama())


def test_what_learns_does_not_depend_on_the_loss(model):
    for terms in (None, Distill()):
        names = [name for name, _ in Factors(loss=terms).choose(model)]
        assert names == [name for name, p in model.named_parameters() if p.requires_grad]
        assert names == [name for name, _ in Factors().choose(model)]


@pytest.mark.parametrize("refresh", [1, 2])
def test_galore_on_the_factors_moves_only_them_and_keeps_less_than_adam(model, refresh):
    before = snapshot(model)
    named = Factors().choose(model)
    rule = build("galore", rank=2, every=refresh)
    optimizer = Optim(named, rule, lr=1e-2)
    train(model, draw(IDS.flatten(), length=12, batch=2, steps=3), optimizer, steps=3)
    assert changed(model, before) == {name for name, _ in named}
    assert {id(p) for p in optimizer.state} == {id(p) for _, p in named}
    adam = sum(2 * 8 * p.numel() for _, p in named)
    assert state_bytes(optimizer) < adam


def test_a_bias_under_a_norm_like_name_stays_frozen(model):
    model.model.norm.bias = nn.Parameter(torch.zeros(24, dtype=torch.float64))
    assert "model.norm.bias" not in {name for name, _ in Factors(norms=True).choose(model)}


def test_choosing_again_takes_back_what_was_chosen_before(model):
    Factors(norms=True).choose(model)
    named = Factors().choose(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in named}
    assert only(model, set()) == [] and not any(p.requires_grad for p in model.parameters())


def test_adam_keeps_two_numbers_for_each_number_of_the_factors(model):
    named = Factors().choose(model)
    optimizer = heal(model, named)
    state = [s for p in optimizer.state for s in [optimizer.state[p]]]
    moments = [t for s in state for key, t in s.items() if key != "step"]
    expected = 2 * sum(rank * (m + n) for rank, m, n in factors(model).values())
    assert sum(t.numel() for t in moments) == expected
    assert len(state) == len(named) and all(s["step"].numel() == 1 for s in state)
    counters = sum(s["step"].element_size() for s in state)
    assert state_bytes(optimizer) == 8 * expected + counters


@pytest.mark.parametrize("norms", [False, True])
def test_the_published_preset_is_this(model, norms):
    assert build("welore_peft", norms=norms) == Factors(norms=norms)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="LlamaForCausalLM has no low-rank layer to train; compress it first"):
        build("welore_peft", norms=norms).choose(plain := llama())
    assert all(p.requires_grad for p in plain.parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


def test_the_factors_of_an_adapter_are_not_low_rank_layers(model):
    plain = llama()
    edit(plain, None, adapt(build("lora", rank=2)))
    with pytest.raises(ValueError, match="no low-rank layer"):
        Factors().choose(plain)
    own = {f"{name}.{factor}" for name in factors(model) for factor in "uv"}
    edit(model, sites(model), adapt(build("lora", rank=2)))
    chosen = {name.replace(".base.op.", ".op.") for name, _ in Factors().choose(model)}
    assert chosen == own


# ---- LoRA on a compressed model


def sites(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if "layers." in n and isinstance(m, nn.Linear | OpLinear)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["lora", "rslora", "dora"])
def test_an_adapter_that_starts_at_zero_changes_no_bit_and_undo_gives_the_objects_back(model, preset, dtype):
    model.to(dtype)
    before, modules, flags = logits(model), dict(model.named_modules()), requirements(model)
    done = edit(model, sites(model), adapt(build(preset, "adapter", rank=2)))
    assert sum(isinstance(m, Adapted) for m in model.modules()) == 14
    assert torch.equal(logits(model), before)
    done.undo()
    assert dict(model.named_modules()) == modules and requirements(model) == flags
    assert torch.equal(logits(model), before)


def requirements(model: nn.Module) -> dict[str, tuple[int, bool]]:
    return {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "preset", [name for name, m in methods("adapter").items() if not isinstance(m.build().op, FromData)]
)
def test_training_an_adapter_leaves_the_compressed_model_bit_for_bit(model, preset):
    whole = snapshot(model)
    healing = Factors().choose(model)
    takes = signature(find(preset).build).parameters
    small = {name: 2 for name in ("rank", "block") if name in takes}
    with edit(model, sites(model), adapt(build(preset, "adapter", **small))):
        before = snapshot(model)
        named = trainable(model)
        heal(model, named)
        assert changed(model, before) == {name for name, _ in named}
    assert changed(model, whole) == set()
    assert all(p.requires_grad for _, p in healing)


def test_under_an_adapter_the_factors_get_no_gradient_even_if_they_were_chosen(model):
    named = Factors().choose(model)
    edit(model, sites(model), adapt(build("lora", rank=2)))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is None for _, p in named)
    assert all(p.grad is not None for _, p in trainable(model))
