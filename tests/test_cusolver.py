"""The way to cuSOLVER through cupy, as far as a CPU can go: shapes, layouts and the choice of solver.

Where cupy is installed, the names and signatures it is called by are checked against it; results on a GPU are for
``make gpu``.
"""

from __future__ import annotations

import contextlib
import sys
import types

import numpy as np
import pytest
import torch

from isomerge_fast.linalg import cusolver


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """numpy under cupy's names; its syevj gives back eigenvectors in Fortran order, as cuSOLVER does."""
    calls: list[tuple] = []

    def syevj(a: np.ndarray, uplo: str, with_eigen_vector: bool) -> tuple[np.ndarray, np.ndarray]:
        calls.append((a.shape, uplo, with_eigen_vector))
        assert uplo == "L"
        values, vectors = np.linalg.eigh(a, UPLO="L")
        return values, np.swapaxes(np.ascontiguousarray(np.swapaxes(vectors, -1, -2)), -1, -2)

    # Attributes that a module made here does not declare: hence the ignores.
    package = types.ModuleType("cupy")
    package.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        Device=lambda index: contextlib.nullcontext(), ExternalStream=lambda pointer: contextlib.nullcontext()
    )
    package.from_dlpack = np.from_dlpack  # type: ignore[attr-defined]
    solver = types.ModuleType("cupyx.cusolver")
    solver.syevj = syevj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", package)
    monkeypatch.setitem(sys.modules, "cupyx", types.ModuleType("cupyx"))
    monkeypatch.setitem(sys.modules, "cupyx.cusolver", solver)
    monkeypatch.setattr(cusolver, "_stream", lambda x: 0)
    cusolver.cupy.cache_clear()
    return calls


@pytest.fixture(autouse=True)
def forget() -> object:
    yield
    cusolver.cupy.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 2, 35, 35), (1, 33, 33)], ids=str)
def test_stacks_keep_their_layout(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    calls = stand_in(monkeypatch)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x = (x + x.mT).mT.contiguous().mT  # not C-contiguous
    before = x.clone()
    values, vectors = cusolver.batched_jacobi(x)
    assert calls == [((x.shape[:-2].numel(), *shape[-2:]), "L", True)]
    assert values.shape == shape[:-1]
    assert values.dtype == vectors.dtype == dtype
    torch.testing.assert_close((vectors * values[..., None, :]) @ vectors.mT, x)
    assert torch.equal(x, before)


def test_a_cpu_never_needs_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch)
    x = torch.eye(40).expand(3, 40, 40)
    assert torch.equal(cusolver.eigh(x)[0], torch.ones(3, 40))
    assert not calls


def test_absent_cupy_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    cusolver.cupy.cache_clear()
    assert cusolver.cupy() is None


def test_names_and_signature() -> None:
    """Against the real package; needs no GPU, only its libraries."""
    cupy = pytest.importorskip("cupy", reason="cupy is not installed (extra `cuda`)")
    solver = pytest.importorskip("cupyx.cusolver", reason="cupy's CUDA libraries are not installed")
    assert solver.syevj.__doc__.startswith("syevj(a, UPLO='L', with_eigen_vector=True)")  # compiled: no signature
    assert callable(cupy.from_dlpack)
    assert callable(cupy.cuda.ExternalStream)
    assert callable(cupy.cuda.Device)
