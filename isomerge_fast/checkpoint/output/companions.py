"""Choose the files beside the weights: which of the base's become files of the output, and which are left behind."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import InputError, ResourceError
from ...parsing.file_formats import HEAD_BYTES, MAX_POINTER_BYTES, PULL, is_pointer
from ..folder import list_folder, open_own, unreadable_refused
from ..io.checksum import Checksum
from ..io.direct_io import READ_BYTES, page_buffer
from ..io.writer import write_blocks_durably
from ..submodules import Submodule, check_same_weights, experts_with, listed_modules, loaded_weights
from .file_kinds import OTHER_WEIGHTS, is_essential, is_essential_file, is_essential_folder, is_weights, why_left_behind
from .manifest import MANIFEST_FILE, REPORT_FILE, file_name

# Every output has its own; ``delta`` is the folder of the merged Δ.
_WRITTEN = ("readme.md", MANIFEST_FILE, REPORT_FILE, "adapter_config.json", "delta")
_CONFIG = "config.json"  # written anew, of the base's
_STRAY, _UNLISTED = "a LoRA adapter beside the weights", "cannot be listed"

# Vocabularies of unknown names have up to 60 MB. In the folder itself all names are looked at; below it bounds keep a
# data set, or a tree of logs, from being walked or copied.
MAX_SMALL_BYTES, MAX_SMALL_TOGETHER_BYTES = 100_000_000, 500_000_000
MAX_FOLDER_NAMES, MAX_WALKED_NAMES, MAX_DEPTH = 1_000, 10_000, 6


class _PointerError(InputError):
    """Refuse a Git LFS pointer in the place of a file."""


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """Name a file of the base's folder that no output has, or a folder (its name ends in ``/``) with all in it."""

    name: str
    why: str
    files: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {"name": file_name("", self.name), "why": self.why, "files": self.files, "bytes": self.bytes}


@dataclass(frozen=True)
class FolderContents:
    """List what lies beside the merged weights of a folder, by relative names, sorted."""

    companions: tuple[str, ...] = ()  # the files to copy; each of them can be opened
    left_behind: tuple[LeftBehind, ...] = ()
    submodules: tuple[Submodule, ...] = ()  # sub-folders whose weights may belong to the model

    def without_folder(self, left: LeftBehind) -> FolderContents:
        """Return the same with a whole folder left behind."""
        others = [each for each in self.left_behind if not each.name.startswith(left.name)]
        return replace(
            self,
            companions=tuple(name for name in self.companions if not name.startswith(left.name)),
            left_behind=_by_name([*others, left]),
        )


def contents_of(base: Path, merged: Collection[str], experts: Sequence[Path], method: str) -> FolderContents:
    """Return which files of the base's folder the output gets, and the weights in its sub-folders that it may have.

    ``merged`` names the files of weights that the merge reads: they are neither copied nor left behind. The sub-folders
    of ``experts``, those that are checkpoints, are compared with the base's; advice in errors names ``method``.
    """
    contents = sort_folder(base, merged)
    strays = [each for each in contents.submodules if each.is_adapter and experts and not experts_with(each, experts)]
    for stray in strays:
        contents = contents.without_folder(measure(base, stray.folder, _STRAY, MAX_WALKED_NAMES))
    kept = [each for each in contents.submodules if each not in strays]
    check_same_weights(base, kept, experts, method)
    names = [name for each in kept for name in each.names]
    for name in names:
        _readable_bytes(base, name)
    return replace(contents, companions=tuple(sorted({*contents.companions, *names})))


def sort_folder(folder: Path, merged: Collection[str] = ()) -> FolderContents:
    """Return what lies in a checkpoint's folder beside the files that are merged, ``merged``.

    Files that cannot be read, are no regular files, lead out of the folder, or differ from another one in case alone
    are left behind; where such a file is essential, and where the folder cannot be listed, it raises InputError.
    """
    sorter = _Sorter(folder, merged)
    sorter.sort()
    return FolderContents(tuple(sorted(sorter.copied)), _by_name(sorter.left), tuple(sorter.submodules))


def _by_name(left: Iterable[LeftBehind]) -> tuple[LeftBehind, ...]:
    return tuple(sorted(left, key=lambda each: each.name))


def _readable_bytes(folder: Path, name: str) -> int:
    """Return the size of a file; refuse one that cannot be read, leads out of the folder, or is a Git LFS pointer."""
    with unreadable_refused(folder / name):
        descriptor, status = open_own(folder, name)
        with open(descriptor, "rb", buffering=0) as file:
            head = file.read(HEAD_BYTES) if status.st_size <= MAX_POINTER_BYTES else b""
    if is_pointer(head):
        raise _PointerError(f"{folder / name}: a Git LFS pointer, not the file itself; {PULL}")
    return status.st_size


def measure(folder: Path, name: str, why: str, most: int) -> LeftBehind:
    """Return a file or folder as left behind, with its files and bytes; count no more than ``most`` files."""
    if not os.path.isdir(folder / name):
        return LeftBehind(name, why, 1, _size(folder / name))
    files = size = 0
    folders = [folder / name]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    elif files == most:
                        return LeftBehind(f"{name}/", f"{why}, counted up to {most:,} files", files, size)
                    else:
                        files, size = files + 1, size + _size(Path(entry.path))
        except OSError:
            why = why if why == _UNLISTED else f"{why}, {_UNLISTED}"
    return LeftBehind(f"{name}/", why, files, size)


class _Sorter:
    """Sort one folder, the essential files first: of two names that differ in case alone they are kept."""

    def __init__(self, folder: Path, merged: Collection[str]) -> None:
        self.copied: list[str] = []
        self.left: list[LeftBehind] = []
        self.submodules: list[Submodule] = []
        self._folder, self._merged = folder, merged
        self._home = Path(os.path.realpath(folder))
        self._modules: frozenset[str] = frozenset()
        self._small: list[str] = []
        self._walked = self._bytes = 0
        self._uncounted = MAX_WALKED_NAMES
        self._known = {_caseless(name): name for name in (*_WRITTEN, _CONFIG, *merged)}

    def sort(self) -> None:
        names = list_folder(self._folder)
        self._modules = listed_modules(self._folder, names)
        self._sort_names("", names)
        for name in sorted(self._small, key=lambda name: (not is_essential(name), name)):
            if why := self._obstacle(name):
                self._leave(name, why)
            else:
                self.copied.append(name)

    def _sort_names(self, within: str, names: Iterable[str]) -> None:
        for name in names:
            path = f"{within}/{name}" if within else name
            if path in self._merged or path == _CONFIG or name.startswith("."):
                continue
            place = self._folder / path
            # A link to a folder under an essential file's name is an error, as any other that is no file.
            is_folder = os.path.isdir(place) and not (place.is_symlink() and is_essential(path))
            if _caseless(path) in _WRITTEN:
                self._leave(path, "the output has its own")
            elif not is_folder and is_essential_file(path):
                self._small.append(path)
            elif why := why_left_behind(name):
                self._leave(path, why)
            elif is_folder:
                self._sort_folder(path)
            else:
                self._small.append(path)

    def _sort_folder(self, path: str) -> None:
        is_essential_one = is_essential_folder(path)
        place = self._folder / path
        if place.is_symlink() and not (is_essential_one and Path(os.path.realpath(place)).is_relative_to(self._home)):
            # Its essential files are refused one by one; others are not looked at.
            inside = list_folder(place, most=MAX_FOLDER_NAMES) if is_essential_one else []
            self._small += [file for name in inside if is_essential(file := f"{path}/{name}")]
            self.left.append(LeftBehind(f"{path}/", "a link to a folder", 0, 0))
            return None
        try:
            names = list_folder(place, most=MAX_FOLDER_NAMES + 1)
        except InputError:
            if is_essential_one:
                raise
            return self._leave(path, _UNLISTED)
        self._walked += len(names)
        if len(names) > MAX_FOLDER_NAMES:
            return self._leave(path, f"holds more than {MAX_FOLDER_NAMES:,} names")
        if self._walked > MAX_WALKED_NAMES:
            return self._leave(path, f"not looked through, after {MAX_WALKED_NAMES:,} names of other folders")
        if path.count("/") >= MAX_DEPTH:
            return self._leave(path, f"more than {MAX_DEPTH} folders deep")
        weights = loaded_weights(names)
        is_module = any(f"{path}/".startswith(f"{module}/") for module in self._modules)
        if weights and (is_module or "adapter_config.json" in names):
            self.submodules.append(Submodule(path, tuple(weights), is_adapter=not is_module))
        elif not is_module and any(map(is_weights, names)):
            return self._leave(path, OTHER_WEIGHTS)
        return self._sort_names(path, [name for name in names if name not in weights])

    def _leave(self, path: str, why: str) -> None:
        self.left.append(measure(self._folder, path, why, self._uncounted))
        self._uncounted -= self.left[-1].files

    def _obstacle(self, name: str) -> str | None:
        """Return why a file is not copied, or None; raise InputError where it is essential."""
        is_essential_one = is_essential(name)
        other = self._known.setdefault(_caseless(name), name)
        if other != name:
            if is_essential_one:
                raise InputError(
                    f"{self._folder}: {other!r} and {name!r} are one file where case is not told; remove one"
                )
            return f"one file with {other!r} where case is not told"
        if not is_essential_one and not name.isprintable():
            return "control characters in its name"
        try:
            size = _readable_bytes(self._folder, name)
        except InputError as error:
            if is_essential_one:
                raise
            reason = error.__cause__
            if isinstance(reason, OSError):
                return f"cannot be read ({reason.strerror})"
            return "a Git LFS pointer" if isinstance(error, _PointerError) else "a link out of its folder"
        if is_essential_one:
            return None
        if size > MAX_SMALL_BYTES:
            return f"larger than {MAX_SMALL_BYTES // 1_000_000} MB"
        if self._bytes + size > MAX_SMALL_TOGETHER_BYTES:
            return f"beyond {MAX_SMALL_TOGETHER_BYTES // 1_000_000} MB of other files"
        self._bytes += size
        return None


def _caseless(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _size(path: Path) -> int:
    """Return the size of a file, or of a link's target; 0 where the link leads nowhere."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def copy_companions(source: Path, target: Path, names: Iterable[str]) -> dict[str, Checksum]:
    """Copy the contents of files, whose modes follow the umask; return the checksums of what was written."""
    written = {}
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        written[name] = write_blocks_durably(target / name, _blocks(source, name))
    return written


def _blocks(source: Path, name: str) -> Iterator[memoryview]:
    """Yield a file's bytes in blocks, each valid until the next: a tokenizer may have hundreds of megabytes."""
    block, position = page_buffer()[:READ_BYTES], 0
    try:
        descriptor, _ = open_own(source, name)
        with open(descriptor, "rb", buffering=0) as file:
            while count := os.preadv(file.fileno(), [block], position):
                yield block[:count]
                position += count
    except OSError as error:
        raise ResourceError(f"{source / name}: cannot be read ({error.strerror}); --resume continues") from error
