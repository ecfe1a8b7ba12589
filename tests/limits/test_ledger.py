"""What the ledger predicts is what training then holds; cut over devices, it is what paper and pencil say."""

import gc
import inspect
import re
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch import nn

from subspan.methods import build, methods
from subspan.methods.optimizers import adamw, fira, galore
from subspan.optim import Adam, ErrorFeedback, Every, Momentum, Optim, Projected, Rows, Sgd, Span, ledger
from subspan.optim.ledger import dry_steps
from subspan.optim.meter import Peak

LLAMA = {
    "model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,),
    **{f"model.layers.{i}.{name}.weight": shape for i in (0, 1) for name, shape in {
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "mlp.up_proj": (24, 16),
        "mlp.down_proj": (16, 24), "input_layernorm": (16,)}.items()},
}  # fmt: skip
ODD = {
    "one.weight": (1, 7), "thin.weight": (9, 1), "tall.weight": (13, 5), "wide.weight": (5, 13), "one.bias": (7,),
    "conv.weight": (4, 3, 2, 2), "temperature": (),
}  # fmt: skip
# Rules alone: an optimizer that is no rule keeps its own books.
RULES = [name for name, m in methods("optimizer").items() if callable(getattr(m.build(), "init", None))]

every_rule = pytest.mark.parametrize("name", RULES)
every_model = pytest.mark.parametrize("shapes", [LLAMA, ODD], ids=["llama", "odd"])


def parameters(shapes, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in shapes.items()}


def made(name, rank=3):
    takes = inspect.signature(methods("optimizer")[name].build).parameters
    return build(name, "optimizer", **({"rank": rank} if "rank" in takes else {}))


def trained(named, rule, steps=3, **settings):
    """An optimizer that has stepped every parameter."""
    opt = Optim(named.items(), rule, lr=0.5, **settings)
    for step in range(steps):
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.dtype)
        opt.step()
    return opt


def one(shape, rule, **settings):
    (row,) = ledger([("w", nn.Parameter(torch.empty(shape, device="meta")))], rule, where="*", **settings).rows
    return row


def single(rule, shape, scope):
    """Bytes of the counters and other single numbers in a part of the state."""
    s = {"step": torch.tensor(0), **rule.init(torch.empty(shape), 0)}
    own = [x for key, x in s.items() if x.ndim == 0 and ("frame." in key) == (scope == "frame")]
    return sum(x.nbytes for x in own)


def parts(rule, shape, **settings):
    """Bytes of basis, moments and the rest, the first and the last without single numbers."""
    held = one(shape, rule, **settings).ours
    return held.basis - single(rule, shape, "frame"), held.moments, held.other - single(rule, shape, "rest")


def test_the_first_presets_are_reckoned():
    assert {"adamw", "fira", "frugal", "galore"} <= set(RULES)


@every_rule
@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_predicted_state_is_measured_state(name, shapes, dtype):
    named = parameters(shapes, dtype)
    found = ledger([(n, p.detach().to("meta").requires_grad_()) for n, p in named.items()], made(name))
    opt = trained(named, made(name), unmoved="allow")
    assert found.totals["state_bytes"] == opt.state_bytes()
    assert {r.name: r.ours.state for r in found.rows} == {r["name"]: r["bytes"] for r in opt.report()}
    assert {r.name: r.role for r in found.rows} == {r["name"]: r["role"] for r in opt.report()}
    assert found.totals["weight_bytes"] == sum(p.nbytes for p in named.values())
    assert found.totals["gradient_bytes"] == sum(p.grad.nbytes for p in named.values())


@every_rule
@pytest.mark.parametrize("rank", [1, 5, 11, 16])
def test_it_pays_exactly_where_less_is_held_than_by_adamw(name, rank):
    rule = made(name, rank)
    ours = {row["name"]: row["bytes"] for row in trained(parameters(LLAMA), rule, 1, unmoved="allow").report()}
    peer = {row["name"]: row["bytes"] for row in trained(parameters(LLAMA), Adam(), 1).report()}
    found = ledger(parameters(LLAMA).items(), rule)
    assert {row.name: row.pays for row in found.rows} == {n: ours[n] < peer[n] for n in LLAMA}
    assert {row.name: row.adamw.state for row in found.rows} == peer
    assert all(bool(row.reason) != row.pays for row in found.rows)
    stuck = {row.size for row in found.rows if row.role == "rule" and not row.pays}
    assert len(found.remarks()) == len(stuck)
    assert all(any(f"of {size} " in line for line in found.remarks()) for size in stuck)


def test_a_full_basis_outweighs_what_it_saves():
    row = one((8, 12), galore(rank=8))
    assert parts(galore(rank=8), (8, 12)) == (8 * 8 * 4, 2 * 8 * 12 * 4, 0)
    assert row.adamw.state == 2 * 8 * 12 * 4 + 8
    assert not row.pays
    assert re.fullmatch(r"a basis of 2\d\d bytes and moments of 768 outweigh AdamW's 776; choose a .*", row.reason)


def test_the_parts_of_the_state():
    assert parts(fira(rank=2), (6, 9)) == (6 * 2 * 4, 2 * 2 * 9 * 4, 0)
    feedback = Projected(Span(2), Every(1), Momentum(), ErrorFeedback())
    assert parts(feedback, (6, 9)) == (6 * 2 * 4, 2 * 9 * 4, 6 * 9 * 4)
    drawn = Projected(Rows(2), Every(1), Momentum())
    assert parts(drawn, (6, 9)) == (2 * 8, 2 * 9 * 4, 0)
    nested = Projected(Span(4), Every(1), Projected(Span(2), Every(1), Momentum()))
    assert parts(nested, (6, 9)) == ((6 * 4 + 4 * 2) * 4, 2 * 9 * 4, 0)


@pytest.mark.parametrize(
    "shape, shards, rows", [((10, 4), 4, 3), ((10, 4), 3, 4), ((9,), 4, 3), ((2, 5), 4, 1), ((), 4, 1)]
)
def test_the_first_device_holds_the_first_chunk(shape, shards, rows):
    chunk = torch.empty(shape).chunk(shards)[0] if shape else torch.empty(shape)
    row = one(shape, Adam(), shards=shards)
    assert (len(chunk) if shape else 1) == rows
    assert row.weight == row.gradient == chunk.nbytes
    assert row.ours.state == row.adamw.state == 2 * chunk.nbytes + 8


def test_what_follows_the_rows_is_cut_and_the_rest_is_whole():
    rule = galore(rank=2)
    tall = 4 * 2 * 4, 2 * (2 * 3) * 4, 0  # 3 of 10 rows; compressed on the right
    wide = (2 * 2) * 4, 2 * (2 * 10) * 4, 0  # 2 of 4 rows; compressed on the left
    square = 6 * 2 * 4, 2 * (2 * 3) * 4, 0  # 3 of 6 rows; compressed on the right
    batch = 2 * (4 * 2) * 4, 2 * 2 * (2 * 5) * 4, 0  # 2 of 6 matrices
    almost = (2 * 2) * 4, 2 * (2 * 5) * 4, 0  # 2 of 4 rows; one row more would be compressed on the right
    assert parts(rule, (10, 4), shards=4) == tall
    assert parts(rule, (4, 10), shards=2) == wide
    assert parts(rule, (6, 6), shards=2) == square
    assert parts(rule, (6, 5, 4), shards=4) == batch
    assert parts(rule, (4, 5), shards=2) == almost


def test_whole_moments_can_cost_more_than_adamws_cut_ones():
    assert one((8, 32), galore(rank=3)).pays
    assert not one((8, 32), galore(rank=3), shards=4).pays


@every_rule
def test_more_devices_never_hold_more_and_one_is_the_whole(name):
    named = parameters(LLAMA)
    found = [ledger(named.items(), made(name), shards=n) for n in (1, 2, 4, 1000)]
    assert found[0] == ledger(named.items(), made(name))
    assert found[-1].totals["weight_bytes"] == 4 * sum(p[0].numel() for p in named.values())
    for fewer, more in pairwise(found):
        assert fewer.totals["state_bytes"] >= more.totals["state_bytes"]
        assert fewer.totals["adamw_state_bytes"] > more.totals["adamw_state_bytes"]


def test_half_precision_halves_weights_and_gradients_not_state():
    full, half = [ledger(parameters(LLAMA, d).items(), fira(rank=3)) for d in (torch.float32, torch.bfloat16)]
    assert half.totals["weight_bytes"] * 2 == full.totals["weight_bytes"]
    assert half.totals["gradient_bytes"] * 2 == full.totals["gradient_bytes"]
    assert half.totals["state_bytes"] == full.totals["state_bytes"]
    assert all(row.ours.workspace >= 4 * torch.Size(row.shape).numel() for row in half.rows)


def test_frozen_parameters_only_weigh():
    named = parameters({"a.weight": (6, 5), "b.weight": (6, 5)})
    named["a.weight"].requires_grad_(False)
    frozen, free = ledger(named.items(), Adam()).rows
    assert (frozen.role, frozen.weight, frozen.gradient, frozen.ours.state, frozen.adamw.state) == (
        "frozen", 120, 0, 0, 0,
    )  # fmt: skip
    assert (free.role, free.gradient, free.ours.state) == ("rule", 120, 248)


def test_a_rule_that_holds_nothing_has_the_counter_of_its_steps():
    found = ledger(parameters({"a.weight": (6, 5)}).items(), Sgd())
    assert (found.totals["state_bytes"], found.ratio) == (8, 8 / 248)


def test_live_counts_storages_while_they_last():
    with Peak(answer=True) as live:
        x = torch.zeros(8, dtype=torch.float64)
        view = x[2:].mul_(2)
        assert (live.now, live.most) == (64, 64)
        y = x + 1
        assert live.now == 128
        del x, y
        gc.collect()
        assert (live.now, live.most) == (64, 128)
        del view
        gc.collect()
        assert (live.now, live.most) == (0, 128)


@pytest.mark.parametrize("rule", [Momentum(), Adam(eps_on="raw"), galore(rank=8), fira(rank=8)], ids=repr)
@pytest.mark.parametrize("shape", [(120, 80), (64, 96)], ids=str)
def test_a_dry_step_takes_the_space_of_a_real_one(rule, shape):
    with Peak(answer=True) as live:
        p = nn.Parameter(torch.randn(shape))
        p.grad = torch.randn(shape)
        opt, peaks = Optim([("w", p)], rule, lr=1e-3), []
        for _ in range(2):
            live.most = live.now
            opt.step()
            peaks.append(live.most - live.now)
    # LAPACK's copies of its input and output differ from those of the meta kernel.
    assert max(peaks) == pytest.approx(dry_steps(rule, shape, torch.float32, Peak(answer=True)), rel=0.1)


@dataclass(frozen=True)
class ByValue(Sgd):
    """A rule whose step is as large as its gradient has non-zeros."""

    def update(self, g, s, w, t):
        return g * len(g.nonzero())


@dataclass(frozen=True)
class Late(Sgd):
    """A rule whose later steps take more than its first."""

    def update(self, g, s, w, t):
        return (g.repeat(1, 8) + 1)[:, : g.shape[1]] if t > 1 else g


def test_a_later_step_may_be_the_largest():
    # Eight copies and their sum with 1 in the second step; in the first, Optim's copy of the weight.
    row = one((16, 16), Late())
    assert row.ours.workspace == 2 * 8 * 16 * 16 * 4
    assert one((16, 16), Sgd()).ours.workspace <= 2 * 16 * 16 * 4


class Bookkeeper:
    """Something that says what it keeps, and is stepped by others."""

    def init(self, g, seed):
        return {}


@pytest.mark.parametrize("rule", [ByValue(), Bookkeeper()], ids=["by value", "by others"])
def test_a_workspace_that_cannot_be_tried_is_not_guessed(rule):
    found = ledger(parameters(LLAMA).items(), rule)
    assert found.totals["workspace_bytes"] is None
    assert {row.ours.workspace for row in found.rows if row.role == "rule"} == {None}
    assert found.totals["adamw_workspace_bytes"] > 0


def test_totals_are_sums_and_the_largest_workspace():
    found = ledger(parameters(LLAMA).items(), fira(rank=3), shards=2)
    told = found.to_dict()
    assert told["shards"] == 2
    assert [row["name"] for row in told["parameters"]] == list(LLAMA)
    for key, total in told["totals"].items():
        gather = max if "workspace" in key else sum
        assert total == gather(row[key] for row in told["parameters"])
    assert told["ratio"] == told["totals"]["state_bytes"] / told["totals"]["adamw_state_bytes"]
    three = ("moment_bytes", "basis_bytes", "other_bytes")
    assert all(row["state_bytes"] == sum(row[key] for key in three) for row in told["parameters"])


def test_the_table_has_a_line_for_parameters_that_are_alike():
    mib = 2**20
    named = {f"layers.{i}.q_proj.weight": torch.empty(1024, 2048, device="meta") for i in range(3)}
    found = ledger([(n, nn.Parameter(p)) for n, p in named.items()], galore(rank=256))
    console = Console(width=160)
    with console.capture() as shown:
        console.print(found.table("galore"))
    lines = {line.strip().partition("   ")[0]: line.split() for line in shown.get().splitlines()}
    moments, basis = 3 * 2 * 256 * 2048 * 4 / mib, 3 * 1024 * 256 * 4 / mib
    sums = [f"{x:.2f}" for x in (24, 24, moments, basis, moments + basis, 48)]
    assert lines["3 of 1024x2048: q_proj"][4:10] == sums
    assert lines["all, by galore"][3:9] == sums
    assert lines["all, by galore"][-1] == f"{found.ratio:.1%}" == "31.3%"
    assert lines["all, by AdamW"][3:9] == ["24.00", "24.00", "48.00", "0.00", "48.00", "48.00"]
    assert len(found.groups()) == 1


@pytest.mark.parametrize(
    "rule, settings, words",
    [
        (Adam(), {"shards": 0}, "shards=0 is less than 1"),
        (Adam(), {"where": "*.v_proj"}, "matches no parameter; there are: model.embed_tokens"),
        (galore(rank=2), {"where": "*norm*"}, r"model.norm.weight: a subspace needs a matrix, not shape \(16,\)"),
    ],
)
def test_what_cannot_be_reckoned_is_refused(rule, settings, words):
    with pytest.raises(ValueError, match=words):
        ledger(parameters(LLAMA).items(), rule, **settings)


def test_a_parameter_given_twice_is_refused_as_by_the_optimizer():
    p = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match="b is given twice"):
        ledger([("a", p), ("b", p)], adamw())
