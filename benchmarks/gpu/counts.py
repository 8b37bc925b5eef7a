"""Count what a merge asks of a GPU, without one, and write it into docs/gpu.md (``make gpu-counts``):

python -m benchmarks.gpu.counts [--readings benchmarks/results/NVIDIA-H200.json] [--write docs/gpu.md]

Needs tests/support on PYTHONPATH, whose pretended GPU does the counting.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.estimate import Rates, seconds_a_launch, total_seconds
from benchmarks.gpu.shapes import LLAMA, NAMES, STACKED, TASKS, VIT, Shape
from benchmarks.gpu.stacks import places_of, stack_label
from benchmarks.gpu.summary import Readings, milliseconds
from benchmarks.harness.markdown import table, write_between
from benchmarks.shapes import dimensions
from counted_gpu import Answers, CountedGpu, Work, counted_gpu  # type: ignore[import-not-found]  # in tests/support
from isomerge_fast.bench.problems import deltas_like_fine_tuning
from isomerge_fast.linalg import subspace_chebyshev
from isomerge_fast.methods import MemoryDeltas, make_method
from isomerge_kernels.devices import DeviceTraits

MARKS = ("<!-- counts: made by benchmarks.gpu.counts -->", "<!-- end of counts -->")
READINGS = Path("benchmarks/results/NVIDIA-H200.json")
# Of the readings.
H200 = DeviceTraits(True, (9, 0), 150_109_880_320, "pretended H200")
# Matrices with a longer short side are walked, and told by one with sides a quarter as long.
LONGEST_COMPUTED, SHARE = 1024, 4
HEAD = (
    "8 tasks",
    "full products: number, GFLOP",
    "symmetric: number (read), GFLOP",
    "eigenproblems",
    "factors, solves",
    "launches",
    "reads",
    "device, ms",
    "with the host",
    "measured",
)


@dataclass(frozen=True)
class Counted:
    """Hold what ``places`` matrices of one shape asked of a GPU, merged together."""

    name: str
    places: int
    work: tuple[Work, ...]
    launches: int
    reads: int

    def of(self, kind: str) -> list[Work]:
        return [each for each in self.work if each.kind == kind]


def counted(method: str, shape: Shape, places: int = 1) -> Counted:
    """Count the merge of so many matrices at once: of one that is small enough while it is computed."""
    told = None
    if min(shape) > LONGEST_COMPUTED:
        told = _read_of_a_part(method, (shape[0] // SHARE, shape[1] // SHARE), places)
        deltas = [[torch.empty(shape, device="meta")] * TASKS] * places
    else:
        deltas = _deltas(shape, places)
    with counted_gpu(H200, told) as gpu:
        _merge(gpu, method, deltas)
    name = stack_label(method, shape, places) if places > 1 else f"{method} {dimensions(shape)}"
    return Counted(name, places, tuple(gpu.work), gpu.launch_count, gpu.read_count)


def _deltas(shape: Shape, places: int) -> list[list[Tensor]]:
    return [deltas_like_fine_tuning(*shape, TASKS, "decay", seed=seed) for seed in range(places)]


@cache
def _read_of_a_part(method: str, shape: Shape, places: int) -> Answers:
    with _rules_of_a_part(), counted_gpu(H200) as gpu:
        _merge(gpu, method, _deltas(shape, places))
    return gpu.read


@contextmanager
def _rules_of_a_part() -> Iterator[None]:
    """Let a matrix with sides ``SHARE`` times as short be searched where the whole one is, with as wide a block."""
    widths = tuple(width // SHARE for width in subspace_chebyshev.FREE_WIDTHS)
    smallest = subspace_chebyshev.SMALLEST_WIDE_PART // SHARE
    with (
        mock.patch.object(subspace_chebyshev, "FREE_WIDTHS", widths),
        mock.patch.object(subspace_chebyshev, "SMALLEST_WIDE_PART", smallest),
    ):
        yield


def _merge(gpu: CountedGpu, method: str, deltas: Sequence[Sequence[Tensor]]) -> None:
    sources = [MemoryDeltas([gpu.upload(delta) for delta in of_one]) for of_one in deltas]
    gpu.reset()
    made = make_method(method)
    results = made.merge_stack(sources) if len(sources) > 1 else [made.merge(sources[0])]
    assert not any(stats.missed() for _, stats in results), [stats.to_dict() for _, stats in results]


def every_count() -> list[Counted]:
    """Return the counts of Llama's and a vision transformer's matrices, one by one and as stacks."""
    rows = [counted(name, shape) for shape in (*LLAMA, *VIT) for name in NAMES]
    with counted_gpu(H200) as gpu:
        device = gpu.upload(torch.zeros(1)).device
        stacks = [(name, shape, places_of(name, shape, device)) for shape in STACKED for name in NAMES]
    return rows + [counted(name, shape, places) for name, shape, places in stacks if places > 1]


def counts_table(rows: Sequence[Counted], readings: Readings) -> str:
    """Return what was counted, with the milliseconds that it takes by the rates of ``readings``."""
    rates, launches = Rates(readings), {row.name: row.launches for row in rows}
    host = seconds_a_launch(readings, launches)

    def cells(row: Counted) -> Iterator[str]:
        yield row.name
        for kind in ("product", "symmetric"):
            found = row.of(kind)
            read = _symmetric_calls(readings, row.name) if kind == "symmetric" else ""
            yield f"{len(found)}{read}, {sum(each.flops for each in found) / 1e9:,.0f}" if found else f"0{read}"
        yield _sides(row.of("eigenproblem"))
        yield str(len(row.of("factorisation")) + len(row.of("solve")))
        yield f"{row.launches:,}"
        yield str(row.reads)
        device = total_seconds(rates, row.work)
        yield _shown(device, row.places)
        yield _shown(device + host * row.launches, row.places)
        measured = readings.row("methods", row.name).get("seconds")
        yield _shown(measured, row.places) if measured else ""

    return f"{table(HEAD, [list(cells(row)) for row in rows])}\n\nA counted launch costs the host {1e6 * host:.1f} µs."


def _shown(seconds: float, places: int) -> str:
    each = f" ({milliseconds(seconds / places)} each)" if places > 1 else ""
    return milliseconds(seconds) + each


def _symmetric_calls(readings: Readings, name: str) -> str:
    """Return in brackets how often a profile of that matrix has our kernel, where it has it."""
    operations = readings.row("methods", f"{name}, profile").get("operations", ())
    calls = [count for operation, count, _ in operations if operation == "symmetric_matmul_kernel"]
    return f" ({calls[0]})" if calls else ""


def _sides(eigenproblems: Sequence[Work]) -> str:
    found = Counter(dimensions((*work.shape[:-2], work.shape[-1])) for work in eigenproblems)
    return ", ".join(f"{count} of {side}" if count > 1 else side for side, count in found.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readings", type=Path, default=READINGS, help="the JSON of a device, for its rates")
    parser.add_argument("--write", type=Path, help="a Markdown file with the table's two marks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.readings.read_text(encoding="utf-8"))["rows"]
    text = counts_table(every_count(), Readings(rows))
    print(text)
    if options.write is not None:
        write_between(options.write, MARKS, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
