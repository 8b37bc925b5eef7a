"""Compile every form of every kernel ahead of time for the GPUs it is meant for, and show what came of it.

No GPU is needed. "It compiled" proves little: a row counts when nothing spills to local memory, shared memory fits the
target, and the instructions that make the kernel fast are there: 16-byte loads and stores, matrix instructions. Exit
code 1 where a row is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # decided at import

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.harness.markdown import table, write_between
from isomerge_kernels import apply_delta, symmetric_matmul, task_sum
from isomerge_kernels._launch import TRITON_DTYPES, Config

MARKS = ("<!-- compile table -->", "<!-- end of compile table -->")
KIB = 1024


@dataclass(frozen=True)
class Target:
    """Name a GPU to compile for; ``shared_bytes`` is the most that one block may have."""

    name: str
    backend: str
    arch: int | str
    warp: int
    shared_bytes: int

    @property
    def is_nvidia(self) -> bool:
        return self.backend == "cuda"


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * KIB),
    Target("sm_90", "cuda", 90, 32, 227 * KIB),
    Target("sm_100", "cuda", 100, 32, 227 * KIB),
    Target("gfx942", "hip", "gfx942", 64, 64 * KIB),
)


@dataclass(frozen=True)
class Form:
    """Hold one compiled form of a kernel, as its launcher asks for it."""

    kernel: str
    label: str
    config: str
    signature: dict[str, str]  # the types of arguments
    constants: dict[str, Any]
    options: dict[str, Any]
    vector_loads: int  # at least
    vector_stores: int
    dots: str = ""  # what is multiplied ("half", "tf32x3", …)
    but_not_on: tuple[str, ...] = ()  # targets whose launcher never takes it


@dataclass
class Row:
    """Hold what the compiler made of one form for one target; ``wrong`` lists what must not be."""

    kernel: str
    label: str
    config: str
    target: str
    registers: int | None = None
    spilled_bytes: int | None = None
    shared_bytes: int | None = None
    wrong: list[str] = field(default_factory=list)


DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUMS = "bf16 fp32, bf16 fp64, fp16 fp32, fp32 fp32, fp32 fp64, fp64 fp64"
UPDATES = "bf16 fp32 bf16, bf16 fp64 bf16, fp16 fp32 fp16, fp32 fp32 fp32, fp32 fp32 bf16, fp64 fp64 fp64"
# Integers of 32 bits; all others have 64, as those of the largest tensors do.
NARROW = {"n_tasks", "n_blocks", "n_outputs", "n", "k", "tiles"}
# All other pointers and integers are multiples of 16.
ANY_NUMBER = {"scalings", "n_tasks", "n_blocks", "n_outputs", "tiles", "seed", "first", "kind_stride", "task_stride"}


def empty(dtype: str, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def launches(launcher: Callable[..., Any], *arguments: Any, **options: Any) -> list[dict[str, Any]]:
    """Return the ``Form`` fields of every kernel that a launcher starts: types, constants and options."""
    found = []

    def record(kernel: Any, *values: Any, grid: Any, warmup: Any, **named: Any) -> None:
        form: dict[str, Any] = {"signature": {}, "constants": {}, "options": {}}
        for name, value in zip(kernel.arg_names, values, strict=False):
            if name.endswith(("_row", "_column")) and value == 1:  # for which Triton compiles a form of its own
                form["constants"][name] = 1
            elif isinstance(value, torch.Tensor):
                form["signature"][name] = f"*{TRITON_DTYPES.get(value.dtype, 'i64')}"
            else:
                form["signature"][name] = "fp64" if isinstance(value, float) else "i32" if name in NARROW else "i64"
        for name, value in named.items():
            form["constants" if name in kernel.arg_names else "options"][name] = value
        found.append({"kernel": kernel.__name__.removesuffix("_kernel"), **form})

    with mock.patch.object(JITFunction, "run", record):
        launcher(*arguments, **options)
    return found


def forms() -> Iterator[Form]:
    """Yield every configuration, by the dtypes that merges bring; the rarer turns of a kernel in its first one."""
    for expert, total in map(str.split, SUMS.split(",")):
        configs = task_sum.CONFIGS[torch.float64 if expert == "fp64" else torch.float32]
        for config in configs:
            yield sum_form([expert], total, config)
        yield sum_form([expert], total, configs[0], "deltas", has_base=False)
    first = task_sum.CONFIGS[torch.float32][0]
    yield sum_form(["fp16", "bf16"], "fp32", first, "added to S")
    yield sum_form(["bf16"], "fp32", first, "not aligned", elements=8)
    *_, added = launches(task_sum.task_sum, [empty("bf16", 64)], None, [1.0], empty("fp32", 64))
    # A member's blocks begin anywhere: no vectors.
    config = f"{task_sum.ADDED_BLOCK}, {task_sum.ADDED_WARPS} warps"
    yield Form(label="statistics of blocks", config=config, vector_loads=0, vector_stores=0, **added)
    for base, delta, out in map(str.split, UPDATES.split(",")):
        for config in apply_delta.CONFIGS:
            yield apply_form(base, delta, out, config)
    for config in apply_delta.CONFIGS:
        yield apply_form("bf16", "fp32", "bf16", config, seed=1)
    for key, configs in symmetric_matmul.CONFIGS.items():
        for config in configs:
            for transposed in (False, True):
                yield product_form(key, config, transposed)
            yield product_form(key, config, False, has_c=False)


def sum_form(
    experts: list[str],
    total: str,
    config: task_sum.SumConfig,
    note: str = "",
    *,
    has_base: bool = True,
    elements: int = 64,
) -> Form:
    """Return ``task_sum`` of lines of so many elements: the launch for the last expert, whose dtype the base has."""
    tensors = [empty(expert, 2, elements) for expert in experts]
    arguments = [tensors, tensors[-1] if has_base else None, [1.0] * len(tensors), empty(total, 2, elements)]
    *_, launch, _ = launches(task_sum.task_sum, *arguments, batch_dims=1, config=config)
    warps = f"{config.num_warps} warp{'s' if config.num_warps > 1 else ''}"
    return Form(
        label=f"{experts[-1]} → {total}" + (f", {note}" if note else ""),
        config=f"{config.block}, {warps}, {config.num_stages} stages",
        # Of the base and of the experts, which are read in vectors only where their addresses allow it.
        vector_loads=has_base + (launch["constants"]["ALIGNMENT"] == 16),
        vector_stores=1,
        **launch,
    )


def apply_form(base: str, delta: str, out: str, config: Config, seed: int | None = None) -> Form:
    options = {"scalings": [1.0], "dtype": DTYPES[out], "seed": seed, "config": config}
    (launch,) = launches(apply_delta.apply_delta, empty(base, 64), empty(delta, 64), **options)
    label = f"{base} + {delta} → {out}" + (", stochastic" if seed else "")
    shape = f"{config.block}, {config.num_warps} warps"
    return Form(label=label, config=shape, vector_loads=2, vector_stores=1, **launch)


def product_form(key: str, config: symmetric_matmul.TileConfig, transposed: bool, *, has_c: bool = True) -> Form:
    """Return A Aᵀ of a matrix with its rows side by side, or Aᵀ A of it."""
    element = {"fp64": "fp64", "half": "bf16"}.get(key, "fp32")
    on_sm_80 = symmetric_matmul.default_config(key, (8, 0), symmetric_matmul.LARGE_TILES)
    a = empty(element, 48, 64).mT if transposed else empty(element, 64, 48)
    options = {"precision": key if element == "fp32" else "ieee", "config": config}
    (launch,) = launches(symmetric_matmul.symmetric_matmul, a, c=empty(element, 64, 64) if has_c else None, **options)
    launch["options"]["maxnreg"] = config.max_registers  # on NVIDIA, which a tensor without memory is not on
    shape = f"{config.block} × {config.block} × {config.block_k}"
    return Form(
        label={"half": "bf16"}.get(key, key) + (", Aᵀ A" if transposed else ", A Aᵀ") + ("" if has_c else ", no C"),
        config=f"{shape}, {config.num_warps} warps, {config.num_stages} stages",
        vector_loads=2,
        vector_stores=2,  # the tile and its mirror
        dots=key,
        but_not_on=("sm_80",) if key in ("tf32x3", "bf16x3") and config != on_sm_80 else (),
        **launch,
    )


KERNELS = {
    "task_sum": task_sum.task_sum_kernel,
    "add_up": task_sum.add_up_kernel,
    "apply_delta": apply_delta.apply_delta_kernel,
    "symmetric_matmul": symmetric_matmul.symmetric_matmul_kernel,
}
VECTOR_LOAD = {
    True: r"\bld\.global\S*\.v4\.b32|\bld\.global\S*\.v2\.b64|\bcp\.async\.cg\.shared\.global[^;]*, 0x10",
    False: r"\b(?:global|buffer)_load_dwordx[24]",
}
VECTOR_STORE = {
    True: r"\bst\.global\S*\.v4\.b32|\bst\.global\S*\.v2\.b64",
    False: r"\b(?:global|buffer)_store_dwordx[24]",
}


def matrix_instructions(form: Form, target: Target) -> tuple[str, int]:
    """Return a pattern of what has to multiply, and how many of it one step along k takes; ("", 0) where nothing does.

    That is by design for ieee products on NVIDIA, and for float64 on sm_100, where Triton gives it none.
    """
    if not form.dots:
        return "", 0
    if not target.is_nvidia:
        return (r"\bv_mfma_\w*f64" if form.dots == "fp64" else r"\bv_mfma_"), 1
    if form.dots == "ieee" or (form.dots == "fp64" and target.name == "sm_100"):
        return "", 0
    block, depth, warps = form.constants["BLOCK"], form.constants["BLOCK_K"], form.options["num_warps"]
    if form.dots == "fp64":
        multiplied = 8 * 8 * 4 if target.name == "sm_80" else 16 * 8 * 16
        return r"\bmma\.sync\S*\.f64", block * block * depth // multiplied // warps
    products = 1 if form.dots == "half" else 3
    element_depth = 8 if form.dots == "tf32x3" else 16
    if target.name == "sm_80":
        return r"\bmma\.sync", products * block * block * depth // (16 * 8 * element_depth) // warps
    # A warp group (sm_90) or the block (sm_100) multiplies its whole tile at once.
    pattern = r"\bwgmma\.mma_async" if target.name == "sm_90" else r"\btcgen05\.mma"
    return pattern, products * depth // element_depth


def compile_row(form: Form, target: Target) -> Row:
    """Compile one form for one target; the compiler's own failure is a wrong row too."""
    row = Row(form.kernel, form.label, form.config, target.name)
    kernel = KERNELS[form.kernel]
    names = kernel.arg_names
    aligned = [name for name, kind in form.signature.items() if kind[0] in "*i" and name not in ANY_NUMBER]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    signature = {name: form.signature.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, constexprs=form.constants, attrs=attributes)
    try:
        compiled = triton.compile(
            source, target=GPUTarget(target.backend, target.arch, target.warp), options=form.options
        )
    except Exception as error:  # whatever the compiler raises is what the table is for
        row.wrong.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
        return row
    text = compiled.asm["ptx" if target.is_nvidia else "amdgcn"]
    row.shared_bytes = shared = int(compiled.metadata.shared)
    if target.is_nvidia:
        row.registers, row.spilled_bytes = nvidia_usage(compiled.asm["cubin"])
    else:
        row.registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0])
        row.spilled_bytes = 4 * int(re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)[0])
    if row.spilled_bytes:
        row.wrong.append(f"{row.spilled_bytes} bytes a thread in local memory")
    if shared > target.shared_bytes:
        row.wrong.append(f"{shared} bytes of shared memory, {target.shared_bytes} are there")
    for name, pattern, expected in (
        ("vector loads", VECTOR_LOAD[target.is_nvidia], form.vector_loads),
        ("vector stores", VECTOR_STORE[target.is_nvidia], form.vector_stores),
        ("matrix instructions", *matrix_instructions(form, target)),
    ):
        count = len(re.findall(pattern, text)) if expected else 0
        if count < expected:
            row.wrong.append(f"{count} {name}, expected {expected} or more")
    return row


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Return (registers a thread, bytes of local memory a thread) as the assembler recorded them."""
    tool = knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def all_rows() -> list[Row]:
    """Compile every form for every target that has it, on all cores; Triton's cache makes a second run fast."""
    pairs = [(form, target) for form in forms() for target in TARGETS if target.name not in form.but_not_on]
    jobs = [(form, target) for form, target in pairs if target.is_nvidia or not form.dots.startswith("tf32")]
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_row, *zip(*jobs, strict=True), chunksize=8))


def markdown(rows: list[Row]) -> str:
    """Return one line for each form, one column for each target: registers / KiB of shared memory / bytes spilled."""
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        shared = "?" if row.shared_bytes is None else f"{row.shared_bytes / KIB:.0f}"
        cell = f"{row.registers} / {shared} / {row.spilled_bytes}" if not row.wrong else "; ".join(row.wrong)
        cells.setdefault((row.kernel, row.label, row.config), {})[row.target] = cell
    names = [target.name for target in TARGETS]
    lines = [
        (f"`{kernel}`", *rest, *(columns.get(name, "–") for name in names))
        for (kernel, *rest), columns in cells.items()
    ]
    return table(("kernel", "form", "configuration", *names), lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, help="a Markdown file with the table's two marks")
    parser.add_argument("--json", action="store_true", help="rows as JSON instead of the table")
    arguments = parser.parse_args()
    rows = all_rows()
    caption = f"Triton {version('triton')}: registers a thread / KiB of shared memory / bytes spilled a thread."
    text = f"{caption}\n\n{markdown(rows)}"
    wrong = [row for row in rows if row.wrong]
    print(json.dumps([asdict(row) for row in rows]) if arguments.json else text)
    print(f"{len(rows)} compiled, {len(wrong)} not as they must be", file=sys.stderr)
    for row in wrong:
        print(f"  {row.kernel} {row.label} {row.config} {row.target}: {'; '.join(row.wrong)}", file=sys.stderr)
    if arguments.write is not None:
        write_between(arguments.write, MARKS, text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
