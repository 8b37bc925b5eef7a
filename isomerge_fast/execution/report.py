"""Report a merge: what was done with every tensor, seconds, bytes, and where the output was written."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, get_ident
from typing import Any, NotRequired, TypedDict

from ..parsing.json_types import check
from .threads import check_wanted

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
        seconds: by what was done: ``prepare`` (all that is nothing of the following: made files and threads,
            page-locked memory), ``read`` (waited for bytes), ``compute``, ``write`` (waited until there was room for
            more, and at the end until all was on disk); and ``total``, of one process their sum: where cores do
            different things at a time, each counts for its share.
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


@dataclass
class _Seat:
    """Hold what a thread is at: its phase, and how many cores it computes the tensor with."""

    tensor: str
    cores: int
    phase: str = ""


class PhaseTimer:
    """Measure seconds by phase, of ``cores`` cores together: each counts for its share, so that the sum is the time.

    Phases nest, and time is counted for the innermost. Threads in a ``job`` have phases of their own, for the cores
    that they compute with; what is left counts for that of the thread which made the timer. That thread alone calls the
    observer: of a change in another one when its own phase changes, or in ``tell``.
    """

    def __init__(self, progress: Progress, observer: Observer | None, cores: int = 1) -> None:
        self._progress, self._observer, self._cores = progress, observer, cores
        self._own = _Seat("", cores)
        self._jobs: dict[int, _Seat] = {}  # by thread
        self._changes: deque[tuple[str, str]] = deque()  # in other threads, that the observer is to be told of
        self._since = time.perf_counter()
        self._lock = Lock()  # guards the seats, and the seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        check_wanted()
        seat = self._jobs.get(get_ident(), self._own)
        outer = seat.phase
        self._switch(seat, name)
        try:
            yield
        finally:
            self._switch(seat, outer)

    def begin(self, tensor: str) -> None:
        """Tell which tensor the thread that made the timer is at."""
        self._own.tensor = self._progress.tensor = tensor

    @contextmanager
    def job(self, tensor: str, cores: int) -> Iterator[None]:
        """Count the calling thread for so many cores that merge a tensor."""
        with self._lock:
            self._count()
            self._jobs[get_ident()] = _Seat(tensor, cores, "compute")
        try:
            yield
        finally:
            with self._lock:
                self._count()
                del self._jobs[get_ident()]

    def tell(self) -> None:
        """Call the observer for what has changed in other threads."""
        while self._changes and self._observer is not None:
            self._progress.tensor, self._progress.phase = self._changes.popleft()
            self._observer(self._progress)

    def _switch(self, seat: _Seat, name: str) -> None:
        with self._lock:
            self._count()
            seat.phase = name
        if self._observer is None:
            return
        if seat is not self._own:
            self._changes.append((seat.tensor, name))
            return
        self.tell()
        self._progress.tensor, self._progress.phase = self._own.tensor, name
        self._observer(self._progress)

    def _count(self) -> None:
        """Count the time since the last change."""
        now, seconds = time.perf_counter(), self._progress.seconds
        share, left = (now - self._since) / self._cores, self._cores
        for seat in self._jobs.values():
            seconds[seat.phase] += share * seat.cores
            left -= seat.cores
        if self._own.phase:
            seconds[self._own.phase] += share * left
        self._since = now
