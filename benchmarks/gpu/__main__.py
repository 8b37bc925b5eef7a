"""Prove and measure everything on this machine's GPU: ``python -m benchmarks.gpu``; docs/gpu.md says how to read it."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.runner import ROOT, run_stage
from benchmarks.gpu.schedule import CALL_SECONDS, CALLS, DEVICE, STAGES, Stage
from benchmarks.gpu.summary import summary
from benchmarks.harness.readings import Results, Row

# A dry run's sizes are small and its machine slow: its limits only end what hangs.
SMALL_FACTOR = 10.0


def run_stages(stages: Sequence[Stage], results: Results, *, device: str, small: bool, end: float) -> int:
    """Run stages up to ``end`` of the monotonic clock; return how many of their rows failed."""
    failed = 0
    for stage in stages:
        start = time.monotonic()
        limit = max(1.0, min(stage.seconds * (SMALL_FACTOR if small else 1.0), end - start))
        results.begin(stage.name)
        run_stage(stage, results.add, device=device, small=small, seconds=limit)
        rows = [row for row in results.rows if row["stage"] == stage.name]
        misses = sum("failed" in row or "cut" in row for row in rows)
        failed += misses
        results.say(
            f"= {stage.name}: {len(rows)} rows, {misses} failed, {time.monotonic() - start:.1f} of {limit:.0f} s"
        )
    return failed


def leave(*_: object) -> None:
    """End by an exception, upon which what runs is killed."""
    sys.exit(128 + signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--call", choices=sorted(CALLS), help="both when left out")
    parser.add_argument("--stage", action="append", choices=STAGES, help="this one alone; may be given again")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="small sizes, to see that everything runs")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, leave)
    factor = SMALL_FACTOR if options.small else 1.0
    found: list[Row] = []
    run_stage(DEVICE, found.append, device=options.device, small=options.small, seconds=factor * DEVICE.seconds)
    if not found or "failed" in found[-1]:
        why = found[-1]["failed"] if found else "no answer"
        print(f"no device {options.device}: {why} (--device cpu --small is a dry run)", file=sys.stderr)
        return 2
    results, failed, start = Results(options.out, found[-1]["name"]), 0, time.monotonic()
    for call in [options.call] if options.call else CALLS:
        stages = [stage for stage in CALLS[call] if not options.stage or stage.name in options.stage]
        failed += run_stages(
            stages, results, device=options.device, small=options.small, end=start + factor * CALL_SECONDS[call]
        )
        start = time.monotonic()
    for line in summary(results.rows):
        results.say(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
