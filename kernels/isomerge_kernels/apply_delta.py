"""Write θ_i = θ₀ + α_i Δ for several α in one read of θ₀ and Δ, each rounded once to the output's dtype.

Rounding to bf16 can be stochastic, by the bits of ``reference.random_bits``: a GPU, a CPU and a merge that was resumed
give the same bytes (docs/kernels.md).
"""

# pyright: reportCallIssue=false, reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (What a launch takes, and types inside of a kernel, are Triton's own matter.)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import OPTIONS, Config, as_lines, on_device

# H200, bf16 + float32 to bf16: within 2 % of each other, 1.03 of the copy's rate at 14336 x 4096, 0.93 at 4096 x 4096.
CONFIGS = (Config(2048, 4), Config(1024, 4), Config(2048, 8))
CONFIG = CONFIGS[0]


@triton.jit
def random_bits(seed, element, BLOCK: tl.constexpr):
    """Return 16 random bits for each of BLOCK elements from ``element`` on, a multiple of 8; see ``reference``."""
    group = element // 8 + tl.arange(0, BLOCK // 8)
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    none = low & 0
    r0, r1, r2, r3 = tl.philox(seed, low, high, none, none)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # r0, r1, r2, r3 when flattened
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [BLOCK])


@triton.jit(do_not_specialize=["seed", "first"])
def apply_delta_kernel(
    base,
    delta,
    out,
    scalings,  # [outputs] float64
    seed,
    first,  # place of the one line's first element in its tensor, for the random bits
    n_outputs,
    n_blocks,
    elements,  # of a line
    base_stride,
    delta_stride,
    out_stride,
    output_stride,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    line, block = program // n_blocks, program % n_blocks
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    compute = delta.dtype.element_ty
    change = tl.load(delta + line * delta_stride + offsets, mask=mask, other=0.0)
    origin = tl.load(base + line * base_stride + offsets, mask=mask, other=0.0).to(compute)
    place = out + line * out_stride + offsets
    noise = tl.zeros([BLOCK], dtype=tl.uint32)
    if STOCHASTIC:
        noise = random_bits(seed, first + block * BLOCK, BLOCK)
    for output in range(n_outputs):
        value = origin + tl.load(scalings + output).to(compute) * change
        if out.dtype.element_ty != tl.float64:  # float64 to bf16 goes by float32, as in torch
            value = value.to(tl.float32)
        if STOCHASTIC:
            bits = value.to(tl.uint32, bitcast=True)
            raised = bits + noise
            finite = (bits & 0x7F800000) != 0x7F800000
            value = tl.where(finite, raised & 0xFFFF0000, bits).to(tl.float32, bitcast=True)
        tl.store(place, value.to(out.dtype.element_ty), mask=mask)
        place += output_stride


def apply_delta(
    base: Tensor,
    delta: Tensor,
    scalings: Sequence[float],
    dtype: torch.dtype,
    seed: int | None = None,
    first: int = 0,
    config: Config = CONFIG,
) -> list[Tensor]:
    """Return [θ₀ + α Δ for α in ``scalings``]; see ``ops.apply_delta``."""
    outputs = torch.empty(len(scalings), *base.shape, dtype=dtype, device=base.device)
    if seed is not None:  # the random bits go by an element's place in its tensor, which is one line then
        base, delta = base.contiguous(), delta.contiguous()
    lines = as_lines([base, delta, outputs[0]])
    n_blocks = triton.cdiv(lines.elements, config.block)
    alphas = torch.tensor(scalings, dtype=torch.float64, device="cpu").to(base.device, non_blocking=True)
    with on_device(base):
        apply_delta_kernel[(lines.n_lines * n_blocks,)](
            *lines.tensors,
            alphas,
            0 if seed is None else seed,
            first,
            len(scalings),
            n_blocks,
            lines.elements,
            *lines.strides,
            outputs.stride(0),
            STOCHASTIC=seed is not None,
            BLOCK=config.block,
            num_warps=config.num_warps,
            **OPTIONS,
        )
    return list(outputs)
