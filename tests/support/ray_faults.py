"""Faults in the worker processes of a Ray cluster, by orders that they find in a folder.

A machine of the cluster is started in ``Machine.environment``: every Python process there then begins with this file,
as its ``sitecustomize``. It looks for orders at every call of the kinds that it knows, and obeys those that are meant.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

FOLDER = "ISOMERGE_TEST_ORDERS"
# A process that nobody lets go goes on.
HELD_SECONDS = 180.0
PAUSE_SECONDS = 0.02


@dataclass(frozen=True)
class Order:
    """What is to happen at a call.

    Attributes:
        call: ``pwrite``, ``preadv``, ``fsync`` or ``open`` of a process that is at work on a unit; or ``stat``, by any.
        path: part of the path of the file that is about.
        act: ``hold``: the call waits until the order is taken back; ``meet``: until two processes are at work;
            ``kill``: the process is gone; else the name of an error.
        staging: the folder of the run in which the unit's journal lies.
        unit: of this unit only; 0: of any.
        lines: only once so many tensors stand in the unit's journal.
        times: so often; 0: always.
        alone: of the first process only that comes to it.
    """

    call: str
    path: str
    act: str
    staging: str = ""
    unit: int = 0
    lines: int = 0
    times: int = 0
    alone: bool = False


class Given:
    """An order that stands."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def take_back(self) -> None:
        self._path.unlink(missing_ok=True)

    @property
    def obeyed(self) -> list[int]:
        """Processes that did, each time they did so."""
        found = self._path.parent.glob(f"{self._path.stem}.did-*")
        marks = [mark for mark in found if mark.suffix.startswith(".did-")]  # and not one that is being made
        return [int(mark.name.split("-")[1]) for mark in sorted(marks, key=lambda mark: mark.stat().st_mtime_ns)]


class Machine:
    """The folder of orders for one machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        shutil.copy(__file__, folder / "sitecustomize.py")

    @property
    def environment(self) -> dict[str, str]:
        paths = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Ray's workers give way to all else on the machine; where that is much, nothing would come of them.
        return {"PYTHONPATH": os.pathsep.join(paths), FOLDER: str(self.folder), "RAY_worker_niceness": "0"}

    def give(self, call: str, path: str, act: str, **about: Any) -> Given:
        order = Order(call, path, act, **about)
        given = self.folder / f"{uuid4().hex}.json"
        temporary = given.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(order)))
        temporary.rename(given)
        return Given(given)

    def clear(self) -> None:
        """Takes all orders back."""
        for path in self.folder.glob("*.json"):
            path.unlink()

    def pretend(self, version: str | None) -> None:
        """New processes find this version of the package; none with ""; the one that is installed with None."""
        path = self.folder / "version"
        path.unlink(missing_ok=True)
        if version is not None:
            path.write_text(version)


def journals(staging: Path) -> dict[int, tuple[int, int]]:
    """By unit: the process that is, or was, at work on it, and how many tensors stand in its journal."""
    return {unit: (pid, lines) for unit, (pid, lines, _) in _journals(str(staging)).items()}


def _journals(staging: str) -> dict[int, tuple[int, int, int]]:
    """With the time of the last change. By none of the calls that are watched."""
    found = {}
    try:
        runs = [run.path for run in os.scandir(staging) if run.name.startswith("run-")]
        entries = [entry for run in runs for entry in os.scandir(run) if entry.name.startswith("journal-")]
    except OSError:
        return {}
    for entry in entries:
        try:
            with open(entry.path, "rb") as opened:
                lines = opened.read().splitlines()
            about = json.loads(lines[0].split(b" ", 1)[1])
            unit = int(entry.name.removeprefix("journal-").removesuffix(".jsonl"))
            found[unit] = about["pid"], len(lines) - 1, entry.stat().st_mtime_ns
        except (OSError, IndexError, ValueError):  # being made, or gone by now
            continue
    return found


# In the processes of a machine.


class _Obedience:
    """Of this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open, self._stat = os.open, os.stat

    def install(self) -> None:
        for name in ("pwrite", "preadv", "fsync"):
            setattr(os, name, self._of_descriptor(name, getattr(os, name)))
        os.open = self._of_path("open", os.open)  # type: ignore[assignment]  # a wrapper of looser types, as is setattr's
        os.stat = self._of_path("stat", os.stat)  # type: ignore[assignment]  # likewise

    def _of_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: Any, *arguments: Any) -> Any:
            if self._orders():
                number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
                self._obey(name, os.readlink(f"/proc/self/fd/{number}"))
            return real(descriptor, *arguments)

        return call

    def _of_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if not isinstance(path, int) and self._orders():
                self._obey(name, os.fsdecode(path))
            return real(path, *arguments, **options)

        return call

    def _orders(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._folder) if name.endswith(".json"))
        except OSError:
            return []

    def _obey(self, call: str, path: str) -> None:
        for name in self._orders():
            file = f"{self._folder}/{name}"
            try:
                with open(file) as opened:  # not by os.open, nor is anything else here
                    order = Order(**json.load(opened))
            except OSError:
                continue
            if call == order.call and order.path in path and self._is_meant(order, file):
                self._act(order, file, path)

    def _is_meant(self, order: Order, file: str) -> bool:
        if order.call != "stat":
            mine = [
                (changed, unit, lines)
                for unit, (pid, lines, changed) in _journals(order.staging).items()
                if pid == os.getpid()
            ]
            if not mine:
                return False
            _, unit, lines = max(mine)
            if order.unit not in (0, unit) or lines < order.lines:
                return False
        if order.alone:
            self._claim(f"{file}.alone", str(os.getpid()))
            with open(f"{file}.alone") as opened:
                if opened.read() != str(os.getpid()):
                    return False
        return not order.times or any(self._claim(f"{file}.time-{time}") for time in range(order.times))

    def _act(self, order: Order, file: str, path: str) -> None:
        self._claim(f"{file.removesuffix('.json')}.did-{os.getpid()}-{uuid4().hex}")
        if order.act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if order.act in ("hold", "meet"):
            patience = time.monotonic() + HELD_SECONDS
            while _exists(file) and time.monotonic() < patience:
                if order.act == "meet" and len({pid for pid, *_ in _journals(order.staging).values()}) > 1:
                    break
                time.sleep(PAUSE_SECONDS)
            return
        number = getattr(errno, order.act)
        raise OSError(number, os.strerror(number), path if order.call in ("open", "stat") else None)

    def _claim(self, path: str, content: str = "") -> bool:
        """Whether this is the first to do so."""
        temporary = f"{path}.{uuid4().hex}"
        with open(temporary, "w") as opened:
            opened.write(content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary)
        return True


def _exists(path: str) -> bool:
    return os.path.basename(path) in os.listdir(os.path.dirname(path))


def _pretend_version(folder: Path) -> None:
    import types

    try:
        version = (folder / "version").read_text()
    except OSError:
        return
    pretended: Any = types.ModuleType("isomerge_fast")
    pretended.__version__ = version
    sys.modules["isomerge_fast"] = pretended if version else None  # type: ignore[assignment]  # None: no such module


if FOLDER in os.environ and __name__ == "sitecustomize":
    _pretend_version(Path(os.environ[FOLDER]))
    _Obedience(Path(os.environ[FOLDER])).install()
