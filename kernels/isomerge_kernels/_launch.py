"""Share what every launcher needs: tensors as equal lines, a table of addresses, grids that never overflow."""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
VECTOR_BYTES = 16
# Said at every launch, because Triton's default is about to change, and with it last digits.
OPTIONS = {"enable_fp_fusion": True}


class Config(NamedTuple):
    """Describe one compiled form of an elementwise kernel.

    Chosen by rule and never by timing when it runs: another machine, or a merge that is resumed, has to give the same
    bytes. ``benchmarks/gpu`` times all of them, so that the rule can follow what is measured.
    """

    block: int  # elements a program handles, at once
    num_warps: int


class Lines(NamedTuple):
    """Hold tensors of one shape as lines of elements side by side; each tensor begins at its first element."""

    tensors: Sequence[Tensor]
    strides: list[int]  # by tensor, elements from line to line
    n_lines: int
    elements: int

    def is_aligned(self, index: int) -> bool:
        """Return whether every line of this tensor begins at a multiple of 16 bytes and can be read in vectors."""
        apart = self.n_lines > 1 and self.strides[index] % VECTOR_BYTES != 0
        return not apart and self.tensors[index].data_ptr() % VECTOR_BYTES == 0


def as_lines(tensors: Sequence[Tensor], members: int = 1) -> Lines:
    """Return tensors of one shape as lines: one for each of ``members``, or one for each row.

    No copy is made where all are contiguous, or where their rows are and lie at equal distances; else of those that
    need it.
    """
    if not all(tensor.is_contiguous() for tensor in tensors):
        rows = [row for tensor in tensors if (row := row_view(tensor)) is not None]
        if len(rows) == len(tensors) and len(rows[0]) % members == 0:
            return Lines(rows, [row.stride(0) for row in rows], *rows[0].shape)
        tensors = [tensor.contiguous() for tensor in tensors]
    elements = tensors[0].numel() // members
    return Lines(tensors, [elements] * len(tensors), members, elements)


def row_view(tensor: Tensor) -> Tensor | None:
    """Return [rows, columns] over the same memory, or None where that is not possible."""
    if tensor.ndim < 2 or tensor.stride(-1) != 1:
        return None
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return None


def address_table(lines: Lines, weights: Sequence[float], tasks: Sequence[int]) -> Tensor:
    """Return [T, 4] int64 as one line: address, distance of lines, the bits of w_t in float64, the task."""
    rows = [(lines.tensors[task].data_ptr(), lines.strides[task], weights[task], task) for task in tasks]
    table = bytearray(struct.pack("<" + "qqdq" * len(rows), *itertools.chain.from_iterable(rows)))
    return torch.frombuffer(table, dtype=torch.int64).to(lines.tensors[0].device, non_blocking=True)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's device the current one, on which kernels are launched."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()
