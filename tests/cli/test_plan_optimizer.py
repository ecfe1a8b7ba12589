"""`subspan plan --optimizer` says what training will hold, before any weight is read."""

import shutil

import pytest

from subspan.hosts import folders, lessons
from subspan.hosts.transformers import skeleton
from subspan.methods import methods
from subspan.optim import Optim, ledger

FIRA = ["--optimizer", "fira", "--rank", 4]


def test_json_is_what_the_library_says(good, tiny):
    printed = good(
        "plan", tiny, *FIRA, "--every", 50, "--where", "*.q_proj.*", "--shards", 3, "--dtype", "bfloat16"
    )
    rule, args = lessons.rule("fira", steps=1000, rank=4, every=50)
    model = skeleton(tiny).bfloat16()
    told = ledger(model.named_parameters(), rule, where="*.q_proj.*", shards=3).to_dict()
    assert printed == {"optimizer": "fira", "args": args, "dtype": "bfloat16", **told}


def test_it_foretells_what_training_the_model_takes(good, tiny, page, tmp_path):
    plan = good("plan", tiny, *FIRA)
    few = ["--steps", 2, "--batch", 2, "--window", 32]
    done = good("finetune", tiny, "--method", "fira", "--rank", 4, *few, "--data", page, "-o", tmp_path / "out")
    assert plan["totals"]["state_bytes"] == done["state_bytes"]
    assert plan["totals"]["weight_bytes"] == 4 * done["parameters"]


def test_weights_are_not_needed(good, tiny, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny / "config.json", bare)
    assert good("plan", bare, *FIRA) == good("plan", tiny, *FIRA)


def test_a_compressed_model_is_reckoned_as_it_is(good, tiny, tmp_path):
    good("compress", tiny, "--method", "svd", "--err", 0.5, "-o", tmp_path / "small")
    named = list(folders.open_model(tmp_path / "small").model.named_parameters())
    found = good("plan", tmp_path / "small", *FIRA)
    assert [row["name"] for row in found["parameters"]] == [name for name, _ in named]
    rule, _ = lessons.rule("fira", steps=1000, rank=4)
    assert [group["role"] for group in Optim(named, rule, lr=0.1).param_groups] == ["rule", "other"]
    assert found["totals"] == ledger(named, rule).totals


def test_the_table_and_where_it_does_not_pay(cli, tiny):
    low, full = [cli("plan", tiny, "--optimizer", "galore", "--rank", rank) for rank in (4, 32)]
    assert (low.code, full.code) == (0, 0)
    assert "all, by galore" in low.out
    assert "all, by AdamW" in low.out
    assert "no saving" not in low.out
    assert "no saving on 4 of 32x32 (q_proj, o_proj): a basis of 4," in full.out


@pytest.mark.parametrize(
    "given, words",
    [
        ([*FIRA, "--method", "svd"], ["give exactly one of --method, --optimizer"]),
        ([], ["give exactly one of --method, --optimizer", "none"]),
        ([*FIRA, "--err", 0.5, "--tokens", 9], ["--err, --tokens", "leave it out with --optimizer"]),
        (["--method", "svd", "--err", 0.5, "--shards", 2], ["--shards", "leave it out with --method"]),
    ],
)
def test_the_two_plans_do_not_mix(given, words, cli, tiny):
    done = cli("plan", tiny, *given)
    said = " ".join(done.err.replace("│", " ").split())
    assert (done.code, done.out) == (2, "")
    assert [word for word in words if word not in said] == []


def test_errors_name_what_exists(check_refused, tiny, tmp_path):
    check_refused(["'svd'", *methods("optimizer")], "plan", tiny, "--optimizer", "svd")
    check_refused(["adamw takes no 'rank'"], "plan", tiny, "--optimizer", "adamw", "--rank", 4)
    check_refused(["neither a count"], "plan", tiny, "--optimizer", "fira", "--rank", "many")
    check_refused(["matches no parameter", "q_proj"], "plan", tiny, *FIRA, "--where", "*.nowhere")
    check_refused(["no such folder"], "plan", tmp_path / "none", *FIRA)
