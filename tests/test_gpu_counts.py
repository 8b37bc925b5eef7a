"""What a GPU is asked to do, counted without one; with shapes alone where numbers would take too long."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import counts
from benchmarks.gpu.counts import H200, MARKS, READINGS, counted, counts_table
from benchmarks.gpu.estimate import Rates
from benchmarks.gpu.shapes import LLAMA, NAMES, VIT
from benchmarks.gpu.summary import Readings
from benchmarks.harness.markdown import write_between
from benchmarks.shapes import dimensions
from counted_gpu import CountedGpu, Work, counted_gpu
from isomerge_fast import ops
from isomerge_fast.bench.problems import deltas_like_fine_tuning
from isomerge_fast.linalg.cusolver import eigh
from isomerge_fast.methods import MemoryDeltas, make_method

ROOT = Path(__file__).parents[1]


def readings() -> Readings:
    return Readings(json.loads((ROOT / READINGS).read_text(encoding="utf-8"))["rows"])


def test_a_chain_of_products_is_counted_as_by_hand() -> None:
    """Of shapes alone: n is large enough for the symmetric kernel."""
    n, m = 2048, 8192
    wide, thin, stack = (torch.empty(shape, device="meta") for shape in ((n, m), (n, 8), (8, 816, 816)))
    with counted_gpu(H200, {}) as gpu:
        x, v, batch = (gpu.upload(tensor) for tensor in (wide, thin, stack))
        gpu.reset()
        gram = ops.sym_mm(x)
        gram = ops.sym_mm_add(gram, gram, alpha=0.5, beta=2.0)
        y = ops.mm_add(v, gram, v)
        lower, _ = torch.linalg.cholesky_ex(gram)
        torch.linalg.solve_triangular(lower, y, upper=False)
        eigh(batch)
        (y + 1.0).sum()
    item = 4
    assert [(each.kind, each.shape, each.flops) for each in gpu.work] == [
        ("symmetric", (n, m), 2.0 * n * n * m),
        ("symmetric", (n, n), 2.0 * n**3),
        ("product", (n, n), 2.0 * n * n * 8),
        ("factorisation", (n, n), 0.0),
        ("solve", (n, n), 8.0 * n * n),
        ("eigenproblem", (8, 816, 816), 0.0),
        ("pass", (n, 8), 0.0),
        ("pass", (n, 8), 0.0),
    ]
    assert gpu.launch_count == len(gpu.work)
    assert gpu.read_count == 0
    assert gpu.work[2].moved_bytes == item * (n * n + 3 * 8 * n)  # the matrix, and three thin ones


def work_of(gpu: CountedGpu) -> list[Work]:
    return list(gpu.work)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(320, 320), (640, 256)])
def test_a_walk_asks_what_the_merge_that_told_it_asks(name: str, shape: tuple[int, int]) -> None:
    deltas, merge = deltas_like_fine_tuning(*shape, 8, "decay"), make_method(name).merge
    shapes_alone = torch.empty(shape, device="meta")
    with counted_gpu(H200) as gpu:
        merge(MemoryDeltas([gpu.upload(delta) for delta in deltas]))
    with counted_gpu(H200, gpu.read) as walked:
        merge(MemoryDeltas([walked.upload(shapes_alone) for _ in deltas]))
    assert walked.work == gpu.work
    assert (walked.launches, walked.reads, walked.uploads) == (gpu.launches, gpu.reads, gpu.uploads)
    with counted_gpu(H200, {}) as walked, pytest.raises(LookupError, match="reads what no merge that was computed"):
        merge(MemoryDeltas([walked.upload(shapes_alone) for _ in deltas]))


def test_products_of_a_larger_matrix_are_larger_by_the_cube() -> None:
    """As many of them, where the steps are the same."""
    shape, larger = (96, 384), (384, 1536)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "LONGEST_COMPUTED", 96)
        small, large = counted("iso-cts", shape), counted("iso-cts", larger)
    flops = [sum(each.flops for kind in ("product", "symmetric") for each in row.of(kind)) for row in (small, large)]
    assert 0.8 * 64 <= flops[1] / flops[0] <= 1.2 * 64
    assert small.name == "iso-cts 96 x 384"


def test_matrices_at_once_are_counted_together() -> None:
    one, two = counted("iso-c", (96, 96)), counted("iso-c", (96, 96), 2)
    assert two.name == "iso-c 2 x 96 x 96, stack"  # as the readings call it
    assert one.launches < two.launches <= 2 * one.launches
    line = counts_table([counted("iso-c", (768, 768)), two], readings()).splitlines()[3]
    assert line.count(" each)") == 2


def test_seconds_are_those_of_the_readings_rates() -> None:
    found, rates = readings(), Rates(readings())
    matmul = found.row("ceilings", "matmul 4096 fp64")["tflop_per_s"]
    product = Work("product", "aten.mm", (4096, 4096), torch.float64, 2.0 * 4096**3, 3 * 8 * 4096**2)
    assert rates.seconds(product) == pytest.approx(2 * 4096**3 / matmul / 1e12)
    # Of few columns it takes what its operands take.
    thin = Work("product", "aten.mm", (4096, 4096), torch.float64, 2.0 * 4096**2, 8 * 4096**2)
    assert rates.seconds(thin) == pytest.approx(8 * 4096**2 / found.row("ceilings", "copy")["gb_per_s"] / 1e9)
    for name, batched, shape in (
        ("eigh 4096, fp64", False, (4096, 4096)),
        ("eigh 1024, fp64", False, (1024, 1024)),
        ("eigh 8 x 816 fp64, rule", True, (8, 816, 816)),
        ("eigh 8 x 152 fp64, rule", True, (8, 152, 152)),
        ("eigh 8 x 64 fp64, rule", True, (8, 64, 64)),
        ("eigh 48 x 768 fp64, rule", True, (48, 768, 768)),
    ):
        solver = "XsyevBatched" if batched else "aten._linalg_eigh"
        work = Work("eigenproblem", solver, shape, torch.float64, 0.0, 0)
        assert rates.seconds(work) == pytest.approx(found.row("primitives", name)["seconds"]), name


def test_the_docs_hold_the_counts_of_every_matrix(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    begin, end = MARKS
    inside = text.partition(begin)[2].partition(end)[0]
    names = Counter(line.split("|")[1].strip() for line in inside.splitlines() if line.startswith("| iso-"))
    assert {f"{name} {dimensions(shape)}" for shape in (*LLAMA, *VIT) for name in NAMES} <= set(names)
    assert set(names.values()) == {1}
    page = tmp_path / "gpu.md"
    page.write_text(text, encoding="utf-8")
    write_between(page, MARKS, inside.strip("\n"))
    assert page.read_text(encoding="utf-8") == text
