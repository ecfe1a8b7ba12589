"""Overlaps, angles and cosines have their closed forms, and see subspaces rather than bases."""

import math

import pytest
import torch
from torch.testing import assert_close

from subspan import linalg
from subspan.inspect import (
    captured,
    chance_overlap,
    gradient_cosine_matrix,
    gradient_subspace_trace,
    leading_frames,
    overlap_matrix,
    principal_angles,
    steadiness,
    subspace_overlap,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def frame(n, k, seed=0):
    return linalg.qr(normal(n, k, seed=seed))


def test_a_subspace_overlaps_itself_fully_and_its_complement_not_at_all():
    q = frame(10, 10)
    assert_close(subspace_overlap(q[:, :4], q[:, :4]), 1.0)
    assert_close(subspace_overlap(q[:, :4], q[:, 4:]), 0.0, rtol=0, atol=1e-12)
    assert_close(subspace_overlap(q[:, :4], q[:, 3:7]), 0.25)


def test_overlap_is_symmetric_and_does_not_see_the_basis_or_a_common_rotation():
    a, b, turn = frame(12, 5), frame(12, 3, seed=1), frame(12, 12, seed=2)
    want = subspace_overlap(a, b)
    assert_close(subspace_overlap(b, a), want)
    assert_close(subspace_overlap(a @ frame(5, 5, seed=3), b @ frame(3, 3, seed=4)), want)
    assert_close(subspace_overlap(turn @ a, turn @ b), want)


@pytest.mark.parametrize("j, k, n", [(8, 8, 64), (3, 6, 20), (5, 5, 5)])
def test_random_subspaces_overlap_as_chance_says(j, k, n):
    found = [subspace_overlap(frame(n, j, seed=2 * i), frame(n, k, seed=2 * i + 1)) for i in range(300)]
    mean, spread = torch.tensor(found).mean().item(), torch.tensor(found).std().item()
    assert abs(mean - chance_overlap(j, k, n)) <= 4 * spread / math.sqrt(300) + 1e-12


def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles():
    a, b = frame(12, 5), frame(12, 3, seed=1)
    angles = principal_angles(a, b)
    assert_close(angles.cos().square().mean().item(), subspace_overlap(a, b))
    assert_close(principal_angles(b, a), angles)
    assert bool((angles.diff() >= 0).all())


@pytest.mark.parametrize("angle", [1e-9, 1e-3, 0.7, math.pi / 2])
def test_principal_angles_are_exact_for_small_angles_too(angle):
    a, b = torch.eye(4, dtype=torch.float64)[:, :2], torch.zeros(4, 2, dtype=torch.float64)
    b[0, 0] = 1
    b[1, 1], b[2, 1] = math.cos(angle), math.sin(angle)
    assert_close(principal_angles(a, b)[1].item(), angle, rtol=1e-9, atol=1e-15)


def test_captured_energy_is_that_of_the_leading_singular_values():
    g = normal(8, 6)
    frames = leading_frames(g, 2)
    want = float(frames.s[:2].square().sum() / frames.s.square().sum())
    assert_close(captured(g, frames.left), want)
    assert_close(captured(g, frames.right, "right"), want)
    assert_close(captured(g, frame(8, 8)), 1.0)


def test_cosines_do_not_see_scale_and_are_inner_products():
    g, h = normal(5, 4), normal(5, 4, seed=1)
    assert_close(gradient_cosine_matrix([g, 3 * g, 1e-8 * g]), torch.ones(3, 3, dtype=torch.float64))
    got = gradient_cosine_matrix([g, h])
    assert_close(got[0, 1], torch.cosine_similarity(g.flatten(), h.flatten(), dim=0))
    assert_close(gradient_cosine_matrix([g, -g])[0, 1].item(), -1.0)
    assert gradient_cosine_matrix([g, 0 * g])[0, 1].isnan()


def test_subspace_trace_is_the_spectrum_over_its_largest():
    g = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    got = gradient_subspace_trace([g, 5 * g, 0 * g], top=2)
    assert_close(got, torch.tensor([[1, 0.5], [1, 0.5], [0, 0]], dtype=torch.float64))


def test_overlap_matrix_and_steadiness_agree():
    frames = [frame(9, 3, seed=i) for i in range(4)]
    matrix = overlap_matrix(frames)
    assert_close(matrix, matrix.mT)
    assert_close(matrix.diagonal(1).tolist(), steadiness(frames))
    assert_close(matrix[0, 3].item(), subspace_overlap(frames[0], frames[3]))


def test_what_is_no_frame_is_refused():
    with pytest.raises(ValueError, match=r"not orthonormal.*linalg.qr"):
        subspace_overlap(2 * frame(5, 2), frame(5, 2))
    with pytest.raises(ValueError, match="heights must agree"):
        principal_angles(frame(5, 2), frame(6, 2))
    with pytest.raises(ValueError, match=r"\(n, k\) with 1 <= k <= n"):
        captured(normal(3, 3), normal(2, 3))
    with pytest.raises(ValueError, match="of one matrix"):
        gradient_cosine_matrix([normal(2, 3), normal(3, 2)])
    with pytest.raises(ValueError, match="of one matrix"):
        gradient_subspace_trace([])
    with pytest.raises(ValueError, match="do not fit into 4"):
        chance_overlap(2, 5, 4)
