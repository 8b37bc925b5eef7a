"""What each tier promises, over one table of inputs, on real deltas, and where the formula is not a function."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import oracle
import pytest
import torch
from allocation import peak_bytes
from cases import CASES, Case
from torch import Tensor

import isomerge_fast as imf
from isomerge_fast.linalg.auto import PROMISES
from isomerge_fast.linalg.gram_eigh import GramEigh
from isomerge_fast.linalg.protocol import Solver
from isomerge_fast.linalg.subspace_chebyshev import ChebyshevSubspace
from isomerge_fast.linalg.svd import FullSvd
from isomerge_fast.methods import MergeStats, TensorDeltas, TensorSpec, as_deltas, make_method

METHODS = ("iso-c", "iso-cts")


def numpy(deltas: list[Tensor]) -> list[np.ndarray]:
    return [delta.double().numpy() for delta in deltas]


@lru_cache(maxsize=4)
def expected(case: Case, method: str) -> np.ndarray:
    """The published algorithm; the same for all tiers."""
    return {"iso-c": oracle.iso_c, "iso-cts": oracle.iso_cts}[method](numpy(case.deltas()))


def merge(deltas: list[Tensor], method: str, **options: object) -> tuple[Tensor, MergeStats]:
    return make_method(method, options).merge(as_deltas(deltas))


def rounding_level(deltas: list[Tensor]) -> float:
    """What rounding of the deltas can look like as a singular value of their sum: where ranks are cut."""
    rows, columns = deltas[0].shape
    norm = sum(delta.double().square().sum().item() for delta in deltas) ** 0.5
    eps = torch.finfo(torch.promote_types(deltas[0].dtype, torch.float32)).eps
    return 2 * eps * norm / (rows * columns) ** 0.5 * (rows**0.5 + columns**0.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiers_keep_their_promises(case: Case, method: str) -> None:
    deltas = case.deltas()
    judge = expected(case, method)
    sigma = np.linalg.svd(np.sum(numpy(deltas), axis=0), compute_uv=False)
    rank = int((sigma > rounding_level(deltas)).sum())
    if method == "iso-c" and rank < sigma.size:
        judge = oracle.iso_c(numpy(deltas), rank=rank)  # the others are below the input's own rounding
    for precision, promise in PROMISES.items():
        value, stats = merge(deltas, method, precision=precision)
        evidence = stats.to_dict()
        assert oracle.relative_error(value.numpy(), judge) <= promise, (precision, evidence)
        assert evidence["certified"], (precision, evidence)


def test_a_gram_matrix_in_float32_is_not_enough_at_condition_1e6() -> None:
    """The fast tier starts with one where the matrix is long, notices, and takes float64."""
    case = Case(0, 64, 512, 1e6, 8)
    value, stats = merge(case.deltas(), "iso-c", precision="fast")
    assert stats.escalations
    assert stats.to_dict()["certified"]
    assert oracle.relative_error(value.numpy(), expected(case, "iso-c")) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_what_a_gram_matrix_hides_is_left_to_the_svd(method: str) -> None:
    """One direction 2.5e7 times the others: above the input's rounding, below what float64 Gram matrices resolve."""
    generator = torch.Generator().manual_seed(0)
    deltas = [0.01 * torch.randn(300, 1000, generator=generator) for _ in range(8)]
    for delta in deltas:
        delta[:, 0] = 0
        delta[0] = 0
        delta[0, 0] = 1.2e7 / 8
    value, stats = merge(deltas, method)
    assert "unresolved" in stats.escalations[-1], stats.to_dict()
    assert stats.algorithm.endswith("svd-fp64")
    assert stats.to_dict()["certified"]
    judge = {"iso-c": oracle.iso_c, "iso-cts": oracle.iso_cts}[method](numpy(deltas))
    assert oracle.relative_error(value.numpy(), judge) <= PROMISES["default"]


@pytest.mark.parametrize("precision", PROMISES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 16, 64])
@pytest.mark.parametrize("shape", [(512, 512), (512, 4096), (4096, 512)], ids=str)
def test_lora_sums(shape: tuple[int, int], rank: int, method: str, precision: str) -> None:
    """T adapters of low rank: the result is σ̄ times the polar factor on the range, which small factors give exactly."""
    tasks = 4
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(shape[0], tasks * rank, generator=generator)
    right = torch.randn(tasks * rank, shape[1], generator=generator)
    # Multiplied in float64: a float32 product has rounding of its own, of full rank and above that of its entries.
    a, b = left.double(), right.double()
    deltas = [(a[:, i : i + rank] @ b[i : i + rank]).float() for i in range(0, tasks * rank, rank)]
    value, stats = merge(deltas, method, precision=precision)
    # The oracle in factor space: S = A B, A = Q R, B = (Q' R')ᵀ, S = Q (R R'ᵀ) Q'ᵀ.
    q, r = np.linalg.qr(left.double().numpy())
    q_right, r_right = np.linalg.qr(right.double().numpy().T)
    expected = q @ oracle.iso_c([r @ r_right.T]) @ q_right.T
    assert oracle.relative_error(value.numpy(), expected) <= max(1e-6, PROMISES[precision])
    assert stats.to_dict()["rank"] == tasks * rank
    again, _ = merge(deltas, method, precision=precision)
    assert torch.equal(value, again)


@pytest.mark.parametrize("precision", PROMISES)
@pytest.mark.parametrize("shape", [(1100, 260), (260, 300)], ids=["searched", "exact"])
@pytest.mark.parametrize("method", METHODS)
class TestDegenerate:
    """Zero, equal and repeated deltas, also where task parts are searched for."""

    def case(self, shape: tuple[int, int]) -> list[Tensor]:
        return Case(0, *shape, 1e2, 8).deltas()

    def check(self, deltas: list[Tensor], method: str, precision: str) -> Tensor:
        value, _ = merge(deltas, method, precision=precision)
        assert torch.isfinite(value).all()
        assert torch.equal(value, merge(deltas, method, precision=precision)[0])
        return value

    def test_all_zero(self, method: str, shape: tuple[int, int], precision: str) -> None:
        assert not self.check([torch.zeros(shape)] * 8, method, precision).any()

    def test_zero_sum(self, method: str, shape: tuple[int, int], precision: str) -> None:
        delta = self.case(shape)[0]
        assert not self.check([delta, -delta] * 4, method, precision).any()

    def test_one_zero(self, method: str, shape: tuple[int, int], precision: str) -> None:
        value = self.check([*self.case(shape)[:7], torch.zeros(shape)], method, precision)
        assert value.norm() > 0

    def test_equal(self, method: str, shape: tuple[int, int], precision: str) -> None:
        """Directions are kept or left out, never bent: all singular values of the result are 0 or σ̄."""
        value = self.check([self.case(shape)[0]] * 8, method, precision)
        sigma = torch.linalg.svdvals(value.double())
        kept = sigma > 1e-2 * sigma[0]
        assert sigma[kept] == pytest.approx(sigma[0].item(), rel=max(1e-4, 2 * PROMISES[precision]))

    def test_repeated_expert(self, method: str, shape: tuple[int, int], precision: str) -> None:
        deltas = self.case(shape)
        value = self.check([*deltas[:7], deltas[0]], method, precision)
        assert value.norm() > 0


@pytest.mark.parametrize("precision", PROMISES)
def test_near_equal_singular_values(precision: str) -> None:
    """σ_k = σ_{k+1}: the split is arbitrary, the gap says so, and the result is still an isometry times σ̄."""
    r, tasks = 96, 4
    k, _ = oracle.split_rank(r, tasks, 0.8)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    sigma = torch.linspace(2.0, 1.0, r, dtype=torch.float64)
    sigma[k] = sigma[k - 1]
    noise = 0.01 * torch.randn(tasks, r, r, generator=generator, dtype=torch.float64)
    noise -= noise.mean(0)
    deltas = [(u * sigma) @ v.mT / tasks + part for part in noise]
    value, stats = merge(deltas, "iso-cts", precision=precision)
    assert stats.to_dict()["gap"] <= 1e-12
    scaled = torch.linalg.svdvals(value) / stats.to_dict()["sigma_mean"]
    assert scaled.numpy() == pytest.approx(1.0, abs=1e-6)


def test_batch_escalates_only_the_members_that_missed() -> None:
    """An ill-conditioned member among others: its neighbours keep their results, and each is what it is alone."""
    members = [Case(seed, 60, 150, 1e6 if seed == 1 else 2.0, 4).deltas() for seed in range(3)]
    batch = [torch.stack(parts) for parts in zip(*members, strict=True)]
    for method in METHODS:
        value, stats = merge(batch, method, precision="fast")
        assert stats.escalations
        for index, member in enumerate(members):
            alone, own = merge(member, method, precision="fast")
            assert bool(own.escalations) == (index == 1)
            assert oracle.relative_error(value[index].numpy(), alone.double().numpy()) <= 1e-6


def test_given_solver_is_not_escalated() -> None:
    deltas = Case(0, 60, 150, 1e6, 4).deltas()
    value, stats = merge(deltas, "iso-c", solver=GramEigh(torch.float32))
    assert torch.isfinite(value).all()
    assert not stats.escalations
    assert not stats.to_dict()["certified"]


@pytest.mark.parametrize("precision", PROMISES)
@pytest.mark.parametrize("method", METHODS)
def test_api_takes_every_precision(method: str, precision: str) -> None:
    case = Case(1, 40, 70, 1e2, 3)
    function = {"iso-c": imf.iso_c, "iso-cts": imf.iso_cts}[method]
    value = function(case.deltas(), precision=precision)
    assert value.dtype == torch.float32
    assert oracle.relative_error(value.numpy(), expected(case, method)) <= max(1e-6, PROMISES[precision])


@pytest.mark.parametrize("precision", PROMISES)
@pytest.mark.parametrize("shape", [(60, 150), (150, 60), (1100, 260)], ids=["wide", "tall", "searched"])
def test_tasks_at_once(shape: tuple[int, int], precision: str) -> None:
    """What a GPU does: the tasks' small problems as one batch, of one matrix and of a batch of layers."""
    layers = [Case(seed, *shape, 1e2, 8).deltas() for seed in range(2)]
    batch = [torch.stack(parts) for parts in zip(*layers, strict=True)]
    for deltas in (layers[0], batch):
        one, _ = merge(deltas, "iso-cts", precision=precision)
        several, stats = merge(deltas, "iso-cts", precision=precision, tasks_at_once=3)
        assert stats.to_dict()["certified"] if deltas is not batch else not stats.missed()
        allowed = max(1e-6, PROMISES[precision])
        assert oracle.relative_error(several.numpy(), one.double().numpy()) <= allowed


class FreshDeltas(TensorDeltas):
    """As from files: every delta is made when it is asked for."""

    def delta(self, task: int) -> Tensor:
        return super().delta(task).clone()


WORKSPACE_SHAPES = [(300, 300), (260, 1100), (1100, 260), (64, 9000), (9000, 64), (600, 600)]


@pytest.mark.parametrize("solver", [GramEigh(), GramEigh(torch.float32), ChebyshevSubspace(), FullSvd()], ids=str)
@pytest.mark.parametrize("shape", WORKSPACE_SHAPES, ids=str)
def test_solver_keeps_to_its_workspace(solver: Solver, shape: tuple[int, int]) -> None:
    """Ill-conditioned input, where all of a solver's steps are taken."""
    total = torch.stack(Case(0, *shape, 1e6, 4).deltas()).double().sum(0)
    k = 4 * min(shape) // 5
    for dtype in (torch.float32, torch.float64):
        promised = solver.workspace_bytes(*shape, dtype)
        peak, _ = peak_bytes(lambda dtype=dtype: solver.polar(total, dtype=dtype))
        assert peak <= promised <= 4 * peak
        peak, _ = peak_bytes(lambda dtype=dtype: solver.top_subspace(total, k, complement=True, dtype=dtype))
        assert peak <= promised


@pytest.mark.parametrize(
    "options", [{}, {"precision": "fast"}, {"precision": "reference"}, {"memory_bytes": 1}], ids=str
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", WORKSPACE_SHAPES, ids=str)
def test_method_keeps_to_its_workspace(shape: tuple[int, int], method: str, options: dict) -> None:
    deltas = FreshDeltas(Case(0, *shape, 1e1, 8).deltas())
    chosen = make_method(method, options)
    promised = chosen.workspace_bytes(TensorSpec("x", shape, torch.float32), 8)
    peak, (_, stats) = peak_bytes(lambda: chosen.merge(deltas))
    assert not stats.escalations
    assert peak <= promised <= 5 * peak


def test_a_ceiling_takes_the_leaner_solver() -> None:
    spec = TensorSpec("x", (4000, 512), torch.float32)
    method = make_method("iso-cts")
    needed = method.workspace_bytes(spec, 8)
    lean = method.within(needed - 1)
    assert "chebyshev" in method.explain(spec, 8, torch.device("cpu"))
    assert "chebyshev" not in lean.explain(spec, 8, torch.device("cpu"))
    assert lean.workspace_bytes(spec, 8) < needed
    deltas = Case(0, 1100, 260, 1e2, 8).deltas()
    value, stats = merge(deltas, "iso-cts", memory_bytes=1)
    assert "chebyshev" not in stats.algorithm
    assert oracle.relative_error(value.numpy(), expected(Case(0, 1100, 260, 1e2, 8), "iso-cts")) <= PROMISES["default"]
