"""What every launcher needs: tensors as equal lines, a table of addresses, grids that never overflow."""

from __future__ import annotations

import contextlib
import math
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
    """One compiled form of an elementwise kernel.

    Chosen by rule and never by timing when it runs: another machine, or a merge that is resumed, has to give the same
    bytes. ``benchmarks/gpu`` times all of them, so that the rule can follow what is measured.
    """

    block: int  # elements a program handles, at once
    num_warps: int


def as_lines(tensors: Sequence[Tensor], members: int) -> list[Tensor]:
    """Tensors of one shape as [lines, elements] with elements side by side: one line a member, or one a row.

    No copy is made where all are contiguous, or where their rows are and lie at equal distances; else of those that
    need it.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(members, -1) for tensor in tensors]
    rows = [row_view(tensor) for tensor in tensors]
    if any(row is None for row in rows):
        return [tensor.contiguous().view(members, -1) for tensor in tensors]
    return [row for row in rows if row is not None]


def row_view(tensor: Tensor) -> Tensor | None:
    """[rows, columns] over the same memory, or None where that is not possible."""
    if tensor.ndim < 2 or tensor.stride(-1) != 1:
        return None
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return None


def is_aligned(lines: Tensor) -> bool:
    """Whether every line begins at a multiple of 16 bytes, so that it can be read in vectors."""
    return lines.data_ptr() % VECTOR_BYTES == 0 and (len(lines) == 1 or lines.stride(0) % VECTOR_BYTES == 0)


def address_table(lines: Sequence[Tensor], weights: Sequence[float], tasks: Sequence[int]) -> Tensor:
    """[T, 4] int64 on their device: address, distance of lines in elements, the bits of w_t in float64, the task."""
    rows = [
        (line.data_ptr(), line.stride(0), struct.unpack("<q", struct.pack("<d", weight))[0], task)
        for line, weight, task in zip(lines, weights, tasks, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").to(lines[0].device, non_blocking=True)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels are launched on the current device, which need not be that of the tensor."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def blocks_of(elements: int, block: int) -> int:
    return math.ceil(elements / block)
