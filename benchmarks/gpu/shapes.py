"""Methods that are measured, and the matrices that everything is measured on."""

from __future__ import annotations

import torch

Shape = tuple[int, int]
NAMES = ("iso-c", "iso-cts")
TASKS = 8
# q and o, k and v, gate and up, down of Llama-3-8B.
LLAMA: tuple[Shape, ...] = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
VIT: tuple[Shape, ...] = ((768, 768), (3072, 768))
SMALL: tuple[Shape, ...] = ((96, 96), (160, 64))
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def named(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
