"""PEFT's types other than LoRA on layers that are no nn.Linear: both ways where it has them, else the reason."""

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from subspan.adapt import adapt, trainable
from subspan.edit import edit
from subspan.hosts import transformers
from subspan.hosts.peft import load_peft, save_peft
from subspan.hosts.peft_beyond import unlike_on
from subspan.methods import build

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
LAYERS = {
    "turned": (lambda: Conv1D(8, 12), (4, 12)),
    "line": (lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1, dilation=2), (2, 4, 9)),
    "plane": (lambda: nn.Conv2d(4, 8, (3, 2), stride=(1, 2), padding="valid"), (2, 4, 6, 6)),
    "square": (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 6, 6)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2, padding=1, bias=False), (2, 4, 6, 6)),
    "point": (lambda: nn.Conv2d(4, 8, 1, stride=2), (2, 4, 6, 6)),
    "space": (lambda: nn.Conv3d(4, 8, 2), (2, 4, 4, 4, 4)),
    "table": (lambda: nn.Embedding(12, 8), None),
}
TARGET = {"target_modules": ["layer"]}
THEIRS = {
    "loha": lambda: peft.LoHaConfig(r=2, **TARGET),
    "lokr": lambda: peft.LoKrConfig(r=2, **TARGET),
    "vera": lambda: peft.VeraConfig(r=4, **TARGET),
    "randlora": lambda: peft.RandLoraConfig(r=2, **TARGET),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, **TARGET),
    "shira": lambda: peft.ShiraConfig(r=2, **TARGET),
    "adalora": lambda: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, **TARGET),
}
OURS = {
    "loha": {"rank": 2}, "lokr": {"rank": 2}, "vera": {"rank": 4}, "randlora": {"rank": 2, "alpha": 40.0},
    "oft": {"block": 4}, "shira": {"rank": 2}, "adalora": {"rank": 2, "start": 1.0},
}  # fmt: skip
BOTH = [
    *((kind, "turned") for kind in ("vera", "randlora", "adalora")),
    *(("loha", layer) for layer in ("line", "plane", "groups", "point")),
    ("loha", "square"), ("adalora", "square"), ("adalora", "point"), ("oft", "point"),
]  # fmt: skip


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.other = LAYERS[kind][0](), nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x)


def net(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(kind).eval()


def given(kind):
    size = LAYERS[kind][1]
    return (
        torch.arange(12)[None] if size is None else torch.randn(size, generator=torch.Generator().manual_seed(1))
    )


@torch.no_grad()
def stir(tensors):
    draw = torch.Generator().manual_seed(2)
    for p in tensors:
        p.add_(0.2 * torch.randn(p.shape, generator=draw))


def theirs(method, kind, out):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(net(kind), THEIRS[method]()).eval()
    stir(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(out)
    return model


def ours(method, kind):
    model = net(kind)
    edit(model, ["layer"], adapt(build(method, "adapter", **OURS[method])))
    stir(p for _, p in trainable(model))
    return model


@torch.no_grad()
def check_same(model, other, kind):
    """The same outputs, which are not those of the bare model."""
    x = given(kind)
    one, two = model(x), other(x)
    assert_close(one, two, rtol=0, atol=1e-5 * float(two.abs().max()))
    assert (two - net(kind)(x)).abs().max() > 1e-2 * two.abs().max()


def keys(folder):
    """Without the copies of shared matrices that PEFT keeps under every layer's name."""
    return {
        k
        for k in load_file(folder / "adapter_model.safetensors")
        if not k.endswith(("layer.randlora_A", "layer.randlora_B"))
    }


@pytest.mark.parametrize(("method", "kind"), BOTH)
def test_both_ways(method, kind, tmp_path):
    wanted, model = theirs(method, kind, tmp_path / "a"), net(kind)
    load_peft(model, tmp_path / "a")
    check_same(model, wanted, kind)
    save_peft(model, tmp_path / "b")
    assert keys(tmp_path / "a") == keys(tmp_path / "b")
    check_same(peft.PeftModel.from_pretrained(net(kind), tmp_path / "b").eval(), wanted, kind)
    mine = ours(method, kind)
    save_peft(mine, tmp_path / "c")
    check_same(peft.PeftModel.from_pretrained(net(kind), tmp_path / "c").eval(), mine, kind)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("kind", LAYERS)
def test_what_peft_has_not_is_not_written(method, kind, tmp_path):
    model = ours(method, kind) if (method, kind) != ("oft", "table") else net(kind)
    if (method, kind) in BOTH or (method, kind) == ("adalora", "plane"):
        assert unlike_on(method.upper(), net(kind).layer) == ""
        return
    assert unlike_on(method.upper(), net(kind).layer)
    if (method, kind) != ("oft", "table"):
        with pytest.raises(ValueError, match=r"^layer is an? .*PEFT.*; merge it first$"):
            save_peft(model, tmp_path / "a")
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("method", "kind", "words"),
    [
        ("oft", "square", "layer is a convolution, whose overlapping patches PEFT's OFT turns.*it is not read"),
        ("oft", "table", "an adapter on an embedding is not read"),
        ("lokr", "plane", r"lokr_w2 is \(4, 2, 3, 2\), a convolution's LoKr, which is not read; merge it"),
        ("lokr", "line", r"lokr_w2 is \(4, 2, 3\), a convolution's LoKr, which is not read; merge it"),
    ],
)  # fmt: skip
def test_what_peft_computes_otherwise_is_not_read(method, kind, words, tmp_path):
    theirs(method, kind, tmp_path / "a")
    model = net(kind)
    layer = model.layer
    with pytest.raises(ValueError, match=words):
        load_peft(model, tmp_path / "a")
    assert model.layer is layer


def test_the_reason_is_true_pefts_oft_of_a_kernel_computes_other_outputs_than_it_merges(tmp_path):
    model, x = theirs("oft", "square", tmp_path / "a"), given("square")
    with torch.no_grad():
        before = model(x)
        after = model.merge_and_unload()(x)
    assert (before - after).abs().max() > 1e-2 * after.abs().max()


def test_pissa_of_an_embedding_is_an_ordinary_lora_in_peft(tmp_path):
    config = peft.LoraConfig(r=2, init_lora_weights="pissa", **TARGET)
    wanted = peft.get_peft_model(net("table"), config).eval()
    stir(p for p in wanted.parameters() if p.requires_grad)
    assert torch.equal(wanted.base_model.model.layer.base_layer.weight, net("table").layer.weight)
    wanted.save_pretrained(tmp_path / "a")
    model = net("table")
    load_peft(model, tmp_path / "a")
    check_same(model, wanted, "table")


def test_a_shard_outside_of_the_folder_is_not_opened(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "m", max_shard_size="10KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"lm_head.weight": "', '"lm_head.weight": "../m/'))
    with pytest.raises(ValueError, match=r"names the shard '\.\./m/model.*', which leaves the folder"):
        transformers.load_folder(tmp_path / "m")
