"""Adapters on every kind of layer: forward is that of the layer with the folded matrix, and so are gradients."""

import copy
import json
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperModel,
)
from transformers.pytorch_utils import Conv1D

from subspan import site
from subspan.adapt import Adapted, Adapter, Add, FromWeight, Rescale, ZeroLowRank, adapt, layers, trainable
from subspan.adapt import merge as merged
from subspan.adapt.layers import NotAdaptable, Patches, Table, View, matrix, plain, refusal, remedy, seen, use_of
from subspan.cli import main
from subspan.edit import edit
from subspan.hosts import text
from subspan.hosts.folders import fingerprint, open_model, save_adapter, save_model
from subspan.hosts.jobs import fold
from subspan.hosts.lessons import adaptable
from subspan.hosts.transformers import LoadedModel
from subspan.methods import build
from subspan.ops import Dense, LowRank, OpConv, OpEmbedding, OpLinear
from subspan.ops.layer import Window


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


@torch.no_grad()
def drawn(module: nn.Module, seed: int = 0, size: float = 1.0) -> nn.Module:
    """The module in float64, every trainable parameter moved by random numbers."""
    module.double()
    for i, p in enumerate(p for p in module.parameters() if p.requires_grad):
        p.add_(size * rand(*p.shape, seed=seed + i))
    return module


IDS = torch.tensor([[1, 2, 8], [0, 2, 5]])
# name -> (a layer, an input)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 8), lambda: rand(2, 3, 6)),
    "conv1d of transformers": (lambda: Conv1D(8, 6), lambda: rand(2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: rand(2, 4, 11)),
    "conv1d, depthwise and causal": (lambda: nn.Conv1d(6, 6, 4, padding=3, groups=6), lambda: rand(2, 6, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(0, 2)), lambda: rand(2, 4, 8, 9)),
    "conv2d, groups, stride and dilation": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), lambda: rand(2, 4, 9, 8)
    ),
    "conv2d, groups and same": (
        lambda: nn.Conv2d(4, 8, (4, 2), padding="same", groups=4, bias=False), lambda: rand(2, 4, 7, 6)
    ),
    "conv2d, reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", groups=2), lambda: rand(2, 4, 4, 5)
    ),
    "conv2d, circular": (
        lambda: nn.Conv2d(2, 6, 3, padding=(2, 1), padding_mode="circular"), lambda: rand(2, 2, 4, 5)
    ),
    "conv2d, replicate": (
        lambda: nn.Conv2d(2, 6, 3, padding=1, padding_mode="replicate", stride=2), lambda: rand(2, 2, 4, 5)
    ),
    "conv2d, one image": (lambda: nn.Conv2d(4, 6, 2, groups=2), lambda: rand(4, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 6, (2, 1, 2), padding=1, groups=2), lambda: rand(2, 2, 3, 3, 4)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: IDS),
    "embedding, padding": (lambda: nn.Embedding(9, 6, padding_idx=2), lambda: IDS),
    "embedding, by frequency": (lambda: nn.Embedding(9, 6, scale_grad_by_freq=True), lambda: IDS),
}  # fmt: skip
PRESETS = {
    "lora": lambda: build("lora", "adapter", rank=2, alpha=3.0),
    "dora": lambda: build("dora", "adapter", rank=2, alpha=3.0),
    "pissa": lambda: build("pissa", "adapter", rank=2, alpha=3.0),
    "oft": lambda: build("oft", "adapter", block=4),
    "loha": lambda: build("loha", "adapter", rank=2, alpha=3.0),
    "lora_xs": lambda: build("lora_xs", "adapter", rank=2, alpha=3.0),
    "dora, dense": lambda: Adapter(lambda _, w: Dense(nn.Parameter(0.1 * torch.ones_like(w))), Rescale(0.5)),
}


@pytest.fixture(params=LAYERS)
def layer(request) -> tuple[nn.Module, Tensor]:
    build_layer, inputs = LAYERS[request.param]
    return drawn(build_layer()), inputs()


def folded(old: nn.Module, w: Tensor, x: Tensor) -> Tensor:
    """What an ordinary layer does with another matrix in its parameter, through torch alone."""
    shape = old.weight.shape
    kept = w.mT if isinstance(old, Conv1D) else w.reshape(shape)
    return functional_call(old, {"weight": kept}, (x,))


def put(preset: str, module: nn.Module) -> Adapted:
    made = adapt(PRESETS[preset]())("site", module)
    assert isinstance(made, Adapted)
    return drawn(made, seed=5, size=0.3)


def check_close(one: Tensor, two: Tensor) -> None:
    assert_close(one, two, rtol=1e-10, atol=1e-10)


# ---- forward, gradients, merge ----


@pytest.mark.parametrize("preset", PRESETS)
def test_forward_and_gradients_are_those_of_the_layer_with_the_folded_matrix(layer, preset):
    old, x = layer
    new = put(preset, old)
    floats = x.is_floating_point()
    x = x.requires_grad_(floats)
    tensors = [p for _, p in trainable(new)] + [x] * floats
    y, wanted = new(x), folded(old, new.matrix, x)
    check_close(y, wanted)
    assert not torch.equal(y, old(x))
    probe = rand(*y.shape, seed=8)
    pairs = zip(
        torch.autograd.grad((y * probe).sum(), tensors),
        torch.autograd.grad((wanted * probe).sum(), tensors),
        strict=True,
    )
    for one, two in pairs:
        check_close(one, two)


@pytest.mark.parametrize("preset", ["lora", "dora", "oft"])
def test_a_fresh_adapter_changes_nothing(layer, preset):
    old, x = layer
    new = adapt(PRESETS[preset]())("site", old)
    check_close(new(x), old(x))


@pytest.mark.parametrize("preset", PRESETS)
def test_merge_gives_the_same_kind_of_layer(layer, preset):
    old, x = layer
    new = put(preset, old.eval())
    plain_one = merged(new)
    assert type(plain_one) is type(old) and repr(plain_one) == repr(old) and not plain_one.training
    assert plain_one.state_dict().keys() == old.state_dict().keys()
    assert {k: v.shape for k, v in plain_one.state_dict().items()} == {
        k: v.shape for k, v in old.state_dict().items()
    }
    assert all(p.requires_grad and p.is_contiguous() for p in plain_one.parameters())
    check_close(plain_one(x), new(x))
    before = new(x).clone()
    drawn(plain_one)
    assert torch.equal(new(x), before)


def test_two_adapters_fold_in_order_and_start_on_what_is_below(layer):
    old, x = layer
    one = put("dora", old)
    below = one.matrix
    two = adapt(Adapter(FromWeight(2), Add(0.5)), "two")("site", one)
    assert isinstance(two, Adapted)
    check_close(two.slot("two").op.dense(), FromWeight(2)("site", below).dense())
    check_close(two(x), folded(old, below + 0.5 * two.slot("two").op.dense(), x))
    two.active = ("two",)
    check_close(two(x), folded(old, matrix(old) + 0.5 * two.slot("two").op.dense(), x))
    two.active = ()
    assert torch.equal(two(x), old(x)) and torch.equal(two.matrix, matrix(old))


def test_the_base_is_a_frozen_double_over_the_same_storage(layer):
    old, _ = layer
    new = put("lora", old)
    assert old.weight.requires_grad and not new.base.weight.requires_grad
    assert new.base.weight.data_ptr() == old.weight.data_ptr()
    assert [name for name, _ in trainable(new)] == ["adapters.default.op.u", "adapters.default.op.v"]


def test_a_start_that_takes_from_the_base_leaves_the_original_and_its_kind(layer):
    old, _ = layer
    before = old.weight.clone()
    new = adapt(PRESETS["pissa"]())("site", old)
    assert isinstance(new, Adapted) and type(new.base) is type(old)
    assert torch.equal(old.weight, before) and torch.equal(new.origin.weight, before)
    check_close(new.matrix, matrix(old))
    left, all_of_it = torch.linalg.svdvals(matrix(new.base)), torch.linalg.svdvals(matrix(old))
    check_close(left[:-2], all_of_it[2:])
    check_close(left[-2:], torch.zeros(2).double())


def test_the_weight_is_read_as_that_of_the_layer_and_so_are_its_numbers(layer):
    old, _ = layer
    new = put("lora", old)
    assert new.weight.shape == (old.weight.mT.shape if isinstance(old, Conv1D) else old.weight.shape)
    assert torch.equal(new.weight.flatten(1), new.matrix)
    for name in ("stride", "kernel_size", "groups", "padding_idx", "num_embeddings", "nx", "in_channels"):
        assert vars(new).get(name) == vars(old).get(name)
    assert (new.out_features, new.in_features) == tuple(new.matrix.shape)


def test_copies_and_pickles_and_states_come_back(layer):
    old, x = layer
    new = put("dora", old)
    assert torch.equal(copy.deepcopy(new)(x), new(x))
    assert torch.equal(pickle.loads(pickle.dumps(new))(x), new(x))
    other = put("dora", drawn(copy.deepcopy(old), seed=9))
    assert not torch.equal(other(x), new(x))
    other.load_state_dict(new.state_dict())
    assert torch.equal(other(x), new(x))


@pytest.mark.parametrize("preset", ["lora", "dora", "oft"])
def test_compressed_layers_carry_adapters_and_merge_to_their_kind(layer, preset):
    old, x = layer
    u, s, v = torch.linalg.svd(matrix(old).detach(), full_matrices=False)
    op = LowRank((u * s)[:, :3].contiguous(), v[:3].contiguous())
    small = site.of(old).rebuild(old, op, site.bias(old))
    new = put(preset, small)
    wanted = plain(small, new.matrix)
    assert type(wanted) is type(old)
    check_close(new(x), wanted(x))
    assert type(merged(new)) is type(old)
    check_close(merged(new)(x), new(x))


@pytest.mark.parametrize("name", ["conv1d of transformers", "conv2d, groups and same", "embedding"])
@pytest.mark.parametrize("preset", ["lora", "dora", "oft"])
def test_half_precision_layers_get_float32_adapters(name, preset):
    old = drawn(LAYERS[name][0]()).bfloat16()
    x = LAYERS[name][1]()
    x = x.bfloat16() if x.is_floating_point() else x
    new = adapt(PRESETS[preset]())("site", old)
    assert isinstance(new, Adapted) and {p.dtype for _, p in trainable(new)} == {torch.float32}
    assert new(x).dtype == new.weight.dtype == merged(new).weight.dtype == torch.bfloat16
    with torch.no_grad():
        for _, p in trainable(new):
            p.add_(0.3 * rand(*p.shape).float())
    wide = x.double() if x.is_floating_point() else x
    exact = folded(copy.deepcopy(old).double(), new.folded(new.active).weight.double(), wide)
    assert_close(new(x).double(), exact, rtol=0, atol=2**-7 * exact.abs().max().item())


@pytest.mark.parametrize("preset", ["lora", "dora", "oft"])
def test_compiled_whole_they_compute_the_same(preset):
    net = nn.Sequential(nn.Embedding(9, 6, padding_idx=2), Conv1D(8, 6), nn.Conv1d(3, 6, 3, dilation=2, groups=3))
    edit(net, ["0", "1", "2"], lambda _, layer: put(preset, drawn(layer)))
    x = torch.cat([IDS, IDS[:1]]).T
    torch.compiler.reset()
    check_close(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))


@pytest.mark.parametrize("preset", ["lora", "dora", "oft"])
def test_autocast_convolves_in_half_with_a_matrix_joined_in_full(preset):
    new, x = put(preset, nn.Conv2d(4, 6, 3, groups=2)).float(), rand(2, 4, 5, 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = new(x)
        assert torch.equal(new.matrix, new.float().matrix) and y.dtype == torch.bfloat16
    exact = new(x)
    assert_close(y.float(), exact, rtol=0, atol=2**-6 * exact.abs().max().item())
    assert not torch.equal(y.float(), exact)


# ---- the parts ----


def test_a_low_rank_convolution_in_groups_is_narrow_in_each():
    conv = drawn(nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False))
    window, op = Window.of(conv), LowRank(rand(6, 2), rand(2, 18))
    x = rand(2, 4, 5, 5)
    wanted = F.conv2d(x, op.dense().reshape(6, 2, 3, 3), padding=1, groups=2)
    check_close(window.through(x, op), wanted)
    check_close(OpConv(op, window=window)(x), wanted)
    back = OpConv(op, window=window).plain(op.dense())
    assert repr(back) == repr(conv)
    check_close(back(x), wanted)
    assert torch.equal(window.kernels(op.dense()), back.weight)
    assert torch.equal(OpConv(op, window=window).weight, back.weight)


def test_a_table_of_low_rank_never_forms_its_matrix(monkeypatch):
    op = LowRank(rand(9, 2).requires_grad_(), rand(2, 4).requires_grad_())
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("formed"))
    check_close(Table().op(IDS, op), (op.u @ op.v)[IDS])


def test_layers_know_how_they_use_their_matrix():
    conv, table, linear = nn.Conv2d(2, 4, 3, groups=2), nn.Embedding(5, 3, padding_idx=1), nn.Linear(3, 4)
    assert use_of(conv) == Patches(Window.of(conv)) and use_of(table) == Table(1)
    assert use_of(site.of(table).rebuild(table, Dense(table.weight), None)) == Table(1)
    assert use_of(linear) is None and use_of(Conv1D(3, 2)) is None
    assert seen(linear) is linear and isinstance(seen(Conv1D(3, 2)), View)
    turned = Conv1D(3, 2)
    assert torch.equal(View(turned).weight, turned.weight.mT) and View(turned).bias is turned.bias
    assert torch.equal(View(turned)(torch.eye(2)), turned(torch.eye(2)))
    every = (conv, table, linear, turned, OpLinear(Dense(rand(2, 3))), OpEmbedding(Dense(rand(4, 3))))
    assert [layers.shape(m) for m in every] == [tuple(matrix(m).shape) for m in every]


def test_a_matrix_in_the_shape_of_the_parameter_is_seen_as_it_was(layer):
    old, _ = layer
    kind, w = site.of(old), rand(*matrix(old).shape)
    assert torch.equal(kind.view(old, kind.kept(old, w)), w)
    assert kind.kept(old, w).shape == old.weight.shape


# ---- what is refused ----


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.up = 2, nn.Parameter(rand(2, 4, 3))


class Doubled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.LayerNorm(4), "cannot adapt LayerNorm: it is none of nn.Linear"),
        (nn.ConvTranspose2d(2, 2, 2), "cannot adapt ConvTranspose2d"),
        (Doubled(4, 4), "cannot adapt Doubled.*forward of its own"),
        (nn.Embedding(4, 4, max_norm=1.0), "cannot adapt Embedding: it rescales its rows to max_norm"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_named_with_the_remedy(module, words):
    make = adapt(Adapter(ZeroLowRank(2), Add()))
    for kind in (TypeError, ValueError, NotAdaptable):
        with pytest.raises(kind, match=rf"^h\.0\.x: {words}.*; leave it out with '!h\.0\.x'$"):
            make("h.0.x", module)
    with pytest.raises(NotAdaptable, match="cannot adapt"):
        Adapted(module)
    assert refusal(module)


def test_experts_are_left_out_unless_they_are_named():
    model = nn.ModuleDict({"0": nn.Linear(3, 3), "mlp": nn.ModuleDict({"experts": Experts()})})
    assert adaptable(model) == ["0"]
    name, expert = "mlp.experts.1.up", site.Expert(model["mlp"]["experts"], "up", 1)
    assert adaptable(model, "*") == ["0", "mlp.experts.0.up", name] and refusal(expert) == ""
    assert adaptable(model, "!*experts.*") == ["0"] and remedy(name, expert) == "!*experts.*"


def test_a_convolution_in_groups_is_adapted_when_it_is_named():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 4))
    assert adaptable(model) == ["1"] and adaptable(model, "0|1") == ["0", "1"]


def test_a_rank_or_a_block_that_a_layer_cannot_have_names_the_site():
    conv = nn.Conv2d(1, 5, 1)
    with pytest.raises(ValueError, match=r"stem: rank 2"):
        adapt(build("lora", "adapter", rank=2, alpha=1.0))("stem", conv)
    with pytest.raises(ValueError, match=r"stem: no block in 2\.\.4 divides 1 inputs"):
        adapt(build("oft", "adapter", block=4))("stem", conv)


# ---- whole models ----

TOKENS = torch.arange(2 * 12).reshape(2, 12) * 37 % 300


def gpt2(*, tie: bool = True) -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
            tie_word_embeddings=tie, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=text.train_tokenizer(text.prose()[:20_000], 300))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, words):
    """GPT-2 folders, tied and not."""
    root = tmp_path_factory.mktemp("gpt2")
    for tie in (True, False):
        save_model(root / str(tie), LoadedModel(gpt2(tie=tie), words, "tiny"))
    return root


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


@torch.no_grad()
def drawn_like(model: nn.Module) -> None:
    """Every tensor of the adapters moved."""
    for i, (_, p) in enumerate(trainable(model)):
        p.add_(0.3 * rand(*p.shape, seed=i).to(p))


def called(capsys, *args: object, code: int = 0) -> str:
    """What the command line prints on stdout."""
    capsys.readouterr()
    left = 0
    try:
        main([str(arg) for arg in args])
    except SystemExit as leave:
        left = leave.code or 0
    said = capsys.readouterr()
    assert left == code, said
    return said.out


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "oft"])
def test_an_adapter_on_conv1d_and_embeddings_comes_back_bit_for_bit(folders, tmp_path, words, method):
    source = str(folders / "False")
    model = open_model(source).model
    before = fingerprint(model)
    names = adaptable(model, "*.c_attn|*.c_proj|*.c_fc|*.wte|*.wpe|lm_head")
    args = {"block": 4} if method == "oft" else {"rank": 2, "alpha": 3.0}
    edit(model, names, adapt(build(method, "adapter", **args)))
    assert len(names) == 11 and fingerprint(model) == before
    drawn_like(model)
    save_adapter(tmp_path / "a", model, method=method, args=args, source=source)
    read = open_model(tmp_path / "a").model
    assert torch.equal(logits(read), logits(model))
    assert not torch.allclose(logits(read), logits(gpt2(tie=False)), atol=0.01)
    assert fold(read) == 11
    assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-4)
    save_model(tmp_path / "m", LoadedModel(read, words, "tiny"))
    assert torch.equal(logits(open_model(tmp_path / "m").model), logits(read))
    assert isinstance(read.get_submodule("transformer.h.0.attn.c_attn"), Conv1D)
    assert isinstance(read.get_submodule("transformer.wte"), nn.Embedding)


def test_the_command_line_finetunes_gpt2(folders, tmp_path, capsys):
    page, out = tmp_path / "page.txt", tmp_path / "lora"
    page.write_text(text.prose()[20_000:26_000], encoding="utf-8")
    args = ["finetune", folders / "True", "--method", "lora", "--rank", "2", "--data", page, "--steps", "3"]
    found = json.loads(called(capsys, *args, "--window", "16", "-o", out, "--json"))
    assert found["validation_after"] < found["validation_before"]
    read = open_model(out).model
    carried = [name for name, m in read.named_modules() if isinstance(m, Adapted)]
    assert carried == [f"transformer.h.{i}.{key}" for i in range(2)
                       for key in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
    assert found["parameters"] == 2 * 2 * sum(m + n for m, n in [(48, 16), (16, 16), (64, 16), (16, 64)])


def test_the_command_line_refuses_a_tied_head_in_one_line(folders, tmp_path, capsys):
    page = tmp_path / "page.txt"
    page.write_text(text.prose()[20_000:26_000], encoding="utf-8")
    args = ["finetune", folders / "True", "--method", "lora", "--data", page, "--select", "lm_head"]
    said = called(capsys, *args, "--window", "16", "-o", tmp_path / "out", "--json", code=1)
    assert json.loads(said)["error"].startswith("lm_head shares its weight with transformer.wte")
    assert not (tmp_path / "out").exists()


def moved(model: nn.Module, names: list[str], method: str, **args: float) -> None:
    edit(model, names, adapt(build(method, "adapter", **args)))
    drawn_like(model)


@pytest.mark.parametrize(("method", "args"), [("lora", {"rank": 2}), ("dora", {"rank": 2}), ("oft", {"block": 2})])
def test_a_depthwise_convolution_whose_weight_the_host_reads_itself(method, args):
    sizes = {"vocab_size": 50, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MambaForCausalLM(MambaConfig(**sizes)).double().eval()
    ids, wanted = (
        TOKENS[:, :6] % 50,
        {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None},
    )
    with torch.no_grad():
        before = model(input_ids=ids).logits
        moved(model, [f"backbone.layers.{i}.mixer.conv1d" for i in range(2)], method, **args)
        said, longer = model(input_ids=ids).logits, model.generate(ids, **wanted)
        assert fold(model) == 2 and (said - before).abs().max() > 0.01
        check_close(model(input_ids=ids).logits, said)
    assert torch.equal(model.generate(ids, **wanted), longer)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_convolutions_whose_stride_the_host_reads_itself(method):
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 8)
    sizes |= dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | {"max_source_positions": 6}
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = WhisperConfig(
            vocab_size=60, num_mel_bins=4, max_target_positions=8, init_std=0.3, **sizes, **special
        )
        model = WhisperModel(config).double().eval()
    inputs = {"input_features": rand(2, 4, 12), "decoder_input_ids": torch.tensor([[1, 3], [1, 0]])}
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        moved(model, ["encoder.conv1", "encoder.conv2", "decoder.embed_tokens"], method, rank=2)
        said = model(**inputs).last_hidden_state
        assert fold(model) == 3 and (said - before).abs().max() > 0.01
        check_close(model(**inputs).last_hidden_state, said)


# ---- ties ----


@pytest.mark.parametrize("name", ["lm_head", "transformer.wte"])
def test_a_tied_head_or_table_is_refused_by_either_name(name):
    other = {"lm_head": "transformer.wte", "transformer.wte": "lm_head"}[name]
    with pytest.raises(
        ValueError, match=rf"{re.escape(name)} shares its weight with {re.escape(other)}.*'!{name}'"
    ):
        adaptable(gpt2(), name)


def test_an_adapter_on_one_of_a_tie_leaves_the_other_and_is_kept_when_merged(tmp_path, words):
    model = gpt2()
    edit(model, "lm_head", adapt(build("lora", "adapter", rank=2, alpha=3.0)), tied="share")
    drawn_like(model)
    assert torch.equal(model.transformer.wte.weight, gpt2().transformer.wte.weight)
    said = logits(model)
    fold(model)
    save_model(tmp_path / "m", LoadedModel(model, words, "tiny"))
    assert_close(logits(open_model(tmp_path / "m").model), said, rtol=1e-4, atol=1e-4)
