"""Record weights stepped by the authors' MeZO trainer: `python record_mezo.py OUT.npz`.

Needs torch and MeZO's folder `large_models` on PYTHONPATH (see README.md). The trainer's module is not
imported, for it needs a transformers of 2023: its four MeZO methods are compiled alone.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record_galore import SEED, SHAPES, STEPS, save

SETTINGS = {"lr": 0.01, "zo_eps": 1e-3, "weight_decay": 0.0}
METHODS = ("zo_perturb_parameters", "zo_forward", "zo_step", "zo_update")
ROWS = 16


def draw_regression() -> dict[str, np.ndarray]:
    """Draw initial weights, inputs and targets of one linear regression per shape."""
    rng = np.random.default_rng(SEED)
    arrays: dict[str, np.ndarray] = {}
    for name, (m, n) in SHAPES.items():
        arrays[f"{name}.w0"] = rng.standard_normal((m, n))
        arrays[f"{name}.x"] = rng.standard_normal((ROWS, n))
        arrays[f"{name}.y"] = rng.standard_normal((ROWS, m))
    return arrays


class Regression(torch.nn.Module):
    """Three linear maps without bias, in the order tall, wide, square."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        for name in SHAPES:
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(arrays[f"{name}.w0"].copy())))

    def forward(self, arrays: dict[str, np.ndarray]) -> torch.Tensor:
        """Sum over the maps of the mean of (X W^T - Y)^2."""
        pairs = {name: [torch.from_numpy(arrays[f"{name}.{key}"]) for key in "xy"] for name in SHAPES}
        return sum((x @ self.get_parameter(k).T - y).square().mean() for k, (x, y) in pairs.items())


def peer_methods() -> dict[str, Any]:
    """Compile the peer's MeZO methods, unchanged, out of its file trainer.py."""
    spec = importlib.util.find_spec("trainer")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("no trainer.py on PYTHONPATH: add the folder large_models of MeZO")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    owner = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "OurTrainer")
    chosen: list[ast.stmt] = [f for f in owner.body if isinstance(f, ast.FunctionDef) and f.name in METHODS]
    namespace: dict[str, Any] = {"torch": torch, "np": np}
    exec(compile(ast.Module(chosen, []), spec.origin, "exec"), namespace)
    return {name: namespace[name] for name in METHODS}


def stand_in(losses: list[float]) -> Any:
    """Make the `self` of the peer's methods: what they use of a Trainer, and a note of every loss."""

    def compute_loss(_: Any, model: Regression, inputs: dict[str, np.ndarray]) -> torch.Tensor:
        loss = model(inputs)
        losses.append(loss.item())
        return loss

    body = peer_methods() | {
        "args": types.SimpleNamespace(non_diff=False, n_gpu=0, gradient_accumulation_steps=1, **SETTINGS),
        "lr_scheduler": types.SimpleNamespace(step=lambda: None),
        "compute_loss": compute_loss,
        "compute_loss_context_manager": lambda _: contextlib.nullcontext(),
        "_prepare_inputs": lambda _, inputs: inputs,
        "_get_learning_rate": lambda _: SETTINGS["lr"],
    }
    return type("StandIn", (), body)()


@contextlib.contextmanager
def noted_normal(drawn: list[np.ndarray]) -> Any:
    """Note every result of torch.normal, which draws the peer's perturbations; values unchanged."""
    original = torch.normal

    def normal(*args: Any, **kwargs: Any) -> torch.Tensor:
        z = original(*args, **kwargs)
        drawn.append(z.numpy().copy())
        return z

    vars(torch)["normal"] = normal
    try:
        yield
    finally:
        vars(torch)["normal"] = original


def same_draw(drawn: list[np.ndarray]) -> list[np.ndarray]:
    """Check that one step's four passes over the parameters drew the same z, and return it."""
    count = len(SHAPES)
    passes = [drawn[i : i + count] for i in range(0, len(drawn), count)]
    if len(passes) != 4 or any(
        not np.array_equal(a, b) for p in passes for a, b in zip(p, passes[0], strict=True)
    ):
        raise ValueError(f"a step drew {len(drawn)} perturbations, expected 4 equal sets of {count}")
    return passes[0]


def main(path: str) -> None:
    """Record ten MeZO steps of the linear regressions."""
    arrays = draw_regression()
    model = Regression(arrays)
    losses: list[float] = []
    trainer = stand_in(losses)
    record: dict[str, list[Any]] = {f"{name}.{key}": [] for name in SHAPES for key in "zw"}
    record |= {"seed": [], "projected": []}
    np.random.seed(SEED)
    for _ in range(STEPS):
        drawn: list[np.ndarray] = []
        with noted_normal(drawn):
            trainer.zo_step(model, arrays)
            trainer.zo_update(model)
        record["seed"].append(trainer.zo_random_seed)
        record["projected"].append(trainer.projected_grad)
        for name, z in zip(SHAPES, same_draw(drawn), strict=True):
            record[f"{name}.z"].append(z)
            record[f"{name}.w"].append(model.get_parameter(name).detach().numpy().copy())
    save(path, arrays, record, {"losses": np.reshape(losses, (STEPS, 2))}, SETTINGS)


if __name__ == "__main__":
    main(sys.argv[1])
