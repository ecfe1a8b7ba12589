"""A comparison is the closed form for known changes, of any kind of layer, and tells what it left out."""

import json
import math
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.testing import assert_close

from subspan.budget import Ratio
from subspan.compress import compress
from subspan.inspect import Change, Comparison, changed, compare, find_intruders, subspace_overlap
from subspan.methods import build


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net(seed=0, width=12):
    torch.manual_seed(seed)
    block = lambda: nn.ModuleDict({"up": nn.Linear(width, 16), "down": nn.Linear(16, width)})  # noqa: E731
    made = nn.Module()
    made.layers = nn.ModuleList([block(), block()])
    made.head = nn.Linear(width, 5)
    return made.double()


def printed(table):
    console = Console(width=200, record=True, file=StringIO())
    console.print(table)
    return console.export_text()


def test_a_model_against_itself_has_changed_nowhere():
    found = compare(net(), net())
    assert list(found.rows) == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    for row in found.rows.values():
        assert (row.change, row.spectra, row.left, row.right, row.intruders) == (0, 0, 1, 1, 0)
        assert row.effective_a == row.effective_b and row.rank_b == row.full == 12
    assert "4 unchanged" in printed(found.table())


def test_scaling_changes_norms_and_nothing_else():
    w = normal(10, 7)
    row = changed(w, 1.25 * w, top=3)
    assert_close((row.change, row.spectra, row.left, row.right), (0.25, 0.25, 1.0, 1.0))
    assert row.intruders == 0
    assert_close(row.effective_b, row.effective_a)


def test_numbers_are_those_of_the_parts():
    a, b = normal(20, 14), normal(20, 14) + 0.5 * normal(20, 14, seed=1)
    row = changed(a, b, top=4)
    one, two = torch.linalg.svd(a, full_matrices=False), torch.linalg.svd(b, full_matrices=False)
    assert_close(row.change, float((b - a).norm() / a.norm()))
    assert_close(row.spectra, float((two.S - one.S).norm() / a.norm()))
    assert_close(row.left, subspace_overlap(one.U[:, :4], two.U[:, :4]))
    assert_close(row.right, subspace_overlap(one.Vh[:4].mT, two.Vh[:4].mT))
    assert row.intruders == find_intruders(a, b, top=4).count
    assert row.spectra <= row.change


def test_a_rank_one_spike_is_one_intruder_at_one_site():
    before, after = net(), net()
    weight = after.layers[1]["up"].weight
    weight.data += 30 * torch.nn.functional.normalize(normal(16, 1), dim=0) @ normal(1, 12, seed=4)
    found = compare(before, after, top=1, epsilon=0.6)
    assert {name: row.intruders for name, row in found.rows.items() if row.change} == {"layers.1.up": 1}
    assert found.types()["up"]["intruders"] == 1
    assert found.types()["down"]["change"] == 0


def test_compressed_layers_are_compared_by_their_dense_weights():
    before, after = net(), net()
    compress(after, build("svd", "compression", target=Ratio(0.6)))
    found = compare(before, after, top=3)
    for row in found.rows.values():
        assert row.rank_b < row.full
        assert_close((row.left, row.right), (1.0, 1.0))
        assert row.intruders == 0 and row.effective_b < row.effective_a
        assert_close(row.change, row.spectra)


def test_half_precision_is_compared_in_float32():
    w = normal(9, 9)
    assert_close(
        changed(w.float(), w.bfloat16()).change, float((w.bfloat16().float() - w.float()).norm() / w.norm())
    )


def test_sites_that_cannot_be_compared_are_named():
    a, b = (
        {"0.q": normal(4, 4), "0.k": normal(4, 3), "0.x": normal(2, 2)},
        {"0.q": normal(4, 4), "0.k": normal(4, 4)},
    )
    found = compare(a, b)
    assert list(found.rows) == ["0.q"]
    assert found.skipped == {"0.x": "only in the first", "0.k": "4 x 3 in the first and 4 x 4 in the second"}
    assert "not compared: 0.x, only in the first" in printed(found.table())


def test_select_reaches_layers_outside_blocks():
    assert list(compare(net(), net(1), select="head").rows) == ["head"]
    assert compare(net(), net(1), select="head").rows["head"].change > 0


def test_data_is_json_and_holds_the_rows():
    zero = {"0.q": torch.zeros(3, 3), "1.q": normal(3, 3)}
    found = compare(zero, {"0.q": normal(3, 3), "1.q": normal(3, 3)}, top=2)
    assert isinstance(found, Comparison) and isinstance(found.rows["0.q"], Change)
    assert math.isinf(found.rows["0.q"].change)
    got = json.loads(json.dumps(found.data(), allow_nan=False))
    assert got["sites"]["0.q"]["change"] is None and got["sites"]["1.q"]["shape"] == [3, 3]
    assert got["top"] == 2 and got["types"]["q"]["count"] == 2


def test_the_most_changed_come_first_and_the_rest_is_counted():
    a = {f"{i}.q": normal(5, 5, seed=i) for i in range(4)}
    b = {name: (1 + 0.1 * i) * w for i, (name, w) in enumerate(a.items())}
    text = printed(compare(a, b).table(2))
    assert text.index("3.q") < text.index("2.q") and "1.q" not in text and "2 more sites" in text
    assert "q" in printed(compare(a, b).by_type())


def test_the_figure_shows_every_block_and_says_what_changed_most():
    a = {f"{i}.q": normal(5, 5, seed=i) for i in range(4)}
    b = {name: (1 + 0.1 * i) * w for i, (name, w) in enumerate(a.items())}
    upper, lower = compare(a, b).figure().axes
    assert_close([float(y) for y in upper.lines[0].get_ydata()], [0.0, 10.0, 20.0, 30.0])
    assert_close([float(y) for y in lower.lines[0].get_ydata()], [1.0] * 4)
    assert upper.get_title(loc="left").startswith("q 3 changed most, by 0.3 of its norm")


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="no layer of one name in common"):
        compare({"a": normal(2, 2)}, {"b": normal(2, 2)})
    with pytest.raises(ValueError, match="top 0 is no number"):
        compare(net(), net(), top=0)
    with pytest.raises(ValueError, match=r"0.q after.*nan"):
        compare({"0.q": normal(2, 2)}, {"0.q": normal(2, 2) * float("nan")})
    with pytest.raises(ValueError, match="matches no layer"):
        compare(net(), net(), select="nothing")
