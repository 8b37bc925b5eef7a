"""Each function of ``methods.recombine`` against plain numpy in float64: polar factors by full SVDs, sums by loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from isomerge_fast.linalg.gram_eigh import GramEigh
from isomerge_fast.linalg.polar_traced import TracedPolar
from isomerge_fast.linalg.protocol import Subspace
from isomerge_fast.linalg.svd import FullSvd
from isomerge_fast.methods import recombine as module
from isomerge_fast.methods.recombine import SAME_DIRECTION, projection_angle, recombine, recombine_literally

SINGLE, DOUBLE = torch.float32, torch.float64
SOLVERS = [FullSvd(), GramEigh()]
SHAPES = {"wide": (40, 70), "tall": (70, 40), "square": (40, 40), "batched": (3, 24, 40)}
TASKS, S = 3, 2
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Return noise with a strong shared part of low rank, as the deltas of fine-tuning have it."""
    shared = random(rows, 4, seed=99) @ random(4, columns, seed=98)
    return random(rows, columns, seed=seed) + shared


def subspace(u: np.ndarray, sigma: np.ndarray, v: np.ndarray, wide: bool, complement: np.ndarray | None) -> Subspace:
    """Return a ``Subspace`` with these vectors, of which no angle is off."""
    short, long = (u, v) if wide else (v, u)
    zero = torch.zeros((), dtype=DOUBLE)
    return Subspace(
        short=torch.from_numpy(np.ascontiguousarray(short)),
        long=torch.from_numpy(np.ascontiguousarray(long)),
        sigma=torch.from_numpy(np.ascontiguousarray(sigma)),
        complement=None if complement is None else torch.from_numpy(np.ascontiguousarray(complement)),
        gap=zero + 1.0,
        angle=zero,
        unresolved=zero.long(),
        wide=wide,
    )


def stacked(members: list[Subspace]) -> Subspace:
    """Return one batch of all."""

    def stack(name: str) -> Tensor:
        return torch.stack([getattr(member, name) for member in members])

    first = members[0]
    return Subspace(
        short=stack("short"),
        long=stack("long"),
        sigma=stack("sigma"),
        complement=None if first.complement is None else stack("complement"),
        gap=stack("gap"),
        angle=stack("angle"),
        unresolved=stack("unresolved"),
        wide=first.wide,
    )


def member(rows: int, columns: int, seed: int, repeated: bool) -> tuple[Subspace, list[Subspace], np.ndarray]:
    """Return the common and the task subspaces of random deltas by numpy's SVD, and U° V°ᵀ by two polar factors."""
    deltas = [matrix(rows, columns, 10 * seed + task).numpy() for task in range(TASKS)]
    if repeated:
        deltas[-1] = deltas[0]
    u, sigma, v = oracle.thin_svd(np.sum(deltas, axis=0))
    k, wide = min(rows, columns) - TASKS * S, rows <= columns
    u_k, v_k = u[:, :k], v[:, :k]
    # U_ts lies beside U_k; of a square or wide matrix, the directions beyond the k-th span all of that.
    common = subspace(u_k, sigma[:k], v_k, wide, u[:, k:] if wide else None)
    parts = []
    for delta in deltas:
        left, values, right = oracle.thin_svd(delta - u_k @ (u_k.T @ delta))
        parts.append((left[:, :S], values[:S], right[:, :S]))
    sides = [
        np.concatenate([*(part[i] for part in parts), common_side], axis=1) for i, common_side in ((0, u_k), (2, v_k))
    ]
    exact = [oracle.polar(side, SAME_DIRECTION) for side in sides]
    return common, [subspace(left, sigma, right, wide, None) for left, sigma, right in parts], exact[0] @ exact[1].T


def problem(shape: tuple[int, ...], repeated: bool = False) -> tuple[Subspace, list[Subspace], np.ndarray]:
    """Return ``member`` of one matrix, or of a batch."""
    if len(shape) == 2:
        return member(shape[0], shape[1], 0, repeated)
    members = [member(shape[-2], shape[-1], seed, repeated) for seed in range(shape[0])]
    parts = [stacked([parts[task] for _, parts, _ in members]) for task in range(TASKS)]
    return stacked([common for common, _, _ in members]), parts, np.stack([value for *_, value in members])


@each_solver
@each_shape
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["fp32", "fp64"])
@pytest.mark.parametrize("function", [recombine, recombine_literally])
def test_value(function, dtype: torch.dtype, shape: tuple[int, ...], solver: FullSvd | GramEigh) -> None:
    """U° V°ᵀ, both in few dimensions and literally: where every direction is there, they are one formula."""
    common, parts, exact = problem(shape)
    found = function(common, parts, dtype, solver)
    assert parts == []  # freed as soon as they are not needed
    assert found.value.dtype == dtype
    assert found.value.shape == shape
    error = oracle.relative_error(found.value.numpy(), exact)
    assert error <= (2e-6 if dtype == SINGLE else 1e-9)
    assert not found.same_directions.any()
    assert found.orthogonality.max() <= (1e-5 if dtype == SINGLE else 1e-9)
    # ‖·‖_F that the small polar factors may be off by, and what is not orthonormal of the whole: no more is wrong.
    size = min(shape[-2:]) ** 0.5
    assert dtype == SINGLE or error * size <= 3 * float((found.error + size * found.orthogonality).max()) + 1e-12
    assert (found.growth > 0).all()


@pytest.mark.parametrize("smallest", [1.0, 1e-5], ids=["even", "uneven"])
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["fp32", "fp64"])
@pytest.mark.parametrize("shape", [(40, 70), (40, 40), (3, 24, 40)], ids=str)
def test_a_right_side_that_is_not_made(shape: tuple[int, ...], dtype: torch.dtype, smallest: float) -> None:
    """V_k as factors of S: the same, in float64 where the σ of S are too far apart for a float32 product with it."""
    common, parts, exact = problem(shape)
    assert common.long is not None
    sigma = common.sigma * torch.linspace(1.0, smallest, common.sigma.shape[-1], dtype=DOUBLE)
    total = common.short @ (sigma[..., None] * common.long.mT)
    factored = replace(common, sigma=sigma, long=None)
    growth = recombine(common, list(parts), dtype, GramEigh()).growth
    found = recombine(factored, parts, dtype, GramEigh(), total)
    assert parts == []
    assert found.value.dtype == dtype
    # S itself is rounded to ε₆₄ σ₁, which in float64 is 1e-9 of the smallest direction.
    assert oracle.relative_error(found.value.numpy(), exact) <= (2e-6 if dtype == SINGLE else 1e-8)
    assert found.orthogonality.max() <= (1e-5 if dtype == SINGLE else 1e-8)
    torch.testing.assert_close(found.growth, growth, rtol=1e-6, atol=0)


@each_shape
def test_growth_is_how_an_error_of_the_tasks_grows(shape: tuple[int, ...]) -> None:
    """Directions turned by a random θ move the result by about ``growth`` θ."""
    common, parts, exact = problem(shape)
    size, moved = 1e-7, []
    squares = 0.0
    for index, part in enumerate(parts):
        assert part.long is not None
        noise = [size * random(*side.shape, seed=200 + 2 * index + i) for i, side in enumerate((part.short, part.long))]
        squares += sum(float(change.square().sum()) for change in noise)
        if part.wide:  # what is turned stays beside U_k
            noise[0] -= common.short @ (common.short.mT @ noise[0])
        else:
            noise[1] -= common.long @ (common.long.mT @ noise[1])  # type: ignore[union-attr]
        moved.append(replace(part, short=part.short + noise[0], long=part.long + noise[1]))
    found = recombine(common, moved, DOUBLE, FullSvd())
    members = exact.reshape(-1, *shape[-2:]).shape[0]
    theta = (squares / members / 2) ** 0.5
    turned = np.linalg.norm(found.value.numpy() - exact) / members**0.5
    expected = float(found.growth.square().mean().sqrt()) * theta
    assert expected / 4 <= turned <= 4 * expected


@each_solver
@each_shape
def test_repeated_tasks_are_counted(shape: tuple[int, ...], solver: FullSvd | GramEigh) -> None:
    """A task twice has its directions once, as the polar factor on the range has them."""
    common, parts, exact = problem(shape, repeated=True)
    found = recombine_literally(common, parts, DOUBLE, solver)
    assert found.same_directions.flatten().tolist() == [S] * found.same_directions.numel()
    assert oracle.relative_error(found.value.numpy(), exact) <= 1e-8
    common, parts, _ = problem(shape, repeated=True)
    assert (recombine(common, parts, DOUBLE, solver).same_directions == S).all()


@each_shape
def test_a_task_of_zeros_adds_nothing(shape: tuple[int, ...]) -> None:
    common, parts, _ = problem(shape)
    zeroed = [
        replace(p, short=0 * p.short, long=torch.zeros_like(p.v if p.wide else p.u), sigma=0 * p.sigma) for p in parts
    ]
    found = recombine_literally(common, zeroed, DOUBLE, FullSvd())
    assert oracle.relative_error(found.value.numpy(), (common.u @ common.v.mT).numpy()) <= 1e-10
    assert not found.same_directions.any()


@pytest.mark.parametrize("solver", [FullSvd(), GramEigh(), TracedPolar(FullSvd())], ids=lambda solver: solver.name)
@pytest.mark.parametrize("batch", [(), (2,)], ids=["matrix", "batch"])
@pytest.mark.parametrize(("k", "width"), [(20, 6), (4, 6)], ids=["more-common", "more-of-the-tasks"])
def test_small_problem(k: int, width: int, batch: tuple[int, ...], solver: FullSvd) -> None:
    """[V_ts, V_k] is Z between orthonormal bases, beside an identity: its polar factor follows from that of Z."""
    columns = 50
    v_k = torch.linalg.qr(random(*batch, columns, k)).Q
    v_tasks = random(*batch, columns, width, seed=1)
    v_tasks = v_tasks / torch.linalg.vector_norm(v_tasks, dim=-2, keepdim=True)
    a = v_k.mT @ v_tasks
    small = module.small_problem(a, v_tasks - v_k @ a, solver)
    unit = np.eye(small.q_a.shape[-1])
    assert np.allclose((small.q_a.mT @ small.q_a).numpy(), unit, atol=1e-13)
    assert np.allclose((small.q_r.mT @ small.q_r).numpy(), np.eye(small.q_r.shape[-1]), atol=1e-13)
    assert not small.same_directions.any()
    # polar([V_ts, V_k])ᵀ = [[0], [V_kᵀ]] + weights · [V_a, Q_r]ᵀ, the weights' lower rows in the basis of V_a.
    right = torch.cat([v_k @ small.q_a, small.q_r], dim=-1)
    found = torch.cat(
        [
            small.weights[..., :width, :] @ right.mT,
            v_k.mT + small.q_a @ small.weights[..., width:, :] @ right.mT,
        ],
        dim=-2,
    ).mT
    both = torch.cat([v_tasks, v_k], dim=-1).reshape(-1, columns, width + k).numpy()
    exact = np.stack([oracle.polar(x) for x in both]).reshape(found.shape)
    assert oracle.relative_error(found.numpy(), exact) <= 1e-12
    # The growth of the whole problem, by the loop over pairs that ``polar_growth`` stands for.
    growth = small.growth(columns, k).reshape(-1)
    for member_growth, x in zip(growth.tolist(), both, strict=True):
        sigma = np.linalg.svd(x, compute_uv=False)
        pairs = sum(2 / (a + b) ** 2 for i, a in enumerate(sigma) for j, b in enumerate(sigma) if i != j)
        beyond = (columns - (width + k)) * (1 / sigma**2).sum()
        assert member_growth == pytest.approx(math.sqrt((pairs + beyond) / (width * columns)), rel=0.02)


@pytest.mark.parametrize("distance", [1e-9, 1e-3], ids=["one", "two"])
def test_small_problem_counts_directions_that_are_one(distance: float) -> None:
    """Two tasks' vectors nearer than ``SAME_DIRECTION`` are one direction."""
    v_k = torch.linalg.qr(random(30, 8)).Q
    v = random(30, 1, seed=1)
    v_tasks = torch.cat([v, v + distance * random(30, 1, seed=2)], dim=-1)
    v_tasks = v_tasks / torch.linalg.vector_norm(v_tasks, dim=-2, keepdim=True)
    a = v_k.mT @ v_tasks
    small = module.small_problem(a, v_tasks - v_k @ a, FullSvd())
    assert int(small.same_directions) == (1 if distance < SAME_DIRECTION else 0)


def test_projection_angle() -> None:
    """By hand: the rounding of a projection and what U_k is off, over the gap and the size of the short side."""
    sigma = torch.tensor([[4.0, 2.0], [3.0, 0.0], [0.0, 0.0]], dtype=DOUBLE)
    part = subspace(np.zeros((6, 2)), sigma.numpy(), np.zeros((9, 2)), True, None)
    part = replace(part, sigma=sigma, gap=torch.tensor([0.5, 0.1, 1.0]))
    turned, share, norm = torch.tensor(1e-6), torch.tensor(7.0), torch.tensor(100.0)
    found = projection_angle(part.sigma, part.gap, turned, share, 6, norm)
    off = [module.PROJECTION * 100.0 + module.TURNED * 1e-6 * (7.0 + largest) for largest in (4.0, 3.0)]
    # Where a direction was left out nothing lies near the cut; where all were, there is no angle.
    assert found.tolist() == pytest.approx([off[0] / (2.0 * 0.5) / math.sqrt(12), off[1] / 3.0 / math.sqrt(12), 0.0])


def test_over_columns() -> None:
    assert module.over_columns(torch.tensor(12.0), 9, 4).item() == 2.0
    assert module.over_columns(torch.tensor(12.0), 9, 0).item() == 12.0
