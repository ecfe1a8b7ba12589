"""AdaLoRA's moving ranks: budget, scores, penalty and masks by their definitions, and the shrink at the end."""

import copy
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from subspan import io
from subspan.adapt import (
    AdaLora,
    Adapted,
    Adapter,
    Add,
    RankSchedule,
    ZeroLowRank,
    ZeroTriples,
    adapt,
    merge,
    planned,
    trainable,
)
from subspan.adapt.ranks import cut_state
from subspan.adapt.triples import (
    Sensitivity,
    Site,
    Triples,
    cut,
    cut_as_saved,
    deviation,
    deviation_slope,
    site_of,
    triples,
)
from subspan.edit import edit
from subspan.hosts import lessons
from subspan.hosts.folders import added, put_adapter, save_adapter
from subspan.hosts.lessons import Learning, Split, fit, summary
from subspan.hosts.training import History
from subspan.methods.adapters import adalora, lora
from subspan.ops import Dense, Diag, LowRank, Product
from subspan.optim import Adam, Optim, Sgd, checkpoint

SIZES = {"0": (9, 7), "2": (8, 9), "4": (6, 8)}
RANK, END, STEPS = 4, 2, 20
RULE = AdaLora(END, STEPS, warmup=4, final=5, every=2, orth=0.3)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net(seed: int = 0, rank: int = RANK, adapter: Adapter | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (m, n) in enumerate(SIZES.values()):
        layer = nn.Linear(n, m, dtype=torch.float64)
        for k, p in enumerate(layer.parameters()):
            p.data.copy_(0.5 * rand(*p.shape, seed=seed + 10 * i + k))
        layers += [adapt(adapter or Adapter(ZeroTriples(rank, spread=0.3), Add(1.5)))(str(i), layer), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def loss_of(model: nn.Module, t: int) -> torch.Tensor:
    x = rand(16, 7, seed=100 + t)
    return (model(x) - torch.sin(x[:, :6] * torch.arange(6))).square().sum()


def adamw(model: nn.Module, lr: float = 0.02) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for _, p in trainable(model)], lr=lr, weight_decay=0.01)


def optim(model: nn.Module, lr: float = 0.02) -> Optim:
    return Optim(trainable(model), Adam(), lr=lr)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    optimizer.zero_grad()
    loss_of(model, t).backward()
    optimizer.step()


def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 1, last: int = STEPS) -> None:
    for t in range(first, last + 1):
        advance(model, optimizer, t)


def ready(
    rule: AdaLora = RULE, make=adamw, **options
) -> tuple[nn.Sequential, torch.optim.Optimizer, RankSchedule]:
    model = net(**options)
    optimizer = make(model)
    return model, optimizer, RankSchedule(model, rule).attach(optimizer)


def check_equal(one: nn.Module, two: nn.Module) -> None:
    have, want = one.state_dict(), two.state_dict()
    assert have.keys() == want.keys() and all(torch.equal(x, want[key]) for key, x in have.items())


# ---- the budget


@pytest.mark.parametrize("t", range(1, 31))
def test_the_budget_is_the_cubic_in_exact_fractions(t):
    rule = AdaLora(2, 30, warmup=5, final=8)
    share = min(Fraction(1), max(Fraction(0), 1 - Fraction(t - 5, 30 - 8 - 5)))
    assert rule.budget(t, 1000, 343) == math.floor(343 + (1000 - 343) * share**3)


def test_the_budget_never_rises_and_runs_from_all_to_the_end():
    rule = AdaLora(3, 97, warmup=9, final=20)
    found = [rule.budget(t, 216, 24) for t in range(120)]
    assert found == sorted(found, reverse=True)
    assert set(found[:10]) == {216} and set(found[77:]) == {24} and found[76] >= 24
    assert found[9] > found[10]


def test_it_chooses_each_few_steps_between_warm_up_and_the_final_choice():
    rule = AdaLora(2, 30, warmup=6, final=7, every=3)
    assert [t for t in range(1, 40) if rule.chooses(t)] == [9, 12, 15, 18, 21, 23]


@pytest.mark.parametrize("steps", [2, 3, 7, 100, 3000])
def test_the_usual_shares_of_a_run_fit_into_it(steps):
    rule = AdaLora.over(8, steps)
    assert rule.steps == steps and rule.rank == 8 and 2 <= rule.settled <= steps - rule.final
    assert AdaLora.over(8, 600) == AdaLora(8, 600, warmup=100, final=300, every=2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AdaLora(0, 10), "rank and every must be at least 1"),
        (lambda: AdaLora(2, 10, every=0), "rank and every must be at least 1"),
        (lambda: AdaLora(2, 10, orth=-1.0), "orth not negative"),
        (lambda: AdaLora(2, 10, b1=1.0), r"b1 and b2 must be in 0\.\.1"),
        (lambda: AdaLora(2, 10, warmup=5, final=5), "warmup 5 and final 5 leave no step of 10"),
        (lambda: AdaLora(2, 1), "leave no step of 1"),
        (lambda: ZeroTriples(2, 3), r"final 3 is outside 1\.\.2"),
        (lambda: ZeroTriples(9)("here", rand(8, 12)), r"here: rank 9 is outside 1\.\.min\(8, 12\)"),
        (lambda: adalora(rank=0), "alpha 16.0 and rank 0"),
        (lambda: adalora(rank=8, start=0.5), r"final 8 is outside 1\.\.4"),
    ],
)
def test_impossible_schedules_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ---- the start


def test_the_start_is_zero_gaussian_and_its_own_at_every_site():
    w = torch.empty(300, 400, dtype=torch.float64)
    op = ZeroTriples(50)("site", w)
    u, e, v = triples(op)
    assert torch.equal(op.dense(), torch.zeros_like(w)) and torch.equal(e, torch.zeros(50).double())
    assert_close(torch.stack([u.std(), v.std()]), torch.full((2,), 0.02).double(), rtol=0.02, atol=0)
    assert not torch.equal(triples(ZeroTriples(50)("other", w)).u, u)
    assert torch.equal(triples(ZeroTriples(50)("site", w.float())).u, u.float())


def test_only_a_product_whose_three_tensors_train_is_triples():
    u, v = nn.Parameter(rand(5, 2)), nn.Parameter(rand(2, 4))
    frozen = Product([Dense(u), Diag(rand(2)), Dense(v)])
    assert triples(LowRank(u, v)) is None and triples(frozen) is None
    assert triples(Product([Dense(u), Diag(nn.Parameter(rand(2)))])) is None
    assert triples(Product([Dense(u), Diag(nn.Parameter(rand(2))), Dense(v)])).v is v


def test_the_preset_starts_above_its_rank_and_plans_to_end_there():
    adapter = adalora(rank=8, alpha=24.0)
    assert adapter == Adapter(ZeroTriples(12, 8), Add(2.0))
    assert planned(adapter, 3000) == AdaLora.over(8, 3000)
    assert planned(lora(), 100) is None and planned(Adapter(ZeroTriples(3), Add()), 100) is None


# ---- the scores


def twin_scores(history: list[tuple[list[list[float]], list[list[float]]]], b1: float, b2: float):
    """The score of every entry of a matrix from its values and gradients, number by number."""
    rows, columns = len(history[0][0]), len(history[0][0][0])
    found = [[0.0] * columns for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            mean = spread = 0.0
            for p, g in history:
                now = abs(p[i][j] * g[i][j])
                mean = b1 * mean + (1 - b1) * now
                spread = b2 * spread + (1 - b2) * abs(now - mean)
            found[i][j] = mean * spread
    return found


def test_scores_are_those_of_a_plain_twin_over_twenty_steps():
    rule = AdaLora(END, 40, warmup=30, b1=0.8, b2=0.7, orth=0.2)
    model, optimizer, schedule = ready(rule)
    seen = {at: [] for at in schedule.sites}
    for t in range(1, 21):
        advance(model, optimizer, t)
        for at, site in schedule.sites.items():
            seen[at].append([(p.detach().reshape(len(p), -1).tolist(), p.grad.reshape(len(p), -1).tolist())
                             for p in site.triples])  # fmt: skip
    for at, found in schedule.scores().items():
        u, e, v = (twin_scores([step[k] for step in seen[at]], 0.8, 0.7) for k in range(3))
        m, n = SIZES[at]
        expected = [e[i][0] + sum(u[j][i] for j in range(m)) / m + sum(v[i]) / n for i in range(RANK)]
        assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_parameter_without_gradient_counts_as_zero():
    p, g = rand(3, 2), rand(3, 2, seed=1)
    one, two = Sensitivity(p), Sensitivity(p)
    for step in (g, None, g):
        one.update(p, step, 0.85, 0.85)
        two.update(p, torch.zeros_like(g) if step is None else step, 0.85, 0.85)
    assert torch.equal(one.score, two.score) and one.score.min() > 0


def test_half_precision_is_scored_in_float32():
    p, g = torch.full((2,), 0.01).bfloat16(), torch.full((2,), 1e-30).bfloat16()
    one = Sensitivity(p)
    one.update(p, g, 0.85, 0.85)
    assert one.mean.dtype == torch.float32
    assert torch.equal(one.mean, (p.float() * g.float()) * (1 - 0.85))


def peft_tensors(schedule: RankSchedule) -> dict[str, tuple[nn.Parameter, tuple[int, ...]]]:
    """Every tensor under PEFT's name for it, and in PEFT's shape: A (rank, n), E (rank, 1), B (m, rank)."""
    names = {"v": "A", "e": "E", "u": "B"}
    return {
        f"{at}.lora_{names[key]}.default": (p, (RANK, 1) if key == "e" else tuple(p.shape))
        for at, site in schedule.sites.items()
        for key, p in site.triples._asdict().items()
    }


class Named:
    """What PEFT's allocator wants to know of a model."""

    def __init__(self, schedule: RankSchedule) -> None:
        self.pairs = [(name, p, nn.Parameter(p.detach().clone().reshape(shape)))
                      for name, (p, shape) in peft_tensors(schedule).items()]  # fmt: skip

    def follow(self) -> None:
        for _, p, q in self.pairs:
            q.data, q.grad = p.detach().clone().reshape(q.shape), p.grad.clone().reshape(q.shape)

    def named_parameters(self):
        return [(name, q) for name, _, q in self.pairs]


def test_scores_and_masks_are_those_of_peft():
    peft, layer = pytest.importorskip("peft"), pytest.importorskip("peft.tuners.adalora.layer")
    last = STEPS - 5
    config = peft.AdaLoraConfig(target_r=END, init_r=RANK, tinit=4, tfinal=5, deltaT=2, total_step=STEPS)
    model = net()
    optimizer, schedule = adamw(model), RankSchedule(model, AdaLora(END, STEPS, warmup=4, final=5, every=2))
    theirs = Named(schedule)
    allocator = layer.RankAllocator(theirs, config, "default")
    for t in range(1, last + 1):
        advance(model, optimizer, t)
        theirs.follow()
        allocator.update_and_allocate(theirs, t, force_mask=t == last)
        schedule.step()
        senses = [sense for site in schedule.sites.values() for sense in site.senses.values()]
        for (name, p, q), sense in zip(theirs.pairs, senses, strict=True):
            expected = allocator._element_score(name).reshape(p.shape)
            assert_close(sense.score, expected, rtol=1e-12, atol=0)
            assert torch.equal(p == 0, q.reshape(p.shape) == 0), (t, name)
    assert sum(schedule.ranks.values()) == allocator.target_bgt == END * len(SIZES)


# ---- the penalty


def test_the_slope_is_autograd_of_the_deviation():
    x = rand(3, 5).requires_grad_()
    (expected,) = torch.autograd.grad(deviation(x), x)
    assert_close(deviation_slope(x.detach()), expected)


def test_orthonormal_rows_have_neither_deviation_nor_slope():
    x = torch.eye(5).double()[:3]
    assert float(deviation(x)) == 0 and torch.equal(deviation_slope(x), torch.zeros(3, 5).double())


def test_the_penalty_is_the_mean_over_all_factors():
    model = net()
    schedule = RankSchedule(model, RULE)
    total = 0.0
    for site in schedule.sites.values():
        u, _, v = (p.detach() for p in site.triples)
        for gram in (u.T @ u, v @ v.T):
            total += math.sqrt(sum(float(x) ** 2 for x in (gram - torch.eye(RANK)).flatten()))
    assert_close(schedule.penalty().item(), 0.3 * total / (2 * len(SIZES)), rtol=1e-12, atol=0)


def test_the_gradient_that_a_hook_adds_is_that_of_the_penalty_in_the_loss():
    one, two = net(), net()
    RankSchedule(one, RULE).attach(adamw(one))
    loss_of(one, 1).backward()
    (loss_of(two, 1) + RankSchedule(two, RULE).penalty()).backward()
    for (name, p), (_, q) in zip(trainable(one), trainable(two), strict=True):
        assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("to_none", [True, False])
def test_it_is_added_once_a_step_however_many_micro_batches_there_are(to_none):
    one, optimizer, _ = ready()
    two = net()
    by_hand, other = RankSchedule(two, RULE), adamw(two)
    for t in range(3):
        for part in range(3):
            loss_of(one, 3 * t + part).backward()
            loss_of(two, 3 * t + part).backward()
        by_hand.penalty().backward()
        for (_, p), (_, q) in zip(trainable(one), trainable(two), strict=True):
            assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        other.step()
        by_hand.step()
        other.zero_grad()


def test_a_gradient_that_was_thrown_away_takes_the_penalty_with_it():
    model, optimizer, _ = ready()
    loss_of(model, 1).backward()
    first = [p.grad.clone() for _, p in trainable(model)]
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    assert all(torch.equal(p.grad, g) for (_, p), g in zip(trainable(model), first, strict=True))


# ---- a run


def test_at_a_full_budget_it_is_plain_training_of_u_diag_e_v_with_the_penalty():
    model, optimizer, schedule = ready(AdaLora(RANK, STEPS, warmup=2, final=5, orth=0.3))
    start = {at: [p.detach().clone() for p in site.triples] for at, site in schedule.sites.items()}
    run(model, optimizer)
    tensors = {at: [p.requires_grad_() for p in found] for at, found in start.items()}
    other = torch.optim.AdamW([p for found in tensors.values() for p in found], lr=0.02, weight_decay=0.01)
    bases = {at: model.get_submodule(at).base for at in SIZES}
    for t in range(1, STEPS + 1):
        x = rand(16, 7, seed=100 + t)
        y, norms = x, []
        for at, (u, e, v) in tensors.items():
            y = y @ (bases[at].weight + 1.5 * u @ torch.diag(e) @ v).T + bases[at].bias
            y = torch.tanh(y) if at != "4" else y
            norms += [(u.T @ u - torch.eye(RANK)).norm(), (v @ v.T - torch.eye(RANK)).norm()]
        loss = (y - torch.sin(x[:, :6] * torch.arange(6))).square().sum() + 0.3 * sum(norms) / len(norms)
        other.zero_grad()
        loss.backward()
        other.step()
    for at, site in schedule.sites.items():
        for p, q in zip(site.triples, tensors[at], strict=True):
            assert_close(p, q, rtol=0, atol=1e-10)
    assert schedule.finish() == dict.fromkeys(SIZES, RANK)


@pytest.mark.parametrize("make", [adamw, optim])
def test_after_every_choice_as_many_triples_live_as_the_budget_says(make):
    model, optimizer, schedule = ready(make=make)
    for t in range(1, STEPS + 5):
        advance(model, optimizer, t)
        alive = sum(int((site.triples.e != 0).sum()) for site in schedule.sites.values())
        if RULE.chooses(t) or t > RULE.settled:
            assert alive == sum(schedule.ranks.values()) == RULE.budget(t, schedule.full, schedule.end), t
        elif t > 1:
            assert alive == schedule.full, t
    assert schedule.steps == STEPS + 4 and alive == END * len(SIZES)


def test_after_the_final_choice_neither_scores_nor_choice_change():
    model, optimizer, schedule = ready()
    run(model, optimizer, last=RULE.settled)
    before = copy.deepcopy(schedule.state_dict())
    run(model, optimizer, RULE.settled + 1, STEPS)
    after = schedule.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key != "steps")
    assert int(after["steps"]) == STEPS


def test_ranks_go_to_the_layer_that_has_something_to_learn():
    target = net(seed=0)
    with torch.no_grad():
        target[2].base.weight.add_(0.5 * rand(8, 3, seed=5) @ rand(3, 9, seed=6))
    model, optimizer, schedule = ready(AdaLora(1, 80, warmup=10, final=20))
    for t in range(80):
        x = rand(32, 7, seed=t)
        optimizer.zero_grad()
        (model(x) - target(x)).square().mean().backward()
        optimizer.step()
    assert schedule.ranks["2"] > max(schedule.ranks["0"], schedule.ranks["4"])


def test_equal_scores_still_leave_the_budget_exactly():
    model = net()
    schedule = RankSchedule(model, AdaLora(2, 4, final=0))
    for _ in range(4):
        for _, p in trainable(model):
            p.grad = torch.zeros_like(p)
        schedule.step()
    assert sum(schedule.ranks.values()) == 2 * len(SIZES)


# ---- the end


@pytest.mark.parametrize("make", [adamw, optim])
def test_finish_leaves_smaller_tensors_the_same_function_and_the_same_parameters(make):
    model, optimizer, schedule = ready(make=make)
    run(model, optimizer)
    x, named, ranks = rand(5, 7, seed=1), trainable(model), schedule.ranks
    before, weights = model(x).detach(), [m.weight.detach() for m in model if isinstance(m, Adapted)]
    count = sum(p.numel() for _, p in named)
    assert schedule.finish() == ranks and sum(ranks.values()) == END * len(SIZES)
    assert_close(model(x), before, rtol=1e-13, atol=1e-13)
    for module, w in zip((m for m in model if isinstance(m, Adapted)), weights, strict=True):
        assert_close(module.weight, w, rtol=1e-13, atol=1e-13)
        assert_close(merge(module)(rand(2, module.in_features)), module(rand(2, module.in_features)))
    assert [(n, id(p)) for n, p in trainable(model)] == [(n, id(p)) for n, p in named]
    sizes = {at: ranks[at] * (m + n + 1) for at, (m, n) in SIZES.items()}
    assert sum(p.numel() for _, p in named) == sum(sizes.values()) < count
    for at, site in schedule.sites.items():
        assert site.triples.e.shape == site.kept.shape == site.scores().shape == (ranks[at],)
    assert schedule.finish() == ranks


@pytest.mark.parametrize("make", [adamw, optim])
def test_training_goes_on_after_it_as_the_masked_model_would_have(make):
    rule = AdaLora(END, STEPS, warmup=4, final=5, every=2, orth=0.0)
    (one, first, short), (two, second, _) = ready(rule, make), ready(rule, make)
    run(one, first)
    run(two, second)
    loss = loss_of(one, 50)  # a graph from before the shrink is still alive
    short.finish()
    run(one, first, STEPS + 1, STEPS + 8)
    run(two, second, STEPS + 1, STEPS + 8)
    assert_close(one(rand(5, 7)), two(rand(5, 7)), rtol=0, atol=1e-12)
    assert loss.requires_grad


def test_state_in_other_shapes_is_dropped_and_single_numbers_stay():
    p, index = nn.Parameter(rand(4, 3)), torch.tensor([0, 2])
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = {"m": rand(4, 3), "step": torch.tensor(3), "name": "x"}
    cut_state(optimizer, p, 0, index, p.shape)
    assert torch.equal(optimizer.state[p]["m"], rand(4, 3)[index]) and int(optimizer.state[p]["step"]) == 3
    optimizer.state[p] = {"m": rand(4, 3), "frame": rand(4, 2)}
    cut_state(optimizer, p, 0, index, p.shape)
    assert p not in optimizer.state
    cut_state(optimizer, p, 0, index, p.shape)
    assert p not in optimizer.state


def test_a_site_may_end_at_rank_zero():
    slot_model = net()
    site = site_of(slot_model[0], "default")
    assert isinstance(site, Site) and isinstance(site.triples, Triples)
    cut(site.slot, site.triples, torch.tensor([], dtype=torch.int64))
    adapted, x = slot_model[0], rand(5, 7)
    assert torch.equal(adapted(x), adapted.base(x)) and torch.equal(adapted.weight, adapted.base.weight)
    loss_of(slot_model, 0).backward()
    optimizer = optim(slot_model)
    optimizer.step()
    assert [tuple(p.shape) for p in site.triples] == [(9, 0), (0,), (0, 7)]


def test_the_scale_stays_that_of_the_start():
    model, optimizer, schedule = ready(adapter=Adapter(ZeroTriples(RANK, END, spread=0.3), Add(0.5)))
    run(model, optimizer)
    schedule.finish()
    assert {m.slot("default").join for m in model if isinstance(m, Adapted)} == {Add(0.5)}


def test_what_finish_cannot_do_is_refused():
    model, optimizer, schedule = ready()
    run(model, optimizer, last=RULE.settled - 1)
    with pytest.raises(ValueError, match="at step 14, and its choice is final at 15; train on"):
        schedule.finish()
    advance(model, optimizer, RULE.settled)
    with torch.no_grad():
        for site in schedule.sites.values():
            site.triples.e.add_(1.0)
    with pytest.raises(ValueError, match=r"pruned triples of .* are not zero; call step\(\)"):
        schedule.finish()
    advance(model, optimizer, RULE.settled + 1)
    schedule.finish()
    with pytest.raises(RuntimeError, match="finished: the ranks stay"):
        schedule.step()
    with pytest.raises(ValueError, match="attached or finished already"):
        schedule.attach(optimizer)


# ---- driving


def test_attached_is_driven_by_hand():
    (one, first, attached), two = ready(), net()
    second, by_hand = adamw(two), RankSchedule(two, RULE)
    run(one, first)
    for t in range(1, STEPS + 1):
        second.zero_grad()
        (loss_of(two, t) + by_hand.penalty()).backward()
        second.step()
        by_hand.step()
    assert attached.ranks == by_hand.ranks
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=1e-10)


def test_a_closure_drives_it_too_as_in_lightning():
    (one, first, _), (two, second, _) = ready(), ready()
    run(one, first)
    for t in range(1, STEPS + 1):

        def closure(t: int = t) -> torch.Tensor:
            second.zero_grad()
            loss = loss_of(two, t)
            loss.backward()
            return loss

        second.step(closure)
    check_equal(one, two)


def test_a_step_without_backward_is_none():
    model, optimizer, schedule = ready()
    for _, p in trainable(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert schedule.steps == 0
    with pytest.raises(RuntimeError, match=r"no triple has a gradient; call step\(\) after optimizer.step\(\)"):
        RankSchedule(net(), RULE).step()


def test_what_cannot_be_scheduled_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no adapter 'default' of the form u diag\(e\) v"):
        RankSchedule(net(adapter=Adapter(ZeroLowRank(2), Add())), RULE)
    with pytest.raises(ValueError, match="has no adapter 'other'"):
        RankSchedule(net(), RULE, name="other")
    with pytest.raises(ValueError, match="rank 5 at 3 sites is 15 triples, above the 12"):
        RankSchedule(net(), AdaLora(5, 20))
    model = net()
    with pytest.raises(ValueError, match="does not step the adapters of 0, 2, 4; build it over"):
        RankSchedule(model, RULE).attach(Optim([("w", nn.Parameter(rand(2, 2)))], Sgd(), lr=0.1, where="w"))
    schedule = RankSchedule(model, RULE).attach(adamw(model))
    with pytest.raises(ValueError, match="attached or finished already"):
        schedule.attach(adamw(model))


# ---- resume


@pytest.mark.parametrize("cut_at", [3, 7, 16])
@pytest.mark.parametrize("make", [adamw, optim])
def test_a_run_goes_on_bit_for_bit_through_the_optimizer_s_state(make, cut_at, tmp_path):
    one, first, schedule = ready(make=make)
    run(one, first, last=cut_at)
    torch.save({"model": one.state_dict(), "optimizer": first.state_dict()}, tmp_path / "run.pt")
    run(one, first, cut_at + 1, STEPS)
    two, second, again = ready(make=make, seed=50)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    two.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert again.steps == cut_at and all("ranks" not in group for group in second.param_groups)
    run(two, second, cut_at + 1, STEPS)
    check_equal(one, two)
    assert schedule.finish() == again.finish()
    check_equal(one, two)
    assert all("ranks" not in group for group in second.state_dict()["param_groups"])


def test_a_checkpoint_folder_takes_the_schedule_among_its_tensors(tmp_path):
    one, first, schedule = ready(make=optim)
    run(one, first, last=9)
    checkpoint.save(tmp_path, {**dict(trainable(one)), **schedule.state_dict()}, first)
    run(one, first, 10, STEPS)
    two, second, again = ready(make=optim)
    checkpoint.load(tmp_path, {**dict(trainable(two)), **again.state_dict()}, second)
    assert again.steps == 9
    run(two, second, 10, STEPS)
    check_equal(one, two)


def test_a_state_of_other_ranks_is_refused_and_changes_nothing():
    model, optimizer, schedule = ready()
    run(model, optimizer, last=3)
    before = copy.deepcopy(schedule.state_dict())
    with pytest.raises(ValueError, match=r"other sites or ranks \(0/u/mean, .*, 21 in all\)"):
        schedule.load_state_dict(RankSchedule(net(rank=3), RULE).state_dict())
    with pytest.raises(ValueError, match=r"other sites or ranks \(steps, 1 in all\)"):
        schedule.load_state_dict({k: t for k, t in before.items() if k != "steps"})
    after = schedule.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


# ---- folders and jobs


def test_saved_tensors_tell_the_ranks_to_a_fresh_model():
    one, optimizer, schedule = ready()
    run(one, optimizer)
    schedule.finish()
    saved = {name: t.detach().clone() for name, t in added(one).items()}
    two = net()
    cut_as_saved(two, saved)
    io.fill(added(two), saved, "here")
    assert torch.equal(one(rand(5, 7)), two(rand(5, 7)))
    fresh = net()
    cut_as_saved(fresh, {})
    check_equal(fresh, net())
    wide = net(rank=6)
    cut_as_saved(fresh, added(wide))
    with pytest.raises(ValueError, match="here does not fit this model: 9 of another shape"):
        io.fill(added(fresh), added(wide), "here")


def test_a_job_schedules_what_asks_for_it_and_shrinks_it_at_the_end(monkeypatch):
    taken = {}

    def train(model, batches, optimizer, *, steps, **_):
        run(model, optimizer, last=steps)
        taken["x"] = model(rand(5, 7))

    monkeypatch.setattr(lessons, "train", train)
    model = net()
    learns = Learning(trainable(model), Adam(), {}, "adapter", ranks=RULE)
    data = Split(torch.arange(40), torch.arange(8).reshape(1, 8))
    fit(model, learns, data, steps=STEPS, batch=1, lr=0.02)
    history = History(train=[(STEPS, 1.0)], validation=[(0, 2.0), (STEPS, 1.5)])
    ranks = summary(history, learns)["ranks"]
    assert ranks == {at: triples(model[int(at)].slot("default").op).e.numel() for at in SIZES}
    assert sum(ranks.values()) == END * len(SIZES)
    assert "ranks" not in summary(history, replace(learns, ranks=None))
    assert_close(model(rand(5, 7)), taken["x"], rtol=1e-13, atol=1e-13)


def plain(seed: int = 0) -> nn.Sequential:
    """The layers of `net` without adapters."""
    return nn.Sequential(*(m.base if isinstance(m, Adapted) else m for m in net(seed)))


def test_a_folder_holds_the_small_tensors_and_puts_them_on_the_base_again(tmp_path):
    args = {"rank": END, "start": 2.0, "alpha": 6.0}
    one = plain()
    edit(one, list(SIZES), adapt(adalora(**args)))
    optimizer = adamw(one, lr=0.1)
    schedule = RankSchedule(one, RULE).attach(optimizer)
    run(one, optimizer)
    schedule.finish()
    emptied = schedule.sites["2"]
    cut(emptied.slot, emptied.triples, torch.tensor([], dtype=torch.int64))
    save_adapter(tmp_path / "small", one, method="adalora", args=args, source="net")
    stored = io.read_tensors(tmp_path / "small" / io.WEIGHTS)
    alive = {at: len(site.triples.e) for at, site in schedule.sites.items()}
    assert alive["2"] == 0
    assert sum(t.numel() for t in stored.values()) == sum(alive[at] * (m + n + 1) for at, (m, n) in SIZES.items())
    two = plain()
    put_adapter(two, tmp_path / "small", io.read_about(tmp_path / "small"))
    assert torch.equal(one(rand(5, 7)), two(rand(5, 7)))
    other = plain(seed=1)
    with pytest.raises(ValueError, match="was trained on other weights"):
        put_adapter(other, tmp_path / "small", io.read_about(tmp_path / "small"))
    assert not any(isinstance(m, Adapted) for m in other)


# ---- other people's loops


class Answering(nn.Module):
    """The net, as Trainer asks for it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = net(seed)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.net(x) - y).square().sum()}


DATA = [{"x": rand(7, seed=t), "y": rand(6, seed=1000 + t)} for t in range(96)]


@pytest.mark.parametrize("make", [adamw, optim])
def test_trainer_drives_it_and_resumes_it_from_its_own_files_bit_for_bit(make, tmp_path):
    def trainer(folder: str, seed: int) -> tuple[Trainer, RankSchedule]:
        args = TrainingArguments(
            str(tmp_path / folder), max_steps=STEPS, save_steps=9, per_device_train_batch_size=2, use_cpu=True,
            gradient_accumulation_steps=2, report_to="none", disable_tqdm=True, seed=3,
        )  # fmt: skip
        model = Answering(seed)
        optimizer = make(model)
        schedule = RankSchedule(model, RULE).attach(optimizer)
        return Trainer(model, args, train_dataset=DATA, optimizers=(optimizer, None)), schedule

    one, first = trainer("one", 0)
    one.train()
    assert first.steps == STEPS and sum(first.ranks.values()) == END * len(SIZES)
    two, second = trainer("two", 50)
    two.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-9"))
    assert second.steps == STEPS and second.finish() == first.finish()
    check_equal(one.model, two.model)


@pytest.mark.full
@pytest.mark.parametrize("make", [adamw, optim])
def test_lightning_drives_it_and_resumes_it_from_its_own_files_bit_for_bit(make, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Lit(lightning.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = net(seed)

        def training_step(self, _: torch.Tensor) -> torch.Tensor:
            return loss_of(self.net, self.global_step)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = make(self.net)
            self.schedule = RankSchedule(self.net, RULE).attach(optimizer)
            return optimizer

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    models = Lit(0), Lit(50)
    for model, start in zip(models, (None, tmp_path / "half.ckpt"), strict=True):
        save = lightning.callbacks.ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=11)
        runner = lightning.Trainer(max_steps=STEPS, callbacks=[save], **quiet)
        runner.fit(model, torch.utils.data.DataLoader(range(STEPS)), ckpt_path=start, weights_only=True)
    assert [m.schedule.steps for m in models] == [STEPS, STEPS]
    assert models[0].schedule.finish() == models[1].schedule.finish()
    check_equal(models[0].net, models[1].net)
