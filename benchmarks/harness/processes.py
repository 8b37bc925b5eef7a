"""Run merges as a user starts them, measured from outside: wall time with start-up, peak resident memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A process between this one and the one measured: a child's peak starts with that of the process it was forked from.
MEASURED = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
outcome = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
seconds = time.perf_counter() - started
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024, "output": outcome.stdout}))
sys.exit(outcome.returncode)
"""


def measured(command: Sequence[str | Path]) -> dict[str, Any]:
    """Return the wall time, the peak memory and the output of a process; raise RuntimeError where it failed."""
    words = [sys.executable, "-c", MEASURED, *map(str, command)]
    outcome = subprocess.run(words, capture_output=True, text=True)
    if outcome.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{outcome.stdout}{outcome.stderr}")
    return json.loads(outcome.stdout.splitlines()[-1])


def merged(models: Sequence[Path], out: Path, *options: str) -> dict[str, Any]:
    """Delete ``out``, run ``isomerge run`` on the base ``models[0]``; return what was ``measured``, and its report."""
    shutil.rmtree(out, ignore_errors=True)
    command: list[str | Path] = [sys.executable, "-m", "isomerge_fast.cli", "run", "--base", models[0], "--out", out]
    for expert in models[1:]:
        command += ["--expert", expert]
    found = measured([*command, *options, "--format", "json"])
    return {**found, "report": json.loads(found.pop("output"))}
