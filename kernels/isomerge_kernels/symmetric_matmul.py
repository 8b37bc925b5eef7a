"""α A B + β C + γ I where A B and C are symmetric: A Aᵀ, Aᵀ A, and products of polynomials of one symmetric matrix.

Only the tiles on and below the diagonal are computed; each is stored twice, the second time transposed. With A, B and C
all G and (α, β, γ) = (c, b, a) it is the polynomial a I + b G + c G² of a polar iteration's step, in one pass.

The precision of a product of float32 matrices is an argument: ``ieee`` (no tensor cores), ``tf32x3`` (three products of
tf32 parts: about float32's own), ``bf16x3`` (three of bf16 parts: 16 bits of mantissa). bf16 and fp16 are multiplied as
they are and added up in float32; float64 in float64.

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
    """One compiled form of the kernel, chosen by rule as ``_launch.Config`` is."""

    block: int  # rows and columns of a tile of the result
    block_k: int
    num_warps: int
    num_stages: int


# By what is multiplied. Compiled ahead of time, none of these spills registers on sm_80, sm_90, sm_100 or gfx942;
# float64 tiles of 128 do everywhere, those of split float32 on sm_80: tf32x3 always, bf16x3 by Triton 3.8
# (benchmarks/compile_table.py).
CONFIGS: dict[str, tuple[TileConfig, ...]] = {
    "fp64": (TileConfig(64, 32, 8, 2), TileConfig(64, 16, 8, 2)),
    "ieee": (TileConfig(64, 16, 4, 2), TileConfig(128, 16, 8, 2)),
    "tf32x3": (TileConfig(128, 32, 8, 3), TileConfig(64, 32, 4, 3)),
    "bf16x3": (TileConfig(128, 32, 8, 3), TileConfig(64, 32, 4, 3)),
    "half": (TileConfig(128, 64, 8, 3), TileConfig(64, 64, 4, 3)),
}
GROUP = 8  # rows of tiles that are walked together, so that their operands are still in L2


@triton.jit
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
    rows = row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = column.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    accumulate = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK, BLOCK], dtype=accumulate)
    left = a + member * a_batch + rows[:, None] * a_row + depth[None, :] * a_column
    right = b + member * b_batch + depth[:, None] * b_row + columns[None, :] * b_column
    for start in range(0, k, BLOCK_K):
        inside = start + depth < k
        x = tl.load(left, mask=(rows < n)[:, None] & inside[None, :], other=0.0)
        y = tl.load(right, mask=inside[:, None] & (columns < n)[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=accumulate)
        left += BLOCK_K * a_column
        right += BLOCK_K * b_row
    if row == column:  # x yᵀ and y xᵀ need not round alike
        total = tl.where(rows[:, None] >= columns[None, :], total, tl.trans(total))
    value = total * tl.full([], alpha, accumulate)
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    if HAS_C:
        place = c + member * c_batch + rows[:, None] * c_row + columns[None, :]
        value += tl.full([], beta, accumulate) * tl.load(place, mask=inside, other=0.0).to(accumulate)
    value += tl.where(rows[:, None] == columns[None, :], tl.full([], gamma, accumulate), 0.0)
    value = value.to(out.dtype.element_ty)
    target = out + member * out_batch
    tl.store(target + rows[:, None] * out_row + columns[None, :], value, mask=inside)
    if row > column:
        inside = (columns < n)[:, None] & (rows < n)[None, :]
        tl.store(target + columns[:, None] * out_row + rows[None, :], tl.trans(value), mask=inside)


def config_key(dtype: torch.dtype, precision: str) -> str:
    """The row of ``CONFIGS`` for a product."""
    return {torch.float64: "fp64", torch.float32: precision}.get(dtype, "half")


def default_config(key: str, capability: tuple[int, int] | None) -> TileConfig:
    """The first that suits: on sm_80 and its kin only small tiles of split float32 keep to their registers.

    Args:
        key: of ``CONFIGS``.
        capability: NVIDIA's, None elsewhere.
    """
    splits_in_registers = key in ("tf32x3", "bf16x3") and capability is not None and capability[0] < 9
    return CONFIGS[key][1 if splits_in_registers else 0]


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
    """α A B + β C + γ I for symmetric A B and C, [..., n, n].

    Args:
        a: [..., n, k], any strides.
        b: [..., k, n], any strides; Aᵀ when left out. The product has to be symmetric, which is not checked.
        c: [..., n, n]; left out it is 0.
        precision: of float32 products, one of ``PRECISIONS``.
        out: overwritten with the result; may be ``c``, but not ``a`` or ``b``.
        config: ``default_config`` when left out.

    Raises:
        ValueError: shapes that do not fit each other, or an unknown precision.
    """
    b = a.mT if b is None else b
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown (known: {', '.join(PRECISIONS)})")
    n, k = a.shape[-2:]
    if b.shape[-2:] != (k, n):
        raise ValueError(f"a is {list(a.shape)} and b {list(b.shape)}: expected [..., n, k] and [..., k, n]")
    batch = numpy.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    if out is None:
        out = torch.empty(*batch, n, n, dtype=a.dtype, device=a.device)
    for name, matrix in (("c", c), ("out", out)):
        if matrix is not None and matrix.shape != (*batch, n, n):
            raise ValueError(f"{name} is {list(matrix.shape)}, expected {[*batch, n, n]}")
        if matrix is not None and n > 1 and matrix.stride(-1) != 1:
            raise ValueError(f"{name} has strides {matrix.stride()}: expected rows side by side")
    if out.ndim > 3 and not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}: expected a contiguous tensor for several batch dimensions")
    if out.numel() == 0:
        return out
    config = config or default_config(config_key(a.dtype, precision), traits_of(a.device).capability)
    left, right, target = _flat(a.expand(*batch, n, k)), _flat(b.expand(*batch, k, n)), _flat(out)
    addend = target if c is None else _flat(c)
    tiles = math.ceil(n / config.block)
    with on_device(out):
        symmetric_matmul_kernel[(tiles * tiles, len(target))](
            left,
            right,
            addend,
            target,
            n,
            k,
            tiles,
            *left.stride(),
            *right.stride(),
            *addend.stride()[:2],
            *target.stride()[:2],
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
            **OPTIONS,
        )
    return out


def _flat(matrices: Tensor) -> Tensor:
    """[batch, rows, columns]; over the same memory, but for several batch dimensions that cannot be seen as one."""
    return matrices[None] if matrices.ndim == 2 else matrices.flatten(0, -3)
