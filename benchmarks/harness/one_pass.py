"""Measure every contender of every row once, those of a row right after each other: accuracy first, then time.

    python -m benchmarks.harness.one_pass FILE SETTINGS

``benchmarks.run`` starts this process and reads FILE, which has a row of readings for each contender. SETTINGS is JSON:
``suites`` (list), ``level``, ``device``, ``is_later`` (to leave out what is measured once), and ``plugins``, modules
that are imported first.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.counting import count_flops, peak_memory
from benchmarks.harness.machine import machine
from benchmarks.harness.readings import Rows, read_rows
from benchmarks.harness.rows import OURS, Problem, Row, absence, is_wanted
from benchmarks.harness.scratch import remembered
from isomerge_fast.bench.ceilings import Ceilings, measure_ceilings, timed
from isomerge_fast.execution.malloc import set_heap_thresholds

# Seconds for the timed calls of one contender in one pass.
BUDGET = {"tiny": 0.02, "short": 0.15, "full": 1.5}
# OpenBLAS's threads go on spinning for 2^26 cycles after a call, which the next contender must not pay for: in a pass
# where numpy's SVDs came right before, Iso-C of 256 x 256 took 3.4 times as long.
SETTLE_SECONDS = 0.03
LEAST_ROUNDS, MOST_ROUNDS = 3, 50


def measure(
    row: Row, contender: str, problem: Problem, ceilings: Ceilings, *, level: str, device: torch.device
) -> dict[str, Any]:
    """Return the readings of one contender of a row.

    It is called once before it is timed, which warms up and shows its peak memory and its error. A slow one is timed in
    that very call.
    """
    call = problem.calls[contender]

    def seconds_once_more() -> float:
        problem.before()
        return timed(call, device)[1]

    time.sleep(SETTLE_SECONDS)
    problem.before()
    with peak_memory(device) as peak:
        result, seconds = timed(call, device)
    error = None if problem.error is None else problem.error(result)
    bar = problem.bars.get(contender)
    assert bar is None or (error is not None and error <= bar), (
        f"{row.name}: {contender} is off by {error:.2e}, at most {bar:.0e} is right"
    )
    peak_bytes = problem.peak(result) if problem.peak else peak.bytes
    del result
    if contender not in row.slow:
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(BUDGET[level] / max(seconds, 1e-9))))
        seconds = statistics.median([seconds_once_more() for _ in range(rounds)])
    found = {"contender": contender, "seconds": seconds, "error": error, "bar": bar, "peak_bytes": peak_bytes}
    found |= {"moved_bytes": problem.moved_bytes, "curve": row.curve}
    if contender == OURS:
        flops = remembered(f"flops {row.name}", lambda: count_flops(call)) if problem.is_counted else {}
        double = flops.get("float64", 0.0)
        floor_seconds = ceilings.floor_seconds(problem.moved_bytes, sum(flops.values()) - double, double)
        found |= {"flops": flops, "floor_seconds": floor_seconds}
    return found


def main() -> int:
    """Measure the rows that the command line asks for; return 1 where one failed."""
    file, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    level, device = settings["level"], torch.device(settings["device"])
    # glibc moves its thresholds as it goes, and with them what a large temporary costs: plain torch's sum of eight bf16
    # experts took 25 or 110 ms, depending on what had been freed before. Fixed where they end up.
    set_heap_thresholds(eager=False)
    for plugin in settings["plugins"]:
        importlib.import_module(plugin)
    readings = Rows("machine", file, device=str(device), small=False, seconds=float("inf"))
    readings.note("machine", **machine(device))
    ceilings = measure_ceilings(device)
    for suite in settings["suites"]:
        readings.stage = suite
        for row in importlib.import_module(f"benchmarks.bench_{suite}").ROWS:
            if not is_wanted(row, level, later_pass=settings["is_later"], on_gpu=device.type == "cuda"):
                continue
            with closing(row.make(device)) as problem:
                for contender in row.contenders:
                    reason = absence(contender) or problem.absent.get(contender)
                    if reason:
                        readings.note(row.name, contender=contender, skipped=reason)
                    else:
                        measured = partial(measure, row, contender, problem, ceilings, level=level, device=device)
                        readings.attempt(row.name, measured)
    failed = [row for row in read_rows(file) if "failed" in row]
    for row in failed:
        print(f"{row['stage']}, {row['name']}: {row['failed']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
