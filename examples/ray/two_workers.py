"""Merge in one process and by two workers of a Ray cluster on this machine: the same bytes, in less time.

    python two_workers.py [folder] [--layers 12] [--method iso-c]

The base and its four experts are made-up Llamas (of 162 M parameters, 1.6 GB in all, with 12 layers); put your own
folders in their place. Needs: pip install 'isomerge-fast[ray]'.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path

import ray
import torch
from safetensors.torch import save_file

import isomerge_fast as imf

WIDTH, INNER, VOCABULARY, EXPERTS, WORKERS = 768, 3072, 32_000, 4, 2


def make_llama(folder: Path, layers: int, seed: int) -> Path:
    """Make random weights under a Llama's names, in one file for each half of the layers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)

    def layer(index: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{index}."
        attention = {f"{prefix}self_attn.{name}_proj.weight": random(WIDTH, WIDTH) for name in "qkvo"}
        mlp = {f"{prefix}mlp.{name}_proj.weight": random(INNER, WIDTH) for name in ("gate", "up")}
        norms = {f"{prefix}{name}_layernorm.weight": random(WIDTH) for name in ("input", "post_attention")}
        return attention | mlp | {f"{prefix}mlp.down_proj.weight": random(WIDTH, INNER)} | norms

    folder.mkdir(parents=True, exist_ok=True)
    tokens = {"model.embed_tokens.weight": random(VOCABULARY, WIDTH), "lm_head.weight": random(VOCABULARY, WIDTH)}
    weight_map = {}
    for part, indices in enumerate((range(layers // 2), range(layers // 2, layers)), 1):
        file = f"model-{part:05d}-of-00002.safetensors"
        tensors = {name: tensor for index in indices for name, tensor in layer(index).items()}
        name, table = tokens.popitem()
        save_file({name: table, **tensors}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys([name, *tensors], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Return the hashes of all files but the report, which holds times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "report.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--method", default="iso-c")
    given = parser.parse_args()
    root = given.folder or Path(tempfile.mkdtemp())
    base, *experts = [make_llama(root / f"llama-{seed}", given.layers, seed) for seed in range(EXPERTS + 1)]
    config = {"base": base, "experts": experts, "method": given.method, "scaling": 0.3}

    threads = max(1, (os.cpu_count() or 1) // WORKERS)
    started = time.perf_counter()
    alone = imf.merge({**config, "out": root / "alone"}, threads=threads, overwrite=True)
    alone_seconds = time.perf_counter() - started
    print(f"one process, {threads} thread(s): {alone_seconds:.1f} s")

    ray.init(num_cpus=WORKERS * threads, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    started = time.perf_counter()
    shared = imf.merge({**config, "out": root / "shared"}, threads=threads, ray=True, overwrite=True)
    shared_seconds = time.perf_counter() - started
    ray.shutdown()
    print(
        f"{len(shared.workers)} workers of {threads} thread(s): {shared_seconds:.1f} s "
        f"({alone_seconds / shared_seconds:.2f} times as fast), evenly busy to {shared.balance:.0%}"
    )
    for worker in shared.workers:
        print(
            f"  worker {worker['pid']}: {worker['units']} units, {worker['tensors']} tensors, {worker['seconds']:.1f} s"
        )
    same = digests(root / "alone") == digests(root / "shared")
    print(f"{len(alone.tensors)} tensors, the same bytes: {'yes' if same else 'NO'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
