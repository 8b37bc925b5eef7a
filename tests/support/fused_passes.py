"""Counts the passes that sum deltas straight from base and experts, without making T deltas first."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from isomerge_fast import ops
from isomerge_fast.methods import source


def fused_passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], int]]:
    """Return a list that grows by (shape, T) at every such pass."""
    seen: list[tuple[tuple[int, ...], int]] = []

    def noted(experts: list[Tensor], base: Tensor | None = None, **how: Any) -> ops.TaskSum:
        assert base is not None, "deltas were made before they were summed"
        seen.append((tuple(base.shape), len(experts)))
        return ops.task_sum(experts, base, **how)

    monkeypatch.setattr(source, "task_sum", noted)
    return seen
