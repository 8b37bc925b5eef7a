"""Read where every tensor of a checkpoint lies: safetensors headers, shard indexes and Hugging Face folders.

Headers are checked here more strictly than the format's own parser does (duplicate keys, control characters, absurd
sizes), and then once more by safetensors itself. Weights are never read, and pickles never opened.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import sys
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import InputError, shown
from ..parsing.file_formats import HEAD_BYTES, other_format
from ..parsing.regular_files import open_regular, read_regular
from ..parsing.strict_json import MAX_INDEXED, parse_json, parse_settings
from .folder import list_folder, read_own, unreadable_refused
from .wrong_paths import explain_missing, explain_no_weights, explain_other_file, explain_several

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
# Tensors with a row for every token.
TOKEN_TABLES = re.compile(r"(embed|lm_head|wte|output\.weight$|shared\.weight$)")
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 250_000  # a file; the largest real checkpoints hold about 150,000 in all their shards
MAX_VALUES = 12 * MAX_TENSORS  # in the header of a file: a tensor of four dimensions has eleven
MAX_INDEX_BYTES = 32_000_000  # the largest real ones have under 20,000,000
MAX_SETTINGS_BYTES = 16_000_000  # rank_pattern may name every module of a model, and that is all that grows
MAX_NAME_CHARACTERS = 1_000  # of a tensor
MAX_FILE_NAME_BYTES = 255  # of most file systems
HASHED_BYTES = 1 << 20  # at once
MAX_DIMS = 64  # torch's and numpy's own limit
LARGE_HEADER_BYTES = 16_000_000  # above this a header may be a tenth of its file at most

# By the names in headers, manifests and messages.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Integers and booleans.
COPIED_DTYPES = frozenset(dtype for dtype in DTYPES.values() if not dtype.is_floating_point and not dtype.is_complex)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """Describe a tensor by its name, dtype and shape."""

    name: str
    dtype: torch.dtype  # one of DTYPES
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize  # asked for dozens of times a tensor


@dataclass(frozen=True, slots=True)
class StoredTensor(OutputTensor):
    """Locate a tensor in a file: ``bytes`` at absolute offset ``start``, up to ``end``.

    A merge holds one for every tensor of every checkpoint, so that names and shapes are shared (``_parse_entry``).
    """

    file: Path
    start: int

    @property
    def end(self) -> int:
        return self.start + self.bytes

    def name_at(self, position: int) -> str:
        """Return which tensor the byte at an offset of the file is of: this one, where it is not several."""
        del position
        return self.name


@dataclass(frozen=True)
class FileIdentity:
    """Identify a file by its size, its modification time and the hash of its header."""

    size: int
    mtime_ns: int
    header_sha256: str
    # What the kernel alone sets, so that another file of the same size and time is recognised too. It holds for this
    # process only: copying a file or changing its mode does not make another input of it, and a network file system may
    # give other stamps on every machine. So it is never recorded or pickled.
    stamp: tuple[int, ...] | None = field(default=None, compare=False, repr=False)
    # Of the header, which the hash covers. It is not pickled either.
    metadata: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, status: os.stat_result, header_sha256: str, metadata: Mapping[str, str] | None = None) -> FileIdentity:
        return cls(status.st_size, status.st_mtime_ns, header_sha256, _stamp(status), dict(metadata or {}))

    def __reduce__(self) -> tuple[Any, ...]:
        return FileIdentity, (self.size, self.mtime_ns, self.header_sha256)

    @property
    def recorded(self) -> dict[str, Any]:
        """Return what a later process may compare with."""
        return {"size": self.size, "mtime_ns": self.mtime_ns, "header_sha256": self.header_sha256}

    def is_of(self, status: os.stat_result) -> bool:
        """Return whether a file has this size, modification time and stamp; the header is not read."""
        same = (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)
        return same and self.stamp in (None, _stamp(status))


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Return ctime, and inode and device of files on a disk. (FUSE renumbers files that it has forgotten.)"""
    place = (status.st_ino, status.st_dev) if os.major(status.st_dev) else ()
    return (status.st_ctime_ns, *place)


@dataclass(frozen=True)
class Checkpoint:
    """Hold a checkpoint's tensors by name, its files with their identities, and the ``config.json`` of a folder."""

    path: Path
    tensors: dict[str, StoredTensor]
    files: dict[Path, FileIdentity]
    config: dict[str, Any] | None = field(default=None, compare=False)
    index_name: str | None = None  # of the index file, when the folder has one
    names: tuple[str, ...] = field(default=(), compare=False, repr=False)  # of everything in the folder

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def stored_tensors(self) -> int:
        """Return the number of tensors in its files."""
        return len(self.tensors)

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()


def read_header(path: Path) -> tuple[dict[str, StoredTensor], FileIdentity]:
    """Read the header of a safetensors file strictly: every byte after it has to belong to exactly one tensor."""
    with unreadable_refused(path):
        descriptor, status = open_regular(path)
        with open(descriptor, "rb") as file:
            prefix = file.read(8) if status.st_size >= 8 else b""  # files of /proc, which have no size, may wait
            if len(prefix) < 8:
                raise InputError(f"{path}: {status.st_size} bytes, too short for a safetensors file")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > MAX_HEADER_BYTES:
                instead = other_format(prefix + file.read(HEAD_BYTES - len(prefix)))
                why = f", but {instead}" if instead else f" (its header would be {header_bytes} bytes long)"
                raise InputError(f"{path}: not a safetensors file{why}")
            if 8 + header_bytes > status.st_size:
                raise InputError(f"{path}: truncated, {status.st_size} bytes hold no header of {header_bytes}")
            if header_bytes > LARGE_HEADER_BYTES and header_bytes * 10 > status.st_size:
                raise InputError(f"{path}: the header is {header_bytes} of {status.st_size} bytes; refused")
            raw = file.read(header_bytes)
    header_sha256 = hashlib.sha256(prefix + raw).hexdigest()
    header = parse_json(raw, f"{path}: header", most_values=MAX_VALUES)
    del raw
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise InputError(f"{path}: {len(header)} tensors in one file; refused above {MAX_TENSORS}")
    data_start = 8 + header_bytes
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    entries = (_parse_entry(path, name, entry, data_start, shapes) for name, entry in header.items())
    tensors = {tensor.name: tensor for tensor in entries}
    _check_places(path, tensors, data_start, status.st_size)
    try:
        descriptor, _ = open_regular(path)  # safetensors itself would wait for a FIFO that is there by now
        with open(descriptor, "rb"), safe_open(f"/dev/fd/{descriptor}", framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: refused by safetensors ({error})") from error
    return tensors, FileIdentity.of(status, header_sha256, metadata)  # texts alone, as safetensors has checked


def _check_places(path: Path, tensors: Mapping[str, StoredTensor], data_start: int, file_bytes: int) -> None:
    """Refuse tensors that overlap, and bytes that belong to none."""
    position = data_start
    for start, end, name in sorted((tensor.start, tensor.end, name) for name, tensor in tensors.items()):
        if start != position:
            flaw = "overlaps the tensor before it" if start < position else "leaves a hole before it"
            raise InputError(f"{path}: tensor {name!r} {flaw} (offset {start}, expected {position})")
        position = end
    if position != file_bytes:
        flaw = "truncated" if position > file_bytes else "has trailing bytes"
        raise InputError(f"{path}: {flaw}: the header describes {position} bytes, the file has {file_bytes}")


def hash_header(descriptor: int) -> str:
    """Return the SHA-256 of the length field and header of an open safetensors file, read in blocks."""
    running = hashlib.sha256(prefix := os.pread(descriptor, 8, 0))
    position, end = len(prefix), len(prefix) + int.from_bytes(prefix, "little")
    while position < end and (block := os.pread(descriptor, min(HASHED_BYTES, end - position), position)):
        running.update(block)
        position += len(block)
    return running.hexdigest()


def _parse_entry(
    path: Path, name: str, entry: Any, data_start: int, shapes: dict[tuple[int, ...], tuple[int, ...]]
) -> StoredTensor:
    """Check a header entry and return its tensor. To save memory, equal names and equal ``shapes`` are one object."""
    if len(name) > MAX_NAME_CHARACTERS:
        raise InputError(
            f"{path}: tensor {shown(name)} has a name of {len(name)} characters; refused above {MAX_NAME_CHARACTERS}"
        )
    if not name or _CONTROLS.search(name):
        raise _refused(path, name, "empty name or control characters in it")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise _refused(path, name, "its header entry needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        packed = isinstance(dtype, str) and dtype.startswith(("F8_", "F6_", "F4"))
        hint = "; weights that are quantized are dequantized and saved in float first" if packed else ""
        raise _refused(path, name, f"dtype {shown(dtype)} is not supported{hint}")
    if not isinstance(shape, list) or not _are_whole(shape, 2**48):
        raise _refused(path, name, f"shape {shown(shape)} is not a list of sizes")
    if len(shape) > MAX_DIMS:
        raise _refused(path, name, f"{len(shape)} dimensions; refused above {MAX_DIMS}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_whole(offsets, 2**56):
        raise _refused(path, name, f"data_offsets {shown(offsets)} are not two offsets")
    expected = prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise _refused(
            path, name, f"{dtype}{shape} takes {expected} bytes, its data_offsets {offsets} span another size"
        )
    shared = shapes.setdefault(tuple(shape), tuple(shape))
    return StoredTensor(sys.intern(name), DTYPES[dtype], shared, path, data_start + offsets[0])


def _refused(path: Path, name: str, flaw: str) -> InputError:
    return InputError(f"{path}: tensor {name!r}: {flaw}")


def _are_whole(values: list[Any], bound: int) -> bool:
    """Return whether all are integers from 0 to below ``bound``."""
    return all([type(value) is int and 0 <= value < bound for value in values])  # noqa: C419  # half a generator's time


def find_index(folder: Path, names: Collection[str]) -> Path | None:
    """Return ``model.safetensors.index.json``, or the one index of another name (diffusers has its own), or None."""
    if INDEX_FILE in names:
        return folder / INDEX_FILE
    others = [name for name in names if name.endswith(".safetensors.index.json")]
    if len(others) > 1:
        raise InputError(f"{folder}: several indexes ({', '.join(others[:5])}) and no {INDEX_FILE}")
    return folder / others[0] if others else None


def weight_files(folder: Path, names: Sequence[str]) -> tuple[list[Path], Path | None, dict[str, str]]:
    """Return the safetensors files of a folder with these ``names``, its index, and the ``weight_map`` of the index.

    Shards are looked up by name (hub caches are links into ``blobs/``), so names must be plain. A file that is listed
    and cannot be opened is an error: nothing takes its place.
    """
    index = find_index(folder, names)
    if index is not None:
        weight_map = _read_index(index)
        shards = sorted(set(weight_map.values()))
        check_shard_names(index, shards)
        missing = next((shard for shard in shards if shard not in names), None)
        if missing is not None:
            raise InputError(f"{index}: shard {missing!r} is missing from {folder}")
        if SINGLE_FILE in names and SINGLE_FILE not in shards:
            raise InputError(f"{folder}: holds both {SINGLE_FILE} and {index.name}; remove the one that is stale")
        return [folder / shard for shard in shards], index, weight_map
    if SINGLE_FILE in names:
        return [folder / SINGLE_FILE], None, {}
    others = [name for name in names if name.endswith(".safetensors")]
    if len(others) == 1:
        check_shard_names(folder, others)
        return [folder / others[0]], None, {}
    raise InputError(explain_several(folder, names, others) if others else explain_no_weights(folder, names))


def _read_index(index: Path) -> dict[str, str]:
    """Return the ``weight_map`` of an index."""
    with unreadable_refused(index):
        data, _ = read_regular(index, MAX_INDEX_BYTES)
    parsed = parse_json(data, str(index), most_values=MAX_INDEXED)
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{index}: no weight_map of tensor names to shard names")
    return weight_map


def check_shard_names(where: Path, shards: Iterable[str]) -> None:
    """Raise InputError where a shard's name leaves its folder, or cannot be a shard's name in the output.

    The output's shards have the names of the base's. They end in .safetensors, as no other file of an output does, and
    differ in more than case or Unicode's form, which some file systems ignore.
    """
    known: dict[str, str] = {}
    for shard in shards:
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard or not shard.isprintable():
            raise InputError(f"{where}: shard {shown(shard)} is not a plain file name; refused")
        if not shard.endswith(".safetensors"):
            raise InputError(f"{where}: shard {shown(shard)} does not end in .safetensors; refused")
        if len(os.fsencode(shard)) > MAX_FILE_NAME_BYTES:
            raise InputError(f"{where}: shard {shown(shard)} has a name of over {MAX_FILE_NAME_BYTES} bytes; refused")
        other = known.setdefault(unicodedata.normalize("NFC", shard).casefold(), shard)
        if other != shard:
            raise InputError(f"{where}: shards {other!r} and {shard!r} are one file where case is not told; refused")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face folder (one file or sharded) or a bare ``.safetensors`` file; read headers only.

    An InputError names the path, shard, index or header that is missing or malformed.
    """
    root = Path(path)
    try:
        is_folder = stat.S_ISDIR(os.stat(root).st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(explain_missing(root)) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a name that a file can have"
        raise InputError(f"{shown(str(root))}: cannot be opened ({reason})") from error
    names = list_folder(root) if is_folder else []
    if is_folder:
        files, index, weight_map = weight_files(root, names)
    elif root.suffix == ".safetensors":
        files, index, weight_map = [root], None, {}
    else:
        raise InputError(explain_other_file(root))

    tensors: dict[str, StoredTensor] = {}
    identities: dict[Path, FileIdentity] = {}
    for file in files:
        found, identities[file] = read_header(file)
        for name in found:
            if name in tensors:
                raise InputError(f"{root}: tensor {name!r} is in both {tensors[name].file.name} and {file.name}")
        tensors |= found
    if index is not None:
        for name, shard in weight_map.items():
            if name not in tensors or tensors[name].file.name != shard:
                raise InputError(f"{root}: the index puts tensor {shown(name)} into {shard}, where it is not")
        for name in sorted(tensors.keys() - weight_map.keys()):
            raise InputError(f"{root}: the index does not list tensor {name!r} of {tensors[name].file.name}")
    config = None
    if "config.json" in names:
        data, _ = read_own(root, "config.json", MAX_SETTINGS_BYTES)
        config = parse_settings(data, str(root / "config.json"), as_python=True)
    return Checkpoint(root, tensors, identities, config, index.name if index is not None else None, tuple(names))
