"""Adapters of PEFT other than LoRA: the same tensors under the same keys both ways, and the same logits."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.adapt import Adapted, Adapter, Add, adapt, trainable
from subspan.cli import adapter as cli
from subspan.edit import edit
from subspan.hosts import folders
from subspan.hosts.peft import load_peft, read_peft, save_peft, type_of, written_as
from subspan.hosts.peft_change import as_lora, compare, write_lora
from subspan.hosts.peft_kohya import load_kohya, save_kohya
from subspan.hosts.peft_merge import effect, merge_folder
from subspan.hosts.peft_parts import (
    BlockSeries,
    lokr_shapes,
    oft_block,
    paired,
    split,
)
from subspan.hosts.peft_read import change, read_adapter, thin
from subspan.hosts.peft_types import TYPES, layout_of
from subspan.methods import build
from subspan.ops import Dense, Diag, Entries, Hadamard, Kron, LowRank, Product

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
IDS = torch.arange(2 * 12).reshape(2, 12) * 37 % 300
SITES = ["q_proj", "down_proj"]
SITE = "model.layers.0.self_attn.q_proj"
BOOL = [True, False, True, True, False]
KEPT = {f"model.layers.0.{name}.lora_E": BOOL for name in ("self_attn.q_proj", "mlp.down_proj")}
KEPT["model.layers.1.mlp.down_proj.lora_E"] = [False] * 5
THEIRS = {
    "loha": (peft.LoHaConfig, {"r": 3, "alpha": 6}),
    "loha patterns": (peft.LoHaConfig, {"r": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}}),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 8}),
    "lokr dense": (peft.LoKrConfig, {"r": 8, "alpha": 8}),
    "lokr both": (peft.LoKrConfig, {"r": 1, "alpha": 2, "decompose_both": True}),
    "lokr factor": (peft.LoKrConfig, {"r": 2, "alpha": 2, "decompose_factor": 8}),
    "vera": (peft.VeraConfig, {"r": 7}),
    "vera of all": (peft.VeraConfig, {"r": 5, "target_modules": "all-linear"}),
    "oft": (peft.OFTConfig, {"oft_block_size": 6}),
    "oft exact": (peft.OFTConfig, {"oft_block_size": 6, "use_cayley_neumann": False}),
    "oft count": (peft.OFTConfig, {"oft_block_size": 0, "r": 3, "num_cayley_neumann_terms": 3}),
    "oft odd block": (peft.OFTConfig, {"oft_block_size": 7}),
    "shira": (peft.ShiraConfig, {"r": 2}),
    "randlora": (peft.RandLoraConfig, {"r": 5, "randlora_alpha": 50}),
    "randlora of all": (peft.RandLoraConfig, {"r": 5, "randlora_alpha": 5, "target_modules": "all-linear"}),
    "randlora sparse": (peft.RandLoraConfig, {"r": 4, "randlora_alpha": 40, "sparse": True}),
    "adalora": (peft.AdaLoraConfig, {"init_r": 4, "total_step": 10, "lora_alpha": 16}),
    "adalora ranks": (peft.AdaLoraConfig, {"init_r": 5, "total_step": 9, "lora_alpha": 16, "rank_pattern": KEPT}),
    "eva": (peft.LoraConfig, {"r": 4, "init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=2.0)}),
    "whole": (peft.LoHaConfig, {"r": 3, "modules_to_save": ["lm_head"]}),
}
OURS = {
    "loha": {"rank": 3, "alpha": 6.0},
    "lokr": {"rank": 2, "alpha": 8.0},
    "vera": {"rank": 7},
    "oft": {"block": 6},
    "shira": {"rank": 2},
    "randlora": {"rank": 5, "alpha": 50.0},
}


def llama(*, dtype=torch.float32, layers=2):
    small = {
        "vocab_size": 300, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**small)).to(dtype).eval()


@torch.no_grad()
def said(model):
    return model(input_ids=IDS).logits


@torch.no_grad()
def stir(tensors):
    draw = torch.Generator().manual_seed(1)
    for p in tensors:
        p.add_(0.2 * torch.randn(p.shape, generator=draw))


def theirs(kind, out):
    """A model with a moved adapter of peft, saved by peft."""
    config, args = THEIRS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = peft.get_peft_model(llama(), config(**{"target_modules": SITES} | args)).eval()
    if kind == "eva":
        peft.initialize_lora_eva_weights(model, dataloader=[{"input_ids": IDS}] * 9, show_progress_bar=False)
    stir(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(out)
    # AdaLoRA cuts its ranks only when it saves.
    return peft.PeftModel.from_pretrained(llama(), out).eval() if kind == "adalora ranks" else model


def ours(method, *, select="*.q_proj|*.down_proj", dtype=torch.float32, **args):
    model = llama(dtype=dtype)
    edit(model, select, adapt(build(method, "adapter", **OURS.get(method, {}) | args)))
    stir(p for _, p in trainable(model))
    return model


def check_same(model, other, tolerance=1e-5):
    """The same logits within a share of the largest, which are not those of the bare model."""
    one, two = said(model), said(other)
    assert_close(one, two, rtol=0, atol=tolerance * float(two.abs().max()))
    assert (two - said(llama(dtype=two.dtype))).abs().max() > 1e-2 * two.abs().max()


def tensors_of(folder):
    """The tensors of a folder without peft's copies of base weights and of what all layers share."""
    found = load_file(folder / "adapter_model.safetensors")
    shared = tuple(f"model.{key}" for key in found if key.startswith("base_model.") and key.count(".") == 1)
    ends = tuple("." + key.rpartition(".")[2] for key in shared)
    return {
        key: t
        for key, t in found.items()
        if not (ends and key.startswith("base_model.model.") and key.endswith(ends))
    }


SLOW = {"vera of all", "randlora sparse", "lokr dense", "oft odd block", "loha patterns", "oft exact"}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.full] * (k in SLOW)) for k in THEIRS])
def test_what_peft_writes_we_read_and_write_back(kind, tmp_path):
    wanted, model = theirs(kind, tmp_path / "a"), llama()
    load_peft(model, tmp_path / "a")
    check_same(model, wanted)
    trained = {
        k: t.numel() for k, t in tensors_of(tmp_path / "a").items() if k.count(".") > 3 and "_indices" not in k
    }
    assert sum(p.numel() for _, p in trainable(model)) == sum(trained.values())
    whole = ["lm_head"] if kind == "whole" else []
    save_peft(model, tmp_path / "b", modules_to_save=whole)
    one, two = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert one.keys() == two.keys()
    unread = {"base_model.randlora_A", "base_model.randlora_B"}  # ours are zero where no layer reads them
    assert all(torch.equal(one[key] * (two[key] != 0 if key in unread else 1), two[key]) for key in one)
    check_same(peft.PeftModel.from_pretrained(llama(), tmp_path / "b").eval(), wanted)


@pytest.mark.parametrize("method", OURS)
def test_what_we_write_peft_reads(method, tmp_path):
    model = ours(method)
    save_peft(model, tmp_path / "a")
    check_same(peft.PeftModel.from_pretrained(llama(), tmp_path / "a").eval(), model)
    load_peft(other := llama(), tmp_path / "a")
    check_same(other, model)


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr dense", "lokr both", "lokr factor"])
def test_kohyas_form_is_the_same_adapter(kind, tmp_path):
    theirs(kind, tmp_path / "a")
    load_peft(model := llama(), tmp_path / "a")
    file = save_kohya(model, tmp_path / "a.safetensors")
    found = load_file(file)
    site = SITE
    slot = model.get_submodule(site).slot("default")
    own = {
        end: t
        for key, t in found.items()
        if (end := key.removeprefix(f"lora_unet_{site.replace('.', '_')}.")) != key
    }
    peft_own = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert own.keys() - {"alpha"} == {k.rpartition(".")[2] for k in peft_own if "0.self_attn.q_proj." in k}
    assert_close(dense_of_kohya(own), slot.join.scale * slot.op.dense())
    load_kohya(other := llama(), file)
    check_same(other, model)


def dense_of_kohya(own):
    """What LyCORIS makes of the tensors of a layer."""
    one, two = (
        own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"]
        for name in (("hada_w1", "hada_w2") if "hada_w1_a" in own else ("lokr_w1", "lokr_w2"))
    )
    ranks = [own[name].shape[1] for name in ("hada_w1_a", "lokr_w1_a", "lokr_w2_a") if name in own]
    scale = float(own["alpha"]) / ranks[0] if ranks else 1.0
    return scale * (one * two if "hada_w1_a" in own else torch.kron(one, two))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of each type, written by peft."""
    root = tmp_path_factory.mktemp("types")
    kinds = ("loha", "lokr", "vera", "oft", "oft exact", "shira", "randlora", "adalora ranks")
    for kind in kinds:
        theirs(kind, root / kind)
    return {kind: root / kind for kind in kinds}


@pytest.mark.parametrize("kind", ["loha", "lokr", "vera", "oft", "shira", "randlora", "adalora ranks"])
def test_what_an_adapter_changes_is_the_difference_of_the_weights(kind, made):
    saved, bare = read_adapter(made[kind]), llama(dtype=torch.float64)
    load_peft(model := llama(dtype=torch.float64), made[kind])
    assert len(saved.sites) == 4
    for site in saved.sites:
        weight = bare.get_submodule(site).weight.detach()
        apart = model.get_submodule(site).weight.detach() - weight
        assert apart.abs().max() > 1e-3 or site in str(KEPT)
        assert_close(
            change(saved, site, weight).dense().double(), apart, rtol=0, atol=1e-6 * float(apart.abs().max())
        )


def test_types_that_narrow_are_plain_lora_without_a_rank(made, tmp_path):
    for kind, ranks in (("adalora ranks", {1, 3, 5}), ("vera", {7})):
        saved = read_adapter(made[kind])
        cut = as_lora(saved, lambda site: llama().get_submodule(site).weight.detach())
        assert cut.error == 0
        assert {factor.u.shape[1] for factor in cut.factors.values()} == ranks
        write_lora(cut, tmp_path / kind, base=None, dtype=None)
        load_peft(model := llama(), tmp_path / kind)
        load_peft(wanted := llama(), made[kind])
        check_same(model, wanted)


@pytest.mark.parametrize("kind", ["loha", "oft", "shira"])
def test_a_cut_of_another_type_is_the_best_of_its_rank(kind, made):
    saved = read_adapter(made[kind])
    weight = lambda site: llama().get_submodule(site).weight.detach()  # noqa: E731
    with pytest.raises(ValueError, match="has no factors; give the rank"):
        as_lora(saved, weight)
    cut = as_lora(saved, weight, 5)
    for site, factor in cut.factors.items():
        dense = change(saved, site, weight(site)).dense()
        s = torch.linalg.svdvals(dense.double())
        assert_close(cut.errors[site], float(s[5:].norm() / s.norm()), rtol=1e-4, atol=0)
        assert_close(float((dense - factor.u @ factor.v).norm()), float(s[5:].norm()), rtol=1e-4, atol=0)
    assert 0.1 < cut.error < 1


@pytest.mark.parametrize("kind", ["loha", "vera", "oft", pytest.param("randlora", marks=pytest.mark.full),
                                  pytest.param("lokr", marks=pytest.mark.full),
                                  pytest.param("shira", marks=pytest.mark.full),
                                  pytest.param("adalora ranks", marks=pytest.mark.full)])  # fmt: skip
def test_a_merge_is_the_model_with_its_adapter(kind, made, words, tmp_path):
    base = tmp_path / "base"
    llama().save_pretrained(base, max_shard_size="10KB")
    words.save_pretrained(base)
    saved = read_adapter(made[kind])
    assert effect(str(base), saved).largest > 1e-2
    done = merge_folder(str(base), saved, tmp_path / "out")
    assert (done.streamed, done.sites) == (True, 4)
    assert done.difference <= 1e-5
    load_peft(model := llama(), made[kind])
    check_same(folders.open_model(tmp_path / "out").model, model)


@pytest.mark.parametrize(
    "kind",
    [
        "loha",
        "oft exact",
        *(
            pytest.param(kind, marks=pytest.mark.full)
            for kind in ("lokr", "shira", "vera", "oft", "randlora", "adalora ranks")
        ),
    ],
)
def test_the_command_line_takes_it(kind, made, words, tmp_path):
    llama().save_pretrained(base := tmp_path / "base")
    words.save_pretrained(base)
    base, folder = str(base), made[kind]
    found = cli.check(base, folder).data
    assert (found["method"], found["sites"], found["largest"] > 1e-2) == (read_adapter(folder).method, 4, True)
    done = cli.convert(folder, cli.Form.lora, tmp_path / "lora", rank=8, base=base).data
    ranks = {t.u.shape[1] for t in read_peft(tmp_path / "lora").sites.values()}
    assert max(ranks) <= 8 if done["error"] == 0 else ranks == {8}
    assert 0 <= done["error"] < 1
    apart = cli.diff(folder, tmp_path / "lora", base=base).data["sites"].values()
    missed, total = (sum(row[name] ** 2 for row in apart) for name in ("apart", "one"))
    assert_close((missed / total) ** 0.5, done["error"], rtol=1e-3, atol=1e-6)
    cli.convert(folder, cli.Form.peft, tmp_path / "peft", base=base)
    assert cli.diff(folder, tmp_path / "peft", base=base).data["same"]
    load_peft(wanted := llama(), folder)
    if read_adapter(folder).args:
        cli.convert(folder, cli.Form.subspan, tmp_path / "subspan", base=base)
        check_same(folders.open_model(tmp_path / "subspan").model, wanted)
    else:
        with pytest.raises(ValueError, match="no preset of subspan makes"):
            cli.convert(folder, cli.Form.subspan, tmp_path / "subspan", base=base)


def test_two_types_are_compared_by_what_they_change(made):
    weight = lambda site: llama().get_submodule(site).weight.detach()  # noqa: E731
    one, two = read_adapter(made["loha"]), read_adapter(made["oft"])
    for site, row in compare(one, two, weight).items():
        a, b = (change(saved, site, weight(site)).dense().double() for saved in (one, two))
        assert_close(row.apart, float((a - b).norm()), rtol=1e-5, atol=0)
        assert_close(row.cosine, float((a * b).sum() / a.norm() / b.norm()), rtol=0, atol=1e-6)
    assert max(row.apart for row in compare(one, one, weight).values()) == 0


def changed(folder, out, *, tensors=None, drop=(), **fields):
    """A copy of a folder with other fields, and its tensors passed through a function."""
    out.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    config = {key: value for key, value in config.items() if key not in drop}
    (out / "adapter_config.json").write_text(json.dumps(config))
    found = load_file(folder / "adapter_model.safetensors")
    save_file(tensors(found) if tensors else found, out / "adapter_model.safetensors")
    return out


def check_refused(folder, words, model=None):
    """Loading fails with these words, and the model keeps its modules."""
    model = model or llama()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r".") as caught:
        load_peft(model, folder)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert dict(model.named_modules()) == modules


REFUSED = {
    "coft": ("oft", {"coft": True}, ["peft_type is 'OFT'", "coft is True"]),
    "block_share": ("oft", {"block_share": True}, ["block_share is True"]),
    "old oft": ("oft", {"oft_block_size": None}, ["oft_block_size None", "before 0.14"]),
    "both sizes": ("oft", {"r": 4}, ["r is 4 and oft_block_size 6"]),
    "terms": ("oft", {"num_cayley_neumann_terms": 0}, ["num_cayley_neumann_terms is 0"]),
    "block": ("oft", {"oft_block_size": 4}, ["other shapes", "oft_R.weight (4, 15) there, (6, 6) here"]),
    "no projection": ("vera", {"save_projection": False}, ["save_projection is False", "save_projection=True"]),
    "bases": ("randlora", {"save_projection": False}, ["save_projection is False"]),
    "vera rank": ("vera", {"r": 6}, ["other shapes", "vera_lambda_d (7,) there, (6,) here"]),
    "biases": ("vera", {"bias": "vera_only"}, ["bias is 'vera_only'"]),
    "rank": ("loha", {"r": 4}, ["hada_w1_a", "(24, 3)", "says rank 4"]),
    "rank of one": ("loha", {"rank_pattern": {"q_proj": 2}}, ["q_proj", "says rank 2"]),
    "field": ("loha", {"use_dora": True}, ["peft_type is 'LOHA'", "use_dora is True", "merge_and_unload"]),
    "factor": ("lokr", {"decompose_factor": 3}, ["says rank 2, factor 3"]),
    "bad factor": ("lokr", {"decompose_factor": 0}, ["decompose_factor is 0", "-1 or a positive"]),
    "entries": ("shira", {"r": 3}, ["other shapes", "shira_weight (96,) there, (144,) here"]),
    "kept": ("adalora ranks", {"rank_pattern": {"x.lora_E": [True]}}, ["x.lora_E", "init_r = 5"]),
    "init_r": ("adalora ranks", {"init_r": 4, "rank_pattern": None}, ["says rank 4"]),
    "unknown": ("loha", {"peft_type": "BOFT"}, ["peft_type is 'BOFT'", "LORA, LOHA, LOKR, VERA, OFT, SHIRA"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fields_that_would_change_the_meaning_are_refused(case, made, tmp_path):
    kind, fields, words = REFUSED[case]
    check_refused(changed(made[kind], tmp_path / "a", **fields), words)


def test_an_old_series_is_refused(made, tmp_path):
    check_refused(changed(made["oft"], tmp_path / "a", drop=["peft_version"]), ["before 0.18.0 summed another"])


@pytest.mark.parametrize("kind", ["loha", "lokr", "vera", "oft", "shira", "randlora", "adalora ranks"])
def test_extra_and_missing_keys_are_shown(kind, made, tmp_path):
    config = read_peft(made[kind]).config
    key = next(key for key in tensors_of(made[kind]) if "0.mlp.down_proj" in key)
    less = lambda t: {k: v for k, v in t.items() if k != key}  # noqa: E731
    only = len(config.layout.names) == 1
    words = ["also names model.layers.0.mlp.down_proj", "no tensors"] if only else [" missing", key[17:]]
    check_refused(changed(made[kind], tmp_path / "less", tensors=less), words)
    more = lambda t: t | {f"{key}.more": torch.ones(2)}  # noqa: E731
    check_refused(changed(made[kind], tmp_path / "more", tensors=more), ["1 unknown", f"{key[17:]}.more"])
    bare = lambda t: {k.replace("base_model.model.", ""): v for k, v in t.items()}  # noqa: E731
    check_refused(changed(made[kind], tmp_path / "bare", tensors=bare), ["do not begin with", "prefix=''"])
    load_peft(model := llama(), tmp_path / "bare", prefix="")
    assert sum(isinstance(m, Adapted) for m in model.modules()) == 4
    short = llama(layers=1)
    check_refused(made[kind], ["lacks", "model.layers.1", "another model"], short)


def test_matrices_of_all_layers_are_there_and_one(made, tmp_path):
    none = lambda t: {k: v for k, v in t.items() if k != "base_model.vera_A"}  # noqa: E731
    check_refused(changed(made["vera"], tmp_path / "a", tensors=none), ["1 missing", "vera_A"])
    name = "base_model.model.model.layers.0.mlp.down_proj.randlora_A"
    other = lambda t: t | {name: t[name] + 1}  # noqa: E731
    check_refused(changed(made["randlora"], tmp_path / "b", tensors=other), ["randlora_A is shared", "differ"])
    small = lambda t: t | {"base_model.vera_A": t["base_model.vera_A"][:, :30].clone()}  # noqa: E731
    check_refused(
        changed(made["vera"], tmp_path / "c", tensors=small),
        ["other shapes", "vera_A (7, 30) there, too small for (24, 40) here"],
    )


def test_entries_are_inside_and_named_once(made, tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.shira_indices"
    for number, value in enumerate((24, -1)):
        bad = lambda t, value=value: t | {key: t[key].index_fill(1, torch.tensor([0]), value)}  # noqa: E731
        check_refused(changed(made["shira"], tmp_path / str(number), tensors=bad), ["outside (24, 24)"])
    twice = lambda t: t | {key: t[key][:, [0, *range(95)]].contiguous()}  # noqa: E731
    check_refused(changed(made["shira"], tmp_path / "twice", tensors=twice), ["an entry twice"])
    floats = lambda t: t | {key: t[key].float()}  # noqa: E731 (as peft saves them on Windows)
    load_peft(model := llama(), changed(made["shira"], tmp_path / "floats", tensors=floats))
    load_peft(wanted := llama(), made["shira"])
    assert torch.equal(said(model), said(wanted))


def put(op_of, join=None, select="*.q_proj|*.down_proj"):
    """A model with an op of (m, n) at each site."""
    edit(model := llama(), select, adapt(Adapter(lambda _, w: op_of(*w.shape), join or Add())))
    return model


def test_what_peft_has_no_words_for_is_not_written(tmp_path):
    low = lambda m, n, rank: LowRank(torch.ones(m, rank), torch.ones(rank, n))  # noqa: E731
    for model, words in (
        (put(lambda m, n: Hadamard(low(m, n, 2), low(m, n, 3))), "ranks are 2 and 3"),
        (put(lambda m, n: Kron(low(2, 2, 1), low(m // 2, n // 2, 5))), "no rank and decompose_factor"),
        (put(lambda m, n: Entries(torch.arange(7), torch.ones(7), m, n)), "7 entries"),
        (put(lambda m, n: Entries(torch.arange(t := m + n if n == 24 else 2 * (m + n)), torch.ones(t), m, n)),
         "SHiRA's rank is"),
        (ours("vera", seed=1, select="*.q_proj"), None),
        (ours("randlora", select="*.q_proj|*.k_proj"), "no heads of those that PEFT shares"),
    ):  # fmt: skip
        if words is None:
            edit(model, "*.down_proj", adapt(build("vera", "adapter", rank=7, seed=2)))
            words = "no head of the one PEFT shares"
        with pytest.raises(ValueError, match=words):
            save_peft(model, tmp_path / "a")
    model = ours("loha", select="*.q_proj")
    edit(model, "*.down_proj", adapt(build("oft", "adapter", block=4)))
    with pytest.raises(ValueError, match=r"one type for all layers, but .* is LOHA.* is OFT"):
        save_peft(model, tmp_path / "a")
    model = ours("lora", rank=2)
    edit(model, [SITE], adapt(build("oft", "adapter", block=4), "two"))
    with pytest.raises(ValueError, match="OFT on top of other adapters"):
        save_peft(model, tmp_path / "a", name="two")
    assert not (tmp_path / "a").exists()


def test_files_of_kohya_that_do_not_fit(made, tmp_path):
    load_peft(model := llama(), made["lokr"])
    good = load_file(save_kohya(model, tmp_path / "a.safetensors"))
    begin = "lora_unet_model_layers_0_self_attn_q_proj"
    for change_of, words in (
        (lambda t: t | {f"{begin}.lokr_w2": torch.ones(6, 6)}, r"2 unknown"),
        (lambda t: {k: v for k, v in t.items() if k != f"{begin}.lokr_w1"}, r"2 missing .*lokr_w1_a"),
        (lambda t: t | {f"{begin}.hada_w1_a": torch.ones(1)}, "hada_w1_a belongs to LoHa|belongs to LoKr"),
        (lambda t: t | {f"{begin}.lokr_t2": torch.ones(1)}, "a convolution's LoKr"),
        (lambda t: t | {f"{begin}.dora_scale": torch.ones(1)}, "dora_scale belongs to DoRA"),
        (lambda t: {k: v[..., None] if v.dim() else v for k, v in t.items()}, "only matrices are read"),
        (lambda t: t | {f"{begin}.lokr_w1": torch.ones(3, 3)}, r"q_proj: .*\(18, 18\)"),
    ):
        save_file(change_of(good), tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=words):
            load_kohya(bare := llama(), tmp_path / "bad.safetensors")
        assert not any(isinstance(m, Adapted) for m in bare.modules())
    with pytest.raises(ValueError, match="LoRA, LoHa and LoKr only"):
        save_kohya(ours("oft"), tmp_path / "b.safetensors")


def test_no_alpha_and_an_alpha_of_zero_are_a_scale_of_one(made, tmp_path):
    load_peft(model := llama(), made["loha"])
    good = load_file(save_kohya(model, tmp_path / "a.safetensors"))
    site = "model.layers.1.mlp.down_proj"
    for alphas in ({}, {k: 0 * v for k, v in good.items() if k.endswith("alpha")}):
        rest = {k: v for k, v in good.items() if not k.endswith("alpha")}
        save_file(rest | alphas, tmp_path / "b.safetensors")
        load_kohya(other := llama(), tmp_path / "b.safetensors")
        assert other.get_submodule(site).slot("default").join.scale == 1.0


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 6, 9])
def test_the_series_is_that_of_the_definition(terms):
    q = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    power = max(3, terms - 1) if terms > 2 else terms - 1
    for row, block in zip(q, BlockSeries(q, terms).blocks(), strict=True):
        skew = torch.zeros(3, 3, dtype=torch.float64)
        skew[[0, 0, 1], [1, 2, 2]] = row
        skew = skew - skew.T
        wanted = sum((2.0 if k else 1.0) * torch.linalg.matrix_power(skew, k) for k in range(power + 1))
        last = torch.linalg.matrix_power(skew, power) if power > 2 else 0
        assert_close(block, torch.eye(3, dtype=torch.float64) if terms == 1 else wanted - last)


def test_many_terms_are_the_exact_rotation_the_other_way():
    q = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 8
    turn = BlockSeries(q, 200)
    assert_close(turn.dense() @ turn.dense().T, torch.eye(8, dtype=torch.float64))
    assert layout_of(Dense(q), Add()) is None


def test_sizes_are_split_as_peft_splits_them():
    factorization = pytest.importorskip("peft.tuners.lokr.layer").factorization
    layer = pytest.importorskip("peft.tuners.oft.layer").OFTLayer
    for size in range(2, 120):
        for asked in (1, 2, 3, 5, 8, 20, 32):
            assert split(size, asked) == factorization(size, asked)[0]
            near = asked if size % asked == 0 else layer.adjust_oft_parameters(None, size, asked)
            assert oft_block(size, blocks=0, block=asked) == near
            assert oft_block(size, blocks=asked, block=0) == size // near
        assert split(size, -1) == factorization(size, -1)[0]


@pytest.mark.parametrize("rank", [1, 2, 3, 7])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("factor", [-1, 3, 12])
def test_lokrs_shapes_are_those_that_peft_makes(rank, both, factor):
    config = peft.LoKrConfig(r=rank, decompose_both=both, decompose_factor=factor, target_modules=["0"])
    layer = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(40, 24)), config).base_model.model[0]
    own = {n.removesuffix(".default"): tuple(p.shape) for n, p in layer.named_parameters() if "lokr" in n}
    assert lokr_shapes(24, 40, rank=rank, factor=factor, both=both) == own


def test_pairing_undoes_itself():
    left = torch.arange(2 * 12).reshape(2, 12)
    assert torch.equal(paired(paired(left, 3), 4), left)
    assert not torch.equal(paired(left, 3), left)


def test_a_product_that_narrows_has_two_factors():
    torch.manual_seed(0)
    op = Product([Dense(torch.randn(6, 2)), Diag(torch.randn(2)), Dense(torch.randn(2, 5))])
    low = thin(op)
    assert low.rank == 2
    assert_close(low.dense(), op.dense())
    assert thin(Product([Dense(torch.randn(3, 4)), Dense(torch.randn(4, 3))])) is None


def test_every_type_has_a_preset_or_a_reason(made):
    assert {layout.label for layout in TYPES.values() if layout.write is None} == {"LoRA"}
    module = ours("loha").get_submodule("model.layers.0.self_attn.q_proj")
    assert type_of({"q": module}) == "LOHA"
    assert written_as("LOHA", {"q": module}).ranks == {"q": 3}
    with pytest.raises(ValueError, match="is no rotation"):
        written_as("OFT", {"q": module})
    assert {kind: read_adapter(folder).args for kind, folder in made.items()} == {
        "loha": {"rank": 3, "alpha": 6}, "lokr": {"rank": 2, "alpha": 8, "factor": -1, "both": False},
        "shira": {"rank": 2}, "oft exact": {"block": 6}, "oft": {}, "vera": {}, "randlora": {},
        "adalora ranks": {},
    }  # fmt: skip


def test_evas_ranks_are_a_pattern(tmp_path):
    theirs("eva", tmp_path / "a")
    config = read_peft(tmp_path / "a").config
    assert (config.method, len(config.rank_pattern) > 0) == ("lora", True)


@pytest.mark.parametrize("method", ["loha", "shira"])
def test_half_precision_files_are_float32_in_memory(method, tmp_path):
    save_peft(model := ours(method), tmp_path / "a", dtype=torch.bfloat16)
    kinds = {t.dtype for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()}
    assert kinds == {torch.bfloat16} | ({torch.int32} if method == "shira" else set())
    load_peft(other := llama(), tmp_path / "a")
    assert {p.dtype for _, p in trainable(other)} == {torch.float32}
    for (_, one), (_, two) in zip(trainable(model), trainable(other), strict=True):
        assert torch.equal(one.to(torch.bfloat16).float(), two)


def test_layers_share_the_random_matrices(made):
    for kind, at in (("vera", (1, 3)), ("randlora", (0,))):
        load_peft(model := llama(), made[kind])
        ops = [m.slot("default").op for m in model.modules() if isinstance(m, Adapted)]
        products = [op if isinstance(op, Product) else op.op for op in ops]
        for i in at:
            assert len({product.ops[i].w.untyped_storage().data_ptr() for product in products}) == 1
