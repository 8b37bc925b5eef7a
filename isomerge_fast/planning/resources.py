"""Check that a planned merge fits into memory and onto the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from ..checkpoint.output.staging import staged_bytes
from ..errors import ResourceError
from .plan import Plan


def check_resources(plan: Plan, *, max_ram: int | None, max_vram: int | None, device: torch.device) -> None:
    """Raise ResourceError where the working set exceeds a ceiling, or the output its disk, naming what is needed."""
    on_gpu = device.type == "cuda"
    needed = plan.host_buffer_bytes if on_gpu else plan.peak_ram_bytes
    if max_ram is not None and needed > max_ram:
        raise ResourceError(_too_low("max_ram", max_ram, needed, plan))
    if max_vram is not None and on_gpu and plan.peak_vram_bytes > max_vram:
        raise ResourceError(_too_low("max_vram", max_vram, plan.peak_vram_bytes, plan))
    if max_vram is None and on_gpu and plan.peak_vram_bytes > plan.device_bytes:
        largest = max(plan.tensors, key=lambda tensor: tensor.route.work_bytes)
        raise ResourceError(
            f"{device}: {plan.device_bytes} bytes of its memory can be used, the merge takes {plan.peak_vram_bytes} "
            f"(of tensor {largest.name!r} {list(largest.spec.shape)}); --device cpu merges without it"
        )
    if plan.config.out is not None:
        folder = Path(os.path.realpath(plan.config.out)).parent
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free + staged_bytes(Path(plan.config.out))
        if plan.write_bytes > free:
            raise ResourceError(f"{folder}: {free} bytes are free, the output takes {plan.write_bytes}")


def _too_low(option: str, given: int, needed: int, plan: Plan) -> str:
    largest = max(plan.tensors, key=lambda tensor: tensor.route.work_bytes)
    held = (
        f", what is held of {len(plan.tensors)} tensors beside their bytes {plan.metadata_bytes}"
        if option == "max_ram" and plan.metadata_bytes
        else ""
    )
    return (
        f"{option} is {given} bytes; the smallest that would do is {needed} "
        f"(tensor {largest.name!r} {list(largest.base.shape)} takes {largest.route.work_bytes} of it{held})"
    )
