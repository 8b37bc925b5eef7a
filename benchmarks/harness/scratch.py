"""Share files between benchmarks, and between passes over them: checkpoints, results in float64."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VARIABLE = "ISOMERGE_BENCH_SCRATCH"


def scratch() -> Path:
    """Return the folder of all passes of ``benchmarks.run``, or of one ``pytest benchmarks``."""
    return Path(os.environ[VARIABLE])


def remembered(name: str, make: Callable[[], Any]) -> Any:
    """Return a value that JSON can hold, made once for all passes."""
    path = _file(name, ".json")
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def kept(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return an array that is made once, and kept on disk for all passes of ``benchmarks.run``."""
    path = _file(name, ".npy")
    if not path.exists():
        np.save(path, make())
    return np.load(path)


def _file(name: str, suffix: str) -> Path:
    return scratch() / (name.replace("/", "-").replace(" ", "_") + suffix)
