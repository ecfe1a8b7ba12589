"""Measured errors are those of the outputs; on the text they were predicted from, they are those predicted."""

import pytest
import torch
from matplotlib.colors import to_rgba
from torch import nn
from torch.testing import assert_close

from subspan.budget import Err, Ratio, Uniform
from subspan.compress import study
from subspan.inspect import compression_report, error_figure, measured_errors, write_page
from subspan.inspect.errors import by_type
from subspan.metric import Covariance, Gram, Plain


def net(bias=True):
    torch.manual_seed(0)
    blocks = [
        nn.ModuleDict({"up": nn.Linear(6, 8, bias=bias), "down": nn.Linear(8, 6, bias=bias)}) for _ in range(2)
    ]
    model = Chain(nn.ModuleList(blocks)).double()
    return model.train()


class Chain(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)) + 1)
        return x


def batches(seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 10, 6, generator=draw, dtype=torch.float64) + 0.5 for _ in range(3)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("measure", [Gram(), Covariance()], ids=["gram", "covariance"])
def test_on_the_calibration_text_what_is_measured_is_what_was_predicted(measure, bias):
    model = net(bias)
    taken = study(model, measure, batches=batches())
    plan = taken.plan(Uniform(Err(0.5)))
    done = taken.apply(model, plan)
    swaps = dict(done.swaps)
    done.undo()
    found = measured_errors(model, swaps, batches(), centred=isinstance(measure, Covariance))
    assert set(found) == set(plan.sites)
    for name, row in plan.sites.items():
        assert_close(found[name], row.error, rtol=1e-9, atol=0)
    assert model.training and not any(m._forward_hooks for m in model.modules())


def test_the_first_layer_does_not_care_what_comes_after_it_and_the_last_one_does():
    model = net()
    taken = study(model, Plain())
    with taken.apply(model, taken.plan(Uniform(Ratio(0.6)))) as done:
        swaps = dict(done.swaps)
        through = measured_errors(model, swaps, batches())
    dense = measured_errors(model, swaps, batches())
    assert through["blocks.0.up"] == dense["blocks.0.up"]
    assert abs(through["blocks.1.down"] - dense["blocks.1.down"]) > 1e-6


def test_no_smaller_error_than_under_the_gram_metric_of_the_same_text():
    model = net()
    found = {}
    for measure in (Plain(), Gram()):
        taken = study(model, measure, batches=batches())
        done = taken.apply(model, taken.plan(Uniform(Err(0.5))))
        swaps = dict(done.swaps)
        done.undo()
        found[type(measure)] = measured_errors(model, swaps, batches())
    assert all(found[Gram][name] <= error * (1 + 1e-9) for name, error in found[Plain].items())
    assert found[Gram] != found[Plain]


def test_a_convolution_counts_every_place_of_the_image():
    torch.manual_seed(0)
    old, new = nn.Conv2d(2, 3, 2).double(), nn.Conv2d(2, 3, 2).double()
    new.load_state_dict({"weight": old.weight * 0.9, "bias": old.bias})
    image = [torch.randn(2, 2, 5, 5, dtype=torch.float64)]
    assert_close(measured_errors(nn.Sequential(old), {"0": (old, new)}, image)["0"], 0.1)


def test_a_site_that_is_not_reached_or_not_of_this_edit_is_named():
    model = net()
    spare = nn.Linear(3, 3).double()
    model.spare = spare
    with pytest.raises(ValueError, match=r"no batch reached spare; use more data or leave the site out"):
        measured_errors(model, {"spare": (spare, nn.Linear(3, 3))}, batches())
    stranger = nn.Linear(6, 8).double()
    ours = {"blocks.0.up": (model.blocks[0]["up"], stranger), "blocks.1.up": (stranger, stranger)}
    with pytest.raises(ValueError, match=r"blocks\.1\.up is neither the old layer nor the new one"):
        measured_errors(model, ours, batches())
    assert not any(m._forward_hooks for m in model.modules())
    broken = nn.Linear(6, 8).double()
    broken.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"squared errors and outputs of blocks\.0\.up .* holds nan"):
        measured_errors(model, {"blocks.0.up": (model.blocks[0]["up"], broken)}, batches())


PREDICTED = {"0.up": 0.1, "1.up": 0.2, "0.down": 0.05, "1.down": 0.0}
MEASURED = {"0.up": 0.15, "1.up": 0.2, "0.down": 0.2, "1.down": 0.3}


def test_the_figure_shows_every_pair_of_errors_and_the_diagonal():
    (axes,) = error_figure(PREDICTED, MEASURED).axes
    shown = {}
    for points in axes.collections:
        shown[points.get_label()] = sorted(tuple(map(float, p)) for p in points.get_offsets())
    wanted = {"up": [(10.0, 15.0), (20.0, 20.0)], "down": [(5.0, 20.0)]}
    assert {k: [tuple(round(v, 9) for v in p) for p in ps] for k, ps in shown.items()} == wanted
    line = axes.lines[0]
    assert list(line.get_xdata()) == list(line.get_ydata()) == list(axes.get_xlim()) == list(axes.get_ylim())
    assert axes.get_title(loc="left") == "Measured over predicted error: 1.5 in the middle, 4 at down 0"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_a_type_has_one_colour_whatever_else_is_drawn():
    def colour(predicted):
        (axes,) = error_figure(predicted, dict.fromkeys(predicted, 0.1)).axes
        return {p.get_label(): tuple(p.get_facecolor()[0][:3]) for p in axes.collections}

    alone, both = colour({"0.up_proj": 0.2}), colour({"0.q_proj": 0.3, "0.up_proj": 0.2})
    assert alone["up_proj"] == both["up_proj"] != both["q_proj"] == to_rgba("#0072b2")[:3]


def test_without_a_pair_of_errors_there_is_nothing_to_draw():
    with pytest.raises(
        ValueError, match="both a predicted and a measured error is empty: there is nothing to draw"
    ):
        error_figure({"0.up": 0.0, "1.up": 0.5}, {"0.up": 0.5})


def test_means_by_type():
    rows = by_type(PREDICTED, MEASURED)
    assert rows == [("up", 2, "15.00%", "17.50%"), ("down", 2, "2.50%", "25.00%")]


def test_the_page_holds_ranks_errors_and_every_layer(tmp_path):
    model = net()
    taken = study(model, Gram(), batches=batches())
    plan = taken.plan(Uniform(Err(0.5)), method="svd_llm")
    done = taken.apply(model, plan)
    swaps = dict(done.swaps)
    done.undo()
    found = measured_errors(model, swaps, batches(2))
    page = compression_report(plan, found, model="net")
    source = write_page(page, tmp_path / "new" / "net.html").read_text()
    assert source.count("<svg") == 2
    assert all(f"{error:.2%}" in source for error in found.values())
    assert all(f"{row.error:.2%}" in source for row in plan.sites.values())
    assert page.data["measured"] == found and page.data["plan"] == plan.to_dict()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["net.html"]


def test_a_page_without_measured_errors_has_the_ranks_alone():
    plan = study(net()).plan(Uniform(Err(0.5)))
    blocks = compression_report(plan, {}).blocks
    assert [b.kind for b in blocks].count("figure") == 1
    assert len(next(b for b in blocks if b.title == "Every matrix.").rows) == len(plan.sites)
