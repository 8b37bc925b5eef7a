"""Verify a finished output: every byte of every file against its manifest, and a sample of tensors recomputed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..checkpoint.io.direct_io import open_on_disk
from ..checkpoint.io.read_ahead import THREADS, Bundle, InputChecksums, ReadAhead
from ..checkpoint.io.reader import Reader, files_of, whole
from ..checkpoint.layout import DTYPE_NAMES, Checkpoint, StoredTensor, read_header
from ..checkpoint.output.manifest import (
    MANIFEST_FILE,
    REPORT_FILE,
    FileEntry,
    Manifest,
    TensorEntry,
    examine_manifest,
    file_entry,
    file_name,
    list_output,
)
from ..errors import ConfigError, InputChangedError, InputError, UnreadableError, VerificationError, first_of, shown
from ..methods import origins_of
from ..parsing.values import path_text, whole_number
from .finalize import config_of, read_report
from .recompute import Verification, recompute

# Checksums are made of parts of so many bytes, and this many are read ahead.
PART_BYTES, READ_AHEAD_BYTES = 16 << 20, 64 << 20


def verify(folder: str | os.PathLike[str], *, samples: int = 4, seed: int = 0) -> Verification:
    """Verify the output in ``folder``: every file of it, and that nothing else is in it.

    Files are read from the disk and not from the page cache, in which a page whose writing failed looks as if it were
    written.

    Args:
        samples: tensors to recompute in float64 by full SVD from the recorded inputs (0: checksums only).
        seed: of the choice of samples.

    Raises:
        ConfigError: a number of samples below zero, or no number.
        InputError: no finished output there.
        VerificationError: a file or tensor that is missing, was added or changed, or that is not what its inputs give;
            ``problems`` names them.
    """
    root = Path(path_text(folder, "folder", "the output of a merge"))
    samples, seed = whole_number(samples, "samples", 0), whole_number(seed, "seed")
    manifest, flaw = examine_manifest(root)
    problems = [] if flaw is None else [flaw]
    listing, unknown = list_output(root, manifest)
    problems += [f"{root / name}: was added" for name in unknown]
    config = None
    try:
        config = config_of(manifest)
    except ConfigError as error:
        problems.append(f"{root / MANIFEST_FILE}: not the manifest of a merge ({error})")
    problems += _report_problems(root, None if flaw else manifest.get("digest"))
    problems += [
        problem
        for name, entry in manifest["files"].items()
        for problem in _file_problems(root / name, listing.get(name), entry)
    ]
    outputs = {name: Checkpoint(root / name, {}, {}) for name in manifest["outputs"]}
    for name, (folder_name, tensors) in _shards(manifest).items():
        sha256 = manifest["shards"][name]["header_sha256"]
        problems += _shard_problems(root / name, listing.get(name), sha256, tensors, outputs[folder_name])
    result = Verification(
        str(root),
        sum(len(output.tensors) for output in outputs.values()),
        sum(output.bytes for output in outputs.values()),
        len(listing),
    )
    if config is not None:
        recorded, here = manifest["description"].get("methods", {}), origins_of(config.methods)
        if recorded != here:
            result.remarks.append(f"methods from outside were {shown(recorded)}, and are {shown(here)} here")
    if not problems and samples:
        assert config is not None
        problems += recompute(root, manifest, config, outputs, samples, seed, result)
    if problems:
        raise VerificationError(f"{root}: {len(problems)} problem(s)", first_of(problems))
    return result


def _report_problems(root: Path, digest: str | None) -> Iterator[str]:
    """Yield the problems of the report. ``digest``: of the manifest, or None where that was changed."""
    try:
        _, own = read_report(root)
    except InputError:
        yield f"{root / REPORT_FILE}: is missing"
    except VerificationError as error:
        yield str(error)
    else:
        if digest is not None and own != digest:
            yield f"{root / REPORT_FILE}: is the report of another merge"


def _file_problems(path: Path, found: Path | None, entry: FileEntry) -> Iterator[str]:
    """Yield the problem of a file that holds no weights, if it has one."""
    if found is None:
        yield f"{path}: is missing"
        return
    try:
        now = file_entry(found)
    except OSError as error:
        yield f"{path}: cannot be read ({error.strerror})"
        return
    if now["bytes"] != entry["bytes"]:
        yield f"{path}: has {now['bytes']} bytes, and was written with {entry['bytes']}"
    elif now["checksum"] != entry["checksum"]:
        yield f"{path}: is not what was written (checksum differs)"


def _shards(manifest: Manifest) -> dict[str, tuple[str, dict[str, TensorEntry]]]:
    """Return the files of weights by name, each with its sub-folder of the output and its tensors."""
    shards: dict[str, tuple[str, dict[str, TensorEntry]]] = {}
    for folder, output in manifest["outputs"].items():
        for tensor, entry in output["tensors"].items():
            _, tensors = shards.setdefault(file_name(folder, entry["file"]), (folder, {}))
            tensors[tensor] = entry
    return shards


def _shard_problems(
    path: Path, found: Path | None, header_sha256: str, recorded: Mapping[str, TensorEntry], output: Checkpoint
) -> Iterator[str]:
    """Yield the problems of a file of weights; add its tensors to ``output``."""
    if found is None:
        yield f"{path}: is missing, and with it {len(recorded)} tensor(s)"
        return
    try:
        os.close(open_on_disk(found))
        tensors, identity = read_header(found)
    except OSError as error:
        yield f"{path}: cannot be read ({error.strerror})"
        return
    except InputError as error:
        yield str(error)
        return
    problems = [*_layout_problems(path, tensors, recorded)]
    if identity.header_sha256 != header_sha256 and not problems:
        problems.append(f"{path}: its header is not what was written (its metadata, or the order of its tensors)")
    yield from problems
    present = [tensors[name] for name in recorded if name in tensors]
    part = Checkpoint(output.path, tensors, {found: identity})
    try:
        for stored, checksum in zip(present, _checksums(part, present), strict=True):
            if checksum != recorded[stored.name]["checksum"]:
                yield f"{path}: tensor {stored.name!r} is not what was written (checksum differs)"
    except (InputChangedError, UnreadableError) as error:
        yield f"{path}: cannot be read ({getattr(error.__cause__, 'strerror', None) or error})"
    output.tensors.update(tensors)
    output.files[found] = identity


def _layout_problems(
    path: Path, found: Mapping[str, StoredTensor], recorded: Mapping[str, TensorEntry]
) -> Iterator[str]:
    """Yield how a file's header differs from the tensors that are recorded of it."""
    for name, entry in recorded.items():
        stored = found.get(name)
        if stored is None:
            yield f"{path}: tensor {name!r} is missing"
        elif (dtype := DTYPE_NAMES[stored.dtype], list(stored.shape)) != (entry["dtype"], entry["shape"]):
            yield (
                f"{path}: tensor {name!r} is {dtype}{list(stored.shape)}, "
                f"and was written as {entry['dtype']}{entry['shape']}"
            )
    for name in sorted(found.keys() - recorded.keys()):
        yield f"{path}: tensor {name!r} was added"


def _checksums(checkpoint: Checkpoint, tensors: Sequence[StoredTensor]) -> Iterator[str]:
    """Yield the checksum of each tensor as it is in its file, read ahead in parts."""
    bundles = [Bundle((whole(stored),)) for stored in tensors]
    checksums, most = InputChecksums(tensors), READ_AHEAD_BYTES
    with (
        Reader(files_of(checkpoint)) as reader,
        ThreadPoolExecutor(THREADS) as threads,
        ReadAhead(reader, threads, bundles, budget_bytes=most, part_bytes=PART_BYTES, checksums=checksums) as ahead,
    ):
        for stored, bundle in zip(tensors, bundles, strict=True):
            for _ in bundle.parts(PART_BYTES):
                ahead.take()
            yield checksums.take(stored)
