"""Keep the journals of an unfinished merge: which tensors are finished, and the checksums of their bytes."""

from __future__ import annotations

import json
import os
import sys
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..io.checksum import Checksum
from ..io.writer import rename, sync_folder, write_blocks_durably
from .json_files import to_json

JOURNAL_FILE = "journal.jsonl"
_DECODER = json.JSONDecoder()


class Entries(UserDict[str, Any]):
    """Hold journal entries by tensor, each as its JSON, which is parsed whenever the entry is asked for.

    (0.4 KB a tensor averaged into one output, where it takes 1.8 KB as objects.) ``|=`` adds those of others.
    """

    def __init__(self, entries: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__()
        for entry in entries:
            self.add(entry)

    def add(self, entry: dict[str, Any]) -> bytes:
        """Add an entry, or replace that of the same tensor; return its JSON."""
        text = self.data[sys.intern(entry["name"])] = to_json(entry, indent=None)
        return text

    def of(self, names: Iterable[str]) -> Entries:
        """Return the entries of those tensors that have one."""
        found = Entries()
        found.data = {name: self.data[name] for name in names if name in self.data}
        return found

    def __getitem__(self, name: str) -> dict[str, Any]:
        return _DECODER.decode(self.data[name].decode())

    def checksums(self, name: str) -> dict[str, dict[str, str]]:
        """Return ``checksum`` of an entry alone: in 0.5 us, where all of it takes 6."""
        return self._first_part(name, "checksum")

    def base_checksum(self, name: str) -> str:
        """Return ``base_checksum`` of an entry alone."""
        return self._first_part(name, "base_checksum")

    def _first_part(self, name: str, key: str) -> Any:
        """Return one of the parts that come first, as keys are sorted: nothing else that stands there has its name."""
        text, label = self.data[name].decode(), f'"{key}": '
        return _DECODER.raw_decode(text, text.index(label) + len(label))[0]


class Journal:
    """Begin or continue the journals of a merge, in files of ``folder``.

    ``journal.jsonl`` has what earlier runs finished, ``journal-<number>.jsonl`` what each work item of this run has
    finished. The first line holds the merge's ``fingerprint``, ``key``; each other line is a finished tensor. Every
    line begins with its own checksum. Resuming checks the bytes of a tensor that an entry names.

    The last digits of what several cores compute depend on their number: attribute ``cores`` has that of every tensor
    that more than one computes, as the merge began, and ``eigenvectors`` the library that computed them. Journals of
    another merge are refused, naming the input that has changed, or with ``overwrite`` discarded.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        inputs: list[dict[str, Any]],
        *,
        cores: Mapping[str, int],
        eigenvectors: str = "",
        resume: bool,
        overwrite: bool = False,
    ) -> None:
        self.cores, self.eigenvectors = dict(cores), eigenvectors
        self.finished = Entries()
        path = folder / JOURNAL_FILE
        lines = _read_lines(path) if resume else iter(())
        first = next(lines, None)  # without it nothing is known of the rest
        if first is not None and first.get("fingerprint") == key:
            self.cores, self.eigenvectors = first["cores"], first.get("eigenvectors", eigenvectors)
            self.finished = Entries(lines)
            for part in sorted(folder.glob(_item_file("*"))):
                self.finished |= _entries_of_merge(part, key, self.cores)
        elif first is not None and not overwrite:
            raise ConfigError(
                f"{folder}: the unfinished merge was of other inputs, options, devices or versions"
                f"{_changed_input(first.get('inputs', []), inputs)}; "
                "run with --overwrite to discard it"
            )
        head = {"fingerprint": key, "inputs": inputs, "cores": self.cores, "eigenvectors": self.eigenvectors}
        _replace(path, head, self.finished)
        for part in folder.glob(_item_file("*")):
            part.unlink()


class ItemJournal:
    """Write the journal of one work item, in the process that works on it; others read it while it grows.

    ``about`` describes the process, in the first line. Where another merge has the folder by now it raises ConfigError.
    """

    def __init__(self, folder: Path, key: str, cores: Mapping[str, int], item: int, about: Mapping[str, Any]) -> None:
        path = item_journal(folder, item)
        if not _is_of(next(_read_lines(folder / JOURNAL_FILE), None), key, cores):
            raise ConfigError(f"{folder}: another merge has taken the place of this one")
        self.finished = _entries_of_merge(path, key, cores)  # by an earlier attempt at the same work item
        _replace(path, {"fingerprint": key, "cores": dict(cores), **about}, self.finished)
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()

    def add(self, entry: dict[str, Any]) -> None:
        self.add_texts([to_json(entry, indent=None)])

    def add_texts(self, entries: Iterable[bytes]) -> None:
        """Add entries, each as its JSON (see ``Entries.add``)."""
        self._file.write(b"".join(map(_line, entries)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class ItemProgress:
    """Follow the journal of a work item from another process."""

    def __init__(self, folder: Path, item: int) -> None:
        self._path = item_journal(folder, item)
        self.about: dict[str, Any] = {}
        self.finished = Entries()
        self._read = (0, 0)  # which file, and how much of it

    def update(self) -> None:
        """Read what was added. A file that is not there yet, or not for the moment, changes nothing."""
        try:
            with open(self._path, "rb") as file:
                number = os.fstat(file.fileno()).st_ino
                position = self._read[1] if self._read[0] == number else 0
                file.seek(position)
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError:
            return
        if not whole:
            return
        self._read = number, position + len(whole) + 1
        for entry in filter(None, map(_parse_line, whole.splitlines())):
            if "name" in entry:
                self.finished.add(entry)
            else:
                self.about = entry


def delete_journals(folder: Path) -> None:
    """Delete the journals of a merge that has lost writes, so that a resume begins with new files.

    What failed may be in the file system's own records of a file, where reading its bytes from the disk shows nothing
    until it is mounted again. (Seen on ext4 without a journal: blocks that were written, and recorded as unwritten.)
    """
    for path in folder.glob("journal*"):
        path.unlink(missing_ok=True)


def item_journal(folder: Path, item: int) -> Path:
    return folder / _item_file(str(item))


def _item_file(item: str) -> str:
    return f"journal-{item}.jsonl"


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of complete lines; none where the first is not complete."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            entry = _parse_line(line.rstrip(b"\r\n"))
            if entry is not None:
                yield entry
            elif number == 0:
                return


def _is_of(first: dict[str, Any] | None, key: str, cores: Mapping[str, int]) -> bool:
    return first is not None and (first.get("fingerprint"), first.get("cores")) == (key, cores)


def _entries_of_merge(path: Path, key: str, cores: Mapping[str, int]) -> Entries:
    """Return the entries of a work item's journal, or none where it is of another merge."""
    lines = _read_lines(path)
    return Entries(lines) if _is_of(next(lines, None), key, cores) else Entries()


def _replace(path: Path, head: dict[str, Any], entries: Entries) -> None:
    """Write a journal anew, so that a line torn by a kill does not swallow the next one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    write_blocks_durably(temporary, map(_line, chain([to_json(head, indent=None)], entries.data.values())))
    rename(temporary, path)
    sync_folder(path.parent)


def _line(text: bytes) -> bytes:
    return f"{Checksum([text.rstrip()]).text} ".encode() + text


def _parse_line(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    return json.loads(text) if checksum.decode("latin-1") == Checksum([text]).text else None


def _changed_input(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Return the first file that is not what it was, in words for the end of a sentence, or nothing."""
    for old, new in zip(before, now, strict=False):
        if old["path"] != new["path"]:
            return f" ({new['path']} instead of {old['path']})"
        for name in sorted(old["files"].keys() | new["files"].keys()):
            if old["files"].get(name) != new["files"].get(name):
                path = Path(new["path"])
                return f" ({path if path.name == name else path / name} has changed)"
    return ""
