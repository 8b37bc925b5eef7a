"""Files to files: a whole merge against mergekit, and against what the disk and the arithmetic alone take.

    python -m benchmarks.streaming [--folder DIR] [--rows mergekit,floor,…] [--rounds 3] [--mergekit PATH] [--out JSON]

``mergekit``  task arithmetic of 4 experts of 162 M parameters in bf16 under 600 MiB, start-up included, in turn with
              ``mergekit-yaml`` on the same files; outputs compared.
``floor``     the mean of 2 experts of 2 B parameters in bf16 under 1 GiB (12 GB in, 4 GB out), in turn with reading
              those bytes and writing those bytes, and with the arithmetic alone. The inputs are put out of the page
              cache before each reading.
``embedding`` Iso-C and Iso-CTS of one 128256 x 8192 matrix, 2 experts in bf16 under 4 GiB (5 minutes on 2 cores for
              Iso-C, several times that for Iso-CTS).
``gpu``       Iso-C of 4 experts of 8B-parameter shapes (four layers and both token tables) under 8 GiB of GPU memory;
              put --folder on a tmpfs.

Every figure is the median over rounds. Needs 20 GB in --folder for ``floor``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from isomerge_fast import ops
from isomerge_fast.bench.ceilings import device_name, forget, read_all, write_all
from isomerge_fast.workers import Workers, parts_of

MIB = 1 << 20
SHARD_BYTES = 2 << 30
SCALING = 0.3  # of task arithmetic


def llama_shapes(width: int, inner: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama without grouped queries, as Hugging Face stores them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


SMALL = llama_shapes(768, 3072, 12, 32_000)  # 162 M parameters
LARGE = llama_shapes(2560, 10_240, 18, 32_000)  # 2.05 B
EMBEDDING = {"model.embed_tokens.weight": (128_256, 8192)}
EIGHT_BILLION = llama_shapes(4096, 14_336, 4, 128_256)


def make_checkpoint(folder: Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> Path:
    """bf16 weights in shards of 2 GB: random numbers that all seeds share, and a tenth of others."""
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shared, own = (torch.randn(1 << 25, generator=torch.Generator().manual_seed(number)) for number in (0, 1 + seed))
    pool = (0.02 * (shared + 0.1 * own)).bfloat16()
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled + 2 * prod(shape) > SHARD_BYTES and filled:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * prod(shape)
    weight_map, turn = {}, 0
    for number, names in enumerate(shards, 1):
        file, tensors = f"model-{number:05}-of-{len(shards):05}.safetensors", {}
        for name in names:
            turn += 7919
            count = prod(shapes[name])
            tensors[name] = pool.roll(turn).repeat(-(-count // len(pool)))[:count].reshape(shapes[name])
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    width, vocabulary = shapes["model.embed_tokens.weight"][1], shapes["model.embed_tokens.weight"][0]
    inner = next((shape[0] for name, shape in shapes.items() if "gate_proj" in name), 4 * width)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "num_hidden_layers": sum("q_proj" in name for name in shapes),
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    index_file.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def family(root: Path, name: str, shapes: Mapping[str, tuple[int, ...]], tasks: int) -> list[Path]:
    """The base and its experts."""
    return [make_checkpoint(root / name / str(seed), shapes, seed) for seed in range(tasks + 1)]


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# A process between this one and the one measured: a child's peak starts with that of the process it was forked from.
MEASURED = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
outcome = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
seconds = time.perf_counter() - started
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024, "output": outcome.stdout}))
sys.exit(outcome.returncode)
"""


def measured(command: Sequence[str | Path]) -> dict[str, Any]:
    """Wall time and peak memory of a process, from outside."""
    words = [sys.executable, "-c", MEASURED, *map(str, command)]
    outcome = subprocess.run(words, capture_output=True, text=True)
    if outcome.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{outcome.stdout}{outcome.stderr}")
    return json.loads(outcome.stdout.splitlines()[-1])


def merged(models: Sequence[Path], out: Path, *options: str) -> dict[str, Any]:
    """``isomerge run`` as a user starts it, with its report."""
    shutil.rmtree(out, ignore_errors=True)
    command: list[str | Path] = [sys.executable, "-m", "isomerge_fast.cli", "run", "--base", models[0], "--out", out]
    for expert in models[1:]:
        command += ["--expert", expert]
    found = measured([*command, *options, "--format", "json"])
    return {**found, "report": json.loads(found.pop("output"))}


def shares(report: Mapping[str, Any]) -> dict[str, float]:
    """Of the merge's time, by what its main thread did."""
    seconds = report["seconds"]
    return {key: seconds[key] / seconds["total"] for key in ("read", "compute", "write")}


def against_mergekit(root: Path, rounds: int, mergekit: str) -> Iterator[dict[str, Any]]:
    """One row for arithmetic in bf16, as its examples have it, and one for arithmetic in float32, which is ours."""
    models = family(root, "llama-162m", SMALL, 4)
    ours, theirs = root / "ours", root / "theirs"
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(models[0]),
        "models": [{"model": str(model), "parameters": {"weight": SCALING}} for model in models[1:]],
        "parameters": {"normalize": False},
        "out_dtype": "bfloat16",
    }
    options = ("--method", "task-arithmetic", "--scaling", str(SCALING), "--max-ram", "600MiB")
    for dtype in ("bfloat16", "float32"):
        (root / "mergekit.yml").write_text(json.dumps({**recipe, "dtype": dtype}))
        pairs = []
        for _ in range(rounds):
            shutil.rmtree(theirs, ignore_errors=True)
            peer = measured([mergekit, root / "mergekit.yml", theirs, "--no-copy-tokenizer"])
            pairs.append((merged(models, ours, *options), peer))
        yield {
            "row": f"mergekit/{dtype}",
            "seconds": statistics.median(our["seconds"] for our, _ in pairs),
            "mergekit_seconds": statistics.median(peer["seconds"] for _, peer in pairs),
            "ratio": statistics.median(our["seconds"] / peer["seconds"] for our, peer in pairs),
            "peak_bytes": max(our["peak_bytes"] for our, _ in pairs),
            "ceiling_bytes": 600 * MIB,
            "mergekit_peak_bytes": max(peer["peak_bytes"] for _, peer in pairs),
            **difference(models, ours, theirs),
        }


def difference(models: Sequence[Path], ours: Path, theirs: Path) -> dict[str, Any]:
    """Errors of two task arithmetics against float64, relative to the weights; and of all entries the most by which the
    two differ, in roundings to bf16 of |θ₀| + α Σ |Δ_t|.
    """

    def opened(folder: Path) -> dict[str, Any]:
        files = [safe_open(file, "pt") for file in weights(folder)]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118

    sources = [opened(folder) for folder in (*models, ours, theirs)]
    squares = torch.zeros(3, dtype=torch.float64)
    differ, most = 0, 0.0
    for name in sources[0]:
        base, *experts, mine, other = (source[name].get_tensor(name).double() for source in sources)
        exact, size = base.clone(), base.abs()
        for expert in experts:
            exact.add_(expert - base, alpha=SCALING)
            size.add_((expert - base).abs(), alpha=SCALING)
        squares += torch.stack([(mine - exact).square().sum(), (other - exact).square().sum(), exact.square().sum()])
        apart = (mine - other).abs()
        differ += int((apart > 0).sum())
        most = max(most, float((apart / size.clamp_min(1e-30)).max()) / torch.finfo(torch.bfloat16).eps)
    error, peer_error = (squares[:2] / squares[2]).sqrt().tolist()
    return {"error": error, "mergekit_error": peer_error, "entries_that_differ": differ, "most_roundings_apart": most}


def arithmetic(elements: int, tasks: int) -> float:
    """Seconds of a mean's passes over so many elements in memory, as the engine shares them out."""
    block = 1 << 22
    base, *experts = [torch.full((block,), 0.5 + index, dtype=torch.bfloat16) for index in range(tasks + 1)]
    out = torch.empty_like(base)

    def merge(rows: slice) -> None:
        total = ops.task_sum([expert[rows] for expert in experts], base[rows]).total
        out[rows] = ops.apply_delta(base[rows], total.div_(tasks), scalings=[1.0], dtype=torch.bfloat16)[0]

    with Workers() as workers:
        parts = parts_of(slice(0, block), (block,))
        workers.map(merge, parts)
        started = time.perf_counter()
        for _ in range(-(-elements // block)):
            workers.map(merge, parts)
        return time.perf_counter() - started


def against_the_floor(root: Path, rounds: int) -> Iterator[dict[str, Any]]:
    models = family(root, "llama-2b", LARGE, 2)
    files = [file for model in models for file in weights(model)]
    sizes = [file.stat().st_size for file in weights(models[0])]
    seen: list[dict[str, float]] = []
    for _ in range(rounds):
        reading = min(read_all(files, direct=direct) for direct in (True, False))
        writing = min(write_all(root, sizes, direct=direct) for direct in (True, False))
        computing = arithmetic(sum(map(prod, LARGE.values())), 2)
        forget(files)
        found = merged(models, root / "out", "--method", "mean", "--max-ram", "1GiB")
        floor = max(reading + writing, computing)
        seen.append(
            {
                "seconds": found["seconds"],
                "reading_seconds": reading,
                "writing_seconds": writing,
                "computing_seconds": computing,
                "ratio": found["seconds"] / floor,
                "peak_bytes": found["peak_bytes"],
                **{f"share_{key}": value for key, value in shares(found["report"]).items()},
            }
        )
    yield {
        "row": "floor",
        "read_bytes": sum(file.stat().st_size for file in files),
        "write_bytes": sum(sizes),
        "ceiling_bytes": 1024 * MIB,
        **{key: statistics.median(entry[key] for entry in seen) for key in seen[0]},
    }
    shutil.rmtree(root / "out", ignore_errors=True)


def of_one_embedding(root: Path, rounds: int) -> Iterator[dict[str, Any]]:
    models = family(root, "embedding", EMBEDDING, 2)
    for method in ("iso-c", "iso-cts"):
        found = merged(models, root / "out", "--method", method, "--max-ram", "4GiB")
        entry = found["report"]["tensors"][0]
        yield {
            "row": f"embedding/{method}",
            "seconds": found["seconds"],
            "peak_bytes": found["peak_bytes"],
            "ceiling_bytes": 4096 * MIB,
            "route": entry["route"],
            "algorithm": entry["algorithm"],
            "certified": entry["certified"],
        }


def on_a_gpu(root: Path, rounds: int) -> Iterator[dict[str, Any]]:
    models = family(root, "llama-8b-shapes", EIGHT_BILLION, 4)
    options = ("--method", "iso-c", "--device", "cuda", "--max-vram", "8GiB")
    runs = [merged(models, root / "out", *options) for _ in range(rounds)]
    best = min(runs, key=lambda run: run["seconds"])
    yield {
        "row": "gpu",
        "seconds": statistics.median(run["seconds"] for run in runs),
        "device": best["report"]["device"],
        "peak_vram_bytes": max(run["report"]["io"]["peak_vram_bytes"] for run in runs),
        "ceiling_bytes": 8192 * MIB,
        **{f"share_{key}": value for key, value in shares(best["report"]).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for checkpoints and outputs; a temporary one when left out")
    parser.add_argument("--rows", default="mergekit,floor")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="path of mergekit-yaml")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = given.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        for name in given.rows.split(","):
            if name == "mergekit" and not given.mergekit:
                print("mergekit: skipped, mergekit-yaml is not on PATH (pip install 'isomerge-fast[mergekit]')")
                continue
            makers = {"floor": against_the_floor, "embedding": of_one_embedding, "gpu": on_a_gpu}
            if name == "mergekit":
                found = against_mergekit(root, given.rounds, given.mergekit)
            else:
                found = makers[name](root, given.rounds)
            for row in found:
                rows.append(row)
                for key, value in row.items():
                    print(f"{key:30} {value:.4g}" if isinstance(value, float) else f"{key:30} {value}", flush=True)
    if given.out:
        device = torch.device("cuda" if "gpu" in given.rows else "cpu")
        result = {"device": device_name(device), "cores": os.cpu_count(), "torch": torch.__version__, "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
