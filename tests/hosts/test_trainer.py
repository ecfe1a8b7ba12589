"""Trainer drives our optimizers as its own: schedule, decay, betas, epsilon, and resuming from its own files."""

import inspect
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from subspan.adapt import adapt, trainable
from subspan.edit import edit
from subspan.hosts.trainer import optimizer_factory, optimizer_for
from subspan.methods import build, methods
from subspan.optim import Adam, Optim, Recipe, Sgd, hasten
from subspan.optim.pairs import usual

STEPS, SAVED = 8, 5  # with every=4 the checkpoint lies within a refresh interval
SMALL = {"rank": 4, "every": 4}
ALL = {
    name: {key: value for key, value in SMALL.items() if key in inspect.signature(method.build).parameters}
    for name, method in methods("optimizer").items()
    if name != "mezo"  # which Trainer cannot run: see the last test
}
METHODS = {name: ALL[name] for name in ("adamw", "galore", "fira", "frugal")}
GIVEN = {"weight_decay": 0.3, "adam_beta1": 0.7, "adam_beta2": 0.9, "adam_epsilon": 1e-3}
DATA = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(40 * 12) ** 2 % 61).reshape(40, 12)]


def model(seed: int = 0, *, dropout: float = 0.1) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "attention_bias": True,
        "attention_dropout": dropout,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**sizes))


def arguments(folder, **given) -> TrainingArguments:
    usual = {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "adamw_torch",
        "seed": 7,
    }
    return TrainingArguments(str(folder), **usual | GIVEN | given)


def trainer(args, made=None, *, start=None, **given) -> Trainer:
    """A Trainer with our factory, or Trainer's own AdamW for None."""
    return Trainer(start or model(), args, train_dataset=DATA, optimizer_cls_and_kwargs=made, **given)


def ours(folder, method: str, options=None, *, start=None, **given) -> Trainer:
    args = arguments(folder, **given)
    return trainer(
        args, optimizer_factory(method, args, **ALL[method] if options is None else options), start=start
    )


def trained(run: Trainer) -> Trainer:
    """The run, at its end; Trainer seeds when it is built, so build and train one after the other."""
    run.train()
    return run


def rates(run: Trainer) -> list[float]:
    return [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[str, Trainer]:
    """An uninterrupted run of every method, whose folder holds checkpoint-5."""
    return {method: trained(ours(tmp_path_factory.mktemp(method), method)) for method in ALL}


def checkpoint(run: Trainer) -> str:
    return f"{run.args.output_dir}/checkpoint-{SAVED}"


# ---- resuming


@pytest.mark.parametrize("method", ALL)
def test_a_run_resumed_from_trainer_s_files_ends_bit_for_bit_as_the_uninterrupted_one(tmp_path, finished, method):
    whole = finished[method]
    resumed = ours(tmp_path, method, start=model(seed=1))
    resumed.train(resume_from_checkpoint=checkpoint(whole))
    assert resumed.state.global_step == STEPS and rates(resumed) == rates(whole)
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    states = [run.optimizer.state_dict()["state"] for run in (whole, resumed)]
    for i, key in ((i, key) for i, row in states[0].items() for key in row):
        assert torch.equal(states[0][i][key], states[1][i][key]), (i, key)


@pytest.mark.parametrize(("saved", "asked"), list(itertools.permutations(METHODS, 2)))
def test_the_checkpoint_of_another_method_is_refused_with_the_difference(tmp_path, finished, saved, asked):
    other = ours(tmp_path, asked)
    first, row = state_of_a_matrix(finished[saved])
    with pytest.raises(ValueError) as caught:
        other.train(resume_from_checkpoint=checkpoint(finished[saved]))
    message, rule = str(caught.value), build(asked, **options_of(asked))
    assert message.startswith(f"{first}: the saved state (")
    assert f" was not written by {rule!r}; " in message
    blank = rule.init(torch.zeros(32, 32), 0)
    assert all(f"with {key} {tuple(x.shape)}" in message for key, x in row.items() if key not in {*blank, "step"})
    assert all(f"without {key} {tuple(x.shape)}" in message for key, x in blank.items() if key not in row)


def options_of(method: str) -> dict:
    """The method's options, with the inner Adam that GIVEN stands for."""
    b1, b2, eps = GIVEN["adam_beta1"], GIVEN["adam_beta2"], GIVEN["adam_epsilon"]
    if method == "adamw":
        return {"b1": b1, "b2": b2, "eps": eps}
    return ALL[method] | {"rule": Adam(b1, b2, eps, "corrected" if method == "frugal" else "raw")}


def state_of_a_matrix(run: Trainer) -> tuple[str, dict]:
    group = run.optimizer.param_groups[0]
    assert group["role"] == "rule"
    return group["param_names"][0], run.optimizer.state[group["params"][0]]


def test_a_checkpoint_of_another_rank_or_selection_is_refused(tmp_path, finished):
    with pytest.raises(
        ValueError, match=r"q_proj.weight: the saved state \(with .*\(32, 4\).* not written by .*Span\(rank=3"
    ):
        ours(tmp_path, "galore", {"rank": 3}).train(resume_from_checkpoint=checkpoint(finished["galore"]))
    args = arguments(tmp_path)
    made = optimizer_factory(
        "galore", args, rank=4, every=4, where=lambda name, p: name.endswith("up_proj.weight")
    )
    with pytest.raises(
        ValueError, match=r"other parameters \(in another role: .*layers.0.self_attn.q_proj.weight"
    ):
        trainer(args, made).train(resume_from_checkpoint=checkpoint(finished["galore"]))


def test_trainer_s_own_checkpoint_is_refused(tmp_path):
    trained(trainer(arguments(tmp_path)))
    with pytest.raises(ValueError, match=r"this state holds no parameter names, so it was not saved by Optim"):
        ours(tmp_path, "galore").train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{SAVED}")


# ---- what of TrainingArguments is honoured


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"weight_decay": 0.0},
        {"adam_beta1": 0.0},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 1e-8},
        {"learning_rate": 1e-3},
        {"lr_scheduler_type": "linear", "warmup_steps": 3},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    ],
    ids=str,
)
def test_our_adamw_is_trainer_s_adamw(tmp_path, given):
    mine = trained(ours(tmp_path / "mine", "adamw", start=model().double(), **given))
    own = trained(trainer(arguments(tmp_path / "own", **given), start=model().double()))
    assert type(own.optimizer.optimizer) is torch.optim.AdamW
    assert rates(mine) == rates(own) and len(set(rates(mine))) == STEPS
    for (name, p), q in zip(mine.model.named_parameters(), own.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_every_setting_that_the_runs_above_compare_changes_the_end(tmp_path, finished):
    changes = [{"weight_decay": 0.0}, {"adam_beta1": 0.0}, {"adam_beta2": 0.5}, {"adam_epsilon": 1e-8}]
    for i, change in enumerate(changes):
        run = trained(ours(tmp_path / str(i), "adamw", **change))
        pairs = zip(finished["adamw"].model.parameters(), run.model.parameters(), strict=True)
        assert max((p - q).abs().max().item() for p, q in pairs) > 1e-3, change


@pytest.mark.parametrize("method", ALL)
def test_decay_acts_on_the_parameters_that_trainer_decays(tmp_path, method):
    run, own = ours(tmp_path, method), trainer(arguments(tmp_path))
    run.create_optimizer(), own.create_optimizer()
    names = {id(p): name for name, p in own.model.named_parameters()}
    theirs = {names[id(p)]: g["weight_decay"] for g in own.optimizer.param_groups for p in g["params"]}
    assert {n: g["weight_decay"] for g in run.optimizer.param_groups for n in g["param_names"]} == theirs
    assert set(theirs.values()) == {0.0, 0.3}
    roles = [(g["role"], g["weight_decay"]) for g in run.optimizer.param_groups]
    assert roles == [("rule", 0.3), ("other", 0.3), ("other", 0.0)]


@pytest.mark.parametrize("method", ALL)
def test_trainer_s_run_is_the_loop_written_by_hand_bit_for_bit(tmp_path, method):
    args, batches, by_hand = arguments(tmp_path), [], model(dropout=0.0).train()
    run = trainer(
        args,
        optimizer_factory(method, args, **ALL[method]),
        start=model(dropout=0.0),
        data_collator=lambda rows: batches.append(default_data_collator(rows)) or batches[-1],
    )
    run.train()
    optimizer = optimizer_for(by_hand, method, args, **ALL[method])
    for t, batch in enumerate(batches[:STEPS]):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * t / STEPS)))
        optimizer.zero_grad()
        by_hand(**batch).loss.backward()
        clip_grad_norm_(by_hand.parameters(), args.max_grad_norm)
        optimizer.step()
    for (name, p), q in zip(run.model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("method", METHODS)
def test_betas_and_epsilon_are_those_of_the_arguments(tmp_path, method):
    optimizer = optimizer_for(model(), method, arguments(tmp_path), **ALL[method])
    assert optimizer.rules["rule"] == build(method, **options_of(method))
    assert optimizer.rules["other"] == Adam(0.7, 0.9, 1e-3)
    assert optimizer.seed == 7


def test_a_rule_that_is_given_counts(tmp_path):
    optimizer = optimizer_for(model(), "galore", arguments(tmp_path), rank=4, rule=Sgd())
    assert optimizer.rules["rule"] == build("galore", rank=4, rule=Sgd())
    assert optimizer_for(model(), "fira", arguments(tmp_path), limit=None).rules["rule"].residual.limit is None


def test_arguments_are_read_when_trainer_asks_and_frozen_parameters_are_left_out(tmp_path):
    args = arguments(tmp_path)
    made = optimizer_factory("galore", args, rank=4)
    args.learning_rate = 0.5
    frozen = model()
    frozen.model.embed_tokens.weight.requires_grad_(False)
    run = trainer(args, made, start=frozen)
    groups = run.create_optimizer().param_groups
    assert {g["lr"] for g in groups} == {0.5}
    held = {name for g in groups for name in g["param_names"]}
    assert held == {name for name, _ in frozen.named_parameters()} - {"model.embed_tokens.weight"}


def test_a_model_that_trainer_builds_itself_is_the_one_that_moves(tmp_path, finished):
    args = arguments(tmp_path)
    run = Trainer(
        model_init=lambda: model(), args=args, train_dataset=DATA,
        optimizer_cls_and_kwargs=optimizer_factory("galore", args, **ALL["galore"]),
    )  # fmt: skip
    run.train()
    for p, q in zip(run.model.parameters(), finished["galore"].model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("galor", {}, "unknown optimizer method 'galor'; there are: "),
        ("adamw", {"rank": 4}, "adamw takes no 'rank'; it takes: b1, b2, eps"),
        ("galore", {"eps": 1e-6}, "galore takes no 'eps'; it takes: rank, every, scale, rule"),
    ],
)
def test_what_does_not_exist_is_named_before_training(tmp_path, method, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer_factory(method, arguments(tmp_path), **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer_for(nn.Linear(2, 2), method, arguments(tmp_path), **options)


# ---- adapters


def adapted(method: str, **given) -> LlamaForCausalLM:
    start = model(dropout=0.0).requires_grad_(False)
    edit(start, "*_proj", adapt(build(method, **given)))
    return start


@pytest.mark.parametrize(
    ("method", "given"),
    [("lora_plus", {"rank": 2, "ratio": 8.0}), ("lora_pro", {"rank": 2}), ("dora", {"rank": 2})],
)
def test_an_adapter_brings_its_rule_and_its_ratio_and_resumes_bit_for_bit(tmp_path, method, given):
    args, batches = arguments(tmp_path / "whole"), []
    whole = trainer(
        args,
        optimizer_factory(method, args, **given),
        start=adapted(method, **given),
        data_collator=lambda rows: batches.append(default_data_collator(rows)) or batches[-1],
    )
    whole.train()
    by_hand, put = adapted(method, **given).train(), usual(build(method, **given))
    rule = replace(put.rule, rule=Adam(0.7, 0.9, 1e-3)) if isinstance(put.rule, Recipe) else Adam(0.7, 0.9, 1e-3)
    settings = {"lr": args.learning_rate, "weight_decay": 0.3, "other": Adam(0.7, 0.9, 1e-3), "seed": 7}
    optimizer = hasten(Optim(trainable(by_hand), rule, **settings), put.ratio)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: max(0.0, 0.5 * (1.0 + math.cos(math.pi * t / STEPS)))
    )
    for batch in batches[:STEPS]:
        optimizer.zero_grad()
        by_hand(**batch).loss.backward()
        clip_grad_norm_(by_hand.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
    resumed = trainer(
        arguments(tmp_path / "resumed"),
        optimizer_factory(method, args, **given),
        start=adapted(method, **given),
    )
    resumed.train(resume_from_checkpoint=f"{tmp_path}/whole/checkpoint-{SAVED}")
    for other in (by_hand, resumed.model):
        for (name, p), q in zip(whole.model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_an_adapter_whose_ranks_move_is_refused_with_the_way(tmp_path):
    with pytest.raises(ValueError, match=r"adalora moves its ranks .* RankSchedule\(model, rule\)\.attach"):
        optimizer_factory("adalora", arguments(tmp_path), rank=2)


def test_a_method_that_steps_by_a_closure_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"mezo steps by a closure, .* call opt\.step\(closure\) in a loop"):
        optimizer_factory("mezo", arguments(tmp_path))
