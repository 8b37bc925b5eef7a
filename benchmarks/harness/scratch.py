"""Files that several benchmarks, or several passes over them, share: checkpoints, results in float64."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

VARIABLE = "ISOMERGE_BENCH_SCRATCH"
_ours: list[tempfile.TemporaryDirectory[str]] = []


@cache
def scratch() -> Path:
    """The folder named by ``ISOMERGE_BENCH_SCRATCH``, or one that goes with this process."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    _ours.append(tempfile.TemporaryDirectory(prefix="isomerge-bench-"))
    return Path(_ours[0].name)


def kept(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that is made once for all passes."""
    path = scratch() / (name.replace("/", "-").replace(" ", "_") + ".npy")
    if not path.exists():
        unfinished = path.with_suffix(".new.npy")
        np.save(unfinished, make())
        unfinished.rename(path)
    return np.load(path)
