"""`stored`: keep parts of a rule's state in another form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.codec import Codec
from subspan.optim.direction import Direction
from subspan.optim.rule import Rule
from subspan.optim.state import Scope, State, placed
from subspan.shards import recut, settled


class Decoded(MutableMapping[str, Tensor]):
    """A state whose encoded entries read and write like plain tensors, for the length of one update."""

    __slots__ = ("_base", "_codecs", "_like", "_open")

    def __init__(self, base: State, codecs: Mapping[str, Codec], like: Tensor) -> None:
        self._base, self._codecs, self._like = base, codecs, like
        self._open: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._codecs:
            return self._base[key]
        if key not in self._open:
            x = self._codecs[key].decode(Scope(self._base, key)).to(self._like.dtype)
            self._open[key] = recut(x, self._like)
        return self._open[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        if key not in self._codecs:
            self._base[key] = value
            return
        codec = self._codecs[key]
        Scope(self._base, key).update(encoded(codec, value))
        self._open[key] = value
        if codec.through:
            del self._open[key]

    def __delitem__(self, key: str) -> None:
        self._open.pop(key, None)
        if key in self._codecs:
            Scope(self._base, key).clear()
        else:
            del self._base[key]

    def __iter__(self) -> Iterator[str]:
        hidden = tuple(f"{name}." for name in self._codecs)
        yield from self._codecs
        yield from (key for key in self._base if not key.startswith(hidden))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, slots=True, repr=False)
class Stored:
    """A rule some of whose state is kept encoded; build it with `stored`."""

    rule: Rule
    codecs: tuple[tuple[str, Codec], ...]

    def __repr__(self) -> str:
        return f"stored({', '.join([repr(self.rule)] + [f'{name}={codec!r}' for name, codec in self.codecs])})"

    @property
    def degree(self) -> Mapping[str, int]:
        """The rule's moments; the encoded ones are not entries of the state, so `rotate` refuses them."""
        return self.rule.degree

    def init(self, g: Tensor, seed: int) -> State:
        """The rule's state, each encoded entry replaced by its codec's, `name.` before the key."""
        s = dict(self.rule.init(g, seed))
        for name, codec in self.codecs:
            s |= placed(name, encoded(codec, s.pop(name)))
        return s

    def update(self, g: Tensor, s: State, w: Tensor, t: int) -> Direction:
        """The rule's direction on the decoded state."""
        return self.rule.update(g, Decoded(s, dict(self.codecs), g), w, t)

    def gain(self, s: State, t: int) -> float:
        """The rule's gain."""
        return self.rule.gain(s, t)


def encoded(codec: Codec, x: Tensor) -> State:
    """What the codec makes of x, sums over processes done."""
    return {key: settled(value) for key, value in codec.encode(x).items()}


def stored(rule: Rule, **codecs: Codec) -> Stored:
    """Keep the named entries of a rule's state encoded; raises ValueError for a name the rule does not have.

    Names with dots are passed as `stored(rule, **{"rule.nu": Bf16()})`.

    >>> from subspan.codec import Factored
    >>> from subspan.optim import Adam
    >>> stored(Adam(), nu=Factored())
    stored(Adam(b1=0.9, b2=0.999, eps=1e-08, eps_on='corrected'), nu=Factored())
    """
    have = rule.init(torch.zeros(2, 2), 0)
    unknown = [name for name in codecs if name not in have]
    if unknown or not codecs:
        raise ValueError(f"stored: {rule!r} has no state {unknown or '(none named)'}; it has: {', '.join(have)}")
    return Stored(rule, tuple(codecs.items()))
