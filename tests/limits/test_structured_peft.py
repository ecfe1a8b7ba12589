"""The same tensors in peft and here give the same outputs; where peft computes another thing, that is shown."""

from importlib import import_module

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan.adapt import Adapted, Adapter, adapt
from subspan.adapt.starts import near_factor
from subspan.methods.adapters import loha, lokr, oft, randlora, shira, vera
from subspan.ops import Dense, Entries, LowRank, Product

peft = pytest.importorskip("peft")
M, N = 24, 18


class Two(nn.Module):
    """Two linear layers, tall and wide."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tall, self.wide = nn.Linear(N, M), nn.Linear(M, N)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(torch.tanh(self.tall(x)))


def theirs(config: object) -> nn.Module:
    """Peft's model, its trained numbers moved."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(Two(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def ours(adapter: Adapter) -> dict[str, Adapted]:
    base, make = Two(), adapt(adapter)
    return {name: make(name, getattr(base, name)) for name in ("tall", "wide")}


def check_equal(model: nn.Module, mine: dict[str, Adapted], tolerance: float = 1e-6) -> None:
    """Outputs and merged weights of both sites agree, and the adapter has changed them."""
    for name, adapted in mine.items():
        layer = getattr(model.base_model.model, name)
        x = torch.randn(5, adapted.in_features, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            assert (adapted(x) - adapted.base(x)).abs().max() > 0.05
            assert_close(adapted(x), layer(x), rtol=tolerance, atol=tolerance)
            layer.merge()
            assert_close(adapted.weight, layer.get_base_layer().weight.detach(), rtol=tolerance, atol=tolerance)


SITES = {"target_modules": ["tall", "wide"]}


@torch.no_grad()
def test_loha():
    model = theirs(peft.LoHaConfig(r=3, alpha=6, **SITES))
    mine = ours(loha(rank=3, alpha=6.0))
    for name, adapted in mine.items():
        layer, op = getattr(model.base_model.model, name), adapted.slot("default").op
        for part, side in ((op.one, "1"), (op.two, "2")):
            part.u.copy_(getattr(layer, f"hada_w{side}_a")["default"])
            part.v.copy_(getattr(layer, f"hada_w{side}_b")["default"])
    check_equal(model, mine)


@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("factor", [-1, 3])
@torch.no_grad()
def test_lokr(r, both, factor):
    config = peft.LoKrConfig(r=r, alpha=2 * r, decompose_both=both, decompose_factor=factor, **SITES)
    model, mine = theirs(config), ours(lokr(rank=r, alpha=2.0 * r, factor=factor, both=both))
    for name, adapted in mine.items():
        layer, op = getattr(model.base_model.model, name), adapted.slot("default").op
        for part, side in ((op.a, "lokr_w1"), (op.b, "lokr_w2")):
            if isinstance(part, LowRank):
                part.u.copy_(getattr(layer, f"{side}_a")["default"])
                part.v.copy_(getattr(layer, f"{side}_b")["default"])
            else:
                part.w.copy_(getattr(layer, side)["default"])
    check_equal(model, mine)


def test_lokr_splits_sizes_as_peft_does_but_for_a_factor_above_the_root():
    factorization = import_module("peft.tuners.lokr.layer").factorization
    for size in range(1, 200):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 16):
            one, two = factorization(size, factor)
            assert near_factor(size, factor) == min(one, two)


@torch.no_grad()
def test_vera():
    model = theirs(peft.VeraConfig(r=7, save_projection=True, **SITES))
    mine = ours(vera(rank=7))
    for name, adapted in mine.items():
        layer, slot = getattr(model.base_model.model, name), adapted.slot("default")
        b, _, d, _ = slot.op.ops
        b.d.copy_(layer.vera_lambda_b["default"])
        d.d.copy_(layer.vera_lambda_d["default"])
        left, right = layer.vera_B["default"][: b.shape[0]], layer.vera_A["default"][:, : adapted.in_features]
        slot.op = Product([b, Dense(left), d, Dense(right)])
    check_equal(model, mine)


@torch.no_grad()
def test_vera_bases_have_pefts_deviation_where_the_layer_is_the_widest():
    model = theirs(peft.VeraConfig(r=400, save_projection=True, **SITES))
    for name, widest in (("tall", False), ("wide", True)):
        op, layer = ours(vera(rank=400))[name].slot("default").op, getattr(model.base_model.model, name)
        assert_close(op.ops[1].dense().std(), layer.vera_B["default"].std(), rtol=0.03, atol=0)
        deviation = op.ops[3].dense().std() * (1 if widest else (N / M) ** 0.5)
        assert_close(deviation, layer.vera_A["default"].std(), rtol=0.03, atol=0)


@torch.no_grad()
def test_randlora_but_for_the_order_in_which_peft_pairs_ranks_and_bases():
    model = theirs(peft.RandLoraConfig(r=3, randlora_alpha=6, save_projection=True, **SITES))
    mine, bases = ours(randlora(rank=3, alpha=6.0)), N // 3
    for name, adapted in mine.items():
        layer, op = getattr(model.base_model.model, name), adapted.slot("default").op
        tall = op if name == "tall" else op.op
        tall.ops[1].rows.copy_(layer.randlora_lambda["default"].T)
        tall.ops[1].columns.copy_(layer.randlora_gamma["default"])
        # Peft multiplies column (basis, rank) of B, flattened, by row (rank, basis) of A, flattened.
        left = (
            layer.randlora_B["default"]
            .float()[: max(M, N), :bases]
            .flatten(1)
            .unflatten(1, (3, bases))
            .mT.flatten(1)
        )
        tall.ops[1].op = Dense(layer.randlora_A["default"].float()[:, 0, :N])
        tall.ops = nn.ModuleList([Dense(left), tall.ops[1]])
    check_equal(model, mine, 1e-5)


@torch.no_grad()
def test_oft_with_the_exact_inverse():
    model = theirs(peft.OFTConfig(r=0, oft_block_size=6, use_cayley_neumann=False, **SITES))
    mine = ours(oft(block=6))
    for name, adapted in mine.items():
        layer = getattr(model.base_model.model, name)
        adapted.slot("default").join.turn.q.copy_(layer.oft_R["default"].weight)
    check_equal(model, mine)


@torch.no_grad()
def test_pefts_default_oft_is_no_rotation_and_near_the_start_turns_the_other_way():
    model = theirs(peft.OFTConfig(r=0, oft_block_size=6, **SITES))
    layer = model.base_model.model.tall
    mine = ours(oft(block=6))["tall"].slot("default").join.turn
    mine.q.copy_(layer.oft_R["default"].weight)
    r, one = layer.oft_R["default"].get_weight(), torch.eye(N)
    assert_close(mine.dense().T @ mine.dense(), one, rtol=0, atol=1e-6)
    assert (r.T @ r - one).abs().max() > 1e-2
    mine.q.copy_(-layer.oft_R["default"].weight.mul_(0.01))
    assert_close(mine.dense(), layer.oft_R["default"].get_weight(), rtol=0, atol=1e-6)


@torch.no_grad()
def test_shira():
    model = theirs(peft.ShiraConfig(r=2, random_seed=0, **SITES))
    mine = ours(shira(rank=2))
    for name, adapted in mine.items():
        layer, slot = getattr(model.base_model.model, name), adapted.slot("default")
        row, column = layer.shira_indices["default"]
        assert len(row) == len(slot.op.index)
        index = row * adapted.in_features + column
        slot.op = Entries(index, layer.shira_weight["default"], *slot.op.shape)
    check_equal(model, mine)
