"""How a tensor goes through memory: which of its copies are held when, so that a merge keeps to its ceilings.

    copy        the base's bytes, part by part
    by-rows     parts of all copies in, rows of the result out; nothing of the tensor's size is held (the linear
                methods; tall matrices of the spectral ones in several passes, where the ceiling asks for it)
    resident    all T + 1 copies are read once and held while the tensor is merged
    streamed    the sum and the result are held, the copies read part by part, again for every pass
    factors     the thin factors of all deltas are held (LoRA); the base is walked part by part
    adapter     only they: the result is a pair of thin factors again

Besides what a tensor takes, a merge holds what is read ahead and what waits to be written (``Budget``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from .methods import Method, TensorSpec
from .ops import BLOCK_ELEMENTS, traits_of

MIB = 1 << 20
# Read ahead at least this much where nothing forbids it, and at the very least: four parts of 2 MiB.
READ_AHEAD_BYTES, LEAST_READ_AHEAD_BYTES = 128 * MIB, 8 * MIB
PARTS_AHEAD = 4
# So much is page-locked for copies to a GPU, which takes 0.4 s a GiB beside an H200; torch rounds it up to a power of
# two. Parts are a quarter of it: each takes 3.5 ms of launches and of waiting for Python's lock there. At 32 MiB a part
# that was four fifths of a merge that only reads and writes.
PINNED_BYTES = 512 * MIB
# Of each copy read: it begins somewhere within a page of 4 KiB, and ends so.
PADDING_BYTES = 8 << 10
# Without a ceiling tensors are resident whose copies take up to this share of the machine's memory.
RESIDENT_SHARE = 1 / 32
# Parts are of so many rows or multiples of it, so that random bits can be made for parts (``ops.apply_delta``).
ROW_STEP = 8
COPY, BY_ROWS, RESIDENT, STREAMED, FACTORS, ADAPTER = "copy", "by-rows", "resident", "streamed", "factors", "adapter"


@dataclass(frozen=True)
class Budget:
    """Bytes of host memory for what is read ahead and for what waits to be written; and for a tensor being merged.

    ``work`` is the ceiling on the latter, on the device that computes; None where there is none. ``on_gpu`` are bytes
    of a GPU for the copies of the tensor that comes next; None on a CPU, which works on what is read ahead.
    """

    read_ahead: int
    work: int | None
    on_gpu: int | None = None

    @property
    def write_behind(self) -> int:
        return self.read_ahead // 4

    @property
    def part(self) -> int:
        """Bytes of one part, all copies together."""
        return self.read_ahead // PARTS_AHEAD

    @property
    def again(self) -> int:
        """Bytes read ahead in passes after the first: two parts."""
        return 2 * self.part

    @property
    def whole(self) -> int:
        """Bytes up to which all copies of a tensor are held at once, while the next ones are read."""
        return self.read_ahead // 2 if self.on_gpu is None else self.on_gpu

    @property
    def cut(self) -> int | None:
        """Bytes of the parts that copies are cut into on their way to a GPU; None on a CPU, where they stay whole."""
        return None if self.on_gpu is None else self.part

    @property
    def in_transfer(self) -> int:
        """On a GPU, bytes beside the work: the bundle that comes next, and outputs on their way to the host."""
        return self.whole + self.write_behind


@dataclass(frozen=True)
class Route:
    """The way of one tensor.

    Attributes:
        lines: the shape by which it is walked: [M, N] as it is, or [elements] where rows have no meaning.
        part_rows: of ``lines``, in every part but the last: what is written at once, and where copies are not held,
            what is read at once.
        method: with the ceiling it was given; None: copied.
        work_bytes: peak on the device that computes, beyond ``Budget.read_ahead`` and ``write_behind``.
    """

    name: str
    lines: tuple[int, ...]
    part_rows: int
    method: Method | None
    work_bytes: int

    @property
    def reads_base(self) -> bool:
        return self.name != ADAPTER

    def parts(self) -> Iterator[slice]:
        """Rows of ``lines``, in order."""
        for start in range(0, self.lines[0], self.part_rows):
            yield slice(start, min(start + self.part_rows, self.lines[0]))

    def readings(self) -> Iterator[slice]:
        """Rows of ``lines`` that are read at once."""
        return iter([slice(0, self.lines[0])]) if self.name == RESIDENT else self.parts()


@dataclass(frozen=True, slots=True)
class Traffic:
    """What moves for one element of a tensor: bytes of every copy read, and of all outputs written."""

    read: tuple[int, ...]
    written: int
    tasks: int


def budgets(largest: int, *, host: int | None, vram: int | None, on_gpu: bool) -> Iterator[Budget]:
    """Budgets to be tried in turn: what is read ahead shrinks until the tensors fit beside it.

    Args:
        largest: bytes of all copies of the largest tensor that would be resident.
        host: ceiling in bytes for all that a merge holds on the host; on a CPU for the work as well.
        vram: ceiling in bytes for the work on a GPU.
    """
    ceiling = vram if on_gpu else host
    if ceiling is None:
        most = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * RESIDENT_SHARE)
    else:
        most = ceiling // 4
    resident = min(largest, most)
    size = PINNED_BYTES if on_gpu else max(READ_AHEAD_BYTES, 3 * resident)
    if host is not None:
        size = min(size, host // 3)
    held = max(size // 2, resident) if on_gpu else None
    least = LEAST_READ_AHEAD_BYTES
    while True:
        size = max(least, size)
        held = None if held is None else max(least // 2, held)
        budget = Budget(size, None, held)
        beside = budget.in_transfer if on_gpu else budget.read_ahead + budget.write_behind
        yield budget if ceiling is None else replace(budget, work=max(0, ceiling - beside))
        if size == least and held in (None, least // 2):
            return
        size //= 2
        held = None if held is None else held // 2


def copy_route(shape: Sequence[int], traffic: Traffic, budget: Budget) -> Route:
    """Bytes that are only converted, if that."""
    lines = (prod(shape),)
    rows = _part_rows(lines, traffic, budget.part)
    return Route(COPY, lines, rows, None, rows * traffic.written)


def factor_route(
    method: Method,
    spec: TensorSpec,
    traffic: Traffic,
    budget: Budget,
    device: torch.device,
    *,
    tasks: int,
    rank: int,
    adapter_rank: int | None,
) -> Route:
    """Of deltas given as factors of ``rank`` columns in all.

    The factors; in float64 their stacks, one of which may take two more to be orthonormal; every task's coordinates and
    what the method makes of them. Then the result's factors, and a part of their product.
    """
    (rows, columns), sides = spec.shape, sum(spec.shape)
    height, width = min(rank, rows), min(rank, columns)
    solving = 8 * (rank * (3 * sides + 4 * max(rows, columns)) // 2 + height * width * (tasks + 8))
    if adapter_rank is not None:
        outputs = sides * adapter_rank * (16 + traffic.written)
        return Route(ADAPTER, spec.shape, rows, method, solving + outputs)
    part_rows = _part_rows(spec.shape, traffic, budget.part)
    part = part_rows * columns
    applying = spec.dtype.itemsize * (sides * width + 2 * part) + _applying(part, traffic, device)
    return Route(FACTORS, spec.shape, part_rows, method, max(solving, applying) + _on_device(2 * part, traffic, device))


def choose_route(method: Method, spec: TensorSpec, traffic: Traffic, budget: Budget, device: torch.device) -> Route:
    """The fastest way that keeps to ``budget.work``; where none does, the one that takes least."""
    routes = []
    for route in _routes(method, spec, traffic, budget, device):
        if budget.work is None or route.work_bytes <= budget.work:
            return route
        routes.append(route)
    return min(routes, key=lambda route: route.work_bytes)


def _routes(
    method: Method, spec: TensorSpec, traffic: Traffic, budget: Budget, device: torch.device
) -> Iterator[Route]:
    if method.any_shape:
        lines = (spec.elements,)
        rows = _part_rows(lines, traffic, budget.part)
        work = (method.row_map_bytes(spec, traffic.tasks, rows, device) or 0) + _applying(rows, traffic, device)
        yield Route(BY_ROWS, lines, rows, method, work + _on_device(2 * rows, traffic, device))
        return
    lines = spec.shape
    row = prod(lines[1:])
    everything = spec.elements * sum(traffic.read)
    if device.type == "cpu":  # on a GPU copies begin where they like
        everything += PADDING_BYTES * len(traffic.read)
    rows = _part_rows(lines, traffic, budget.part)
    if everything <= budget.whole:
        held = _on_device(spec.elements, traffic, device)
        chosen = _within(method, budget, held)
        # A download and its place within a page together are not to exceed a power of two, to which torch rounds.
        room = budget.write_behind // 2 - PADDING_BYTES
        at_once = rows if device.type == "cpu" else max(rows, _rows_of(lines, traffic.written, room))
        writing = spec.bytes + _applying(at_once * row, traffic, device)
        work = max(chosen.workspace_bytes(spec, traffic.tasks, device), writing)
        yield Route(RESIDENT, lines, at_once, chosen, work + held)
    writing = spec.bytes + _applying(rows * row, traffic, device)
    # Of parts there are two: one is taken while that before it is still at hand.
    again = budget.again + _on_device(2 * rows * row, traffic, device)
    making = _making(rows * row, spec, device)
    chosen = _within(method, budget, again + making)
    work = max(chosen.workspace_bytes(spec, traffic.tasks, device) + making, writing)
    yield Route(STREAMED, lines, rows, chosen, work + again)
    chosen = _within(method, budget, again + _applying(rows * row, traffic, device))
    by_rows = chosen.row_map_bytes(spec, traffic.tasks, rows * row, device)
    if by_rows is not None:
        yield Route(BY_ROWS, lines, rows, chosen, by_rows + again + _applying(rows * row, traffic, device))


def _within(method: Method, budget: Budget, beside: int) -> Method:
    return method if budget.work is None else method.within(max(0, budget.work - beside))


def _part_rows(lines: Sequence[int], traffic: Traffic, part_bytes: int) -> int:
    """Rows of which all copies are so many bytes."""
    return _rows_of(lines, sum(traffic.read), part_bytes - PADDING_BYTES * len(traffic.read))


def _rows_of(lines: Sequence[int], element_bytes: int, part_bytes: int) -> int:
    rows = part_bytes // max(1, prod(lines[1:]) * element_bytes)
    return min(max(ROW_STEP, rows // ROW_STEP * ROW_STEP), max(1, lines[0]))


def _applying(elements: int, traffic: Traffic, device: torch.device) -> int:
    """Outputs of one part, and the temporaries of making them."""
    if traits_of(device).is_gpu:  # as they are made; and of one of them its size and three flags, to find NaN and Inf
        return elements * (3 * traffic.written + 3)
    return elements * traffic.written + 4 * 8 * min(elements, BLOCK_ELEMENTS)


def _making(part_elements: int, spec: TensorSpec, device: torch.device) -> int:
    """Return the bytes of the temporaries of making deltas of parts."""
    traits = traits_of(device)
    if traits.is_gpu:  # only in ``subtract``: the base's rows in the dtype computed in
        return spec.dtype.itemsize * min(part_elements, traits.block_elements(BLOCK_ELEMENTS))
    return 32 * min(BLOCK_ELEMENTS, spec.elements)


def _on_device(elements: int, traffic: Traffic, device: torch.device) -> int:
    """Copies on a GPU of what is being worked on; on a CPU the buffers read into are it."""
    return 0 if device.type == "cpu" else elements * sum(traffic.read)
