"""Parameters cut over processes by FSDP2: the steps of one process, state in parts, and nothing large sent."""

import pytest
import torch

BOTH = ["adamw", "galore", "galore_int8", "fira", "frugal", "apollo", "dct_adamw", "muon", "factored", "int4"]
ONLY_FOUR = ["galore_exact", "rotated_error_feedback", "dion", "ldadam", "adafactor"]
SAVED = ["adamw", "galore", "frugal", "galore_int8"]
TALL = "0.weight"  # (10, 6), projected on its right side


def check_same(one, other, tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def four(run):
    return run("fsdp", 4)


@pytest.fixture(scope="module")
def two(run):
    return run("fsdp", 2)


@pytest.fixture(scope="module")
def alone(run):
    return run("alone", 1)


@pytest.mark.parametrize("name", BOTH + ONLY_FOUR)
def test_twenty_steps_of_four_processes_are_those_of_one(four, alone, name):
    check_same(four[name]["weights"], alone[name]["weights"], 1e-10)


@pytest.mark.parametrize("name, tolerance", [*((name, 1e-10) for name in BOTH), ("galore_float32", 1e-5)])
def test_twenty_steps_of_two_processes_are_those_of_one(two, alone, name, tolerance):
    check_same(two[name]["weights"], alone[name]["weights"], tolerance)


def test_every_rule_is_compared(four, two):
    assert {*BOTH, *ONLY_FOUR, "sent", "nan"} == four.keys()
    assert {*BOTH, "galore_float32", "loaded"} == two.keys()


@pytest.mark.parametrize("name", BOTH)
def test_no_process_holds_all_moments_of_a_matrix(four, two, name):
    # 10 rows are cut into 3, 3, 3, 1 and into 5, 5; what is stored by coordinates (2 rows) into 1, 1, 0, 0.
    for found, most in ((four, 0.5), (two, 0.5)):
        moments = {key: sizes for key, sizes in found[name]["layout"][TALL].items() if is_moment(key)}
        assert moments
        for key, (whole, here) in moments.items():
            assert here <= most * whole, key


def is_moment(key):
    """Not a frame or a counter; nor one of Factored's two sums, of which one is whole everywhere."""
    return "frame" not in key and key.rpartition(".")[2] in {"mu", "nu", "buf", "error", "codes", "bf16", "absmax"}


@pytest.mark.parametrize("name", BOTH)
def test_state_shrinks_with_the_number_of_processes(four, two, alone, name):
    assert four[name]["bytes"] < two[name]["bytes"] < alone[name]["bytes"]


def test_a_tall_matrix_is_never_gathered(four):
    # galore of rank 2 on (64, 16): a refresh sums g^T g q, (16, 2), and norms of g q; other steps send nothing.
    assert four["sent"]["plain"] == []
    assert {kind for kind, _ in four["sent"]["refresh"]} == {"all_reduce"}
    assert sum(numbers for _, numbers in four["sent"]["refresh"]) <= 16 * 2 + 2 + 1 < 64 * 16 / 29


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_four_processes_goes_on_in_two_and_in_one(two, alone, name):
    check_same(two["loaded"][name], alone[name]["weights"], 1e-10)
    check_same(alone["loaded"][name], alone[name]["weights"], 1e-10)


@pytest.mark.parametrize("place", ["loss", "part"])
def test_nan_on_one_process_is_the_same_error_at_the_same_step_on_all(four, place):
    said = four["nan"][place]
    assert len(said) == 4 and len(set(said)) == 1
    assert said[0].startswith("0.weight: ") and "holds nan" in said[0]
    assert said[0].endswith("after [7, 7, 7, 7, 7, 7]")
