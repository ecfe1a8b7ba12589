"""What a streamed compression is made of: its shards, and a plan made from spectra that are taken one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from subspan import io, linalg, site
from subspan.budget import Evidence, Informed
from subspan.compress import Calibration, Compression, Study, Witness, compressed, gained
from subspan.edit import matrices, shapes
from subspan.fit import Decomposition, decompose
from subspan.hosts import transformers as host
from subspan.hosts.shardfile import stored_names, weightless
from subspan.hosts.transformers import LoadedModel
from subspan.importance import Importance, block_of
from subspan.metric import Measure, Metric
from subspan.ops import OpLayer
from subspan.plan import SitePlan, priced, ridged

MANY = 1 << 26
"""Numbers of the weights that are decomposed at once, on as many threads as there are."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What becomes one shard: `names` of tensors there -> in the model; `groups` what is swapped -> its sites."""

    where: str
    names: dict[str, str]
    groups: dict[str, list[str]]


def pieces(model: nn.Module, changed: Sequence[str]) -> list[Piece]:
    """The shards to write: one for each numbered block, one for each site outside of them, one for the rest."""
    found = matrices(model)
    groups: dict[str, list[str]] = {}
    for name in changed:
        groups.setdefault(place_of(name, found[name]), []).append(name)

    def home(name: str) -> str:
        if any(part.isdigit() for part in name.split(".")):
            return block_of(name)
        return next((place for place in groups if f"{name}.".startswith(f"{place}.")), "")

    made: dict[str, Piece] = {}
    for new, name in stored_names(model).items():
        where = home(new.rpartition(".")[0])
        made.setdefault(where, Piece(where, {}, {})).names[new] = name
    for place, names in groups.items():
        made[home(place)].groups[place] = names
    return list(made.values())


def place_of(name: str, layer: nn.Module) -> str:
    """The module that is swapped when a site is compressed."""
    return name.removesuffix(f"{layer.index}.{layer.key}").rstrip(".") if isinstance(layer, site.Expert) else name


def portions(size: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in order, so many together as come to `MANY` at most, or one alone.

    >>> [len(names) for names in portions({"a": MANY, "b": MANY // 2, "c": MANY // 2})]
    [1, 2]
    """
    taken: list[str] = []
    for name, count in size.items():
        if taken and sum(size[n] for n in taken) + count > MANY:
            yield taken
            taken = []
        taken.append(name)
    if taken:
        yield taken


class Watched(Mapping[str, Tensor]):
    """Spectra that say when somebody looks at them."""

    def __init__(self, spectra: Mapping[str, Tensor], look: Callable[[], None]) -> None:
        self.spectra = spectra
        self.look = look

    def __getitem__(self, name: str) -> Tensor:
        self.look()
        return self.spectra[name]

    def __iter__(self) -> Iterator[str]:
        self.look()
        return iter(self.spectra)

    def __len__(self) -> int:
        return len(self.spectra)


def wants(
    method: Compression, study: Study, sizes: Mapping[str, tuple[int, int]]
) -> tuple[set[str], list[Importance]]:
    """Which spectra a budget looks at, `weight` or `metric`, and which importances it asks for.

    It is found by letting it budget made-up spectra.
    """
    kinds: set[str] = set()
    asked: list[Importance] = []
    made_up = {name: torch.linspace(2, 1, min(size)) for name, size in sizes.items()}
    weight, under = (Watched(made_up, lambda kind=kind: kinds.add(kind)) for kind in ("weight", "metric"))  # type: ignore[misc]

    def ask(importance: Importance) -> dict[str, float]:
        asked.append(importance)
        return dict.fromkeys(sizes, 1.0)

    budget = method.budget
    if isinstance(budget, Informed):
        budget = budget.on(Evidence(weight, under, study.bits, study.other_bytes, ask))
    budget(weight, sizes)
    return kinds, asked


def lean_study(model: nn.Module, found: Mapping[str, nn.Module], measure: Measure) -> Study:
    """A study that knows shapes and bytes, and no spectra yet."""
    x = torch.eye(3, 2, dtype=torch.float64)
    shifts = measure.needs == "inputs" and measure.metric(measure.fold(x) / 3).mean is not None
    parts = {
        name: Decomposition(
            torch.empty(m, 0, device="meta"), torch.zeros(min(m, n)), torch.empty(0, n, device="meta"),
            torch.empty(n, device="meta") if shifts else None,
        )
        for name, (m, n) in shapes(found).items()
    }  # fmt: skip
    every = sum(p.numel() * p.element_size() for p in model.parameters())
    own = sum(w.numel() * w.element_size() for w in map(site.matrix, found.values()))
    bits = {name: 8 * site.parameter(layer).element_size() for name, layer in found.items()}
    biases = {name: gained(layer, parts[name]) for name, layer in found.items()}
    spectra = {name: part.s for name, part in parts.items()}
    return Study(measure, spectra, parts, bits, every - own, biases, Witness(model, found, Calibration()))


def with_spectra(
    study: Study, known: Mapping[str, Mapping[str, Tensor]], told: Mapping[Importance, Mapping[str, float]]
) -> Study:
    """The study with the spectra that were taken; a site's own are those under a measure that needs no data."""
    plain = study.measure.needs == "nothing"
    spectra = {n: known.get(n, {}).get("weight", s) for n, s in study.spectra.items()}
    parts = {
        n: replace(p, s=known.get(n, {}).get("weight" if plain else "metric", p.s)) for n, p in study.parts.items()
    }
    witness = replace(study.witness, told=dict(told))
    return replace(study, spectra=spectra, parts=parts, witness=witness)


def take_apart(
    name: str, layer: nn.Module, row: SitePlan, metric: Metric, tokens: int
) -> tuple[OpLayer, SitePlan]:
    """What takes a layer's place, and its row with the error that this makes."""
    part = decompose(checked(name, layer), metric)
    made = replace(row, error=part.error(row.rank), bias=gained(layer, part))
    return compressed(layer, row, part, where=name), ridged(priced(made), metric.ridge, tokens)


def checked(name: str, layer: nn.Module) -> Tensor:
    """A layer's matrix; raises ValueError for NaN or Inf."""
    w = site.matrix(layer).detach()
    linalg.require_finite(w, f"the weight of {name}")
    return w


def refuse_gradients(measure: Measure) -> None:
    """Raise ValueError for a measure of gradients."""
    if measure.needs == "gradients":
        raise ValueError(
            f"{measure!r} reads gradients, which need the whole model in memory; leave out --stream, or choose "
            "another metric, such as --metric gram"
        )


def opened(name: str | Path, *, dtype: torch.dtype | None = None) -> LoadedModel:
    """The model of a transformers folder without its weights, and the tokenizer; by default in its own precision.

    Raises what `hosts.transformers.skeleton` and `tokenizer` raise, and ValueError for anything but such a folder.
    """
    folder = Path(name)
    if name == "smollm2":
        raise ValueError("smollm2 lies in a package and in no folder of safetensors; leave out --stream")
    if (folder / io.ABOUT).is_file() and io.read_about(folder).get("kind") == "adapter":
        raise ValueError(f"{folder} holds an adapter and not a model; leave out --stream")
    with weightless():
        model = host.skeleton(folder, dtype=dtype or host.stored_dtype(folder))
    return LoadedModel(model, host.tokenizer(folder), str(folder))


def no_loss(model: nn.Module, batch: object) -> Tensor:
    """The loss where there is none: raises ValueError."""
    raise ValueError(
        "the budget asks how much the loss feels each layer, and gradients need the whole model in memory; leave "
        "out --stream, or make the plan elsewhere and pass it by --plan"
    )
