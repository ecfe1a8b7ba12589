"""Distillation is the sum it says, costs nothing where the models agree, and never touches the teacher."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.compress import study
from subspan.distill import Distill, blocks, distance, farthest, first, fitting, low_rank, mse, require, weights
from subspan.heal import Factors
from subspan.hosts.training import draw, train
from subspan.methods import build
from subspan.ops import Dense, LowRank, OpLinear
from subspan.optim import Optim

IDS = torch.arange(2 * 12).reshape(2, 12) * 37 % 60
F64 = torch.float64


def answer(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False)


@pytest.fixture
def teacher():
    sizes = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).double().eval()


@pytest.fixture
def student(teacher):
    """Rank 3 wherever there are at least 8 columns and rows; k_proj and v_proj stay."""
    made = copy.deepcopy(teacher)
    taken = study(made, select="!*.k_proj|!*.v_proj|!lm_head")
    taken.apply(made, taken.plan(lambda _, shapes: dict.fromkeys(shapes, 3)))
    return made


class One(nn.Module):
    """One numbered layer y = W x, whose logits are 2 y and whose loss is the sum of y."""

    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, x):
        y = self.layers[0](x)
        return SimpleNamespace(loss=y.sum(), logits=2 * y)


def run(model, x):
    return model(x)


def dense(w):
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    layer.weight = nn.Parameter(w.clone())
    return layer


def factored(u, v):
    return OpLinear(LowRank(nn.Parameter(u.clone()), nn.Parameter(v.clone())))


# ---- the sum


def test_the_sum_and_its_gradients_worked_out_by_hand():
    u, v = torch.tensor([[1.0], [0.0]], dtype=F64), torch.tensor([[1.0, 2.0]], dtype=F64)
    w = torch.tensor([[1.0, 2.0], [1.0, 3.0]], dtype=F64)
    pupil, master, x = One(factored(u, v)), One(dense(w)), torch.ones(1, 2, dtype=F64)
    # y = (3, 0) and y' = (3, 4): L = 3, MSE(y, y') = 8, MSE(2y, 2y') = 32; |uv - W|_max = |0 - 3|, less eps: 2.
    parts = {"task": (2.0, 3.0), "features": (0.5, 8.0), "logits": (0.25, 32.0), "bound": (10.0, 4.0)}
    for name, (_, value) in parts.items():
        alone = dict.fromkeys(parts, 0.0) | {name: 1.0}
        assert Distill(**alone, eps=1.0).loss(pupil, master, x, run).item() == value
    whole = Distill(**{name: weight for name, (weight, _) in parts.items()}, eps=1.0)
    loss = whole.loss(pupil, master, x, run)
    assert loss.item() == 6 + 4 + 8 + 40
    loss.backward()
    op = pupil.layers[0].op
    assert op.u.grad.flatten().tolist() == [6, 6 - 18 - 80]
    assert op.v.grad.flatten().tolist() == [2, 2]


def test_it_is_the_formula_written_with_the_hidden_states_of_transformers(student, teacher):
    terms = Distill(task=0.3, features=0.7, logits=0.2, bound=1.5, eps=0.05)
    a, b = (m(input_ids=IDS, labels=IDS, output_hidden_states=True) for m in (student, teacher))
    # transformers puts the final norm over the last of its hidden states, so that one is taken from the blocks.
    with blocks(student) as mine, torch.no_grad():
        student(input_ids=IDS)
    with blocks(teacher) as theirs, torch.no_grad():
        teacher(input_ids=IDS)
    assert list(mine) == list(theirs) == ["model.layers.0", "model.layers.1"]
    assert torch.equal(mine["model.layers.0"][0], a.hidden_states[1])
    assert torch.equal(student.model.norm(mine["model.layers.1"][0]), a.hidden_states[2])
    f = [mse_loss(mine[n][0], theirs[n][0]) for n in mine]
    originals = dict(teacher.named_modules())
    gaps = [
        (m.op.u @ m.op.v - originals[n].weight).abs().max() - 0.05
        for n, m in student.named_modules()
        if isinstance(m, OpLinear)
    ]
    assert len(gaps) == 10 and min(gaps) > 0
    strain = torch.stack(gaps).square().mean()
    expected = 0.3 * a.loss + 0.7 * sum(f) / 2 + 0.2 * mse_loss(a.logits, b.logits) + 1.5 * strain
    assert_close(terms.loss(student, teacher, IDS, answer), expected, rtol=1e-12, atol=0)


def test_with_the_task_alone_it_is_the_model_s_own_loss_and_the_teacher_is_not_run(student):
    found = Distill(features=0, bound=0).loss(student, nn.Identity(), IDS, answer)
    assert torch.equal(found, answer(student, IDS).loss)


def test_a_bound_alone_runs_no_model(student, teacher):
    terms = Distill(task=0, features=0)
    assert torch.equal(terms.loss(student, teacher, None, None), terms.strain(student, teacher))


# ---- where student and teacher agree


@pytest.mark.parametrize("same", [True, False])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(student, same):
    master = student if same else copy.deepcopy(student)
    loss = Distill(task=0, features=3, logits=2, bound=5).loss(student, master, IDS, answer)
    assert loss.item() == 0
    loss.backward()
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    assert len(grads) > 10 and not any(bool(g.any()) for g in grads)
    both = Distill(task=0, features=0, eps=0.25, sides="both")
    assert both.loss(student, master, IDS, answer).item() == 0.25**2


def test_the_teacher_gets_no_gradient_and_keeps_every_bit(student, teacher):
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    named = Factors(rest=True).choose(student)
    terms = Distill(logits=1.0)
    terms.loss(student, teacher, IDS, answer).backward()
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for _, p in named)
    train(
        student, draw(IDS.flatten(), length=12, batch=2, steps=3), Optim(named, build("adamw"), lr=1e-2), steps=3,
        loss=lambda model, ids: terms.loss(model, teacher, ids, answer),
    )  # fmt: skip
    after = teacher.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training


def test_features_teach_features(student, teacher):
    def apart(model):
        with torch.no_grad():
            return Distill(task=0, bound=0).loss(model, teacher, IDS, answer).item()

    def learned(terms):
        pupil = copy.deepcopy(student)
        optimizer = torch.optim.Adam(pupil.parameters(), lr=1e-2)
        batches = draw(IDS.flatten(), length=12, batch=2, steps=30)
        train(pupil, batches, optimizer, steps=30, loss=lambda m, ids: terms.loss(m, teacher, ids, answer))
        return apart(pupil)

    with_features, without = learned(Distill(bound=0)), learned(Distill(features=0, bound=0))
    assert with_features < min(apart(student), without)


# ---- the bound


@pytest.mark.parametrize("eps", [0.0, 0.125, 0.5, 0.75])
def test_the_strain_of_weights_moved_by_known_steps(eps):
    torch.manual_seed(0)
    steps = [0.25, -0.5, 0.125]
    layers, plain = [], []
    for step in steps:
        w = torch.randint(-4, 5, (3, 3)).double()
        moved = w.clone()
        moved[1, 2] += step
        layers.append(factored(moved, torch.eye(3, dtype=F64)))
        plain.append(dense(w))
    pupil, master = nn.Sequential(*layers), nn.Sequential(*plain)
    above = sum(max(0.0, abs(step) - eps) ** 2 for step in steps) / 3
    assert_close(Distill(eps=eps).strain(pupil, master).item(), above, rtol=1e-15, atol=0)
    assert (above == 0) == (eps >= 0.5)
    both = sum((abs(step) - eps) ** 2 for step in steps) / 3
    assert_close(Distill(eps=eps, sides="both").strain(pupil, master).item(), both, rtol=1e-15, atol=0)


def test_its_value_and_gradient_are_those_of_the_largest_entry_multiplied_out():
    torch.manual_seed(1)
    op = LowRank(nn.Parameter(torch.randn(7, 2, dtype=F64)), nn.Parameter(torch.randn(2, 5, dtype=F64)))
    w = torch.randn(7, 5, dtype=F64, requires_grad=True)
    found = farthest(op, w)
    slow = (op.u @ op.v - w.detach()).abs().amax()
    assert_close(found, slow, rtol=1e-14, atol=0)
    mine, theirs = torch.autograd.grad(found, [op.u, op.v]), torch.autograd.grad(slow, [op.u, op.v])
    assert_close(mine, theirs, rtol=1e-14, atol=0)
    assert [(g != 0).any(dim).sum().item() for g, dim in zip(mine, (1, 0), strict=True)] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_out_in_float32_also_under_autocast(dtype):
    torch.manual_seed(2)
    op, w = LowRank(torch.randn(64, 8).to(dtype), torch.randn(8, 48).to(dtype)), torch.randn(64, 48).to(dtype)
    exact = (op.u.double() @ op.v.double() - w.double()).abs().max().float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = farthest(op, w)
    assert inside.dtype == torch.float32
    assert_close(inside, exact, rtol=1e-6, atol=0)


def test_the_layers_it_compares(student, teacher):
    ops, dense_ones = low_rank(student), weights(teacher)
    assert len(ops) == 10 and set(ops) <= set(dense_ones)
    assert all(dense_ones[name].data_ptr() == teacher.get_submodule(name).weight.data_ptr() for name in ops)
    assert all(torch.equal(weights(student)[name], op.u @ op.v) for name, op in ops.items())
    assert low_rank(nn.Sequential(OpLinear(Dense(torch.eye(2))))) == {}


# ---- blocks


def test_hooks_are_gone_afterwards_also_after_an_error(student):
    def hooked():
        return sum(len(m._forward_hooks) for m in student.modules())

    with blocks(student):
        assert hooked() == 2
    with pytest.raises(ZeroDivisionError), blocks(student):
        raise ZeroDivisionError
    assert hooked() == 0


def test_every_call_of_a_block_counts_once_in_the_mean():
    x, y = torch.ones(3, dtype=F64), torch.zeros(3, dtype=F64)
    assert distance({"0": [x, y], "1": [2 * x]}, {"0": [y, y], "1": [y]}).item() == (1 + 0 + 4) / 3


@pytest.mark.parametrize("output", [(2, 3), {"hidden": 3}, None, ()])
def test_a_block_without_hidden_states_is_named(output):
    x = torch.ones(2)
    assert first((x, 3), "0") is first([x], "0") is first({"a": x, "b": 1}, "0") is x
    with pytest.raises(ValueError, match=r"block layers\.3 puts out \w+, not hidden states; use features=0"):
        first(output, "layers.3")


# ---- what cannot be


@pytest.mark.parametrize(
    "given, words",
    [
        ({"features": -1.0}, "features is -1.0; it must be a finite number of at least 0"),
        ({"bound": float("inf")}, "bound is inf"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"task": 0, "features": 0, "bound": 0}, "task, features, logits, bound are all 0, which is no loss"),
        ({"sides": "below"}, "sides 'below' is neither 'above' nor 'both'"),
    ],
)
def test_values_that_make_no_loss(given, words):
    with pytest.raises(ValueError, match=words):
        Distill(**given)


def test_models_that_do_not_fit_together(student, teacher):
    terms = Distill()
    shallow = copy.deepcopy(teacher)
    del shallow.model.layers[1]
    with pytest.raises(
        ValueError, match=r"block model\.layers\.1 ran 1 times in the student and 0 in the teacher"
    ):
        terms.loss(student, shallow, IDS, answer)
    with pytest.raises(
        ValueError, match="LlamaForCausalLM has no low-rank layer to hold near its weight; use boun"
    ):
        terms.loss(teacher, teacher, IDS, answer)
    with pytest.raises(
        ValueError, match=r"layers\.0: the student is \(2, 3\), the teacher has \(3, 2\); teach by"
    ):
        fitting(torch.ones(3, 2), name="layers.0", shape=(2, 3))
    with pytest.raises(ValueError, match=r"the teacher has no such layer"):
        terms.strain(student, nn.Identity())
    with pytest.raises(ValueError, match=r"the logits: the student's shape is \(2,\), the teacher's \(3,\)"):
        mse(torch.ones(2), torch.ones(3), where="the logits")
    with pytest.raises(ValueError, match="no numbered block whose output could be compared; use features=0"):
        distance({}, {})


def test_a_forward_that_returns_too_little(student, teacher):
    with pytest.raises(
        ValueError, match=r"forward\(LlamaForCausalLM\) returned no loss; return it, or give it no w"
    ):
        Distill().loss(student, teacher, IDS, lambda model, ids: model(input_ids=ids))
    x = torch.ones(1)
    assert require(x, "loss", student) is x


# ---- the preset


def test_pela_trains_all_of_the_model_from_this_loss(student):
    assert build("pela") == Factors(rest=True, loss=Distill(1.0, 1.0, 0.0, 1.0, 1e-3, "above"))
    given = {"features": 0.1, "logits": 0.5, "bound": 2.0, "eps": 0.01, "sides": "both"}
    assert build("pela", **given).loss == Distill(**given)
    assert [name for name, _ in build("pela").choose(student)] == [name for name, _ in student.named_parameters()]
