"""Files that several benchmarks, or several passes over them, share: checkpoints, results in float64."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

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


def remembered(name: str, make: Callable[[], Any]) -> Any:
    """Something that JSON can hold, and that is the same in all passes."""
    path = scratch() / (_file_name(name) + ".json")
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def kept(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that is made once for all passes."""
    path = scratch() / (_file_name(name) + ".npy")
    if not path.exists():
        unfinished = path.with_suffix(".new.npy")
        np.save(unfinished, make())
        unfinished.rename(path)
    return np.load(path)


def _file_name(name: str) -> str:
    return name.replace("/", "-").replace(" ", "_")
