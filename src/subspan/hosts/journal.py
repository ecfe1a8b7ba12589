"""The folder in which a long job keeps its finished pieces, so that it goes on where it was killed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from subspan import io
from subspan.io import to_disk

if sys.platform != "win32":
    import fcntl

JOB, MODEL, PLAN = "job.json", "model", "plan.json"


@dataclass(frozen=True, slots=True)
class World:
    """The processes that share a job: alone, or those that torchrun started, which see the same disk."""

    rank: int = 0
    size: int = 1
    joined: bool = False

    @staticmethod
    def join() -> World:
        """The world that the environment tells of; processes meet through gloo, which carries no weights."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size < 2:
            return World()
        joined = not dist.is_initialized()
        if joined:
            # One process may wait for as long as another decomposes a large matrix.
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        return World(dist.get_rank(), size, joined)

    def leave(self) -> None:
        """End what `join` began."""
        if self.joined:
            dist.destroy_process_group()

    def meet(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def tell(self, value: str) -> str:
        """What the first process says, to all."""
        said = [value]
        if self.size > 1:
            dist.broadcast_object_list(said, 0)
        return said[0]

    def mine(self, turn: int) -> bool:
        """Whether the work of this number is mine."""
        return turn % self.size == self.rank


class Journal:
    """Work in progress for the folder `out`, in `OUT.partial` beside it.

    `facts` say what the job is: a folder of a job with other facts is not continued. Raises ValueError for such
    a folder unless `force`, which removes it; RuntimeError while another process works there; FileExistsError
    for a folder that is none of ours, and for an `out` that is there unless `force`.
    """

    def __init__(self, out: str | Path, facts: Mapping[str, Any], world: World, *, force: bool = False) -> None:
        self.out = Path(out).resolve()
        self.folder = self.out.with_name(f"{self.out.name}.partial")
        self.model = self.folder / MODEL
        self.facts = {"format": io.FORMAT, "library": io.subspan_version(), **facts}
        self.world = world
        self._held: IO[str] | None = None
        problem: Exception | None = None
        if world.rank == 0:
            try:
                self._open(force=force)
            except (OSError, ValueError, RuntimeError) as found:
                problem = found
        told = world.tell("" if problem is None else str(problem))
        if problem is not None:
            raise problem
        if told:
            raise RuntimeError(told)
        self.done = world.tell("done" if self.complete and not force else "") == "done"

    @property
    def digest(self) -> str:
        """sha256 of the facts."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def complete(self) -> bool:
        """Whether `out` is what this very job makes."""
        if not (self.out / io.ABOUT).is_file():
            return False
        return bool(io.read_about(self.out).get("job") == self.digest)

    def piece(self, name: str) -> Path:
        """Where a piece lies or will lie."""
        return self.folder / name

    def _open(self, *, force: bool) -> None:
        if self.complete and not force:
            return
        if self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir()) and not force):
            raise FileExistsError(
                f"{self.out} exists and is not empty; choose another output or pass --force to replace it"
            )
        if self.folder.exists():
            self._lock()
            if self._differs(force=force):
                self.close()
                shutil.rmtree(self.folder)
        if not self.folder.exists():
            self._begin()
            self._lock()
        self.model.mkdir(exist_ok=True)
        for stale in [*self.folder.glob(".*"), *self.model.glob(".*")]:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()

    def _begin(self) -> None:
        fresh = self.folder.with_name(f".{self.folder.name}-{os.getpid()}")
        (fresh / MODEL).mkdir(parents=True, exist_ok=True)
        (fresh / JOB).write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
        to_disk(fresh / JOB)
        os.replace(fresh, self.folder)
        to_disk(self.folder.parent)

    def _lock(self) -> None:
        if not (self.folder / JOB).is_file():
            raise FileExistsError(f"{self.folder} is in the way and no job of subspan; move it, or remove it")
        self._held = (self.folder / JOB).open(encoding="utf-8")
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RuntimeError(f"another process works in {self.folder}; wait for it, or end it") from None

    def _found(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / JOB).read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            return {}

    def _plain(self) -> dict[str, Any]:
        return dict(json.loads(json.dumps(self.facts)))

    def _differs(self, *, force: bool) -> bool:
        there, now = self._found(), self._plain()
        keys = [key for key in {**there, **now} if there.get(key) != now.get(key)]
        if keys and not force:
            told = "; ".join(f"{key}: {_short(there.get(key))} there, {_short(now.get(key))} now" for key in keys)
            self.close()
            raise ValueError(
                f"{self.folder} holds an unfinished job with other arguments ({told}); give those again to go on "
                "with it, or pass --force to begin anew"
            )
        return bool(keys)

    def finish(self) -> None:
        """Give the finished model its name, in place of what was there, and remove the pieces."""
        for file in self.model.iterdir():
            to_disk(file)
        to_disk(self.model)
        old = self.folder / "old"
        if self.out.exists():
            if old.exists():
                shutil.rmtree(old)
            os.replace(self.out, old)
        os.replace(self.model, self.out)
        to_disk(self.out.parent)
        self.clear()

    def clear(self) -> None:
        """Remove the pieces of this job, if there are any."""
        self.close()
        if self.world.rank == 0 and (self.folder / JOB).is_file() and self._found() == self._plain():
            shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let others work here; a job that was refused before anything was finished leaves nothing behind."""
        begun = self._held is not None and self.folder.is_dir()
        if (
            begun
            and {p.name for p in self.folder.iterdir()} <= {JOB, MODEL, PLAN}
            and not any(self.model.iterdir())
        ):
            shutil.rmtree(self.folder)
        if self._held is not None:
            self._held.close()
            self._held = None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
