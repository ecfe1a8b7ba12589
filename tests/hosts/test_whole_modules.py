"""Modules that train whole beside an adapter: PEFT and we read the same folders, and nothing is lost unsaid."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from subspan import io
from subspan.adapt import Adapted
from subspan.hosts import folders, jobs, keep, lessons, quantizer
from subspan.hosts.keep import Keeping, require_peft, save_whole, train_whole
from subspan.hosts.lessons import fit, learning
from subspan.hosts.peft import layers_of, load_peft, read_peft, save_peft
from subspan.hosts.peft_merge import logits, merge_folder, opened_with
from subspan.hosts.peft_read import read_adapter
from subspan.hosts.score import nll
from subspan.hosts.transformers import LoadedModel

TOKENS = torch.arange(900) * 37 % 300
IDS = torch.arange(2 * 12).reshape(2, 12) * 37 % 300
STEPS = 8
MORE = [("lora", False), ("dora", True), ("loha", True), ("loha", False)]


def begun(model, method="lora", also="lm_head|model.norm", **given):
    """What learns: an adapter with modules whole."""
    torch.manual_seed(3)
    learns = learning(model, method, steps=STEPS, rank=3, **given)
    whole = train_whole(model, also)
    return lessons.Learning(**{**vars(learns), "named": [*learns.named, *whole.named]}), whole


def trained(model, method="lora", also="lm_head|model.norm", *, keeping=None, lr=1e-2, **given):
    learns, whole = begun(model, method, also, **given)
    data = lessons.split(TOKENS, 12)
    return whole, fit(model, learns, data, steps=STEPS, every=2, keeping=keeping, lr=lr, batch=2, seed=3)


@torch.no_grad()
def said(model):
    return model(input_ids=IDS).logits


def check_same(one, two, tolerance=1e-12):
    wanted = said(two)
    assert_close(said(one), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


# ---- training


@pytest.mark.parametrize("tie", [True, False])
def test_what_is_named_trains_and_all_else_stays(base, tie):
    model = base(tie)
    old = {name: t.clone() for name, t in model.state_dict().items()}
    whole, _ = trained(model)
    assert whole.modules == ("model.norm", "lm_head")
    assert whole.untied == ({"lm_head": "model.embed_tokens"} if tie else {})
    new = {name.replace(".base.", "."): t for name, t in model.state_dict().items() if ".adapters." not in name}
    assert {name for name, t in old.items() if not torch.equal(t, new[name])} == {
        "model.norm.weight",
        "lm_head.weight",
    }
    assert any(".adapters." in name and t.any() for name, t in model.state_dict().items())


def test_a_head_learns_what_it_would_learn_alone(base):
    """With the adapters held still, the head moves as under its own optimizer."""
    twin = base(False)
    model = copy.deepcopy(twin)
    learns, whole = begun(model, also="lm_head")
    only = lessons.Learning(**{**vars(learns), "named": whole.named})
    alone = lessons.Learning(lessons.only(twin, {"lm_head.weight"}), learns.rule, {}, "adapter")
    data = lessons.split(TOKENS, 12)
    for net, what in ((model, only), (twin, alone)):
        fit(net, what, data, steps=4, batch=2, lr=1e-2, seed=3)
    assert_close(model.lm_head.weight, twin.lm_head.weight, rtol=0, atol=1e-12)


def test_both_sides_of_a_tie_train_apart_when_both_are_named(llama):
    whole, _ = trained(llama, also="lm_head|*.embed_tokens")
    assert [*whole.untied] == ["model.embed_tokens"]
    assert not torch.equal(llama.lm_head.weight, llama.model.embed_tokens.weight)


@pytest.mark.parametrize("stop", [3, pytest.param(STEPS, marks=pytest.mark.full)])
def test_a_run_killed_and_resumed_is_the_run_that_was_not(llama, tmp_path, dies_at, stop):
    whole, killed, resumed = (copy.deepcopy(llama) for _ in range(3))
    _, history = trained(whole, keeping=Keeping())
    with dies_at(stop):
        trained(killed, keeping=Keeping(folder=tmp_path, every=1))
    _, again = trained(resumed, keeping=Keeping(folder=tmp_path, resume=True))
    have, want = resumed.state_dict(), whole.state_dict()
    assert have.keys() == want.keys() and all(torch.equal(t, want[name]) for name, t in have.items())
    assert (again.train, again.validation, again.best) == (history.train, history.validation, history.best)


def test_the_best_state_is_that_of_the_modules_too(llama):
    _, history = trained(llama, keeping=Keeping(), lr=0.3)
    assert history.best[0] < STEPS
    found = nll(llama, lessons.split(TOKENS, 12).validation).mean().item()
    assert found == pytest.approx(history.best[1], rel=1e-12)


# ---- folders


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestPeft:
    @pytest.mark.parametrize(
        ("method", "tie"),
        [("lora", True), ("dora", False), *(pytest.param(*row, marks=pytest.mark.full) for row in MORE)],
    )
    def test_what_we_save_peft_and_we_read_with_the_same_logits(self, base, words, method, tie, tmp_path):
        model = base(tie)
        theirs, ours = (copy.deepcopy(model).float() for _ in range(2))
        whole, _ = trained(model, method)
        about = {"method": method}
        save_whole(
            tmp_path / "a", LoadedModel(model, words, "x"), whole.modules, about, notes={"train.json": about}
        )
        assert json.loads((tmp_path / "a" / "train.json").read_text()) == about
        check_same(peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval(), model.float(), 1e-5)
        load_peft(ours, tmp_path / "a")
        check_same(ours, model.float(), 1e-5)
        assert read_peft(tmp_path / "a").config.whole == ("lm_head", "model.norm")

    def test_the_files_are_those_that_peft_writes(self, llama, tmp_path):
        model = copy.deepcopy(llama).float()
        whole, _ = trained(model)
        save_peft(model, tmp_path / "a", modules_to_save=whole.modules)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(llama).float(), tmp_path / "a")
        theirs.save_pretrained(tmp_path / "b")
        one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
        assert one.keys() == two.keys() and all(torch.equal(t, two[key]) for key, t in one.items())
        assert {"base_model.model.lm_head.weight", "base_model.model.model.norm.weight"} <= one.keys()
        fields = [json.loads((tmp_path / x / "adapter_config.json").read_text())["modules_to_save"] for x in "ab"]
        assert set(fields[0]) == set(fields[1]) == {"lm_head", "model.norm"}

    @pytest.mark.parametrize("tie", [True, pytest.param(False, marks=pytest.mark.full)])
    def test_what_peft_trains_and_saves_whole_we_read(self, base, tie, tmp_path):
        model = base(tie).float()
        ours = copy.deepcopy(model)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
        theirs = peft.get_peft_model(model, config)
        torch.manual_seed(0)
        step = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            theirs(input_ids=IDS, labels=IDS).loss.backward()
            step.step()
        theirs.eval().save_pretrained(tmp_path / "a")
        before = said(ours)
        load_peft(ours, tmp_path / "a")
        check_same(ours, theirs, 1e-6)
        assert (said(ours) - before).abs().max() > 1e-2

    @pytest.mark.parametrize("tie", [True, pytest.param(False, marks=pytest.mark.full)])
    def test_merge_has_the_same_logits_and_says_what_is_untied(self, base, words, tie, tmp_path):
        model = base(tie)
        model.save_pretrained(tmp_path / "base")
        words.save_pretrained(tmp_path / "base")
        whole, _ = trained(model, "dora")
        loaded = LoadedModel(model, words, str(tmp_path / "base"))
        save_whole(tmp_path / "a", loaded, whole.modules, {"method": "dora"})
        done = merge_folder(str(tmp_path / "base"), read_adapter(tmp_path / "a"), tmp_path / "out")
        assert done.streamed and done.untied == (("lm_head.weight",) if tie else ())
        opened = folders.open_model(tmp_path / "out", dtype=torch.float64).model
        check_same(opened, model, 1e-12)
        assert opened.config.tie_word_embeddings is False
        # A stock transformers takes it for what it is.
        check_same(LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64), model, 1e-12)


def test_the_folder_opens_by_its_name(llama, words, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    whole, _ = trained(llama)
    loaded = LoadedModel(llama, words, str(tmp_path / "base"))
    save_whole(tmp_path / "a", loaded, whole.modules, {"method": "lora"})
    opened = jobs.opened(str(tmp_path / "a"), dtype="float64", device="cpu")
    check_same(opened.model, llama)
    assert opened.source == str(tmp_path / "a")
    folded = jobs.opened(str(tmp_path / "a"), dtype="float64", device="cpu", merged=True).model
    assert not any(isinstance(m, Adapted) for m in folded.modules())
    check_same(folded, llama)


def test_a_base_of_few_bits_is_remembered_beside_modules(llama, words, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    few = jobs.narrow_base(llama, 4, "float64")
    whole, _ = trained(llama)
    jobs.require_narrow(llama, "lora")
    loaded = LoadedModel(llama, words, str(tmp_path / "base"))
    save_whole(tmp_path / "a", loaded, whole.modules, {"method": "lora", "quantized": few})
    assert io.read_about(tmp_path / "a")["quantized"] == {"bits": 4, "block": 64, "dtype": "float64"}
    saved = read_adapter(tmp_path / "a")
    opened, _ = opened_with(str(tmp_path / "base"), saved)
    check_same(opened.model, llama)
    assert any(map(quantizer.narrowed, opened.model.modules()))
    check_same(jobs.opened(str(tmp_path / "a"), dtype="float64", device="cpu").model, llama)
    done = merge_folder(str(tmp_path / "base"), saved, tmp_path / "out")
    merged = folders.open_model(tmp_path / "out", dtype=torch.float64)
    assert not done.streamed and not any(map(quantizer.narrowed, merged.model.modules()))
    check_same(merged.model, llama)
    assert_close(logits(merged.model, IDS), said(llama).float(), rtol=0, atol=1e-4)


# ---- refusals


@pytest.mark.parametrize(
    ("also", "match"),
    [
        ("nothing", r"'nothing' matches no module that can train whole; there are: model.embed_tokens"),
        ("model.layers.0.self_attn.q_proj", "q_proj carries an adapter and cannot train whole too; leave it out"),
        ("*", "carries an adapter"),
        ("lm_head|model.norn", r"'model.norn' matches no module that can train whole; there are: model.embed"),
        ("", "an empty pattern selects nothing"),
    ],
)
def test_a_pattern_that_cannot_be_followed(llama, also, match):
    learning(llama, "lora", steps=STEPS, rank=2)
    before = dict(llama.named_modules())
    with pytest.raises(ValueError, match=match):
        train_whole(llama, also)
    assert dict(llama.named_modules()) == before


def test_a_name_that_ends_others_would_save_those_too(llama):
    body = llama.model
    learning(body, "lora", steps=STEPS, rank=2, select="*.q_proj")
    with pytest.raises(
        ValueError, match=r"PEFT finds norm by the end of its name, and would save .*layernorm whole"
    ):
        train_whole(body, "norm")
    assert len(train_whole(body, "norm|*layernorm").modules) == 5


def test_an_adapter_that_peft_has_not_trains_alone(llama):
    learning(llama, "lora_xs", steps=STEPS, rank=2)
    with pytest.raises(ValueError, match="is no LoRA"):
        train_whole(llama, "lm_head")
    with pytest.raises(ValueError, match="is no LoRA"):
        require_peft(layers_of(llama))
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


def test_a_start_that_changes_the_base_is_refused_on_few_bits(llama):
    jobs.narrow_base(llama, 8, "float64")
    learning(llama, "pissa", steps=STEPS, rank=2)
    with pytest.raises(ValueError, match=r"pissa changes the base when it starts .*without --base-bits"):
        jobs.require_narrow(llama, "pissa")


def test_what_is_whole_is_a_value():
    assert keep.Whole(("a",), [], {}) == keep.Whole(("a",), [], {})
