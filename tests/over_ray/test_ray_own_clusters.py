"""Clusters of their own: two workers beside one process, and what is left when a driver or a head dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import isomerge_fast as imf
import peers
from checkpoints import save_folder
from llama_tensors import TASKS, WIDE, llama_tensors
from ray_faults import Machine

peers.need("ray", "ray")

import ray  # noqa: E402  # after the line that skips where Ray is absent

from ray_site import (  # noqa: E402  # likewise
    PATIENCE_SECONDS,
    STORE_BYTES,
    Family,
    Merge,
    command,
    expect_accounts,
    is_gone,
    killed_when_held,
    wait_for,
    write_config,
)

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

# --- clusters of their own ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_of_162_million_parameters(
    unconnected: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster that is started for it, one core a worker; shows how much sooner it is done."""
    folders = [
        save_folder(tmp_path / f"model{seed}", llama_tensors(seed, **WIDE), shards=2) for seed in range(TASKS + 1)
    ]
    merge = Merge(tmp_path / "merge", (folders[0], folders[1:]), scaling=0.3)
    seconds = {}
    started = time.perf_counter()
    imf.merge({**merge.config, "out": str(merge.whole)}, device="cpu", threads=1)
    seconds["one process"] = time.perf_counter() - started
    monkeypatch.setenv("RAY_worker_niceness", "0")  # as ``--ray local`` has it
    started = time.perf_counter()
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=STORE_BYTES)
    try:
        report = merge.over_ray()
    finally:
        ray.shutdown()
    seconds["two workers"] = time.perf_counter() - started
    merge.expect_done()
    expect_accounts(report, len(llama_tensors(0, **WIDE)), 2)
    with capsys.disabled():
        told = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        ratio = seconds["one process"] / seconds["two workers"]
        print(
            f"\niso-c, 4 experts, one thread a process: {told} ({report.seconds['total']:.1f} s of it the merge): "
            f"{ratio:.2f} times as fast, balance {report.balance:.3f}"
        )


@pytest.mark.slow
def test_a_driver_killed_with_a_cluster_of_its_own(
    unconnected: None, families: dict[str, Family], tmp_path: Path
) -> None:
    """The cluster goes with it, and the merge is resumed over another one."""
    merge = Merge(tmp_path, families["sharded"])
    machine = Machine(tmp_path / "orders")
    line = command("run", write_config(merge), "--ray", "local", "--threads", 1, "--device", "cpu", "--format", "json")
    held = min(2, os.cpu_count() or 1)
    below = killed_when_held(merge, machine, line, held, env=machine.environment)
    # Two of Ray's agents, which know nothing of the merge, go after a minute.
    agents = {pid for pid, name in below.items() if re.fullmatch("ray::[A-Za-z]+Agent", name)}
    assert len(below) >= len(agents) + held + 2  # of which one is the raylet, and one the head's server
    try:
        wait_for(lambda: all(map(is_gone, below.keys() - agents)), "the cluster is gone")
    finally:
        for pid in agents:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    # What Ray tells of the attempt that fails is not among the answer.
    given = merge.order(machine, "preadv", "expert0", "EIO", times=1)
    environment = {**os.environ, **machine.environment}
    done = subprocess.run(
        [*line, "--resume"], capture_output=True, text=True, env=environment, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(given.obeyed) == 1
    assert "Task merge_there failed" in done.stderr
    report = json.loads(done.stdout)
    assert sum(worker["tensors"] for worker in report["workers"] if not worker["units"]) >= 2 * held
    merge.expect_done()


@pytest.mark.slow
def test_a_cluster_whose_head_is_lost(unconnected: None, families: dict[str, Family], tmp_path: Path) -> None:
    """A word of ours comes before Ray ends the process, and nobody writes any more then."""
    merge = Merge(tmp_path, families["eight"])
    machine = Machine(tmp_path / "orders")
    given = merge.order(machine, "pwrite", "/new/", "hold", lines=2)
    line = command("run", write_config(merge), "--ray", "local", "--threads", 1, "--device", "cpu")
    environment = {**os.environ, **machine.environment}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as driver:
        wait_for(lambda: given.obeyed or driver.poll() is not None, "a worker is held")
        below = psutil.Process(driver.pid).children(recursive=True)
        (head,) = [process for process in below if process.name() == "gcs_server"]
        head.kill()
        stdout, stderr = driver.communicate(timeout=PATIENCE_SECONDS)
    assert (driver.returncode, stdout) == (4, "")
    said = r"isomerge: the head of the Ray cluster \([\d.]+:\d+\) has not answered for 30 s; --resume continues\n"
    assert re.fullmatch(said, stderr)
    assert all(map(is_gone, given.obeyed))
    given.take_back()
    merge.resume_locally()
