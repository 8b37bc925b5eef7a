"""JSON files that end in the checksum of their own text, so that any change to one is found by reading it alone."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import InputError, VerificationError
from ..io.checksum import Checksum
from ..io.direct_io import drop_cache, read_pages
from ..io.writer import write_blocks_durably
from ..layout import parse_settings

_SEAL = re.compile(rb',\n "digest": "([0-9a-f]{32})"\n}\n\Z')
_LONGEST_SEAL = 64
_END = b"\n}\n"
MOST_VALUES = 10_000_000  # a report of 45,000 tensors of eight experts has 900,000


def write_sealed(path: Path, text: Iterable[bytes]) -> str:
    """Write the text of an object, with ``digest`` for its last key, durably; return the digest.

    Args:
        text: in blocks: indented JSON, of one key at least.
    """
    running = Checksum()
    write_blocks_durably(path, _sealed(text, running))
    return running.text


def _sealed(text: Iterable[bytes], running: Checksum) -> Iterator[bytes]:
    """Yield the text with its checksum in it, which ``running`` is at the end."""
    held = b""
    for block in text:
        whole = held + block
        held = whole[-len(_END) :]
        running.update(whole[: -len(_END)])
        yield whole[: -len(_END)]
    assert held == _END
    yield f',\n "digest": "{running.text}"\n}}\n'.encode()


def read_sealed(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return an object as it is on the disk, and what is wrong with its digest, if anything.

    Raises:
        VerificationError: it cannot be read, or is no JSON object.
    """
    try:
        data = b"".join(map(bytes, disk_blocks(path)))
        value = parse_settings(data, str(path), most_values=MOST_VALUES)
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read ({error.strerror})") from error
    except InputError as error:
        raise VerificationError(str(error)) from error
    seal = _SEAL.search(data, max(0, len(data) - _LONGEST_SEAL))
    if seal is None:
        return value, f"{path}: was changed after the merge wrote it (it does not end in a digest)"
    running = Checksum()
    running.update(memoryview(data)[: seal.start()])
    if running.text != seal[1].decode():
        return value, f"{path}: was changed after the merge wrote it (its digest is of another text)"
    return value, None


def open_on_disk(path: Path) -> int:
    """Open a regular file whose next reads are to come from the disk.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO without a writer would block
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a regular file", str(path))
    with suppress(OSError):  # what could not be written shows in what is read
        drop_cache(descriptor)
    return descriptor


def disk_blocks(path: Path) -> Iterator[memoryview]:
    """Yield a file's bytes as they are on its disk, in blocks that are valid until the next one.

    Raises:
        OSError: as ``open_on_disk``, or it cannot be read.
    """
    descriptor = open_on_disk(path)
    try:
        yield from read_pages(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
