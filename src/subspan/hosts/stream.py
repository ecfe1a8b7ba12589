"""Compression of a model folder block by block: no more of it than one block is ever in memory.

Everything finished lies in `OUT.partial` until all is done, and is used again after a kill. Processes that
torchrun started share the work through that folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan import io, linalg, site
from subspan.compress import Calibration, Compression, Track
from subspan.edit import edit, matrices, shapes, sites
from subspan.hosts import jobs, quantizer
from subspan.hosts import transformers as host
from subspan.hosts.journal import PLAN, Journal, World
from subspan.hosts.outline import (
    Piece,
    checked,
    lean_study,
    no_loss,
    pieces,
    place_of,
    portions,
    refuse_gradients,
    take_apart,
    wants,
    with_spectra,
)
from subspan.hosts.outline import opened as opened
from subspan.hosts.relay import Relay, record, stack_of
from subspan.hosts.shardfile import (
    Shards,
    Source,
    publish_copies,
    publish_index,
    publish_json,
    publish_tensors,
    read_published,
)
from subspan.hosts.transformers import LoadedModel
from subspan.importance import Importance, block_of
from subspan.metric import collect
from subspan.ops import OpLayer
from subspan.plan import Plan, SitePlan
from subspan.select import Select
from subspan.threads import spread


def compress(
    loaded: LoadedModel,
    out: str | Path,
    *,
    method: str,
    args: Mapping[str, Any],
    plan: Plan | None = None,
    select: Select | None = None,
    batches: Tensor | None = None,
    sequential: bool = False,
    device: torch.device | None = None,
    track: Track[str] = iter,
    force: bool = False,
) -> Plan:
    """Compress the model of `opened` into the folder `out`, by a registered method or by a plan.

    `sequential` calibrates every block through the ones already compressed, as `walk.Blockwise` does. The plan
    that comes back has the errors that were made. Raises ValueError for what needs gradients of the whole model,
    and what `Journal`, `Source`, `decode` and the budget raise.
    """
    made = jobs.decode(method, args)
    refuse_gradients(made.measure)
    shards, world = Shards(loaded.source), World.join()
    facts = {
        "source": str(Path(loaded.source).resolve()), "weights": shards.digest(),
        "config": _sha(Path(loaded.source, "config.json").read_bytes()), "dtype": str(jobs.dtype_of(loaded.model)),
        "method": method, "args": dict(args), "plan": None if plan is None else _sha(_text(plan.to_dict())),
        "select": select if select is None or isinstance(select, str) else sorted(sites(loaded.model, select)),
        "calibration": None if batches is None else _sha(batches.cpu().contiguous().numpy().tobytes()),
        "sequential": sequential,
    }  # fmt: skip
    journal = Journal(out, facts, world, force=force)
    try:
        if journal.done:
            journal.clear()
            return Plan.from_dict(io.read_about(out)["plan"], str(out))
        source = Source(loaded.model, shards, device=device)
        stream = Stream(loaded, source, journal, made, batches, track if world.rank == 0 else iter)
        planned = plan or stream.planned(method, args, select)
        finished = stream.follow(planned, sequential=sequential)
        world.meet()
        if world.rank == 0:
            stream.close(finished)
        world.meet()
        return finished
    finally:
        journal.close()
        world.leave()


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """One job on one model without weights."""

    loaded: LoadedModel
    source: Source
    journal: Journal
    method: Compression
    batches: Tensor | None
    track: Track[str]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model, nearly always empty."""
        return self.loaded.model

    @property
    def world(self) -> World:
        """The processes that work on it."""
        return self.journal.world

    def planned(self, method: str, args: Mapping[str, Any], select: Select | None) -> Plan:
        """The plan that a study in memory makes, from spectra taken one weight at a time."""
        at = self.journal.piece(PLAN)
        if at.is_file():
            return Plan.from_json(at)
        found = sites(self.model, select)
        study = lean_study(self.model, found, self.method.measure)
        kinds, asked = wants(self.method, study, shapes(found))
        if "metric" in kinds and self.method.measure.needs == "nothing":
            kinds = {"weight"}
        if "metric" in kinds or asked:
            self.survey(found, asked, kinds)
        elif kinds:
            self.measure_weights(found)
        self.world.meet()
        told = self.scores(found, asked)
        known = {n: read_published(self.spectrum(i))[0] for i, n in enumerate(found)} if kinds else {}
        study = with_spectra(study, known, told)
        plan = study.plan(self.method.budget, method=method, args=args)
        self.world.meet()
        if self.world.rank == 0:
            publish_json(at, plan.to_dict())
        return plan

    def spectrum(self, i: int) -> Path:
        """Where the spectra of the i-th site lie."""
        return self.journal.piece(f"spectrum-{i:06}.safetensors")

    def score(self, i: int, asked: Importance) -> Path:
        """Where the importance of the i-th block's sites lies."""
        return self.journal.piece(f"score-{i:06}-{_sha(repr(asked).encode())[:12]}.json")

    def scores(
        self, found: Mapping[str, nn.Module], asked: Sequence[Importance]
    ) -> dict[Importance, dict[str, float]]:
        """Every importance that was measured."""
        blocks = stack_of(self.model, list(found)) if asked else []
        told = {}
        for importance in asked:
            files = [self.score(i, importance) for i in range(len(blocks))]
            told[importance] = {n: x for f in files if f.is_file() for n, x in json.loads(f.read_text()).items()}
        return told

    def measure_weights(self, found: Mapping[str, nn.Module]) -> None:
        """The weights' own spectra, each process its share."""
        todo = [(i, n) for i, n in enumerate(found) if self.world.mine(i) and not self.spectrum(i).is_file()]
        for i, name in zip([i for i, _ in todo], self.track([n for _, n in todo]), strict=True):
            with self.source.filled(self.source.names(place_of(name, found[name]))):
                publish_tensors(self.spectrum(i), {"weight": linalg.svdvals(checked(name, found[name]))})

    def survey(self, found: Mapping[str, nn.Module], asked: Sequence[Importance], kinds: set[str]) -> None:
        """Take data through the model as it is, and keep spectra under the measure and importances."""
        number = {name: i for i, name in enumerate(found)}
        blocks, measure = stack_of(self.model, list(found)), self.method.measure

        def visit(i: int, relay: Relay) -> None:
            here = {n: m for n, m in found.items() if block_of(n) == blocks[i]}
            mine = {n: m for n, m in here.items() if self.world.mine(number[n])}
            todo = {n: m for n, m in mine.items() if kinds and not self.spectrum(number[n]).is_file()}
            means = self.collected(blocks[i], relay.calls(i), relay, todo)
            for name, layer in todo.items():
                w = checked(name, layer)
                known = {"weight": linalg.svdvals(w)} if "weight" in kinds else {}
                if "metric" in kinds:
                    under = measure.metric(means.pop(name, None)).apply(linalg.wide(w))
                    known["metric"] = linalg.svdvals(under.to(linalg.wide(w).dtype))
                publish_tensors(self.spectrum(number[name]), known)
            for importance in asked if here and self.world.mine(i) else ():
                told = importance(
                    self.model, here, batches=relay.calls(i), loss=no_loss,
                    forward=lambda model, call: relay.run(model.get_submodule(blocks[i]), call),
                )  # fmt: skip
                publish_json(self.score(i, importance), told)

        self.walk("survey", blocks, list(found), visit, after=None)

    def follow(self, plan: Plan, *, sequential: bool) -> Plan:
        """Do what a plan says; the plan that comes back has the errors that were made."""
        plan.check(shapes(matrices(self.model)))
        changed = [name for name, row in plan.sites.items() if row.form != "keep"]
        if changed:
            sites(self.model, changed.__contains__)
        every = pieces(self.model, changed)
        if changed and self.method.measure.needs == "inputs":
            self.calibrate(plan, every, changed, sequential=sequential)
        left = [i for i in range(len(every)) if self.world.mine(i) and not self.shard(i, every).is_file()]
        for i, _ in zip(left, self.track([every[i].where for i in left]), strict=True):
            self.cut(plan, i, every[i], {}, mine=lambda j: True)
            self.assemble(i, every)
        self.world.meet()
        known = [json.loads(self.about(i).read_text()) for i in range(len(every))]
        rows = {name: row for about in known for name, row in about["rows"].items()}
        done = plan.to_dict()
        return Plan.from_dict({**done, "sites": {**done["sites"], **rows}})

    def calibrate(self, plan: Plan, every: Sequence[Piece], changed: Sequence[str], *, sequential: bool) -> None:
        """Cut block after block by what reaches it, through the blocks as they were or as they became."""
        blocks, place = stack_of(self.model, changed), {piece.where: i for i, piece in enumerate(every)}
        found = matrices(self.model)

        def visit(i: int, relay: Relay) -> None:
            at = place[blocks[i]]
            piece = every[at]
            if self.shard(at, every).is_file():
                return
            turn = {name: self.world.mine(j) for j, names in enumerate(piece.groups.values()) for name in names}
            todo = [(j, names) for j, names in enumerate(piece.groups.values()) if not self.part(at, j).is_file()]
            mine = {n: found[n] for _, names in todo for n in names if turn[n]}
            means = self.collected(blocks[i], relay.calls(i), relay, mine)
            self.cut(plan, at, piece, means, mine=self.world.mine)
            self.world.meet()
            if self.world.rank == 0:
                self.assemble(at, every)
            self.world.meet()

        def compressed_block(i: int, relay: Relay) -> None:
            at = place[blocks[i]]
            rebuilt = quantizer.rebuild(self.model, json.loads(self.about(at).read_text())["specs"], device="meta")
            new = read_published(self.shard(at, every))[0]
            names = [n for n in self.model.state_dict() if n.startswith(f"{blocks[i]}.")]
            with self.source.filled(names, lambda name, dtype: new[name]):
                relay.advance(i, self.model.get_submodule(blocks[i]))
            rebuilt.undo()

        self.walk("cut", blocks, changed, visit, after=compressed_block if sequential else None)

    def collected(
        self, block: str, calls: Sequence[Any], relay: Relay, found: Mapping[str, nn.Module]
    ) -> dict[str, Tensor]:
        """The mean statistics of sites in one block; none for a measure that needs nothing."""
        if not found or self.method.measure.needs == "nothing":
            return {}
        module = self.model.get_submodule(block)
        return collect(module, calls, self.method.measure, found, forward=relay.run, counts=self.counts)

    def walk(
        self,
        phase: str,
        blocks: Sequence[str],
        names: Sequence[str],
        visit: Callable[[int, Relay], None],
        *,
        after: Callable[[int, Relay], None] | None,
    ) -> None:
        """Visit each block with its weights and what enters it, from where an earlier process was stopped.

        `after` takes the hidden states on where the block as it was is not to do it.
        """

        def hidden(i: int) -> Path:
            return self.journal.piece(f"hidden-{phase}-{i:05}.safetensors")

        if self.journal.piece(f"{phase}.done").is_file():
            return
        data = Calibration(self.batches, jobs.forward).present(self.method.measure, names)
        start = max((i for i in range(len(blocks)) if hidden(i).is_file()), default=0)
        relay = record(self.source, blocks, data, jobs.forward)
        if start:
            kept = read_published(hidden(start))[0]
            relay.hidden = [kept[str(i)] for i in range(len(kept))]
        for i, block in zip(range(start, len(blocks)), self.track(blocks[start:]), strict=True):
            last = i + 1 == len(blocks)
            with torch.no_grad(), self.source.filled(self.source.names(block)):
                visit(i, relay)
                if after is None and not last:
                    relay.advance(i, self.model.get_submodule(block))
            if after is not None and not last:
                after(i, relay)
            self.world.meet()
            if self.world.rank == 0 and not last:
                publish_tensors(hidden(i + 1), {str(n): x for n, x in enumerate(relay.hidden)})
                hidden(i).unlink(missing_ok=True)
        self.world.meet()
        if self.world.rank == 0:
            publish_json(self.journal.piece(f"{phase}.done"), True)

    def shard(self, i: int, every: Sequence[Piece]) -> Path:
        """Where the i-th shard of the result lies."""
        return self.journal.model / f"model-{i + 1:05}-of-{len(every):05}.safetensors"

    def about(self, i: int) -> Path:
        """Where it says what stands in that shard; written before it."""
        return self.journal.piece(f"about-{i:05}.json")

    def part(self, i: int, j: int) -> Path:
        """Where the j-th compressed group of the i-th shard lies until that is written."""
        return self.journal.piece(f"part-{i:05}-{j:05}.safetensors")

    def cut(
        self, plan: Plan, i: int, piece: Piece, means: dict[str, Tensor], *, mine: Callable[[int], bool]
    ) -> None:
        """Decompose the sites of one shard, a portion at once, and write what takes their places."""
        todo = {p: j for j, p in enumerate(piece.groups) if mine(j) and not self.part(i, j).is_file()}
        found = matrices(self.model) if todo else {}
        size = {p: sum(site.matrix(found[n]).numel() for n in piece.groups[p]) for p in todo}
        for places in portions(size):
            names = [n for place in places for n in piece.groups[place]]
            held = [t for place in places for t in self.source.names(place)]

            def take(name: str, found: Mapping[str, nn.Module] = found) -> tuple[OpLayer, SitePlan]:
                metric = self.method.measure.metric(means.pop(name, None))
                return take_apart(name, found[name], plan.sites[name], metric, self.counts.get(name, 0))

            with torch.no_grad(), self.source.filled(held):
                made = dict(zip(names, spread(take, names), strict=True))
                for place in places:
                    here = {name: made[name] for name in piece.groups[place]}
                    publish_tensors(self.part(i, todo[place]), *self.swapped(here))

    def swapped(self, made: Mapping[str, tuple[OpLayer, SitePlan]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors that stand where sites stood, and what is to be known of them."""
        with edit(self.model, list(made), lambda name, _: made[name][0]) as done:
            inside = tuple(f"{place}." for place in done)
            tensors = {
                f"{place}.{key}": tensor
                for place in done
                for key, tensor in self.model.get_submodule(place).state_dict().items()
            }
            specs = {n: s for n, s in quantizer.describe(self.model).items() if f"{n}.".startswith(inside)}
        return tensors, {"rows": {name: asdict(row) for name, (_, row) in made.items()}, "specs": specs}

    def assemble(self, i: int, every: Sequence[Piece]) -> None:
        """Write a shard from its parts and from what stays as it was."""
        piece, parts = every[i], [self.part(i, j) for j in range(len(every[i].groups))]
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {"rows": {}, "specs": {}}
        for part in parts:
            new, told = read_published(part)
            tensors |= new
            about = {key: about[key] | told[key] for key in about}
        gone = tuple(f"{place}." for place in piece.groups)
        publish_json(self.about(i), about)
        stay = {new: name for new, name in piece.names.items() if not (gone and new.startswith(gone))}
        publish_copies(self.shard(i, every), self.source, stay, tensors)
        for part in parts:
            part.unlink()

    def close(self, plan: Plan) -> None:
        """Write what makes the shards a model folder, and give it its name."""
        model, folder = self.model, self.journal.model
        specs: dict[str, Any] = {}
        for file in sorted(self.journal.folder.glob("about-*.json")):
            specs |= json.loads(file.read_text())["specs"]
        quantizer.rebuild(model, specs, device="meta")
        host.save_folder_extras(model, self.loaded.tokenizer, folder)
        publish_index(folder, sorted(folder.glob("model-*.safetensors")))
        told = {"kind": "model", "source": self.loaded.source, "sites": list(quantizer.describe(model))}
        plain = {"method": plan.method, "plan": plan.to_dict(), "job": self.journal.digest}
        io.write_about(folder, {**told, **plain})
        self.journal.finish()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _text(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
