"""Copies of a model that exchange gradients, or only their coordinates in the frames."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from subspan.optim import Adam, Optim, Paired, Preconditioned, Recipe
from subspan.optim.reduce import reduce_projected

# Numbers in the matrices, their biases and, at rank 2, their coordinates: (10, 6), (5, 10) and (3, 5).
MATRICES, BIASES, COORDINATES = 60 + 50 + 15, 10 + 5 + 3, 2 * (10 + 10 + 5)


def check_same(one, other, tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def ddp(run):
    return run("ddp", 2)


@pytest.fixture(scope="module")
def alone(run):
    return run("alone", 1)


@pytest.mark.parametrize("way", ["whole", "projected"])
@pytest.mark.parametrize("name", ["galore", "fira"])
def test_two_copies_take_the_steps_of_one_process_and_their_bases_are_bit_equal(ddp, alone, name, way):
    (weights, frames), (others, other_frames) = ddp[name, way]
    check_same(weights, alone[name]["weights"], 1e-10)
    assert len(frames) == 3
    for key in frames:
        assert torch.equal(frames[key], other_frames[key])
    for key in weights:
        assert torch.equal(weights[key], others[key])


def test_coordinates_are_sent_where_they_serve_and_the_bytes_are_counted(ddp):
    refreshes = len([t for t in range(1, 21) if (t - 1) % 7 == 0])
    whole = 20 * 8 * (MATRICES + BIASES)
    sent = refreshes * 8 * (MATRICES + BIASES) + (20 - refreshes) * 8 * (COORDINATES + BIASES)
    assert ddp["galore", "projected", "traffic"] == (sent, whole, whole - sent)


def test_a_residual_that_looks_outside_is_sent_whole_gradients(ddp):
    sent, whole, saved = ddp["fira", "projected", "traffic"]
    assert sent == whole == 20 * 8 * (MATRICES + BIASES)
    assert saved == 0


@pytest.mark.parametrize("way", [0, 1], ids=["whole", "projected"])
def test_nan_in_the_loss_of_one_process_is_the_same_error_at_the_same_step_on_both(ddp, way):
    one, other = ddp["nan"][way]
    assert one == other == "0.weight: " + one.removeprefix("0.weight: ")
    assert "holds nan" in one and one.endswith("after [7, 7, 7, 7, 7, 7]")


def test_a_model_that_is_not_ddps_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"works on DistributedDataParallel.*not Linear; wrap"):
        reduce_projected(model, Optim(model.named_parameters(), Adam(), lr=0.1))


def test_a_source_that_looks_at_whole_gradients_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(2, 2))
        opt = Optim(model.module.named_parameters(), Recipe(Adam(), Paired(Preconditioned())), lr=0.1)
        with pytest.raises(ValueError, match="changes whole gradients"):
            reduce_projected(model, opt)
    finally:
        dist.destroy_process_group()
