"""Execute a plan by the worker processes of a Ray cluster."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
import torch
from ray import exceptions

from ... import __version__
from ...checkpoint.io.reader import Reader, files_of
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
from ...execution.work_item import MergeSettings, WorkItem, WorkResult
from ...planning.cost import assumed_rates, divide
from ...planning.plan import Plan
from ...planning.planner import make_plan
from ...planning.schedule import default_cores
from . import cluster, worker
from .cluster import POLL_SECONDS, RETRIES

# How long there may be no machine on which a work item could run.
PATIENCE_SECONDS = 60.0
# How long a cluster's head may be silent, and how long tasks may take to end then. After 60 s Ray ends this process
# and what still works of the cluster, with a word of its own only; to leave the cluster takes 8 s of these.
HEAD_SECONDS, ANSWER_SECONDS_WITHOUT_HEAD = 30.0, 10.0


class RayExecutor:
    """Merge by a Ray cluster's worker processes: the ``Executor`` of a cluster.

    A worker has ``threads`` CPU threads, and where ``device`` is ``cuda`` a GPU of its own.
    """

    def __init__(self, device: str, threads: int | None) -> None:
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; it is 1 or more")
        gpus = max((machine.resources.get("GPU", 0.0) for machine in cluster.machines()), default=0.0)
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device {device!r}: over Ray it is auto, cpu or cuda; each worker gets a GPU of its own")
        if device == "cuda" and gpus < 1:
            raise ResourceError("device 'cuda': no machine of the Ray cluster has a GPU")
        self.device = "cuda" if device == "cuda" or (device == "auto" and gpus >= 1) else "cpu"
        self.threads = threads or (default_cores() if self.device == "cpu" else self._cpus_a_gpu)

    def plan(self, config: MergeConfig, *, max_ram: int | None, max_vram: int | None) -> Plan:
        """Make the plan for the workers, and check that all machines see the same files as this one."""
        if self.device == "cuda" and not torch.cuda.is_available():  # what it decides depends on the GPU
            task: Any = ray.remote(num_gpus=1, max_retries=RETRIES)(worker.plan_on_gpu)
            try:
                plan: Any = ray.get(task.remote(config, max_ram, max_vram, os.getcwd()))
            except exceptions.RayTaskError as error:
                raise _cause(error) from error
        else:
            given = {"max_ram": max_ram, "max_vram": max_vram, "threads": self.threads}
            plan = make_plan(config, resolve_device(self.device), **given)
        if not self.workers(plan, self.threads):
            raise ResourceError(self._too_small(plan, self.threads))
        if config.out is not None:
            self._check_files(plan, Path(os.path.realpath(config.out)).parent)
        return plan

    def check_versions(self) -> None:
        """Raise ConfigError where a machine lacks this package or torch, or has another version of one."""
        here = {"isomerge-fast": __version__, "torch": metadata.version("torch")}
        problems = [
            f"{machine}: {package} {found.get(package) or 'not installed'}; here it is {version}"
            for machine, found in cluster.ask_all(worker.versions_question())
            for package, version in here.items()
            if found.get(package) != version
        ]
        if problems:
            raise ConfigError("every machine of the Ray cluster needs the versions of this one:", problems)

    def _check_files(self, plan: Plan, folder: Path) -> None:
        """Raise ResourceError where a machine does not see the inputs as they were planned, or the output's folder."""
        known = files_of(plan.base, *plan.experts).items()
        files = {str(path.absolute()): (identity.size, identity.mtime_ns) for path, identity in known}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".isomerge-") as token:
                answers = cluster.ask_all(worker.files_question(), token.name, str(folder), files)
        except OSError as error:
            raise ResourceError(f"{folder}: cannot be written to ({error.strerror})") from error
        if problems := [f"{machine}: {problem}" for machine, found in answers for problem in found]:
            raise ResourceError(
                "every machine of the Ray cluster has to see the inputs and the output's folder under the same paths, "
                "on a file system that they share:",
                problems,
            )

    def workers(self, plan: Plan, threads: int) -> int:
        """Return how many work items of ``threads`` threads the cluster can work on at a time; 0 where none fits."""
        request = self._request(plan, threads)
        return sum(machine.holds(request) for machine in cluster.machines())

    def merge(
        self, plan: Plan, settings: MergeSettings, journal_entries: Entries, observer: Observer | None
    ) -> list[WorkResult]:
        """Merge all tensors of the plan, divided for as many workers as there are now, the largest work items first.

        It raises ResourceError where no machine is large enough for one worker, a work item failed for good, or the
        head is lost; and what the workers raise, such as InputError.
        """
        threads = settings.threads
        workers = self.workers(plan, threads)
        if not workers:
            raise ResourceError(self._too_small(plan, threads))
        parts = divide(plan, workers, assumed_rates(torch.device(self.device), threads))
        items = [WorkItem.of(plan, number, tensors, journal_entries) for number, tensors in enumerate(parts, 1)]
        again: dict[str, Any] = {"max_retries": RETRIES, "retry_exceptions": [InputChangedError, UnreadableError]}
        task: Any = ray.remote(**self._request(plan, threads), **again)(worker.merge_there)
        shared = ray.put(settings)
        waiting = {task.remote(shared, item, __version__, os.getcwd()): item for item in items}
        progress = _ClusterProgress(plan, settings, items, journal_entries, observer)
        results: list[WorkResult] = []
        last_hope = time.monotonic()  # when there was last a machine that is large enough, or something was done
        head = cluster.HeadWatch(lambda: self.workers(plan, threads), workers)
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=progress.pause_seconds)
                for reference in done:
                    result = self._result(reference, waiting.pop(reference), plan)
                    results.append(result)
                    progress.finish(result)
                progress.update()
                if head.silent_seconds > HEAD_SECONDS:
                    raise ResourceError(
                        f"the head of the Ray cluster ({head.address}) has not answered for {HEAD_SECONDS:.0f} s; "
                        "--resume continues"
                    )
                if done or head.workers:
                    last_hope = time.monotonic()
                elif time.monotonic() - last_hope > PATIENCE_SECONDS:
                    raise ResourceError(f"{self._too_small(plan, threads)}; --resume continues")
        finally:
            head.stop()
            is_lost = head.silent_seconds > HEAD_SECONDS
            cluster.end_tasks(list(waiting), ANSWER_SECONDS_WITHOUT_HEAD if is_lost else cluster.ANSWER_SECONDS)
        # Workers know size, time and header of what was planned; this process also what the kernel says of it.
        Reader(files_of(plan.base, *plan.experts)).check_unchanged()
        return sorted(results, key=lambda result: result.number)

    def _result(self, reference: Any, item: WorkItem, plan: Plan) -> WorkResult:
        """Return the result of a task that has ended; an error names the work item, the machine and the cause."""
        try:
            return ray.get(reference)
        except exceptions.RayTaskError as error:
            cause = _cause(error)
            at = f"{item} on {getattr(cause, 'host', 'a machine')}"
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
                f"{item}: its worker was lost {RETRIES + 1} times, at last by {type(error).__name__} ({reason}); "
                "--resume continues"
            ) from error

    def _request(self, plan: Plan, threads: int) -> dict[str, Any]:
        """Return the resources that one worker takes of a machine, in Ray's words."""
        if self.device == "cpu":
            return {"num_cpus": threads, "num_gpus": 0, "memory": plan.peak_ram_bytes}
        return {"num_cpus": min(threads, self._cpus_a_gpu), "num_gpus": 1, "memory": plan.host_buffer_bytes}

    @property
    def _cpus_a_gpu(self) -> int:
        has = [machine.resources for machine in cluster.machines() if machine.resources.get("GPU", 0.0) >= 1]
        return max(1, int(min((each.get("CPU", 0.0) // each["GPU"] for each in has), default=1)))

    def _too_small(self, plan: Plan, threads: int) -> str:
        """Return the message that no machine has room for one worker."""
        request = self._request(plan, threads)
        gpu = ", a GPU" if request["num_gpus"] else ""
        machines = "; ".join(
            f"{machine} has {machine.resources.get('CPU', 0):g} CPUs, {machine.resources.get('GPU', 0):g} GPUs, "
            f"{machine.resources.get('memory', 0):.0f} bytes"
            for machine in cluster.machines()
        )
        return (
            f"no machine of the Ray cluster has {request['num_cpus']:g} CPU(s){gpu} and {request['memory']:.0f} bytes "
            f"of memory for one worker ({machines or 'it has none'}); a lower --threads or --max-ram takes less"
        )


class _ClusterProgress:
    """Tell an observer how far all work items are together."""

    def __init__(
        self,
        plan: Plan,
        settings: MergeSettings,
        items: Sequence[WorkItem],
        journal_entries: Entries,
        observer: Observer | None,
    ) -> None:
        self._observer = observer
        self._bytes = {tensor.name: tensor.moved_bytes for tensor in plan.tensors}
        self._progress = Progress(len(plan.tensors), sum(self._bytes.values()))
        self._running = {item.number: ItemProgress(settings.folder, item.number) for item in items}
        self._items = len(items)
        self._done = set(journal_entries) & self._bytes.keys()
        self._started = time.perf_counter()
        self.pause_seconds = POLL_SECONDS  # until the next look at the journals

    def finish(self, result: WorkResult) -> None:
        """Count a work item as done."""
        del self._running[result.number]
        self._done |= result.entries.keys()

    def update(self) -> None:
        """Read the journals and tell the observer."""
        if self._observer is None:
            return
        started = time.perf_counter()
        at_work = 0
        for journal in self._running.values():
            journal.update()
            at_work += bool(journal.about)
            for name in journal.finished.keys() - self._done:
                self._done.add(name)
                self._progress.tensor = name
        progress = self._progress
        progress.done_tensors = len(self._done)
        progress.done_bytes = sum(self._bytes[name] for name in self._done)
        progress.seconds["compute"] = started - self._started
        progress.phase = f"{at_work} worker(s), unit {self._items - len(self._running)}/{self._items}"
        self._observer(progress)
        # Thousands of journals on a slow file system: no more than a twentieth of the time.
        self.pause_seconds = max(POLL_SECONDS, 20 * (time.perf_counter() - started))


def _cause(error: exceptions.RayTaskError) -> BaseException:
    """Return the exception that ended a task."""
    return error.cause if isinstance(error.cause, BaseException) else error
