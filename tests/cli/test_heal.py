"""Healing a compressed folder by every way there is: what learns, what is saved, who teaches."""

import re
import shutil

import pytest
import torch
from torch import nn

from subspan import io
from subspan.adapt import Adapted, trainable
from subspan.heal import Factors
from subspan.hosts import folders, jobs, lessons, text
from subspan.hosts.score import nll
from subspan.hosts.training import state_bytes
from subspan.methods import methods
from subspan.ops import LowRank, OpLinear
from subspan.optim import Optim

FEW = ["--steps", 2, "--batch", 2, "--window", 32]
ADAPTERS = ["lora", "rslora", "dora", "pissa", "milora"]
SITES = [f"model.layers.{i}.{m}" for i in (0, 1) for m in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)]  # fmt: skip


@pytest.fixture(scope="module")
def small(tiny, good, tmp_path_factory):
    """The tiny model with low-rank q_proj, up_proj and down_proj; the rest is as it was."""
    out = tmp_path_factory.mktemp("small") / "small"
    good(
        "compress", tiny, "--method", "svd", "--err", 0.75, "--select", "*.q_proj|*.up_proj|*.down_proj", "-o", out
    )
    return out


def tensors(folder):
    return {name: t.clone() for name, t in folders.open_model(folder).model.state_dict().items()}


def validation_loss(loaded, page, window=32):
    found = lessons.split(jobs.tokens(loaded.tokenizer, text.read([page])), window)
    return nll(loaded.model, found.validation, batch=8).mean().item()


def compressed_model(folder):
    return folders.open_model(folder).model


# ---- every way, through the command line


@pytest.mark.parametrize("method", [*methods("healing"), *ADAPTERS, "adamw", "galore"])
def test_a_healed_folder_opens_with_the_loss_it_was_left_with(method, good, small, page, tmp_path):
    more = ["--rank", 2] if method in ADAPTERS else []
    found = good("finetune", small, "--method", method, *more, "--data", page, *FEW, "-o", tmp_path / "a")
    healed = folders.open_model(tmp_path / "a")
    assert validation_loss(healed, page) == found["validation_after"] != found["validation_before"]
    ops = [m for m in healed.model.modules() if isinstance(m, LowRank) and m.rank == 8]
    assert len(ops) == (0 if method in ("pissa", "milora") else 6)


def test_all_of_the_model_is_one_thing_and_its_factors_another(good, small, page, tmp_path):
    before = tensors(small)
    factors = {name for name, _ in Factors().choose(compressed_model(small))}
    assert len(factors) == 12
    for method, moved in {"full": set(before), "welore_peft": factors}.items():
        good("finetune", small, "--method", method, "--data", page, *FEW, "-o", tmp_path / method)
        after = tensors(tmp_path / method)
        assert {name for name in before if not torch.equal(before[name], after[name])} == moved
    good("finetune", small, "--method", "adamw", "--data", page, *FEW, "-o", tmp_path / "adamw")
    same = tensors(tmp_path / "adamw")
    assert all(torch.equal(same[name], t) for name, t in tensors(tmp_path / "full").items())


def test_an_adapter_on_a_compressed_model_leaves_it_as_it_was_on_disk(good, small, page, tmp_path):
    good("finetune", small, "--method", "lora", "--rank", 2, "--data", page, *FEW, "-o", tmp_path / "a")
    about = io.read_about(tmp_path / "a")
    assert about["sites"] == SITES and about["base"]["source"] == str(small)
    before, after = tensors(small), tensors(tmp_path / "a")
    kept = {name.replace(".base.", "."): t for name, t in after.items() if ".adapters." not in name}
    assert set(kept) == set(before) and all(torch.equal(t, before[name]) for name, t in kept.items())


def test_a_merged_adapter_on_a_compressed_model_says_the_same(good, small, page, tmp_path):
    good("finetune", small, "--method", "lora", "--data", page, *FEW, "--lr", 0.03, "-o", tmp_path / "a")
    model = compressed_model(tmp_path / "a").double()
    ids = torch.arange(2 * 16).reshape(2, 16) * 37 % 300
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert jobs.fold(model) == len(SITES)
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-10, atol=1e-10)


# ---- what learns, and what is kept for it


@pytest.mark.parametrize("method", ["welore_peft", "full", "lora"])
def test_adam_s_state_is_two_numbers_for_each_that_trains(method, small, page):
    loaded = folders.open_model(small)
    data = lessons.split(jobs.tokens(loaded.tokenizer, text.read([page])), 32)
    learns = lessons.learning(loaded.model, method, steps=1, rank=2 if method == "lora" else None)
    history = lessons.fit(loaded.model, learns, data, steps=1, batch=2, lr=1e-3)
    numbers = sum(p.numel() for _, p in learns.named)
    counter = 8
    assert history.state_bytes == 4 * 2 * numbers + counter * len(learns.named)
    assert [n for n, _ in learns.named] == [n for n, p in loaded.model.named_parameters() if p.requires_grad]


def test_galore_keeps_less_than_adam_for_the_same_compressed_model(small):
    kept = {}
    for method in ("adamw", "galore"):
        model = compressed_model(small)
        learns = lessons.learning(model, method, steps=10)
        optimizer = Optim(learns.named, learns.rule, lr=1e-3)
        ids = torch.arange(32).reshape(1, 32)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
        kept[method] = state_bytes(optimizer)
    assert kept["galore"] < kept["adamw"]


def test_adapters_go_on_plain_and_compressed_layers_alike(small):
    model = compressed_model(small)
    assert lessons.adaptable(model) == SITES
    assert lessons.adaptable(model, "*.k_proj|*.0.*.q_proj") == [SITES[0], SITES[1], SITES[8]]
    assert isinstance(model.get_submodule(SITES[0]), OpLinear)
    lessons.learning(model, "lora", steps=1, select="*.up_proj", rank=2)
    assert [name for name, m in model.named_modules() if isinstance(m, Adapted)] == [SITES[5], SITES[12]]
    assert len(trainable(model)) == 4
    with pytest.raises(ValueError, match=r"'\*\.query' matches no linear layer; there are: model"):
        lessons.adaptable(compressed_model(small), "*.query")


def test_a_tied_layer_of_a_compressed_model_is_refused_and_never_taken_unasked():
    tied = nn.Sequential(
        OpLinear(LowRank(torch.ones(3, 1), torch.ones(1, 3))), nn.Linear(3, 4), nn.Embedding(4, 3)
    )
    tied[2].weight = tied[1].weight
    assert lessons.adaptable(tied) == ["0"]
    with pytest.raises(ValueError, match="1 shares its weight with 2; leave it out with '!1'"):
        lessons.adaptable(tied, "*")


# ---- who teaches


def test_only_pela_has_a_teacher():
    assert [name for name in methods() if lessons.distils(name)] == ["pela"]


def test_the_teacher_is_what_the_folder_was_compressed_from(good, small, tiny, page, tmp_path):
    pela = ["--method", "pela", "--data", page, *FEW]
    assert good("finetune", small, *pela, "-o", tmp_path / "a")["teacher"] == str(tiny)
    good("finetune", small, *pela, "--teacher", tiny, "-o", tmp_path / "b")
    one, two = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(one[name], t) for name, t in two.items())
    other = shutil.copytree(tiny, tmp_path / "other")
    changed = folders.open_model(other)
    with torch.no_grad():
        changed.model.model.layers[0].mlp.down_proj.weight.mul_(2)
    folders.save_model(other, changed, force=True)
    good("finetune", small, *pela, "--teacher", other, "-o", tmp_path / "c")
    assert not all(torch.equal(one[name], t) for name, t in tensors(tmp_path / "c").items())


def test_the_teacher_of_what_was_healed_is_still_the_dense_one(good, small, tiny, page, tmp_path):
    good("finetune", small, "--method", "welore_peft", "--data", page, *FEW, "-o", tmp_path / "healed")
    good("finetune", tmp_path / "healed", "--method", "lora", "--data", page, *FEW, "-o", tmp_path / "adapted")
    chain = [str(tmp_path / "adapted"), str(tmp_path / "healed"), str(small), str(tiny)]
    assert [lessons.made_from(name) for name in chain] == [*chain[1:], None]
    assert all(lessons.teacher_of(name) == str(tiny) for name in chain)
    assert lessons.teacher_of("smollm2") == "smollm2"
    assert lessons.teacher_for("lora", str(small), None) is None
    assert lessons.teacher_for("pela", str(small), "smollm2") == "smollm2"


def test_a_teacher_that_is_gone_that_nobody_asked_or_that_does_not_fit(
    check_refused, good, small, tiny, page, tmp_path
):
    dense = shutil.copytree(tiny, tmp_path / "dense")
    orphan = tmp_path / "orphan"
    good("compress", dense, "--method", "svd", "--err", 0.75, "-o", orphan)
    shutil.rmtree(dense)
    tune = ["--data", page, *FEW, "-o", tmp_path / "a"]
    words = [f"{orphan} was made from {dense}, which is no model folder here", "--teacher MODEL"]
    check_refused(words, "finetune", orphan, "--method", "pela", *tune)
    words = ["--teacher is for methods that distil, and lora does not; leave it out"]
    check_refused(words, "finetune", small, "--method", "lora", "--teacher", tiny, *tune)
    narrow = tmp_path / "narrow"
    sizes = ["--vocab", 300, "--heads", 2, "--hidden", 16, "--layers", 2]
    good("train", "--steps", 1, "--batch", 2, "--window", 32, *sizes, "--data", page, "-o", narrow)
    words = ["block model.layers.0: the student's shape is (2, 32, 32), the teacher's (2, 32, 16)"]
    check_refused(words, "finetune", small, "--method", "pela", "--teacher", narrow, *tune)
    words = ["LlamaForCausalLM has no low-rank layer to train; compress it first"]
    check_refused(words, "finetune", tiny, "--method", "pela", *tune)
    assert not (tmp_path / "a").exists()


def test_without_a_teacher_there_is_no_lesson(small):
    words = re.escape("pela distils, and has no teacher; pass the dense model, on the command line --teacher")
    with pytest.raises(ValueError, match=words):
        lessons.learning(compressed_model(small), "pela", steps=1)


def test_a_teacher_is_frozen_and_put_in_eval_mode(small, tiny):
    teacher = compressed_model(tiny).train()
    learns = lessons.learning(compressed_model(small), "pela", steps=1, teacher=teacher)
    assert learns.loss is not None and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
