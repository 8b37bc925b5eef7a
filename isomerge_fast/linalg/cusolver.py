"""Solve stacks of symmetric eigenproblems on CUDA in one call; the only file that knows cuSOLVER and cupy.

torch sends a stack of symmetric matrices with more than 32 rows to one solver call a matrix, even where its cuSOLVER
has a batched one (pytorch issues 174674, 175585 and 183806). The shape of a stack and the installed libraries alone
decide who solves it:

1. ``cusolverDnXsyevBatched`` (tridiagonalisation; cuSOLVER 11.7.1 and newer), from the library that torch itself
   brings: sides of ``SMALLEST`` to ``LARGEST``;
2. without that, ``syevjBatched`` (Jacobi) through cupy, if it is installed: up to ``LARGEST_JACOBI``;
3. everything else, by ``torch.linalg.eigh``, or on a CPU by ``openblas`` where that serves.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections import defaultdict
from contextlib import suppress
from ctypes import POINTER, byref, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops import traits_of
from . import openblas

# torch batches smaller ones itself. In ms on an H200, batched tridiagonalisation / torch / Jacobi: 8 of side 64
# 0.4 / 5.6 / 1.1, of 152 7.7 / 9.2 / 10, of 512 23 / 37 / 56, of 816 49 / 66 / –; 48 of side 768 66 / 364 / –. One
# matrix of 1024 takes 10, no less than torch's.
SMALLEST, LARGEST, LARGEST_JACOBI = 33, 1024, 128
# Of CUDA by its major version: what torch's own library is called.
LIBRARIES = {"12": "libcusolver.so.11", "13": "libcusolver.so.12"}
# cusolverEigMode_t, cublasFillMode_t, cudaDataType.
WITH_VECTORS, LOWER = 1, 0
DATA_TYPES = {torch.float32: 0, torch.float64: 1}
# Bytes of the matrices of one call: JAX has found 32-bit products inside the solver (its issue 33062).
MOST_BYTES = 2**31 - 1
# From the handle to jobz, uplo, n, the types, pointers and leading dimension, as cusolverDn.h has them.
_PROBLEM = [c_void_p, c_void_p, c_int, c_int, c_int64, c_int, c_void_p, c_int64, c_int, c_void_p, c_int]
PROTOTYPES = {
    "cusolverDnXsyevBatched_bufferSize": [*_PROBLEM, POINTER(c_size_t), POINTER(c_size_t), c_int64],
    "cusolverDnXsyevBatched": [*_PROBLEM, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_int64],
    "cusolverDnCreate": [POINTER(c_void_p)],
    "cusolverDnSetStream": [c_void_p, c_void_p],
    "cusolverDnCreateParams": [POINTER(c_void_p)],
    "cusolverGetProperty": [c_int, POINTER(c_int)],
}
# (handle, params) that nobody uses, by (device, stream): work of one stream is in order, whatever thread sends it.
_idle: defaultdict[tuple[int, int], list[tuple[c_void_p, c_void_p]]] = defaultdict(list)


@cache
def cupy() -> Any | None:
    """Return the cupy package, or None where it is not installed."""
    try:
        return importlib.import_module("cupy")
    except ImportError:
        return None


@cache
def xsyev() -> Any | None:
    """Return torch's cuSOLVER with ``PROTOTYPES``, or None where there is none or it has no batched solver."""
    name = LIBRARIES.get((torch.version.cuda or "").split(".")[0])
    if name is None:
        return None
    package = importlib.util.find_spec("nvidia")
    roots = map(Path, (package.submodule_search_locations or ()) if package else ())
    beside_torch = sorted(str(path) for root in roots for path in root.glob(f"*/lib/{name}"))
    for path in (*beside_torch, name):
        try:
            library = ctypes.CDLL(path)
            for function, types in PROTOTYPES.items():
                getattr(library, function).argtypes = types
        except (OSError, AttributeError):
            continue
        return library
    return None


def describe_arithmetic(device: torch.device) -> str:
    """Return in words what decides the last digits of a merge on ``device`` beside its inputs and options.

    Of a GPU: the model (libraries choose by its multiprocessors), all of its memory (batches follow from it), and the
    versions of what launches on it. torch's own version is recorded elsewhere.
    """
    traits = traits_of(device)
    if not traits.is_gpu:
        return device.type
    triton = "absent"
    with suppress(PackageNotFoundError):
        triton = version("triton")
    return f"{traits.name}, {traits.memory_bytes} bytes; triton {triton}; {describe_eigensolvers(device)}"


def describe_eigensolvers(device: torch.device) -> str:
    """Return the solvers that ``eigh`` chooses from on ``device``, with versions: their results differ in bits."""
    if device.type == "cuda" and (library := xsyev()) is not None:
        return f"xsyev-batched {_version(library)} | torch"
    if device.type == "cuda" and (package := cupy()) is not None:
        return f"cupy-syevj {package.__version__} | torch"
    if device.type == "cpu" and (blas := openblas.library()) is not None:
        return f"openblas {blas.version} of numpy | torch"
    return "torch"


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (λ ascending, V) with X = V diag(λ) Vᵀ, of symmetric [..., n, n]; only the lower triangle is read.

    On CUDA torch and cupy read one flag from the device, whether the solver converged. ``batched_syev`` reads none: the
    λ of members that it could not solve are NaN, which no certificate takes for a result.
    """
    stacked = x.ndim > 2 and x.shape[:-2].numel() > 1
    if x.device.type != "cuda" or not stacked or x.shape[-1] < SMALLEST:
        return openblas.eigh(x) or torch.linalg.eigh(x)
    if xsyev() is not None:
        return batched_syev(x) if x.shape[-1] <= LARGEST else torch.linalg.eigh(x)
    if cupy() is not None and x.shape[-1] <= LARGEST_JACOBI:
        return batched_jacobi(x)
    return torch.linalg.eigh(x)


def batched_syev(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``eigh`` of float32 or float64 by ``cusolverDnXsyevBatched``, on torch's stream and in its memory."""
    n = x.shape[-1]
    # Column by column, as cuSOLVER has matrices; the vectors take its place.
    columns = x.detach().mT.clone(memory_format=torch.contiguous_format).view(-1, n, n)
    values = x.new_empty(len(columns), n)
    info = torch.zeros(len(columns), dtype=torch.int32, device=x.device)
    at_once = max(1, MOST_BYTES // (n * n * x.element_size()))
    with torch.cuda.device(x.device):
        stream = _stream(x)
        handle, params = idle = _take(x.device.index or 0, stream)
        try:
            for first in range(0, len(columns), at_once):
                part = slice(first, first + at_once)
                _solve(handle, params, columns[part], values[part], info[part])
        finally:
            _idle[x.device.index or 0, stream].append(idle)
    values.masked_fill_((info != 0)[:, None], torch.nan)
    return values.view(x.shape[:-1]), columns.view(x.shape).mT


def _solve(handle: c_void_p, params: c_void_p, columns: Tensor, values: Tensor, info: Tensor) -> None:
    library, count, n, kind = xsyev(), len(columns), columns.shape[-1], DATA_TYPES[columns.dtype]
    assert library is not None
    problem = (handle, params, WITH_VECTORS, LOWER, n, kind, columns.data_ptr(), n, kind, values.data_ptr(), kind)
    on_device, on_host = c_size_t(), c_size_t()
    _check(library, "cusolverDnXsyevBatched_bufferSize", *problem, byref(on_device), byref(on_host), count)
    workspace = torch.empty(on_device.value, dtype=torch.uint8, device=columns.device)
    host = torch.empty(on_host.value, dtype=torch.uint8)
    spaces = (workspace.data_ptr(), on_device.value, host.data_ptr(), on_host.value)
    _check(library, "cusolverDnXsyevBatched", *problem, *spaces, info.data_ptr(), count)


def _take(device: int, stream: int) -> tuple[c_void_p, c_void_p]:
    """Return an idle handle of this stream and its parameters, or new ones, made on the current device."""
    try:
        return _idle[device, stream].pop()
    except IndexError:
        handle, params = c_void_p(), c_void_p()
    _check(xsyev(), "cusolverDnCreate", byref(handle))
    _check(xsyev(), "cusolverDnSetStream", handle, stream)
    _check(xsyev(), "cusolverDnCreateParams", byref(params))
    return handle, params


def _check(library: Any, function: str, *arguments: Any) -> None:
    status = getattr(library, function)(*arguments)
    if status:
        raise torch.linalg.LinAlgError(f"{function} failed with cuSOLVER's status {status}")


def _version(library: Any) -> str:
    numbers = [c_int() for _ in range(3)]
    for index, number in enumerate(numbers):
        _check(library, "cusolverGetProperty", index, byref(number))
    return ".".join(str(number.value) for number in numbers)


def batched_jacobi(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``eigh`` by ``cupyx.cusolver.syevj``, which copies X; shared over DLPack, on torch's stream and device."""
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
