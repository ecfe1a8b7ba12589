"""`subspan adapter`: what it says about adapters is what the library says, and what it writes opens again."""

import json
from importlib import import_module

import pytest
import torch
from torch.testing import assert_close

from subspan.adapt import adapt, trainable
from subspan.edit import edit
from subspan.hosts import folders
from subspan.hosts.peft import load_peft, read_peft, save_peft
from subspan.hosts.peft_merge import refuse_gate
from subspan.hosts.peft_read import read_adapter
from subspan.methods import build

PARTS = import_module("subspan.cli.adapter").PARTS


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Adapters of the tiny model, in subspan's form, each trained a little; and the LoRA in PEFT's form."""
    place = tmp_path_factory.mktemp("adapters")
    for method in ("lora", "dora", "pissa"):
        loaded = folders.open_model(tiny)
        edit(loaded.model, "*.q_proj|*.down_proj", adapt(build(method, "adapter", rank=2)))
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, p in trainable(loaded.model):
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
        args = {"method": method, "args": {"rank": 2}, "source": str(tiny)}
        folders.save_adapter(place / method, loaded.model, **args)
        if method == "lora":
            save_peft(loaded.model, place / "peft", base=str(tiny))
    return place


def logits(path):
    ids = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        return folders.open_model(path).model(input_ids=ids).logits


def with_peft(tiny, path):
    model = folders.open_model(tiny).model
    load_peft(model, path)
    ids = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("part", PARTS)
def test_every_part_has_help_and_an_example(part, cli):
    run, example = PARTS[part]
    shown = cli("adapter", part, "--help")
    assert shown.code == 0
    assert run.__doc__.splitlines()[0] in " ".join(shown.out.split())
    assert " ".join(shown.out.split()).endswith(f"Example: {example}")
    assert example.startswith(f"subspan adapter {part}")
    assert part in cli("adapter", "--help").out


def test_check_counts_and_measures(good, cli, tiny, made):
    found = good("adapter", "check", tiny, made / "peft")
    assert found["tensors"] == {
        "lora_A": {"count": 4, "numbers": 4 * 32 + 4 * 48}, "lora_B": {"count": 4, "numbers": 8 * 32}
    }  # fmt: skip
    assert (found["method"], found["form"], found["sites"], found["numbers"]) == ("lora", "peft", 4, 576)
    own = good("adapter", "check", tiny, made / "lora")
    assert {key: own[key] for key in ("largest", "mean", "logit")} == {
        key: found[key] for key in ("largest", "mean", "logit")
    }
    assert found["largest"] > found["mean"] > 0
    assert "lora_A" in cli("adapter", "check", tiny, made / "peft").out


def test_check_fails_for_an_adapter_that_does_nothing(check_refused, tiny, tmp_path):
    loaded = folders.open_model(tiny)
    edit(loaded.model, "*.q_proj", adapt(build("lora", "adapter", rank=2)))
    save_peft(loaded.model, tmp_path / "idle")
    check_refused(["changes no logit", "untrained"], "adapter", "check", tiny, tmp_path / "idle")


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_what_is_merged_opens_as_one_model(method, good, tiny, made, tmp_path):
    done = good("adapter", "merge", tiny, made / method, "-o", tmp_path / "out")
    assert (done["streamed"], done["sites"], done["untied"]) == (True, 4, [])
    wanted = logits(made / method)
    assert_close(logits(tmp_path / "out"), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    skipped = good("adapter", "merge", tiny, made / method, "-o", tmp_path / "fast", "--no-verify")
    assert skipped["difference"] is None
    assert torch.equal(logits(tmp_path / "fast"), logits(tmp_path / "out"))


def test_convert_to_peft_and_back_is_the_same_adapter(good, tiny, made, tmp_path):
    good("adapter", "convert", made / "lora", "--to", "peft", "-o", tmp_path / "theirs")
    good("adapter", "convert", tmp_path / "theirs", "--to", "subspan", "-o", tmp_path / "ours")
    assert torch.equal(logits(tmp_path / "ours"), logits(made / "lora"))
    assert good("adapter", "diff", tmp_path / "ours", made / "lora")["same"]
    assert read_peft(tmp_path / "theirs").config.base == str(tiny)


@pytest.mark.parametrize(("method", "rank", "exact"), [("lora", 2, True), ("pissa", 4, True), ("dora", 2, False)])
def test_convert_to_lora_prints_its_error(method, rank, exact, good, tiny, made, tmp_path):
    done = good("adapter", "convert", made / method, "--to", "lora", "--rank", rank, "-o", tmp_path / "plain")
    assert (done["error"] < 1e-5) == exact
    assert read_peft(tmp_path / "plain").config.rank == rank
    if exact:
        wanted = logits(made / method)
        assert_close(with_peft(tiny, tmp_path / "plain"), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    apart = good("adapter", "diff", made / method, tmp_path / "plain")["sites"]
    total = sum(row["one"] ** 2 for row in apart.values())
    missed = sum(row["apart"] ** 2 for row in apart.values())
    assert_close((missed / total) ** 0.5, done["error"], rtol=1e-3, atol=1e-6)


def test_convert_stores_narrow_factors_and_says_what_that_costs(good, made, tmp_path):
    args = ["--to", "lora", "--dtype", "bfloat16", "-o", tmp_path / "half"]
    done = good("adapter", "convert", made / "lora", *args)
    assert 0 < done["rounding"] < 2**-8
    row = good("adapter", "diff", made / "lora", tmp_path / "half")["sites"]
    assert max(r["apart"] / r["one"] for r in row.values()) < 2 * done["rounding"] * (1 + 2**-8)


def test_diff_names_what_only_one_has(cli, good, tiny, made, tmp_path):
    loaded = folders.open_model(tiny)
    edit(loaded.model, "*.q_proj", adapt(build("lora", "adapter", rank=2)))
    save_peft(loaded.model, tmp_path / "a", modules_to_save=["lm_head"])
    found = good("adapter", "diff", tmp_path / "a", made / "lora")
    assert found["same"] is False
    assert found["modules_to_save"] == {"only_a": ["lm_head.weight"], "only_b": [], "different": []}
    assert [site for site, row in found["sites"].items() if row["one"] is None] == [
        f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
    ]
    shown = cli("adapter", "diff", tmp_path / "a", made / "lora").out
    assert "only A saves whole: lm_head.weight" in shown


def test_errors_say_what_to_do(check_refused, cli, tiny, made, tmp_path):
    out = tmp_path / "out"
    check_refused(
        ["itself an adapter", "merge it first"], "adapter", "merge", made / "lora", made / "dora", "-o", out
    )
    check_refused(["no such folder"], "adapter", "check", tiny, tmp_path / "nowhere")
    check_refused(["whole model", "folder of an adapter"], "adapter", "check", tiny, saved_whole(tiny, tmp_path))
    check_refused(["no factors", "--rank"], "adapter", "convert", made / "dora", "--to", "lora", "-o", out)
    check_refused(["rank 99", "32"], "adapter", "convert", made / "lora", "--to", "lora", "--rank", 99, "-o", out)
    check_refused(["that form already"], "adapter", "convert", made / "lora", "--to", "subspan", "-o", out)
    check_refused(["in use"], "adapter", "merge", tiny, made / "lora", "-o", tiny, "--force")
    check_refused(["not empty"], "adapter", "merge", tiny, made / "lora", "-o", tiny)
    folder = tmp_path / "moved"
    folder.mkdir()
    for file in (made / "peft").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/model"}))
    check_refused(["'org/model'", "--base"], "adapter", "convert", folder, "--to", "subspan", "-o", out)
    assert cli("adapter", "convert", made / "lora", "--to", "peft", "--rank", 2, "-o", out).code == 2
    assert not out.exists()


@pytest.mark.parametrize(
    "args",
    [
        ["merge", "TINY", "GATE"],
        ["convert", "GATE", "--to", "lora", "--rank", 2],
        ["convert", "GATE", "--to", "peft"],
    ],
    ids=lambda args: " ".join(map(str, args[:3])),
)
def test_a_gate_is_refused_with_its_layers(args, check_refused, tiny, gate, tmp_path):
    given = [{"TINY": tiny, "GATE": gate}.get(arg, arg) for arg in args]
    words = [
        "moe_lora on model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj",
        "keep it as an adapter",
    ]
    check_refused(words, "adapter", *given, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gate_is_not_compared_and_names_its_layer_where_it_would_be_merged(check_refused, gate, made, tmp_path):
    check_refused(
        ["moe_lora on model.layers.0.self_attn.q_proj", "compare"], "adapter", "diff", made / "lora", gate
    )
    with pytest.raises(ValueError, match="gate is moe_lora on"):
        refuse_gate(read_adapter(gate))
    assert refuse_gate(read_adapter(made / "lora")) is None
    words = ["error: model.layers.0.self_attn.q_proj: Routed(", "such as lora"]
    check_refused(words, "export", gate, "--to", "dense", "-o", tmp_path / "out")


@pytest.fixture(scope="module")
def gate(tiny, tmp_path_factory):
    """A mixture of experts on the queries."""
    loaded, args = folders.open_model(tiny), {"rank": 1, "experts": 3, "top": 2}
    edit(loaded.model, "*.q_proj", adapt(build("moe_lora", "adapter", **args)))
    place = tmp_path_factory.mktemp("gates") / "gate"
    return folders.save_adapter(place, loaded.model, method="moe_lora", args=args, source=str(tiny))


def saved_whole(tiny, tmp_path):
    folders.save_model(tmp_path / "whole", folders.open_model(tiny))
    return tmp_path / "whole"
