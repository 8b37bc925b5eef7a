"""Write checkpoints of which only the headers exist, to plan models of any size without their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from benchmarks.shapes import Shapes
from isomerge_fast.checkpoint.io.writer import OutputTensor, file_layout


def shards_of(shapes: Shapes, shard_bytes: int) -> dict[str, list[str]]:
    """Return the names of bf16 tensors by the file that holds them; a file holds ``shard_bytes`` or one tensor."""
    shards: list[list[str]] = [[]]
    spent = 0  # on the last shard
    for name, shape in shapes.items():
        if shards[-1] and spent + 2 * prod(shape) > shard_bytes:
            shards.append([])
            spent = 0
        shards[-1].append(name)
        spent += 2 * prod(shape)
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": names for number, names in enumerate(shards, 1)}


def write_index(folder: Path, shards: Mapping[str, list[str]]) -> None:
    """Write the index that says which file holds which tensor."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_headers(folder: Path, shapes: Shapes, shard_bytes: int = 5 << 30) -> Path:
    """Write a sharded bf16 checkpoint of sparse files, which has everything but the data."""
    folder.mkdir()
    shards = shards_of(shapes, shard_bytes)
    for file, names in shards.items():
        tensors = [OutputTensor(name, torch.bfloat16, shapes[name]) for name in names]
        prefix, placed = file_layout(folder / file, tensors)
        with open(folder / file, "wb") as opened:
            opened.write(prefix)
            opened.truncate(max(tensor.end for tensor in placed.values()))
    write_index(folder, shards)
    return folder
