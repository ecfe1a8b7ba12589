"""Whole adapted models in training: recomputed, compiled, in half precision, and beside weights that train too."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.adapt import Adapted, adapt, trainable
from subspan.edit import edit
from subspan.methods import build
from subspan.methods.optimizers import galore
from subspan.optim import Adam, Optim, checkpoint

ARGS: dict[str, dict[str, object]] = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "pissa": {"rank": 2},
    "lora_xs": {"rank": 3},
    "vera": {"rank": 5},
    "randlora": {"rank": 3},
    "loha": {"rank": 2},
    "lokr": {"rank": 1},
    "oft": {"block": 4},
    "shira": {"rank": 1},
    "paca": {"rank": 2},
    "adalora": {"rank": 2},
}
IDS = torch.arange(2 * 8).reshape(2, 8) * 7 % 30


def llama(seed: int = 0) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=30, num_key_value_heads=1, initializer_range=0.3, **sizes)
        return LlamaForCausalLM(config)


@torch.no_grad()
def adapted(method: str, *, select: str | None = None, seed: int = 0) -> LlamaForCausalLM:
    """A frozen model with an adapter off its start."""
    model = llama(seed)
    edit(model, select, adapt(build(method, "adapter", **ARGS[method])))
    added = dict(trainable(model))
    for name, p in model.named_parameters():
        p.requires_grad_(name in added)
    draw = torch.Generator().manual_seed(seed)
    for p in added.values():
        p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return model


def loss(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(input_ids=ids, labels=ids).loss
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    loss(model.train()).backward()
    return {name: p.grad for name, p in trainable(model) if p.grad is not None}


def check_same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


# ---- recomputed, compiled, in half precision ----


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ARGS)
def test_checkpointing_computes_the_blocks_again_and_gives_the_same_bits(method, reentrant):
    plain, model = adapted(method), adapted(method)
    wanted = gradients(plain)
    assert wanted.keys() == {name for name, _ in trainable(plain)}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # nothing before the first block trains, and this kind wants an input that does
        model.enable_input_require_grads()
    calls = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    check_same_bits(gradients(model), wanted)
    assert len(calls) == 2


@pytest.mark.parametrize("method", ARGS)
def test_autocast_multiplies_in_half_and_trains_what_is_kept_in_full(method):
    torch.manual_seed(0)
    base = nn.Linear(24, 16)
    model = adapt(build(method, "adapter", **ARGS[method]))("site", base)
    x, probe = torch.randn(40, 24), torch.randn(40, 16)
    added = dict(trainable(model))
    for p in added.values():
        p.data.add_(0.1 * torch.randn(p.shape))
    exact = model(x)
    size = float(exact.detach().abs().max())
    wanted = torch.autograd.grad((exact * probe).sum(), list(added.values()))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x)
    found = torch.autograd.grad((rounded.float() * probe).sum(), list(added.values()))
    assert rounded.dtype == torch.bfloat16
    assert_close(rounded.float(), exact, rtol=0, atol=2**-6 * size)
    assert not torch.equal(rounded.float(), exact)
    for one, two in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert float((one - two).norm()) <= 2**-5 * float(two.norm())


@pytest.mark.full
@pytest.mark.parametrize("method", ["lora", "dora", "lokr"])
def test_a_whole_model_compiles_into_one_graph(method):
    plain, model = adapted(method), adapted(method)
    wanted, wanted_loss = gradients(plain), loss(plain)
    torch.compiler.reset()
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = whole(input_ids=IDS, labels=IDS, use_cache=False).loss
    assert_close(found, wanted_loss, rtol=1e-5, atol=0)
    found.backward()
    for name, p in trainable(model):
        assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-6)


# ---- beside weights that train ----


MLP = "*.mlp.*"
RATES = {"rule": 1e-2, "other": 3e-3}


def parts(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The weights of the mlp, and what the adapters on attention train."""
    mlp = {name: p for name, p in model.named_parameters() if ".mlp." in name}
    return mlp, dict(trainable(model))


def mixed(method: str, seed: int = 0) -> tuple[nn.Module, Optim]:
    """GaLore on the weights of the mlp and AdamW on the adapters of attention, in one optimizer."""
    model = adapted(method, select="*.self_attn.*", seed=seed)
    mlp, added = parts(model)
    for p in mlp.values():
        p.requires_grad_()
    rule = galore(rank=3, every=2)
    opt = Optim((mlp | added).items(), rule, lr=0.0, weight_decay=0.1, where=MLP, other=Adam())
    for group in opt.param_groups:
        group["lr"] = RATES[group["role"]]
    return model, opt


def train(model: nn.Module, opt: Optim, steps: range) -> None:
    for t in steps:
        opt.zero_grad()
        loss(model, torch.randint(0, 30, (2, 8), generator=torch.Generator().manual_seed(t))).backward()
        opt.step()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_each_part_moves_as_it_would_alone(method):
    together, opt = mixed(method)
    before = {name: p.clone() for name, p in together.named_parameters()}
    train(together, opt, range(1))
    for part, role in enumerate(("rule", "other")):
        model, _ = mixed(method)
        mine, frozen = parts(model)[part], parts(model)[1 - part]
        for p in frozen.values():
            p.requires_grad_(False)
        rule = galore(rank=3, every=2) if role == "rule" else Adam()
        where = {"where": MLP} if role == "rule" else {"where": functools.partial(is_of, mine)}
        train(model, Optim(mine.items(), rule, lr=RATES[role], weight_decay=0.1, **where), range(1))
        now, alone = dict(together.named_parameters()), dict(model.named_parameters())
        check_same_bits({name: now[name] for name in mine}, {name: alone[name] for name in mine})
        assert all(not torch.equal(now[name], before[name]) for name in mine)
        assert all(torch.equal(alone[name], before[name]) for name in before.keys() - mine.keys())
    moving = parts(together)[0] | parts(together)[1]
    assert all(torch.equal(p, before[name]) for name, p in together.named_parameters() if name not in moving)


def is_of(some: dict[str, nn.Parameter], name: str, _: Tensor) -> bool:
    return name in some


def test_the_state_of_each_part_is_its_own():
    model, opt = mixed("lora")
    train(model, opt, range(3))
    mlp, added = parts(model)
    kinds = {
        role: {key for p in some.values() for key in opt.state[p]} for role, some in (("m", mlp), ("a", added))
    }
    assert "frame.q" in kinds["m"] and not any("frame" in key for key in kinds["a"])
    assert all(isinstance(model.get_submodule(f"model.layers.{i}.self_attn.q_proj"), Adapted) for i in range(2))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_run_of_both_goes_on_bit_for_bit(method, tmp_path):
    (straight, whole), (first, opt), (second, resumed) = mixed(method), mixed(method), mixed(method, seed=1)
    train(straight, whole, range(7))
    train(first, opt, range(3))  # between two refreshes
    checkpoint.save(tmp_path, first, opt)
    with torch.no_grad():
        second(input_ids=IDS)  # whatever is remembered of the other weights
    checkpoint.load(tmp_path, second, resumed)
    check_same_bits(first.state_dict(), second.state_dict())
    train(second, resumed, range(3, 7))
    check_same_bits(straight.state_dict(), second.state_dict())
    check_same_bits(checkpoint.flat(whole), checkpoint.flat(resumed))
    assert [group["lr"] for group in resumed.param_groups] == [RATES["rule"], RATES["other"]]
