"""Connect to a Ray cluster, ask its machines, and watch its head."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...errors import ConfigError, ResourceError
from ..peers import is_ray_address

# How often a task is tried again whose worker or machine is lost, or which cannot read its inputs.
RETRIES = 3
# Of Ray's object store, where a cluster is started for one merge: only plans go through it.
OBJECT_STORE_BYTES = 100_000_000
# For a first answer from an address. Ray 2.60 itself tries for more than 400 s where something else listens there.
CONNECT_SECONDS = 5.0
# A client of HTTP/2 begins so, here without settings of its own. The head of a cluster answers with its settings: a
# frame of type 4.
HELLO, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), b"\4"
# How long a machine may take to answer.
ANSWER_SECONDS = 60.0
# Between two looks at running tasks, and at the head.
POLL_SECONDS = 0.5


def connect(address: str | None) -> None:
    """Connect to the cluster at ``address``, or start one on this machine (see ``ray_executor``)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else Ray tries a task for which its machine has not enough memory for ever.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    if address is not None and not is_ray_address(address):
        raise ConfigError(f"ray {address!r} is no address of a cluster: give host:port (of its head), auto or local")
    found = _last_started() if address in (None, "auto") else address
    if found is not None and ":" in found and (reason := _why_no_head(found)) is not None:
        if address is not None:
            raise ConfigError(f"ray {found}: {reason}")
        address = "local"
    at_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address != "local":
            try:
                ray.init(address=address or "auto", **quiet)
                return
            except ConnectionError:
                if address is not None:
                    raise
        # As a merge by one process does not give way to all else on this machine. (Four attempts at a small work item,
        # each by a new worker, took 102 s beside two busy processes on 2 cores with Ray's niceness of 15, with 0 13 s.)
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    except (RuntimeError, ValueError, OSError) as error:
        advice = "; this machine has to be one of that cluster's" if isinstance(error, ConnectionError) else ""
        raise ConfigError(f"ray {address or 'local'}: {' '.join(str(error).split())}{advice}") from error
    finally:  # Ray has set a handler of its own
        if at_sigterm is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, at_sigterm)


def _last_started() -> str | None:
    """Return ``host:port`` of the cluster that ``ray start`` made or joined last on this machine. It may be gone."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        address = Path(folder, "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return None
    return address if is_ray_address(address) else None


def _why_no_head(address: str) -> str | None:
    """Return why ``host:port`` is no head of a cluster; None where it may be one."""
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


class Machine:
    """Name a machine of the cluster, with the resources that it has for tasks."""

    def __init__(self, node: Mapping[str, Any]) -> None:
        self.id: str = node["NodeID"]
        self.name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        self.resources: dict[str, float] = node["Resources"]

    def __str__(self) -> str:
        return self.name

    def holds(self, request: Mapping[str, Any]) -> int:
        """Return how many workers the machine has room for, each with the resources of ``request``."""
        has = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        return int(min(self.resources.get(has[key], 0.0) // value for key, value in request.items() if value))


def machines() -> list[Machine]:
    """Return the machines that Ray takes for alive."""
    return [Machine(node) for node in ray.nodes() if node["Alive"]]


def ask_all(question: Callable[..., Any], *arguments: Any) -> list[tuple[Machine, Any]]:
    """Run ``question`` on every machine; return the answers, and refuse a machine that does not answer."""
    asked = []
    for machine in machines():
        there: Any = NodeAffinitySchedulingStrategy(machine.id, soft=False)
        task: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(question)
        asked.append((machine, task.remote(*arguments)))
    answers = []
    for machine, reference in asked:
        try:
            answers.append((machine, ray.get(reference, timeout=ANSWER_SECONDS)))
        except exceptions.RayError as error:
            if machine.id not in {other.id for other in machines()}:
                continue  # it was lost a while ago, and Ray has found out by now
            reason = str(error).strip().splitlines()[-1]
            raise ResourceError(f"{machine} of the Ray cluster does not answer ({reason})") from error
    return answers


def end_tasks(references: list[Any], patience: float) -> None:
    """End tasks; return when none of them writes any more, or after ``patience`` seconds."""
    if not references:
        return
    # Ray aborts this process ("task that was not pending") where a task ends by itself while it is cancelled, and what
    # ended one task may well end others at the same moment: those first.
    _, running = ray.wait(references, num_returns=len(references), timeout=POLL_SECONDS)
    for reference in running:
        ray.cancel(reference, force=True)
    if running:
        ray.wait(running, num_returns=len(running), timeout=patience)


class HeadWatch:
    """Ask the cluster's head again and again, in a thread of its own: Ray waits in the call for a head that is gone."""

    def __init__(self, ask: Callable[[], int], workers: int) -> None:
        self._ask = ask
        self.workers = workers  # by its last answer: how many work items the cluster could work on at a time
        self.address = ray.get_runtime_context().gcs_address
        self._answered = time.monotonic()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="isomerge-ray-head", daemon=True).start()

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self._answered

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            with suppress(Exception):  # that is no answer either
                self.workers = self._ask()
                self._answered = time.monotonic()
