"""Clusters of Ray on this machine, and merges over them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

import isomerge_fast as imf
import peers
from executors import runs_of
from fault_driver import difference, state_of
from isomerge_fast.checkpoint.output.staging import staging_folder
from isomerge_fast.cli.commands import app
from isomerge_fast.execution.report import Report
from ray_faults import Given, Machine

peers.need("ray", "ray")

import ray  # noqa: E402  # after the line that skips where Ray is absent
from ray.cluster_utils import Cluster  # noqa: E402  # likewise

from isomerge_fast.integrations.ray import cluster, executor  # noqa: E402  # likewise

PATIENCE_SECONDS = 120.0
STORE_BYTES = 100_000_000
HOST = re.escape(socket.gethostname())
Family = tuple[Path, list[Path]]


def wait_for(condition: Callable[[], Any], what: str, running: Future[Any] | None = None) -> Any:
    """Its first result that is true. ``running`` must not end before."""
    patience = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        if running is not None and running.done():
            raise AssertionError(f"ended before {what}: {running.exception() or running.result()}")
        assert time.monotonic() < patience, f"not within {PATIENCE_SECONDS:.0f} s: {what}"
        time.sleep(0.02)
    return found


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Site:
    """A cluster on this machine: a head with 2 CPUs, and a second "machine" with one when that is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.head = Machine(folder / "head")
        # What is lost is missed after some seconds, not half a minute.
        checks = {"health_check_period_ms": 500, "health_check_failure_threshold": 5}
        self._cluster = Cluster(
            initialize_head=True, head_node_args=self._arguments(self.head, 2, _system_config=checks)
        )
        assert self._cluster.address is not None
        self.address: str = self._cluster.address
        self._second: tuple[Machine, Any] | None = None

    @staticmethod
    def _arguments(machine: Machine, cpus: int, **more: Any) -> dict[str, Any]:
        environment = {**machine.environment, **more.pop("env_vars", {})}
        return {
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
            "env_vars": environment,
            **more,
        }

    def add(self, name: str, cpus: int, **more: Any) -> tuple[Machine, Any]:
        """One more machine."""
        machine = Machine(self._folder / name)
        return machine, self._cluster.add_node(**self._arguments(machine, cpus, **more))

    def second(self) -> Machine:
        if self._second is None:
            self._second = self.add("second", 1)
        return self._second[0]

    def kill_second(self) -> None:
        """As when its power goes: what watches over it and what runs on it, at once."""
        assert self._second is not None
        self.remove(self._second[1])
        self._second = None

    def remove(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def connect(self) -> None:
        if not ray.is_initialized():
            cluster.connect(self.address)

    def disconnect(self) -> None:
        """The next connection has new worker processes."""
        ray.shutdown()

    def shutdown(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


class Merge:
    """A merge into a folder of its own, and what one process makes of it."""

    def __init__(self, folder: Path, family: Family, **changes: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.out = folder / "point", folder / "point/out"
        self.folder.mkdir()
        self.staging = staging_folder(self.out)
        self.config: dict[str, Any] = {
            "base": str(family[0]),
            "experts": [str(expert) for expert in family[1]],
            "out": str(self.out),
            "method": "iso-c",
            **changes,
        }
        self.whole = folder / "whole"

    def local(self, **options: Any) -> Report:
        return imf.merge(self.config, device="cpu", threads=1, **options)

    def over_ray(self, **options: Any) -> Report:
        return imf.merge(self.config, **{"device": "cpu", "threads": 1, "ray": True, **options})

    def started(self, **options: Any) -> Future[Report]:
        """The merge over Ray in a thread of its own."""
        threads = ThreadPoolExecutor(1)
        future = threads.submit(self.over_ray, **options)
        threads.shutdown(wait=False)
        return future

    def order(self, machine: Machine, call: str, path: str, act: str, **about: Any) -> Given:
        return machine.give(call, path, act, staging=str(self.staging), **about)

    def expect_done(self) -> None:
        """The bytes that one process makes, and nothing beside them."""
        if not self.whole.exists():
            imf.merge({**self.config, "out": str(self.whole)}, device="cpu", threads=1)
        found, expected = state_of(self.out), state_of(self.whole)
        assert found == expected, difference(found, expected)
        assert os.listdir(self.folder) == ["out"]

    def expect_nothing(self) -> None:
        assert os.listdir(self.folder) == []

    def resume_locally(self) -> None:
        assert self.staging.exists()
        self.local(resume=True)
        self.expect_done()


def in_units(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Every file is divided into so many units."""
    monkeypatch.setattr(executor, "divide", lambda plan, workers, rates: runs_of(plan, count))


def expect_accounts(report: Report, tensors: int, workers: int) -> None:
    """Of every tensor once, by so many processes."""
    assert len(report.workers) == workers
    assert len({(worker["host"], worker["pid"]) for worker in report.workers}) == workers
    assert {worker["host"] for worker in report.workers} == {socket.gethostname()}
    assert os.getpid() not in {worker["pid"] for worker in report.workers}
    assert sum(worker["tensors"] for worker in report.workers) == len(report.tensors) == tensors
    for key in ("read_bytes", "write_bytes"):
        assert sum(worker[key] for worker in report.workers) == sum(tensor[key] for tensor in report.tensors)


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def write_config(merge: Merge, name: str = "merge.yml") -> Path:
    path = merge.folder.parent / name
    path.write_text(json.dumps(merge.config))  # which is YAML
    return path


def command(*arguments: object) -> list[str]:
    return [str(Path(sys.executable).parent / "isomerge"), *map(str, arguments)]


def killed_when_held(merge: Merge, machine: Machine, line: list[str], held: int, **more: Any) -> dict[int, str]:
    """Starts it, kills it when so many workers are held, each after two tensors; returns what ran below it, by pid."""
    given = merge.order(machine, "pwrite", "/new/", "hold", lines=2)
    environment = {**os.environ, **more.get("env", {})}
    with open(merge.folder.parent / "output", "w+") as output:
        driver = subprocess.Popen(line, stdout=output, stderr=output, env=environment, cwd=merge.folder.parent)
        try:
            wait_for(lambda: len(set(given.obeyed)) >= held or driver.poll() is not None, f"{held} worker(s) are held")
            assert driver.poll() is None, Path(output.name).read_text()
            below = {
                process.pid: " ".join(process.cmdline()).strip()
                for process in psutil.Process(driver.pid).children(recursive=True)
            }
        finally:
            driver.kill()
            driver.wait()
    if driver.pid not in given.obeyed:
        wait_for(lambda: all(map(is_gone, given.obeyed)), "the workers of the killed driver are gone")
    given.take_back()
    assert not merge.out.exists()
    return below
