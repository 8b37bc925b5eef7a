"""What tensors cost, and how a merge is dealt out, from checkpoints of which only the headers exist."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.headers import config_of, save_headers
from benchmarks.shapes import MODELS, Shapes
from isomerge_fast.config import MergeConfig
from isomerge_fast.planning.cost import LEAST_SECONDS, UNITS_A_WORKER, Rates, TensorCost, cost_of, divide
from isomerge_fast.planning.forecast import forecast, item_costs
from isomerge_fast.planning.plan import Plan, TensorPlan
from isomerge_fast.planning.planner import make_plan

METHODS = ("iso-c", "iso-cts", "task-arithmetic")
WORKERS = st.integers(1, 300)
Planned = Callable[..., Plan]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """Of Llama-3-70B and eight experts, by any method."""
    root = tmp_path_factory.mktemp("llama")
    config = config_of(root, MODELS["llama-3-70b"](), 8, out=None)

    @cache
    def plan(method: str) -> Plan:
        return make_plan(
            MergeConfig(base=config.base, experts=config.experts, method=method, out=None), max_ram=64 << 30
        )

    return plan


def plan_of(root: Path, shapes: Shapes, *, shard_bytes: int, **changes: Any) -> Plan:
    base, expert = (str(save_headers(root / name, shapes, shard_bytes)) for name in ("base", "expert"))
    return make_plan(MergeConfig(base=base, experts=[expert], **{"out": None, **changes}))


def rates_of(flops: float) -> Rates:
    return Rates(flops, 2e9, 2e9)


def even_rates(plan: Plan) -> Rates:
    """By which one worker computes exactly as long as it moves bytes: tensors differ most in what they wait for."""
    load = cost_of(plan.tensors)
    return rates_of(load.flops / load.transfer_seconds(rates_of(1.0)))


def seconds_of(unit: tuple[TensorPlan, ...], rates: Rates) -> float:
    return cost_of(unit).seconds(rates)


# --- loads ----------------------------------------------------------------------------------------------------------


def test_a_load_takes_the_longer_of_computing_and_moving() -> None:
    load, rates = TensorCost(600, 100, 50.0), Rates(10.0, 200.0, 50.0)
    assert load.compute_seconds(rates) == 5
    assert load.transfer_seconds(rates) == 600 / 200 + 100 / 50
    assert load.seconds(rates) == 5
    assert load.seconds(Rates(5.0, 200.0, 50.0)) == 10
    assert load.seconds(Rates(10.0, 100.0, 50.0)) == 8
    assert load + TensorCost(1, 2, 3.0) == TensorCost(601, 102, 53.0)


def test_a_load_is_that_of_all_tensors_and_outputs(tmp_path: Path) -> None:
    shapes: Shapes = {"a": (30, 20), "b": (10, 10), "c": (7,)}
    plan = plan_of(tmp_path, shapes, shard_bytes=10**6, method="iso-c", scaling=[0.5, 1.0, 2.0], save_delta=True)
    elements = 600 + 100 + 7
    total = cost_of(plan.tensors)
    assert total.read_bytes == 2 * 2 * elements
    assert total.write_bytes == (3 * 2 + 4) * elements  # bf16, and the merged Δ in float32
    assert total.flops == sum(tensor.flops for tensor in plan.tensors) > 0
    a, b, c = (cost_of([tensor]) for tensor in plan.tensors)
    assert a + b + c == total
    assert cost_of([]) == TensorCost(0, 0, 0.0)


# --- units ----------------------------------------------------------------------------------------------------------


def check_units(plan: Plan, units: list[tuple[TensorPlan, ...]], rates: Rates) -> None:
    """Every tensor is in one unit, a unit is a run of tensors of one file, and the largest comes first."""
    assert Counter(tensor.name for unit in units for tensor in unit) == Counter(t.name for t in plan.tensors)
    files: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        files.setdefault(tensor.shard, []).append(tensor.name)
    for unit in units:
        names = [tensor.name for tensor in unit]
        in_file = files[unit[0].shard]
        start = in_file.index(names[0])
        assert names == in_file[start : start + len(names)]
    seconds = [seconds_of(unit, rates) for unit in units]
    assert all(first >= second * (1 - 1e-12) for first, second in pairwise(seconds))


@pytest.mark.parametrize("method", METHODS)
@given(workers=WORKERS, flops=st.floats(10, 15))
@settings(max_examples=12, deadline=None)
def test_units_are_runs_of_every_file(llama: Planned, method: str, workers: int, flops: float) -> None:
    plan, rates = llama(method), rates_of(10**flops)
    check_units(plan, divide(plan, workers, rates), rates)


@given(workers=WORKERS)
@settings(max_examples=12, deadline=None)
def test_units_are_in_order_of_what_they_take_together(llama: Planned, workers: int) -> None:
    """Not of the sum of what their tensors take: one is moved while another is computed."""
    plan = llama("iso-cts")
    rates = even_rates(plan)
    check_units(plan, divide(plan, workers, rates), rates)


@given(workers=st.integers(2, 300), flops=st.floats(10, 15))
@settings(max_examples=20, deadline=None)
def test_no_unit_is_much_of_what_a_worker_has_to_do(llama: Planned, workers: int, flops: float) -> None:
    """Of several tensors: a quarter at most, and half of the last tensor."""
    plan, rates = llama("iso-c"), rates_of(10**flops)
    cost = {tensor.name: seconds_of((tensor,), rates) for tensor in plan.tensors}
    limit = max(sum(cost.values()) / (workers * UNITS_A_WORKER), LEAST_SECONDS)
    for unit in divide(plan, workers, rates):
        if len(unit) > 1:
            assert seconds_of(unit, rates) <= limit + cost[unit[-1].name] / 2 + 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_one_worker_has_whole_files(llama: Planned, method: str) -> None:
    plan = llama(method)
    rates = rates_of(1e13)
    units = divide(plan, 1, rates)
    check_units(plan, units, rates)
    assert len(units) == len({tensor.shard for tensor in plan.tensors}) > 20


def test_files_stay_whole_where_there_are_enough(tmp_path: Path) -> None:
    """32 equal files are four for each of eight workers, and too few for nine."""
    shapes: Shapes = {f"{file}.{part}": (512, 512) for file in range(32) for part in range(4)}
    plan = plan_of(tmp_path, shapes, shard_bytes=4 * 2 * 512 * 512, method="iso-c")
    rates = Rates(cost_of(plan.tensors[:1]).flops / 100)  # 100 s a tensor
    assert {len(unit) for unit in divide(plan, 8, rates)} == {4}
    units = divide(plan, 9, rates)
    assert len(units) > 32
    check_units(plan, units, rates)


def test_one_file_is_cut_for_several_workers(tmp_path: Path) -> None:
    shapes: Shapes = {f"{part:02}": (512, 512) for part in range(64)}
    plan = plan_of(tmp_path, shapes, shard_bytes=10**9, method="iso-c")
    each = cost_of(plan.tensors[:1]).flops
    assert len(divide(plan, 1, Rates(each / 100))) == 1
    assert {len(unit) for unit in divide(plan, 4, Rates(each / 100))} == {4}
    # Not below what starting a unit is worth: 64 x 0.01 s are one unit.
    assert len(divide(plan, 4, Rates(each / 0.01))) == 1


def test_nothing_is_divided_into_nothing(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, {"empty": (0, 4), "also": (0,)}, shard_bytes=10**6)
    for workers in (1, 3):
        check_units(plan, divide(plan, workers, Rates(1e9)), Rates(1e9))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("times", [0.1, 0.7, 1.0, 1.4, 10.0])
def test_sixteen_workers_are_fourteen_times_as_fast(llama: Planned, method: str, times: float) -> None:
    """Of Llama-3-70B: 0.9 N for every N up to 16, whether computing takes longer than moving or not, or as long."""
    plan = llama(method)
    rates = rates_of(times * even_rates(plan).flops_per_second)
    alone = item_costs(plan, 1, rates)
    shares = {
        workers: forecast(item_costs(plan, workers, rates), workers, rates, alone=alone).speedup / workers
        for workers in range(1, 17)
    }
    assert min(shares.values()) >= 0.9, shares
    assert max(shares.values()) <= 1 + 1e-9, shares


def test_dividing_takes_no_time(llama: Planned, tmp_path: Path) -> None:
    """About 0.02 and 0.4 s on one core."""
    moe = make_plan(config_of(tmp_path, MODELS["glm-4.5"](), 1, method="iso-c", out=None))
    assert len(moe.tensors) > 40_000
    for plan in (llama("iso-c"), moe):
        for rates in (rates_of(1e12), even_rates(plan)):
            started = time.perf_counter()
            units = divide(plan, 256, rates)
            took = time.perf_counter() - started
            print(f"{len(plan.tensors)} tensors in {len(units)} units: {took:.2f} s")
            assert took < 4
