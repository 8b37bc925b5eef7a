"""Describe what is measured: rows of contenders, each at one problem, and what their passes share on disk."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from isomerge_fast.bench.problems import relative_error

Value = TypeVar("Value")
OURS = "ours"
# Smallest first: ``tiny`` is for tests of the benchmarks themselves, ``full`` adds to ``short``.
LEVELS = ("tiny", "short", "full")
SUITES = "kernels,polar,subspace,methods,merge,io"
# Contenders that come from a package of their own, an extra of that name: its module.
PEERS = {"fusion-bench": "fusion_bench", "mergekit": "mergekit"}
SCRATCH_VARIABLE = "ISOMERGE_BENCH_SCRATCH"


@dataclass
class Problem:
    """Hold inputs and contenders, ready to be timed."""

    calls: Mapping[str, Callable[[], Any]]  # what each contender does
    # Takes a result, and compares it with float64; it is or gives None where there is nothing to be off by.
    error: Callable[[Any], float | None] | None = None
    bars: Mapping[str, float] = field(default_factory=dict)  # the largest errors allowed, checked before the timing
    moved_bytes: float = 0.0  # what has to be read and written at least
    is_counted: bool = True  # whether the operations that this process asks torch for tell how much is computed
    before: Callable[[], None] = lambda: None  # done before every timed call, untimed
    peak: Callable[[Any], int] | None = None  # takes the peak memory from a result, measured in another process
    absent: Mapping[str, str] = field(default_factory=dict)  # contenders that cannot take part here, and why
    close: Callable[[], None] = lambda: None  # removes what was made on disk


@dataclass(frozen=True)
class Row:
    """Describe one line of the tables."""

    name: str
    contenders: tuple[str, ...]  # by name; where ``OURS`` is among them, the others are what it is compared to
    make: Callable[[torch.device], Problem]
    level: str = "short"  # see ``LEVELS``
    slow: frozenset[str] = frozenset()  # contenders that take seconds: called once, and that call is timed
    once: bool = False  # measured in the first of several passes only
    gpu_only: bool = False  # too large for a CPU
    curve: tuple[str, str, float] | None = None  # (name, variable, value) of a point of a growth curve


def is_wanted(row: Row, level: str, *, later_pass: bool, on_gpu: bool) -> bool:
    """Return whether a row belongs to a level (``full`` has the ``short`` ones too), a pass and a device."""
    if (row.once and later_pass) or (row.gpu_only and not on_gpu):
        return False
    return row.level == level or (level == "full" and row.level == "short")


@cache
def absence(contender: str) -> str | None:
    """Return why a contender cannot take part, or None."""
    extra = contender.removesuffix("-fp32")
    module = PEERS.get(extra, "torch")
    # Of what is imported already there may be no specification: FusionBench takes its own away.
    if module not in sys.modules and find_spec(module) is None:
        return f"{contender} is not installed: pip install 'isomerge-fast[{extra}]'"
    return None


def error_against(exact: Any, result: Any) -> float:
    """Return the relative error of a contender's tensor, array, or list of tensors."""
    value = torch.stack(result) if isinstance(result, list) else torch.as_tensor(result)
    return relative_error(value.cpu(), torch.as_tensor(exact))


def scratch() -> Path:
    """Return the folder of all passes of ``benchmarks.run``, or of one ``pytest benchmarks``."""
    return Path(os.environ[SCRATCH_VARIABLE])


def kept(name: str, make: Callable[[], Value]) -> Value:
    """Return a value that is made once, and kept on disk for all passes of ``benchmarks.run``."""
    path = scratch() / f"{name.replace('/', '-').replace(' ', '_')}.pickle"
    if not path.exists():
        path.write_bytes(pickle.dumps(make()))
    return pickle.loads(path.read_bytes())
