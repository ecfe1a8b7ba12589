"""Adapters on experts of 3-D parameters: the model runs on the joined matrices, and only the adapters learn."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import MixtralConfig, MixtralForCausalLM

from subspan import io, site
from subspan.adapt import Adapted, Add, FromData, adapt, merge, prepare, trainable
from subspan.compress import Calibration
from subspan.edit import edit, matrices, sites
from subspan.hosts import jobs
from subspan.hosts.folders import fingerprint, put_adapter, save_adapter, unsliced
from subspan.hosts.lessons import adaptable, learning
from subspan.hosts.peft_change import as_lora
from subspan.hosts.peft_read import read_adapter
from subspan.methods import build
from subspan.ops import LowRank, OpLinear
from subspan.ops.experts import Slice, Stacked, expert_layers, form, stacked, whole

IDS = torch.arange(2 * 8).reshape(2, 8) * 7 % 30
EXPERTS = "*.experts.*"


def mixtral(dtype: torch.dtype = torch.float64) -> Any:
    config = MixtralConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3, vocab_size=30,
        intermediate_size=12, max_position_embeddings=16, num_key_value_heads=2, num_local_experts=3,
        num_experts_per_tok=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(config).eval().to(dtype)
    model.set_experts_implementation("eager")  # the others have no float64
    return model


class Turned(nn.Module):
    """Experts whose parameter is (experts, in, out), each of which takes every input."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = 3, True
        self.up = nn.Parameter(
            torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.einsum("bn,enm->ebm", x, self.up)).sum(0)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def put(model: Any, method: str = "lora", select: str = EXPERTS, **args: Any) -> Any:
    """The edit that puts an adapter on the chosen sites."""
    found = sites(model, select)
    made = prepare(build(method, "adapter", **args), model, found, Calibration([IDS], jobs.forward, jobs.loss))
    return edit(model, list(found), adapt(made))


def moved(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in trainable(model):
            p.add_(0.3 * torch.randn(p.shape, generator=generator).to(p))
    return model


def experts(model: Any) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, Adapted) and ".experts." in name]


def merged_by_hand(model: Any) -> Any:
    """The dense model whose 3-D parameters hold what the adapters make of each slice."""
    dense, found = mixtral(next(model.parameters()).dtype), dict(model.named_modules())
    with torch.no_grad():
        for name, expert in matrices(dense).items():
            if isinstance(found.get(name), Adapted):
                site.matrix(expert).copy_(found[name].matrix)
    return dense


STATIC = {"lora": {"rank": 2}, "dora": {"rank": 2}, "pissa": {"rank": 2}, "vera": {"rank": 4}, "oft": {"block": 4},
          "shira": {"rank": 1}, "eva": {"rank": 2}, "lora_ga": {"rank": 2},
          "mos": {"rank": 2, "parts": 2}}  # fmt: skip


@pytest.mark.parametrize("method", STATIC)
def test_the_model_runs_on_the_joined_matrices_and_starts_at_its_own(method):
    model, before = mixtral(), logits(mixtral())
    put(model, method, **STATIC[method])
    assert len(experts(model)) == 2 * 2 * 3
    assert_close(logits(model), before, rtol=0, atol=1e-10 if method in ("pissa", "dora", "lora_ga") else 1e-13)
    moved(model)
    assert_close(logits(model), logits(merged_by_hand(model)), rtol=0, atol=1e-11)
    assert (logits(model) - before).abs().max() > 1e-2


def test_an_expert_that_is_read_in_full_precision_starts_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        model, before = mixtral(dtype), logits(mixtral(dtype))
        put(model, rank=2)
        assert torch.equal(logits(model), before)
        assert {p.dtype for _, p in trainable(model)} == {torch.float32}


def test_gradients_reach_the_adapters_alone_and_are_those_of_the_stack():
    model = mixtral()
    put(model, rank=2)
    moved(model)
    for p in model.parameters():
        p.requires_grad_(False)
    for _, p in (named := [(n, p) for n, p in model.named_parameters() if ".adapters." in n]):
        p.requires_grad_(True)
    dense = merged_by_hand(model)
    for one in (model, dense):
        one(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapters." not in n)
    for name, expert in matrices(dense).items():
        adapted = dict(model.named_modules()).get(name)
        if isinstance(adapted, Adapted):
            g = site.of(expert).view(expert, site.parameter(expert).grad)
            op, scale = adapted.slot("default").op, adapted.slot("default").join.scale
            assert_close(op.u.grad, scale * g @ op.v.T, rtol=1e-9, atol=1e-12)
            assert_close(op.v.grad, scale * op.u.T @ g, rtol=1e-9, atol=1e-12)
    assert len(named) == 2 * len(experts(model)) == len(trainable(model))


@pytest.mark.parametrize("kernels", ["grouped_mm", "batched_mm"])
def test_every_kernel_of_the_host_reads_the_joined_stack(kernels):
    model = mixtral(torch.float32)
    put(model, rank=2)
    before = logits(moved(model))
    model.set_experts_implementation(kernels)
    assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_checkpointed_layers_form_the_stack_again_and_get_the_same_gradients():
    found = []
    for again in (False, True):
        model = mixtral()
        put(model, rank=2)
        moved(model).train()
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad for _, p in trainable(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][0].norm() > 0


def test_undo_puts_the_very_parameter_back_and_merging_makes_it_anew():
    model = mixtral()
    owner = model.model.layers[0].mlp.experts
    parameter, state = owner.down_proj, {k: v.clone() for k, v in model.state_dict().items()}
    done = put(model, rank=2)
    held = model.model.layers[0].mlp.experts
    assert isinstance(held, Stacked) and "down_proj" not in dict(held.named_parameters())
    # no copy of the weights: a slice lies where it was
    assert held.get_submodule("1.down_proj").base.weight.data_ptr() == parameter[1].data_ptr()
    moved(model)
    trained = logits(model)
    folded = copy.deepcopy(model)
    assert jobs.fold(folded) == 12
    assert type(folded.model.layers[0].mlp.experts) is type(owner)
    assert sorted(folded.state_dict()) == sorted(state)
    assert not any(isinstance(m, Stacked) for m in folded.modules())
    assert_close(logits(folded), trained, rtol=0, atol=1e-11)
    done.undo()
    assert model.model.layers[0].mlp.experts is owner and owner.down_proj is parameter
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_some_experts_may_carry_an_adapter_and_others_follow_later():
    model, before = mixtral(), logits(mixtral())
    put(model, select="*.experts.1.down_proj", rank=2)
    owner = model.model.layers[1].mlp.experts
    kinds = [type(layer) for layer in expert_layers(owner, "down_proj")]
    assert kinds == [Slice, Adapted, Slice] and isinstance(owner.gate_up_proj, nn.Parameter)
    assert torch.equal(logits(model), before)
    later = ["model.layers.1.mlp.experts.0.down_proj", "model.layers.1.mlp.experts.2.gate_up_proj"]
    edit(model, later, adapt(build("lora", "adapter", rank=1)))
    edit(model, later[:1], adapt(build("dora", "adapter", rank=1), "second"))
    assert_close(logits(moved(model)), logits(merged_by_hand(model)), rtol=0, atol=1e-11)
    assert len(experts(model)) == 4
    jobs.fold(model)
    assert sorted(model.state_dict()) == sorted(mixtral().state_dict())


def test_a_stack_that_is_kept_turned_is_read_turned():
    net, x = nn.ModuleDict({"experts": Turned()}), torch.ones(2, 5, dtype=torch.float64)
    owner, before = net["experts"], net["experts"](x)
    edit(net, ["experts.0.up", "experts.2.up"], adapt(build("lora", "adapter", rank=2)))
    assert torch.equal(net["experts"](x), before)
    moved(net)
    stack = net["experts"].up
    adapted = net.get_submodule("experts.2.up")
    assert stack.shape == (3, 5, 4) and torch.equal(stack[2], adapted.matrix.T)
    assert torch.equal(stack[1], owner.up[1]) and not torch.allclose(stack[2], owner.up[2])
    assert_close(net["experts"](x), torch.tanh(torch.einsum("bn,enm->ebm", x, stack)).sum(0))
    jobs.fold(net)
    assert type(net["experts"]) is Turned and torch.equal(net["experts"].up, stack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "mos"])
def test_a_folder_of_experts_adapters_comes_back_bit_for_bit(method, dtype, tmp_path):
    model, args = mixtral(dtype), STATIC[method]
    put(model, method, "*.experts.*|*.q_proj", **args)
    moved(model)
    assert fingerprint(model) == fingerprint(mixtral(dtype))
    save_adapter(tmp_path / "a", model, method=method, args=args, source="none")
    about, fresh = io.read_about(tmp_path / "a"), mixtral(dtype)
    assert len(about["sites"]) == 12 + 2
    put_adapter(fresh, tmp_path / "a", about)
    assert torch.equal(logits(fresh), logits(model))
    other = mixtral(dtype)
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj[1, 0, 0] += 1
    with pytest.raises(ValueError, match="trained on other weights"):
        put_adapter(other, tmp_path / "a", about)


def test_experts_are_no_lora_of_peft(tmp_path):
    model = mixtral()
    put(model, select="*.experts.*|*.q_proj", rank=2)
    save_adapter(tmp_path / "a", model, method="lora", args={"rank": 2}, source="none")
    with pytest.raises(
        ValueError, match=r"adapts 12 experts of 3-D parameters \(model\.layers\.0.*merge it instead"
    ):
        as_lora(read_adapter(tmp_path / "a"), lambda name: torch.empty(0))


def test_a_state_with_experts_apart_has_the_names_of_the_whole():
    net = nn.ModuleDict({"experts": Turned()})
    state = {k: v.clone() for k, v in net.state_dict().items()}
    put_names = ["experts.1.up"]
    edit(net, put_names, adapt(build("lora", "adapter", rank=1)))
    apart = {f"experts.{i}.up.weight": state["experts.up"][i].T for i in range(3)}
    found = unsliced(net, apart)
    assert list(found) == ["experts.up"] and torch.equal(torch.stack(found["experts.up"]), state["experts.up"])


def test_finetuning_takes_experts_where_they_are_named():
    model = mixtral()
    plain = adaptable(model)
    assert plain == [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n]
    named = adaptable(model, "*.experts.*.down_proj")
    assert named == [f"model.layers.{i}.mlp.experts.{e}.down_proj" for i in range(2) for e in range(3)]
    learns = learning(model, "lora", steps=1, select="*.experts.*.down_proj", rank=2)
    assert [n.partition(".adapters.")[0] for n, _ in learns.named[::2]] == named
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in learns.named}


@pytest.mark.parametrize("method", ["moe_lora"])
def test_a_gate_is_refused_on_an_expert_and_the_model_left_alone(method):
    model, before = mixtral(), logits(mixtral())
    with pytest.raises(
        ValueError, match=r"experts\.0\.\w+: adapter 'default': Routed.*an expert of a 3-D parameter"
    ):
        put(model, method, rank=2, experts=2, top=1)
    assert torch.equal(logits(model), before) and not experts(model)


def test_only_a_layer_with_the_experts_matrix_and_no_bias_takes_its_place():
    model = mixtral()
    name = "model.layers.0.mlp.experts.1.down_proj"
    for wrong in (nn.Linear(12, 16), nn.Linear(16, 12, bias=False), nn.Identity()):
        with pytest.raises(
            ValueError, match=r"only a layer with a weight of \(16, 12\) and without a bias.*leave it"
        ):
            edit(model, [name], lambda n, old, wrong=wrong: wrong)
    other = nn.Linear(12, 16, bias=False, dtype=torch.float64)
    with edit(model, [name], lambda n, old: other):
        owner = model.model.layers[0].mlp.experts
        assert torch.equal(form(owner, "down_proj")[1], other.weight) and type(whole(owner)) is not type(owner)
    ops = [OpLinear(LowRank(torch.ones(16, 1).double(), torch.ones(1, 12).double())) for _ in range(3)]
    mixed = stacked(model.model.layers[0].mlp.experts, {"down_proj": ops})
    assert whole(mixed) is mixed and whole(model) is model


def test_an_adapted_slice_merges_to_a_linear_layer_and_data_starts_see_experts():
    model = mixtral()
    put(model, rank=2)
    adapted = moved(model).model.layers[0].mlp.experts.get_submodule("0.down_proj")
    assert type(adapted.base) is Slice and not adapted.base.weight.requires_grad
    made = merge(adapted)
    assert type(made) is nn.Linear and torch.equal(made.weight, adapted.matrix)
    assert type(adapted.slot("default").join) is Add
    assert isinstance(build("eva", "adapter").op, FromData)
    assert Slice(torch.ones(2, 3), trains=True).weight.requires_grad
