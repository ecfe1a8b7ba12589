"""How much the demo does."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Settings:
    """Sizes of the three acts; the numbers that decide how long the demo takes."""

    steps: int = 90
    batch: int = 8
    length: int = 128
    vocab: int = 2048
    hidden: int = 192
    layers: int = 4
    code_chars: int = 600_000
    errs: tuple[float, ...] = (0.3, 0.5)
    window: int = 512
    scored: int = 8
    calibration: int = 16
    heal_steps: int = 12
    heal_length: int = 256
    decode: int = 16
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def rank(self) -> int:
        """The rank of act one: a quarter of the hidden size."""
        return self.hidden // 4


def full(seed: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Settings:
    """About eight minutes on two cores."""
    return Settings(seed=seed, device=device, dtype=dtype)


def quick(seed: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Settings:
    """The same story in two minutes, with numbers that say less."""
    return replace(
        full(seed, device=device, dtype=dtype), steps=16, vocab=1024, hidden=128, layers=2, code_chars=150_000,
        window=256, scored=2, calibration=8, heal_steps=2, heal_length=128, decode=2,
    )  # fmt: skip
