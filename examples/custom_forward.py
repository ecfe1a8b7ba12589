"""Compress a model whose forward takes what no library can guess: `forward=` says how to run it on a batch."""

import torch
from torch import Tensor, nn

from subspan.budget import Ratio, Uniform
from subspan.compress import Compression, compress
from subspan.metric import Gram, Plain

WIDTH, STEPS = 48, 16


class Pendulum(nn.Module):
    """Moves states (batch, WIDTH) on by some seconds; wants them by keyword, and a clock besides."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, clock: list[float], *, state: Tensor, damping: float) -> dict[str, Tensor]:
        for seconds in clock:
            state = state + seconds * (self.down(torch.tanh(self.up(state))) - damping * state)
        return {"state": state}


def run(model: nn.Module, batch: tuple[Tensor, float]) -> Tensor:
    """What `forward=` is: any function of the model and a batch, of whatever kind the batches are."""
    state, damping = batch
    return model([0.1] * STEPS, state=state, damping=damping)["state"]


def main() -> dict[str, float]:
    """Compress by half, once by the weights alone and once by what reaches the layers; returns the errors."""
    torch.manual_seed(0)
    model = Pendulum().eval()
    # States lie near a plane of 6 directions, which the weights do not know of.
    plane = torch.randn(6, WIDTH)
    batches = [(torch.randn(64, 6) @ plane + 0.05 * torch.randn(64, WIDTH), 0.1 * i) for i in range(1, 9)]
    unseen = batches.pop()
    errors = {}
    with torch.no_grad():
        exact = run(model, unseen)
        for name, measure in {"plain": Plain(), "gram": Gram()}.items():
            method = Compression(Uniform(Ratio(0.5)), measure)
            plan, edit = compress(model, method, batches=batches, forward=run)
            errors[name] = float((run(model, unseen) - exact).norm() / exact.norm())
            print(f"{name}: {plan.ratio:.0%} of the numbers, error {errors[name]:.2%}")
            edit.undo()
    return errors


if __name__ == "__main__":
    found = main()
    print(f"what reaches the layers helps: {found['gram'] < found['plain']}")
