"""Handle standard streams that fail, and signals that ask the process to end."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TextIO

# The exit code that a shell gives a program that a closed pipe has ended.
CLOSED_PIPE = 128 + signal.SIGPIPE
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stream(io.TextIOWrapper):
    """Print without ever raising: keep the first error for ``take_failure``, and drop everything after it.

    What the encoding lacks is written as an escape.
    """

    before: TextIO | None = None
    _error: OSError | None = None

    def write(self, text: str) -> int:
        with self._kept():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept():
            super().flush()

    def take_failure(self) -> OSError | None:
        """Return the first error of the output since the last call, or None, and forget it."""
        self.flush()
        error, self._error = self._error, None
        return error

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._error = self._error or error
            # The interpreter flushes the buffer again when it ends: let that go nowhere.
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)


def take_failure(stream: TextIO) -> OSError | None:
    """Return why something printed on ``stream`` since the last call is lost, or None."""
    return stream.take_failure() if isinstance(stream, Stream) else None


def guard_streams() -> None:
    """Make standard output and standard error a ``Stream`` each, even if they were closed from the start."""
    # Else the next file that is opened takes the place of a closed stream, and a library's messages go into it.
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = _guarded(sys.stdout, 1), _guarded(sys.stderr, 2)


def _guarded(stream: TextIO | None, descriptor: int) -> Stream:
    if stream is None:  # closed
        return Stream(open(descriptor, "wb", closefd=False), "utf-8", "backslashreplace")
    stream.flush()
    guarded = Stream(stream.buffer, stream.encoding, "backslashreplace", line_buffering=bool(stream.line_buffering))
    guarded.before = stream  # which would close the buffer that they share
    return guarded


class Stopped(KeyboardInterrupt):
    """Report a signal that asks the process to end; ``exit_code`` is the shell's for it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into ``Stopped`` in the main thread.

    The second one prints ``message`` and ends the process at once, as a kill would. A signal that was ignored before
    stays so (nohup).
    """
    is_stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        if is_stopping:
            with suppress(OSError):
                os.write(2, f"{message}\n".encode())
            os._exit(128 + number)
        is_stopping = True
        raise Stopped(number)

    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number in _STOPPING:
            if signal.getsignal(number) is stop:
                signal.signal(number, signal.SIG_DFL)  # from here on there is nothing to clean up, and no traceback
