"""Report a merge: what was done with every tensor, seconds, bytes, and where the output was written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

from ..parsing.json_types import check

PHASES = ("prepare", "read", "compute", "write")


class TensorReport(TypedDict):
    """Name the keys of a tensor's report: those that all have, and the optional ones that this package reads."""

    name: str
    action: str
    algorithm: str
    read_bytes: int
    write_bytes: int
    seconds: float
    remarks: NotRequired[str]
    certified: NotRequired[bool]
    min_dim: NotRequired[int]
    truncation: NotRequired[float]


class WorkerReport(TypedDict):
    host: str
    pid: int
    units: int
    tensors: int
    read_bytes: int
    write_bytes: int
    seconds: float


class LeftBehindReport(TypedDict):
    name: str
    why: str
    files: int
    bytes: int


class LeftOutReport(TypedDict):
    expert: str
    tensors: dict[str, list[int]]


class IoReport(TypedDict):
    read: str
    write: str


@dataclass(frozen=True)
class Report:
    """Hold the result of a merge, which is also written as ``report.json``.

    Attributes:
        outputs: the folders written, one a scaling.
        tensors: one dict a tensor: name, action, algorithm, its evidence (see ``MergeStats``), read_bytes, write_bytes,
            seconds, and ``remarks`` where something out of the ordinary happened.
        seconds: of the thread that computes, by what it did: ``prepare`` (all that is nothing of the following: made
            files and threads, page-locked memory), ``read`` (waited for bytes), ``compute``, ``write`` (waited until
            there was room for more, and at the end until all was on disk); and ``total``, of one process their sum.
        io: how files were read and written (``direct`` or ``page-cache``), and the seconds that the threads which do
            it were busy, together; on a GPU ``peak_vram_bytes``, the most that was allocated.
        left_out: one dict an expert that has tensors which the output has not: its path, and their shapes by name.
        workers: one dict a process: host, pid, the units it finished, tensors, read_bytes, write_bytes, and the seconds
            that these took. With several processes the phases of ``seconds`` are summed over them.
        left_behind: one dict a file, or folder, of the base that is not in the output: name, why, files, bytes.
    """

    version: str
    method: str
    scaling: list[float]
    outputs: list[str]
    device: str
    tensors: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    io: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    workers: list[dict[str, Any]] = field(default_factory=list)
    left_behind: list[dict[str, Any]] = field(default_factory=list)

    @property
    def balance(self) -> float:
        """Return how evenly the workers were busy: their mean seconds over the most; 1 is even."""
        most = max((worker["seconds"] for worker in self.workers), default=0.0)
        return sum(worker["seconds"] for worker in self.workers) / (len(self.workers) * most) if most else 1.0

    @property
    def read_bytes(self) -> int:
        return sum(tensor["read_bytes"] for tensor in self.tensors)

    @property
    def write_bytes(self) -> int:
        return sum(tensor["write_bytes"] for tensor in self.tensors)

    def counts(self) -> dict[str, int]:
        """Return the number of tensors by action."""
        return dict(Counter(tensor["action"] for tensor in self.tensors))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON holds it; lists and dicts are the report's own."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**own, "read_bytes": self.read_bytes, "write_bytes": self.write_bytes}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Report:
        """Return the report that ``to_dict`` gave as ``raw``; a ValueError names what is not as it is in a report."""
        check(raw, dict[str, Any], "report")
        known = {key: value for key, value in raw.items() if key in cls.__dataclass_fields__}
        check(known, cls, "report")
        check(known.get("tensors", []), list[TensorReport], "tensors")
        check(known.get("left_out", []), list[LeftOutReport], "left_out")
        check(known.get("workers", []), list[WorkerReport], "workers")
        check(known.get("left_behind", []), list[LeftBehindReport], "left_behind")
        check(known.get("io") or {"read": "", "write": ""}, IoReport, "io")
        if unknown := known.get("seconds", {}).keys() - {*PHASES, "total"}:
            raise ValueError(f"seconds has an unknown key {min(unknown)!r}")
        return cls(**known)


@dataclass
class Progress:
    """Tell how far a merge is: one object, updated in place and handed to the observer at every change of phase."""

    total_tensors: int
    total_bytes: int
    done_tensors: int = 0
    done_bytes: int = 0
    tensor: str = ""
    phase: str = ""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


Observer = Callable[[Progress], None]


class PhaseTimer:
    """Measure seconds by phase. Phases nest, and time is counted for the innermost."""

    def __init__(self, progress: Progress, observer: Observer | None) -> None:
        self._progress, self._observer = progress, observer
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self._progress.phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str) -> None:
        now = time.perf_counter()
        if self._progress.phase:
            self._progress.seconds[self._progress.phase] += now - self._since
        self._since, self._progress.phase = now, name
        if self._observer is not None:
            self._observer(self._progress)
