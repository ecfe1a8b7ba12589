"""Parts are values: they cannot be changed, and what they are built from can be read back."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from subspan import io
from subspan.adapt import Adapted, Add, Folded, Slot
from subspan.budget import Err, Ratio, Uniform, bisect, normalised
from subspan.codec import Bf16
from subspan.edit import Edit, edit
from subspan.fit import Decomposition, Stack, Svd, decompose, stack
from subspan.inspect import Style, Survey, SurveyRow, TypeMeans, styles, survey
from subspan.linalg import Whitened, whiten
from subspan.ops import LowRank
from subspan.optim import Adam, Chain, Momentum, Reset, Scope, Stored, chain, reset, stored


def matrix(m: int = 5, n: int = 4) -> torch.Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()


VALUES = {
    Stack: lambda: stack(Svd(1), Svd(2)),
    Decomposition: lambda: decompose(matrix()),
    Chain: lambda: chain(first=Momentum(), then=Adam()),
    Stored: lambda: stored(Adam(), mu=Bf16()),
    Reset: lambda: reset,
    Folded: lambda: Folded(nn.Linear(4, 4), LowRank(torch.ones(4, 1), torch.ones(1, 4)), Add()),
    Style: lambda: styles(["welore"])["welore"],
    Survey: lambda: survey(net()),
    SurveyRow: lambda: survey(net()).rows["0"],
    TypeMeans: lambda: survey(net()).types()["0"],
}


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_a_part_is_of_its_kind_and_cannot_be_changed(kind):
    value = VALUES[kind]()
    assert type(value) is kind
    names = value._fields if issubclass(kind, tuple) else [field.name for field in dataclasses.fields(value)]
    for name in names:
        with pytest.raises(AttributeError, match=r"cannot assign|can't set"):
            setattr(value, name, None)


def test_whitened_says_which_ridge_it_took():
    found = whiten(torch.eye(3) * 4, ridge=0.5)
    assert isinstance(found, Whitened)
    assert found.ridge == 0.5
    torch.testing.assert_close(found.factor @ found.factor.mT, torch.eye(3).double() * 6)


def test_a_scope_is_a_window_on_the_flat_state():
    flat = {"rule.mu": torch.zeros(1), "frame.q": torch.ones(1)}
    seen = Scope(flat, "rule")
    seen["nu"] = torch.full((1,), 2.0)
    del seen["mu"]
    assert dict(seen) == {"nu": flat["rule.nu"]}
    assert sorted(flat) == ["frame.q", "rule.nu"]


def test_a_slot_holds_the_op_and_the_join_of_one_adapter():
    layer = Adapted(nn.Linear(4, 4))
    op = LowRank(torch.ones(4, 1), torch.ones(1, 4))
    layer.add("one", op, Add(2.0))
    slot = layer.slot("one")
    assert isinstance(slot, Slot)
    assert slot.op is op
    assert slot.join == Add(2.0)


def test_an_edit_undoes_itself_when_a_with_block_ends():
    model = net()
    first = model[0]
    with edit(model, "0", lambda _, __: nn.Identity()) as done:
        assert isinstance(done, Edit)
        assert list(done) == ["0"]
        assert model[0] is done.swaps["0"][1]
    assert model[0] is first
    assert done.swaps == {}


@pytest.mark.parametrize("target", [Err(0.0), Err(0.3), Err(0.62), Err(0.9), Ratio(0.3), Ratio(0.75), Ratio(1.0)])
def test_bisect_finds_what_looking_at_every_level_finds(target):
    shape = {"a": (8, 8), "b": (6, 12), "c": (20, 5)}
    levels = [Uniform(Err(e))({}, shape) for e in np.linspace(0, 0.99, 40)]
    found = bisect(lambda i: levels[i], len(levels), target, shape)
    goal = target.value if isinstance(target, Err) else 1 - target.value
    reached = [target.reached(ranks, shape) for ranks in levels]
    if isinstance(target, Err):
        assert abs(target.reached(found, shape) - goal) == min(abs(r - goal) for r in reached)
    else:
        assert target.reached(found, shape) == min(r for r in reached if r >= goal - 1e-12)


def test_normalised_spectra_run_from_zero_to_one():
    s = torch.tensor([9.0, 5.0, 1.0])
    assert normalised(s, "w").tolist() == [0.0, 0.5, 1.0]
    for scale, order in itertools.product((1e-3, 7.0), ([0, 1, 2], [2, 0, 1])):
        np.testing.assert_allclose(normalised(scale * s[order], "w"), [0.0, 0.5, 1.0], atol=1e-7)
    with pytest.raises(ValueError, match=r"w: all singular values equal 2"):
        normalised(torch.full((3,), 2.0), "w")


def test_about_is_written_with_format_and_version_and_read_back(tmp_path):
    io.write_about(tmp_path, {"method": "svd", "sites": {}})
    expected = {"format": io.FORMAT, "library": io.subspan_version(), "method": "svd", "sites": {}}
    assert io.read_about(tmp_path) == expected
    assert json.loads((tmp_path / io.ABOUT).read_text()) == expected


def test_fill_is_strict_and_changes_nothing_when_it_fails():
    have = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(3))}
    with pytest.raises(
        ValueError, match=r"f does not fit .* 1 missing \(b\); 1 unexpected \(c\); 1 of another shape \(a\)"
    ):
        io.fill(have, {"a": torch.ones(3), "c": torch.ones(1)}, "f")
    assert not any(p.any() for p in have.values())
    io.fill(have, {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.bfloat16)}, "f")
    assert have["a"].tolist() == [1, 1]
    assert have["b"].dtype == torch.bfloat16
