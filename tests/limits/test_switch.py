"""Sparse adapters switched in the weights: what a merge gives, and every bit back."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from subspan.adapt import Adapted, Adapter, Add, SparseEntries, adapt, merge, trainable
from subspan.adapt.switch import Change, Switch, entries
from subspan.edit import edit
from subspan.methods import build
from subspan.ops import Entries

NAMES = ("one", "two", "three")


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Every kind of layer that keeps a matrix, one of them in groups, all weights random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Embedding(12, 10), nn.Linear(10, 14), Conv1D(8, 14), nn.Conv2d(4, 6, 3, groups=2)
        return nn.Sequential(*layers).to(dtype)


def adapted(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same net with a moved SHiRA on each layer, other entries for each name."""
    model = net(dtype)
    seed = NAMES.index(name)
    put = adapt(Adapter(SparseEntries(2, seed=seed), Add(0.5 + seed)), name)
    edit(model, [str(i) for i in range(len(model))], put)
    draw = torch.Generator().manual_seed(seed)
    for _, p in trainable(model):
        p.data.copy_(torch.randn(p.shape, generator=draw))
    return model


def switch_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Switch:
    switch = Switch(model)
    for name in NAMES:
        switch.add(name, entries(adapted(name, dtype), name))
    return switch


def bits(model: nn.Module) -> dict[str, Tensor]:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {key: t.clone().view(kinds[t.element_size()]) for key, t in model.state_dict().items()}


def check_same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_switch_is_a_merge_from_any_adapter_to_any_and_none_is_every_bit_of_the_original(dtype):
    model = net(dtype)
    before = bits(model)
    switch = switch_of(model, dtype)
    check_same_bits(bits(model), before)
    merged = {name: [merge(layer).weight for layer in adapted(name, dtype)] for name in NAMES}
    for step in itertools.permutations((*NAMES, None)):
        for name in step:
            switch.to(name)
            assert switch.active == name
            if name is None:
                check_same_bits(bits(model), before)
                continue
            for layer, weight in zip(model, merged[name], strict=True):
                assert torch.equal(layer.weight, weight)


def test_entries_of_two_adapters_at_one_place_do_not_mix():
    layer = nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    switch = Switch(nn.ModuleDict({"x": layer}))
    for name, places, value in (("a", [5, 1], 0.3), ("b", [1, 4], -0.7)):
        switch.add(name, {"x": Entries(torch.tensor(places), torch.full((2,), value), 2, 3)})
    for name, places, value in (("a", [5, 1], 0.3), ("b", [1, 4], -0.7), ("a", [5, 1], 0.3)):
        switch.to(name)
        wanted = before.clone().view(-1)
        wanted[places] += value
        assert torch.equal(layer.weight.view(-1), wanted)


def test_an_adapter_added_while_another_is_in_use_stands_on_the_original():
    model = net()
    switch = Switch(model)
    switch.add("one", entries(adapted("one"), "one"))
    switch.to("one")
    during = bits(model)
    switch.add("two", entries(adapted("two"), "two"))
    assert switch.active == "one"
    check_same_bits(bits(model), during)
    switch.to("two")
    assert torch.equal(model[1].weight, merge(adapted("two")[1]).weight)


def test_subtracting_does_not_give_the_bits_back_and_a_switch_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    before = bits(model)
    op = SparseEntries(8)("0", model[0].weight)
    op.values.data.normal_()
    with torch.no_grad():
        model[0].weight.add_(op.dense().bfloat16()).sub_(op.dense().bfloat16())
    assert not torch.equal(bits(model)["0.weight"], before["0.weight"])
    model[0].weight.data.copy_(before["0.weight"].view(torch.bfloat16))
    switch = Switch(model)
    switch.add("a", {"0": op})
    switch.to("a")
    assert not torch.equal(bits(model)["0.weight"], before["0.weight"])
    switch.to(None)
    check_same_bits(bits(model), before)


def test_entries_are_the_change_with_its_scale():
    model = adapted("two")
    found = entries(model, "two")
    assert list(found) == ["0", "1", "2", "3"]
    for key, op in found.items():
        slot = model.get_submodule(key).slot("two")
        assert torch.equal(op.dense(), slot.join.scale * slot.op.dense())
        assert not op.values.requires_grad


def test_a_change_writes_at_its_places_in_the_memory_of_the_weight():
    weight = nn.Parameter(torch.zeros(2, 3))
    change = Change(weight, torch.tensor([1, 5]), torch.zeros(2), torch.tensor([7.0, 8.0]))
    with torch.no_grad():
        change.write(change.new)
    assert weight.tolist() == [[0, 7, 0], [0, 0, 8]]


def test_weights_that_somebody_else_wrote_to_are_not_switched():
    model = net()
    switch = switch_of(model)
    switch.to("one")
    during = bits(model)
    with torch.no_grad():
        model[1].weight.mul_(2)
    for name in ("two", None):
        with pytest.raises(
            ValueError, match=r"\(14, 10\) was written to since the last switch.*'one'.*new Switch"
        ):
            switch.to(name)
    assert switch.active == "one"
    assert torch.equal(bits(model)["0.weight"], during["0.weight"])
    fresh = net()
    idle = switch_of(fresh)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    with pytest.raises(ValueError, match="was written to"):
        idle.to("one")


def entry(m: int = 4, n: int = 4) -> Entries:
    return Entries(torch.tensor([0]), torch.ones(1), m, n)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
        self.head.weight = self.table.weight


def turned() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.eye(4).as_strided((4, 4), (1, 4)).contiguous().mT)
    return layer


@pytest.mark.parametrize(
    ("model", "adapter", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4)), {}, "has 0 sites"),
        (nn.Sequential(nn.Linear(4, 4)), {"1": entry()}, "1 is no module of the model"),
        (nn.Sequential(nn.LayerNorm(4)), {"0": entry()}, "0 is a LayerNorm"),
        (nn.Sequential(Adapted(nn.Linear(4, 4))), {"0": entry()}, "0 is a Adapted"),
        (nn.Sequential(nn.Linear(4, 5)), {"0": entry()}, r"the weight is \(5, 4\).*the entries are of \(4, 4\)"),
        (nn.Sequential(turned()), {"0": entry()}, r"strides \(1, 4\).*contiguous"),
        (Tied(), {"head": entry()}, "head shares its weight with table, which would change too"),
    ],
)
def test_what_cannot_be_switched_is_refused(model, adapter, words):
    switch = Switch(model)
    with pytest.raises(ValueError, match=words):
        switch.add("a", adapter)
    with pytest.raises(ValueError, match="no adapter 'a'; there are: none at all"):
        switch.to("a")


def test_a_name_is_taken_once_and_only_plain_sums_of_entries_have_entries():
    switch = switch_of(net())
    with pytest.raises(ValueError, match="a name beside one, two, three"):
        switch.add("two", {"1": entry(14, 10)})
    with pytest.raises(ValueError, match="Sequential carries no adapter 'default'"):
        entries(net())
    model = net()
    edit(model, ["1"], adapt(build("lora", "adapter", rank=2)))
    with pytest.raises(ValueError, match="1: LowRank joined by Add is no sparse sum; merge it instead"):
        entries(model)
