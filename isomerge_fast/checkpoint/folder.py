"""List the folder of a checkpoint, and open its files; a link that leads out of it is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

from ..errors import InputError
from ..parsing.regular_files import open_regular, read_opened

# Opening files inside a folder needs no right to list it.
_FOLDER_FLAGS = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)


@contextmanager
def unreadable_refused(path: Path) -> Iterator[None]:
    """Turn an OSError of reading a file into an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def list_folder(folder: Path, most: int | None = None) -> list[str]:
    """Return the sorted names of everything in a folder, but read at most ``most``; refuse what cannot be listed."""
    try:  # ``glob`` takes such a folder for an empty one
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, most))
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror})") from error


def open_own(folder: Path, name: str) -> tuple[int, os.stat_result]:
    """Open a file whose contents become part of the output; return a descriptor for reading and the file's status.

    Links may lead to other places in the folder. Those of a snapshot in the hub's cache (``models--…/snapshots/…``) may
    also lead to the files themselves, which lie in ``blobs`` of the same repository. Any other is refused: it would let
    whoever made the folder put a file of this machine into the output.
    """
    path = folder / name
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    for root in (home, *_blobs(home)):
        if target != root and target.is_relative_to(root):
            return _open_below(root, target.relative_to(root).parts)
    raise InputError(
        f"{path}: leads out of its folder, to {target}, and only weights may lie elsewhere; if it belongs to the "
        "checkpoint, put a copy in its place (cp --remove-destination)"
    )


def read_own(folder: Path, name: str, most_bytes: int) -> tuple[bytes, os.stat_result]:
    """Return the bytes and the status of a small file whose contents become part of the output, as ``open_own``."""
    with unreadable_refused(folder / name):
        return read_opened(open_own(folder, name), most_bytes)


def _blobs(home: Path) -> list[Path]:
    """Return the folder of the files of a snapshot, or of a folder inside a snapshot; nothing for other folders."""
    for revision in (home, *home.parents):
        if revision.parent.name == "snapshots":
            return [revision.parent.parent / "blobs"]
    return []


def _open_below(root: Path, parts: tuple[str, ...]) -> tuple[int, os.stat_result]:
    """Open a file below ``root`` by a path that has no links in it, and gets none meanwhile."""
    with ExitStack() as closing:
        folder = os.open(root, _FOLDER_FLAGS)
        closing.callback(os.close, folder)
        for part in parts[:-1]:
            folder = os.open(part, _FOLDER_FLAGS, dir_fd=folder)
            closing.callback(os.close, folder)
        return open_regular(parts[-1], dir_fd=folder, follow=False)
