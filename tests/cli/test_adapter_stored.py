"""`subspan adapter convert --dtype`: smaller files of the same adapter, with what that costs."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from subspan import io
from subspan.adapt import adapt, trainable
from subspan.cli import adapter as verb
from subspan.edit import edit
from subspan.hosts import folders
from subspan.hosts.peft import save_peft
from subspan.hosts.peft_read import read_adapter
from subspan.hosts.stored import store
from subspan.methods import build

METHODS = {"lora": {"rank": 16}, "dora": {"rank": 16}, "vera": {"rank": 8}, "lokr": {"rank": 2}}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    for method, args in METHODS.items():
        loaded = folders.open_model(tiny)
        edit(loaded.model, "*.q_proj|*.down_proj", adapt(build(method, "adapter", **args)))
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, p in trainable(loaded.model):
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
        folders.save_adapter(place / method, loaded.model, method=method, args=args, source=str(tiny),
                             notes={"train.json": {"loss": 1}})  # fmt: skip
        if method == "lora":
            save_peft(loaded.model, place / "peft", base=str(tiny))
    return place


def logits(path):
    with torch.no_grad():
        return folders.open_model(path).model(input_ids=torch.arange(40)[None] * 7 % 300).logits


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_a_narrower_folder_is_the_same_adapter_within_what_is_told(method, kind, good, made, tmp_path):
    done = good("adapter", "convert", made / method, "--to", "subspan", "--dtype", kind, "-o", tmp_path / "a")
    one, two = (io.read_tensors(path / io.WEIGHTS) for path in (made / method, tmp_path / "a"))
    apart = max(float((t - two[name]).norm() / t.norm()) for name, t in one.items())
    assert_close(done["rounding"], apart, rtol=1e-5, atol=1e-9)
    few = method in ("vera", "lokr")  # vectors, and matrices too small to be worth it
    assert apart < 1e-2 and (apart > 0) == (kind != "int8" or not few)
    size = [(path / io.WEIGHTS).stat().st_size for path in (made / method, tmp_path / "a")]
    assert size[1] < size[0] + (64 if few and kind == "int8" else 0)
    wanted = logits(made / method)
    assert_close(logits(tmp_path / "a"), wanted, rtol=0, atol=0.03 * float(wanted.abs().max()))
    assert (tmp_path / "a" / "train.json").read_bytes() == (made / method / "train.json").read_bytes()
    assert good("adapter", "check", io.read_about(made / method)["base"]["source"], tmp_path / "a")["sites"] == 4


def test_what_it_costs_is_printed_with_the_bound(cli, made, tmp_path):
    shown = cli(
        "adapter", "convert", made / "lora", "--to", "subspan", "--dtype", "int8", "-o", tmp_path / "a"
    ).out
    assert "as int8 a factor is off by" in shown and "no more than 1/254 of the largest of its 64" in shown
    shown = cli(
        "adapter", "convert", made / "lora", "--to", "peft", "--dtype", "bfloat16", "-o", tmp_path / "b"
    ).out
    assert "as bfloat16 a factor is off by" in shown and "no more than 3.9e-03 of itself" in shown
    kinds = {t.dtype for t in load_file(tmp_path / "b" / "adapter_model.safetensors").values()}
    assert kinds == {torch.bfloat16}


def test_a_folder_of_peft_is_converted_and_then_held_narrower(good, made, tmp_path):
    done = good("adapter", "convert", made / "peft", "--to", "subspan", "--dtype", "int8", "-o", tmp_path / "a")
    assert 0 < done["rounding"] < 1e-2
    wanted = logits(made / "lora")
    assert_close(logits(tmp_path / "a"), wanted, rtol=0, atol=0.03 * float(wanted.abs().max()))
    with pytest.raises(ValueError, match="is a folder of PEFT; convert it --to subspan"):
        store(read_adapter(made / "peft"), tmp_path / "b", "int8")


def test_codes_are_for_our_own_form(cli, check_refused, made, tmp_path):
    done = cli("adapter", "convert", made / "lora", "--to", "peft", "--dtype", "int8", "-o", tmp_path / "a")
    assert done.code == 2 and "--dtype int8 belongs to --to subspan" in " ".join(done.err.split())
    words = ["that form already"]
    check_refused(words, "adapter", "convert", made / "lora", "--to", "subspan", "--dtype", "float32",
                  "-o", tmp_path / "a")  # fmt: skip
    assert [kept.narrow for kept in verb.Kept] == [False, True, True, True, False]
    assert not (tmp_path / "a").exists()
