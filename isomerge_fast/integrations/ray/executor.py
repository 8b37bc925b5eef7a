"""Merges over Ray: the units of a merge are tasks, which worker processes on many GPUs or machines take one by one.

Ray decides where a task runs, and runs it again where its worker or its machine is lost. All files are on a file system
that every machine sees under the same paths; tasks are given paths and slices of the plan, never tensors.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, chdir, contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...checkpoint.io.reader import Reader, files_of
from ...checkpoint.layout import FileIdentity
from ...checkpoint.output.journal import Entries, ItemProgress
from ...config import MergeConfig
from ...errors import (
    ConfigError,
    InputChangedError,
    InputError,
    IsomergeError,
    LostWritesError,
    ResourceError,
    UnreadableError,
)
from ...execution.engine import resolve_device
from ...execution.report import Observer, Progress
from ...execution.worker import Job, WorkItem, WorkResult, merge_item
from ...planning.cost import assumed_rates, divide
from ...planning.plan import Plan
from ...planning.planner import make_plan
from ..peers import RAY, is_ray_address, require_at_least

# How often a unit is tried again whose worker or machine is lost, or which cannot read its inputs.
RETRIES = 3
# Of Ray's object store, where a cluster is started for one merge: only plans go through it.
OBJECT_STORE_BYTES = 100_000_000
# How long a machine may take to answer, and how long there may be no machine on which a unit could run.
ANSWER_SECONDS, PATIENCE_SECONDS = 60.0, 60.0
POLL_SECONDS = 0.5
# How long a cluster's head may be silent, and how long tasks may take to end then. After 60 s Ray ends this process
# and what still works of the cluster, with a word of its own only; to leave the cluster takes 8 s of these.
HEAD_SECONDS, ANSWER_SECONDS_WITHOUT_HEAD = 30.0, 10.0
# For a first word from an address. (Ray tries for 160 s and more where something else listens there, or nothing does.)
CONNECT_SECONDS = 5.0
# How a client of HTTP/2 begins, without settings of its own. A cluster's head answers with its own: a frame of type 4.
HELLO, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), b"\4"


@contextmanager
def ray_executor(address: str | None, *, device: str, threads: int | None) -> Iterator[RayExecutor]:
    """Connected to Ray, with every machine of the cluster found fit to merge.

    Args:
        address: ``host:port`` of a cluster; ``auto``: that of ``RAY_ADDRESS``, or that which this machine belongs to;
            ``local``: one is started on this machine; None: ``auto`` where there is one, else ``local``. A connection
            that this process has already is used, whatever the address.
        device: ``auto``, ``cpu`` or ``cuda``: what the workers compute on.
        threads: CPU threads of a worker.

    Raises:
        MissingPackageError: no Ray here, or too old.
        ConfigError: an address where no cluster answers; workers with another version of this package or of torch.
        ResourceError: Ray did not start, or a machine does not answer.
    """
    require_at_least("ray", RAY, "ray")
    import ray

    connected = ray.is_initialized()
    if not connected:
        with _own_signals():
            _connect(address)
    try:
        executor = RayExecutor(device, threads)
        executor.check_versions()
        yield executor
    finally:
        if not connected:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keeps what this process does at a SIGTERM, for which Ray has a way of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _connect(address: str | None) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else Ray tries a unit for which its machine has not enough memory for ever.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    if address is not None and not is_ray_address(address):
        raise ConfigError(f"ray {address!r} is no address of a cluster: give host:port (of its head), auto or local")
    found = _started_here() if address in (None, "auto") else address
    silence = _silence(found) if found is not None and ":" in found else None
    if silence is not None and address is None:
        address = "local"
    elif silence is not None:
        raise ConfigError(f"ray {found}: {silence}")
    try:
        if address != "local":
            try:
                ray.init(address=address or "auto", **quiet)
                return
            except ConnectionError:
                if address is not None:
                    raise
        # As a merge by one process does not give way to all else on this machine. (Four attempts at a small unit,
        # each by a new worker, took 102 s beside two busy processes on 2 cores with Ray's niceness of 15, with 0 13 s.)
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    except (RuntimeError, ValueError, OSError) as error:
        advice = "; this machine has to be one of that cluster's" if isinstance(error, ConnectionError) else ""
        raise ConfigError(f"ray {address or 'local'}: {' '.join(str(error).split())}{advice}") from error


def _started_here() -> str | None:
    """``host:port`` of the cluster that ``ray start`` made or joined last on this machine. It may be gone."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        address = Path(folder, "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return None
    return address if is_ray_address(address) else None


def _silence(address: str) -> str | None:
    """Why there is no head of a cluster at ``host:port``; None where there may be one."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return None
            connection.sendall(HELLO)
            answer = connection.recv(9)
    except (OSError, OverflowError, UnicodeError) as error:
        return f"nothing answers there ({error})"
    return None if answer[3:4] == SETTINGS else "what answers there is no head of a Ray cluster"


class RayExecutor:
    """The ``Executor`` of a Ray cluster's worker processes.

    Attributes:
        device: ``cpu``, or ``cuda``: each worker has a GPU of its own.
        threads: CPU threads of a worker.
    """

    def __init__(self, device: str, threads: int | None) -> None:
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; it is 1 or more")
        gpus = max((machine.resources.get("GPU", 0.0) for machine in _machines()), default=0.0)
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device {device!r}: over Ray it is auto, cpu or cuda; each worker gets a GPU of its own")
        if device == "cuda" and gpus < 1:
            raise ResourceError("device 'cuda': no machine of the Ray cluster has a GPU")
        self.device = "cuda" if device == "cuda" or (device == "auto" and gpus >= 1) else "cpu"
        self.threads = threads or (torch.get_num_threads() if self.device == "cpu" else self._cpus_a_gpu)

    def plan(self, config: MergeConfig, *, max_ram: int | None, max_vram: int | None) -> Plan:
        """``make_plan`` for the workers, all of whose machines see the same files as this one.

        Raises:
            ConfigError, InputError: as ``make_plan``.
            ResourceError: a machine that does not see them; none that is large enough for one worker.
        """
        import ray
        from ray import exceptions

        if self.device == "cuda" and not torch.cuda.is_available():  # what it decides depends on the GPU
            task = _remote(_plan, num_gpus=1, max_retries=RETRIES)
            try:
                plan: Any = ray.get(task.remote(config, max_ram, max_vram, os.getcwd()))
            except exceptions.RayTaskError as error:
                raise _cause(error) from error
        else:
            plan = make_plan(config, resolve_device(self.device), max_ram=max_ram, max_vram=max_vram)
        if not self.workers(plan, self.threads):
            raise ResourceError(self._too_small(plan, self.threads))
        if config.out is not None:
            self._check_files(plan, Path(os.path.realpath(config.out)).parent)
        return plan

    def check_versions(self) -> None:
        """Raises ConfigError where a machine has not what this one has."""
        here = {"isomerge-fast": __version__, "torch": metadata.version("torch")}
        problems = []
        for machine, found in _ask_all(_versions_there()):
            for package, version in here.items():
                if found.get(package) != version:
                    other = found.get(package) or "not installed"
                    problems.append(f"{machine}: {package} {other}; here it is {version}")
        if problems:
            raise ConfigError("every machine of the Ray cluster needs the versions of this one:", problems)

    def _check_files(self, plan: Plan, folder: Path) -> None:
        """Raises ResourceError where a machine does not see the inputs as they were planned, or the output's folder."""
        files = {
            str(path.absolute()): _stamp(identity) for path, identity in files_of(plan.base, *plan.experts).items()
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".isomerge-") as token:
                problems = [
                    f"{machine}: {problem}"
                    for machine, found in _ask_all(_files_there(), token.name, str(folder), files)
                    for problem in found
                ]
        except OSError as error:
            raise ResourceError(f"{folder}: cannot be written to ({error.strerror})") from error
        if problems:
            raise ResourceError(
                "every machine of the Ray cluster has to see the inputs and the output's folder under the same paths, "
                "on a file system that they share:",
                problems,
            )

    def workers(self, plan: Plan, threads: int) -> int:
        """How many units of the plan the cluster can work on at a time."""
        request = self._request(plan, threads)
        return sum(machine.holds(request) for machine in _machines())

    def merge(self, plan: Plan, job: Job, journal_entries: Entries, observer: Observer | None) -> list[WorkResult]:
        """See ``engine.Executor``. Units are divided for as many workers as there are now, the largest first.

        Raises:
            ResourceError: no machine is large enough for one worker; a unit failed for good; the head is lost.
            InputError: a weight that is not finite, and the like.
        """
        import ray

        workers = self.workers(plan, job.threads)
        if not workers:
            raise ResourceError(self._too_small(plan, job.threads))
        parts = divide(plan, workers, assumed_rates(torch.device(self.device)))
        units = [WorkItem.of(plan, number, tensors, journal_entries) for number, tensors in enumerate(parts, 1)]
        task = _remote(
            _work,
            **self._request(plan, job.threads),
            max_retries=RETRIES,
            retry_exceptions=[InputChangedError, UnreadableError],
        )
        shared = ray.put(job)
        waiting = {task.remote(shared, unit, __version__, os.getcwd()): unit for unit in units}
        overview = _Overview(plan, job, units, journal_entries, observer)
        results: list[WorkResult] = []
        hopeless_since: float | None = None
        head = _Head(lambda: self.workers(plan, job.threads), workers)
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=overview.pause_seconds)
                for reference in done:
                    result = self._result(reference, waiting.pop(reference), plan)
                    results.append(result)
                    overview.finished(result)
                overview.update()
                if head.silent_seconds > HEAD_SECONDS:
                    raise ResourceError(f"{head} has not answered for {HEAD_SECONDS:.0f} s; --resume continues")
                if done or head.workers:
                    hopeless_since = None
                elif hopeless_since is None:
                    hopeless_since = time.monotonic()
                elif time.monotonic() - hopeless_since > PATIENCE_SECONDS:
                    raise ResourceError(f"{self._too_small(plan, job.threads)}; --resume continues")
        finally:
            head.leave()
            lost = head.silent_seconds > HEAD_SECONDS
            _end_all(list(waiting), ANSWER_SECONDS_WITHOUT_HEAD if lost else ANSWER_SECONDS)
        # Workers know size, time and header of what was planned; this process also what the kernel says of it.
        Reader(files_of(plan.base, *plan.experts)).check_unchanged()
        return sorted(results, key=lambda result: result.number)

    def _result(self, reference: Any, unit: WorkItem, plan: Plan) -> WorkResult:
        """Of a task that has ended.

        Raises:
            IsomergeError: names the unit, the machine and the cause.
        """
        import ray
        from ray import exceptions

        try:
            return ray.get(reference)
        except exceptions.RayTaskError as error:
            cause = _cause(error)
            at = f"{unit} on {getattr(cause, 'host', 'a machine')}"
            if isinstance(cause, InputChangedError | UnreadableError):
                # Where this machine sees what is amiss as well, it is the input; else it is that machine.
                Reader(files_of(plan.base, *plan.experts)).check_unchanged()
                raise UnreadableError(f"{at}, tried {RETRIES + 1} times: {cause}; --resume continues") from error
            if isinstance(cause, IsomergeError):
                kinds = (InputError, ConfigError, LostWritesError, ResourceError, IsomergeError)
                kind = next(kind for kind in kinds if isinstance(cause, kind))
                raise kind(f"{at}: {cause.message}", cause.problems) from error
            raise
        except exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise ResourceError(
                f"{unit}: its worker was lost {RETRIES + 1} times, at last by {type(error).__name__} ({reason}); "
                "--resume continues"
            ) from error

    def _request(self, plan: Plan, threads: int) -> dict[str, Any]:
        """What one worker takes of a machine, as Ray calls it."""
        if self.device == "cpu":
            return {"num_cpus": threads, "num_gpus": 0, "memory": plan.peak_ram_bytes}
        return {"num_cpus": min(threads, self._cpus_a_gpu), "num_gpus": 1, "memory": plan.host_buffer_bytes}

    @property
    def _cpus_a_gpu(self) -> int:
        shares = [
            machine.resources.get("CPU", 0.0) // machine.resources["GPU"]
            for machine in _machines()
            if machine.resources.get("GPU", 0.0) >= 1
        ]
        return max(1, int(min(shares, default=1)))

    def _too_small(self, plan: Plan, threads: int) -> str:
        request = self._request(plan, threads)
        gpu = ", a GPU" if request["num_gpus"] else ""
        wanted = f"{request['num_cpus']:g} CPU(s){gpu} and {request['memory']:.0f} bytes of memory"
        machines = "; ".join(
            f"{machine} has {machine.resources.get('CPU', 0):g} CPUs, {machine.resources.get('GPU', 0):g} GPUs, "
            f"{machine.resources.get('memory', 0):.0f} bytes"
            for machine in _machines()
        )
        return (
            f"no machine of the Ray cluster has {wanted} for one worker ({machines or 'it has none'}); a lower "
            "--threads or --max-ram takes less"
        )


class _Machine:
    """A machine of the cluster, and what it has for tasks."""

    def __init__(self, node: Mapping[str, Any]) -> None:
        self.id: str = node["NodeID"]
        self.name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        self.resources: dict[str, float] = node["Resources"]

    def __str__(self) -> str:
        return self.name

    def holds(self, request: Mapping[str, Any]) -> int:
        """Workers at a time."""
        has = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        return int(min(self.resources.get(has[key], 0.0) // value for key, value in request.items() if value))


def _machines() -> list[_Machine]:
    import ray

    return [_Machine(node) for node in ray.nodes() if node["Alive"]]


class _Head:
    """The cluster's head, asked again and again by a thread of its own: Ray waits in the call for one that is gone.

    Attributes:
        workers: how many units the cluster could work on at a time, by its last answer.
    """

    def __init__(self, ask: Callable[[], int], workers: int) -> None:
        import ray

        self._ask, self.workers = ask, workers
        self._address = ray.get_runtime_context().gcs_address
        self._answered = time.monotonic()
        self._left = threading.Event()
        threading.Thread(target=self._watch, name="isomerge-ray-head", daemon=True).start()

    def __str__(self) -> str:
        return f"the head of the Ray cluster ({self._address})"

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self._answered

    def leave(self) -> None:
        self._left.set()

    def _watch(self) -> None:
        while not self._left.wait(POLL_SECONDS):
            with suppress(Exception):  # that is no answer either
                self.workers = self._ask()
                self._answered = time.monotonic()


def _remote(function: Callable[..., Any], **options: Any) -> Any:
    """A Ray task."""
    import ray

    return ray.remote(**options)(function)


def _end_all(references: list[Any], patience: float) -> None:
    """Ends tasks, and returns when nobody writes any more, or after ``patience`` seconds."""
    import ray

    if not references:
        return
    # Ray aborts this process ("task that was not pending") where a task ends by itself while it is cancelled, and what
    # ended one unit may well end others at the same moment: those first.
    _, running = ray.wait(references, num_returns=len(references), timeout=POLL_SECONDS)
    for reference in running:
        ray.cancel(reference, force=True)
    if running:
        ray.wait(running, num_returns=len(running), timeout=patience)


def _ask_all(question: Callable[..., Any], *arguments: Any) -> list[tuple[_Machine, Any]]:
    """What every machine answers.

    Raises:
        ResourceError: one that does not.
    """
    import ray
    from ray import exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = []
    for machine in _machines():
        there = NodeAffinitySchedulingStrategy(machine.id, soft=False)
        task = _remote(question, num_cpus=0, max_retries=0, scheduling_strategy=there)
        asked.append((machine, task.remote(*arguments)))
    answers = []
    for machine, reference in asked:
        try:
            answers.append((machine, ray.get(reference, timeout=ANSWER_SECONDS)))
        except exceptions.RayError as error:
            if machine.id not in {other.id for other in _machines()}:
                continue  # it was lost a while ago, and Ray has found out by now
            reason = str(error).strip().splitlines()[-1]
            raise ResourceError(f"{machine} of the Ray cluster does not answer ({reason})") from error
    return answers


# Questions are functions inside functions, which travel by value: the machine that is asked may lack this package.


def _versions_there() -> Callable[[], dict[str, str]]:
    def versions() -> dict[str, str]:
        from importlib import metadata

        found = {}
        try:
            import isomerge_fast

            found["isomerge-fast"] = isomerge_fast.__version__
            found["torch"] = metadata.version("torch")
        except (ImportError, metadata.PackageNotFoundError):
            pass
        return found

    return versions


def _files_there() -> Callable[[str, str, dict[str, tuple[int, int]]], list[str]]:
    def problems(token: str, folder: str, files: dict[str, tuple[int, int]]) -> list[str]:
        import os

        found = []
        if not os.path.exists(token):
            found.append(f"{folder}: not the folder that the driver sees")
        elif not os.access(folder, os.W_OK):
            found.append(f"{folder}: not writable")
        for path, stamp in files.items():
            try:
                status = os.stat(path)
            except OSError as error:
                found.append(f"{path}: {error.strerror}")
                continue
            if (status.st_size, status.st_mtime_ns) != tuple(stamp):
                found.append(f"{path}: another file than the driver sees")
            elif not os.access(path, os.R_OK):
                found.append(f"{path}: not readable")
        return found

    return problems


def _stamp(identity: FileIdentity) -> tuple[int, int]:
    return identity.size, identity.mtime_ns


def _in_folder(folder: str) -> AbstractContextManager[None]:
    """Where the driver is, so that relative paths mean what they mean there. Absolute ones need no such folder."""
    return chdir(folder) if os.path.isdir(folder) else nullcontext()


def _plan(config: MergeConfig, max_ram: int | None, max_vram: int | None, folder: str) -> Plan:
    with _in_folder(folder):
        return make_plan(config, torch.device("cuda"), max_ram=max_ram, max_vram=max_vram)


def _work(job: Job, unit: WorkItem, version: str, folder: str) -> WorkResult:
    """The task."""
    try:
        if version != __version__:  # of a machine that has joined since
            raise ConfigError(f"isomerge-fast {__version__} is installed there; the driver has {version}")
        with _in_folder(folder):
            return merge_item(job, unit)
    except IsomergeError as error:
        failure = error
    except OSError as error:  # as in ``engine.run``
        failure = ResourceError(f"{error.filename or job.folder}: {error.strerror}; --resume continues")
    except MemoryError as error:
        failure = ResourceError(f"out of memory ({error}); --resume continues")
    failure.host = socket.gethostname()  # type: ignore[union-attr]  # travels with it
    raise failure


def _cause(error: Any) -> BaseException:
    """Of a task's failure."""
    return error.cause if isinstance(error.cause, BaseException) else error


class _Overview:
    """How far all workers are, together, from the journals that they keep."""

    def __init__(
        self,
        plan: Plan,
        job: Job,
        units: Sequence[WorkItem],
        journal_entries: Entries,
        observer: Observer | None,
    ) -> None:
        self._observer = observer
        self._bytes = {tensor.name: tensor.moved_bytes for tensor in plan.tensors}
        self._progress = Progress(len(plan.tensors), sum(self._bytes.values()))
        self._running = {unit.number: ItemProgress(job.folder, unit.number) for unit in units}
        self._units = len(units)
        self._done = set(journal_entries) & self._bytes.keys()
        self._started = time.perf_counter()
        self.pause_seconds = POLL_SECONDS

    def finished(self, result: WorkResult) -> None:
        del self._running[result.number]
        self._done |= result.entries.keys()

    def update(self) -> None:
        """Tells the observer."""
        if self._observer is None:
            return
        started = time.perf_counter()
        at_work = 0
        for unit in self._running.values():
            unit.update()
            at_work += bool(unit.about)
            for name in unit.finished.keys() - self._done:
                self._done.add(name)
                self._progress.tensor = name
        progress = self._progress
        progress.done_tensors = len(self._done)
        progress.done_bytes = sum(self._bytes[name] for name in self._done)
        progress.seconds["compute"] = started - self._started
        progress.phase = f"{at_work} worker(s), unit {self._units - len(self._running)}/{self._units}"
        self._observer(progress)
        # Thousands of journals on a slow file system: no more than a twentieth of the time.
        self.pause_seconds = max(POLL_SECONDS, 20 * (time.perf_counter() - started))
