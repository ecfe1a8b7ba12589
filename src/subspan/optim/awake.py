"""Which parameters move: all of them, or some layers at a time."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from subspan.optim.state import mixed

Asleep = Literal["drop", "keep"]


class Awake(Protocol):
    """A frozen dataclass of settings; `state` says what becomes of the state of what falls asleep."""

    @property
    def state(self) -> Asleep:
        """ "drop": it begins anew on waking; "keep": it goes on where it was."""

    def draw(self, names: Iterable[str], *, seed: int, steps: int) -> dict[str, bool]:
        """Of the names that it governs, which are awake after `steps` steps; it depends on nothing else."""


@dataclass(frozen=True, slots=True)
class All:
    """Every parameter moves; none is governed."""

    state: ClassVar[Asleep] = "keep"

    def draw(self, names: Iterable[str], *, seed: int, steps: int) -> dict[str, bool]:
        """No name."""
        return {}


@dataclass(frozen=True, slots=True)
class RandomLayers:
    """Of the numbered blocks (`layers.3`), `count` move, drawn anew after every `every` steps (Pan et al., 2024).

    A draw is without replacement and independent of the others; every block is drawn equally often. Everything
    outside the blocks, such as embeddings, last norm and head, always moves. A block sleeps with requires_grad
    False, so that backward passes it by, and `.grad` None; its state is dropped, or kept with state="keep". The
    draw follows from the optimizer's seed and the number of steps done, so a resumed run goes on with the same.

    >>> drawn = RandomLayers(1).draw(["wte.weight", "h.0.w", "h.1.w", "h.1.b"], seed=0, steps=0)
    >>> drawn["h.1.w"] is drawn["h.1.b"] is not drawn["h.0.w"], "wte.weight" in drawn
    (True, False)
    """

    count: int = 2
    every: int = 20
    state: Asleep = "drop"

    def __post_init__(self) -> None:
        for name, value in (("count", self.count), ("every", self.every)):
            if value < 1:
                raise ValueError(f"RandomLayers: {name}={value!r} is less than 1; use a count, such as 2")
        if self.state not in ("drop", "keep"):
            raise ValueError(f"RandomLayers: state={self.state!r}; use 'drop' or 'keep'")

    def draw(self, names: Iterable[str], *, seed: int, steps: int) -> dict[str, bool]:
        """The members of blocks, True for those of `count` blocks, or of all where there are fewer.

        Raises ValueError when no name is in a numbered block.
        """
        names = list(names)
        member = {name: found for name in names if (found := block(name)) is not None}
        if not member:
            raise ValueError(
                f"RandomLayers: no parameter is in a numbered block such as layers.3; there are: "
                f"{', '.join(names)}. Pass names of the whole model, or use All()"
            )
        blocks = sorted(set(member.values()))
        generator = torch.Generator().manual_seed(mixed(seed, steps // self.every))
        drawn = {blocks[i] for i in torch.randperm(len(blocks), generator=generator)[: self.count].tolist()}
        return {name: found in drawn for name, found in member.items()}


def block(name: str) -> str | None:
    """The numbered block that a parameter is in, up to the first number of its name; None outside of all.

    >>> block("model.layers.3.mlp.experts.0.weight"), block("lm_head.weight")
    ('model.layers.3', None)
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def settle(
    awake: Awake, named: dict[str, Tensor], state: MutableMapping[Tensor, Any], *, seed: int, steps: int
) -> frozenset[str]:
    """Wake and put to sleep what is drawn for the next step; returns the names asleep."""
    drawn = awake.draw(named, seed=seed, steps=steps)
    for name, moves in drawn.items():
        p = named[name].requires_grad_(moves)
        if not moves:
            p.grad = None
            if awake.state == "drop":
                state.pop(p, None)
    return frozenset(name for name, moves in drawn.items() if not moves)
