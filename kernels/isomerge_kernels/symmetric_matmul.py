"""Multiply α A B + β C + γ I where A B and C are symmetric: A Aᵀ, Aᵀ A, polynomials of one symmetric matrix.

Only the tiles on and below the diagonal are computed; each is stored twice, the second time transposed. Precisions of
float32 products: ``ieee`` (no tensor cores), ``tf32x3`` (three products of tf32 parts: about float32's own), ``bf16x3``
(three of bf16 parts: 16 bits of mantissa). bf16 and fp16 are added up in float32 (docs/kernels.md).

Structure (only one triangle computed, mirrored at the store) after microsoft/dion, newton_schulz_triton.py.
"""

# pyright: reportCallIssue=false, reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (What a launch takes, and types inside of a kernel, are Triton's own matter.)
from __future__ import annotations

import math
from typing import NamedTuple

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import OPTIONS, on_device
from .devices import traits_of

PRECISIONS = ("ieee", "tf32x3", "bf16x3")


class TileConfig(NamedTuple):
    """Describe one compiled form of the kernel, chosen by rule as ``_launch.Config`` is."""

    block: int  # rows and columns of a tile of the result
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread, on NVIDIA: fewer make room for one more block at a time


# By what is multiplied. Compiled ahead of time, none of these spills registers on sm_80, sm_90, sm_100 or gfx942;
# float64 tiles of 128 do everywhere, those of split float32 on sm_80: tf32x3 always, bf16x3 by Triton 3.8
# (benchmarks/compile_table.py). Speed over torch.matmul on an H200, at 2048 and 4096 rows: float64 1.8 and 1.7 by the
# first, three blocks at a time, 1.3 at 4096 by the second; no more than the first by 128 x 32 or 128 x 64, and 1.8 at
# both by cuBLAS's syrk with a pass that mirrors it. tf32x3 1.4 and 3.0 by the first, 1.9 and 2.6 by the second; bf16x3
# 1.7 and 3.7, 3.3 and 3.6.
CONFIGS: dict[str, tuple[TileConfig, ...]] = {
    "fp64": (TileConfig(64, 16, 4, 3, max_registers=168), TileConfig(64, 32, 8, 3)),
    "ieee": (TileConfig(64, 16, 4, 2), TileConfig(128, 16, 8, 2)),
    "tf32x3": (TileConfig(128, 32, 8, 3), TileConfig(64, 32, 4, 3)),
    "bf16x3": (TileConfig(128, 32, 8, 3), TileConfig(64, 32, 4, 3)),
    "half": (TileConfig(128, 64, 8, 3), TileConfig(64, 64, 4, 3)),
}
# Entries of a result (of all members) from which large tiles of split float32 fill a GPU: 4096 x 4096 are 528 of them,
# four for every multiprocessor of an H200. There tf32x3 takes 0.88 of the time of small tiles, at 3072 rows 1.21.
LARGE_TILES = 1 << 24
GROUP = 8  # rows of tiles that are walked together, so that their operands are still in L2


@triton.jit(do_not_specialize=["tiles"])
def symmetric_matmul_kernel(
    a,  # [batch, n, k]
    b,  # [batch, k, n]
    c,  # [batch, n, n]
    out,  # [batch, n, n]
    n,
    k,
    tiles,
    a_batch,
    a_row,
    a_column,
    b_batch,
    b_row,
    b_column,
    c_batch,
    c_row,
    out_batch,
    out_row,
    alpha: tl.float64,  # a float without an annotation would come as float32
    beta: tl.float64,
    gamma: tl.float64,
    HAS_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0)
    member = tl.program_id(1).to(tl.int64)
    # GROUP rows of tiles at a time, column by column.
    first = program // (GROUP * tiles) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    row = first + program % (GROUP * tiles) % height
    column = program % (GROUP * tiles) // height
    if row < column:
        return  # the mirror of another tile
    # Where the tile begins goes into an address as one number: places of their own for all entries take registers that
    # other blocks could have.
    top, side = row.to(tl.int64) * BLOCK, column.to(tl.int64) * BLOCK
    entry = tl.arange(0, BLOCK)
    is_row, is_column = entry < (n - top).to(tl.int32), entry < (n - side).to(tl.int32)
    far, depth = entry.to(tl.int64), tl.arange(0, BLOCK_K).to(tl.int64)
    accumulate = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK, BLOCK], dtype=accumulate)
    left = a + member * a_batch + top * a_row + far[:, None] * a_row + depth[None, :] * a_column
    right = b + member * b_batch + side * b_column + depth[:, None] * b_row + far[None, :] * b_column
    for start in range(0, k, BLOCK_K):
        inside = start + depth < k
        x = tl.load(left, mask=is_row[:, None] & inside[None, :], other=0.0)
        y = tl.load(right, mask=inside[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=accumulate)
        left += BLOCK_K * a_column
        right += BLOCK_K * b_row
    if row == column:  # x yᵀ and y xᵀ need not round alike
        total = tl.where(entry[:, None] >= entry[None, :], total, tl.trans(total))
    value = total * tl.full([], alpha, accumulate)
    inside = is_row[:, None] & is_column[None, :]
    if HAS_C:
        place = c + member * c_batch + top * c_row + side + far[:, None] * c_row + entry[None, :]
        value += tl.full([], beta, accumulate) * tl.load(place, mask=inside, other=0.0).to(accumulate)
    if row == column:
        value += tl.where(entry[:, None] == entry[None, :], tl.full([], gamma, accumulate), 0.0)
    value = value.to(out.dtype.element_ty)
    target = out + member * out_batch
    tl.store(target + top * out_row + side + far[:, None] * out_row + entry[None, :], value, mask=inside)
    if row > column:
        inside = is_column[:, None] & is_row[None, :]
        mirror = target + side * out_row + top + far[:, None] * out_row + entry[None, :]
        tl.store(mirror, tl.trans(value), mask=inside)


def default_config(key: str, capability: tuple[int, int] | None, entries: int) -> TileConfig:
    """Return the first config that suits: large tiles of split float32 are for large results, and never for sm_80."""
    is_split = key in ("tf32x3", "bf16x3")
    spills = capability is not None and capability[0] < 9
    return CONFIGS[key][1 if is_split and (spills or entries < LARGE_TILES) else 0]


def symmetric_matmul(
    a: Tensor,
    b: Tensor | None = None,
    *,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.0,
    precision: str = "ieee",
    out: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Return α A B + β C + γ I for symmetric A B and C [..., n, n], with A [..., n, k] and B of any strides.

    B is Aᵀ when left out; that A B is symmetric is not checked. ``out`` may be C, but not A or B.
    """
    b = a.mT if b is None else b
    n, k = a.shape[-2:]
    batch = _batch(a, b, precision)
    if out is None:
        out = torch.empty(*batch, n, n, dtype=a.dtype, device=a.device)
    _check_square(c, out, (*batch, n, n))
    if out.numel() == 0:
        return out
    capability = traits_of(a.device).capability
    key = {torch.float64: "fp64", torch.float32: precision}.get(a.dtype, "half")
    config = config or default_config(key, capability, out.numel())
    left, right, target = (_members(matrix, batch) for matrix in (a, b, out))
    addend = target if c is None else _members(c, batch)
    tiles = triton.cdiv(n, config.block)
    with on_device(out):
        symmetric_matmul_kernel[(tiles * tiles, math.prod(batch))](
            *(members[0] for members in (left, right, addend, target)),
            n,
            k,
            tiles,
            *left[1:],
            *right[1:],
            *addend[1:3],
            *target[1:3],
            alpha,
            beta,
            gamma,
            HAS_C=c is not None,
            PRECISION=precision if a.dtype == torch.float32 else "ieee",
            BLOCK=config.block,
            BLOCK_K=config.block_k,
            GROUP=GROUP,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **(OPTIONS if capability is None else OPTIONS | {"maxnreg": config.max_registers}),
        )
    return out


def _batch(a: Tensor, b: Tensor, precision: str) -> torch.Size | tuple[int, ...]:
    """Return the batch dimensions of A B; raise ValueError where there is no such product."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown (known: {', '.join(PRECISIONS)})")
    n, k = a.shape[-2:]
    if b.shape[-2:] != (k, n):
        raise ValueError(f"a is {list(a.shape)} and b {list(b.shape)}: expected [..., n, k] and [..., k, n]")
    return a.shape[:-2] if b.shape[:-2] == a.shape[:-2] else numpy.broadcast_shapes(a.shape[:-2], b.shape[:-2])


def _check_square(c: Tensor | None, out: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``c`` and ``out`` have ``shape``, rows side by side, and batches without gaps."""
    for name, matrix in (("c", c), ("out", out)):
        if matrix is not None and matrix.shape != shape:
            raise ValueError(f"{name} is {list(matrix.shape)}, expected {list(shape)}")
        if matrix is not None and shape[-1] > 1 and matrix.stride(-1) != 1:
            raise ValueError(f"{name} has strides {matrix.stride()}: expected rows side by side")
    if out.ndim > 3 and not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}: expected a contiguous tensor for several batch dimensions")


def _members(matrices: Tensor, batch: torch.Size | tuple[int, ...]) -> tuple[Tensor, int, int, int]:
    """Return memory that begins with the first matrix, and the distances of matrices, rows and columns in it.

    Makes a copy for several batch dimensions that cannot be seen as one. One matrix is taken as it is: every view costs
    the host microseconds, and small products take few.
    """
    if matrices.ndim == 2:
        row, column = matrices.stride()
        return matrices, 0, row, column
    stack = matrices if matrices.ndim == 3 and len(batch) == 1 else matrices.expand(*batch, -1, -1).flatten(0, -3)
    member, row, column = stack.stride()
    return stack, member if len(stack) > 1 else 0, row, column
