"""The shortcuts of a low-rank adapter: equal to the definition, with the memory that was promised, never stale."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from subspan.adapt import Adapted, Add, Rescale, row_norms
from subspan.adapt.fast import (
    Norms,
    Seen,
    bare,
    eager,
    lengths,
    norms_lowrank,
    stays,
    sum_lowrank,
    uncast,
)
from subspan.adapt.join import added, stretched
from subspan.ops import Dense, LowRank
from subspan.optim.meter import Peak

M, N, RANK = 7, 6, 2
JOINS = {"add": Add(0.7), "rescale": Rescale(0.7)}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(m: int = M, n: int = N, *, bias: bool = True) -> nn.Linear:
    made = nn.Linear(n, m, bias=bias, dtype=torch.float64).requires_grad_(False)
    for i, p in enumerate(made.parameters()):
        p.copy_(rand(*p.shape, seed=i))
    return made


def lowrank(m: int = M, n: int = N, rank: int = RANK, *, frozen: str = "") -> LowRank:
    u, v = rand(m, rank, seed=5), rand(rank, n, seed=6)
    return LowRank(u.requires_grad_("u" not in frozen), v.requires_grad_("v" not in frozen))


def put(name: str, *, bias: bool = True, frozen: str = "") -> Adapted:
    """One adapter whose magnitude, where it has one, has moved."""
    adapted = Adapted(layer(bias=bias))
    adapted.add("a", lowrank(frozen=frozen), JOINS[name])
    join = adapted.slot("a").join
    if isinstance(join, Rescale):
        with torch.no_grad():
            join.mu.mul_(1 + 0.3 * rand(M, seed=9).tanh())
    return adapted


def defined(adapted: Adapted, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, adapted.weight, adapted.bias)


@pytest.mark.parametrize("frozen", ["", "u", "v"])
@pytest.mark.parametrize("wants", [True, False], ids=["dx", "first-layer"])
@pytest.mark.parametrize("shape", [(N,), (3, N), (2, 3, N), (2, 1, 3, N), (0, N)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("name", JOINS)
def test_forward_and_gradients_are_those_of_the_weight(name, bias, shape, wants, frozen):
    adapted, x = put(name, bias=bias, frozen=frozen), rand(*shape, seed=7).requires_grad_(wants)
    wrt = [p for p in adapted.parameters() if p.requires_grad] + [x] * wants
    probe = rand(*shape[:-1], M, seed=8)
    one, two = adapted(x), defined(adapted, x)
    assert_close(one, two, rtol=0, atol=1e-12)
    found = torch.autograd.grad((one * probe).sum(), wrt)
    for a, b in zip(found, torch.autograd.grad((two * probe).sum(), wrt), strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


def test_columns_and_steps_of_another_tensor_are_read_right():
    adapted, x = put("add"), rand(N, 4, seed=7)
    assert_close(adapted(x.T), defined(adapted, x.T), rtol=0, atol=1e-12)
    assert_close(adapted(x.T[::2]), defined(adapted, x.T[::2]), rtol=0, atol=1e-12)


def holding(u, v):
    """A low-rank op of these very tensors, which need not be parameters."""
    op = LowRank(u.detach(), v.detach())
    del op.u, op.v
    op.u, op.v = u, v
    return op


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stretch", [True, False])
def test_first_and_second_derivatives_by_finite_differences(stretch, bias):
    base = layer(4, 3, bias=bias)

    def shortcut(x, u, v, gain):
        z = added(base, holding(u, v), 0.7, x)
        return stretched(z, gain, base.bias) if stretch else z

    def definition(x, u, v, gain):
        y = base(x) + 0.7 * x @ v.T @ u.T
        return gain * (y - (base.bias if bias else 0)) + (base.bias if bias else 0) if stretch else y

    given = [t.requires_grad_() for t in (rand(2, 3), rand(4, 2, seed=1), rand(2, 3, seed=2), rand(4, seed=3))]
    given = given if stretch else [*given[:3], given[3].detach()]
    assert_close(shortcut(*given), definition(*given), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(shortcut, given)
    assert torch.autograd.gradgradcheck(shortcut, given)


def saved(run) -> list[torch.Tensor]:
    """The tensors that a forward pass keeps for backward, parameters apart, each storage once."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    held = [t for t in kept if t.dim() == 2 and t.shape[0] == 50]
    return list({t.untyped_storage().data_ptr(): t for t in held}.values())


@pytest.mark.parametrize("name", JOINS)
def test_backward_keeps_x_and_its_coordinates_and_rescale_one_output_more(name):
    adapted, x = put(name), rand(50, N, seed=7).requires_grad_()
    wide = {"add": [], "rescale": [M]}[name]
    assert sorted(t.shape[1] for t in saved(lambda: adapted(x))) == sorted([N, RANK, *wide])
    assert any(t.data_ptr() == x.data_ptr() for t in saved(lambda: adapted(x)))


def test_a_lora_forward_makes_its_output_and_the_coordinates_and_nothing_else():
    base, op, x = layer(300, 200), lowrank(300, 200, 4), rand(50, 200, seed=7)
    with Peak() as peak:
        added(base, op, 0.7, x)
    assert peak.most == 8 * 50 * (300 + 4)


def test_a_layer_with_a_hook_keeps_the_output_that_the_hook_saw():
    adapted, x, seen = put("add"), rand(4, N, seed=7), []
    assert bare(adapted.base) and eager(x, adapted.base.weight)
    handle = adapted.base.register_forward_hook(lambda module, given, y: seen.append((given[0], y)))
    assert not bare(adapted.base)
    out = adapted(x.view(2, 2, N))
    assert torch.equal(seen[0][0], x.view(2, 2, N))
    assert torch.equal(seen[0][1], F.linear(x, adapted.base.weight, adapted.base.bias).view(2, 2, M))
    handle.remove()
    assert_close(out.view(4, M), adapted(x), rtol=0, atol=1e-12)


def test_a_hook_on_the_op_is_called():
    adapted, x = put("add"), rand(4, N, seed=7)
    adapted.slot("a").op.register_forward_hook(lambda module, given, y: 2 * y)
    base = adapted.base
    assert_close(adapted(x), 2 * defined(adapted, x) - base(x), rtol=0, atol=1e-12)


def test_sum_lowrank_writes_over_its_first_argument_only_if_told():
    y, x, u, v = rand(3, M), rand(3, N), rand(M, RANK), rand(RANK, N)
    before, total = y.clone(), y + 0.5 * x @ v.T @ u.T
    assert_close(sum_lowrank(y, x, u, v, 0.5, fresh=False), total)
    assert torch.equal(y, before)
    assert sum_lowrank(y, x, u, v, 0.5, fresh=True) is y
    assert_close(y, total)


@pytest.mark.parametrize("name", JOINS)
def test_vmap_over_adapters_and_forward_mode(name):
    adapted, x = put(name), rand(4, N, seed=7)
    params = {k: p.detach() for k, p in adapted.named_parameters() if p.requires_grad}
    many = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    base, key = adapted.base, "adapters.a.op."
    both = torch.vmap(lambda u, v: added(base, holding(u, v), 0.7, x))(many[key + "u"], many[key + "v"])
    for i in range(2):
        assert_close(both[i], added(base, LowRank(many[key + "u"][i], many[key + "v"][i]), 0.7, x))

    def loss(u):
        return torch.func.functional_call(adapted, {key + "u": u}, (x,)).square().sum()

    def fixed(u):
        return added(base, holding(u, params[key + "v"]), 0.7, x)

    _, tangent = torch.func.jvp(fixed, (params[key + "u"],), (params[key + "u"],))
    assert_close(tangent, added(base, adapted.slot("a").op, 0.7, x) - base(x))
    if name == "add":
        u = adapted.slot("a").op.u
        assert_close(torch.func.grad(loss)(params[key + "u"]), torch.autograd.grad(loss(u), u)[0])


@pytest.mark.parametrize("name", JOINS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(name, reentrant):
    adapted, x = put(name), rand(2, 3, N, seed=7).requires_grad_()
    wrt = [p for p in adapted.parameters() if p.requires_grad] + [x]
    plain = torch.autograd.grad(adapted(x).square().sum(), wrt)
    again = checkpoint(adapted, x, use_reentrant=reentrant).square().sum()
    again.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, wrt, strict=True))


@pytest.mark.parametrize("name", [pytest.param("add", marks=pytest.mark.full), "rescale"])
def test_compiled_whole_it_computes_the_same(name):
    adapted, x = put(name), rand(2, 3, N, seed=7).requires_grad_()
    wrt = [p for p in adapted.parameters() if p.requires_grad] + [x]
    whole = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    out = whole(x)
    assert_close(out, adapted(x), rtol=0, atol=1e-12)
    grads = torch.autograd.grad(out.square().sum(), wrt)
    for a, b in zip(grads, torch.autograd.grad(adapted(x).square().sum(), wrt), strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", JOINS)
def test_autocast_multiplies_in_half_and_measures_in_full(name):
    adapted, x = put(name).float(), rand(5, N, seed=7).float()
    join, op = adapted.slot("a").join, adapted.slot("a").op
    exact = adapted(x)
    norm = row_norms(adapted.base.weight, op, 0.7)
    with uncast("meta"), torch.autocast("cpu", torch.bfloat16):
        out = adapted(x)
        assert torch.equal(row_norms(adapted.base.weight, op, 0.7), norm)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), exact, rtol=0, atol=2**-6 * exact.abs().max().item())
    out.float().sum().backward()
    assert op.u.grad.dtype == torch.float32 and (join == Add(0.7) or bool(join.mu.grad.isfinite().all()))


def test_a_gain_of_one_leaves_the_sum_bit_for_bit():
    z, bias, ones = rand(5, M).float(), rand(M).float(), torch.ones(M)
    for given in (None, bias):
        assert torch.equal(stretched(z, ones, given), z)
        half = None if given is None else given.bfloat16()
        assert torch.equal(stretched(z.bfloat16(), ones, half), z.bfloat16())


def test_a_gain_next_to_one_survives_half_precision():
    z, gain = rand(2000, M).bfloat16(), torch.full((M,), 1.003)
    nearest = (z.float() * gain).bfloat16()
    assert (stretched(z, gain, None) == nearest).double().mean() > 0.99
    assert torch.equal(z * gain.bfloat16(), z) and (z == nearest).double().mean() < 0.6


SIZES = [(50, 300, 8), (300, 40, 8), (64, 48, 48)]


@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.1, -1.0, 100.0, 1e6])
@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_factored_norms_are_the_dense_ones(m, n, rank, scale):
    w, op = rand(m, n), lowrank(m, n, rank)
    dense = (w + scale * op.dense()).detach().norm(dim=1)
    assert_close(norms_lowrank(w, op.u, op.v, scale), dense, rtol=1e-12, atol=0)
    single = [t.detach().float() for t in (w, op.u, op.v)]
    wide = (single[0].double() + scale * single[1].double() @ single[2].double()).norm(dim=1)
    assert_close(norms_lowrank(*single, scale).double(), wide, rtol=1e-6, atol=0)
    assert_close(row_norms(single[0], LowRank(*single[1:]), scale).double(), wide, rtol=1e-6, atol=0)


@pytest.mark.parametrize("left", [0.5, 0.1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_rows_that_cancel_keep_six_digits_in_float32(m, n, rank, left):
    op = lowrank(m, n, rank)
    u, v = op.u.detach().float(), op.v.detach().float()
    w = (-(u.double() @ v.double()) + left * rand(m, n)).float()
    w[::3] = rand(m, n, seed=3).float()[::3]
    exact = (w.double() + u.double() @ v.double()).norm(dim=1)
    assert_close(norms_lowrank(w, u, v, 1.0).double(), exact, rtol=1e-6, atol=0)


def test_factors_that_cancel_each_other_keep_six_digits():
    u, v = rand(40, 8, seed=1), rand(8, 60, seed=2)
    u, v = (u - u.mean(1, keepdim=True)).float(), (v[:1] + 1e-4 * v).float()
    for scale in (1.0, 1e3, 1e5):
        w = rand(40, 60).float()
        exact = (w.double() + scale * u.double() @ v.double()).norm(dim=1)
        assert_close(norms_lowrank(w, u, v, scale).double(), exact, rtol=1e-6, atol=0)


def test_the_norm_of_nothing_is_zero_and_of_nan_is_nan():
    u, v = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.5, -0.25]])
    w = -(u @ v)
    assert torch.equal(norms_lowrank(w, u, v, 1.0), torch.zeros(3))
    w[1, 0] = float("nan")
    assert norms_lowrank(w, u, v, 1.0).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_measured_in_float32(dtype):
    w, op = rand(2100, 600).to(dtype), lowrank(2100, 600, 4).float()
    exact = (w.double() + 0.5 * op.u.double() @ op.v.double()).norm(dim=1)
    found = row_norms(w, op, 0.5)
    assert found.dtype == torch.float32
    assert_close(found.double(), exact, rtol=1e-6, atol=0)
    assert_close(lengths(w), w.float().norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cancel", [False, True])
def test_the_workspace_of_the_norm_is_of_the_factors_size(cancel):
    m, n, rank = 2048, 2048, 32
    u, v = rand(m, rank, seed=1).float(), rand(rank, n, seed=2).float()
    w = -(u @ v) if cancel else rand(m, n).float()
    with Peak() as peak:
        norms_lowrank(w, u, v, 1.0)
    assert peak.most <= 8 * 4 * (m * rank + rank**2 + m + n)
    assert peak.most < w.nbytes / 4


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_rescale_remembers_and_is_never_stale(mode):
    adapted, x = put("rescale").train(mode), rand(4, N, seed=7)
    slot = adapted.slot("a")
    op, join = slot.op, slot.join

    def check_fresh():
        assert_close(adapted(x), defined(adapted, x), rtol=0, atol=1e-12)
        assert torch.equal(join.norms(adapted.base.weight, op), row_norms(adapted.base.weight, op, 0.7))

    check_fresh()
    norms = join.norms(adapted.base.weight, op)
    assert join.norms(adapted.base.weight, op) is norms
    for tensor in (op.u, op.v, join.mu):
        with torch.no_grad():
            tensor.mul_(1.5)
        check_fresh()
        tensor.data.add_(0.25)
        check_fresh()
        tensor.data = 2 * tensor.data
        check_fresh()
        tensor.data[0] *= -1
        check_fresh()
    op.load_state_dict({"u": rand(M, RANK, seed=30), "v": rand(RANK, N, seed=31)})
    check_fresh()
    op.load_state_dict({"u": rand(M, RANK, seed=32), "v": rand(RANK, N, seed=33)}, assign=True)
    check_fresh()
    optimizer = torch.optim.SGD([*op.parameters()], lr=0.1)
    for _ in range(3):
        adapted(x).square().sum().backward()
        optimizer.step()
        check_fresh()


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_base_that_moves_is_measured_again(mode):
    given = layer().requires_grad_()
    adapted, x = Adapted(given).train(mode), rand(4, N, seed=7)
    adapted.add("a", lowrank(), Rescale(0.7))

    def check_fresh():
        assert_close(adapted(x), defined(adapted, x), rtol=0, atol=1e-12)

    check_fresh()
    with torch.no_grad():
        given.weight.mul_(2)
    check_fresh()
    adapted.load_state_dict({**adapted.state_dict(), "base.weight": rand(M, N, seed=40)})
    check_fresh()
    adapted.base.weight.data = rand(M, N, seed=41)
    check_fresh()
    adapted.base = layer()
    check_fresh()
    adapted.base.weight.data.mul_(3)
    adapted.train(mode)
    check_fresh()
    adapted.base.weight.data.mul_(3)
    adapted.to(torch.float64)
    check_fresh()


def test_a_base_under_another_adapter_is_measured_every_time():
    adapted, x = put("add").eval(), rand(4, N, seed=7)
    adapted.add("b", LowRank(rand(M, 1, seed=20), rand(1, N, seed=21)), Rescale(0.5))
    for _ in range(3):
        with torch.no_grad():
            adapted.slot("a").op.u.mul_(1.7)
        assert_close(adapted(x), defined(adapted, x), rtol=0, atol=1e-12)
    adapted.active = ("b",)
    assert_close(adapted(x), defined(adapted, x), rtol=0, atol=1e-12)


def test_what_is_remembered_is_neither_saved_nor_copied():
    adapted, x = put("rescale").eval(), rand(4, N, seed=7)
    keys = set(adapted.state_dict())
    before = adapted(x)
    assert set(adapted.state_dict()) == keys
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert other.slot("a").join._norms._seen is None
        assert torch.equal(other(x), before)
        with torch.no_grad():
            other.base.weight.mul_(2)
        assert_close(other(x), defined(other, x), rtol=0, atol=1e-12)


def test_norms_know_a_parameter_by_itself_its_memory_and_its_version():
    w, op, norms = nn.Parameter(rand(M, N), requires_grad=False), lowrank(), Norms()
    assert stays(w) and not stays(w.detach()) and not stays(w.to("meta"))
    found = norms(w, op.u, op.v, 0.5)
    seen = norms._seen
    assert isinstance(seen, Seen) and seen.knows(w) and not seen.knows(w.detach())
    assert norms(w, op.u, op.v, 0.5) is found
    w.add_(1)
    assert not seen.knows(w)
    assert_close(norms(w, op.u, op.v, 0.5), row_norms(w, Dense(op.dense().detach()), 0.5))
    norms.forget()
    assert norms._seen is None


def test_weights_of_inference_mode_and_of_meta_are_measured_without_memory():
    with torch.inference_mode():
        w = nn.Parameter(rand(M, N), requires_grad=False)
        assert not stays(w)
        found = Norms()(w, lowrank().u, lowrank().v, 0.5)
    assert_close(found.clone(), row_norms(rand(M, N), lowrank(), 0.5))
    assert norms_lowrank(*(t.to("meta") for t in (rand(M, N), lowrank().u, lowrank().v)), 1.0).shape == (M,)
