"""Tensors by positioned reads, one at a time, into memory of their own; nothing is mapped or stays resident."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ..errors import InputError
from .layout import DTYPES, Checkpoint, FileIdentity, StoredTensor

READ_BYTES = 1 << 26  # one system call reads at most 2 GiB; 64 MiB keeps interrupts prompt


class Reader:
    """Open files of one or more checkpoints; a context manager. Files changed since they were planned are refused."""

    def __init__(self, *checkpoints: Checkpoint) -> None:
        self._identities: dict[Path, FileIdentity] = {}
        for checkpoint in checkpoints:
            self._identities.update(checkpoint.files)
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, stored: StoredTensor, rows: slice | None = None) -> Tensor:
        """The tensor, or some rows of it, in a fresh CPU tensor of its own dtype.

        Args:
            rows: ``slice(start, stop)`` along the first dimension.

        Raises:
            InputError: the file changed since it was planned, ended early, or failed to read.
        """
        start, size, shape = stored.start, stored.bytes, stored.shape
        if rows is not None:
            row_bytes = stored.bytes // stored.shape[0]
            start, size = start + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes
            shape = (rows.stop - rows.start, *shape[1:])
        data = torch.empty(size, dtype=torch.uint8, device="cpu")
        view = data.numpy().data
        position = 0
        try:
            descriptor = self._open(stored.file)
            while position < size:
                block = view[position : position + READ_BYTES]
                count = os.preadv(descriptor, [block], start + position)
                if count == 0:
                    raise InputError(f"{stored.file}: ends inside tensor {stored.name!r}")
                position += count
        except OSError as error:
            raise InputError(f"{stored.file}: tensor {stored.name!r} cannot be read ({error.strerror})") from error
        return data.view(DTYPES[stored.dtype]).reshape(shape)

    def check_unchanged(self) -> None:
        """Raises InputError when an input's size or modification time is not what was planned."""
        for path, identity in self._identities.items():
            try:
                status = os.stat(path)
            except OSError as error:
                raise InputError(f"{path}: gone during the merge ({error.strerror})") from error
            if (status.st_size, status.st_mtime_ns) != (identity.size, identity.mtime_ns):
                raise InputError(f"{path}: changed during the merge")

    def _open(self, path: Path) -> int:
        if path not in self._descriptors:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status, identity = os.fstat(descriptor), self._identities[path]
            if (status.st_size, status.st_mtime_ns) != (identity.size, identity.mtime_ns):
                os.close(descriptor)
                raise InputError(f"{path}: changed since the merge was planned")
            self._descriptors[path] = descriptor
        return self._descriptors[path]
