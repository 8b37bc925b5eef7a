"""Describe what is measured: rows of contenders, each at one problem."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from isomerge_fast.bench.problems import relative_error

OURS = "ours"
# Smallest first: ``tiny`` is for tests of the benchmarks themselves, ``full`` adds to ``short``.
LEVELS = ("tiny", "short", "full")
SUITES = "kernels,polar,subspace,methods,merge,io"
# Contenders that come from a package of their own, an extra of that name: its module.
PEERS = {"fusion-bench": "fusion_bench", "mergekit": "mergekit"}


@dataclass
class Problem:
    """Hold inputs and contenders, ready to be timed.

    Attributes:
        calls: what each contender does.
        error: of a result, relative to float64; None, or gives None, where there is nothing to be off by.
        bars: the largest error allowed to a contender, checked before it is timed.
        moved_bytes: what has to be read and written at least.
        is_counted: whether the operations that this process asks torch for tell how much is computed.
        before: done before every timed call, untimed.
        peak: takes the peak memory from a result, where that was measured in another process.
        absent: contenders that cannot take part here, and why.
        close: removes what was made on disk.
    """

    calls: Mapping[str, Callable[[], Any]]
    error: Callable[[Any], float | None] | None = None
    bars: Mapping[str, float] = field(default_factory=dict)
    moved_bytes: float = 0.0
    is_counted: bool = True
    before: Callable[[], None] = lambda: None
    peak: Callable[[Any], int] | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Row:
    """Describe one line of the tables.

    Attributes:
        contenders: by name; where ``OURS`` is among them, the others are what it is compared to.
        make: its problem, on a device.
        level: see ``LEVELS``.
        slow: contenders that take seconds: called once, and that call is timed.
        once: measured in the first of several passes only.
        gpu_only: too large for a CPU.
        curve: (name, variable, value) where the row is a point of a growth curve.
    """

    name: str
    contenders: tuple[str, ...]
    make: Callable[[torch.device], Problem]
    level: str = "short"
    slow: frozenset[str] = frozenset()
    once: bool = False
    gpu_only: bool = False
    curve: tuple[str, str, float] | None = None


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
