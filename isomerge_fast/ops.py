"""The one door to the kernels: everything above calls these, nothing above imports ``isomerge_kernels``.

Each operation runs in plain torch on the device of its tensors (CPU, CUDA, …).
"""

from __future__ import annotations

import torch

from isomerge_kernels.reference import (
    BLOCK_ELEMENTS,
    apply_delta,
    count_nonfinite,
    mm,
    mm_add,
    row_blocks,
    subtract,
    sum_deltas,
    sym_mm,
    sym_mm_add,
    task_sum,
)

__all__ = [
    "BLOCK_ELEMENTS",
    "apply_delta",
    "compute_dtype",
    "count_nonfinite",
    "mm",
    "mm_add",
    "row_blocks",
    "subtract",
    "sum_deltas",
    "sym_mm",
    "sym_mm_add",
    "task_sum",
]


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 when any input is fp64, else fp32: half precision is never computed in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
