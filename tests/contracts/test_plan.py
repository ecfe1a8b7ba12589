"""A plan is a file that people edit: it comes back equal, its bytes are true, and mistakes in it are named."""

import json
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from subspan.budget import Err, Ratio, Uniform
from subspan.compress import study
from subspan.edit import shapes, sites
from subspan.plan import FORMAT, Plan, SitePlan, break_even, numbers, ridged, site_plan


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(5, 16), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 12, bias=False), nn.LayerNorm(12)
    ).to(dtype)


def ranked(ranks: dict[str, int]) -> Callable[[Any, Any], dict[str, int]]:
    return lambda spectra, shapes: ranks


def made(ranks: dict[str, int], dtype: torch.dtype = torch.float64) -> Plan:
    return study(net(dtype)).plan(ranked(ranks), method="by hand", args={"err": 0.3, "names": ["a"], "x": None})


def size(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


# name -> ranks of the sites 1 (12 x 16) and 3 (12 x 12), whose break-even ranks are 6 and 5
RANKS = {
    "lowrank": {"1": 2, "3": 1},
    "dense": {"1": 7, "3": 6},
    "keep": {"1": 12, "3": 12},
    "at break-even": {"1": 6, "3": 5},
    "mixed": {"1": 3, "3": 11},
    "one kept": {"1": 12, "3": 4},
}


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_json_comes_back_equal(ranks, tmp_path):
    plan = made(ranks)
    plan.to_json(tmp_path / "plan.json")
    assert Plan.from_json(tmp_path / "plan.json") == plan
    assert Plan.from_dict(plan.to_dict()) == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_cannot_be_written_leaves_the_old_file(tmp_path):
    made(RANKS["mixed"]).to_json(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        study(net()).plan(Uniform(Err(0.5)), args={"dtype": torch.float32}).to_json(tmp_path / "plan.json")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


def test_arguments_that_differ_are_written_differently(tmp_path):
    """`Err(0.5)` removes half of the ranks, `Ratio(0.5)` half of the numbers: the file must tell them apart."""
    written = []
    for target in (Err(0.5), Ratio(0.5)):
        try:
            study(net()).plan(Uniform(Err(0.5)), args={"target": target}).to_json(tmp_path / "plan.json")
        except TypeError as refusal:
            assert "JSON" in str(refusal)
        else:
            written.append((tmp_path / "plan.json").read_text())
    assert len(set(written)) == len(written)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_bytes_are_those_of_the_model_before_and_after(ranks, dtype):
    model = net(dtype)
    taken = study(model)
    plan = taken.plan(ranked(ranks))
    before = size(model)
    with taken.apply(model, plan):
        assert plan.bytes == (before, size(model))
    assert size(model) == before


def test_bytes_count_every_precision_as_it_is():
    model = net()
    model[3].to(torch.bfloat16)
    taken = study(model)
    plan, before = taken.plan(ranked({"1": 3, "3": 2})), size(model)
    with taken.apply(model, plan):
        assert plan.bytes == (before, size(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "change", [{"rank": 1}, {"rank": 5}, {"rank": 9}, {"rank": 12}, {"form": "keep"}, {"form": "dense"}], ids=str
)
def test_bytes_of_a_plan_edited_by_hand_are_still_true(change, dtype, tmp_path):
    model = net(dtype)
    taken = study(model)
    data = taken.plan(ranked(RANKS["lowrank"])).to_dict()
    data["sites"]["1"].update(change)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    plan = Plan.from_json(tmp_path / "plan.json")
    with taken.apply(model, plan):
        assert plan.bytes[1] == size(model)


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_totals_are_their_definitions(ranks):
    plan = made(ranks)
    assert plan.ranks() == ranks
    assert plan.err == pytest.approx(1 - sum(ranks.values()) / 24, abs=1e-15)
    stored = sum(min(ranks[name] * (m + n), m * n) for name, (m, n) in (("1", (12, 16)), ("3", (12, 12))))
    assert plan.ratio == pytest.approx(stored / (12 * 16 + 12 * 12), abs=1e-15)
    assert {key: plan.to_dict()["totals"][key] for key in ("err", "ratio")} == {
        "err": plan.err,
        "ratio": plan.ratio,
    }


def test_break_even_is_the_last_rank_whose_factors_hold_nine_tenths_of_the_numbers():
    for m in range(1, 24):
        for n in range(1, 24):
            saves = [rank for rank in range(1, m * n + 1) if 10 * rank * (m + n) <= 9 * m * n]
            assert break_even(m, n) == max(saves, default=0)


def test_numbers_are_those_of_two_factors_up_to_break_even_and_of_one_matrix_above():
    for m, n in [(1, 1), (3, 7), (8, 8), (5, 2), (20, 30)]:
        for rank in range(1, min(m, n) + 1):
            factors = torch.zeros(m, rank).numel() + torch.zeros(rank, n).numel()
            assert numbers(rank, m, n) == (factors if 10 * factors <= 9 * m * n else m * n)


@pytest.mark.parametrize("m,n", [(1, 1), (2, 2), (1, 9), (8, 8), (12, 5), (20, 30)])
def test_the_form_is_the_cheapest_that_holds_the_rank_and_is_no_slower(m, n):
    for rank in range(1, min(m, n) + 1):
        row = site_plan((m, n), rank, lambda rank: 0.5, bits=16)
        wanted = "keep" if rank == min(m, n) else "lowrank" if 10 * rank * (m + n) <= 9 * m * n else "dense"
        assert row.form == wanted and row.full == min(m, n)
        assert (row.bytes_before, row.bytes_after) == (2 * m * n, 2 * numbers(rank, m, n))
        assert row.error == (0.0 if wanted == "keep" else 0.5)


@pytest.mark.parametrize("rank", [0, 6, -1])
def test_a_row_for_an_impossible_rank_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is outside 1\.\.min\(5, 9\)"):
        site_plan((5, 9), rank, lambda rank: 0.0, bits=32)


def rename(data: dict[str, Any], old: str, new: str) -> None:
    data["sites"] = {new if name == old else name: row for name, row in data["sites"].items()}


# What a person may do to the file -> (the edit, what the error must name)
EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "rank 0": (lambda d: d["sites"]["3"].update(rank=0), r"3: rank 0 is outside .*choose"),
    "rank below": (lambda d: d["sites"]["3"].update(rank=-2), r"3: rank -2 is outside .*choose"),
    "rank above": (
        lambda d: d["sites"]["3"].update(rank=13),
        r"3: rank 13 is outside .*min\(12, 12\) = 12; choose",
    ),
    "rank text": (lambda d: d["sites"]["3"].update(rank="4"), r"3.*rank"),
    "rank half": (lambda d: d["sites"]["3"].update(rank=2.5), r"3.*rank 2\.5"),
    "rank none": (lambda d: d["sites"]["3"].update(rank=None), r"3.*rank"),
    "form typo": (lambda d: d["sites"]["3"].update(form="low-rank"), r"3.*low-rank"),
    "shape": (lambda d: d["sites"]["3"].update(shape=[12, 13]), r"3: the plan says shape \(12, 13\).*plan again"),
    "shape number": (lambda d: d["sites"]["3"].update(shape=12), r"not a (row of a )?subspan plan"),
    "site renamed": (lambda d: rename(d, "3", "layers.3"), r"names 1 sites this model lacks, e\.g\. layers\.3"),
    "site no row": (lambda d: d["sites"].update({"3": 4}), r"not a (row of a )?subspan plan"),
    "rank missing": (lambda d: d["sites"]["3"].pop("rank"), r"3.*'?rank"),
    "field unknown": (lambda d: d["sites"]["3"].update(colour="red"), r"colour"),
    "no sites": (lambda d: d.pop("sites"), r"sites"),
    "empty sites": (lambda d: d.update(sites={}), r"site"),
    "no method": (lambda d: d.pop("method"), r"method"),
    "no args": (lambda d: d.pop("args"), r"args"),
    "no other_bytes": (lambda d: d.pop("other_bytes"), r"other_bytes"),
    "newer format": (
        lambda d: d.update(format=FORMAT + 1),
        rf"format {FORMAT + 1} is newer than {FORMAT}; upgrade",
    ),
    "format text": (lambda d: d.update(format="one"), r"format"),
}


def read_and_check(path) -> None:
    plan = Plan.from_json(path)
    plan.check(shapes(sites(net())))
    assert plan.table().row_count == len(plan.sites)


@pytest.mark.parametrize("name", EDITS)
def test_a_mistake_in_the_file_is_named(name, tmp_path):
    change, culprit = EDITS[name]
    data = json.loads(json.dumps(made(RANKS["lowrank"]).to_dict()))
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=culprit):
        read_and_check(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{'a': 1}", b"[]", b"3", b"null", b'"plan"', b"{}", b"\x93NUMPY\xff"]
)
def test_a_file_that_is_no_plan_is_named(content, tmp_path):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"plan\.json"):
        Plan.from_json(tmp_path / "plan.json")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Plan.from_json(tmp_path / "nowhere.json")


def test_a_plan_for_the_model_passes_its_check():
    plan = made(RANKS["mixed"])
    plan.check(shapes(sites(net())))
    plan.check({**shapes(sites(net())), "more": (3, 3)})
    assert plan == made(RANKS["mixed"])


@pytest.mark.parametrize("limit,rows", [(None, 5), (5, 5), (9, 5), (2, 2), (0, 0)])
def test_the_table_has_a_row_for_every_site_up_to_the_limit(limit, rows):
    row = SitePlan((8, 6), 2, "lowrank", 32, 192, 112, 0.125, "because")
    plan = Plan("welore", {}, {f"layer.{i}": row for i in range(5)}, 1000)
    console = Console(width=200, file=StringIO())
    table = plan.table(limit)
    console.print(table)
    text = console.file.getvalue()
    assert [f"layer.{i}" in text for i in range(5)] == [i < rows for i in range(5)]
    assert text.count("12.50%") == text.count("8x6") == text.count("2/6") == text.count("because") == rows
    assert (table.caption is not None) == (rows < 5)
    assert "rank reduction 66.7%" in table.title and "numbers kept 58.3%" in table.title


def test_a_row_says_its_ridge_once_and_forgets_it():
    row = site_plan((6, 8), 2, lambda rank: 0.5, bits=32)
    once = ridged(row, 1e-3, 5)
    assert once.ridge == 1e-3 and once.reason == f"{row.reason}; ridge 0.001 for 5 tokens in 8 inputs"
    assert ridged(once, 1e-4, 7).reason == f"{row.reason}; ridge 0.0001 for 7 tokens in 8 inputs"
    assert ridged(once, 0.0, 9) == row
