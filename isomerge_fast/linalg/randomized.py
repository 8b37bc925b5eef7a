"""Find the top singular triplets of matrices by a random search, and prove that they are the top ones.

Every way to find them gives b = k + p orthonormal vectors near the top ones of the short side of A, and a bound on all
that lies beyond them (``triplets``). How that bound is known is what the ways differ in; none of them trusts the draw.

Reference: Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..ops import sym_mm_add, traits_of
from .blockwise import to_long_side, to_short_side
from .certificate import fixed_draw
from .cusolver import eigh
from .subspace_chebyshev import (
    EXACT_SHARE,
    LARGEST_FRACTION,
    SMALLEST_SIDE,
    SMALLEST_WIDE_PART,
    ChebyshevSubspace,
    filtered_block,
)
from .svd import NOISE, FullSvd
from .thin import thin_qrs
from .triplets import CERTIFIED, NOTHING, Problem, Triplets, column_norms, judged, rayleigh_ritz, shortcoming

# ‖A‖_F of what a first block leaves, over the smallest σ wanted, up to which steps with A itself find the rest, and how
# many: each takes the angle down by that squared.
LOW_RANK, LOW_RANK_STEPS = 0.1, 3
# Relative to ‖A‖_F²: what float32 products of that first block cannot tell from nothing.
UNSEEN = 1e-5
# Products with a block, times its width over r, that take a CPU as long as the eigensolver: a longer search is given up
# (768 x 28 in float64: 0.75 ms of 65, 768 x 48: 1.3).
SEARCH_WORK = 3.0
# Of r: blocks up to which a search takes a CPU less time than all directions do (of 768, width 24: 0.42 to 0.74 of it,
# 48: 0.96 to 1.33; of 1024, width 32: 0.5, 64: 1.6).
SEARCHED_SHARE = 1 / 24
# Sides below which, and shares of r from which on, a CPU takes one float64 SVD.
SMALLEST_GRAM, LARGEST_GRAM_SHARE = 96, 0.5
# float64 entries beyond these are brought nearer to 1 first: squares of them overflow, or vanish.
SMALLEST_ENTRY, LARGEST_ENTRY = 1e-120, 1e120


@dataclass(frozen=True)
class SvdEvidence:
    """Hold what is known of the triplets of each matrix, [...] each, in float64 on the CPU, before they are rounded."""

    residual: Tensor  # the largest of all ‖A v − s u‖ and ‖Aᵀu − s v‖, over s_1
    orthogonality: Tensor  # the larger one of ‖UᵀU − I‖_F and ‖VᵀV − I‖_F, over √k
    angle: Tensor  # a bound on ‖sin θ‖_F/√k between the subspaces found and the true ones, 1 where there is none
    gap: Tensor  # (s_k − s_{k+1}) / s_k as found; 1 where nothing lies beyond the cut
    captured: Tensor  # Σ s² / ‖A‖_F²
    determined: Tensor  # bool: whether the gap is large enough for float64 to tell the subspaces to ``tolerance``
    certified: Tensor  # bool: whether all of this keeps to ``tolerance``, the angle where the subspaces are determined
    algorithm: tuple[str, ...]  # what found the triplets of each matrix, in the order of the flattened batch
    escalations: tuple[str, ...]  # which ways did not do for which matrix, and why


@dataclass(frozen=True)
class SvdResult:
    """Hold A ≈ U diag(s) Vᴴ; it unpacks as the result of ``torch.linalg.svd`` does, ``u, s, vh = …``."""

    u: Tensor  # [..., M, k]
    s: Tensor  # [..., k], descending
    vh: Tensor  # [..., k, N]
    evidence: SvdEvidence

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.u, self.s, self.vh))


@dataclass(frozen=True)
class Solved:
    """Hold the top k triplets of n matrices, and what is known of them."""

    sides: tuple[Tensor, Tensor, Tensor]  # of the short side, of the long one, σ
    measures: Tensor  # as ``judged`` returns them, [7, n] on the CPU
    names: list[str]  # of the ways that found them
    missed: list[tuple[int, str]]  # the place of a matrix, and which way did not do and why


Way = Callable[[Problem], Triplets | str]


def top_triplets(a: Tensor, rank: int, *, n_oversamples: int, tolerance: float) -> SvdResult:
    """Return the top ``rank`` triplets of finite A [..., M, N] (see ``functional.randomized_svd``).

    On a CPU the matrices of a batch are solved one by one, so that none depends on its neighbours, or by LAPACK, which
    does the same; on a GPU together: there they share the number of steps, which changes them within what is certified.
    """
    batch, (rows, columns) = a.shape[:-2], a.shape[-2:]
    short, long, count = min(rows, columns), max(rows, columns), math.prod(batch)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    if rank == 0 or count == 0:
        sides = (a.new_zeros(count, short, rank), a.new_zeros(count, long, rank), a.new_zeros(count, rank))
        return _result([Solved(sides, NOTHING[:, None].expand(-1, count), ["none"] * count, [])], batch, dtype, a)
    members, exponents = _near_one(a.reshape(count, rows, columns))
    width = min(short, ChebyshevSubspace(oversampling=n_oversamples).block_width(short, rank, a.device))
    order = ways(short, width, a.device)
    together = [members] if traits_of(a.device).is_gpu or short < SMALLEST_GRAM else members.unbind()
    solved = [solve(Problem(part, rank, width, tolerance), order, place) for place, part in enumerate(together)]
    found = _result(solved, batch, dtype, a)
    if exponents is not None:
        found = replace(found, s=torch.ldexp(found.s, exponents.reshape(*batch, 1)))
    largest = found.s[..., :1]
    if not bool(((largest >= least_normal(dtype)) & torch.isfinite(largest) | (largest == 0)).all()):
        raise InputError(
            f"a {list(a.shape)} has singular values beyond the range of {dtype}, in which they are returned"
        )
    return found


def least_normal(dtype: torch.dtype) -> float:
    """Return the smallest number that ``dtype`` holds with all of its digits."""
    return torch.finfo(dtype).tiny


def _near_one(a: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return A [n, M, N] and None, or where squares of float64 entries are none, A over powers of 2 and these."""
    if a.dtype != torch.float64:
        return a, None
    largest = torch.linalg.vector_norm(a, math.inf, dim=(-2, -1))
    is_far = (largest > LARGEST_ENTRY) | ((largest > 0) & (largest < SMALLEST_ENTRY))
    if not bool(is_far.any()):
        return a, None
    exponents = torch.where(is_far, torch.frexp(largest)[1].clamp(-1000, 1000), 0)
    return torch.ldexp(a, -exponents[:, None, None]), exponents


def solve(problem: Problem, order: Sequence[tuple[str, Way]], first: int) -> Solved:
    """Solve by the ways of ``order``, each for those matrices whose certificate the one before missed.

    ``first`` is the place in the whole batch of the first of them.
    """
    device, count = problem.a.device, math.prod(problem.a.shape[:-2])
    pending = torch.ones(count, dtype=torch.bool, device="cpu")
    measures, names, missed = NOTHING[:, None].repeat(1, count), [""] * count, list[tuple[int, str]]()
    sides: tuple[Tensor, ...] = ()
    for name, way in order:
        places = pending.nonzero().flatten().tolist()
        part = problem if len(places) == count else problem.members(pending.to(device))
        try:
            found = way(part)
        except torch.linalg.LinAlgError as error:
            found = str(error).partition("\n")[0]
        if isinstance(found, str):
            missed += [(first + place, f"{name}: {found}") for place in places]
            continue
        top = tuple(each[..., : problem.rank] for each in (found.short, found.long, found.sigma))
        if part is problem:
            sides = top
        else:
            for whole, again in zip(sides, top, strict=True):
                whole[pending.to(device)] = again
        measures[:, pending] = judged(part, found).reshape(len(NOTHING), -1).cpu()
        for place in places:
            names[place] = name
            if not measures[CERTIFIED, place]:
                missed.append((first + place, f"{name}: {shortcoming(measures[:, place], problem.tolerance)}"))
        pending &= measures[CERTIFIED] == 0
        if not pending.any():
            break
    if not sides:
        raise InputError(f"no singular vectors were found of {list(problem.a.shape)}: {missed[-1][1]}")
    return Solved((sides[0], sides[1], sides[2]), measures, names, missed)


def _result(solved: Sequence[Solved], batch: Sequence[int], dtype: torch.dtype, a: Tensor) -> SvdResult:
    """Return what was found of all matrices of A [*batch, M, N], in ``dtype``."""
    wide, is_one = a.shape[-2] <= a.shape[-1], len(solved) == 1
    short, long, sigma = (
        (parts[0] if is_one else torch.stack(parts)).to(dtype)
        for parts in zip(*(each.sides for each in solved), strict=True)
    )
    u, v = (short, long) if wide else (long, short)
    measures = torch.cat([each.measures for each in solved], 1)
    numbers = [row.reshape(batch) for row in measures]
    missed = [text for each in solved for text in each.missed]
    evidence = SvdEvidence(
        *numbers[:-2],
        *(row > 0 for row in numbers[-2:]),
        algorithm=tuple(name for each in solved for name in each.names),
        escalations=tuple(f"a{_index(place, batch)}: {text}" for place, text in missed),
    )
    vh = v.mT
    return SvdResult(
        u.reshape(*batch, *u.shape[-2:]).contiguous(),
        sigma.reshape(*batch, sigma.shape[-1]).contiguous(),
        vh.reshape(*batch, *vh.shape[-2:]).contiguous(),
        evidence,
    )


def _index(place: int, batch: Sequence[int]) -> str:
    """Return the index of a matrix as it is written, nothing where there is only one."""
    return str([int(number) for number in np.unravel_index(place, tuple(batch))]) if batch else ""


def ways(short: int, width: int, device: torch.device) -> tuple[tuple[str, Way], ...]:
    """Return the ways to the top triplets by name, in order: each is taken where the certificate of the last missed.

    A way that finds nothing returns why.
    """
    is_gpu = traits_of(device).is_gpu
    svd = ("svd-fp64", full_svd)
    if not is_gpu and (short < SMALLEST_GRAM or width > short * LARGEST_GRAM_SHARE):
        return (svd,)
    whole = (("gram-eigh-fp64", all_directions), svd)
    if is_gpu:
        return (("chebyshev-fp64", search), *whole) if short >= SMALLEST_WIDE_PART and width <= short // 4 else whole
    if short < SMALLEST_SIDE or width > short * LARGEST_FRACTION:
        return whole
    searched = (("chebyshev-fp64", search), *whole) if width <= short * SEARCHED_SHARE else whole
    return (("range-finder-fp64", range_of_low_rank), *searched)


def range_of_low_rank(problem: Problem) -> Triplets | str:
    """Find the triplets of one A of nearly rank k by products with A alone: what is left of ‖A‖_F² bounds the rest."""
    a, rank, squares = problem.a, problem.rank, problem.squares
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    start = fixed_draw(min(a.shape), problem.width, dtype, a.device)
    image = to_short_side(a, torch.linalg.qr(to_long_side(a, start, dtype))[0]).double()
    seen = image.square().sum()
    if not bool(torch.isfinite(seen)):
        return "float32 products overflow"
    smallest = eigh(image.mT @ image)[0][-rank]
    if bool(squares - seen > torch.maximum(LOW_RANK**2 * smallest, UNSEEN * seen)):
        return f"{problem.width} directions leave {((squares - seen) / squares).sqrt().item():.1e} of the norm"
    step = 0
    while True:
        triplets, image = rayleigh_ritz(a, thin_qrs(image)[0][0])
        beyond = (squares - triplets.sigma.square().sum()).clamp_min(0.0) + problem.noise
        triplets = replace(triplets, beyond=beyond)
        is_small = bool(beyond <= LOW_RANK**2 * triplets.sigma[rank - 1].square())
        if not is_small or step == LOW_RANK_STEPS or bool(judged(problem, triplets)[CERTIFIED]):
            return triplets
        step += 1


def search(problem: Problem) -> Triplets | str:
    """Find the triplets by ``filtered_block``; a Cholesky factor shows that nothing else is as large.

    It is that of μ I − (G − V S² Vᵀ), μ halfway between the cut and the end of the block: where there is one, so there
    is of μ I − V'ᵀ G V' for a basis V' of what is orthogonal to V.
    """
    gram, rank = problem.gram, problem.rank
    is_gpu = traits_of(gram.device).is_gpu
    ritz = filtered_block(
        gram,
        rank,
        noise=problem.noise,
        angle=EXACT_SHARE * problem.tolerance,
        oversampling=problem.width - rank,
        max_work=math.inf if is_gpu else SEARCH_WORK * gram.shape[-1] / problem.width,
    )
    if ritz is None:
        return "directions at the cut (of one of a batch) lie too close together, or in the Gram matrix's rounding"
    triplets, _ = rayleigh_ritz(problem.a, ritz.vectors)
    squares = triplets.sigma.square()
    middle = (squares[..., rank - 1] + squares[..., -1]) / 2.0
    rest = sym_mm_add(gram, triplets.short * triplets.sigma[..., None, :], beta=-1.0)
    rest.diagonal(dim1=-2, dim2=-1).add_(middle[..., None])
    failed = torch.linalg.cholesky_ex(rest)[1]
    return replace(triplets, beyond=torch.where(failed == 0, middle + problem.noise, math.inf))


def all_directions(problem: Problem) -> Triplets:
    """Find the triplets by all eigenvectors of the Gram matrix, whose eigenvalues show what lies beyond."""
    values, vectors = eigh(problem.gram)
    width = problem.width
    triplets, _ = rayleigh_ritz(problem.a, vectors[..., -width:].flip(-1))
    if width == values.shape[-1]:
        return triplets
    return replace(triplets, beyond=values[..., -width - 1].clamp_min(0.0) + problem.noise)


def full_svd(problem: Problem) -> Triplets:
    """Find the triplets by an SVD in float64."""
    a = problem.a
    u, sigma, vh = FullSvd().svd(a)
    width = min(problem.rank + 1, sigma.shape[-1])
    short, long = (u, vh.mT) if a.shape[-2] <= a.shape[-1] else (vh.mT, u)
    short, long, kept = short[..., :width], long[..., :width], sigma[..., :width]
    image, back = to_long_side(a, short, torch.float64), to_short_side(a, long)
    beyond = torch.zeros_like(sigma[..., 0])
    if width < sigma.shape[-1]:
        beyond = (sigma[..., width] + NOISE * sigma[..., 0]).square()
    return Triplets(short, long, kept, column_norms(image, long, kept), column_norms(back, short, kept), beyond)
