"""The command behind ``make gpu``: stages that abort, hang or leave processes behind; its files; its dry run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu_command, baselines, environment, rates
from benchmarks.gpu.__main__ import run_stages
from benchmarks.gpu.runner import ROOT, child_command, child_environment
from benchmarks.gpu.schedule import CALL_SECONDS, CALLS, DEVICE, Stage
from benchmarks.gpu.summary import MAX_LINES, summary
from benchmarks.gpu.table import MARKS, readings_table, table_of
from benchmarks.harness import peers as harness
from benchmarks.harness.markdown import write_between
from benchmarks.harness.readings import Results, Row, Rows, read_rows
from forks import Forks
from isomerge_fast.bench.ceilings import installed, median_seconds


def fake(name: str, *, seconds: float = 30.0, processes: int = 1) -> Stage:
    return Stage(name, f"stages_that_fail:{name}", seconds, processes)


def run_fakes(folder: Path, *stages: Stage) -> tuple[int, list[dict[str, Any]]]:
    results = Results(folder, "A device (of mine)")
    failed = run_stages(stages, results, device="cpu", small=False, end=time.monotonic() + 60.0)
    return failed, json.loads((folder / "A-device-of-mine.json").read_text())["rows"]


def is_alive(pid: int) -> bool:
    """Whether a process is there and not only waiting to be noticed as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_dead(*pids: int) -> None:
    end = time.monotonic() + 10.0
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_alive(pid)]


def test_a_stage_that_aborts_hangs_or_leaves_a_process_costs_the_others_nothing(tmp_path: Path) -> None:
    start = time.monotonic()
    stages = [fake("aborts"), fake("hangs", seconds=2.0), fake("leaves_a_process"), fake("works")]
    failed, rows = run_fakes(tmp_path, *stages)
    assert time.monotonic() - start < 20.0
    assert failed == 2
    found = {(row["stage"], row["name"]): row for row in rows}
    assert found["aborts", "before"]["value"] == 1
    assert re.match("SIGABRT: .*why it aborts", found["aborts", "process 0"]["failed"])
    assert found["hangs", "process 0"]["cut"].startswith("out of time")
    assert "value" in found["works", "first"]
    wait_until_dead(found["hangs", "before"]["pid"], found["leaves_a_process", "left"]["pid"])


def test_processes_of_a_stage_run_at_once_and_an_error_in_one_row_is_that_rows(tmp_path: Path) -> None:
    failed, rows = run_fakes(tmp_path, fake("works", processes=2))
    assert sorted(row["value"] for row in rows if "value" in row) == [0, 1]
    assert [row["failed"].partition(":")[0] for row in rows if "failed" in row] == 2 * ["ZeroDivisionError"]
    assert failed == 2


def test_the_seconds_of_a_stage_are_those_of_its_process_imports_included(tmp_path: Path) -> None:
    _, (row,) = run_fakes(tmp_path, Stage("left", "stage_imported_slowly:tells", 20.0))
    assert row["seconds"] <= 19.5


def test_one_stage_again_replaces_its_rows_alone(tmp_path: Path) -> None:
    _, before = run_fakes(tmp_path, fake("works"), fake("leaves_a_process"))
    _, after = run_fakes(tmp_path, fake("leaves_a_process"))
    assert [row["name"] for row in after] == ["first", "left"]
    assert after[0] == before[0]
    assert after[1]["pid"] != before[1]["pid"]
    assert {file.name for file in tmp_path.iterdir()} == {"A-device-of-mine.json", "A-device-of-mine.txt"}


def own_rows(folder: Path, **circumstances: Any) -> Rows:
    """Rows of a stage in this process."""
    return Rows("mine", folder / "rows.json", **({"device": "cpu", "small": True, "seconds": 60.0} | circumstances))


def written(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((folder / "rows.json").read_text())["rows"]}


def test_values_that_no_row_can_hold_are_that_rows_failure(tmp_path: Path) -> None:
    rows = own_rows(tmp_path)
    assert rows.attempt("taken", lambda: {"name": "a", "stage": "b"}) == {}
    assert rows.attempt("no JSON", lambda: {"value": torch.zeros(1)}) == {}
    assert rows.attempt("like parameters", lambda: {"self": 1, "function": 2}) == {"self": 1, "function": 2}
    found = written(tmp_path)
    assert found["taken"]["failed"] == (
        "ValueError: a row has a name and a stage of its own: these values need other names"
    )
    assert found["no JSON"]["failed"].startswith("TypeError: ")
    assert found["like parameters"]["function"] == 2


def test_the_environment_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nvidia-smi calls "name" is no row's name; releases are those of the distributions."""
    answers = [f"{index} of it" for index in range(len(environment.QUERY.split(",")))]
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), 0, ", ".join(["An H200", *answers[1:]]))
    )
    rows = own_rows(tmp_path)
    rows.attempt("nvidia-smi", environment._queried)
    environment.environment(rows)
    found = written(tmp_path)
    assert found["nvidia-smi"]["gpu"] == "An H200"
    assert found["nvidia-smi"]["driver_version"] == "1 of it"
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert installed("no-such-distribution", "torch") == found["versions"]["torch"]
    assert installed("no-such-distribution") is None
    assert found["versions"]["fusion-bench"] == (installed("fusion-bench") or "absent")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_runs_ends_with_the_command(tmp_path: Path, number: int) -> None:
    file = tmp_path / "pids"
    command = f"""
import signal, sys, time
from benchmarks.gpu import rates
from benchmarks.gpu.__main__ import leave, run_stages
from benchmarks.harness.readings import Results
from benchmarks.gpu.schedule import Stage
from pathlib import Path
signal.signal(signal.SIGTERM, leave)
stage = Stage("waits", "stages_that_fail:waits_for_a_file", 60.0)
run_stages([stage], Results(Path({str(tmp_path)!r}), "d"), device="cpu", small=False, end=time.monotonic() + 60.0)
"""
    environment = child_environment("cpu", 1) | {"ISOMERGE_TEST_FILE": str(file)}
    process = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 20.0
    while "waiting" not in (tmp_path / "d.txt").read_text() if (tmp_path / "d.txt").exists() else True:
        assert time.monotonic() < end
        time.sleep(0.02)
    pids = [int(pid) for pid in file.read_text().split()]
    process.send_signal(number)
    process.wait(10.0)
    wait_until_dead(*pids)
    assert [row["name"] for row in json.loads((tmp_path / "d.json").read_text())["rows"]] == ["waiting"]


def test_stages_fit_into_their_calls() -> None:
    for call, stages in CALLS.items():
        assert sum(stage.seconds for stage in stages) <= CALL_SECONDS[call]
        assert DEVICE.seconds + CALL_SECONDS[call] <= 600
    assert CALL_SECONDS == {"a": 420.0, "b": 200.0}


def test_a_command_without_a_gpu_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "none")]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("no device cuda:0")
    assert not (tmp_path / "none").exists()


def test_the_command_itself_does_without_torch() -> None:
    check = "import sys, benchmarks.gpu.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def readings() -> list[dict[str, Any]]:
    """Rows as of a GPU that takes one second for everything, as far as the summary looks at them."""
    shapes = ("4096 x 4096", "1024 x 4096", "14336 x 4096", "4096 x 14336")
    rows: list[dict[str, Any]] = []
    for method in ("iso-c", "iso-cts"):
        for shape in shapes:
            rows.append({"stage": "methods", "name": f"{method} {shape}", "seconds": 1.0, "certified": True})
            for label, seconds in (("{}, gesvd", 3.0), ("fusion-bench {}", 9.0)):
                name = label.format(f"{method} {shape}")
                rows.append({"stage": "published", "name": name, "seconds": seconds, "estimated": "11 x one SVD"})
    rows += [{"stage": "kernels", "name": f"check {n}", "failed": "wrong\nby 2"} for n in range(40)]
    rows += [
        {"stage": "merge", "name": "iso-c, again", "seconds": 2.0, "read_gb_per_s": 2.0, "uncertified": 0},
        {"stage": "merge", "name": "task-arithmetic, again", "seconds": 1.0, "read_gb_per_s": 4.0, "uncertified": 0},
        {"stage": "products", "name": "fp64, 4096, 64x32/8/2", "failed": "out of memory"},
        *(
            {"stage": "bandwidths", "name": f"sums, 4096 x 4096, {name}", "of_copy": share, "of_copy_as_large": 1.0}
            | {"host_seconds": 1e-4}
            for name, share in (("2048/4", 0.8), ("1024/4", 0.9))
        ),
        {"stage": "methods", "name": "process 0", "cut": "out of time: "},
    ]
    return rows


def test_the_summary_ends_with_what_matters_and_is_short() -> None:
    lines = summary(readings())
    assert len(lines) <= MAX_LINES
    assert not [line for line in lines if "\n" in line]
    assert sum(map(len, lines)) < 12_000  # of which the end is seen
    assert "| sums | 0.80 / 1.00 (0.90 / 1.00 by 1024/4) |" in lines
    assert "A call with the host, µs: sums 100." in lines
    # What failed comes last; before that 32 layers of 2 + 2 + 2 + 1 matrices, FusionBench's 9 s and gesvd's 3 s.
    end = lines.index("== correctness, once more")
    assert "kernels 40 (40 FAILED)" in lines[end + 1]
    assert "and 29 more" in lines[end:]
    assert lines[-1] == "CUT by their time, what came later is missing: methods"
    whole = "iso-c    arithmetic 224.0 s; FusionBench 2016.0 s (in part estimated); published by gesvd 672.0 s"
    assert lines[end - 5].startswith(whole)
    assert lines[end - 4] == "iso-c    32 layers as the two merged above: 32 s"
    estimate = "9000 (9 ×; estimated: 11 x one SVD) | 3000 (3 ×; estimated: 11 x one SVD)"
    assert f"| iso-c 4096 x 4096 | 1000 |  | {estimate} |" in lines
    assert lines[end - 2] == "disk     145 + 16 GB: 80 s at 2 GB/s"
    assert lines[end - 1] == "disk     145 + 16 GB: 40 s at the rate of task-arithmetic above"
    without = summary([row for row in readings() if row["name"] != "iso-c 1024 x 4096"])
    assert "?" in without[without.index("== correctness, once more") - 5]


# What FusionBench's file imports, and a method by one SVD.
ISO_UTILS = """
import torch
from fusion_bench.utils import timeit_context
from fusion_bench.utils.type import StateDictType

def iso_c(task_vectors, accelerator) -> StateDictType:
    print("merging")
    with timeit_context("ISO-C Merging"):
        u, sigma, vt = torch.linalg.svd(sum(each["w"].to(accelerator) for each in task_vectors), full_matrices=False)
    return {"w": sigma.mean() * (u @ vt)}

def iso_cts(task_vectors, common_space_fraction, accelerator) -> StateDictType:
    raise NotImplementedError(common_space_fraction)
"""


@pytest.fixture
def foreign_iso_utils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of FusionBench's name, before any other, that cannot be imported: the file that matters."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "fusion_bench"]:
        monkeypatch.delitem(sys.modules, name)
    file = tmp_path / "fusion_bench" / "method" / "isotropic_merging" / "iso_utils.py"
    file.parent.mkdir(parents=True)
    (tmp_path / "fusion_bench" / "__init__.py").write_text("import a_package_that_is_absent")
    monkeypatch.syspath_prepend(tmp_path)
    harness.iso_utils.cache_clear()
    yield file
    harness.iso_utils.cache_clear()


def test_fusion_bench_runs_where_only_its_file_does(
    foreign_iso_utils: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign_iso_utils.write_text(ISO_UTILS)
    baselines.baselines(own_rows(tmp_path))
    found = written(tmp_path)
    assert found["fusion-bench"]["loaded"] == "its functions' file by itself"
    assert found["fusion-bench iso-c 96 x 96"]["distance"] < 1e-4
    assert found["fusion-bench iso-cts 96 x 96"]["failed"] == "NotImplementedError: 0.8"
    assert found["fusion-bench iso-cts 64 x 160"]["estimated"] == "11 x one SVD"
    assert capsys.readouterr().out == ""
    assert "fusion_bench" not in sys.modules


@pytest.mark.usefixtures("foreign_iso_utils")
def test_without_fusion_bench_the_published_algorithm_takes_its_place(tmp_path: Path) -> None:
    baselines.baselines(own_rows(tmp_path))
    found = written(tmp_path)
    assert "a_package_that_is_absent" in found["fusion-bench"]["absent"]
    assert found["iso-cts 96 x 96, default"]["distance"] < 1e-4
    assert not [row for row in found.values() if "failed" in row]


@pytest.mark.usefixtures("foreign_iso_utils")
def test_where_time_is_short_baselines_are_estimated_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {(96, 96): 2.0, (160, 64): 5.0, (64, 160): 1.0}
    monkeypatch.setattr(baselines, "svd", lambda x, driver: {"seconds": seconds.get(tuple(x.shape))})
    baselines.baselines(own_rows(tmp_path, seconds=12.0))  # of which 3 are to be left
    found = written(tmp_path)
    assert "distance" in found["iso-c 96 x 96, default"]
    assert found["iso-cts 96 x 96, default"]["estimated"] == "11 x one SVD"
    assert found["iso-cts 96 x 96, default"]["seconds"] == 22.0
    assert "distance" in found["iso-c 160 x 64, default"]
    assert found["iso-cts 160 x 64, default"]["seconds"] == 55.0
    assert found["one SVD 64 x 160, default"]["left_out"] == "no time"  # three times the longest may be 15 s
    assert found["iso-c 64 x 160, default"]["left_out"] == "its SVD was not timed"


@pytest.mark.usefixtures("foreign_iso_utils")
def test_baselines_of_a_gpu_come_in_the_order_of_what_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda x, driver, **options: svd(x, **options))  # which a CPU lacks
    monkeypatch.setattr(baselines, "drivers", lambda device: (None, "gesvd", "gesvda"))
    baselines.baselines(own_rows(tmp_path))
    names = list(written(tmp_path))
    assert names[1:4] == [f"one SVD 96 x 96, {driver}" for driver in ("default", "gesvd", "gesvda")]
    assert names[4:6] == ["iso-c 96 x 96, default", "iso-c 96 x 96, gesvd"]
    natural, other = names[6:13], names[13:]
    assert natural[-1] == "iso-cts 96 x 96, default"
    assert [name.replace("default", "gesvd") for name in natural] == other


def test_seconds_on_a_gpu_are_those_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of 10 µs, by the clock of a GPU that is not there: many between two events, and one wait for them."""
    calls, waits = [0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = calls[0]

        def synchronize(self) -> None:
            waits.append(calls[0])

        def elapsed_time(self, other: Event) -> float:
            return 0.01 * (other.at - self.at)

    def call() -> None:
        calls[0] += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: __import__("contextlib").nullcontext())
    seconds = median_seconds(call, torch.device("cuda:0"), budget_seconds=0.01, rounds=9)
    assert seconds == pytest.approx(1e-5)
    assert calls[0] >= 100 * (len(waits) - 1)
    assert len(waits) <= 10


def of_every_section() -> list[dict[str, Any]]:
    """``readings``, and rows of what the table shows beside."""
    rows = [row for row in readings() if "failed" not in row]
    smi = {"gpu": "An H200", "driver_version": "580.1", "clocks.sm": "1980 MHz"}
    svd = {"seconds": 2.5, "error": 3e-4, "orthogonality": 2e-3}
    rows += [
        {"stage": "environment", "name": "versions", "torch": "2.11.0", "triton": "3.6.0", "cupy": "absent"},
        {"stage": "environment", "name": "nvidia-smi", **smi},
        {"stage": "methods", "name": "iso-c 4096 x 4096, profile", "device_ms": 900.0, "busy": 0.9, "operations": []},
        {"stage": "published", "name": "one SVD 4096 x 4096, default", **svd},
        {"stage": "kernels", "name": "one", "failed": "wrong"},
        {"stage": "threads", "name": "iso-c 768 x 768, 4 threads", "threads": 4, "seconds": 0.5, "speedup": 3.5},
    ]
    stack = {"stage": "methods", "name": "iso-c 16 x 768 x 768, stack", "matrices": 16, "one_by_one": 0.08}
    rows.append(stack | {"seconds": 0.016, "certified": True, "escalations": 1})
    rows.append({"stage": "methods", "name": f"{stack['name']}, profile", "busy": 0.75, "launches": 320} | {"waits": 3})
    rows.append(stack | {"name": "iso-c, matrices of ViT-B/32", "matrices": 72, "one_by_one": None, "seconds": 0.072})
    rows[-1] |= {"certified": False, "escalations": 0}
    merge = {"stage": "merge", "name": "iso-c, ViT-B/32, again", "seconds": 0.5, "read_gb_per_s": 6.1, "uncertified": 0}
    rows.append(merge | {"phases": {"prepare": 0.1, "read": 0.05, "compute": 0.3, "write": 0.05, "total": 0.5}})
    for config, ratio in (("64x32/8/2", 0.84), ("64x16/8/2", 0.95)):
        row = {"stage": "products", "name": f"fp64, 4096, {config}", "seconds": 1e-3, "ratio": ratio}
        rows.append(row | {"tflop_per_s": 137.4, "error": 1e-14, "torch_error": 2e-14})
    for shape in ("4096 x 4096", "1024 x 4096"):
        row = {"stage": "bandwidths", "name": f"task_sum, {shape}, 2048/4", "seconds": 1e-4, "of_copy": 0.88}
        rows.append(row | {"of_copy_as_large": 0.9, "host_seconds": 2e-4})
    return rows


def test_the_table_says_what_the_rows_say() -> None:
    lines = readings_table("An H200", of_every_section()).splitlines()
    assert lines[0].startswith(
        "**An H200**: torch 2.11.0, triton 3.6.0, driver 580.1, SM clock 1980 MHz. Rows (failed)"
    )
    assert "`kernels` 1 (one)" in lines[0]
    estimate = "9000 (9 ×; estimated: 11 x one SVD) | 3000 (3 ×; estimated: 11 x one SVD)"
    assert f"| iso-c 4096 x 4096 | 1000 | 90% | {estimate} |" in lines
    assert "| one SVD 4096 x 4096, default | 2500 | 3e-04 | 2e-03 |" in lines
    assert "| fp64 | 0.84, 137 (0.95, 137 by 64x16/8/2) |" in lines
    assert "Largest errors, ours / torch's: fp64 1e-14 / 2e-14." in lines
    assert "| task_sum | 0.88 / 0.90 | 0.88 / 0.90 |" in lines
    assert "A call with the host, µs: sums 100, task_sum 200." in lines
    assert "| task-arithmetic, again | 1.00 | 4.00 |  | 0 |" in lines
    assert "| iso-c, again | 0.50 | 6.10 |  | 0 | 0.05 | 0.30 | 0.05 |" in lines
    assert "| iso-c 16 x 768 x 768, stack | 16 | 1 | 80 (5 ×) | 75% | 20 | 1 |" in lines
    assert "| iso-c, matrices of ViT-B/32 | 72 not certified | 1 |  |  |  | 0 |" in lines
    assert "| iso-c 768 x 768, 4 threads | 500 | 3.50 |" in lines
    assert lines[-1].strip() == "disk     145 + 16 GB: 40 s at the rate of task-arithmetic above"


def test_the_table_of_rows_without_baselines_has_no_columns_for_them() -> None:
    rows = [row for row in readings() if row["stage"] == "methods"]
    assert "| 8 tasks | ours, ms | GPU busy |" in readings_table("A GPU", rows).splitlines()


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("NVIDIA-*.json")), ids=lambda f: f.stem)
def test_the_table_of_the_docs_is_that_of_the_committed_readings(file: Path) -> None:
    assert table_of(file) in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_the_docs_have_the_tables_marks(tmp_path: Path) -> None:
    """Between which ``--write`` puts it, once and again."""
    file, document = tmp_path / "d.json", tmp_path / "gpu.md"
    file.write_text(json.dumps({"device": "An H200", "rows": of_every_section()}))
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    document.write_text(text)
    for _ in range(2):
        write_between(document, MARKS, table_of(file))
    begin, end = MARKS
    head, tail = text.split(begin)[0], text.split(end)[1]
    assert document.read_text() == f"{head}{begin}\n{table_of(file)}\n{end}{tail}"


@pytest.mark.parametrize("late", [False, True], ids=["ahead", "late"])
def test_device_seconds_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """A call of 3 µs that takes 50 of the host, by the clocks of both; ``late``: copies that take no time."""
    host, device = [0.0], [0.0]

    def enqueue(by_host: float, by_device: float) -> None:
        host[0] += by_host
        device[0] = max(device[0], host[0]) + by_device

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(device[0], host[0])

        def query(self) -> bool:
            return host[0] >= self.at

        def synchronize(self) -> None:
            host[0] = max(host[0], self.at)

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: __import__("contextlib").nullcontext())
    monkeypatch.setattr(rates, "_copying", lambda device: lambda: enqueue(1e-6, 0.0 if late else 1e-4))
    calls = [lambda: enqueue(5e-5, 3e-6)] * 2
    if late:
        with pytest.raises(RuntimeError, match="the host queued 40 calls in more time than"):
            rates.device_seconds(calls, torch.device("cuda:0"))
    else:
        assert rates.device_seconds(calls, torch.device("cuda:0")) == pytest.approx(3e-6)


def in_forks(forks: Forks, folder: Path) -> Callable[..., None]:
    """Return a ``run_stage`` whose stages are forks of a process that has loaded torch, and call everything once."""

    def run(stage: Stage, add: Callable[[Row], None], **settings: Any) -> None:
        file = folder / f"{stage.name}.json"
        _, _, function, *words = child_command(stage, file, **settings)[1:]
        module, _, name = function.partition(":")
        code = f"""
import importlib, json, sys
from pathlib import Path
from benchmarks.harness.readings import Rows
from isomerge_fast.bench import ceilings
ceilings.median_seconds = lambda call, device, **_: ceilings.timed(call, device)[1]
file, settings = sys.argv[1:]
importlib.import_module({module!r}).{name}(Rows(file=Path(file), **json.loads(settings)))
"""
        environment = child_environment("cpu", 1)
        done = forks.run([sys.executable, "-c", code, *words], cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        for row in read_rows(file):
            add(row)

    return run


@pytest.mark.slow
def test_the_suite_runs_dry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage but the checks of tests/test_kernels.py, and the short ones; then one by the command itself."""
    left_out = {"kernels", "memcheck", "environment", "ceilings", "threads"}
    stages = [stage.name for found in CALLS.values() for stage in found if stage.name not in left_out]
    (tmp_path / "rows").mkdir()
    out = tmp_path / "out"
    arguments = ["--device", "cpu", "--small", "--out", str(out)]
    warm = "import torch, torch.profiler, isomerge_fast.execution.engine, isomerge_fast.methods"
    with Forks(warm, TRITON_INTERPRET="1") as forks:
        monkeypatch.setattr(gpu_command, "run_stage", in_forks(forks, tmp_path / "rows"))
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        monkeypatch.setattr(
            sys, "argv", ["gpu", *arguments, *(word for stage in stages for word in ("--stage", stage))]
        )
        assert gpu_command.main() == 0
    files = sorted(out.iterdir())
    assert [re.fullmatch(r"[A-Za-z0-9-]+\.(json|txt)", file.name) is not None for file in files] == [True, True]
    told = capsys.readouterr().out
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--stage", "primitives"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    assert sorted(out.iterdir()) == files
    rows = json.loads(files[0].read_text())["rows"]
    assert {row["stage"] for row in rows} == set(stages)
    assert not [row for row in rows if "failed" in row]
    profiles = [row for row in rows if row["name"].endswith(", profile")]
    assert len(profiles) == 4 + 4  # of matrices by themselves, and of stacks
    assert all(row["device_ms"] > 0 and row["busy"] > 0 for row in profiles)
    names = {row["name"] for row in rows if row["stage"] in ("methods", "primitives")}
    assert {"iso-cts 96 x 96, noise", "iso-cts 160 x 64, fast", "polar 3 x 48 x 48, gram-eigh-fp64"} <= names
    merges = {row["name"]: row for row in rows if row["stage"] == "merge"}
    assert merges["iso-cts"]["uncertified"] == merges["iso-cts, ViT-B/32, again"]["uncertified"] == 0
    at_once = [row for row in rows if "matrices" in row]
    assert len(at_once) == 4 + 1 + 2  # one by eigensolvers
    assert all(row["certified"] and row["one_by_one"] > 0 for row in at_once)
    assert {"iso-c 160 x 64, any company", "iso-cts 160 x 64, any company"} <= {row["name"] for row in rows}
    assert files[1].read_text() == told + outcome.stdout
