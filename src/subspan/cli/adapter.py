"""`subspan adapter`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from subspan.adapt import trainable
from subspan.cli.common import LIMIT, Debug, Force, Json, Model, Out, Result, bar, facts, note
from subspan.hosts import folders, jobs
from subspan.hosts.peft import save_peft
from subspan.hosts.peft_change import Difference, as_lora, compare, write_lora
from subspan.hosts.peft_keys import PREFIX
from subspan.hosts.peft_merge import effect, merge_folder, opened_with, refuse_gate
from subspan.hosts.peft_read import AdapterFolder, Weights, base_of, read_adapter
from subspan.hosts.stored import store
from subspan.packed import bound_of

EXAMPLE = "subspan adapter merge smollm2 runs/lora -o merged"


class Form(StrEnum):
    """What an adapter can be converted to."""

    lora = "lora"
    peft = "peft"
    subspan = "subspan"


class Kept(StrEnum):
    """How the numbers of an adapter can lie in its file."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    float64 = "float64"

    @property
    def narrow(self) -> bool:
        """Whether it loses digits of float32."""
        return self not in (Kept.float32, Kept.float64)


HELP_ADAPTER = "An adapter's folder, as peft or subspan saved it."
AdapterPath = Annotated[Path, typer.Argument(metavar="ADAPTER", help=HELP_ADAPTER, show_default=False)]
Base = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Its base; by default the one it names.")
]
Prefix = Annotated[str, typer.Option("--prefix", help="What precedes the layers' names in a PEFT file.")]
Root = Annotated[str, typer.Option("--root", help="What to put before them to get the model's names.")]


def run(ctx: typer.Context) -> None:
    """Check, convert, merge or compare adapters, PEFT's or subspan's own.

    A PEFT folder holds adapter_config.json and adapter_model.safetensors: LoRA (with rsLoRA, DoRA, PiSSA, EVA),
    AdaLoRA, LoHa, LoKr, VeRA, RandLoRA, OFT or SHiRA.
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def check(
    model: Model,
    adapter: AdapterPath,
    prefix: Prefix = PREFIX,
    root: Root = "",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Load an adapter strictly and prove on text that it changes the model's logits."""
    saved = read_adapter(adapter, prefix=prefix, root=root)
    found = effect(model, saved)
    kinds = saved.kinds()
    data = {
        "adapter": str(adapter), "form": saved.form, "method": saved.method, "sites": len(saved.sites),
        "tensors": {kind: {"count": count, "numbers": size} for kind, (count, size) in kinds.items()},
        "numbers": sum(size for _, size in kinds.values()), **asdict(found),
    }  # fmt: skip
    rows = {kind: f"{count} tensors, {size:,} numbers" for kind, (count, size) in kinds.items()}
    moved = f"{found.largest:.4g} at most, {found.mean:.4g} on average (largest logit {found.logit:.4g})"
    rows |= {"layers": str(len(saved.sites)), "logits move by": moved}
    return Result(data, (facts(f"{adapter}: {saved.method} ({saved.form})", rows),))


def convert(
    adapter: AdapterPath,
    to: Annotated[
        Form, typer.Option("--to", help="Plain LoRA of one rank, PEFT, or subspan.", show_default=False)
    ],
    out: Out,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="The rank of the plain LoRA.")] = None,
    base: Base = None,
    dtype: Annotated[
        Kept | None, typer.Option("--dtype", help="Store the factors in this; int8 is for --to subspan.")
    ] = None,
    prefix: Prefix = PREFIX,
    root: Root = "",
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Rewrite an adapter: as plain LoRA that every server takes, for PEFT, or for subspan.

    Plain LoRA is the best of its rank for what the adapter changes, and the error is printed: zero where the rank
    suffices. PEFT keeps most types as they are; PiSSA and MiLoRA become LoRA of twice the rank.
    """
    jobs.vacant(out, force=force, reads=[adapter])
    if rank is not None and to is not Form.lora:
        raise typer.BadParameter("--rank belongs to --to lora")
    if dtype is Kept.int8 and to is not Form.subspan:
        raise typer.BadParameter("--dtype int8 belongs to --to subspan; the files of PEFT hold no codes")
    saved = read_adapter(adapter, prefix=prefix, root=root)
    if to is Form.subspan:
        return _to_subspan(saved, out, dtype=dtype, base=base, force=force)
    refuse_gate(saved)
    if to is Form.lora:
        return _to_lora(saved, out, rank=rank, base=base, kept=dtype, force=force)
    kept = None if dtype is None else getattr(torch, dtype)
    source = base_of(saved, base)
    loaded, _ = opened_with(source, saved)
    modules = sorted({key.rpartition(".")[0] for key in saved.whole})
    save_peft(
        loaded.model, out, modules_to_save=modules, base=source, rslora=saved.method == "rslora",
        dtype=kept, force=force,
    )  # fmt: skip
    if (words := jobs.tokenizer_of(saved)) is not None:
        words.save_pretrained(out)
    rounding = _rounding([p.detach() for _, p in trainable(loaded.model)], kept)
    data = {"out": str(out), "to": "peft", "method": saved.method, "rounding": rounding}
    return Result(data, (f"wrote {out}{_rounded(rounding, dtype)}",))


def merge(
    model: Model,
    adapter: AdapterPath,
    out: Out,
    verify: Annotated[bool, typer.Option(help="Compare logits before OUT appears.")] = True,
    prefix: Prefix = PREFIX,
    root: Root = "",
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Write the model with the adapter in its weights.

    In float32 with one cast at the end, file by file where MODEL is a folder. A head that shared its weight with
    the embeddings gets its own where the adapter changes one of them alone.
    """
    jobs.vacant(out, force=force, reads=[model, adapter])
    saved = read_adapter(adapter, prefix=prefix, root=root)
    done = merge_folder(model, saved, out, verify=verify, force=force, track=bar("merging"))
    if done.untied:
        note(f"no longer tied: {', '.join(done.untied)}")
    said = (
        "not verified"
        if done.difference is None
        else f"its logits differ from those of model and adapter by {done.difference:.1e} of the largest "
        f"({done.tolerance:g} allowed)"
    )
    data = {
        "out": str(out), "sites": done.sites, "streamed": done.streamed, "untied": list(done.untied),
        "difference": done.difference, "tolerance": done.tolerance,
    }  # fmt: skip
    return Result(data, (f"wrote {out}, {done.sites} layers merged: {said}",))


def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help=HELP_ADAPTER, show_default=False)],
    two: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    base: Base = None,
    prefix: Prefix = PREFIX,
    root: Root = "",
    as_json: Json = False,
    debug: Debug = False,
) -> Result:
    """Compare what two adapters change, layer by layer: norms, cosine, ranks, and what only one has."""
    pair = [read_adapter(path, prefix=prefix, root=root) for path in (one, two)]
    for saved in pair:
        refuse_gate(saved)
    needy = next((saved for saved in pair if saved.reads_base), None)
    weight = Weights(base_of(needy, base)) if needy else None
    found = compare(pair[0], pair[1], weight or _no_weight)
    alone = [sorted(pair[i].whole.keys() - pair[1 - i].whole.keys()) for i in (0, 1)]
    shared = sorted(pair[0].whole.keys() & pair[1].whole.keys())
    other = [key for key in shared if not torch.equal(pair[0].whole[key], pair[1].whole[key])]
    data = {
        "sites": {site: asdict(row) for site, row in found.items()}, "same": not any(alone) and not other
        and all(row.apart == 0 and row.one is not None and row.two is not None for row in found.values()),
        "modules_to_save": {"only_a": alone[0], "only_b": alone[1], "different": other},
    }  # fmt: skip
    return Result(data, _differences(found, alone, other))


PARTS: dict[str, tuple[Any, str]] = {
    "check": (check, "subspan adapter check smollm2 runs/lora"),
    "convert": (convert, "subspan adapter convert runs/dora --to lora --rank 16 -o plain"),
    "merge": (merge, EXAMPLE),
    "diff": (diff, "subspan adapter diff runs/lora runs/dora"),
}


def _to_lora(
    saved: AdapterFolder, out: Path, *, rank: int | None, base: str | None, kept: Kept | None, force: bool
) -> Result:
    dtype = None if kept is None else getattr(torch, kept)
    weight = Weights(base_of(saved, base)) if saved.reads_base else _no_weight
    cut = as_lora(saved, weight, rank)
    rounding = _rounding([t for factor in cut.factors.values() for t in (factor.u, factor.v)], dtype)
    write_lora(cut, out, base=base or saved.base, dtype=dtype, force=force)
    worst = max(cut.errors, key=lambda site: cut.errors[site])
    data = {"out": str(out), "to": "lora", "method": saved.method, "error": cut.error, "errors": cut.errors,
            "rounding": rounding}  # fmt: skip
    said = f"wrote {out}: its change differs from {saved.path}'s by {cut.error:.2e} of its norm"
    at = f"; most at {worst} ({cut.errors[worst]:.2e})" if cut.errors[worst] else ""
    return Result(data, (said + at + _rounded(rounding, kept),))


def _rounding(tensors: Iterable[torch.Tensor], dtype: torch.dtype | None) -> float | None:
    """The largest relative error of a factor that is stored in a narrower precision."""
    if dtype is None:
        return None
    norms = [(float((t - t.to(dtype).to(t)).norm()), float(t.norm())) for t in tensors]
    return max((lost / size for lost, size in norms if size), default=0.0)


def _rounded(rounding: float | None, kept: Kept | None) -> str:
    """What storing in a narrower precision costs: what was measured, and what cannot be exceeded."""
    if rounding is None or kept is None or not kept.narrow:
        return ""
    bound = bound_of(kept)
    return f"; as {kept} a factor is off by {rounding:.2e} of its norm at most, an entry by no more than {bound}"


def _to_subspan(saved: AdapterFolder, out: Path, *, dtype: Kept | None, base: str | None, force: bool) -> Result:
    data: dict[str, Any] = {"out": str(out), "to": "subspan", "method": saved.method, "rounding": None}
    if dtype is None or not dtype.narrow or saved.form == "peft":
        _as_preset(saved, base_of(saved, base), out, force=force)
    if dtype is None or not dtype.narrow:
        return Result(data, (f"wrote {out}",))
    plain = saved if saved.form == "subspan" else read_adapter(out)
    packed = store(plain, out, dtype, force=force or plain is not saved)
    data["rounding"] = packed.error
    return Result(data, (f"wrote {out}{_rounded(packed.error, dtype)}",))


def _as_preset(saved: AdapterFolder, source: str, out: Path, *, force: bool) -> None:
    if saved.whole or not saved.args or saved.form == "subspan":
        what = (
            "modules saved whole" if saved.whole
            else "that form already" if saved.form == "subspan"
            else "ranks, scales or fixed matrices that no preset of subspan makes"
        )  # fmt: skip
        raise ValueError(
            f"{saved.path} has {what}; a subspan folder is one preset on every layer: use it as it is"
        )
    loaded, _ = opened_with(source, saved)
    folders.save_adapter(
        out, loaded.model, method=saved.method, args=saved.args, source=source,
        about={"from": str(saved.path)}, force=force,
    )  # fmt: skip


def _no_weight(site: str) -> torch.Tensor:
    raise ValueError(f"{site}: what the adapter changes depends on the base weight; give --base MODEL")


def _differences(
    found: dict[str, Difference], alone: list[list[str]], other: list[str]
) -> tuple[Table | str, ...]:
    table = Table("layer", "|A|", "|B|", "|A - B|", "cosine", "ranks")
    for site, row in list(found.items())[:LIMIT]:
        numbers = ["-" if value is None else f"{value:.4g}" for value in (row.one, row.two, row.apart, row.cosine)]
        table.add_row(site, *numbers, f"{row.ranks[0]}, {row.ranks[1]}")
    notes = [f"{len(found) - LIMIT} more layers; --json lists all"] if len(found) > LIMIT else []
    notes += [
        f"only {name} saves whole: {', '.join(keys)}" for name, keys in zip("AB", alone, strict=True) if keys
    ]
    notes += [f"saved whole and different: {', '.join(other)}"] if other else []
    return table, *notes
