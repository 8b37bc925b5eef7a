"""Run every kernel's operation in plain torch: on a CPU, and as what GPU kernels are tested against.

Large tensors are walked in row blocks, so that the temporaries of a pass stay near ``BLOCK_ELEMENTS`` elements whatever
the tensor's size: a 128256 x 4096 embedding needs its fp32 sum once, not three times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy
import torch
from torch import Tensor

from .devices import traits_of
from .protocol import TaskSum, compute_dtype

MASK = 0xFFFFFFFF
# 1 MiB of fp32. Both passes take the same time from 2^16 to 2^19 (32000 x 768 bf16, 2-core CPU); larger blocks only
# cost memory, smaller ones time.
BLOCK_ELEMENTS = 1 << 18
# 8 tasks of 4096 x 1024 in float32 take 28.1 ms of one core in blocks of 2^16, 23.0 at 2^17, 20.9 at 2^18, 19.5 at 2^19
# (AMD EPYC, 1 MiB of L2): smaller ones cost calls, larger ones memory.
SUM_BLOCK_ELEMENTS = 1 << 18
# Over 2^17 normal numbers dot in float32 is right to 1.1e-6 (MKL on that AMD, 4e-8 on Intel), over twice as many to
# 1.9e-6; vector_norm to 2e-6.
DOT_ELEMENTS = 1 << 17
# Of all tasks together, 64 KiB in float64, of which copies are made that nobody has planned for.
STACKED_ELEMENTS = 1 << 13
# Of memory that torch allocates, in bytes.
ALIGNMENT = 64


def row_blocks(x: Tensor, elements: int) -> Iterator[slice]:
    """Yield slices of the rows of ``x``, of about so many elements each."""
    step = max(1, elements // max(1, x[:1].numel()))
    for start in range(0, len(x), step):
        yield slice(start, start + step)


def subtract(expert: Tensor, base: Tensor, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return Δ = θ_t − θ₀, both widened to ``dtype`` before the subtraction (never rounded to the inputs' dtype).

    ``dtype`` is at least as wide as both.
    """
    out = torch.empty(base.shape, dtype=dtype, device=base.device) if out is None else out
    if base.ndim == 0:
        return out.copy_(expert.to(dtype) - base.to(dtype))
    for rows in row_blocks(base, traits_of(base.device).block_elements(BLOCK_ELEMENTS)):
        # copy_ widens block by block: no second full-size tensor in `dtype`.
        out[rows].copy_(expert[rows]).sub_(base[rows].to(dtype))
    return out


def task_sum(
    experts: Sequence[Tensor],
    base: Tensor | None,
    weights: Sequence[float],
    out: Tensor,
    batch_dims: int = 0,
    largest: bool = True,
) -> TaskSum:
    """Write S = Σ_t w_t (θ_t − θ₀) to ``out``, and return it with what is seen of every Δ_t; see ``ops.task_sum``."""
    if not batch_dims and out.numel() <= DOT_ELEMENTS:
        found = _sum_of_block(experts, base, weights, out, largest)
        if found is not None:
            return found
    batch, tasks = out.shape[:batch_dims], len(experts)
    compute = compute_dtype(*(tensor.dtype for tensor in experts), *([] if base is None else [base.dtype]))
    members = batch.numel()
    sources = [expert.reshape(members, -1) for expert in experts]
    origin = None if base is None else base.reshape(members, -1)
    room = min(SUM_BLOCK_ELEMENTS, out.numel() // members)
    dots = math.ceil(room / DOT_ELEMENTS)
    none = torch.zeros((), dtype=compute, device=out.device)
    # Taken once: a block's own temporaries, and views of it cut one by one, are a quarter of the time.
    wide_delta, wide_base = (torch.empty(room, dtype=compute, device=out.device) for _ in range(2))
    # Of a float64 sum: inside a merge fresh memory is new pages each time, and widening a block into it took 0.29 ms in
    # place of 0.07 (one core of an AMD EPYC).
    widest = None if out.dtype == compute else torch.empty(room, dtype=out.dtype, device=out.device)
    seen = []
    for member, total in enumerate(out.view(members, -1).unbind()):
        # All tasks over one block before the next block: S stays in the cache, where a pass over the whole of S for
        # each task would move it T times.
        of_tasks = zip(*(source[member].split(SUM_BLOCK_ELEMENTS) for source in sources), strict=True)
        of_base = itertools.repeat(None) if origin is None else origin[member].split(SUM_BLOCK_ELEMENTS)
        for target, parts, part_of_base in zip(total.split(SUM_BLOCK_ELEMENTS), of_tasks, of_base, strict=False):
            spare = wide_delta[: len(target)]
            from_base = None if part_of_base is None else _widened(part_of_base, wide_base[: len(target)])
            for task, part in enumerate(parts):
                is_first = task == 0 and weights[0] == 1.0
                delta = _delta(part, from_base, target if is_first and target.dtype == compute else spare)
                if task:
                    added = delta if widest is None else widest[: len(target)].copy_(delta)
                    target.add_(added, alpha=weights[task])
                elif not is_first:
                    torch.mul(delta, weights[0], out=target)
                elif delta is not target:
                    target.copy_(delta)
                of_parts = [torch.dot(part, part) for part in delta.split(DOT_ELEMENTS)]
                seen += [*of_parts, *[none] * (dots - len(of_parts))]
                if largest:  # which takes 20 us of 2^17 by aminmax, 210 by vector_norm
                    seen += torch.aminmax(delta)
    blocks = torch.stack(seen).double().view(members, -1, tasks, dots + (2 if largest else 0))
    of_blocks, extremes = blocks[..., :dots].sum(-1), blocks[..., dots:]
    is_plain = _mend_squares(of_blocks, extremes if largest else None, sources, origin, compute)
    squares = of_blocks.sum(1).mT.reshape(tasks, *batch).contiguous()
    nonfinite = torch.zeros_like(squares, dtype=torch.int64)
    # NaN and Inf show in the squares; counted only where there are any.
    for task in () if is_plain or bool(squares.isfinite().all()) else range(tasks):
        delta = experts[task].to(compute) if base is None else experts[task].to(compute) - base.to(compute)
        nonfinite[task] = (~delta.isfinite()).reshape(*batch, -1).sum(-1)
    if not largest:
        return TaskSum(out, squares, None, nonfinite)
    most = extremes.abs().amax((1, 3)).mT.reshape(squares.shape)
    return TaskSum(out, squares, most.masked_fill(nonfinite > 0, torch.nan), nonfinite)


def _sum_of_block(
    experts: Sequence[Tensor], base: Tensor | None, weights: Sequence[float], out: Tensor, largest: bool
) -> TaskSum | None:
    """Return ``task_sum`` of tensors that are one block, to the last digit; None where squares are out of range.

    Few numbers take their time for calls of torch, of which this has half as many, and fewer where they are
    ``_stacked``: 256 of eight tasks, with a base and the largest, take 110 and 70 us in place of 240.
    """
    target, tasks = out.view(-1), len(experts)
    compute = compute_dtype(*[tensor.dtype for tensor in experts], *([] if base is None else [base.dtype]))
    is_wider = out.dtype != compute
    origin = None if base is None else base.reshape(-1)
    stack = _stacked(experts, origin, compute)
    if stack is not None:
        deltas = stack.unbind()
        seen = [torch.dot(delta, delta) for delta in deltas]
        if is_wider and {*weights} == {1.0}:
            torch.sum(stack, 0, dtype=out.dtype, out=target)  # exact, but where one is 2^26 times as large as another
        else:
            torch.mul(deltas[0], weights[0], out=target)
            rest = stack[1:].to(out.dtype).unbind() if is_wider else deltas[1:]
            for delta, weight in zip(rest, weights[1:], strict=True):
                target.add_(delta, alpha=weight)
        squares, most = torch.stack(seen).double(), stack.abs().amax(1).double() if largest else None
    else:
        spare = torch.empty(len(target), dtype=compute, device=out.device)
        widest = torch.empty_like(target) if is_wider else None
        if origin is not None and origin.dtype != compute:
            origin = origin.to(compute)
        seen = []
        for task, (expert, weight) in enumerate(zip(experts, weights, strict=True)):
            is_first = task == 0 and weight == 1.0
            delta = _delta(expert.reshape(-1), origin, target if is_first and not is_wider else spare)
            if task:
                target.add_(delta if widest is None else widest.copy_(delta), alpha=weight)
            elif not is_first:
                torch.mul(delta, weight, out=target)
            elif delta is not target:
                target.copy_(delta)
            seen.append(torch.dot(delta, delta))
            if largest:
                seen += torch.aminmax(delta)
        found = torch.stack(seen).double().view(tasks, -1)
        squares, most = found[:, 0].contiguous(), found[:, 1:].abs().amax(1) if largest else None
    least = least_squares(compute)
    sizes = [math.nan] * tasks if most is None else most.tolist()
    for square, size in zip(squares.tolist(), sizes, strict=True):
        if not (least <= square < math.inf or square == size == 0):
            return None
    return TaskSum(out, squares, most, torch.zeros_like(squares, dtype=torch.int64))


def _stacked(experts: Sequence[Tensor], base: Tensor | None, compute: torch.dtype) -> Tensor | None:
    """Return all Δ_t [T, elements] in one tensor, of few numbers; ``base`` is flat.

    None of many, and where a row begins in memory in another way than what ``dot`` is given otherwise: its last digits
    may depend on that.
    """
    elements = experts[0].numel()
    if len(experts) * elements > STACKED_ELEMENTS or elements * compute.itemsize % ALIGNMENT:
        return None
    if base is None and any(expert.dtype == compute and expert.data_ptr() % ALIGNMENT for expert in experts):
        return None
    stack = torch.stack(list(experts)).view(len(experts), -1).to(compute)
    return stack if base is None else stack.sub_(base)


def _widened(x: Tensor, room: Tensor) -> Tensor:
    """Return a block in the dtype of ``room``: itself, or a copy there."""
    return x if x.dtype == room.dtype else room.copy_(x)


def _delta(expert: Tensor, base: Tensor | None, room: Tensor) -> Tensor:
    """Return a block's θ_t − θ₀ in the dtype of ``room``, there; without ``base`` θ_t, itself if it has that dtype."""
    if base is None:
        return _widened(expert, room)
    if expert.dtype == room.dtype:
        return torch.sub(expert, base, out=room)
    return room.copy_(expert).sub_(base)


def _mend_squares(
    squares: Tensor, extremes: Tensor | None, sources: Sequence[Tensor], origin: Tensor | None, compute: torch.dtype
) -> bool:
    """Compute the squares anew that underflowed or overflowed, in place; return whether there were none.

    ``squares`` [members, blocks, T] are ‖·‖² of every block of a Δ_t, ``extremes`` [..., 2] its least and largest
    entry, all float64. Experts and base are [members, elements] each.
    """
    smallest = least_squares(compute)
    if smallest <= float(squares.amin()) and float(squares.amax()) < math.inf:
        return True
    for member, block, task in torch.nonzero(~((squares >= smallest) & squares.isfinite())):
        if extremes is not None and not extremes[member, block, task].any():
            continue
        place = slice(int(block) * SUM_BLOCK_ELEMENTS, (int(block) + 1) * SUM_BLOCK_ELEMENTS)
        delta = sources[int(task)][member, place].to(compute)
        squares[member, block, task] = sum_of_squares(delta if origin is None else delta - origin[member, place])
    return False


def least_squares(compute: torch.dtype) -> float:
    """Return below what a block's sum of squares is lost among what ``compute`` cannot tell from 0."""
    return 1e8 * SUM_BLOCK_ELEMENTS * torch.finfo(compute).tiny


def sum_of_squares(x: Tensor) -> Tensor:
    """Return Σ x² in float64, of x scaled to the size of 1; see ``TaskSum.squares``."""
    size = x.abs().amax().double()
    if not 0 < size < math.inf:
        return size
    scaled = x.double() / size
    return (torch.dot(scaled, scaled) * size * size).clamp_min(torch.finfo(torch.float64).tiny)


def apply_delta(
    base: Tensor, delta: Tensor, scalings: Sequence[float], dtype: torch.dtype, seed: int | None = None, first: int = 0
) -> list[Tensor]:
    """Return [θ₀ + α Δ for α in ``scalings``]; see ``ops.apply_delta``."""
    outputs = [torch.empty(base.shape, dtype=dtype, device=base.device) for _ in scalings]
    origins, changes = base.reshape(-1), delta.reshape(-1)
    for start in range(0, base.numel(), BLOCK_ELEMENTS):
        block = slice(start, start + BLOCK_ELEMENTS)
        change = changes[block]
        noise = None if seed is None else random_bits(seed, first + start, len(change))
        for scaling, output in zip(scalings, outputs, strict=True):
            value = origins[block].to(delta.dtype, copy=True).add_(change, alpha=scaling)
            output.view(-1)[block] = value if noise is None else round_stochastically(value, noise)
    return outputs


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Cut the lower 16 bits of x in float32, and round up where they and the random ``bits``, 0 … 65535, carry."""
    raw = x.float().view(torch.int32)
    raised = (raw + bits.to(x.device, torch.int32)) & -0x10000
    infinite = (raw & 0x7F800000) == 0x7F800000  # NaN and Inf stay what they are
    return torch.where(infinite, raw, raised).view(torch.float32)


def random_bits(seed: int, element: int, count: int) -> Tensor:
    """Return 16 random bits, as int64, of ``count`` elements from ``element`` on: the same on every machine.

    Element e has half e mod 2, the lower first, of word (e mod 8) // 2 of Philox4x32-10, with the seed as its key and
    the counter (e // 8 mod 2^32, e // 8 / 2^32, 0, 0); e goes through the whole tensor, whatever its shape. Every α has
    the same bits, so that one output alone is what it is among several.

    Reference: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    first, last = element // 8, (element + count - 1) // 8
    group = torch.arange(first, last + 1, dtype=torch.int64, device="cpu")
    none = torch.zeros_like(group)
    words = philox4x32((group & MASK, group >> 32, none, none), (seed & MASK, seed >> 32))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1).flatten()
    return halves[element - 8 * first :][:count]


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Run ten rounds of Philox4x32; words of 32 bits in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words wraps around in int64, with the right bits all the same.
        low, high = c2 * 0xCD9E8D57, c0 * 0xD2511F53
        c0, c2 = (low >> 32 & MASK) ^ c1 ^ k0, (high >> 32 & MASK) ^ c3 ^ k1
        c1, c3 = low & MASK, high & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return c0, c1, c2, c3


def count_nonfinite(x: Tensor) -> Tensor:
    """Count the entries that are NaN or infinite: one number on the device of ``x``, which is not waited for."""
    # On a CPU the extremes tell at once, in a twentieth of the time, that there are none.
    if x.numel() == 0 or (x.device.type == "cpu" and all(map(torch.isfinite, torch.aminmax(x)))):
        return torch.zeros((), dtype=torch.int64, device=x.device)
    x = x[None] if x.ndim == 0 else x
    elements = traits_of(x.device).block_elements(4 * BLOCK_ELEMENTS)
    return torch.stack([(~torch.isfinite(x[rows])).sum() for rows in row_blocks(x, elements)]).sum()


# From this many rows on a symmetric product is made of panels. Eight take 0.63 of a full product's time at 768, 0.58 at
# 2048, and with a long side of four times as many 0.66 to 0.7; four take 0.67, 0.64 and the same (float32 and float64,
# one core of an AMD EPYC). At 304 they take longer.
PANELS, PANEL_ROWS = 8, 512


def symmetric_matmul(
    a: Tensor,
    b: Tensor | None = None,
    *,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return α A B + β C + γ I [..., n, n] for symmetric A B and C; A Aᵀ without ``b``. About half the work of A B.

    The lower block triangle is computed and mirrored. ``out`` may be C itself.
    """
    b = a.mT if b is None else b
    rows = a.shape[-2]
    if c is None:
        beta = 0.0
        if out is None:
            shape = numpy.broadcast_shapes(a.shape[:-2], b.shape[:-2])
            out = torch.empty(*shape, rows, rows, dtype=a.dtype, device=a.device)
    else:
        out = c.clone() if out is None else out if out is c else out.copy_(c)
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
    if gamma:
        out.diagonal(dim1=-2, dim2=-1).add_(gamma)
    return out
