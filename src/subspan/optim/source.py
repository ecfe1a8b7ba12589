"""Where gradients come from: backpropagation, or differences of the loss."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from subspan.optim.state import mixed
from subspan.shards import laid

Closure = Callable[[], Any]
Gradient = Callable[[str, Tensor], Tensor | None]
Named = Iterable[tuple[str, Tensor]]


class Source(Protocol):
    """A frozen dataclass of settings; `backward` says whether somebody calls loss.backward() for it.

    Where nobody does, gradients are made one parameter at a time and `Optim.step` needs a closure.
    """

    backward: ClassVar[bool]

    def holds(self, p: Tensor) -> bool:
        """Whether a tensor like p is held for as long as a step takes."""

    def gradients(self, closure: Closure | None, named: Named, *, seed: int, steps: int) -> tuple[Any, Gradient]:
        """The loss, None if unknown, and the gradient of each parameter by name, None for one that has none.

        `steps` counts the steps done before. Runs without autograd.
        """


@dataclass(frozen=True, slots=True)
class Backprop:
    """The gradients that backward() has left in `.grad`; a closure, if any, calls it."""

    backward: ClassVar[bool] = True

    def holds(self, p: Tensor) -> bool:
        """Its gradient is."""
        return True

    def gradients(self, closure: Closure | None, named: Named, *, seed: int, steps: int) -> tuple[Any, Gradient]:
        """The closure's loss, and `.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        return loss, lambda name, p: p.grad


@dataclass(frozen=True, slots=True)
class Spsa:
    """The slope of the loss along one random direction z, from two losses, in the memory of inference.

        c = (loss(w + eps z) - loss(w - eps z)) / (2 eps),   g = c z,   z ~ N(0, 1)

    On average over z, g is the gradient up to eps^2. Both losses see the same random numbers (dropout). z is
    drawn in float32 on the CPU from the seed, the parameter's name and the step, once for every pass over the
    weights, and never kept, so every device and a resumed run see the same. Only parameters that require
    gradients move. With several processes the closure must return the mean loss over all of them.

    Weights walk by +eps z, -2 eps z and +eps z (Malladi et al., 2023), which does not quite lead back: measured
    on weights of size 0.02 with eps 1e-3 they drift by 6e-8 of their size in one step and 2e-6 in a thousand in
    float32, by 4e-3 and 0.12 in bfloat16, 5e-4 and 0.016 in float16. `copy` names the weights that are restored
    from a copy instead, exactly: those in "half" precision, "always" all, or "never" any.

    >>> w = torch.tensor([1.0, 2.0])
    >>> loss, gradient = Spsa().gradients(lambda: w.sum(), [("w", w.requires_grad_(False))], seed=0, steps=0)
    >>> round(float(loss), 3), gradient("w", w)
    (3.0, None)
    """

    eps: float = 1e-3
    copy: Literal["half", "always", "never"] = "half"
    backward: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.eps < math.inf:
            raise ValueError(
                f"Spsa: eps={self.eps!r} is no distance to step; use a small one above 0, such as 1e-3"
            )
        if self.copy not in ("half", "always", "never"):
            raise ValueError(f"Spsa: copy={self.copy!r}; use 'half', 'always' or 'never'")

    def holds(self, p: Tensor) -> bool:
        """Its copy, if it has one."""
        return self.copy == "always" or (self.copy == "half" and p.dtype not in (torch.float32, torch.float64))

    def gradients(self, closure: Closure | None, named: Named, *, seed: int, steps: int) -> tuple[Any, Gradient]:
        """The mean of both losses, and c z; raises ValueError without a closure.

        Raises FloatingPointError for losses that are not finite; the weights are then as they were before.
        """
        if closure is None:
            raise ValueError(
                "Spsa measures the loss itself: call step(closure), where closure() returns the loss of the "
                "current batch and does not call backward()"
            )
        moving = [(name, p) for name, p in named if p.requires_grad]
        loss, slope = self._measure(closure, moving, seed, steps)
        ids = {id(p) for _, p in moving}

        def gradient(name: str, p: Tensor) -> Tensor | None:
            if id(p) not in ids:
                return None
            z = self.noise(name, p, seed=seed, steps=steps)
            return laid(z.to(p.device, torch.promote_types(p.dtype, torch.float32)), p).mul_(slope)

        return loss, gradient

    def noise(self, name: str, p: Tensor, *, seed: int, steps: int) -> Tensor:
        """z for a parameter, of its shape: float32, on the CPU."""
        # A stream of its own: the frames and the rounding of this name draw from crc32(name) ^ seed.
        generator = torch.Generator().manual_seed(mixed(zlib.crc32(f"spsa {name}".encode()) ^ seed, steps))
        return torch.randn(p.shape, generator=generator, dtype=torch.float32)

    def _measure(
        self, closure: Closure, moving: Sequence[tuple[str, Tensor]], seed: int, steps: int
    ) -> tuple[Any, float]:
        """The mean loss and the slope, the weights being back where they were."""
        kept = {name: p.clone() for name, p in moving if self.holds(p)}
        cards = sorted({p.get_device() for _, p in moving if p.is_cuda})
        at = 0.0

        def walk(to: float) -> None:
            nonlocal at
            for name, p in moving:
                if name in kept:
                    p.copy_(kept[name])
                gap = to if name in kept else to - at
                if gap:
                    p.add_(laid(self.noise(name, p, seed=seed, steps=steps).to(p.device), p), alpha=gap)
            at = to

        try:
            walk(self.eps)
            with torch.random.fork_rng(cards):
                plus = closure()
            walk(-self.eps)
            minus = closure()
        finally:
            walk(0.0)
        slope = (float(plus) - float(minus)) / (2 * self.eps)
        if not math.isfinite(slope):
            raise FloatingPointError(
                f"Spsa: the losses at w + eps z and w - eps z are {float(plus)} and {float(minus)}; "
                "lower the learning rate or eps"
            )
        return (plus + minus) / 2, slope
