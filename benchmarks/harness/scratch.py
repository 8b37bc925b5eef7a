"""Share files between benchmarks, and between passes over them: checkpoints, results in float64."""

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
    """Return the folder named by ``ISOMERGE_BENCH_SCRATCH``, or one that goes with this process."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    _ours.append(tempfile.TemporaryDirectory(prefix="isomerge-bench-"))
    return Path(_ours[0].name)


def remembered(name: str, make: Callable[[], Any]) -> Any:
    """Return a value that JSON can hold, made once for all passes."""
    path = _file(name, ".json")
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def kept(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return an array that is made once for all passes."""
    path = _file(name, ".npy")
    if not path.exists():
        np.save(path, make())
    return np.load(path)


def _file(name: str, suffix: str) -> Path:
    return scratch() / (name.replace("/", "-").replace(" ", "_") + suffix)
