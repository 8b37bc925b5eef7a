"""What tensors cost, and how a merge is dealt out, from checkpoints of which only the headers exist."""

from __future__ import annotations

import heapq
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from benchmarks.harness.checkpoints import save_headers
from benchmarks.shapes import MODELS, Shapes
from isomerge_fast.bench.outlook import predict
from isomerge_fast.cli.render import duration
from isomerge_fast.config import MergeConfig
from isomerge_fast.planning.cost import (
    ITEMS_PER_WORKER,
    LEAST_SECONDS,
    Rates,
    TensorCost,
    cost_of,
    divide,
    least_seconds,
)
from isomerge_fast.planning.plan import Plan, TensorPlan
from isomerge_fast.planning.planner import make_plan
from planned_models import config_of, glm4_moe

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


def costs_of(plan: Plan, workers: int, rates: Rates) -> list[TensorCost]:
    return [cost_of(item) for item in divide(plan, workers, rates)]


def taken(items: Sequence[TensorCost], workers: int, rates: Rates) -> float:
    """Seconds until the last worker is done, each taking the next item when it is free; the storage has no limit."""
    ends = [0.0] * workers
    for item in items:
        heapq.heapreplace(ends, ends[0] + item.seconds(rates))
    return max(ends)


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
    assert load.storage_seconds(Rates(1.0, storage_bytes_per_second=7.0)) == 100


def test_a_load_is_that_of_all_tensors_and_outputs(tmp_path: Path) -> None:
    shapes: Shapes = {"a": (30, 20), "b": (10, 10), "c": (7,)}
    plan = plan_of(tmp_path, shapes, shard_bytes=10**6, method="iso-c", scaling=[0.5, 1.0, 2.0], save_delta=True)
    elements = 600 + 100 + 7
    total = cost_of(plan.tensors)
    assert total.read_bytes == 2 * 2 * elements
    assert total.write_bytes == (3 * 2 + 4) * elements  # bf16, and the merged Δ in float32
    assert total.flops == sum(tensor.flops for tensor in plan.tensors) > 0
    a, b, c = (cost_of([tensor]) for tensor in plan.tensors)
    assert a.read_bytes + b.read_bytes + c.read_bytes == total.read_bytes
    assert a.write_bytes + b.write_bytes + c.write_bytes == total.write_bytes
    assert a.flops + b.flops + c.flops == total.flops
    assert cost_of([]) == TensorCost(0, 0, 0.0)


# --- the least time, and the wall -----------------------------------------------------------------------------------

# Rates by which an item's bytes and operations are about its seconds.
UNHURRIED = Rates(1.0, 2.0, 1.0)
items_lists = st.lists(
    st.builds(TensorCost, st.integers(0, 100), st.integers(0, 100), st.floats(0, 100)), min_size=1, max_size=12
).map(lambda items: sorted(items, key=lambda item: item.seconds(UNHURRIED), reverse=True))
storages = st.one_of(st.just(math.inf), st.floats(0.1, 20))


def limited(storage: float, rates: Rates = UNHURRIED) -> Rates:
    return replace(rates, storage_bytes_per_second=storage)


WALLS: dict[str, tuple[list[TensorCost], int, Rates, float]] = {
    # items, workers, rates, seconds by hand
    "compute": ([TensorCost(2, 0, 10.0)] * 8, 4, limited(100.0), 20.0),
    "transfers": ([TensorCost(40, 0, 10.0)] * 8, 4, limited(100.0), 40.0),
    "storage": ([TensorCost(40, 0, 10.0)] * 8, 4, limited(4.0), 80.0),
    "largest unit": ([TensorCost(40, 0, 90.0), *[TensorCost(40, 0, 10.0)] * 7], 8, limited(4.0), 90.0),
}


@pytest.mark.parametrize(("wall", "case"), WALLS.items(), ids=[name.replace(" ", "-") for name in WALLS])
def test_the_wall_is_what_decides(wall: str, case: tuple[list[TensorCost], int, Rates, float]) -> None:
    """Lifting it makes the merge faster, lifting any other limit by a tenth does not."""
    items, workers, rates, seconds = case
    assert least_seconds(items, workers, rates) == (pytest.approx(seconds), wall)
    faster = {
        "compute": replace(rates, flops_per_second=1.1 * rates.flops_per_second),
        "transfers": replace(rates, read_bytes_per_second=1.1 * rates.read_bytes_per_second),
        "storage": limited(1.1 * rates.storage_bytes_per_second, rates),
    }
    gains = {name: seconds / least_seconds(items, workers, each)[0] for name, each in faster.items()}
    expected = {name: pytest.approx(1.1 if name == wall else 1.0) for name in gains}
    if wall == "largest unit":  # which is computed for longest
        expected["compute"] = pytest.approx(1.1)
        assert least_seconds(items[1:], workers, rates)[0] < 0.9 * seconds
    assert gains == expected


@given(items=items_lists, workers=st.integers(1, 8), storage=storages)
@settings(max_examples=300)
def test_the_least_time_is_a_bound(items: list[TensorCost], workers: int, storage: float) -> None:
    """One worker takes the longest of three sums; workers are never done before; one worker more is never slower."""
    rates = limited(storage)
    found, wall = least_seconds(items, workers, rates)
    c = [item.flops for item in items]
    t = [item.read_bytes / 2 + item.write_bytes for item in items]
    b = [(item.read_bytes + item.write_bytes) / storage for item in items]
    walls = {
        "compute": sum(c) / workers,
        "transfers": sum(t) / workers,
        "storage": sum(b),
        "largest unit": max(max(each) for each in zip(c, t, b, strict=True)),
    }
    assert found == pytest.approx(max(walls.values()))
    assert walls[wall] == pytest.approx(found)
    assert least_seconds(items, workers, UNHURRIED)[0] <= taken(items, workers, UNHURRIED) * (1 + 1e-9)
    assert least_seconds(items, workers + 1, rates)[0] <= found * (1 + 1e-9)
    assert least_seconds(items, 1, rates)[0] == pytest.approx(max(sum(c), sum(t), sum(b)))


def test_nothing_takes_no_time() -> None:
    for items in ([], [TensorCost(0, 0, 0.0)] * 3):
        assert least_seconds(items, 2, limited(1.0)) == (0.0, "compute")


@pytest.mark.parametrize("storage", [math.inf, 5.0])
def test_rates_may_be_infinite(storage: float) -> None:
    rates = Rates(math.inf, math.inf, math.inf, storage)
    assert least_seconds([TensorCost(10, 5, 7.0)] * 4, 2, rates)[0] == pytest.approx(60 / storage)


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
    limit = max(sum(cost.values()) / (workers * ITEMS_PER_WORKER), LEAST_SECONDS)
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
    alone = taken(costs_of(plan, 1, rates), 1, rates)
    shares = {
        workers: alone / taken(costs_of(plan, workers, rates), workers, rates) / workers for workers in range(1, 17)
    }
    assert min(shares.values()) >= 0.9, shares
    assert max(shares.values()) <= 1 + 1e-9, shares


def test_the_page_shows_what_is_predicted(llama: Planned) -> None:
    """What the commands in docs/scaling.md print."""
    workers = (1, 2, 4, 8, 16, 32, 64, 128)
    found = [predict(llama("iso-c"), limited(each, rates_of(1e13)), workers)["rows"] for each in (math.inf, 1e10, 4e10)]
    page = (Path(__file__).resolve().parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    for rows in zip(*found, strict=True):
        cells = [(duration(row["seconds"]), f"{row['speedup']:.1f}×", row["wall"]) for row in rows]
        assert f"\n| {rows[0]['workers']} | {' | '.join(cell for each in cells for cell in each)} |\n" in page


def test_dividing_takes_no_time(llama: Planned, tmp_path: Path) -> None:
    """About 0.02 and 0.4 s on one core."""
    moe = make_plan(config_of(tmp_path, glm4_moe(), 1, method="iso-c", out=None))
    assert len(moe.tensors) > 40_000
    for plan in (llama("iso-c"), moe):
        for rates in (rates_of(1e12), even_rates(plan)):
            started = time.process_time()
            units = divide(plan, 256, rates)
            took = time.process_time() - started
            print(f"{len(plan.tensors)} tensors in {len(units)} units: {took:.2f} s")
            assert took < 4
