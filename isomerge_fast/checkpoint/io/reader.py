"""Read the bytes of tensors by positioned reads, from several threads; map nothing and keep nothing in memory.

Files that are not in the page cache are read with direct I/O, which leaves the cache to others and is faster. (4 GB on
an ext4 disk of a 2-core machine, 4 MiB a read: 0.4 to 1.2 GB/s through the cache on one thread, 1.5 to 2.7 directly;
from the cache 7 to 8.)
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputChangedError, UnreadableError
from ...parsing.regular_files import IrregularFileError, open_regular
from ..layout import Checkpoint, FileIdentity, StoredTensor, hash_header
from .direct_io import (
    PAGE,
    READ_BYTES,
    copy_bytes,
    is_aligned_with,
    is_cached,
    open_direct,
    page_buffer,
    page_ceiling,
    page_floor,
)

# For files that other code opens.
SPARE_FILES = 64


@dataclass(frozen=True)
class Piece:
    """Name the elements of a stored tensor from element ``first`` on that fill ``shape``."""

    stored: StoredTensor
    first: int
    shape: tuple[int, ...]

    @property
    def start(self) -> int:
        """Return the offset in the file."""
        return self.stored.start + self.first * self.stored.dtype.itemsize

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.stored.dtype.itemsize

    def view(self, data: Tensor) -> Tensor:
        """Return bytes in the piece's dtype and shape."""
        return data.view(self.stored.dtype).view(self.shape)


def whole(stored: StoredTensor) -> Piece:
    return Piece(stored, 0, stored.shape)


def files_of(*checkpoints: Checkpoint) -> dict[Path, FileIdentity]:
    """Return every file of some checkpoints."""
    return {path: identity for checkpoint in checkpoints for path, identity in checkpoint.files.items()}


class Reader:
    """Open files of checkpoints and read from them, as a context manager; refuse files changed since they were planned.

    ``files`` (``files_of`` checkpoints) tell what each file was then. With ``direct`` what is not in the page cache is
    read past it, where the file system can.
    """

    def __init__(self, files: Mapping[Path, FileIdentity], *, direct: bool = True) -> None:
        self._identities = files
        self._direct = direct
        allow_open_files(2 * len(self._identities))
        self._descriptors: dict[Path, tuple[int, int | None]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptors in self._descriptors.values():
            for descriptor in descriptors:
                if descriptor is not None:
                    os.close(descriptor)
        self._descriptors.clear()

    @property
    def direct_files(self) -> int:
        """Return how many of the opened files are read past the page cache."""
        return sum(direct is not None for _, direct in self._descriptors.values())

    def read(self, piece: Piece) -> Tensor:
        """Read a piece into a new CPU tensor; see ``read_into``."""
        data = torch.empty(piece.bytes, dtype=torch.uint8, device="cpu")
        self.read_into(piece, 0, data.numpy().data)
        return piece.view(data)

    def read_into(self, piece: Piece, offset: int, target: memoryview) -> None:
        """Fill ``target`` with the piece's bytes from ``offset`` on; several threads may call it at once.

        It raises InputChangedError where the file changed since it was planned, is gone or ended early, and
        UnreadableError where it failed to read.
        """
        start, end = piece.start + offset, piece.start + offset + len(target)
        file, position = piece.stored.file, start
        try:
            through_cache, direct = self._open(file)
            while position < end:
                # Read up to a multiple of READ_BYTES, so that direct reads overlap no more than they must.
                stop = min(end, (position // READ_BYTES + 1) * READ_BYTES)
                part = target[position - start : stop - start]
                if direct is None:
                    count = os.preadv(through_cache, [part], position)
                else:
                    count = self._read_directly(direct, part, position)
                if count <= 0:
                    raise InputChangedError(f"{file}: ends inside tensor {piece.stored.name_at(position)!r}")
                position += count
        except OSError as error:
            raise _unreadable(f"{file}: tensor {piece.stored.name_at(position)!r}", error) from error

    def check_unchanged(self) -> None:
        """Raise InputChangedError where an input is another file than was planned, or was changed."""
        for path, identity in self._identities.items():
            try:
                status = os.stat(path)
            except OSError as error:
                raise _unreadable(str(path), error) from error
            if not identity.is_of(status):
                raise InputChangedError(f"{path}: changed during the merge")

    def _read_directly(self, descriptor: int, part: memoryview, position: int) -> int:
        """Read whole pages in one call, and return how many of the wanted bytes came.

        They go straight to where they are wanted if that is aligned with the file, but for the pages at both ends,
        which hold other tensors too. Otherwise all go through this thread's own buffer.
        """
        pages = page_buffer()
        end = position + len(part)
        first, inside = page_floor(position), page_ceiling(position)
        outside, last = page_floor(end), page_ceiling(end)
        if inside < outside and is_aligned_with(part, position):
            head, tail = pages[: inside - first], pages[PAGE : PAGE + last - outside]
            vectors = [head, part[inside - position : outside - position], tail]
            count = os.preadv(descriptor, [vector for vector in vectors if len(vector)], first) - (position - first)
            copy_bytes(part[: inside - position], head[position - first :])
            copy_bytes(part[outside - position :], tail[: end - outside])
            return min(count, len(part))
        count = min(os.preadv(descriptor, [pages[: last - first]], first) - (position - first), len(part))
        if count > 0:
            copy_bytes(part[:count], pages[position - first : position - first + count])
        return count

    def _open(self, path: Path) -> tuple[int, int | None]:
        """Return a descriptor through the page cache, and one past it or None; refuse a file that was changed."""
        with self._lock:
            if path not in self._descriptors:
                descriptor, status = open_regular(path)
                try:
                    identity = self._identities[path]
                    if not (identity.is_of(status) and hash_header(descriptor) == identity.header_sha256):
                        raise InputChangedError(f"{path}: changed since the merge was planned")
                except BaseException:
                    os.close(descriptor)
                    raise
                direct = None
                if self._direct and status.st_size >= READ_BYTES and not is_cached(descriptor, status.st_size):
                    direct = open_direct(f"/dev/fd/{descriptor}", os.O_RDONLY)  # the same file, whatever is there now
                self._descriptors[path] = (descriptor, direct)
            return self._descriptors[path]


def _unreadable(what: str, error: OSError) -> InputChangedError | UnreadableError:
    """Return the error of a failed read: a file that is gone does not come back by itself, a disk or a server may."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return InputChangedError(f"{what}: gone during the merge ({error.strerror})")
    if isinstance(error, IrregularFileError):
        return InputChangedError(f"{what}: changed during the merge ({error.strerror})")
    return UnreadableError(f"{what}: cannot be read ({error.strerror}); --resume continues")


def allow_open_files(more: int) -> None:
    """Raise the soft limit on open files, where ``more`` do not fit, as far as the hard limit allows.

    (The soft one is low, 256 or 1024, for the sake of programs that use ``select``; a 70 B model has 30 shards.)
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + more + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
