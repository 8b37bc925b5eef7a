"""Deltas in memory as a ``DeltaSource``, and what a method makes of them by rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from isomerge_fast.methods import MergeStats, Method, RowBlock


@dataclass
class Rows:
    """A ``DeltaSource`` in memory that counts how often it is walked."""

    experts: list[Tensor]
    base: Tensor
    block_rows: int
    are_deltas: bool = False
    walks: int = 0

    @property
    def n_tasks(self) -> int:
        return len(self.experts)

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.base.device

    def blocks(self) -> Iterator[RowBlock]:
        self.walks += 1
        for start in range(0, len(self.base), self.block_rows):
            rows = slice(start, min(start + self.block_rows, len(self.base)))
            yield RowBlock(rows, [expert[rows] for expert in self.experts], self.base[rows], self.are_deltas)


def rows_of(deltas: list[Tensor], block_rows: int = 100) -> Rows:
    return Rows(deltas, torch.zeros_like(deltas[0]), block_rows)


def by_rows(method: Method, source: Rows) -> tuple[Tensor, MergeStats]:
    row_map = method.row_map(source)
    value = torch.cat([row_map.rows(block) for block in source.blocks()])
    return value, row_map.stats()
