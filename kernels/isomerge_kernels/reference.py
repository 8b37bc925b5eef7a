"""Every kernel's operation in plain torch: what a CPU runs, and what GPU kernels are tested against.

Large tensors are walked in row blocks, so that the temporaries of a pass stay near ``BLOCK_ELEMENTS`` elements whatever
the tensor's size: a 128256 x 4096 embedding needs its fp32 sum once, not three times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# 1 MiB of fp32. Both passes take the same time from 2^16 to 2^19 (32000 x 768 bf16, 2-core CPU); larger blocks only
# cost memory, smaller ones time.
BLOCK_ELEMENTS = 1 << 18
# 8 tasks of 3072 x 768 take 7.4 ms in blocks of 2^16 or 2^17, 18 at 2^18, 52 at 2^15 (threads are woken too often), and
# 26 where every task is added to the whole sum.
SUM_BLOCK_ELEMENTS = 1 << 17


def row_blocks(shape: torch.Size | tuple[int, ...], block_elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Slices over the first dimension that cover about ``block_elements`` elements each."""
    if len(shape) == 0 or 0 in shape:
        return
    row_elements = 1
    for size in shape[1:]:
        row_elements *= size
    step = max(1, block_elements // max(1, row_elements))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def subtract(expert: Tensor, base: Tensor, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Δ = θ_t − θ₀, both operands widened to ``dtype`` before the subtraction (never rounded to the inputs' dtype).

    Args:
        expert, base: same shape, any float dtypes.
        dtype: of the result, at least as wide as both inputs.
        out: overwritten with the result where given.
    """
    out = torch.empty(base.shape, dtype=dtype, device=base.device) if out is None else out
    if base.ndim == 0:
        return out.copy_(expert.to(dtype) - base.to(dtype))
    for rows in row_blocks(base.shape):
        # copy_ widens block by block: no second full-size tensor in `dtype`.
        out[rows].copy_(expert[rows]).sub_(base[rows].to(dtype))
    return out


def task_sum(total: Tensor, expert: Tensor, base: Tensor, *, weight: float = 1.0) -> Tensor:
    """S ← S + w·(θ_t − θ₀) in place; returns ‖θ_t − θ₀‖_F², a 0-d float64 tensor on the same device.

    Args:
        total: S, fp32 or fp64, the shape of ``base``; the sum over tasks is made by one call a task.
        expert, base: any float dtypes not wider than ``total``.
    """
    squares = torch.zeros((), dtype=torch.float64, device=total.device)
    if total.ndim == 0:
        total, expert, base = total[None], expert[None], base[None]
    for rows in row_blocks(total.shape):
        delta = expert[rows].to(total.dtype, copy=True).sub_(base[rows].to(total.dtype))
        flat = delta.reshape(-1)
        # Over a block of 2^18, dot is right to 4e-8 and vector_norm to 2e-6; float64 would take four times as long.
        squares += torch.dot(flat, flat)
        total[rows].add_(delta, alpha=weight)
    return squares


def sum_deltas(deltas: Sequence[Tensor], *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """S = Σ_t Δ_t in ``dtype`` and ‖Δ_t‖_F² in float64, [T] for matrices, [T, B, ...] for batches; each byte read once.

    Args:
        deltas: T tensors of one shape, any float dtypes not wider than ``dtype``.
    """
    first = deltas[0]
    total = torch.empty(first.shape, dtype=dtype, device=first.device)
    batch = first.shape[:-2] if first.ndim > 2 else torch.Size()
    squares = torch.zeros(len(deltas), *batch, dtype=torch.float64, device=first.device)
    if 0 in first.shape:
        return total, squares
    compute = torch.float64 if first.dtype == torch.float64 else torch.float32
    members = math.prod(batch)
    sources = [delta.reshape(members, -1) for delta in deltas]
    for member, out in enumerate(total.view(members, -1)):
        dots = []
        # All tasks over one block before the next block: the float64 sum stays in the cache, where a pass over the
        # whole of S for each task would move it T times.
        for start in range(0, len(out), SUM_BLOCK_ELEMENTS):
            block = slice(start, start + SUM_BLOCK_ELEMENTS)
            for task, source in enumerate(sources):
                part = source[member, block]
                out[block].copy_(part) if task == 0 else out[block].add_(part)
                part = part.to(compute)
                dots.append(torch.dot(part, part))
        squares.view(len(deltas), members)[:, member] = torch.stack(dots).double().view(-1, len(deltas)).sum(0)
    return total, squares


def apply_delta(base: Tensor, delta: Tensor, *, scaling: float, dtype: torch.dtype) -> Tensor:
    """θ = θ₀ + α·Δ, computed in the dtype of ``delta`` (fp32 or fp64) and rounded once to ``dtype``."""
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    if base.ndim == 0:
        return out.copy_(base.to(delta.dtype).add(delta, alpha=scaling))
    for rows in row_blocks(base.shape):
        out[rows].copy_(base[rows].to(delta.dtype, copy=True).add_(delta[rows], alpha=scaling))
    return out


def count_nonfinite(x: Tensor) -> int:
    """How many entries are NaN or infinite."""
    if x.ndim == 0:
        x = x[None]
    return sum(int((~torch.isfinite(x[rows])).sum()) for rows in row_blocks(x.shape))


# From this many rows on a symmetric product is made of panels. At 768 four panels take 0.78 of a full product's time in
# float32 and float64, at 2048 0.72 (2-core CPU); at 304 they take longer.
PANELS, PANEL_ROWS = 4, 512


def mm(a: Tensor, b: Tensor) -> Tensor:
    """A B of [..., m, k] and [..., k, n]."""
    return a @ b


def mm_add(c: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """β C + α A B."""
    if c.ndim == 2:
        return torch.addmm(c, a, b, alpha=alpha, beta=beta)
    return (a @ b).mul_(alpha).add_(c, alpha=beta)


def sym_mm(a: Tensor, b: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """A B where that is symmetric (polynomials of one symmetric matrix), A Aᵀ without ``b``: about half the work.

    Args:
        a, b: [..., n, k] and [..., k, n].
        out: overwritten with the result where given.
    """
    b = a.mT if b is None else b
    rows = a.shape[-2]
    if out is None:
        out = torch.empty(
            *torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), rows, rows, dtype=a.dtype, device=a.device
        )
    return _sym_update(out, a, b, alpha=1.0, beta=0.0)


def sym_mm_add(
    c: Tensor, a: Tensor, b: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """β C + α A B for symmetric C and A B (see ``sym_mm``); ``out`` may be C itself."""
    out = c.clone() if out is None else out if out is c else out.copy_(c)
    return _sym_update(out, a, a.mT if b is None else b, alpha=alpha, beta=beta)


def _sym_update(out: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float) -> Tensor:
    """out ← β out + α A B, of which the lower block triangle is computed and mirrored."""
    rows = a.shape[-2]
    step = math.ceil(rows / PANELS) if rows >= PANEL_ROWS else max(1, rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        panel = out[..., start:stop, :stop]
        if out.ndim == 2:
            torch.addmm(panel, a[start:stop], b[:, :stop], alpha=alpha, beta=beta, out=panel)
        else:
            product = (a[..., start:stop, :] @ b[..., :, :stop]).mul_(alpha)
            panel.copy_(product if beta == 0.0 else product.add_(panel, alpha=beta))
        if start:
            out[..., :start, start:stop] = panel[..., :, :start].mT
    return out
