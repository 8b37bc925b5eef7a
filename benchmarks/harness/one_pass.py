"""Measure every contender of every row once, those of a row right after each other: accuracy first, then time.

    python -m benchmarks.harness.one_pass FILE --suites methods,polar --level short --device cpu

``benchmarks.run`` starts this process and reads FILE, which has a row of readings for each contender.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import statistics
import sys
import time
from contextlib import closing
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.counting import count_flops, peak_memory
from benchmarks.harness.readings import Rows, read_rows
from benchmarks.harness.rows import OURS, Problem, Row, absence, is_wanted
from benchmarks.harness.scratch import remembered
from isomerge_fast.bench.ceilings import Ceilings, device_name, measure_ceilings, timed
from isomerge_fast.execution.malloc import return_freed_blocks

# Seconds for the timed calls of one contender in one pass.
BUDGET = {"tiny": 0.02, "short": 0.15, "full": 1.5}
# OpenBLAS's threads go on spinning for 2^26 cycles after a call, which the next contender must not pay for: in a pass
# where numpy's SVDs came right before, Iso-C of 256 x 256 took 3.4 times as long.
SETTLE_SECONDS = 0.03
LEAST_ROUNDS, MOST_ROUNDS = 3, 50
PACKAGES = ("isomerge-fast", "torch", "numpy", "triton", "safetensors", "fusion-bench", "mergekit")


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "numpy_blas": _numpy_blas(),
    }


def installed(*distributions: str) -> str | None:
    """Return the version of the first distribution that is installed, None where none is."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _numpy_blas() -> str:
    """Return numpy's BLAS, with the kernel that it chose for this processor where threadpoolctl is there to ask."""
    import numpy as np

    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return f"of numpy {np.__version__}, threadpoolctl is not installed"
    pools = [pool for pool in threadpool_info() if "numpy" in pool["filepath"]]
    return ", ".join(f"{pool['internal_api']} {pool['version']} ({pool.get('architecture')})" for pool in pools)


def measure(
    row: Row, contender: str, problem: Problem, ceilings: Ceilings, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the readings of one contender of a row.

    It is called once before it is timed, which warms up and shows its peak memory and its error. A slow one is timed in
    that very call.
    """
    call, device = problem.calls[contender], torch.device(options.device)

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
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(BUDGET[options.level] / max(seconds, 1e-9))))
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
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--suites", required=True)
    parser.add_argument("--level", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--later-pass", action="store_true", help="leave out what is measured once")
    parser.add_argument("--plugin", action="append", default=[], help="a module that is imported first")
    options = parser.parse_args()
    # glibc moves its thresholds as it goes, and with them what a large temporary costs: plain torch's sum of eight bf16
    # experts took 25 or 110 ms, depending on what had been freed before. Fixed where they end up.
    return_freed_blocks(eager=False)
    for plugin in options.plugin:
        importlib.import_module(plugin)
    device = torch.device(options.device)
    readings = Rows("machine", options.file, device=options.device, small=False, seconds=float("inf"))
    readings.note("machine", **machine(device))
    ceilings = measure_ceilings(device)
    for suite in options.suites.split(","):
        readings.stage = suite
        for row in importlib.import_module(f"benchmarks.bench_{suite}").ROWS:
            if not is_wanted(row, options.level, later_pass=options.later_pass, on_gpu=device.type == "cuda"):
                continue
            with closing(row.make(device)) as problem:
                for contender in row.contenders:
                    reason = absence(contender) or problem.absent.get(contender)
                    if reason:
                        readings.note(row.name, contender=contender, skipped=reason)
                    else:
                        readings.attempt(row.name, partial(measure, row, contender, problem, ceilings, options))
    failed = [row for row in read_rows(options.file) if "failed" in row]
    for row in failed:
        print(f"{row['stage']}, {row['name']}: {row['failed']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
