"""Define and read ``manifest.json``: what an output was made of, and the checksum of everything in it.

It holds no times or random names, so the same merge gives the same bytes. Its last key is the checksum of its own text;
the report, which does hold times, ends in the same way and says which manifest it belongs to.
"""

from __future__ import annotations

import hashlib
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NotRequired, TypedDict

from ...errors import InputError, VerificationError
from ...parsing.json_types import check
from ..io.checksum import Checksum
from ..io.direct_io import disk_blocks
from ..layout import Checkpoint
from .json_files import read_with_digest, to_json

MANIFEST_FILE, REPORT_FILE = "manifest.json", "report.json"
FORMAT = 3


class InputFile(TypedDict):
    """Record the ``FileIdentity`` of a file of an input."""

    size: int
    mtime_ns: int
    header_sha256: str


class Input(TypedDict):
    """Record a checkpoint or adapter that was merged."""

    path: str
    files: dict[str, InputFile]


class Description(TypedDict):
    """Record all that decides an output's bytes. ``config`` is a ``MergeConfig`` without its paths."""

    tool: str
    version: str
    torch: str
    device: str
    config: dict[str, Any]
    solvers: list[str]
    inputs: list[Input]


class FileEntry(TypedDict):
    """Record a file other than weights: its size, and the checksum of all of it."""

    bytes: int
    checksum: str


class ShardEntry(TypedDict):
    """Record a file of weights: its size and the hash of its header. Its tensors have checksums of their own."""

    bytes: int
    header_sha256: str


class TensorEntry(TypedDict):
    """Record a tensor of an output, and the file that it lies in."""

    file: str
    action: str
    dtype: str
    shape: list[int]
    checksum: str


class Output(TypedDict):
    """Record a sub-folder of the output; ``scaling`` is None for that of the kept Δ."""

    scaling: float | None
    tensors: dict[str, TensorEntry]


class Manifest(TypedDict):
    """Record an output.

    ``files`` and ``shards`` are all files of the output but this one and the report, by ``file_name``. ``base``, where
    Δ is kept, has the checksums of the base's tensors, for ``apply``.
    """

    format: int
    checksum: str
    description: Description
    outputs: dict[str, Output]
    files: dict[str, FileEntry]
    shards: dict[str, ShardEntry]
    base: NotRequired[dict[str, str]]
    digest: NotRequired[str]


def describe_inputs(checkpoints: Iterable[Checkpoint]) -> list[dict[str, Any]]:
    """Return the absolute path and the file identities of each checkpoint."""
    return [
        {
            "path": str(checkpoint.path.absolute()),
            "files": {path.name: identity.recorded for path, identity in sorted(checkpoint.files.items())},
        }
        for checkpoint in checkpoints
    ]


def fingerprint(description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a merge's canonical JSON and of the format's number: an unfinished merge needs the same."""
    return hashlib.sha256(to_json({"format": FORMAT, **description}, indent=None)).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a finished output, as the merge wrote it.

    It raises InputError where there is none, and VerificationError where this version cannot read it or it was changed.
    """
    manifest, flaw = examine_manifest(folder)
    if flaw is not None:
        raise VerificationError(flaw)
    return manifest


def examine_manifest(folder: Path) -> tuple[Manifest, str | None]:
    """Return a manifest of sound structure, and what is wrong with its digest, if anything."""
    path = folder / MANIFEST_FILE
    if not os.path.isfile(path):  # of a name that is too long, too
        raise no_output(folder, MANIFEST_FILE)
    value, flaw = read_with_digest(path)
    number = value.get("format")
    if type(number) is int and 0 < number < FORMAT:
        raise VerificationError(
            f"{path}: of format {number}, and this version reads {FORMAT}: written by an older version, whose outputs "
            "it cannot vouch for; merge again"
        )
    if type(number) is not int or number != FORMAT:
        raise VerificationError(f"{path}: not a manifest of format {FORMAT}")
    try:
        check(value, Manifest, "manifest")
        _check_agreement(typing.cast(Manifest, value))
    except ValueError as error:
        raise VerificationError(f"{path}: not a manifest ({error})") from error
    return typing.cast(Manifest, value), flaw


def no_output(folder: Path, missing: str) -> InputError:
    """Return the error of a folder without manifest or report; it names the output that the folder is a part of."""
    parent = folder.absolute().parent
    if os.path.exists(folder) and os.path.isfile(parent / missing):
        shown = folder.parent if folder.name and folder.parent != folder else parent
        return InputError(f"{folder}: no {missing}; a part of the output in {shown}, which has it: give that folder")
    return InputError(f"{folder}: no {missing}; not the output of a finished merge")


def _check_agreement(manifest: Manifest) -> None:
    """Raise ValueError where parts of a manifest contradict each other."""
    if not manifest["outputs"]:
        raise ValueError("it lists no outputs")
    if len(manifest["description"]["inputs"]) < 2:
        raise ValueError("it does not name a base and an expert")
    if any("\0" in recorded["path"] for recorded in manifest["description"]["inputs"]):
        raise ValueError("an input's path holds NUL")
    outputs = manifest["outputs"].items()
    used = {file_name(folder, each["file"]) for folder, output in outputs for each in output["tensors"].values()}
    for name in sorted(used ^ manifest["shards"].keys()):
        raise ValueError(f"{name!r} is {'no shard' if name in used else 'a shard without tensors'}")


def list_output(folder: Path, manifest: Manifest) -> tuple[dict[str, Path], list[str]]:
    """Return the files that the merge wrote and that are there, by ``file_name``, and the names of everything else.

    Links to folders are not followed. A folder that the merge did not write is named without its contents.
    """
    known = {*manifest["files"], *manifest["shards"], MANIFEST_FILE, REPORT_FILE}
    parents = {parent.as_posix() for name in known for parent in PurePosixPath(name).parents}
    found: dict[str, Path] = {}
    unknown: list[str] = []

    def unlisted(error: OSError) -> None:
        unknown.append(f"{os.path.relpath(error.filename, folder)} (a folder that cannot be listed)")

    for parent, folders, names in os.walk(folder, onerror=unlisted):
        within = os.path.relpath(parent, folder)
        place = "" if within == "." else within
        for name in [*names, *folders]:
            path, own = Path(parent, name), file_name(place, name)
            if own in known:
                found[own] = path
            elif name in names or own not in parents or path.is_symlink():
                unknown.append(own)
        folders[:] = [name for name in folders if file_name(place, name) in parents]
    return found, sorted(unknown)


def file_name(folder: str, name: str) -> str:
    r"""Return the name that the manifest gives a file: relative to the output, with \xff for a byte that is no text."""
    whole = (f"{folder}/{name}" if folder else name).replace("\\", "\\\\")
    return whole.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def file_entry(path: Path) -> FileEntry:
    """Return the manifest's entry of a file as it is on its disk."""
    return entry_of(Checksum(disk_blocks(path)))


def entry_of(content: Checksum) -> FileEntry:
    """Return the manifest's entry of a file with this content."""
    return {"bytes": content.bytes, "checksum": content.text}
