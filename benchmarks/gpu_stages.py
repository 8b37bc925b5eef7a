"""What ``gpu_suite`` does, stage by stage; it sets up the paths that these imports need."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_checks import CHECKS  # type: ignore[import-not-found]  # tests/ is put on the path by gpu_suite
from safetensors.torch import save_file
from torch import Tensor

import isomerge_fast
from benchmarks.suite import Suite
from isomerge_fast.bench import published
from isomerge_fast.bench.ceilings import (
    copy_rate,
    device_name,
    float32_matmul,
    matmul_rate,
    median_seconds,
    transfer_rates,
)
from isomerge_fast.bench.problems import deltas_like_fine_tuning, relative_error
from isomerge_fast.config import MergeConfig
from isomerge_fast.engine import run
from isomerge_fast.linalg.gram_eigh import GramEigh
from isomerge_fast.linalg.polar_express import PolarExpress
from isomerge_fast.linalg.polar_gram import GramNewtonSchulz
from isomerge_fast.linalg.polar_qdwh import Qdwh
from isomerge_fast.linalg.protocol import PolarSolver
from isomerge_fast.linalg.svd import FullSvd
from isomerge_fast.methods import METHODS, Method, TensorDeltas, make_method
from isomerge_fast.plan import make_plan
from isomerge_kernels import apply_delta, symmetric_matmul, task_sum

SMOKE = (
    "task_sum-odd-bf16",
    "apply_delta-batch-fp32",
    "apply_delta-stochastic",
    "symmetric_matmul-polynomial",
    *(f"symmetric_matmul-{key}-{configs[0].block}-odd" for key, configs in symmetric_matmul.CONFIGS.items()),
)
LLAMA = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # q and o, k and v, gate and up, down of Llama-3-8B
VIT = ((768, 768), (3072, 768), (768, 3072), (1024, 4096))  # of ViT-B, and one of ViT-L
SMALL_SHAPES = ((96, 96), (64, 160), (160, 64))
TASKS = 8
MAX_VRAM = 8 << 30


def environment(suite: Suite) -> None:
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "cupy", "numpy", "safetensors"):
        try:
            versions[package] = __import__(package).__version__
        except Exception as error:  # an absent or broken optional package is a fact of the environment
            versions[package] = f"absent ({type(error).__name__})"
    if suite.device.type == "cuda":
        properties = torch.cuda.get_device_properties(suite.device)
        versions |= {"capability": f"{properties.major}.{properties.minor}", "memory_bytes": properties.total_memory}
        versions |= {"multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
    suite.note("environment", device_name(suite.device), isomerge=isomerge_fast.__version__, **versions)


def smoke(suite: Suite) -> None:
    """One form of everything, in seconds: what is broken shows before time is spent."""
    for name in SMOKE:
        suite.attempt("smoke", name, lambda name=name: CHECKS[name](suite.device), needs=1.0)


def kernels_right(suite: Suite) -> None:
    for name in tuple(CHECKS)[:8] if suite.small else CHECKS:
        suite.attempt("correctness", name, lambda name=name: CHECKS[name](suite.device), needs=1.0)


def solvers_right(suite: Suite) -> None:
    """Polar solvers and methods in all tiers against full SVDs in float64, on this device."""
    solvers: list[tuple[PolarSolver, float]] = [
        (PolarExpress(), 1e-9),
        (PolarExpress(torch.float32), 1e-2),
        (GramNewtonSchulz(), 1e-9),
        (GramNewtonSchulz(torch.float32), 1e-2),
        (Qdwh(), 1e-9),
        (GramEigh(), 1e-5),
        (FullSvd(), 1e-6),
    ]
    shapes = SMALL_SHAPES if suite.small else ((1100, 1100), (1024, 3072), (3072, 1024))
    for rows, columns in shapes:
        deltas = deltas_like_fine_tuning(rows, columns, 4, "decay", device=suite.device)
        total = torch.stack(deltas).double().sum(0)
        exact = published.polar(total)
        for solver, bar in solvers:

            def polar(solver: PolarSolver = solver, bar: float = bar, x: Tensor = total, exact: Tensor = exact):
                q, stats = solver.polar(x, dtype=torch.float64)
                found = {"error": relative_error(q, exact), "orthogonality": stats.orthogonality.item()}
                assert found["error"] <= bar, found
                return found

            suite.attempt("correctness", f"{solver.name} {rows} x {columns}", polar)
    # The judge of Iso-CTS takes T + 3 SVDs in float64: half the size.
    halves = SMALL_SHAPES if suite.small else ((550, 550), (512, 1536), (1536, 512))
    for name, judged in (("iso-c", shapes), ("iso-cts", halves)):
        for rows, columns in judged:
            deltas = deltas_like_fine_tuning(rows, columns, 4, "decay", device=suite.device)
            exact = getattr(published, name.replace("-", "_"))([delta.double() for delta in deltas])
            for precision, bar in (("fast", 1e-2), ("default", 1e-5), ("reference", 1e-8)):

                def merge(name=name, precision=precision, bar=bar, exact=exact, deltas=deltas):
                    value, stats = make_method(name, {"precision": precision}).merge(TensorDeltas(deltas))
                    found = {"error": relative_error(value, exact), "algorithm": stats.algorithm}
                    assert found["error"] <= bar, found
                    assert not stats.missed(), stats.to_dict()
                    return found

                suite.attempt("correctness", f"{name} {precision} {rows} x {columns}", merge, needs=10)


def ceilings(suite: Suite) -> None:
    device = suite.device
    size = 1 << 22 if suite.small else 1 << 30
    suite.attempt("ceiling", "copy", lambda: {"gb_per_s": copy_rate(device, size) / 1e9})
    if device.type == "cuda":

        def transfers() -> dict[str, Any]:
            return {key: rate / 1e9 for key, rate in transfer_rates(device).items()}

        suite.attempt("ceiling", "pinned transfers, GB/s", transfers)
    for side in (128,) if suite.small else (1024, 4096, 8192):
        for name, dtype, precision in (
            ("bf16", torch.bfloat16, "ieee"),
            ("tf32", torch.float32, "tf32"),
            ("fp32", torch.float32, "ieee"),
            ("fp64", torch.float64, "ieee"),
        ):

            def products_a_second(side=side, dtype=dtype, precision=precision):
                return {"tflop_per_s": matmul_rate(device, side, dtype, precision) / 1e12}

            suite.attempt("ceiling", f"matmul {name} {side}", products_a_second)


def bandwidths(suite: Suite) -> None:
    """task_sum and apply_delta at Llama's shapes, as shares of the copy measured above."""
    device, ceiling = suite.device, suite.value("copy", "gb_per_s")
    for rows, columns in SMALL_SHAPES[:1] if suite.small else LLAMA:
        elements = rows * columns
        for dtype, total in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.float64), (torch.float32,) * 2):
            base, *experts = (torch.randn(rows, columns, device=device).to(dtype) for _ in range(TASKS + 1))
            out = torch.empty(rows, columns, dtype=total, device=device)
            size = elements * ((TASKS + 1) * dtype.itemsize + total.itemsize)
            for config in task_sum.CONFIGS:

                def sums(base=base, experts=experts, out=out, config=config, size=size):
                    seconds = median_seconds(
                        lambda: task_sum.task_sum(experts, base, out=out, config=config), device, budget_seconds=0.2
                    )
                    rate = size / seconds / 1e9
                    return {"seconds": seconds, "gb_per_s": rate, "of_copy": rate / ceiling}

                form = f"{_name(dtype)} to {_name(total)}, {config.block} on {config.num_warps} warps"
                suite.attempt("bandwidth", f"task_sum {rows} x {columns} {form}", sums)
            del base, experts, out
        base = torch.randn(rows, columns, device=device).bfloat16()
        delta = torch.randn(rows, columns, device=device)
        for scalings, seed in (([1.0], None), ([0.8, 1.0, 1.3], None), ([1.0], 7)):
            size = elements * (2 + 4 + 2 * len(scalings))
            for config in apply_delta.CONFIGS:

                def applied(base=base, delta=delta, scalings=scalings, seed=seed, config=config, size=size):
                    options = {"scalings": scalings, "dtype": torch.bfloat16, "seed": seed, "config": config}
                    call = partial(apply_delta.apply_delta, base, delta, **options)
                    seconds = median_seconds(call, device, budget_seconds=0.2)
                    rate = size / seconds / 1e9
                    return {"seconds": seconds, "gb_per_s": rate, "of_copy": rate / ceiling}

                form = f"{len(scalings)} outputs{'' if seed is None else ', stochastic'}"
                label = f"apply_delta {rows} x {columns} {form}, {config.block} on {config.num_warps} warps"
                suite.attempt("bandwidth", label, applied)


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]


def products(suite: Suite) -> None:
    """symmetric_matmul beside torch.matmul of the same matrix, at the precision that is nearest."""
    device = suite.device
    for side in (128,) if suite.small else (1024, 2048, 4096, 8192):
        for key, configs in symmetric_matmul.CONFIGS.items():
            dtype = {"fp64": torch.float64, "half": torch.bfloat16}.get(key, torch.float32)
            if suite.small and dtype == torch.bfloat16 and device.type == "cpu":
                continue
            a = torch.randn(side, side, device=device).to(dtype)
            exact = a.double() @ a.double().mT
            with float32_matmul("ieee"):
                theirs = median_seconds(lambda a=a: a @ a.mT, device, budget_seconds=0.3)
                their_error = relative_error(a @ a.mT, exact)
            for config in configs:

                def product(a=a, key=key, config=config, exact=exact, theirs=theirs, their_error=their_error):
                    precision = key if a.dtype == torch.float32 and device.type == "cuda" else "ieee"
                    call = partial(symmetric_matmul.symmetric_matmul, a, precision=precision, config=config)
                    error = relative_error(call(), exact)
                    seconds = median_seconds(call, device, budget_seconds=0.3)
                    return {
                        "seconds": seconds,
                        "torch_seconds": theirs,
                        "ratio": theirs / seconds,
                        "tflop_per_s": 2 * len(a) ** 3 / seconds / 1e12,
                        "error": error,
                        "torch_error": their_error,
                    }

                shape = f"{config.block} x {config.block_k}, {config.num_warps} warps, {config.num_stages} stages"
                suite.attempt("product", f"symmetric_matmul {key} {side}, {shape}", product)


def methods(suite: Suite) -> None:
    """Our methods beside the published algorithm in plain torch float32, on the same deltas."""
    device = suite.device
    for rows, columns in SMALL_SHAPES if suite.small else (*VIT, *LLAMA):
        deltas = deltas_like_fine_tuning(rows, columns, TASKS, "decay", device=device)
        large = min(rows, columns) >= 4096
        for name, needs in (("iso-c", 120 if large else 70), ("iso-cts", 220 if large else 90)):

            def compared(name: str = name, deltas: list[Tensor] = deltas):
                method: Method = METHODS[name]()
                source = TensorDeltas(deltas)
                value, stats = method.merge(source)
                baseline = getattr(published, name.replace("-", "_"))
                ours = median_seconds(lambda: method.merge(source), device, budget_seconds=2.0, rounds=10)
                start = time.perf_counter()
                theirs = baseline(deltas)
                distance = relative_error(theirs, value.double())
                first = time.perf_counter() - start
                # A second call only where it is cheap: of large shapes one is minutes.
                again = first if first > 3.0 else median_seconds(lambda: baseline(deltas), device, budget_seconds=2.0)
                return {
                    "seconds": ours,
                    "published_seconds": again,
                    "ratio": again / ours,
                    "distance": distance,
                    "certified": not stats.missed(),
                    "algorithm": stats.algorithm,
                }

            suite.attempt("method", f"{name} {rows} x {columns}, T = {TASKS}", compared, needs=needs)


def end_to_end(suite: Suite) -> None:
    """A merge of files in memory, of 2.3 billion parameters with 4 experts, under a ceiling for GPU memory."""
    layers, width, inner, vocabulary = (1, 64, 160, 100) if suite.small else (8, 4096, 14336, 128256)
    experts = 4
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", width), ("k", width // 4), ("v", width // 4), ("o", width)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, width)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (inner, width)
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        shapes[f"{prefix}input_layernorm.weight"] = (width,)
    parameters = sum(Tensor.numel(torch.empty(shape, device="meta")) for shape in shapes.values())
    memory = Path("/dev/shm")
    needed = 2 * parameters * (experts + 2)
    place = memory if memory.is_dir() and shutil.disk_usage(memory).free > 1.2 * needed else None

    def merged() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            start = time.perf_counter()
            base: dict[str, Tensor] = {}
            for index in range(experts + 1):
                generator = torch.Generator(device=suite.device).manual_seed(index)
                tensors = {}
                for name, shape in shapes.items():
                    noise = torch.randn(shape, generator=generator, device=suite.device)
                    tensors[name] = (
                        (0.02 * noise if index == 0 else base[name].to(suite.device) + 2e-3 * noise).bfloat16().cpu()
                    )
                base = base or tensors
                save_file(tensors, str(Path(folder) / f"{index}.safetensors"))
            base = tensors = {}
            made = time.perf_counter() - start
            if suite.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            found: dict[str, Any] = {"parameters": parameters, "experts": experts, "made_seconds": made}
            for method in ("task-arithmetic", "iso-c", "iso-cts"):
                if suite.seconds_left < (5 if method == "task-arithmetic" else 40) and not suite.small:
                    found[f"{method}_skipped"] = f"{suite.seconds_left:.0f} s left"
                    continue
                config = MergeConfig(
                    base=str(Path(folder) / "0.safetensors"),
                    experts=[str(Path(folder) / f"{index}.safetensors") for index in range(1, experts + 1)],
                    method=method,
                    scaling=0.5,
                    out=str(Path(folder) / "merged"),
                )
                plan = make_plan(config, suite.device, max_vram=MAX_VRAM)
                report = run(plan, device=str(suite.device), max_vram=MAX_VRAM, overwrite=True)
                seconds = report.seconds["total"]
                found[f"{method}_seconds"] = seconds
                found[f"{method}_uncertified"] = sum(row.get("certified") is False for row in report.tensors)
                found[f"{method}_phases"] = {key: round(value, 3) for key, value in report.seconds.items()}
                found[f"{method}_read_gb_per_s"] = sum(row["read_bytes"] for row in report.tensors) / seconds / 1e9
                if suite.device.type == "cuda":
                    found[f"{method}_peak_vram_bytes"] = torch.cuda.max_memory_reserved()
                    assert torch.cuda.max_memory_reserved() <= MAX_VRAM
                    torch.cuda.reset_peak_memory_stats()
            return found

    suite.attempt("end-to-end", f"{parameters / 1e9:.2f} billion parameters, {experts} experts", merged, needs=60)


def sanitizer(suite: Suite) -> None:
    """The smoke test once more under compute-sanitizer, where that is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")

    def sanitized() -> dict[str, Any]:
        if tool is None or suite.device.type != "cuda":
            return {"absent": "compute-sanitizer is not installed"}
        with tempfile.TemporaryDirectory() as folder:
            again = [sys.executable, "-m", "benchmarks.gpu_suite", "--only", "smoke", "--out", f"{folder}/smoke.json"]
            outcome = subprocess.run(
                [tool, "--tool", "memcheck", "--error-exitcode", "9", *again],
                env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                capture_output=True,
                text=True,
                timeout=max(10.0, suite.seconds_left),
                cwd=Path(__file__).parents[1],
            )
        summary = [line for line in outcome.stdout.splitlines() if "ERROR SUMMARY" in line]
        assert outcome.returncode == 0, outcome.stdout[-400:]
        return {"summary": summary[-1] if summary else "none"}

    suite.attempt("sanitizer", "smoke test under memcheck", sanitized, needs=30)


STAGES = (
    environment,
    smoke,
    kernels_right,
    solvers_right,
    ceilings,
    bandwidths,
    products,
    methods,
    end_to_end,
    sanitizer,
)
