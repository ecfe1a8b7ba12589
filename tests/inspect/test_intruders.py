"""Intruders are the new directions, no others, and mitigation scales just those."""

import pytest
import torch
from torch.testing import assert_close

from subspan import linalg
from subspan.inspect import Intruders, find_intruders, mitigate


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spike(base, size, seed=5):
    """A large rank-one change whose left vector is spread over all directions."""
    u, v = normal(base.shape[0], 1, seed=seed), normal(1, base.shape[1], seed=seed + 1)
    return size * (u / u.norm()) @ (v / v.norm())


@pytest.mark.parametrize("m, n", [(64, 64), (96, 48), (48, 96)])
def test_an_unchanged_weight_has_none_and_a_spike_is_one(m, n):
    base = normal(m, n)
    assert find_intruders(base, base).count == 0
    assert find_intruders(base, 3 * base).count == 0
    found = find_intruders(base, base + spike(base, 200.0), top=1)
    assert isinstance(found, Intruders) and found.indices == (0,)
    assert found.similarity[0] < 0.5


def test_a_spike_outside_the_column_space_has_no_similarity():
    q = linalg.qr(normal(20, 9))
    base = q[:, :8] @ normal(8, 8, seed=1)
    tuned = base + 100 * q[:, 8:] @ normal(1, 8, seed=2)
    found = find_intruders(base, tuned, top=1)
    assert found.indices == (0,) and found.similarity[0] < 0.1
    s = torch.linalg.svdvals(tuned)
    assert_close(found.energy, float(s[0] ** 2 / s.square().sum()))


def test_the_other_side_is_the_transpose():
    base = normal(30, 20)
    tuned = base + spike(base, 60.0)
    left, right = find_intruders(base.mT, tuned.mT), find_intruders(base, tuned, side="right")
    assert left.indices == right.indices
    assert_close(left.similarity, right.similarity)


def test_equal_singular_values_are_one_subspace():
    base, turn = torch.eye(16, dtype=torch.float64), linalg.qr(normal(16, 16))
    assert find_intruders(base, turn @ torch.diag(torch.arange(16.0, 0, -1).double()) @ turn.mT).count == 0


def test_directions_that_the_base_does_not_have_are_no_likeness():
    base = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    tuned = torch.diag(torch.tensor([3.0, 2.0, 9.0, 0.0], dtype=torch.float64))
    assert find_intruders(base, tuned).indices == (0,)
    assert find_intruders(torch.zeros(3, 3), torch.eye(3)).count == 3


def test_signs_do_not_matter():
    base = normal(12, 10)
    tuned = base + spike(base, 40.0)
    flip = torch.diag(torch.sign(normal(10)))
    assert find_intruders(base @ flip, tuned).indices == find_intruders(base, tuned).indices


def test_mitigation_scales_the_intruder_alone():
    base = normal(64, 48)
    tuned = base + spike(base, 200.0)
    assert_close(mitigate(base, tuned, scale=1.0), tuned)
    u, s, vh = torch.linalg.svd(tuned, full_matrices=False)
    for scale in (0.75, 0.0):
        got = mitigate(base, tuned, scale=scale, top=1)
        assert_close(got, tuned + (scale - 1) * s[0] * torch.outer(u[:, 0], vh[0]))
    assert_close(mitigate(base, base, scale=0.0), base)
    assert mitigate(base.bfloat16(), tuned.bfloat16()).dtype == torch.bfloat16


def test_wrong_shapes_and_limits_are_refused():
    with pytest.raises(ValueError, match="same layer before and after"):
        find_intruders(normal(2, 3), normal(3, 2))
    with pytest.raises(ValueError, match=r"top 0 and epsilon 0.5"):
        find_intruders(normal(2, 2), normal(2, 2), top=0)
