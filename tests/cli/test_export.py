"""`subspan export` writes what others load, and says what it cannot do."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from subspan.hosts import folders

IDS = torch.arange(24).reshape(2, 12) * 37 % 300


@pytest.fixture(scope="module")
def small(good, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "model"
    good("compress", tiny, "--method", "svd", "--ratio", 0.5, "-o", out)
    return out


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_a_dense_export_has_the_logits_of_the_folder(good, small, tmp_path):
    said = good("export", small, "--to", "dense", "-o", tmp_path / "out")
    assert said == {**said, "to": "dense", "out": str(tmp_path / "out")}
    assert 0 <= said["difference"] <= said["tolerance"]
    found, wanted = (
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
        logits(folders.open_model(small).model),
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())


def test_a_peft_export_has_two_folders(good, small, tmp_path):
    good("export", small, "--to", "peft", "-o", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "base"]
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 14
    named = {key.rpartition(".lora_")[0].rpartition(".")[2] for key in tensors}
    assert set(config["target_modules"]) == named


def test_the_precision_is_that_of_the_folder_unless_told(good, tiny, tmp_path):
    good("compress", tiny, "--method", "svd", "--ratio", 0.5, "--dtype", "bfloat16", "-o", tmp_path / "half")
    good("export", tmp_path / "half", "--to", "dense", "-o", tmp_path / "a")
    good("export", tmp_path / "half", "--to", "dense", "--dtype", "float32", "-o", tmp_path / "b")
    found = [AutoModelForCausalLM.from_pretrained(tmp_path / name).dtype for name in "ab"]
    assert found == [torch.bfloat16, torch.float32]


def test_an_adapter_is_merged_into_the_export(good, small, page, tmp_path):
    few = ["--steps", 3, "--batch", 2, "--window", 32]
    good("finetune", small, "--method", "lora", "--data", page, *few, "-o", tmp_path / "lora")
    good("export", tmp_path / "lora", "--to", "dense", "-o", tmp_path / "out")
    wanted = logits(folders.open_model(tmp_path / "lora").model)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
    assert not torch.allclose(found, logits(folders.open_model(small).model), atol=1e-4)


def test_what_it_cannot_do(check_refused, cli, tiny, small, tmp_path):
    out = tmp_path / "out"
    check_refused([str(tiny), "no low-rank layer", "--to dense"], "export", tiny, "--to", "peft", "-o", out)
    check_refused(["no such folder"], "export", tmp_path / "none", "--to", "dense", "-o", out)
    assert not out.exists()
    (out / "kept").mkdir(parents=True)
    check_refused(["is not empty", "--force"], "export", small, "--to", "dense", "-o", out)
    assert (out / "kept").is_dir()
    assert cli("export", small, "-o", out).code == 2
    assert cli("export", small, "--to", "gguf", "-o", out).code == 2
