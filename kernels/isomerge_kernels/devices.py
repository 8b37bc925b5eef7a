"""Describe a device to the rules that choose solvers, sizes and precisions; the one place that asks torch for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Elements that a product or a pass takes at once on a GPU: 256 MiB in float64. Its launches cost more than its caches
# give: 14336 x 4096 in blocks for a CPU's cache are 56 products where two do. (H200, Iso-CTS of that shape, ms:
# 416 with 2^22, 367 with this, 374 with 2^28.)
GPU_BLOCK_ELEMENTS = 1 << 25

# A100 and H100 multiply float64 on their tensor cores, at the rate of float32 without them.
FLOAT64_TENSOR_CORES = ((8, 0), (9, 0))
# From Ampere on.
BFLOAT16_TENSOR_CORES = (8, 0)


@dataclass(frozen=True)
class DeviceTraits:
    """Describe a device as far as rules depend on it.

    What is free of the memory is no trait: it changes from run to run, and a rule that followed it would change the
    bytes of a merge with it.
    """

    is_gpu: bool  # NVIDIA's or AMD's
    capability: tuple[int, int] | None = None  # NVIDIA's compute capability; None elsewhere
    memory_bytes: int = 0  # of the whole GPU; 0 on a CPU
    name: str = ""  # the GPU's model, by which libraries choose; empty on a CPU

    @property
    def has_float64_tensor_cores(self) -> bool:
        return self.capability in FLOAT64_TENSOR_CORES

    @property
    def has_bfloat16_tensor_cores(self) -> bool:
        return self.capability is not None and self.capability >= BFLOAT16_TENSOR_CORES

    def block_elements(self, on_cpu: int) -> int:
        """Return how many elements a product or a pass takes at once: ``on_cpu``, or as many as fill a GPU."""
        return GPU_BLOCK_ELEMENTS if self.is_gpu else on_cpu


CPU = DeviceTraits(is_gpu=False)
# By device. What is put here is not asked for: tests describe GPUs that are not there.
KNOWN: dict[torch.device, DeviceTraits] = {}


def traits_of(device: torch.device) -> DeviceTraits:
    """Return what is known of a device, asking torch the first time."""
    if device not in KNOWN:
        KNOWN[device] = _ask(device)
    return KNOWN[device]


def indexed(device: torch.device) -> torch.device:
    """Return the device with its number, as torch's memory functions want it: the current GPU where none is given."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _ask(device: torch.device) -> DeviceTraits:
    if device.type != "cuda":  # which AMD's are too
        return CPU
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor) if torch.version.hip is None else None
    return DeviceTraits(True, capability, properties.total_memory, properties.name)
