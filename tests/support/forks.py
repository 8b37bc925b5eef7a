"""Run commands of Python in forks of one process that has loaded what they need, which takes seconds every time.

A fork is a process of its own all the same: with its own environment, working folder, output and exit code. What is
decided as modules are loaded (threads, whether kernels are interpreted) is as in the process that forks.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Else numpy's OpenBLAS starts threads, which a fork would lack.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Forks:
    """A context manager around the process that forks, with these variables; ``warm`` is the code it runs before."""

    def __init__(self, warm: str, **variables: str) -> None:
        self._warm, self._environment = warm, {**os.environ, **ONE_THREAD, **variables}

    def __enter__(self) -> Forks:
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._warm],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def run(
        self,
        command: Sequence[object],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        **_: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Do as ``subprocess.run(command, capture_output=True, text=True)`` does, for python and for its scripts."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        words = [str(word) for word in command]
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder) / name for name in ("stdout", "stderr")]
            request = [words, str(cwd or os.getcwd()), dict(env or os.environ), [str(path) for path in outputs]]
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(words, code, *(path.read_text() for path in outputs))


def act(words: list[str]) -> int:
    """Run a script, ``python -m module`` or ``python -c code`` in this process; return its exit code."""
    try:
        if os.path.realpath(words[0]) != os.path.realpath(sys.executable):
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        elif words[1] == "-m":
            sys.argv, sys.path[0] = words[2:], os.getcwd()
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            assert words[1] == "-c", words
            sys.argv, sys.path[0] = words[1:2] + words[3:], ""
            exec(compile(words[2], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def answer(words: list[str], folder: str, environment: dict[str, str], outputs: list[str]) -> int:
    """Return the exit code of one command, run in a fork; minus the signal that ended it."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            for descriptor, path in zip((0, 1, 2), (os.devnull, *outputs), strict=True):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
            code = act(words)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def serve() -> None:
    exec(sys.argv[1], {})
    assert len(os.listdir("/proc/self/task")) == 1, "a fork lacks the threads that there are"
    for line in sys.stdin:
        print(answer(*json.loads(line)), flush=True)


if __name__ == "__main__":
    serve()
