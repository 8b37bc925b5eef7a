"""Name the methods that are measured, and the matrices that everything is measured on."""

from __future__ import annotations

from collections import Counter

from benchmarks.shapes import MODELS, shape_of

Shape = tuple[int, int]
NAMES = ("iso-c", "iso-cts")
TASKS = 8
# q and o, k and v, gate and up, down.
LLAMA = tuple(shape_of(f"Llama-3-8B {name}_proj") for name in ("q", "k", "gate", "down"))
VIT = (shape_of("ViT-B/32 q_proj"), shape_of("ViT-B/32 fc1"), shape_of("ViT-B/32 fc2"))
# What stacks are for.
STACKED = (*VIT, LLAMA[1])
# How often the vision tower of ViT-B/32 has a matrix of each shape: 48 of 768 x 768, 12 of each of the other two.
VIT_MATRICES: Counter[Shape] = Counter((rows, columns) for rows, columns in MODELS["vit-b/32"]().values())
SMALL: tuple[Shape, ...] = ((96, 96), (160, 64))
