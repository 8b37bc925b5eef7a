"""The filter of a spectrum's bottom by products alone: against LAPACK, and with its mistakes made on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import oracle
from cases import CASES, Case
from isomerge_fast.linalg import spectral_filter
from isomerge_fast.linalg.filtered import SpectralFilter
from isomerge_fast.linalg.spectral_filter import BottomBlock, block_width, bottom_block, counted_cut, sign_of
from isomerge_fast.linalg.spectrum import largest_eigenvalue
from isomerge_fast.methods import MemoryDeltas, make_method

DOUBLE = torch.float64
SIDE, COUNT = 240, 48
# ‖sin θ‖_F/√c that Iso-CTS magnifies the least: what ``ChebyshevSubspace`` allows.
ANGLE = 1e-6


def symmetric(sigma: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return H = V diag(σ) Vᵀ of ascending σ, and V."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(len(sigma), len(sigma), generator=generator, dtype=DOUBLE)).Q
    h = (vectors * sigma) @ vectors.mT
    return 0.5 * (h + h.mT), vectors


def with_gap(gap: float, condition: float = 1e4) -> Tensor:
    """Return σ, ascending to 1, that fall about evenly but for a relative gap above the bottom ``COUNT``."""
    sigma = torch.linspace(1.0 / condition, 0.06, SIDE, dtype=DOUBLE)
    sigma[-16:] = torch.linspace(0.3, 1.0, 16, dtype=DOUBLE)  # what all tasks share
    sigma[COUNT:] += sigma[COUNT - 1] * (1.0 + gap) - sigma[COUNT].item()
    return sigma


def in_clusters(width: int) -> Tensor:
    """Return σ of which ``width`` on each side of the cut are equal to a millionth."""
    sigma = with_gap(1e-3)
    sigma[COUNT - width : COUNT] = sigma[COUNT - 1] * (1 - 1e-6 * torch.arange(width, 0, -1))
    sigma[COUNT : COUNT + width] = sigma[COUNT] * (1 + 1e-6 * torch.arange(width))
    return sigma


def sine(found: Tensor, vectors: Tensor) -> float:
    rest = found - vectors @ (vectors.mT @ found)
    return float(torch.linalg.matrix_norm(rest)) / math.sqrt(found.shape[-1])


def block_of(h: Tensor, count: int = COUNT, dtype: torch.dtype = DOUBLE) -> BottomBlock:
    return bottom_block(h, largest_eigenvalue(h), count, dtype=dtype)


SPECTRA: dict[str, Tensor] = {
    **{f"gap {gap:.0e}": with_gap(gap) for gap in (1e-1, 1e-2, 1e-3, 1e-4)},
    **{f"kappa {condition:.0e}": with_gap(1e-2, condition) for condition in (3e1, 1e3, 1e6)},
    **{f"cluster of {width} at the cut": in_clusters(width) for width in (2, 6)},
    "singular": torch.cat([torch.zeros(5, dtype=DOUBLE), with_gap(1e-2)[5:]]),
}


@pytest.mark.parametrize("sigma", SPECTRA.values(), ids=SPECTRA.keys())
def test_the_bottom_is_lapacks(sigma: Tensor) -> None:
    h, vectors = symmetric(sigma)
    found = block_of(h)
    bottom = found.vectors[:, :COUNT]
    assert not bool(found.missed)
    # A bound, that is met, and small.
    error = sine(bottom, vectors[:, :COUNT])
    assert error <= float(found.angle) + 1e-13
    assert float(found.angle) <= ANGLE
    assert float((found.values[:COUNT] - sigma[:COUNT]).abs().max()) <= 1e-12
    unit = torch.eye(found.vectors.shape[-1], dtype=DOUBLE)
    assert float((found.vectors.mT @ found.vectors - unit).abs().max()) <= 1e-12


def test_members_of_a_batch_are_found_each() -> None:
    spectra = [with_gap(1e-2), in_clusters(4), 7.0 * with_gap(1e-3, 1e2)]
    pairs = [symmetric(sigma, seed) for seed, sigma in enumerate(spectra)]
    found = block_of(torch.stack([h for h, _ in pairs]))
    assert found.missed.tolist() == [False] * 3
    for member, (_, vectors) in enumerate(pairs):
        assert sine(found.vectors[member, :, :COUNT], vectors[:, :COUNT]) <= float(found.angle[member]) <= ANGLE


def test_of_a_side_that_the_padding_fills_all_are_found() -> None:
    h, vectors = symmetric(with_gap(1e-2)[-20:])
    assert block_width(20, 6) == 20
    found = block_of(h, 6)
    assert sine(found.vectors[:, :6], vectors[:, :6]) <= 1e-12


@pytest.mark.parametrize("side", [200, 384, 700])
def test_the_cut_is_counted(side: int) -> None:
    """By random vectors: to 2.5 % of all, and never so far that the padding does not hold the difference."""
    for seed in range(3):
        sigma = torch.rand(side, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).square().sort().values
        h, _ = symmetric(sigma, seed)
        for share in (0.1, 0.2, 0.4):
            cut = counted_cut(h, share * side)
            assert abs(int((sigma < cut).sum()) - share * side) <= 0.025 * side


def test_a_sign_is_one_and_knows_the_side() -> None:
    sigma = with_gap(1e-1)
    sigma = sigma / sigma[-1]
    h, vectors = symmetric(sigma)
    sign = sign_of(h, 0.5 * (sigma[COUNT - 1] + sigma[COUNT]))
    expected = (vectors * torch.where(torch.arange(SIDE) < COUNT, -1.0, 1.0)) @ vectors.mT
    assert float((sign - expected).abs().max()) <= 1e-7


def test_in_float32_the_certificate_says_what_is_left() -> None:
    """What is left of the large σ is 2e-4 here, and the bound is above it."""
    h, vectors = symmetric(with_gap(1e-2))
    found = block_of(h, dtype=torch.float32)
    error = sine(found.vectors[:, :COUNT], vectors[:, :COUNT])
    assert 1e-8 <= error <= 1e-3
    assert error <= float(found.angle)


def too_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_filter, "SIGN_LOWER", 0.2)


def cut_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_filter, "counted_cut", lambda h, below: counted_cut(h, COUNT - 0.05 * SIDE))


def cut_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_filter, "counted_cut", lambda h, below: counted_cut(h, COUNT + 0.2 * SIDE))


def deficient_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one direction of the bottom; QR makes it up by one from elsewhere."""
    _, vectors = symmetric(with_gap(1e-2))
    lost = vectors[:, 3:4]
    draw = spectral_filter.fixed_draw

    def without(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        found = draw(rows, columns, dtype, device)
        return found - lost @ (lost.mT @ found) if columns > spectral_filter.COUNTING_VECTORS else found

    monkeypatch.setattr(spectral_filter, "fixed_draw", without)
    # Else rounding brings it back, and the second pass all of it.
    filtered = spectral_filter._filtered
    monkeypatch.setattr(spectral_filter, "_filtered", lambda sign, x: _without(filtered(sign, x), lost))


def _without(x: Tensor, lost: Tensor) -> Tensor:
    return x - lost @ (lost.mT @ x)


MISTAKES: tuple[Callable[[pytest.MonkeyPatch], None], ...] = (
    too_few_steps,
    cut_too_low,
    cut_too_high,
    deficient_start,
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_caught(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    h, _ = symmetric(with_gap(1e-2))
    assert not bool(block_of(h).missed)
    mistake(monkeypatch)
    found = block_of(h)
    assert bool(found.missed) or not float(found.angle) <= ANGLE


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_what_is_caught_is_solved_by_the_next(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a merge: a stack of one, whose matrix is then merged alone."""
    case = Case(3, 260, SIDE, 1e2, 8)
    deltas = case.deltas()
    mistake(monkeypatch)
    method = make_method("iso-cts")
    monkeypatch.setattr(type(method), "stack_size", lambda self, *_: 2)
    ((value, stats),) = method.merge_stack([MemoryDeltas(deltas)])
    judge = oracle.iso_cts([delta.double().numpy() for delta in deltas])
    assert oracle.relative_error(value.numpy(), judge) <= 1e-6
    assert not stats.missed()
    if mistake is not deficient_start:  # whose lost direction is none of this matrix's
        assert stats.escalations[0].startswith("iso-cts/spectral-filter-fp64: ")
        assert "spectral-filter" not in stats.algorithm


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.condition <= 1e3 and case.dtype == torch.float32], ids=str
)
def test_iso_cts_by_the_filter_alone(case: Case) -> None:
    """As the only solver, T = 2, 8, 20: certified, and within a hundredth of what is promised."""
    deltas = case.deltas()
    method = make_method("iso-cts", {"solver": SpectralFilter()})
    value, stats = method.merge(MemoryDeltas(deltas))
    judge = oracle.iso_cts([delta.double().numpy() for delta in deltas])
    assert stats.algorithm == "iso-cts/spectral-filter-fp64"
    assert not stats.missed()
    assert oracle.relative_error(value.numpy(), judge) <= 1e-6


def test_a_float32_filter_claims_nothing_that_is_wrong() -> None:
    for condition in (1e1, 1e3):
        deltas = Case(2, 130, 130, condition, 8).deltas()
        solver = SpectralFilter(filter_dtype=torch.float32)
        value, stats = make_method("iso-cts", {"solver": solver}).merge(MemoryDeltas(deltas))
        assert stats.algorithm == "iso-cts/spectral-filter-fp32"
        judge = oracle.iso_cts([delta.double().numpy() for delta in deltas])
        assert stats.missed() or oracle.relative_error(value.numpy(), judge) <= 1e-5
    assert "angle" in stats.missed()  # of the latter


def test_of_one_task_and_all_directions() -> None:
    deltas = Case(0, 130, 130, 1e2, 2).deltas()[:1]
    value, stats = make_method("iso-cts", {"solver": SpectralFilter()}).merge(MemoryDeltas(deltas))
    judge = oracle.iso_cts([deltas[0].double().numpy()])
    assert not stats.missed()
    assert oracle.relative_error(value.numpy(), judge) <= 1e-6
    # k = r: there is nothing to be split.
    value, stats = make_method("iso-cts", {"solver": SpectralFilter(), "common_fraction": 1.0}).merge(
        MemoryDeltas(deltas)
    )
    assert stats.values["s"] == 0
    assert oracle.relative_error(value.numpy(), oracle.iso_c([deltas[0].double().numpy()])) <= 1e-6


def test_more_bottom_than_top_is_refused() -> None:
    """k = 0 among them."""
    deltas = Case(0, 60, 80, 1e2, 2).deltas()
    for fraction in (0.0, 0.4):
        with pytest.raises(ValueError, match="the filter is for at most 30 bottom directions, not"):
            make_method("iso-cts", {"solver": SpectralFilter(), "common_fraction": fraction}).merge(
                MemoryDeltas(deltas)
            )


def test_a_deficient_sum_is_told() -> None:
    deltas = [delta[:, :20] @ delta[:20] for delta in Case(0, 90, 90, 1e1, 2).deltas()]
    _, stats = make_method("iso-cts", {"solver": SpectralFilter()}).merge(MemoryDeltas(deltas))
    assert "unresolved" in stats.missed()
