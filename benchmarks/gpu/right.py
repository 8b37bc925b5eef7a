"""Check kernels, solvers and methods on this device."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.runner import child_command
from benchmarks.gpu.schedule import Stage
from benchmarks.gpu.shapes import NAMES, VIT, Shape
from benchmarks.gpu.stacks import places_of, some_sources
from benchmarks.harness.readings import Rows, read_rows
from benchmarks.shapes import dimensions
from isomerge_fast.bench import published
from isomerge_fast.bench.ceilings import median_seconds
from isomerge_fast.bench.problems import deltas_like_fine_tuning, relative_error
from isomerge_fast.functional import randomized_svd
from isomerge_fast.linalg.gram_eigh import GramEigh
from isomerge_fast.linalg.polar_express import PolarExpress
from isomerge_fast.linalg.polar_gram import GramNewtonSchulz
from isomerge_fast.linalg.protocol import PolarSolver
from isomerge_fast.linalg.svd import FullSvd
from isomerge_fast.methods import DeltaSource, MemoryDeltas, make_method
from isomerge_kernels import symmetric_matmul
from kernel_checks import CHECKS  # type: ignore[import-not-found]  # tests/support is put on the path by runner

# One form of everything.
SMOKE = (
    "task_sum-odd-bf16",
    "apply_delta-batch-fp32",
    "apply_delta-stochastic",
    "symmetric_matmul-polynomial",
    *(
        f"symmetric_matmul-{key}-{configs[0].block}x{configs[0].block_k}-odd"
        for key, configs in symmetric_matmul.CONFIGS.items()
    ),
)
# A dry run takes every so many checks.
SMALL_STEP = 9
SOLVERS: tuple[tuple[PolarSolver, float], ...] = (
    (PolarExpress(), 1e-9),
    (PolarExpress(torch.float32), 1e-2),
    (GramNewtonSchulz(), 1e-9),
    (GramNewtonSchulz(torch.float32), 1e-2),
    (GramEigh(), 1e-5),
    (FullSvd(), 1e-6),
)
TIERS = (("fast", 1e-2), ("default", 1e-5), ("reference", 1e-8))
SHAPES = ((1100, 1100), (1024, 3072), (3072, 1024))
# The judge of Iso-CTS takes T + 3 SVDs: half the size.
HALVES = ((550, 550), (512, 1536), (1536, 512))
BATCH = 3
TRIPLETS = (((3072, 768), 19), ((768, 768), 100), ((4096, 4096), 64))
# Whose rows, and small factors, begin at odd places of a stack.
ODD_SHAPES = ((33, 48), (64, 80), (150, 33), (301, 133))
BATCHED_SHAPES = ((300, 300), (256, 640), (640, 256))
# Different ones, of a matrix in a stack.
NEIGHBOURS = 3
SMALL_SHAPES = ((96, 96), (64, 160), (160, 64))


def kernels(rows: Rows) -> None:
    """Run this process's share of the kernel checks; the far-apart ones are the last process's alone."""
    names = list(CHECKS)
    far = [name for name in names if "far-apart" in name]
    near = [name for name in names if name not in far][:: SMALL_STEP if rows.small else 1]
    last = rows.shares - 1
    mine = [*near, *far] if last == 0 else far if rows.share == last else near[rows.share :: last]
    for name in mine:
        rows.attempt(name, partial(CHECKS[name], torch.device(rows.device)))


def smoke(rows: Rows) -> None:
    """Check one form of everything."""
    for name in SMOKE[: 2 if rows.small else None]:
        rows.attempt(name, partial(CHECKS[name], torch.device(rows.device)))


def memcheck(rows: Rows) -> None:
    """Run the smoke test under compute-sanitizer, where that is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    watched = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"] if tool else []

    def checked() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            file, output = Path(folder) / "rows.json", Path(folder) / "output"
            stage = Stage("smoke", f"{__name__}:smoke", rows.seconds_left)
            settings = {"device": rows.device, "small": rows.small, "seconds": rows.seconds_left}
            command = [*watched, *child_command(stage, file, **settings)]
            environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            with output.open("wb") as written:
                code = subprocess.run(command, stdout=written, stderr=subprocess.STDOUT, env=environment).returncode
            text, found = output.read_text(errors="replace"), read_rows(file)
        failed = [row for row in found if "failed" in row]
        assert code == 0, text[-400:]
        assert not failed, failed[0]
        assert len(found) == (2 if rows.small else len(SMOKE))
        summary = [line.strip("= ") for line in text.splitlines() if "ERROR SUMMARY" in line]
        return {"watched": bool(watched), "checks": len(found), "summary": summary[-1] if summary else ""}

    if tool is None and torch.device(rows.device).type == "cuda":
        rows.note("compute-sanitizer", absent="not installed")
    else:
        rows.attempt("smoke test", checked)


def solvers_and_methods(rows: Rows) -> None:
    """Check polar solvers, and methods in all tiers, one matrix at a time and batched.

    The judge is the published algorithm in float64 by LAPACK on the CPU: no code that is judged is part of it.
    """
    device = torch.device(rows.device)
    for shape in SMALL_SHAPES if rows.small else SHAPES:
        total = torch.stack(deltas_like_fine_tuning(*shape, 4, "decay", device=device)).double().sum(0)
        exact = published.polar(total.cpu()).to(device)
        for solver, bar in SOLVERS:
            rows.attempt(f"{solver.name} {dimensions(shape)}", partial(_polar, solver, bar, total, exact))
    for name, shapes in (("iso-c", SHAPES), ("iso-cts", HALVES)):
        for shape in SMALL_SHAPES if rows.small else BATCHED_SHAPES:
            members = [deltas_like_fine_tuning(*shape, 4, "decay", device=device, seed=seed) for seed in range(BATCH)]
            _tiers(rows, name, members, batched=True)
        for shape in SMALL_SHAPES if rows.small else shapes:
            _tiers(rows, name, [deltas_like_fine_tuning(*shape, 4, "decay", device=device)], batched=False)
    for shape, rank in (((96, 64), 4),) if rows.small else TRIPLETS:
        rows.attempt(f"randomized_svd 2 x {dimensions(shape)}, {rank}", partial(_top_triplets, shape, rank, device))
    for shape in SMALL_SHAPES if rows.small else (*VIT, *ODD_SHAPES):
        for name in NAMES:
            rows.attempt(f"{name} {dimensions(shape)}, any company", partial(_same_bytes, name, shape, device))


def _top_triplets(shape: Shape, rank: int, device: torch.device) -> dict[str, Any]:
    """Check ``randomized_svd`` of two matrices by all singular values in float64, and time it beside svd_lowrank."""
    a = torch.stack(deltas_like_fine_tuning(*shape, 2, "noise", device=device))
    found = randomized_svd(a, rank)
    exact = torch.linalg.svdvals(a.double())[..., :rank]
    error = relative_error(found.s, exact)
    assert bool(found.evidence.certified.all()), found.evidence
    assert error <= 1e-5, error
    lowrank = torch.svd_lowrank(a, q=rank + 9)[1][..., :rank]
    return {
        "error": error,
        "algorithm": ", ".join(sorted(set(found.evidence.algorithm))),
        "seconds": median_seconds(lambda: randomized_svd(a, rank), device, budget_seconds=0.3),
        "lowrank_error": relative_error(lowrank, exact),
        "lowrank_seconds": median_seconds(lambda: torch.svd_lowrank(a, q=rank + 9), device, budget_seconds=0.3),
    }


def _same_bytes(name: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Check that a matrix has the same bytes in stacks of 1, 7 and as many members as there are places, at any place;
    and beside some that are not regular.
    """
    method, places = make_method(name), places_of(name, shape, device)
    judged, *regular = some_sources(shape, 1 + NEIGHBOURS, device)
    odd = MemoryDeltas([delta[:, :1] * delta[:1] for delta in regular[0].experts])  # of rank 1
    (alone, evidence), *_ = method.merge_stack([judged])
    sizes = sorted({1, min(7, places), places})
    stacks = [(regular, size, place) for size in sizes for place in sorted({0, size // 2, size - 1})]
    stacks += [([odd, *regular], places, places // 2)] if places > 1 else []
    for neighbours, size, place in stacks:
        company: list[DeltaSource] = [neighbours[index % len(neighbours)] for index in range(size)]
        company[place] = judged
        value, stats = method.merge_stack(company)[place]
        where = f"place {place} of {size}, beside {len(neighbours)} kinds"
        assert torch.equal(value.view(torch.uint8), alone.view(torch.uint8)), f"{where}: other bytes than alone"
        assert not stats.missed(), (where, stats.to_dict())
    return {"places": places, "stacks": len(stacks), "algorithm": evidence.algorithm}


def _polar(solver: PolarSolver, bar: float, x: Tensor, exact: Tensor) -> dict[str, Any]:
    q, stats = solver.polar(x, dtype=torch.float64)
    found = {"error": relative_error(q, exact), "orthogonality": stats.orthogonality.item()}
    assert found["error"] <= bar, found
    return found


def _tiers(rows: Rows, name: str, members: list[list[Tensor]], *, batched: bool) -> None:
    """Add rows of one method in all tiers; ``members`` are T deltas each."""
    algorithm = getattr(published, name.replace("-", "_"))
    exact = [algorithm([delta.cpu().double() for delta in deltas]).to(rows.device) for deltas in members]
    deltas = [torch.stack(task) if batched else task[0] for task in zip(*members, strict=True)]
    for tier, bar in TIERS:

        def merged(tier: str = tier, bar: float = bar) -> dict[str, Any]:
            value, stats = make_method(name, {"precision": tier}).merge(MemoryDeltas(deltas))
            values = value if batched else value[None]
            worst = max(relative_error(one, judge) for one, judge in zip(values, exact, strict=True))
            assert worst <= bar, {"error": worst, "algorithm": stats.algorithm}
            assert not stats.missed(), stats.to_dict()
            return {"error": worst, "algorithm": stats.algorithm}

        rows.attempt(f"{name} {tier} {dimensions(deltas[0].shape)}", merged)
