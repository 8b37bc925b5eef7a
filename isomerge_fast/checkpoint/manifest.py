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
from .layout import Checkpoint, parse_json

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
    """One line a finished tensor, in a file beside the staged output. Lines are claims: resuming checks the bytes."""

    def __init__(self, path: Path, key: str, *, resume: bool) -> None:
        self.finished: dict[str, dict[str, Any]] = {}
        lines = path.read_bytes().splitlines() if resume and path.is_file() else []
        if lines and _parse_line(lines[0]) == {"fingerprint": key}:
            for line in lines[1:]:
                entry = _parse_line(line)
                if entry is not None and "name" in entry:
                    self.finished[entry["name"]] = entry
        elif lines:
            raise ConfigError(
                f"{path.parent}: the unfinished merge was of other inputs, options or versions; "
                "run with --overwrite to discard it"
            )
        # Rewritten, so that a line torn by a kill does not swallow the next one.
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        for entry in [{"fingerprint": key}, *self.finished.values()]:
            self._append(entry)

    def add(self, entry: dict[str, Any]) -> None:
        self.finished[entry["name"]] = entry
        self._append(entry)

    def close(self) -> None:
        self._file.close()

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(to_json(entry, indent=None))
        self._file.flush()


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
