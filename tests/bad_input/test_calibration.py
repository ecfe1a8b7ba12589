"""Too little calibration data is used as far as it goes, with a ridge; a plan edited by hand says what is true."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from subspan import linalg
from subspan.budget import Err, Uniform
from subspan.compress import Compression, compress, study
from subspan.edit import matrices, shapes
from subspan.hosts.text import windows
from subspan.metric import Covariance, Gram, Plain, collect
from subspan.plan import Plan, site_plan

LOW = Uniform(Err(0.6))


def net(dtype=torch.float64, width=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 8, bias=False)).to(dtype)


def tokens(count, *, width=12, seed=1, dtype=torch.float64):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_a_text_shorter_than_a_window_says_how_long_both_are():
    with pytest.raises(
        ValueError, match=r"the text has 30 tokens.* 1 window\(s\) of length 64 need 64; give a longer"
    ):
        windows(torch.arange(30), 64)


@pytest.mark.parametrize("measure", [Gram(), Covariance()], ids=["gram", "covariance"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_outputs_on_fewer_tokens_than_columns_are_kept_by_as_many_ranks(count, measure):
    model, data = net(), tokens(count)
    before = model(data)
    with study(model, measure, batches=[data]).apply(model, planned(model, measure, data, rank=count)):
        after = model(data)
    assert_close(after, before, rtol=0, atol=1e-3)


def planned(model, measure, data, rank):
    return study(model, measure, batches=[data]).plan(lambda spectra, shapes: dict.fromkeys(shapes, rank))


@pytest.mark.parametrize("measure", [Gram(), Covariance()], ids=["gram", "covariance"])
def test_a_singular_statistic_gives_finite_factors_that_beat_plain_truncation_on_its_data(measure):
    model, data = net(), tokens(200)
    data[:, 3] = 0  # an input that is always off
    data[:, 5] = data[:, 4]  # and two that are always alike
    before = model[0](data)
    losses = []
    for method in (Compression(LOW, measure), Compression(LOW)):
        _, done = compress(model, method, select="0", batches=[data])
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        losses.append(float((model[0](data) - before).detach().norm()))
        done.undo()
    assert losses[0] < losses[1]


@pytest.mark.parametrize("dead", [torch.zeros(12, 12), torch.diag(torch.arange(12.0))], ids=["all", "one"])
def test_whitening_of_dead_inputs_is_finite_and_says_its_ridge(dead):
    found = linalg.whiten(dead)
    assert bool(found.factor.isfinite().all()) and bool(found.factor.diagonal().gt(0).all())
    assert found.ridge == (0.0 if not dead.any() else 1e-9)


def test_an_indefinite_statistic_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 2\) is not positive semi-definite, even with ridge 1e-2"):
        linalg.whiten(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


def test_bfloat16_weights_are_planned_in_float32_and_stay_bfloat16():
    half = net(torch.bfloat16)
    full = net(torch.float32)
    full.load_state_dict({name: p.float() for name, p in half.state_dict().items()})
    data = tokens(64, dtype=torch.bfloat16)
    # The second layer's inputs pass through bfloat16 in one model alone.
    plans = [study(m, Gram(), select="0", batches=[data.to(m[0].weight.dtype)]).plan(LOW) for m in (half, full)]
    assert plans[0].ranks() == plans[1].ranks()
    assert_close(plans[0].sites["0"].error, plans[1].sites["0"].error, rtol=1e-5, atol=0)
    assert [plan.sites["0"].bits for plan in plans] == [16, 32]
    assert plans[0].bytes[0] * 2 == plans[1].bytes[0]
    compress(half, Compression(LOW, Gram()), batches=[data])
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


# Plans edited by hand


def written(tmp_path, change):
    data = json.loads(json.dumps(study(net()).plan(LOW, method="svd").to_dict()))
    change(data["sites"])
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    return file


@pytest.mark.parametrize("rank", [0, -1, 9, 10**9])
def test_an_impossible_rank_is_named_when_the_file_is_read(tmp_path, rank):
    file = written(tmp_path, lambda rows: rows["2"].update(rank=rank))
    with pytest.raises(
        ValueError, match=rf"plan\.json: 2: rank {rank} is outside 1\.\.min\(8, 8\) = 8; choose one"
    ):
        Plan.from_json(file)


def test_a_misspelt_site_is_shown_beside_the_nearest_one():
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4)}) for _ in range(3)])}
    )
    plan = study(model).plan(LOW)
    rows = dict(plan.sites)
    rows["layers.1.q_porj"] = rows.pop("layers.1.q_proj")
    with pytest.raises(ValueError, match=r"lacks, e\.g\. layers\.1\.q_porj; did you mean layers\.1\.q_proj by"):
        replace(plan, sites=rows).check(shapes(matrices(model)))


def test_a_site_that_is_like_none_gets_no_guess():
    plan = study(net()).plan(LOW)
    with pytest.raises(ValueError, match=r"e\.g\. encoder; the model has 0, 2, \.\.\.: was the plan made for"):
        replace(plan, sites={"encoder": plan.sites["0"]}).check({"0": (8, 12), "2": (8, 8)})


def test_a_row_that_was_taken_out_leaves_the_layer_and_its_bytes(tmp_path):
    model = net()
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    plan = Plan.from_json(written(tmp_path, lambda rows: rows.pop("2")))
    assert plan.bytes[0] == whole
    layer = model[2]
    study(model).apply(model, plan)
    assert model[2] is layer and model[0] is not layer
    assert plan.bytes[1] == sum(p.numel() * p.element_size() for p in model.parameters())


def test_an_unedited_plan_reads_back_equal(tmp_path):
    assert Plan.from_json(written(tmp_path, lambda rows: None)) == study(net()).plan(LOW, method="svd")


def test_a_row_says_the_ridge_it_needed_and_the_plan_remarks_on_it():
    row = site_plan((8, 12), 2, lambda rank: 0.1, bits=32, ridge=1e-7, tokens=1500)
    assert row.ridge == 1e-7 and row.reason.endswith("; ridge 1e-07 for 1,500 tokens in 12 inputs")
    clean = site_plan((8, 12), 2, lambda rank: 0.1, bits=32, tokens=1500)
    assert "ridge" not in clean.reason
    (said,) = Plan("svd_llm", {}, {"a": clean, "b": row}).remarks()
    assert said.startswith("1 of 2 sites had inputs") and f"e.g. at b ({row.reason})" in said
    assert "use more calibration tokens" in said and Plan("svd_llm", {}, {"a": clean}).remarks() == []


@pytest.mark.parametrize("measure", [Gram(), Covariance()], ids=["gram", "covariance"])
def test_a_plan_says_which_sites_had_too_few_tokens_and_the_ridge_they_got(measure):
    few = study(net(), measure, batches=[tokens(6), tokens(4, seed=2)]).plan(LOW)
    assert few.sites["0"].ridge > 0 and few.sites["2"].ridge == 0
    assert f"ridge {few.sites['0'].ridge:g} for 10 tokens in 12 inputs" in few.sites["0"].reason
    assert "at 0 (" in few.remarks()[0] and few.remarks()[0].startswith("1 of 2 sites")
    enough = study(net(), measure, batches=[tokens(40)]).plan(LOW)
    assert enough.remarks() == [] and "ridge" not in enough.sites["0"].reason


def test_a_plan_says_which_sites_lose_ranks_and_save_nothing():
    """Two factors of rank r take r (m + n) / (m n) of the numbers: here 0.9 and 0.92 of them."""
    cut, dense = (site_plan((100, 100), rank, lambda rank: 0.1, bits=32) for rank in (45, 46))
    assert (cut.form, dense.form) == ("lowrank", "dense")
    (said,) = Plan("svd", {}, {"a": cut, "b": dense}).remarks()
    assert said.startswith("1 of 2 sites lose ranks and stay dense, e.g. b:") and "least_loss" in said
    assert Plan("svd", {}, {"a": cut}).remarks() == []


def test_a_ridge_that_was_asked_for_is_not_remarked_upon():
    assert study(net(), Gram(ridge=1e-3), batches=[tokens(5)]).plan(LOW).remarks() == []
    assert study(net(), Plain()).plan(LOW).remarks() == []


def test_sites_that_share_an_input_count_the_same_tokens():
    counts = {}
    model = net()
    collect(model, [tokens(6), tokens(4, seed=2)], Gram(), {"0": model[0], "2": model[2]}, counts=counts)
    assert counts == {"0": 10, "2": 10}
