"""Compression block by block: every block is cut by what really reaches it through the blocks before."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.budget import Err, Uniform
from subspan.compress import Calibration, Compression, OneShot, compress, study
from subspan.edit import replace as put
from subspan.fit import Svd, decompose
from subspan.hosts import jobs
from subspan.metric import AbsMean, Covariance, Fisher, Gram, Measure, Plain, collect
from subspan.plan import priced
from subspan.walk import Blockwise

M, N = 8, 6
DATA: dict[str, Measure] = {"absmean": AbsMean(), "gram": Gram(), "covariance": Covariance()}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(rand(*p.shape, seed=i))
    return model.eval()


def inputs() -> Tensor:
    """Correlated inputs (40, n) with a mean."""
    return 0.3 + rand(40, N, seed=1) @ torch.diag(torch.logspace(0.5, -1.5, N).double()) @ rand(N, N, seed=2)


def at(rank: int, measure: Measure) -> Compression:
    return Compression(lambda spectra, shapes: dict.fromkeys(shapes, rank), measure)


class Block(nn.Module):
    """Two layers round a tanh, with a residual; takes a mask of its own and gives a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, mask: Tensor, *, hidden: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
        return hidden + scale * self.down(torch.tanh(self.up(hidden * mask))), "also"


class Stack(nn.Module):
    """Blocks by keyword, every one with another mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(N, N)
        self.blocks = nn.ModuleList(Block(N) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = block(torch.arange(N) != i, hidden=x, scale=1.0 + i)[0]
        return x


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=30, num_key_value_heads=1, initializer_range=0.3, **sizes)
        return LlamaForCausalLM(config).double().eval()


def ids() -> Tensor:
    return torch.randint(30, (6, 2, 9), generator=torch.Generator().manual_seed(0))


# name -> (the model, its batches, how it runs)
MODELS: dict[str, Callable[[], tuple[nn.Module, list[Tensor], Callable[[nn.Module, Tensor], object]]]] = {
    "chain": lambda: (
        filled(nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, N), nn.Linear(N, M)).double()),
        list(inputs().split(9)), lambda m, x: m(x),
    ),
    "stack": lambda: (filled(Stack().double()), list(inputs().split(9)), lambda m, x: m(x)),
    "llama": lambda: (llama(), list(ids()), jobs.forward),
}  # fmt: skip


def result(out: object) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]()


def block_of(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[: 1 + next(i for i, part in enumerate(parts) if part.isdigit())])


@pytest.mark.parametrize("measure", DATA.values(), ids=DATA)
def test_every_block_is_fitted_to_what_really_reaches_it(case, measure):
    """With the blocks before it compressed and it as it was, the whole model gives what it was cut by."""
    model, batches, forward = case
    rank = 3
    with torch.no_grad():
        plan, done = compress(model, at(rank, measure), batches=batches, forward=forward, walk=Blockwise())
    swaps = dict(done.swaps)
    done.undo()
    blocks = list(dict.fromkeys(map(block_of, plan.sites)))
    assert len(blocks) == 3 and list(plan.sites) == list(swaps)
    for block in blocks:
        here = {name: old for name, (old, _) in swaps.items() if block_of(name) == block}
        means = collect(model, batches, measure, here, forward=forward)
        for name, old in here.items():
            new = swaps[name][1]
            part = decompose(old.weight.detach(), measure.metric(means[name]))
            assert_close(new.weight, part.cut(rank).dense(), rtol=1e-9, atol=1e-9, msg=name)
            assert plan.sites[name].error == pytest.approx(part.error(rank), rel=1e-9)
            if isinstance(measure, Covariance):
                bias = 0 if old.bias is None else old.bias
                assert_close(new.bias, bias + part.shift(rank), rtol=1e-9, atol=1e-9)
        for name in here:
            put(model, name, swaps[name][1])
    assert sum(p.numel() * 8 for p in model.parameters()) == plan.bytes[1]


@pytest.mark.parametrize("measure", DATA.values(), ids=DATA)
def test_the_first_block_is_that_of_one_shot_and_later_ones_are_not(case, measure):
    model, batches, forward = case
    weights = []
    for walk in (OneShot(), Blockwise()):
        _, done = compress(model, at(3, measure), batches=batches, forward=forward, walk=walk)
        weights.append({name: new.weight for name, (_, new) in done.swaps.items()})
        done.undo()
    same = {name: bool(torch.allclose(w, weights[1][name], rtol=1e-10)) for name, w in weights[0].items()}
    first = block_of(next(iter(same)))
    assert same == {name: block_of(name) == first for name in same}


@pytest.mark.parametrize("measure", DATA.values(), ids=DATA)
def test_block_by_block_at_full_rank_is_the_model_itself(case, measure):
    model, batches, forward = case
    with torch.no_grad():
        before = result(forward(model, batches[0]))
        whole = study(model).plan(Uniform(Err(0.0)))
        kept, done = Blockwise().follow(model, whole, measure, data=Calibration(batches, forward), track=iter)
        assert kept == whole and not done.swaps and torch.equal(result(forward(model, batches[0])), before)
        rows = {name: replace(site, form="lowrank") for name, site in whole.sites.items()}
        _, done = Blockwise().follow(
            model, replace(whole, sites=rows), measure, data=Calibration(batches, forward), track=iter
        )
        assert list(done) == list(rows)
        assert_close(result(forward(model, batches[0])), before, rtol=1e-9, atol=1e-9)


def test_without_data_block_by_block_is_one_shot(case):
    model, batches, forward = case
    seen = []
    for walk in (OneShot(), Blockwise()):
        plan, done = compress(model, at(3, Plain()), forward=forward, walk=walk)
        with torch.no_grad():
            seen.append((plan, result(forward(model, batches[0]))))
        done.undo()
    assert seen[0][0] == seen[1][0] and torch.equal(seen[0][1], seen[1][1])


def pair() -> tuple[nn.Module, Tensor, Tensor]:
    """Two linear layers with nothing between, and their weights."""
    model = filled(nn.Sequential(nn.Linear(N, M, bias=False), nn.Linear(M, M, bias=False)).double())
    return model, model[0].weight.detach().clone(), model[1].weight.detach().clone()


@pytest.mark.parametrize("rank", range(1, N))
def test_the_second_of_two_linear_layers_is_cut_by_the_gram_of_the_firsts_outputs(rank):
    (model, w1, w2), x = pair(), inputs()
    compress(model, at(rank, Gram()), batches=list(x.split(9)), walk=Blockwise())
    a1 = Svd(rank)(w1, Gram().metric(x.mT @ x)).dense()
    a2 = Svd(rank)(w2, Gram().metric(a1 @ (x.mT @ x) @ a1.mT)).dense()
    with torch.no_grad():
        assert_close(model[0].weight, a1, rtol=1e-9, atol=1e-9)
        # The Gram is singular, so only what the second makes of the first's outputs is settled.
        assert_close(model[1].weight @ a1, a2 @ a1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", range(1, N))
def test_of_two_linear_layers_block_by_block_is_never_worse_than_one_shot(rank):
    """The errors of a Gram cut are orthogonal to what it keeps: the two layers' squares add up, and the second
    is then the best of its rank. With more layers, or layers that are not linear, this is no theorem."""
    x, lost = inputs(), {}
    for walk in (OneShot(), Blockwise()):
        model, w1, w2 = pair()
        with torch.no_grad():
            y = model(x)
            compress(model, at(rank, Gram()), batches=[x], walk=walk)
            a1, a2 = model[0].weight, model[1].weight
            lost[type(walk)] = (model(x) - y).square().sum()
            parts = (x @ (w1 - a1).mT @ w2.mT).square().sum() + (x @ a1.mT @ (w2 - a2).mT).square().sum()
            assert_close(lost[type(walk)], parts, rtol=1e-9, atol=0.0)
    assert lost[Blockwise] <= lost[OneShot] * (1 + 1e-9)


def test_a_plan_is_followed_block_by_block_with_the_forms_a_person_wrote():
    model, batches = llama(), ids()
    plan, _ = jobs.make_plan(model, "lord", {"target": {"err": 0.7}}, batches=batches)
    name, other = list(plan.sites)[3], list(plan.sites)[-1]
    asked = {name: priced(replace(plan.sites[name], form="dense")), other: replace(plan.sites[other], form="keep")}
    edited = replace(plan, sites={**plan.sites, **asked})
    found, done = jobs.follow_plan(model, edited, batches=batches, walk=Blockwise())
    assert type(model.get_submodule(name).op).__name__ == "Dense" and other not in done.swaps
    assert {n: (s.rank, s.form, s.bytes_after) for n, s in found.sites.items() if n != other} == {
        n: (s.rank, s.form, s.bytes_after) for n, s in edited.sites.items() if n != other
    }
    done.undo()
    direct, _ = jobs.do_method(model, "lord", {"target": {"err": 0.7}}, batches=batches, walk=Blockwise())
    assert (direct.method, direct.args, direct.ranks()) == (plan.method, plan.args, plan.ranks())
    first = [n for n in plan.sites if ".layers.0." in n]
    assert [direct.sites[n].error for n in first] == pytest.approx([plan.sites[n].error for n in first], rel=1e-9)


# ---- what cannot be walked is refused, and the model is as it was ----


class Glued(nn.Module):
    """Something happens between the blocks."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(N, N) for _ in range(blocks))
        self.head = nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = 2 * block(x)
        return self.head(x)


class Twice(nn.Sequential):
    """Its blocks run twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def square() -> nn.Module:
    return nn.Sequential(nn.Linear(N, N), nn.Linear(N, N), nn.Linear(N, N))


class Poison(nn.Module):
    """Puts out NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float("nan")


class Towers(nn.Module):
    """Two stacks of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = square(), square()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Boxed(nn.Module):
    """A block whose output is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(N, N)

    def forward(self, x: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": self.inner(x["x"] if isinstance(x, dict) else x)}


REFUSED: dict[str, tuple[Callable[[], nn.Module], Compression, str | None, str]] = {
    "between": (Glued, at(2, Gram()), None, r"blocks\.1 was not called once and with what blocks\.0 put out"),
    "twice": (lambda: Twice(*square()), at(2, Gram()), "0|1", r"0 was not called once"),
    "no block": (Glued, at(2, Gram()), "head|blocks.0", r"head is in no numbered block.*'!head'"),
    "two stacks": (Towers, at(2, Gram()), None, r"lie in 2 stacks of blocks \('a', 'b'\).*'a\.\*'"),
    "gradients": (square, at(2, Fisher()), None, r"Fisher\(\) reads gradients, .*one shot"),
    "nan": (lambda: nn.Sequential(nn.Linear(N, N), Poison(), nn.Linear(N, N)), at(2, Gram()), None,
            r"input statistic of 2 .*nan"),
    "no tensor": (lambda: nn.Sequential(Boxed(), Boxed()), at(2, Gram()), None, r"0 puts out dict, not hidden"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_walked_is_refused_and_left_as_it_was(name):
    make, method, select, says = REFUSED[name]
    model = make().double().train()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=says):
        compress(model, method, select=select, batches=[inputs()], walk=Blockwise())
    assert dict(model.named_modules()) == modules
    assert not any(m._forward_pre_hooks or m._forward_hooks or not m.training for m in modules.values())


def test_a_cache_that_remembers_is_refused():
    model = llama()
    with pytest.raises(
        ValueError, match=r"layers\.0 is given past_key_values of type DynamicCache.*use_cache=False"
    ):
        compress(model, at(2, Gram()), batches=[{"input_ids": ids()[0]}], walk=Blockwise())


@pytest.mark.parametrize("batches,says", [(None, "calibration batches"), ([], "no calibration batch reached")])
def test_a_walk_without_data_says_what_to_pass(batches, says):
    with pytest.raises(ValueError, match=says):
        compress(square().double(), at(2, Gram()), batches=batches, walk=Blockwise())


def test_track_sees_the_sites_and_then_the_blocks_from_the_first_to_the_last():
    seen: list[str] = []
    model = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N), nn.Linear(N, N)).double()
    compress(
        model, at(2, Gram()), select="1|3", batches=[inputs()], walk=Blockwise(),
        track=lambda names: [seen.append(name) or name for name in names],
    )  # fmt: skip
    assert seen == ["1", "3"] + ["1", "2", "3"]
