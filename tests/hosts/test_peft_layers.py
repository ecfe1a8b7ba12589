"""LoRA on convolutions and embeddings as peft keeps it: key for key both ways, refused where theirs is another."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.adapt import Adapted, adapt, merge, trainable
from subspan.adapt.layers import matrix, use_of
from subspan.edit import edit
from subspan.hosts.peft import load_peft, save_peft, type_of
from subspan.hosts.peft_keys import flattened, formed
from subspan.hosts.peft_kohya import save_kohya
from subspan.hosts.peft_merge import merge_folder
from subspan.hosts.peft_read import change, fill_peft, joined, read_adapter
from subspan.hosts.peft_write import class_of, form_of, gathered, resharded, unlike, unwrapped, write_once
from subspan.methods import build
from subspan.ops import LowRank
from subspan.site import of

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
IDS = torch.arange(2 * 10).reshape(2, 10) * 7 % 11
CONVOLUTIONS = ["line", "plane", "space"]
ALL = ["table", *CONVOLUTIONS]
METHODS = {"lora": ALL, "rslora": ALL, "dora": CONVOLUTIONS, "pissa": ALL, "milora": ALL}
THEIRS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": CONVOLUTIONS},
    "gaussian": {"init_lora_weights": "gaussian"},
    "patterns": {"rank_pattern": {"plane": 2, "table": 3}, "alpha_pattern": {"line": 5}},
    "with a linear layer": {"target_modules": [*ALL, "head"]},
}


class Net(nn.Module):
    """A table, a convolution of each kind, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=2)
        self.line = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(2, 6, (3, 2), padding="same", bias=False)
        self.space = nn.Conv3d(3, 4, (2, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1))
        self.head = nn.Linear(6, 5)

    def forward(self, ids):
        x = self.line(self.table(ids).mT).tanh()
        x = self.plane(x.unflatten(1, (2, 4))).tanh()
        return self.head(self.space(x.unflatten(1, (3, 2))).tanh())


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


@torch.no_grad()
def said(model, x=IDS):
    return model(x)


@torch.no_grad()
def stir(tensors):
    draw = torch.Generator().manual_seed(1)
    for p in tensors:
        p.add_(0.2 * torch.randn(p.shape, generator=draw))


def ours(method, sites, model=None, **args):
    """A model with a moved adapter of ours."""
    model = model or net()
    edit(model, sites, adapt(build(method, "adapter", **{"rank": 2} | args)))
    stir(p for _, p in trainable(model))
    return model


def theirs(out, model=None, **args):
    """A model with a moved adapter of peft, saved by peft."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ALL} | args)
    made = peft.get_peft_model(model or net(), config).eval()
    stir(p for p in made.parameters() if p.requires_grad)
    made.save_pretrained(out)
    return made


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def check_same(model, other, bare, x=IDS, tolerance=1e-5):
    """The same outputs within a share of the largest, which are not those of the bare model."""
    one, two = said(model, x), said(other, x)
    assert_close(one, two, rtol=0, atol=tolerance * float(two.abs().max()))
    assert (two - said(bare, x)).abs().max() > 1e-2 * two.abs().max()


# ---- both ways ----


@pytest.mark.parametrize("method", METHODS)
def test_what_we_write_peft_reads_and_writes_again_key_for_key(method, tmp_path):
    model = ours(method, METHODS[method])
    save_peft(model, tmp_path / "a", rslora=method == "rslora")
    read = peft.PeftModel.from_pretrained(net(), tmp_path / "a").eval()
    check_same(read, model, net())
    read.save_pretrained(tmp_path / "b")
    one, two = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("method", METHODS)
def test_what_we_write_we_read(method, tmp_path):
    model, other = ours(method, METHODS[method]), net()
    load_peft(other, save_peft(model, tmp_path / "a", rslora=method == "rslora"))
    check_same(other, model, net())


@pytest.mark.parametrize("args", THEIRS.values(), ids=THEIRS)
def test_what_peft_writes_we_read_and_write_again(args, tmp_path):
    wanted, model = theirs(tmp_path / "a", **args), net()
    load_peft(model, tmp_path / "a")
    check_same(model, wanted, net())
    save_peft(model, tmp_path / "b", rslora="use_rslora" in args)
    one, two = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_shapes_are_pefts(tmp_path):
    save_peft(ours("dora", CONVOLUTIONS), tmp_path / "a")
    save_peft(ours("lora", ["table"]), tmp_path / "b")
    found = {key.removeprefix("base_model.model."): tuple(t.shape) for key, t in tensors(tmp_path / "a").items()}
    assert found == {
        "line.lora_A.weight": (2, 6, 3), "line.lora_B.weight": (8, 2, 1),
        "line.lora_magnitude_vector": (1, 8, 1),
        "plane.lora_A.weight": (2, 2, 3, 2), "plane.lora_B.weight": (6, 2, 1, 1),
        "plane.lora_magnitude_vector": (1, 6, 1, 1),
        "space.lora_A.weight": (2, 3, 2, 1, 2), "space.lora_B.weight": (4, 2, 1, 1, 1),
        "space.lora_magnitude_vector": (1, 4, 1, 1, 1),
    }  # fmt: skip
    found = {key: tuple(t.shape) for key, t in tensors(tmp_path / "b").items()}
    assert found == {
        "base_model.model.table.lora_embedding_A": (2, 11), "base_model.model.table.lora_embedding_B": (6, 2)
    }  # fmt: skip


def test_flattening_undoes_the_form():
    torch.manual_seed(0)
    draw = {"lora_B.weight": torch.randn(8, 2), "lora_A.weight": torch.randn(2, 12)}
    for form, more in ((None, {}), ((), {}), ((3, 2, 2), {"lora_magnitude_vector": torch.randn(8)}), ((4, 3), {})):
        own = draw | more
        flat, forms = flattened({f"x.{key}": t for key, t in formed(own, form).items()})
        assert forms == ({} if form is None else {"x": form})
        assert flat.keys() == {f"x.{key}" for key in own}
        assert all(torch.equal(flat[f"x.{key}"], t) for key, t in own.items())


def llama(*, tie=False):
    small = {
        "vocab_size": 300, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=tie)).eval()


@pytest.mark.parametrize("tie", [False, True])
def test_the_embedding_of_a_language_model_both_ways(tie, tmp_path, words):
    words.save_pretrained(tmp_path / "base")
    llama(tie=tie).save_pretrained(tmp_path / "base")
    theirs(tmp_path / "a", llama(tie=tie), target_modules=["embed_tokens", "q_proj"])
    ids = IDS * 23
    wanted = peft.PeftModel.from_pretrained(llama(tie=tie), tmp_path / "a").eval()
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in tensors(tmp_path / "a"))
    load_peft(model := llama(tie=tie), tmp_path / "a")
    with torch.no_grad():
        one, two, bare = (m(input_ids=ids).logits for m in (model, wanted, llama(tie=tie)))
    assert_close(one, two, rtol=0, atol=1e-5)
    assert (one - bare).abs().max() > 1e-2
    save_peft(model, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(llama(tie=tie), tmp_path / "b").eval()
    with torch.no_grad():
        assert_close(again(input_ids=ids).logits, two, rtol=0, atol=1e-5)
    done = merge_folder(str(tmp_path / "base"), read_adapter(tmp_path / "b"), tmp_path / "out")
    assert (done.streamed, done.difference <= done.tolerance) == (True, True)
    assert done.untied == (("lm_head.weight",) if tie else ())


# ---- the parts ----


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_joined_alone_is_that_of_the_model(method, tmp_path):
    model = ours(method, METHODS[method])
    saved = read_adapter(save_peft(model, tmp_path / "a", rslora=method == "rslora"))
    assert saved.kinds().keys() <= {
        "lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B"
    }  # fmt: skip
    for site in saved.sites:
        alone = joined(saved, site, net().get_submodule(site).weight)
        assert_close(alone, merge(model.get_submodule(site)).weight, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match=f"{site} is (a convolution|an embedding), whose change is not read"):
            change(saved, site, net().get_submodule(site).weight)


def test_the_compressed_forms_of_the_layers_take_pefts_adapters(tmp_path):
    theirs(tmp_path / "a")
    model, small = net(), net()

    def cut(_, layer):
        u, s, v = torch.linalg.svd(matrix(layer).detach(), full_matrices=False)
        return of(layer).rebuild(
            layer, LowRank((u * s)[:, :3].contiguous(), v[:3].contiguous()), layer._parameters.get("bias")
        )

    edit(small, ALL, cut)
    for site in ALL:
        layer = small.get_submodule(site)
        model.get_submodule(site).weight.data.copy_(layer.weight)
    load_peft(model, tmp_path / "a")
    load_peft(small, tmp_path / "a")
    assert_close(said(small), said(model), rtol=0, atol=1e-5)


def test_filling_an_adapter_is_loading_it(tmp_path):
    save_peft(model := ours("dora", [*CONVOLUTIONS, "head"]), tmp_path / "a")
    other = net()
    edit(other, [*CONVOLUTIONS, "head"], adapt(build("dora", "adapter", rank=2)))
    kept = dict(other.named_parameters())
    fill_peft(other, tmp_path / "a")
    assert torch.equal(said(other), said(model))
    assert all(p is kept[name] for name, p in other.named_parameters())


@pytest.mark.parametrize(
    ("method", "sites", "args", "words"),
    [
        ("lora", ["line"], {}, r"stand on other layers \(plane\)"),
        ("lora", ["line", "plane"], {"rank": 3}, r"'op\.u': \(8, 2\).* there and .*\(8, 3\).* here"),
        ("lora", ["line", "plane"], {"alpha": 9.0}, "scale 8.0 there and 4.5 here"),
        ("dora", ["line", "plane"], {}, "LowRank there and LowRank Rescale here"),
        ("pissa", ["line", "plane"], {}, "its start changed the base"),
    ],
)
def test_filling_refuses_another_adapter_and_writes_nothing(method, sites, args, words, tmp_path):
    save_peft(ours("lora", ["line", "plane"], alpha=16.0), tmp_path / "a")
    model = ours(method, sites, **{"alpha": 16.0} | args)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        fill_peft(model, tmp_path / "a")
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


# ---- where peft's LoRA is another ----


GROUPS = {"groups": 2, "padding": 1}
OTHER = {
    "groups": (GROUPS, "in 2 groups, where PEFT's lora_A reads all channels"),
    "dilation": ({"dilation": 2, "padding": "same"}, "of dilation .2, 2., and PEFT's lora_A looks at neighbours"),
    "reflected": (
        {"padding": 1, "padding_mode": "reflect"},
        "padding_mode 'reflect', and PEFT's lora_A pads with",
    ),
}
IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def image(args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 4, 3, **args)).eval()


@pytest.mark.parametrize(("args", "words"), OTHER.values(), ids=OTHER)
def test_a_convolution_that_peft_does_not_change_as_we_do_is_refused_both_ways(args, words, tmp_path):
    with pytest.raises(ValueError, match=f"^0 is a convolution .*{words}.*; merge it first"):
        save_peft(ours("lora", ["0"], image(args)), tmp_path / "b")
    assert not (tmp_path / "b").exists()
    theirs(tmp_path / "a", image(args), target_modules=["0"])
    model = image(args)
    with pytest.raises(ValueError, match=f"0 is a convolution .*{words}.*; it is not read"):
        load_peft(model, tmp_path / "a")
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("args", [OTHER["dilation"][0], OTHER["reflected"][0]], ids=["dilation", "reflected"])
def test_the_reason_is_true_peft_computes_other_outputs_than_it_merges(args, tmp_path):
    model = theirs(tmp_path / "a", image(args), target_modules=["0"])
    before = said(model, IMAGE)
    after = said(model.merge_and_unload(), IMAGE)
    assert (before - after).abs().max() > 1e-2 * after.abs().max()


def test_the_reason_is_true_a_group_of_pefts_reads_the_channels_of_the_others(tmp_path):
    model = theirs(tmp_path / "a", image(GROUPS), target_modules=["0"])
    x = IMAGE.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x)[:, :2].sum(), x)
    assert g[:, 2:].abs().max() > 1e-2 * g.abs().max()
    (g,) = torch.autograd.grad(ours("lora", ["0"], image(GROUPS))(x)[:, :2].sum(), x)
    assert g[:, 2:].abs().max() == 0 < g[:, :2].abs().max()
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    "args", [{"dilation": 2, "kernel_size": 1}, {"padding_mode": "circular"}, {"padding": "valid"}], ids=str
)
def test_a_window_that_is_harmless_is_no_reason(args, tmp_path):
    def one():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(4, 4, **{"kernel_size": 3} | args)).eval()

    save_peft(model := ours("lora", ["0"], one()), tmp_path / "a")
    check_same(peft.PeftModel.from_pretrained(one(), tmp_path / "a").eval(), model, one(), IMAGE)


def test_a_dora_of_an_embedding_is_another_there(tmp_path):
    words = "table is an embedding, of which PEFT's DoRA keeps one length a feature, ours one a token"
    with pytest.raises(ValueError, match=f"{words}; merge it first"):
        save_peft(ours("dora", ["table"]), tmp_path / "b")
    theirs(tmp_path / "a", target_modules=["table"], use_dora=True)
    assert tensors(tmp_path / "a")["base_model.model.table.lora_magnitude_vector"].shape == (6,)
    with pytest.raises(ValueError, match=f"{words}; it is not read"):
        load_peft(net(), tmp_path / "a")


@pytest.mark.parametrize(
    ("method", "args", "label"),
    [("lokr", {}, "LoKr"), ("shira", {"rank": 1}, "SHiRA"), ("oft", {"block": 2}, "OFT")],
)
def test_types_that_peft_has_not_on_a_convolution_are_not_written(method, args, label, tmp_path):
    model = net()
    edit(model, ["line"], adapt(build(method, "adapter", **args)))
    with pytest.raises(
        ValueError, match=f"line is a convolution of 1 axes, and PEFT's {label} is not read or written for one"
    ):
        save_peft(model, tmp_path / "a")


def test_kohyas_form_has_linear_layers_only(tmp_path):
    model = ours("lora", ["line"])
    with pytest.raises(
        ValueError, match="line: adapters of convolutions and embeddings are not written in this form"
    ):
        save_kohya(model, tmp_path / "a.safetensors")
    found = {"line": model.line}
    assert type_of(found, layers="all") == "LORA"
    with pytest.raises(ValueError, match="not written in this form"):
        type_of(found)


# ---- damage ----


def changed(folder, out, edited):
    out.mkdir()
    save_file(edited(tensors(folder)), out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return out


TABLE, LINE = "base_model.model.table.lora_embedding", "base_model.model.line.lora"


@pytest.mark.parametrize(
    ("edited", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if k != f"{TABLE}_B"}, "an embedding without its other factor"),
        (lambda t: t | {f"{TABLE}_A": torch.ones(3, 11)}, r"table.*\(11, 3\).*rank 4"),
        (lambda t: t | {f"{LINE}_B.weight": torch.ones(8, 4)}, r"line.*belong together"),
        (lambda t: t | {f"{LINE}_A.weight": torch.ones(4, 6)}, r"line.*belong together"),
        (
            lambda t: t | {f"{LINE}_A.weight": torch.ones(4, 3, 6)},
            r"a convolution of \(3, 6\) there.*\(6, 3\) here",
        ),
        (
            lambda t: t | {f"{LINE}_A.weight": torch.ones(4, 18), f"{LINE}_B.weight": torch.ones(8, 4)},
            r"a linear layer there, a convolution of \(6, 3\) here",
        ),
        (
            lambda t: t | {"base_model.model.table.lora_A.weight": torch.ones(4, 6)},
            "an embedding without its other",
        ),
    ],
)
def test_damaged_factors_are_refused_and_the_model_is_left(edited, words, tmp_path):
    theirs(tmp_path / "a")
    folder, model = changed(tmp_path / "a", tmp_path / "b", edited), net()
    with pytest.raises(ValueError, match=words):
        load_peft(model, folder)
    assert not any(isinstance(m, Adapted) for m in model.modules())


def test_a_table_is_no_linear_layer(tmp_path):
    theirs(tmp_path / "a", nn.Sequential(nn.Linear(6, 11)), target_modules=["0"])
    with pytest.raises(ValueError, match="a linear layer there, an embedding here"):
        load_peft(nn.Sequential(nn.Embedding(11, 6)), tmp_path / "a")


# ---- what stands around a model ----


def test_forms_and_reasons_follow_the_use_of_a_layer():
    assert [form_of(use_of(layer)) for layer in net().children()] == [(), (6, 3), (2, 3, 2), (3, 2, 1, 2), None]
    assert [unlike(use_of(layer), dora=False) for layer in net().children()] == [""] * 5
    assert [bool(unlike(use_of(layer), dora=True)) for layer in net().children()] == [True, *[False] * 4]


def test_a_wrapper_leaves_no_trace_in_the_folder(tmp_path):
    model = ours("lora", ["line"])
    whole = torch.compile(model)
    assert unwrapped(whole).keys() == unwrapped(model).keys()
    assert class_of(unwrapped(whole)[""]) is Net
    save_peft(model, tmp_path / "a")
    save_peft(whole, tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (
        json.loads((tmp_path / "a" / "adapter_config.json").read_text())["auto_mapping"]["base_model_class"]
        == "Net"
    )


def test_one_process_is_never_asked_to_wait():
    slot = ours("lora", ["line"]).line.slot("default")
    assert gathered(slot) is slot
    assert not resharded(net())
    done = []
    write_once(lambda: done.append(1), together=False)
    assert done == [1]
