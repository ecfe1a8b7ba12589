"""Compression block by block: each is calibrated through the blocks that are already compressed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from subspan import site
from subspan.compress import Calibration, Compression, OneShot, Track, compressed, gained, study
from subspan.edit import Edit, edit, matrices, shapes, sites
from subspan.fit import Decomposition, decompose
from subspan.metric import Batches, Forward, Measure, collect
from subspan.plan import Plan, SitePlan, priced, ridged
from subspan.select import Select
from subspan.threads import spread
from subspan.watch import evaluating

Slot = int | str
Swaps = dict[str, tuple[nn.Module, nn.Module]]


@dataclass(frozen=True, slots=True)
class Blockwise:
    """Blocks one after the other, each calibrated on what the compressed blocks before it really put out.

    A block is a numbered module (`layers.3`), and its layers are calibrated together. The blocks must form a
    chain: each takes the hidden states that the one before it gives, beside whatever else. Hidden states of all
    batches are kept, so a block runs three times: recorded, calibrated, compressed. Ranks are those of one shot,
    chosen before anything is replaced.
    """

    def compress(
        self, model: nn.Module, method: Compression, *, select: Select | None, data: Calibration, track: Track[str]
    ) -> tuple[Plan, Edit]:
        """Plan on the model as it is, then follow that plan; raises what `study` and `follow` raise."""
        self.require_inputs(method.measure)
        data = replace(data, batches=None if data.batches is None else list(data.batches))
        plan = study(
            model,
            method.measure,
            select=select,
            batches=data.batches,
            forward=data.forward,
            loss=data.loss,
            track=track,
        ).plan(method.budget)
        return self.follow(model, plan, method.measure, data=data, track=track)

    def follow(
        self, model: nn.Module, plan: Plan, measure: Measure, *, data: Calibration, track: Track[str]
    ) -> tuple[Plan, Edit]:
        """Do what a plan says, block by block; on any error the model is left as it was.

        A measure that needs no data is followed in one shot, which is the same. Raises ValueError for a measure
        of gradients, which no block has alone, and for a model whose blocks form no chain.
        """
        plan.check(shapes(matrices(model)))
        changed = [name for name, row in plan.sites.items() if row.form != "keep"]
        if measure.needs == "nothing" or not changed:
            return OneShot().follow(model, plan, measure, data=data, track=track)
        self.require_inputs(measure)
        site.require_inputs(sites(model, changed.__contains__), measure)
        blocks = chain(model, changed)
        batches = data.present(measure, changed)
        rows, done = dict(plan.sites), Edit(model, {})
        try:
            with evaluating(model), torch.no_grad():
                runs = _record(model, blocks, batches, data.forward)
                for i, block in enumerate(track(blocks)):
                    here = {n: plan.sites[n] for n in changed if f"{n}.".startswith(f"{block}.")}
                    made, swaps = _replace(model, block, here, measure, runs.calls(i))
                    rows |= made
                    done.swaps |= swaps
                    if i + 1 < len(blocks):
                        runs.advance(i, model.get_submodule(block))
        except BaseException:
            done.undo()
            raise
        return replace(plan, sites=rows), done

    def require_inputs(self, measure: Measure) -> None:
        """Raise ValueError for a measure of gradients, which a block does not have on its own."""
        if measure.needs == "gradients":
            raise ValueError(
                f"{measure!r} reads gradients, which a block does not have on its own; compress in one shot"
            )


def _replace(
    model: nn.Module, block: str, here: Mapping[str, SitePlan], measure: Measure, calls: Sequence[Call]
) -> tuple[dict[str, SitePlan], Swaps]:
    """Calibrate and replace the sites of one block; returns their rows with the errors made, and the swaps."""
    if not here:
        return {}, {}
    every = matrices(model)
    found = {name: every[name] for name in here}
    module = model.get_submodule(block)
    counts: dict[str, int] = {}
    means = collect(module, calls, measure, found, forward=lambda b, call: call.run(b), counts=counts)
    ridges: dict[str, float] = {}

    def take(name: str) -> Decomposition:
        metric = measure.metric(means[name])
        ridges[name] = metric.ridge
        return decompose(site.matrix(found[name]).detach(), metric)

    parts = dict(zip(found, spread(take, found), strict=True))
    swaps = edit(model, list(here), lambda n, layer: compressed(layer, here[n], parts[n], where=n)).swaps
    made = {n: replace(s, error=parts[n].error(s.rank), bias=gained(found[n], parts[n])) for n, s in here.items()}
    return {name: ridged(priced(row), ridges[name], counts[name]) for name, row in made.items()}, swaps


def _block(name: str) -> str | None:
    """The numbered module that a site is in, outermost first; None when nothing is numbered.

    >>> _block("model.layers.3.mlp.experts.0.up"), _block("lm_head")
    ('model.layers.3', None)
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[: at + 1])


def chain(model: nn.Module, names: Sequence[str]) -> list[str]:
    """All blocks from the first to the last one that holds a site."""
    blocks = {name: _block(name) for name in names}
    if outside := [name for name, block in blocks.items() if block is None]:
        raise ValueError(
            f"{outside[0]} is in no numbered block, so it has no place in the order; leave it out with "
            f"'!{outside[0]}', or compress in one shot"
        )
    held = {block for block in blocks.values() if block is not None}
    stacks = sorted({block.rpartition(".")[0] for block in held})
    if len(stacks) > 1:
        raise ValueError(
            f"the sites lie in {len(stacks)} stacks of blocks ({', '.join(repr(s) for s in stacks)}); select "
            f"those of one at a time, such as '{stacks[0] or '0'}.*'"
        )
    prefix = f"{stacks[0]}." if stacks[0] else ""
    children = [f"{prefix}{n}" for n, _ in model.get_submodule(stacks[0]).named_children() if n.isdigit()]
    used = [i for i, block in enumerate(children) if block in held]
    return children[used[0] : used[-1] + 1]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments a block was called with; `slot` says which of them are the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    slot: Slot
    hidden: Tensor | None = None

    def run(self, block: nn.Module) -> Tensor:
        """What the block makes of the hidden states; a copy of them, as a block may write into its input."""
        x = None if self.hidden is None else self.hidden.clone()
        if isinstance(self.slot, int):
            args = (*self.args[: self.slot], x, *self.args[self.slot + 1 :])
            return _hidden(block(*args, **self.kwargs), "the block")
        return _hidden(block(*self.args, **{**self.kwargs, self.slot: x}), "the block")


@dataclass(slots=True, eq=False)
class _Runs:
    """What every block was called with in every batch, and the hidden states that enter the next block."""

    tapes: list[list[Call]]
    hidden: list[Tensor]

    def calls(self, i: int) -> list[Call]:
        """The calls of block i on the present hidden states, one for each batch."""
        return [replace(tape[i], hidden=x) for tape, x in zip(self.tapes, self.hidden, strict=True)]

    def advance(self, i: int, block: nn.Module) -> None:
        """Take the hidden states through block i as it is now."""
        for batch, call in enumerate(self.calls(i)):
            self.hidden[batch] = call.run(block)


class Recorded(Exception):
    """Raised inside a forward pass to end it where no more is wanted."""


def _record(model: nn.Module, blocks: Sequence[str], batches: Batches, forward: Forward) -> _Runs:
    """Run the batches up to the last block, and keep each block's arguments and the first one's hidden states."""
    runs = _Runs([], [])
    for batch in batches:
        # The first batch runs to its end, to see that no block is called again.
        tape = Tape(blocks, ends=bool(runs.tapes))
        modules = [model.get_submodule(block) for block in blocks]
        hooks = [m.register_forward_pre_hook(tape.enter(i), with_kwargs=True) for i, m in enumerate(modules)]
        hooks += [m.register_forward_hook(tape.leave(i)) for i, m in enumerate(modules)]
        try:
            forward(model, batch)
        except Recorded:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if len(tape.calls) < len(blocks):
            missed = blocks[len(tape.calls)]
            raise ValueError(f"no calibration batch reached {missed}; use more data or leave the site out")
        runs.tapes.append(tape.calls)
        runs.hidden.append(tape.first)
    return runs


class Tape:
    """One batch's way through the blocks."""

    first: Tensor

    def __init__(self, blocks: Sequence[str], *, ends: bool) -> None:
        self.blocks = blocks
        self.ends = ends
        self.calls: list[Call] = []
        self.last: Tensor | None = None

    def enter(self, i: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            for name, value in named.items():
                _require_plain(value, f"{self.blocks[i]} is given {name}")
            slot = next((k for k, v in named.items() if isinstance(v, Tensor) and (not i or v is self.last)), None)
            if slot is None or i != len(self.calls):
                before = f"what {self.blocks[i - 1]} put out" if i else "hidden states"
                raise ValueError(
                    f"{self.blocks[i]} was not called once and with {before}, so the blocks form no chain "
                    "to walk along; compress in one shot"
                )
            if i == 0:
                self.first = named[slot].clone()
            rest = tuple(None if k == slot else v for k, v in enumerate(args))
            self.calls.append(Call(rest, {k: None if k == slot else v for k, v in kwargs.items()}, slot))
            if self.ends and i + 1 == len(self.blocks):
                raise Recorded

        return see

    def leave(self, i: int) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            self.last = _hidden(output, self.blocks[i])

        return see


def _hidden(output: Any, where: str) -> Tensor:
    """The hidden states in a block's output: itself, or the first of several."""
    x = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(x, Tensor):
        raise ValueError(f"{where} puts out {type(x).__name__}, not hidden states; compress in one shot")
    return x


def _require_plain(value: Any, where: str) -> None:
    """Raise ValueError for an argument that may remember one call in the next, like a cache."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            _require_plain(item, where)
    elif not isinstance(value, Tensor | bool | int | float | complex | str | torch.dtype | torch.device | None):
        raise ValueError(
            f"{where} of type {type(value).__name__}, which may remember one call in the next; run the model "
            "without it, for transformers with use_cache=False, or compress in one shot"
        )
