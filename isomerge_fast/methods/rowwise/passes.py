"""Pass over the rows of a tall matrix [M, N], M ≥ ``SMALLEST_ASPECT`` N, that is never held.

N x N numbers are kept of a pass: Gram matrices, products, and estimates of residuals.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...linalg.certificate import PROBES, asymmetry_of, probes
from ...linalg.gram_eigh import PRODUCT, GramEigh
from ...linalg.gram_spectrum import GramSpectrum, gram_noise, spectrum_in_place
from ...linalg.protocol import rounding_tolerance
from ...ops import BLOCK_ELEMENTS, TaskSum, sym_mm_add, thin_mm, traits_of
from ..certified import exact_products
from ..source import DeltaSource, RowBlock, TensorSpec, joined
from ..spectral import Spectral
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
    """Return whether a matrix can be merged by rows with the precision of a float64 Gram matrix."""
    rows, columns = spec.shape[-2:]
    narrow = precision != "reference" and spec.dtype == torch.float32
    return narrow and len(spec.shape) == 2 and rows >= SMALLEST_ASPECT * columns > 0


class DeltaStats:
    """Collect what passes see of every Δ_t, by place: the order of parts and threads does not change the sums."""

    def __init__(self) -> None:
        self._parts: dict[int, TaskSum] = {}

    def add(self, first: int, found: TaskSum) -> None:
        """Keep what was seen in the part that begins with row ``first``. Called by several threads at once."""
        self._parts[first] = found._replace(total=found.squares)  # which is small

    def values(self) -> tuple[Tensor, dict[str, Any]]:
        """Return (‖Δ_t‖² [T], ``delta_sizes``), which may raise. One read of the device."""
        seen = joined([self._parts[first] for first in sorted(self._parts)])
        return seen.squares, delta_sizes(seen)


def chunk_rows(rows: int, columns: int, device: torch.device) -> int:
    """Return how many rows are worked on at once."""
    elements = GPU_CHUNK_ELEMENTS if traits_of(device).is_gpu else CHUNK_ELEMENTS
    return min(rows, max(LEAST_ROWS, elements // max(1, columns)))


def chunks(
    source: DeltaSource, tasks: Sequence[int], *, seen: DeltaStats | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Yield rows of S and of the Δ_t of ``tasks`` in float64, [rows, N] each, valid until the next ones are taken.

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
    """Return (V and σ of S, ‖S‖_F, ‖Δ_t‖² [T], ``delta_sizes``) in one pass.

    It takes a second one where float64 blurs SᵀS, or its cut at ``k``, by more than ``limit``.
    """
    rows, columns = source.shape
    seen = DeltaStats()
    gram = product_gram(source, None, seen)
    squares, values = seen.values()
    require_comparable(values["delta_norms"], TensorSpec("", tuple(source.shape), source.dtype))
    norm = gram.diagonal().sum().sqrt()
    tolerance = rounding_tolerance(squares.sum().sqrt(), rows, columns, source.dtype)
    spectrum = spectrum_in_place(gram, tolerance, pass_noise(source))
    del gram
    if spectrum.is_blurred(k, limit):
        spectrum = spectrum.sharpened(lambda small: product_gram(source, small), pass_noise(source))
    return spectrum, norm, squares, values


def pass_noise(source: DeltaSource) -> float:
    """Return ``gram_noise`` of a matrix that a pass over all rows adds up chunk by chunk."""
    rows, columns = source.shape
    return gram_noise(math.ceil(rows / chunk_rows(rows, columns, source.device)))


def product_gram(source: DeltaSource, a: Tensor | None, seen: DeltaStats | None = None) -> Tensor:
    """Return QᵀQ of Q = S A, or of S where ``a`` is None, in one pass."""
    columns = source.shape[1] if a is None else a.shape[1]
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=source.device)
    for (total,) in chunks(source, (), seen=seen):
        q = total if a is None else total @ a
        sym_mm_add(gram, q.mT, out=gram)
        del q  # before the next one is made
    return gram


def newton_schulz(a: Tensor, gram: Tensor) -> Tensor:
    """Return A (3/2 I − 1/2 G), with G = QᵀQ and Q = X A: it squares the defect of X A. ``gram`` is overwritten."""
    gram.mul_(-0.5).diagonal().add_(1.5)
    return a @ gram


class ResidualEstimator:
    """Add up QᵀQ Ω, QᵀS Ω and SᵀQ Ω as the rows of Q are made; see ``certificate``."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.omega = probes(columns, torch.float64, device)
        self._squared, self._image, self._mirrored = (torch.zeros_like(self.omega) for _ in range(3))

    def add(self, q: Tensor, total: Tensor | None = None) -> None:
        """Add some rows of Q in any dtype, and those of S in float64 where the symmetry is asked for."""
        q = q.double()
        along = thin_mm(q, self.omega)
        self._squared = thin_mm(q.mT, along, c=self._squared)
        if total is not None:
            self._image = thin_mm(q.mT, thin_mm(total, self.omega), c=self._image)
            self._mirrored = thin_mm(total.mT, along, c=self._mirrored)

    def orthogonality(self, expected: Tensor) -> Tensor:
        """Estimate ‖QᵀQ − P‖_F / √N, where P Ω is ``expected``."""
        return torch.linalg.matrix_norm(self._squared - expected) / math.sqrt(len(self.omega))

    def symmetry(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return (asymmetry, negative) of QᵀS with ‖S‖_F = ``norm``; see ``certificate.symmetry``."""
        return asymmetry_of(self.omega, self._image, self._mirrored, norm)


def product_rounding(columns: int, *products: tuple[Tensor, Tensor]) -> float:
    """Return the rounding of Σ X A in float32, relative to √N, from pairs of ‖X‖_F and A [·, N]; see ``PRODUCT``.

    Reads one number from the device.
    """
    return PRODUCT / columns * float(sum(norm * torch.linalg.vector_norm(a) for norm, a in products))


class RowwiseSpectral(ABC):
    """Make σ̄ Q by rows, with Q the polar factor that a method has learnt. A subclass states ``learn`` and ``fill``."""

    sigma_mean: Tensor

    def __init__(self, source: DeltaSource, algorithm: str, method: Spectral) -> None:
        self.algorithm, self.tolerance, self.dtype = algorithm, method.tolerance, source.dtype
        with exact_products(source.device):
            self.learn(source, method.rank_policy)

    @abstractmethod
    def learn(self, source: DeltaSource, rank_policy: str) -> None:
        """Pass over all rows, and keep σ̄ as ``sigma_mean`` and what ``fill`` needs."""

    @abstractmethod
    def fill(self, q: Tensor, part: RowBlock) -> None:
        """Write the rows of Q, and add them to the evidence."""

    def rows(self, block: RowBlock) -> Tensor:
        out = torch.empty(block.like.shape, dtype=self.dtype, device=block.like.device)
        # So many rows at a time as there is memory for in float64.
        step = chunk_rows(len(out), out.shape[1], out.device)
        with exact_products(out.device):
            for part, q in zip(block.parts(step), out.split(step), strict=True):
                self.fill(q, part)
        return out.mul_(self.sigma_mean.to(out.dtype))


def chunk_bytes(rows: int, columns: int, matrices: int, products: int, device: torch.device) -> int:
    """Return the bytes of ``matrices`` chunks and of the larger of: making one, ``products`` tensors of its size."""
    elements = columns * chunk_rows(rows, columns, device)
    making = max(12 * min(BLOCK_ELEMENTS, elements), 4 * elements + 4 * min(BLOCK_ELEMENTS, elements))
    return 8 * elements * matrices + max(making, 8 * elements * products)


def part_bytes(columns: int, block_elements: int, products: int, device: torch.device) -> int:
    """Return the bytes of ``RowwiseSpectral.rows``: the result, one chunk with its products, and the evidence."""
    rows = max(1, block_elements // max(1, columns))
    chunk = chunk_bytes(rows, columns, 1, products, device)
    return 4 * block_elements + chunk + 16 * PROBES * chunk_rows(rows, columns, device)
