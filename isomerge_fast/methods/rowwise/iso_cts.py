"""Merge tall matrices by Iso-CTS in passes over rows b of S and Δ_t; N x N float64 numbers are kept from each.

With SᵀS = V Σ² Vᵀ and U_k = S V_k Σ_k⁻¹, for every task:

    H_t = Δ_tᵀ Δ_t,  C_t = Sᵀ Δ_t               one pass, or one for some tasks at a time
    Y_t = U_kᵀ Δ_t = Σ_k⁻¹ V_kᵀ C_t
    R_tᵀ R_t = H_t − Y_tᵀ Y_t,  top s: (E_t, σ_t), so V_t = E_t     (where too much cancels: a pass over R_t)
    U_t = R_t E_t σ_t⁻¹ = Δ_t E_t σ_t⁻¹ + S Q_t  with  Q_t = −V_k Σ_k⁻¹ Y_t E_t σ_t⁻¹

Then X = [U_1 … U_T] is made of rows of S and Δ_t by N x Ts numbers: K = XᵀX takes one pass, polar(X) = X K^(-1/2). As
X ⊥ U_k, and with the small Z of ``recombine`` for the right side,

    merged Δ_b / σ̄ = U_kb A_k + X_b B = S_b (V_k Σ_k⁻¹ A_k + Q B) + Σ_t Δ_tb E_t (σ_t⁻¹ B_t),
    A_k = V_kᵀ + Q_a w_a [V_a, Q_r]ᵀ,  B = K^(-1/2) w_ts [V_a, Q_r]ᵀ,  [w_ts; w_a] = polar(Z)ᵀ − [[0, 0], [I, 0]].

Where directions are missing (deficient sums, zero or repeated tasks) their columns are left out, and both polar factors
are restricted to their ranges, by ``SAME_DIRECTION``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...linalg.certificate import PROBES
from ...linalg.gram_eigh import GramEigh
from ...linalg.gram_spectrum import GramSpectrum, eigh_workspace_bytes, spectrum_in_place
from ...linalg.protocol import polar_growth, relative_gap, rounding_tolerance
from ...ops import sym_mm_add
from ..recombine import SAME_DIRECTION, over_columns, projection_angle, small_problem
from ..source import DeltaSource, RowBlock, TensorSpec
from ..spectral import Spectral, spectral_mean
from ..stats import Check, MergeStats
from .passes import (
    ROUNDING,
    ResidualEstimator,
    RowwiseSpectral,
    chunk_bytes,
    chunk_rows,
    chunks,
    newton_schulz,
    part_bytes,
    pass_noise,
    product_rounding,
    sum_spectrum,
)


@dataclass(frozen=True)
class _Part:
    """Hold a task's directions that are kept, as X_t = Δ_t E σ⁻¹ + S Q."""

    sigma: Tensor  # [s] float64, zero where a direction is not kept
    e: Tensor  # [N, kept] float64
    q: Tensor  # likewise
    scale: Tensor  # σ of those kept, in the order of the columns
    angle: Tensor  # as of ``Subspace``
    unresolved: Tensor

    @property
    def width(self) -> int:
        return len(self.scale)


class RowwiseIsoCTS(RowwiseSpectral):
    """Make the Iso-CTS merge by rows, from k directions of the sum and s > 0 of every task.

    The Gram matrices of ``at_once`` tasks are added up in one pass.
    """

    def __init__(self, source: DeltaSource, algorithm: str, method: Spectral, k: int, s: int, at_once: int) -> None:
        self._k, self._s, self._at_once = k, s, at_once
        super().__init__(source, algorithm, method)

    def learn(self, source: DeltaSource, rank_policy: str) -> None:
        k, s, at_once = self._k, self._s, self._at_once
        columns = source.shape[1]
        # What U_k is not orthonormal by, X is not orthogonal to it by: times ‖U_kᵀΔ_t E_t‖ / σ_t.
        common, norm, squares, of_deltas = sum_spectrum(source, k, 1e-2 * ROUNDING)
        parts = []
        for first in range(0, source.n_tasks, at_once):
            tasks = range(first, min(first + at_once, source.n_tasks))
            parts += _parts(source, tasks, common, k, s, squares)

        sigma = torch.cat([common.kept_sigma(k), *(part.sigma for part in parts)])
        rank = (sigma > 0).sum()
        self.sigma_mean = spectral_mean(sigma.sum(), rank, columns, rank_policy) * (norm > 0)
        self._values = {
            "sigma_mean": self.sigma_mean,
            "rank": rank,
            "min_dim": columns,
            "k": k,
            "s": s,
            "gap": relative_gap(common.sigma, k),
            **of_deltas,
        }
        self._evidence = ResidualEstimator(columns, source.device)
        is_full = int(rank) == k + s * source.n_tasks
        unresolved = common.unresolved[:k].sum() + sum(part.unresolved for part in parts)
        angles = 2.0 * k * common.angle(k).square()
        of_tasks = s * sum(part.angle.square() for part in parts)
        growths = self._compose(source, common, k, parts, norm, squares, is_full)
        self._checks = {
            "angle": Check(((angles + growths * of_tasks) / columns).sqrt(), self.tolerance),
            "unresolved": Check(unresolved, 0),
        }

    def _compose(
        self,
        source: DeltaSource,
        common: GramSpectrum,
        k: int,
        parts: list[_Part],
        norm: Tensor,
        squares: Tensor,
        is_full: bool,
    ) -> Tensor:
        """Find A, E_t and B_t with the merged rows σ̄ (S_b A + Σ_t Δ_tb E_t B_t); return ``growth``² of both sides."""
        columns, omega = source.shape[1], self._evidence.omega
        v_k, sigma_k = common.top(k)
        root, projector, sigma_tasks = _polar_of_tasks(source, parts, v_k, sigma_k)
        v_tasks = torch.cat([part.e for part in parts], dim=-1)
        width = v_tasks.shape[-1]
        a = v_k.mT @ v_tasks
        rest = v_tasks.addmm_(v_k, a, alpha=-1.0)
        del v_tasks
        defect, growths = torch.zeros(2, dtype=torch.float64, device=source.device)
        same_directions = width - (sigma_tasks > 0).sum()
        if width:
            small = small_problem(a, rest, GramEigh())
            del rest
            same_directions = torch.maximum(same_directions, small.same_directions)
            growths = over_columns(polar_growth(sigma_tasks, width, source.shape[0]), source.shape[0], width).square()
            growths = growths + small.growth(columns, len(sigma_k)).square()
            right = torch.cat([v_k @ small.q_a, small.q_r], dim=-1)
            b = small.weights[:width] @ right.mT
            a_k = torch.addmm(v_k.mT, small.q_a, small.weights[width:] @ right.mT)
            defect = small.stats.orthogonality
            del small, right
        else:
            del rest
            b, a_k = v_k.new_zeros(0, columns), v_k.mT.clone()
        del a
        self._values["same_directions"] = same_directions
        whole = is_full and int(same_directions) == 0
        # What MᵀM Ω is of M = [polar(X), U_k] [B; A_k]; where no direction is missing, Ω itself.
        expected = b.mT @ (projector @ (projector.mT @ (b @ omega))) + a_k.mT @ (a_k @ omega)
        self._expected = omega if whole else expected
        self._defect = torch.zeros_like(defect) if whole else defect
        b = root @ b
        a_k /= sigma_k[:, None]
        a = v_k @ a_k
        del a_k, v_k
        self._tasks: list[tuple[Tensor, Tensor]] = []
        products = []
        for part, b_t, square in zip(parts, b.split([part.width for part in parts]), squares, strict=True):
            a.addmm_(part.q, b_t)
            b_t /= part.scale[:, None]
            self._tasks.append((part.e, b_t))
            products.append((square.sqrt(), b_t))
        narrow = product_rounding(columns, (norm, a), *products) <= ROUNDING
        self._a = a.float() if narrow else a
        self._tasks = [(e.to(self._a.dtype), b_t.to(self._a.dtype)) for e, b_t in self._tasks]
        return growths

    def fill(self, q: Tensor, part: RowBlock) -> None:
        dtype = self._a.dtype
        value = part.sum(torch.float64).total.to(dtype) @ self._a
        for task, (e, b) in enumerate(self._tasks):
            value.addmm_(part.delta(task, self.dtype).to(dtype) @ e, b)
        self._evidence.add(value)
        q.copy_(value)

    def stats(self) -> MergeStats:
        orthogonality = torch.maximum(self._evidence.orthogonality(self._expected), self._defect)
        checks = {"orthogonality": Check(orthogonality, self.tolerance), **self._checks}
        return MergeStats(self.algorithm, self._values, checks)


def _parts(
    source: DeltaSource, tasks: Sequence[int], common: GramSpectrum, k: int, s: int, squares: Tensor
) -> list[_Part]:
    """Return the top s directions of R_t of some tasks, by one pass; see ``GramFactorization.residual``."""
    rows, columns = source.shape
    v_k, sigma_k = common.top(k)
    grams, crosses = _task_products(source, tasks)
    noise = pass_noise(source)
    parts = []
    for task in tasks:
        gram = grams.pop(0)
        y = v_k.mT @ crosses.pop(0)
        y /= sigma_k[:, None]
        sym_mm_add(gram, y.mT, alpha=-1.0, out=gram)
        norm = squares[task].sqrt()
        # See ``iso_cts.share_at_cut``.
        at_cut = torch.linalg.vector_norm(y[:4], dim=-1).amax() if len(y) else norm
        tolerance = rounding_tolerance(norm, rows, columns, source.dtype)
        if len(sigma_k) < k:  # see ``iso_cts.residual_noise``
            tolerance = tolerance + common.tolerance * torch.linalg.vector_norm(y / sigma_k[:, None])
        # What cancels in H − YᵀY leaves rounding of the size of ‖Δ‖².
        spectrum = spectrum_in_place(gram, tolerance, noise, scale=norm)
        del gram
        if spectrum.is_blurred(s, ROUNDING):
            largest = torch.maximum(spectrum.sigma[0], spectrum.noise[0].sqrt())
            del spectrum
            gram = _residual_gram(source, task, v_k, y / -sigma_k[:, None])
            # R itself is rounded to ε ‖Δ‖.
            spectrum = spectrum_in_place(gram, tolerance, noise, scale=(norm * largest).sqrt())
            del gram
        vectors, sigma = spectrum.top(s)
        e = vectors.clone()
        del vectors
        y = y @ e
        y /= sigma_k[:, None] * -sigma
        kept, angle, unresolved = spectrum.kept_sigma(s), spectrum.angle(s), spectrum.unresolved[:s].sum()
        gap = relative_gap(spectrum.sigma, s)
        del spectrum
        angle = angle + projection_angle(kept, gap, common.angle(k) * k**0.5, at_cut, columns, norm)
        parts.append(_Part(kept, e, v_k @ y, sigma, angle, unresolved))
    return parts


def _task_products(source: DeltaSource, tasks: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Return (Δ_tᵀ Δ_t, Sᵀ Δ_t) of every one of ``tasks``, by one pass."""
    columns = source.shape[1]
    grams, crosses = (
        [torch.zeros(columns, columns, dtype=torch.float64, device=source.device) for _ in tasks] for _ in range(2)
    )
    for total, *deltas in chunks(source, tasks):
        for gram, cross, delta in zip(grams, crosses, deltas, strict=True):
            sym_mm_add(gram, delta.mT, out=gram)
            cross.addmm_(total.mT, delta)
    return grams, crosses


def _residual_gram(source: DeltaSource, task: int, v_k: Tensor, y: Tensor) -> Tensor:
    """Return RᵀR of R = Δ_t + S V_k Y by one pass: nothing cancels in it, as it does in H_t − Y_tᵀY_t."""
    factor = v_k @ y
    del y
    gram = torch.zeros_like(factor)
    for total, delta in chunks(source, [task]):
        delta.addmm_(total, factor)
        sym_mm_add(gram, delta.mT, out=gram)
    return gram


def _polar_of_tasks(
    source: DeltaSource, parts: list[_Part], v_k: Tensor, sigma_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (K^(-1/2), the kept vectors of K, the σ of X with zeros for the others), by ``SAME_DIRECTION``.

    The rounding has left parts of U_k in X: D = U_kᵀX is taken out of K and of ``parts``.
    """
    widths = [part.width for part in parts]
    if not (width := sum(widths)):
        return sigma_k.new_zeros(0, 0), sigma_k.new_zeros(0, 0), sigma_k.new_zeros(0)
    cross = torch.zeros(source.shape[1], width, dtype=torch.float64, device=source.device)
    gram = _task_gram(source, parts, cross=cross)
    d = v_k.mT @ cross
    del cross
    d /= sigma_k[:, None]
    sym_mm_add(gram, d.mT, alpha=-1.0, out=gram)
    d /= sigma_k[:, None]
    for task, part in enumerate(parts):
        part.q.addmm_(v_k, d.split(widths, dim=-1)[task], alpha=-1.0)
    del d
    same = torch.tensor(SAME_DIRECTION, dtype=torch.float64, device=source.device)
    spectrum = spectrum_in_place(gram, same, pass_noise(source))
    projector, sigma = spectrum.top(spectrum.rank)[0].clone(), spectrum.kept_sigma(width)
    refine = bool(spectrum.polar_noise() > ROUNDING)
    root = spectrum.inverse_root()
    if refine:
        root = newton_schulz(root, _task_gram(source, parts, factor=root))
    return root, projector, sigma


def _task_gram(
    source: DeltaSource, parts: list[_Part], *, factor: Tensor | None = None, cross: Tensor | None = None
) -> Tensor:
    """Return XᵀX, or that of X times a factor, by one pass; add SᵀX to ``cross``."""
    widths = [part.width for part in parts]
    gram = torch.zeros(sum(widths), sum(widths), dtype=torch.float64, device=source.device)
    for total, *deltas in chunks(source, range(len(parts))):
        x = torch.cat([(delta @ part.e).div_(part.scale) for delta, part in zip(deltas, parts, strict=True)], dim=-1)
        for task, part in enumerate(parts):
            x.split(widths, dim=-1)[task].addmm_(total, part.q)
        if factor is not None:
            x = x @ factor
        sym_mm_add(gram, x.mT, out=gram)
        if cross is not None:
            cross.addmm_(total.mT, x)
        del x  # before the next one is made
    return gram


def learning_bytes(spec: TensorSpec, tasks: int, s: int, at_once: int, device: torch.device) -> int:
    """Return the peak bytes of ``RowwiseIsoCTS.learn``: the maximum over its steps, which are listed in their order.

    ``s`` directions of every task are kept, and N − T·s of the sum. One pass adds up the Gram matrices of ``at_once``
    tasks.
    """
    rows, columns = spec.shape
    square, thin = 8 * columns**2, 8 * columns * tasks * s
    k = columns - tasks * s
    common = 8 * columns * k
    parts = 2 * thin  # E and Q
    grams = (1 + 2 * at_once) * square
    width = min(k, tasks * s) + tasks * s
    small = 10 * 8 * width**2  # Z, and ``GramEigh`` of it
    polar = 3 * 8 * (tasks * s) ** 2
    return 8 * 8 * PROBES * columns + max(
        2 * square + max(eigh_workspace_bytes(columns), chunk_bytes(rows, columns, 1, 1, device)),
        grams + parts + chunk_bytes(rows, columns, 1 + at_once, 0, device),
        grams + parts + common,
        grams - square + parts + common + eigh_workspace_bytes(columns),
        square
        + parts
        + polar
        + thin
        + chunk_bytes(rows, columns, 1 + tasks, 0, device)
        + 16 * chunk_rows(rows, columns, device) * tasks * s,
        square + parts + polar + 3 * thin + max(2 * thin, small),
        2 * square + parts + polar + common + 3 * thin,
    )


def mapping_bytes(spec: TensorSpec, tasks: int, s: int, block_elements: int, device: torch.device) -> int:
    """Return the peak bytes of ``RowwiseIsoCTS.rows``."""
    columns = spec.shape[1]
    return 8 * columns**2 + 16 * columns * tasks * s + part_bytes(columns, block_elements, 2, device)
