"""The story of the library on a real model, in three acts: train, see and compress, heal."""

from subspan.demo.story import run as run
