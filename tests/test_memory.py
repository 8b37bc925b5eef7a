"""Peak resident memory, seen from outside the process: checkpoints larger than the ceiling, merged tensor by tensor."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.harness.checkpoints import save_headers
from checkpoints import save_folder
from isomerge_fast.cli.commands import app
from isomerge_fast.execution.engine import run
from isomerge_fast.planning import budget as budgets_module, planner as planning
from llama_tensors import NARROW, TASKS, WIDE, llama_tensors
from planned_models import config_of

CEILING_BYTES = 600 << 20


# A process between the test and the merge: a child's peak starts with that of the process it was forked from.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(f"peak_kib={resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}", file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(
    scope="module", params=[NARROW, pytest.param(WIDE, marks=pytest.mark.long)], ids=lambda llama: f"{llama['layers']}"
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a base and 4 experts in bf16: 1.0 GB, or 1.6 GB."""
    root = tmp_path_factory.mktemp("llama")
    return [save_folder(root / str(seed), llama_tensors(seed, **request.param), shards=2) for seed in range(TASKS + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mean", "task-arithmetic", "iso-c", "iso-cts"])
def test_peak_memory(family: list[Path], tmp_path: Path, method: str) -> None:
    arguments = [
        "run",
        "--base",
        str(family[0]),
        "--method",
        method,
        "--scaling",
        "0.3",
        "--out",
        str(tmp_path / "out"),
    ]
    for expert in family[1:]:
        arguments += ["--expert", str(expert)]
    command = [
        sys.executable,
        "-m",
        "isomerge_fast.cli",
        *arguments,
        "--max-ram",
        str(CEILING_BYTES),
        "--threads",
        "2",
        "--format",
        "json",
    ]
    outcome = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    report = json.loads(outcome.stdout)
    peak_bytes = int(outcome.stderr.split("peak_kib=")[1]) * 1024
    seconds = report["seconds"]["total"]
    print(f"{method}: {report['read_bytes'] / 1e9:.2f} GB read, peak {peak_bytes / 1e6:.0f} MB, {seconds:.1f} s")
    weights = sum(file.stat().st_size for folder in family for file in folder.glob("*.safetensors"))
    assert report["read_bytes"] >= 0.999 * weights >= 1.5 * CEILING_BYTES
    assert peak_bytes <= CEILING_BYTES
    # What plan promises is kept, and is no empty promise; under the same ceiling, which decides between solvers.
    planned = CliRunner().invoke(app, ["plan", *command[4:]])
    assert planned.exit_code == 0, planned.output
    assert peak_bytes <= json.loads(planned.stdout)["peak_ram_bytes"] <= 1.3 * peak_bytes


FREED = """
import sys, psutil, torch
from isomerge_fast.execution.malloc import set_heap_thresholds, trim_heap
process = psutil.Process()
torch.ones(1)
for eager in (True, False):
    set_heap_thresholds(eager=eager)
    before = process.memory_info().rss
    # 2 MiB each, and between them something that stays: the heap cannot simply shrink.
    blocks, keep = zip(*[(torch.ones(1 << 19), torch.ones(1 << 14)) for _ in range(50)])
    del blocks
    print((process.memory_info().rss - before) >> 20)
trim_heap()
print((process.memory_info().rss - before) >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="heap settings of glibc")
def test_freed_blocks_go_back_to_the_system_where_the_peak_is_decided() -> None:
    outcome = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    eager, lazy, trimmed = map(int, outcome.stdout.split())
    assert eager <= 10
    assert lazy >= 50  # of 100 MiB; without that the test would show nothing
    assert trimmed <= 10


def tiny_tensors(count: int) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{i // 400}.mlp.experts.{i % 400}.gate_proj.weight": (8,) for i in range(count)}


def test_what_is_held_of_tensors_beside_their_bytes_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the growth of what Python has allocated, from one count of tensors to another."""
    monkeypatch.setattr(planning, "METADATA_IN_BASELINE_BYTES", 0)
    # What is read ahead has objects of its own, in proportion to its bytes.
    monkeypatch.setattr(budgets_module, "LEAST_READ_AHEAD_BYTES", 1 << 20)
    peaks, promised = [], []
    for count in (10, 50, 250):  # the first loads modules
        root = tmp_path / str(count)
        root.mkdir()
        config = config_of(root, tiny_tensors(count), 6, method="mean", out=str(root / "out"))
        tracemalloc.start()
        try:
            plan = planning.make_plan(config, max_ram=planning.PROCESS_BYTES)
            run(plan)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        promised.append(plan.metadata_bytes)
    grown = peaks[2] - peaks[1]
    print(f"{grown / 200:.0f} bytes a tensor, {(promised[2] - promised[1]) / 200:.0f} planned for")
    assert grown <= promised[2] - promised[1] <= 2 * grown


@pytest.mark.long
def test_tensors_by_the_thousand_stay_under_the_ceiling(tmp_path: Path) -> None:
    """45,000 of eight experts: 0.7 MB of weights a checkpoint."""
    base = save_headers(tmp_path / "base", tiny_tensors(45_000), shard_bytes=1 << 17)
    command = [sys.executable, "-m", "isomerge_fast.cli", "run", "--base", str(base), "--method", "mean"]
    for task in range(8):
        (tmp_path / str(task)).symlink_to(base)
        command += ["--expert", str(tmp_path / str(task))]
    command += ["--max-ram", str(CEILING_BYTES), "--out", str(tmp_path / "out")]
    outcome = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, cwd=tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    peak_bytes = int(outcome.stderr.split("peak_kib=")[1]) * 1024
    print(f"peak {peak_bytes / 1e6:.0f} MB")
    assert peak_bytes <= CEILING_BYTES
