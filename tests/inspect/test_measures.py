"""Effective ranks count equal directions and see no scale; the utilised rank has its limits."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan import linalg
from subspan.inspect import RANK_MEASURES, Utilised, mean_utilisation, rank_measures, utilised, utilised_ranks
from subspan.inspect.measures import logdet_rank, nuclear_rank, numerical_rank, participation_ratio, schatten_rank


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spectrum(k=12, seed=0):
    return torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort(descending=True)[
        0
    ]


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("name", RANK_MEASURES)
def test_k_equal_singular_values_count_as_k(name, k):
    s = torch.cat([torch.full((k,), 2.5), torch.zeros(4)]).double()
    want = math.ceil(0.9 * k) if name.startswith("energy") else k
    assert_close(RANK_MEASURES[name](s), float(want), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", RANK_MEASURES)
def test_no_measure_sees_scale_and_all_lie_between_one_and_the_rank(name):
    s = spectrum()
    value = RANK_MEASURES[name](s)
    assert_close(RANK_MEASURES[name](1e5 * s), value)
    assert_close(RANK_MEASURES[name](1e-5 * s), value)
    assert 1 <= value <= len(s) + 1e-9
    assert rank_measures(s)[name] == value


def test_measures_of_zero_are_finite():
    got = rank_measures(torch.zeros(5))
    assert all(math.isfinite(value) for value in got.values())
    assert got["rank"] == got["entropy"] == got["stable"] == got["nuclear"] == 0


def test_the_family_contains_the_others():
    s = spectrum()
    assert_close(schatten_rank(s, 2.0), linalg.stable_rank(s))
    assert_close(schatten_rank(s, 1e-9), torch.tensor(12.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert_close(logdet_rank(s, 1e12), linalg.stable_rank(s), rtol=1e-6, atol=0)
    assert_close(participation_ratio(s), s.square().sum().square() / s.pow(4).sum())
    assert_close(nuclear_rank(s), s.sum().square() / s.square().sum())
    assert numerical_rank(torch.tensor([1.0, 1e-3, 1e-12])).item() == 2


def test_ranks_are_differentiable_penalties():
    s = spectrum(6).requires_grad_()
    for rank in (linalg.entropy_rank, nuclear_rank, logdet_rank, linalg.stable_rank):
        assert torch.autograd.gradcheck(rank, (s,))


def test_wrong_powers_and_levels_are_refused():
    with pytest.raises(ValueError, match="power above 0"):
        schatten_rank(spectrum(), 0.0)
    with pytest.raises(ValueError, match="delta is -1"):
        logdet_rank(spectrum(), -1)


@pytest.mark.parametrize("d", [1, 3, 5])
def test_inputs_of_d_dimensions_use_d_of_the_rank(d):
    x = normal(100, d) @ normal(d, 8, seed=1)
    w = normal(6, 8, seed=2)
    found = utilised(w, x.mT @ x, energy=1 - 1e-11)
    assert found.inputs.shape[1] == d and found.rank == d
    assert isinstance(found, Utilised) and found.share == d / 6
    assert_close(x @ found.project(w).mT, x @ w.mT, rtol=0, atol=1e-8)


def test_all_energy_changes_no_output_and_less_loses_little():
    x, w = normal(100, 8), normal(6, 8, seed=2)
    x = x * 0.5 ** torch.arange(8)
    assert_close(x @ utilised(w, x.mT @ x, energy=1.0).project(w).mT, x @ w.mT)
    ranks = [utilised(w, x.mT @ x, energy=e).rank for e in (0.5, 0.9, 0.99, 0.999, 1.0)]
    assert ranks == sorted(ranks) and ranks[0] < ranks[-1] == 6
    some = utilised(w, x.mT @ x, energy=0.9)
    assert torch.linalg.matrix_rank(some.project(w)) <= some.rank


def test_projectors_hold_the_share_of_energy_asked_for():
    x, w = normal(100, 8) * 0.6 ** torch.arange(8), normal(6, 8, seed=2)
    h = x.mT @ x
    found = utilised(w, h, energy=0.9)
    for q, moments in ((found.inputs, h), (found.outputs, w @ h @ w.mT)):
        assert (q.mT @ moments @ q).trace() >= 0.9 * moments.trace()
        assert (q[:, :-1].mT @ moments @ q[:, :-1]).trace() < 0.9 * moments.trace()


def test_utilisation_of_a_model_is_read_off_its_inputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6)).double()
    x = normal(50, 2) @ normal(2, 8, seed=1)
    found = utilised_ranks(net, [x], energy=1 - 1e-11)
    assert found["0"].rank == 2
    assert (
        found["2"].rank == utilised(net[2].weight, (h := net[:2](x).detach()).mT @ h / 50, energy=1 - 1e-11).rank
    )
    assert_close(mean_utilisation(found), (2 / 6 + found["2"].share) / 2)


def test_what_cannot_be_utilised_is_refused():
    with pytest.raises(ValueError, match=r"energy 1.5 is no share"):
        utilised(normal(2, 2), torch.eye(2), energy=1.5)
    with pytest.raises(ValueError, match=r"needs second moments of shape \(3, 3\)"):
        utilised(normal(2, 3), torch.eye(2))
    with pytest.raises(ValueError, match="at least"):
        mean_utilisation({})
