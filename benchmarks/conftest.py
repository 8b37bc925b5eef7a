"""Give the options of a pass, and a case for each contender of each row that it asks for."""

from __future__ import annotations

import importlib
import os
import tempfile
from typing import Any

import pytest
import torch

from benchmarks.harness.machine import machine
from benchmarks.harness.rows import LEVELS, SCRATCH_VARIABLE, SUITES, is_wanted
from isomerge_fast.execution.malloc import set_heap_thresholds

# Threads that wait give way soon, as under the command line (see ``isomerge_fast.cli.application.main``).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("isomerge")
    group.addoption("--suites", default=SUITES, help=f"by comma, of {SUITES}")
    group.addoption("--level", choices=LEVELS, default="short", help="how many rows, and how large")
    group.addoption("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda or cuda:N")
    group.addoption("--later-pass", action="store_true", help="leave out what is measured once")


def pytest_configure(config: pytest.Config) -> None:
    if SCRATCH_VARIABLE not in os.environ:  # ``benchmarks.run`` has one folder for all passes
        folder = tempfile.TemporaryDirectory(prefix="isomerge-bench-")
        config.add_cleanup(folder.cleanup)
        os.environ[SCRATCH_VARIABLE] = folder.name
    # glibc moves its thresholds as it goes, and with them what a large temporary costs: plain torch's sum of eight bf16
    # experts took 25 or 110 ms, depending on what had been freed before. Fixed where they end up.
    set_heap_thresholds(eager=False)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine(config.option.device)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    # The terminal's plugin is always there; its type says that it may be None.
    reports = config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])  # type: ignore[union-attr]
    output_json["skipped"] = sorted({report.longrepr[2].removeprefix("Skipped: ") for report in reports})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    cases = [
        pytest.param(row, (suite, row, contender), id=f"{row.name} {contender}")
        for suite in options.suites.split(",")
        for row in importlib.import_module(f"benchmarks.bench_{suite}").ROWS
        if is_wanted(row, options.level, later_pass=options.later_pass, on_gpu=options.device.type == "cuda")
        for contender in row.contenders
    ]
    # By the session's scope the contenders of a row, which follow each other, share the problem.
    metafunc.parametrize(("problem", "case"), cases, indirect=["problem"], scope="session")
