"""Predicted times of many workers: closed forms, a simulation by small steps, what bounds them, what the docs show."""

from __future__ import annotations

import heapq
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import simulate_cluster
from isomerge_fast.planning.cost import Rates, TensorCost, cost_of
from isomerge_fast.planning.forecast import forecast, item_costs
from isomerge_fast.planning.plan import Plan

SCALING_PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
# Rates by which a unit's bytes and operations are about its seconds.
UNHURRIED = Rates(1.0, 2.0, 1.0)

loads = st.builds(TensorCost, st.integers(0, 100), st.integers(0, 100), st.floats(0, 100))
units_lists = st.lists(loads, min_size=1, max_size=12).map(
    lambda units: sorted(units, key=lambda load: load.seconds(UNHURRIED), reverse=True)
)
storages = st.one_of(st.just(math.inf), st.floats(0.1, 20))
workers_numbers = st.integers(1, 8)


def limited(storage: float, rates: Rates = UNHURRIED) -> Rates:
    return replace(rates, storage_bytes_per_second=storage)


def size(load: TensorCost) -> int:
    return load.read_bytes + load.write_bytes


# --- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("load", [TensorCost(4, 2, 10.0), TensorCost(40, 2, 10.0)], ids=["computed", "moved"])
def test_as_many_equal_units_as_workers_take_as_long_as_one(workers: int, load: TensorCost) -> None:
    found = forecast([load] * workers, workers, UNHURRIED)
    assert found.seconds == pytest.approx(load.seconds(UNHURRIED))
    assert found.busy_share == pytest.approx(1)
    assert found.speedup == pytest.approx(workers)
    assert (found.workers, found.units) == (workers, workers)


@given(units=units_lists)
def test_one_worker_takes_the_sum(units: list[TensorCost]) -> None:
    found = forecast(units, 1, UNHURRIED)
    assert found.seconds == pytest.approx(sum(load.seconds(UNHURRIED) for load in units))
    assert found.speedup == pytest.approx(1)


@given(units=units_lists, workers=workers_numbers, storage=st.floats(0.1, 1.0))
def test_where_storage_alone_decides_it_takes_all_bytes(units: list[TensorCost], workers: int, storage: float) -> None:
    """Nothing is computed and any one worker could take all that the storage gives, so that it is never idle."""
    rates = limited(storage, Rates(math.inf, 1.0, 1.0))
    total = sum(size(load) for load in units)
    assert forecast(units, workers, rates).seconds == pytest.approx(total / storage)


@given(units=units_lists, workers=workers_numbers)
def test_without_a_limit_the_next_unit_goes_to_who_is_free_first(units: list[TensorCost], workers: int) -> None:
    ends = [0.0] * workers
    for load in units:
        heapq.heapreplace(ends, ends[0] + load.seconds(UNHURRIED))
    found = forecast(units, workers, UNHURRIED)
    assert found.seconds == pytest.approx(max(ends))
    if found.seconds:
        assert found.busy_share == pytest.approx(sum(ends) / (workers * max(ends)))


READ = Rates(math.inf, 8.0, 8.0, 10.0)
SHARED: dict[str, tuple[list[TensorCost], int, Rates, float, float]] = {
    # units, workers, rates, seconds by hand, sum of the times with a unit in hand
    # 5 each for 2 s; then the other one's 20 bytes at its own 8.
    "two-unequal": ([TensorCost(10, 0, 0.0), TensorCost(30, 0, 0.0)], 2, READ, 2 + 20 / 8, 2 + 4.5),
    # One reads at 2 at most, which leaves 8 to the other, who writes; alone it has 10.
    "own-rates-differ": (
        [TensorCost(4, 0, 0.0), TensorCost(0, 32, 0.0)],
        2,
        Rates(math.inf, 2.0, 100.0, 10.0),
        2 + 16 / 10,
        2 + 3.6,
    ),
    # 2, 4 and 4: nobody has more than the level but who wants less; 2 s, then 20 bytes left each at 5 for 4 s.
    "a-level-for-the-rest": (
        [TensorCost(0, 28, 0.0), TensorCost(4, 0, 0.0), TensorCost(0, 28, 0.0)],
        3,
        Rates(math.inf, 2.0, 100.0, 10.0),
        6.0,
        2 + 6 + 6,
    ),
    # Bytes are moved by 1 s, what is computed ends at 5; the other has the storage from then on: 5 + 30 by 1 + 3.75 s.
    "computed-beside": (
        [TensorCost(5, 0, 5.0), TensorCost(35, 0, 1.0)],
        2,
        Rates(1.0, 8.0, 8.0, 10.0),
        5.0,
        5 + 4.75,
    ),
    # The third unit is begun at 2 s, and shares with what is left of the second: 5 each until its 5 are there at 3 s.
    "a-unit-begins": (
        [TensorCost(10, 0, 0.0), TensorCost(30, 0, 0.0), TensorCost(5, 0, 0.0)],
        2,
        READ,
        3 + 15 / 8,
        3 + 4.875,
    ),
    # A worker has 8 of the 10.
    "alone": ([TensorCost(40, 40, 0.0)], 1, READ, 10.0, 10.0),
}


@pytest.mark.parametrize(("units", "workers", "rates", "seconds", "in_hand"), SHARED.values(), ids=SHARED)
def test_storage_is_shared_fairly(
    units: list[TensorCost], workers: int, rates: Rates, seconds: float, in_hand: float
) -> None:
    found = forecast(units, workers, rates)
    assert found.seconds == pytest.approx(seconds)
    assert found.busy_share == pytest.approx(in_hand / (workers * seconds))


def test_the_speedup_is_over_what_one_worker_would_be_given() -> None:
    """Together the two units' transfers and operations overlap; dealt out to two workers they do not."""
    halves = [TensorCost(20, 0, 0.0), TensorCost(0, 0, 10.0)]
    found = forecast(halves, 2, UNHURRIED, alone=[halves[0] + halves[1]])
    assert found.seconds == 10
    assert found.speedup == pytest.approx(1)
    # One worker has the same storage, which is slower than it.
    assert forecast(halves, 2, limited(1.0), alone=[halves[0] + halves[1]]).speedup == pytest.approx(1)
    assert forecast(halves, 2, limited(1.0)).speedup == pytest.approx(30 / 20)


def test_nothing_takes_no_time() -> None:
    for units in ([], [TensorCost(0, 0, 0.0)] * 3):
        found = forecast(units, 2, limited(1.0))
        assert (found.seconds, found.busy_share, found.speedup) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("storage", [math.inf, 5.0])
def test_rates_may_be_infinite(storage: float) -> None:
    rates = Rates(math.inf, math.inf, math.inf, storage)
    assert forecast([TensorCost(10, 5, 7.0)] * 4, 2, rates).seconds == pytest.approx(60 / storage)


def test_there_is_a_worker() -> None:
    with pytest.raises(ValueError, match="workers = 0"):
        forecast([TensorCost(1, 1, 1.0)], 0, UNHURRIED)


WALLS: dict[str, tuple[list[TensorCost], int, Rates]] = {
    "compute": ([TensorCost(2, 0, 10.0)] * 8, 4, limited(100.0)),
    "transfers": ([TensorCost(40, 0, 10.0)] * 8, 4, limited(100.0)),
    "storage": ([TensorCost(40, 0, 10.0)] * 8, 4, limited(4.0)),
    "largest unit": ([TensorCost(40, 0, 90.0), *[TensorCost(40, 0, 10.0)] * 7], 8, limited(4.0)),
}


@pytest.mark.parametrize(("wall", "case"), WALLS.items(), ids=[name.replace(" ", "-") for name in WALLS])
def test_the_wall_is_what_decides(wall: str, case: tuple[list[TensorCost], int, Rates]) -> None:
    """Lifting it makes the merge faster, lifting any other limit by a tenth does not."""
    units, workers, rates = case
    found = forecast(units, workers, rates)
    assert found.wall == wall
    faster = {
        "compute": forecast(units, workers, replace(rates, flops_per_second=1.1 * rates.flops_per_second)),
        "transfers": forecast(units, workers, replace(rates, read_bytes_per_second=1.1 * rates.read_bytes_per_second)),
        "storage": forecast(units, workers, limited(1.1 * rates.storage_bytes_per_second, rates)),
    }
    gains = {name: found.seconds / each.seconds for name, each in faster.items()}
    expected = {name: pytest.approx(1.1 if name == wall else 1.0) for name in gains}
    if wall == "largest unit":  # which is computed for longest
        expected["compute"] = pytest.approx(1.1)
        assert forecast(units[1:], workers, rates).seconds < 0.9 * found.seconds
    assert gains == expected


# --- what holds of any --------------------------------------------------------------------------------------------


@given(units=units_lists, workers=workers_numbers, storage=storages)
@settings(max_examples=300)
def test_time_is_within_its_bounds(units: list[TensorCost], workers: int, storage: float) -> None:
    rates = limited(storage)
    found = forecast(units, workers, rates)
    c = [load.flops for load in units]
    t = [load.read_bytes / 2 + load.write_bytes for load in units]
    b = [size(load) for load in units]
    walls = {
        "compute": sum(c) / workers,
        "transfers": sum(t) / workers,
        "storage": sum(b) / storage,
        "largest unit": max(max(each) for each in zip(c, t, (one / storage for one in b), strict=True)),
    }
    least = max(walls.values())
    assert found.seconds >= least * (1 - 1e-9)
    assert walls[found.wall] == pytest.approx(least)
    s = [max(pair) for pair in zip(c, t, strict=True)]
    most = sum(b) / storage + sum(s) / workers + (1 - 1 / workers) * max(s)
    assert found.seconds <= most * (1 + 1e-9)
    assert 0 <= found.busy_share <= 1 + 1e-9
    assert found.speedup <= workers * (1 + 1e-9)


@given(units=units_lists, workers=workers_numbers)
def test_more_workers_are_never_slower_where_storage_is_no_limit(units: list[TensorCost], workers: int) -> None:
    """With a limit they can be: what they move keeps back the unit that ends last."""
    one_more = forecast(units, workers + 1, UNHURRIED).seconds
    assert one_more <= forecast(units, workers, UNHURRIED).seconds * (1 + 1e-9)


@given(units=units_lists, storage=st.floats(0.1, 20), times=st.floats(1, 10))
def test_more_storage_is_never_slower_where_every_worker_has_one_unit(
    units: list[TensorCost], storage: float, times: float
) -> None:
    slow, fast = (forecast(units, len(units), limited(each)).seconds for each in (storage, times * storage))
    assert fast <= slow * (1 + 1e-9)


@given(units=units_lists, workers=workers_numbers, storage=storages, times=st.sampled_from([0.25, 2.0, 1024.0]))
def test_times_are_in_proportion_to_rates(units: list[TensorCost], workers: int, storage: float, times: float) -> None:
    found = forecast(units, workers, limited(storage))
    scaled = forecast(units, workers, Rates(times, 2 * times, times, storage * times))
    assert replace(scaled, seconds=times * scaled.seconds) == found  # powers of two: to the last bit


def by_small_steps(units: Sequence[TensorCost], workers: int, rates: Rates, step: float) -> float:
    """The same by Euler's method: in every step each worker moves as many bytes as bisection finds fair."""
    waiting = list(units)
    hands: list[list[float]] = []  # operations and bytes left, and the worker's own bytes a second
    now = 0.0
    while True:
        hands = [hand for hand in hands if hand[0] > 0 or hand[1] > 0]
        while waiting and len(hands) < workers:
            load = waiting.pop(0)
            hands.append([load.flops, size(load), size(load) / max(load.transfer_seconds(rates), 1e-300)])
        if not hands:
            return now
        own = [rate for _, left, rate in hands if left > 0]
        low, high = 0.0, max(own, default=0.0)
        for _ in range(40):
            middle = (low + high) / 2
            if sum(min(rate, middle) for rate in own) > rates.storage_bytes_per_second:
                high = middle
            else:
                low = middle
        for hand in hands:
            hand[0] -= step * rates.flops_per_second
            hand[1] -= step * min(hand[2], high)
        now += step


@pytest.mark.parametrize("seed", range(4))
def test_events_are_those_of_small_steps(seed: int) -> None:
    draw = random.Random(seed)
    units = [TensorCost(draw.randint(0, 60), draw.randint(0, 30), draw.uniform(0, 25)) for _ in range(9)]
    rates = limited(draw.uniform(1.5, 3.0))
    found = forecast(units, 3, rates).seconds
    step = found / 2000
    # A unit may end a step late, three or four of them one after the other.
    assert by_small_steps(units, 3, rates, step) == pytest.approx(found, abs=5 * step)
    assert found > 1.02 * forecast(units, 3, UNHURRIED).seconds  # the limit was felt


def test_thousands_of_units_take_no_time() -> None:
    """About 0.3 s on one core."""
    draw = random.Random(0)
    units = [TensorCost(draw.randint(10**8, 10**10), 10**9, draw.uniform(1e12, 1e14)) for _ in range(4000)]
    for storage in (1e10, 3e11, math.inf):
        started = time.perf_counter()
        forecast(units, 256, Rates(1e13, 2e9, 1e9, storage))
        assert time.perf_counter() - started < 4


# --- merges, and the page -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Plan:
    """What `python -m benchmarks.simulate_cluster --model llama-3-70b` plans."""
    return simulate_cluster.plan_of_headers("llama-3-70b", simulate_cluster.TASKS, simulate_cluster.METHOD)


def test_a_merge_is_compared_with_one_worker_that_has_whole_files(llama: Plan) -> None:
    total = cost_of(llama.tensors)
    # Computing takes as long as moving, so that it matters which tensors are together.
    rates = Rates(total.flops / total.transfer_seconds(simulate_cluster.RATES), 2e9, 2e9)
    files = item_costs(llama, 1, rates)
    assert len(files) == len({tensor.shard for tensor in llama.tensors})
    units = item_costs(llama, 16, rates)
    found = forecast(units, 16, rates, alone=files)
    assert found.speedup < 0.99 * forecast(units, 16, rates).speedup
    assert found.speedup == pytest.approx(sum(load.seconds(rates) for load in files) / found.seconds)
    alone = forecast(files, 1, rates, alone=files)
    assert alone.seconds == pytest.approx(sum(load.seconds(rates) for load in files))
    assert (alone.speedup, alone.busy_share) == (pytest.approx(1), pytest.approx(1))


def test_the_page_shows_what_is_simulated_for_llama(llama: Plan) -> None:
    text = SCALING_PAGE.read_text(encoding="utf-8")
    assert simulate_cluster.assumptions() in text
    assert simulate_cluster.section("llama-3-70b", llama) in text


@pytest.mark.long
def test_the_page_is_what_is_simulated(llama: Plan, tmp_path: Path) -> None:
    """`python -m benchmarks.simulate_cluster --write docs/scaling.md` wrote it."""
    plans = {
        name: llama
        if name == "llama-3-70b"
        else simulate_cluster.plan_of_headers(name, simulate_cluster.TASKS, simulate_cluster.METHOD)
        for name in simulate_cluster.DOCUMENTED
    }
    text = SCALING_PAGE.read_text(encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    sections = [simulate_cluster.section(name, plan) for name, plan in plans.items()]
    simulate_cluster.write(page, simulate_cluster.page(sections, simulate_cluster.assumptions()))
    assert page.read_text(encoding="utf-8") == text


def test_a_simulation_is_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin, end = simulate_cluster.MARKS
    page = tmp_path / "page.md"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    options = ["--model", "llama-3-8b", "--tasks", "2", "--workers", "1,4", "--storage", "1e9", "--write", str(page)]
    monkeypatch.setattr(sys, "argv", ["simulate_cluster", *options])
    simulate_cluster.main()
    printed = capsys.readouterr().out
    assert page.read_text() == f"before\n{begin}\n{printed}{end}\nafter\n"
    assert printed.startswith("2 experts, iso-c, bf16. Assumed, not measured: a worker computes 10 TFLOP/s")
    assert "**llama-3-8b.** 8.03 billion parameters" in printed
    rows = [line for line in printed.splitlines() if line.startswith(("| 1 |", "| 4 |"))]
    assert len(rows) == 4
    # Three models of 16.06 GB are read and one is written, a GB a second.
    seconds, _, wall = rows[3].removeprefix("| 4 | ").removesuffix(" |").split(" | ")
    assert float(seconds) == pytest.approx(4 * 16.06, rel=1e-3)
    assert wall == "storage"
