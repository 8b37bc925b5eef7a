"""Merge by Iso-CTS: Iso-C on the top directions of the sum, and in place of the rest the tasks' own directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..linalg.auto import Candidate, small_candidate, subspace_candidates
from ..linalg.blockwise import block_elements, short_side_gram, to_long_side, to_short_side
from ..linalg.certificate import orthogonality as polar_orthogonality
from ..linalg.filtered import SpectralFilter
from ..linalg.protocol import Factorization, Solver, Subspace, reciprocal
from ..ops import thin_mm, traits_of
from .base import RowwiseMerge
from .iso_c import IsoC
from .recombine import projection_angle, recombine, recombine_literally
from .rowwise.iso_c import RowwiseIsoC, rowwise_iso_c_bytes
from .rowwise.iso_cts import RowwiseIsoCTS, learning_bytes, mapping_bytes
from .rowwise.passes import fits_rowwise
from .small import small_iso_cts
from .source import DeltaSource, TensorSpec
from .spectral import Spectral, require_matrices, spectral_mean
from .stats import Check, MergeStats
from .sums import rounding_of, spectral_sum

# Of U_k, beside the cut.
CUT_COLUMNS = 4


def split_rank(min_dim: int, tasks: int, common_fraction: float) -> tuple[int, int]:
    """Return (k, s): directions kept of the sum, and directions given to every task, k + T·s = r.

    ts = round((r − int(r·f)) / T)·T with banker's rounding, k = r − ts, s = ts / T: the rounding of the released code.
    A negative k (small r, many tasks, f near 0) raises ConfigError; the released code silently indexes from the other
    end.
    """
    s = round((min_dim - int(min_dim * common_fraction)) / tasks)
    k = min_dim - s * tasks
    if k < 0:
        raise ConfigError(
            f"common_fraction {common_fraction:g} leaves k = {k} common directions of {min_dim} with {tasks} tasks: "
            f"rounding gives every task {s} directions, {s * tasks} in all. Use a larger common_fraction."
        )
    return k, s


@dataclass(frozen=True)
class IsoCTS(Spectral):
    """Merge by Δ = σ̄ · U° V°ᵀ, with U° = polar([U_1 … U_T, U_k]), V° likewise, and σ̄ the mean of all kept σ.

    U_k, V_k are the top k singular pairs of S = Σ_t Δ_t; U_t, V_t the top s of R_t = Δ_t − U_k U_kᵀ Δ_t (projected on
    the left only, also for tall matrices); (k, s) from ``split_rank``. s = 0 is Iso-C.

    One factorisation of S and one of each small task part; no M x N SVD (docs/numerics.md, "The identities").

    Args:
        common_fraction: f, the fraction of the r directions kept for the common subspace.
        rank_policy, precision, solver, memory_bytes: as for ``Spectral``. Directions at or below the numerical
            tolerance are left out of the common and the task parts, and σ̄ is over those kept.
        tasks_at_once: tasks whose parts are solved as one batch; by default one on a CPU, as many as fit on a GPU.

    Reference: arXiv 2502.04959 (Iso-CTS).
    """

    common_fraction: float = 0.8
    solver: Solver | None = field(default=None, kw_only=True, metadata={"kind": Solver})
    tasks_at_once: int | None = None

    name: ClassVar[str] = "iso-cts"
    citation: ClassVar[str] = "arXiv 2502.04959"
    deltas_taken: ClassVar[int] = 1
    rowwise_passes: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.common_fraction <= 1.0:
            raise ConfigError(f"common_fraction is {self.common_fraction:g}; it lies between 0 and 1")
        if self.tasks_at_once == 0:
            raise ConfigError("tasks_at_once is 0; it is 1 or more")

    def check(self, spec: TensorSpec, tasks: int) -> None:
        split_rank(min(spec.shape), tasks, self.common_fraction)

    def solvers(self, spec: TensorSpec, tasks: int, device: torch.device) -> Sequence[Candidate[Solver]]:
        rows, columns = spec.shape[-2:]
        small = small_candidate(spec.shape, tasks, device)
        solvers = subspace_candidates(self.precision, spec.dtype, tall=rows > columns, small=small)
        if self.memory_bytes is None or self.solving_bytes(solvers[0], spec, tasks, device) <= self.memory_bytes:
            return solvers
        return subspace_candidates(self.precision, spec.dtype, lean=True)

    def stack_candidate(self, spec: TensorSpec, tasks: int) -> Candidate[Solver] | None:
        k, s = split_rank(min(spec.shape), tasks, self.common_fraction)
        if s == 0 or k < s * tasks:
            return None
        return Candidate(SpectralFilter(in_stack=True), "products only, the same steps for all matrices of a stack")

    def explain(self, spec: TensorSpec, tasks: int, device: torch.device) -> str:
        if split_rank(min(spec.shape), tasks, self.common_fraction)[1] == 0:
            return f"too few directions for {tasks} tasks: {self._iso_c().explain(spec, tasks, device)}"
        return super().explain(spec, tasks, device)

    def _iso_c(self) -> IsoC:
        return IsoC(**{option.name: getattr(self, option.name) for option in fields(IsoC)})

    def solving_bytes(self, candidate: Candidate[Solver], spec: TensorSpec, tasks: int, device: torch.device) -> int:
        k, s = split_rank(min(spec.shape[-2:]), tasks, self.common_fraction)
        at_once = self._tasks_at_once(candidate.solver, spec, tasks, k, s, device)
        all_deltas = 16 * tasks * spec.elements if candidate.is_small else 0  # as they are and in float64, or R_t
        return all_deltas + self._bytes_with(candidate.solver, spec, tasks, k, s, at_once, device)

    def _tasks_at_once(self, solver: Solver, spec: TensorSpec, tasks: int, k: int, s: int, device: torch.device) -> int:
        """Return how many tasks' small problems are solved as one batch.

        On a GPU as many as fit under the ceiling, or into half of all its memory. (What is free of it would change the
        bytes from run to run.) On a CPU one: a batch of 8 gains 5 % in products and nothing in eigensolvers.
        """
        if self.tasks_at_once is not None:
            return max(1, min(self.tasks_at_once, tasks))
        traits = traits_of(device)
        if not traits.is_gpu:
            return 1
        room = traits.memory_bytes // 2 if self.memory_bytes is None else self.memory_bytes
        return most_that_fit(tasks, room, lambda count: self._bytes_with(solver, spec, tasks, k, s, count, device))

    def _bytes_with(
        self, solver: Solver, spec: TensorSpec, tasks: int, k: int, s: int, at_once: int, device: torch.device
    ) -> int:
        rows, columns = spec.shape[-2:]
        elements, members = rows * columns, spec.elements // max(1, rows * columns)
        item = self.result_dtype(spec.dtype).itemsize
        short, long = min(rows, columns), max(rows, columns)
        on_gpu = traits_of(device).is_gpu
        thin = 8 * long * s * tasks
        small = 8 * 10 * short**2
        splitting = 8 * elements + solver.workspace_bytes(rows, columns, spec.dtype, device)
        bases = thin + 2 * at_once * thin // max(1, tasks)  # of the tasks before, and those being made
        # On a GPU one more: a Δ_t on its way into the batch, or the base's rows in the dtype of Δ_t.
        delta = spec.dtype.itemsize * elements * (at_once + on_gpu)
        parts = solver.part_bytes(rows, columns, k, s, at_once, spec.dtype, device)
        task_parts = 8 * elements + delta + bases + parts
        left = item * long * s * tasks
        if on_gpu and rows <= columns:
            small = 8 * 7 * min(short, 2 * s * tasks) ** 2 + 8 * short**2  # Z and its iterates, beside a basis or two
        if rows <= columns:  # V_k in float64, V_ts and what is left of it, then V_k in float32 and the result
            recombining = 8 * long * k + max(4 * thin, item * (long * k + elements) + 4 * left) + small
            if not on_gpu:  # S in place of V_k, and blocks of it and of the result
                blocks = 16 * min(elements, max(block_elements(device), short))
                factored = 8 * elements + max(4 * thin, item * elements + 4 * left + blocks) + small
                recombining = max(recombining, factored)
        else:  # U_k, then U_ts and its polar factor, then the result
            recombining = item * long * k + max(3 * thin, item * elements + 3 * left) + small
        return members * max(splitting, task_parts, recombining)

    def rowwise(self, source: DeltaSource) -> RowwiseMerge:
        """Return σ̄ U° V°ᵀ by rows, as ``rowwise.iso_cts`` describes it."""
        columns, tasks = source.shape[1], source.n_tasks
        k, s = split_rank(columns, tasks, self.common_fraction)
        if s == 0:
            iso_c = RowwiseIsoC(source, f"{self.name}/{IsoC.name}/by-rows", self)
            iso_c.values |= {"k": columns, "s": 0}
            return iso_c
        at_once = self._tasks_in_a_pass(TensorSpec("", tuple(source.shape), source.dtype), tasks, s, source.device)
        return RowwiseIsoCTS(source, f"{self.name}/by-rows", self, k, s, at_once)

    def rowwise_bytes(self, spec: TensorSpec, tasks: int, block_elements: int, device: torch.device) -> int | None:
        if self.solver is not None or not fits_rowwise(spec, self.precision):
            return None
        _, s = split_rank(spec.shape[1], tasks, self.common_fraction)
        if s == 0:
            return rowwise_iso_c_bytes(spec, block_elements, device)
        learning = learning_bytes(spec, tasks, s, self._tasks_in_a_pass(spec, tasks, s, device), device)
        return max(learning, mapping_bytes(spec, tasks, s, block_elements, device))

    def _tasks_in_a_pass(self, spec: TensorSpec, tasks: int, s: int, device: torch.device) -> int:
        """Return how many tasks share a pass over all rows: as many as there is memory for."""
        room = math.inf if self.memory_bytes is None else self.memory_bytes
        return most_that_fit(tasks, room, lambda count: learning_bytes(spec, tasks, s, count, device))

    def flops(self, spec: TensorSpec, tasks: int) -> float:
        short = min(spec.shape)
        rows, columns = spec.shape
        sum_part = 8.0 * spec.elements * short + 12.0 * short**3
        part = short * (1.0 - self.common_fraction)
        if rows <= columns:
            task_part = 4.0 * spec.elements * part + 4.0 * part * part * columns + 12.0 * part**3
        else:
            task_part = 8.0 * spec.elements * short + 12.0 * short**3
        return sum_part + tasks * task_part + 8.0 * spec.elements * short

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        require_matrices(self.name, deltas.shape)
        rows, columns = deltas.full_spec.shape[-2:]
        _, s = split_rank(min(rows, columns), deltas.n_tasks, self.common_fraction)
        if s == 0 or 0 in deltas.shape:
            value, stats = self._iso_c().merge(deltas)
            values = {**stats.values, "k": min(rows, columns), "s": 0}
            return value, replace(stats, algorithm=f"{self.name}/{stats.algorithm}", values=values)
        return super().merge(deltas)

    def attempt(self, deltas: DeltaSource, candidate: Candidate[Solver]) -> tuple[Tensor, MergeStats]:
        solver, tasks = candidate.solver, deltas.n_tasks
        min_dim = min(deltas.full_spec.shape[-2:])
        rows, columns = deltas.shape[-2:]
        # There are no more directions than coordinates.
        k, s = (min(count, rows, columns) for count in split_rank(min_dim, tasks, self.common_fraction))
        # In float64: rounding S to float32 alone was an error of 6e-5 (768 x 300, gap at the cut 0.3 %).
        total, squares, zero_limit, of_deltas = spectral_sum(deltas, torch.float64)
        dtype = self.result_dtype(deltas.dtype)
        if candidate.is_small and deltas.shape == deltas.full_spec.shape:
            norms = of_deltas["delta_norms"].tolist()
            found = small_iso_cts(deltas, total, k, s, norms, float(zero_limit))
            if found is not None and found.holds(self.tolerance):
                values = {"k": k, "s": s, **of_deltas}
                return found.merged(f"{self.name}/{solver.name}", dtype, self.tolerance, values)
        factors = solver.factorize(total, tolerance=zero_limit)
        common, long_dtype = _common_part(factors, solver, k, dtype)
        spec = TensorSpec("", tuple(deltas.shape), deltas.dtype)
        at_once = self._tasks_at_once(solver, spec, tasks, k, s, deltas.device)
        parts = self._task_parts(factors, deltas, common, s, squares.sqrt(), at_once, solver.in_stack)
        # The short form needs every direction of every matrix of the batch.
        is_whole = all(each.is_whole for each in (common, *parts))
        nonzero = torch.linalg.vector_norm(total, dim=(-2, -1)) > 0
        # On a CPU V_k = Sᵀ U_k Σ_k⁻¹ of a wide S takes part in the short form as these factors.
        is_factored = is_whole and bool(parts) and common.wide and not traits_of(total.device).is_gpu
        factor = total if is_factored and common.long is None and common.isometry is None else None
        if common.long is None and factor is None:
            common = factors.complete(common, long_dtype)
        if not common.wide and common.isometry is None:
            common = replace(common, long=common.u.to(long_dtype))
        del total, factors
        sigma = torch.cat([common.sigma, *(part.sigma for part in parts)], dim=-1)
        rank = (sigma > 0).sum(-1)
        sigma_mean = spectral_mean(sigma.sum(-1), rank, min_dim, self.rank_policy) * nonzero
        unresolved = common.unresolved + sum(part.unresolved for part in parts)
        # Every direction that is off by θ costs √2 θ of √r, and those of tasks as much more as they are alike.
        angles = 2.0 * k * common.angle.square()
        same_directions = torch.zeros_like(rank)
        if not parts:
            value = isometry_of(common, dtype)
            orthogonality = polar_orthogonality(value).double()
        else:
            of_tasks = s * sum(part.angle.square() for part in parts)
            if is_whole:
                joined = recombine(common, parts, dtype, solver, factor)
            else:
                joined = recombine_literally(common, parts, dtype, solver)
            value, orthogonality, same_directions = joined.value, joined.orthogonality, joined.same_directions
            angles = angles + joined.growth.square() * of_tasks + joined.error.square()
            del joined
        value *= sigma_mean.to(value.dtype)[..., None, None]
        values = {"sigma_mean": sigma_mean, "rank": rank, "min_dim": min_dim, "k": k, "s": s, "gap": common.gap}
        checks = {
            "orthogonality": Check(orthogonality, self.tolerance),
            "angle": Check((angles / min_dim).sqrt(), self.tolerance),
            "unresolved": Check(unresolved, 0),
        }
        values |= {"same_directions": same_directions, **of_deltas}
        return value, MergeStats(f"{self.name}/{solver.name}", values, checks)

    def _task_parts(
        self,
        factors: Factorization,
        deltas: DeltaSource,
        common: Subspace,
        s: int,
        norms: Tensor,
        at_once: int,
        in_stack: bool,
    ) -> list[Subspace]:
        """Return the top s triplets of every R_t, solved ``at_once`` at a time."""
        parts: list[Subspace] = []
        # Where U_k is all of a wide matrix's left side, as in coordinates it may be, R_t = 0.
        part_of = partial(self._task_part, factors, common=common, s=s, full_spec=deltas.full_spec, in_stack=in_stack)
        nothing_left = common.complement is not None and common.complement.shape[-1] == 0
        for start in range(0, 0 if nothing_left else deltas.n_tasks, at_once):
            norm = norms[start : start + at_once]
            # No name for a delta here: it would outlive the loop, beside what is made of S next.
            if at_once == 1:
                parts.append(part_of(deltas.delta(start), norm=norm[0]))
            else:
                stack = torch.empty(len(norm), *deltas.shape, dtype=deltas.dtype, device=deltas.device)
                for task in range(len(norm)):
                    stack[task] = deltas.delta(start + task)
                parts += part_of(stack, norm=norm).unbind()
                del stack
        return parts

    def _task_part(
        self,
        factors: Factorization,
        delta: Tensor,
        *,
        common: Subspace,
        s: int,
        norm: Tensor,
        full_spec: TensorSpec,
        in_stack: bool,
    ) -> Subspace:
        """Return the top s triplets of R above the rounding. One read of the device, and none in a stack.

        The rounding is that of Δ, and where directions of S are missing, that of S.
        """
        limit = rounding_of(norm, full_spec)
        if not common.is_whole:
            limit = limit + factors.tolerance * residual_noise(delta, factors.x, common)
        part = factors.residual(delta, common, s, norm=norm, tolerance=limit)
        # The error of U_k, first as if it concerned all of Δ; where that would matter, what it does concern.
        turned, min_dim = common.angle * math.sqrt(common.sigma.shape[-1]), common.short.shape[-2]
        if in_stack:
            share = share_at_cut(delta, factors.x, common)
            angle = part.angle + projection_angle(part.sigma, part.gap, turned, share, min_dim, norm)
            unresolved = part.unresolved + (part.sigma <= 0).sum(-1)
            return replace(part, angle=angle, unresolved=unresolved, is_whole=True)
        angle = projection_angle(part.sigma, part.gap, turned, norm, min_dim, norm)
        is_off, is_whole = torch.stack([(angle > 1e-3 * self.tolerance).any(), (part.sigma > 0).all()]).tolist()
        if is_off and common.sigma.shape[-1]:
            share = share_at_cut(delta, factors.x, common)
            angle = projection_angle(part.sigma, part.gap, turned, share, min_dim, norm)
        return replace(part, angle=part.angle + angle, is_whole=is_whole)


def _common_part(factors: Factorization, solver: Solver, k: int, dtype: torch.dtype) -> tuple[Subspace, torch.dtype]:
    """Return the top ``k`` directions of S, as the task parts need them, and the dtype of their long side."""
    common = factors.top(k)
    if solver.in_stack:  # of which each has to be whole by itself
        lacking = (common.sigma <= 0).sum(-1)
        common = replace(common, is_whole=True, unresolved=common.unresolved + lacking)
    if common.wide:
        common = replace(common, complement=factors.complement(common))
    early_dtype, long_dtype = solver.long_dtypes(common.wide, dtype, factors.x.device)
    if early_dtype is not None:
        common = factors.complete(common, early_dtype)
    factors.release()
    return common, long_dtype


def isometry_of(common: Subspace, dtype: torch.dtype) -> Tensor:
    """Return U_k V_kᵀ in ``dtype``, fresh."""
    if common.isometry is not None:
        return common.isometry.to(dtype, copy=True)
    return common.u.to(dtype) @ common.v.to(dtype).mT


def most_that_fit(tasks: int, room: float, bytes_of: Callable[[int], int]) -> int:
    """Return the largest number of tasks, 1 at least, whose ``bytes_of`` there is room for."""
    return next((count for count in range(tasks, 1, -1) if bytes_of(count) <= room), 1)


def share_at_cut(delta: Tensor, total: Tensor, common: Subspace) -> Tensor:
    """Return max_i ‖u_iᵀ Δ‖ [...] over the last ``CUT_COLUMNS`` directions u_i of U_k.

    It bounds what of Δ an error of U_k at its cut moves between U_k and the residual of Δ.
    """
    if common.wide:
        share = to_long_side(delta, common.short[..., -CUT_COLUMNS:], torch.float64)
    else:
        if common.isometry is None:
            u = to_long_side(total, common.whitened[..., -CUT_COLUMNS:], torch.float64)
        else:
            u = thin_mm(common.isometry, common.short[..., -CUT_COLUMNS:])
        share = to_short_side(delta, u)
    return torch.linalg.vector_norm(share, dim=-2).amax(-1)


def residual_noise(delta: Tensor, total: Tensor, common: Subspace) -> Tensor:
    """Return the error of R for an error of 1 in S: ‖Σ_k⁻¹ U_kᵀ Δ‖_F where S has less than k directions, else 0.

    An error E of S turns U_k so that R = Δ − U_k U_kᵀ Δ is off by E V_k Σ_k⁻¹ U_kᵀ Δ at most. Deltas of low rank leave
    nothing else in R, and it would be taken for directions of their own.
    """
    if common.wide:
        squares = (short_side_gram(delta) @ common.whitened * common.whitened).sum((-2, -1))
        noise = squares.clamp_min(0).sqrt()
    else:
        y = common.whitened.mT @ short_side_gram(total, delta)
        noise = torch.linalg.vector_norm(y * reciprocal(common.sigma)[..., None], dim=(-2, -1))
    return noise * (common.sigma <= 0).any(-1)
