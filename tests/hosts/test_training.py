"""The training loop is the few lines it stands for, bit for bit, and stops loudly when it cannot work."""

import copy
import math
import resource

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.hosts.meter import Meter
from subspan.hosts.score import nll
from subspan.hosts.training import cosine, draw, next_token, sample, state_bytes, train
from subspan.methods import build
from subspan.optim import Optim

TEXT = torch.arange(400) * 37 % 300
HELD = torch.arange(3 * 12).reshape(3, 12) * 41 % 300


def batches(steps: int, seed: int = 0) -> list[torch.Tensor]:
    return list(draw(TEXT, length=12, batch=2, steps=steps, seed=seed))


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.named_parameters(), lr=lr, weight_decay=0.1)


# ---- batches


def test_draw_is_the_same_for_the_same_seed_and_another_for_another():
    one, two, other = (torch.stack(batches(5, seed)) for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_draw_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    batches(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_window_is_a_piece_of_the_text_and_both_ends_are_reached():
    ids = torch.arange(20)
    found = torch.cat(list(draw(ids, length=4, batch=5, steps=60)))
    assert torch.equal(found - found[:, :1], torch.arange(4).expand(300, 4))
    assert set(found[:, 0].tolist()) == set(range(17))


def test_a_text_of_one_window_has_that_window_and_a_shorter_one_is_refused():
    assert torch.equal(next(draw(torch.arange(4), length=4, batch=2, steps=1)), torch.arange(4).expand(2, 4))
    with pytest.raises(ValueError, match=r"the text has 3 tokens, fewer than one window of 4; give a longer text"):
        next(draw(torch.arange(3), length=4, batch=2, steps=1))


# ---- schedule


@pytest.mark.parametrize(("steps", "warmup", "floor"), [(100, 10, 0.1), (7, 3, 0.0), (50, 0, 0.25), (1, 1, 0.1)])
def test_the_schedule_is_its_closed_form(steps, warmup, floor):
    for t in range(steps + 1):
        if t < warmup:
            expected = (t + 1) / warmup
        else:
            x = (t - warmup) / max(1, steps - warmup)
            expected = floor + (1 - floor) * math.cos(math.pi * x / 2) ** 2
        assert cosine(t, steps, warmup=warmup, floor=floor) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    rates = [cosine(t, steps, warmup=warmup, floor=floor) for t in range(warmup, steps + 1)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1


# ---- the loop


@pytest.mark.parametrize("clip", [1.0, 0.01, None])
@pytest.mark.parametrize("warmup", [None, 3])
def test_train_is_the_loop_written_by_hand_bit_for_bit(llama, clip, warmup):
    twin, steps, losses = copy.deepcopy(llama).train(), 6, []
    optimizer = adamw(twin)
    for t, ids in enumerate(batches(steps)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * cosine(t, steps, warmup=warmup or 1)
        loss = twin(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            clip_grad_norm_(twin.parameters(), clip)
        optimizer.step()
        losses.append((t + 1, loss.item()))
    history = train(llama, batches(steps), adamw(llama), steps=steps, clip=clip, warmup=warmup)
    assert history.train == losses
    for (name, p), q in zip(llama.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not llama.training


@pytest.mark.parametrize("method", ["adamw", "mezo"])
def test_the_model_s_own_loss_is_the_default(llama, method):
    twin = copy.deepcopy(llama)
    train(llama, batches(2), Optim(llama.named_parameters(), build(method), lr=1e-3), steps=2)
    train(twin, batches(2), Optim(twin.named_parameters(), build(method), lr=1e-3), steps=2, loss=next_token)
    assert all(torch.equal(p, q) for p, q in zip(llama.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("method", ["sgd", "mezo"])
def test_four_times_the_loss_at_a_quarter_of_the_rate_is_the_same_training(llama, method):
    twin = copy.deepcopy(llama)

    def learned(model, lr, loss):
        named = list(model.named_parameters())
        rule = Optim(named, build("mezo"), lr=lr) if method == "mezo" else torch.optim.SGD(named, lr=lr)
        return train(model, batches(3), rule, steps=3, clip=None, loss=loss).train

    one = learned(llama, 1e-3, None)
    four = learned(twin, 0.25e-3, lambda model, ids: 4 * next_token(model, ids))
    assert [(step, 4 * loss) for step, loss in one] == four
    assert all(torch.equal(p, q) for p, q in zip(llama.parameters(), twin.parameters(), strict=True))


def test_only_what_the_optimizer_holds_is_clipped_and_stepped(llama):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    chosen = [(n, p) for n, p in llama.named_parameters() if "mlp" in n]
    twin = copy.deepcopy(llama)
    train(llama, batches(2), torch.optim.SGD(chosen, lr=1.0), steps=2, clip=1e-3)
    moved = {name for name, p in llama.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, _ in chosen}
    for p in twin.parameters():
        p.requires_grad_(False)
    only = [(n, p.requires_grad_()) for n, p in twin.named_parameters() if "mlp" in n]
    train(twin, batches(2), torch.optim.SGD(only, lr=1.0), steps=2, clip=1e-3)
    assert all(torch.equal(p, q) for p, q in zip(llama.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(("steps", "every", "at"), [(6, 2, [0, 2, 4, 6]), (5, 3, [0, 3, 5]), (2, 100, [0, 2])])
def test_validation_is_the_host_s_score_before_each_th_step_and_at_the_end(llama, steps, every, at):
    snapshots = {0: copy.deepcopy(llama)}
    history = train(
        llama,
        batches(steps),
        adamw(llama),
        steps=steps,
        validation=HELD,
        every=every,
        after=lambda step: snapshots.update({step: copy.deepcopy(llama)}),
    )
    assert list(snapshots) == list(range(steps + 1))
    assert history.validation == [(step, nll(snapshots[step], HELD).mean().item()) for step in at]
    assert history.final == history.validation[-1][1]


def test_validation_does_not_change_the_training(llama):
    twin = copy.deepcopy(llama)
    one = train(llama, batches(4), adamw(llama), steps=4, validation=HELD, every=1)
    two = train(twin, batches(4), adamw(twin), steps=4)
    assert one.train == two.train and two.validation == []
    assert all(torch.equal(p, q) for p, q in zip(llama.parameters(), twin.parameters(), strict=True))


def test_the_history_tells_speed_memory_and_state(llama):
    optimizer = adamw(llama)
    with Meter() as meter:
        history = train(llama, batches(3), optimizer, steps=3)
    assert [step for step, _ in history.train] == [1, 2, 3]
    assert history.tokens_per_second > 3 * 24 / meter.seconds
    assert 2**20 < history.peak_rss < 1.1 * 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert history.state_bytes == state_bytes(optimizer)
    numbers = sum(p.numel() for p in llama.parameters())
    counters = len(list(llama.parameters()))
    assert history.state_bytes == 2 * 8 * numbers + 4 * counters


def test_state_bytes_is_the_sum_over_tensors_and_what_optim_says(llama):
    optimizer = Optim(llama.named_parameters(), build("galore", rank=3, every=2), lr=1e-2)
    assert state_bytes(optimizer) == 0
    train(llama, batches(3), optimizer, steps=3)
    tensors = [t for s in optimizer.state.values() for t in s.values()]
    assert state_bytes(optimizer) == optimizer.state_bytes()
    assert state_bytes(optimizer) == sum(t.numel() * t.element_size() for t in tensors) > 0


def test_state_bytes_counts_a_shared_storage_once_and_whole():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))], lr=1.0)
    storage = torch.zeros(10)
    for p, view in zip(optimizer.param_groups[0]["params"], storage.split([2, 8]), strict=True):
        optimizer.state[p] = {"one": view, "step": 3, "empty": torch.empty(0)}
    assert state_bytes(optimizer) == 40


# ---- what stops it


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 8191, 48_000])
def test_a_sample_is_spread_evenly_and_small(size):
    found = sample(torch.arange(size))
    assert len(found) <= 4096 and len(set(found.diff().tolist())) <= 1
    assert found[0] == 0 and size - found[-1] <= max(1, math.ceil(size / 4096))


def test_a_parameter_that_rounding_holds_still_is_named(llama):
    llama.bfloat16()
    with pytest.raises(RuntimeError, match=r"mine: \d+ parameters did not move in the first step, e\.g\. model\."):
        train(llama, batches(2), torch.optim.SGD(llama.named_parameters(), lr=1e-12), steps=2, label="mine")


def test_only_the_parameters_that_stood_still_are_named(llama):
    groups = [
        {"params": [(n, p)], "lr": 0.0 if n == "model.layers.1.mlp.up_proj.weight" else 1.0}
        for n, p in llama.named_parameters()
    ]
    with pytest.raises(RuntimeError, match=r": 1 parameters .* e\.g\. model\.layers\.1\.mlp\.up_proj\.weight;"):
        train(llama, batches(2), torch.optim.SGD(groups, lr=1.0), steps=2)


def test_a_parameter_without_a_gradient_may_stand_still(llama):
    llama.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    train(llama, batches(1), torch.optim.SGD(llama.named_parameters(), lr=1e-2), steps=1)
    assert torch.equal(llama.extra.detach(), torch.ones(3, dtype=torch.float64))


def test_an_embedding_whose_few_used_rows_moved_has_moved():
    sizes = {"vocab_size": 16384, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))
    embedding = model.model.embed_tokens.weight
    ids = torch.tensor([[9, 18, 31, 42, 53, 62]])  # few of so many rows that an even sample misses them all
    before = embedding.detach().clone()
    train(model, [ids], torch.optim.SGD(model.named_parameters(), lr=1.0), steps=1)
    assert set((embedding.detach() != before).any(1).nonzero().flatten().tolist()) == set(ids[0, :-1].tolist())


def test_a_loss_that_is_not_finite_stops_at_its_step_before_it_reaches_the_weights(llama):
    steps, seen = 4, []
    forward = llama.forward

    def poisoned(**inputs):
        out = forward(**inputs)
        seen.append(None)
        if len(seen) == 3:
            out.loss = out.loss * float("nan")
        return out

    llama.forward = poisoned
    with pytest.raises(FloatingPointError, match=r"mine: the loss is nan at step 3; lower the learning rate"):
        train(llama, batches(steps), adamw(llama), steps=steps, label="mine")
    assert len(seen) == 3
    assert all(bool(p.isfinite().all()) for p in llama.parameters())


def test_no_steps_are_no_training(llama):
    before = copy.deepcopy(llama)
    history = train(llama, [], adamw(llama), steps=0, validation=HELD)
    assert history.train == [] and history.tokens_per_second == 0
    assert history.validation == [(0, nll(before, HELD).mean().item())]
    assert all(torch.equal(p, q) for p, q in zip(llama.parameters(), before.parameters(), strict=True))
