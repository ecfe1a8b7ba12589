"""Jobs on language models, as the command line runs them: open, plan, compress, score."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan import io
from subspan.adapt import Adapted, merge
from subspan.budget import Bytes, Energy, Err, Ratio
from subspan.compress import Calibration, Compression, OneShot, Study, Track, Walk, study
from subspan.edit import Edit, edit
from subspan.hosts import folders, quantizer, text
from subspan.hosts import transformers as host
from subspan.hosts.meter import Meter
from subspan.hosts.peft_read import AdapterFolder, base_of, is_adapter, read_adapter
from subspan.hosts.score import decode_speed, nll
from subspan.hosts.transformers import LoadedModel
from subspan.methods import build
from subspan.metric import MEASURES
from subspan.ops.experts import whole
from subspan.plan import Plan
from subspan.select import Select

# Entries of a row that share a scale in a base of few bits, as in QLoRA.
BLOCK = 64
Json = dict[str, Any]
Size = Err | Ratio | Bytes | Energy
TARGETS: dict[str, Callable[[Any], Size]] = {"err": Err, "ratio": Ratio, "bytes": Bytes, "energy": Energy}


def vacant(out: str | Path, *, force: bool, reads: Iterable[str | Path] = ()) -> None:
    """Raise unless `out` may be written, before any work is done for it.

    FileExistsError for a file or a non-empty folder without `force`; with it, ValueError when replacing `out`
    would delete the working folder, the home folder or one of `reads`; PermissionError for a read-only place.
    """
    out = Path(out).resolve()
    taken = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if taken and not force:
        raise FileExistsError(
            f"{out} exists and is not empty; choose another output or pass --force to replace it"
        )
    kept = [Path.cwd(), Path.home(), *(Path(path).resolve() for path in reads if Path(path).exists())]
    for path in kept if taken else ():
        if path.is_relative_to(out):
            raise ValueError(f"replacing {out} would delete {path}, which is in use; choose another output")
    nearest = next(folder for folder in out.parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise PermissionError(f"cannot write to {nearest}; choose an output that you may write")


def place(name: str) -> torch.device:
    """The device of that name; raises ValueError when there is none such on this machine."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:  # torch asserts that it was compiled with CUDA
        reason = str(problem).partition("\n")[0]
        raise ValueError(
            f"device {name!r} cannot be used ({reason}); use 'cpu', or one this torch knows"
        ) from None
    return device


def opened(name: str, *, dtype: str, device: str, seed: int = 0, merged: bool = False) -> LoadedModel:
    """Seed torch and open a model in the named precision; `merged` folds its adapters into plain layers.

    A folder of PEFT opens on the base it names. Raises what `open_model`, `read_adapter` and `place` raise.
    """
    torch.manual_seed(seed)
    source, kept = name if name == "smollm2" else str(Path(name).absolute()), getattr(torch, dtype)
    if _of_peft(source):
        saved = read_adapter(source)
        loaded, _ = put_on(base_of(saved), saved, dtype=kept, device=place(device), progress=True)
        folders.cast(loaded.model, kept)
        loaded = replace(loaded, source=source)
    else:
        loaded = folders.open_model(source, dtype=kept, device=place(device), progress=True)
    if merged:
        fold(loaded.model)
        if quantizer.few_bits(source) is not None:
            quantizer.widen(loaded.model)
    return loaded


def stored_dtype(name: str) -> torch.dtype:
    """The precision that a model lies in on disk, or of an adapter's folder, its base; float32 when none says."""
    alone = name == "smollm2" or (Path(name) / io.ABOUT).is_file() or not is_adapter(name)
    return folders.stored_dtype(name if alone else base_of(read_adapter(name)))


def _of_peft(source: str) -> bool:
    """Whether a folder holds an adapter of PEFT, which opens on the base it names."""
    if source == "smollm2" or not is_adapter(source):
        return False
    return not (Path(source) / io.ABOUT).is_file() or io.read_about(source).get("kind") == "peft"


def put_on(
    model: str,
    saved: AdapterFolder,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    name: str = "default",
    progress: bool = False,
) -> tuple[LoadedModel, Edit]:
    """Open a model and put an adapter on it, on a base of as many bits as it was trained on.

    In the precision that the adapter's numbers depend on, else in `dtype`. One with rows of single tokens brings
    the tokenizer that knows them, if it lies there. Raises what `open_model` and the adapter's `put` raise.
    """
    few = quantizer.few_bits(saved.path)
    own = saved.dtype or (few["dtype"] if few else dtype)
    loaded = folders.open_model(model, dtype=own, device=device, progress=progress)
    if few and not any(map(quantizer.narrowed, loaded.model.modules())):
        quantizer.narrow(loaded.model, few["bits"], block=few["block"])
    if (words := tokenizer_of(saved)) is not None:
        loaded = replace(loaded, tokenizer=words)
    return loaded, saved.put(loaded.model, name)


def tokenizer_of(saved: AdapterFolder) -> Any:
    """The tokenizer that lies beside rows of single tokens, None where there is none."""
    there = bool(saved.tokens.values) and host.has_tokenizer(saved.path)
    return host.tokenizer(saved.path) if there else None


def narrow_base(model: nn.Module, bits: int, dtype: str) -> Json:
    """Hold the layers of a model in few bits, as a base for adapters; returns what a folder says of it."""
    quantizer.narrow(model, bits, block=BLOCK)
    return {"bits": bits, "block": BLOCK, "dtype": dtype}


def require_narrow(model: nn.Module, method: str) -> None:
    """Raise ValueError when an adapter changed its base as it started, which is then no longer of few bits."""
    if wide := [n for n, m in model.named_modules() if isinstance(m, Adapted) and m.origin is not m.base]:
        raise ValueError(
            f"{method} changes the base when it starts ({wide[0]}), which would lie in full precision again; "
            "use a method that leaves it alone, such as lora, or train without --base-bits"
        )


def fold(model: nn.Module) -> int:
    """Replace every adapted layer by a plain one with the adapters merged; returns how many there were.

    Experts of a 3-D parameter become one again, and layers of one weight that share their ops stay tied.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}
    tables: dict[object, Tensor] = {}

    def plain(name: str, _: nn.Module) -> nn.Module:
        made = merge(adapted[name])
        if isinstance(made, nn.Linear | nn.Embedding) and adapted[name].active:
            ops = tuple(adapted[name].slot(one).op for one in adapted[name].active)
            first = tables.setdefault(ops, made.weight)
            if first is not made.weight and torch.equal(first, made.weight):
                made.weight = first
        return made

    edit(model, list(adapted), plain)
    again = {name: new for name, m in quantizer.stacks(model).items() if (new := whole(m)) is not m}
    edit(model, list(again), lambda name, _: again[name])
    return len(adapted)


def target_of(**given: float | None) -> Size:
    """The target of the one value that is not None: err, ratio, bytes or energy."""
    return next(TARGETS[kind](value) for kind, value in given.items() if value is not None)


def encode(target: Size, metric: str | None = None) -> Json:
    """What a compression was asked for, as plain values for a plan's `args`; `decode` is the inverse.

    >>> encode(Err(0.5), "gram")
    {'target': {'err': 0.5}, 'metric': 'gram'}
    """
    said = {"energy": target.target} if isinstance(target, Energy) else target.said
    return {"target": said} | ({"metric": metric} if metric is not None else {})


def decode(method: str, args: Mapping[str, Any]) -> Compression:
    """The compression that a plan's `method` and `args` describe.

    An energy target takes the place of the method's budget, a metric that of its measure. Raises ValueError for
    anything that `encode` does not write.
    """
    unknown = sorted(set(args) - {"target", "metric"})
    asked = args.get("target")
    if unknown or not isinstance(asked, Mapping) or len(asked) != 1 or next(iter(asked)) not in TARGETS:
        raise ValueError(
            f"args {dict(args)} do not describe a compression; they hold one target of {', '.join(TARGETS)}, "
            "such as {'target': {'err': 0.5}}, and perhaps a metric"
        )
    kind, value = next(iter(asked.items()))
    target = TARGETS[kind](value)
    made: Compression = build(method, "compression", target=None if isinstance(target, Energy) else target)
    if isinstance(target, Energy):
        made = replace(made, budget=target)
    metric = args.get("metric")
    if metric is None:
        return made
    if metric not in MEASURES:
        raise ValueError(f"unknown metric {metric!r}; there are: {', '.join(MEASURES)}")
    return replace(made, measure=MEASURES[metric])


def require_data(method: str, made: Compression, files: Sequence[str] | None) -> None:
    """Raise ValueError when the measure or the budget is read off data and none was named."""
    if made.needs_data and not files:
        spared = not replace(made, measure=MEASURES["plain"]).needs_data
        raise ValueError(
            f"{method} reads what matters off data; pass --calibrate FILE (a text, @prose or @code)"
            + (", or --metric plain to do without" if spared else "")
        )


def window_for(model: nn.Module, asked: int | None, *, usual: int = 512) -> int:
    """A window the model can take: as asked, else the usual or the model's limit; raises ValueError beyond it."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or asked or usual
    if asked is not None and asked > limit:
        raise ValueError(f"--window {asked} is longer than the model's {limit} positions; use at most {limit}")
    return asked or min(usual, limit)


def tokens(tokenizer: Any, content: str, limit: int | None = None) -> Tensor:
    """Encode a text into (tokens,); with a limit, only as much of it as gives that many, if it does."""
    length = len(content) if limit is None else 8 * limit
    while True:
        ids = text.encode(tokenizer, content[:length])
        # The last word of a cut text may be cut too, and then encoded otherwise.
        if length >= len(content) or (limit is not None and len(ids) >= limit + 64):
            return ids[:limit]
        length *= 2


def calibration(
    loaded: LoadedModel,
    made: Compression,
    files: Sequence[str] | None,
    *,
    limit: int,
    window: int | None,
    device: torch.device | None = None,
) -> Tensor | None:
    """Windows (count, 1, length) of text on the model's device or another, or None where no data is read.

    Of at most `limit` tokens, but one window at least. Raises what `text.read` and `text.windows` raise.
    """
    if not (made.needs_data and files):
        return None
    length = window_for(loaded.model, window)
    ids = tokens(loaded.tokenizer, text.read(files), max(limit, length))
    return text.windows(ids, length).unsqueeze(1).to(device or device_of(loaded.model))


def forward(model: nn.Module, ids: Tensor) -> object:
    """Run a language model on ids (count, length) without filling a cache."""
    return model(input_ids=ids, use_cache=False)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean negative log-likelihood in nats that a language model gives to ids (count, length)."""
    found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter is."""
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """The precision of the first parameter."""
    return next(model.parameters()).dtype


def make_plan(
    model: nn.Module,
    method: str,
    args: Mapping[str, Any],
    *,
    select: Select | None = None,
    batches: Tensor | None = None,
    track: Track[str] = iter,
) -> tuple[Plan, Study]:
    """Take a model apart and plan a registered method on it; raises what `decode` and `study` raise."""
    made = decode(method, args)
    taken = study(model, made.measure, select=select, batches=batches, forward=forward, loss=loss, track=track)
    return taken.plan(made.budget, method=method, args=args), taken


def do_method(
    model: nn.Module,
    method: str,
    args: Mapping[str, Any],
    *,
    select: Select | None = None,
    batches: Tensor | None = None,
    track: Track[str] = iter,
    walk: Walk = OneShot(),
) -> tuple[Plan, Edit]:
    """Plan a registered method on a model and apply it; raises what `decode` and the walk raise."""
    data = Calibration(batches, forward, loss)
    plan, done = walk.compress(model, decode(method, args), select=select, data=data, track=track)
    return replace(plan, method=method, args=dict(args)), done


def follow_plan(
    model: nn.Module,
    plan: Plan,
    *,
    batches: Tensor | None = None,
    track: Track[str] = iter,
    walk: Walk = OneShot(),
) -> tuple[Plan, Edit]:
    """Do what a plan says; the plan that comes back has the errors that were made.

    Raises ValueError when it was made for another model, and what the walk raises.
    """
    made = decode(plan.method, plan.args)
    return walk.follow(model, plan, made.measure, data=Calibration(batches, forward, loss), track=track)


def read_plan(path: str | Path) -> Plan:
    """A plan file; raises FileNotFoundError saying how to make one, and what `Plan.from_json` raises."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such plan; make one with `subspan plan MODEL --method svd --err 0.5 -o {path}`"
        )
    return Plan.from_json(path)


def write_plan(plan: Plan, path: str | Path) -> Path:
    """Write a plan file, and its folder if need be; nothing is left when that fails."""
    path = Path(path)
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder, and a plan is a file; name one, such as {path / 'plan.json'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        plan.to_json(path)
    except OSError as problem:
        path.with_name(f".{path.name}.partial").unlink(missing_ok=True)
        raise OSError(
            problem.errno, f"cannot write {path} ({problem.strerror}); free space or choose another place"
        ) from None
    return path


@dataclass(frozen=True)
class Score:
    """How a model did on a text: perplexity, mean negative log-likelihood in nats, and what it took."""

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int
    seconds: float
    decode_tokens_per_second: float | None


def evaluate(
    loaded: LoadedModel,
    files: Sequence[str],
    *,
    window: int | None = None,
    count: int | None = None,
    speed: bool = False,
) -> Score:
    """Score texts window by window; raises what `text.read`, `text.windows` and `score.nll` raise."""
    length = window_for(loaded.model, window)
    ids = tokens(loaded.tokenizer, text.read(files), None if count is None else count * length)
    cut = text.windows(ids, length, count)
    with Meter() as meter:
        mean = nll(loaded.model, cut, progress=True).mean()
    prompt = cut[0, : max(1, min(32, length - 17))]
    rate = decode_speed(loaded.model, prompt) if speed else None
    return Score(mean.exp().item(), mean.item(), len(cut) * (length - 1), len(cut), length, meter.seconds, rate)
