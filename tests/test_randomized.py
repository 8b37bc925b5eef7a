"""``imf.randomized_svd`` against numpy's float64 SVD: its triplets, and whether its evidence is true."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import isomerge_fast as imf
from isomerge_fast.bench.problems import deltas_like_fine_tuning
from isomerge_fast.errors import InputError
from isomerge_fast.linalg import randomized, subspace_chebyshev
from isomerge_fast.linalg.triplets import MEASURES, Problem, Triplets, column_norms, judged, rayleigh_ritz
from pretend_gpu import PretendTensor, pretend_gpu

SINGLE, DOUBLE = torch.float32, torch.float64
DEFAULTS = {SINGLE: 1e-5, DOUBLE: 1e-8}
# What rounding a result to its dtype adds to an angle, and to a residual over s_1.
ROUNDED = {SINGLE: 1e-7, DOUBLE: 1e-14}


def with_sigma(sigma: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """U diag(σ) Vᵀ in float64."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(side, len(sigma), generator=generator, dtype=DOUBLE))[0] for side in (rows, columns)
    )
    return (u * sigma) @ v.mT


def clustered(count: int, cut: int, gap: float) -> Tensor:
    """Falling σ of which those around the cut are one, but for a relative gap at it."""
    sigma = 1.0 / (1.0 + torch.arange(count, dtype=DOUBLE) / 20.0)
    sigma[cut - 2 : cut] = sigma[cut - 1]
    sigma[cut:] = (sigma[cut:] / sigma[cut]) * sigma[cut - 1] * (1.0 - gap)
    return sigma


def logarithmic(count: int, condition: float) -> Tensor:
    return torch.logspace(0.0, -float(np.log10(condition)), count, dtype=DOUBLE)


def low_rank(count: int, rank: int, noise: float) -> Tensor:
    sigma = noise * torch.linspace(1.0, 0.5, count, dtype=DOUBLE)
    sigma[:rank] = torch.linspace(1.0, 0.3, rank, dtype=DOUBLE)
    return sigma


def check(a: Tensor, found: imf.linalg.randomized.SvdResult, tolerance: float | None = None) -> None:
    """The result is what its evidence says, by numpy's SVD in float64, and that it is certified."""
    (u, s, vh), evidence = found, found.evidence
    assert bool(evidence.certified.all()), evidence
    dtype, rank = u.dtype, s.shape[-1]
    assert {u.dtype, s.dtype, vh.dtype} == {DOUBLE if a.dtype == DOUBLE else SINGLE}
    tolerance, rounded = tolerance or DEFAULTS[dtype], ROUNDED[dtype]
    assert all(side.is_contiguous() for side in found)
    batch, (rows, columns) = a.shape[:-2], a.shape[-2:]
    assert (u.shape, s.shape, vh.shape) == ((*batch, rows, rank), (*batch, rank), (*batch, rank, columns))
    matrices = a.double().reshape(-1, rows, columns).numpy()
    parts = (u.double().reshape(-1, rows, rank), s.double().reshape(-1, rank), vh.double().reshape(-1, rank, columns))
    for index, (matrix, *member) in enumerate(zip(matrices, *(part.numpy() for part in parts), strict=True)):
        left, sigma, right = member
        true_u, true_s, true_vh = np.linalg.svd(matrix, full_matrices=False)
        scale = true_s[0] or 1.0
        assert (np.diff(sigma) <= 0).all()
        assert np.abs(sigma - true_s[:rank]).max() <= (tolerance + rounded) * scale
        assert np.linalg.norm(left.T @ left - np.eye(rank)) <= (10 * rounded + tolerance) * rank**0.5
        assert np.linalg.norm(right @ right.T - np.eye(rank)) <= (10 * rounded + tolerance) * rank**0.5
        measures = [getattr(evidence, name).reshape(-1)[index].item() for name in MEASURES]
        residual, _, angle, gap, captured, determined, _ = measures
        forward = np.linalg.norm(matrix @ right.T - left * sigma, axis=0).max()
        backward = np.linalg.norm(matrix.T @ left - right.T * sigma, axis=0).max()
        assert max(forward, backward) <= (residual + 3 * rounded) * scale
        total = np.square(matrix).sum() or 1.0
        assert abs(captured - np.square(true_s[:rank]).sum() / total) <= tolerance
        if rank < len(true_s) and true_s[rank - 1] > 0:
            true_gap = (true_s[rank - 1] - true_s[rank]) / true_s[rank - 1]
            assert gap >= true_gap - tolerance * scale / true_s[rank - 1]
        if determined and rank < len(true_s):
            # numpy's own vectors are off by a few ε over the gap.
            known = 64 * 2.2e-16 * scale / (true_s[rank - 1] - true_s[rank])
            for side, exact in ((left, true_u[:, :rank]), (right.T, true_vh[:rank].T)):
                off = np.linalg.norm(side - exact @ (exact.T @ side)) / rank**0.5
                assert off <= angle + rounded + known
            assert angle <= tolerance


SPECTRA = {
    "log-1e2": lambda count, cut: logarithmic(count, 1e2),
    "log-1e4": lambda count, cut: logarithmic(count, 1e4),
    "log-1e6": lambda count, cut: logarithmic(count, 1e6),
    **{f"gap-{gap:g}": lambda count, cut, gap=gap: clustered(count, cut, gap) for gap in (1e-1, 1e-2, 1e-3, 1e-4, 0.0)},
    "low-rank": lambda count, cut: low_rank(count, cut, 0.0),
    "low-rank-noise": lambda count, cut: low_rank(count, cut, 1e-4),
    "fewer-directions": lambda count, cut: low_rank(count, max(1, cut - 2), 0.0),
    "fewer-and-noise": lambda count, cut: low_rank(count, max(1, cut - 2), 1e-5),
    "one-value": lambda count, cut: torch.ones(count, dtype=DOUBLE),
}
# Rank by shape: those of a CPU's search, of the range finder alone, of all directions, and of one SVD.
SHAPES = {(420, 288): 3, (288, 420): 8, (300, 300): 40, (110, 130): 12, (60, 500): 5, (130, 120): 119}


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["fp32", "fp64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_triplets_and_their_evidence_are_true(spectrum: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rank = SHAPES[shape]
    a = with_sigma(SPECTRA[spectrum](min(shape), rank), *shape).to(dtype)
    before = a.clone()
    found = imf.randomized_svd(a, rank)
    check(a, found)
    assert torch.equal(a, before)
    again = imf.randomized_svd(a, rank)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_each_way_is_taken_where_it_is_the_cheapest() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 300, generator=generator)
    thin = torch.randn(400, 3, generator=generator) @ torch.randn(3, 300, generator=generator)
    for a, rank, algorithm in (
        (thin, 3, "range-finder-fp64"),
        (thin + 1e-4 * noise, 3, "range-finder-fp64"),
        (thin, 8, "range-finder-fp64"),
        (noise, 3, "chebyshev-fp64"),
        (noise, 20, "gram-eigh-fp64"),
        (noise, 200, "svd-fp64"),
        (noise[:50], 3, "svd-fp64"),
    ):
        found = imf.randomized_svd(a, rank)
        assert found.evidence.algorithm == (algorithm,)
        check(a, found)


def test_of_low_rank_and_noise_steps_are_taken_until_it_is_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Tensor] = []
    monkeypatch.setattr(randomized, "rayleigh_ritz", lambda a, x: (steps.append(x), rayleigh_ritz(a, x))[1])
    a = with_sigma(low_rank(288, 3, 1e-3), 400, 288)
    found = imf.randomized_svd(a, 3)
    check(a, found)
    assert found.evidence.algorithm == ("range-finder-fp64",)
    assert 1 < len(steps) <= 1 + randomized.LOW_RANK_STEPS


def test_directions_that_are_not_there_are_found_without_another_way() -> None:
    """Exact zeros, at which a QR by Cholesky fails."""
    sigma = torch.zeros(288, dtype=DOUBLE)
    sigma[:3] = 1.0
    for rank in (2, 3, 9):
        a = diagonal(sigma, 400)
        found = imf.randomized_svd(a, rank)
        check(a, found)
        assert found.evidence.algorithm == ("range-finder-fp64",)


@pytest.mark.parametrize("kind", ["noise", "decay"])
@pytest.mark.parametrize("rank", [4, 19])
def test_errors_are_below_those_of_svd_lowrank(kind: Any, rank: int) -> None:
    a = deltas_like_fine_tuning(512, 384, 1, kind)[0]
    exact = torch.linalg.svd(a.double(), full_matrices=False)
    torch.manual_seed(0)
    theirs = torch.svd_lowrank(a, q=rank + 9, niter=4)
    ours = imf.randomized_svd(a, rank)

    def errors(u: Tensor, s: Tensor, v: Tensor) -> tuple[float, ...]:
        sides = ((exact[0][:, :rank], u[:, :rank]), (exact[2].mT[:, :rank], v[:, :rank]))
        angles = (torch.linalg.matrix_norm(side.double() - true @ (true.mT @ side.double())) for true, side in sides)
        return (*(float(angle) for angle in angles), float((s[:rank] - exact[1][:rank]).abs().max()))

    for our_error, their_error in zip(errors(ours.u, ours.s, ours.vh.mT), errors(*theirs), strict=True):
        assert our_error <= their_error


@pytest.mark.parametrize("size", [(40, 30), (130, 110), (420, 288)], ids=str)
def test_a_matrix_of_a_batch_is_what_it_is_alone(size: tuple[int, int]) -> None:
    """Whatever its neighbours are: some take another way, one is zero."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 3, *size, generator=generator)
    a[0, 1] = with_sigma(low_rank(min(size), 3, 0.0), *size).float()
    a[1, 0] = 0.0
    a[1, 2] *= 1e-20
    found = imf.randomized_svd(a, 3)
    check(a, found)
    for index in np.ndindex(2, 3):
        alone = imf.randomized_svd(a[index], 3)
        place = index[0] * 3 + index[1]
        assert found.evidence.algorithm[place] == alone.evidence.algorithm[0]
        for member, single in zip(found, alone, strict=True):
            assert torch.equal(member[index], single)
    assert len(found.evidence.algorithm) == 6
    assert found.evidence.angle.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_as_float32_would_be(dtype: torch.dtype) -> None:
    a = torch.randn(300, 280, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = imf.randomized_svd(a, 3)
    check(a, found)
    single = imf.randomized_svd(a.float(), 3)
    for one, other in zip(found, single, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


def test_strides_arrays_and_modes_make_no_difference() -> None:
    a = torch.randn(3, 280, 300, generator=torch.Generator().manual_seed(0))
    expected = imf.randomized_svd(a.contiguous(), 3)
    wide = torch.zeros(3, 300, 560)
    wide[..., ::2] = a.mT
    column_wise, strided = a.mT.contiguous().mT, wide[..., ::2].mT
    inputs: list[Any] = [column_wise, strided, a.numpy(), a.numpy()[::-1].copy()[::-1], a.clone().requires_grad_()]
    for given in inputs:
        found = imf.randomized_svd(given, 3)
        assert not found.u.requires_grad
        torch.testing.assert_close(found.s, expected.s, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.vh.mT @ found.vh, expected.vh.mT @ expected.vh, rtol=0, atol=1e-6)
    thin = a[0, :, :3] @ a[0, :3]
    plain = imf.randomized_svd(thin, 3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        again, found = imf.randomized_svd(thin, 3), imf.randomized_svd(a, 3)
    assert plain.evidence.algorithm == ("range-finder-fp64",)
    assert torch.equal(again.u, plain.u)
    assert torch.equal(found.u, expected.u)


def test_nothing_is_asked_for_or_there() -> None:
    for shape, rank in (((5, 7), 0), ((0, 5, 7), 3), ((2, 0, 5, 7), 5), ((3, 0, 4), 0), ((0, 0), 0)):
        found = imf.randomized_svd(torch.ones(shape), rank)
        batch = shape[:-2]
        shapes = ((*batch, shape[-2], rank), (*batch, rank), (*batch, rank, shape[-1]))
        assert tuple(tuple(side.shape) for side in found) == shapes
        assert found.evidence.certified.shape == batch
        assert bool(found.evidence.certified.all())


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (7, 7), (30, 200), (120, 120)], ids=str)
def test_all_directions_of_a_matrix(shape: tuple[int, int]) -> None:
    for dtype in (SINGLE, DOUBLE):
        a = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        found = imf.randomized_svd(a, min(shape))
        check(a, found)
        u, s, vh = found
        torch.testing.assert_close((u * s) @ vh, a, rtol=0, atol=1e-5 if dtype == SINGLE else 1e-13)


@pytest.mark.parametrize("shape", [(9, 9), (120, 110), (400, 300)], ids=str)
def test_a_zero_matrix_has_orthonormal_vectors(shape: tuple[int, int]) -> None:
    a = torch.zeros(shape)
    found = imf.randomized_svd(a, 3)
    check(a, found)
    assert not found.s.any()
    assert not found.evidence.determined.any()


@pytest.mark.parametrize("size", [1e-200, 1e200, 1e-30, 1e30], ids=str)
def test_sizes_make_no_difference(size: float) -> None:
    for rank, shape in ((3, (300, 290)), (5, (110, 120))):
        for matrix in (torch.randn(shape, dtype=DOUBLE), with_sigma(low_rank(min(shape), rank, 0.0), *shape)):
            for dtype in (DOUBLE, SINGLE) if 1e-100 < size < 1e100 else (DOUBLE,):
                plain = imf.randomized_svd(matrix.to(dtype), rank)
                scaled = imf.randomized_svd((matrix * size).to(dtype), rank)
                assert bool(scaled.evidence.certified.all())
                torch.testing.assert_close(scaled.s.double() / size, plain.s.double(), rtol=1e-6, atol=0)


def test_of_equal_singular_values_at_the_cut_residuals_are_certified() -> None:
    a = with_sigma(clustered(300, 5, 0.0), 400, 300)
    evidence = imf.randomized_svd(a, 5).evidence
    assert not evidence.determined.any()
    assert bool(evidence.certified.all())
    assert float(evidence.residual) <= 1e-12
    expected = torch.linalg.svdvals(a)[:5].square().sum() / a.square().sum()
    torch.testing.assert_close(evidence.captured, expected)


def test_a_tolerance_that_float64_does_not_reach_is_not_certified() -> None:
    a = torch.randn(120, 110, generator=torch.Generator().manual_seed(0))
    evidence = imf.randomized_svd(a, 4, tolerance=1e-18).evidence
    assert not evidence.certified.any()
    assert [text.partition(" ")[2].partition(":")[0] for text in evidence.escalations] == ["gram-eigh-fp64", "svd-fp64"]
    loose = imf.randomized_svd(a, 4, tolerance=0.5)
    assert bool(loose.evidence.certified.all())


# --- what is refused --------------------------------------------------------------------------------------------------

A = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), "a [1, 2] has 1 entries that are NaN or infinite"),
        (torch.full((2, 2, 2), float("inf"), dtype=DOUBLE), "a [2, 2, 2] has 8 entries that are NaN or infinite"),
        (torch.ones(3), "a has shape [3]; expected a matrix [M, N] or a batch of them [..., M, N]"),
        (torch.tensor(1.0), "a has shape []; expected a matrix"),
        (torch.ones(3, 3, dtype=torch.int64), "a is torch.int64; expected float64, float32, bfloat16 or float16"),
        (torch.ones(3, 3, dtype=torch.complex64), "a is torch.complex64; expected float64"),
        (torch.ones(3, 3).to_sparse(), "a is torch.sparse_coo; expected a dense tensor"),
        (torch.ones(3, 3, device="meta"), "a is a meta tensor, which has no numbers"),
        ([[1.0]], "a is a list; expected a tensor or a numpy array"),
        (None, "a is None; expected a tensor or a numpy array"),
        (torch.full((300, 300), 1e38), "a [300, 300] has singular values beyond the range of torch.float32"),
    ],
)
def test_what_are_no_matrices(given: Any, message: str) -> None:
    with pytest.raises(imf.InputError) as caught:
        imf.randomized_svd(given, 1)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"rank": 4}, "rank is 4; expected a whole number, 0 or more, 3 at most"),
        ({"rank": -1}, "rank is -1; expected a whole number, 0 or more"),
        ({"rank": 1.5}, "rank is 1.5; expected a whole number"),
        ({"rank": True}, "rank is True; expected a whole number"),
        ({"n_oversamples": 0}, "n_oversamples is 0; expected a whole number, 1 or more"),
        ({"tolerance": 0.0}, "tolerance is 0.0; expected a number above 0"),
        ({"tolerance": float("nan")}, "tolerance is nan; expected a finite number"),
        ({"tolerance": "small"}, "tolerance is 'small'; expected a number"),
    ],
)
def test_options_that_cannot_be(named: dict[str, Any], message: str) -> None:
    with pytest.raises(imf.ConfigError) as caught:
        imf.randomized_svd(A, **{"rank": 1, **named})
    assert str(caught.value).startswith(message)


# --- misses are caught, and what follows is named ---------------------------------------------------------------------


def names_of(evidence: imf.linalg.randomized.SvdEvidence) -> list[str]:
    return [text.partition(": ")[2].partition(":")[0] for text in evidence.escalations]


def diagonal(sigma: Tensor, rows: int) -> Tensor:
    a = torch.zeros(rows, len(sigma), dtype=SINGLE)
    a.diagonal()[:] = sigma
    return a


@pytest.fixture
def blind_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that has nothing of the last direction: of a diagonal matrix no product and no QR brings it back."""
    draw = subspace_chebyshev.fixed_draw

    def blind(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return draw(rows, columns, dtype, device) * (torch.arange(rows) < rows - 1)[:, None]

    monkeypatch.setattr(subspace_chebyshev, "fixed_draw", blind)
    monkeypatch.setattr(randomized, "fixed_draw", blind)


@pytest.mark.usefixtures("blind_draw")
def test_a_search_that_overlooks_a_direction_is_caught() -> None:
    sigma = (1.0 / (1.0 + torch.arange(288, dtype=DOUBLE))).flip(0)
    a = diagonal(sigma, 400)
    overlooked = randomized.search(Problem(a, 3, 12, 1e-5))
    assert isinstance(overlooked, Triplets)
    torch.testing.assert_close(overlooked.sigma[:3], sigma[-4:-1].flip(0), rtol=1e-5, atol=0)  # it did overlook it
    found = imf.randomized_svd(a, 3)
    check(a, found)
    assert found.evidence.algorithm == ("gram-eigh-fp64",)
    assert names_of(found.evidence) == ["range-finder-fp64", "chebyshev-fp64"]
    assert found.evidence.escalations[1].startswith("a: chebyshev-fp64: angle 1.0e+00 above 1e-05")


@pytest.mark.usefixtures("blind_draw")
def test_a_range_that_overlooks_a_direction_is_caught() -> None:
    """Which is so small that float32 products cannot tell it from nothing, and may be wanted or not."""
    sigma = torch.zeros(288, dtype=DOUBLE)
    sigma[:3], sigma[-1] = 1.0, 2e-3
    a = diagonal(sigma, 400)
    for rank, names in ((3, []), (4, ["range-finder-fp64"])):
        found = imf.randomized_svd(a, rank)
        check(a, found)
        assert names_of(found.evidence)[:1] == names
        torch.testing.assert_close(found.s, sigma.sort(descending=True)[0][:rank].float())


def test_a_search_of_too_few_steps_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace_chebyshev, "MAX_DEGREE", 0)
    a = deltas_like_fine_tuning(400, 288, 1, "noise")[0]
    found = imf.randomized_svd(a, 3, n_oversamples=9)
    check(a, found)
    assert found.evidence.algorithm == ("gram-eigh-fp64",)
    assert names_of(found.evidence) == ["range-finder-fp64", "chebyshev-fp64"]
    assert "angle" in found.evidence.escalations[1]


def test_a_search_that_takes_longer_than_an_eigensolver_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    chebyshev = subspace_chebyshev._chebyshev
    monkeypatch.setattr(subspace_chebyshev, "_chebyshev", lambda *a: (steps.append(a[-1]), chebyshev(*a))[1])
    a = with_sigma(torch.ones(288, dtype=DOUBLE) - 1e-4 * (torch.arange(288) >= 3), 400, 288).float()
    found = imf.randomized_svd(a, 3)
    check(a, found)
    assert found.evidence.algorithm == ("gram-eigh-fp64",)
    assert "too close together" in found.evidence.escalations[1]
    assert sum(steps) + subspace_chebyshev.RITZ_PRODUCTS * len(steps) <= randomized.SEARCH_WORK * 288 / 12


def test_what_a_gram_matrix_does_not_resolve_takes_an_svd() -> None:
    a = with_sigma(logarithmic(120, 1e16), 130, 120)
    found = imf.randomized_svd(a, 48, tolerance=1e-5)
    check(a, found, 1e-5)
    assert found.evidence.algorithm == ("svd-fp64",)
    assert names_of(found.evidence) == ["gram-eigh-fp64"]


def test_a_solver_that_fails_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(problem: Problem) -> Triplets:
        raise torch.linalg.LinAlgError("it did not converge\nat all")

    a = torch.randn(2, 120, 110, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(randomized, "all_directions", fail)
    found = imf.randomized_svd(a, 4)
    check(a, found)
    assert found.evidence.escalations == tuple(f"a[{n}]: gram-eigh-fp64: it did not converge" for n in range(2))
    monkeypatch.setattr(randomized, "full_svd", fail)
    with pytest.raises(imf.InputError, match=r"no singular vectors were found of \[120, 110\]: svd-fp64: it did not"):
        imf.randomized_svd(a, 4)


BOUNDED = {
    "log-1e1": logarithmic(60, 1e1),
    "log-1e4": logarithmic(60, 1e4),
    # Where what couples both sides of the cut by way of the outside is most of the angle.
    "gap-1e-3": clustered(60, 6, 1e-3),
}


@pytest.mark.parametrize("off", [1e-1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("spectrum", BOUNDED)
def test_the_bound_is_above_the_angle(off: float, spectrum: str) -> None:
    """Of a space near the true one, with what lies beyond known exactly for that space."""
    a = with_sigma(BOUNDED[spectrum], 80, 60)
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.linalg.qr(vh.mT[:, :12] + off * 0.1 * torch.randn(60, 12, generator=generator, dtype=DOUBLE))[0]
        found, _ = rayleigh_ritz(a, x)
        bound = bounded(a, found, 6)
        assert angle_between(found.short[:, :6], vh.mT[:, :6]) <= 1.01 * bound + 1e-12
        assert angle_between(found.long[:, :6], u[:, :6]) <= 1.01 * bound + 1e-12
        if off <= 1e-4 and spectrum == "log-1e1":
            assert bound <= 10 * off  # and is one


def test_the_bound_counts_both_residuals() -> None:
    """With v = Aᵀu/s nothing is missing on one side, and all of the error is seen on the other."""
    a = with_sigma(logarithmic(60, 1e1), 80, 60)
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    long = torch.nn.functional.normalize(u[:, :1] + 1e-3 * u[:, 1:2], dim=0)
    short = a.mT @ long
    sigma = torch.linalg.vector_norm(short, dim=0)
    short = short / sigma
    beyond = torch.linalg.matrix_norm(a - a @ short @ short.mT, ord=2).square()
    back = column_norms(a.mT @ long, short, sigma)
    assert float(back) < 1e-15
    found = Triplets(short, long, sigma, column_norms(a @ short, long, sigma), back, beyond)
    assert 5e-4 <= angle_between(short, vh.mT[:, :1]) <= bounded(a, found, 1)


def bounded(a: Tensor, found: Triplets, rank: int) -> float:
    """The bound of ``judged``, with μ as it is."""
    rest = a - a @ found.short @ found.short.mT
    found = replace(found, beyond=torch.linalg.matrix_norm(rest, ord=2).square())
    return judged(Problem(a, rank, found.sigma.shape[-1], 1e-8), found)[MEASURES.index("angle")].item()


def angle_between(side: Tensor, exact: Tensor) -> float:
    return torch.linalg.matrix_norm(side - exact @ (exact.mT @ side)).item() / side.shape[-1] ** 0.5


def test_vectors_that_are_none_are_not_certified() -> None:
    a = with_sigma(logarithmic(60, 1e2), 80, 60)
    problem = Problem(a, 6, 12, 1e-8)
    good = randomized.full_svd(problem)
    assert bool(judged(problem, good)[-1])

    def changed(**parts: Any) -> Triplets:
        worse = replace(good, **parts)
        image, back = a @ worse.short, a.mT @ worse.long
        forward, backward = column_norms(image, worse.long, worse.sigma), column_norms(back, worse.short, worse.sigma)
        return replace(worse, forward=forward, backward=backward)

    skewed = good.long.clone()
    skewed[:, 0] += 1e-6 * skewed[:, 1]
    for worse in (
        changed(sigma=good.sigma * (1.0 + 1e-6)),
        changed(long=skewed),
        changed(short=good.short * (1.0 + 1e-7), sigma=good.sigma),
        changed(short=good.short[:, [1, 0, *range(2, 7)]]),
        replace(good, beyond=good.sigma[0].square()),
        replace(good, beyond=good.sigma[0] * torch.inf),
        replace(good, sigma=good.sigma * torch.nan),
    ):
        assert not bool(judged(problem, worse)[-1])


# --- on a GPU that is not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rank", "algorithm", "launches", "reads"),
    [
        ((4, 640, 520), 19, "chebyshev-fp64", 390, 12),
        ((4, 520, 640), 19, "chebyshev-fp64", 390, 12),
        ((6, 130, 120), 20, "gram-eigh-fp64", 170, 8),
        ((64, 20, 16), 16, "gram-eigh-fp64", 125, 8),
    ],
    ids=str,
)
def test_a_batch_on_a_gpu_is_solved_together(
    shape: tuple[int, int, int], rank: int, algorithm: str, launches: int, reads: int
) -> None:
    count, rows, columns = shape
    a = torch.stack(deltas_like_fine_tuning(rows, columns, count, "noise"))
    with pretend_gpu() as gpu:
        there = gpu.upload(a)
        gpu.reset()
        found = imf.randomized_svd(there, rank)
        assert gpu.launch_count <= launches, gpu.launches.most_common(12)
        assert gpu.read_count <= reads, gpu.reads
        assert all(isinstance(side, PretendTensor) for side in found)
        u, s, vh = (side.held for side in found)  # type: ignore[attr-defined]  # asserted above
    assert found.evidence.algorithm == (algorithm,) * count
    check(a, replace(found, u=u, s=s, vh=vh))
    expected = imf.randomized_svd(a, rank)
    torch.testing.assert_close(s, expected.s, rtol=2e-6, atol=0)
    torch.testing.assert_close(vh.mT @ vh, expected.vh.mT @ expected.vh, rtol=0, atol=1e-5)


def test_of_a_batch_on_a_gpu_what_missed_is_solved_again() -> None:
    a = torch.randn(3, 130, 120, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    a[1] = with_sigma(logarithmic(120, 1e16), 130, 120)
    with pretend_gpu() as gpu:
        found = imf.randomized_svd(gpu.upload(a), 48, tolerance=1e-5)
        u, s, vh = (side.cpu() for side in found)
    assert found.evidence.algorithm == ("gram-eigh-fp64", "svd-fp64", "gram-eigh-fp64")
    assert [text.partition(":")[0] for text in found.evidence.escalations] == ["a[1]"]
    check(a, replace(found, u=u, s=s, vh=vh), 1e-5)


@pytest.mark.parametrize("size", [1e-42, 1e-44])
def test_what_float32_holds_with_few_digits_is_refused(size: float) -> None:
    a = size * torch.ones(1, 256)
    with pytest.raises(InputError, match=r"beyond the range of torch\.float32"):
        imf.randomized_svd(a, 1)
    u, s, vh = imf.randomized_svd(1e-36 * torch.ones(1, 256), 1)
    torch.testing.assert_close(u * s @ vh, 1e-36 * torch.ones(1, 256), rtol=1e-6, atol=0)
