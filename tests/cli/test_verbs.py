"""Every verb does what its help says, and what one writes the next one reads."""

import itertools
import json
import math
import shlex
from importlib import import_module, metadata
from inspect import getdoc, signature

import pytest
import torch
from torch.testing import assert_close

from subspan import io
from subspan.cli import VERBS, flowing
from subspan.compress import study
from subspan.heal import Factors
from subspan.hosts import folders, jobs, lessons, text
from subspan.hosts.score import nll, perplexity
from subspan.methods import find, methods
from subspan.metric import Gram
from subspan.ops import LowRank
from subspan.plan import Plan

NOW = "import sys; from subspan.cli import main; main(sys.argv[1:])"
LIGHT = """
import sys
from subspan.cli import main
for args in (["--help"], ["methods", "--json"]):
    try:
        main(args)
    except SystemExit as leave:
        assert leave.code == 0
print([name for name in ("transformers", "matplotlib") if name in sys.modules], file=sys.stderr)
"""
SMALL = ["--steps", 5, "--batch", 2, "--window", 32, "--vocab", 300, "--hidden", 32, "--layers", 1, "--heads", 2]


@pytest.fixture(scope="module")
def plan_file(good, tiny, page, tmp_path_factory):
    """A data-aware plan of the tiny model."""
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    wanted = ["--method", "welore", "--err", 0.5, "--metric", "gram"]
    good("plan", tiny, *wanted, "--calibrate", page, "--tokens", 512, "-o", file)
    return file


@pytest.fixture(scope="module")
def small(good, tiny, page, plan_file, tmp_path_factory):
    """The tiny model compressed by that plan."""
    out = tmp_path_factory.mktemp("small") / "model"
    good("compress", tiny, "--plan", plan_file, "--calibrate", page, "--tokens", 512, "-o", out)
    return out


def validation_loss(loaded, page, window):
    """What `train` measures: the mean over the held-out windows, eight at a time."""
    windows = lessons.split(jobs.tokens(loaded.tokenizer, text.read([page])), window).validation
    return nll(loaded.model, windows, batch=8).mean().item()


def test_help_is_the_same_in_the_list_and_in_the_verb(cli):
    for verb, line in VERBS.items():
        module = import_module(f"subspan.cli.{verb}")
        assert module.run.__doc__.splitlines()[0] == line
        assert module.EXAMPLE.startswith(f"subspan {verb}")
        shown = cli(verb, "--help")
        assert shown.code == 0
        assert " ".join(shown.out.split()).endswith(f"Example: {module.EXAMPLE}")


def test_help_flows_to_the_end_of_the_terminal(cli, monkeypatch):
    assert flowing(flowing) == "\n\n".join(" ".join(p.split()) for p in getdoc(flowing).split("\n\n"))
    monkeypatch.setenv("COLUMNS", "60")
    verbs = [import_module(f"subspan.cli.{verb}") for verb in VERBS]
    for verb, module in zip(VERBS, verbs, strict=True):
        lines = [line.strip() for line in cli(verb, "--help").out.splitlines()]
        paragraphs = flowing(module.run).split("\n\n")
        for words in paragraphs:
            first = next(i for i, line in enumerate(lines) if line and words.startswith(line))
            shown = lines[first : lines.index("", first)]
            assert " ".join(shown) == words
            # No line ends before the next word would not fit any more.
            assert all(len(a) + 1 + len(b.split()[0]) > 58 for a, b in itertools.pairwise(shown))


def test_no_arguments_print_help_and_version_the_version(cli):
    assert cli() == cli("--help")
    assert all(verb in cli().out for verb in VERBS)
    assert cli("--version").out == f"subspan {metadata.version('subspan')}\n"


def test_help_and_methods_import_neither_transformers_nor_matplotlib(process):
    assert process(LIGHT).communicate()[1].strip() == "[]"


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "demo"])
def test_examples_work(verb, cli, tiny, page, small, plan_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(import_module(f"subspan.cli.{verb}").EXAMPLE)[1:]
    given = {"smollm2": tiny, "@code": page, "@prose": page} | ({"out": small} if verb == "export" else {})
    if verb == "adapter":
        given["runs/lora"] = lora = tmp_path / "runs" / "lora"
        assert cli("finetune", tiny, "--method", "lora", "--data", page, "--steps", 1, "-o", lora).code == 0
    args = [given.get(word, word) for word in words]
    more = {"train": [*SMALL, "--data", page], "finetune": ["--steps", 2, "--window", 32]}
    done = cli(*args, *more.get(verb, []))
    assert done.code == 0, done
    if "-o" in words:
        assert (tmp_path / words[words.index("-o") + 1]).exists()


def test_methods_are_those_of_the_registry(good, cli):
    rows = good("methods")
    assert [row["name"] for row in rows] == list(methods())
    assert all(set(row) == {"name", "kind", "paper", "reference", "status", "value"} for row in rows)
    assert {row["name"] for row in good("methods", "--kind", "adapter")} == set(methods("adapter"))
    assert cli("methods", "--kind", "diet").code == 2


def test_inspect_writes_a_page_with_both_figures(good, tiny, tmp_path):
    found = good("inspect", tiny, "--select", "*.q_proj|*.up_proj", "-o", tmp_path / "look")
    assert sorted(path.name for path in (tmp_path / "look").iterdir()) == ["report.html", "report.json"]
    assert (tmp_path / "look" / "report.html").read_text(encoding="utf-8").count("<svg") == 2
    assert found["report"] == str(tmp_path / "look" / "report.html")
    assert list(found["sites"]) == [
        f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj")
    ]
    assert json.loads((tmp_path / "look" / "report.json").read_text())["data"]["sites"] == found["sites"]


def test_a_survey_shows_twenty_layers_unless_all_are_asked_for(cli, good, tmp_path, page):
    out = tmp_path / "deep"
    deep = [*SMALL, "--steps", 1, "--layers", 3]
    good("train", *deep, "--data", page, "-o", out)
    assert "1 more sites" in cli("inspect", out).out
    assert "more sites" not in cli("inspect", out, "--all").out


def test_plan_json_is_the_plan_file(good, tiny, tmp_path):
    printed = good("plan", tiny, "--method", "svd", "--ratio", 0.6, "-o", tmp_path / "new" / "plan.json")
    assert Plan.from_dict(printed) == Plan.from_json(tmp_path / "new" / "plan.json")
    assert (printed["method"], printed["args"]) == ("svd", {"target": {"ratio": 0.6}})
    assert printed["totals"]["ratio"] <= 0.6


def test_energy_takes_the_place_of_the_methods_budget(good, tiny):
    plan = good("plan", tiny, "--method", "welore", "--energy", 0.9, "--select", "*.q_proj")
    wanted = {
        name: row["energy_rank"] for name, row in good("inspect", tiny, "--select", "*.q_proj")["sites"].items()
    }
    assert {name: site["rank"] for name, site in plan["sites"].items()} == wanted


def test_what_compress_saves_scores_as_it_did_in_memory(process, small, tiny, page, plan_file):
    plan = Plan.from_json(plan_file)
    loaded = folders.open_model(tiny)
    windows = text.windows(jobs.tokens(loaded.tokenizer, text.read([page])), 64, 4)
    calibration = text.windows(jobs.tokens(loaded.tokenizer, text.read([page]), 512), 64).unsqueeze(1)
    taken = study(loaded.model, Gram(), batches=calibration, forward=jobs.forward)
    assert taken.plan(jobs.decode(plan.method, plan.args).budget).sites == plan.sites
    dense = perplexity(loaded.model, windows)
    taken.apply(loaded.model, plan)
    there = process(NOW, "eval", small, "--text", page, "--window", 64, "--windows", 4, "--json").communicate()[0]
    assert json.loads(there)["perplexity"] == perplexity(loaded.model, windows) != dense


def test_a_plan_and_its_method_compress_alike(good, small, tiny, page, tmp_path):
    wanted = ["--method", "welore", "--err", 0.5, "--metric", "gram", "--calibrate", page, "--tokens", 512]
    found = good("compress", tiny, *wanted, "-o", tmp_path / "direct")
    assert found["plan"] == io.read_about(small)["plan"]
    one, other = io.read_tensors(tmp_path / "direct" / io.WEIGHTS), io.read_tensors(small / io.WEIGHTS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_plan_that_keeps_everything_changes_nothing(good, tiny, page, tmp_path):
    good("plan", tiny, "--method", "svd", "--err", 0, "-o", tmp_path / "plan.json")
    good("compress", tiny, "--plan", tmp_path / "plan.json", "-o", tmp_path / "same")
    score = ["--text", page, "--windows", 2]
    assert good("eval", tmp_path / "same", *score)["nll"] == good("eval", tiny, *score)["nll"]


def test_eval_counts_what_it_scores(good, tiny, page):
    found = good("eval", tiny, "--text", page, "--window", 16, "--windows", 3, "--speed")
    assert (found["windows"], found["window"], found["tokens"]) == (3, 16, 45)
    assert found["perplexity"] == torch.tensor(found["nll"], dtype=torch.float64).exp().item()
    assert found["decode_tokens_per_second"] > 0


def test_train_saves_the_model_it_validated(good, page, tmp_path):
    found = good("train", "--optimizer", "fira", *SMALL, "--data", page, "-o", tmp_path / "a")
    again = good("train", "--optimizer", "fira", *SMALL, "--data", page, "-o", tmp_path / "b")
    assert found["validation_after"] == again["validation_after"] < found["validation_before"]
    loaded = folders.open_model(tmp_path / "a")
    assert validation_loss(loaded, page, 32) == found["validation_after"]
    history = json.loads((tmp_path / "a" / "train.json").read_text())
    assert [step for step, _ in history["train"]] == [1, 2, 3, 4, 5]
    assert history["args"] == {"rank": 0.25, "every": 1}
    assert good("eval", tmp_path / "a", "--text", page)["window"] == 32


@pytest.mark.parametrize("method", sorted(methods("adapter")))
def test_an_adapter_is_saved_alone_and_opens_as_it_was(method, good, tiny, page, tmp_path):
    ranked = "rank" in signature(find(method).build).parameters
    args = ["--method", method, *(["--rank", 2] if ranked else []), "--data", page, "--steps", 3, "--window", 32]
    found = good("finetune", tiny, *args, "-o", tmp_path / "a", "--select", "*.q_proj|*.down_proj")
    assert not (tmp_path / "a" / "config.json").exists()
    assert found["args"].get("rank") == (2 if ranked else None)
    loaded = folders.open_model(tmp_path / "a")
    assert len(io.read_about(tmp_path / "a")["sites"]) == 4
    assert validation_loss(loaded, page, 32) == found["validation_after"] != found["validation_before"]


def test_an_adapter_is_merged_before_its_model_is_compressed(good, tiny, page, tmp_path):
    good("finetune", tiny, "--method", "lora", "--data", page, "--steps", 3, "--lr", 0.03, "-o", tmp_path / "a")
    good("compress", tmp_path / "a", "--method", "svd", "--err", 0, "-o", tmp_path / "merged")
    score = ["--text", page, "--windows", 4]
    plain, adapted, merged = (good("eval", m, *score)["nll"] for m in (tiny, tmp_path / "a", tmp_path / "merged"))
    assert abs(adapted - plain) > 1e-3
    assert_close(merged, adapted, rtol=1e-6, atol=0)
    assert list(good("inspect", tmp_path / "a")["sites"]) == list(good("inspect", tiny)["sites"])


def test_healing_moves_the_factors_and_nothing_else(good, small, page, tmp_path):
    found = good("finetune", small, "--method", "welore_peft", "--data", page, "--steps", 3, "-o", tmp_path / "a")
    before, after = folders.open_model(small).model, folders.open_model(tmp_path / "a").model
    healed = {name for name, _ in Factors().choose(before)}
    assert found["parameters"] == sum(
        p.numel() for m in after.modules() if isinstance(m, LowRank) for p in m.parameters()
    )
    old, new = before.state_dict(), after.state_dict()
    assert {name for name in old if not torch.equal(old[name], new[name])} == healed


@pytest.mark.parametrize("method", sorted(methods("optimizer")))
def test_every_optimizer_trains_all_weights(method, good, tiny, page, tmp_path):
    args = ["--method", method, "--data", page, "--steps", 2, "--batch", 2, "--window", 32]
    found = good("finetune", tiny, *args, "-o", tmp_path / "a")
    loaded = folders.open_model(tmp_path / "a")
    assert found["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    assert validation_loss(loaded, page, 32) == found["validation_after"]
    assert math.isfinite(found["perplexity"])


def test_the_demo_prints_where_its_page_lies(cli, tmp_path, monkeypatch):
    def run(out, *, quick, seed, device, dtype, force):
        print("act one")
        assert (quick, seed, device, dtype, force) == (True, 3, "cpu", torch.bfloat16, False)
        return out / "report.html"

    monkeypatch.setattr(import_module("subspan.cli.demo").demo, "run", run)
    args = ["demo", "--quick", "--seed", 3, "--dtype", "bfloat16", "-o", tmp_path / "demo"]
    assert cli(*args).out == f"act one\nreport: {tmp_path / 'demo' / 'report.html'}\n"
    done = cli(*args, "--json")
    assert (done.json, done.err) == ({"report": str(tmp_path / "demo" / "report.html")}, "act one\n")


def test_a_report_of_a_compression_names_every_layer_and_needs_the_whole_model(good, cli, tiny, page, tmp_path):
    words = ("compress", tiny, "--method", "svd_llm", "--err", 0.3, "--calibrate", page, "--window", 64)
    plan = good(*words, "-o", tmp_path / "out", "--report", tmp_path / "page.html")["plan"]
    shown = (tmp_path / "page.html").read_text()
    assert all(site in shown for site in plan["sites"])
    assert "Predicted against measured error" in shown
    refused = cli(*words, "-o", tmp_path / "other", "--report", tmp_path / "page.html", "--stream")
    assert refused.code == 2 and "--report needs the whole model in memory" in " ".join(refused.err.split())
