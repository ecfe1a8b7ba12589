"""Rows of single tokens beside an adapter: only these move, PEFT and we read the same folders, ties hold."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from subspan.adapt import Adapted, Add
from subspan.adapt.layer import Slot
from subspan.adapt.tokens import carries_rows, rows_of, shared_rows, token_rows
from subspan.edit import edit
from subspan.hosts import folders, jobs, lessons, samples, text
from subspan.hosts.keep import Keeping, save_whole, train_tokens, train_whole
from subspan.hosts.lessons import fit, learning
from subspan.hosts.peft import layers_of, load_peft, read_peft, save_peft
from subspan.hosts.peft_change import as_lora, compare
from subspan.hosts.peft_config import PeftConfig, parse_tokens
from subspan.hosts.peft_merge import effect, merge_folder
from subspan.hosts.peft_read import fill_peft, read_adapter
from subspan.hosts.peft_tokens import TokenRows, refuse_ends, split_tokens, written_tokens
from subspan.hosts.transformers import LoadedModel, has_tokenizer
from subspan.hosts.vocabulary import Ends, NewTokens, add_tokens, ends, grow, rows_in
from subspan.ops import LowRank
from subspan.optim import Adam, Optim

NEW = ["<think>", "</think>"]
IDS = torch.cat([torch.arange(20), torch.tensor([300, 301, 5, 301])])[None].repeat(2, 1) * 1
STEPS = 6
MORE = [
    (True, [3, 299], True),
    (False, [3, 299], False),
    (True, {"embed_tokens": [3, 299], "lm_head": [3, 299]}, False),
    (False, {"embed_tokens": [3, 299], "lm_head": [4]}, False),
    (True, {"embed_tokens": [3, 299], "lm_head": [4]}, False),
    (True, {"lm_head": [4, 3]}, True),
]


def rows(ids=(300, 301)):
    """Tokens in which the given ids occur."""
    torch.manual_seed(4)
    return torch.cat([torch.arange(500) * 37 % 300, torch.tensor(ids).repeat(150)])[torch.randperm(800)]


def begun(loaded, method="lora", new=NEW, **given):
    """A model with new tokens, what learns, and the new tokens."""
    loaded, added = add_tokens(loaded, new)
    torch.manual_seed(3)
    learns = learning(loaded.model, method, steps=STEPS, rank=3, **given)
    more = train_tokens(loaded.model, added.ids, added.start)
    return loaded, lessons.Learning(**{**vars(learns), "named": [*learns.named, *more]}), added


def trained(loaded, method="lora", *, keeping=None, new=NEW, **given):
    loaded, learns, added = begun(loaded, method, new, **given)
    data = lessons.split(rows(added.ids), 12)
    history = fit(loaded.model, learns, data, steps=STEPS, every=2, keeping=keeping, lr=1e-2, batch=4, seed=3)
    return loaded, added, history


@torch.no_grad()
def said(model, ids=IDS):
    return model(input_ids=ids).logits


def check_same(one, two, tolerance=1e-12, ids=IDS):
    wanted = said(two, ids)
    assert_close(said(one, ids), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def tables(model):
    """The matrices of embeddings and head, with the adapters in them."""
    return [layers_of(model)[name].weight for name in ends(model).sources]


# ---- the op


def test_rows_are_a_sparse_sum_for_a_table_and_for_a_head():
    torch.manual_seed(0)
    head, table = nn.Linear(4, 9, bias=False).double(), nn.Embedding(9, 4).double()
    change, index = torch.randn(2, 4, dtype=torch.float64), torch.tensor([7, 2])
    net = nn.ModuleDict({"table": table, "head": head})
    old = {name: m.weight.clone() for name, m in net.items()}
    edit(net, ["table", "head"], shared_rows({"table": "table", "head": "table"}, lambda *_: (index, change)))
    for name, module in net.items():
        wanted = old[name].index_add(0, index, change)
        assert torch.equal(module.weight, wanted)
        assert carries_rows(module) and not carries_rows(module, "other") and not carries_rows(head)
        found = rows_of(module.slot("default"))
        assert torch.equal(found[0], index) and torch.equal(found[1], change)
    assert net["table"].slot("default").op is net["head"].slot("default").op
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_close(net["head"](x), x @ net["head"].weight.mT, rtol=0, atol=1e-14)
    assert_close(net["table"](index), old["table"][index] + change, rtol=0, atol=1e-14)
    assert rows_of(Slot(LowRank(torch.ones(9, 1), torch.ones(1, 4)), Add())) is None
    assert rows_of(Slot(token_rows(index, change, 9), Add(2.0))) is None


# ---- the vocabulary


class TestAdd:
    def test_the_tokenizer_finds_them_and_the_old_one_is_as_it_was(self, llama, words):
        before = words.get_vocab()
        loaded, new = add_tokens(LoadedModel(llama, words, "x"), NEW)
        assert words.get_vocab() == before
        found = text.encode(loaded.tokenizer, "a<think>b</think>").tolist()
        assert found == [*text.encode(words, "a"), 300, *text.encode(words, "b"), 301]
        assert loaded.tokenizer.decode(found, skip_special_tokens=True) == "ab"
        assert new == NewTokens(
            tuple(NEW), (300, 301), tuple(tuple(text.encode(words, t).tolist()) for t in NEW), 2
        )

    @pytest.mark.parametrize("tie", [True, False])
    def test_the_vocabulary_grows_by_zeros_and_keeps_its_tie(self, base, words, tie):
        model = base(tie)
        old = {name: t.clone() for name, t in model.state_dict().items()}
        state = torch.get_rng_state()
        _, new = add_tokens(LoadedModel(model, words, "x"), NEW)
        assert torch.equal(torch.get_rng_state(), state) and not model.training
        assert (new.grown, rows_in(model), model.config.vocab_size) == (2, 302, 302)
        assert ends(model) == Ends("model.embed_tokens", "lm_head", tie)
        for name, t in model.state_dict().items():
            assert torch.equal(t[:300], old[name][:300])
            assert t.shape == old[name].shape or not t[300:].any()

    def test_a_vocabulary_with_rows_to_spare_does_not_grow(self, llama):
        few = PreTrainedTokenizerFast(tokenizer_object=text.train_tokenizer(text.prose()[:20_000], 290))
        model, weight = llama, llama.lm_head.weight.clone()
        _, new = add_tokens(LoadedModel(model, few, "x"), NEW)
        assert (new.ids, new.grown, model.config.vocab_size) == ((290, 291), 0, 300)
        assert torch.equal(model.lm_head.weight, weight)
        assert (grow(model, 299), rows_in(model)) == (0, 300)

    @pytest.mark.parametrize(
        ("new", "match"),
        [
            ([], "no new token was named"),
            (["<a>", " "], r"new token 2 of \['<a>', ' '\] is empty"),
            (["<a>", "<a>"], "'<a>' is listed twice"),
            (["e"], r"'e' is already a token \(its id is \d+\)"),
        ],
    )
    def test_tokens_that_are_refused(self, llama, words, new, match):
        with pytest.raises(ValueError, match=match):
            add_tokens(LoadedModel(llama, words, "x"), new)
        assert rows_in(llama) == 300

    def test_tables_that_cannot_grow(self, llama, base, words):
        adapted = copy.deepcopy(llama)
        edit(adapted, ["lm_head"], shared_rows({"lm_head": "lm_head"}, lambda _, w: (torch.tensor([1]), w[:1])))
        with pytest.raises(ValueError, match=r"has 300 rows and needs 302, but lm_head carries an adapter"):
            grow(adapted, 302)
        other = base(False)
        other.lm_head = nn.Linear(24, 304, bias=False)
        with pytest.raises(ValueError, match="lm_head has 304 rows; only plain"):
            grow(other, 302)
        with pytest.raises(ValueError, match="Sequential does not say where its tokens are read in"):
            ends(nn.Sequential(nn.Linear(2, 2)))


# ---- training


@pytest.mark.parametrize("tie", [True, False])
def test_a_row_starts_as_the_mean_of_its_pieces(base, words, tie):
    model = base(tie)
    loaded, _, new = begun(LoadedModel(model, words, "x"))
    for table in tables(loaded.model):
        for i, pieces in new.start.items():
            assert len(pieces) > 1
            assert_close(table[i], table[list(pieces)].mean(0), rtol=0, atol=1e-15)


def test_no_new_token_starts_likelier_than_its_pieces_are_on_average(llama, words):
    """exp of a mean is at most the mean of exp (Jensen), so no distribution of old tokens moves far."""
    before = said(llama, IDS[:, :20]).exp()
    loaded, _, new = begun(LoadedModel(llama, words, "x"))
    after = said(loaded.model, IDS[:, :20]).exp()
    assert_close(after[..., :300], before, rtol=1e-12, atol=0)
    for i, pieces in new.start.items():
        assert bool((after[..., i] <= after[..., list(pieces)].mean(-1) * (1 + 1e-12)).all())


@pytest.mark.parametrize("tie", [True, False])
def test_with_weight_decay_only_the_rows_named_move(base, words, tie):
    model = base(tie)
    loaded, learns, new = begun(LoadedModel(model, words, "x"))
    old = {name: t.clone() for name, t in model.state_dict().items() if ".adapters." not in name}
    start = [table.detach().clone() for table in tables(model)]
    optimizer = Optim(learns.named, Adam(), lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert len([name for name, _ in learns.named if name.endswith(".rows")]) == (1 if tie else 2)
    for name, t in model.state_dict().items():
        assert ".adapters." in name or torch.equal(t, old[name])
    for table, before in zip(tables(model), start, strict=True):
        moved = (table != before).any(1).nonzero().flatten()
        assert moved.tolist() == list(new.ids)
    assert torch.equal(*tables(model)) == tie
    assert loaded.model is model


def test_known_tokens_train_from_where_they_are(llama):
    learning(llama, "lora", steps=STEPS, rank=2)
    before, old = said(llama, IDS[:, :20]), llama.lm_head.weight.clone()
    named = train_tokens(llama, [7, 3])
    assert torch.equal(said(llama, IDS[:, :20]), before) and not named[0][1].any()
    with torch.no_grad():
        named[0][1][:, 0] = 1.0
    assert_close(llama.lm_head.weight[7], old[7] + 1.0, rtol=0, atol=1e-15)


@pytest.mark.parametrize("stop", [3, pytest.param(STEPS, marks=pytest.mark.full)])
def test_a_run_killed_and_resumed_is_the_run_that_was_not(llama, words, tmp_path, dies_at, stop):
    whole, killed, resumed = (LoadedModel(copy.deepcopy(llama), words, "x") for _ in range(3))
    history = trained(whole, keeping=Keeping())[2]
    with dies_at(stop):
        trained(killed, keeping=Keeping(folder=tmp_path, every=1))
    again = trained(resumed, keeping=Keeping(folder=tmp_path, resume=True))[2]
    have, want = resumed.model.state_dict(), whole.model.state_dict()
    assert have.keys() == want.keys() and all(torch.equal(t, want[name]) for name, t in have.items())
    assert (again.train, again.validation, again.best) == (history.train, history.validation, history.best)


# ---- folders


@pytest.fixture
def place(base, words, tmp_path):
    """place(tie): a model of a folder, and the folder."""

    def made(tie):
        model = base(tie)
        model.save_pretrained(tmp_path / "base")
        words.save_pretrained(tmp_path / "base")
        return LoadedModel(model, words, str(tmp_path / "base"))

    return made


def saved(place, tie, out, method="lora", **given):
    """A model that trained, and its new tokens; the adapter lies in `out`."""
    loaded, new, _ = trained(place(tie), method, **given)
    save_whole(out, loaded, (), {"method": method})
    return loaded, new


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestPeft:
    @pytest.mark.parametrize(
        ("method", "tie"),
        [("lora", True), ("dora", False), *(pytest.param(m, t, marks=pytest.mark.full)
         for m, t in [("lora", False), ("pissa", True), ("adalora", True)])],
    )  # fmt: skip
    def test_what_we_save_peft_and_we_read_with_the_same_logits(self, place, method, tie, tmp_path):
        loaded, _ = saved(place, tie, tmp_path / "a", method)
        model = loaded.model.float()
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        theirs.resize_token_embeddings(len(loaded.tokenizer), mean_resizing=False)
        check_same(peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval(), model, 1e-5)
        ours = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        load_peft(ours, tmp_path / "a")
        check_same(ours, model, 1e-5)
        assert torch.equal(*tables(ours)) == tie
        said_of = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["trainable_token_indices"]
        assert said_of == ([300, 301] if tie else {"model.embed_tokens": [300, 301], "lm_head": [300, 301]})
        assert has_tokenizer(tmp_path / "a") and not has_tokenizer(tmp_path / "none")

    def test_the_tensors_are_those_that_peft_writes(self, place, tmp_path):
        saved(place, True, tmp_path / "a")
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        theirs.resize_token_embeddings(302, mean_resizing=False)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a")
        theirs.save_pretrained(tmp_path / "b", save_embedding_layers=False)
        one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
        assert one.keys() == two.keys() and all(torch.equal(t, two[key]) for key, t in one.items())
        assert "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta" in one

    @pytest.mark.parametrize(
        ("tie", "asked", "grown"),
        [
            (True, [3, 299], False),
            (False, [3, 299], True),
            (True, {"embed_tokens": [3, 299], "lm_head": [3, 299]}, True),
            (False, {"embed_tokens": [3, 299], "lm_head": [4]}, True),
            (True, {"embed_tokens": [3, 299], "lm_head": [4]}, True),
            (True, {"lm_head": [4, 3]}, False),
            *(pytest.param(*row, marks=pytest.mark.full) for row in MORE),
        ],
    )
    def test_what_peft_trains_and_saves_we_read_and_merge(self, place, tie, asked, grown, tmp_path):
        loaded = place(tie)
        model = copy.deepcopy(loaded.model).float()
        vocabulary = 303 if grown else 300
        if grown:
            asked = json.loads(json.dumps(asked).replace("299", "301"))
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=asked)
        theirs = peft.get_peft_model(model, config)
        theirs.peft_config["default"].base_model_name_or_path = loaded.source
        torch.manual_seed(0)
        step = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            theirs(input_ids=IDS[:, :20], labels=IDS[:, :20]).loss.backward()
            step.step()
        theirs.eval().save_pretrained(tmp_path / "a")
        ids = IDS.clamp(max=vocabulary - 1)
        wanted = said(theirs, ids)
        ours = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        load_peft(ours, tmp_path / "a")
        assert rows_in(ours) == vocabulary
        assert_close(said(ours, ids), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        done = merge_folder(loaded.source, read_adapter(tmp_path / "a"), tmp_path / "out")
        apart = tie and isinstance(asked, dict) and asked.get("embed_tokens") != asked["lm_head"]
        assert done.streamed and done.untied == (("lm_head.weight",) if apart else ())
        merged = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert_close(said(merged, ids), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        assert merged.config.tie_word_embeddings == (tie and not apart)


class TestMerge:
    @pytest.mark.parametrize("tie", [True, False])
    def test_the_merged_folder_has_the_rows_the_tie_the_tokenizer_and_all_else_bit_for_bit(
        self, place, tie, tmp_path
    ):
        loaded, new = saved(place, tie, tmp_path / "a", select="*.q_proj")
        before = load_file(tmp_path / "base" / "model.safetensors")
        done = merge_folder(loaded.source, read_adapter(tmp_path / "a"), tmp_path / "out")
        assert done.streamed and done.untied == ()
        opened = folders.open_model(tmp_path / "out", dtype=torch.float64)
        check_same(opened.model, loaded.model, 1e-12)
        assert torch.equal(*tables(opened.model)) == tie
        assert opened.model.config.vocab_size == 302
        after = load_file(tmp_path / "out" / "model.safetensors")
        assert after.keys() == before.keys()
        for key, t in after.items():
            assert "q_proj" in key or torch.equal(t[:300], before[key][:300])
        assert text.encode(opened.tokenizer, "<think>").tolist() == [new.ids[0]]

    @pytest.mark.parametrize("tie", [True, False])
    def test_folding_in_memory_keeps_the_tie(self, place, tie, tmp_path):
        loaded, _ = saved(place, tie, tmp_path / "a")
        folded = jobs.opened(str(tmp_path / "a"), dtype="float64", device="cpu", merged=True)
        assert not any(isinstance(m, Adapted) for m in folded.model.modules())
        check_same(folded.model, loaded.model)
        assert (folded.model.lm_head.weight is folded.model.model.embed_tokens.weight) == tie
        assert text.encode(folded.tokenizer, "<think>").tolist() == [300]
        folders.save_model(tmp_path / "b", folded)
        check_same(folders.open_model(tmp_path / "b", dtype=torch.float64).model, loaded.model)

    def test_on_a_base_of_few_bits(self, llama, words, tmp_path):
        llama.save_pretrained(tmp_path / "base")
        words.save_pretrained(tmp_path / "base")
        loaded, added = add_tokens(LoadedModel(llama, words, str(tmp_path / "base")), NEW)
        few = jobs.narrow_base(llama, 4, "float64")
        learning(llama, "lora", steps=STEPS, rank=2)
        train_tokens(llama, added.ids, added.start)
        save_whole(tmp_path / "a", loaded, (), {"method": "lora", "quantized": few})
        done = merge_folder(loaded.source, read_adapter(tmp_path / "a"), tmp_path / "out")
        opened = folders.open_model(tmp_path / "out", dtype=torch.float64)
        assert not done.streamed and done.untied == ()
        check_same(opened.model, llama, 1e-12)
        assert opened.model.lm_head.weight is opened.model.model.embed_tokens.weight
        assert text.encode(opened.tokenizer, "<think>").tolist() == [300]


def small(kind, **sizes):
    """A tiny random model of an architecture, with 300 tokens."""
    given = {"vocab_size": 300, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **sizes}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).float().eval()


SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gpt2", {"n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 64}),  # Conv1D, and a tie
        pytest.param("gpt_neox", {**SIZES, "max_position_embeddings": 64}, marks=pytest.mark.full),
        pytest.param("falcon", {k: n for k, n in SIZES.items() if k[0] != "i"}, marks=pytest.mark.full),
    ],
)
def test_other_architectures_as_peft_has_them_and_merged(kind, sizes, words, tmp_path):
    model = small(kind, **sizes)
    model.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    loaded, learns, _ = begun(LoadedModel(model, words, str(tmp_path / "base")))
    for _, p in learns.named:
        nn.init.normal_(p, std=0.3)
    save_whole(tmp_path / "a", loaded, (), {"method": "lora"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs.resize_token_embeddings(302, mean_resizing=False)
    check_same(peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval(), model, 1e-5)
    merge_folder(loaded.source, read_adapter(tmp_path / "a"), tmp_path / "out")
    check_same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model, 1e-5)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("phi", "lm_head has a bias, and PEFT leaves that out"),
        ("gemma", "embed_tokens, an GemmaText.* of its own"),
    ],
)
def test_models_whose_rows_peft_would_not_compute_alike(kind, match):
    model = small(kind, **SIZES, num_key_value_heads=4, head_dim=8)
    learning(model, "lora", steps=STEPS, rank=2)
    with pytest.raises(ValueError, match=match):
        train_tokens(model, [3])


@pytest.mark.full
@pytest.mark.smollm2
def test_smollm2_learns_two_tokens_and_all_old_rows_stay(smollm2, tmp_path):
    """From what the pieces say to less than a third of that loss, in ten steps; merged, and as PEFT has it."""
    model = copy.deepcopy(smollm2.model)
    loaded, new = add_tokens(LoadedModel(model, smollm2.tokenizer, "smollm2"), NEW)
    file = tmp_path / "data.jsonl"
    found = [{"prompt": f"{i}+{i}?", "completion": f"<think>{i}, {i}</think>{2 * i}"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    torch.manual_seed(0)
    learns = learning(model, "lora", steps=10, rank=4)
    more = train_tokens(model, new.ids, new.start)
    learns = lessons.Learning(**{**vars(learns), "named": [*learns.named, *more]})
    data = samples.split(samples.read([file], loaded.tokenizer, 64).samples)
    history = fit(model, learns, data, steps=10, batch=2, lr=1e-3, seed=0)
    assert history.final < history.validation[0][1] / 3
    save_whole(tmp_path / "a", loaded, (), {"method": "lora"})
    done = merge_folder("smollm2", read_adapter(tmp_path / "a"), tmp_path / "out")
    assert done.difference < 1e-5 and done.untied == ()
    merged = folders.open_model(tmp_path / "out")
    old = smollm2.model.lm_head.weight
    assert torch.equal(merged.model.lm_head.weight[: len(old)], old)
    assert merged.model.lm_head.weight is merged.model.model.embed_tokens.weight
    theirs = copy.deepcopy(smollm2.model)
    theirs.resize_token_embeddings(len(loaded.tokenizer), mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    ids = text.encode(merged.tokenizer, "1+1?<think>1, 1</think>2")[None]
    assert set(new.ids) < set(ids.flatten().tolist())
    for other in (theirs, merged.model):
        assert_close(said(other, ids), said(model, ids), rtol=0, atol=1e-5 * float(said(model, ids).abs().max()))


def test_adapters_of_other_tokens_stand_side_by_side(place, tmp_path):
    """Two folders, with rows of their own each: the sum of both changes, forward and as weights."""
    loaded = place(True)
    model = copy.deepcopy(loaded.model)
    alone = {}
    for name, ids in (("a", [3, 5]), ("b", [7])):
        one = copy.deepcopy(loaded.model)
        torch.manual_seed(len(ids))
        learning(one, "lora", steps=STEPS, rank=2, select="*.q_proj")
        for _, p in train_tokens(one, ids):
            nn.init.normal_(p)
        save_peft(one, tmp_path / name)
        alone[name] = one.lm_head.weight
        load_peft(model, tmp_path / name, name=name)
    wanted = alone["a"] + alone["b"] - loaded.model.lm_head.weight
    assert_close(model.lm_head.weight, wanted, rtol=0, atol=1e-14)
    folded = copy.deepcopy(model)
    jobs.fold(folded)
    check_same(folded, model, ids=IDS[:, :20])
    assert folded.lm_head.weight is folded.model.embed_tokens.weight


def test_check_diff_and_convert_know_the_rows(place, tmp_path):
    loaded, _ = saved(place, True, tmp_path / "a")
    one = read_adapter(tmp_path / "a")
    assert one.kinds()["trainable_tokens_delta"] == (1, 2 * 24)
    assert effect(loaded.source, one).largest > 1e-3
    with torch.no_grad():
        loaded.model.lm_head.slot("default").op.op.values[0, 1] += 2.0
    save_peft(loaded.model, tmp_path / "b")
    two = read_adapter(tmp_path / "b")
    found = compare(one, two, lambda _: None)
    assert {site for site, row in found.items() if row.apart} == {"model.embed_tokens (rows of tokens)"}
    assert found["model.embed_tokens (rows of tokens)"].apart == pytest.approx(2.0, rel=1e-12)
    with pytest.raises(ValueError, match="has rows of single tokens, which no LoRA holds"):
        as_lora(one, lambda _: None, 2)
    assert one.args == {}
    with pytest.raises(ValueError, match="rows of single tokens, which are not filled in"):
        fill_peft(loaded.model, tmp_path / "a")
    with pytest.raises(ValueError, match="rows of single tokens that train, which only a folder of PEFT holds"):
        folders.save_adapter(tmp_path / "c", loaded.model, method="lora", args={}, source="x")


# ---- refusals


def changed(folder, **fields):
    """The folder's config with other fields."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"trainable_token_indices": None}, r"None, and there are trained token rows for .*embed_tokens"),
        ({"trainable_token_indices": [300]}, r"the rows of 1 tokens are \(2, 24\)"),
        ({"trainable_token_indices": [1, 1]}, "must list ids of tokens, each once"),
        ({"trainable_token_indices": {"lm_head": [1, 2]}}, "there are trained token rows for"),
        ({"trainable_token_indices": [-1, 2]}, "must list ids of tokens"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}}, r"disagree about lm_head"),
        ({"trainable_token_indices": {"embed_tokens": [1, 2], "head2": [3]}}, r"rows of tokens for head2"),
    ],
)  # fmt: skip
def test_a_folder_that_contradicts_itself(place, fields, match, tmp_path):
    loaded, _ = saved(place, True, tmp_path / "a")
    model = copy.deepcopy(folders.open_model(loaded.source).model)
    with pytest.raises(ValueError, match=match):
        load_peft(model, changed(tmp_path / "a", **fields))
    assert not any(isinstance(m, Adapted) for m in model.modules()) and rows_in(model) == 300


def test_a_name_that_is_taken_leaves_the_vocabulary_as_it_was(place, tmp_path):
    loaded, _ = saved(place, True, tmp_path / "a", select="*.q_proj")
    model = folders.open_model(loaded.source).model
    learning(model, "lora", steps=STEPS, rank=2, select="*.q_proj")
    with pytest.raises(ValueError, match="'default' is already there"):
        load_peft(model, tmp_path / "a")
    assert rows_in(model) == 300
    done = load_peft(model, changed(tmp_path / "a", ensure_weight_tying=True), name="other")
    assert rows_in(model) == 302 and torch.equal(*tables(model))
    done.undo()
    assert not model.lm_head.weight[300:].any() and ends(model).tied


def test_rows_of_another_model(place, tmp_path):
    saved(place, True, tmp_path / "a")
    there = read_peft(tmp_path / "a").tokens
    assert (there.size, there.ids("model.embed_tokens")) == (302, (300, 301))
    other = nn.Module()
    other.get_input_embeddings = lambda: other.wte
    other.wte = nn.Embedding(400, 24)
    with pytest.raises(ValueError, match=r"rows of tokens for model.embed_tokens, and those of Module are in wte"):
        there.fits(other)
    narrow = nn.Module()
    narrow.get_input_embeddings = lambda: narrow.model.embed_tokens
    narrow.model = nn.ModuleDict({"embed_tokens": nn.Embedding(400, 23)})
    with pytest.raises(ValueError, match=r"rows of 24 numbers for model.embed_tokens, which has 23"):
        there.fits(narrow)
    assert TokenRows().fits(other) == {}


def test_what_peft_would_not_compute_alike_is_refused(llama):
    with pytest.raises(ValueError, match="has a bias"):
        refuse_ends({"head": nn.Linear(2, 2)})
    learning(llama, "lora", steps=STEPS, rank=2)
    put = shared_rows({"model.embed_tokens": "x"}, lambda _, w: (torch.tensor([1]), w[:1]))
    edit(llama, ["model.embed_tokens"], put)
    with pytest.raises(ValueError, match="PEFT ties rows of tokens as the model ties"):
        save_peft(llama, "never")
    assert written_tokens(llama, {}, "LORA", "default").fields == {}
    found = {"model.embed_tokens": llama.model.embed_tokens}
    with pytest.raises(ValueError, match="PEFT's LoHa has no rows of tokens"):
        written_tokens(llama, found, "LOHA", "default")


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([], "each once"),
        ([3, 3], r"ids \[3, 3\] must be of the 300 tokens of the vocabulary, each once"),
        ([300], "of the 300 tokens"),
        ([-1], "of the 300 tokens"),
    ],
)
def test_ids_that_are_no_tokens(llama, ids, match):
    learning(llama, "lora", steps=STEPS, rank=2)
    with pytest.raises(ValueError, match=match):
        train_tokens(llama, ids)


def test_rows_stand_alone_and_beside_what_peft_has(llama):
    other = copy.deepcopy(llama)
    learning(llama, "lora", steps=STEPS, rank=2)
    train_tokens(llama, [3])
    with pytest.raises(ValueError, match=r"model.embed_tokens carries an adapter, and rows of tokens stand alone"):
        train_tokens(llama, [4])
    with pytest.raises(ValueError, match="lm_head carries an adapter and cannot train whole too"):
        train_whole(llama, "lm_head")
    assert train_whole(llama, "model.norm").modules == ("model.norm",)
    learning(other, "lora_xs", steps=STEPS, rank=2)
    with pytest.raises(ValueError, match="is no LoRA"):
        train_tokens(other, [3])


def test_fields_and_tensors_are_sorted():
    assert parse_tokens({"a": [1], "b": [2, 0]}) == {"a": (1,), "b": (2, 0)}
    t = torch.ones(1, 2)
    key = "base.a.token_adapter"
    tensors = {f"{key}.trainable_tokens_delta": t, f"{key}.base_layer.weight": t, "base.head.weight": t, "x": t}
    found, rest = split_tokens(tensors, PeftConfig(rank=1, alpha=1.0, targets=None, tokens={"a": (1,)}))
    moved = found.at("folder", prefix="base.", root="r.")
    assert (list(moved.values), list(moved.tables), list(rest)) == (["r.a"], ["r.a", "r.head"], ["x"])
    assert list(moved.tensors) == ["r.a.token_adapter.trainable_tokens_delta"]
