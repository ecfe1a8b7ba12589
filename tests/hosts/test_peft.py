"""Adapters as peft itself writes and reads them: the same tensors under the same keys, and the same logits."""

import inspect

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.adapt import Adapted, adapt, prepare, trainable
from subspan.compress import Calibration
from subspan.edit import edit, sites
from subspan.hosts import folders, jobs
from subspan.hosts.export import TOLERANCE
from subspan.hosts.peft import (
    factor_of,
    load_peft,
    low_rank,
    read_peft,
    save_peft,
)
from subspan.hosts.peft_change import as_lora, compare, inner, triples, write_lora
from subspan.hosts.peft_config import PeftConfig, read_config
from subspan.hosts.peft_keys import peft_tensors, sort_tensors
from subspan.hosts.peft_kohya import load_kohya, save_kohya
from subspan.hosts.peft_merge import effect, logits, merge_folder, opened_with, some_ids
from subspan.hosts.peft_read import Weights, base_of, change, is_adapter, joined, read_adapter, read_one, shards
from subspan.hosts.peft_write import Factor, targets, tidy, write_peft
from subspan.linalg import svdvals
from subspan.methods import build, methods
from subspan.ops import Dense, LowRank, OpLinear, Scaled

IDS = torch.arange(2 * 12).reshape(2, 12) * 37 % 300
SITES = "*.q_proj|*.down_proj"
METHODS = ["lora", "rslora", "dora", "pissa", "milora"]
THEIRS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 7},
        "alpha_pattern": {r"layers\.1\..*": 5, "q_proj": 3},  # sorted, as peft saves them: the first match wins
    },
    "rslora patterns": {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norm": {"modules_to_save": ["model.norm"]},
    "one layer": {"layers_to_transform": [1]},
    "layers of a list": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "all": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.[qk]_proj"},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "too large a rank": {"r": 30},
}


def llama(*, tie=False, dtype=torch.float32, **sizes):
    small = {
        "vocab_size": 300, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**small | sizes, tie_word_embeddings=tie)).to(dtype).eval()


@torch.no_grad()
def said(model):
    return model(input_ids=IDS).logits


@torch.no_grad()
def stir(tensors):
    draw = torch.Generator().manual_seed(1)
    for p in tensors:
        p.add_(0.1 * torch.randn(p.shape, generator=draw))


def ours(method, *, select=SITES, tie=False, dtype=torch.float32, name="default", **args):
    """A model with a trained adapter of ours."""
    model = llama(tie=tie, dtype=dtype)
    edit(model, select, adapt(build(method, "adapter", **{"rank": 4} | args), name))
    stir(p for _, p in trainable(model))
    return model


def theirs(out, *, tie=False, base=None, **args):
    """A model with a trained adapter of peft, saved by peft."""
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"]} | args
    model = peft.get_peft_model(base or llama(tie=tie), peft.LoraConfig(**config)).eval()
    stir(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(out)
    return model


def saved_by_us(method, model, out, **args):
    return save_peft(model, out, rslora=method == "rslora", **args)


def check_same(model, other, tolerance=1e-6):
    """The same logits within a share of the largest, which are not those of the bare model."""
    one, two = said(model), said(other)
    assert_close(one, two, rtol=0, atol=tolerance * float(two.abs().max()))
    assert (two - said(llama(dtype=two.dtype))).abs().max() > 1e-2 * two.abs().max()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
class TestPeft:
    @pytest.mark.parametrize("method", METHODS)
    def test_what_we_write_peft_reads(self, method, tmp_path):
        model = ours(method)
        saved_by_us(method, model, tmp_path / "a")
        check_same(peft.PeftModel.from_pretrained(llama(), tmp_path / "a").eval(), model)

    @pytest.mark.parametrize("method", METHODS)
    def test_what_we_write_we_read(self, method, tmp_path):
        model, other = ours(method), llama()
        load_peft(other, saved_by_us(method, model, tmp_path / "a"))
        check_same(other, model)

    @pytest.mark.parametrize("tie", [False, pytest.param(True, marks=pytest.mark.full)])
    @pytest.mark.parametrize("args", THEIRS.values(), ids=THEIRS)
    def test_what_peft_writes_we_read(self, args, tie, tmp_path):
        wanted, model = theirs(tmp_path / "a", tie=tie, **args), llama(tie=tie)
        bare = said(model)
        load_peft(model, tmp_path / "a")
        assert_close(said(model), said(wanted), rtol=0, atol=1e-6)
        assert (said(model) - bare).abs().max() > 1e-2

    @pytest.mark.parametrize("method", METHODS)
    def test_the_tensors_are_those_that_peft_writes(self, method, tmp_path):
        saved_by_us(method, ours(method), tmp_path / "a")
        peft.PeftModel.from_pretrained(llama(), tmp_path / "a").save_pretrained(tmp_path / "b")
        one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)

    @pytest.mark.full
    @pytest.mark.parametrize("args", THEIRS.values(), ids=THEIRS)
    def test_a_round_trip_of_theirs_keeps_every_tensor(self, args, tmp_path):
        wanted, model = theirs(tmp_path / "a", **args), llama()
        load_peft(model, tmp_path / "a")
        if args.get("init_lora_weights") == "pissa":
            save_peft(model, tmp_path / "b")  # now relative to the original base
        else:
            whole = sorted({key.rpartition(".")[0] for key in read_peft(tmp_path / "a").whole})
            save_peft(model, tmp_path / "b", modules_to_save=whole, rslora="use_rslora" in args)
            one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
            copies = {key for key in one if key.endswith("base_layer.weight")}
            assert one.keys() - copies == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in two)
        assert_close(
            said(peft.PeftModel.from_pretrained(llama(), tmp_path / "b")), said(wanted), rtol=0, atol=2e-6
        )

    def test_pissa_in_float64_is_the_same_to_rounding(self, tmp_path):
        model, other = ours("pissa", dtype=torch.float64), llama(dtype=torch.float64)
        load_peft(other, save_peft(model, tmp_path / "a"))
        check_same(other, model, 1e-12)

    def test_auto_model_finds_the_base(self, words, tmp_path):
        llama().save_pretrained(tmp_path / "base")
        save_peft(model := ours("lora"), tmp_path / "a", base=str(tmp_path / "base"))
        check_same(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a"), model)


def test_pissa_is_written_as_twice_its_rank(tmp_path):
    model = ours("pissa")
    save_peft(model, tmp_path / "a")
    config = read_config(tmp_path / "a")
    assert (config.rank, config.scale_of("any"), config.pissa) == (8, 16 / 4, False)
    site = "model.layers.0.self_attn.q_proj"
    module = model.get_submodule(site)
    u, v, scale, _ = vars(factor_of(site, module)).values()
    assert_close(module.origin.weight + scale * u @ v, module.weight, rtol=0, atol=1e-5)


def test_only_the_named_adapter_is_written(tmp_path):
    model = ours("lora", name="one")
    alone = said(model)
    edit(model, ["model.layers.0.mlp.down_proj"], adapt(build("lora", "adapter", rank=2), "two"))
    stir(p for n, p in trainable(model) if ".two." in n)
    save_peft(model, tmp_path / "one", name="one")
    load_peft(other := llama(), tmp_path / "one", name="again")
    assert torch.equal(said(other), alone)
    assert [*read_peft(save_peft(model, tmp_path / "two", name="two")).sites] == ["model.layers.0.mlp.down_proj"]


def test_an_edit_can_be_undone(tmp_path):
    theirs(tmp_path / "a", modules_to_save=["lm_head"])
    model = llama(tie=True)
    before, modules = said(model), dict(model.named_modules())
    done = load_peft(model, tmp_path / "a")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    done.undo()
    assert dict(model.named_modules()) == modules
    assert torch.equal(said(model), before)


def test_other_beginnings_of_the_names_are_read_when_they_are_told(tmp_path):
    model = ours("lora")
    tensors = load_file(save_peft(model, tmp_path / "a") / "adapter_model.safetensors")
    config = PeftConfig(rank=4, alpha=8.0, targets=None)
    for old, new, root in [("base_model.model.", "x.", ""), ("base_model.model.model.", "", "model.")]:
        moved = {key.replace(old, new): t for key, t in tensors.items()}
        found = sort_tensors(moved, config, prefix=new, root=root)
        assert peft_tensors(found.sites, found.whole).keys() == tensors.keys()


def test_half_precision_factors_are_float32_in_memory(tmp_path):
    save_peft(ours("dora"), tmp_path / "a", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    load_peft(model := llama(), tmp_path / "a")
    assert {p.dtype for _, p in trainable(model)} == {torch.float32}


def test_targets_select_their_sites_and_no_others():
    names = ["a.0.q", "a.1.q", "b.a.1.q", "a.0.k"]
    for wanted in (["a.0.q", "a.1.q", "b.a.1.q"], ["a.0.q"], ["a.1.q"], ["a.0.q", "b.a.1.q"]):
        chosen = targets(wanted, names)
        config = PeftConfig(rank=1, alpha=1.0, targets=chosen if isinstance(chosen, str) else tuple(chosen))
        assert config.targeted(names, ()) == set(wanted)
    assert targets(["a.1.q"], names) == r"a\.1\.q"


def test_patterns_mean_one_site_each(tmp_path):
    factors = {
        name: Factor(torch.ones(3, r), torch.ones(r, 2), r) for name, r in (("q", 1), ("x.q", 2), ("y.q", 2))
    }
    write_peft(tmp_path / "a", factors, names=list(factors))
    config = read_config(tmp_path / "a")
    assert {site: (config.rank_of(site), config.scale_of(site)) for site in factors} == {
        "q": (1, 1.0), "x.q": (2, 2.0), "y.q": (2, 2.0)
    }  # fmt: skip


def test_factors_are_found_through_numbers():
    op = LowRank(torch.randn(4, 2), torch.randn(2, 3))
    assert torch.equal(low_rank(Scaled(op, 2.0)).dense(), 2 * op.dense())
    assert low_rank(Dense(torch.ones(2, 2))) is None
    assert tidy(0.1 + 0.2) == 0.1 + 0.2


def test_triples_of_factors_are_those_of_the_product():
    torch.manual_seed(0)
    op = LowRank(torch.randn(9, 3).double(), torch.randn(3, 7).double())
    u, s, vh = triples(op)
    assert_close(u * s @ vh, op.dense())
    assert_close(s, svdvals(op.dense())[:3])
    assert_close(inner(op, op), inner(Dense(op.dense()), op))


@pytest.mark.parametrize("method", METHODS)
def test_a_cut_is_the_best_of_its_rank(method, tmp_path):
    model = ours(method)
    saved = read_adapter(saved_by_us(method, model, tmp_path / "a"))
    weight = lambda site: model.get_submodule(site).origin.weight  # noqa: E731
    cut = as_lora(saved, weight, 2)
    lost = total = 0.0
    for site, factor in cut.factors.items():
        s = svdvals(change(saved, site, weight(site)).dense()).double()
        assert_close(cut.errors[site], float(s[2:].norm() / s.norm()), rtol=1e-4, atol=0)
        missed = change(saved, site, weight(site)).dense() - factor.u @ factor.v
        assert_close(float(missed.norm()), float(s[2:].norm()), rtol=1e-4, atol=0)
        lost, total = lost + float(s[2:].square().sum()), total + float(s.square().sum())
    assert_close(cut.error, (lost / total) ** 0.5, rtol=1e-5, atol=0)


def test_a_cut_of_enough_rank_changes_nothing(tmp_path):
    model = ours("lora")
    saved = read_adapter(save_peft(model, tmp_path / "a"))
    cut = as_lora(saved, Weights("smollm2"), 12)
    write_lora(cut, tmp_path / "b", base=None, dtype=None)
    assert cut.error == 0
    load_peft(other := llama(), tmp_path / "b")
    check_same(other, model)


def test_comparing_is_geometry(tmp_path):
    one = read_adapter(save_peft(ours("lora"), tmp_path / "a"))
    two = read_adapter(save_peft(ours("lora", alpha=24.0, select="*.q_proj"), tmp_path / "b"))
    found = compare(one, two, Weights("smollm2"))
    assert list(found) == [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("mlp.down_proj", "self_attn.q_proj")]
    for site, row in found.items():
        a = change(one, site).dense()
        assert_close(row.one, float(a.norm()), rtol=1e-6, atol=0)
        rest = a if row.two is None else a - change(two, site).dense()
        assert_close(row.apart, float(rest.norm()), rtol=1e-6, atol=0)
        assert row.ranks == (4, 0 if row.two is None else 4)
        if row.two is not None:
            cosine = torch.nn.functional.cosine_similarity(a.flatten(), change(two, site).dense().flatten(), 0)
            assert_close(row.cosine, float(cosine), rtol=0, atol=1e-6)
    same = compare(one, one, Weights("smollm2"))
    assert max(row.apart / row.one for row in same.values()) < 1e-6


def put_down(model, words, folder, **args):
    model.save_pretrained(folder, **args)
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("method", "dtype"), [("lora", torch.float32), ("dora", torch.bfloat16), ("pissa", torch.float32)]
)
def test_a_merge_is_the_model_with_its_adapter(method, dtype, words, tmp_path):
    base = put_down(llama(dtype=dtype), words, tmp_path / "base", max_shard_size="10KB")
    saved_by_us(method, ours(method), tmp_path / "a")
    saved = read_adapter(tmp_path / "a")
    done = merge_folder(base, saved, tmp_path / "out")
    assert (done.streamed, done.sites, done.untied) == (True, 4, ())
    assert done.difference <= done.tolerance
    old, new = shards(tmp_path / "base"), shards(tmp_path / "out")
    assert {key: file.name for key, file in old.items()} == {key: file.name for key, file in new.items()}
    assert len(set(new.values())) > 1
    for key in new:
        was, now = read_one(old[key], key), read_one(new[key], key)
        site = key.removesuffix(".weight")
        assert torch.equal(now, joined(saved, site, was).to(dtype) if site in saved.sites else was)


@pytest.mark.parametrize(
    "args",
    [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
)
def test_a_tied_head_gets_its_own_weight(args, words, tmp_path):
    base = put_down(llama(tie=True), words, tmp_path / "base")
    wanted = theirs(tmp_path / "a", tie=True, **args)
    done = merge_folder(base, read_adapter(tmp_path / "a"), tmp_path / "out")
    assert done.untied == ("lm_head.weight",)
    merged = folders.open_model(tmp_path / "out").model
    assert merged.config.tie_word_embeddings is False
    assert_close(said(merged), said(wanted), rtol=0, atol=2e-6)


def test_a_compressed_model_is_merged_in_memory(words, tmp_path):
    loaded = folders.open_model(put_down(llama(), words, tmp_path / "base"))
    low = LowRank(*(torch.randn(s, generator=torch.Generator().manual_seed(0)) for s in ((24, 3), (3, 24))))
    site = "model.layers.0.self_attn.o_proj"
    edit(loaded.model, [site], lambda *_: OpLinear(low))
    folders.save_model(tmp_path / "small", loaded)
    saved = read_adapter(save_peft(ours("lora"), tmp_path / "a"))
    done = merge_folder(str(tmp_path / "small"), saved, tmp_path / "out")
    assert (done.streamed, done.difference <= done.tolerance) == (False, True)
    assert isinstance(
        folders.open_model(tmp_path / "out").model.get_submodule("model.layers.0.self_attn.o_proj").op, LowRank
    )


def test_a_subspan_folder_and_its_peft_folder_are_one_adapter(words, tmp_path):
    base = put_down(llama(), words, tmp_path / "base")
    model = ours("pissa")
    args = {"method": "pissa", "args": {"rank": 4}, "source": base}
    folders.save_adapter(tmp_path / "a", model, **args)
    saved = read_adapter(tmp_path / "a")
    assert (is_adapter(tmp_path / "a"), is_adapter(base), base_of(saved)) == (True, False, base)
    loaded, done = opened_with(base, saved)
    assert torch.equal(said(loaded.model), said(model))
    moved = effect(base, saved)
    after = logits(loaded.model, some_ids(loaded))
    done.undo()
    change_of = (after - logits(loaded.model, some_ids(loaded))).abs()
    assert (moved.largest, moved.mean) == (float(change_of.max()), float(change_of.mean()))
    merged = merge_folder(base, saved, tmp_path / "out")
    assert merged.difference <= TOLERANCE[torch.float32] / 100
    assert saved.kinds() == {"op.u": (4, 4 * 96), "op.v": (4, 4 * 128)}


@pytest.mark.parametrize("prefix", ["lora_unet", "lycoris", "lora_te1"])
@pytest.mark.parametrize("method", ["lora", "rslora", "pissa"])
def test_kohyas_form_is_the_same_adapter(method, prefix, tmp_path):
    model = ours(method)
    file = save_kohya(model, tmp_path / "a.safetensors", prefix=prefix)
    tensors = load_file(file)
    site = "model.layers.0.self_attn.q_proj"
    key = f"{prefix}_model_layers_0_self_attn_q_proj"
    u, v, scale, _ = vars(factor_of(site, model.get_submodule(site))).values()
    assert torch.equal(tensors[f"{key}.lora_up.weight"], u)
    assert torch.equal(tensors[f"{key}.lora_down.weight"], v)
    assert_close(float(tensors[f"{key}.alpha"]), scale * u.shape[1])
    assert len(tensors) == 3 * len([m for m in model.modules() if isinstance(m, Adapted)])
    load_kohya(other := llama(), file)
    check_same(other, model)


def test_a_file_of_kohya_without_alpha_has_scale_one(tmp_path):
    torch.manual_seed(0)
    key = "lora_unet_model_layers_0_self_attn_o_proj"
    u, v = torch.randn(24, 2), torch.randn(2, 24)
    save_file({f"{key}.lora_up.weight": u, f"{key}.lora_down.weight": v}, tmp_path / "a.safetensors")
    load_kohya(model := llama(), tmp_path / "a.safetensors")
    bare = llama().get_submodule("model.layers.0.self_attn.o_proj").weight
    assert_close(model.get_submodule("model.layers.0.self_attn.o_proj").weight, bare + u @ v)


@pytest.mark.full
@pytest.mark.parametrize("method", sorted(set(methods("adapter")) - {"moe_lora"}))  # a gate has no weight
def test_every_adapter_of_ours_is_merged_and_cut(method, words, tmp_path):
    base = put_down(llama(), words, tmp_path / "base")
    model = llama()
    args = {"rank": 3} if "rank" in inspect.signature(methods()[method].build).parameters else {}
    data = Calibration([IDS], jobs.forward, jobs.loss)
    made = prepare(build(method, "adapter", **args), model, sites(model, SITES), data)
    edit(model, SITES, adapt(made))
    stir(p for _, p in trainable(model))
    folders.save_adapter(tmp_path / "a", model, method=method, args=args, source=base)
    saved = read_adapter(tmp_path / "a")
    done = merge_folder(base, saved, tmp_path / "out")
    assert done.streamed
    assert_close(said(folders.open_model(tmp_path / "out").model), said(model), rtol=0, atol=1e-4)
    cut = as_lora(saved, Weights(base), 8)
    for site, error in cut.errors.items():
        s = svdvals(change(saved, site, Weights(base)(site)).dense()).double()
        assert_close(error, float(s[8:].norm() / s.norm()), rtol=1e-3, atol=1e-6)


def test_a_dora_here_and_a_lora_there_are_not_one_adapter(tmp_path):
    u, v = torch.ones(3, 1), torch.ones(1, 2)
    with pytest.raises(ValueError, match="some sites are DoRA and some are LoRA"):
        write_peft(tmp_path / "a", {"x": Factor(u, v, 1.0), "y": Factor(u, v, 1.0, torch.ones(3))}, names=None)
