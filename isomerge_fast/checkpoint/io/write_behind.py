"""Do writes in a thread of their own, in order, in a bounded number of bytes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from torch import Tensor

from .ring_buffer import RingBuffer

# A room has at most one part in so many of the memory, so that one is filled while others are written.
ROOM_SHARE = 3


class WriteBehind:
    """Do writes behind their caller, as a context manager; raise the first failure at the next call.

    At most ``budget_bytes`` wait to be written, but one write is taken whatever its size. All that was put is done when
    ``drain`` returns.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._ring = RingBuffer(budget_bytes)
        self._actions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._results: SimpleQueue[BaseException | None] = SimpleQueue()  # of each action, in order: its failure
        self._pending: deque[tuple[int, bool]] = deque()  # ``put``'s size and in_room, of actions without a result yet
        self._bytes = 0  # of what is pending
        self._failure: BaseException | None = None
        self._stopped = False
        # A daemon: a write that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="isomerge-write", daemon=True)
        self.busy_seconds = 0.0

    def __enter__(self) -> WriteBehind:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """End the thread. After an error what still waits is not written."""
        self._stopped = kind is not None
        self._actions.put(None)
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
        self._take_results()
        while (room := self._ring.take(size)) is None:
            self._settle()
        return room

    def put(self, action: Callable[[], None], *, size: int = 0, in_room: bool = False) -> None:
        """Have ``action`` done; wait while the budget is used up.

        Until it is done it uses ``size`` bytes of the budget; with ``in_room`` it writes from the ``room`` taken last,
        which is then given back.
        """
        self._take_results()
        while self._bytes and self._bytes + size > self._budget:
            self._settle()
        self._pending.append((size, in_room))
        self._bytes += size
        self._actions.put(action)

    def drain(self) -> None:
        """Wait until everything is done."""
        self._raise()
        while self._pending:
            self._settle()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _take_results(self) -> None:
        """Take back the bytes of all writes that have ended by now; raise a failure."""
        self._raise()
        while not self._results.empty():
            self._settle()

    def _settle(self) -> None:
        """Wait for the oldest write, and take back its bytes; raise its failure."""
        self._failure = self._results.get()
        self._raise()
        size, in_room = self._pending.popleft()
        self._bytes -= size
        if in_room:
            self._ring.give_back()

    def _work(self) -> None:
        failure = None
        while (action := self._actions.get()) is not None and failure is None and not self._stopped:
            started = time.perf_counter()
            try:
                action()
            except BaseException as error:
                failure = error
            del action  # and with it the bytes
            self.busy_seconds += time.perf_counter() - started
            self._results.put(failure)
        while action is not None:  # after a failure: what still waits would keep its bytes
            del action
            action = self._actions.get()
