"""Time every contender of every row with pytest-benchmark, those of a row right after each other.

    pytest benchmarks --level short --suites polar,methods [--benchmark-json FILE]

Accuracy comes first, then time. ``benchmarks.run`` starts one such process for each pass and reads FILE.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.harness.counting import count_flops, peak_memory
from benchmarks.harness.rows import OURS, Problem, Row, absence, kept
from isomerge_fast.bench.ceilings import Ceilings, measure_ceilings, timed

# Seconds for the timed calls of one contender in one pass.
BUDGET = {"tiny": 0.02, "short": 0.15, "full": 1.5}
# OpenBLAS's threads go on spinning for 2^26 cycles after a call, which the next contender must not pay for: in a pass
# where numpy's SVDs came right before, Iso-C of 256 x 256 took 3.4 times as long.
SETTLE_SECONDS = 0.03
LEAST_ROUNDS, MOST_ROUNDS = 3, 50


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config) -> Ceilings:
    """Return the ceilings of this machine, which shares of the roofline are shares of."""
    return measure_ceilings(pytestconfig.option.device)


@pytest.fixture(scope="session")
def problem(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Iterator[Problem]:
    """Yield the problem of a row, until that of another is asked for."""
    made = request.param.make(pytestconfig.option.device)
    yield made
    made.close()


def test_row(
    problem: Problem, case: tuple[str, Row, str], benchmark: Any, ceilings: Ceilings, pytestconfig: pytest.Config
) -> None:
    suite, row, contender = case
    if reason := absence(contender) or problem.absent.get(contender):
        benchmark.skipped = True
        pytest.skip(reason)
    benchmark.group = row.name
    found = measure(row, contender, problem, ceilings, benchmark, pytestconfig.option)
    benchmark.extra_info.update(suite=suite, **found)


def measure(
    row: Row, contender: str, problem: Problem, ceilings: Ceilings, benchmark: Any, options: Any
) -> dict[str, Any]:
    """Return the readings of one contender of a row.

    It is called once before it is timed, which warms up and shows its peak memory and its error. A slow one is timed in
    that very call.
    """
    call, device = problem.calls[contender], options.device

    def complete() -> Any:
        return timed(call, device)[0]

    def before() -> None:  # pytest-benchmark takes what a setup returns for arguments
        problem.before()

    time.sleep(SETTLE_SECONDS)
    before()
    with peak_memory(device) as peak:
        if contender in row.slow:
            result, seconds = benchmark.pedantic(complete), 0.0
        else:
            result, seconds = timed(call, device)
    error = None if problem.error is None else problem.error(result)
    bar = problem.bars.get(contender)
    assert bar is None or (error is not None and error <= bar), (
        f"{row.name}: {contender} is off by {error:.2e}, at most {bar:.0e} is right"
    )
    if contender not in row.slow:
        del result
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(BUDGET[options.level] / max(seconds, 1e-9))))
        result = benchmark.pedantic(complete, setup=before, rounds=rounds)
    peak_bytes = problem.peak(result) if problem.peak else peak.bytes
    if benchmark.stats is not None:  # None where pytest-benchmark is disabled: then the one call counts
        seconds = benchmark.stats.stats.median
    found = {"contender": contender, "seconds": seconds, "error": error, "bar": bar}
    found |= {"peak_bytes": peak_bytes, "moved_bytes": problem.moved_bytes, "curve": row.curve}
    if contender == OURS:
        flops = kept(f"flops {row.name}", lambda: count_flops(call)) if problem.is_counted else {}
        double = flops.get("float64", 0.0)
        floor_seconds = ceilings.floor_seconds(problem.moved_bytes, sum(flops.values()) - double, double)
        found |= {"flops": flops, "floor_seconds": floor_seconds}
    return found
