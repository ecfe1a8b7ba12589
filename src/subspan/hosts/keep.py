"""What a training run keeps: its history, its best state, checkpoints to go on from, modules trained whole."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan import io
from subspan.adapt import Adapted
from subspan.adapt.layers import matrix
from subspan.adapt.tokens import carries_rows, shared_rows
from subspan.edit import edit, sharers
from subspan.hosts import folders
from subspan.hosts.peft import check_modules, layers_of, save_peft
from subspan.hosts.peft_tokens import refuse_ends
from subspan.hosts.peft_write import factor_of, type_of, written_as
from subspan.hosts.transformers import LoadedModel
from subspan.hosts.vocabulary import ends
from subspan.linalg import wide
from subspan.ops import OpLayer
from subspan.optim import Optim, checkpoint
from subspan.select import Select, matcher, pick

BEST = "best/"


@dataclass
class History:
    """What a run did: (step, loss) in nats per token, tokens per second, peak memory and state in bytes.

    `best` is the step and validation loss of the state that was kept, where not simply the last one was.
    """

    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    tokens_per_second: float = 0.0
    peak_rss: int = 0
    state_bytes: int = 0
    best: tuple[int, float] | None = None

    @property
    def final(self) -> float:
        """The validation loss of the state that was kept: the best, or the last."""
        return self.validation[-1][1] if self.best is None else self.best[1]


@dataclass(frozen=True)
class Keeping:
    """What to keep of a run; nothing is stopped and nothing is written by default.

    `best` keeps the state of the lowest validation loss after the first step, not the last. `patience` stops the
    run after so many validations in a row that are no better. Each `every` steps a checkpoint goes into `folder`;
    `facts` say what the run is, and one with other facts is not continued. `resume` goes on from what is there.
    Raises ValueError for a patience or an interval below 1, and for checkpoints without a folder.
    """

    best: bool = True
    patience: int | None = None
    folder: Path | None = None
    every: int | None = None
    resume: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(given is not None and given < 1 for given in (self.patience, self.every)):
            raise ValueError(f"patience {self.patience} and every {self.every} must be at least 1, or None")
        if self.folder is None and (self.every is not None or self.resume):
            raise ValueError("checkpoints need a folder; name one")


class Keeper:
    """Keeps the best state of some tensors, which the optimizer trains, and writes checkpoints of the run.

    `more` are other tensors that change, such as the state of a rank schedule: checkpoints hold them too.
    Validations before the step `since` are not candidates for the best.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        optimizer: Optim,
        keeping: Keeping,
        *,
        more: Mapping[str, Tensor] | None = None,
        since: int = 1,
    ) -> None:
        self.tensors, self.optimizer, self.keeping = dict(tensors), optimizer, keeping
        self.more, self.since = dict(more or {}), since
        self.best: tuple[int, float] | None = None
        self.worse = 0
        self.held: dict[str, Tensor] = {}

    def judge(self, step: int, loss: float, *, last: bool = False) -> bool:
        """Take note of a validation; returns whether the run should stop. No copy is made of the last state."""
        if step < self.since:
            return False
        if self.best is None or loss < self.best[1]:
            self.best, self.worse = (step, loss), 0
            wanted = self.tensors if self.keeping.best and not last else {}
            self.held = {name: t.detach().to("cpu", copy=True) for name, t in wanted.items()}
            return False
        self.worse += 1
        return self.keeping.patience is not None and self.worse >= self.keeping.patience

    @torch.no_grad()
    def close(self, history: History) -> None:
        """Put the best state back, if it is to be kept, and say in the history which it was."""
        if self.keeping.best and self.best is not None:
            for name, t in self.held.items():
                self.tensors[name].copy_(t)
            history.best = self.best
        self.held = {}

    # ---- checkpoints

    def parts(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, sharing memory."""
        return {**self.tensors, **self.more, **{f"{BEST}{name}": t for name, t in self.held.items()}}

    def after(self, step: int, history: History) -> None:
        """Write a checkpoint when it is time."""
        if self.keeping.folder is None or self.keeping.every is None or step % self.keeping.every:
            return
        extra = {
            "step": step,
            "train": [list(row) for row in history.train],
            "validation": [list(row) for row in history.validation],
            "best": None if self.best is None else list(self.best),
            "worse": self.worse,
            "held": bool(self.held),
            "facts": plain(self.keeping.facts),
        }
        parts = {name: checkpoint.apart(t) for name, t in self.parts().items()}
        checkpoint.save(self.keeping.folder, parts, self.optimizer, extra=extra, rng=True)

    def resume(self, history: History) -> int:
        """Go on from the newest checkpoint, if that is asked for and there is one; returns the steps it has made.

        Raises ValueError naming the facts that differ, and what `optim.checkpoint.load` raises.
        """
        here = checkpoint.newest(self.keeping.folder) if self.keeping.resume and self.keeping.folder else None
        if here is None:
            return 0
        about = checkpoint.read_about(here)["extra"]
        other = list(checkpoint.differing(about["facts"], plain(self.keeping.facts)))
        if other:
            raise ValueError(
                f"{here} is of another run ({'; '.join(other)}); give the same command, or begin anew with "
                "--force and without --resume"
            )
        if about["held"]:
            self.held = {name: torch.empty_like(t, device="cpu") for name, t in self.tensors.items()}
        extra = checkpoint.load(here, self.parts(), self.optimizer)
        history.train = [(int(step), loss) for step, loss in extra["train"]]
        history.validation = [(int(step), loss) for step, loss in extra["validation"]]
        self.best = None if extra["best"] is None else (int(extra["best"][0]), extra["best"][1])
        self.worse = extra["worse"]
        return int(extra["step"])


def plain(facts: Mapping[str, Any]) -> Any:
    """The facts as json gives them back."""
    return json.loads(json.dumps(dict(facts)))


def ours(folder: Path) -> bool:
    """Whether a folder holds checkpoints and what is left of such, and nothing else."""
    return all(re.match(r"\.?saved-\d", path.name) for path in folder.iterdir())


def vacate(folder: Path, *, resume: bool, force: bool) -> None:
    """Make sure that checkpoints may go into a folder.

    Raises FileExistsError for one that holds something else, and for checkpoints of a run that is not to be
    continued, unless `force`, which removes them.
    """
    if not folder.exists() or (resume and folder.is_dir() and ours(folder)):
        return
    if not folder.is_dir() or not ours(folder):
        raise FileExistsError(f"{folder} is in the way and no checkpoint; move it, or remove it")
    if checkpoint.newest(folder) is not None and not force:
        raise FileExistsError(
            f"{folder} holds a checkpoint of an unfinished run; pass --resume to go on, or --force to begin anew"
        )
    shutil.rmtree(folder)


def clear(folder: Path | None) -> None:
    """Remove the checkpoints of a run that is finished, if there are any."""
    if folder is not None and folder.is_dir() and ours(folder):
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Whole:
    """Modules that train whole beside an adapter: their names, their parameters by name, and what was untied.

    `untied` names those that shared a weight, each with the module that it was shared with and that keeps it.
    """

    modules: tuple[str, ...]
    named: list[tuple[str, nn.Parameter]]
    untied: Mapping[str, str]


def train_whole(model: nn.Module, select: Select) -> Whole:
    """Let further modules of an adapted model train whole, in place, as PEFT does with its `modules_to_save`.

    A pattern names modules that hold parameters and no modules, such as `lm_head` or `*.norm`. One that shares its
    weight gets a copy of its own. Raises ValueError when an alternative of the pattern matches none, for a layer
    that carries an adapter or is compressed, and when no folder of PEFT could hold modules and adapter.
    """
    layers, wanted = layers_of(model), matcher(select)
    require_peft(layers)
    if taken := [n for n, m in layers.items() if isinstance(m, Adapted | OpLayer) and wanted(n)]:
        held = "carries an adapter" if isinstance(layers[taken[0]], Adapted) else "is compressed"
        raise ValueError(f"{taken[0]} {held} and cannot train whole too; leave it out with '!{taken[0]}'")
    single = [n for n, m in layers.items() if (own := _own(m)) and own == m.state_dict().keys()]
    for part in select.split("|") if isinstance(select, str) else ():
        if part.strip() and not part.strip().startswith("!"):
            pick(single, part, what="module that can train whole")
    names = pick(single, select, what="module that can train whole")
    check_modules(layers, names)
    untied: dict[str, str] = {}
    for name in names:
        shared = sharers(model)
        holders = [other for p in model.get_submodule(name).parameters() for other in shared.get(id(p), ())]
        if others := [other for other in holders if other != name]:
            untied[name] = others[0]
            edit(model, [name], lambda _, old: copy.deepcopy(old))
    named = [(f"{n}.{key}", p) for n in names for key, p in model.get_submodule(n).named_parameters()]
    for _, parameter in named:
        parameter.requires_grad_(True)
    return Whole(tuple(names), named, untied)


def train_tokens(
    model: nn.Module, ids: Sequence[int], start: Mapping[int, Sequence[int]] = {}
) -> list[tuple[str, nn.Parameter]]:
    """Let the rows of single tokens train beside an adapter, in place, as PEFT's `trainable_token_indices`.

    They train where tokens are read in and where they are scored: one set of rows where the head is tied to the
    embeddings, else two. All other rows stay. `start` names tokens whose mean row a row starts as. What trains is
    the change (n, k) of the rows; returns it with its names, for the optimizer. Raises ValueError for ids that are
    not in the vocabulary or listed twice, for embeddings or a head that carry an adapter, and when no folder of
    PEFT could hold rows and adapter.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from subspan.adapt import adapt
    >>> from subspan.methods.adapters import lora
    >>> sizes = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    >>> done = edit(model, "*.q_proj", adapt(lora(rank=1)))
    >>> [(name, p.shape) for name, p in train_tokens(model, [8], {8: [2, 3]})]
    [('model.embed_tokens.rows', torch.Size([4, 1]))]
    """
    there, layers = ends(model), layers_of(model)
    require_peft(layers)
    if taken := [name for name in there.sources if isinstance(layers[name], Adapted)]:
        raise ValueError(
            f"{taken[0]} carries an adapter, and rows of tokens stand alone; leave it out with '!{taken[0]}'"
        )
    refuse_ends({name: layers[name] for name in there.sources})
    count = len(matrix(layers[there.embedding]))
    if not ids or len(set(ids)) < len(ids) or not 0 <= min(ids) <= max(ids) < count:
        raise ValueError(f"ids {list(ids)} must be of the {count} tokens of the vocabulary, each once")

    def change(_: str, w: Tensor) -> tuple[Tensor, Tensor]:
        rows = [wide(w[list(start.get(i, [i]))]).mean(0) - wide(w[i]) for i in ids]
        return torch.tensor(ids), torch.stack(rows)

    edit(model, list(there.sources), shared_rows(there.sources, change))
    return [
        (f"{site}.rows", p)
        for site in dict.fromkeys(there.sources.values())
        for p in model.get_submodule(site).parameters()
        if p.requires_grad
    ]


def _own(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters(recurse=False)}


def require_peft(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError, as `save_peft` does, for an adapter on these layers that no folder of PEFT holds."""
    found = {site: m for site, m in layers.items() if isinstance(m, Adapted) and not carries_rows(m)}
    kind = type_of(found, layers="all")
    if kind == "LORA":
        factor_of(*next(iter(found.items())))
    else:
        written_as(kind, found)


def save_whole(
    out: str | Path,
    loaded: LoadedModel,
    modules: Sequence[str],
    about: Mapping[str, Any],
    *,
    notes: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write an adapter and the modules and rows of tokens that trained with it as a folder of PEFT.

    Of `about`, `method` says what it is, and a base that was quantized to train on is written down beside it. The
    tokenizer lies there too where rows of tokens train. See `io.staged`.
    """
    base = str(Path(loaded.source).resolve()) if Path(loaded.source).is_dir() else loaded.source
    with io.staged(out, force=force) as folder:
        save_peft(loaded.model, folder, modules_to_save=modules, base=base, rslora=about.get("method") == "rslora")
        if "quantized" in about:
            io.write_about(folder, {"kind": "peft", "sites": [], **about})
        if any(map(carries_rows, loaded.model.modules())):
            loaded.tokenizer.save_pretrained(folder)
        folders.write_notes(folder, notes)
    return Path(out)
