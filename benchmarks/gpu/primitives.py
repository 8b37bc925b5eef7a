"""Time what solvers are made of: eigenvalues, factorisations, and the iterations that do without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import TASKS
from benchmarks.harness.readings import Rows
from benchmarks.shapes import dimensions
from isomerge_fast.bench.ceilings import median_seconds, result_and_seconds
from isomerge_fast.bench.problems import relative_error
from isomerge_fast.linalg import cusolver
from isomerge_fast.linalg.gram_eigh import GramEigh
from isomerge_fast.linalg.polar_express import PolarExpress
from isomerge_fast.linalg.protocol import PolarSolver
from isomerge_fast.linalg.thin import flagged_qr, thin_qrs
from isomerge_kernels._launch import TRITON_DTYPES

QR: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "Householder": torch.linalg.qr,
    "CholeskyQR2": lambda x: thin_qrs(x)[0],
    "CholeskyQR3": flagged_qr,
}
# What one matrix, or one stack of them, may take.
BUDGET_SECONDS = 0.3


def primitives(rows: Rows) -> None:
    """Time what Iso-CTS meets at the sides of Llama and of a vision transformer first."""
    device = torch.device(rows.device)
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def timed(name: str, call: Callable[[], Any], error: Callable[[Any], float]) -> None:
        def measured() -> dict[str, Any]:
            worst = error(call())
            return {"seconds": median_seconds(call, device, budget_seconds=BUDGET_SECONDS), "error": worst}

        rows.attempt(name, measured)

    _eigenproblems(rows, timed, random)
    _factorisations(rows, timed, random)
    drivers = ("gesvd", "gesvdj", "gesvda") if device.type == "cuda" else (None,)
    for shape in ((64, 64), (48, 96)) if rows.small else ((1024, 1024), (768, 3072)):
        x = random(*shape, dtype=torch.float32)
        for driver in drivers:
            rows.attempt(f"svd {dimensions(shape)} fp32, {driver or 'default'}", partial(svd, x, driver))
    # What FullSvd is the last resort for: float64, with directions that no Gram matrix resolves.
    side = 64 if rows.small else 1024
    left, right = (torch.linalg.qr(random(side, side))[0] for _ in range(2))
    x = left * torch.logspace(0, -10, side, dtype=torch.float64, device=device) @ right
    for driver in drivers:
        call = partial(svd, x, driver, polar=left @ right)
        rows.attempt(f"svd {side} fp64 to 1e-10, {driver or 'default'}", call)
    sides = (64,) if rows.small else (64, 128, 256, 512, 768, 1024, 2048, 4096)
    stacks = ((3, 48, 48),) if rows.small else ((TASKS, 816, 816), (48, 768, 768))
    solvers: tuple[PolarSolver, ...] = (PolarExpress(), GramEigh())
    for shape in (*((side, side) for side in sides), *stacks):
        x = random(*shape)
        label = str(shape[0]) if len(shape) == 2 else dimensions(shape)
        for solver in solvers:
            timed(f"polar {label}, {solver.name}", partial(solver.polar, x), lambda found: _not_orthogonal(found[0]))


def svd(x: Tensor, driver: str | None, *, polar: Tensor | None = None) -> dict[str, Any]:
    """Time the thin SVD of one matrix; return its error, or that of its ``polar`` factor where that is known, and the
    loss of orthogonality of its singular vectors.
    """
    call = partial(torch.linalg.svd, x, full_matrices=False, driver=driver)
    try:
        (u, sigma, vh), seconds = result_and_seconds(call, x.device, BUDGET_SECONDS)
    except RuntimeError as error:  # not every driver takes every shape, or converges
        return {"refused": str(error)[:200]}
    u, sigma, vh = u.double(), sigma.double(), vh.double()
    orthogonality = max(map(_not_orthogonal, (u, vh.mT)))
    error = relative_error((u * sigma) @ vh, x.double()) if polar is None else relative_error(u @ vh, polar)
    return {"seconds": seconds, "error": error, "orthogonality": orthogonality}


def _eigenproblems(rows: Rows, timed: Callable[..., None], random: Callable[..., Tensor]) -> None:
    """Time eigenproblems one after the other, and stacks by every solver that takes them in one call."""

    def symmetric(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        x = random(*shape, dtype=dtype)
        return x @ x.mT / shape[-1]

    for side in (48,) if rows.small else (768, 1024, 4096):
        for dtype in (torch.float64, torch.float32):
            x = symmetric(side, side, dtype=dtype)
            timed(f"eigh {side}, {TRITON_DTYPES[dtype]}", partial(torch.linalg.eigh, x), partial(_not_eigen, x))
    solvers: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"torch": torch.linalg.eigh, "rule": cusolver.eigh}
    if rows.device.startswith("cuda"):
        if cusolver.xsyev() is not None:
            solvers["syev"] = cusolver.batched_syev
        if cusolver.cupy() is not None:
            solvers["jacobi"] = cusolver.batched_jacobi
    for stack in ((3, 40),) if rows.small else ((TASKS, 816), (TASKS, 152), (TASKS, 512), (TASKS, 64), (48, 768)):
        x = symmetric(stack[0], stack[1], stack[1])
        for name, solver in solvers.items():
            if name == "jacobi" and stack[1] > 512:  # sweeps that take seconds
                continue
            timed(f"eigh {stack[0]} x {stack[1]} fp64, {name}", partial(solver, x), partial(_not_eigen, x))


def _factorisations(rows: Rows, timed: Callable[..., None], random: Callable[..., Tensor]) -> None:
    """Time Cholesky, solves with few columns, and orthonormal bases of tall matrices."""
    for shape in ((48,),) if rows.small else ((4096,), (TASKS, 816)):
        side, x = shape[-1], random(*shape, shape[-1])
        gram = x @ x.mT + torch.eye(shape[-1], dtype=torch.float64, device=x.device)
        factor, b = torch.linalg.cholesky(gram), random(*shape, 8)
        inverse = torch.linalg.inv(factor)
        label, residual = dimensions((*shape, side)), partial(lambda gram, b, x: relative_error(gram @ x, b), gram, b)
        rebuilt = partial(lambda gram, found: relative_error(found @ found.mT, gram), gram)
        timed(f"cholesky, {label}", partial(torch.linalg.cholesky, gram), rebuilt)
        timed(f"solve {label}, 8 columns, factor", partial(torch.cholesky_solve, b, factor), residual)
        solved = partial(lambda inverse, b: inverse.mT @ (inverse @ b), inverse, b)
        timed(f"solve {label}, 8 columns, inverse", solved, residual)
    for shape in ((2, 60, 9),) if rows.small else ((TASKS, 14336, 110), (TASKS, 3072, 28)):
        x = random(*shape)
        for name, factorise in QR.items():
            timed(f"QR {dimensions(shape)}, {name}", partial(factorise, x), lambda found: _not_orthogonal(found[0]))


def _not_eigen(x: Tensor, found: tuple[Tensor, Tensor]) -> float:
    """Return ‖V diag(λ) Vᵀ − X‖_F / ‖X‖_F, or the loss of orthogonality where that is larger."""
    values, vectors = (part.double() for part in found)
    return max(relative_error((vectors * values[..., None, :]) @ vectors.mT, x.double()), _not_orthogonal(vectors))


def _not_orthogonal(q: Tensor) -> float:
    """Return ‖QᵀQ − I‖_F / ‖I‖_F."""
    gram = q.double().mT @ q.double()
    return relative_error(gram, torch.eye(gram.shape[-1], dtype=torch.float64, device=q.device).expand_as(gram))
