"""Describe the machine that figures come from."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from isomerge_fast.bench.ceilings import device_name, installed

PACKAGES = ("isomerge-fast", "torch", "numpy", "triton", "safetensors", "fusion-bench", "mergekit", "pytest-benchmark")


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "numpy_blas": _numpy_blas(),
    }


def _numpy_blas() -> str:
    """Return numpy's BLAS, with the kernel that it chose for this processor where threadpoolctl is there to ask."""
    import numpy as np

    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return f"of numpy {np.__version__}, threadpoolctl is not installed"
    pools = [pool for pool in threadpool_info() if "numpy" in pool["filepath"]]
    return ", ".join(f"{pool['internal_api']} {pool['version']} ({pool.get('architecture')})" for pool in pools)
