"""The parts of the pipeline by themselves: reads ahead, copies to a device, arithmetic in threads, writes behind."""

from __future__ import annotations

import ctypes
import json
import os
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import isomerge_fast as imf
from checkpoints import save_folder, write_tensor
from isomerge_fast.checkpoint.io import direct_io, reader as reader_module
from isomerge_fast.checkpoint.io.buffer_pool import BufferPool
from isomerge_fast.checkpoint.io.checksum import Checksum
from isomerge_fast.checkpoint.io.direct_io import copy_bytes, page_ceiling
from isomerge_fast.checkpoint.io.read_ahead import Bundle, ReadAhead
from isomerge_fast.checkpoint.io.reader import Piece, Reader, files_of, whole
from isomerge_fast.checkpoint.io.write_behind import WriteBehind
from isomerge_fast.checkpoint.io.writer import OutputTensor, ShardWriter, create_shard, tensor_bytes
from isomerge_fast.checkpoint.layout import Checkpoint, StoredTensor, open_checkpoint
from isomerge_fast.checkpoint.output.manifest import MANIFEST_FILE
from isomerge_fast.execution.device_copies import Download, Uploads
from isomerge_fast.execution.engine import run
from isomerge_fast.execution.sources import FileSource, bundle_of, first_pass
from isomerge_fast.execution.threads import ComputeThreads
from isomerge_fast.methods import IsoC, Mean, Method, RowBlock, TensorSpec
from isomerge_fast.planning.budget import Budget, budgets_to_try
from isomerge_fast.planning.part_sizes import PartSizes, Traffic
from isomerge_fast.planning.plan import Plan, TensorPlan
from isomerge_fast.planning.planner import make_plan
from isomerge_fast.planning.routes import Copied, Resident, Route, Rowwise, Streamed, choose_route
from pretend_gpu import pretend_gpu

pytestmark = pytest.mark.usefixtures("two_threads")

MIB = 1 << 20
SIZES = {"large": 5 * MIB + 3, "small": 77, "empty": 0, "scalar": 1, "page": 4096, "next": 3 * MIB}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Tensors of 0 bytes to 10 MB, of which none begins on a page."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(-9999, 9999, (size,), generator=generator, dtype=torch.int16).view(torch.bfloat16)
        for name, size in SIZES.items()
    }
    return open_checkpoint(str(save_folder(tmp_path_factory.mktemp("read") / "model", tensors)))


def loaded(checkpoint: Checkpoint) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint.path / "model.safetensors")


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.reshape(-1).view(torch.int16), expected.reshape(-1).view(torch.int16))


# reading


@pytest.mark.parametrize("direct", [False, True])
def test_every_part_of_a_tensor_is_read_as_it_is_stored(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    monkeypatch.setattr(reader_module, "is_cached", lambda descriptor, size: False)
    expected = loaded(checkpoint)
    with Reader(files_of(checkpoint), direct=direct) as reader:
        for name, stored in checkpoint.tensors.items():
            assert same(reader.read(whole(stored)), expected[name])
            for first, count in ((0, 1), (1, 7), (2048, 2048), (MIB + 5, 4 * MIB - 9), (SIZES["large"] - 1, 1)):
                if first + count <= SIZES[name]:
                    part = reader.read(Piece(stored, first, (count,)))
                    assert same(part, expected[name][first : first + count]), (name, first, count)
        if direct and reader.direct_files == 0:
            pytest.skip("this file system has no direct I/O")
        assert reader.direct_files == direct


def test_short_reads_are_continued(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_read = os.preadv

    def short_read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return whole_read(descriptor, [buffers[0][: max(4096, len(buffers[0]) // 3 // 4096 * 4096)]], offset)

    for direct in (False, True):
        monkeypatch.setattr(reader_module, "is_cached", lambda descriptor, size, direct=direct: not direct)
        monkeypatch.setattr(os, "preadv", short_read)
        with Reader(files_of(checkpoint)) as reader:
            found = reader.read(whole(checkpoint.tensors["large"]))
        monkeypatch.setattr(os, "preadv", whole_read)
        assert same(found, loaded(checkpoint)["large"])


def test_what_is_cached_is_read_from_the_cache(checkpoint: Checkpoint) -> None:
    (path,) = checkpoint.files
    path.read_bytes()
    with Reader(files_of(checkpoint)) as reader:
        reader.read(whole(checkpoint.tensors["large"]))
        assert reader.direct_files == 0


@pytest.mark.parametrize(("share", "is_cached"), [(0.0, False), (0.4, False), (0.6, True), (1.0, True)])
def test_a_file_of_which_half_was_read_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, is_cached: bool
) -> None:
    path, size = tmp_path / "file", 3 * MIB + 5
    path.write_bytes(bytes(size))
    looked_at: list[int] = []

    def mincore(address: int, length: int, result: int) -> int:
        looked_at.append(address)
        # The first page that is looked at lies within the first hundredth of the file.
        ctypes.c_uint8.from_address(result).value = 0xFE | (address - looked_at[0] < share * size)
        return 0

    monkeypatch.setattr(direct_io.ctypes, "CDLL", lambda name: SimpleNamespace(mincore=mincore))
    with path.open("rb") as file:
        assert direct_io.is_cached(file.fileno(), size) == is_cached
    assert looked_at == sorted(set(looked_at))
    assert len(looked_at) == direct_io.CACHE_SAMPLES
    assert 0.98 * size < looked_at[-1] - looked_at[0] < size
    with open(os.devnull, "rb") as file:
        assert direct_io.is_cached(file.fileno(), size)  # of what cannot be mapped nothing is known


@contextmanager
def reading_ahead(
    checkpoint: Checkpoint, bundles: list[Bundle], budget: int, part: int | None = None
) -> Iterator[ReadAhead]:
    with (
        Reader(files_of(checkpoint)) as reader,
        ThreadPoolExecutor(4) as threads,
        ReadAhead(reader, threads, bundles, budget_bytes=budget, part_bytes=part) as ahead,
    ):
        yield ahead


@pytest.mark.parametrize("budget", [1, 4 * MIB, 1 << 30])
def test_bundles_come_in_order_whatever_the_budget(checkpoint: Checkpoint, budget: int) -> None:
    expected = loaded(checkpoint)
    names = [*SIZES, *reversed(SIZES), *SIZES]
    pairs = list(zip(names, [*names[1:], "small"], strict=True))
    bundles = [Bundle(tuple(whole(checkpoint.tensors[name]) for name in pair)) for pair in pairs]
    with reading_ahead(checkpoint, bundles, budget) as ahead:
        for pair in pairs:
            assert ahead.upcoming is not None
            found = ahead.take()
            assert all(same(tensor, expected[name]) for tensor, name in zip(found, pair, strict=True))
            if budget == 1 << 30:  # all in the pool, where memory lies like the file within its pages
                for tensor, name in zip(found, pair, strict=True):
                    apart = tensor.data_ptr() - checkpoint.tensors[name].start
                    assert apart % 4096 == 0 or tensor.numel() == 0
        assert ahead.upcoming is None
    assert ahead.busy_seconds > 0


def test_no_more_is_read_ahead_than_the_budget_allows(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    load = Reader.read_into

    def counted(self: Reader, piece: Piece, offset: int, target: memoryview) -> None:
        if offset == 0:
            started.append(len(started))
        load(self, piece, offset, target)

    monkeypatch.setattr(Reader, "read_into", counted)
    large = whole(checkpoint.tensors["large"])
    with reading_ahead(checkpoint, [Bundle((large,))] * 12, 3 * page_ceiling(Bundle((large,)).bytes)) as ahead:
        for taken in range(12):
            time.sleep(0.02)
            assert len(started) <= taken + 3
            ahead.take()
        assert len(started) == 12


def test_a_pool_gives_every_byte_to_one_only() -> None:
    """Against a model that knows nothing of gaps: places in use never overlap, and what fits is given."""
    generator = torch.Generator().manual_seed(0)
    pool = BufferPool(4096 * 100)
    taken: list[Tensor] = []
    given = 0
    for _ in range(3000):
        size = int(torch.randint(0, 4096 * 40, (1,), generator=generator))
        found = pool.take(size)
        if found is None:
            assert taken  # an empty pool takes whatever is no larger than itself
            part = taken.pop(int(torch.randint(0, len(taken), (1,), generator=generator)))
            assert (part == 7).all()
            pool.give_back(part)
            continue
        assert found.numel() == size
        assert found.data_ptr() % 4096 == 0
        for other in taken:
            assert (other == 7).all()
        found.fill_(7)
        before = [other.clone() for other in taken]
        found.fill_(9)
        assert all(torch.equal(a, b) for a, b in zip(before, taken, strict=True))
        found.fill_(7)
        taken.append(found)
        given += 1
        assert sum(page_ceiling(max(1, each.numel())) for each in taken) <= 4096 * 100
    assert given > 1000
    assert pool.take(4096 * 100 + 1) is None


def test_a_read_that_fails_is_raised_where_its_bundle_is_taken(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["small", "page", "large", "next"]
    load = Reader.read_into

    def failing(self: Reader, piece: Piece, offset: int, target: memoryview) -> None:
        if piece.stored.name == "large":
            raise imf.InputError("cannot be read")
        load(self, piece, offset, target)

    monkeypatch.setattr(Reader, "read_into", failing)
    bundles = [Bundle((whole(checkpoint.tensors[name]),)) for name in names]
    with reading_ahead(checkpoint, bundles, 1 << 30) as ahead:
        for name in names[:2]:
            assert same(ahead.take()[0], loaded(checkpoint)[name])
        with pytest.raises(imf.InputError, match="cannot be read"):
            ahead.take()


# copies to a device: with copies from the host to the host, which go the same way


def uploading(checkpoint: Checkpoint, ahead: ReadAhead) -> Uploads:
    return Uploads(ahead, torch.device("cpu"), copied=True)


def test_uploads_come_in_order_and_one_ahead(checkpoint: Checkpoint) -> None:
    expected, names = loaded(checkpoint), [*SIZES] * 3
    bundles = [Bundle((whole(checkpoint.tensors[name]),)) for name in names]
    with reading_ahead(checkpoint, bundles, 1) as ahead, uploading(checkpoint, ahead) as uploads:
        taken = []
        for name in names:
            (tensor,) = uploads.take()
            taken.append(tensor)
            assert same(tensor, expected[name])
        # Copies outlive the buffers they were read into, of which there is one at a time.
        assert all(same(tensor, expected[name]) for tensor, name in zip(taken, names, strict=True))
        assert ahead.upcoming is None


PARTS = (1, 3 * 4096, 100_000, 4 * MIB, 1 << 30)


@pytest.mark.parametrize("limit", PARTS)
def test_parts_of_a_bundle_are_all_of_it_in_order(checkpoint: Checkpoint, limit: int) -> None:
    names = ["small", "empty", "page", "scalar"] if limit == 1 else ["small", "large", "empty", "page", "large", "next"]
    bundle = Bundle(tuple(whole(checkpoint.tensors[name]) for name in names))
    parts = list(bundle.parts(limit))
    assert list(bundle.parts(None)) == [bundle]
    for part in parts:
        assert page_ceiling(part.bytes) <= limit or sum(piece.bytes for piece in part.pieces) == 2
    found = [(piece.stored, piece.start, piece.start + piece.bytes) for part in parts for piece in part.pieces]
    joined: list[tuple[StoredTensor, int, int]] = []
    for stored, start, end in found:
        if joined and joined[-1][0] == stored and joined[-1][2] == start:
            start = joined.pop()[1]
        joined.append((stored, start, end))
    assert joined == [
        (piece.stored, piece.start, piece.stored.end) for piece in bundle.pieces if piece.bytes or limit == 1 << 30
    ]
    assert len(parts) <= 2 + 2 * bundle.bytes // max(2, limit - 3 * 4096 * len(names))


@pytest.mark.parametrize("limit", PARTS[1:])
def test_what_is_read_in_parts_is_whole_on_the_device(checkpoint: Checkpoint, limit: int) -> None:
    expected = loaded(checkpoint)
    bundles = [["small", "large", "empty"], ["empty"], ["page", "large", "large"], ["next", "scalar"], ["large"]]
    with (
        reading_ahead(
            checkpoint,
            [Bundle(tuple(whole(checkpoint.tensors[name]) for name in names)) for names in bundles],
            3 * limit,
            limit,
        ) as ahead,
        uploading(checkpoint, ahead) as uploads,
    ):
        for names in bundles:
            found = uploads.take()
            assert [tuple(tensor.shape) for tensor in found] == [checkpoint.tensors[name].shape for name in names]
            assert all(same(tensor, expected[name]) for tensor, name in zip(found, names, strict=True))
        assert ahead.upcoming is None


def test_a_bundle_for_which_a_device_has_no_room_is_taken_when_there_is_some(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ahead of time nobody is told; when it is wanted, nothing of it is lost either."""
    expected, names = loaded(checkpoint), ["large", "next", "page"]
    bundles = [Bundle((whole(checkpoint.tensors[name]),)) for name in names]
    empty, left = torch.empty, {"large": 0, "next": 1, "page": 2}

    def full(*size: Any, dtype: torch.dtype, **options: Any) -> Tensor:
        if dtype == torch.bfloat16:
            name = next(name for name in names if (SIZES[name],) == size[0])
            left[name] -= 1
            if left[name] >= 0:
                raise torch.OutOfMemoryError("out of memory")
        return empty(*size, dtype=dtype, **options)

    monkeypatch.setattr(torch, "empty", full)
    with reading_ahead(checkpoint, bundles, 1 << 30) as ahead, uploading(checkpoint, ahead) as uploads:
        for name in names[:2]:
            assert same(uploads.take()[0], expected[name])
        with pytest.raises(torch.OutOfMemoryError):
            uploads.take()
        assert same(uploads.take()[0], expected["page"])
    assert set(left.values()) == {-1}


@pytest.mark.parametrize("position", [0, 4096, 2 * 4096 + 10, 123_456_788])
@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (70, 90)])
def test_a_download_lies_like_its_file(position: int, shape: tuple[int, ...]) -> None:
    """So that a direct write takes it as it is."""
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    with pretend_gpu() as gpu:
        found = Download(gpu.upload(value), position)()
    assert type(found) is Tensor
    assert found.data_ptr() % 4096 == position % 4096 or found.numel() == 0
    assert same(found, value)
    assert found.shape == value.shape


def test_an_upload_that_fails_is_raised_where_it_is_taken(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Reader, piece: Piece, offset: int, target: memoryview) -> None:
        raise imf.InputError("cannot be read")

    bundles = [Bundle((whole(checkpoint.tensors["small"]),))] * 2
    monkeypatch.setattr(Reader, "read_into", failing)
    with (
        reading_ahead(checkpoint, bundles, 1) as ahead,
        uploading(checkpoint, ahead) as uploads,
        pytest.raises(imf.InputError, match="cannot be read"),
    ):
        uploads.take()


def test_a_download_on_the_host_is_the_tensor_itself() -> None:
    value = torch.ones(3)
    assert Download(value)() is value


# arithmetic


def test_workers_compute_on_one_core_each_and_answer_in_order() -> None:
    before = torch.get_num_threads()
    with ComputeThreads() as workers:
        rows = [RowBlock(slice(item, item + 1), (), torch.zeros(1)) for item in range(64)]
        seen = workers.map(lambda part: (part.rows.start, torch.get_num_threads(), threading.get_ident()), rows)
        assert [item for item, _, _ in seen] == list(range(64))
        assert {threads for _, threads, _ in seen} == {1}
        assert threading.get_ident() not in {thread for _, _, thread in seen}
        assert torch.get_num_threads() == before
        with pytest.raises(ZeroDivisionError):
            workers.map(lambda part: 1 // part.rows.start, rows)
        assert workers.map(lambda _: torch.is_grad_enabled(), rows[:2]) == [False, False]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("lines", [(1_000_003,), (3000, 500), (7, 1 << 20), (5, 0)])
def test_parts_cover_the_rows_once(lines: tuple[int, ...]) -> None:
    whole = RowBlock(slice(16, 16 + lines[0]), (), torch.empty(lines))
    with ComputeThreads(1) as workers:
        parts = workers.parts(whole)
    assert [row for part in parts for row in range(part.rows.start, part.rows.stop)] == [*range(16, 16 + lines[0])]
    assert all(part.rows.start % 8 == 0 for part in parts)
    assert [len(part.like) for part in parts] == [part.rows.stop - part.rows.start for part in parts]


# writing


def test_writes_are_done_in_order_and_bounded() -> None:
    done: list[int] = []
    most, waiting, lock = 0, 0, threading.Lock()

    def write(number: int) -> None:
        nonlocal waiting
        time.sleep(0.002)
        done.append(number)
        with lock:
            waiting -= 40

    with WriteBehind(100) as writes:
        for number in range(40):
            writes.put(lambda number=number: write(number), size=40)
            with lock:
                waiting += 40
                most = max(most, waiting)
        writes.drain()
        assert done == list(range(40))
        writes.put(lambda: done.append(-1), size=1000)  # alone, whatever its size
        writes.drain()
    assert done[-1] == -1
    # One whose bytes were given back may not have been counted down yet.
    assert most <= 120
    assert writes.busy_seconds >= 40 * 0.002


def test_rooms_are_filled_while_others_are_written() -> None:
    written: list[int] = []
    with WriteBehind(3 * 4096) as writes:
        assert writes.room(writes.room_bytes + 1) is None
        for number in range(50):
            room = writes.room(4000)
            assert room is not None
            room.fill_(number)

            def write(room: Tensor = room) -> None:
                time.sleep(0.001)
                written.append(int(room.unique()))

            writes.put(write, room=room)
        writes.drain()
    assert written == list(range(50))


def test_a_room_waited_for_comes_to_an_end_when_writing_fails() -> None:
    def fail() -> None:
        time.sleep(0.05)
        raise imf.ResourceError("no space left")

    with WriteBehind(3 * 4096) as writes:
        for _ in range(3):
            room = writes.room(4000)
            assert room is not None
            writes.put(fail, room=room)
        with pytest.raises(imf.ResourceError, match="no space left"):
            writes.room(4000)


def test_a_write_that_fails_stops_the_others_and_is_raised() -> None:
    done = []

    def fail() -> None:
        raise imf.ResourceError("no space left")

    with WriteBehind(1 << 20) as writes:
        writes.put(lambda: done.append(1), size=1)
        writes.put(fail, size=1)
        with pytest.raises(imf.ResourceError, match="no space left"):
            writes.drain()
        for _ in range(3):
            with pytest.raises(imf.ResourceError, match="no space left"):
                writes.put(lambda: done.append(2), size=1)
    assert done == [1]


def test_after_a_failed_write_what_waits_is_freed_and_a_room_tells() -> None:
    started = threading.Event()

    def fail() -> None:
        started.wait()
        raise imf.ResourceError("no space left")

    with WriteBehind(3 * 4096) as writes:
        writes.put(fail, size=1)
        waiting = torch.zeros(8)
        freed = weakref.ref(waiting)
        writes.put(lambda waiting=waiting: None, size=32)
        del waiting
        started.set()
        patience = time.monotonic() + 10.0
        while freed() is not None:  # until the other thread has dropped it
            assert time.monotonic() < patience
            time.sleep(0.001)
        with pytest.raises(imf.ResourceError, match="no space left"):
            writes.room(8)


def test_after_an_error_what_waits_is_not_written() -> None:
    done = []

    def failing() -> None:
        with WriteBehind(1 << 20) as writes:
            writes.put(lambda: time.sleep(0.05), size=1)
            writes.put(lambda: done.append(1), size=1)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert done == []


def test_what_lies_like_the_file_is_written_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    monkeypatch.setattr(
        "isomerge_fast.checkpoint.io.writer.copy_bytes",
        lambda target, source: (copies.append(len(source)), copy_bytes(target, source)),
    )
    value = torch.randint(-9999, 9999, (2 * MIB,), dtype=torch.int16).view(torch.bfloat16)
    contents = []
    for shift in (0, 2):
        outputs = [OutputTensor("w", torch.bfloat16, (2 * MIB,))]
        create_shard(tmp_path / f"at-{shift}", outputs, resume=False)
        writer = ShardWriter(tmp_path / f"at-{shift}", outputs)
        place = writer.position("w", 0) % 4096 + shift
        memory = BufferPool(16 * MIB).take(16 * MIB)
        assert memory is not None
        placed = memory[place : place + value.nbytes].view(torch.bfloat16)
        placed.copy_(value)
        write_tensor(writer, "w", placed)
        if not writer.is_direct:
            pytest.skip("this file system has no direct I/O")
        writer.close(validate=True)
        contents.append((tmp_path / f"at-{shift}").read_bytes())
        assert bool(copies) == bool(shift)
    assert contents[0] == contents[1]


@pytest.mark.parametrize("direct", [False, True])
def test_parts_written_anywhere_make_the_file_that_safetensors_writes(tmp_path: Path, direct: bool) -> None:
    from safetensors.torch import save_file

    tensors = {f"t{index}": torch.randn(size).bfloat16() for index, size in enumerate((3 * MIB + 1, 9, 0, 2 * MIB))}
    outputs = [OutputTensor(name, torch.bfloat16, tuple(value.shape)) for name, value in tensors.items()]
    create_shard(tmp_path / "ours", outputs, resume=False)
    writer = ShardWriter(tmp_path / "ours", outputs, direct=direct)
    for name in reversed(tensors):
        value = tensors[name]
        for first in range(0, max(1, len(value)), MIB):
            writer.write_part(name, value[first : first + MIB], first)
        assert writer.finish(name) == writer.checksum(name)
    writer.close(validate=True)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


# routes


TRAFFIC = Traffic((2, 2, 2), 2, 2)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("method", "shape", "ceiling", "expected"),
    [
        (Mean(), (4096, 4096), None, Rowwise),
        (Mean(), (100,), 100 * MIB, Rowwise),
        (IsoC(), (1024, 1024), None, Resident),
        (IsoC(), (1024, 1024), 200 * MIB, Resident),
        (IsoC(), (8192, 8192), 3 << 30, Streamed),
        (IsoC(), (8192, 8192), 1 << 30, Streamed),  # nothing fits: the least that would do
    ],
)
def test_a_tensor_goes_the_fastest_way_that_fits(
    method: Method, shape: tuple[int, ...], ceiling: int | None, expected: type[Route]
) -> None:
    spec = TensorSpec("w", shape, torch.float32)
    largest = spec.elements * 6
    routes = []
    for budget in budgets_to_try(largest, host=ceiling, vram=None, on_gpu=False):
        routes.append((choose_route(method, spec, PartSizes(TRAFFIC, budget, CPU)), budget))
        route, budget = routes[-1]
        assert budget.read_ahead >= 8 * MIB
        if budget.work is None or route.work_bytes <= budget.work:
            break
    route, budget = routes[-1]
    assert type(route) is expected
    assert [row for part in route.parts() for row in (part.start, part.stop)][-1] == route.view_shape[0]
    assert all(part.start % 8 == 0 for part in route.parts())
    if ceiling and budget.work is not None and route.work_bytes <= budget.work:
        assert budget.read_ahead + budget.write_behind + route.work_bytes <= ceiling


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("route", [Resident, Streamed, Rowwise])
@pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
def test_what_is_read_in_all_is_what_was_planned(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    route: type[Resident] | type[Streamed] | type[Rowwise],
    tasks: int,
) -> None:
    def choose(*given: Any) -> Route:
        found = route.plan(*given)
        assert found is not None
        return found

    monkeypatch.setattr("isomerge_fast.planning.planner.choose_route", choose)
    base, *experts = [
        str(save_folder(tmp_path / str(index), {"w": torch.randn(300, 64)})) for index in range(tasks + 1)
    ]
    planned = make_plan(imf.MergeConfig(base, experts, method=method, out=str(tmp_path / "out")))
    report = run(planned, device="cpu")
    assert report.tensors[0]["route"] == route.name
    assert planned.passed_bytes == report.read_bytes
    assert (planned.passed_bytes > planned.read_bytes) == (route is not Resident)


# a tensor's copies


def planned(tmp_path: Path, route: type[Route]) -> tuple[Plan, TensorPlan, list[dict[str, Tensor]]]:
    """A plan of one 300 x 64 matrix that goes by ``route``."""
    models = [{"w": torch.randn(300, 64, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    base, *experts = [str(save_folder(tmp_path / str(index), model)) for index, model in enumerate(models)]
    plan = make_plan(imf.MergeConfig(base, experts, method="iso-c"))
    (tensor,) = plan.tensors
    return plan, replace(tensor, route=route((300, 64), 56, tensor.method, 0)), models


@contextmanager
def source_of(plan: Plan, tensor: TensorPlan, device: torch.device = CPU) -> Iterator[FileSource]:
    # What comes next must not be taken by this tensor.
    after = bundle_of(tensor, slice(0, 8), [0])
    with (
        Reader(files_of(plan.base, *plan.experts)) as reader,
        ThreadPoolExecutor(2) as threads,
        ReadAhead(reader, threads, [*first_pass(tensor), after], budget_bytes=1 << 20) as ahead,
        Uploads(ahead, CPU, copied=True) as uploads,
        ComputeThreads() as workers,
    ):
        source = FileSource(
            tensor, uploads, reader, threads, workers, Budget(1 << 20, None), device, lambda _: nullcontext()
        )
        yield source
        rest = uploads.take()
        assert [tuple(value.shape) for value in rest] == [(8, 64), (8, 64)]


@pytest.mark.parametrize("route", [Resident, Streamed])
def test_a_source_gives_the_same_deltas_by_every_route_and_as_often_as_wanted(
    tmp_path: Path, route: type[Route]
) -> None:
    plan, tensor, (base, *experts) = planned(tmp_path, route)
    deltas = [expert["w"] - base["w"] for expert in experts]
    with source_of(plan, tensor) as source:
        for _ in range(2):
            found = source.sum(torch.float64)
            torch.testing.assert_close(found.total, deltas[0].double() + deltas[1].double())
            torch.testing.assert_close(found.squares, torch.stack([delta.double().square().sum() for delta in deltas]))
        for task in (1, 0):
            assert torch.equal(source.delta(task), deltas[task])
        rows = [(block.rows, block.like.clone()) for block in source.blocks(())]
        assert torch.equal(torch.cat([value for _, value in rows]), base["w"])
        assert [part.start for part, _ in rows] == ([0] if route is Resident else list(range(0, 300, 56)))
    once = 3 * 300 * 64 * 4
    assert source.read_bytes == (once if route is Resident else 2 * once + 5 * once // 3)


@pytest.mark.parametrize("route", [Resident, Streamed])
@pytest.mark.parametrize("taken", [0, 1])
def test_a_source_starts_over(tmp_path: Path, route: type[Route], taken: int) -> None:
    """Whenever a device's memory was full: before anything was taken, or after the first part."""
    plan, tensor, (base, *experts) = planned(tmp_path, route)
    with source_of(plan, tensor) as source:
        if taken:
            blocks = source.blocks()
            next(blocks)
        source.start_over()
        found = source.sum(torch.float64).total
        torch.testing.assert_close(found, sum((expert["w"] - base["w"]).double() for expert in experts))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "mean", "stochastic_rounding": 3},
        {"method": "task-arithmetic", "scaling": [0.5, 1.0], "save_delta": True, "dtype": "float32"},
        {"method": "iso-c", "scaling": [0.5, 1.0]},
        {"method": "iso-cts", "stochastic_rounding": 1, "save_delta": True},
    ],
    ids=lambda options: options["method"],
)
def test_the_size_of_parts_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    models = [
        {
            "matrix": torch.randn(200, 72, generator=torch.Generator().manual_seed(seed)).bfloat16(),
            "vector": torch.randn(5003, generator=torch.Generator().manual_seed(10 + seed)).bfloat16(),
            "integers": torch.arange(3000),
        }
        for seed in range(4)
    ]
    base, *experts = [save_folder(tmp_path / str(index), model) for index, model in enumerate(models)]
    config = {"base": base, "experts": experts, **options}
    plans = {}
    for name, part_elements, read_ahead in (
        ("large", 1 << 18, 128 << 20),
        ("shared-out", 576, 128 << 20),
        ("small", 576, 4096),
    ):
        monkeypatch.setattr("isomerge_fast.execution.threads.PART_ELEMENTS", part_elements)
        monkeypatch.setattr("isomerge_fast.planning.budget.READ_AHEAD_BYTES", read_ahead)
        monkeypatch.setattr("isomerge_fast.planning.budget.LEAST_READ_AHEAD_BYTES", read_ahead)
        monkeypatch.setattr("isomerge_fast.planning.budget.RESIDENT_SHARE", 0)
        plans[name] = make_plan(imf.MergeConfig(str(base), [str(expert) for expert in experts], method="iso-c"))
        imf.merge({**config, "out": tmp_path / name})
    assert {type(tensor.route) for tensor in plans["large"].tensors} == {Copied, Rowwise, Resident}
    assert {type(tensor.route) for tensor in plans["small"].tensors} == {Copied, Rowwise, Streamed}
    assert all(len(list(tensor.route.parts())) > 5 for tensor in plans["small"].tensors)
    for path in (tmp_path / "large").rglob("*.safetensors"):
        for name in ("shared-out", "small"):
            other = tmp_path / name / path.relative_to(tmp_path / "large")
            assert path.read_bytes() == other.read_bytes()
    if "save_delta" in options:  # by which ``apply`` knows the base
        expected = {}
        for name, value in models[0].items():
            running = Checksum()
            running.update(tensor_bytes(value))
            expected[name] = running.text
        for name in plans:
            assert json.loads((tmp_path / name / MANIFEST_FILE).read_bytes())["base"] == expected
