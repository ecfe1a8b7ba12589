"""An optimizer factory for the Trainer of the transformers library."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from subspan.adapt import planned
from subspan.methods import build, find, methods
from subspan.optim import Adam, Optim, Recipe, Rule, Where, hasten, hidden_matrices
from subspan.optim.pairs import usual

__all__ = ["optimizer_factory", "optimizer_for"]


def optimizer_factory(
    method: str, args: TrainingArguments, *, where: Where = hidden_matrices, **options: Any
) -> tuple[Callable[[], Callable[..., Optim]], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes to train with a published method.

        Trainer(model, args, optimizer_cls_and_kwargs=optimizer_factory("galore", args, rank=64), ...)

    An adapter's name brings the rule and the rates that it is trained by, to be given the adapter's arguments:

        edit(model, None, adapt(build("lora_plus", rank=8)))
        Trainer(model, args, optimizer_cls_and_kwargs=optimizer_factory("lora_plus", args, rank=8), ...)

    Trainer calls it with the model that it is about to train, so it sees adapters that were added before, works
    with `model_init` and reads `args` late, none of which holds for a finished optimizer in `optimizers=`.
    Needs transformers >= 5.3. See `optimizer_for` for what of `args` is honoured; `args.optim` is not read.
    Raises ValueError for an unknown method or option, at once.

    >>> args = TrainingArguments("unused", report_to="none", use_cpu=True, learning_rate=1e-2, weight_decay=0.1)
    >>> make, settings = optimizer_factory("galore", args, rank=2)
    >>> optimizer = make()(nn.Linear(4, 3), **settings)
    >>> [(g["role"], g["param_names"], g["weight_decay"]) for g in optimizer.param_groups]
    [('rule', ['weight'], 0.1), ('other', ['bias'], 0.0)]
    """
    _taught(method, args, options)
    return _factory, {"method": method, "args": args, "where": where, **options}


def optimizer_for(
    model: nn.Module, method: str, args: TrainingArguments, *, where: Where = hidden_matrices, **options: Any
) -> Optim:
    """`Optim` over the model's trainable parameters, as Trainer's own optimizers are set up by `args`.

    The learning rate is where Trainer's schedule starts from. Weight decay acts on the parameters that Trainer
    decays: no biases, no norms. The betas and epsilon are those of the method's inner Adam, unless `options` give
    that `rule`, and of the Adam that steps what `where` does not select; the method's own defaults for them do not
    apply. The factors of an adapter step at its own ratio of rates. Frames follow `args.seed`. Raises ValueError
    for an unknown method or option, and for an adapter whose ranks move.
    """
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # it uses no Trainer, and cannot drift from it
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rule, ratio = _taught(method, args, options)
    optimizer = Optim(
        named.items(),
        rule,
        lr=args.learning_rate,
        other=Adam(**_adam(args)),
        where=where,
        seed=args.seed,
    )
    roles = {name: group["role"] for group in optimizer.param_groups for name in group["param_names"]}
    optimizer.param_groups = []
    for role in optimizer.rules:
        for decay in (True, False):
            members = [(n, p) for n, p in named.items() if roles[n] == role and (n in decayed) == decay]
            if members:
                optimizer.add_param_group(
                    {"params": members, "role": role, "weight_decay": args.weight_decay if decay else 0.0}
                )
    return hasten(optimizer, ratio)


def _factory() -> Callable[..., Optim]:
    # Trainer takes what is no optimizer class for a factory, and calls it twice: factory()(model, **settings).
    return optimizer_for


def _taught(method: str, args: TrainingArguments, options: dict[str, Any]) -> tuple[Rule | Recipe, float]:
    """The method's rule, and how much faster the factors u of an adapter step than the rest."""
    if method not in methods("adapter"):
        return _rule(method, args, options), 1.0
    put = usual(build(method, "adapter", **options))
    if planned(put, args.max_steps if args.max_steps > 1 else 2) is not None:
        raise ValueError(
            f"{method} moves its ranks while it trains: make the optimizer and the schedule yourself, optimizer = "
            "Optim(trainable(model), Adam()) and RankSchedule(model, rule).attach(optimizer), and pass "
            "optimizers=(optimizer, None) to Trainer"
        )
    adam = Adam(**_adam(args))
    return replace(put.rule, rule=adam) if isinstance(put.rule, Recipe) else adam, put.ratio


def _rule(method: str, args: TrainingArguments, options: dict[str, Any]) -> Rule | Recipe:
    """The method's value, its inner Adam set by `args` where `options` do not say otherwise."""
    preset = find(method, "optimizer").build
    accepted = inspect.signature(preset).parameters
    for option in options:
        if option not in accepted:
            raise ValueError(f"{method} takes no {option!r}; it takes: {', '.join(accepted)}")
    adam = _adam(args)
    settings: dict[str, Any] = {key: value for key, value in adam.items() if key in accepted}
    if "rule" in accepted and isinstance(accepted["rule"].default, Adam):
        settings["rule"] = replace(accepted["rule"].default, **adam)
    rule: Rule | Recipe = preset(**settings | options)
    if isinstance(rule, Recipe) and not rule.source.backward:
        raise ValueError(
            f"{method} steps by a closure, which Trainer does not pass; call opt.step(closure) in a loop"
        )
    return rule


def _adam(args: TrainingArguments) -> dict[str, Any]:
    return {"b1": args.adam_beta1, "b2": args.adam_beta2, "eps": args.adam_epsilon}
