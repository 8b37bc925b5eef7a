"""Export all launchers for ``isomerge_fast.ops``; importing this needs Triton."""

from __future__ import annotations

from .apply_delta import apply_delta
from .symmetric_matmul import symmetric_matmul
from .task_sum import task_sum

__all__ = ["apply_delta", "symmetric_matmul", "task_sum"]
