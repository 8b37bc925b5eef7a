"""Call the kernels: everything above calls these functions, and nothing above imports ``isomerge_kernels``.

Tensors on a GPU go to the Triton kernels, all others to their plain form in torch; each function says by what rule a
product is left to the vendor's library. Nothing falls back in silence: a GPU without Triton is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from isomerge_kernels import bf16x3, reference
from isomerge_kernels.devices import DeviceTraits as DeviceTraits, indexed as indexed, traits_of as traits_of
from isomerge_kernels.protocol import (
    FLOAT_DTYPES as FLOAT_DTYPES,
    TaskSum as TaskSum,
    check_apply,
    check_sum,
    compute_dtype as compute_dtype,
)
from isomerge_kernels.reference import (
    ALIGNMENT as ALIGNMENT,
    BLOCK_ELEMENTS as BLOCK_ELEMENTS,
    SUM_BLOCK_ELEMENTS as SUM_BLOCK_ELEMENTS,
    count_nonfinite as count_nonfinite,
    least_squares as least_squares,
    subtract as subtract,
    sum_of_squares as sum_of_squares,
)

from .errors import MissingPackageError

# Half the tiles save time when there are many of them: where a result has so many rows and, over all members, so many
# entries. Speed over torch.matmul on an H200: float64 0.8 at 1024 rows, 1.1 at 1280, 1.7 from 2048 on, 1.5 for eight
# members of 816 rows; tf32x3 0.9, 1.7 and 1.9. Below, our launch costs the host more (60 us) than torch's (20 us) and
# its product together. No AMD GPU has been timed.
SYMMETRIC_SIDE, SYMMETRIC_ENTRIES = 768, 1280 * 1280


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Have torch compute with ``count`` threads for the calling thread, and then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def gpu_kernels() -> ModuleType:
    """Return the launchers, or raise MissingPackageError where Triton is not installed or does not load."""
    try:
        from isomerge_kernels import launchers
    except ImportError as error:
        raise MissingPackageError(
            f"tensors on a GPU need Triton, which cannot be imported ({error}): pip install 'isomerge-fast[cuda]'"
        ) from error
    return launchers


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``: ``float32``."""
    return str(dtype).removeprefix("torch.")


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda  # true of ROCm too


def _backend(tensor: Tensor) -> ModuleType:
    return gpu_kernels() if _has_kernels(tensor) else reference


def task_sum(
    experts: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    batch_dims: int = 0,
    largest: bool = True,
) -> TaskSum:
    """Return S = Σ_t w_t (θ_t − θ₀), or Σ_t w_t θ_t without ``base``, with what is seen of every Δ_t.

    Each byte is read once. Δ_t is computed in float64 where an input is that, else in float32, and added up in
    ``dtype``.

    Args:
        experts: T tensors [..., M, N] of one shape (or of any other: 0-d, vectors), any float dtypes and strides.
        base: θ₀, of that shape.
        weights: w_t, T numbers; 1 when left out.
        dtype: of S, float32 or float64, when ``out`` is left out.
        out: S is written here: a contiguous float32 or float64 tensor of that shape.
        batch_dims: first dimensions that are a batch; what is seen of Δ_t is kept apart for each of its members.
        largest: whether max |Δ_t| is wanted, a third of the time on a CPU.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit each other.
    """
    first, backend = experts[0], _backend(experts[0])
    values = (1.0,) * len(experts) if weights is None else tuple(map(float, weights))
    out = torch.empty(first.shape, dtype=dtype, device=first.device) if out is None else out
    check_sum(experts, base, values, out)
    if 0 in out.shape:
        zero = torch.zeros(len(experts), *out.shape[:batch_dims], dtype=torch.float64, device=out.device)
        return TaskSum(out, zero, zero.clone(), zero.long())
    return backend.task_sum(experts, base, values, out, batch_dims, largest)


def apply_delta(
    base: Tensor,
    delta: Tensor,
    *,
    scalings: Sequence[float],
    dtype: torch.dtype,
    seed: int | None = None,
    first: int = 0,
) -> list[Tensor]:
    """Return [θ₀ + α Δ for α in ``scalings``], computed in the dtype of ``delta`` and rounded once to ``dtype``.

    Args:
        base: [..., M, N] (or any other shape), any float dtype.
        delta: of that shape, float32 or float64.
        seed: of stochastic rounding to bfloat16 by ``reference.random_bits``: up with the probability by which the
            value lies nearer to the neighbour above. Rounded to the nearest when left out.
        first: place of the first element in the tensor that these are some rows of, a multiple of 8: what is made in
            pieces has the random bits of the whole.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit each other; a seed with another dtype than bfloat16.
    """
    backend = _backend(base)
    check_apply(base, delta, dtype, seed, first)
    if 0 in base.shape or len(scalings) == 0:
        return [torch.empty(base.shape, dtype=dtype, device=base.device) for _ in scalings]
    return backend.apply_delta(base, delta, scalings, dtype, seed, first)


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None, precision: str | None = None) -> Tensor:
    """Return A B, of float32 in ``precision`` (``"bf16x3"``), by default what the vendor's library has for float32."""
    if precision != "bf16x3":
        return torch.matmul(a, b, out=out)
    product = bf16x3.mm(a, b)
    return product if out is None else out.copy_(product)


def mm_add(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Return β C + α A B; ``out`` may be C itself, ``precision`` is as in ``mm``."""
    if precision != "bf16x3" and c.ndim == 2:
        return torch.addmm(c, a, b, alpha=alpha, beta=beta, out=out)
    if precision != "bf16x3" and c.ndim == a.ndim == b.ndim == 3 and traits_of(c.device).is_gpu:  # one launch for three
        return torch.baddbmm(c, a, b, alpha=alpha, beta=beta, out=out)
    result = mm(a, b, precision=precision).mul_(alpha).add_(c, alpha=beta)
    return result if out is None else out.copy_(result)


def thin_mm(a: Tensor, b: Tensor, *, c: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Return β C + α A B for a B of few columns; on a CPU the columns of the result follow each other in memory.

    There it is made as (Bᵀ Aᵀ)ᵀ. With few columns on the right MKL takes two to seventeen times as long, by how A and B
    lie: 8 or 61 ms instead of 3.5 for Xᵀ B of a 3072 x 768 X and 8 columns in float64 (one core of an AMD EPYC).
    """
    if traits_of(a.device).is_gpu:
        return mm(a, b) if c is None else mm_add(c, a, b, alpha=alpha, beta=beta)
    product = mm(b.mT, a.mT) if c is None else mm_add(c.mT, b.mT, a.mT, alpha=alpha, beta=beta)
    return product.mT


def sym_mm(a: Tensor, b: Tensor | None = None, *, out: Tensor | None = None, precision: str | None = None) -> Tensor:
    """Return A B where that is symmetric (polynomials of one symmetric matrix), A Aᵀ without ``b``: half the work.

    ``precision`` is that of float32 products, by default ``product_precision``.
    """
    return sym_mm_add(None, a, b, out=out, precision=precision)


def sym_mm_add(
    c: Tensor | None,
    a: Tensor,
    b: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.0,
    out: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Return β C + α A B + γ I for symmetric C and A B (see ``sym_mm``); ``out`` may be C itself.

    One pass of one kernel where ``is_for_kernel`` holds: the polynomial a I + b G + c G² of a polar iteration's step.
    """
    if is_for_kernel(a):
        precision = precision or product_precision(a.device)
        return gpu_kernels().symmetric_matmul(
            a, b, c=c, alpha=alpha, beta=beta, gamma=gamma, out=out, precision=precision
        )
    if not _has_kernels(a) and precision is None:
        return reference.symmetric_matmul(a, b, c=c, alpha=alpha, beta=beta, gamma=gamma, out=out)
    b = a.mT if b is None else b
    if c is not None:
        result = mm_add(c, a, b, alpha=alpha, beta=beta, out=out, precision=precision)
    else:
        result = mm(a, b, out=out, precision=precision)
        if alpha != 1.0:
            result.mul_(alpha)
    if gamma:
        result.diagonal(dim1=-2, dim2=-1).add_(gamma)
    return result


def is_for_kernel(a: Tensor) -> bool:
    """Return whether a symmetric product goes to the kernel instead of the vendor's library.

    It does on a GPU, where the result has ``SYMMETRIC_SIDE`` rows and ``SYMMETRIC_ENTRIES`` entries or more: of
    float32, and of float64 where tensor cores multiply it (A100, H100). In 16 bits the vendor's product is about as
    fast at 4096 rows, and faster below.
    """
    n = a.shape[-2]
    if not _has_kernels(a) or n < SYMMETRIC_SIDE or a.shape[:-2].numel() * n * n < SYMMETRIC_ENTRIES:
        return False
    return a.dtype == torch.float32 or (a.dtype == torch.float64 and traits_of(a.device).has_float64_tensor_cores)


def product_precision(device: torch.device) -> str:
    """Return the precision of float32 products: tf32x3 on NVIDIA, on tensor cores and about as exact; else ieee."""
    return "ieee" if traits_of(device).capability is None else "tf32x3"
