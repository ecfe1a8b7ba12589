"""Training jobs on language models, as the command line runs them: what learns, from what, at which rate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from subspan import io
from subspan.adapt import AdaLora, Adapted, Adapter, FromData, RankSchedule, adapt, planned, prepare, trainable
from subspan.adapt.layers import refusal, require
from subspan.compress import Calibration
from subspan.distill import Distill
from subspan.edit import edit, matrices, sharers, sites
from subspan.heal import Factors, Named, only
from subspan.hosts import samples, text
from subspan.hosts.folders import added
from subspan.hosts.jobs import Json, fold, forward, loss, place
from subspan.hosts.keep import Keeper, Keeping
from subspan.hosts.samples import Rows, inputs
from subspan.hosts.training import History, Loss, draw, next_token, train
from subspan.hosts.transformers import LoadedModel
from subspan.methods import build, find
from subspan.ops import OpLayer, OpLinear
from subspan.optim import Adam, Optim, Recipe, Rule, hasten
from subspan.optim.pairs import usual
from subspan.select import Select, pick
from subspan.site import kind_of, parameter

VALIDATION_WINDOWS = 32
HELD_OUT = 0.1
LOOK = 8

# From scratch, and from a trained model, where a tenth to a fiftieth is the custom. Of the adapters it is about a
# third of what does best in the short runs of bench/finetuning.py, as longer runs want less.
SCRATCH_LR = {"adamw": 3e-3, "galore": 1e-2, "fira": 1e-2, "frugal": 1e-3, "mezo": 1e-4}
FINETUNE_LR = {
    "adamw": 5e-5, "galore": 2e-4, "fira": 2e-4, "frugal": 5e-5, "mezo": 1e-6,
    "welore_peft": 3e-4, "full": 5e-5, "pela": 5e-5,
    "lora": 1e-3, "rslora": 1e-3, "dora": 1e-3, "milora": 1e-3, "pissa": 3e-4, "eva": 3e-4,
    "lora_plus": 2e-4, "lora_pro": 1e-3, "riemannian_lora": 1e-3, "adalora": 5e-3,
    "lora_ga": 3e-5, "lora_one": 3e-4, "lora_sb": 3e-4, "lora_xs": 3e-4, "moe_lora": 3e-3, "mos": 1e-3,
    "vera": 1e-2, "randlora": 1e-4, "loha": 1e-3, "lokr": 3e-3, "oft": 2e-4, "shira": 1e-3, "paca": 1e-3,
}  # fmt: skip


def parse_rank(value: str) -> int | float:
    """A rank as given on the command line: a count, or a share of the full rank.

    >>> parse_rank("64"), parse_rank("0.25")
    (64, 0.25)
    """
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    count = value.strip().isdigit()
    if not (number >= 1 if count else 0 < number <= 1):
        raise ValueError(f"rank {value!r} is neither a count such as 64 nor a share such as 0.25")
    return int(value) if count else number


def default_lr(method: str, *, scratch: bool) -> float:
    """A learning rate to begin with."""
    return (SCRATCH_LR if scratch else FINETUNE_LR).get(method, 1e-3 if scratch else 1e-4)


def rule(
    method: str, *, steps: int, rank: int | float | None = None, every: int | None = None
) -> tuple[Rule | Recipe, Json]:
    """A registered optimizer and the arguments it was built with.

    A quarter of the full rank unless told, and ten refreshes or those every 200 steps, whichever are more.
    """
    takes = inspect.signature(find(method, "optimizer").build).parameters
    usual = {"rank": 0.25, "every": min(200, max(1, steps // 10))}
    given = {name: value for name, value in {"rank": rank, "every": every}.items() if value is not None}
    args: Json = {name: value for name, value in usual.items() if name in takes} | given
    return build(method, "optimizer", **args), args


@dataclass(frozen=True)
class Learning:
    """What a method trains: the parameters by name, the rule that steps them, its arguments, and what to save.

    They learn from the model's own loss, or from another; factors u step at `ratio` times the learning rate.
    Under `ranks` their number falls, and what was pruned is gone at the end.
    """

    named: Named
    rule: Rule | Recipe
    args: Json
    kind: str
    loss: Loss | None = None
    ratio: float = 1.0
    ranks: AdaLora | None = None


def learning(
    model: nn.Module,
    method: str,
    *,
    steps: int,
    select: Select | None = None,
    rank: int | float | None = None,
    alpha: float | None = None,
    every: int | None = None,
    teacher: nn.Module | None = None,
    look: Calibration | None = None,
) -> Learning:
    """Prepare a model for fine-tuning by an adapter, a healing method or an optimizer; all else is frozen.

    A method that distils needs the teacher, which is frozen too; an adapter that starts from data needs `look`.
    Raises ValueError for a compression, and naming an argument that the method does not take.
    """
    kind = find(method).kind
    if kind == "compression":
        raise ValueError(
            f"{method} compresses; run `subspan compress MODEL --method {method} ...`, then fine-tune"
        )
    if kind != "adapter" and select is not None:
        raise ValueError(f"--select chooses layers for adapters, and {method} is none; leave it out")
    if kind == "adapter" and isinstance(rank, float):
        raise ValueError(f"rank {rank} is a share, and {method} takes a count, such as 8")
    if kind == "adapter":
        refuse_stack(model, method)
        args = full_args(method, rank=rank, alpha=alpha, every=every)
        start, names = prepared(build(method, "adapter", **args), model, adaptable(model, select), look)
        put = usual(start)
        edit(model, names, adapt(put))
        named = only(model, {name for name, _ in trainable(model)})
        return Learning(named, put.rule, args, kind, ratio=put.ratio, ranks=planned(put, steps))
    fold(model)
    if kind == "healing":
        heal: Factors = build(method, rank=rank, alpha=alpha, every=every)
        loss = None if heal.loss is None else taught(heal.loss, teacher, method)
        return Learning(heal.choose(model), Adam(), {}, kind, loss)
    build(method, alpha=alpha)
    made, args = rule(method, steps=steps, rank=rank, every=every)
    return Learning(only(model, {name for name, _ in model.named_parameters()}), made, args, kind)


def prepared(
    adapter: Adapter, model: nn.Module, names: Sequence[str], look: Calibration | None
) -> tuple[Adapter, list[str]]:
    """The adapter after its look at the data, if it wants one, and the layers that are left to put it on.

    Raises what `adapt.prepare` raises.
    """
    experts = matrices(model)
    found = {name: experts[name] if name in experts else model.get_submodule(name) for name in names}
    made = prepare(adapter, model, found, look or Calibration())
    idle = made.op.idle if isinstance(made.op, FromData) else set()
    return made, [name for name in names if name not in idle]


def glance(data: Split | Rows, batch: int, *, seed: int = 0, device: torch.device | None = None) -> Calibration:
    """What adapters that start from data look at: the batches that training with the same seed begins with.

    Samples come one by one, so that what fills up a batch is not looked at.
    """
    if isinstance(data, Rows):
        found = samples.draw(data.train, batch=1, steps=LOOK * batch, seed=seed)
        return Calibration([one.to(device) for one in found], forward_sample, next_token)
    drawn = draw(data.train, length=data.validation.shape[1], batch=batch, steps=LOOK, seed=seed)
    return Calibration([ids.to(device) for ids in drawn], forward, loss)


def forward_sample(model: nn.Module, batch: samples.Padded) -> object:
    """Run a language model on samples without filling a cache."""
    return model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)


def adaptable(model: nn.Module, select: Select | None = None) -> list[str]:
    """The layers that adapters go on: as `edit.sites` chooses, and the compressed among those.

    Experts of 3-D parameters, whose matrices are formed anew in every call, are left out unless they are named.
    Raises `NotAdaptable`, and what `edit.sites` and `select.pick` raise.
    """
    fit = {n: m for n, m in model.named_modules() if not refusal(m)}
    kind = OpLinear if select is None else OpLayer
    found = {n: m for n, m in fit.items() if isinstance(m, kind) or ((k := kind_of(m)) is not None and k.usual)}
    if not any(isinstance(m, OpLayer) for m in found.values()):
        chosen = sites(model, select, grouped="take")
        able = {n: m for n, m in chosen.items() if select is not None or n in fit} or chosen
        require(able)
        return list(able)
    if select is not None:
        picked = pick(found, select, what="linear layer")
        plain = {name for name in picked if not isinstance(found[name], OpLayer)}
        if plain:  # refuses those that share their weight
            sites(model, plain.__contains__, grouped="take")
        return picked
    shared = sharers(model)
    free = [n for n, m in found.items() if isinstance(m, OpLinear) or id(parameter(m)) not in shared]
    return [name for name in free if any(part.isdigit() for part in name.split("."))] or free


def distils(method: str) -> bool:
    """Whether a method learns from a teacher.

    >>> distils("pela"), distils("welore_peft"), distils("lora")
    (True, False, False)
    """
    found = find(method)
    return found.kind == "healing" and found.build().loss is not None


def taught(distill: Distill, teacher: nn.Module | None, method: str) -> Loss:
    """The loss of a student under a frozen teacher; raises ValueError when there is none."""
    if teacher is None:
        raise ValueError(
            f"{method} distils, and has no teacher; pass the dense model, on the command line --teacher"
        )
    master = teacher.requires_grad_(False).eval()

    def answer(model: nn.Module, batch: samples.Batch) -> Any:
        return model(**inputs(batch), use_cache=False)

    return lambda model, batch: distill.loss(model, master, batch, answer)


def teacher_for(method: str, model: str, asked: str | None) -> str | None:
    """The name of the model that teaches, if the method has a teacher: as asked, else what `model` was made from.

    Raises ValueError for one that is asked for in vain, and what `teacher_of` raises.
    """
    if not distils(method):
        if asked is not None:
            raise ValueError(f"--teacher is for methods that distil, and {method} does not; leave it out")
        return None
    return teacher_of(model) if asked is None else asked


def teacher_of(name: str) -> str:
    """The dense model that a folder was compressed from, through however many folders; itself when it is dense.

    Raises FileNotFoundError when that is not there any more.
    """
    source, seen = name, {name}
    while (above := made_from(source)) is not None:
        if above != "smollm2" and (above in seen or not Path(above).is_dir()):
            raise FileNotFoundError(
                f"{source} was made from {above}, which is no model folder here; name the dense model with "
                "--teacher MODEL"
            )
        source = above
        seen.add(source)
    return source


def made_from(name: str) -> str | None:
    """The model that an adapter's or a compressed folder names as its source; None for any other model."""
    if name == "smollm2" or not (Path(name) / io.ABOUT).is_file():
        return None
    about = io.read_about(name)
    if about.get("kind") == "adapter":
        return str(about["base"]["source"])
    return str(about["source"]) if about.get("sites") else None


def refuse_stack(model: nn.Module, method: str) -> None:
    """Raise ValueError for a model that carries an adapter: its folder could not name the base of a second one."""
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ValueError(
            f"the model already carries an adapter, and {method} would be a second; fine-tune its base, or merge "
            "it first with `subspan adapter merge BASE ADAPTER -o MERGED`"
        )


def full_args(method: str, **given: Any) -> Json:
    """Every argument of a preset, as given or by default: a saved adapter must not depend on later defaults."""
    build(method, **given)
    defaults = {name: p.default for name, p in inspect.signature(find(method).build).parameters.items()}
    return defaults | {name: value for name, value in given.items() if value is not None}


def fit(
    model: nn.Module,
    learns: Learning,
    data: Split | Rows,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int = 0,
    label: str = "training",
    every: int = 100,
    keeping: Keeping | None = None,
) -> History:
    """Train what `learns` names on random windows, as long as those of validation, or on samples.

    Validates each `every` steps. Under a rank schedule only states whose ranks are final can be the best, or end
    the run. Raises what `train` raises.
    """
    optimizer = hasten(Optim(learns.named, learns.rule, lr=lr, seed=seed), learns.ratio)
    schedule = None if learns.ranks is None else RankSchedule(model, learns.ranks).attach(optimizer)
    keeper = None if keeping is None else keeper_for(model, learns, optimizer, schedule, keeping)
    history = train(
        model, batches_of(data, batch=batch, steps=steps, seed=seed), optimizer, steps=steps,
        validation=data.validation, every=every, label=label, progress=True, loss=learns.loss, keeper=keeper,
    )  # fmt: skip
    if schedule is not None:
        schedule.finish()
    return history


def batches_of(data: Split | Rows, *, batch: int, steps: int, seed: int) -> Iterator[samples.Batch]:
    """The batches of a run, the same for the same seed."""
    if isinstance(data, Rows):
        return samples.draw(data.train, batch=batch, steps=steps, seed=seed)
    return draw(data.train, length=data.validation.shape[1], batch=batch, steps=steps, seed=seed)


def keeper_for(
    model: nn.Module, learns: Learning, optimizer: Optim, schedule: RankSchedule | None, keeping: Keeping
) -> Keeper:
    """What keeps the trained tensors; its checkpoints hold the adapters' fixed ones and the ranks' state too."""
    trained = dict(learns.named)
    known = {id(t) for t in trained.values()}
    # What two sites share has two names.
    fixed = dict({id(t): (name, t) for name, t in added(model).items() if id(t) not in known}.values())
    moving = {} if schedule is None else {f"ranks/{key}": t for key, t in schedule.state_dict().items()}
    since = 1 if schedule is None else schedule.rule.settled
    return Keeper(trained, optimizer, keeping, more=fixed | moving, since=since)


class Split(NamedTuple):
    """Token ids to train on, (tokens,), and windows to validate on, (count, length)."""

    train: Tensor
    validation: Tensor


def split(ids: Tensor, window: int) -> Split:
    """Hold out the last tenth for validation; raises ValueError when it is shorter than one window."""
    cut = len(ids) - int(HELD_OUT * len(ids))
    count = min(VALIDATION_WINDOWS, (len(ids) - cut) // window)
    return Split(ids[:cut], text.windows(ids, window, max(1, count), start=cut))


def newborn(
    content: str,
    *,
    vocab: int,
    hidden: int,
    layers: int,
    heads: int,
    window: int,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> LoadedModel:
    """A small untrained LLaMA with a tokenizer learnt from the text, all but the tenth that `split` holds out.

    Raises ValueError for sizes that do not fit together.
    """
    if hidden % (2 * heads):
        near = 2 * heads * max(1, hidden // (2 * heads))
        raise ValueError(f"hidden {hidden} is no multiple of twice the {heads} heads; use e.g. {near}")
    words = text.train_tokenizer(content[: int((1 - HELD_OUT) * len(content))], vocab)
    config = LlamaConfig(
        vocab_size=words.get_vocab_size(), hidden_size=hidden, intermediate_size=8 * math.ceil(hidden / 3),
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=window, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=words)
    return LoadedModel(model.to(place(device), getattr(torch, dtype)), wrapped, "scratch")


def diary(history: History, about: Mapping[str, Any]) -> Json:
    """The note `train.json` that lies beside a trained model: what was run, and every loss."""
    return {"train.json": {**about, **asdict(history)}}


def summary(history: History, learns: Learning) -> Json:
    """What a run came to, as plain values; under a rank schedule, the ranks by site too."""
    ends = {name.partition(".adapters.")[0]: len(p) for name, p in learns.named if name.endswith(".op.ops.1.d")}
    return {
        "parameters": sum(p.numel() for _, p in learns.named),
        "state_bytes": history.state_bytes,
        "tokens_per_second": history.tokens_per_second,
        "train_loss": history.train[-1][1],
        "validation_before": history.validation[0][1],
        "validation_after": history.final,
        "perplexity": math.exp(history.final),
        **({} if history.best is None else {"kept_step": history.best[0]}),
        **({"ranks": ends} if learns.ranks is not None else {}),
    }
