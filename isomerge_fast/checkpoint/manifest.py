"""``manifest.json``: what an output was made of and the checksum of every tensor in it; and the journal of a running
merge.

Neither holds times or random names, so the same merge gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, InputError, VerificationError
from .checksum import Checksum
from .layout import Checkpoint, parse_json
from .writer import rename, sync_folder, write_durably

MANIFEST_FILE = "manifest.json"
FORMAT = 2


def describe_inputs(checkpoints: Iterable[Checkpoint]) -> list[dict[str, Any]]:
    """Absolute path and file identities of each checkpoint, the base first."""
    return [
        {
            "path": str(checkpoint.path.absolute()),
            "files": {path.name: dataclasses.asdict(identity) for path, identity in sorted(checkpoint.files.items())},
        }
        for checkpoint in checkpoints
    ]


def fingerprint(description: Mapping[str, Any]) -> str:
    """What must be equal for an unfinished merge to go on: SHA-256 of its canonical JSON."""
    return hashlib.sha256(to_json(description, indent=None)).hexdigest()


def to_json(value: Any, indent: int | None = 1) -> bytes:
    return (json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished output.

    Raises:
        InputError: no such folder or no manifest in it.
        VerificationError: a manifest that this version cannot read.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise InputError(f"{folder}: no {MANIFEST_FILE}; not the output of a finished merge")
    try:
        manifest = parse_json(path.read_bytes(), str(path))
    except InputError as error:
        raise VerificationError(str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise VerificationError(f"{path}: not a manifest of format {FORMAT}")
    return manifest


class Journal:
    """One line a finished tensor, in a file beside the staged output. Lines are claims: resuming checks the bytes.

    Every line begins with its own checksum. The first tells of what the merge is.

    Args:
        key: ``fingerprint`` of the merge; ``inputs`` of it, to name the one that has changed.
        threads: with which this run would compute. LAPACK's last digits depend on their number, so a merge goes on with
            that which it began with: attribute ``threads``.
        resume: go on with what is there.
        overwrite: discard what is of another merge, instead of refusing it.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        inputs: list[dict[str, Any]],
        *,
        threads: int,
        resume: bool,
        overwrite: bool = False,
    ) -> None:
        self.threads = threads
        self.finished: dict[str, dict[str, Any]] = {}
        lines = path.read_bytes().splitlines() if resume and path.is_file() else []
        first = _parse_line(lines[0]) if lines else None  # without it nothing is known of the rest
        if first is not None and first.get("fingerprint") == key:
            entries = [entry for line in lines[1:] if (entry := _parse_line(line)) is not None]
            self.threads = first["threads"]
            self.finished = {entry["name"]: entry for entry in entries}
        elif first is not None and not overwrite:
            changed = "".join(f" ({what})" for what in _changed_inputs(first.get("inputs", []), inputs))
            raise ConfigError(
                f"{path.parent}: the unfinished merge was of other inputs, options or versions{changed}; "
                "run with --overwrite to discard it"
            )
        # Rewritten, so that a line torn by a kill does not swallow the next one.
        written = [{"fingerprint": key, "inputs": inputs, "threads": self.threads}, *self.finished.values()]
        temporary = path.with_name(f"{path.name}.new")
        write_durably(temporary, b"".join(_line(entry) for entry in written))
        rename(temporary, path)
        sync_folder(path.parent)
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()

    def add(self, entry: dict[str, Any]) -> None:
        self.finished[entry["name"]] = entry
        self._file.write(_line(entry))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(entry: dict[str, Any]) -> bytes:
    text = to_json(entry, indent=None)
    return f"{_checksum(text.rstrip())} ".encode() + text


def _parse_line(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    return json.loads(text) if checksum.decode("latin-1") == _checksum(text) else None


def _checksum(text: bytes) -> str:
    running = Checksum()
    running.update(text)
    return running.text


def _changed_inputs(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """The first file that is not what it was, in words."""
    for old, new in zip(before, now, strict=False):
        if old["path"] != new["path"]:
            return [f"{new['path']} instead of {old['path']}"]
        for name in sorted(old["files"].keys() | new["files"].keys()):
            if old["files"].get(name) != new["files"].get(name):
                path = Path(new["path"])
                return [f"{path if path.name == name else path / name} has changed"]
    return []
