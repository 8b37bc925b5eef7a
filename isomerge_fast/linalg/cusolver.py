"""Stacks of small symmetric eigenproblems on CUDA by cuSOLVER's batched Jacobi solver; the only file that knows cupy.

torch sends a stack of symmetric matrices with more than 32 rows to one solver call a matrix (or a newer batched one,
where its cuSOLVER has that); cupy binds ``syevjBatched``, which takes the whole stack in one call. Where cupy is not
installed, and everywhere but on CUDA, ``torch.linalg.eigh`` does the same.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Sides for which one call for a stack is taken to be worth it: torch batches smaller ones itself, and Jacobi sweeps of
# larger ones cost more than tridiagonalisation. An estimate: no GPU has been at hand.
SMALLEST, LARGEST = 33, 512


@cache
def cupy() -> Any | None:
    """The package, or None where it is not installed."""
    try:
        return importlib.import_module("cupy")
    except ImportError:
        return None


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """(λ ascending, V) with X = V diag(λ) Vᵀ, of symmetric [..., n, n]; only the lower triangle is read.

    Reads one flag from the device on CUDA: whether the solver converged.
    """
    stacked = x.ndim > 2 and x.shape[:-2].numel() > 1
    if x.device.type != "cuda" or not stacked or not SMALLEST <= x.shape[-1] <= LARGEST or cupy() is None:
        return torch.linalg.eigh(x)
    return batched_jacobi(x)


def batched_jacobi(x: Tensor) -> tuple[Tensor, Tensor]:
    """``eigh`` by ``cupyx.cusolver.syevj``, which copies X; shared over DLPack, on torch's stream and device."""
    package = cupy()
    assert package is not None
    solver = importlib.import_module("cupyx.cusolver")
    stack = x.detach().reshape(-1, *x.shape[-2:]).contiguous()
    with package.cuda.Device(x.device.index or 0), package.cuda.ExternalStream(_stream(x)):
        values, vectors = solver.syevj(package.from_dlpack(stack), "L", True)
        eigenvalues, eigenvectors = torch.from_dlpack(values), torch.from_dlpack(vectors)
    return eigenvalues.reshape(x.shape[:-1]), eigenvectors.reshape(x.shape)


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream
