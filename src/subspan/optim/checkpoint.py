"""Checkpoints: a run that is saved, killed at any moment, and continued bit for bit.

`save` fills a new numbered folder under a hidden name and renames it once, when every byte is on the disk; only
then are older ones deleted. A rename to a name that is free is atomic, and nothing is ever replaced, so at each
moment the newest numbered folder is complete, and it is what `load` reads.

`torch.distributed.checkpoint` works too, with get_optimizer_state_dict and set_optimizer_state_dict, and is the
way for weights cut over processes. It leaves out parameters that sleep: `RandomLayers` goes through this module,
or through torch.save of `Optim.state_dict()`.

Under `torchrun --max-restarts`, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: torch 2.13 else hands the addresses of
the dead workers to those that it starts again, which then cannot connect.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan import io
from subspan.optim.optimizer import Optim
from subspan.shards import is_cut

STATE = "optim.safetensors"
CPU, CARD = "rng.cpu", "rng.cuda"
Model = nn.Module | Mapping[str, Tensor]


def save(
    folder: str | Path,
    model: Model,
    opt: Optim,
    *,
    extra: Mapping[str, Any] = {},
    rng: bool = False,
    keep: int = 1,
) -> Path:
    """Write weights and optimizer state into the next numbered folder of `folder`, and return it.

    It holds `model.safetensors` (weights under their own names), `optim.safetensors` (state under NAME/key) and
    `subspan.json` (settings of the optimizer and its groups, `extra`, the sum of each file). `model` is a module,
    or named tensors, such as the trained ones only. `extra` comes back from `load`: plain values, such as a step
    number or a scheduler's `state_dict()`. `rng` adds torch's random state. The newest `keep` folders stay.

    One process writes at a time: with several, call it on the first one only. Raises TypeError for values that are
    not plain, ValueError for tensors that are cut over processes, OSError with the remedy when the disk is full.
    """
    if keep < 1:
        raise ValueError(f"checkpoint.save: keep={keep!r} would keep none; use 1 or more")
    state = flat(opt)
    refuse_cut({**weights(model)[0], **state})
    orders = {key: order for key, x in state.items() if (order := permuted(x))}
    about = {
        "kind": "checkpoint",
        "steps": opt.steps,
        "optimizer": settings(opt),
        "groups": [{k: plain(k, v) for k, v in group.items() if k != "params"} for group in opt.param_groups],
        "orders": orders,
        "extra": {key: kept(key, value) for key, value in extra.items()},
    }
    last = max((number(path) for path in numbered(Path(folder))), default=0)
    out = Path(folder) / f"saved-{last + 1:06d}"
    with io.staged(out) as partial:
        if isinstance(model, nn.Module):
            io.save(partial, model, about)
        else:
            io.write_tensors(partial / io.WEIGHTS, model)
            io.write_about(partial, {**about, "sites": {}, "tied": {}})
        packed = {key: apart(x.permute(orders[key]) if key in orders else x) for key, x in state.items()}
        io.write_tensors(partial / STATE, packed | (drawn() if rng else {}))
        sums = {name: digest(partial / name) for name in (io.WEIGHTS, STATE)}
        io.write_about(partial, {**io.read_about(partial), "sha256": sums})
        for path in (*partial.iterdir(), partial):
            io.to_disk(path)
    io.to_disk(out.parent)
    sweep(out.parent, keep)
    return out


def load(folder: str | Path, model: Model, opt: Optim) -> dict[str, Any]:
    """Continue from the newest checkpoint in `folder` (or from one numbered folder); returns its `extra`.

    The weights are written in place, and random state is set if it was saved. Nothing is changed when something
    does not fit. Raises FileNotFoundError where there is no checkpoint, and ValueError for a file that is damaged,
    cut short or another checkpoint's, for another model, and for another method: it names what differs.
    """
    here = newest(folder)
    if here is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint; give the folder that checkpoint.save was given")
    about = read_about(here)
    require_same_settings(here, about["optimizer"], settings(opt))
    tensors, state = (verified(here / name, about["sha256"][name]) for name in (io.WEIGHTS, STATE))
    require_fit(here, model, tensors, about["tied"])
    random = {key: state.pop(key) for key in list(state) if "/" not in key}
    for key, order in about["orders"].items():
        state[key] = state[key].permute([order.index(axis) for axis in range(len(order))])
    opt.load_state_dict(nested(state, about["groups"]))
    with torch.no_grad():
        for name, x in weights(model)[0].items():
            x.copy_(tensors[name])
    redraw(random)
    extra: dict[str, Any] = about["extra"]
    return extra


def newest(folder: str | Path) -> Path | None:
    """The newest checkpoint in `folder`, or `folder` itself where it is one; None where there is none."""
    folder = Path(folder)
    itself = [folder] if (folder / io.ABOUT).is_file() else []
    return max([*itself, *numbered(folder)], key=number, default=None)


def flat(opt: Optim) -> dict[str, Tensor]:
    """The optimizer's state, sharing memory with it: parameter name/key -> tensor.

    >>> from subspan.optim import Sgd
    >>> opt = Optim([("w", torch.ones(2))], Sgd(), lr=0.1, where="w")
    >>> opt.advance("w", opt.param_groups[0]["params"][0], torch.ones(2), opt.param_groups[0])
    >>> flat(opt)
    {'w/step': tensor(1)}
    """
    saved = opt.state_dict()
    index = {i: name for g in saved["param_groups"] for i, name in zip(g["params"], g["param_names"], strict=True)}
    return {f"{index[i]}/{key}": x for i, s in saved["state"].items() for key, x in s.items()}


def nested(state: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `Optim.load_state_dict` takes, from `flat` state and groups with `param_names`."""
    names = [name for group in groups for name in group["param_names"]]
    index = {name: i for i, name in enumerate(names)}
    found: dict[int, dict[str, Tensor]] = {}
    for path, x in state.items():
        name, _, key = path.rpartition("/")
        found.setdefault(index[name], {})[key] = x
    restored = [{key: unplain(value) for key, value in group.items()} for group in groups]
    rows = [{**group, "params": [index[name] for name in group["param_names"]]} for group in restored]
    return {"state": found, "param_groups": rows}


# ---- values


def settings(opt: Optim) -> dict[str, Any]:
    """All that decides how an optimizer steps and that its groups do not say, as plain values."""
    return {"recipe": described(opt.recipe), "seed": opt.seed, "rounding": opt.rounding}


def described(value: Any) -> Any:
    """A value built of dataclasses as plain values: {"kind": class, field: value}.

    >>> from subspan.optim import Every, keep
    >>> described(Every(5, keep))
    {'kind': 'Every', 'every': 5, 'carry': {'kind': 'Keep'}}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **{f.name: described(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def differing(saved: Any, here: Any, path: str = "") -> Iterator[str]:
    """What `described` tells apart, as "path: one saved, another here"."""
    if isinstance(saved, dict) and isinstance(here, dict) and saved.get("kind") == here.get("kind"):
        for key in (*saved, *(key for key in here if key not in saved)):
            yield from differing(saved.get(key), here.get(key), f"{path}.{key}" if path else key)
    elif isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here):
        for i, (one, two) in enumerate(zip(saved, here, strict=True)):
            yield from differing(one, two, f"{path}.{i}")
    elif type(saved) is not type(here) or saved != here:
        yield f"{path}: {brief(saved)} saved, {brief(here)} here"


def brief(value: Any) -> str:
    """The class of what was described, or the value."""
    return str(value["kind"]) if isinstance(value, dict) and "kind" in value else repr(value)


def plain(key: str, value: Any) -> Any:
    """A group's value for json; a number that is a tensor (a learning rate) leaves its precision too."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return {"number": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    return kept(key, list(value) if isinstance(value, tuple) else value)


def unplain(value: Any) -> Any:
    """The group's value again."""
    if isinstance(value, dict) and value.keys() == {"number", "dtype"}:
        return torch.tensor(value["number"], dtype=getattr(torch, value["dtype"]))
    return value


def kept(key: str, value: Any) -> Any:
    """The value, after a check that json gives back an equal one; raises TypeError naming the key."""
    try:
        same = json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        same = False
    if not same:
        raise TypeError(
            f"checkpoint.save: {key}={value!r} is not plain; use numbers, strings, None, lists and dicts with "
            "strings as keys, and put tensors into the model"
        )
    return value


# ---- tensors


def weights(model: Model) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's tensors without repetitions, and alias -> the name that holds the tensor."""
    return io.unique(model) if isinstance(model, nn.Module) else (dict(model), {})


def permuted(x: Tensor) -> list[int] | None:
    """The order of dimensions in which x is contiguous, None where that is its own or there is none.

    Sums over the same numbers in another layout round differently, so a layout has to come back too.
    """
    order = sorted(range(x.ndim), key=lambda axis: (-x.stride()[axis], axis))
    return order if not x.is_contiguous() and x.permute(order).is_contiguous() else None


def apart(x: Tensor) -> Tensor:
    """x contiguous, copied where it is a part of a larger storage, which safetensors refuses."""
    x = x.detach().contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def refuse_cut(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for tensors of which this process holds a part only."""
    cut = [name for name, x in tensors.items() if is_cut(x)]
    if cut:
        raise ValueError(
            f"checkpoint.save: {', '.join(cut[:5])} are cut over processes; use torch.distributed.checkpoint"
        )


def require_same_settings(where: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise ValueError naming the settings in which two optimizers differ."""
    found = [text.removeprefix("recipe.") for text in differing(saved, here)]
    if found:
        raise ValueError(
            f"{where} was saved by another optimizer ({'; '.join(found)}); build Optim with the saved settings"
        )


def require_fit(where: Path, model: Model, tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Raise ValueError naming where saved weights are not those of this model."""
    have, links = weights(model)
    names = [f"{name} missing" for name in have if name not in tensors]
    names += [f"{name} unexpected" for name in tensors if name not in have]
    both = [name for name in have if name in tensors]
    ways = {name: (described_tensor(tensors[name]), described_tensor(have[name])) for name in both}
    names += [f"{name}: {saved} saved, {here} here" for name, (saved, here) in ways.items() if saved != here]
    names += [f"{a} tied to {b} in one only" for a, b in sorted({*links.items()} ^ {*tied.items()})]
    if names:
        rest = f"; and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{where} is of another model ({'; '.join(names[:5])}{rest}); load it into its own")


def described_tensor(x: Tensor) -> str:
    """Precision and shape.

    >>> described_tensor(torch.ones(2, 3))
    'float32 (2, 3)'
    """
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def drawn() -> dict[str, Tensor]:
    """The random state of the CPU and of every card."""
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {CPU: torch.get_rng_state(), **{f"{CARD}{i}": x for i, x in enumerate(cards)}}


def redraw(random: Mapping[str, Tensor]) -> None:
    """Go on with the random state that was saved, on the cards that are there."""
    if CPU in random:
        torch.set_rng_state(random[CPU])
    for i in range(torch.cuda.device_count()):
        if f"{CARD}{i}" in random:
            torch.cuda.set_rng_state(random[f"{CARD}{i}"], i)


# ---- files


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in a folder; one that has its name is complete."""
    return [p for p in folder.iterdir() if number(p)] if folder.is_dir() else []


def number(path: Path) -> int:
    """A checkpoint's number, from 1; 0 for anything else."""
    name = re.fullmatch(r"saved-(\d{6,})", path.name)
    return int(name[1]) if name and (path / io.ABOUT).is_file() else 0


def sweep(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest, and what killed processes left of others."""
    *old, last = sorted(numbered(folder), key=number)
    for path in old[: max(0, len(old) + 1 - keep)]:
        path.rename(path.with_name(f".{path.name}.partial-{os.getpid()}"))  # half-deleted, it must not look whole
    for path in folder.glob(".saved-*.partial-*"):
        name = re.fullmatch(r"\.saved-(\d{6,})\.partial-\d+", path.name)
        if name and int(name[1]) <= number(last):
            shutil.rmtree(path, ignore_errors=True)


def read_about(here: Path) -> dict[str, Any]:
    """A checkpoint's json; raises ValueError for one of something else, or with parts missing."""
    about = io.read_about(here)
    if about.get("kind") != "checkpoint":
        raise ValueError(f"{here} is a saved {about.get('kind', 'model')}, not a checkpoint; use subspan.io.load")
    missing = [key for key in ("optimizer", "groups", "orders", "extra", "sha256", "tied") if key not in about]
    if missing:
        raise ValueError(f"{here / io.ABOUT} is damaged: it has no {', '.join(missing)}; load an older checkpoint")
    return about


def verified(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file; raises ValueError when it is not, to the last byte, the one that was written."""
    tensors = io.read_tensors(path)
    if digest(path) != sha256:
        raise ValueError(
            f"{path} is not the file that {io.ABOUT} beside it was written with: it is damaged or another "
            "checkpoint's; copy the folder again, or load an older one"
        )
    return tensors


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
