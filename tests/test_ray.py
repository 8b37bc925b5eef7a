"""Merges over Ray: the bytes of a merge by one process, whatever happens to workers, machines, files and the driver."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from http.server import HTTPServer, SimpleHTTPRequestHandler
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import test_memory
import torch
from typer.testing import CliRunner

import adapters
import isomerge_fast as imf
import peers
from checkpoints import load_folder, make_expert, save_folder
from executors import runs_of
from fault_driver import difference, make_families, state_of
from isomerge_fast.checkpoint.output.staging import staging_folder
from isomerge_fast.cli.commands import app
from isomerge_fast.errors import InputChangedError, MissingPackageError, UnreadableError
from isomerge_fast.execution.report import Progress, Report
from isomerge_fast.execution.work_item import WorkResult
from isomerge_fast.planning.plan import Plan
from ray_faults import Given, Machine, journals

peers.need("ray", "ray")

import ray  # noqa: E402  # after the line that skips where Ray is absent
from ray.cluster_utils import Cluster  # noqa: E402  # likewise

from isomerge_fast.integrations.ray import cluster, executor, session, worker  # noqa: E402  # likewise

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

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


@pytest.fixture(scope="module", autouse=True)
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its sockets and logs, and what it knows of clusters on this machine: none but those made here."""
    before = {name: os.environ.pop(name, None) for name in ("RAY_TMPDIR", "RAY_ADDRESS")}
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:  # paths of sockets are short
        os.environ["RAY_TMPDIR"] = folder
        yield Path(folder)
        del os.environ["RAY_TMPDIR"]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("machines"))
    try:
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def connected(site: Site) -> Iterator[Site]:
    """This process is a driver of the cluster; its worker processes have torch loaded after the first merge."""
    site.connect()
    yield site
    site.head.clear()


@pytest.fixture
def unconnected() -> None:
    ray.shutdown()


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    root = tmp_path_factory.mktemp("families")
    made = make_families(root)
    adapted, folders = adapters.make_adapters(root / "adapters", tasks=2)
    shutil.rmtree(adapted)
    made["adapters"] = adapters.make_base(adapted, shards=2), folders
    # Eight tensors in a row, of a size that is written at once.
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{index}.weight": torch.randn(32, 24, generator=generator) for index in range(8)}
    folder = root / "eight"
    made["eight"] = save_folder(folder / "base", base), [save_folder(folder / "expert", make_expert(base, 0))]
    return made


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


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[WorkResult]:
    """Of the units of merges over Ray."""
    found: list[WorkResult] = []
    real = executor.RayExecutor.merge

    def merge(executor: executor.RayExecutor, *arguments: Any) -> list[WorkResult]:
        made = real(executor, *arguments)
        found.extend(made)
        return made

    monkeypatch.setattr(executor.RayExecutor, "merge", merge)
    return found


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


# --- no cluster, or not the one that was meant ------------------------------------------------------------------------


@pytest.mark.parametrize(("found", "said"), [(None, "ray is not installed"), ("2.9.3", "ray 2.9.3 is installed")])
def test_without_ray_it_says_what_to_install(
    families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str | None, said: str
) -> None:
    real = metadata.version

    def version(package: str) -> str:
        if package != "ray":
            return real(package)
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "version", version)
    merge = Merge(tmp_path, families["one-file"])
    with pytest.raises(MissingPackageError, match=rf"{re.escape(said)}.*pip install -U 'isomerge-fast\[ray\]'"):
        merge.over_ray(ray="local")
    code, _, told = invoke("run", write_config(merge), "--ray", "local")
    assert (code, said in told) == (4, True)
    merge.expect_nothing()


def listener(kind: str) -> Iterator[int]:
    """A port where something listens, or nothing."""
    if kind == "http":
        with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield server.server_address[1]
            server.shutdown()
            thread.join()
        return
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if kind == "silent":
            server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("way", ["address", "RAY_ADDRESS", "last-started"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [("nobody", "nothing answers there"), ("silent", "nothing answers there"), ("http", "is no head of a Ray cluster")],
    ids=["nobody", "silent", "http"],
)
def test_an_address_without_a_cluster(
    unconnected: None,
    families: dict[str, Family],
    tmp_path: Path,
    ray_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    said: str,
    way: str,
) -> None:
    """Said within seconds, where Ray itself would try for minutes, and before there is anything on the disk."""
    merge = Merge(tmp_path, families["one-file"])
    if kind == "silent":
        monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.3)
    for port in listener(kind):
        address = f"127.0.0.1:{port}"
        if way == "RAY_ADDRESS":
            monkeypatch.setenv("RAY_ADDRESS", address)
        if way == "last-started":
            (ray_folder / "ray").mkdir(exist_ok=True)
            (ray_folder / "ray/ray_current_cluster").write_text(address)
        started = time.monotonic()
        code, _, told = invoke("run", write_config(merge), "--ray", address if way == "address" else "auto")
        assert time.monotonic() - started < 15
        assert code == 2
        assert f"ray {address}: " in told
        assert said in told
    (ray_folder / "ray/ray_current_cluster").unlink(missing_ok=True)
    merge.expect_nothing()


def test_sigterm_does_what_it_did_before_ray() -> None:
    """Which ``ray.init`` changes."""
    before = signal.getsignal(signal.SIGTERM)
    with cluster.kept_sigterm():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("address", ["nonsense", "host", "ray://127.0.0.1:10001", "a:b", "host:1234567", "http://h:1"])
def test_what_is_no_address(
    unconnected: None, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    merge = Merge(tmp_path, families["one-file"])
    with pytest.raises(
        imf.ConfigError, match=rf"ray '{re.escape(address)}' is no address of a cluster: give host:port"
    ):
        merge.over_ray(ray=address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(imf.ConfigError, match="is no address of a cluster"):
        merge.over_ray()
    merge.expect_nothing()


@pytest.mark.parametrize("address", ["host..name:1", "127.0.0.1:99999", "no-such-host.invalid:6379"])
def test_an_address_that_cannot_be_reached(
    unconnected: None, families: dict[str, Family], tmp_path: Path, address: str
) -> None:
    merge = Merge(tmp_path, families["one-file"])
    with pytest.raises(imf.ConfigError, match=rf"ray {re.escape(address)}: nothing answers there"):
        merge.over_ray(ray=address)
    merge.expect_nothing()


class Head:
    """What says the first word of a cluster's head at a port, and nothing more."""

    def __enter__(self) -> str:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()
        return f"127.0.0.1:{self._server.getsockname()[1]}"

    def _answer(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()


@pytest.mark.parametrize(
    ("given", "variable", "last", "tried"),
    [
        (None, None, None, ["auto", "local"]),
        (None, None, "nobody", ["local"]),
        (None, None, "head", ["auto", "local"]),  # it may be gone all the same
        (None, "head", "nobody", ["head"]),
        (None, "local", None, ["local"]),
        ("auto", "head", None, ["head"]),
        ("auto", None, "head", ["auto"]),
        ("head", "nobody", "nobody", ["head"]),
        ("local", "nobody", "nobody", ["local"]),
    ],
)
def test_which_cluster_is_tried(
    unconnected: None,
    ray_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    variable: str | None,
    last: str | None,
    tried: list[str],
) -> None:
    """An address goes before RAY_ADDRESS, that before the cluster which ``ray start`` was told of last."""
    found: list[str] = []

    def init(address: str, **_: Any) -> None:
        found.append(address)
        if address != "local":
            raise ConnectionError("no such cluster")

    monkeypatch.setattr(ray, "init", init)
    with Head() as head:
        names = {"head": head, "nobody": "127.0.0.1:9"}
        if variable is not None:
            monkeypatch.setenv("RAY_ADDRESS", names.get(variable, variable))
        if last is not None:
            (ray_folder / "ray").mkdir(exist_ok=True)
            (ray_folder / "ray/ray_current_cluster").write_text(names[last])
        try:
            if tried[-1] == "local":
                cluster.connect(given)
            else:
                with pytest.raises(
                    imf.ConfigError, match=r"no such cluster; this machine has to be one of that cluster's"
                ):
                    cluster.connect(names.get(given or "", given))
        finally:
            (ray_folder / "ray/ray_current_cluster").unlink(missing_ok=True)
    assert found == [names.get(name, name) for name in tried]


@pytest.mark.parametrize("line", [["--ray", "nonsense"], ["--ray=nonsense"], ["--ray", "nonsense:"]])
def test_no_address_on_the_command_line(
    unconnected: None, families: dict[str, Family], tmp_path: Path, line: list[str]
) -> None:
    merge = Merge(tmp_path, families["one-file"])
    code, _, told = invoke("run", write_config(merge), *line)
    assert (code, "nonsense" in told) == (2, True)
    merge.expect_nothing()


def test_auto_without_a_cluster(unconnected: None, families: dict[str, Family], tmp_path: Path) -> None:
    """Before this module has one; another one on this machine would be found."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    if any("--gcs-address" in argument for line in lines for argument in line):
        pytest.skip("there is a cluster on this machine")
    merge = Merge(tmp_path, families["one-file"])
    with pytest.raises(imf.ConfigError, match="ray auto: "):
        merge.over_ray(ray="auto")
    merge.expect_nothing()


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
        assert raised.value.host == socket.gethostname()  # type: ignore[attr-defined]
    with pytest.raises(imf.ConfigError, match=r"isomerge-fast .* is installed there; the driver has 0\.0\.1"):
        worker.merge_there(job, unit, "0.0.1", ".")  # type: ignore[arg-type]


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
    merge = Merge(tmp_path, families["one-file"])

    def fail(*_: object) -> None:
        raise imf.ResourceError("this time")

    monkeypatch.setattr("isomerge_fast.execution.engine.merge_item", fail)
    with pytest.raises(imf.ResourceError, match="this time"):
        imf.merge(merge.config, device="cpu", threads=99)
    with pytest.raises(imf.ResourceError, match=r"has 99 CPU\(s\)"):
        merge.over_ray(resume=True)
    assert merge.staging.exists()


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


# --- a driver that dies -----------------------------------------------------------------------------------------------


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


def copied(merge: Merge, name: str) -> Merge:
    """The unfinished merge, elsewhere."""
    other = Merge(merge.folder.parent / name, (Path(), []))
    other.config = {**merge.config, "out": str(other.out)}
    shutil.copytree(merge.staging, other.staging)
    return other


def test_a_driver_killed_on_a_cluster(
    connected: Site, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed by one process, and over Ray with other units for another number of workers."""
    merge = Merge(tmp_path, families["sharded"], save_delta=True)
    line = command("run", write_config(merge), "--ray", connected.address, "--threads", 1, "--device", "cpu")
    killed_when_held(merge, connected.head, line, 2)
    locally = copied(merge, "locally")
    locally.resume_locally()
    connected.second()
    in_units(monkeypatch, 2)
    report = merge.over_ray(resume=True)
    merge.expect_done()
    before = sum(worker["tensors"] for worker in report.workers if not worker["units"])
    assert before >= 4  # by the workers of the driver that was killed
    assert sum(worker["tensors"] for worker in report.workers) == len(report.tensors)


def test_a_merge_without_ray_goes_on_over_ray(connected: Site, families: dict[str, Family], tmp_path: Path) -> None:
    merge = Merge(tmp_path, families["eight"])
    line = command("run", write_config(merge), "--threads", 1, "--device", "cpu")
    killed_when_held(merge, connected.head, line, 1, env=connected.head.environment)
    with pytest.raises(imf.ConfigError, match="an unfinished merge lies in"):
        merge.over_ray()
    report = merge.over_ray(resume=True)
    merge.expect_done()
    assert sorted(worker["tensors"] for worker in report.workers) == [2, 6]


# --- machines that are not alike --------------------------------------------------------------------------------------


@pytest.fixture
def second(site: Site) -> Iterator[Machine]:
    """Another machine. This process is connected anew, so that it has new processes there."""
    machine = site.second()
    site.disconnect()
    yield machine
    machine.pretend(None)
    machine.clear()
    site.disconnect()


@pytest.mark.parametrize(("version", "said"), [("0.0.1", "0.0.1"), ("", "not installed")], ids=["other", "absent"])
def test_a_machine_with_another_version_or_without_it(
    site: Site, second: Machine, families: dict[str, Family], tmp_path: Path, version: str, said: str
) -> None:
    second.pretend(version)
    site.connect()
    merge = Merge(tmp_path, families["one-file"])
    with pytest.raises(imf.ConfigError) as raised:
        merge.over_ray()
    first, *problems = str(raised.value).splitlines()
    assert first == "every machine of the Ray cluster needs the versions of this one:"
    assert re.fullmatch(
        rf"  - {HOST} \(.*\): isomerge-fast {re.escape(said)}; here it is {imf.__version__}", problems[0]
    )
    assert all("torch" in problem for problem in problems[1:])
    merge.expect_nothing()


def test_a_machine_that_does_not_see_the_files(
    site: Site, second: Machine, families: dict[str, Family], tmp_path: Path
) -> None:
    site.connect()
    merge = Merge(tmp_path, families["one-file"])
    expert = families["one-file"][1][1] / "model.safetensors"
    second.give("stat", str(merge.folder), "ENOENT")
    second.give("stat", str(expert), "ENOENT")
    with pytest.raises(imf.ResourceError) as raised:
        merge.over_ray()
    first, *problems = str(raised.value).splitlines()
    assert first.startswith("every machine of the Ray cluster has to see the inputs and the output's folder")
    assert len(problems) == 2
    assert re.fullmatch(
        rf"  - {HOST} \(.*\): {re.escape(str(merge.folder))}: not the folder that the driver sees", problems[0]
    )
    assert re.fullmatch(rf"  - {HOST} \(.*\): {re.escape(str(expert))}: No such file or directory", problems[1])
    merge.expect_nothing()


def test_what_a_machine_says_of_other_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    ask, stamp = worker.files_question(), (1, file.stat().st_mtime_ns)
    assert ask(str(file), str(tmp_path), {str(file): stamp}) == []
    for other in ((2, stamp[1]), (1, stamp[1] + 1)):
        assert ask(str(file), str(tmp_path), {str(file): other}) == [f"{file}: another file than the driver sees"]


def test_a_machine_that_does_not_answer(
    site: Site, second: Machine, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.connect()
    merge = Merge(tmp_path, families["one-file"])
    with session.ray_executor(None, device="cpu", threads=1):
        pass  # has processes there
    second.give("stat", str(merge.folder), "hold")
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 1.0)
    with pytest.raises(imf.ResourceError, match=rf"{HOST} \(.*\) of the Ray cluster does not answer \("):
        merge.over_ray()
    merge.expect_nothing()


def test_a_machine_that_was_lost_just_before(connected: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes it for alive until it has found out; from then on it need not answer."""
    real = cluster.machines
    about = {"NodeID": "ab" * 28, "NodeManagerHostname": "lost", "NodeManagerAddress": "there", "Resources": {}}
    lost = cluster.Machine(about)
    here = [machine.id for machine in real()]
    lists = [[*real(), lost]]
    monkeypatch.setattr(cluster, "machines", lambda: lists.pop() if lists else real())
    assert [machine.id for machine, _ in cluster.ask_all(worker.versions_question())] == here
    monkeypatch.setattr(cluster, "machines", lambda: [*real(), lost])
    with pytest.raises(imf.ResourceError, match=r"lost \(there\) of the Ray cluster does not answer \("):
        cluster.ask_all(worker.versions_question())


def test_a_machine_that_is_lost(
    site: Site,
    second: Machine,
    families: dict[str, Family],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    results: list[WorkResult],
) -> None:
    """Both machines merge; what the lost one had to do is done by the other."""
    site.connect()
    merge = Merge(tmp_path, families["eight"])
    in_units(monkeypatch, 3)
    orders = [merge.order(machine, "pwrite", "/new/", "hold", lines=1) for machine in (site.head, second)]
    running = merge.started()
    wait_for(lambda: [len(set(given.obeyed)) for given in orders] == [2, 1], "both machines are at work", running)
    (lost,) = set(orders[1].obeyed)
    site.kill_second()
    wait_for(lambda: is_gone(lost), "what ran on the lost machine is gone")
    for given in orders:
        given.take_back()
    report = running.result(PATIENCE_SECONDS)
    merge.expect_done()
    assert {worker["pid"]: worker["tensors"] for worker in report.workers}[lost] == 1
    assert lost not in {result.process["pid"] for result in results}


def test_no_machine_is_left_that_is_large_enough(
    connected: Site, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor comes one within the time that is waited for it; what still runs is ended."""
    merge = Merge(tmp_path, families["eight"])
    monkeypatch.setattr(executor, "PATIENCE_SECONDS", 1.0)
    given = merge.order(connected.head, "pwrite", "/new/", "hold", lines=1)
    running = merge.started()
    wait_for(lambda: given.obeyed, "the worker is held", running)
    monkeypatch.setattr(executor.RayExecutor, "workers", lambda executor, plan, threads: 0)
    with pytest.raises(imf.ResourceError, match=r"no machine .* has 1 CPU\(s\).*; --resume continues"):
        running.result(PATIENCE_SECONDS)
    monkeypatch.undo()
    merge.resume_locally()


# --- clusters of their own ------------------------------------------------------------------------------------------
# Last: machines of the cluster above may be given no work after these have come and gone.


@pytest.mark.slow
def test_a_model_of_162_million_parameters(
    unconnected: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster that is started for it, one core a worker; shows how much sooner it is done."""
    folders = [
        save_folder(tmp_path / f"model{seed}", test_memory.llama_tensors(seed, **test_memory.WIDE), shards=2)
        for seed in range(test_memory.TASKS + 1)
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
    expect_accounts(report, len(test_memory.llama_tensors(0, **test_memory.WIDE)), 2)
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
