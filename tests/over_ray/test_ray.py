"""Merges over Ray: the bytes of a merge by one process, whatever happens to workers, machines, files and the driver."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import isomerge_fast as imf
import peers
from checkpoints import load_folder, save_folder
from isomerge_fast.errors import InputChangedError, UnreadableError
from isomerge_fast.execution.report import Progress
from isomerge_fast.execution.work_item import WorkResult
from isomerge_fast.planning.plan import Plan
from ray_faults import Given, journals

peers.need("ray", "ray")

from isomerge_fast.integrations.ray import cluster, executor, session, worker  # noqa: E402  # after that line
from ray_site import (  # noqa: E402  # likewise
    HOST,
    PATIENCE_SECONDS,
    Family,
    Merge,
    Site,
    expect_accounts,
    in_units,
    invoke,
    is_gone,
    wait_for,
    write_config,
)

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


# --- the same bytes ---------------------------------------------------------------------------------------------------

# family, changes of the configuration, units a file, options
MERGES: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "iso-c": ("sharded", {}, 1, {}),
    "iso-c-divided": ("sharded", {}, 2, {}),
    "iso-cts-rounded": (
        "sharded",
        {"method": "iso-cts", "dtype": "bfloat16", "stochastic_rounding": 7, "scaling": 0.7},
        2,
        {},
    ),
    "task-arithmetic-scalings": (
        "sharded",
        {"method": "task-arithmetic", "scaling": [0.5, 1.25]},
        2,
        {"io": "buffered"},
    ),
    "save-delta": ("sharded", {"save_delta": True}, 3, {}),
    "one-file": ("one-file", {"method": "iso-cts"}, 4, {}),
    "past-the-page-cache": ("large", {"method": "mean", "scaling": [1.0, 0.3]}, 3, {}),
    "adapters-to-checkpoint": ("adapters", {"method": "iso-cts"}, 2, {}),
    "adapters-to-adapter": ("adapters", {"adapter_rank": 3}, 3, {}),
}


@pytest.mark.parametrize("name", MERGES)
def test_two_workers_merge_to_the_same_bytes(
    connected: Site,
    families: dict[str, Family],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    results: list[WorkResult],
    name: str,
) -> None:
    family, changes, count, options = MERGES[name]
    merge = Merge(tmp_path, families[family], **changes)
    in_units(monkeypatch, count)
    merge.order(connected.head, "pwrite", "/new/", "meet")  # neither is to do all of it before the other comes
    plans: list[Plan] = []
    real = executor.RayExecutor.plan
    monkeypatch.setattr(
        executor.RayExecutor, "plan", lambda *given, **more: plans.append(real(*given, **more)) or plans[-1]
    )
    report = merge.over_ray(**options)
    merge.expect_done()
    expect_accounts(report, len(plans[0].tensors), 2)
    assert sum(worker["units"] for worker in report.workers) == len(results) > 1
    if count > 1:
        writers: dict[str, set[int]] = {}
        by = {name: entry["process"]["pid"] for result in results for name, entry in result.entries.items()}
        for tensor in plans[0].tensors:
            writers.setdefault(tensor.shard, set()).add(by[tensor.name])
        assert 2 in map(len, writers.values())  # one file by two processes
    assert json.loads(next(merge.out.rglob("report.json")).read_text())["workers"] == report.workers


def test_shards_are_divided_where_whole_ones_would_leave_workers_idle(
    connected: Site,
    families: dict[str, Family],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    results: list[WorkResult],
) -> None:
    """As ``divide`` does it."""
    merge = Merge(tmp_path, families["eight"])
    monkeypatch.setattr("isomerge_fast.planning.cost.LEAST_SECONDS", 1e-9)
    merge.order(connected.head, "pwrite", "/new/", "meet")
    report = merge.over_ray()
    assert len(results) > 1
    assert report.balance > 0
    expect_accounts(report, 8, 2)
    merge.expect_done()


def test_relative_paths_are_the_drivers(
    connected: Site, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    merge = Merge(tmp_path, families["sharded"])
    merge.config |= {
        "base": os.path.relpath(merge.config["base"]),
        "experts": [os.path.relpath(expert) for expert in merge.config["experts"]],
        "out": os.path.relpath(merge.out),
    }
    merge.over_ray()
    merge.expect_done()


# --- workers that die -------------------------------------------------------------------------------------------------


def kill_held(merge: Merge, given: Given, unit: int, running: Future[Any]) -> int:
    """Kills the process that the journal of the unit names, once it is held."""
    (held,) = wait_for(lambda: given.obeyed, "a worker is held", running)
    pid, lines = journals(merge.staging)[unit]
    assert pid == held
    os.kill(pid, signal.SIGKILL)
    return lines


def test_a_worker_killed_at_any_moment_of_a_unit(
    connected: Site,
    families: dict[str, Family],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    results: list[WorkResult],
) -> None:
    """Before its first tensor is written, in the middle, and when all are: what is done is found, not merged anew."""
    merge = Merge(tmp_path, families["eight"])
    in_units(monkeypatch, 1)
    points = [("pwrite", 0), ("pwrite", 3), ("fsync", 8)]
    orders = [
        merge.order(connected.head, call, "/new/", "hold", unit=1, lines=lines, times=1) for call, lines in points
    ]
    running = merge.started()
    assert [kill_held(merge, given, 1, running) for given in orders] == [0, 3, 8]
    report = running.result(PATIENCE_SECONDS)
    merge.expect_done()
    killed = [given.obeyed[0] for given in orders]
    (result,) = results
    merged_by = Counter(entry["process"]["pid"] for entry in result.entries.values())
    assert merged_by == {killed[1]: 3, killed[2]: 5}
    last = result.process["pid"]
    assert last not in killed
    assert {worker["pid"]: (worker["units"], worker["tensors"]) for worker in report.workers} == {
        killed[1]: (0, 3),
        killed[2]: (0, 5),
        last: (1, 0),
    }


def test_a_worker_that_dies_at_every_attempt(
    connected: Site, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = Merge(tmp_path, families["eight"])
    in_units(monkeypatch, 2)
    given = merge.order(connected.head, "pwrite", "/new/", "kill", unit=1, lines=1)
    with pytest.raises(
        imf.ResourceError,
        match=r"unit 1 \(model\.safetensors: 4 tensors 'layers\.4\.weight' to 'layers\.7\.weight'\): its worker was "
        r"lost 4 times, at last by \w+Error \(.+\); --resume continues",
    ):
        merge.over_ray()
    assert len(given.obeyed) == len(set(given.obeyed)) == 4
    merge.resume_locally()


# --- files that fail --------------------------------------------------------------------------------------------------


def test_no_space_for_one_worker(
    connected: Site, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = Merge(tmp_path, families["eight"])
    in_units(monkeypatch, 2)
    merge.order(connected.head, "pwrite", "/new/", "meet")
    given = merge.order(connected.head, "pwrite", "/new/", "ENOSPC", lines=2, alone=True)
    code, stdout, _ = invoke("run", "--ray", write_config(merge), "--device", "cpu", "--threads", 1, "--format", "json")
    error = json.loads(stdout)["error"]
    assert (code, error["kind"]) == (4, "resource")
    file = re.escape(f"{merge.staging}/run-") + "[0-9a-f]+/new/model.safetensors"
    assert re.fullmatch(
        rf"unit \d \(model\.safetensors: 4 tensors .*\) on {HOST}: {file}: no space left while writing; .*--resume",
        error["message"],
    )
    assert len(set(given.obeyed)) == 1
    merge.resume_locally()


def test_a_read_that_fails_once_is_tried_again(connected: Site, families: dict[str, Family], tmp_path: Path) -> None:
    merge = Merge(tmp_path, families["sharded"])
    given = merge.order(connected.head, "preadv", "expert1", "EIO", times=1)
    merge.over_ray()
    assert len(given.obeyed) == 1
    merge.expect_done()


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [("preadv", "EIO", r"cannot be read \(Input/output error\)"), ("open", "ENOENT", "gone during the merge")],
    ids=["unreadable", "gone"],
)
def test_a_worker_that_cannot_read_what_the_driver_can(
    connected: Site, families: dict[str, Family], tmp_path: Path, call: str, error: str, said: str
) -> None:
    """Not the input's fault: what is staged stays."""
    merge = Merge(tmp_path, families["eight"])
    given = merge.order(connected.head, call, "eight/expert/model.safetensors", error)
    with pytest.raises(
        UnreadableError,
        match=rf"unit 1 \(.*\) on {HOST}, tried 4 times: .*expert/model\.safetensors: "
        rf"tensor 'layers\.0\.weight'.*{said}.*--resume continues",
    ):
        merge.over_ray()
    assert len(given.obeyed) >= 4
    merge.resume_locally()


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_an_input_that_is_gone_or_changed(
    connected: Site, families: dict[str, Family], tmp_path: Path, change: str
) -> None:
    """As without Ray: the same inputs cannot succeed later, and nothing is left."""
    base, _ = families["eight"]
    expert = shutil.copytree(families["eight"][1][0], tmp_path / "expert")
    merge = Merge(tmp_path / "merge", (base, [expert]))
    given = merge.order(connected.head, "pwrite", "/new/", "hold")
    running = merge.started()
    wait_for(lambda: given.obeyed, "a worker is held", running)
    if change == "gone":
        shutil.rmtree(expert)
    else:
        os.utime(expert / "model.safetensors", ns=(1, 1))
    given.take_back()
    with pytest.raises(
        InputChangedError, match=rf"{re.escape(str(expert))}/model\.safetensors: {change} during the merge"
    ):
        running.result(PATIENCE_SECONDS)
    merge.expect_nothing()


def test_a_weight_that_is_not_finite_ends_the_other_units(
    connected: Site, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = families["eight"]
    tensors = load_folder(families["eight"][1][0])
    tensors["layers.6.weight"][3, 4] = float("nan")
    merge = Merge(tmp_path / "merge", (base, [save_folder(tmp_path / "expert", tensors)]))
    in_units(monkeypatch, 2)
    merge.order(connected.head, "preadv", "/model.safetensors", "meet", unit=1)
    held = merge.order(connected.head, "preadv", "/model.safetensors", "hold", unit=2)
    running = merge.started()
    with pytest.raises(
        imf.InputError,
        match=r"unit 1 \(.*\) on .*: a weight is not finite:\n  - .*/expert/model\.safetensors: "
        r"tensor 'layers\.6\.weight' holds 1 NaN or Inf",
    ):
        running.result(PATIENCE_SECONDS)
    merge.expect_nothing()
    wait_for(lambda: all(is_gone(pid) for pid in held.obeyed), "the other worker is gone")
    assert held.obeyed


def test_what_a_worker_says_of_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a journal that cannot be written, of memory, and of a machine that joined late and has another version."""

    class Here:
        folder = tmp_path

    job, unit = Here(), object()
    cases: list[tuple[Exception, str]] = [
        (OSError(28, "No space left on device"), f"{tmp_path}: No space left on device; --resume continues"),
        (OSError(5, "Input/output error", "file"), "file: Input/output error; --resume continues"),
        (MemoryError("4 GB"), "out of memory (4 GB); --resume continues"),
    ]
    for error, said in cases:

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(worker, "merge_item", fail)
        with pytest.raises(imf.ResourceError) as raised:
            worker.merge_there(job, unit, imf.__version__, ".")  # type: ignore[arg-type]  # not looked into
        assert str(raised.value) == said
        assert raised.value.host == socket.gethostname()  # type: ignore[attr-defined]  # set there
    with pytest.raises(imf.ConfigError, match=r"isomerge-fast .* is installed there; the driver has 0\.0\.1"):
        worker.merge_there(job, unit, "0.0.1", ".")  # type: ignore[arg-type]  # not looked into


# --- requests that cannot be met --------------------------------------------------------------------------------------


def test_more_threads_than_any_machine_has(connected: Site, families: dict[str, Family], tmp_path: Path) -> None:
    merge = Merge(tmp_path, families["one-file"])
    said = (
        r"no machine of the Ray cluster has 99 CPU\(s\) and \d+ bytes of memory for one worker "
        rf"\({HOST} \(.*\) has 2 CPUs, 0 GPUs, \d+ bytes\); a lower --threads or --max-ram takes less"
    )
    started = time.monotonic()
    with pytest.raises(imf.ResourceError, match=said):
        merge.over_ray(threads=99)
    code, _, told = invoke("run", write_config(merge), "--ray", "--threads", 99, "--device", "cpu")
    assert (code, re.search(said, told) is not None) == (4, True)
    assert time.monotonic() - started < 20
    merge.expect_nothing()


def test_more_memory_than_any_machine_has(
    connected: Site, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = Merge(tmp_path, families["one-file"])
    real = cluster.machines

    def machines() -> list[cluster.Machine]:
        found = real()
        for machine in found:
            machine.resources["memory"] = 1e8
        return found

    monkeypatch.setattr(cluster, "machines", machines)
    with pytest.raises(imf.ResourceError, match=r"has 1 CPU\(s\) and \d{9} bytes of memory .* 100000000 bytes"):
        merge.over_ray()
    merge.expect_nothing()


def test_an_unfinished_merge_that_began_with_more_threads_than_there_are(
    connected: Site, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes on: each of its tensors is computed by one core."""
    merge = Merge(tmp_path, families["one-file"])

    def fail(*_: object) -> None:
        raise imf.ResourceError("this time")

    with monkeypatch.context() as patch:
        patch.setattr("isomerge_fast.execution.engine.merge_item", fail)
        with pytest.raises(imf.ResourceError, match="this time"):
            imf.merge(merge.config, device="cpu", threads=99)
    assert merge.staging.exists()
    merge.over_ray(resume=True)
    merge.expect_done()


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"device": "cuda"}, imf.ResourceError, "device 'cuda': no machine of the Ray cluster has a GPU"),
        ({"device": "cuda:1"}, imf.ConfigError, "device 'cuda:1': over Ray it is auto, cpu or cuda"),
        ({"threads": 0}, imf.ConfigError, "threads is 0; it is 1 or more"),
        ({"threads": -1}, imf.ConfigError, "threads is -1; it is 1 or more"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(
    connected: Site,
    families: dict[str, Family],
    tmp_path: Path,
    options: dict[str, Any],
    kind: type[Exception],
    said: str,
) -> None:
    merge = Merge(tmp_path, families["one-file"])
    with pytest.raises(kind, match=re.escape(said)):
        merge.over_ray(**options)
    merge.expect_nothing()


def test_a_folder_for_the_output_that_cannot_be(connected: Site, families: dict[str, Family], tmp_path: Path) -> None:
    merge = Merge(tmp_path, families["one-file"])
    (tmp_path / "file").write_text("")
    merge.config["out"] = str(tmp_path / "file/inside/out")
    with pytest.raises(imf.ResourceError, match=r"file/inside: cannot be written to \(Not a directory\)"):
        merge.over_ray()


# --- the command line, and what is seen of it -------------------------------------------------------------------------


def test_ray_on_the_command_line(
    connected: Site, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an address, and without one at the end, before another option, and before the file."""
    addresses: list[str | None] = []
    real = session.ray_executor

    def recorded(address: str | None, **options: Any) -> Any:
        addresses.append(address)
        return real(address, **options)

    monkeypatch.setattr(session, "ray_executor", recorded)
    more = ["--device", "cpu", "--threads", "1", "--format", "json"]
    lines: list[tuple[Callable[[Path], list[object]], str | None]] = [
        (lambda file: [file, *more, "--ray"], None),
        (lambda file: [file, "--ray", *more], None),
        (lambda file: ["--ray", file, *more], None),
        (lambda file: ["--ray", connected.address, file, *more], connected.address),
        (lambda file: [file, f"--ray={connected.address}", *more], connected.address),
        (lambda file: [file, *more, "--ray", "auto"], "auto"),
    ]
    for number, (line, address) in enumerate(lines):
        merge = Merge(tmp_path / str(number), families["one-file"])
        code, stdout, told = invoke("run", *line(write_config(merge)))
        assert code == 0, told
        assert addresses.pop() == address
        report = json.loads(stdout)
        assert report["workers"][0]["pid"] != os.getpid()
        merge.expect_done()


def test_the_observer_sees_how_far_all_workers_are(
    connected: Site, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = Merge(tmp_path, families["eight"])
    in_units(monkeypatch, 2)
    given = merge.order(connected.head, "pwrite", "/new/", "hold", lines=2)
    seen: list[tuple[int, int, int, int]] = []
    phases: list[str] = []

    def observe(progress: Progress) -> None:
        seen.append((progress.done_tensors, progress.done_bytes, progress.total_tensors, progress.total_bytes))
        phases.append(progress.phase)
        if 0 < progress.done_tensors < progress.total_tensors:
            given.take_back()

    report = merge.over_ray(observer=observe)
    assert {(tensors, total) for _, _, tensors, total in seen} == {(8, report.read_bytes + report.write_bytes)}
    assert seen == sorted(seen)
    assert seen[-1][:2] == seen[-1][2:]
    assert any(0 < tensors < 8 and 0 < done < total for tensors, done, _, total in seen)
    assert any(re.fullmatch(r"[12] worker\(s\), unit 0/2", phase) for phase in phases)
    merge.expect_done()
