"""``manifest.json``: what an output was made of and the checksum of every tensor in it.

It holds no times or random names, so the same merge gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, VerificationError
from .layout import Checkpoint, parse_json

MANIFEST_FILE = "manifest.json"
FORMAT = 2


def describe_inputs(checkpoints: Iterable[Checkpoint]) -> list[dict[str, Any]]:
    """Absolute path and file identities of each checkpoint, the base first."""
    return [
        {
            "path": str(checkpoint.path.absolute()),
            "files": {path.name: identity.recorded for path, identity in sorted(checkpoint.files.items())},
        }
        for checkpoint in checkpoints
    ]


def fingerprint(description: Mapping[str, Any]) -> str:
    """What must be equal for an unfinished merge to go on: SHA-256 of its canonical JSON."""
    return hashlib.sha256(to_json(description, indent=None)).hexdigest()


def to_json(value: Any, indent: int | None = 1) -> bytes:
    """``value`` as JSON, the same bytes every time. ValueError where it holds NaN or Infinity, which JSON has not."""
    return (json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


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


def listed_files(manifest: Mapping[str, Any]) -> frozenset[str]:
    """Return the relative names of all files that the merge wrote, the manifest and the report among them."""
    return frozenset(manifest["files"])
