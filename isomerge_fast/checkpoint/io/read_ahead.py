"""Read bundles of pieces with a few threads before they are asked for, in a bounded number of bytes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition

import torch
from torch import Tensor

from ..layout import StoredTensor
from .buffer_pool import BufferPool
from .checksum import Checksum
from .direct_io import PAGE, READ_BYTES
from .reader import Piece, Reader

# More threads than cores: they wait for the disk, not for each other.
THREADS = 4
# A GPU takes more than four threads copy from the page cache, 14.5 GB/s; eight copy 25 (16 cores beside an H200).
GPU_THREADS = 8


@dataclass(frozen=True)
class Bundle:
    """Name the pieces that are needed together: some rows of the base and of every expert."""

    pieces: tuple[Piece, ...]

    def places(self) -> list[int]:
        """Return where each piece starts in a buffer on whole pages, and where the last one ends.

        A piece has the same place within its page as in its file, so that it is read without a copy, unless its dtype
        cannot stand there.
        """
        starts, end = [], 0
        for piece in self.pieces:
            within = 0 if piece.start % piece.stored.dtype.itemsize else piece.start % PAGE
            starts.append(end + (within - end) % PAGE)
            end = starts[-1] + piece.bytes
        return [*starts, end]

    @property
    def bytes(self) -> int:
        return self.places()[-1]

    def parts(self, limit_bytes: int | None) -> Iterator[Bundle]:
        """Yield the same elements in the same order, in bundles of at most so many bytes, and of one element at least.

        The elements of a piece that is cut have no shape but their number.
        """
        if limit_bytes is None or self.bytes + PAGE <= limit_bytes:
            yield self
            return
        part: list[Piece] = []
        room = 0
        for piece in self.pieces:
            itemsize, first = piece.stored.dtype.itemsize, piece.first
            end = first + piece.bytes // itemsize
            while first < end:
                room -= 2 * PAGE  # for its place within a page, and the last one's end
                if part and room < itemsize:
                    yield Bundle(tuple(part))
                    part = []
                if not part:
                    room = limit_bytes - 2 * PAGE
                count = min(end - first, max(1, room // itemsize))
                part.append(Piece(piece.stored, first, (count,)))
                room -= count * itemsize
                first += count
        yield Bundle(tuple(part))


class InputChecksums:
    """Compute the checksums of the wanted tensors, ``tensors``, while their parts come in order."""

    def __init__(self, tensors: Iterable[StoredTensor]) -> None:
        self._wanted = set(tensors)
        self._running: dict[StoredTensor, Checksum] = {}

    def add(self, piece: Piece, data: Tensor) -> None:
        """Add a part's bytes. A part that was added before (a tensor may stand for several experts) changes nothing."""
        if not self._wanted or piece.stored not in self._wanted:
            return
        running = self._running.setdefault(piece.stored, Checksum())
        if running.bytes == piece.start - piece.stored.start:
            running.update(data.numpy().data)

    def take(self, stored: StoredTensor) -> str:
        """Return the checksum of a tensor all of which was added, and forget it."""
        self._wanted.remove(stored)
        running = self._running.pop(stored, None) or Checksum()  # of an empty one no part came
        assert running.bytes == stored.bytes, stored.name
        return running.text


@dataclass
class _Reading:
    whole: Bundle
    bundle: Bundle  # that, or a part of it
    buffer: Tensor
    in_pool: bool
    parts: list[Future[float]]


@dataclass(frozen=True)
class Lease:
    """Hold the pieces of a bundle, or of a part of one, until they are given back."""

    tensors: list[Tensor]
    give_back: Callable[[], None]


class ReadAhead:
    """Hand out ``bundles`` in their order while the next ones are being read, as a context manager.

    The bundles that are out and those ahead have ``budget_bytes`` together. A larger bundle has a buffer of its own,
    and none is held beside it. Bundles are cut into parts of at most ``part_bytes``, each handed out by itself, and
    what is handed out is added to ``checksums``. ``pinned`` buffers are page-locked, for asynchronous copies to a GPU.
    """

    def __init__(
        self,
        reader: Reader,
        threads: ThreadPoolExecutor,
        bundles: Iterable[Bundle],
        *,
        budget_bytes: int,
        part_bytes: int | None = None,
        pinned: bool = False,
        checksums: InputChecksums | None = None,
    ) -> None:
        self._reader, self._threads, self._pinned = reader, threads, pinned
        self._checksums = checksums
        self._pool = BufferPool(budget_bytes, pinned=pinned)
        self.budget_bytes = budget_bytes
        self.part_bytes = part_bytes
        self._bundles = ((bundle, part) for bundle in bundles for part in bundle.parts(part_bytes))
        self._next = next(self._bundles, None)
        self._ahead: deque[_Reading] = deque()
        self._out = 0  # how many are handed out and not given back
        self._changed = Condition()  # guards all of these: a bundle is given back by the thread that used it
        self._taken: Lease | None = None
        self.busy_seconds = 0.0  # of all threads together

    def __enter__(self) -> ReadAhead:
        with self._changed:
            self._top_up()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._next = None  # what is given back from now on makes room for nothing
        parts = [part for reading in self._ahead for part in reading.parts]
        wait([part for part in parts if not part.cancel()])  # the buffer must outlive the read
        self._ahead.clear()
        self._taken = None

    @property
    def upcoming(self) -> Bundle | None:
        """Return the bundle that is taken next, whole or in part."""
        if self._ahead:
            return self._ahead[0].whole
        return None if self._next is None else self._next[0]

    def take(self) -> list[Tensor]:
        """Return the pieces of the next bundle, or of its next part, valid until the next call (see ``lease``)."""
        if self._taken is not None:
            self._taken.give_back()
        self._taken = None
        self._taken = self.lease()
        return self._taken.tensors

    def lease(self) -> Lease:
        """Return the pieces of the next bundle, or of its next part, valid until they are given back in any thread.

        One thread at a time may ask. It waits for what others have to give back first, and raises what ``Reader.read``
        does.
        """
        with self._changed:
            self._top_up()
            while not self._ahead:
                self._changed.wait()
                self._top_up()
            reading = self._ahead.popleft()
            self._out += 1
        for part in reading.parts:
            self.busy_seconds += part.result()
        with self._changed:
            self._top_up()  # read on while this bundle is used
        placed = list(_placed(reading.bundle, reading.buffer))
        if self._checksums is not None:
            for piece, data in placed:
                self._checksums.add(piece, data)

        def give_back() -> None:
            with self._changed:
                self._out -= 1
                if reading.in_pool:
                    self._pool.give_back(reading.buffer)
                # Where there is no memory for it, whoever asks for it next is told.
                with suppress(MemoryError, OSError, RuntimeError):
                    self._top_up()
                self._changed.notify_all()

        return Lease([piece.view(data) for piece, data in placed], give_back)

    def _top_up(self) -> None:
        while self._next is not None:
            whole, bundle = self._next
            size = bundle.bytes
            buffer = self._pool.take(size)
            in_pool = buffer is not None
            if buffer is None:
                if size <= self._pool.size or self._ahead or self._out:
                    return
                self._pool.release()
                buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._pinned)
            parts = [self._threads.submit(self._load, items) for items in _jobs(bundle, buffer)]
            self._ahead.append(_Reading(whole, bundle, buffer, in_pool, parts))
            self._next = next(self._bundles, None)

    def _load(self, items: list[tuple[Piece, int, Tensor]]) -> float:
        started = time.perf_counter()
        for piece, offset, target in items:
            self._reader.read_into(piece, offset, target.numpy().data)
        return time.perf_counter() - started


def _placed(bundle: Bundle, buffer: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    for piece, start in zip(bundle.pieces, bundle.places(), strict=False):
        yield piece, buffer[start : start + piece.bytes]


def _jobs(bundle: Bundle, buffer: Tensor) -> Iterator[list[tuple[Piece, int, Tensor]]]:
    """Yield the bundle's bytes in lists for one thread each: large pieces in parts, small ones together."""
    job: list[tuple[Piece, int, Tensor]] = []
    size = 0
    for piece, data in _placed(bundle, buffer):
        start = 0
        while start < piece.bytes:
            # Cut at multiples in the file, so that only a piece's own ends share a page with others.
            stop = min(start + READ_BYTES - (piece.start + start) % READ_BYTES, piece.bytes)
            job.append((piece, start, data[start:stop]))
            size += stop - start
            start = stop
            if size >= READ_BYTES:
                yield job
                job, size = [], 0
    if job:
        yield job
