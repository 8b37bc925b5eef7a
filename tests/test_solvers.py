"""Every solver of ``isomerge_fast.linalg`` over one table of shapes, spectra and dtypes, against numpy's float64 SVD.

A solver is a row of ``ROWS``, with the errors that it may make. What only one of them has (coefficients, searches,
cuSOLVER) is tested in a module of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from allocation import peak_bytes
from cases import Case
from isomerge_fast.linalg.auto import FAST_ANGLE, TOLERANCES
from isomerge_fast.linalg.certificate import probes, symmetry
from isomerge_fast.linalg.gram_eigh import GramEigh
from isomerge_fast.linalg.polar_express import PolarExpress
from isomerge_fast.linalg.polar_gram import GramNewtonSchulz
from isomerge_fast.linalg.polar_iteration import bounds_and_gram
from isomerge_fast.linalg.polar_traced import TracedPolar
from isomerge_fast.linalg.protocol import PolarSolver, PolarStats, Solver, Subspace
from isomerge_fast.linalg.subspace_chebyshev import ChebyshevSubspace
from isomerge_fast.linalg.svd import FullSvd

SINGLE, DOUBLE = torch.float32, torch.float64
CPU = torch.device("cpu")
CONDITIONS = (1e0, 1e2, 1e4, 1e6)
Errors = tuple[float, float, float, float]


@dataclass(frozen=True)
class Row:
    """Hold a solver and the relative errors of Q that it may make.

    Attributes:
        errors: at the four κ of ``CONDITIONS``, log-spaced singular values, float64 in and out; infinite where the
            solver says that it has lost directions.
        single: what float32 in and out may add.
        iterates: whether it leaves matrices with missing directions to others (see ``polar_iteration``).
    """

    name: str
    solver: PolarSolver
    errors: Errors
    single: float = 2 * torch.finfo(SINGLE).eps
    iterates: bool = False

    @property
    def eps(self) -> float:
        """Return the rounding of the products that the solver is made of."""
        dtype = getattr(self.solver, "dtype", DOUBLE)
        return 2.0**-16 if getattr(self.solver, "products", None) else torch.finfo(dtype).eps

    def bound(self, condition: float, dtype: torch.dtype = DOUBLE) -> float:
        """Return the largest error at one κ of ``CONDITIONS``."""
        return self.errors[CONDITIONS.index(condition)] + (self.single if dtype == SINGLE else 0.0)

    def takes(self, dtype: torch.dtype) -> bool:
        """Return whether X may have that dtype: the traces are products of X and a float64 Q."""
        return dtype == DOUBLE or not isinstance(self.solver, TracedPolar)


def rounding(eps: float) -> Errors:
    """Rounding to ε turns the smallest direction by about ε κ, the mean of log-spaced ones by a tenth of that."""
    first, second, third, fourth = (eps * (30 + 0.2 * condition) for condition in CONDITIONS)
    return first, second, third, fourth


EPS, EPS32 = torch.finfo(DOUBLE).eps, torch.finfo(SINGLE).eps
# The bounds are three times or more the largest errors measured on ``SHAPES`` with two seeds. A Gram matrix squares κ.
GRAM: Errors = (6e-15, 5e-13, 5e-10, 3e-6)
ROWS = (
    Row("svd", FullSvd(), (6e-15, 5e-14, 2e-12, 2e-10)),
    Row("gram-eigh", GramEigh(), GRAM, single=8e-7),
    Row("gram-eigh-careful", GramEigh(rounding=0.0), GRAM, single=4e-7),
    Row("gram-eigh-fp32", GramEigh(SINGLE), (4e-7, 1e-4, np.inf, np.inf), single=2e-6),
    Row("chebyshev", ChebyshevSubspace(), GRAM, single=8e-7),
    Row("chebyshev-fast", ChebyshevSubspace(parts_dtype=SINGLE, angle=FAST_ANGLE), GRAM, single=8e-7),
    Row("polar-express", PolarExpress(), rounding(EPS), iterates=True),
    Row("polar-express-fp32", PolarExpress(SINGLE), rounding(EPS32), single=0.0, iterates=True),
    Row("polar-express-bf16x3", PolarExpress(SINGLE, products="bf16x3"), (2e-5, 1e-4, 3e-3, 2e-1), iterates=True),
    Row("gram-newton-schulz", GramNewtonSchulz(), (4e-15, 4e-12, 1e-10, 2e-9), iterates=True),
    # The last is beyond what three restarts mend in float32.
    Row("gram-newton-schulz-fp32", GramNewtonSchulz(SINGLE), (1e-6, 2e-5, 3e-4, 5e-2), single=0.0, iterates=True),
    Row("traced", TracedPolar(FullSvd()), rounding(EPS)),
)
SHAPES = {
    "square": (96, 96),
    "wide": (64, 160),
    "tall": (160, 64),
    "odd-wide": (63, 500),
    "odd-tall": (500, 63),
    "batched": (3, 48, 80),
}
SPECTRA = (
    *(f"log-{condition:.0e}" for condition in CONDITIONS),
    *(f"{kind}-{condition:.0e}" for kind in ("floor", "lone") for condition in (1e3, 1e6)),
)
PRODUCTS = [row for row in ROWS if row.iterates]
SUBSPACES = [row for row in ROWS if isinstance(row.solver, Solver)]
# Those that a tier takes for task parts.
FOR_PARTS = [row for row in SUBSPACES if row.solver != GramEigh(SINGLE)]


def name_of(row: Row) -> str:
    return row.name


each = pytest.mark.parametrize("row", ROWS, ids=name_of)
each_iteration = pytest.mark.parametrize("row", PRODUCTS, ids=name_of)
wide_and_tall = pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=["wide", "tall"])
each_dtype = pytest.mark.parametrize("dtype", [DOUBLE, SINGLE], ids=["fp64", "fp32"])
each_row_and_dtype = pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, id=f"{row.name}-{dtype}".replace("torch.", ""))
        for row in ROWS
        for dtype in (DOUBLE, SINGLE)
        if row.takes(dtype)
    ],
)


def with_sigma(shape: tuple[int, ...], sigma: Tensor, seed: int = 0) -> Tensor:
    """Return random U diag(σ) Vᵀ [..., M, N] in float64."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(*shape[:-2], side, len(sigma), generator=generator, dtype=DOUBLE)).Q
        for side in shape[-2:]
    )
    return (u * sigma) @ v.mT


def log_spaced(short: int, condition: float, rank: int | None = None) -> Tensor:
    """Return σ log-spaced from 3 to 3/κ, zero beyond ``rank``."""
    sigma = 3.0 * torch.logspace(0, -np.log10(condition), short, dtype=DOUBLE)
    return sigma if rank is None else sigma * (torch.arange(short) < rank)


def matrix(shape: tuple[int, ...], condition: float, *, rank: int | None = None, seed: int = 0) -> Tensor:
    return with_sigma(shape, log_spaced(min(shape[-2:]), condition, rank), seed)


def spectrum(short: int, name: str) -> Tensor:
    """Return the σ of one entry of ``SPECTRA``: log-spaced, most at the smallest, or only the last small."""
    kind, condition = name.split("-", 1)
    sigma = log_spaced(short, float(condition))
    if kind == "floor":
        sigma[short // 10 :] = sigma[-1].clone()
    elif kind == "lone":
        sigma[:-1] = torch.linspace(3.0, 0.6, short - 1, dtype=DOUBLE)
    return sigma


def exact_polar(x: Tensor) -> np.ndarray:
    """Return the oracle's polar factor of every matrix of a batch."""
    members = [oracle.polar(member) for member in x.double().reshape(-1, *x.shape[-2:]).numpy()]
    return np.stack(members).reshape(x.shape)


@cache
def judged(shape: tuple[int, ...], spectrum_name: str, dtype: torch.dtype) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Return X, the oracle's polar factor of what X holds, and its ‖X‖_*."""
    x = with_sigma(shape, spectrum(min(shape[-2:]), spectrum_name)).to(dtype)
    norms = np.linalg.svd(x.double().numpy(), compute_uv=False).sum(-1)
    return x, exact_polar(x), norms


def no_tolerance(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[:-2], dtype=DOUBLE)


def claimed(x: Tensor, q: Tensor, stats: PolarStats) -> float:
    """Return the largest of a polar factor's own evidence; infinite where directions may be missing."""
    found = [*symmetry(x, q.to(x.dtype)), stats.error, stats.orthogonality]
    worst = max(float(torch.as_tensor(value, dtype=DOUBLE).max()) for value in found)
    return np.inf if torch.as_tensor(stats.unresolved).any() else worst


# --- polar factors ----------------------------------------------------------------------------------------------------


@each_row_and_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", SPECTRA)
def test_polar(row: Row, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Q is as near to the oracle's as the row says, as orthonormal as it says, and no better certified than it is."""
    kind, condition = name.split("-", 1)
    x, expected, norms = judged(shape, name, dtype)
    q, stats = row.solver.polar(x, tolerance=no_tolerance(x))
    assert q.dtype == dtype
    assert q.is_contiguous() or not row.iterates
    assert stats.solver == row.solver.name or isinstance(row.solver, TracedPolar)
    error = oracle.relative_error(q.numpy(), expected)
    # The certificate: at no tier is a factor passed that is not as near as the tier promises. No tier takes
    # Newton-Schulz in float32, whose restarts cannot mend κ = 1e6: asymmetry hardly sees what that loses.
    evidence = np.inf if row.name == "gram-newton-schulz-fp32" else claimed(x, q, stats)
    assert not [tier for tier, promise in TOLERANCES.items() if evidence <= promise < error], (error, evidence)
    if torch.as_tensor(stats.unresolved).any():
        assert row.solver == GramEigh(SINGLE)
        assert float(condition) >= 1e3
        return
    short = min(shape[-2:])
    assert stats.rank.tolist() == torch.full(shape[:-2], short).tolist()
    if kind == "log":
        assert error <= row.bound(float(condition), dtype)
    # ⟨Q, X⟩ feels the small directions only by their size; a Gram matrix squares what it rounds.
    beyond = row.name == "gram-newton-schulz-fp32" and float(condition) == 1e6
    squared = isinstance(row.solver, GramEigh)
    allowed = 5e-3 if beyond else 20 * row.eps * (float(condition) if squared else 1.0)
    if row.name == "polar-express-bf16x3":
        allowed = 80 * row.eps
    assert stats.nuclear_norm.numpy() == pytest.approx(norms, rel=allowed + (EPS32 if dtype == SINGLE else 0.0))
    # ‖QQᵀ − I‖, which a Newton-Schulz step after it squares where the Gram matrix has been factored.
    side = (q if shape[-2] <= shape[-1] else q.mT).double()
    defect = torch.linalg.matrix_norm(side @ side.mT - torch.eye(short, dtype=DOUBLE)) / short**0.5
    width = max(row.eps, torch.finfo(dtype).eps)
    if row.iterates:
        assert stats.orthogonality.numpy() == pytest.approx(defect.numpy(), rel=1e-3, abs=8 * width)
    else:
        assert (defect <= 3 * stats.orthogonality + 8 * width).all()
        if row.name == "gram-eigh-careful":
            assert (defect <= short**0.5 * stats.orthogonality.square() + 8 * width).all()
    if row.iterates and not isinstance(row.solver, GramNewtonSchulz):
        assert defect.max() <= 20 * width


@pytest.mark.parametrize("row", [row for row in ROWS if row.takes(SINGLE)], ids=name_of)
@wide_and_tall
def test_the_result_has_the_dtype_asked_for(row: Row, shape: tuple[int, int]) -> None:
    """By default the input's; what float32 input holds is not lost on the way to a float64 result."""
    condition = 1e4 if np.isfinite(row.bound(1e4)) else 1e2
    x = matrix(shape, condition).float()
    q, stats = row.solver.polar(x)
    assert q.dtype == SINGLE
    assert stats.nuclear_norm.dtype == DOUBLE
    assert oracle.relative_error(q.numpy(), exact_polar(x)) <= row.bound(condition, SINGLE)
    if row.iterates:
        assert stats.orthogonality.dtype == DOUBLE
        assert stats.orthogonality <= (4e-7 if row.eps == EPS else 1e-5 if row.eps == EPS32 else 1e-4)
    q, _ = row.solver.polar(x, dtype=DOUBLE)
    assert q.dtype == DOUBLE
    assert oracle.relative_error(q.numpy(), exact_polar(x)) <= row.bound(condition)
    q, _ = row.solver.polar(x.double(), dtype=SINGLE)
    assert q.dtype == SINGLE


@each
@wide_and_tall
def test_zero(row: Row, shape: tuple[int, int]) -> None:
    at_or_below = (matrix(shape, 10.0), torch.tensor(4.0))
    for x, tolerance in ((torch.zeros(shape, dtype=DOUBLE), None), at_or_below):
        q, stats = row.solver.polar(x, tolerance=tolerance)
        assert not q.any()
        assert (stats.rank, stats.nuclear_norm) == (0, 0)
        assert stats.orthogonality <= (0.0 if row.iterates else 1e-5)


@each
@wide_and_tall
def test_deficient(row: Row, shape: tuple[int, int]) -> None:
    """A solver that truncates gives the polar factor on the range; an iteration says that it is none for this."""
    deficient, healthy, sigma = matrix(shape, 10.0, rank=30), matrix(shape, 100.0), log_spaced(40, 100.0)
    given = [(deficient, None, 30), (healthy, 1.01 * sigma[-1], 39), (healthy, 1.01 * sigma[3], 3)]
    if row.iterates:
        given += [(deficient, torch.zeros(()), 30), (healthy, sigma[-1], 39), (healthy, sigma[3], 3)]
    for x, tolerance, rank in given:
        q, stats = row.solver.polar(x, tolerance=tolerance)
        assert torch.isfinite(q).all()
        assert torch.isfinite(stats.nuclear_norm)
        if row.iterates:
            assert stats.orthogonality == torch.inf
            continue
        u, exact, v = oracle.thin_svd(x.numpy())
        assert stats.rank == rank
        assert oracle.relative_error(q.numpy(), u[:, :rank] @ v[:, :rank].T) <= 2 * row.bound(1e2)
        assert stats.nuclear_norm.item() == pytest.approx(exact[:rank].sum(), rel=max(1e-12, 20 * row.eps))
    _, stats = row.solver.polar(healthy, tolerance=sigma[-1] / 2)
    assert stats.orthogonality <= 1e-2
    assert stats.rank == 40


@each
@wide_and_tall
def test_mixed_batch(row: Row, shape: tuple[int, int]) -> None:
    """Zero and deficient members neither spoil the others nor cost them steps."""
    members = [matrix(shape, 100.0, seed=1), torch.zeros(shape), 1e-3 * matrix(shape, 10.0)]
    members += [matrix(shape, 10.0, rank=30), 1e6 * matrix(shape, 1.0, seed=2)]
    x = torch.stack(members)
    q, stats = row.solver.polar(x)
    healthy = [0, 2, 4]
    assert torch.isfinite(q).all()
    assert oracle.relative_error(q[healthy].numpy(), exact_polar(x[healthy])) <= row.bound(1e2)
    assert stats.rank[healthy].tolist() == [40, 40, 40]
    assert (stats.orthogonality[healthy] <= (1e-4 if row.solver != GramEigh(SINGLE) else 1e-2)).all()
    assert not q[1].any()
    if row.iterates:
        assert stats.orthogonality.isinf().tolist() == [False, False, False, True, False]
        assert stats.orthogonality[1] == 0
        assert bounds_and_gram(x, None)[0].lower == bounds_and_gram(x[:1], None)[0].lower
    else:
        assert stats.rank.tolist() == [40, 0, 40, 30, 40]
        assert oracle.relative_error(q[3].numpy(), oracle.polar(x[3].numpy(), 1e-10)) <= row.bound(1e2)


@each
def test_input_is_not_modified_and_may_be_strided(row: Row) -> None:
    x = matrix((3, 50, 40), 10.0)
    for strided in (x.mT, x[:, ::2], x[..., ::2], x[1].mT, x[1:2].expand(2, -1, -1)):
        before = strided.clone()
        q, _ = row.solver.polar(strided)
        assert torch.equal(strided, before)
        # The pseudo-random start of the bounds and every product: the same bits again.
        assert torch.equal(q, row.solver.polar(strided)[0])
        assert q.is_contiguous() or not row.iterates
        contiguous, _ = row.solver.polar(before.contiguous())
        assert oracle.relative_error(q.numpy(), contiguous.numpy()) <= 100 * row.eps


@each
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 0, 4), (0, 4, 4)], ids=str)
def test_empty(row: Row, shape: tuple[int, ...]) -> None:
    q, stats = row.solver.polar(torch.zeros(shape, dtype=DOUBLE))
    assert q.shape == shape
    for value in (stats.rank, stats.nuclear_norm, stats.orthogonality):
        assert value.shape == shape[:-2]
        assert not value.any()


@each
@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (2, 2)], ids=str)
def test_few_directions(row: Row, shape: tuple[int, int]) -> None:
    x = matrix(shape, 2.0)
    q, _ = row.solver.polar(x)
    assert oracle.relative_error(q.numpy(), exact_polar(x)) <= 8 * row.eps


class CountReads(TorchDispatchMode):
    """Count the numbers that go from tensors to Python: on a GPU, each waits for all work before it."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@each_iteration
def test_one_read_a_solve(row: Row) -> None:
    x = matrix((2, 40, 60), 1e5)
    with CountReads() as counter:
        row.solver.polar(x)
    assert counter.reads == 1


# --- the top directions, what is beyond them, and task parts ----------------------------------------------------------

TOP = 7
SUBSPACE_SHAPES = {"wide": (40, 60), "tall": (60, 40), "square": (50, 50), "batched": (3, 30, 44)}
each_subspace = pytest.mark.parametrize("row", SUBSPACES, ids=name_of)


def sine(found: Tensor, exact: Tensor) -> float:
    """Return ‖sin θ‖_F/√k between the spans of two orthonormal bases [..., n, k], the largest of a batch."""
    beyond = found - exact @ (exact.mT @ found)
    return float(torch.linalg.matrix_norm(beyond).max()) / max(1, found.shape[-1]) ** 0.5


def exact_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return numpy's (short side's vectors, σ, long side's vectors) in float64."""
    u, sigma, vh = (torch.from_numpy(part) for part in np.linalg.svd(x.double().numpy(), full_matrices=False))
    return (u, sigma, vh.mT) if x.shape[-2] <= x.shape[-1] else (vh.mT, sigma, u)


@each_subspace
@each_dtype
@pytest.mark.parametrize("shape", SUBSPACE_SHAPES.values(), ids=SUBSPACE_SHAPES.keys())
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5], ids="{:.0e}".format)
def test_top_complement_and_complete(row: Row, condition: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert isinstance(row.solver, Solver)
    values = log_spaced(min(shape[-2:]), condition)
    values[TOP:] *= 0.8  # a gap at the cut that is no other's
    x = with_sigma(shape, values).to(dtype)
    short, sigma, long = exact_svd(x)
    factors = row.solver.factorize(x, tolerance=no_tolerance(x))
    top = factors.complete(factors.top(TOP), DOUBLE)
    assert top.long is not None
    assert (top.wide, top.is_whole, bool(top.unresolved.any())) == (shape[-2] <= shape[-1], True, False)
    # The seventh of 30 to 50 log-spaced directions is no smaller than κ^(−1/4).
    noise = 20 * row.eps * condition**0.5
    assert top.sigma.numpy() == pytest.approx(sigma[..., :TOP].numpy(), rel=noise)
    assert top.gap.numpy() == pytest.approx(
        ((sigma[..., TOP - 1] - sigma[..., TOP]) / sigma[..., TOP - 1]).numpy(), rel=1e-2
    )
    # Its own angle is an estimate of what rounding does at the cut: no error is ten times that.
    angle = 10 * float(top.angle.max()) + 20 * EPS
    assert sine(top.short, short[..., :TOP]) <= angle <= 1e-2
    product, exact = top.long @ top.short.mT, long[..., :TOP] @ short[..., :TOP].mT
    assert oracle.relative_error(product.numpy(), exact.numpy()) <= 10 * angle + noise + (
        1e-6 if dtype == SINGLE else 0.0
    )
    # X maps one side's vectors to the other's, times σ.
    mapped = (x.double().mT if top.wide else x.double()) @ top.short
    assert oracle.relative_error((top.long * top.sigma[..., None, :]).numpy(), mapped.numpy()) <= max(noise, 10 * EPS)
    # The complement is the rest of the short side: together they are the identity.
    complement = factors.complement(top)
    assert complement.shape[-1] == min(shape[-2:]) - TOP
    whole = top.short @ top.short.mT + complement @ complement.mT
    unit = np.broadcast_to(np.eye(min(shape[-2:])), whole.shape)
    assert oracle.relative_error(whole.numpy(), unit) <= 50 * row.eps
    narrow = factors.complete(factors.top(TOP), SINGLE).long
    assert narrow is not None
    assert narrow.dtype == SINGLE
    assert oracle.relative_error(narrow.numpy(), top.long.numpy()) <= 1e-5
    factors.release()
    assert torch.equal(factors.top(TOP).short, top.short)


@each_subspace
@pytest.mark.parametrize("shape", SUBSPACE_SHAPES.values(), ids=SUBSPACE_SHAPES.keys())
@pytest.mark.parametrize("rank", [0, 4], ids=["zero", "low-rank"])
def test_top_of_the_deficient(row: Row, rank: int, shape: tuple[int, ...]) -> None:
    """What is not there is zero columns, and the complement the projector on all that is not kept."""
    assert isinstance(row.solver, Solver)
    x = matrix(shape, 10.0, rank=rank)
    tolerance = torch.full(x.shape[:-2], 1e-2, dtype=DOUBLE)
    factors = row.solver.factorize(x, tolerance=tolerance)
    top = factors.complete(factors.top(TOP), DOUBLE)
    assert top.long is not None
    short, sigma, _ = exact_svd(x)
    assert top.is_whole is False
    assert not top.unresolved.any()
    assert not top.sigma[..., rank:].any()
    assert not top.short[..., rank:].any()
    assert not top.long[..., rank:].any()
    assert top.sigma[..., :rank].numpy() == pytest.approx(sigma[..., :rank].numpy(), rel=100 * row.eps)
    inside = short[..., :rank] @ short[..., :rank].mT
    complement = factors.complement(top)
    projector = torch.eye(min(shape[-2:]), dtype=DOUBLE) - inside
    assert oracle.relative_error((complement @ complement.mT).numpy(), projector.numpy()) <= 100 * row.eps
    assert (complement.mT @ top.short).abs().max() <= 100 * row.eps


def deltas_of(kind: str, rows: int, columns: int, tasks: int) -> list[Tensor]:
    """Return float32 Δ_t: noise; with decaying columns; or with a shared part that hides what a task has of its own."""
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(rows, columns, generator=generator) for _ in range(tasks)]
    if kind == "decay":
        return [delta * torch.arange(1, columns + 1) ** -0.7 for delta in deltas]
    if kind == "cancelling":  # what all share is 300 times larger than what is left of a task
        shared = torch.randn(rows, 20, generator=generator) @ torch.randn(20, columns, generator=generator)
        return [delta + 70.0 * shared for delta in deltas]
    return deltas


@cache
def judged_part(kind: str, rows: int, columns: int, k: int, s: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return the Δ_t, and numpy's top s of R = Δ_0 − U_k U_kᵀ Δ_0: vectors of the short side, σ (one more), U Vᵀ."""
    deltas = deltas_of(kind, rows, columns, 8)
    exact = [delta.double().numpy() for delta in deltas]
    u_k = oracle.thin_svd(np.sum(exact, axis=0))[0][:, :k]
    residual = exact[0] - u_k @ (u_k.T @ exact[0])
    u, sigma, v = oracle.thin_svd(residual - u_k @ (u_k.T @ residual))
    short = u if rows <= columns else v
    found = (short[:, :s], sigma[: s + 1], u[:, :s] @ v[:, :s].T)
    first, second, third = (torch.from_numpy(np.ascontiguousarray(part)) for part in found)
    return deltas, first, second, third


PARTS = {
    "wide": (60, 90, 48, 2),
    "tall": (90, 60, 48, 2),
    "square": (64, 64, 48, 2),
    "searched": (1500, 300, 244, 7),  # narrow enough for a search
}


@pytest.mark.parametrize("row", FOR_PARTS, ids=name_of)
@pytest.mark.parametrize("kind", ["noise", "decay", "cancelling"])
@pytest.mark.parametrize("shape", PARTS.values(), ids=PARTS.keys())
def test_residual(row: Row, shape: tuple[int, int, int, int], kind: str) -> None:
    """Task parts, their singular values, both sides and the angle that a solver claims: that is a bound."""
    solver = row.solver
    assert isinstance(solver, Solver)
    rows, columns, k, s = shape
    deltas, short, sigma, product = judged_part(kind, rows, columns, k, s)
    total = torch.stack(deltas).double().sum(0)
    factors = solver.factorize(total)
    top = factors.top(k)
    common = factors.complete(top, SINGLE if isinstance(solver, ChebyshevSubspace) else DOUBLE)
    if common.wide:
        common = replace(common, complement=factors.complement(top))
    delta, tolerance = deltas[0], torch.zeros((), dtype=DOUBLE)
    found = factors.residual(delta, common, s, norm=delta.double().norm(), tolerance=tolerance)
    assert found.long is not None
    assert found.short.dtype == found.long.dtype == found.sigma.dtype == DOUBLE
    assert not found.unresolved.any()
    angle = float(found.angle)
    assert angle > 0.0
    # What is off of U_k itself is for ``projection_angle`` to say: a few ε of ‖Δ‖ over what is left, and the gap.
    outside = 1e-12 * float(delta.double().norm() / (sigma[s - 1] * (sigma[s - 1] - sigma[s]) / sigma[s - 1]))
    assert sine(found.short, short) <= angle + outside + 1e-12
    assert oracle.relative_error(found.sigma.numpy(), sigma[:s].numpy()) <= 1e-6 + angle**2
    left, right = (found.short, found.long) if common.wide else (found.long, found.short)
    assert oracle.relative_error((left @ right.mT).numpy(), product.numpy()) <= 10 * (angle + outside) + 1e-9
    # No more than was asked for, or than all directions' Gram matrix leaves, to which what is missed is given.
    if isinstance(solver, ChebyshevSubspace):
        every = GramEigh(parts_dtype=solver.parts_dtype).factorize(total)
        exact = every.residual(delta, common, s, norm=delta.double().norm(), tolerance=tolerance)
        assert angle <= max(solver.angle, float(exact.angle))


# --- memory -----------------------------------------------------------------------------------------------------------


# The products in bf16x3 of a CPU are made of more parts than those of a GPU.
@pytest.mark.parametrize("row", [row for row in PRODUCTS if row.name != "polar-express-bf16x3"], ids=name_of)
@each_dtype
@pytest.mark.parametrize("shape", [(256, 256), (96, 1500), (1500, 96), (40, 60000)], ids=str)
def test_workspace(row: Row, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """An upper bound, and not more than 1.5 times the truth where the solver needs most (ill-conditioned input)."""
    x = matrix(shape, 1e6)
    for kept in (DOUBLE, SINGLE):  # a draw that is kept is no part of a solve
        probes(min(shape), kept, CPU)
    peak, (_, stats) = peak_bytes(lambda: row.solver.polar(x, tolerance=no_tolerance(x), dtype=dtype))
    assert torch.isfinite(stats.orthogonality)
    assert peak <= row.solver.workspace_bytes(*shape, dtype, CPU) <= 1.5 * peak


WORKSPACE_SHAPES = [(300, 300), (260, 1100), (1100, 260), (64, 9000), (9000, 64), (600, 600)]
MEASURED = (GramEigh(), GramEigh(SINGLE), ChebyshevSubspace(), FullSvd())


@pytest.mark.parametrize("row", [row for row in SUBSPACES if row.solver in MEASURED], ids=name_of)
@pytest.mark.parametrize("shape", WORKSPACE_SHAPES, ids=str)
def test_workspace_of_subspaces(row: Row, shape: tuple[int, int]) -> None:
    """Ill-conditioned input, where all of a solver's steps are taken."""
    solver = row.solver
    assert isinstance(solver, Solver)
    total = torch.stack(Case(0, *shape, 1e6, 4).deltas()).double().sum(0)
    k = 4 * min(shape) // 5

    def split(dtype: torch.dtype) -> tuple[Subspace, Tensor]:
        factors = solver.factorize(total)
        top = factors.top(k)
        complement = factors.complement(top)
        return factors.complete(top, dtype), complement

    for dtype in (SINGLE, DOUBLE):
        promised = solver.workspace_bytes(*shape, dtype, CPU)
        peak, _ = peak_bytes(lambda dtype=dtype: solver.polar(total, dtype=dtype))
        assert peak <= promised <= 4 * peak
        peak, _ = peak_bytes(lambda dtype=dtype: split(dtype))
        assert peak <= promised
