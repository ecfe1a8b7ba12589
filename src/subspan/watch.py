"""Looking at a model at work: in eval mode, and at the experts of 3-D parameters, which no module call shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from subspan import site

See = Callable[[str, Tensor], None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode for a while, then each in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, shows the inputs (tokens, n) that experts are multiplied with, by the expert's name.

    It knows a parameter by its memory: in a product `x @ w` with one expert's slice, however the module that owns
    it came there, and in a grouped product of sorted tokens with all experts at once. A module that copies
    slices before it multiplies is not seen.
    """

    def __init__(self, experts: Mapping[str, site.Expert], see: See) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.see = see
        self.slices: dict[tuple[int, int, int], str] = {}
        self.stacks: dict[tuple[int, int, int], dict[int, str]] = {}
        for name, expert in experts.items():
            parameter = site.parameter(expert)
            self.slices[_place(parameter[expert.index])] = name
            self.stacks.setdefault(_place(parameter), {})[expert.index] = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given: dict[Any, Any] = {**dict(enumerate(args)), **(kwargs or {})}
        name = func.name()
        if name in ("aten::mm", "aten::addmm"):
            x, w = args[-2:]
            if _place(w) in self.slices:
                self.see(self.slices[_place(w)], x)
        elif "grouped_mm" in name and _place(args[1]) in self.stacks:
            self.split(args[0], self.stacks[_place(args[1])], given.get("offs", given.get(2)))
        return func(*args, **(kwargs or {}))

    def split(self, x: Tensor, names: Mapping[int, str], ends: Tensor | None) -> None:
        """Show each expert its own of the sorted tokens x, which end at `ends` (experts,)."""
        start = 0
        for i, end in enumerate([] if ends is None else ends.tolist()):
            if i in names and end > start:
                self.see(names[i], x[start:end])
            start = end


def _place(w: Tensor) -> tuple[int, int, int]:
    """Where in memory a tensor lies, and how many numbers it has."""
    return w.untyped_storage().data_ptr(), int(w.storage_offset()), w.numel()
