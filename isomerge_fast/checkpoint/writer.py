"""Safetensors files written tensor by tensor, in any order, in bounded memory.

No maintained library writes the format incrementally. The header follows from names, dtypes and shapes alone, so it is
written first, with the file at its final size; every tensor then goes to its own offset. The order is safetensors' own
(wider dtypes first, then by name), so a finished file is byte for byte what ``safetensors.torch.save_file`` writes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import ResourceError
from .layout import DTYPE_NAMES, DTYPES, StoredTensor, element_count

# safetensors sorts by its own dtype ranking, widest first; equal widths have a fixed order as well.
_DTYPE_RANK = [
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
]  # fmt: skip


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return element_count(self.shape) * DTYPES[self.dtype].itemsize


def file_layout(path: Path, tensors: Iterable[OutputTensor]) -> tuple[bytes, dict[str, StoredTensor]]:
    """The first bytes of the file (length and header), and where each tensor will lie."""
    ordered = sorted(tensors, key=lambda tensor: (_DTYPE_RANK.index(tensor.dtype), tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        end = position + tensor.bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = {}
    for tensor in ordered:
        offsets = header[tensor.name]["data_offsets"]  # type: ignore[index]  # built just above
        placed[tensor.name] = StoredTensor(
            tensor.name, tensor.dtype, tensor.shape, path, start + offsets[0], start + offsets[1]
        )
    return struct.pack("<Q", len(text)) + text, placed


def tensor_bytes(value: Tensor) -> memoryview:
    """The tensor's bytes, without a copy when it is contiguous on the CPU."""
    flat = value.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def sha256(data: memoryview | bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class ShardWriter:
    """One safetensors file under construction."""

    def __init__(self, path: Path, tensors: Iterable[OutputTensor], *, resume: bool = False) -> None:
        self.path = path
        prefix, self.tensors = file_layout(path, tensors)
        self._total = max([len(prefix), *(tensor.end for tensor in self.tensors.values())])
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if resume else os.O_TRUNC)
        self._descriptor = os.open(path, flags, 0o666)
        try:
            os.ftruncate(self._descriptor, self._total)
            self._write_at(memoryview(prefix), 0)
        except OSError as error:
            os.close(self._descriptor)
            raise _resource_error(path, error) from error

    def write(self, name: str, value: Tensor) -> str:
        """Writes one tensor; returns the SHA-256 of its bytes."""
        stored = self.tensors[name]
        assert (DTYPE_NAMES[value.dtype], tuple(value.shape)) == (stored.dtype, stored.shape), name
        data = tensor_bytes(value)
        try:
            self._write_at(data, stored.start)
        except OSError as error:
            raise _resource_error(self.path, error) from error
        return sha256(data)

    def checksum(self, name: str) -> str:
        """SHA-256 of the tensor's bytes as they are in the file now."""
        stored = self.tensors[name]
        digest, position = hashlib.sha256(), stored.start
        while position < stored.end:
            block = os.pread(self._descriptor, min(1 << 24, stored.end - position), position)
            if not block:
                break
            digest.update(block)
            position += len(block)
        return digest.hexdigest()

    def close(self, *, validate: bool) -> None:
        """Ends the file; with ``validate`` it is on disk and safetensors has opened it, else it is left as it is."""
        try:
            if validate:
                os.fsync(self._descriptor)
        except OSError as error:
            raise _resource_error(self.path, error) from error
        finally:
            os.close(self._descriptor)
        if validate:
            with safe_open(self.path, framework="np") as opened:
                assert set(opened.keys()) == set(self.tensors), self.path

    def _write_at(self, data: memoryview, offset: int) -> None:
        position = 0
        while position < len(data):
            position += os.pwrite(self._descriptor, data[position : position + (1 << 26)], offset + position)


def _resource_error(path: Path, error: OSError) -> ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{path}: no space left while writing; free some and run again with --resume")
    return ResourceError(f"{path}: cannot be written ({error.strerror})")


def write_durably(path: Path, data: bytes) -> None:
    """A small file, complete and on disk when this returns."""
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _resource_error(path, error) from error


def sync_folder(path: Path) -> None:
    """Makes the folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
