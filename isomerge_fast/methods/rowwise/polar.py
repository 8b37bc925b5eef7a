"""Merges of tensors that are never held: passes over blocks of rows, of which N x N numbers are kept.

    linear    Δ_b = Σ_t Δ_tb, or over T
    Iso-C     Δ_b = σ̄ S_b A with A = V Σ⁻¹ Vᵀ from SᵀS = Σ_b S_bᵀ S_b = V Σ² Vᵀ

for the rows b of tall matrices [M, N], M ≥ ``SMALLEST_ASPECT`` N. Iso-CTS: ``row_map_cts``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...linalg.certificate import PROBES, probes
from ...linalg.gram_eigh import PRODUCT, GramEigh
from ...linalg.gram_spectrum import GramSpectrum, eigh_workspace_bytes, gram_noise, spectrum_in_place
from ...linalg.protocol import rounding_tolerance
from ...ops import BLOCK_ELEMENTS, TaskSum, sym_mm_add, traits_of
from ..certified import exact_products
from ..source import DeltaSource, RowBlock, TensorSpec
from ..spectral import spectral_mean
from ..stats import Check, MergeStats
from ..sums import delta_sizes, require_comparable

# Gram matrices square the condition number, and no other solver follows when they miss: left to long matrices, whose
# sums are well-conditioned.
SMALLEST_ASPECT = 2
# Rows are gathered until S_b holds this many elements (4 MiB in float64), and are at least so many: N x N sums are read
# and written once for all of them.
CHUNK_ELEMENTS, LEAST_ROWS = 1 << 19, 256
# On a GPU: 1024 rows of 4096 are multiplied in six times the time that their N x N sum takes to be read and written (by
# the rates of an H200's products and copies; not timed), and each task has such a chunk.
GPU_CHUNK_ELEMENTS = 1 << 22
# Relative error that float64 Gram matrices and float32 products may leave each.
ROUNDING = GramEigh().rounding


def fits_rowwise(spec: TensorSpec, precision: str) -> bool:
    """Whether a matrix can be merged by rows with what a float64 Gram matrix resolves."""
    rows, columns = spec.shape[-2:]
    narrow = precision != "reference" and spec.dtype == torch.float32
    return narrow and len(spec.shape) == 2 and rows >= SMALLEST_ASPECT * columns > 0


class DeltaStats:
    """What passes see of every Δ_t, kept by place: neither the order of the parts nor the threads change the sums."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[Tensor, Tensor | None, Tensor]] = {}

    def add(self, first: int, found: TaskSum) -> None:
        """Of the part that begins with row ``first``. Called by several threads at once."""
        self._parts[first] = (found.squares, found.largest, found.nonfinite)

    def values(self) -> tuple[Tensor, dict[str, Any]]:
        """(‖Δ_t‖² [T], what ``MergeStats.values`` says of every Δ_t), as ``finite_sum`` has it. One read of the device.

        Raises:
            As ``delta_sizes``.
        """
        parts = [self._parts[first] for first in sorted(self._parts)]
        squares = torch.stack([squares for squares, _, _ in parts]).sum(0)
        largest = [largest for _, largest, _ in parts if largest is not None]
        nonfinite = torch.stack([nonfinite for _, _, nonfinite in parts], 1)
        return squares, delta_sizes(squares[:, None], torch.stack(largest, 1) if largest else None, nonfinite)


class RowwiseLinear:
    """Σ_t Δ_t over ``divisor``; see ``RowwiseMerge``."""

    def __init__(self, source: DeltaSource, algorithm: str, *, divisor: int = 1) -> None:
        self._dtype, self._algorithm, self._divisor = source.dtype, algorithm, divisor
        self._wants_largest = source.wants_largest
        self._seen = DeltaStats()

    def rows(self, block: RowBlock) -> Tensor:
        """See ``RowwiseMerge``."""
        found = block.sum(self._dtype, largest=self._wants_largest)
        self._seen.add(block.rows.start, found)
        return found.total if self._divisor == 1 else found.total.div_(self._divisor)

    def stats(self) -> MergeStats:
        """See ``RowwiseMerge``."""
        return MergeStats(self._algorithm, self._seen.values()[1])


def chunk_rows(rows: int, columns: int, device: torch.device) -> int:
    """Return how many rows are worked on at once."""
    elements = GPU_CHUNK_ELEMENTS if traits_of(device).is_gpu else CHUNK_ELEMENTS
    return min(rows, max(LEAST_ROWS, elements // max(1, columns)))


def chunks(
    source: DeltaSource, tasks: Sequence[int], *, seen: DeltaStats | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Rows of S and of the Δ_t of ``tasks`` in float64, [rows, N] each, valid until the next ones are taken.

    They do not depend on the source's blocks.
    """
    rows, columns = source.shape
    step = chunk_rows(rows, columns, source.device)
    buffers = [torch.empty(step, columns, dtype=torch.float64, device=source.device) for _ in range(1 + len(tasks))]
    filled = 0
    for block in source.blocks():
        start, count = 0, block.rows.stop - block.rows.start
        while start < count:
            stop = min(count, start + step - filled)
            part = block.part(slice(start, stop))
            place = slice(filled, filled + stop - start)
            found = part.sum(torch.float64, out=buffers[0][place], largest=source.wants_largest)
            if seen is not None:
                seen.add(part.rows.start, found)
            for task, buffer in zip(tasks, buffers[1:], strict=True):
                buffer[place].copy_(part.delta(task, source.dtype))
            start, filled = stop, place.stop
            if filled == step:
                yield tuple(buffers)
                filled = 0
    if filled:
        yield tuple(buffer[:filled] for buffer in buffers)


def sum_spectrum(source: DeltaSource, k: int, limit: float) -> tuple[GramSpectrum, Tensor, Tensor, dict[str, Any]]:
    """(V and σ of S, ‖S‖_F, ‖Δ_t‖², what is said of every Δ_t) in one pass; in two where float64 blurs SᵀS or its cut
    at ``k`` by more than ``limit``. See ``DeltaStats.values`` for what it raises.
    """
    rows, columns = source.shape
    seen = DeltaStats()
    gram, noise = product_gram(source, None, seen)
    squares, values = seen.values()
    require_comparable(values["delta_norms"], TensorSpec("", tuple(source.shape), source.dtype))
    norm = gram.diagonal().sum().sqrt()
    tolerance = rounding_tolerance(squares.sum().sqrt(), rows, columns, source.dtype)
    spectrum = spectrum_in_place(gram, tolerance, noise)
    del gram
    if spectrum.is_blurred(k, limit):
        spectrum = spectrum.sharpened(lambda small: product_gram(source, small))
    return spectrum, norm, squares, values


def product_gram(source: DeltaSource, a: Tensor | None, seen: DeltaStats | None = None) -> tuple[Tensor, float]:
    """(QᵀQ of Q = S A or S, its ``gram_noise``) in one pass."""
    columns = source.shape[1] if a is None else a.shape[1]
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=source.device)
    count = 0
    for (total,) in chunks(source, (), seen=seen):
        q = total if a is None else total @ a
        sym_mm_add(gram, q.mT, out=gram)
        del q  # before the next one is made
        count += 1
    return gram, gram_noise(count)


def newton_schulz(a: Tensor, gram: Tensor) -> Tensor:
    """A (3/2 I − 1/2 G) with G = QᵀQ, Q = X A: squares what X A is away from orthonormal. ``gram`` is overwritten."""
    gram.mul_(-0.5).diagonal().add_(1.5)
    return a @ gram


class ResidualEstimator:
    """QᵀQ Ω, QᵀS Ω and SᵀQ Ω, added up as the rows of Q are made; see ``certificate``."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.omega = probes(columns, torch.float64, device)
        self._squared, self._image, self._mirrored = (torch.zeros_like(self.omega) for _ in range(3))

    def add(self, q: Tensor, total: Tensor | None = None) -> None:
        """Some rows of Q in any dtype, and the same of S in float64 where the symmetry is asked for."""
        q = q.double()
        along = q @ self.omega
        self._squared.addmm_(q.mT, along)
        if total is not None:
            self._image.addmm_(q.mT, total @ self.omega)
            self._mirrored.addmm_(total.mT, along)

    def orthogonality(self, expected: Tensor) -> Tensor:
        """‖QᵀQ − P‖_F / √N, estimated, where P Ω is ``expected``."""
        return torch.linalg.matrix_norm(self._squared - expected) / math.sqrt(len(self.omega))

    def symmetry(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        """(asymmetry, negative) of QᵀS with ‖S‖_F = ``norm``; see ``certificate.symmetry``."""
        scale = torch.where(norm > 0, norm, 1.0)
        asymmetry = torch.linalg.matrix_norm(self._image - self._mirrored) / scale
        quotients = (self.omega * self._image).sum(0) / self.omega.square().sum(0)
        return asymmetry, (-quotients.amin()).clamp_min(0.0) * math.sqrt(len(self.omega)) / scale


class RowwisePolar:
    """σ̄ · polar(S) by rows; see ``RowwiseMerge``. Two passes, or three where S is ill-conditioned; then ``rows``.

    Args:
        promise: limit of the checks.
        values: more of ``MergeStats.values``.
    """

    def __init__(self, source: DeltaSource, algorithm: str, *, rank_policy: str, promise: float, **values: int) -> None:
        self._algorithm, self._promise, self._dtype = algorithm, promise, source.dtype
        with exact_products(source.device):
            self._learn(source, rank_policy)
        self._values |= values

    def _learn(self, source: DeltaSource, rank_policy: str) -> None:
        columns = source.shape[1]
        spectrum, self._norm, _, of_deltas = sum_spectrum(source, columns, ROUNDING)
        self._unresolved, self._error = spectrum.unresolved.sum(), spectrum.skew_error()
        vectors, sigma = spectrum.top(spectrum.rank)
        self._evidence = ResidualEstimator(columns, source.device)
        self._expected = vectors @ (vectors.mT @ self._evidence.omega)
        del vectors
        rank = torch.tensor(spectrum.rank, device=source.device)
        self._sigma_mean = spectral_mean(sigma.sum(), rank, columns, rank_policy)
        self._values = {"sigma_mean": self._sigma_mean, "rank": rank, "min_dim": columns, **of_deltas}
        refine = bool(spectrum.polar_noise() > ROUNDING)
        a = spectrum.inverse_root()
        del spectrum
        if refine:
            a = newton_schulz(a, product_gram(source, a)[0])
        self._a = a.float() if product_rounding(columns, (self._norm, a)) <= ROUNDING else a

    def rows(self, block: RowBlock) -> Tensor:
        """See ``RowwiseMerge``. Every row is to be asked for once."""
        out = torch.empty(block.like.shape, dtype=self._dtype, device=block.like.device)
        with exact_products(block.like.device):
            for place in part_rows(block):
                total = block.part(place).sum(torch.float64).total
                q = out[place]
                if self._a.dtype == out.dtype:
                    torch.mm(total.to(out.dtype), self._a, out=q)
                else:
                    q.copy_(total @ self._a)
                self._evidence.add(q, total)
                del total  # before the next one is made
        return out.mul_(self._sigma_mean.to(out.dtype))

    def stats(self) -> MergeStats:
        """See ``RowwiseMerge``."""
        asymmetry, negative = self._evidence.symmetry(self._norm)
        checks = {
            "orthogonality": Check(self._evidence.orthogonality(self._expected), self._promise),
            "asymmetry": Check(asymmetry, self._promise),
            "negative": Check(negative, self._promise),
            "unresolved": Check(self._unresolved, 0),
            "rounding": Check(self._error, self._promise),
        }
        return MergeStats(self._algorithm, self._values, checks)


def product_rounding(columns: int, *products: tuple[Tensor, Tensor]) -> float:
    """Return what float32 leaves in Σ X A, relative to √N, from ‖X‖_F and the A [·, N]: that of ``GramEigh.polar``.

    Reads one number from the device.
    """
    return PRODUCT / columns * float(sum(norm * torch.linalg.vector_norm(a) for norm, a in products))


def part_rows(block: RowBlock) -> Iterator[slice]:
    """The rows of a block, counted from its first, so many at a time as there is memory for in float64."""
    count, columns = block.like.shape
    step = chunk_rows(count, columns, block.like.device)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def chunk_bytes(rows: int, columns: int, matrices: int, products: int, device: torch.device) -> int:
    """Of ``chunks``, and of what makes them or what is made of them, as so many matrices of their size."""
    elements = columns * chunk_rows(rows, columns, device)
    making = max(12 * min(BLOCK_ELEMENTS, elements), 4 * elements + 4 * min(BLOCK_ELEMENTS, elements))
    return 8 * elements * matrices + max(making, 8 * elements * products)


def part_bytes(columns: int, block_elements: int, products: int, device: torch.device) -> int:
    """Of ``rows``: the result, and what is made part by part, the evidence included."""
    rows = max(1, block_elements // max(1, columns))
    chunk = chunk_bytes(rows, columns, 1, products, device)
    return 4 * block_elements + chunk + 16 * PROBES * chunk_rows(rows, columns, device)


def rowwise_polar_bytes(spec: TensorSpec, block_elements: int, device: torch.device) -> int:
    """Peak of ``RowwisePolar``: the second eigensolver, or QᵀQ and its product, or what is made of rows."""
    rows, columns = spec.shape
    square = 8 * columns**2
    return 8 * 8 * PROBES * columns + max(
        square + chunk_bytes(rows, columns, 1, 0, device),
        2 * square + eigh_workspace_bytes(columns),
        2 * square + chunk_bytes(rows, columns, 1, 1, device),
        3 * square,
        square + part_bytes(columns, block_elements, 1, device),
    )
