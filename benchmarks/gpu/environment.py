"""Describe a machine: its GPU, its releases, its memory."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from typing import Any

import torch

import isomerge_fast
from benchmarks.harness.readings import Rows
from isomerge_fast.bench.ceilings import device_name, installed

# What is asked of nvidia-smi; its "name" is that of the GPU.
QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,"
    "mig.mode.current,persistence_mode,clocks_event_reasons.active"
)
PINNED_BYTES = 4 << 30
PACKAGES = ("torch", "triton", "numpy", "safetensors", "xxhash", "fusion-bench")
CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def device(rows: Rows) -> None:
    """Name the device, which has to be there."""
    torch.zeros(1, device=rows.device)
    rows.note(device_name(torch.device(rows.device)))


def environment(rows: Rows) -> None:
    """Note releases, the GPU and its clocks, what /dev/shm holds, how long pinned memory takes."""
    own = {"isomerge": isomerge_fast.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    releases = {**{name: installed(name) for name in PACKAGES}, "cupy": installed(*CUPY)}
    rows.note("versions", **own, **{name: release or "absent" for name, release in releases.items()})
    shared = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    rows.note(
        "machine",
        processors=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        dev_shm_bytes=shared and shared.total,
        dev_shm_free_bytes=shared and shared.free,
        temporary_free_bytes=shutil.disk_usage("/tmp").free,
    )
    if torch.device(rows.device).type != "cuda":
        return
    properties = torch.cuda.get_device_properties(rows.device)
    rows.note(
        "gpu",
        capability=f"{properties.major}.{properties.minor}",
        memory_bytes=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
    )
    if torch.version.hip is None:
        rows.attempt("nvidia-smi", _queried)
    rows.attempt("pinned memory", _pinned)


def _queried() -> dict[str, Any]:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    values = answer.stdout.splitlines()[0].split(", ") if answer.returncode == 0 else []
    if len(values) != len(QUERY.split(",")):  # an older driver lacks one: what it says by itself
        answer = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=10)
        return {"said": answer.stdout.splitlines()[:20]}
    return dict(zip(("gpu", *QUERY.split(",")[1:]), values, strict=True))


def _pinned() -> dict[str, Any]:
    start = time.perf_counter()
    torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    seconds = time.perf_counter() - start
    return {"bytes": PINNED_BYTES, "seconds": seconds, "gb_per_s": PINNED_BYTES / seconds / 1e9}
