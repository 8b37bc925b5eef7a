"""Where the parts of one merged tensor go: rounded once for every α, to the shards, through the thread that writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from math import prod

import torch
from torch import Tensor

from . import ops
from .checkpoint.layout import DTYPES
from .checkpoint.write_behind import WriteBehind
from .checkpoint.writer import ShardWriter
from .errors import InputError
from .methods import RowBlock
from .plan import DELTA_FOLDER, TensorPlan
from .sources import TensorSource


class TensorOutput:
    """One tensor in all its outputs.

    Args:
        writers: by sub-folder of the output.
        scalings: α by sub-folder, of those that have one.
        phase: ``Stopwatch.phase``.
    """

    def __init__(
        self,
        plan: TensorPlan,
        writers: Mapping[str, ShardWriter],
        scalings: Mapping[str, float],
        writes: WriteBehind,
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._plan, self._writers, self._scalings = plan, writers, scalings
        self._writes, self._phase = writes, phase
        self._row_elements = prod(plan.route.lines[1:])
        self._overflows = dict.fromkeys(scalings, 0)

    def add(
        self, block: RowBlock, value: Callable[[RowBlock], Tensor], parts: list[RowBlock], source: TensorSource
    ) -> None:
        """Writes θ₀ + α Δ of these rows for every α, rounded once, and Δ itself where it is kept.

        Args:
            value: Δ of a part of the block.
            parts: of the block, shared out among threads.
        """
        plan, dtype = self._plan, DTYPES[self._plan.out.dtype]

        # In one piece, because small writes do not go directly to the disk.
        def room(of: torch.dtype) -> Tensor:
            return torch.empty(block.base.shape, dtype=of, device=block.base.device)

        outputs = {folder: room(dtype) for folder in self._scalings}
        kept = None if plan.delta is None else room(DTYPES[plan.delta.dtype])

        def apply(part: RowBlock) -> None:
            place = slice(part.rows.start - block.rows.start, part.rows.stop - block.rows.start)
            delta = value(part)
            if kept is not None:
                kept[place] = delta
                delta = kept[place]
            made = ops.apply_delta(
                part.base,
                delta,
                scalings=list(self._scalings.values()),
                dtype=dtype,
                seed=plan.rounding_seed,
                first=part.rows.start * self._row_elements,
            )
            for out, rows in zip(outputs.values(), made, strict=True):
                out[place] = rows

        source.share_out(apply, parts)
        for folder, out in outputs.items():
            if dtype == torch.float16:
                self._overflows[folder] += ops.count_nonfinite(out)
            self._put(folder, out, block.rows)
        if kept is not None:
            self._put(DELTA_FOLDER, kept, block.rows)

    def copy(self, rows: slice, base: Tensor) -> None:
        """Writes the base, converted where the output has another dtype. An empty tensor's Δ is empty."""
        out = base.to(DTYPES[self._plan.out.dtype], copy=True)  # the buffer it lies in is read into again
        for folder in self._scalings:
            self._put(folder, out, rows)
        if self._plan.delta is not None:
            self._put(DELTA_FOLDER, base.to(DTYPES[self._plan.delta.dtype]), rows)

    def check_finite(self) -> None:
        """Raises InputError where finite weights became infinite in the output's dtype."""
        for folder, count in self._overflows.items():
            if count:
                raise InputError(
                    f"tensor {self._plan.name!r}: {count} merged weights overflow float16 "
                    f"at scaling {self._scalings[folder]:g}"
                )

    def checksums(self) -> dict[str, str]:
        """Of the finished tensor, by folder."""
        return {folder: writer.finish(self._plan.name) for folder, writer in self._writers.items()}

    def _put(self, folder: str, out: Tensor, rows: slice) -> None:
        """Has rows of ``Route.lines`` written, in the thread that does so."""
        on_host, writer, name = out.to("cpu"), self._writers[folder], self._plan.name
        with self._phase("write"):
            self._writes.put(on_host.nbytes, partial(writer.write_part, name, on_host, rows.start * self._row_elements))
