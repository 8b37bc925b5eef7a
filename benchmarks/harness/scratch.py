"""Share files between benchmarks, and between passes over them: checkpoints, results in float64."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")
VARIABLE = "ISOMERGE_BENCH_SCRATCH"


def scratch() -> Path:
    """Return the folder of all passes of ``benchmarks.run``, or of one ``pytest benchmarks``."""
    return Path(os.environ[VARIABLE])


def kept(name: str, make: Callable[[], Value]) -> Value:
    """Return a value that is made once, and kept on disk for all passes of ``benchmarks.run``."""
    path = scratch() / f"{name.replace('/', '-').replace(' ', '_')}.pickle"
    if not path.exists():
        path.write_bytes(pickle.dumps(make()))
    return pickle.loads(path.read_bytes())
