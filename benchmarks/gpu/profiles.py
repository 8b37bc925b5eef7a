"""Say where the time of a call goes: operations on the device, launches, and how busy the device is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from isomerge_fast.bench.ceilings import synchronise, timed

PROFILED_OPERATIONS = 20


def profiled(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Return the operations that take longest: (name, calls, milliseconds on the device).

    ``device_ms`` is all of them, ``busy`` that as a share of a call's time without the profiler; in the rest of it the
    device waits for the host.
    """
    call()
    _, seconds = timed(call, device)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *((ProfilerActivity.CUDA,) if on_gpu else ())]
    with profile(activities=activities) as found:
        call()
        synchronise(device)
    kind, key = ("CUDA", "self_device_time_total") if on_gpu else ("CPU", "self_cpu_time_total")
    averages = sorted(found.key_averages(), key=lambda entry: getattr(entry, key), reverse=True)
    own = [entry for entry in averages if entry.device_type.name == kind]  # not what launched them, too
    top = [(entry.key[:60], entry.count, getattr(entry, key) / 1e3) for entry in own[:PROFILED_OPERATIONS]]
    assert top or not on_gpu, "the profiler saw nothing of the GPU"
    launches = sum(entry.count for entry in averages if "LaunchKernel" in entry.key)
    waits = sum(entry.count for entry in averages if "Synchronize" in entry.key)
    device_ms = sum(getattr(entry, key) for entry in own) / 1e3
    counted = {"launches": launches, "waits": waits, "device_ms": device_ms, "busy": device_ms / 1e3 / seconds}
    return counted | {"operations": top}
