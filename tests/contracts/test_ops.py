"""Every op keeps the LinOp contract: a new op adds one row and inherits every test."""

import inspect
import json
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from subspan import io
from subspan.ops import (
    BlockCayley,
    Columns,
    Dense,
    Diag,
    Entries,
    Hadamard,
    Kron,
    LinOp,
    LowRank,
    OpLinear,
    Product,
    Scaled,
    Seeded,
    Shards,
    Stacked,
    Sum,
    Transposed,
    Zero,
    factors,
    quantize,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


ROWS: dict[str, Callable[[], LinOp]] = {
    "dense": lambda: Dense(rand(5, 4)),
    "diag": lambda: Diag(rand(4)),
    "lowrank": lambda: LowRank(rand(5, 2), rand(2, 4)),
    "lowrank-1": lambda: LowRank(rand(5, 1), rand(1, 4)),
    "sum": lambda: Sum([Dense(rand(5, 4)), LowRank(rand(5, 2), rand(2, 4)), Dense(rand(5, 4, seed=1))]),
    "product": lambda: Product([Dense(rand(5, 3)), Diag(rand(3)), Dense(rand(3, 4))]),
    "scaled": lambda: Scaled(LowRank(rand(5, 2), rand(2, 4)), -1.5),
    "transposed": lambda: Transposed(LowRank(rand(4, 2), rand(2, 5))),
    "nested": lambda: Sum(
        [
            Product([Diag(rand(5)), Scaled(Transposed(Dense(rand(4, 5))), 0.3), Diag(rand(4))]),
            Transposed(Sum([Dense(rand(4, 5, seed=2)), Scaled(LowRank(rand(4, 2), rand(2, 5)), 2.0)])),
        ]
    ),
    "kron": lambda: Kron(Dense(rand(2, 3)), Dense(rand(3, 2))),
    "kron-wide": lambda: Kron(Diag(rand(2)), LowRank(rand(2, 1), rand(1, 4))),
    "kron-tall": lambda: Kron(Dense(rand(4, 1)), Dense(rand(2, 3))),
    "hadamard": lambda: Hadamard(LowRank(rand(5, 1), rand(1, 4)), LowRank(rand(5, 2), rand(2, 4))),
    "hadamard-formed": lambda: Hadamard(LowRank(rand(5, 2), rand(2, 4)), LowRank(rand(5, 3), rand(3, 4))),
    "entries": lambda: Entries(torch.tensor([0, 7, 9]), rand(3), 5, 4),
    "entries-formed": lambda: Entries(torch.arange(1, 20, dtype=torch.int32), rand(19), 5, 4),
    "columns": lambda: Columns(torch.tensor([3, 1], dtype=torch.int32), rand(5, 2), 4),
    "stacked": lambda: Stacked(Dense(rand(2, 4)), rand(3, 2), rand(3, 4)),
    "stacked-seeded": lambda: Stacked(Transposed(Seeded(1, 4, 2).double()), rand(3, 2), rand(3, 4)),
    "shards": lambda: Shards(rand(3, 2), torch.tensor([2, 0, 1, 1, 0, 2, 0, 1, 2, 2], dtype=torch.int32), 2),
    "cayley": lambda: BlockCayley(rand(2, 3)),
    "cayley-pairs": lambda: BlockCayley(rand(2, 1)),
    "seeded": lambda: Seeded(3, 5, 4, scale=0.5).double(),
    "seeded-ternary": lambda: Seeded(3, 5, 4, "ternary").double(),
    "zero": lambda: Zero(5, 4).double(),
    "quantized-8": lambda: quantize(rand(5, 4), "int8", 3),
    "quantized-4": lambda: quantize(rand(5, 4), "nf4", 2),
    "quantized-odd": lambda: quantize(rand(4, 7), "nf4", 4),
}
FROZEN = {"seeded", "seeded-ternary", "zero"}


@pytest.fixture(params=ROWS)
def op(request) -> LinOp:
    return ROWS[request.param]()


def test_shape_is_that_of_dense(op):
    assert op.shape == tuple(op.dense().shape)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_forward_is_multiplication_by_dense(op, batch):
    x = rand(*batch, op.shape[1])
    assert_close(op(x), x @ op.dense().mT)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_back_is_multiplication_by_the_transpose(op, batch):
    x = rand(*batch, op.shape[0])
    assert_close(op.back(x), x @ op.dense())


def test_back_is_the_adjoint_of_forward(op):
    x, y = rand(7, op.shape[1]), rand(7, op.shape[0])
    assert_close((op(x) * y).sum(), (x * op.back(y)).sum())


def test_transposing_twice_gives_the_op_itself(op):
    inner = op.op if isinstance(op, Transposed) else op
    assert inner.T.T is inner
    assert op.T is inner or op.T.T is op
    assert torch.equal(op.T.T.dense(), op.dense())


def test_transpose_swaps_forward_and_back_and_shares_parameters(op):
    assert op.T.shape == op.shape[::-1]
    assert_close(op.T.dense(), op.dense().mT, rtol=0, atol=0)
    assert_close(op.T(x := rand(3, op.shape[0])), op.back(x), rtol=0, atol=0)
    assert_close(op.T.back(y := rand(3, op.shape[1])), op(y), rtol=0, atol=0)
    assert {id(p) for p in op.T.parameters()} == {id(p) for p in op.parameters()}


def test_operators_are_the_algebra_of_dense_matrices(op):
    left, right = Dense(rand(3, op.shape[0])), Dense(rand(op.shape[1], 2))
    assert_close((op + op).dense(), 2 * op.dense())
    assert_close((left @ op @ right).dense(), left.dense() @ op.dense() @ right.dense())
    assert_close((-2 * op).dense(), -2 * op.dense())
    assert_close((op * -2).dense(), (-2 * op).dense(), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["forward", "back", "dense"])
def test_gradients_of_input_and_every_parameter(op, method):
    names = [name for name, _ in op.named_parameters()]
    x = rand(2, op.shape[0] if method == "back" else op.shape[1])

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.op = op

        def forward(self, x):
            return op.dense() if method == "dense" else getattr(op, method)(x)

    def function(x, *values):
        tensors = {f"op.{name}": value for name, value in zip(names, values, strict=True)}
        return functional_call(Call(), tensors, (x,))

    assert bool(names) != isinstance(op, Seeded | Zero)
    assert torch.autograd.gradcheck(function, (x, *(p.detach().requires_grad_() for p in op.parameters())))


def test_constructor_arguments_are_attributes_that_rebuild_the_op(op):
    arguments = list(inspect.signature(type(op).__init__).parameters)[1:]
    values = {name: getattr(op, name) for name in arguments}
    values = {k: list(v) if isinstance(v, nn.ModuleList) else v for k, v in values.items()}
    for value in values.values():
        allowed = (torch.Tensor, LinOp, int, float, str)
        assert all(isinstance(v, allowed) for v in (value if isinstance(value, list) else [value]))
    assert torch.equal(type(op)(**values).to(op.dense().dtype).dense(), op.dense())


def test_a_saved_op_comes_back_from_its_description_and_its_tensors(op, tmp_path):
    io.write_tensors(tmp_path / "op", op.state_dict())
    again = io.build(json.loads(json.dumps(io.spec(op)))).double()
    io.fill(again.state_dict(keep_vars=True), io.read_tensors(tmp_path / "op"), "op")
    assert torch.equal(again.dense(), op.dense())


def test_state_dict_keys_start_with_constructor_arguments(op):
    arguments = set(inspect.signature(type(op).__init__).parameters) - {"self"}
    assert {key.partition(".")[0] for key in op.state_dict()} <= arguments
    whole = [key for key, t in op.state_dict().items() if not t.is_floating_point()]
    assert len(op.state_dict()) == len(list(op.parameters())) + len(whole)
    assert all(key.rpartition(".")[2] in ("index", "codes") for key in whole)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in FROZEN])
def test_state_dict_carries_everything_that_trains(name):
    op = ROWS[name]()
    saved = {k: v.clone() for k, v in op.state_dict().items()}
    before = op.dense().detach().clone()
    with torch.no_grad():
        for p in op.parameters():
            p.add_(1)
    assert not torch.allclose(op.dense(), before)
    op.load_state_dict(saved)
    assert torch.equal(op.dense(), before)


def test_ops_keep_a_parameter_and_freeze_a_plain_tensor():
    mine = nn.Parameter(torch.ones(2, 2))
    assert Dense(mine).w is mine
    assert not Dense(torch.ones(2, 2)).w.requires_grad
    assert Dense(torch.ones(2, 2, requires_grad=True)).w.requires_grad


@pytest.mark.parametrize("with_bias", [True, False])
def test_oplinear_is_linear_with_the_dense_weight(op, with_bias):
    bias = rand(op.shape[0]) if with_bias else None
    layer = OpLinear(op, bias)
    x = rand(2, 3, op.shape[1])
    assert_close(layer(x), nn.functional.linear(x, layer.weight, bias))
    assert (layer.out_features, layer.in_features) == op.shape


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LowRank(torch.ones(3, 2), torch.ones(1, 4)), r"u \(3, 2\) and v \(1, 4\)"),
        (lambda: Sum([Dense(torch.ones(2, 3)), Dense(torch.ones(3, 2))]), r"\(2, 3\), \(3, 2\)"),
        (lambda: Product([Dense(torch.ones(2, 3)), Dense(torch.ones(2, 3))]), "3 and 2 differ"),
        (lambda: Sum([]), "Sum"),
        (lambda: Product([]), "Product"),
        (
            lambda: Hadamard(LowRank(rand(3, 1), rand(1, 2)), LowRank(rand(2, 1), rand(1, 3))),
            r"\(3, 2\) and \(2, 3\)",
        ),
        (lambda: Entries(torch.arange(3), rand(2), 2, 2), r"index \(3,\) and values \(2,\)"),
        (lambda: Columns(torch.arange(3), rand(4, 2), 5), r"index \(3,\) does not fit values \(4, 2\)"),
        (lambda: Stacked(Dense(rand(2, 4)), rand(3, 2), rand(2, 4)), r"rows \(3, 2\) and columns \(2, 4\)"),
        (lambda: BlockCayley(rand(2, 4)), "4 numbers fill no triangle"),
        (lambda: Seeded(1, 2, 2, "normal"), "law 'normal' is neither"),
    ],
)
def test_ops_that_do_not_fit_together_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_only_a_plain_low_rank_op_is_its_factors():
    class Other(LowRank):
        pass

    op = LowRank(rand(3, 2), rand(2, 4))
    assert factors(op) == (op.u, op.v)
    assert [factors(other) for other in (Other(op.u, op.v), Scaled(op, 2.0), Dense(rand(3, 4)))] == [None] * 3


def test_a_low_rank_layer_lies_by_columns_in_eval_mode_and_by_rows_in_train_mode(tmp_path):
    u, v = torch.randn(7, 3), torch.randn(3, 5)
    layer = OpLinear(LowRank(nn.Parameter(u.clone()), v.clone()))
    same = layer.op.u
    for mode in (False, True, False):
        assert layer.train(mode).training == mode and layer.op.u is same and torch.equal(same, u)
        assert (same.is_contiguous(), same.mT.is_contiguous()) == (mode, not mode)
    io.write_tensors(tmp_path / "op.safetensors", layer.op.state_dict())
    assert torch.equal(io.read_tensors(tmp_path / "op.safetensors")["u"], u)
