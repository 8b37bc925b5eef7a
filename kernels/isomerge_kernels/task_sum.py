"""Sum S = Σ_t w_t (θ_t − θ₀), with ‖Δ_t‖², max |Δ_t| and the count of NaN and Inf, in one read of every byte.

Program (line, block) holds one block of S in registers and walks the tasks, which a table of addresses finds; a second
kernel adds up what is seen of Δ_t in each block (docs/kernels.md).

Bytes a parameter: T experts and the base in their dtype, S in its own; the statistics are 24 T / BLOCK.
"""

# pyright: reportCallIssue=false, reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (What a launch takes, and types inside of a kernel, are Triton's own matter.)
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import OPTIONS, TRITON_DTYPES, VECTOR_BYTES, address_table, as_lines, on_device
from .protocol import TaskSum, compute_dtype


class SumConfig(NamedTuple):
    """Describe one compiled form, chosen by rule and never by timing when it runs (see ``_launch.Config``)."""

    block: int  # elements a program handles, at once
    num_warps: int
    num_stages: int  # one more than experts are under way


# By the dtype that Δ_t is computed in; the first is taken. One warp waits for no other: 8 experts and a base in bf16 to
# float32 of 4096 x 4096 reach 1.00 of the copy's rate on an H200; 0.96 in 3 stages, 0.90 by blocks of 512, 0.79 by 2048
# on 4 warps. Of float64 no more than 4 elements a thread fit the registers in every form.
CONFIGS = {
    torch.float32: (SumConfig(1024, 1, 4), SumConfig(512, 1, 4), SumConfig(1024, 1, 5)),
    torch.float64: (SumConfig(1024, 8, 4),),
}
# Of the second kernel, whose programs read 8 bytes a block: the more at once, the better, up to this on an H200.
ADDED_BLOCK, ADDED_WARPS = 4096, 16


# Squares of float32 are added up as they are where that loses nothing: where the sum is finite, and so large that
# squares too small for float32 are no part of it.
LEAST = tl.constexpr(2.0**-80)
# Else they are squares of SMALL times the numbers, where all of them are at most SPLIT, or of LARGE times the numbers.
# Powers of two change no digit; OF_SMALL and OF_LARGE take them back, as squares in float64.
SMALL, LARGE, SPLIT = tl.constexpr(2.0**35), tl.constexpr(2.0**-70), tl.constexpr(2.0**23)
OF_SMALL, OF_LARGE = tl.constexpr(2.0**-70), tl.constexpr(2.0**140)
# float64's smallest normal number.
TINY = tl.constexpr(2.0**-1022)


@triton.jit
def scaled_squares(x, largest):
    """Return Σ x² in float64 of float32 x with max |x| = ``largest``; no square under- or overflows from 1e-30 on."""
    is_small = largest <= SPLIT
    scaled = x * tl.where(is_small, SMALL, LARGE)
    return tl.sum(scaled * scaled, axis=0).to(tl.float64) * tl.where(is_small, OF_SMALL, OF_LARGE)


@triton.jit
def task_sum_kernel(
    table,  # [T, 4] int64: address, distance of lines, the bits of w_t in float64, the task's place in `of_blocks`
    base,
    out,
    of_blocks,  # [3, all tasks, lines, blocks] float64: squares, largest or NaN, count of NaN and Inf
    n_tasks,  # in the table
    n_blocks,
    elements,  # of a line
    base_stride,
    out_stride,
    kind_stride,  # of `of_blocks`
    task_stride,
    EXPERT: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ADD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
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
    # The next experts are on their way to shared memory while one is reduced.
    for index in tl.range(n_tasks, num_stages=STAGES):
        row = table + 4 * index
        # The compiler cannot know that an address from memory is aligned.
        source = tl.multiple_of(tl.load(row).to(tl.pointer_type(EXPERT)), ALIGNMENT)
        stride = tl.multiple_of(tl.load(row + 1), ALIGNMENT)
        expert = tl.load(source + (line * stride + offsets), mask=mask, other=0.0).to(COMPUTE)
        weight = tl.load(row + 2).to(tl.float64, bitcast=True).to(accumulate)
        statistic = of_blocks + tl.load(row + 3) * task_stride + program
        delta = expert - origin  # 0 where both are masked
        total += weight * delta.to(accumulate)
        size = tl.abs(delta)
        most, plain = tl.max(size, axis=0), tl.sum(delta * delta, axis=0)
        squares, nonfinite = plain.to(tl.float64), tl.zeros([], dtype=tl.float64)
        # Next to no block is one of these, so that scaling and counting cost nothing. (Comparisons with NaN are false.)
        least = LEAST if tl.float32 == COMPUTE else TINY
        if not ((plain < float("inf")) & ((plain >= least) | ((plain == 0.0) & (most == 0.0)))):
            if tl.float32 == COMPUTE:
                squares = scaled_squares(delta, most)
            # What float64 cannot tell from 0 is not 0 all the same.
            squares = tl.where((most > 0.0) & (squares < TINY), TINY, squares)
            nonfinite = (BLOCK - tl.sum((size < float("inf")).to(tl.int32), axis=0)).to(tl.float64)
            most = tl.where(nonfinite > 0.0, float("nan"), most)
        tl.store(statistic, squares)
        statistic += kind_stride
        tl.store(statistic, most.to(tl.float64))
        statistic += kind_stride
        tl.store(statistic, nonfinite)
    tl.store(place, total, mask=mask)


@triton.jit
def add_up_kernel(
    of_blocks,  # as task_sum_kernel wrote it
    squares,  # [tasks, members] float64
    largest,  # [tasks, members] float64
    nonfinite,  # [tasks, members] int64
    n_blocks,  # of a member, side by side
    kind_stride,
    BLOCK: tl.constexpr,
):
    """Add up one field of ``TaskSum`` for one member of one task: all of them in one launch, where torch takes nine."""
    place, kind = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    source = of_blocks + kind * kind_stride + place * n_blocks
    total = tl.zeros([BLOCK], dtype=tl.float64)
    most = total
    for start in range(0, n_blocks, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        value = tl.load(source + offsets, mask=offsets < n_blocks, other=0.0)
        total += value
        most = tl.maximum(most, value)
    of_all = tl.sum(total, axis=0)
    if kind == 0:
        tl.store(squares + place, of_all)
    elif kind == 1:  # NaN, of which a maximum may know nothing, shows in the sum
        tl.store(largest + place, tl.where(of_all == of_all, tl.max(most, axis=0), of_all))
    else:
        tl.store(nonfinite + place, of_all.to(tl.int64))


def task_sum(
    experts: Sequence[Tensor],
    base: Tensor | None,
    weights: Sequence[float],
    out: Tensor,
    batch_dims: int = 0,
    largest: bool = True,
    config: SumConfig | None = None,
) -> TaskSum:
    """Write S to ``out``, and return it with all that is seen of every Δ_t (also without ``largest``); see ``ops``."""
    tasks, batch, device = len(experts), out.shape[:batch_dims], out.device
    lines = as_lines([*experts, experts[0] if base is None else base, out], batch.numel())
    compute = compute_dtype(lines.tensors[tasks].dtype, *(expert.dtype for expert in experts))
    config = config or CONFIGS[compute][0]
    n_blocks = triton.cdiv(lines.elements, config.block)
    of_blocks = torch.empty(3, tasks, lines.n_lines, n_blocks, dtype=torch.float64, device=device)
    kind_stride, task_stride, *_ = of_blocks.stride()
    with on_device(out):
        # One launch for every dtype among the experts; the second and later ones add to S.
        for launch, kind in enumerate(dict.fromkeys(expert.dtype for expert in experts)):
            members = [task for task in range(tasks) if experts[task].dtype == kind]
            task_sum_kernel[(lines.n_lines * n_blocks,)](
                address_table(lines, weights, members),
                lines.tensors[tasks],
                out,
                of_blocks,
                len(members),
                n_blocks,
                lines.elements,
                lines.strides[tasks],
                lines.strides[tasks + 1],
                kind_stride,
                task_stride,
                EXPERT=TRITON_DTYPES[kind],
                COMPUTE=TRITON_DTYPES[compute],
                HAS_BASE=base is not None,
                ADD=launch > 0,
                ALIGNMENT=VECTOR_BYTES if all(map(lines.is_aligned, members)) else 1,
                BLOCK=config.block,
                STAGES=config.num_stages,
                num_warps=config.num_warps,
                **OPTIONS,
            )
        return TaskSum(out, *_added_up(of_blocks, batch))


def _added_up(of_blocks: Tensor, batch: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``squares``, ``largest`` and ``nonfinite`` of ``TaskSum`` from what ``task_sum_kernel`` wrote."""
    _, tasks, lines, blocks = of_blocks.shape
    squares, most, nonfinite = (
        torch.empty(tasks, *batch, dtype=dtype, device=of_blocks.device)
        for dtype in (torch.float64, torch.float64, torch.int64)
    )
    add_up_kernel[squares.numel(), 3](
        of_blocks,
        squares,
        most,
        nonfinite,
        lines * blocks * tasks // squares.numel(),
        of_blocks.stride(0),
        BLOCK=ADDED_BLOCK,
        num_warps=ADDED_WARPS,
        **OPTIONS,
    )
    return squares, most, nonfinite
