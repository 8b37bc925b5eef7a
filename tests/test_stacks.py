"""Matrices of one shape that a GPU merges together: what is planned, the bytes, the journal and the errors of each."""

from __future__ import annotations

import gc
import json
import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isomerge_fast as imf
from checkpoints import listing, load_folder, rewrite, save_folder
from executors import InTurn
from isomerge_fast.config import Override
from isomerge_fast.execution.device_copies import Uploads
from isomerge_fast.execution.engine import resolve_device, run
from isomerge_fast.execution.report import Progress
from isomerge_fast.execution.tensor_stacks import TensorStack, stacked
from isomerge_fast.execution.verify import verify
from isomerge_fast.methods import TensorSpec, registry
from isomerge_fast.methods.source import DeltaSource
from isomerge_fast.planning import budget as budgets, planner
from isomerge_fast.planning.budget import Budget
from isomerge_fast.planning.part_sizes import PartSizes, Traffic
from isomerge_fast.planning.plan import Plan
from isomerge_fast.planning.planner import make_plan
from isomerge_fast.planning.routes import Resident, Stacked, stack_route
from planned_models import config_of as headers_of
from pretend_gpu import CUDA, pretend_gpu
from stacked_methods import PLACES, InStacks, ManyLaunches

LAYERS, TASKS = 12, 3
SIDES = (24, 16)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (InStacks, ManyLaunches):
        monkeypatch.setitem(registry.METHODS, method.name, method)
    monkeypatch.setattr(InStacks, "seen", [])


def tensors_of(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Twelve layers of two matrices and a bias; what is the only one of its kind, or one of two; a buffer."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"embed": made(48, 16), "pair.0": made(8, 12), "pair.1": made(8, 12), "steps": torch.arange(4)}
    for layer in range(LAYERS):
        tensors |= {
            f"layer.{layer:02}.up": made(*SIDES),
            f"layer.{layer:02}.bias": made(SIDES[0]),
            f"layer.{layer:02}.down": made(*SIDES[::-1]),
        }
    return tensors


STACKED = {f"layer.{layer:02}.{name}" for layer in range(LAYERS) for name in ("up", "down")}


def family_of(folder: Path, dtype: torch.dtype = torch.float32, *, shards: int = 1) -> dict[str, Any]:
    base, *experts = [
        save_folder(folder / f"m{seed}", tensors_of(seed, dtype), shards=shards) for seed in range(1 + TASKS)
    ]
    return {"base": base, "experts": experts, "method": InStacks.name}


def merge(family: dict[str, Any], out: Path, **options: Any) -> imf.Report:
    resume = options.pop("resume", False)
    max_vram, observer = options.pop("max_vram", None), options.pop("observer", None)
    config = {**family, **options, "out": out}
    return imf.merge(config, device="cuda", resume=resume, max_vram=max_vram, observer=observer)


def plan_of(family: dict[str, Any], device: str = "cuda", max_vram: int | None = None, **options: Any) -> Plan:
    config = imf.MergeConfig(
        **{**family, "base": str(family["base"]), "experts": list(map(str, family["experts"]))}, **options
    )
    return make_plan(config, resolve_device(device), max_vram=max_vram)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in listing(folder).items() if name.endswith(".safetensors")}


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The report's tensors, but for what may differ: how long they took, and which way they went."""
    report = json.loads((folder / "report.json").read_text())
    left_out = ("seconds", "route")
    return {row["name"]: {key: row[key] for key in row if key not in left_out} for row in report["tensors"]}


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "stack_route", lambda *_: None)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_matrices_of_which_there_are_three_are_stacked_on_a_gpu(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    with pretend_gpu():
        plan = plan_of(family)
        again = plan_of(family)
        explained = InStacks().explain(TensorSpec("w", SIDES, torch.float32), TASKS, CUDA)
    assert {tensor.name for tensor in plan.tensors if isinstance(tensor.route, Stacked)} == STACKED
    assert {tensor.name for tensor in plan.tensors if type(tensor.route) is Resident} == {"embed", "pair.0", "pair.1"}
    assert [tensor.route for tensor in again.tensors] == [tensor.route for tensor in plan.tensors]
    (reason,) = {tensor.reason for tensor in plan.tensors if tensor.name in STACKED}
    assert reason == f"stacked: {PLACES} at once; one whose checks miss by itself: {explained}"
    assert not any(isinstance(tensor.route, Stacked) for tensor in plan_of(family, "cpu").tensors)


def test_an_override_is_told_of_beside_the_stack(tmp_path: Path) -> None:
    family = family_of(tmp_path) | {"method": "mean"}
    with pretend_gpu():
        plan = plan_of(family, overrides=[Override("layer.0*.up", InStacks.name)])
    (reason,) = {tensor.reason for tensor in plan.tensors if isinstance(tensor.route, Stacked)}
    assert reason == f"stacked: {PLACES} at once; overrides: 'layer.0*.up'"


@pytest.fixture
def little_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let as little be page-locked, and held of the next tensors, as suits small matrices."""
    for constant in ("READ_AHEAD_BYTES", "LEAST_READ_AHEAD_BYTES", "PINNED_BYTES"):
        monkeypatch.setattr(budgets, constant, 1 << 17)


@pytest.mark.usefixtures("little_transfer")
def test_ceilings_hold_and_where_there_is_no_room_for_a_stack_each_is_merged_by_itself(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    found: list[str] = []
    with pretend_gpu():
        for ceiling in range(96 << 10, 320 << 10, 8 << 10):
            plan = plan_of(family, max_vram=ceiling)
            (route,) = {tensor.route.name for tensor in plan.tensors if tensor.name in STACKED}
            assert plan.peak_vram_bytes <= ceiling or not found
            assert plan.peak_vram_bytes <= ceiling or route != Stacked.name
            found += [route] if plan.peak_vram_bytes <= ceiling else []
    assert {*found} == {Resident.name, Stacked.name}
    assert found == sorted(found)


def test_the_copies_of_a_stack_are_held_as_those_of_a_tensor_are() -> None:
    """The next stack's are uploaded while one is merged, so there has to be room for both."""
    spec, traffic = TensorSpec("w", SIDES, torch.float32), Traffic((4,) * (1 + TASKS), 4, TASKS)
    copies = PLACES * spec.elements * 4 * (1 + TASKS)
    with pretend_gpu():
        room = Budget(1 << 20, 1 << 30, copies)
        route = stack_route(InStacks(), spec, PartSizes(traffic, room, CUDA), 3)
        assert route is not None
        assert route.work_bytes >= copies + InStacks().stack_bytes(spec, TASKS, CUDA)
        assert stack_route(InStacks(), spec, PartSizes(traffic, room, CUDA), 2) is None
        assert stack_route(InStacks(), spec, PartSizes(traffic, replace(room, on_gpu=copies - 1), CUDA), 3) is None
        least = replace(room, work=route.work_bytes)
        assert stack_route(InStacks(), spec, PartSizes(traffic, least, CUDA), 3) is not None
        less = replace(room, work=route.work_bytes - 1)
        assert stack_route(InStacks(), spec, PartSizes(traffic, less, CUDA), 3) is None


def test_room_is_made_for_the_copies_of_a_stack(tmp_path: Path) -> None:
    """Beyond what is held of the next tensors otherwise, up to a quarter of the GPU."""
    config = headers_of(tmp_path, {f"{layer}.w": (2048, 2048) for layer in range(3)}, 8, method=InStacks.name)
    with pretend_gpu():
        plan = make_plan(config, CUDA)
        less = make_plan(config, CUDA, max_vram=1 << 30)
    copies = PLACES * plan.tensors[0].read_bytes
    assert copies > budgets.PINNED_BYTES // 2
    assert plan.budget.resident == copies
    assert {tensor.route.name for tensor in plan.tensors} == {Stacked.name}
    assert {tensor.route.name for tensor in less.tensors} == {Resident.name}


@pytest.mark.usefixtures("little_transfer")
def test_a_merge_under_a_ceiling_is_that_of_its_plan(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    with pretend_gpu():
        wide = merge(family, tmp_path / "wide", max_vram=1 << 20)
        tight = merge(family, tmp_path / "tight", max_vram=160 << 10)
        with pytest.raises(imf.ResourceError, match=r"max_vram is 16384 bytes; the smallest that would do is \d+"):
            merge(family, tmp_path / "none", max_vram=16 << 10)
    assert {row["name"] for row in wide.tensors if row["route"] == Stacked.name} == STACKED
    assert {row["route"] for row in tight.tensors if row["name"] in STACKED} == {Resident.name}
    loaded = [load_folder(tmp_path / name) for name in ("tight", "wide")]
    assert all(torch.equal(*(folder[name] for folder in loaded)) for name in STACKED)


# --- the merge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float64, {"scaling": 0.4}),
        (torch.bfloat16, {"scaling": [0.3, 1.7], "save_delta": True, "stochastic_rounding": 3}),
        (torch.float16, {"weights": [0.25, 1.0, -2.5], "dtype": "float32"}),
        (torch.float32, {"experts_are_deltas": True, "exclude": ["*.05.*"]}),
    ],
    ids=["plain", "float64", "several outputs", "weights", "deltas"],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_the_same_bytes_and_evidence_as_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict[str, Any], shards: int
) -> None:
    family = family_of(tmp_path, dtype, shards=shards)
    with pretend_gpu():
        together = merge(family, tmp_path / "together", **options)
        assert set(InStacks.seen) >= {PLACES}
        with monkeypatch.context() as patch:
            one_by_one(patch)
            alone = merge(family, tmp_path / "alone", **options)
    assert weights_of(tmp_path / "together") == weights_of(tmp_path / "alone")
    assert rows_of(tmp_path / "together") == rows_of(tmp_path / "alone")
    names = [row["name"] for row in together.tensors]
    assert names == [row["name"] for row in alone.tensors]
    assert len(set(names)) == len(names)
    assert (together.read_bytes, together.write_bytes) == (alone.read_bytes, alone.write_bytes)
    assert all(row["seconds"] > 0 for row in together.tensors)
    assert Stacked.name in {row["route"] for row in together.tensors}
    assert Stacked.name not in {row["route"] for row in alone.tensors}


def test_every_tensor_is_verified_and_recomputed(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    with pretend_gpu():
        merge(family, tmp_path / "out", scaling=[0.5, 1.0])
    found = verify(tmp_path / "out", samples=100)
    assert {row["name"] for row in found.recomputed} >= STACKED
    assert not found.remarks


def test_progress_counts_every_tensor_and_seconds_are_shared_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(tmp_path)
    merge_stack, seconds = InStacks.merge_stack, 0.4
    last: list[Progress] = []

    def slow(method: InStacks, sources: Sequence[DeltaSource]) -> Any:
        if not method.seen:
            time.sleep(seconds)
        return merge_stack(method, sources)

    monkeypatch.setattr(InStacks, "merge_stack", slow)
    with pretend_gpu():
        report = merge(family, tmp_path / "out", observer=last.append)
    assert (last[-1].done_tensors, last[-1].done_bytes) == (len(report.tensors), last[-1].total_bytes)
    took = {row["name"]: row["seconds"] for row in report.tensors}
    assert all(seconds / PLACES <= took[f"layer.{layer:02}.down"] < seconds for layer in range(PLACES))


def test_a_stack_takes_the_launches_of_one_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of(tmp_path) | {"method": ManyLaunches.name}
    with pretend_gpu() as gpu:
        merge(family, tmp_path / "together")
        together = gpu.launches["aten.mul_"]
        one_by_one(monkeypatch)
        gpu.reset()
        merge(family, tmp_path / "alone")
        alone = gpu.launches["aten.mul_"]
    assert weights_of(tmp_path / "together") == weights_of(tmp_path / "alone")
    stacks = -(-LAYERS // PLACES) * 2
    assert alone - together == 100 * (len(STACKED) - stacks)


def test_stacks_come_where_they_are_full_and_the_rest_at_the_end(tmp_path: Path) -> None:
    with pretend_gpu():
        plan = plan_of(family_of(tmp_path))
    found = list(stacked(plan.tensors))
    assert sorted(tensor.name for each in found for tensor in getattr(each, "tensors", [each])) == sorted(
        tensor.name for tensor in plan.tensors
    )
    sizes = [len(each.tensors) for each in found if isinstance(each, TensorStack)]
    assert sizes == [PLACES] * 4 + [LAYERS % PLACES] * 2
    order = [tensor.name for tensor in plan.tensors]
    assert [each.name for each in found if not isinstance(each, TensorStack)] == [
        name for name in order if name not in STACKED
    ]
    assert all(isinstance(each, TensorStack) for each in found[-2:])


def test_copies_are_freed_before_those_of_the_stack_after_next_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Python's search for circles, which a GPU's memory does not wait for."""
    family = family_of(tmp_path)
    held: list[weakref.ref[Tensor]] = []
    most: list[int] = []
    upload = Uploads._upload

    def counted(self: Uploads) -> list[Tensor]:
        most.append(sum(each() is not None for each in held))
        made = upload(self)
        held.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(Uploads, "_upload", counted)
    gc.collect()
    gc.disable()
    try:
        with pretend_gpu():
            merge(family, tmp_path / "out")
    finally:
        gc.enable()
    # While one is uploaded, those of the stack that is merged.
    assert max(most) <= PLACES * (1 + TASKS)


def test_work_items_have_stacks_of_their_own_and_the_same_bytes(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    with pretend_gpu():
        merge(family, tmp_path / "whole")
        whole = [*InStacks.seen]
        plan = plan_of(family, out=str(tmp_path / "shared"))
        run(plan, device="cuda", executor=InTurn(4).merge)
    assert InStacks.seen[len(whole) :] != whole
    assert weights_of(tmp_path / "shared") == weights_of(tmp_path / "whole")


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing in the package may catch it."""


@pytest.mark.parametrize("after", [0, 3, 8, 11, 19, 26])
def test_a_resume_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Killed at the n-th write, in the middle of a stack or between two: what is left has another company."""
    family = family_of(tmp_path)
    real_pwrite, count = os.pwrite, 0

    def torn(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal count
        count += 1
        if count > after:
            real_pwrite(descriptor, data[: len(data) // 2], offset)
            raise Killed
        return real_pwrite(descriptor, data, offset)

    with pretend_gpu():
        merge(family, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", torn)
            with pytest.raises(Killed):
                merge(family, tmp_path / "out")
        InStacks.seen.clear()
        merge(family, tmp_path / "out", resume=True)
    assert (sum(InStacks.seen) < len(STACKED)) == (after > 8)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


# --- what goes wrong --------------------------------------------------------------------------------------------------


def nan(value: Tensor) -> Tensor:
    value[1, 2] = value[3, 4] = torch.nan
    return value


@pytest.mark.parametrize("name", ["layer.01.up", "layer.11.down"])
@pytest.mark.parametrize(
    ("damage", "options"),
    [
        (nan, {}),
        (lambda value: value.fill_(6e4), {"scaling": 5.0}),
        (lambda value: value.fill_(3e38).float(), {}),
    ],
    ids=["nan", "overflow", "deltas overflow"],
)
def test_a_damaged_tensor_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: Callable[[Tensor], Tensor],
    options: dict[str, Any],
) -> None:
    """As it is where each is merged by itself: the tensor, its files and the experts."""
    family = family_of(tmp_path, torch.float16 if "scaling" in options else torch.float32)
    for expert, sign in ((family["experts"][1], 1.0), (family["base"], -1.0)):
        value = tensors_of(0, torch.float32)[name]
        if sign < 0 and damage is nan:
            continue
        made = sign * damage(value)
        rewrite(expert, **{name: made.half() if "scaling" in options else made})
    errors = []
    for folder in ("together", "alone"):
        with pretend_gpu(), pytest.raises(imf.InputError) as raised:
            merge(family, tmp_path / folder, **options)
        errors.append(str(raised.value))
        one_by_one(monkeypatch)
    assert InStacks.seen
    assert name in errors[0]
    assert errors[0] == errors[1]


def test_an_absurd_delta_is_remarked_of_its_own_tensor(tmp_path: Path) -> None:
    family = family_of(tmp_path)
    value = tensors_of(2, torch.float32)["layer.03.up"]
    value[0, 0] = 2e4
    rewrite(family["experts"][1], **{"layer.03.up": value})
    with pretend_gpu():
        report = merge(family, tmp_path / "out", scaling=1e-3)
    remarks = {row["name"]: row["remarks"] for row in report.tensors if "remarks" in row}
    assert remarks.keys() == {"layer.03.up"}
    assert "is a weight damaged?" in remarks["layer.03.up"]


class Full:
    """A GPU whose memory is full the first few times that a stack of several is merged, or that any is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int, least: int = 1) -> None:
        self.left, self.least, self._merge = times, least, InStacks.merge_stack
        monkeypatch.setattr(InStacks, "merge_stack", lambda method, sources: self(method, sources))

    def __call__(self, method: InStacks, sources: Sequence[DeltaSource]) -> Any:
        sources[0].delta(0)  # something was taken already
        if self.left and len(sources) >= self.least:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self._merge(method, sources)


ONCE_MORE = f"cuda:0 was out of memory and {PLACES} tensors are merged once more: what else runs on it takes room"
APART = (
    f"cuda:0 was out of memory for {PLACES} tensors at once and each is merged by itself: what else runs on it takes "
    "room"
)


@pytest.mark.parametrize(("times", "said"), [(1, ONCE_MORE), (2, APART)])
def test_a_stack_for_which_there_is_no_room_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, times: int, said: str
) -> None:
    family = family_of(tmp_path)
    with pretend_gpu():
        merge(family, tmp_path / "whole")
        assert not caplog.messages
        InStacks.seen.clear()
        Full(monkeypatch, times)
        report = merge(family, tmp_path / "out")
    remarks = [row["remarks"] for row in report.tensors if "remarks" in row]
    assert remarks == [said] * PLACES
    assert caplog.messages == [f"tensor 'layer.00.down': {each}" for each in (ONCE_MORE, APART)[:times]]
    assert InStacks.seen[:PLACES] == [PLACES, PLACES, PLACES, PLACES, 2] if times == 1 else [1] * PLACES
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


@pytest.mark.parametrize("times", [1, 2])
def test_there_need_be_no_room_for_the_copies_of_a_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Then it is read past, and each of its tensors is read again."""
    family = family_of(tmp_path)
    left, upload = times, Uploads._upload

    def full(self: Uploads) -> list[Tensor]:
        nonlocal left
        if left and self._ahead.upcoming is not None and len(self._ahead.upcoming.pieces) > 1 + TASKS:
            left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return upload(self)

    with pretend_gpu():
        merge(family, tmp_path / "whole")
        monkeypatch.setattr(Uploads, "_upload", full)
        monkeypatch.setattr(Uploads, "_upload_if_room", lambda _: None)
        report = merge(family, tmp_path / "out")
    remarks = [row["remarks"] for row in report.tensors if "remarks" in row]
    assert remarks == [(ONCE_MORE, APART)[times - 1]] * PLACES
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_out_of_memory_of_one_by_one_too_is_told_of_with_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of(tmp_path)
    with pretend_gpu():
        merge(family, tmp_path / "whole")
        with monkeypatch.context() as patch:
            Full(patch, 4)
            with pytest.raises(
                imf.ResourceError,
                match=r"cuda:0 is out of memory at tensor 'layer\.00\.down', which was planned to take \d+",
            ):
                merge(family, tmp_path / "out")
        merge(family, tmp_path / "out", resume=True)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
