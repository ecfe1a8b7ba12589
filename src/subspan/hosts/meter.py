"""How much memory a stretch of work takes."""

from __future__ import annotations

import ctypes
import gc
import threading
import time

import psutil


class Meter:
    """Samples this process's resident memory while the block runs; `peak` is the largest seen, in bytes.

    >>> with Meter() as meter:
    ...     pass
    >>> meter.peak > 0 and meter.seconds >= 0
    True
    """

    def __init__(self, every: float = 0.02) -> None:
        self.every = every
        self.peak = 0
        self.seconds = 0.0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(self.every):
            self._sample()

    def _sample(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)

    def __enter__(self) -> Meter:
        self._start = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        self.seconds = time.perf_counter() - self._start


def release() -> None:
    """Hand freed memory back to the system where the C library can, so that the next `Meter` starts low."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
