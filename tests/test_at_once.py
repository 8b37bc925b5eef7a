"""Several tensors at once: the same bytes whatever the number of cores, errors of the first, memory and cores kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor

import isomerge_fast as imf
from benchmarks.shapes import MODELS
from checkpoints import config_of, listing, make_expert, save_folder
from isomerge_fast.checkpoint.io.buffer_pool import BufferPool
from isomerge_fast.checkpoint.io.read_ahead import ReadAhead
from isomerge_fast.config import MergeConfig
from isomerge_fast.execution.in_order import Task, in_order
from isomerge_fast.execution.jobs import Demand, Jobs
from isomerge_fast.execution.report import PhaseTimer, Progress
from isomerge_fast.execution.sources import FirstPass, first_pass
from isomerge_fast.execution.tensor_queue import TensorQueue
from isomerge_fast.execution.threads import ComputeThreads, check_wanted
from isomerge_fast.methods import Elementwise
from isomerge_fast.methods.elementwise import STACKED_ELEMENTS, STACKS
from isomerge_fast.methods.iso_c import IsoC
from isomerge_fast.planning.budget import THREAD_BYTES
from isomerge_fast.planning.plan import Plan, TensorPlan
from isomerge_fast.planning.planner import make_plan
from isomerge_fast.planning.schedule import Simulation, longest_first
from planned_models import config_of as headers_of

Family = tuple[Path, list[Path]]
SIDES = [(96, 160), (160, 96), (128, 128), (700, 300), (64, 64), (96, 160), (160, 96), (128, 128)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Return matrices of several sizes, and between them what is averaged."""
    root, generator = tmp_path_factory.mktemp("family"), torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {"large.bias": torch.randn(1_000_001, generator=generator)}
    for index, shape in enumerate(SIDES):
        tensors[f"layers.{index}.weight"] = torch.randn(shape, generator=generator)
        tensors[f"layers.{index}.bias"] = torch.randn(shape[0], generator=generator)
    base = save_folder(root / "base", tensors, shards=2)
    return base, [save_folder(root / f"expert-{index}", make_expert(tensors, index)) for index in range(3)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Return all files but the report, which tells of times and processes."""
    return {name: data for name, data in listing(folder).items() if not name.endswith("report.json")}


@pytest.mark.parametrize("method", ["iso-c", "iso-cts", "mean", "task-arithmetic"])
@pytest.mark.parametrize("more", [{}, {"scaling": [0.5, 1.0], "save_delta": True, "dtype": "bfloat16"}], ids=str)
def test_the_same_bytes_by_any_number_of_threads(
    family: Family, tmp_path: Path, method: str, more: dict[str, Any]
) -> None:
    found = []
    for threads in (1, 2, 4, 7):
        out = tmp_path / str(threads)
        report = imf.merge(config_of(family, out, method=method, **more), threads=threads)
        assert not report.notes or all("thread" not in note for note in report.notes)
        found.append(bytes_of(out))
    assert all(each == found[0] for each in found)


def test_evidence_does_not_depend_on_the_number_of_threads(family: Family, tmp_path: Path) -> None:
    reports = []
    for threads in (1, 4):
        report = imf.merge(config_of(family, tmp_path / str(threads), method="iso-c"), threads=threads)
        reports.append([{**tensor, "seconds": 0} for tensor in report.tensors])
    assert reports[0] == reports[1]


@contextmanager
def slow_attempts(monkeypatch: pytest.MonkeyPatch, act: Callable[[str], None]) -> Iterator[None]:
    """Have ``act`` called with the name of every tensor before a solver is tried."""
    attempt = IsoC.attempt

    def slowly(self: IsoC, deltas: Any, candidate: Any) -> Any:
        act(deltas.full_spec.name)
        return attempt(self, deltas, candidate)

    with monkeypatch.context() as patch:
        patch.setattr(IsoC, "attempt", slowly)
        yield


def test_matrices_are_computed_at_once_a_core_each(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at a time and no more, each by a thread that computes with one core; not in the calling thread."""
    inside, most, seen, lock = 0, 0, set(), threading.Lock()

    def act(name: str) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            seen.add((threading.get_ident(), torch.get_num_threads()))
        time.sleep(0.05)
        with lock:
            inside -= 1

    with slow_attempts(monkeypatch, act):
        imf.merge(config_of(family, tmp_path / "out", method="iso-c"), threads=3)
    assert most == 3
    assert {threads for _, threads in seen} == {1}
    assert len(seen) == 3
    assert threading.get_ident() not in {ident for ident, _ in seen}


def test_the_first_tensor_that_fails_is_told_of(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a later one fails long before it; and nothing is left, as the inputs are wrong."""

    def act(name: str) -> None:
        if name in ("layers.2.weight", "layers.3.weight"):
            time.sleep(0.3 if name == "layers.2.weight" else 0.0)
            raise imf.InputError(f"{name} cannot be")

    for threads in (1, 2, 4):
        with slow_attempts(monkeypatch, act), pytest.raises(imf.InputError, match=r"layers\.2\.weight cannot be"):
            imf.merge(config_of(family, tmp_path / "out", method="iso-c"), threads=threads)
        assert not [*tmp_path.iterdir()]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("isomerge")]


@pytest.mark.parametrize("threads", [1, 3])
def test_what_stops_the_merge_ends_the_threads_and_a_resume_gives_the_same_bytes(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Whatever number of threads goes on."""
    whole = bytes_of(Path(imf.merge(config_of(family, tmp_path / "whole", method="iso-c")).outputs[0]))
    config = config_of(family, tmp_path / "out", method="iso-c")

    def stop(progress: Any) -> None:
        if progress.done_tensors >= 5:
            raise KeyboardInterrupt

    begun = time.monotonic()
    with slow_attempts(monkeypatch, lambda _: time.sleep(0.1)), pytest.raises(KeyboardInterrupt):
        imf.merge(config, threads=threads, observer=stop)
    assert time.monotonic() - begun < 10.0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("isomerge")]
    report = imf.merge(config, threads=4 - threads, resume=True)
    assert not [note for note in report.notes if "thread" in note]
    assert bytes_of(tmp_path / "out") == whole


def test_a_job_that_computes_is_ended_at_its_next_step(family: Family, tmp_path: Path) -> None:
    """One that would take a minute, by an error in the thread that asked for it."""

    def compute() -> None:
        for _ in range(6000):
            check_wanted()
            time.sleep(0.01)

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), ComputeThreads(2) as threads:  # noqa: PT012 - what is raised in it
        jobs = Jobs(threads, 1, lambda: None)
        jobs.start(0, Demand(1, 0), compute)
        time.sleep(0.1)
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 5.0


def test_the_observer_is_called_by_the_calling_thread_alone(family: Family, tmp_path: Path) -> None:
    callers, tensors, done = set(), set(), []

    def observe(progress: Any) -> None:
        callers.add(threading.get_ident())
        tensors.add(progress.tensor)
        done.append((progress.done_tensors, progress.done_bytes))
        assert progress.phase in ("", "prepare", "read", "compute", "write")

    imf.merge(config_of(family, tmp_path / "out", method="iso-c"), threads=3, observer=observe)
    assert callers == {threading.get_ident()}
    assert {f"layers.{index}.weight" for index in range(len(SIDES))} <= tensors
    assert done == sorted(done)
    assert done[-1][0] == 1 + 2 * len(SIDES)


def test_phases_of_all_cores_add_up_to_the_time(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slow_attempts(monkeypatch, lambda _: time.sleep(0.05)):
        seconds = imf.merge(config_of(family, tmp_path / "out", method="iso-c"), threads=3).seconds
    total = seconds.pop("total")
    assert sum(seconds.values()) == pytest.approx(total, rel=0.02)
    assert seconds["compute"] > 0.05 * len(SIDES) / 3


# jobs


def test_no_more_than_the_cores_and_the_memory_are_used() -> None:
    running: list[Demand] = []
    most, lock = Demand(0, 0), threading.Lock()

    def job(demand: Demand) -> None:
        nonlocal most
        with lock:
            running.append(demand)
            cores, work = sum(each.cores for each in running), sum(each.work_bytes for each in running)
            most = Demand(max(most.cores, cores), max(most.work_bytes, work if len(running) > 1 else 0))
        time.sleep(0.003)
        with lock:
            running.remove(demand)

    generator = torch.Generator().manual_seed(3)
    with ComputeThreads(4) as threads:
        jobs = Jobs(threads, 100, lambda: None)
        for number in range(200):
            cores, work = (int(torch.randint(1, high, (), generator=generator)) for high in (5, 120))
            demand = Demand(cores, work)
            jobs.wait_for_room(demand)
            jobs.start(number, demand, lambda demand=demand: job(demand))
        jobs.end()
    assert most.cores == 4
    assert 80 <= most.work_bytes <= 100


def test_a_job_of_several_cores_computes_with_them_and_those_after_it_with_one() -> None:
    seen: list[int] = []
    with ComputeThreads(3) as threads:
        jobs = Jobs(threads, 0, lambda: None)
        for number, cores in enumerate((3, 1, 2, 1)):
            jobs.wait_for_room(Demand(cores, 0))
            jobs.start(number, Demand(cores, 0), lambda: seen.append(torch.get_num_threads()))
            jobs.end()
    assert seen == [3, 1, 2, 1]


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_results_come_in_order_and_not_far_ahead(cores: int) -> None:
    asked = 0

    def tasks() -> Iterator[Task[int]]:
        nonlocal asked
        for number in range(60):
            asked += 1
            wait = 0.02 if number % 7 == 0 else 0.0

            def make(number: int = number, wait: float = wait) -> int:
                time.sleep(wait)
                return number

            yield Task(make, None if number % 5 == 0 else Demand(1, 1))

    taken = 0
    for result in in_order(tasks(), cores, cores):
        assert result == taken
        taken += 1
        assert asked - taken <= 3 * cores
    assert taken == 60


@pytest.mark.parametrize(("result_bytes", "most"), [(0, 12), (10, 2), (100, 1)])
def test_large_results_are_not_computed_far_ahead(result_bytes: int, most: int) -> None:
    """Of a first result that takes long, and 100 bytes for the work at once: a quarter of that waits."""
    first, made, ahead = threading.Event(), [0], []

    def make(number: int) -> int:
        if number == 0:
            first.wait(0.5)
            ahead.append(made[0])
        made[0] += 1
        return number

    tasks = (Task(lambda number=number: make(number), Demand(1, 1), result_bytes) for number in range(40))
    assert list(in_order(tasks, 6, 100)) == list(range(40))
    assert ahead == [most]


def test_the_first_result_that_fails_is_raised() -> None:
    def fail(number: int, wait: float) -> None:
        time.sleep(wait)
        raise ValueError(number)

    with pytest.raises(ValueError, match=r"^1$"):
        for _ in in_order((Task(lambda n=n: fail(n, 0.2 / n), Demand(1, 0)) for n in (1, 2, 3)), 3, 9):
            pass
    with pytest.raises(ValueError, match=r"^1$"):  # one that the caller makes, after it
        for _ in in_order((Task(lambda n=n: fail(n, 0.2 / n), Demand(1, 0) if n == 1 else None) for n in (1, 2)), 2, 9):
            pass


def test_state_dicts_are_merged_by_several_threads_to_the_same_bytes() -> None:
    generator = torch.Generator().manual_seed(2)
    base = {f"layers.{index}.weight": torch.randn(shape, generator=generator) for index, shape in enumerate(SIDES)}
    base["bias"] = torch.randn(500_000, generator=generator)
    base["tied"] = base["layers.0.weight"]
    base["steps"] = torch.tensor(3)
    experts = [make_expert(base, index) for index in range(3)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(imf.merge_state_dicts(base, experts, "iso-cts"))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for merged in found:
        assert list(merged) == list(base)
        assert merged["tied"] is merged["layers.0.weight"]
        assert all(torch.equal(merged[name], found[0][name]) for name in base)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("isomerge")]


# the schedule


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> MergeConfig:
    """Return a merge of Llama-3-8B and eight experts, of which there are headers only."""
    return headers_of(tmp_path_factory.mktemp("llama"), MODELS["llama-3-8b"](), 8, out=None)


def plan_by(config: MergeConfig, method: str, cores: int, memory: int, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Return the plan for a machine of so many cores and bytes of memory."""
    for module in ("budget", "planner"):
        monkeypatch.setattr(f"isomerge_fast.planning.{module}.memory_bytes", lambda: memory)
    return make_plan(replace(config, method=method), threads=cores)


def share_of_busy_cores(plan: Plan, cores: int, total_seconds: float) -> float:
    """Merge with solvers that sleep for their operations, so many seconds in all for every core, and nothing else."""
    unit = total_seconds * cores / sum(tensor.flops for tensor in plan.tensors)
    busy, lock = 0.0, threading.Lock()

    def merge(tensor: TensorPlan, first: FirstPass) -> None:
        nonlocal busy
        while not first.are_taken:
            first.take()
        begun = time.perf_counter()
        time.sleep(tensor.flops / tensor.cores * unit)
        with lock:
            busy += tensor.cores * (time.perf_counter() - begun)

    order, progress = longest_first(plan.tensors, cores), Progress(0, 0)
    bundles = (bundle for tensor in order for bundle in first_pass(tensor))
    nothing: Any = None  # nothing is read
    begun = time.perf_counter()
    with (
        ThreadPoolExecutor(4) as readers,
        ReadAhead(nothing, readers, bundles, budget_bytes=plan.budget.read_pool) as ahead,
        ComputeThreads(cores) as threads,
    ):
        sources: Any = lambda _plan, first, _threads: first  # noqa: E731 - what is merged is the first pass alone
        timer, merging = PhaseTimer(Progress(0, 0), None, cores), cast(Any, merge)
        queue = TensorQueue(merging, sources, ahead, threads, plan.together_bytes, timer, progress)
        for tensor in order:
            queue.add(tensor)
        queue.end()
    assert progress.done_tensors == len(plan.tensors)
    return busy / cores / (time.perf_counter() - begun)


@pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
def test_sixteen_cores_are_busy(llama: MergeConfig, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is never touched; the best of three, as the threads that sleep have two cores here to wake on."""
    plan = plan_by(llama, method, 16, 128 << 30, monkeypatch)
    simulated = Simulation.of(plan.tensors, plan.budget, 16)
    assert sum(tensor.flops for tensor in plan.tensors) >= 0.95 * 16 * simulated.seconds
    assert simulated.at_once == 16
    monkeypatch.setattr(BufferPool, "_allocate", lambda pool: torch.empty(pool.size, dtype=torch.uint8, device="meta"))
    # Of 150 GB the jobs of 4 MiB alone would take as long as the solvers sleep.
    monkeypatch.setattr("isomerge_fast.checkpoint.io.read_ahead._jobs", lambda *_: ())
    found = []
    while len(found) < 3 and max(found, default=0.0) < 0.9:
        found.append(share_of_busy_cores(plan, 16, 3.0))
    print(f"{method}: {found} of 16 cores busy")
    assert max(found) >= 0.9


@dataclass(frozen=True)
class Median(Elementwise):
    """Of all tasks' deltas: a stack of them for every thread."""

    name: ClassVar[str] = "median-of-tasks"

    def combine(self, deltas: Tensor) -> Tensor:
        return deltas.median(0).values


def test_the_stacks_of_all_threads_are_counted(llama: MergeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch's own number of threads is when the plan is made."""
    monkeypatch.setattr("isomerge_fast.methods.registry._registered", {})
    imf.register_method(Median)
    config, stack = replace(llama, method=Median.name), STACKS * 4 * STACKED_ELEMENTS
    one, many = (make_plan(config, threads=threads, max_ram=4 << 30) for threads in (1, 16))
    assert many.cores == 16
    assert many.peak_ram_bytes - one.peak_ram_bytes >= 15 * (stack + THREAD_BYTES)
    tight = make_plan(config, threads=16, max_ram=one.peak_ram_bytes + 4 * (stack + THREAD_BYTES))
    assert 1 < tight.cores <= 6  # what is read ahead may have given way too
    assert tight.peak_ram_bytes <= one.peak_ram_bytes + 4 * (stack + THREAD_BYTES)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        assert make_plan(config, threads=16, max_ram=4 << 30).peak_ram_bytes == many.peak_ram_bytes
    finally:
        torch.set_num_threads(before)


def test_no_more_cores_are_taken_than_are_usable(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's quota of one: a thread that computes with one core, whatever torch would take."""
    seen: set[int] = set()
    monkeypatch.setattr("isomerge_fast.planning.schedule.usable_cpus", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with slow_attempts(monkeypatch, lambda _: seen.add(torch.get_num_threads())):
            imf.merge(config_of(family, tmp_path / "out", method="iso-c"))
            imf.merge_state_dicts({"w": torch.randn(64, 64)}, [{"w": torch.randn(64, 64)}], "iso-c")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


@pytest.mark.parametrize("method", ["iso-c", "iso-cts", "mean"])
@pytest.mark.parametrize("memory", [8 << 30, 64 << 30, 1 << 40], ids="{}".format)
def test_routes_and_solvers_do_not_depend_on_the_number_of_cores(
    llama: MergeConfig, method: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [plan_by(llama, method, cores, memory, monkeypatch) for cores in (1, 2, 16, 64)]
    for plan in found[1:]:
        for tensor, alone in zip(plan.tensors, found[0].tensors, strict=True):
            assert (tensor.route, tensor.reason) == (alone.route, alone.reason)
    assert {tensor.cores for tensor in found[0].tensors} == {1}
    # All at once take no more than half of the memory, unless one alone does; then beside it what threads hold.
    for plan in found:
        threads = (plan.cores - 1) * plan.budget.thread
        assert plan.peak_ram_bytes <= max(memory // 2, found[0].peak_ram_bytes + threads)


def test_a_matrix_gets_several_cores_where_there_is_no_memory_for_as_many(
    llama: MergeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce = plan_by(llama, "iso-cts", 16, 16 << 30, monkeypatch)
    plenty = plan_by(llama, "iso-cts", 16, 1 << 40, monkeypatch)
    by_shape = {}
    for name, plan in (("scarce", scarce), ("plenty", plenty)):
        by_shape[name] = {tensor.spec.shape: tensor.cores for tensor in plan.tensors if tensor.flops}
    layer = (14336, 4096)
    assert by_shape["scarce"][layer] > by_shape["plenty"][layer] == 1
    for plan in (scarce, plenty):
        for tensor in plan.tensors:  # as many as there is memory for have all cores, together
            fit = max(1, plan.together_bytes // tensor.route.work_bytes)
            assert tensor.cores <= 16
            assert tensor.cores == 1 or tensor.cores * fit >= 8 or tensor.flops > 0


def test_a_low_ceiling_leaves_no_room_for_many_threads(llama: MergeConfig) -> None:
    """Whatever number is asked for, what is promised stays below the ceiling."""
    least = make_plan(replace(llama, method="iso-cts"), max_ram=1, threads=1).peak_ram_bytes
    for ceiling in (least, least + (30 << 20), 2 * least):
        plans = [make_plan(replace(llama, method="iso-cts"), max_ram=ceiling, threads=n) for n in (1, 8, 64)]
        assert all(plan.peak_ram_bytes <= ceiling for plan in plans)
        assert plans[0].cores == 1
        assert plans[2].cores < 64 or ceiling == 2 * least


def test_one_matrix_has_all_cores(tmp_path: Path) -> None:
    config = headers_of(tmp_path, {"a.weight": (8192, 4096), "b.weight": (64, 64), "c.bias": (8192,)}, 2, out=None)
    cores = {tensor.name: tensor.cores for tensor in make_plan(config, threads=8).tensors}
    assert cores == {"a.weight": 8, "b.weight": 1, "c.bias": 1}
