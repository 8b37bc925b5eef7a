"""Merges of files on a GPU that is pretended: the device, its memory, its ceilings, and what a journal is of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import isomerge_fast as imf
from checkpoints import listing, make_family, save_folder
from isomerge_fast.checkpoint.io.buffer_pool import BufferPool
from isomerge_fast.checkpoint.io.writer import ShardWriter
from isomerge_fast.execution.engine import resolve_device, run
from isomerge_fast.execution.verify import verify
from isomerge_fast.methods import IsoC, IsoCTS, Method, TensorSpec
from isomerge_fast.planning import budget as budgets_module
from isomerge_fast.planning.budget import budgets_to_try
from isomerge_fast.planning.part_sizes import PartSizes, Traffic
from isomerge_fast.planning.planner import make_plan
from isomerge_fast.planning.routes import Resident, Route, Streamed, choose_route
from pretend_gpu import A100, CUDA, H100, pretend_gpu

CEILING = 64 << 20


Family = tuple[Path, list[Path]]


def merge(family: Family, out: Path, *, method: str = "iso-cts", **options: Any) -> imf.Report:
    config = {"base": family[0], "experts": family[1], "out": out, "method": method}
    return imf.merge(config, device="cuda", **options)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All but the report, which tells of times."""
    return {name: content for name, content in listing(folder).items() if name != "report.json"}


@pytest.mark.parametrize("method", ["task-arithmetic", "iso-c", "iso-cts"])
@pytest.mark.parametrize("max_vram", [None, CEILING])
def test_a_merge_of_files_on_a_gpu(tmp_path: Path, method: str, max_vram: int | None) -> None:
    family = make_family(tmp_path)
    with pretend_gpu() as gpu:
        report = merge(family, tmp_path / "out", method=method, max_vram=max_vram)
        assert report.device == "cuda:0"
        assert gpu.launches["apply_delta"] > 0
        assert gpu.launches["task_sum"] > 0
    assert not [row for row in report.tensors if row.get("certified") is False]
    assert verify(tmp_path / "out").recomputed


@pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
def test_matrices_larger_than_what_is_page_locked_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """And put together on the GPU: the same bytes. What is held of a tensor is the GPU's memory, not the pool's."""
    models = [{"w": torch.randn(160, 96, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    base, *experts = [save_folder(tmp_path / str(index), model) for index, model in enumerate(models)]
    family = base, experts
    sizes: list[int] = []
    allocate = BufferPool._allocate
    monkeypatch.setattr(BufferPool, "_allocate", lambda pool: sizes.append(pool.size) or allocate(pool))
    with pretend_gpu():
        whole = merge(family, tmp_path / "whole", method=method)
        for constant in ("READ_AHEAD_BYTES", "LEAST_READ_AHEAD_BYTES", "PINNED_BYTES"):
            monkeypatch.setattr(budgets_module, constant, 1 << 17)
        sizes.clear()
        cut = merge(family, tmp_path / "cut", method=method)
    assert [row["route"] for row in cut.tensors] == [Resident.name]
    assert sizes == [1 << 17]
    assert cut.read_bytes == whole.read_bytes > 1 << 17
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("shape", "memory", "route"),
    [
        ((8192, 28672), 68 << 30, Resident),  # of Llama-3-70B
        ((128256, 4096), 68 << 30, Resident),
        ((14336, 4096), 8 << 30, Resident),
        ((8192, 28672), 8 << 30, Streamed),
    ],
)
@pytest.mark.parametrize("method", [IsoC(), IsoCTS()], ids=lambda method: method.name)
def test_copies_are_held_where_the_memory_of_the_gpu_has_room_for_them(
    method: Method, shape: tuple[int, int], memory: int, route: type[Route]
) -> None:
    spec, traffic = TensorSpec("w", shape, torch.float32), Traffic((2,) * 9, 2, 8)
    with pretend_gpu():
        tried = (
            (budget, choose_route(method, spec, PartSizes(traffic, budget, CUDA)))
            for budget in budgets_to_try(9 * 2 * spec.elements, host=None, vram=memory, on_gpu=True)
        )
        budget, found = next((budget, found) for budget, found in tried if found.work_bytes <= (budget.work or 0))
    assert type(found) is route
    assert budget.read_ahead <= 512 << 20
    assert budget.in_transfer + found.work_bytes <= memory
    if route is Resident:  # each part that is written costs launches; two of them may wait
        written = [2 * shape[1] * (part.stop - part.start) for part in found.parts()]
        assert max(written) <= budget.write_behind / 2
        assert len(written) <= 1 + 2 * sum(written) / (budget.write_behind / 2)


def test_large_parts_are_written_as_they_came_from_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [{"w": torch.randn(1031, 700).bfloat16(), "x": torch.ones(3).bfloat16()} for _ in range(3)]
    base, *experts = [save_folder(tmp_path / str(index), model) for index, model in enumerate(models)]
    written: list[tuple[int, int]] = []
    write_at = ShardWriter._write_at

    def seen(writer: ShardWriter, data: memoryview, offset: int) -> None:
        written.append((numpy.frombuffer(data, numpy.uint8).ctypes.data, offset))
        write_at(writer, data, offset)

    monkeypatch.setattr(ShardWriter, "_write_at", seen)
    with pretend_gpu():
        merge((base, experts), tmp_path / "out", method="mean")
    assert len(written) == 2
    assert all((address - offset) % 4096 == 0 for address, offset in written)


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_device_has_its_number(name: str) -> None:
    """Without one, torch's functions for its memory refuse it."""
    with pretend_gpu():
        assert resolve_device(name) == torch.device("cuda", 0)


@pytest.mark.parametrize("fails", [False, True])
def test_the_ceiling_on_memory_is_lifted_when_the_merge_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    family = make_family(tmp_path)

    def fail(*_: object) -> None:
        raise RuntimeError("interrupted")

    with pretend_gpu() as gpu:
        torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda", 0))  # the caller's own
        if fails:
            monkeypatch.setattr(IsoCTS, "merge", fail)
            with pytest.raises(RuntimeError, match="interrupted"):
                merge(family, tmp_path / "out", max_vram=CEILING)
        else:
            merge(family, tmp_path / "out", max_vram=CEILING)
        assert gpu.fractions == [1.0, 0.5, CEILING / H100.memory_bytes, 0.5]


class Full:
    """``IsoCTS.merge`` on a GPU whose memory is full the first few times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left, self._merge = times, IsoCTS.merge
        monkeypatch.setattr(IsoCTS, "merge", lambda method, deltas: self(method, deltas))

    def __call__(self, method: IsoCTS, deltas: Any) -> Any:
        deltas.delta(0)  # something was taken already
        if self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self._merge(method, deltas)


def test_a_tensor_for_which_there_is_no_room_is_tried_again_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    family = make_family(tmp_path)
    with pretend_gpu():
        merge(family, tmp_path / "whole")
        assert not caplog.messages
        Full(monkeypatch, 1)
        report = merge(family, tmp_path / "out")
    (row,) = [row for row in report.tensors if "remarks" in row]
    said = "cuda:0 was out of memory and the tensor is merged once more: what else runs on it takes room"
    assert (row["remarks"], caplog.messages) == (said, [f"tensor {row['name']!r}: {said}"])
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_out_of_memory_is_said_at_once_and_what_is_done_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = make_family(tmp_path)
    with pretend_gpu():
        merge(family, tmp_path / "whole")
        with monkeypatch.context() as patch:
            Full(patch, 2)
            with pytest.raises(
                imf.ResourceError, match=r"cuda:0 is out of memory at tensor '.*planned to take \d+ bytes"
            ):
                merge(family, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        merge(family, tmp_path / "out", resume=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_an_unfinished_merge_does_not_go_on_with_another_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with other packages: what is left would have other last digits."""
    family = make_family(tmp_path)
    with monkeypatch.context() as patch, pretend_gpu(H100):
        Full(patch, 2)
        with pytest.raises(imf.ResourceError):
            merge(family, tmp_path / "out")
    with pretend_gpu(A100), pytest.raises(imf.ConfigError, match="devices or versions"):
        merge(family, tmp_path / "out", resume=True)


def test_a_process_on_another_kind_of_gpu_refuses_its_part(tmp_path: Path) -> None:
    base, experts = make_family(tmp_path)
    config = imf.MergeConfig(str(base), [str(expert) for expert in experts], out=str(tmp_path / "out"))
    with pretend_gpu(H100):
        plan = make_plan(config, resolve_device("cuda"))
    with (
        pretend_gpu(A100),
        pytest.raises(imf.ResourceError, match=r"pretended A100.*planned for pretended H100"),
    ):
        run(plan, device="cuda")
    assert not (tmp_path / "out").exists()


def test_a_plan_without_a_ceiling_keeps_to_the_memory_there_is(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    tiny = replace(H100, memory_bytes=1 << 20)
    with pretend_gpu(tiny), pytest.raises(imf.ResourceError, match=r"cuda:0: 891289 bytes of its memory can be used"):
        merge(family, tmp_path / "out")


def test_free_memory_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(device: object = None) -> tuple[int, int]:
        raise AssertionError("asked for free memory")

    family = make_family(tmp_path)
    with pretend_gpu():
        monkeypatch.setattr(torch.cuda, "mem_get_info", free)
        merge(family, tmp_path / "out")
