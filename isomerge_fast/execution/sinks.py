"""Take the parts of one merged tensor: round them once for every α and hand them to the thread that writes shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from ..checkpoint.io.direct_io import PAGE, page_ceiling
from ..checkpoint.io.write_behind import WriteBehind
from ..methods import OutOfRangeError, RowBlock
from ..methods.factors import product_bound
from ..methods.source import Threads
from ..planning.part_sizes import ROW_STEP
from ..planning.plan import TensorPlan
from .device_copies import Download


class Writer(Protocol):
    """Write the tensors of one file: what a sink needs of a ``ShardWriter``."""

    def position(self, name: str, first: int) -> int: ...

    def write_part(self, name: str, value: Tensor, first: int) -> None: ...


class FileSink:
    """Write one tensor into all its outputs, sharing out parts of a block: the ``Sink`` of a merge of files.

    ``writers`` are by sub-folder of the output; ``phase`` is ``PhaseTimer.phase``.
    """

    def __init__(
        self,
        plan: TensorPlan,
        writers: Mapping[str, Writer],
        writes: WriteBehind,
        threads: Threads,
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._plan, self._outputs, self._writers, self._writes = plan, plan.outputs, writers, writes
        self._threads, self._phase = threads, phase
        # By folder.
        self._names = {output.folder: output.names[0] for output in self._outputs}
        self._dtypes = {output.folder: output.dtype for output in self._outputs}
        self._scalings = {folder: scaling for folder, scaling in plan.scalings.items() if scaling is not None}
        self._kept = next((folder for folder, scaling in plan.scalings.items() if scaling is None), None)  # Δ itself
        self._rented: Tensor | None = None  # of ``writes``, for the rows that are made
        self._row_elements = prod(plan.route.view_shape[1:])
        # By folder, of everything made: how many entries are NaN or infinite, on the device that computes.
        self._not_finite: dict[str, list[Tensor]] = {folder: [] for folder in writers}

    def add(self, block: RowBlock, value: Callable[[RowBlock], Tensor], *, shared: bool) -> None:
        def apply(part: RowBlock, outputs: Mapping[str, Tensor]) -> None:
            assert part.base is not None
            delta = value(part)
            if self._kept is not None:
                delta = outputs[self._kept].copy_(delta)
            made = ops.apply_delta(
                part.base,
                delta,
                scalings=list(self._scalings.values()),
                dtype=self._plan.out_dtype,
                seed=self._plan.rounding_seed,
                first=part.rows.start * self._row_elements,
            )
            for folder, merged in zip(self._scalings, made, strict=True):
                outputs[folder].copy_(merged)

        self._make(block, apply, shared=shared)

    def copy(self, block: RowBlock) -> None:
        def convert(part: RowBlock, outputs: Mapping[str, Tensor]) -> None:
            assert part.base is not None
            for folder, out in outputs.items():
                if folder == self._kept:
                    out.zero_()
                else:
                    out.copy_(part.base)

        self._make(block, convert, shared=True)

    def _make(self, block: RowBlock, action: Callable[[RowBlock, Mapping[str, Tensor]], None], *, shared: bool) -> None:
        """Fill the outputs of every part of a block by ``action``; write them and count what is not finite.

        Shared, several threads fill parts at once; else parts as large as there is room for are filled one by one.
        """
        for group in self._groups(self._threads.parts(block)) if shared else ([piece] for piece in self._pieces(block)):
            rows = slice(group[0].rows.start, group[-1].rows.stop)
            outputs = self._room(rows, block.like.device)

            def fill(
                part: RowBlock, start: int = rows.start, outputs: dict[str, Tensor] = outputs
            ) -> dict[str, Tensor]:
                place = slice(part.rows.start - start, part.rows.stop - start)
                mine = {folder: out[place] for folder, out in outputs.items()}
                action(part, mine)
                # While it is in the cache.
                floats = {folder: out for folder, out in mine.items() if out.is_floating_point()}
                return {folder: ops.count_nonfinite(out) for folder, out in floats.items()}

            try:
                found = self._threads.map(fill, group)
            except BaseException:
                if self._rented is not None:
                    self._writes.give_back(self._rented)
                raise
            for counts in found:
                for folder, count in counts.items():
                    self._not_finite[folder].append(count)
            self._write(rows, outputs)

    def add_factors(self, left: Tensor, right: Tensor) -> None:
        """Take α·left right as the pair of an adapter; α goes into B.

        ``left`` [M, rank] and ``right`` [rank, N] are A or B, as the adapters have it. A product that may be more than
        float32 holds, in which adapters are multiplied out, is refused.
        """
        bound = product_bound(left, right)
        for alpha in self._scalings.values():
            if not bound * abs(alpha) <= torch.finfo(torch.float32).max:
                raise OutOfRangeError(f"weights up to {bound * abs(alpha):.3g} overflow float32 at scaling {alpha:g}")
        a, b = self._plan.merged
        # The first adapter that has the pair gave it its names, and its orientation.
        first = next(pair for pair in self._plan.pairs if pair is not None)
        inner, outer = (left.mT, right.mT) if first.transposed else (right, left)
        for folder, alpha in self._scalings.items():
            for output, value in ((a, inner), (b, outer * alpha)):
                made = value.to(output.dtype).contiguous()
                self._not_finite[folder].append(ops.count_nonfinite(made))
                download, writer = Download(made), self._writers[folder]

                def write(name: str = output.name, download: Download = download, writer: Writer = writer) -> None:
                    writer.write_part(name, download(), 0)

                with self._phase("write"):
                    self._writes.put(write, size=made.nbytes)

    def overflows(self) -> str | None:
        """Return in words how many merged weights are NaN or infinite, or None. One read of the device."""
        for folder, seen in self._not_finite.items():
            count = int(torch.stack(seen).sum()) if seen else 0
            if count:
                dtype = ops.dtype_name(self._dtypes[folder])
                kept = folder == self._kept
                what = "in the merged Δ that is kept" if kept else f"at scaling {self._scalings[folder]:g}"
                return f"{count} merged weights overflow {dtype} {what}"
        return None

    def _groups(self, parts: Sequence[RowBlock]) -> Iterator[list[RowBlock]]:
        """Yield the parts that are written at once: as many as there is room for."""
        group: list[RowBlock] = []
        for part in parts:
            if group and self._bytes_of(part.rows.stop - group[0].rows.start) > self._writes.room_bytes:
                yield group
                group = []
            group.append(part)
        yield group

    def _pieces(self, block: RowBlock) -> Iterator[RowBlock]:
        """Yield the block in parts that there is room for."""
        return block.parts(ROW_STEP * max(1, self._writes.room_bytes // max(1, self._bytes_of(ROW_STEP))))

    def _bytes_of(self, rows: int) -> int:
        """Return the bytes of ``rows`` rows in all outputs, each with a page more for its place within a page."""
        return sum(PAGE + page_ceiling(rows * self._row_elements * dtype.itemsize) for dtype in self._dtypes.values())

    def _room(self, rows: slice, device: torch.device) -> dict[str, Tensor]:
        """Return memory for these rows by folder, on the device that computes."""
        count = rows.stop - rows.start
        shape = (count, *self._plan.route.view_shape[1:])
        self._rented = None
        if device.type == "cpu":
            with self._phase("write"):
                self._rented = room = self._writes.room(self._bytes_of(count))
            if room is not None:
                outputs, end = {}, 0
                for folder, dtype in self._dtypes.items():
                    # As it will lie within a page of the file, so that it can be written without a copy.
                    start = end + (self._position(folder, rows) - end) % PAGE
                    end = start + count * self._row_elements * dtype.itemsize
                    outputs[folder] = room[start:end].view(dtype).view(shape)
                return outputs
        return {folder: torch.empty(shape, dtype=dtype, device=device) for folder, dtype in self._dtypes.items()}

    def _position(self, folder: str, rows: slice) -> int:
        """Return where rows begin in their file; 0 where that is no place for their dtype in memory."""
        position = self._writers[folder].position(self._names[folder], rows.start * self._row_elements)
        return 0 if position % self._dtypes[folder].itemsize else position

    def _write(self, rows: slice, outputs: dict[str, Tensor]) -> None:
        """Have rows of ``Route.view_shape`` fetched and written by the thread that writes."""
        downloads = {folder: Download(out, self._position(folder, rows)) for folder, out in outputs.items()}
        room = self._rented
        size = 0 if room is not None else sum(out.nbytes for out in outputs.values())

        def write() -> None:
            for folder, download in downloads.items():
                self._writers[folder].write_part(self._names[folder], download(), rows.start * self._row_elements)

        with self._phase("write"):
            self._writes.put(write, size=size, room=room)
