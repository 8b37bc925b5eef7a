"""Merges in factor space against the numpy oracle on the dense deltas, and what a truncation loses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import isomerge_fast as imf
import oracle
from allocation import peak_bytes
from isomerge_fast.methods import METHODS, IsoC, IsoCTS, Mean, Method, NotFiniteError, TaskArithmetic, TensorSpec
from isomerge_fast.methods.factors import Factors, LowRank, merge_factors
from isomerge_fast.planning.budget import Budget
from isomerge_fast.planning.factor_routes import factor_route
from isomerge_fast.planning.part_sizes import PartSizes, Traffic

# What the default precision promises; the factor route is in float64 throughout.
PROMISE = 1e-5
RANK_TOLERANCE = 1e-6


def draw(rows: int, columns: int, ranks: list[int], seed: int = 0) -> list[Factors | None]:
    """Factors as after training: A of the size of its start, B small; scales that differ."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        Factors(0.02 * normal(rows, rank), normal(rank, columns) / columns**0.5, scale=1.0 + task)
        for task, rank in enumerate(ranks)
    ]


def opposed(rows: int, columns: int) -> list[Factors | None]:
    """Two tasks that undo each other, beside a third: the sum has fewer directions than the tasks."""
    first, other = draw(rows, columns, [4, 4])
    assert first is not None
    return [first, Factors(-first.left, first.right, first.scale), other]


def shared_a(rows: int, columns: int) -> list[Factors | None]:
    """All tasks with one A, as where A stays frozen: every delta has the same right directions."""
    drawn = draw(rows, columns, [6, 6, 6])
    assert drawn[0] is not None
    return [None if each is None else Factors(each.left, drawn[0].right, each.scale) for each in drawn]


def untrained(rows: int, columns: int) -> list[Factors | None]:
    """One task whose B is still zero, one that leaves the tensor alone."""
    first, second = draw(rows, columns, [5, 3])
    assert second is not None
    return [first, Factors(torch.zeros_like(second.left), second.right), None, draw(rows, columns, [4], seed=9)[0]]


CASES: dict[str, tuple[tuple[int, int], Callable[[int, int], list[Factors | None]]]] = {
    "square": ((96, 96), lambda m, n: draw(m, n, [8, 8, 8])),
    "wide": ((48, 200), lambda m, n: draw(m, n, [4, 8, 2])),
    "tall": ((200, 48), lambda m, n: draw(m, n, [4, 8, 2])),
    "one-task": ((64, 80), lambda m, n: draw(m, n, [8])),
    "odd": ((63, 101), lambda m, n: draw(m, n, [1, 7, 3, 5])),
    "ranks-fill-the-rows": ((24, 130), lambda m, n: draw(m, n, [16, 16])),
    "ranks-fill-the-columns": ((130, 24), lambda m, n: draw(m, n, [16, 16])),
    "opposed": ((64, 72), opposed),
    "opposed-tall": ((96, 40), opposed),
    "repeated": ((64, 72), lambda m, n: draw(m, n, [6]) * 2 + draw(m, n, [6], seed=3)),
    "shared-a": ((80, 64), shared_a),
    "shared-a-wide": ((64, 96), shared_a),
    "untrained": ((72, 64), untrained),
}


def products(factors: list[Factors | None], shape: tuple[int, int]) -> list[np.ndarray]:
    return [
        np.zeros(shape) if each is None else each.scale * (each.left.double().numpy() @ each.right.double().numpy())
        for each in factors
    ]


def expected(method: Method, deltas: list[np.ndarray]) -> np.ndarray:
    if isinstance(method, IsoC):
        return oracle.iso_c(deltas, rank_tolerance=RANK_TOLERANCE)
    if isinstance(method, IsoCTS):
        return oracle.iso_cts(deltas, method.common_fraction, rank_tolerance=RANK_TOLERANCE)
    return np.sum(deltas, axis=0) / (len(deltas) if isinstance(method, Mean) else 1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_is_the_dense_result_on_the_range(case: str, name: str) -> None:
    shape, make = CASES[case]
    factors, method = make(*shape), METHODS[name]()
    merged, stats = merge_factors(method, factors, shape)
    value = (merged.left @ merged.right).numpy()
    judge = expected(method, products(factors, shape))
    assert oracle.relative_error(value, judge) <= PROMISE
    if name.startswith("iso"):
        assert stats.to_dict()["certified"]
    if name == "iso-c":
        assert int(stats.values["rank"]) == np.linalg.matrix_rank(judge, tol=1e-6 * np.linalg.norm(judge, 2))
    # What the dense route makes of the same deltas, in the precision that it has.
    dense = {"iso-c": imf.iso_c, "iso-cts": imf.iso_cts}.get(name)
    if dense is not None:
        deltas = [torch.from_numpy(delta).float() for delta in products(factors, shape)]
        assert oracle.relative_error(value, dense(deltas).double().numpy()) <= PROMISE


@pytest.mark.parametrize("distance", [1e-1, 5e-3, 1e-4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_adapters_that_are_nearly_the_same(side: str, distance: float) -> None:
    """Stacks of a condition that one Cholesky factor does not survive, and of one that it does."""
    shape = (90, 70)
    first, second = draw(*shape, [6, 6])
    assert first is not None
    assert second is not None
    near = {name: getattr(second, name) for name in ("left", "right")}
    near[side] = getattr(first, side) + distance * near[side]
    factors: list[Factors | None] = [first, Factors(near["left"], near["right"])]
    for method in (IsoC(), IsoCTS()):
        merged, _ = merge_factors(method, factors, shape)
        for basis in (merged.left_basis, merged.right_basis):
            unit = torch.eye(12, dtype=torch.float64)
            assert torch.linalg.matrix_norm(basis.q.mT @ basis.q - unit) <= 1e-9
        judge = oracle.iso_c(products(factors, shape), rank_tolerance=1e-7)
        # What the float64 products that the judge sees leave of the smallest directions.
        assert oracle.relative_error((merged.left @ merged.right).numpy(), judge) <= 1e-9 / distance


def test_options_reach_the_core() -> None:
    shape = (60, 80)
    factors = draw(*shape, [4, 4])
    by_range, _ = merge_factors(IsoC(), factors, shape)
    by_min_dim, _ = merge_factors(IsoC(rank_policy="min-dim"), factors, shape)
    assert torch.allclose(by_min_dim.core, by_range.core * (8 / 60))  # σ̄ over r and not over the rank
    # r of the tensor, not of its coordinates: with f = 0.1 of 60 there are 6 common directions of 8.
    few, stats = merge_factors(IsoCTS(common_fraction=0.1), factors, shape)
    assert int(stats.values["k"]) == 6
    judge = oracle.iso_cts(products(factors, shape), 0.1, rank_tolerance=RANK_TOLERANCE)
    assert oracle.relative_error((few.left @ few.right).numpy(), judge) <= PROMISE


def test_a_memory_ceiling_is_for_large_matrices() -> None:
    """And not for the few coordinates, of which there may be too few for the split of the tensor's own r."""
    shape = (60, 80)
    factors = draw(*shape, [2, 2, 2, 1, 1])
    merged, _ = merge_factors(IsoCTS(common_fraction=0.0, memory_bytes=1), factors, shape)
    again, _ = merge_factors(IsoCTS(common_fraction=0.0), factors, shape)
    assert torch.equal(merged.core, again.core)


def test_all_zero() -> None:
    factors = [Factors(torch.zeros(12, 2), torch.ones(2, 9)), None]
    for method in (IsoC(), IsoCTS(), TaskArithmetic()):
        merged, _ = merge_factors(method, factors, (12, 9))
        assert not (merged.left @ merged.right).any()
        left, right, lost = merged.truncated(3)
        assert (left.shape, right.shape, lost) == ((12, 3), (3, 9), 0.0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rank", [1, 5, 12, 24, 30])
def test_truncation_is_the_best_and_says_so(name: str, rank: int) -> None:
    shape = (70, 50)
    merged, _ = merge_factors(METHODS[name](), draw(*shape, [8, 8, 8]), shape)
    value = merged.left @ merged.right
    left, right, lost = merged.truncated(rank)
    assert (left.shape, right.shape) == ((70, rank), (rank, 50))
    error = float(torch.linalg.vector_norm(value - left @ right) / torch.linalg.vector_norm(value))
    assert error == pytest.approx(lost, abs=1e-12)
    sigma = torch.linalg.svdvals(value)
    best = float(torch.linalg.vector_norm(sigma[rank:]) / torch.linalg.vector_norm(sigma))
    assert lost == pytest.approx(best, rel=1e-5, abs=1e-12)
    if rank <= 24:
        norms = [float(torch.linalg.matrix_norm(factor)) for factor in (left, right)]
        assert norms[0] == pytest.approx(norms[1], rel=0.5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_lost_where_there_is_room(case: str, name: str) -> None:
    shape, make = CASES[case]
    merged, _ = merge_factors(METHODS[name](), make(*shape), shape)
    rank = int(torch.linalg.matrix_rank(merged.core, rtol=1e-9))
    for more in (0, 2):
        left, right, lost = merged.truncated(rank + more)
        assert lost <= 1e-9
        value = merged.left @ merged.right
        assert torch.linalg.vector_norm(value - left @ right) <= 1e-9 * torch.linalg.vector_norm(value)


def test_truncation_keeps_what_weighs_most_in_the_sum() -> None:
    """Iso-C gives all directions one weight: any of them would do, and those of the sum's largest values stay."""
    shape = (40, 40)
    factors = draw(*shape, [6, 6])
    merged, _ = merge_factors(IsoC(), factors, shape)
    left, right, _ = merged.truncated(3)
    u, _, v = oracle.thin_svd(np.sum(products(factors, shape), axis=0))
    kept = (left @ right).numpy()
    assert np.linalg.norm(kept - u[:, :3] @ (u[:, :3].T @ kept)) <= 1e-9 * np.linalg.norm(kept)
    assert np.linalg.norm(kept - kept @ v[:, :3] @ v[:, :3].T) <= 1e-9 * np.linalg.norm(kept)


def test_bad_factors_are_named() -> None:
    good = draw(10, 8, [2, 2, 2])
    assert good[1] is not None
    spoiled = Factors(good[1].left.clone(), good[1].right.clone())
    spoiled.left[3, 1] = torch.inf
    with pytest.raises(NotFiniteError) as error:
        merge_factors(IsoC(), [good[0], spoiled, good[2]], (10, 8))
    assert error.value.tasks == [1]
    with pytest.raises(ValueError, match=r"factors\[1\] are \[10, 2\] and \[2, 8\], expected \[10, r\] and \[r, 9\]"):
        merge_factors(IsoC(), [None, good[1]], (10, 9))
    with pytest.raises(ValueError, match="at least one task"):
        merge_factors(IsoC(), [None, None], (10, 8))


def test_inputs_stay_as_they_were() -> None:
    factors = draw(30, 20, [3, 3])
    before = [(each.left.clone(), each.right.clone()) for each in factors if each is not None]
    merged, _ = merge_factors(IsoCTS(), factors, (30, 20))
    assert isinstance(merged, LowRank)
    merged.truncated(2)
    for each, (left, right) in zip(factors, before, strict=True):
        assert each is not None
        assert torch.equal(each.left, left)
        assert torch.equal(each.right, right)


@pytest.mark.parametrize("adapter_rank", [None, 20])
@pytest.mark.parametrize("shape", [(600, 500), (2000, 300), (150, 2400)], ids=str)
def test_the_plan_knows_what_it_takes(shape: tuple[int, int], adapter_rank: int | None) -> None:
    """The solve is the peak where the tensor's parts are small, and then the estimate is not far above it."""
    ranks = [16] * 8

    def merge() -> object:
        factors = [Factors(torch.randn(shape[0], rank), torch.randn(rank, shape[1])) for rank in ranks]
        merged, _ = merge_factors(IsoCTS(), factors, shape)
        return (merged.left, merged.right) if adapter_rank is None else merged.truncated(adapter_rank)

    peak, _ = peak_bytes(merge)
    spec = TensorSpec("", shape, torch.float32)
    sizes = PartSizes(Traffic((2,), 2, 0), Budget(1 << 16, None), torch.device("cpu"))
    given = {"tasks": len(ranks), "rank": sum(ranks), "adapter_rank": adapter_rank}
    route = factor_route(IsoCTS(), spec, sizes, **given)
    assert peak <= route.work_bytes <= 1.8 * peak
