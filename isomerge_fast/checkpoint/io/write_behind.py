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
# The thread begins when so much waits, or for so long: to be woken for each of many small writes takes longer than they
# do.
GATHERED_BYTES, GATHERED_ACTIONS, GATHERING_SECONDS = 1 << 20, 256, 0.02


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
        self._gathered_bytes = 0  # of what was put and is not begun, with the rooms
        self._lock = threading.Lock()  # guards all of these
        self._put = threading.Condition(self._lock)  # for the thread
        self._done = threading.Condition(self._lock)  # for its callers
        self._waiting = 0  # callers
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
        with self._lock:
            if kind is not None:
                self._actions.clear()
            self._ended = True
            self._put.notify()
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
        with self._lock:
            self._raise()
            while (room := self._pool.take(size)) is None:
                self._wait()
        return room

    def give_back(self, room: Tensor) -> None:
        """Give back a room that nothing is written from."""
        with self._lock:
            self._pool.give_back(room)
            self._done.notify_all()

    def put(self, action: Callable[[], None], *, size: int = 0, room: Tensor | None = None) -> None:
        """Have ``action`` done; wait while the budget is used up.

        Until it is done it uses ``size`` bytes of the budget; it writes from ``room``, which is then given back.
        """
        with self._lock:
            self._raise()
            while self._bytes and self._bytes + size > self._budget:
                self._wait()
            self._bytes += size
            self._gathered_bytes += size if room is None else room.nbytes
            self._actions.append((action, size, room))
            # Else the thread looks by itself.
            if not self._is_busy and (len(self._actions) == 1 or self._is_enough):
                self._put.notify()

    def drain(self) -> None:
        """Wait until everything is done."""
        with self._lock:
            self._raise()
            while self._actions or self._is_busy:
                self._wait()

    @property
    def _is_enough(self) -> bool:
        """Return whether the thread is to begin with what was put."""
        gathered = self._gathered_bytes >= GATHERED_BYTES or len(self._actions) >= GATHERED_ACTIONS
        return gathered or self._waiting > 0 or self._ended

    def _wait(self) -> None:
        self._waiting += 1
        self._put.notify()
        self._done.wait()
        self._waiting -= 1
        self._raise()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            with self._lock:
                self._is_busy = False
                while not (self._actions or self._ended):
                    self._put.wait()
                if not self._is_enough:
                    self._put.wait_for(lambda: self._is_enough, GATHERING_SECONDS)
                if not self._actions:
                    return
                self._is_busy = True
            if not self._do_all():
                return

    def _do_all(self) -> bool:
        """Do what was put, until there is nothing; return whether all went well."""
        while True:
            with self._lock:
                if not self._actions:
                    self._is_busy = False
                    self._done.notify_all()
                    return True
                action, size, room = self._actions.popleft()
                self._gathered_bytes -= size if room is None else room.nbytes
            started, failure = time.perf_counter(), None
            try:
                action()
            except BaseException as error:
                failure = error
            del action  # and with it the bytes
            self.busy_seconds += time.perf_counter() - started
            with self._lock:
                self._bytes -= size
                if room is not None:
                    self._pool.give_back(room)
                del room
                if failure is not None:
                    self._failure, self._is_busy = failure, False
                    self._actions.clear()  # nothing is written after a failure
                if self._waiting:
                    self._done.notify_all()
            if failure is not None:
                return False
