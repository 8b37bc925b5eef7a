"""Compute how many rows of a tensor go through memory at once, and how many bytes these take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..methods import Method, TensorSpec
from ..ops import BLOCK_ELEMENTS, traits_of
from .budget import Budget

# Of each copy read: it begins somewhere within a page of 4 KiB, and ends so.
PADDING_BYTES = 8 << 10
# Parts are of so many rows or multiples of it, so that random bits can be made for parts (``ops.apply_delta``).
ROW_STEP = 8


@dataclass(frozen=True, slots=True)
class Traffic:
    """Hold what moves for one element of a tensor: bytes of every copy read, and of all outputs written."""

    read: tuple[int, ...]
    written: int
    tasks: int


@dataclass(frozen=True, slots=True)
class PartSizes:
    """Compute the parts of a tensor that moves by ``traffic``, within a budget, on a device."""

    traffic: Traffic
    budget: Budget
    device: torch.device

    def part_rows(self, view_shape: Sequence[int]) -> int:
        """Return how many rows of all copies fit into one part of the budget."""
        read = self.traffic.read
        return rows_within(view_shape, sum(read), self.budget.part - PADDING_BYTES * len(read))

    def limited(self, method: Method, beside: int) -> Method:
        """Return the method with the ceiling that is left to it when ``beside`` bytes are taken."""
        work = self.budget.work
        return method if work is None else method.within(max(0, work - beside))

    def applying(self, elements: int) -> int:
        """Return the bytes of one part of all outputs, and of the temporaries while they are made."""
        written = self.traffic.written
        if traits_of(self.device).is_gpu:
            # As they are made; and of one of them its size and three flags, to find NaN and Inf.
            return elements * (3 * written + 3)
        return elements * written + 4 * 8 * min(elements, BLOCK_ELEMENTS)

    def rereading(self, elements: int) -> int:
        """Return the bytes of the two parts that a pass after the first holds: the one in use, and the next one."""
        return self.budget.reread + self.on_device(2 * elements)

    def making_deltas(self, elements: int, spec: TensorSpec) -> int:
        """Return the bytes that computing the deltas of a part takes beside the deltas themselves."""
        traits = traits_of(self.device)
        if traits.is_gpu:  # only in ``subtract``: the base's rows in the dtype computed in
            return spec.dtype.itemsize * min(elements, traits.block_elements(BLOCK_ELEMENTS))
        return 32 * min(BLOCK_ELEMENTS, spec.elements)

    def on_device(self, elements: int) -> int:
        """Return the bytes of base and experts in a GPU's memory; 0 on a CPU, which computes where they were read."""
        return 0 if self.device.type == "cpu" else elements * sum(self.traffic.read)


def rows_within(view_shape: Sequence[int], element_bytes: int, part_bytes: int) -> int:
    """Return how many rows make up so many bytes: a multiple of ``ROW_STEP``, or all of them."""
    rows = part_bytes // max(1, prod(view_shape[1:]) * element_bytes)
    return min(max(ROW_STEP, rows // ROW_STEP * ROW_STEP), max(1, view_shape[0]))
