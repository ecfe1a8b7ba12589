"""Budgets that look at data: what they measure, what they make of it, and what a study tells them."""

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from subspan.budget import (
    BlockInfluence,
    Bytes,
    Energy,
    Err,
    Evidence,
    Informed,
    LeastLoss,
    Owl,
    Ratio,
    Uniform,
    WeLore,
)
from subspan.budget.blocks import capped
from subspan.cli.common import parse_bytes
from subspan.compress import Compression, Witness, compress, study
from subspan.hosts import jobs
from subspan.importance import BlockCosine, Importance, Outliers, Sensitivity, block_of
from subspan.methods import build
from subspan.metric import Covariance, Gram, Plain, call
from subspan.plan import Plan


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Block(nn.Module):
    """x + out(tanh(into(x)))."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(12, 20).double(), nn.Linear(20, 12, bias=False).double()
        for i, p in enumerate(self.parameters()):
            p.data = rand(*p.shape, seed=10 * seed + i) / 4

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, float]:
        return x + scale * self.out(torch.tanh(self.into(x))), scale


class Net(nn.Module):
    """Three blocks, and a head that is in none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(i) for i in range(3))
        self.head = nn.Linear(12, 5, bias=False).double()
        self.head.weight.data = rand(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)


def data() -> list[Tensor]:
    return [rand(2, 7, 12, seed=i) * torch.logspace(0, 1, 12) for i in range(3)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum() / 2


def measured(importance: Importance, model: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    sites = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return importance(model, sites, batches=batches, forward=call, loss=loss)


def studied(model: nn.Module, measure=None, select="layers.*", **given):
    return study(model, measure or Gram(), select=select, **{"batches": data(), "loss": loss, **given})


# ---- what is measured ----


def inputs_of(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        m.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1))
        )
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(xs) for name, xs in seen.items()}


@pytest.mark.parametrize("factor", [1.0, 2.0, 5.0])
def test_outliers_are_the_entries_above_a_multiple_of_their_blocks_mean(factor):
    model = Net()
    found, xs = measured(Outliers(factor), model, data()), inputs_of(model, data())
    for block, names in {f"layers.{i}": [f"layers.{i}.into", f"layers.{i}.out"] for i in range(3)}.items():
        entries = torch.cat(
            [(model.get_submodule(n).weight.detach().abs() * xs[n].norm(dim=0)).flatten() for n in names]
        )
        share = sum(float(a) > factor * float(entries.mean()) for a in entries) / len(entries)
        assert [found[name] for name in names] == [share, share], block
    assert found["head"] != found["layers.0.into"]


def test_a_weight_scaled_with_its_inputs_has_the_same_outliers():
    one, many = Net(), Net()
    many.head.weight.data *= 1000
    assert measured(Outliers(2.0), one, data())["head"] == measured(Outliers(2.0), many, data())["head"]


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_multiple_that_is_not_positive_is_refused(factor):
    with pytest.raises(ValueError, match=f"outlier factor {factor} is not above 0"):
        Outliers(factor)


class Turn(nn.Module):
    """A rotation by one angle in every pair of coordinates, times a length."""

    def __init__(self, angle: float, length: float) -> None:
        super().__init__()
        self.site = nn.Linear(4, 4, bias=False).double()
        c, s = math.cos(angle), math.sin(angle)
        turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        self.site.weight.data = length * torch.block_diag(turn, turn)

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


@pytest.mark.parametrize("length", [0.1, 1.0, 30.0])
def test_the_influence_of_a_rotation_is_one_minus_the_cosine_of_its_angle(length):
    angles = [0.0, 0.3, math.pi / 2, math.pi]
    model = nn.Sequential(*(Turn(angle, length) for angle in angles))
    found = measured(BlockCosine(), model, [rand(5, 4), rand(9, 4)])
    assert list(found.values()) == pytest.approx([1 - math.cos(angle) for angle in angles], abs=1e-12)


def test_a_block_that_changes_the_size_has_no_angle():
    with pytest.raises(ValueError, match=r"head turns \(2, 7, 12\) into \(2, 7, 5\).* leave its sites out"):
        measured(BlockCosine(), Net(), data())


def test_sensitivity_is_the_mean_square_of_the_gradient_at_the_outputs():
    model = Net()
    found, by_hand = measured(Sensitivity(), model, data()), 0.0
    for x in data():
        y = model(x).detach()
        by_hand += float(y.square().sum()) / 5 / 3  # dL/dy = y at the head
    assert found["head"] == pytest.approx(by_hand, rel=1e-12)
    twice = Net()
    twice.head.weight.data *= 2
    again = measured(Sensitivity(), twice, data())
    assert again["layers.1.out"] == pytest.approx(16 * found["layers.1.out"], rel=1e-12)


@pytest.mark.parametrize("site", ["layers.0.into", "layers.2.out", "head"])
def test_sensitivity_is_what_errors_in_all_directions_do_to_the_loss(site):
    """Against finite differences: the loss's squared change, on average over the outputs of one token."""
    model, x = Net(), data()[0][:1, :1]
    found, m = measured(Sensitivity(), model, [x])[site], model.get_submodule(site).out_features
    changes = []
    for error in 1e-5 * torch.eye(m, dtype=torch.float64):
        ends = []
        for sign in (1, -1):
            hook = model.get_submodule(site).register_forward_hook(lambda _, __, y, e=sign * error: y + e)
            with torch.no_grad():
                ends.append(float(loss(model, x)))
            hook.remove()
        changes.append((ends[0] - ends[1]) / 2e-5)
    assert math.fsum(c * c for c in changes) / m == pytest.approx(found, rel=1e-6)


def test_measuring_leaves_the_model_as_it_was():
    model = Net()
    model.train()
    model.head.weight.requires_grad_(False)
    model.layers[0].into.weight.grad = mark = torch.ones(20, 12).double()
    for importance in (Outliers(), Sensitivity()):
        measured(importance, model, data())
    assert model.layers[0].into.weight.grad is mark and model.layers[1].into.weight.grad is None
    assert [p.requires_grad for p in model.head.parameters()] == [False]
    assert model.layers[0].out.weight.requires_grad and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("importance", [Outliers(), BlockCosine(), Sensitivity()], ids=repr)
def test_a_site_that_no_batch_reaches_is_named(importance):
    with pytest.raises(ValueError, match=r"no calibration batch reached layers\.0"):
        taken = studied(Net(), Plain(), batches=[])
        taken.plan(
            {Outliers: Owl, BlockCosine: BlockInfluence, Sensitivity: LeastLoss}[type(importance)](Err(0.5))
        )


@pytest.mark.parametrize(
    "name, block", [("model.layers.3.mlp.experts.0.up", "model.layers.3"), ("0", "0"), ("lm_head", "lm_head")]
)
def test_a_block_is_the_outermost_number(name, block):
    assert block_of(name) == block


# ---- what is made of it ----

BLOCKS = {f"layers.{i}.{kind}": d for i, d in enumerate((0.02, 0.05, 0.11, 0.03)) for kind in ("q", "up")}
SHAPES = dict.fromkeys(BLOCKS, (4000, 4000))


@pytest.mark.parametrize("spread", [0.0, 0.08, 0.2])
@pytest.mark.parametrize("sparsity", [0.4, 0.5, 0.7])
def test_owl_keeps_the_shares_of_its_formula(sparsity, spread):
    d = [0.02, 0.05, 0.11, 0.03]
    raised = [2 * spread * (x - min(d)) / (max(d) - min(d)) for x in d]
    keep = [x - sum(raised) / 4 + 1 - sparsity for x in raised]
    assert max(keep) - min(keep) == pytest.approx(2 * spread) and sum(keep) / 4 == pytest.approx(1 - sparsity)
    ranks = Owl(Err(sparsity), spread=spread, scores=BLOCKS)({}, SHAPES)
    assert [ranks[f"layers.{i}.q"] for i in range(4)] == pytest.approx([4000 * p for p in keep], abs=1)
    ranks = Owl(Ratio(1 - sparsity), spread=spread, scores=BLOCKS)({}, SHAPES)
    assert [ranks[f"layers.{i}.up"] for i in range(4)] == pytest.approx([2000 * p for p in keep], abs=1)


@pytest.mark.parametrize("kind", [Owl, BlockInfluence])
@pytest.mark.parametrize("target", [Err(0.3), Ratio(0.4), Bytes(2 * 10**8)], ids=repr)
def test_blocks_that_matter_alike_are_cut_alike(kind, target):
    even = kind(target, scores=dict.fromkeys(BLOCKS, 0.07))({}, SHAPES)
    uniform = Uniform(target)({}, SHAPES)
    assert len(set(even.values())) == 1
    assert max(abs(even[name] - uniform[name]) for name in SHAPES) <= 1


@pytest.mark.parametrize("temperature", [0.015, 0.05, 0.15, 10.0])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.6])
def test_block_influence_removes_a_capped_softmax(sparsity, temperature):
    influence = torch.tensor([0.02, 0.05, 0.11, 0.03], dtype=torch.float64)
    soft = torch.softmax(-influence / temperature, 0).tolist()
    removed = [4 * sparsity * x for x in soft]
    for _ in range(8):  # what is above the cap goes to the others, in proportion
        over = sum(max(x - 0.8, 0.0) for x in removed)
        room = [0.0 if x >= 0.8 else s for x, s in zip(removed, soft, strict=True)]
        total = sum(room) or 1.0
        removed = [min(x, 0.8) + over * r / total for x, r in zip(removed, room, strict=True)]
    assert sum(removed) / 4 == pytest.approx(sparsity)
    ranks = BlockInfluence(Err(sparsity), temperature, scores=BLOCKS)({}, SHAPES)
    assert [ranks[f"layers.{i}.q"] for i in range(4)] == pytest.approx([4000 * (1 - x) for x in removed], abs=1)


@pytest.mark.parametrize("mean", [0.0, 0.1, 0.34, 0.35])
def test_capped_shares_have_their_mean_and_keep_their_proportions(mean):
    found = capped({"a": 5.0, "b": 1.0, "c": 2.0}, mean, 0.35)
    assert sum(found.values()) / 3 == pytest.approx(mean) and max(found.values()) <= 0.35
    assert found["c"] == pytest.approx(2 * found["b"]) or found["c"] == 0.35


def test_by_loss_the_least_loss_gives_ranks_to_what_the_loss_feels():
    """Two equal sites behind each other, where the second one's errors are ten times louder."""
    model = nn.ModuleDict({"a": nn.Linear(12, 12, False), "b": nn.Linear(12, 12, False)}).double()
    s = torch.exp(-0.2 * torch.arange(12).double())
    for layer in model.values():
        layer.weight.data = torch.diag(s)

    def felt(net: nn.Module, x: Tensor) -> Tensor:
        return (net["a"](x) * rand(8, 12, seed=1) + 10 * net["b"](x) * rand(8, 12, seed=2)).sum()

    taken = study(model, batches=[rand(8, 12)], loss=felt)
    even = taken.plan(LeastLoss(Ratio(0.5), by="output")).ranks()
    loud = taken.plan(LeastLoss(Ratio(0.5))).ranks()
    assert even["a"] == even["b"] and loud["b"] > even["b"] and loud["a"] < even["a"]


# ---- what a study tells a budget ----


@pytest.mark.parametrize("kind", [Uniform, Energy, WeLore, Owl, BlockInfluence, LeastLoss])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("measure", [Plain(), Gram(0.01), Covariance(0.01)], ids=repr)
def test_a_model_fits_into_the_bytes_it_was_given(kind, dtype, measure):
    model = Net().to(dtype)
    model.head.double()
    if dtype == torch.bfloat16:
        model.head.to(dtype)
    batches = [x.to(dtype) for x in data()]
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    taken = studied(model, measure, batches=batches)
    for share in (0.95, 0.8, 0.6, 0.4):
        plan = taken.plan(kind(Bytes(int(share * size))))
        with taken.apply(model, plan):
            now = sum(p.numel() * p.element_size() for p in model.parameters())
        assert now == plan.bytes[1] <= share * size
        assert plan.target == {"bytes": int(share * size)}


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_the_least_loss_uses_the_bytes_up_to_one_rank(share):
    taken = studied(Net())
    before = taken.plan(Uniform(Err(0.0))).bytes[0]
    count = int(share * before)
    assert count - 8 * (12 + 20) < taken.plan(LeastLoss(Bytes(count))).bytes[1] <= count


@pytest.mark.parametrize("kind", [Uniform, Energy, WeLore, LeastLoss])
def test_too_few_bytes_are_refused_with_what_is_needed(kind):
    model = Net()
    taken = studied(model)
    least = sum(8 * p.numel() for n, p in model.named_parameters() if n == "head.weight" or n.endswith("bias"))
    least += 6 * 8 * (12 + 20)
    assert taken.plan(kind(Bytes(least))).bytes[1] == least
    with pytest.raises(ValueError, match=rf"needs {least:,} bytes at least, .* {least - 1:,} are too few"):
        taken.plan(kind(Bytes(least - 1)))


def test_budgets_read_the_weights_spectra_or_those_under_the_metric():
    model = Net()
    taken, plain = studied(model), study(model, select="layers.*")
    under = {name: part.s for name, part in taken.parts.items()}
    again = study(model, select="layers.*", spectra=under)
    for kind in (WeLore, Energy):
        assert taken.plan(kind(Err(0.4))).ranks() == plain.plan(kind(Err(0.4))).ranks()
        metric = taken.plan(kind(Err(0.4), spectrum="metric")).ranks()
        assert metric == again.plan(kind(Err(0.4))).ranks() != plain.plan(kind(Err(0.4))).ranks()
    by_metric = taken.plan(LeastLoss(Err(0.4), by="output")).ranks()
    assert by_metric == again.plan(LeastLoss(Err(0.4), by="output", spectrum="weight")).ranks()


def test_under_gram_no_ranks_of_as_many_numbers_predict_a_smaller_sum_of_errors():
    taken = studied(Net())

    def error(plan: Plan) -> float:
        return sum(float(taken.parts[n].s[r:].square().sum()) for n, r in plan.ranks().items())

    for err in (0.2, 0.4, 0.6):
        for rival in (WeLore(Err(err)), Energy(Err(err)), Uniform(Err(err)), Owl(Err(err))):
            plan = taken.plan(rival)
            assert error(taken.plan(LeastLoss(Bytes(plan.bytes[1]), by="output"))) <= error(plan)


def test_importance_is_measured_once_for_any_number_of_plans():
    calls: list[int] = []

    def counting(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(1)
        return loss(model, x)

    taken = studied(Net(), Plain(), loss=counting)
    assert taken.plan(LeastLoss(Err(0.5))) == taken.plan(LeastLoss(Err(0.5)))
    taken.plan(LeastLoss(Err(0.3)))
    assert len(calls) == 3


def test_evidence_tells_bytes_what_a_number_of_each_site_takes():
    taken = studied(Net(), Covariance(0.01))
    assert isinstance(taken.witness, Witness) and isinstance(taken.evidence, Evidence)
    found = taken.evidence.aim(Bytes(5000))
    gained = 8 * 3 * 12  # `out` has no bias, and gains one where the inputs' mean goes into it
    assert found == Bytes(5000, dict.fromkeys(taken.parts, 64), 8 * (3 * 20 + 5 * 12) + gained)
    assert taken.evidence.aim(Err(0.5)) == Err(0.5)
    assert taken.evidence.spectra("weight") == taken.spectra


def test_a_study_without_data_says_so_when_a_budget_asks():
    with pytest.raises(
        ValueError, match=r"Sensitivity\(\) is read off data: pass calibration batches .*--calibrate"
    ):
        study(Net()).plan(LeastLoss(Err(0.5)))


def test_batches_that_are_used_up_are_named():
    taken = studied(Net(), Gram(), batches=iter(data()))
    with pytest.raises(ValueError, match=r"a generator that was read before, pass a list"):
        taken.plan(LeastLoss(Err(0.5)))


def test_an_edited_model_is_not_asked():
    model = Net()
    taken = studied(model)
    with (
        taken.apply(model, taken.plan(Uniform(Err(0.5)))),
        pytest.raises(RuntimeError, match=r"layers\.0\.into was replaced after the study; undo that edit"),
    ):
        taken.plan(LeastLoss(Err(0.5)))
    assert taken.plan(LeastLoss(Err(0.5))).sites


def test_a_compression_needs_data_when_its_budget_or_its_measure_does():
    wanted = {(Uniform, Plain): False, (Uniform, Gram): True, (Owl, Plain): True, (LeastLoss, Plain): True}
    for (budget, measure), needed in wanted.items():
        assert Compression(budget(Err(0.5)), measure()).needs_data is needed
    assert not Compression(LeastLoss(Err(0.5), by="output"), Plain()).needs_data
    assert not Compression(lambda spectra, shapes: {}).needs_data


def test_compress_gives_the_budget_its_data():
    model = Net()
    method = build("least_loss", "compression", target=Ratio(0.6))
    plan, done = compress(model, method, select="layers.*", batches=data(), loss=loss)
    done.undo()
    assert plan == studied(model).plan(method.budget) and isinstance(method.budget, Informed)


# ---- three numbers, target and reached ----


@pytest.mark.parametrize(
    "target, shown",
    [
        (Err(0.25), "(target 25.0%)"),
        (Ratio(0.75), "(target 75.0%)"),
        (Bytes(6144), "(at most 0.0)"),
    ],
)
def test_a_plan_prints_ranks_numbers_and_bytes_with_what_was_asked(target, shown):
    plan = studied(Net()).plan(Uniform(target))
    title = plan.title()
    found = re.search(r"rank reduction ([\d.]+)%.*numbers kept ([\d.]+)%.*bytes ([\d.]+) -> ([\d.]+) MiB", title)
    assert found and shown in title and title.count("(") == 1
    assert float(found[1]) == pytest.approx(100 * plan.err, abs=0.05)
    assert float(found[2]) == pytest.approx(100 * plan.ratio, abs=0.05)
    assert plan.to_dict()["totals"]["target"] == dict(plan.target) == target.said
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan.table().title == title


def test_a_plan_nobody_set_a_target_for_prints_none():
    plan = studied(Net()).plan(lambda spectra, shapes: dict.fromkeys(shapes, 3))
    assert plan.target == {} and "(" not in plan.title()
    assert studied(Net()).plan(Energy(0.9)).target == {"energy": 0.9}


@pytest.mark.parametrize("name", ["svd", "welore", "owl", "block_influence", "least_loss"])
def test_bytes_are_a_target_of_every_method(name):
    assert jobs.decode(name, jobs.encode(Bytes(10**6))) == build(name, "compression", target=Bytes(10**6))


def test_welore_can_be_asked_for_as_the_paper_has_it():
    made = build("welore", "compression", search="grid", nlrc="keep", gate="break_even")
    assert made.budget == WeLore(Err(0.5), "grid", "keep", "break_even")


@pytest.mark.parametrize(
    "text, count",
    [("100MB", 10**8), ("1.5gib", 3 * 2**29), ("12 KB", 12_000), ("7", 7), ("7B", 7), ("2TiB", 2**41)],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MB", "-5MB", "1e9", "12 apples", "5Mb/s"])
def test_other_sizes_are_refused(text):
    with pytest.raises(Exception, match="is not a size; write one such as 400MiB"):
        parse_bytes(text)


def test_targets_say_what_they_are():
    assert [t.said for t in (Err(0.5), Ratio(0.25), Bytes(9))] == [{"err": 0.5}, {"ratio": 0.25}, {"bytes": 9}]
    assert_close(torch.tensor(Bytes(64, {"a": 16}).reached({"a": 1}, {"a": (4, 8)})), torch.tensor(0.625))
