"""Time the subspaces of Iso-CTS: the top s directions that a projection leaves of a tall Δ_t, and the top k of a sum.

And ``randomized_svd``, the certified top triplets of any matrices.

The searched and certified task part stands beside the exact ones, by our eigensolver, torch's and numpy's full SVDs,
and beside torch's randomized ``svd_lowrank``. Errors are ‖sin θ‖_F/√s between the left subspace found and that of
numpy's float64 SVD.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.rows import OURS, Problem, Row, kept
from benchmarks.shapes import shape_of
from isomerge_fast.bench.problems import Kind, deltas_like_fine_tuning
from isomerge_fast.functional import randomized_svd
from isomerge_fast.linalg.auto import subspace_candidates
from isomerge_fast.linalg.gram_eigh import GramEigh
from isomerge_fast.linalg.protocol import Solver, default_tolerance
from isomerge_fast.methods.iso_cts import split_rank

TORCH, TORCH_LOWRANK, NUMPY, EIGH = "torch", "torch-svd-lowrank", "numpy-fp64", "gram-eigh"
TASKS = 8
ANGLE = 1e-5  # what the default tier certifies a searched subspace to


def angle_to(exact: Tensor, result: Any) -> float:
    """Return ‖U − U* U*ᵀ U‖_F / √s of orthonormal U [..., M, s], U* ``exact``, the largest of a batch."""
    u = torch.as_tensor(result).cpu().double()
    return torch.linalg.matrix_norm(u - exact @ (exact.mT @ u)).max().item() / math.sqrt(u.shape[-1])


def left_vectors(x: np.ndarray, count: int) -> np.ndarray:
    return np.linalg.svd(x, full_matrices=False)[0][..., :count]


def task_part(shape: tuple[int, int], kind: Kind, device: torch.device) -> Problem:
    """Return the benchmark of the top s left vectors of a tall R = Δ − U_k U_kᵀ Δ; every contender is given U_k."""
    deltas = deltas_like_fine_tuning(*shape, TASKS, kind, device=device)
    delta, total = deltas[0], torch.stack(deltas).double().sum(0)
    k, s = split_rank(min(shape), TASKS, 0.8)
    solver = subspace_candidates("default", torch.float32)[0].solver
    norm = torch.linalg.vector_norm(delta.double())
    factors = solver.factorize(total)
    common = factors.complete(factors.top(k), torch.float32)
    u_k, array, array_u_k = common.u, delta.double().cpu().numpy(), common.u.double().cpu().numpy()

    def exactly() -> np.ndarray:
        u = left_vectors(total.cpu().numpy(), k)
        return left_vectors(array - u @ (u.T @ array), s)

    def residual() -> Tensor:
        return delta - u_k @ (u_k.mT @ delta)

    def by_solver(solver: Solver) -> Tensor:
        options = {"norm": norm, "tolerance": default_tolerance(delta)}
        return solver.factorize(total).residual(delta, common, s, **options).u

    exact = torch.from_numpy(kept(f"part {shape[0]}x{shape[1]} {kind} {device.type}", exactly))
    calls = {
        OURS: lambda: by_solver(solver),
        EIGH: lambda: by_solver(GramEigh()),
        TORCH: lambda: torch.linalg.svd(residual(), full_matrices=False)[0][:, :s],
        TORCH_LOWRANK: lambda: torch.svd_lowrank(residual(), q=s + 9, niter=8)[0][:, :s],
        NUMPY: lambda: left_vectors(array - array_u_k @ (array_u_k.T @ array), s),
    }
    return Problem(calls, partial(angle_to, exact), {OURS: ANGLE, EIGH: ANGLE}, 4.0 * shape[0] * (shape[1] + s))


def common_part(shape: tuple[int, int], kind: Kind, device: torch.device) -> Problem:
    """Return the benchmark of the top k = 0.8 r triplets of S, both sides."""
    total = torch.stack(deltas_like_fine_tuning(*shape, TASKS, kind, device=device)).double().sum(0)
    k, _ = split_rank(min(shape), TASKS, 0.8)
    single, exactly = total.float(), partial(left_vectors, total.cpu().numpy(), k)

    def ours() -> Tensor:
        factors = subspace_candidates("default", torch.float32)[0].solver.factorize(total)
        return factors.complete(factors.top(k), torch.float32).u

    exact = torch.from_numpy(kept(f"common {shape[0]}x{shape[1]} {kind} {device.type}", exactly))
    calls = {OURS: ours, TORCH: lambda: torch.linalg.svd(single, full_matrices=False)[0][:, :k], NUMPY: exactly}
    return Problem(calls, partial(angle_to, exact), {OURS: ANGLE}, 4.0 * shape[0] * (shape[1] + k))


def top_triplets(shape: tuple[int, int, int], rank: int, kind: Kind | None, device: torch.device) -> Problem:
    """Return the benchmark of the top ``rank`` triplets of one matrix or a batch; lowrank has its default of steps.

    Without a kind matrices are products of two factors of ``rank`` columns, as adapters make them.
    """
    count, rows, columns = shape
    if kind is None:
        generator = torch.Generator(device=device).manual_seed(0)
        left, right = (
            torch.randn(count, side, rank, generator=generator, device=device, dtype=torch.float32)
            for side in (rows, columns)
        )
        matrices = 0.01 * left @ right.mT
    else:
        matrices = torch.stack(deltas_like_fine_tuning(rows, columns, count, kind, device=device))
    a = matrices[0] if count == 1 else matrices
    exactly = partial(left_vectors, a.double().cpu().numpy(), rank)
    exact = torch.from_numpy(kept(f"svd {count}x{rows}x{columns} {rank} {kind} {device.type}", exactly))

    def ours() -> Tensor:
        found = randomized_svd(a, rank)
        assert bool(found.evidence.certified.all())
        return found.u

    calls = {
        OURS: ours,
        TORCH: lambda: torch.linalg.svd(a, full_matrices=False)[0][..., :rank],
        TORCH_LOWRANK: lambda: torch.svd_lowrank(a, q=rank + 9)[0][..., :rank],
        NUMPY: exactly,
    }
    return Problem(calls, partial(angle_to, exact), {OURS: ANGLE}, 4.0 * count * rows * (columns + rank))


CASES: tuple[tuple[str, Kind, str], ...] = (
    ("tiny", "noise", "tiny"),
    ("ViT-B/32 fc1", "noise", "short"),
    ("ViT-B/32 fc1", "decay", "full"),
    ("ViT-L/14 fc1", "noise", "full"),
    ("ViT-L/14 fc1", "decay", "full"),
    ("Llama-3.2-1B gate_proj", "noise", "full"),
)
ROWS = [
    Row(f"{name} {label} {m}x{n} {kind}", contenders, partial(make, (m, n), kind), level)
    for label, kind, level in CASES
    for m, n in [(96, 48) if label == "tiny" else shape_of(label)]
    for name, make, contenders in (
        ("task-part", task_part, (OURS, EIGH, TORCH, TORCH_LOWRANK, NUMPY)),
        ("common-part", common_part, (OURS, TORCH, NUMPY)),
    )
]
SVD_CASES: tuple[tuple[tuple[int, int, int], int, Kind | None, str], ...] = (
    ((2, 96, 48), 4, "noise", "tiny"),
    ((1, 3072, 768), 19, "noise", "short"),
    ((1, 3072, 768), 19, "decay", "full"),
    ((1, 3072, 768), 76, "noise", "full"),
    ((8, 768, 768), 19, "noise", "full"),
    ((1, 3072, 768), 16, None, "full"),
    ((1, 2048, 2048), 16, None, "full"),
)
ROWS += [
    Row(
        f"svd {'' if count == 1 else f'{count} of '}{m}x{n} rank {rank} {kind or 'factors'}",
        (OURS, TORCH, TORCH_LOWRANK, NUMPY),
        partial(top_triplets, (count, m, n), rank, kind),
        level,
        slow=frozenset({TORCH, NUMPY}) if min(m, n) > 1024 else frozenset(),
    )
    for (count, m, n), rank, kind, level in SVD_CASES
]
