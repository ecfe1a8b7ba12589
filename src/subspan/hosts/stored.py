"""An adapter in subspan's own form, its factors held narrower on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from subspan import io
from subspan.hosts.peft_read import AdapterFolder
from subspan.packed import Packed


def store(saved: AdapterFolder, out: str | Path, kind: str, *, force: bool = False) -> Packed:
    """Write the folder of an adapter again, its tensors in bfloat16, float16 or int8; see `io.staged`.

    What lies beside the tensors is copied. Raises ValueError for a folder of PEFT, which has no codes, and as
    `packed.pack` does.
    """
    if saved.form != "subspan":
        raise ValueError(f"{saved.path} is a folder of PEFT; convert it --to subspan, and store that")
    about = io.read_about(saved.path)
    with io.staged(out, force=force) as folder:
        packed = io.write_packed(folder / io.WEIGHTS, saved.tensors, kind)
        for file in saved.path.iterdir():
            if file.is_file() and file.name not in (io.WEIGHTS, io.ABOUT):
                shutil.copyfile(file, folder / file.name)
        io.write_about(folder, {key: value for key, value in about.items() if key not in ("format", "library")})
    return packed
