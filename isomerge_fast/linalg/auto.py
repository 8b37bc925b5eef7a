"""Choose the solvers of a matrix: which is taken first and why, and which follow when its certificate misses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from ..errors import ConfigError, nearest
from ..ops import DeviceTraits, traits_of
from .gram_eigh import GramEigh
from .polar_express import PolarExpress
from .polar_gram import GramNewtonSchulz
from .protocol import PolarSolver, Solver
from .subspace_chebyshev import ChebyshevSubspace
from .svd import FullSvd

# The relative Frobenius error of the merged delta that each tier promises on full-rank input whose split is determined.
TOLERANCES = {"fast": 1e-2, "default": 1e-5, "reference": 1e-8}
PRECISIONS = tuple(TOLERANCES)

# A polar iteration is all products, which a GPU is made for. It is taken from this many columns on, short sides of a
# batch added up: up to sides of 1000 it takes 3 to 5 ms for its launches, where an eigensolver goes through one member
# after the other, column by column. H200, ms by iteration / by eigensolver: 2.8 / 3.8 at 256, 3.4 / 6.4 at 512,
# 3.5 / 9.5 at 768, 4.7 / 14 at 1024, 13 / 29 at 2048.
ITERATION_COLUMNS = 256
# Below this side cuSOLVER takes a whole batch at once.
ITERATION_SIDE = 64

# ‖sin θ‖/√s of tall task parts in the fast tier, which may be magnified twenty times (see ``ChebyshevSubspace``).
FAST_ANGLE = 5e-4

S = TypeVar("S", bound=PolarSolver, covariant=True)


# One matrix on a CPU is small up to this side, up to so many elements of all tasks together (for the memory's sake),
# and up to this for elements times side. Of the general form's time it takes (1:1, 1:2 and 2:1, one thread, T = 2, 8)
# Iso-C 0.5 at a side of 56 or 64, 0.6 to 0.7 at 96, 0.75 to 0.9 at 127, and Iso-CTS 0.2 to 0.4, 0.3 to 0.6 and 0.4 to
# 0.8. (Where the tier is fast, 127 x 254 takes Iso-C 1.0.) 63 x 1040 still takes Iso-C 0.8 and Iso-CTS 0.6, 63 x 2000
# takes both about as long.
SMALL_SIDE, SMALL_ELEMENTS, SMALL_PRODUCT = 128, 1 << 18, 1 << 22


# Matrices of one shape are merged as a stack up to this side and size, as many as are about so many elements together.
# H200, ms a matrix one by one / in a stack: docs/gpu.md.
STACK_SIDE, STACK_MATRIX_ELEMENTS, STACK_ELEMENTS = 1024, 1 << 23, 1 << 25
SMALLEST_STACK, LARGEST_STACK = 8, 64


@dataclass(frozen=True)
class Candidate(Generic[S]):
    """Pair a solver with the reason for it, as ``isomerge plan`` prints it; ``sum_dtype`` is the dtype of S.

    Where ``is_small``, a method first tries its form for small matrices (``methods/small.py``), and then the solver.
    """

    solver: S
    reason: str
    sum_dtype: torch.dtype = torch.float64
    is_small: bool = False


Choice = Candidate  # as it was called before, for one release more


def check_precision(precision: str) -> None:
    """Raise ConfigError for a precision that is none of ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is unknown{nearest(precision, PRECISIONS)}")


# The same of every matrix, and made once: for 16 x 16 numbers making them takes longer than choosing.
_LAST = Candidate(FullSvd(), "the last resort")
_CAREFUL = Candidate(GramEigh(rounding=0.0), "float64 products, and a Newton-Schulz step whatever is predicted")
_SMALL = Candidate(GramEigh(), f"float64 Gram matrices, in few calls: a side is {SMALL_SIDE} at most", is_small=True)


def _svd(precision: str, dtype: torch.dtype) -> tuple[Candidate[FullSvd], bool]:
    """Return the full SVD as the last candidate, and whether it is the only one."""
    check_precision(precision)
    if precision == "reference":
        return Candidate(FullSvd(), "precision is 'reference'"), True
    if dtype == torch.float64:
        return Candidate(FullSvd(), "float64 input, beyond a Gram matrix"), True
    return _LAST, False


def small_candidate(shape: tuple[int, ...], tasks: int, device: torch.device) -> Candidate[GramEigh] | None:
    """Return the candidate of one small matrix on a CPU, None for others."""
    if len(shape) != 2 or traits_of(device).is_gpu:
        return None
    short, elements = min(shape), shape[0] * shape[1]
    if not 0 < short <= SMALL_SIDE or tasks * elements > SMALL_ELEMENTS or elements * short > SMALL_PRODUCT:
        return None
    return _SMALL


def stack_places(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> int:
    """Return how many places a stack of matrices of this shape has on ``device``; 1 where there is none.

    A power of two, by shape and device alone. Stacks are solved by float64 products.
    """
    if len(shape) != 2 or dtype == torch.float64 or not traits_of(device).has_float64_tensor_cores:
        return 1
    elements = shape[0] * shape[1]
    if min(shape) > STACK_SIDE or not 0 < elements <= STACK_MATRIX_ELEMENTS:
        return 1
    places = 1 << max(0, (STACK_ELEMENTS // elements).bit_length() - 1)
    return min(LARGEST_STACK, max(SMALLEST_STACK, places))


def polar_candidates(
    precision: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Candidate[PolarSolver], ...]:
    """Return the solvers for polar(X) in order: each is tried when the certificate of the one before misses.

    ``precision`` is a tier of ``TOLERANCES``, or ConfigError is raised; X [..., M, N] is computed in ``dtype``.
    """
    svd, only = _svd(precision, dtype)
    if only:
        return (svd,)
    if (small := small_candidate(shape, 1, device)) is not None:
        return (small, _CAREFUL, svd)
    rows, columns = shape[-2:]
    short, aspect = min(rows, columns), max(rows, columns) / max(1, min(rows, columns))
    exact = Candidate(GramEigh(), "float64 Gram matrix: resolves float32 input")
    candidates: list[Candidate[PolarSolver]] = [exact, _CAREFUL, svd]
    traits = traits_of(device)
    if traits.is_gpu and short >= ITERATION_SIDE and math.prod(shape[:-2]) * short >= ITERATION_COLUMNS:
        tiers = ("fast", "default") if precision == "fast" else (precision,)
        iterations: dict[str, Candidate[PolarSolver]] = {}
        for tier in tiers:
            if (iteration := _iteration(tier, aspect >= 2, traits)) is not None:
                iterations.setdefault(iteration.solver.name, iteration)
        return (*iterations.values(), *candidates)
    if aspect >= 2:
        # Long sums are well-conditioned: that float32 is enough for S is checked afterwards.
        candidates.insert(0, Candidate(GramEigh(), "float64 Gram matrix of a float32 sum", torch.float32))
    if aspect >= 2 and precision == "fast":
        reason = f"float32 Gram matrix: {rows} x {columns} is tall or wide, and such sums are well-conditioned"
        candidates.insert(0, Candidate(GramEigh(torch.float32), reason, torch.float32))
    return tuple(candidates)


def _iteration(precision: str, is_long: bool, traits: DeviceTraits) -> Candidate[PolarSolver] | None:
    """Return the polar iteration that is fast on a GPU and keeps a tier's tolerance, if there is one.

    There is none of a square matrix where tensor cores do not multiply float64: it takes some 40 n³ float64 operations,
    four times an eigensolver's (docs/numerics.md, "Polar iterations").
    """
    shape = "tall or wide" if is_long else "nearly square"
    narrow = PolarExpress(torch.float32, largest_error=TOLERANCES[precision])
    if precision == "fast":
        products = "bf16x3" if traits.has_bfloat16_tensor_cores else None
        return Candidate(replace(narrow, products=products), f"products only, of {products or 'float32'}")
    if not traits.has_float64_tensor_cores:
        return Candidate(narrow, f"products only, of float32; {shape}") if is_long else None
    return Candidate(GramNewtonSchulz() if is_long else PolarExpress(), f"products only; {shape}")


def subspace_candidates(
    precision: str,
    dtype: torch.dtype,
    *,
    lean: bool = False,
    tall: bool = False,
    small: Candidate[GramEigh] | None = None,
) -> tuple[Candidate[Solver], ...]:
    """Return the solvers for the common and the task subspaces of Iso-CTS, in order as ``polar_candidates``.

    ``small`` is the candidate of a small matrix. ``lean`` leaves out the search, which needs U_k beside S and Δ_t.
    Where matrices are ``tall`` and it may run, the Gram matrices of all directions follow, which find what it misses.
    """
    svd, only = _svd(precision, dtype)
    if only:
        return (svd,)
    if small is not None:
        return (small, svd)
    if lean:
        return (Candidate(GramEigh(), "float64 Gram matrices, in blocks: less memory than the search"), svd)
    exact = Candidate(ChebyshevSubspace(), "float64 Gram matrices; tall task parts by a certified search")
    whole = Candidate(GramEigh(), "float64 Gram matrices, all directions of the task parts")
    last = (whole, svd) if tall else (svd,)
    if precision == "default":
        return (exact, *last)
    loose = ChebyshevSubspace(parts_dtype=torch.float32, angle=FAST_ANGLE)
    return (Candidate(loose, "as default, the task parts in float32 or to a looser angle"), exact, *last)


def spectrum_candidates(precision: str, dtype: torch.dtype) -> tuple[Candidate[Solver], ...]:
    """Return the solvers for all singular values and the short side's vectors, in order as ``polar_candidates``."""
    svd, only = _svd(precision, dtype)
    return (svd,) if only else (Candidate(GramEigh(), "float64 Gram matrix: resolves float32 input"), svd)
