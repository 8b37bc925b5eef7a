"""The way to cuSOLVER through cupy, as far as a CPU can go: shapes, layouts and the choice of solver.

Where cupy is installed, the names and signatures it is called by are checked against it; results on a GPU are for
``make gpu``.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from isomerge_fast.linalg import cusolver, gram_eigh
from isomerge_fast.linalg.gram_eigh import GramEigh


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
    cusolver._idle.clear()


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


# As cusolverDn.h declares them (cuSOLVER 12.0), one C type an argument.
POINTER, INT = ctypes.c_void_p, ctypes.c_int
HEADER = {
    "cusolverDnXsyevBatched_bufferSize": """cusolverDnHandle_t cusolverDnParams_t cusolverEigMode_t cublasFillMode_t
        int64_t cudaDataType void* int64_t cudaDataType void* cudaDataType size_t* size_t* int64_t""",
    "cusolverDnXsyevBatched": """cusolverDnHandle_t cusolverDnParams_t cusolverEigMode_t cublasFillMode_t
        int64_t cudaDataType void* int64_t cudaDataType void* cudaDataType void* size_t void* size_t int* int64_t""",
}
C_TYPES = {
    **dict.fromkeys(("cusolverDnHandle_t", "cusolverDnParams_t", "void*", "int*"), ctypes.c_void_p),
    **dict.fromkeys(("cusolverEigMode_t", "cublasFillMode_t", "cudaDataType"), ctypes.c_int),
    "int64_t": ctypes.c_int64,
    "size_t": ctypes.c_size_t,
    "size_t*": ctypes.POINTER(ctypes.c_size_t),
}


def test_prototypes_are_the_headers() -> None:
    for name, arguments in HEADER.items():
        assert [C_TYPES[argument] for argument in arguments.split()] == cusolver.PROTOTYPES[name]


class OnTheCpu:
    """cuSOLVER's functions over the CPU's memory: matrices column by column, of which the lower triangle is read.

    Called through ctypes with the prototypes that the real library gets.
    """

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.streams: list[int] = []
        self.handles = 0
        self.fails: set[int] = set()
        for name, arguments in cusolver.PROTOTYPES.items():
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(getattr(self, "_" + name)))

    def _cusolverDnCreate(self, handle: Any) -> int:
        self.handles += 1
        handle[0] = 100 + self.handles
        return 0

    def _cusolverDnSetStream(self, handle: int, stream: int | None) -> int:
        self.streams.append(stream or 0)
        return 0

    def _cusolverDnCreateParams(self, params: Any) -> int:
        params[0] = 7
        return 0

    def _cusolverGetProperty(self, which: int, value: Any) -> int:
        value[0] = (12, 0, 4)[which]
        return 0

    def _cusolverDnXsyevBatched_bufferSize(self, *arguments: Any) -> int:
        *_problem, on_device, on_host, batch = arguments
        on_device[0], on_host[0] = 1000 * batch, 10
        return 0

    def _cusolverDnXsyevBatched(self, *arguments: Any) -> int:
        handle, params, jobz, uplo, n, kind, a, lda, kind_w, w, compute, *spaces, info, batch = arguments
        on_device, on_device_bytes, on_host, on_host_bytes = spaces
        if (handle, params, jobz, uplo, lda) != (100 + self.handles, 7, 1, 0, n) or len({kind, kind_w, compute}) != 1:
            return 3
        if on_device_bytes != 1000 * batch or on_host_bytes != 10 or not on_device or not on_host:
            return 3
        self.batches.append(batch)
        element = (ctypes.c_float, ctypes.c_double)[kind]
        matrices = np.ctypeslib.as_array((element * (batch * n * n)).from_address(a)).reshape(batch, n, n)
        values = np.ctypeslib.as_array((element * (batch * n)).from_address(w)).reshape(batch, n)
        flags = np.ctypeslib.as_array((ctypes.c_int * batch).from_address(info))
        # numpy has rows where the memory has columns.
        values[...], vectors = np.linalg.eigh(matrices.swapaxes(1, 2), UPLO="L")
        matrices[...] = vectors.swapaxes(1, 2)
        for member in self.fails:
            flags[member] = 1
        return 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> OnTheCpu:
    found = OnTheCpu()
    monkeypatch.setattr(cusolver, "xsyev", lambda: found)
    monkeypatch.setattr(cusolver, "_stream", lambda x: 5)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 2, 35, 35), (1, 33, 33)], ids=str)
def test_one_call_for_a_stack(library: OnTheCpu, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    symmetric = x.tril() + x.tril(-1).mT
    expected, _ = torch.linalg.eigh(symmetric)
    for given in (x, x.mT.contiguous().mT, x.repeat_interleave(2, -1)[..., ::2]):  # above the diagonal is not read
        before = given.clone()
        values, vectors = cusolver.batched_syev(given)
        assert values.dtype == vectors.dtype == dtype
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close((vectors * values[..., None, :]) @ vectors.mT, symmetric)
        assert torch.equal(given, before)
    assert library.batches == 3 * [x.shape[:-2].numel()]
    assert library.handles == 1  # taken up again
    assert library.streams == [5]


def test_large_stacks_are_cut(library: OnTheCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusolver, "MOST_BYTES", 3 * 33 * 33 * 8)
    x = torch.randn(8, 33, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x += x.mT.clone()
    values, _ = cusolver.batched_syev(x)
    assert library.batches == [3, 3, 2]
    torch.testing.assert_close(values, torch.linalg.eigvalsh(x))


def test_members_without_a_solution_are_missed(library: OnTheCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    library.fails = {1}
    monkeypatch.setattr(gram_eigh, "eigh", cusolver.batched_syev)
    x = torch.randn(3, 40, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = x @ x.mT
    values, _ = cusolver.batched_syev(gram)
    assert values.isnan().all(-1).tolist() == [False, True, False]
    _, stats = GramEigh().polar(x)
    assert stats.nuclear_norm.isnan().tolist() == [False, True, False]
    assert GramEigh().factorize(x).top(4).sigma.isnan().all(-1).tolist() == [False, True, False]


def test_a_refusal_is_an_error(library: OnTheCpu) -> None:
    library.cusolverDnXsyevBatched_bufferSize = lambda *arguments: 9  # type: ignore[attr-defined]  # of a class made up here
    with pytest.raises(torch.linalg.LinAlgError, match=r"cusolverDnXsyevBatched_bufferSize failed .* status 9"):
        cusolver.batched_syev(torch.eye(33).expand(2, 33, 33))


def test_eigensolvers_are_described(library: OnTheCpu, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:0")
    assert cusolver.describe_eigensolvers(cuda) == "xsyev-batched 12.0.4 | torch"
    monkeypatch.setattr(cusolver, "xsyev", lambda: None)
    monkeypatch.setattr(cusolver, "cupy", lambda: types.SimpleNamespace(__version__="14.2.0"))
    assert cusolver.describe_eigensolvers(cuda) == "cupy-syevj 14.2.0 | torch"
    monkeypatch.setattr(cusolver, "cupy", lambda: None)
    assert cusolver.describe_eigensolvers(cuda) == "torch"


@pytest.mark.parametrize(
    ("side", "with_library", "with_cupy", "expected"),
    [
        (32, True, True, "torch"),
        (33, True, True, "syev"),
        (1024, True, True, "syev"),
        (1025, True, True, "torch"),
        (128, False, True, "jacobi"),
        (129, False, True, "torch"),
        (33, False, False, "torch"),
    ],
)
def test_the_rule(
    monkeypatch: pytest.MonkeyPatch, side: int, with_library: bool, with_cupy: bool, expected: str
) -> None:
    monkeypatch.setattr(cusolver, "xsyev", lambda: object() if with_library else None)
    monkeypatch.setattr(cusolver, "cupy", lambda: object() if with_cupy else None)
    monkeypatch.setattr(cusolver, "batched_syev", lambda x: "syev")
    monkeypatch.setattr(cusolver, "batched_jacobi", lambda x: "jacobi")
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: "torch")

    def shaped(*shape: int) -> Any:
        return types.SimpleNamespace(ndim=len(shape), shape=torch.Size(shape), device=torch.device("cuda:0"))

    assert cusolver.eigh(shaped(8, side, side)) == expected
    assert cusolver.eigh(shaped(side, side)) == cusolver.eigh(shaped(1, side, side)) == "torch"


def test_no_library_without_cuda() -> None:
    if torch.version.cuda is None:
        assert cusolver.xsyev() is None
    elif (found := cusolver.xsyev()) is not None:
        assert cusolver._version(found).count(".") == 2
