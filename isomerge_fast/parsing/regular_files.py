"""Open files that somebody gave us: only regular ones, and without waiting."""

from __future__ import annotations

import errno
import os
import stat

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device or a terminal",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


class IrregularFileError(OSError):
    """Report that a name in a folder is of no regular file."""


def open_regular(
    path: str | os.PathLike[str], *, dir_fd: int | None = None, follow: bool = True
) -> tuple[int, os.stat_result]:
    """Open a regular file, relative to the folder ``dir_fd``; return a descriptor for reading and the file's status.

    Opening a FIFO waits for a writer, and opening a device may do something, so these are refused before, by an
    IrregularFileError. What takes the file's place after that is opened without waiting, and refused then. Without
    ``follow`` the path itself may be no link.
    """
    try:
        _require_regular(os.stat(path, dir_fd=dir_fd, follow_symlinks=follow), path)
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        descriptor = os.open(path, flags, dir_fd=dir_fd)
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, "not a name that a file can have", repr(path)) from error
    try:
        status = os.fstat(descriptor)
        _require_regular(status, path)
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status


def read_regular(path: str | os.PathLike[str], most_bytes: int) -> tuple[bytes, os.stat_result]:
    """Return a small file's bytes, as many as it had when it was opened, and its status then."""
    return read_opened(open_regular(path), most_bytes)


def read_opened(opened: tuple[int, os.stat_result], most_bytes: int) -> tuple[bytes, os.stat_result]:
    """Read and close what ``open_regular`` opened; raise OSError where it has more than ``most_bytes``.

    Files of /proc report the size 0, and a read of some blocks: no more than the reported size is read.
    """
    descriptor, status = opened
    with open(descriptor, "rb") as file:
        if status.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes; refused above {most_bytes}")
        return file.read(status.st_size), status


def _require_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise IrregularFileError(errno.EINVAL, f"{kind}, not a regular file", os.fspath(path))
