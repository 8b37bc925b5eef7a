"""GPUs that are not there, described."""

from __future__ import annotations

from isomerge_kernels.devices import DeviceTraits

A100 = DeviceTraits(True, (8, 0), 80 << 30)
H100 = DeviceTraits(True, (9, 0), 80 << 30)
# Of NVIDIA's, without tensor cores for float64.
RTX5090 = DeviceTraits(True, (12, 0), 32 << 30)
