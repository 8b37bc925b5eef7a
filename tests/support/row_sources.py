"""Deltas in memory that are walked by rows, and what a method makes of them so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from isomerge_fast.methods import MemoryDeltas, MergeStats, Method, RowBlock


class Rows(MemoryDeltas):
    """A source in memory that counts how often it is walked."""

    wants_largest = True

    def __init__(self, experts: list[Tensor], base: Tensor, block_rows: int, are_deltas: bool = False) -> None:
        super().__init__(experts, base, are_deltas=are_deltas, dtype=torch.float32, block_rows=block_rows)
        self.walks = 0

    def blocks(self, tasks: Sequence[int] | None = None) -> Iterator[RowBlock]:
        self.walks += 1
        return super().blocks(tasks)


def rows_of(deltas: list[Tensor], block_rows: int = 100) -> Rows:
    return Rows(deltas, torch.zeros_like(deltas[0]), block_rows)


def by_rows(method: Method, source: Rows) -> tuple[Tensor, MergeStats]:
    rowwise = method.rowwise(source)
    value = torch.cat([rowwise.rows(block) for block in source.blocks()])
    return value, rowwise.stats()
