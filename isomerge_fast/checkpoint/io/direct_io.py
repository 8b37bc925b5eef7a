"""Reads and writes past the page cache: whole pages of files, from and to whole pages of memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy

PAGE = 4096
# One read or write. Larger ones gain nothing, neither from the cache nor from the disk; smaller ones cost calls.
READ_BYTES = 4 << 20

_buffers = threading.local()


def page_buffer() -> memoryview:
    """``READ_BYTES`` and two pages more, on whole pages: one buffer a thread, used again and again."""
    if not hasattr(_buffers, "pages"):
        _buffers.pages = memoryview(mmap.mmap(-1, READ_BYTES + 2 * PAGE))
    return _buffers.pages


def open_direct(path: str | Path, flags: int) -> int | None:
    """A descriptor past the page cache, or None where the file system, or the system, has no such thing."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None


def drop_cache(descriptor: int) -> None:
    """Have the next reads of a file come from the disk, where the system can.

    A page whose writing failed stays in the page cache as if it were on the disk, and fsync tells of it only once.

    Raises:
        OSError: what waited to be written cannot be, or could not be before.
    """
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def read_pages(descriptor: int, start: int, end: int) -> Iterator[memoryview]:
    """Yield a file's bytes from ``start`` to ``end``, or to its end, in blocks that are valid until the next one.

    Args:
        descriptor: past the page cache, or through it.
    """
    position = start
    while position < end:
        pages = page_buffer()
        first = position // PAGE * PAGE
        wanted = min(READ_BYTES, -(-end // PAGE) * PAGE - first)
        count = min(os.preadv(descriptor, [pages[:wanted]], first), end - first)
        if first + count <= position:
            return
        yield pages[position - first : count]
        position = first + count


def is_cached(descriptor: int, size: int) -> bool:
    """Whether half of the file or more is in the page cache; yes where the system does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore"):
        return True
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return True
    try:
        resident = (ctypes.c_ubyte * -(-size // PAGE))()
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        if libc.mincore(address, size, resident):
            return True
        return bytes(resident).count(1) * 2 >= len(resident)
    finally:
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.munmap(address, size)


def lies_like(data: memoryview, position: int) -> bool:
    """Whether memory and file lie alike within their pages, so that whole pages need no copy between them."""
    return len(data) > 0 and (numpy.frombuffer(data, numpy.uint8).ctypes.data - position) % PAGE == 0


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """As slices are assigned, but without Python's lock: other threads go on computing."""
    if len(target):
        numpy.copyto(numpy.frombuffer(target, numpy.uint8), numpy.frombuffer(source, numpy.uint8))
