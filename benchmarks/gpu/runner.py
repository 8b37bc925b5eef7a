"""Run a stage in processes of its own, which are killed with all that they started when their time is up.

A stage may abort, hang, or leave processes behind that hold its output: it writes to a file and not into a pipe, each
of its processes leads a session, and that session is killed when the stage ends, however it ends. Where this process
is killed itself, the pipe to the stage's standard input ends, upon which the stage kills its own session.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.schedule import Stage
from benchmarks.harness.readings import Row, Rows, read_rows

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.1
# Of what a process wrote before it failed.
TAIL_CHARACTERS = 400


def child_environment(device: str, shares: int) -> dict[str, str]:
    """Return the environment of a stage: a checkout with nothing installed, one cache of compiled kernels for all, and
    the processors divided among its processes.
    """
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    cache = Path(tempfile.gettempdir()) / f"isomerge-triton-{os.getuid()}"
    found = {"TRITON_CACHE_DIR": str(cache), **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if shares > 1:
        threads = str(max(1, (os.cpu_count() or 1) // shares))
        found |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    if not device.startswith("cuda"):
        found["TRITON_INTERPRET"] = "1"  # which Triton decides when it is loaded
    return found


def child_command(stage: Stage, file: Path, **settings: Any) -> list[str]:
    """Return the command of one process of a stage; its ``Rows`` have these settings and go to ``file``."""
    words = json.dumps({"stage": stage.name, **settings})
    return [sys.executable, "-m", "benchmarks.gpu.runner", stage.function, str(file), words]


class Process:
    """Watch one process of a stage."""

    def __init__(self, command: list[str], file: Path, environment: dict[str, str]) -> None:
        self._file, self._output, self._passed_on = file, file.with_suffix(".out"), 0
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,
                env=environment,
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def pass_on(self, add: Callable[[Row], None]) -> None:
        """Pass the rows that are new since the last time to ``add``."""
        rows = read_rows(self._file)
        for row in rows[self._passed_on :]:
            add(row)
        self._passed_on = len(rows)

    def end(self) -> Row:
        """Kill what is left of the session; return how it ``failed``, how the time ``cut`` it off, or nothing."""
        late = self.is_running
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        if code == 0:
            return {}
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        tail = self._output.read_bytes().decode(errors="replace")[-TAIL_CHARACTERS:]
        said = " ".join(tail.split())
        return {"cut": f"out of time: {said}"} if late else {"failed": f"{how}: {said}"}


def run_stage(stage: Stage, add: Callable[[Row], None], *, device: str, small: bool, seconds: float) -> None:
    """Run a stage for so many seconds at most, and ``add`` its rows as they are made.

    A process that fails, or is cut by the time, adds a row that says so.
    """
    shares = min(stage.processes, os.cpu_count() or 1) if small else stage.processes
    end = time.monotonic() + seconds
    processes: list[Process] = []
    with tempfile.TemporaryDirectory(prefix="isomerge-gpu-", ignore_cleanup_errors=True) as folder:
        try:
            for share in range(shares):
                file = Path(folder) / f"{share}.json"
                settings = {"device": device, "small": small, "seconds": seconds, "share": share, "shares": shares}
                command = child_command(stage, file, **settings)
                processes.append(Process(command, file, child_environment(device, shares)))
            while any(process.is_running for process in processes) and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
                for process in processes:
                    process.pass_on(add)
        finally:
            failures = [process.end() for process in processes]
        for share, (process, failure) in enumerate(zip(processes, failures, strict=True)):
            process.pass_on(add)
            if failure:
                add({"stage": stage.name, "name": f"process {share}", **failure})


def end_with_parent() -> None:
    """Kill this session when standard input ends, as it does when the process that holds its other end is gone."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run one process of a stage, as ``child_command`` asks."""
    function, file, settings = sys.argv[1:]
    threading.Thread(target=end_with_parent, daemon=True).start()
    rows = Rows(file=Path(file), **json.loads(settings))  # first: its seconds are the process's, imports included
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(rows)


if __name__ == "__main__":
    main()
