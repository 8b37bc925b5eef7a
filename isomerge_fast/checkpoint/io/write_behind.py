"""Do writes in a thread of their own, in order, in a bounded number of bytes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from torch import Tensor

from .ring_buffer import RingBuffer

# A room has at most one part in so many of the memory, so that one is filled while others are written.
ROOM_SHARE = 3


class WriteBehind:
    """Do writes behind their caller, as a context manager; raise the first failure at the next call.

    All that was put is done when ``drain`` returns.

    Args:
        budget_bytes: of what waits to be written; one write is taken whatever its size.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._ring = RingBuffer(budget_bytes)
        self._waiting: deque[tuple[int, bool, Callable[[], None]]] = deque()
        self._bytes = 0  # of what waits and what is being written
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._working = self._closed = False
        self._thread = threading.Thread(target=self._work, name="isomerge-write", daemon=True)
        self.busy_seconds = 0.0

    def __enter__(self) -> WriteBehind:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """End the thread. After an error what still waits is not written."""
        with self._changed:
            if kind is not None:
                self._waiting.clear()
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def room_bytes(self) -> int:
        """Return the most bytes that ``room`` gives at once."""
        return self._budget // ROOM_SHARE

    def room(self, size: int) -> Tensor | None:
        """Return ``size`` bytes for what the next ``put`` writes, or None where that is more than ``room_bytes``.

        It waits while others are being written.
        """
        if size > self.room_bytes:
            return None
        with self._changed:
            self._raise()
            while (room := self._ring.take(size)) is None:
                self._changed.wait()
                self._raise()
            return room

    def put(self, action: Callable[[], None], *, size: int = 0, in_room: bool = False) -> None:
        """Have ``action`` done.

        Args:
            size: bytes of its own that it holds until then; waits while the budget is used up.
            in_room: whether what it writes lies in the ``room`` taken last.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._bytes or self._bytes + size <= self._budget)
            self._raise()
            self._waiting.append((size, in_room, action))
            self._bytes += size
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not (self._waiting or self._bytes or self._working))
            self._raise()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                size, in_room, action = self._waiting.popleft()
                self._working = True
            started = time.perf_counter()
            failure: BaseException | None = None
            try:
                action()
            except BaseException as error:
                failure = error
            del action  # and with it the bytes
            with self._changed:
                self.busy_seconds += time.perf_counter() - started
                self._bytes -= size
                if in_room:
                    self._ring.give_back()
                self._working = False
                if failure is not None:
                    self._failure = self._failure or failure
                    self._waiting.clear()
                    self._bytes = 0
                self._changed.notify_all()
                if failure is not None:
                    return
