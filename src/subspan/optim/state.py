"""Optimizer state: flat, tensors only, keys named by role (`rule.mu`, `frame.q`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping

import torch
from torch import Tensor

from subspan.shards import local

State = MutableMapping[str, Tensor]


class Scope(MutableMapping[str, Tensor]):
    """The entries of a flat state whose keys begin with a role, seen without it.

    >>> flat = {"rule.mu": torch.zeros(1)}
    >>> Scope(flat, "rule")["nu"] = torch.ones(1)
    >>> sorted(flat)
    ['rule.mu', 'rule.nu']
    """

    __slots__ = ("_base", "_prefix")

    def __init__(self, base: State, role: str) -> None:
        self._base = base
        self._prefix = role + "."

    def __getitem__(self, key: str) -> Tensor:
        return self._base[self._prefix + key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._base[self._prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self._base[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in self._base if key.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def placed(role: str, s: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's state under the keys it has in the whole: `mu` becomes `role.mu`."""
    return {f"{role}.{key}": value for key, value in s.items()}


def counter(value: int = 0) -> Tensor:
    """A whole number as state: 0-dimensional int64, always on the CPU so that reading it never waits."""
    return torch.tensor(value, dtype=torch.int64, device="cpu")


def mixed(seed: int, draw: int) -> int:
    """A 32-bit seed of its own for draw number 0, 1, ... under a seed."""
    return (seed ^ (draw * 0x9E3779B1)) & 0xFFFFFFFF  # the golden ratio spreads small counts over 32 bits


def by_columns(x: Tensor) -> bool:
    """Whether x is the transpose of a contiguous tensor, as every gradient projected on its right side is."""
    return not x.is_contiguous() and x.mT.is_contiguous()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds in the distinct storages behind tensors."""
    storages = [local(x).untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
