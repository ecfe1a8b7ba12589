"""What the verbs rely on: plain values that rebuild a method, texts cut right, sensible beginnings."""

import itertools

import pytest
import torch

from subspan.budget import Energy, Err, Ratio, Uniform
from subspan.cli.common import facts, mebibytes
from subspan.compress import Compression
from subspan.hosts import folders, jobs, lessons, text
from subspan.methods import build, methods
from subspan.metric import MEASURES, Gram, Plain
from subspan.optim import Adam

TARGETS = [Err(0.25), Ratio(0.75)]
FORMS = ["svd", "asvd", "svd_llm", "welore"]


@pytest.fixture(scope="module")
def loaded(tiny):
    return folders.open_model(tiny)


@pytest.mark.parametrize("name, target", list(itertools.product(FORMS, TARGETS)), ids=str)
def test_decode_undoes_encode(name, target):
    assert jobs.decode(name, jobs.encode(target)) == build(name, "compression", target=target)


@pytest.mark.parametrize("name, metric", list(itertools.product(FORMS, MEASURES)))
def test_a_metric_replaces_the_measure_and_energy_the_budget(name, metric):
    found = jobs.decode(name, jobs.encode(Energy(0.9), metric))
    assert found == Compression(Energy(0.9), MEASURES[metric])
    assert jobs.decode("svd", jobs.encode(Err(0.5), "gram")) == Compression(Uniform(Err(0.5)), Gram())


def test_every_registered_compression_can_be_asked_for():
    for name in methods("compression"):
        assert jobs.decode(name, jobs.encode(Err(0.5))) == build(name, target=Err(0.5))


def test_data_is_required_by_measures_that_read_it():
    jobs.require_data("svd", Compression(Uniform(Err(0.5)), Plain()), None)
    with pytest.raises(ValueError, match=r"svd_llm reads .* --calibrate"):
        jobs.require_data("svd_llm", Compression(Uniform(Err(0.5)), Gram()), [])


@pytest.mark.parametrize("limit", [1, 50, 1000, 5000])
def test_part_of_a_text_has_the_tokens_of_the_whole(loaded, limit):
    content = text.prose()[:20_000]
    whole = text.encode(loaded.tokenizer, content)
    assert torch.equal(jobs.tokens(loaded.tokenizer, content, limit), whole[:limit])
    assert torch.equal(jobs.tokens(loaded.tokenizer, content), whole)


def test_calibration_takes_as_many_windows_as_fit(loaded, page):
    gram = Compression(Uniform(Err(0.5)), Gram())
    ids = text.encode(loaded.tokenizer, text.read([page]))
    found = jobs.calibration(loaded, gram, [str(page)], limit=200, window=64)
    assert torch.equal(found.flatten(), ids[:192])
    assert torch.equal(jobs.calibration(loaded, gram, [str(page)], limit=5, window=None).flatten(), ids[:64])
    assert jobs.calibration(loaded, Compression(Uniform(Err(0.5))), [str(page)], limit=5, window=None) is None


def test_a_window_is_what_was_asked_for_within_the_models_reach(loaded):
    assert [jobs.window_for(loaded.model, asked) for asked in (None, 16, 64)] == [64, 16, 64]
    assert jobs.window_for(loaded.model, None, usual=32) == 32
    with pytest.raises(ValueError, match=r"65 .* 64 positions"):
        jobs.window_for(loaded.model, 65)


def test_the_last_tenth_is_held_out():
    found = lessons.split(torch.arange(1000), 30)
    assert torch.equal(found.train, torch.arange(900))
    assert torch.equal(found.validation.flatten(), torch.arange(900, 990))
    many = lessons.split(torch.arange(100_000), 10)
    assert torch.equal(many.validation.flatten(), torch.arange(90_000, 90_320))


def test_rules_take_a_share_of_the_rank_and_ten_refreshes():
    assert lessons.rule("adamw", steps=100) == (Adam(), {})
    assert lessons.rule("galore", steps=100)[1] == {"rank": 0.25, "every": 10}
    assert lessons.rule("galore", steps=10_000)[1] == {"rank": 0.25, "every": 200}
    made, args = lessons.rule("fira", steps=3, rank=7, every=2)
    assert (made, args) == (build("fira", rank=7, every=2), {"rank": 7, "every": 2})


@pytest.mark.parametrize("given, found", [("64", 64), ("1", 1), ("0.25", 0.25), ("1.0", 1.0)])
def test_a_rank_is_a_count_or_a_share(given, found):
    assert (lessons.parse_rank(given), type(lessons.parse_rank(given))) == (found, type(found))


@pytest.mark.parametrize("given", ["0", "-3", "1.5", "0.0", "nan", "half", ""])
def test_other_ranks_are_refused(given):
    with pytest.raises(ValueError, match="neither a count"):
        lessons.parse_rank(given)


def test_a_newborn_depends_on_its_seed_and_on_nothing_held_out():
    content = text.prose()[:20_000]
    sizes = {"vocab": 300, "hidden": 16, "layers": 1, "heads": 2, "window": 32}
    torch.manual_seed(5)
    one, state = lessons.newborn(content, **sizes, seed=1), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())
    other = lessons.newborn(content[:18_000] + "?" * 2_000, **sizes, seed=1)
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    weights = [torch.cat([p.flatten() for p in m.model.parameters()]) for m in (one, other)]
    assert torch.equal(*weights)
    third = torch.cat([p.flatten() for p in lessons.newborn(content, **sizes, seed=2).model.parameters()])
    assert not torch.equal(weights[0], third)


def test_learning_rates_begin_as_documented():
    assert [lessons.default_lr(name, scratch=True) for name in ("adamw", "galore", "fira", "frugal")] == [
        3e-3, 1e-2, 1e-2, 1e-3,
    ]  # fmt: skip
    assert all(0 < lessons.default_lr(name, scratch=False) <= 1e-2 for name in methods())
    assert set(methods("adapter")) <= lessons.FINETUNE_LR.keys()  # a rate for one is far off for another


def test_tables_hold_what_they_are_given():
    assert [list(column.cells) for column in facts("t", {"a": "1", "b": "2"}).columns] == [["a", "b"], ["1", "2"]]
    assert mebibytes(2**20) == "1.00 MiB"
