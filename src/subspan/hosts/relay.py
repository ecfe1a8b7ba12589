"""Hidden states handed from block to block of a model whose weights are there one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from subspan.hosts.shardfile import Source
from subspan.metric import Batches, Forward
from subspan.walk import Call, Recorded, Tape, chain
from subspan.watch import evaluating


@dataclass(slots=True, eq=False)
class Relay:
    """What every block is called with in every batch, and the hidden states that enter the next, on the CPU."""

    tapes: list[list[Call]]
    hidden: list[Tensor]
    device: torch.device

    def calls(self, i: int) -> list[Call]:
        """The calls of block i on the present hidden states, one for each batch."""
        return [replace(tape[i], hidden=x) for tape, x in zip(self.tapes, self.hidden, strict=True)]

    def run(self, block: nn.Module, call: Call) -> Tensor:
        """What a block makes of one call."""
        x = None if call.hidden is None else call.hidden.to(self.device)
        return replace(call, hidden=x).run(block)

    def advance(self, i: int, block: nn.Module) -> None:
        """Take the hidden states through block i as it is now."""
        with evaluating(block), torch.no_grad():
            for batch, call in enumerate(self.calls(i)):
                self.hidden[batch] = self.run(block, call).cpu()


def stack_of(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The blocks from the very first of their stack to the last one that holds a site.

    Raises ValueError for sites in several stacks, or in none.
    """
    try:
        blocks = chain(model, names)
    except ValueError as problem:
        raise ValueError(f"{problem} (--stream calibrates block by block; without it there is one shot)") from None
    stack = blocks[0].rpartition(".")[0]
    children = [n for n, _ in model.get_submodule(stack).named_children() if n.isdigit()]
    every = [f"{stack}.{n}" if stack else n for n in children]
    return every[: every.index(blocks[-1]) + 1]


@torch.no_grad()
def record(source: Source, blocks: Sequence[str], batches: Batches, forward: Forward) -> Relay:
    """Run what comes before the first block, and keep with which arguments each block is called.

    Nothing is filled but what that touches, and once the first block, to see what a block puts out; the blocks
    hand on what they are given. Raises ValueError for blocks that form no chain.
    """
    relay = Relay([], [], source.device)
    seen: list[Any] = []
    touched: list[str] = []
    try:
        with evaluating(source.model):
            for batch in batches:
                tape = _follow(source, blocks, lambda: forward(source.model, batch), seen, touched)  # noqa: B023
                relay.tapes.append(tape.calls)
                relay.hidden.append(tape.first.cpu())
    finally:
        source.empty(touched)
    return relay


def _follow(
    source: Source, blocks: Sequence[str], forward: Callable[[], object], seen: list[Any], touched: list[str]
) -> Tape:
    tape, model = Tape(blocks, ends=False), source.model
    modules = [model.get_submodule(block) for block in blocks]
    inside = {part for module in modules for part in module.modules()}

    def fetch(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: Any) -> None:
            if len(tape.calls) == len(blocks):
                raise Recorded
            prefix = f"{name}." if name else ""
            own = [f"{prefix}{leaf}" for leaf, p in module.named_parameters(recurse=False) if p.is_meta]
            touched.extend(source.fill(dict.fromkeys(source.first[n] for n in own)))

        return before

    hooks = [
        module.register_forward_pre_hook(fetch(name))
        for name, module in model.named_modules()
        if module not in inside and next(module.parameters(recurse=False), None) is not None
    ]
    for i, module in enumerate(modules):
        hooks.append(module.register_forward_pre_hook(tape.enter(i), with_kwargs=True))
        hooks.append(module.register_forward_hook(tape.leave(i)))
        module.forward = _handing_on(source, blocks[i], tape, seen)
    try:
        forward()
    except Recorded:
        pass
    finally:
        for module in modules:
            del module.forward
        for hook in hooks:
            hook.remove()
    if len(tape.calls) < len(blocks):
        missed = blocks[len(tape.calls)]
        raise ValueError(f"no calibration batch reached {missed}; use more data or leave the site out")
    return tape


def _handing_on(source: Source, block: str, tape: Tape, seen: list[Any]) -> Callable[..., Any]:
    """A forward that puts out its hidden states as they came, in the form that the first block really had."""
    module = source.model.get_submodule(block)
    real = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        slot = tape.calls[-1].slot
        x = (args[slot] if isinstance(slot, int) else kwargs[slot]).clone()
        if not seen:
            with source.filled(source.names(block)):
                seen.append(real(*args, **kwargs))
        form = seen[0]
        return type(form)((x, *form[1:])) if isinstance(form, tuple | list) and form else x

    return forward
