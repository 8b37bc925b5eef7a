"""Merges run to be killed or made to fail, each in a fork of a process that has torch and the package loaded already.

``WarmProcess`` is for tests: it starts this file with ``fault_shim.c`` preloaded and sends it what to run.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# What the shim calls its kinds and modes.
NAMES = ["open", "write", "truncate", "sync", "rename", "unlink", "mkdir", "rmdir", "link", "lock", "close"]
NAMES += ["read", "open_read"]
KINDS = {name: 1 << bit for bit, name in enumerate(NAMES)}
CHANGES = sum(KINDS.values()) - KINDS["read"] - KINDS["open_read"]
MODES = {
    name: number
    for number, name in enumerate(["count", "kill-before", "kill-after", "kill-half", "fail", "fail-on", "short"])
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Fault:
    """At the ``nth`` call of those ``kinds`` below ``folder``. ``fail-on`` fails from there on, ``fail`` once."""

    folder: str
    mode: str = "count"
    nth: int = 0
    kinds: int = CHANGES
    errno: int = 0


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: ``done``, ``killed``, an error of ours (its class), or ``crash``, which none may."""

    status: str
    message: str = ""
    calls: int = 0
    log: list[str] = field(default_factory=list)


def compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build_shim(folder: Path) -> Path:
    """The shim compiled into ``folder``."""
    found = compiler()
    assert found is not None, "no C compiler"
    target = folder / "fault_shim.so"
    source = str(HERE / "fault_shim.c")
    subprocess.run([found, "-shared", "-fPIC", "-O1", "-o", str(target), source, "-ldl"], check=True)
    return target


def attempt(
    config: dict[str, Any],
    fault: Fault,
    *,
    log: bool = False,
    umask: int | None = None,
    open_files: int | None = None,
    threads: int = 1,
    **options: Any,
) -> Outcome:
    """``merge(config, **options)`` in a fork of this process, which must have the shim preloaded.

    Args:
        log: whether the outcome is to tell of every call that was counted.
        open_files: the soft limit on them.
        threads: with which torch computes.
        options: of ``merge``; and ``units``: in how many of them every file is merged, in turn.
    """
    with tempfile.TemporaryFile() as lines:

        def act() -> Outcome:
            if umask is not None:
                os.umask(umask)
            if open_files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            return _run(config, fault, lines.fileno() if log else -1, threads, options)

        outcome = Fork(act).wait()
        lines.seek(0)
        return replace(outcome, log=lines.read().decode().splitlines())


class Fork:
    """A fork of this process that does ``action`` and ends."""

    def __init__(self, action: Callable[[], Outcome]) -> None:
        self._receive, send = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            outcome = Outcome("crash", "left the fork")
            try:
                outcome = action()
            except BaseException:
                outcome = Outcome("crash", traceback.format_exc())
            finally:
                os.write(send, json.dumps(asdict(outcome)).encode())
                os._exit(0)
        os.close(send)

    def wait(self) -> Outcome:
        """Return how it ended."""
        with open(self._receive, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            return Outcome("killed" if os.WTERMSIG(status) == 9 else "crash", f"signal {os.WTERMSIG(status)}")
        return Outcome(**json.loads(answer))


def _run(config: dict[str, Any], fault: Fault, log: int, threads: int, options: dict[str, Any]) -> Outcome:
    import torch

    torch.set_num_threads(threads)
    shim = ctypes.CDLL(None)
    shim.fault_calls.restype = ctypes.c_long
    shim.fault_arm(
        os.fsencode(fault.folder), fault.kinds, ctypes.c_long(fault.nth), MODES[fault.mode], fault.errno, log
    )
    outcome = merged(config, **options)
    shim.fault_disarm()
    return replace(outcome, calls=shim.fault_calls())


def merged(config: dict[str, Any], *, units: int = 0, **options: Any) -> Outcome:
    """``merge(config, **options)`` in this process, every file in so many units, in turn."""
    import isomerge_fast as imf
    from executors import InTurn
    from isomerge_fast.config import load_config
    from isomerge_fast.errors import IsomergeError, LostWritesError
    from isomerge_fast.execution.engine import run
    from isomerge_fast.planning.planner import make_plan

    try:
        if units:
            run(make_plan(load_config(config)), device="cpu", executor=InTurn(units).merge, **options)
        else:
            imf.merge(config, device="cpu", **options)
    except LostWritesError as error:
        return Outcome("ResourceError", str(error))
    except IsomergeError as error:
        return Outcome(type(error).__name__, str(error))
    except BaseException:
        return Outcome("crash", traceback.format_exc())
    return Outcome("done")


def warm_up() -> None:
    """Load what a fork is to find loaded. No parallel work: its threads would be missing from the fork."""
    import torch

    torch.set_num_threads(1)
    import xxhash  # noqa: F401 - to be loaded

    import executors  # noqa: F401 - likewise
    import isomerge_fast as imf
    from checkpoints import make_family
    from isomerge_fast import api  # noqa: F401 - likewise
    from isomerge_fast.config import load_config
    from isomerge_fast.planning.planner import make_plan

    imf.iso_c(torch.randn(2, 4, 6))  # loads what the solvers load
    with tempfile.TemporaryDirectory() as folder:  # loads pydantic and more: else three quarters of a small merge
        base, experts = make_family(Path(folder), tasks=1)
        (base / "notes.txt").touch()  # is compared with the patterns of all companions
        make_plan(load_config({"base": base, "experts": experts}))
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page that holds an object


class WarmProcess:
    """A context manager; ``run`` makes one attempt."""

    def __init__(self, shim: Path) -> None:
        self._shim = shim

    def __enter__(self) -> WarmProcess:
        environment = {**os.environ, **ENVIRONMENT, "LD_PRELOAD": str(self._shim)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def run(self, config: dict[str, Any], fault: Fault, **options: Any) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"config": config, "fault": asdict(fault), "options": options}
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))


def serve() -> None:
    warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        outcome = attempt(request["config"], Fault(**request["fault"]), **request["options"])
        print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    serve()
