"""Mistakes in a compression are a ValueError that names culprit and remedy, and leave the model as it was."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from subspan.budget import Energy, Err, Ratio, Uniform, WeLore
from subspan.compress import Compression, Study, compress, study
from subspan.fit import Svd
from subspan.metric import AbsMean, Gram, Plain
from subspan.plan import Plan


class Net(nn.Module):
    """A block of two layers, a layer that is never called, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.spare = nn.Linear(8, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.blocks[1](torch.tanh(self.blocks[0](self.embed(ids))))))


def poisoned(value: float) -> Net:
    model = Net()
    with torch.no_grad():
        model.blocks[1].weight[2, 3] = value
    return model


def orthogonal() -> Net:
    model = Net()
    with torch.no_grad():
        model.blocks[1].weight.copy_(3 * torch.eye(8))
    return model


def poisoned_inputs() -> Net:
    model = Net()
    with torch.no_grad():
        model.embed.weight[3] = float("nan")
    return model


def without_linear() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 2, 1), nn.LayerNorm(4))


BATCHES = [torch.arange(9).reshape(3, 3)]
HALF = Uniform(Err(0.5))


def run(
    budget: Callable[[], Any] = lambda: HALF, measure: Any = None, **options: Any
) -> Callable[[nn.Module], object]:
    """Compress with these settings; the budget is built only then, so that its own errors count too."""
    return lambda model: compress(model, Compression(budget(), measure or Plain()), **options)


def by_hand(**ranks: int) -> Callable[[Any, Any], dict[str, int]]:
    return lambda spectra, shapes: {name.replace("_", "."): rank for name, rank in ranks.items()}


def planned(change: Callable[[Plan], Plan]) -> Callable[[nn.Module], object]:
    """Apply a plan that somebody changed."""

    def act(model: nn.Module) -> object:
        taken = study(model)
        return taken.apply(model, change(taken.plan(HALF)))

    return act


def reranked(rank: Any) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, sites={n: replace(s, rank=rank) for n, s in plan.sites.items()})


def of_another_model(plan: Plan) -> Plan:
    return replace(plan, sites={f"encoder.{name}": site for name, site in plan.sites.items()})


def another_study(model: nn.Module) -> object:
    taken: Study = study(model, select="blocks.0")
    return taken.apply(model, study(model).plan(HALF))


@dataclass(frozen=True)
class Row:
    act: Callable[[nn.Module], object]
    says: Sequence[str]
    model: Callable[[], nn.Module] = Net


ROWS: dict[str, Row] = {
    # settings
    "err one": Row(run(lambda: Uniform(Err(1.0))), ["reduction 1.0", "[0, 1)", "removes"]),
    "err negative": Row(run(lambda: Uniform(Err(-0.1))), ["reduction -0.1", "[0, 1)"]),
    "err per cent": Row(run(lambda: Uniform(Err(30))), ["reduction 30", "[0, 1)", "0.3"]),
    "err nan": Row(run(lambda: Uniform(Err(float("nan")))), ["reduction nan", "[0, 1)"]),
    "ratio zero": Row(run(lambda: Uniform(Ratio(0.0))), ["ratio 0.0", "(0, 1]", "share of numbers kept"]),
    "ratio above": Row(run(lambda: Uniform(Ratio(1.2))), ["ratio 1.2", "(0, 1]"]),
    "ratio nan": Row(run(lambda: Uniform(Ratio(float("nan")))), ["ratio nan", "(0, 1]"]),
    "energy zero": Row(run(lambda: Energy(0.0)), ["energy 0.0", "(0, 1]", "sum s^2 kept"]),
    "energy above": Row(run(lambda: Energy(95)), ["energy 95", "(0, 1]", "0.95"]),
    "energy nan": Row(run(lambda: Energy(float("nan"))), ["energy nan", "(0, 1]"]),
    "welore search": Row(run(lambda: WeLore(Err(0.5), search="gird")), ["gird", "grid", "exact"]),
    "welore nlrc": Row(run(lambda: WeLore(Err(0.5), nlrc="truncated")), ["truncated", "truncate", "keep"]),
    "welore gate": Row(run(lambda: WeLore(Err(0.5), gate="break-even")), ["break-even", "half", "break_even"]),
    "solver": Row(lambda model: Svd(2, solver="randomized")(torch.ones(3, 3)), ["randomized", "exact", "gram"]),
    "ridge": Row(lambda model: run(measure=Gram(ridge=-1.0), batches=BATCHES)(model), ["ridge", "-1"]),
    # ranks
    "rank zero": Row(
        run(lambda: by_hand(blocks_0=3, blocks_1=0)), ["blocks.1", "rank 0", "min(8, 8) = 8", "choose"]
    ),
    "rank above": Row(
        run(lambda: by_hand(blocks_0=9, blocks_1=3)), ["blocks.0", "rank 9", "min(8, 8) = 8", "choose"]
    ),
    "rank absent": Row(run(lambda: by_hand(blocks_0=3)), ["blocks.1"]),
    "planned zero": Row(planned(reranked(0)), ["blocks.0", "rank 0", "choose"]),
    "planned above": Row(planned(reranked(9)), ["blocks.0", "rank 9", "choose"]),
    "planned half": Row(planned(reranked(2.5)), ["blocks.0", "2.5"]),
    "svd zero": Row(lambda model: Svd(0)(torch.ones(3, 3)), ["rank 0", "min(3, 3) = 3", "choose"]),
    "svd above": Row(lambda model: Svd(4)(torch.ones(3, 3)), ["rank 4", "min(3, 3) = 3", "choose"]),
    # plans
    "other model": Row(planned(of_another_model), ["plan", "encoder.blocks.0", "blocks.0"]),
    "no sites": Row(planned(lambda plan: replace(plan, sites={})), ["plan", "site"]),
    "other study": Row(another_study, ["blocks.1"]),
    # sites
    "no match": Row(run(select="*.q_proj"), ["'*.q_proj'", "matches no nn.Linear", "blocks.0"]),
    "empty pattern": Row(run(select=""), ["empty pattern", "'*'"]),
    "tied": Row(run(select="*"), ["head", "embed", "'!head'", "tied='share'"]),
    "tied alone": Row(run(select="head"), ["head shares its weight with embed", "'!head'"]),
    "no linear": Row(run(), ["Sequential has no nn.Linear", "Conv1d", "LayerNorm"], without_linear),
    "only a layer": Row(run(), ["Linear"], lambda: nn.Linear(4, 4)),
    # weights and data
    "nan weight": Row(run(), ["blocks.1", "nan", "(2, 3)", "leave it out"], lambda: poisoned(float("nan"))),
    "inf weight": Row(run(), ["blocks.1", "-inf", "(2, 3)", "leave"], lambda: poisoned(float("-inf"))),
    "flat spectrum": Row(
        run(lambda: WeLore(Err(0.5))), ["blocks.1", "singular values equal 3", "leave"], orthogonal
    ),
    "no data for gram": Row(run(measure=Gram()), ["calibration batches", "blocks.0"]),
    "no data for absmean": Row(run(measure=AbsMean()), ["calibration batches", "blocks.0"]),
    "empty data": Row(run(measure=Gram(), batches=[]), ["no calibration batch reached blocks.0", "more data"]),
    "unreached": Row(run(measure=Gram(), select="spare|blocks.*", batches=BATCHES), ["reached spare", "leave"]),
    "nan data": Row(run(measure=Gram(), batches=BATCHES), ["blocks.0", "nan"], poisoned_inputs),
    "nan data absmean": Row(run(measure=AbsMean(), batches=BATCHES), ["blocks.0", "nan"], poisoned_inputs),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_is_named_and_changes_nothing(name):
    row = ROWS[name]
    model = row.model().train()
    modules = list(model.named_modules())
    tensors = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        row.act(model)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in modules]
    assert all(model.get_submodule(n) is m and m.training and not m._forward_pre_hooks for n, m in modules)
    assert list(model.state_dict()) == list(tensors)
    for key, tensor in model.state_dict().items():
        assert_close(tensor, tensors[key], rtol=0.0, atol=0.0, equal_nan=True)
    missing = [part for part in row.says if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_a_model_compressed_once_is_not_compressed_again_in_silence():
    model = Net()
    first = study(model)
    first.apply(model, first.plan(HALF))
    with pytest.raises(ValueError, match=r"blocks\.0|no nn\.Linear|matches no"):
        first.apply(model, first.plan(HALF))


def test_an_error_in_the_data_is_handed_on_and_changes_nothing():
    def data():
        yield BATCHES[0]
        raise OSError("the disk is gone")

    model = Net().train()
    with pytest.raises(OSError, match="disk is gone"):
        compress(model, Compression(HALF, Gram()), batches=data())
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())
    assert isinstance(model.blocks[0], nn.Linear)
