"""Models on disk: safetensors and json, written whole or not at all, read strictly.

A folder holds `model.safetensors` (tensors under the model's own names) and `subspan.json` (what stands at each
edited site). No pickle. `spec` and `build` know no op by name: they rely on `LinOp`'s contract that constructor
arguments and attributes share one name.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from subspan import site
from subspan.edit import Edit, edit
from subspan.ops import LinOp, OpLayer
from subspan.packed import Packed, pack, unpack

FORMAT = 1
WEIGHTS, ABOUT = "model.safetensors", "subspan.json"
Json = dict[str, Any]


def spec(op: LinOp) -> Json:
    """What an op is, without its numbers: {"kind": class, argument: value}; tensors leave shape and dtype.

    >>> from subspan.ops import Diag
    >>> spec(Diag(torch.ones(2)))
    {'kind': 'Diag', 'd': {'tensor': [2], 'dtype': 'float32'}}
    """
    arguments = list(inspect.signature(type(op).__init__).parameters)[1:]
    return {"kind": type(op).__name__, **{name: _encode(getattr(op, name)) for name in arguments}}


def build(description: Mapping[str, Any]) -> LinOp:
    """An op of that description with uninitialised tensors, to be filled by a strict load.

    Raises ValueError for an op this version does not know.
    """
    known = {kind.__name__: kind for kind in _subclasses(LinOp)}  # type: ignore[type-abstract]
    name = description.get("kind")
    if name not in known:
        raise ValueError(f"unknown op {name!r}; this version knows {', '.join(sorted(known))}: upgrade subspan")
    return known[name](**{key: _decode(value) for key, value in description.items() if key != "kind"})


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, LinOp):
        return spec(value)
    if isinstance(value, list | tuple | nn.ModuleList):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping) and "tensor" in value:
        return torch.empty(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if isinstance(value, Mapping):
        return build(value)
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def _subclasses(kind: type[LinOp]) -> Iterator[type[LinOp]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


@contextmanager
def staged(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A fresh folder beside `out` that takes its name only when the block ends well.

    Raises FileExistsError when `out` is a file or a non-empty folder (unless `force`), PermissionError when the
    parent cannot be written, OSError with the remedy when the disk is full. What was there before stays until
    the new folder is complete, whatever happens.
    """
    out = Path(out).resolve()
    if out.is_file():
        raise FileExistsError(f"{out} is a file; choose another output, or remove it first")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise FileExistsError(
            f"{out} exists and is not empty; choose another output or pass --force to replace it"
        )
    partial, old = (out.with_name(f".{out.name}.{stage}-{os.getpid()}") for stage in ("partial", "old"))
    for stale in (partial, *([old] if out.exists() else []), *_abandoned(out)):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        _swap(partial, out, old)
    except (OSError, SafetensorError) as problem:
        explained = _explain(problem, out)
        if explained is problem:
            raise
        raise explained from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def _swap(partial: Path, out: Path, old: Path) -> None:
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise


def _abandoned(out: Path) -> list[Path]:
    """Folders that killed processes left: half-written ones, and replaced ones whose replacement is there."""
    stages = ("partial", "old") if out.exists() else ("partial",)
    found = [(path, path.name.removeprefix(f".{out.name}.").partition("-")) for path in _beside(out)]
    return [p for p, (stage, _, pid) in found if stage in stages and pid.isdecimal() and not _alive(int(pid))]


def _beside(out: Path) -> list[Path]:
    parent = out.parent
    return [p for p in parent.iterdir() if p.name.startswith(f".{out.name}.")] if parent.is_dir() else []


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _explain(problem: Exception, out: Path) -> Exception:
    text = str(problem)
    if getattr(problem, "errno", None) == errno.ENOSPC or "os error 28" in text:
        return OSError(errno.ENOSPC, f"disk full while writing {out}; nothing was changed: free space and repeat")
    where = getattr(problem, "filename", None)
    ours = where is None or Path(where).is_relative_to(out.parent)
    if ours and (isinstance(problem, PermissionError) or getattr(problem, "errno", None) == errno.EROFS):
        return PermissionError(f"cannot write to {out.parent}; choose an output folder you may write to")
    return problem


def save(folder: Path, model: nn.Module, about: Mapping[str, Any] | None = None) -> None:
    """Write a model with compressed sites into an existing folder (see `staged`), with `about` in its json.

    Tied parameters are stored once; the json names the aliases.
    """
    tensors, tied = unique(model)
    sites = {
        name: {"kind": "compressed", "op": spec(module.op), "bias": module.bias is not None}
        for name, module in model.named_modules()
        if isinstance(module, OpLayer)
    }
    write_tensors(folder / WEIGHTS, tensors)
    write_about(folder, {**(about or {}), "sites": sites, "tied": tied})


def unique(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's state without repetitions, and alias -> the name that holds the tensor."""
    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        holder = (
            first.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), name)
            if tensor.numel()
            else name
        )
        if holder == name:
            tensors[name] = tensor
        else:
            tied[name] = holder
    return tensors, tied


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, tied: bool = False) -> None:
    """One safetensors file, every tensor contiguous; if `tied`, one of several names is stored under the first."""
    aliases = _aliases(tensors) if tied else {}
    kept = {name: t for name, t in tensors.items() if name not in aliases}
    _write(path, kept, tied=json.dumps(aliases) if aliases else "")


def write_packed(path: Path, tensors: Mapping[str, Tensor], kind: str) -> Packed:
    """One safetensors file as `write_tensors` with `tied` writes it, its tensors held narrower.

    `read_tensors` widens them again. Raises what `packed.pack` raises.
    """
    aliases = _aliases(tensors)
    packed = pack({name: t for name, t in tensors.items() if name not in aliases}, kind)
    _write(path, packed.tensors, tied=json.dumps(aliases) if aliases else "", narrow=kind)
    return packed


def _aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The further names of a tensor, each with its first one."""
    first: dict[int, str] = {}
    holders = {name: first.setdefault(id(t), name) for name, t in tensors.items()}
    return {name: holder for name, holder in holders.items() if name != holder}


def _write(path: Path, tensors: Mapping[str, Tensor], **said: str) -> None:
    kept = {name: t.detach().contiguous() for name, t in tensors.items()}
    save_file(kept, path, metadata={"format": "pt"} | {key: text for key, text in said.items() if text})


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """The folder's json, with format and library version."""
    text = json.dumps({"format": FORMAT, "library": subspan_version(), **about}, indent=1)
    (folder / ABOUT).write_text(text + "\n", encoding="utf-8")


def read_about(folder: str | Path) -> Json:
    """The folder's json; raises FileNotFoundError, or ValueError for damage or a newer format."""
    path = Path(folder) / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {ABOUT}; it is not a folder that subspan saved")
    try:
        about: Json = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:  # UnicodeDecodeError is one too
        raise ValueError(f"{path} is damaged: {problem}; save the model again") from None
    if not isinstance(about, dict) or not isinstance(about.get("format"), int) or "sites" not in about:
        raise ValueError(f"{path} is damaged: it names no format and sites; save the model again")
    if about["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {about['format']}, written by subspan {about.get('library')}; this is subspan "
            f"{subspan_version()}, which reads up to {FORMAT}: upgrade subspan"
        )
    return about


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, those of several names under each, and those held narrower in float32.

    Raises ValueError naming the file when it is damaged or cut short.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; copy or save the folder again")
    try:
        with safe_open(str(path), framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = file.metadata() or {}
            tied = json.loads(said.get("tied", "{}"))
            found = unpack(found, said["narrow"]) if "narrow" in said else found
            return found | {name: found[holder] for name, holder in tied.items() if holder in found}
    except SafetensorError as problem:
        raise ValueError(f"{path} is damaged or cut short ({problem}); copy or save it again") from None


def load(folder: str | Path, model: nn.Module) -> Edit:
    """Turn a model of the original architecture into the saved one, in place.

    Every tensor must be there, of the right shape, and nothing else: ValueError lists what is missing, left
    over or misshapen, and the model is left as it was.
    """
    about, tensors = read_about(folder), read_tensors(Path(folder) / WEIGHTS)

    def make(name: str, old: nn.Module) -> nn.Module:
        row = about["sites"][name]
        op = build(row["op"])
        bias = torch.empty(op.shape[0], dtype=next(op.parameters()).dtype) if row["bias"] else None
        return site.of(old).rebuild(old, op, bias)

    done = edit(model, list(about["sites"]), make)
    try:
        aliases = {alias: tensors[name] for alias, name in about.get("tied", {}).items() if name in tensors}
        fill(model.state_dict(keep_vars=True), {**tensors, **aliases}, str(folder))
    except BaseException:
        done.undo()
        raise
    return done


def fill(have: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Load tensors strictly into parameters and buffers of the same names, keeping the saved precision."""
    report = [
        ("missing", [name for name in have if name not in tensors]),
        ("unexpected", [name for name in tensors if name not in have]),
        ("of another shape", [n for n, t in tensors.items() if n in have and t.shape != have[n].shape]),
        ("of another kind of number", [n for n, t in tensors.items() if n in have and not _alike(t, have[n])]),
    ]
    problems = [f"{len(names)} {what} ({', '.join(names[:5])})" for what, names in report if names]
    if problems:
        raise ValueError(
            f"{where} does not fit this model: {'; '.join(problems)}; load it into its own architecture"
        )
    for name, tensor in have.items():
        tensor.data = tensors[name].to(tensor.device)


def _alike(one: Tensor, two: Tensor) -> bool:
    return one.is_floating_point() == two.is_floating_point()


def subspan_version() -> str:
    """The installed version of subspan."""
    return version("subspan")


def to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that not even a loss of power can undo it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
