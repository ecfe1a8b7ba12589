"""The functions of subspan.shards: cut over two processes they give what they give on plain tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from subspan import shards

WORKER = Path(__file__).with_name("shard_worker.py")
ORDERED_SUMS = ("pending", "settled", "add_product")  # the processes add in another order than one alone


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found: for every shape and axis that a tensor was cut along, and on other meshes."""
    folder = tmp_path_factory.mktemp("shards")
    command = [sys.executable, "-W", "ignore", str(WORKER), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture
def cases(found):
    """(rank, the axis that was cut, what that process found) of every case."""
    return [(rank, axis, c) for rank in (0, 1) for (_, axis), c in found[rank]["cases"].items()]


def part_of(x, axis, rank):
    """The rows or columns that a process holds when x is cut in two along an axis, the first part the larger."""
    if axis is None:
        return x
    half = -(-x.shape[axis] // 2)
    return x.narrow(axis, 0, half) if rank == 0 else x.narrow(axis, half, x.shape[axis] - half)


def placed(results, name):
    return results[name][2]


def test_every_function_gives_what_it_gives_on_plain_tensors(cases):
    for _, axis, case in cases:
        for name, (one, many, _) in case["results"].items():
            if name.startswith(ORDERED_SUMS):
                assert_close(many, one, rtol=0, atol=1e-14)
            else:
                assert torch.equal(one, many), (name, axis)


def test_layouts_come_out_as_they_are_named(cases):
    for _, axis, case in cases:
        results = case["results"]
        assert placed(results, "whole") == "plain"
        assert placed(results, "spread") is None
        assert placed(results, "laid") == axis
        for other in (-1, -2):
            assert placed(results, f"recut {other}") == other
            assert placed(results, f"joined {other}") == (None if axis == other else axis)
        assert placed(results, "recut another shape") == axis


def test_a_pending_sum_settles_along_the_axis_asked_for(cases):
    for _, axis, case in cases:
        results = case["results"]
        before = placed(results, "pending")
        # torch copies the one row of a matrix before it multiplies
        assert (before == "pending") == (axis == -2 and case["x"].shape[-2] > 1)
        for other in (None, -1, -2):
            assert placed(results, f"settled {other}") == (other if before == "pending" else before)


def test_picking_along_a_cut_axis_cuts_the_other(cases):
    for _, axis, case in cases:
        for along in (-1, -2):
            expected = -3 - along if axis == along else axis
            assert placed(case["results"], f"picked {along} odd") == expected
            assert placed(case["results"], f"add_picked {along} odd") == axis
            assert placed(case["results"], f"among_zeros {along} odd") == expected


def test_a_process_holds_its_own_part_in_the_same_memory(cases):
    for rank, axis, case in cases:
        x, parts = case["x"], case["parts"]
        assert torch.equal(parts["local"], part_of(x, axis, rank))
        assert torch.equal(parts["doubled"], 2 * x)
        for along in range(-2, 0):
            every = torch.arange(x.shape[along])
            assert torch.equal(parts["numbers", along], part_of(every, -1 if axis == along else None, rank))


def test_here_finds_the_numbers_a_process_holds(cases):
    for _, _, case in cases:
        x, parts = case["x"], case["parts"]
        for along in (-1, -2):
            held, size = parts["numbers", along], x.shape[along]
            for name, index in {"odd": torch.arange(size)[::2], "last": torch.arange(size)[-1:]}.items():
                at, mine = parts["here", along][name]
                assert torch.equal(held[at], index[mine])
                assert set(index.tolist()) & set(held.tolist()) == set(index[mine].tolist())


def test_beside_cuts_only_the_axes_asked_for_and_the_batch(cases):
    for rank, axis, case in cases:
        for axes in ((), (-1,), (-2,), (-2, -1)):
            cut = axis if axis in (*axes, -3) else None
            assert torch.equal(case["parts"]["beside", axes], part_of(case["x"], cut, rank))


def test_the_way_a_tensor_is_cut_is_told_apart(cases):
    for rank, axis, case in cases:
        parts = case["parts"]
        assert parts["is_cut"] and parts["is_cut_along"] == ([] if axis is None else [axis])
        assert parts["cut_number"] == (0 if axis is None else rank)
        others = {"copies": axis is None, "rows": axis == -2}
        assert parts["cut_alike"] == ["same", *(name for name, alike in others.items() if alike)]


def test_copies_share_a_number_and_parts_over_two_dimensions_do_not(found):
    for rank in (0, 1):
        for shape in ((1, 2), (2, 1)):
            grid = found[rank]["grid"]
            across = shape.index(2)
            assert grid[shape, "rows, columns"] == rank
            assert grid[shape, "copies, rows"] == (rank if across == 1 else 0)
            assert grid[shape, "rows, copies"] == (rank if across == 0 else 0)


def test_what_all_processes_know_is_not_sent(cases):
    for _, axis, case in cases:
        sent = dict(case["sent"])
        assert sent.pop("whole") == (axis is not None)
        assert not any(sent.values()), sent


def test_rebuilt_keeps_the_order_in_memory(found):
    for rank in (0, 1):
        turned = found[rank]["turned"]
        assert torch.equal(turned["columns"], turned["x"]) and turned["columns.stride"] == (1, 5)
        assert torch.equal(turned["transposed part"], part_of(turned["x"], -2, rank))
        assert torch.equal(turned["pending"], torch.full((3,), 1.0 + 2.0))


@pytest.mark.parametrize("shape", [(5,), (5, 3), (2, 5, 3)])
def test_strides_of_a_whole_are_those_of_its_parts_order(shape):
    by_columns = torch.empty(shape[::-1]).permute(*reversed(range(len(shape))))
    for x in (torch.empty(shape), by_columns):
        assert shards.strides(x, shape) == x.stride()


def test_plain_tensors_pass_through_untouched():
    x = torch.ones(2, 3)
    assert not shards.is_cut(x) and not shards.is_cut_along(x, -1) and shards.cut_alike(x, x)
    for f in (shards.whole, shards.settled, shards.local):
        assert f(x) is x
    assert shards.spread(x, x) is x and shards.laid(x, x) is x and shards.recut(x, x) is x
    assert shards.joined(x, -1) is x and shards.beside(x, x, -1) is x
    assert shards.rebuilt(x, x, [], x.shape) is x
