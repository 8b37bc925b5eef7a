"""How rows are measured: accuracy first, then time, with everything that is said of a row beside it.

    pytest benchmarks --level short --device cpu --benchmark-json FILE

Options, the facts of the machine and its ceilings, and the fixture ``measure`` that every benchmark is one call of.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch

from benchmarks.harness.counting import count_flops, peak_memory
from benchmarks.harness.rows import LEVELS, OURS, Problem, Row, absence, is_wanted
from benchmarks.harness.scratch import remembered
from isomerge_fast.bench.ceilings import Ceilings, device_name, measure_ceilings, synchronise
from isomerge_fast.execution.malloc import set_heap_thresholds

# Waiting threads give way soon, as under the command line (see ``isomerge_fast.cli.main``).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Seconds for the timed calls of one contender in one pass.
BUDGET = {"tiny": 0.02, "short": 0.15, "full": 1.5}
# OpenBLAS's threads go on spinning for 2^26 cycles after a call, which the next contender must not pay for: in a pass
# where numpy's SVDs came right before, Iso-C of 256 x 256 took 3.4 times as long.
SETTLE_SECONDS = 0.03
LEAST_ROUNDS, MOST_ROUNDS = 3, 50
PACKAGES = ("isomerge-fast", "torch", "numpy", "triton", "safetensors", "fusion-bench", "mergekit", "pytest-benchmark")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("isomerge")
    group.addoption("--level", choices=LEVELS, default="short", help="how many rows, and how large")
    group.addoption("--device", default="cpu", help="cpu, cuda or cuda:N")
    group.addoption("--later-pass", action="store_true", help="leave out what is measured once")


@dataclass(frozen=True)
class Given:
    """The options."""

    level: str
    device: torch.device
    later_pass: bool


def given(config: pytest.Config) -> Given:
    return Given(
        str(config.getoption("--level")),
        torch.device(str(config.getoption("--device"))),
        bool(config.getoption("--later-pass")),
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    options = given(config)
    wanted, left = [], []
    for item in items:
        row = item.callspec.params.get("row") if hasattr(item, "callspec") else None  # type: ignore[attr-defined]  # of functions only
        takes_part = row is None or is_wanted(
            row, options.level, later_pass=options.later_pass, on_gpu=options.device.type == "cuda"
        )
        (wanted if takes_part else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = wanted


def pytest_configure() -> None:
    # glibc moves its thresholds as it goes, and with them what a large temporary costs: plain torch's sum of eight bf16
    # experts took 25 or 110 ms, depending on what had been freed before. Fixed where they end up.
    set_heap_thresholds(eager=False)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the figures depend on, in place of what pytest-benchmark collects."""
    device = given(config).device
    machine_info.clear()
    machine_info |= {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "numpy_blas": _numpy_blas(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numpy_blas() -> str:
    """numpy's BLAS, with the kernel that it chose for this processor where threadpoolctl is there to ask."""
    import numpy as np

    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return f"of numpy {np.__version__}, threadpoolctl is not installed"
    pools = [pool for pool in threadpool_info() if "numpy" in pool["filepath"]]
    return ", ".join(f"{pool['internal_api']} {pool['version']} ({pool.get('architecture')})" for pool in pools)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return given(pytestconfig).device


@pytest.fixture(scope="session")
def ceilings(device: torch.device) -> Ceilings:
    """Of this run: what shares of the roofline are shares of."""
    return measure_ceilings(device)


@pytest.fixture(scope="session")
def problems(device: torch.device) -> Iterator[Callable[[Row], Problem]]:
    """The problem of a row. One is kept at a time: a row's contenders follow each other."""
    kept: dict[int, Problem] = {}

    def drop() -> None:
        for problem in kept.values():
            problem.close()
        kept.clear()

    def problem(row: Row) -> Problem:
        if id(row) not in kept:
            drop()
            kept[id(row)] = row.make(device)
        return kept[id(row)]

    yield problem
    drop()


@pytest.fixture
def measure(
    pytestconfig: pytest.Config,
    benchmark: Any,
    device: torch.device,
    ceilings: Ceilings,
    problems: Callable[[Row], Problem],
) -> Callable[[Row, str], None]:
    """Measures one contender of one row; what is found lies in ``extra_info``.

    A contender is called once before it is timed, which warms up, shows its peak memory and its error; a slow baseline
    is timed in that very call.
    """

    def run(row: Row, contender: str) -> None:
        # Skipped with the reason, which the run prints: a peer is not installed, or cannot do this here.
        reason = absence(contender)
        problem = None if reason else problems(row)
        reason = reason or (problem.absent.get(contender) if problem else None)
        if reason or problem is None:
            benchmark.skipped = True
            pytest.skip(reason or "")
        call = problem.calls[contender]

        def timed() -> Any:
            result = call()
            synchronise(device)
            return result

        def before() -> None:  # pytest-benchmark takes what a setup returns for arguments
            problem.before()

        def once(function: Callable[[], Any]) -> tuple[Any, int | None]:
            with peak_memory(device) as peak:
                result = function()
            return result, peak.bytes

        def judged(result: Any) -> float | None:
            error = None if problem.error is None else problem.error(result)
            bar = problem.bars.get(contender)
            assert bar is None or (error is not None and error <= bar), (
                f"{row.name}: {contender} is off by {error:.2e}, at most {bar:.0e} is right"
            )
            return error

        benchmark.group = row.name
        time.sleep(SETTLE_SECONDS)
        if contender in row.slow:
            result, peak = once(lambda: benchmark.pedantic(timed, setup=before))
            error = judged(result)
        else:
            problem.before()
            started = time.perf_counter()
            result, peak = once(timed)
            seconds = time.perf_counter() - started
            error = judged(result)
            del result
            budget = BUDGET[given(pytestconfig).level]
            rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(budget / max(seconds, 1e-9))))
            result = benchmark.pedantic(timed, setup=before, rounds=rounds)
        if problem.peak:
            peak = problem.peak(result)
        del result
        info: dict[str, Any] = {"contender": contender, "peak_bytes": peak, "error": error}
        info["bar"] = problem.bars.get(contender)
        info["moved_bytes"] = problem.moved_bytes
        info["curve"] = row.curve
        if contender == OURS:
            flops = remembered(f"flops {row.name}", lambda: count_flops(call)) if problem.is_counted else {}
            double = flops.get("float64", 0.0)
            info["flops"] = flops
            info["floor_seconds"] = ceilings.floor_seconds(problem.moved_bytes, sum(flops.values()) - double, double)
        benchmark.extra_info.update(info)

    return run
