"""A report is one file that needs nothing else, shows every number and believes no text."""

import json
import math
import platform
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from subspan.inspect import Report, environment, loss_curves, rank_heatmap

EVIL = "<script>alert('x')</script> & \"more\""


class Page(HTMLParser):
    """Text of cells and captions, all ids, and every address the page would fetch."""

    def __init__(self, source):
        super().__init__()
        self.cells, self.captions, self.ids, self.tags, self.fetched = [], [], [], [], []
        self.open = None
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.fetched += [attrs[a] for a in ("src", "href", "xlink:href", "data") if a in attrs]
        if tag in ("td", "th", "figcaption"):
            self.open = self.captions if tag == "figcaption" else self.cells
            self.open.append([tag, attrs.get("class"), ""])

    def handle_endtag(self, tag):
        if tag in ("td", "th", "figcaption"):
            self.open = None

    def handle_data(self, data):
        if self.open is not None:
            self.open[-1][2] += data


def filled():
    report = Report(EVIL, "what " + EVIL, seed=7)
    report.section("Results", "One paragraph.\n\nAnother " + EVIL)
    report.table("Kept " + EVIL, ["site", "rank", "share"], [["q_proj", 12345, "50 %"], [EVIL, 3, None]])
    report.figure("Loss " + EVIL, loss_curves({EVIL: [(0, 2.0), (1, 1.0)]}, "loss"))
    report.figure("Ranks", rank_heatmap({"0.q": 1, "1.q": 2}, {"0.q": (4, 4), "1.q": (4, 4)}))
    report.note("Mind " + EVIL)
    report.data.update(ranks={"q_proj": 12}, loss=[2.0, 1.0], ok=True, none=None)
    return report


def test_page_holds_every_cell_and_caption(tmp_path):
    page = Page(filled().write(tmp_path).read_text())
    assert [tuple(cell) for cell in page.cells] == [
        ("th", None, "site"), ("th", "number", "rank"), ("th", "number", "share"),
        ("td", None, "q_proj"), ("td", "number", "12,345"), ("td", "number", "50 %"),
        ("td", None, EVIL), ("td", "number", "3"), ("td", "number", "–"),
    ]  # fmt: skip
    captions = [text for _, _, text in page.captions]
    assert captions == ["Table 1. Kept " + EVIL, "Figure 1. Loss " + EVIL, "Figure 2. Ranks"]


def test_page_escapes_every_text(tmp_path):
    source = filled().write(tmp_path).read_text()
    assert "script" not in Page(source).tags
    # title twice, subtitle, paragraph, cell, two captions, note; the figure's name and its line's label
    assert source.count("&lt;script&gt;") >= 9
    assert "<script" not in source


def test_page_needs_nothing_from_outside(tmp_path):
    source = filled().write(tmp_path).read_text()
    assert 'src="http' not in source
    assert "<link" not in source
    assert "@import" not in source
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in Page(source).fetched)
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<)]+", source)) <= namespaces


def test_ids_are_unique_and_references_resolve(tmp_path):
    source = filled().write(tmp_path).read_text()
    page = Page(source)
    assert len(page.ids) == len(set(page.ids)) > 2
    inner = [a[1:] for a in page.fetched if a.startswith("#")] + re.findall(r"url\(#([^)]+)\)", source)
    assert set(inner) <= set(page.ids)


def test_figures_take_the_ink_of_the_page_and_its_width():
    svg = str(next(b.svg for b in filled().blocks if b.kind == "figure"))
    assert "#2b2d31" not in svg
    assert svg.count("currentColor") > 5
    head = svg[: svg.index(">")]
    assert not re.search(r"\s(width|height)=", head)
    assert "viewBox" in head


def test_same_report_same_page(tmp_path):
    one, two = filled().write(tmp_path / "a"), filled().write(tmp_path / "b")
    assert one.read_bytes() == two.read_bytes()
    assert one.with_suffix(".json").read_bytes() == two.with_suffix(".json").read_bytes()


def test_no_paths_and_no_host_names(tmp_path):
    path = filled().write(tmp_path)
    both = path.read_text() + path.with_suffix(".json").read_text()
    assert str(tmp_path) not in both
    assert len(platform.node()) < 4 or platform.node() not in both


def test_json_round_trips(tmp_path):
    report = filled()
    got = json.loads(report.write(tmp_path).with_suffix(".json").read_text())
    assert got == {
        "title": report.title,
        "subtitle": report.subtitle,
        "data": report.data,
        "environment": environment(7),
    }


def test_json_takes_scalars_and_turns_what_is_not_finite_into_null(tmp_path):
    report = Report("x")
    report.data.update(a=np.float64(0.5), b=torch.tensor(3), c=(1, math.inf), d=torch.tensor(math.nan))
    got = json.loads(report.write(tmp_path).with_suffix(".json").read_text())["data"]
    assert got == {"a": 0.5, "b": 3, "c": [1, None], "d": None}


@pytest.mark.parametrize("value", [torch.ones(2), {1: 2}, {"deep": object()}])
def test_what_json_cannot_hold_is_named_before_anything_is_written(tmp_path, value):
    path = filled().write(tmp_path)
    old = path.read_bytes()
    report = Report("new")
    report.data["bad"] = [0, value]
    with pytest.raises(ValueError, match=r"report\.data\.bad\[1\].* is a "):
        report.write(tmp_path)
    assert path.read_bytes() == old


def test_only_the_two_files_are_left_and_a_second_write_replaces_them(tmp_path):
    folder = tmp_path / "new" / "folder"
    filled().write(folder)
    path = Report("second").write(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.json"]
    assert path == folder / "report.html"
    assert "<h1>second</h1>" in path.read_text()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(FileExistsError, match="taken is a file"):
        Report("x").write(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_row_of_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"'Kept': row 1 has 1 cells.*for 2 columns"):
        Report("x").table("Kept", ["a", "b"], [[1, 2], [3]])


@pytest.mark.parametrize(
    "column, right",
    [
        ([1, 2.5, None], True),
        (["12.5 %", "3.1 MiB", "1.02x"], True),
        (["1.00 ± 0.02", "-3", "inf"], True),
        (["q_proj", 1], False),
        (["", None], False),
        (["3 of 5 runs diverged"], False),
    ],
)
def test_columns_of_numbers_go_right(column, right):
    report = Report("x")
    report.table("t", ["c"], [[value] for value in column])
    assert report.blocks[0].right == (right,)


def test_a_plain_figure_of_the_users_is_shown_as_it_was(tmp_path):
    figure = Figure()
    axes = figure.add_subplot()
    axes.set_title("before")
    report = Report("x")
    report.figure("plain", figure)
    axes.set_title("after")
    source = report.write(tmp_path).read_text()
    assert ">before</text>" in source
    assert "after</text>" not in source


def test_environment_says_the_seed_and_the_versions():
    facts = environment(11)
    assert facts["seed"] == 11
    assert facts["torch"] == torch.__version__
    assert facts["python"] == platform.python_version()
    assert facts["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", str(facts["date"]))
