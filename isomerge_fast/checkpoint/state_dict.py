"""Offer a checkpoint as a state dict whose tensors are read when they are asked for, and not kept."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..parsing.values import path_text
from .io.reader import Reader, files_of, whole
from .layout import Checkpoint, open_checkpoint


class StoredStateDict(Mapping[str, Tensor]):
    """Map names to the tensors of a checkpoint, as a context manager that closes its files.

    The files are closed too when the mapping is deleted. ``len``, ``in``, iteration and ``meta`` read nothing. Every
    ``[name]`` reads the tensor again, into new CPU memory that belongs to the caller, in the dtype of the file.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._reader = Reader(files_of(checkpoint))
        self._close = weakref.finalize(self, self._reader.__exit__)

    def __enter__(self) -> StoredStateDict:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            KeyError: the checkpoint has no tensor of this name.
            InputError: its file changed since it was opened, is gone, or was closed.
            ResourceError: it failed to read.
        """
        stored = self.checkpoint.tensors[name]
        if not self._close.alive:
            raise InputError(f"{self.checkpoint.path}: tensor {name!r} is asked for after the files were closed")
        return self._reader.read(whole(stored))

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.tensors)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.checkpoint.path)!r}, {len(self)} tensors)"

    def meta(self) -> dict[str, Tensor]:
        """Return every tensor's shape and dtype as a meta tensor; read nothing."""
        return {
            name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
            for name, stored in self.checkpoint.tensors.items()
        }


def open_state_dict(path: str | os.PathLike[str]) -> StoredStateDict:
    """Open a checkpoint as a mapping of names to tensors: read the headers now, and the tensors one at a time.

    Args:
        path: a Hugging Face folder (one file or sharded) or one ``.safetensors`` file.

    Returns:
        The mapping. Use it in a ``with`` statement, or have its files closed when it is deleted.

    Raises:
        InputError: the path, a shard, an index or a header is missing or malformed; the message names it.
    """
    return StoredStateDict(open_checkpoint(path_text(path, "path", "the path of a checkpoint")))
