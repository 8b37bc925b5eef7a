"""Time reading and writing of safetensors files: ours, the safetensors library, and the disk alone.

``cold`` files are put out of the page cache before every call. Written files are on the disk (fsync) when a call ends.
The disk alone is the better of reading or writing the same bytes in blocks of 4 MiB past the page cache or through it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness.rows import OURS, Problem, Row, scratch
from isomerge_fast.bench.ceilings import forget, read_blocks, write_blocks
from isomerge_fast.checkpoint.io.direct_io import open_direct
from isomerge_fast.checkpoint.io.read_ahead import THREADS, Bundle, ReadAhead
from isomerge_fast.checkpoint.io.reader import Reader, files_of, whole
from isomerge_fast.checkpoint.io.writer import OutputTensor, ShardWriter, create_shard
from isomerge_fast.checkpoint.layout import open_checkpoint

SAFETENSORS, LOAD_FILE = "safetensors", "safetensors-load-file"
DISK = {"disk-direct": True, "disk-buffered": False}
MIB = 1 << 20
SIDES = {"tiny": 64, "short": 3072, "full": 8192}
TENSORS = 16  # of bf16, [side, side] each


def tensors_of(side: int) -> dict[str, Tensor]:
    """Return the tensors of a file: random, so that no file system can compress them, and alike but for a roll."""
    pool = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).bfloat16()
    return {f"layers.{index}.weight": pool.roll(index, 0) for index in range(TENSORS)}


def reading(level: str, cold: bool, device: torch.device) -> Problem:
    """Return the benchmark of reading a safetensors file by us, by safetensors and without a format.

    ``level`` is a key of ``SIDES``, which has the sizes. A ``cold`` file is dropped from the page cache before every
    call; a warm one is read from there.
    """
    side = SIDES[level]
    file = scratch() / f"io-{side}.safetensors"
    if not file.exists():
        save_file(tensors_of(side), file)

    def ours() -> dict[str, float]:
        checkpoint = open_checkpoint(file)
        bundles = [Bundle((whole(stored),)) for stored in checkpoint.tensors.values()]
        seen = {}
        with (
            Reader(files_of(checkpoint)) as reader,
            ThreadPoolExecutor(THREADS) as threads,
            ReadAhead(reader, threads, bundles, budget_bytes=64 * MIB) as ahead,
        ):
            for name in checkpoint.tensors:
                (tensor,) = ahead.take()
                seen[name] = touched(tensor)
        return seen

    def by_tensor() -> dict[str, float]:
        with safe_open(file, "pt") as opened:
            return {name: touched(opened.get_tensor(name)) for name in opened.offset_keys()}

    def at_once() -> dict[str, float]:
        return {name: touched(tensor) for name, tensor in load_file(file).items()}

    expected = by_tensor()
    calls: dict[str, Callable[[], Any]] = {OURS: ours, SAFETENSORS: by_tensor, LOAD_FILE: at_once}
    for name, direct in DISK.items():
        calls[name] = partial(read_blocks, [file], direct=direct)
    return Problem(
        calls,
        lambda found: float(found != expected) if isinstance(found, dict) else None,
        {OURS: 0.0, SAFETENSORS: 0.0, LOAD_FILE: 0.0},
        file.stat().st_size,
        is_counted=False,
        before=partial(forget, [file]) if cold else calls["disk-buffered"],
        absent=without_direct_io(file),
    )


def without_direct_io(file: Path) -> dict[str, str]:
    """Return {contender: why it takes no part} where the file system, such as a tmpfs, has no direct I/O."""
    descriptor = open_direct(file, os.O_RDONLY)
    if descriptor is None:
        return {"disk-direct": "disk-direct: no direct I/O in the temporary folder; TMPDIR names another"}
    os.close(descriptor)
    return {}


def touched(tensor: Tensor) -> float:
    """Return the sum of one number in 32 bytes, which reads every page: a mapped file is read only then."""
    return tensor.view(-1)[::16].double().sum().item()


def writing(level: str, device: torch.device) -> Problem:
    side = SIDES[level]
    tensors = tensors_of(side)
    outputs = [OutputTensor(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in tensors.items()]
    folder = scratch() / f"written-{side}"
    folder.mkdir(exist_ok=True)

    def ours() -> Path:
        path = folder / "ours.safetensors"
        create_shard(path, outputs, resume=False)
        writer = ShardWriter(path, outputs)
        for name, tensor in tensors.items():
            writer.write_part(name, tensor, 0)
            writer.finish(name)
        writer.close(validate=True)
        return path

    def library() -> Path:
        path = folder / "library.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return path

    expected = library().read_bytes()

    def error(found: Any) -> float | None:
        return float(found.read_bytes() != expected) if isinstance(found, Path) else None

    def clear() -> None:
        for path in folder.iterdir():
            path.unlink()

    size = len(expected)
    calls: dict[str, Callable[[], Any]] = {OURS: ours, SAFETENSORS: library}
    for name, direct in DISK.items():
        calls[name] = partial(write_blocks, folder, [size], direct=direct)
    bars = {OURS: 0.0, SAFETENSORS: 0.0}
    absent = without_direct_io(folder / "library.safetensors")
    close = partial(shutil.rmtree, folder, True)
    return Problem(calls, error, bars, size, is_counted=False, before=clear, absent=absent, close=close)


def rows() -> Iterator[Row]:
    """Yield the rows of reading cached and cold files, and of writing."""
    for level, side in SIDES.items():
        size = f"{TENSORS * 2 * side**2 / 1e9:.2g} GB"
        for cold in (False, True):
            name = f"read {'cold' if cold else 'cached'} {size}"
            contenders = (OURS, SAFETENSORS, LOAD_FILE, *(DISK if cold else ["disk-buffered"]))
            yield Row(name, contenders, partial(reading, level, cold), level)
        yield Row(f"write {size}", (OURS, SAFETENSORS, *DISK), partial(writing, level), level)


ROWS = [*rows()]
