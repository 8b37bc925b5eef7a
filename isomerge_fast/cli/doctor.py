"""Find out what this machine offers, and whether merges on it are right."""

from __future__ import annotations

import platform
import shutil
from typing import Any

import torch

from .. import __version__
from ..bench.ceilings import installed
from ..bench.problems import relative_error
from ..linalg.cusolver import describe_eigensolvers
from ..machine import describe_cpus, describe_memory
from ..methods import METHODS, MemoryDeltas
from ..ops import torch_threads

_PACKAGES = (
    "torch",
    "triton",
    "cupy-cuda13x",
    "numpy",
    "safetensors",
    "transformers",
    "peft",
    "mergekit",
    "fusion-bench",
)
_TASKS, _ROWS, _COLUMNS = 4, 200, 260
_ALLOWED = 1e-5


def examine() -> dict[str, Any]:
    """Return versions, devices and memory, and check every method on every device against float64 full SVDs.

    ``healthy`` is whether all checks are right.
    """
    versions = {"isomerge-fast": __version__, "python": platform.python_version()}
    versions |= {package: installed(package) or "not installed" for package in _PACKAGES}
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu threads": torch.get_num_threads(),
        "usable cpus": describe_cpus(),
        "eigenvectors by": describe_eigensolvers(torch.device("cpu")),
        "memory": describe_memory(),
        "free disk here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
    }
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices[1:]:
        properties = torch.cuda.get_device_properties(device)
        machine[device] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if len(devices) == 1:
        machine["cuda"] = "none; merges run on the CPU"
    with torch_threads(1):  # as merges compute: a matrix a core
        checks = [_check(name, device) for device in devices for name in METHODS]
    healthy = all(check["ok"] for check in checks)
    return {"versions": versions, "machine": machine, "checks": checks, "healthy": healthy}


def _check(name: str, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(_ROWS, _COLUMNS, generator=generator, device="cpu") for _ in range(_TASKS)]
    method = METHODS[name]()
    value, _ = method.merge(MemoryDeltas([delta.to(device) for delta in deltas]))
    expected, _ = method.exact().merge(MemoryDeltas([delta.double() for delta in deltas]))
    error = relative_error(value.cpu(), expected)
    return {"method": name, "device": device, "error": error, "ok": error <= _ALLOWED}
