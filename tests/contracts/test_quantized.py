"""Matrices of few bits: each entry is the nearest level; a product is that of the dense twin, and keeps none."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from subspan.adapt import Adapted, adapt, merge, trainable
from subspan.codec import EVEN8, NF4, NORMAL4, Even8, looked_up
from subspan.hosts.quantizer import code_of, few_bits, narrow, narrowed, widen
from subspan.methods import build
from subspan.ops import Dense, OpLinear, Quantized, quantize
from subspan.ops.quantized import bits_of, decoded

LEVELS = {"int8": EVEN8, "nf4": NORMAL4}
every = pytest.mark.parametrize("code", LEVELS)
shapes = pytest.mark.parametrize(("n", "block"), [(128, 64), (70, 32), (33, 16), (7, 64)])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def largest(w, block):
    """The largest magnitude of each entry's block, (m, n)."""
    parts = [part.abs().amax(1, keepdim=True).expand_as(part) for part in w.split(block, 1)]
    return torch.cat(parts, 1)


# ---- levels


def test_the_levels_of_nf4_are_quantiles_of_a_normal_distribution_over_the_largest():
    edge = 1 - (1 / 30 + 1 / 32) / 2
    above, below = (torch.special.ndtri(torch.linspace(edge, 0.5, k, dtype=torch.float64)[:-1]) for k in (9, 8))
    wanted = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    assert_close(torch.tensor(NORMAL4, dtype=torch.float64), wanted / wanted.abs().max(), rtol=0, atol=2e-7)


def test_the_levels_of_int8_are_evenly_spaced_from_minus_one_to_one():
    assert len(EVEN8) == 255 and (EVEN8[0], EVEN8[127], EVEN8[-1]) == (-1.0, 0.0, 1.0)
    steps = torch.tensor(EVEN8, dtype=torch.float64).diff()
    assert_close(steps, torch.full_like(steps, 1 / 127), rtol=1e-13, atol=0)


@every
@shapes
def test_every_entry_is_the_nearest_level(code, n, block):
    w = draw(5, n)
    choices = torch.tensor(LEVELS[code], dtype=w.dtype) * largest(w, block).unsqueeze(-1)
    best = (choices - w.unsqueeze(-1)).abs().amin(-1)
    assert_close((quantize(w, code, block).dense() - w).abs(), best, rtol=1e-9, atol=1e-14)


@every
@shapes
def test_no_entry_is_off_by_more_than_half_a_step_of_its_block(code, n, block):
    w = draw(5, n, seed=1)
    step = max(b - a for a, b in itertools.pairwise(LEVELS[code]))
    error = (quantize(w, code, block).dense() - w).abs()
    assert (error <= step / 2 * largest(w, block) * (1 + 1e-12)).all() and error.max() > 0
    assert step == pytest.approx(1 / 127 if code == "int8" else 1 - 0.6961928009986877)


@every
def test_zero_and_the_largest_of_a_block_are_kept_and_blocks_know_nothing_of_one_another(code):
    w = draw(4, 64)
    w[0, :32], w[1, 3] = 0, -9
    made = quantize(w, code, 32).dense()
    assert (made[0, :32] == 0).all() and made[1, 3] == -9
    at = largest(w, 32) == w.abs()
    assert torch.equal(made[at], w[at])
    parts = [torch.cat([quantize(part, code, 32).dense() for part in row.split(32, 1)], 1) for row in w.split(1)]
    assert torch.equal(made, torch.cat(parts))


@every
def test_what_is_quantized_already_is_kept(code):
    once = quantize(draw(6, 96), code, 32)
    again = quantize(once.dense(), code, 32)
    assert torch.equal(again.codes, once.codes) and torch.equal(again.scale, once.scale)


@pytest.mark.parametrize("codec", [Even8(32), NF4(32)])
def test_the_op_is_what_the_codec_makes_of_rows(codec):
    w = draw(3, 5, 70)
    code = "int8" if isinstance(codec, Even8) else "nf4"
    stored = codec.encode(w)
    alone = torch.stack([quantize(part, code, 32).dense() for part in w])
    assert torch.equal(codec.decode(stored), alone)
    assert bits_of(code) == 8 * sum(t.numel() for key, t in stored.items() if key != "absmax") / w.numel()
    if code == "int8":
        assert torch.equal(looked_up(stored, EVEN8, 32), alone)


# ---- precision and bytes


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_matrix_of_half_precision_has_exact_scales_and_is_rounded_once(code, dtype):
    w = draw(8, 128, dtype=dtype)
    op = quantize(w, code, 64)
    assert op.scale.dtype == dtype
    assert torch.equal(op.scale, w.unflatten(1, (2, 64)).abs().amax(-1))
    wide = decoded(op.codes, op.scale.float(), 128, code, 64)
    assert torch.equal(op.dense(), wide.to(dtype))
    assert torch.equal(op.codes, quantize(w.float(), code, 64).codes)


@every
@pytest.mark.parametrize(("m", "n", "dtype"), [(48, 256, torch.float32), (7, 65, torch.bfloat16)])
def test_the_bytes_are_those_of_the_codes_and_one_scale_a_block(code, m, n, dtype):
    op = quantize(draw(m, n, dtype=dtype), code, 64)
    held = sum(t.numel() * t.element_size() for t in op.state_dict().values())
    assert held == m * (-(-n * bits_of(code) // 8) + -(-n // 64) * dtype.itemsize)
    assert op.codes.dtype == torch.uint8 and not op.scale.requires_grad


@every
def test_a_cast_changes_the_scales_and_not_the_codes(code):
    op = quantize(draw(4, 64, dtype=torch.float32), code)
    codes, scale = op.codes.clone(), op.scale.detach().clone()
    op.to(torch.bfloat16)
    assert torch.equal(op.codes, codes) and torch.equal(op.scale, scale.bfloat16())
    assert op.dense().dtype == torch.bfloat16


# ---- products


@every
@pytest.mark.parametrize("back", [False, True])
def test_the_gradient_is_that_of_the_dense_twin(code, back):
    op = quantize(draw(24, 40), code, 16)
    twin = Dense(op.dense().clone())
    one, two = (draw(2, 3, 24 if back else 40).requires_grad_() for _ in range(2))
    for x, made in ((one, op), (two, twin)):
        (made.back(x) if back else made(x)).square().sum().backward()
    assert_close(one.grad, two.grad, rtol=1e-14, atol=0)


@every
@pytest.mark.parametrize("trained", [False, True])
def test_nothing_as_large_as_the_matrix_is_kept_for_the_backward_pass(code, trained):
    op = quantize(draw(96, 128), code)
    op.scale.requires_grad_(trained)
    kept = []

    def keep(t):
        kept.append(t)
        return t

    x = draw(5, 128).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = op(x)
    # Not the input either, unless the scales train.
    sizes = sorted(t.numel() * t.element_size() for t in kept)
    wanted = [op.codes.numel(), op.scale.numel() * 8] + ([x.numel() * 8] if trained else [])
    assert sizes == sorted(wanted) and max(sizes) < 96 * 128 * 8
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_close(grad, op.dense().detach().sum(0).expand(5, 128))


@every
def test_scales_can_train_and_have_the_gradient_of_their_block(code):
    op = quantize(draw(6, 64), code, 32)
    op.scale.requires_grad_()
    x = draw(9, 64)
    op(x).square().sum().backward()
    level = decoded(op.codes, torch.ones_like(op.scale), 64, code, 32)
    full = 2 * (x @ op.dense().detach().mT).mT @ x
    assert_close(op.scale.grad, (full * level).unflatten(1, (2, 32)).sum(-1))


@every
def test_under_autocast_it_does_what_a_dense_matrix_does(code):
    op = quantize(draw(24, 40, dtype=torch.float32), code, 16)
    twin = Dense(op.dense().clone())
    one, two = (draw(4, 40, dtype=torch.float32).requires_grad_() for _ in range(2))
    found = []
    for x, made in ((one, op), (two, twin)):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(made(x))
        found[-1].float().square().sum().backward()
    assert found[0].dtype == torch.bfloat16 and torch.equal(*found)
    assert_close(one.grad, two.grad, rtol=2**-7, atol=2**-7 * float(two.grad.abs().max()))


# ---- as the base of adapters


@every
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_on_it_have_the_gradients_of_those_on_its_dense_twin(code, method):
    torch.manual_seed(0)
    op, bias = quantize(draw(24, 40, dtype=torch.float32), code, 16), draw(24, dtype=torch.float32)
    x, found = draw(6, 40, dtype=torch.float32), []
    for base in (OpLinear(op, bias), OpLinear(Dense(op.dense().clone()), bias)):
        torch.manual_seed(1)
        layer = adapt(build(method, "adapter", rank=3))("site", base)
        with torch.no_grad():
            for name, p in trainable(layer):
                p.add_(draw(*p.shape, seed=len(name), dtype=torch.float32), alpha=0.1)
        y = layer(x)
        y.square().sum().backward()
        found.append([y, *(p.grad for _, p in trainable(layer))])
    assert len(found[0]) == (4 if method == "dora" else 3)
    assert [torch.equal(a, b) for a, b in zip(*found, strict=True)] == [True] * len(found[0])


@every
def test_a_merge_adds_to_what_the_codes_stand_for_and_rounds_once(code):
    base = OpLinear(quantize(draw(24, 40, dtype=torch.bfloat16), code, 16))
    layer = adapt(build("lora", "adapter", rank=3, alpha=6.0))("site", base)
    slot = layer.slot("default")
    with torch.no_grad():
        slot.op.u.add_(draw(24, 3, dtype=slot.op.u.dtype))
    made = merge(layer)
    sum_ = base.op.dense().float() + 2.0 * slot.op.u.float() @ slot.op.v.float()
    assert type(made) is nn.Linear and torch.equal(made.weight, sum_.bfloat16())


# ---- models


def test_a_model_held_in_few_bits_is_that_of_its_matrices_and_can_be_undone():
    torch.manual_seed(0)
    net = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(64, 32), nn.Linear(32, 16, bias=False)])}).double()
    x, olds = draw(3, 64), list(net["layers"])
    done = narrow(net, 4, block=32)
    assert list(done) == ["layers.0", "layers.1"] and all(map(narrowed, net["layers"]))
    for old, new in zip(olds, net["layers"], strict=True):
        assert torch.equal(new.weight, quantize(old.weight, "nf4", 32).dense())
        assert not any(p.requires_grad for p in new.parameters())
    assert_close(net["layers"][0](x), F.linear(x, net["layers"][0].weight, olds[0].bias))
    wide = widen(net)
    assert [type(m) for m in net["layers"]] == [nn.Linear] * 2
    assert_close(net["layers"][0](x), F.linear(x, quantize(olds[0].weight, "nf4", 32).dense(), olds[0].bias))
    wide.undo()
    done.undo()
    assert list(net["layers"]) == olds
    assert [*narrow(net, 8, select="layers.1")] == ["layers.1"]


def test_an_adapter_holds_the_codes_once():
    layer = OpLinear(quantize(draw(24, 40, dtype=torch.float32)), draw(24, dtype=torch.float32))
    made = adapt(build("lora", "adapter", rank=3))("site", layer)
    assert isinstance(made, Adapted) and made.base.op.codes is layer.op.codes


# ---- refusals


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: quantize(draw(2, 4), "nf5"), r"no code 'nf5'; use 'int8' or 'nf4'"),
        (lambda: quantize(draw(2, 4), "nf4", 3), r"block=3 of 4 bits each are no whole bytes"),
        (lambda: quantize(draw(2, 4), "int8", 0), r"block=0"),
        (lambda: quantize(draw(4)), r"w \(4,\) must be a matrix of finite numbers"),
        (lambda: quantize(draw(2, 4) / 0), r"w \(2, 4\) must be a matrix of finite numbers"),
        (
            lambda: Quantized(torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 1), 6),
            r"codes \(2, 4\) and scale \(2, 1\) are no 2 rows of 6 in nf4 by blocks of 64, which are \(2, 3\)",
        ),
        (lambda: Even8(0), "Even8: block=0"),
        (lambda: NF4(-1), "NF4: block=-1"),
        (lambda: narrow(nn.ModuleList([nn.Linear(2, 2)]), 3), "a base of 3 bits is not known; use 4 or 8"),
        (lambda: code_of(16), "16 bits"),
    ],
)
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_folder_that_says_nonsense_of_its_bits_is_damaged(tmp_path):
    assert few_bits(tmp_path) is None
    told = '{"format": 1, "library": "0", "sites": [], "quantized": %s}'
    for said in ('{"bits": 5, "block": 64, "dtype": "float32"}', '{"bits": 4}', '"four"'):
        (tmp_path / "subspan.json").write_text(told % said)
        with pytest.raises(ValueError, match="is damaged: quantized is"):
            few_bits(tmp_path)
    (tmp_path / "subspan.json").write_text(told % '{"bits": 4, "block": 64, "dtype": "bfloat16"}')
    assert few_bits(tmp_path) == {"bits": 4, "block": 64, "dtype": torch.bfloat16}
