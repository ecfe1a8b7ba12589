"""`subspan inspect --compare`: what was changed shows where it was changed and by how much, in either spelling."""

import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

CHANGED = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def scaled(tiny, tmp_path_factory):
    """The tiny model with one matrix made 1.5 times as large, which turns no direction."""
    folder = tmp_path_factory.mktemp("models") / "scaled"
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"{CHANGED}.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_only_what_was_changed_shows_and_by_how_much(good, tiny, scaled):
    found = good("inspect", "--compare", tiny, scaled, "--top", 4)
    assert found["models"] == [str(tiny), str(scaled)]
    assert {name for name, row in found["sites"].items() if row["change"] > 0} == {CHANGED}
    row = found["sites"][CHANGED]
    assert math.isclose(row["change"], 0.5, rel_tol=1e-5) and math.isclose(row["spectra"], 0.5, rel_tol=1e-5)
    assert row["intruders"] == 0 and math.isclose(row["left"], 1.0, rel_tol=1e-5)
    assert (found["top"], found["skipped"], found["report"]) == (4, {}, None)


def test_the_flag_may_stand_anywhere_and_the_order_is_before_then_after(good, tiny, scaled):
    first = good("inspect", "--compare", tiny, scaled)
    assert good("inspect", tiny, "--compare", scaled) == first == good("inspect", tiny, scaled, "--compare")
    back = good("inspect", "--compare", scaled, tiny)["sites"][CHANGED]
    assert math.isclose(back["change"], 1 / 3, rel_tol=1e-5)


def test_a_compressed_folder_is_compared_by_its_dense_weights(good, tiny, tmp_path):
    done = good(
        "compress", tiny, "--method", "svd", "--err", 0.5, "--select", "*.q_proj", "-o", tmp_path / "small"
    )
    found = good("inspect", tiny, "--compare", tmp_path / "small")["sites"]
    for name, site in done["plan"]["sites"].items():
        assert math.isclose(found[name]["change"], site["error"], rel_tol=1e-4)
        assert found[name]["rank_b"] == site["rank"]
    assert {name for name, row in found.items() if row["change"] > 0} == set(done["plan"]["sites"])


def test_the_page_holds_a_figure_and_the_same_numbers(good, cli, tiny, scaled, tmp_path):
    found = good("inspect", "--compare", tiny, scaled, "-o", tmp_path / "page")
    source = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert source.count("<svg") == 1 and CHANGED in source
    assert json.loads((tmp_path / "page" / "report.json").read_text())["data"]["sites"] == found["sites"]
    assert "50.00%" in cli("inspect", "--compare", tiny, scaled, "--select", CHANGED).out


def test_models_of_other_shapes_are_told_apart_by_layer(good, check_refused, tiny, page, tmp_path):
    other = tmp_path / "other"
    small = ["--hidden", 16, "--layers", 1, "--vocab", 300, "--steps", 1, "--batch", 1, "--window", 16]
    good("train", *small, "--data", page, "-o", other)
    words = ["no layer of one name and shape in common", "q_proj", "in the first and", "descendant"]
    check_refused(words, "inspect", "--compare", tiny, other)


def test_layers_of_one_model_only_are_listed(good, cli, tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    short = tmp_path / "short"
    shutil.copytree(tiny, short)
    (short / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    weights = load_file(short / "model.safetensors")
    kept = {name: w for name, w in weights.items() if ".layers.1." not in name}
    save_file(kept, short / "model.safetensors", metadata={"format": "pt"})
    found = good("inspect", "--compare", tiny, short)
    assert set(found["skipped"].values()) == {"only in the first"}
    assert all(".layers.1." in name for name in found["skipped"])
    assert "not compared" in cli("inspect", "--compare", tiny, short, "--all").out


@pytest.mark.parametrize(
    "words, args",
    [
        (["--compare takes two models", "got 1"], ["--compare", 1]),
        (["--compare takes two models", "got 3"], ["--compare", 3]),
        (["takes one model", "add --compare"], [2]),
        (["--err is not used with --compare"], ["--compare", "--err", "0.3", 2]),
        (["--top is not used without --compare"], ["--top", "3", 1]),
    ],
)
def test_wrong_usage_says_what_is_right(cli, tiny, words, args):
    *options, count = args
    done = cli("inspect", *options, *[tiny] * count)
    assert done.code == 2 and done.out == ""
    text = " ".join(done.err.replace("│", " ").split())
    assert [word for word in words if word not in text] == []
