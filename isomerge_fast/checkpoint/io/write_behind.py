"""Do writes in a thread of their own, in order, in a bounded number of bytes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from torch import Tensor

from .buffer_pool import BufferPool

# A room has at most one part in so many of the memory, so that one is filled while others are written.
ROOM_SHARE = 3


class WriteBehind:
    """Do writes behind their callers, as a context manager; raise the first failure at the next call.

    Any thread may call. At most ``budget_bytes`` wait to be written, but one write is taken whatever its size. All that
    was put is done when ``drain`` returns.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._pool = BufferPool(budget_bytes)
        self._actions: deque[tuple[Callable[[], None], int, Tensor | None]] = deque()
        self._bytes = 0  # of what was put and is not done, without the rooms
        self._changed = threading.Condition()  # guards all of these
        self._is_busy = False
        self._failure: BaseException | None = None
        self._ended = False
        # A daemon: a write that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="isomerge-write", daemon=True)
        self.busy_seconds = 0.0

    def __enter__(self) -> WriteBehind:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """End the thread. After an error what still waits is not written."""
        with self._changed:
            if kind is not None:
                self._actions.clear()
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def room_bytes(self) -> int:
        """Return the most bytes that ``room`` gives at once."""
        return self._budget // ROOM_SHARE

    def room(self, size: int) -> Tensor | None:
        """Return ``size`` bytes for what this thread's next ``put`` writes, or None where that is above ``room_bytes``.

        It waits while others are being written.
        """
        if size > self.room_bytes:
            return None
        with self._changed:
            self._raise()
            while (room := self._pool.take(size)) is None:
                self._wait()
        return room

    def give_back(self, room: Tensor) -> None:
        """Give back a room that nothing is written from."""
        with self._changed:
            self._pool.give_back(room)
            self._changed.notify_all()

    def put(self, action: Callable[[], None], *, size: int = 0, room: Tensor | None = None) -> None:
        """Have ``action`` done; wait while the budget is used up.

        Until it is done it uses ``size`` bytes of the budget; it writes from ``room``, which is then given back.
        """
        with self._changed:
            self._raise()
            while self._bytes and self._bytes + size > self._budget:
                self._wait()
            self._bytes += size
            self._actions.append((action, size, room))
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything is done."""
        with self._changed:
            self._raise()
            while self._actions or self._is_busy:
                self._wait()

    def _wait(self) -> None:
        self._changed.wait()
        self._raise()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._actions and not self._ended:
                    self._changed.wait()
                if not self._actions:
                    return
                action, size, room = self._actions.popleft()
                self._is_busy = True
            started, failure = time.perf_counter(), None
            try:
                action()
            except BaseException as error:
                failure = error
            del action  # and with it the bytes
            self.busy_seconds += time.perf_counter() - started
            with self._changed:
                self._is_busy = False
                self._bytes -= size
                if room is not None:
                    self._pool.give_back(room)
                del room
                if failure is not None:
                    self._failure = failure
                    self._actions.clear()  # nothing is written after a failure
                self._changed.notify_all()
            if failure is not None:
                return
