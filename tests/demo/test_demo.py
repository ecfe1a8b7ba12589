"""The demo is fair between its contestants, keeps its texts apart, and prints the numbers that it records."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from subspan.adapt import Adapted, trainable
from subspan.budget import Err, WeLore
from subspan.compress import study
from subspan.demo import compress as act_two
from subspan.demo import heal as act_three
from subspan.demo import settings as sizes
from subspan.demo import train as act_one
from subspan.demo.act import Act, mib, ordering
from subspan.demo.settings import Settings
from subspan.edit import sites
from subspan.hosts import text
from subspan.hosts.score import nll, perplexity
from subspan.hosts.training import draw
from subspan.hosts.transformers import LoadedModel
from subspan.inspect import Report
from subspan.ops import LowRank, OpLinear
from subspan.plan import Plan, site_plan

SMALL = Settings(
    steps=2, batch=2, length=16, vocab=300, hidden=48, layers=1, code_chars=20_000, window=24, scored=3,
    calibration=4, heal_steps=2, heal_length=12, decode=2, seed=5,
)  # fmt: skip


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)


# ---- words and sizes


@pytest.mark.parametrize("hidden", [192, 128, 50])
def test_the_rank_is_a_quarter_of_the_hidden_size(hidden):
    assert Settings(hidden=hidden).rank == hidden // 4


@pytest.mark.parametrize("make", [sizes.full, sizes.quick])
def test_both_versions_can_tell_the_whole_story(make):
    found = make(7)
    assert found.seed == 7 and act_two.CHOSEN[2] in found.errs
    assert found.calibration >= 2, "healing is validated on two calibration windows"
    heads = act_one.fresh(replace(found, layers=1)).config.num_attention_heads
    assert found.hidden % heads == 0 and (found.hidden // heads) % 2 == 0


def test_ordering_says_whether_the_values_grow_along_the_names():
    assert ordering(["a", "b", "c"], [1.0, 2.0, 3.0], "Claim") == "Claim: shows here (a 1 < b 2 < c 3)."
    assert ordering(["a", "b"], [2.0, 1.5], "Claim") == "Claim: does NOT show here (b 1.5 < a 2)."
    for values in ([1.0, 3.0, 2.0], [2.0, 1.0, 3.0], [1.0, math.nan, 2.0], [1.0, math.inf, math.inf]):
        assert "does NOT show here" in ordering(["a", "b", "c"], values, "Claim")


@pytest.mark.parametrize("values", [(1.0, 1.0), (2.341, 2.3412)])
def test_ordering_never_prints_that_a_number_is_below_itself(values):
    inside = ordering(["a", "b"], values, "Claim").rpartition("(")[2].rstrip(").")
    shown = [float(part.split()[1]) for part in inside.split(" < ")]
    assert all(low < high for low, high in pairwise(shown))


def test_ordering_of_equal_values_does_not_show():
    assert "does NOT show here" in ordering(["a", "b"], [1.0, 1.0], "Claim")


# ---- act one


def test_every_contestant_starts_from_the_same_weights():
    one, two = act_one.fresh(SMALL), act_one.fresh(SMALL)
    assert same(state(one), state(two)) and not same(state(one), state(act_one.fresh(replace(SMALL, seed=6))))
    makers = act_one.contestants(SMALL)
    for name in ("adamw", "galore", "fira"):
        assert same(state(makers[name]()[0]), state(one)), name
    low = makers["W = BA"]()[0]
    shared = {name: t for name, t in state(low).items() if name in state(one)}
    assert shared and all(torch.equal(t, state(one)[name]) for name, t in shared.items())


def test_every_contestant_sees_the_same_batches(monkeypatch):
    seen: list[list[torch.Tensor]] = []

    def watched(model, batches, optimizer, **rest):
        batches = list(batches)
        seen.append([*batches, rest["validation"]])
        return act_one.History(validation=[(0, 1.0)])

    monkeypatch.setattr(act_one, "train", watched)
    monkeypatch.setattr(act_one, "corpus", lambda _: (torch.arange(99), torch.zeros(2, 16, dtype=torch.int64)))
    act_one.act_train(SMALL)
    assert len(seen) == 4
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("rank", [1, 12])
def test_factorised_weights_have_exactly_that_rank_and_are_the_nearest(rank):
    dense = act_one.fresh(SMALL).double()
    weights = {name: layer.weight.detach().clone() for name, layer in sites(dense).items()}
    low = act_one.factorised(dense, rank)
    found = {name: m for name, m in low.named_modules() if isinstance(m, OpLinear)}
    assert set(found) == set(weights) and len(found) == 7
    for name, layer in found.items():
        assert isinstance(layer.op, LowRank) and layer.op.rank == rank
        assert int(torch.linalg.matrix_rank(layer.weight)) == rank
        left = torch.linalg.svdvals(weights[name])[rank:].square().sum()
        torch.testing.assert_close((weights[name] - layer.weight).square().sum(), left)
        assert layer.op.u.requires_grad and layer.op.v.requires_grad
    assert all(p.requires_grad for p in low.parameters())


@pytest.fixture(scope="module")
def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    return act_one.corpus(SMALL)


def test_held_out_windows_are_no_part_of_the_training_tokens(corpus, monkeypatch):
    monkeypatch.setattr(act_one, "prose", lambda: "p")
    monkeypatch.setattr(act_one, "code", lambda _: "c")
    monkeypatch.setattr(act_one, "train_tokenizer", lambda *_: None)
    numbered = {"p": torch.arange(10_000), "c": torch.arange(20_000, 25_000)}
    monkeypatch.setattr(act_one, "encode", lambda _, which: numbered[which])
    ids, held = act_one.corpus(SMALL)
    assert held.shape == (48, SMALL.length)
    assert set(ids.tolist()).isdisjoint(held.flatten().tolist())
    assert ids.tolist() == [*range(9_000), *range(20_000, 24_500)]
    assert held[:24].flatten().tolist() == list(range(9_000, 9_000 + 24 * 16))
    assert held[24:].flatten().tolist() == list(range(24_500, 24_500 + 24 * 16))


@pytest.fixture(scope="module")
def first(corpus) -> Act:
    patch = pytest.MonkeyPatch()
    patch.setattr(act_one, "corpus", lambda _: corpus)
    act = act_one.act_train(SMALL)
    patch.undo()
    return act


def test_the_first_act_s_table_is_its_data(first, corpus):
    [(caption, columns, rows)] = first.tables
    runs = first.data["runs"]
    assert columns == ["method", "validation loss", "optimizer state", "peak RSS", "tokens/s"]
    assert rows == [
        [name, f"{r['validation'][-1][1]:.3f}", mib(r["state_bytes"]), mib(r["peak_rss"]),
         f"{r['tokens_per_second']:.0f}"] for name, r in runs.items()
    ]  # fmt: skip
    assert list(runs) == ["adamw", "galore", "fira", "W = BA"]
    parameters = sum(p.numel() for p in act_one.fresh(SMALL).parameters())
    assert (first.data["parameters"], first.data["rank"], first.data["tokens"]) == (parameters, 12, len(corpus[0]))
    assert f"{parameters / 1e6:.1f} M parameters for 2 steps, rank 12" in caption


def test_the_first_act_s_remarks_are_about_its_data(first):
    final = {name: run["validation"][-1][1] for name, run in first.data["runs"].items()}
    for note, (better, worse) in zip(first.notes, [("fira", "galore"), ("galore", "W = BA")]):
        assert (": shows here" in note) == (final[better] < final[worse])
        assert (": does NOT show here" in note) == (not final[better] < final[worse])


def test_all_start_at_the_same_loss_and_adam_alone_keeps_two_numbers_a_weight(first, corpus):
    runs = first.data["runs"]
    start = nll(act_one.fresh(SMALL), corpus[1], batch=8).mean().item()
    assert [runs[name]["validation"][0] for name in ("adamw", "galore", "fira")] == [(0, start)] * 3
    assert runs["adamw"]["train"][0] == runs["galore"]["train"][0] == runs["fira"]["train"][0]
    model = act_one.fresh(SMALL)
    counters = 8 * len(list(model.parameters()))
    assert runs["adamw"]["state_bytes"] == 2 * 4 * first.data["parameters"] + counters
    assert runs["galore"]["state_bytes"] < runs["adamw"]["state_bytes"] > runs["W = BA"]["state_bytes"]


def test_the_report_holds_the_same_data(first, tmp_path):
    report = Report("t", "", seed=5)
    first.report(report, "train")
    assert report.data["train"] is first.data


# ---- acts two and three, on a model of two blocks


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    words = PreTrainedTokenizerFast(tokenizer_object=text.train_tokenizer(text.prose()[:20_000], 300))
    config = {"vocab_size": 300, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**config, **heads, initializer_range=0.2, tie_word_embeddings=True))
    return LoadedModel(model.eval(), words, "tiny")


@pytest.fixture(scope="module")
def short():
    patch = pytest.MonkeyPatch()
    patch.setattr(act_two, "prose", lambda: text.prose()[:8_000])
    yield
    patch.undo()


def test_scored_calibration_and_healing_tokens_are_disjoint_slices_in_order(loaded, short):
    ids = text.encode(loaded.tokenizer, act_two.prose())
    texts = act_two.split(loaded, SMALL)
    assert texts.scored.shape == (3, 24) and texts.calibration.shape == (4, 24)
    assert torch.equal(torch.cat([texts.scored.flatten(), texts.calibration.flatten(), texts.healing]), ids)


def test_what_heals_is_never_scored(monkeypatch, loaded):
    monkeypatch.setattr(act_two, "encode", lambda *_: torch.arange(500))
    texts = act_two.split(loaded, SMALL)
    drawn = torch.cat(list(draw(texts.healing, length=12, batch=4, steps=50)))
    apart = [set(t.flatten().tolist()) for t in (texts.scored, texts.calibration, drawn)]
    assert not apart[0] & apart[1] and not (apart[0] | apart[1]) & apart[2]
    assert apart[0] == set(range(72)) and apart[1] == set(range(72, 168)) and min(apart[2]) >= 168


def smollm2_plan() -> Plan:
    """The shapes of SmolLM2-135M, low-rank wherever that pays at half the ranks."""
    block = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    block |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    rows = {
        f"{i}.{name}": site_plan(shape, min(shape) // 2, lambda _: 0.0, bits=32)
        for i in range(30)
        for name, shape in block.items()
    }
    return Plan("uniform", {}, rows)


# The low-rank numbers of WeLore's plans for the real weights at 30, 50, 70 and 90 % rank reduction, and extremes.
@pytest.mark.parametrize("numbers", [23_261_568, 50_877_504, 47_922_048, 15_228_864, 3_052_800, 58_613_760])
def test_lora_trains_as_many_numbers_as_asked_within_five_percent(numbers):
    plan = smollm2_plan()
    trained = act_three.lora_rank(plan, numbers) * sum(sum(site.shape) for site in plan.sites.values())
    assert sum(sum(site.shape) for site in plan.sites.values()) == 305_280
    assert abs(trained / numbers - 1) < 0.05


def test_lora_has_a_rank_that_every_site_can_have():
    assert act_three.lora_rank(smollm2_plan(), 1) == 1
    assert act_three.lora_rank(smollm2_plan(), 106_168_320) == 192


@pytest.fixture(scope="module")
def second(loaded, short) -> act_two.Compressed:
    before, modules = state(loaded.model), dict(loaded.model.named_modules())
    found = act_two.act_compress(loaded, SMALL)
    assert same(state(loaded.model), before) and dict(loaded.model.named_modules()) == modules
    return found


def test_the_second_act_scores_every_plan_and_its_table_is_its_data(second, loaded):
    _, columns, rows = second.act.tables[0]
    records = second.act.data["plans"]
    assert [(r["metric"], r["budget"]) for r in records] == [
        (metric, budget) for metric in ("plain", "gram") for _ in SMALL.errs for budget in ("welore", "uniform")
    ]
    assert second.dense == second.act.data["dense"]["perplexity"] == perplexity(loaded.model, second.texts.scored)
    assert rows[0][5] == act_two.number(second.dense) and len(rows) == len(records) + 1
    for row, r in zip(rows[1:], records, strict=True):
        cells = [f"{r['budget']} {r['metric']}", f"{r['err']:.1%}", f"{r['ratio']:.1%}", f"{r['bytes_kept']:.1%}",
                 f"{r['bytes'] / 2**20:.0f}", act_two.number(r["perplexity"]),
                 f"{r['tokens_per_second']:.1f}"]  # fmt: skip
        assert row == cells and len(row) == len(columns)


def test_the_chosen_plan_is_welore_s_and_scores_what_is_said(second, loaded):
    chosen = second.chosen
    assert (chosen.budget, chosen.metric) == ("welore", "gram")
    plain = study(loaded.model)
    assert chosen.plan.ranks() == plain.plan(WeLore(Err(0.5))).ranks() == second.act.data["ranks"]
    with second.study.apply(loaded.model, chosen.plan):
        assert perplexity(loaded.model, second.texts.scored) == chosen.perplexity
        stored = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    assert stored == chosen.plan.bytes[1]
    assert chosen.kept == stored / sum(p.numel() * p.element_size() for p in loaded.model.parameters())


def test_the_second_act_s_remarks_are_about_its_data(second):
    ppl = {(r["budget"], r["metric"], e): r["perplexity"] for r, e in zip(second.act.data["plans"], asked())}
    expected = [
        ppl["welore", metric, err] < ppl["uniform", metric, err]
        for metric in ("plain", "gram")
        for err in SMALL.errs
    ]
    expected.append(ppl["welore", "gram", 0.5] < ppl["welore", "plain", 0.5])
    notes = [note for note in second.act.notes if "show" in note]
    assert [": shows here" in note for note in notes] == expected
    assert [": does NOT show here" in note for note in notes] == [not e for e in expected]


def asked() -> list[float]:
    return [err for _ in act_two.MEASURED for err in SMALL.errs for _ in act_two.BUDGETS]


@pytest.fixture(scope="module")
def third(second, loaded) -> Act:
    before, modules = state(loaded.model), dict(loaded.model.named_modules())
    act = act_three.act_heal(loaded, second, SMALL)
    assert same(state(loaded.model), before) and dict(loaded.model.named_modules()) == modules
    return act


def test_both_healers_start_at_the_same_loss_and_are_put_back(third, second, loaded):
    validation = third.data["validation"]
    assert list(validation) == ["low-rank components", "LoRA"]
    with second.study.apply(loaded.model, second.chosen.plan):
        start = nll(loaded.model, second.texts.calibration[:2], batch=8).mean().item()
    assert [points[0] for points in validation.values()] == [(0, start)] * 2
    assert all(points[-1][0] == SMALL.heal_steps and points[-1][1] != start for points in validation.values())


def test_the_third_act_s_table_and_remark_are_its_data(third, second):
    [(_, columns, rows)] = third.tables
    assert rows[0][3] == act_two.number(third.data["before"]) == act_two.number(second.chosen.perplexity)
    for row, (name, ppl) in zip(rows[1:], third.data["after"].items(), strict=True):
        assert row[columns.index("trained")] == name
        assert row[columns.index("perplexity")] == act_two.number(ppl)
        assert row[columns.index("optimizer state")] == mib(third.data["state_bytes"][name])
        assert row[columns.index("peak RSS")] == mib(third.data["peak_rss"][name])
    after = third.data["after"]
    assert (": shows here" in third.notes[0]) == (after["low-rank components"] < after["LoRA"])


def test_healers_train_what_they_say_and_leave_no_trace(second, loaded):
    model, plan = loaded.model, second.chosen.plan
    with second.study.apply(model, plan):
        before, modules = state(model), dict(model.named_modules())
        with act_three.factors(model, plan) as named:
            low = [site for site in plan.sites.values() if site.form == "lowrank"]
            numbers = sum(p.numel() for _, p in named)
            assert numbers == sum(site.rank * sum(site.shape) for site in low) > 0
            with torch.no_grad():
                for _, p in named:
                    p.add_(1)
        assert same(state(model), before)
        with act_three.lora(model, plan) as named:
            assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n, _ in named}
            assert sum(isinstance(m, Adapted) for m in model.modules()) == len(plan.sites)
            assert [n for n, _ in named] == [n for n, _ in trainable(model)]
            ranks = {p.shape[0] for n, p in named if n.endswith("op.v")}
            assert ranks == {act_three.lora_rank(plan, numbers)}
            with torch.no_grad():
                for _, p in named:
                    p.add_(1)
        assert same(state(model), before) and dict(model.named_modules()) == modules
