"""S = Σ_t w_t (θ_t − θ₀), with ‖Δ_t‖², max |Δ_t| and the count of NaN and Inf of every task, in one read of every byte.

Program (line, block) holds one block of S in registers and walks the tasks; the tasks' tensors are found by a table of
addresses, so that T of them are read without a stack of copies and one compiled kernel serves every T. What is seen of
Δ_t is written per block and summed by torch afterwards: in a fixed order, as no sum by atomics would be.

Bytes a parameter: T experts and the base in their dtype, S in its own; the statistics are 24 T / BLOCK.
"""

# pyright: reportCallIssue=false, reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (What a launch takes, and types inside of a kernel, are Triton's own matter.)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import OPTIONS, TRITON_DTYPES, Config, address_table, as_lines, blocks_of, is_aligned, on_device
from .protocol import TaskSum, check_out, check_same, compute_dtype, visible, weights_of

# Eight bf16 a thread are one vector; with 2048 on 4 warps more bytes are under way a block, with 1024 more blocks fit.
# (An estimate until a GPU has timed all of them.)
CONFIGS = (Config(2048, 4), Config(1024, 4), Config(2048, 8))
CONFIG = CONFIGS[0]


@triton.jit
def load_task(
    row,
    line,
    offsets,
    mask,
    EXPERT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """The block of the expert that a row of the table stands for."""
    # The compiler cannot know that an address from memory is aligned.
    source = tl.multiple_of(tl.load(row).to(tl.pointer_type(EXPERT)), ALIGNMENT)
    stride = tl.multiple_of(tl.load(row + 1), ALIGNMENT)
    return tl.load(source + (line * stride + offsets), mask=mask, other=0.0)


# Squares of float32 overflow from 1.8e19 on and vanish below 1e-23. So they are added up twice: of SMALL times the
# numbers, which counts up to SPLIT, and of LARGE times the numbers. Powers of two change no digit.
SMALL, LARGE, SPLIT = tl.constexpr(2.0**35), tl.constexpr(2.0**-70), tl.constexpr(2.0**23)
# Back again, as squares in float64.
OF_SMALL, OF_LARGE = tl.constexpr(2.0**-70), tl.constexpr(2.0**140)


@triton.jit
def sum_of_squares(x, largest, COMPUTE: tl.constexpr):
    """Σ x² in float64, with max |x| = ``largest``: of float32 right from 1e-30 on to the largest numbers."""
    if tl.float64 == COMPUTE:
        squares = tl.sum(x * x, axis=0)
    else:
        small, large = x * SMALL, x * LARGE
        of_small = tl.sum(small * small, axis=0).to(tl.float64) * OF_SMALL
        of_large = tl.sum(large * large, axis=0).to(tl.float64) * OF_LARGE
        squares = tl.where(largest <= SPLIT, of_small, of_large)
    return squares


@triton.jit
def task_sum_kernel(
    table,  # [T, 4] int64: address, distance of lines, the bits of w_t in float64, the task's place in `statistics`
    base,
    out,
    statistics,  # [3, all tasks, lines, blocks] float64: squares, largest, count of NaN and Inf
    n_tasks,  # in the table
    n_blocks,
    elements,  # of a line
    base_stride,
    out_stride,
    kind_stride,  # of `statistics`
    task_stride,
    EXPERT: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ADD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # int64 before anything is multiplied: lines may lie more than 2^31 elements apart.
    program = tl.program_id(0).to(tl.int64)
    line, block = program // n_blocks, program % n_blocks
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    place = out + line * out_stride + offsets
    accumulate = out.dtype.element_ty
    total = tl.zeros([BLOCK], dtype=accumulate)
    if ADD:
        total = tl.load(place, mask=mask, other=0.0)
    origin = tl.zeros([BLOCK], dtype=COMPUTE)
    if HAS_BASE:
        origin = tl.load(base + line * base_stride + offsets, mask=mask, other=0.0).to(COMPUTE)
    row = table
    following = load_task(row, line, offsets, mask, EXPERT, ALIGNMENT)
    for index in range(n_tasks):
        expert = following.to(COMPUTE)
        weight = tl.load(row + 2).to(tl.float64, bitcast=True).to(accumulate)
        statistic = statistics + tl.load(row + 3) * task_stride + program
        # The next expert is under way while this one is reduced; the last row is read once more, masked.
        more = index + 1 < n_tasks
        row += tl.where(more, 4, 0)
        following = load_task(row, line, offsets, offsets < tl.where(more, elements, 0), EXPERT, ALIGNMENT)
        delta = tl.where(mask, expert - origin, 0.0)
        total += weight * delta.to(accumulate)
        size = tl.abs(delta)
        most = tl.max(size, axis=0)
        tl.store(statistic, sum_of_squares(delta, most, COMPUTE))
        statistic += kind_stride
        tl.store(statistic, most.to(tl.float64))
        statistic += kind_stride
        finite = (size < float("inf")).to(tl.int32)  # which NaN is not either
        tl.store(statistic, (BLOCK - tl.sum(finite, axis=0)).to(tl.float64))
    tl.store(place, total, mask=mask)


def task_sum(
    experts: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    batch_dims: int = 0,
    largest: bool = True,
    config: Config = CONFIG,
) -> TaskSum:
    """S = Σ_t w_t (θ_t − θ₀), or Σ_t w_t θ_t without ``base``; arguments and result as of ``reference.task_sum``.

    The largest entries cost nothing here and are always there.
    """
    first = experts[0]
    check_same("experts", experts, first if base is None else base)
    values = weights_of(weights, len(experts))
    if out is None:
        out = torch.empty(first.shape, dtype=dtype, device=first.device)
    check_out(out, first)
    tasks, batch = len(experts), first.shape[:batch_dims]
    if 0 in first.shape:
        zero = torch.zeros(tasks, *batch, dtype=torch.float64, device=first.device)
        return TaskSum(out, zero, zero.clone(), zero.long())
    *sources, origin, target = as_lines([*experts, first if base is None else base, out], batch.numel())
    n_lines, elements = target.shape
    n_blocks = blocks_of(elements, config.block)
    statistics = torch.empty(3, tasks, n_lines, n_blocks, dtype=torch.float64, device=first.device)
    compute = compute_dtype(origin.dtype, *(expert.dtype for expert in experts))
    with on_device(target):
        # One launch for every dtype among the experts; the second and later ones add to S.
        for launch, kind in enumerate(dict.fromkeys(expert.dtype for expert in experts)):
            members = [task for task in range(tasks) if experts[task].dtype == kind]
            lines = [sources[task] for task in members]
            task_sum_kernel[(n_lines * n_blocks,)](
                address_table(lines, [values[task] for task in members], members),
                origin,
                target,
                statistics,
                len(members),
                n_blocks,
                elements,
                origin.stride(0),
                target.stride(0),
                statistics.stride(0),
                statistics.stride(1),
                EXPERT=TRITON_DTYPES[kind],
                COMPUTE=TRITON_DTYPES[compute],
                HAS_BASE=base is not None,
                ADD=launch > 0,
                ALIGNMENT=16 if all(is_aligned(line) for line in lines) else 1,
                BLOCK=config.block,
                num_warps=config.num_warps,
                **OPTIONS,
            )
    squares, most, nonfinite = statistics.view(3, tasks, *batch, -1)
    counts, most = nonfinite.sum(-1).long(), most.amax(-1)
    return TaskSum(out, visible(squares.sum(-1), most), most.masked_fill_(counts > 0, torch.nan), counts)
