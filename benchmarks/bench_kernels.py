"""Time the passes over the bytes and the symmetric products of ``ops``: Triton on a GPU, plain forms on a CPU.

Beside them stands what one writes in numpy and in torch; numpy has no bf16 and is given the same numbers in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.rows import OURS, Problem, Row, error_against
from benchmarks.shapes import shape_of
from isomerge_fast import ops

TORCH, NUMPY = "torch", "numpy"
TASKS = 8
# All sets together: beyond the caches of one socket, or of a GPU.
SETS_BYTES, MOST_SETS = 1 << 29, 64


def in_turn(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Callable[[], Any]:
    """Return a function that calls ``function`` with one set after the other; the error is judged on the first."""
    turns = itertools.cycle(sets)
    return lambda: function(*next(turns))


def sets_of(size_bytes: float, make: Callable[[int], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return so many sets of inputs that all together are larger than a cache."""
    return [make(seed) for seed in range(max(1, min(MOST_SETS, round(SETS_BYTES / size_bytes))))]


def draw(seed: int, device: torch.device) -> Callable[..., Tensor]:
    """Return a function that draws a tensor of normal numbers of the shape that it is given."""
    return partial(torch.randn, generator=torch.Generator(device=device).manual_seed(seed), device=device)


def sum_problem(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    """Return the benchmark of S = Σ_t (θ_t − θ₀) by our kernel, torch and numpy.

    The least traffic is T + 1 tensors read, and S written in float32.
    """
    size = shape[0] * shape[1] * ((TASKS + 1) * dtype.itemsize + 4.0)

    def inputs(seed: int) -> tuple[list[Tensor], Tensor]:
        random = draw(seed, device)
        base = (0.02 * random(*shape)).to(dtype)
        return [(base + 1e-3 * random(*shape)).to(dtype) for _ in range(TASKS)], base

    sets = sets_of(size, inputs)
    experts, base = sets[0]
    exact = torch.stack([expert.double() - base.double() for expert in experts]).sum(0)

    def by_torch(experts: list[Tensor], base: Tensor) -> Tensor:
        total = torch.zeros(shape, device=device)
        for expert in experts:
            total += expert.float() - base.float()
        return total

    def by_numpy(experts: list[Any], base: Any) -> Any:
        total = experts[0] - base
        for expert in experts[1:]:
            total += expert - base
        return total

    arrays = [([expert.float().cpu().numpy() for expert in es], b.float().cpu().numpy()) for es, b in sets]
    calls = {
        OURS: in_turn(lambda experts, base: ops.task_sum(experts, base).total, sets),
        TORCH: in_turn(by_torch, sets),
        NUMPY: in_turn(by_numpy, arrays),
    }
    return Problem(calls, partial(error_against, exact.cpu()), {OURS: 1e-6}, size)


def apply_problem(shape: tuple[int, int], scalings: tuple[float, ...], device: torch.device) -> Problem:
    """Return the benchmark of θ_i = θ₀ + α_i Δ in bf16; the least traffic is θ₀ and Δ read, every θ_i written."""
    size = shape[0] * shape[1] * (2.0 + 4.0 + 2.0 * len(scalings))

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        random = draw(seed, device)
        return (0.02 * random(*shape)).bfloat16(), 1e-3 * random(*shape)

    sets = sets_of(size, inputs)
    base, delta = sets[0]
    exact = torch.stack([base.double() + scaling * delta.double() for scaling in scalings])

    def by_torch(base: Tensor, delta: Tensor) -> list[Tensor]:
        return [(base.float() + scaling * delta).bfloat16() for scaling in scalings]

    ours = partial(ops.apply_delta, scalings=list(scalings), dtype=torch.bfloat16)
    calls = {OURS: in_turn(ours, sets), TORCH: in_turn(by_torch, sets)}
    # Rounding to bf16, 2^-9 at most, is the error.
    return Problem(calls, partial(error_against, exact.cpu()), {OURS: 2.0**-9}, size)


def product_problem(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    """Return the benchmark of A Aᵀ, [M, K] -> [M, M], of which half has to be computed."""
    rows, columns = shape
    size = float(dtype.itemsize * (rows * columns + rows**2))
    sets = sets_of(size, lambda seed: (draw(seed, device)(*shape).to(dtype),))
    a = sets[0][0].double()
    calls = {
        OURS: in_turn(ops.sym_mm, sets),
        TORCH: in_turn(lambda a: a @ a.mT, sets),
        NUMPY: in_turn(lambda a: a @ a.T, [(a.cpu().numpy(),) for (a,) in sets]),
    }
    bar = 1e-5 if dtype == torch.float32 else 1e-13
    return Problem(calls, partial(error_against, (a @ a.mT).cpu()), {OURS: bar}, size)


def rows() -> Iterator[Row]:
    """Yield the rows of sums, applications and products, by level."""
    levels = {"tiny": "tiny", "short": "ViT-L/14 fc1", "full": "Llama-3.2-1B gate_proj"}
    for level, label in levels.items():
        shape = (64, 96) if level == "tiny" else shape_of(label)
        size = f"{shape[0]}x{shape[1]}"
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            make = partial(sum_problem, shape, dtype)
            yield Row(f"task_sum {label} {size} T={TASKS} {name}", (OURS, TORCH, NUMPY), make, level)
        for scalings in ((1.0,), (0.8, 1.0, 1.3)):
            make = partial(apply_problem, shape, scalings)
            yield Row(f"apply_delta {label} {size} {len(scalings)} outputs", (OURS, TORCH), make, level)
        for dtype, name in ((torch.float32, "fp32"), (torch.float64, "fp64")):
            wide = (min(shape), max(shape))
            make = partial(product_problem, wide, dtype)
            yield Row(f"sym_mm {label} {wide[0]}x{wide[1]} {name}", (OURS, TORCH, NUMPY), make, level)


ROWS = [*rows()]
