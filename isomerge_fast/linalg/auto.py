"""Which solver a matrix gets, and why; and which ones follow when its certificate misses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Choice(Generic[S]):
    """A solver and the reason for it, as ``isomerge plan`` prints it; ``sum_dtype`` is what S is added up in."""

    solver: S
    reason: str
    sum_dtype: torch.dtype = torch.float64


def check_precision(precision: str) -> None:
    """Raises ConfigError for a precision that is none of ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is unknown{nearest(precision, PRECISIONS)}")


def polar_candidates(
    precision: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Choice[PolarSolver], ...]:
    """Solvers for polar(X), the first to be taken, each of the rest when the certificate of the one before misses.

    Args:
        precision: ``"fast"``, ``"default"`` or ``"reference"``: the relative error of the merged delta is at most
            1e-2, 1e-5 or 1e-8 (``TOLERANCES``) on full-rank input.
        shape: [..., M, N]; dtype: the compute dtype; device: where X is.

    Raises:
        ConfigError: unknown precision.
    """
    check_precision(precision)
    svd = Choice(FullSvd(), _svd_reason(precision, dtype))
    if precision == "reference" or dtype == torch.float64:
        return (svd,)
    rows, columns = shape[-2:]
    short, aspect = min(rows, columns), max(rows, columns) / max(1, min(rows, columns))
    exact = Choice(GramEigh(), "float64 Gram matrix: resolves float32 input")
    careful = Choice(GramEigh(rounding=0.0), "float64 products, and a Newton-Schulz step whatever is predicted")
    candidates: list[Choice[PolarSolver]] = [exact, careful, svd]
    traits = traits_of(device)
    if traits.is_gpu and short >= ITERATION_SIDE and math.prod(shape[:-2]) * short >= ITERATION_COLUMNS:
        tiers = ("fast", "default") if precision == "fast" else (precision,)
        iterations: dict[str, Choice[PolarSolver]] = {}
        for tier in tiers:
            if (iteration := _iteration(tier, aspect >= 2, traits)) is not None:
                iterations.setdefault(iteration.solver.name, iteration)
        return (*iterations.values(), *candidates)
    if aspect >= 2:
        # Long sums are well-conditioned: that float32 is enough for S is checked afterwards.
        candidates.insert(0, Choice(GramEigh(), "float64 Gram matrix of a float32 sum", torch.float32))
    if aspect >= 2 and precision == "fast":
        reason = f"float32 Gram matrix: {rows} x {columns} is tall or wide, and such sums are well-conditioned"
        candidates.insert(0, Choice(GramEigh(torch.float32), reason, torch.float32))
    return tuple(candidates)


def _iteration(precision: str, is_long: bool, traits: DeviceTraits) -> Choice[PolarSolver] | None:
    """The polar iteration that is fast on a GPU and keeps the promise of a tier, if there is one.

    Where tensor cores multiply no float64 (at 1/64 of float32's rate, say), an iteration of a square matrix would take
    some 40 n³ float64 operations, four times an eigensolver's, and float32 misses the default promise from κ = 1e3 on:
    such matrices are left to the eigensolver. Sums of long ones have κ of 10 to 100, which float32 serves.
    """
    shape = "tall or wide" if is_long else "nearly square"
    narrow = PolarExpress(torch.float32, largest_error=TOLERANCES[precision])
    if precision == "fast":
        products = "bf16x3" if traits.has_bfloat16_tensor_cores else None
        return Choice(replace(narrow, products=products), f"products only, of {products or 'float32'}")
    if not traits.has_float64_tensor_cores:
        return Choice(narrow, f"products only, of float32; {shape}") if is_long else None
    solver = GramNewtonSchulz() if is_long else PolarExpress()
    return Choice(solver, f"products only; {shape}")


def subspace_candidates(
    precision: str, dtype: torch.dtype, *, lean: bool = False, tall: bool = False
) -> tuple[Choice[Solver], ...]:
    """Solvers for the common and the task subspaces of Iso-CTS, as ``polar_candidates``.

    Args:
        lean: without the search, which needs U_k beside S and Δ_t.
        tall: where there is a search, which may miss what the Gram matrices of all directions do not.
    """
    check_precision(precision)
    svd: Choice[Solver] = Choice(FullSvd(), _svd_reason(precision, dtype))
    if precision == "reference" or dtype == torch.float64:
        return (svd,)
    exact: Choice[Solver] = Choice(ChebyshevSubspace(), "float64 Gram matrices; tall task parts by a certified search")
    if lean:
        return (Choice(GramEigh(), "float64 Gram matrices, in blocks: less memory than the search"), svd)
    whole: Choice[Solver] = Choice(GramEigh(), "float64 Gram matrices, all directions of the task parts")
    last = (whole, svd) if tall else (svd,)
    if precision == "default":
        return (exact, *last)
    loose = ChebyshevSubspace(parts_dtype=torch.float32, angle=FAST_ANGLE)
    return (Choice(loose, "as default, the task parts in float32 or to a looser angle"), exact, *last)


def spectrum_candidates(precision: str, dtype: torch.dtype) -> tuple[Choice[Solver], ...]:
    """Solvers for all singular values and the vectors of the short side, as ``polar_candidates``."""
    check_precision(precision)
    svd: Choice[Solver] = Choice(FullSvd(), _svd_reason(precision, dtype))
    if precision == "reference" or dtype == torch.float64:
        return (svd,)
    return Choice(GramEigh(), "float64 Gram matrix: resolves float32 input"), svd


def _svd_reason(precision: str, dtype: torch.dtype) -> str:
    if precision == "reference":
        return "precision is 'reference'"
    return "float64 input, beyond a Gram matrix" if dtype == torch.float64 else "the last resort"


def fitting(
    candidates: Sequence[Choice[S]], workspace_bytes: Callable[[Choice[S]], int], memory_bytes: int | None
) -> tuple[Choice[S], ...]:
    """The part of ``candidates`` that keeps to a ceiling; where none does, the one that needs least."""
    if memory_bytes is None:
        return tuple(candidates)
    return tuple(choice for choice in candidates if workspace_bytes(choice) <= memory_bytes) or (
        min(candidates, key=workspace_bytes),
    )
