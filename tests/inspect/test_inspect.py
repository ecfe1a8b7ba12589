"""Surveys equal closed forms of known spectra; figures show exactly the numbers they were given."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from torch import nn
from torch.testing import assert_close

from subspan import linalg
from subspan.budget import Err, WeLore
from subspan.inspect import (
    loss_curves,
    parse_site,
    perplexity_figure,
    rank_heatmap,
    spectra_figure,
    styles,
    survey,
)
from subspan.inspect.plots import log_ticks, spread


def frame(m, k, seed):
    """Orthonormal columns (m, k)."""
    return linalg.qr(torch.randn(m, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def layer(s, m=None, n=None, seed=0):
    """A float64 linear layer (m, n) with singular values s."""
    s = torch.as_tensor(s, dtype=torch.float64)
    m, n = m or len(s), n or len(s)
    made = nn.Linear(n, m, bias=False, dtype=torch.float64)
    made.weight.data = frame(m, len(s), seed) * s @ frame(n, len(s), seed + 1).mT
    return made


def model(**by_type):
    """One block per entry of each list: `layers.<block>.<type>`."""
    count = max(len(spectra) for spectra in by_type.values())
    blocks = [
        nn.ModuleDict({k: layer(v[i], seed=7 * i) for k, v in by_type.items() if i < len(v)}) for i in range(count)
    ]
    net = nn.Module()
    net.layers = nn.ModuleList(blocks)
    return net


def random_model(blocks=3):
    made = torch.Generator().manual_seed(1)
    spectra = [torch.rand(12, generator=made, dtype=torch.float64).sort(descending=True).values for _ in range(6)]
    return model(q_proj=spectra[:blocks], up_proj=[s.square() for s in spectra[3 : 3 + blocks]])


@pytest.mark.parametrize("m, n", [(16, 16), (40, 16), (16, 23)])
def test_geometric_spectrum_has_the_closed_forms(m, n):
    ratio, k = 0.8, 16
    row = survey(nn.Sequential(layer([ratio**i for i in range(k)], m, n))).rows["0"]
    assert row.shape == (m, n)
    assert_close(row.stable_rank, (1 - ratio ** (2 * k)) / (1 - ratio**2))
    p = [ratio**i * (1 - ratio) / (1 - ratio**k) for i in range(k)]
    assert_close(row.effective_rank, math.exp(-sum(x * math.log(x) for x in p)))
    # sum of the first j squares is proportional to 1 - ratio^(2j)
    assert row.energy_rank == math.ceil(math.log(1 - 0.9 * (1 - ratio ** (2 * k))) / math.log(ratio**2))
    # mean of log(s_i / s_9) over i <= 8 is 4.5 log(1 / ratio)
    assert_close(row.tail_index, 1 / (4.5 * math.log(1 / ratio)))


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_of_equal_directions_every_effective_rank_counts_them(kept):
    row = survey(nn.Sequential(layer([2.0] * kept + [0.0] * (8 - kept) + [0.0]))).rows["0"]
    assert_close(row.stable_rank, float(kept))
    assert_close(row.effective_rank, float(kept), rtol=0, atol=1e-6)
    assert row.energy_rank == math.ceil(0.9 * kept)


def test_welore_classes_by_hand():
    # Pooled levels 0 0 .03 .1 .93 .97 1 1 have median .52: one level of the first reaches it, three of the second.
    got = survey(model(low=[[4, 1.3, 1.1, 1]], high=[[4, 3.9, 3.8, 1]])).rows
    assert (got["layers.0.low"].rank, got["layers.0.low"].kind) == (1, "LRC")
    assert (got["layers.0.high"].rank, got["layers.0.high"].kind) == (3, "N-LRC")


@pytest.mark.parametrize("err", [0.0, 0.3, 0.5, 0.9])
def test_welore_classes_are_the_budgets(err):
    got = survey(random_model(), err=err)
    budget, shapes = WeLore(Err(err)), {name: row.shape for name, row in got.rows.items()}
    assert {name: row.rank for name, row in got.rows.items()} == budget(got.spectra, shapes)
    for row in got.rows.values():
        assert (row.kind == "LRC") == budget.lowrank(row.rank, *row.shape)
    assert abs(1 - sum(r.rank for r in got.rows.values()) / (12 * len(got.rows)) - err) <= 1 / (12 * len(got.rows))


def test_survey_does_not_see_rotations_or_a_common_scale():
    net = random_model()
    before = survey(net).rows
    for at, module in enumerate(m for m in net.modules() if isinstance(m, nn.Linear)):
        module.weight.data = 3.7 * frame(12, 12, 50 + at) @ module.weight.data @ frame(12, 12, 90 + at)
    for name, row in survey(net).rows.items():
        old = before[name]
        assert (row.rank, row.kind, row.energy_rank) == (old.rank, old.kind, old.energy_rank)
        now = [row.stable_rank, row.effective_rank, row.tail_index]
        assert_close(now, [old.stable_rank, old.effective_rank, old.tail_index], rtol=1e-9, atol=0)


def test_half_precision_weights_are_surveyed_in_float32():
    net = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    torch.manual_seed(0)
    nn.init.normal_(net[0].weight)
    got = survey(net).spectra["0"]
    assert got.dtype == torch.float32
    assert_close(got.square().sum(), net[0].weight.detach().float().square().sum())


def test_given_spectra_replace_the_computation_and_are_sorted():
    net = random_model()
    full = survey(net)
    seen = []

    def track(names):
        seen.extend(names)
        return names

    again = survey(net, spectra={name: s.flip(0) for name, s in full.spectra.items()}, track=track)
    assert dict(again.rows) == dict(full.rows)
    assert seen == list(full.rows)
    other = {"layers.0.q_proj": torch.tensor([5.0] + [0.0] * 11)}
    assert survey(net, spectra=other).rows["layers.0.q_proj"].stable_rank == 1.0


def test_a_spectrum_of_another_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"layers\.0\.q_proj.*shape \(5,\).*12 x 12 weight has 12 singular values"
    ):
        survey(random_model(), spectra={"layers.0.q_proj": torch.ones(5)})


def test_a_weight_with_nan_is_named():
    net = random_model()
    net.layers[1]["up_proj"].weight.data[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.up_proj.*nan at \(2, 3\)"):
        survey(net)


@pytest.mark.parametrize("err", [-0.1, 1.0])
def test_err_outside_its_range_is_refused(err):
    with pytest.raises(ValueError, match="outside"):
        survey(random_model(), err=err)


@pytest.mark.parametrize("level", [0.0, 2.0])
def test_flat_matrices_keep_full_rank_and_do_not_move_the_threshold(level):
    alone = survey(model(low=[[4, 1.3, 1.1, 1]], high=[[4, 3.9, 3.8, 1]])).rows
    mixed = survey(model(low=[[4, 1.3, 1.1, 1]], high=[[4, 3.9, 3.8, 1]], same=[[level] * 4])).rows
    assert (mixed["layers.0.same"].rank, mixed["layers.0.same"].kind) == (4, "flat")
    for name in alone:
        assert (mixed[name].rank, mixed[name].kind) == (alone[name].rank, alone[name].kind)
    only = survey(model(same=[[level] * 4])).rows["layers.0.same"]
    assert (only.rank, only.kind) == (4, "flat")


def test_types_are_means_over_their_matrices():
    got = survey(random_model())
    rows = [got.rows[f"layers.{i}.up_proj"] for i in range(3)]
    mean = got.types()["up_proj"]
    assert mean.count == 3
    assert_close(mean.stable_rank, sum(r.stable_rank for r in rows) / 3 / 12)
    assert_close(mean.effective_rank, sum(r.effective_rank for r in rows) / 3 / 12)
    assert_close(mean.tail_index, sum(r.tail_index for r in rows) / 3)
    assert_close(mean.energy_rank, sum(r.energy_rank for r in rows) / 3 / 12)
    assert_close(mean.rank, sum(r.rank for r in rows) / 3 / 12)
    assert_close(mean.lrc, sum(r.kind == "LRC" for r in rows) / 3)


def test_tables_print_the_rows():
    got = survey(random_model())
    table = got.table()
    names, ranks = list(table.columns[0].cells), list(table.columns[6].cells)
    assert names == list(got.rows)
    assert ranks == [f"{row.rank}/12" for row in got.rows.values()]
    short = got.table(limit=2)
    assert list(short.columns[0].cells) == names[:2]
    assert short.caption == "4 more sites; --json prints all"
    by_type = got.by_type()
    assert list(by_type.columns[0].cells) == ["q_proj", "up_proj"]
    assert list(by_type.columns[-1].cells) == [f"{mean.lrc:.0%}" for mean in got.types().values()]


def test_to_dict_survives_json_and_has_no_infinity():
    got = survey(model(low=[[4, 1.3, 1.1, 1]], same=[[2.0] * 4]))
    data = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert data == got.to_dict()
    assert data["sites"]["layers.0.low"]["stable_rank"] == got.rows["layers.0.low"].stable_rank
    exact = survey(model(one=[[3.0]]))
    assert exact.rows["layers.0.one"].tail_index == math.inf
    assert exact.to_dict()["sites"]["layers.0.one"]["tail_index"] is None


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.layers.12.self_attn.q_proj", (12, "q_proj")),
        ("h.3.mlp.experts.7.up_proj", (3, "up_proj")),
        ("lm_head", (None, "lm_head")),
        ("0", (0, "0")),
    ],
)
def test_parse_site(name, expected):
    assert parse_site(name) == expected


def lines(figure):
    return [np.array(line.get_xydata()) for line in figure.axes[0].get_lines()]


def text(figure):
    return " ".join(t.get_text() for t in figure.axes[0].texts)


def test_spectra_lines_are_the_normalised_spectra_one_colour_per_type():
    got = survey(random_model())
    figure = spectra_figure(got.spectra)
    drawn = figure.axes[0].get_lines()
    for line, s in zip(drawn, got.spectra.values(), strict=True):
        assert_close(np.array(line.get_ydata()), (s / s.max()).numpy())
        assert_close(np.array(line.get_xdata()), np.arange(12) / 11)
    colours = {name: line.get_color() for name, line in zip(got.spectra, drawn, strict=True)}
    for name, colour in colours.items():
        assert colour == colours[f"layers.0.{parse_site(name)[1]}"]
    assert len(set(colours.values())) == 2
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["q_proj", "up_proj"]


def test_perplexity_title_compares_sizes_as_they_are_printed():
    points = {"uniform": [(0.7986, 44.6)], "welore": [(0.9, 20.0), (0.7991, 43.9)]}
    title = perplexity_figure(points, dense=10.0).axes[0].get_title("left")
    assert title == "At 80% of the bytes welore is lowest, 43.9 (4.39 x dense)"


def test_spectra_title_names_the_fastest_and_slowest_type():
    figure = spectra_figure({"0.slow": torch.tensor([1.0, 0.9]), "0.fast": torch.tensor([1.0, 0.1])})
    assert figure.axes[0].get_title("left") == "Singular values of 2 matrices: fast falls fastest, slow slowest"


def test_a_zero_matrix_draws_zeros():
    assert_close(lines(spectra_figure({"0.a": torch.zeros(3)}))[0][:, 1], np.zeros(3))


def test_heatmap_is_rank_over_full_and_blank_where_there_is_no_site():
    ranks = {"layers.0.k_proj": 1, "layers.2.q_proj": 3, "layers.0.q_proj": 8, "lm_head": 2}
    shapes = {"layers.0.k_proj": (4, 8), "layers.2.q_proj": (8, 8), "layers.0.q_proj": (8, 8), "lm_head": (99, 8)}
    axes = rank_heatmap(ranks, shapes).axes[0]
    nan = np.nan
    expected = np.array([[1.0, 0.25, nan], [0.375, nan, nan], [nan, nan, 0.25]])
    assert_close(axes.images[0].get_array().filled(nan), expected, equal_nan=True)
    assert axes.images[0].get_clim() == (0, 1)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["q_proj", "k_proj", "lm_head"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "2", "none"]
    cells = {t.get_position(): t.get_text() for t in axes.texts}
    assert cells == {(0, 0): "100", (1, 0): "25", (0, 1): "38", (2, 2): "25"}
    assert axes.get_title("left") == "Rank kept, % of full: 50% overall, from 25% (k_proj 0) to 100% (q_proj 0)"


def test_heatmap_pools_experts_by_rank():
    ranks = {"0.experts.0.up": 1, "0.experts.1.up": 4}
    figure = rank_heatmap(ranks, {"0.experts.0.up": (4, 4), "0.experts.1.up": (16, 16)})
    assert_close(figure.axes[0].images[0].get_array().filled(np.nan), np.array([[5 / 20]]))


def test_loss_lines_are_the_curves_and_labels_their_ends():
    curves = {"adam": [(0, 4.0), (10, 3.0), (20, 2.5)], "fira": [(0, 4.0), (10, 2.0)]}
    figure = loss_curves(curves, "validation loss")
    for drawn, given in zip(lines(figure), curves.values(), strict=True):
        assert_close(drawn, np.array(given, dtype=float))
    assert text(figure) == "adam: 2.5 fira: 2"
    assert figure.axes[0].get_title("left") == "Validation loss: fira ends lowest, at 2"


def test_a_diverged_run_says_so_and_does_not_win():
    figure = loss_curves({"a": [(0, 1.0), (1, math.nan)], "b": [(0, 0.5), (1, 0.4)]}, "loss")
    assert "a: 1, then not finite" in text(figure)
    figure.draw_without_rendering()
    with pytest.raises(ValueError, match="'a' has no finite value"):
        loss_curves({"a": [(0, math.inf)]}, "loss")


def test_perplexity_lines_are_the_points_in_percent_on_a_log_axis():
    points = {"welore": [(0.5, 40.0), (0.9, 13.0)], "svd": [(0.9, 20.0), (0.5, math.inf)]}
    figure = perplexity_figure(points, 12.0)
    welore, svd, dense = lines(figure)
    assert_close(welore, np.array([[90.0, 13.0], [50.0, 40.0]]))
    assert_close(svd, np.array([[90.0, 20.0], [50.0, math.inf]]))
    assert_close(dense[:, 1], np.array([12.0, 12.0]))
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_xlim()[0] > 90 > 50 > axes.get_xlim()[1]
    assert axes.get_ylim()[0] < 12 < 40 < axes.get_ylim()[1]
    assert text(figure) == "dense: 12 welore: 40 svd: 20, then not finite"
    assert axes.get_title("left") == "At 50% of the bytes welore reaches 40 (3.33 x dense)"


@pytest.mark.parametrize("draw", [
    lambda: spectra_figure({}), lambda: rank_heatmap({}, {}), lambda: loss_curves({}, "loss"),
    lambda: perplexity_figure({}, 1.0),
])  # fmt: skip
def test_nothing_to_draw_is_an_error(draw):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw()


def test_figures_refuse_what_they_cannot_show():
    with pytest.raises(ValueError, match="'a' has no points"):
        loss_curves({"a": []}, "loss")
    with pytest.raises(ValueError, match=r"0\.a has a rank but no shape"):
        rank_heatmap({"0.a": 1}, {})
    with pytest.raises(ValueError, match=r"perplexity 0\.0 is not above 0"):
        perplexity_figure({"a": [(0.5, 0.0)]}, 12.0)
    with pytest.raises(ValueError, match="no style for 'b'"):
        loss_curves({"b": [(0, 1.0)]}, "loss", style=styles(["a"]))


def test_styles_are_distinct_and_keep_a_series_colour_across_figures():
    names = [f"s{i}" for i in range(28)]
    table = styles(names)
    assert len(set(table.values())) == 28
    figure = loss_curves({"s3": [(0, 1.0), (1, 0.5)]}, "loss", style=table)
    assert figure.axes[0].get_lines()[0].get_color() == table["s3"].color


def test_spread_keeps_order_mean_and_gap_and_leaves_what_is_apart():
    rng = np.random.default_rng(0)
    for _ in range(20):
        given = rng.random(7)
        got = np.array(spread(list(given), 0.1))
        assert (np.diff(np.sort(got)) >= 0.1 - 1e-12).all()
        assert (np.argsort(got) == np.argsort(given)).all()
        assert_close(got.mean(), given.mean())
    assert spread([0.9, 0.1, 0.5], 0.2) == pytest.approx([0.9, 0.1, 0.5])


@pytest.mark.parametrize("low, high", [(11.4, 18.1), (9, 12000), (1, 1e9), (12.1, 12.4)])
def test_log_ticks_are_a_handful_inside_the_axis(low, high):
    ticks = log_ticks(low, high)
    assert 3 <= len(ticks) <= 10
    assert ticks == sorted(ticks)
    assert low <= ticks[0] <= ticks[-1] <= high


def overlaps(figure):
    """Pairs of labels whose text boxes, threads aside, intersect once drawn."""
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(t) for t in figure.axes[0].texts]
    return [(i, j) for i in range(len(boxes)) for j in range(i) if boxes[i].overlaps(boxes[j])]


def test_end_labels_never_overlap_and_stay_on_the_page():
    same = {f"method {i}": [(0, 5.0), (100, 2.0 + 1e-3 * i)] for i in range(8)}
    close = {f"method {i}": [(0.9, 13.0), (0.5, 20.0 + 0.01 * i)] for i in range(6)}
    for figure in (loss_curves(same, "loss"), perplexity_figure(close, 12.0)):
        assert overlaps(figure) == []
        page = figure.bbox
        for label in figure.axes[0].texts:
            box = Text.get_window_extent(label)
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
