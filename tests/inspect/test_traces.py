"""A trace sees the gradients there are, disturbs nothing, and its figures show its numbers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan.inspect import (
    GradientTrace,
    bar_figure,
    cosine_heatmap,
    gradient_cosine_matrix,
    gradients,
    leading_frames,
    spectra_over_time,
    subspace_overlap,
    trace_figure,
)
from subspan.inspect.gradients import count_sketch
from subspan.inspect.traces import between, comparison_figure


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.5), nn.Tanh(), nn.Linear(12, 4)).double()


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


BATCH = normal(16, 8), normal(16, 4, seed=1)


def trained(steps=6, watch=None):
    model = net()
    trace = None if watch is None else watch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(3)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(model, (normal(16, 8, seed=step), normal(16, 4, seed=-step))).backward()
        optimizer.step()
        if trace is not None:
            trace(step)
    return model, trace


def whole(model):
    return GradientTrace(model, BATCH, rank=3, when=2, whole=torch.float64, loss=loss)


def test_training_is_the_same_to_the_bit_when_watched():
    plain, _ = trained()
    seen, trace = trained(watch=whole)
    assert trace.steps == [2, 4, 6]
    for a, b in zip(plain.parameters(), seen.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad) and b.requires_grad
    assert seen.training


def test_gradients_are_autograds_in_evaluation_mode():
    model = net()
    got = gradients(model, BATCH, loss=loss)
    model.eval()
    loss(model, BATCH).backward()
    assert torch.equal(got["0"], model[0].weight.grad) and torch.equal(got["3"], model[3].weight.grad)
    frozen = net().requires_grad_(False)
    assert torch.equal(gradients(frozen, BATCH, loss=loss)["0"], got["0"])
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_trace_equals_the_functions_of_its_gradients():
    model = net()
    trace = whole(model)
    given = [{"0": normal(12, 8, seed=i), "3": normal(4, 12, seed=i + 9)} for i in range(4)]
    for step, gs in enumerate(given):
        trace.take(step, gs)
    of = [g["0"] for g in given]
    assert_close(trace.cosines("0"), gradient_cosine_matrix(of))
    frames = [leading_frames(g, 3) for g in of]
    assert_close(trace.overlaps("0", "right")[0, 2].item(), subspace_overlap(frames[0].right, frames[2].right))
    assert_close(trace.steadiness("0"), [subspace_overlap(a.left, b.left) for a, b in pairwise(frames)])
    assert_close(trace.spectra("0"), torch.stack([torch.linalg.svdvals(g) for g in of]))
    assert_close(trace.weight_spectra("0")[0], torch.linalg.svdvals(model[0].weight.detach()))
    energy = trace.captures("0")
    assert_close(energy.diagonal()[1], (frames[1].s[:3].square().sum() / frames[1].s.square().sum()))
    assert bool((energy.diagonal() >= energy.amax(0) - 1e-12).all())


def test_sketches_keep_cosines_to_their_standard_error():
    a = normal(4000)
    size = 1024
    exact, found = [], []
    for i in range(40):
        b = 0.7 * a + normal(4000, seed=i + 1)
        exact.append(gradient_cosine_matrix([a, b])[0, 1])
        found.append(gradient_cosine_matrix([count_sketch(a, size), count_sketch(b, size)])[0, 1])
    error = torch.stack(found) - torch.stack(exact)
    assert error.square().mean().sqrt() <= 1.5 / size**0.5
    assert_close(count_sketch(3 * a, size), 3 * count_sketch(a, size))


def test_a_sketching_trace_forgets_whole_gradients_and_says_what_it_holds():
    _, small = trained(watch=lambda m: GradientTrace(m, BATCH, rank=2, when={1, 5}, sketch=16, loss=loss))
    assert small.steps == [1, 5]
    assert_close(small.cosines("0").diagonal(), torch.ones(2, dtype=torch.float64))
    per_moment = sum(2 * (m + n) + 2 * min(m, n) + 16 for m, n in ((12, 8), (4, 12)))
    assert small.nbytes == 8 * 2 * per_moment
    with pytest.raises(ValueError, match=r"whole=torch.float32"):
        small.captures("0")


def test_what_a_trace_cannot_do_is_refused():
    trace = whole(net())
    with pytest.raises(ValueError, match="nothing was recorded"):
        trace.cosines("0")
    with pytest.raises(ValueError, match="7 is not watched; there are: 0, 3"):
        trace.cosines("7")
    with pytest.raises(ValueError, match="step 2: no gradient of 3"):
        trace.take(2, {"0": normal(12, 8)})
    with pytest.raises(ValueError, match=r"gradient of 0.*nan"):
        trace.take(2, {"0": normal(12, 8) * float("nan"), "3": normal(4, 12)})
    with pytest.raises(ValueError, match="must all be 1 or more"):
        GradientTrace(net(), BATCH, rank=0)
    with pytest.raises(ValueError, match="does not depend on 3"):
        gradients(net(), BATCH, loss=lambda model, batch: model[0](batch[0]).sum())


def test_heatmaps_show_the_cosines_and_name_the_ends():
    low, high = torch.eye(3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)
    figure = cosine_heatmap({"0.q": low, "3.up": high}, [0, 5, 10])
    assert np.array_equal(figure.axes[0].images[0].get_array(), low.numpy())
    assert figure.axes[1].images[0].get_clim() == (-1, 1)
    assert figure.get_suptitle() == "Cosines of gradients at checkpoints agree most in up 3, least in q 0"
    assert (between(low), between(high), between(torch.ones(1, 1))) == (0, 1, 1)
    with pytest.raises(ValueError, match="do not fit 2 checkpoints"):
        cosine_heatmap({"0.q": low}, [0, 5])


def test_traces_average_the_sites_of_a_type():
    axes = trace_figure({"0.q": [0, 1], "1.q": [1, 0.5], "0.up": [0.25, 0]}, [0, 9], "overlap").axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_label()[0] != "_"}
    assert lines == {"q": [0.5, 0.75], "up": [0.25, 0]}
    assert axes.get_title(loc="left") == "Overlap: highest at the end for q, 0.75; lowest for up, 0"
    with pytest.raises(ValueError, match="values for 3 steps"):
        trace_figure({"0.q": [0, 1]}, [0, 1, 2], "overlap")
    with pytest.raises(ValueError, match="lines is empty"):
        trace_figure({}, [0], "overlap")


def test_spectra_over_time_are_scaled_by_their_largest():
    figure = spectra_over_time({"0.q": torch.tensor([[4.0, 2.0], [8.0, 1.0]])}, [0, 5])
    assert np.array_equal(figure.axes[0].images[0].get_array(), [[1, 1], [0.5, 0.125]])
    with pytest.raises(ValueError, match="2 spectra for 1 steps"):
        spectra_over_time({"0.q": torch.ones(2, 2)}, [0])


def test_bars_are_means_and_dots_are_sites():
    axes = bar_figure({"0.q": 2, "1.q": 4, "0.up": 0}, "intruders", chance={"0.q": 1, "1.q": 1, "0.up": 1}).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [3, 0]
    assert axes.collections[0].get_offsets()[:, 1].tolist() == [2, 4]
    assert axes.get_title(loc="left") == "Intruders: most in q, 3; least in up, 0"


def test_sites_that_share_a_block_and_type_are_averaged():
    upper, _ = comparison_figure({"0.1.q": (0.1, 1.0), "0.2.q": (0.3, 0.5)}, 4).axes
    assert_close(list(upper.lines[0].get_ydata()), [20.0])
