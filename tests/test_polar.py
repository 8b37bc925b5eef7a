"""The polar iterations against numpy's float64 SVD, and the bounds and coefficients that they stand on."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch

import oracle
from isomerge_fast.linalg import polar_gram, polar_iteration
from isomerge_fast.linalg.certificate import symmetry
from isomerge_fast.linalg.polar_express import PolarExpress, Quintic, minimax_quintic, quintics
from isomerge_fast.linalg.polar_gram import GramNewtonSchulz, split
from isomerge_fast.linalg.polar_traced import TracedPolar
from isomerge_fast.linalg.protocol import polar_growth
from isomerge_fast.linalg.spectrum import RESOLUTION, singular_range
from isomerge_fast.linalg.svd import FullSvd
from isomerge_kernels import devices
from isomerge_kernels.devices import DeviceTraits
from pretend_gpu import H100, pretend_gpu

SINGLE, DOUBLE = torch.float32, torch.float64
wide_and_tall = pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=["wide", "tall"])


def matrix(
    shape: tuple[int, ...], condition: float, *, rank: int | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(X, its singular values) in float64: log-spaced from 3 to 3/κ between random factors, 0 beyond ``rank``."""
    generator = torch.Generator().manual_seed(seed)
    short = min(shape[-2:])
    sigma = 3.0 * torch.logspace(0, -np.log10(condition), short, dtype=DOUBLE)
    sigma[rank:] = 0.0 if rank is not None else sigma[rank:]
    u, v = (
        torch.linalg.qr(torch.randn(*shape[:-2], side, short, generator=generator, dtype=DOUBLE)).Q
        for side in shape[-2:]
    )
    return (u * sigma) @ v.mT, sigma


def polar(x: torch.Tensor) -> np.ndarray:
    """The oracle's, of every matrix of a batch."""
    members = [oracle.polar(member) for member in x.double().reshape(-1, *x.shape[-2:]).numpy()]
    return np.stack(members).reshape(x.shape)


def no_tolerance(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.shape[:-2], dtype=DOUBLE)


@pytest.mark.parametrize("kind", [PolarExpress, GramNewtonSchulz])
def test_bad_fields_are_refused(kind) -> None:
    with pytest.raises(ValueError, match=r"not torch\.bfloat16"):
        kind(torch.bfloat16)
    for dtype, products in ((DOUBLE, "bf16x3"), (SINGLE, "tf32")):
        with pytest.raises(ValueError, match=f"products: float32 ones have bf16x3, got '{products}'"):
            PolarExpress(dtype, products=products)


def test_target_is_met_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """‖QQᵀ − I‖ is twice the distance of the singular values from 1."""
    x, _ = matrix((40, 60), 1e3)
    for target, kind in product((1e-1, 1e-2, 1e-6), (PolarExpress, GramNewtonSchulz)):
        monkeypatch.setattr(polar_iteration, "SMALLEST_TARGET", target)
        orthogonality = kind().polar(x)[1].orthogonality
        assert orthogonality <= 2.1 * target
        assert orthogonality > 1e-5 or target < 1e-1


def spectra(rows: int) -> dict[str, torch.Tensor]:
    """Singular values in descending order, of the kinds that power iterations find hard or easy."""
    generator = torch.Generator().manual_seed(0)
    near, split_value = torch.full((2, rows), 0.97, dtype=DOUBLE)
    near[0], split_value[-1] = 1.0, 0.9
    return {
        "square": torch.linalg.svdvals(torch.randn(rows, rows, generator=generator, dtype=DOUBLE)),
        "wide": torch.linalg.svdvals(torch.randn(rows, 4 * rows, generator=generator, dtype=DOUBLE)),
        "equal": torch.ones(rows, dtype=DOUBLE),
        "linear": torch.linspace(1, 1 / rows, rows, dtype=DOUBLE),
        "near-outlier": near,
        "near-inlier": split_value,
        "halves": torch.cat([torch.ones(rows // 2, dtype=DOUBLE), torch.full((rows - rows // 2,), 1e-4, dtype=DOUBLE)]),
        **{f"log-{power}": torch.logspace(0, -power, rows, dtype=DOUBLE) for power in (1, 3, 6)},
    }


each_rule = pytest.mark.parametrize("traits", [devices.CPU, H100], ids=["cpu", "h100"])


@each_rule
@pytest.mark.parametrize("rows", [2, 24, 192])
def test_singular_range(rows: int, traits: DeviceTraits, monkeypatch: pytest.MonkeyPatch) -> None:
    """σ₁ from above and σ_r from below, within a few per cent, of a batch of all spectra at once and of each alone."""
    monkeypatch.setitem(devices.KNOWN, torch.device("cpu"), traits)
    if traits.is_gpu:  # L⁻¹ is formed once instead
        monkeypatch.delattr(torch, "cholesky_solve")
    sigma = torch.stack(list(spectra(rows).values()))
    generator = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(len(sigma), rows, rows, generator=generator, dtype=DOUBLE)).Q
    gram = (u * sigma.square()[:, None, :]) @ u.mT
    gram = (gram + gram.mT) / 2
    before = gram.clone()
    largest, smallest = singular_range(gram, tolerance=torch.zeros(len(sigma)))
    assert torch.equal(gram, before)
    for name, above, below in zip(spectra(rows), largest / sigma[:, 0], smallest / sigma[:, -1], strict=True):
        assert 1 - 1e-12 <= above <= 1.07, name
        assert 0.8 <= below <= 1.0, name
    alone = [singular_range(member, tolerance=torch.zeros(())) for member in gram]
    assert torch.stack([value for value, _ in alone]).numpy() == pytest.approx(largest.numpy(), rel=1e-8)
    assert torch.stack([value for _, value in alone]).numpy() == pytest.approx(smallest.numpy(), rel=1e-3)


def test_singular_range_obeys_norms() -> None:
    """No margin where a norm says that it is too much: the identity, and all energy in one direction."""
    v = torch.arange(1, 8, dtype=DOUBLE)
    for gram in (torch.eye(7, dtype=DOUBLE), torch.outer(v, v)):
        largest, _ = singular_range(gram, tolerance=torch.zeros(()))
        assert largest.square() == pytest.approx(torch.linalg.eigvalsh(gram)[-1].item(), rel=1e-12)


@each_rule
def test_singular_range_of_the_deficient_is_0(traits: DeviceTraits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero, indefinite, of low rank, unresolved, below the tolerance; and one in the same batch that is well."""
    monkeypatch.setitem(devices.KNOWN, torch.device("cpu"), traits)
    ones = torch.ones(6, dtype=DOUBLE)
    diagonals = ones.repeat(6, 1)
    diagonals[0] = 0.0
    diagonals[1, -1] = -1.0
    diagonals[2, 3:] = 0.0
    diagonals[3, -1] = (0.5 * RESOLUTION) ** 2
    diagonals[4, -1] = 1e-4
    diagonals[5, -1] = 1e-4
    tolerance = torch.tensor([0.0, 0.0, 0.0, 0.0, 2e-2, 5e-3])
    largest, smallest = singular_range(torch.diag_embed(diagonals), tolerance=tolerance)
    assert smallest[:5].tolist() == [0.0] * 5
    assert 0.8e-2 <= smallest[5] <= 1e-2
    assert largest[0] == 0.0
    assert (largest[1:] >= 1 - 1e-12).all()
    assert torch.isfinite(largest).all()


def evaluate(step: Quintic, x: np.ndarray) -> np.ndarray:
    return x * (step.a + step.b * x**2 + step.c * x**4)


@pytest.mark.parametrize("target", [1e-6, 1e-13])
@pytest.mark.parametrize("lower", [0.9, 0.5, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
def test_every_quintic_equioscillates(lower: float, target: float) -> None:
    """p − 1 reaches ±error four times in turn (Chebyshev: so no quintic does better), and never exceeds it."""
    for step in quintics(lower, target):
        x = np.unique(
            np.concatenate([spacing(step.lower, step.upper, 4001) for spacing in (np.linspace, np.geomspace)])
        )
        deviation = evaluate(step, np.clip(x, step.lower, step.upper)) - 1
        assert np.abs(deviation).max() <= step.error + 1e-14
        if step.error < 1e-9:
            continue  # the rest is rounding
        turns = np.split(deviation, np.flatnonzero(np.diff(np.sign(deviation))) + 1)
        assert [np.sign(turn[0]) for turn in turns] == [-1, 1, -1, 1]
        assert [np.abs(turn).max() for turn in turns] == pytest.approx([step.error] * 4, rel=1e-4)


@pytest.mark.parametrize(
    ("lower", "count"), [(1.0, 1), (0.1, 4), (1e-2, 6), (1e-3, 7), (1e-4, 9), (1e-5, 10), (1e-6, 12)]
)
def test_composition_reaches_its_target(lower: float, count: int) -> None:
    steps = quintics(lower, 1e-6)
    assert len(steps) == count
    assert steps[0].lower == pytest.approx(lower, rel=1e-9)
    x = np.geomspace(lower, 1, 20001)
    for step in steps:
        assert step.lower * (1 - 1e-9) <= x.min()
        assert x.max() <= step.upper
        x = evaluate(step, x)
    assert np.abs(x - 1).max() <= 1e-6
    assert len(steps) == 1 or steps[-2].error > 1e-6


def test_quintics_round_down_and_are_shared() -> None:
    """Neighbouring ℓ get one sequence, made for the smaller; beyond the smallest of all, that one's."""
    assert quintics(0.0105, 1e-6) is quintics(0.0109, 1e-6)
    for lower in np.geomspace(1e-8, 1, 50):
        assert 0.88 * lower <= quintics(float(lower), 1e-6)[0].lower <= lower * (1 + 1e-9)
    assert quintics(0.0, 1e-6) is quintics(1e-8, 1e-6)


def test_narrow_intervals_meet() -> None:
    """The Padé step takes over where the exchange has nothing left to find."""
    for half in (0.99e-5, 1.01e-5):
        step = minimax_quintic(1 - half, 1 + half)
        x = np.linspace(step.lower, step.upper, 1001)
        assert np.abs(evaluate(step, x) - 1).max() <= 4e-15
    assert minimax_quintic(1.9, 2.1)[:3] == pytest.approx((15 / 16, -10 / 64, 3 / 256), rel=0.02)


def test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are the steps in order; restarts follow the growth of ℓ, and are none when nothing is to be lost."""
    for lower in (0.9, 1e-1, 1e-2, 1e-4, 1e-6, 1e-8):
        steps = quintics(lower, 1e-13)
        for restarts in (0, 1, 20, 3):
            monkeypatch.setattr(polar_gram, "RESTARTS", restarts)
            for dtype in (SINGLE, DOUBLE):
                segments = split(steps, dtype)
                assert [step for segment in segments for step in segment] == list(steps)
                assert all(segments)
                assert len(segments) <= restarts + 1
                growths = [first[0].lower / second[0].lower for first, second in pairwise(segments)]
                assert all(growth < 1 for growth in growths)
    assert [len(split(quintics(lower, 1e-13), DOUBLE)) for lower in (0.1, 1e-2, 1e-4, 1e-6)] == [1, 1, 2, 3]
    assert [len(split(quintics(lower, 1e-7), SINGLE)) for lower in (0.5, 0.1, 1e-2, 1e-4)] == [1, 1, 2, 4]


# --- sums over pairs of singular values, without them -----------------------------------------------------------------


@pytest.mark.parametrize("ones", [0, 40])
@pytest.mark.parametrize("kind", ["log-1e1", "log-1e6", "noise", "one-small"])
def test_traces_give_the_growth(kind: str, ones: int) -> None:
    """To 1 %, where one small σ is all that matters or hardly matters, of a square matrix and of a long one."""
    if kind == "noise":
        x = torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    else:
        x, _ = matrix((60, 60), float(kind.removeprefix("log-")) if kind != "one-small" else 2.0)
    u, sigma, vh = torch.linalg.svd(x)
    if kind == "one-small":
        sigma[-1] = 1e-5
        x = (u * sigma) @ vh
    stats = TracedPolar(FullSvd()).polar(x, tolerance=no_tolerance(x))[1]
    assert stats.sigma is None
    for long in (60, 240):
        expected = polar_growth(sigma, 60 + ones, long + ones, ones=ones).item()
        assert stats.growth(60 + ones, long + ones, ones=ones).item() == pytest.approx(expected, rel=0.01)


@wide_and_tall
def test_traced_polar_leaves_the_deficient_to_the_other(shape: tuple[int, int]) -> None:
    """The whole batch, and with no read of its own; of a batch of full rank every member has its own evidence."""
    healthy = torch.stack([matrix(shape, condition, seed=seed)[0] for seed, condition in enumerate((1e1, 1e4))])
    mixed = torch.stack([healthy[0], matrix(shape, 1e1, rank=30)[0]])
    other, solver = FullSvd(), TracedPolar(FullSvd())
    tolerance = torch.full((2,), 1e-6, dtype=DOUBLE)
    q, stats = solver.polar(mixed, tolerance=tolerance)
    assert torch.equal(q, other.polar(mixed, tolerance=tolerance)[0])
    assert stats.solver == other.name
    q, stats = solver.polar(healthy, tolerance=tolerance)
    assert oracle.relative_error(q.numpy(), polar(healthy)) <= torch.finfo(DOUBLE).eps * (30 + 0.2 * 1e4)
    judge = other.polar(healthy, tolerance=tolerance)[1]
    short, long = sorted(shape)
    growth = stats.growth(short, long).numpy()
    assert growth == pytest.approx(judge.growth(short, long).numpy(), rel=0.01)


# --- what rounding leaves ---------------------------------------------------------------------------------------------

NARROW = [(PolarExpress(SINGLE), 1e-5), (PolarExpress(SINGLE), 1e-2), (PolarExpress(SINGLE, products="bf16x3"), 1e-2)]


@pytest.mark.parametrize(("solver", "promise"), NARROW, ids=["fp32-default", "fp32-fast", "bf16x3-fast"])
@pytest.mark.parametrize("shape", [(128, 128), (128, 300), (512, 64)], ids=str)
def test_narrow_iterations_know_what_rounding_leaves(solver, promise: float, shape: tuple[int, int]) -> None:
    """Where directions with small σ are lost to rounding, what ``asymmetry`` does not see ``error`` does."""
    certified = 0
    for kind in ("log", "floor", "lone"):
        for condition in (1e1, 1e3, 1e5, 1e6):
            x, sigma = matrix(shape, condition)
            u, _, vh = torch.linalg.svd(x, full_matrices=False)
            if kind == "floor":
                sigma[len(sigma) // 10 :] = sigma[-1]
            if kind == "lone":
                sigma[:-1] = torch.linspace(3.0, 0.6, len(sigma) - 1)
            x = (u * sigma) @ vh
            q, stats = solver.polar(x, tolerance=no_tolerance(x))
            found = [*symmetry(x, q), stats.error, stats.orthogonality]
            if max(float(value) for value in found) <= promise:
                certified += 1
                assert oracle.relative_error(q.numpy(), (u @ vh).numpy()) <= promise, (kind, condition)
    assert certified >= 3


@pytest.mark.parametrize("solver", [PolarExpress(), PolarExpress(SINGLE, products="bf16x3")], ids=lambda s: s.name)
def test_one_read_on_a_gpu(solver) -> None:
    x, _ = matrix((40, 60), 1e3)
    with pretend_gpu() as gpu:
        q, _ = solver.polar(gpu.upload(x))
        assert gpu.read_count == 1
    assert oracle.relative_error(q.held.numpy(), polar(x)) <= 1e-3
