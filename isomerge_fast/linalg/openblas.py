"""Solve one symmetric eigenproblem on a CPU by OpenBLAS, which numpy's wheels bring, where MKL takes longer.

torch's wheels bring MKL, whose best kernels are for Intel's CPUs. On one core of an AMD EPYC (Zen 4), ms by MKL and
here, in float64: 39 and 24 at 512, 100 and 68 at 768, 246 and 150 at 1024, 2160 and 1340 at 2048; with OpenBLAS's
kernels for CPUs without AVX-512 0.8 to 0.9 of MKL's time. In float32 MKL is the faster one (60 ms and 78 at 768), and
products take both as long to 5 %.

How many threads OpenBLAS computes with is one number for the whole process, while torch has one for every thread of
Python. So it serves only threads that have one core for torch, and its number is one while it solves: results do not
depend on what other threads do. (With two threads MKL takes 66 ms at 768, where OpenBLAS with one takes 68.)
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from ctypes import byref, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from threading import Lock
from typing import Any

import numpy
import torch
from torch import Tensor

from ..machine import cpu_maker

# The side from which more is saved than the calls cost.
LEAST_SIDE = 192
# Between the ends of columns: where these are 2^k apart, they fall on the same lines of the cache (1024: 190 ms, not
# 150).
PADDING = 8
# LAPACK's own driver scales what is larger or smaller than this; here it is left to that driver.
SMALLEST, LARGEST = 1e-130, 1e130
# How numpy's wheels have named the library, and the functions in it whose integers have 64 bits.
WHEELS = (("libscipy_openblas64_*", "scipy_{}64_"), ("libopenblas64_*", "{}64_"))
MAKERS = ("AuthenticAMD", "HygonGenuine")


class OpenBlas:
    """Call the functions of one OpenBLAS; it computes with one thread in a ``with``, and then as it did before."""

    def __init__(self, library: Any, names: str) -> None:
        def function(name: str, result: Any, *arguments: Any) -> Any:
            found = getattr(library, names.format(name))
            found.restype, found.argtypes = result, arguments
            return found

        self.set_threads = function("openblas_set_num_threads", None, c_int)
        self.get_threads = function("openblas_get_num_threads", c_int)
        # "OpenBLAS 0.3.31  USE64BITINT … SkylakeX …": the version, and the CPU that its kernels are for.
        words = function("openblas_get_config", c_char_p)().decode().split()
        kernels = function("openblas_get_corename", c_char_p)().decode()
        self.version = f"{words[1] if len(words) > 1 else 'unknown'} ({kernels})"
        # Letters, numbers and arrays, then the lengths of the letters, as Fortran has them.
        self.dsytrd = function("dsytrd_", None, c_char_p, *[c_void_p] * 9, c_size_t)
        self.dstedc = function("dstedc_", None, c_char_p, *[c_void_p] * 10, c_size_t)
        self.dormtr = function("dormtr_", None, *[c_char_p] * 3, *[c_void_p] * 10, *[c_size_t] * 3)
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin_again)

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = self.get_threads()
            self._users += 1
            self.set_threads(1)

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self.set_threads(self._before)

    def _begin(self) -> None:
        self._lock, self._users, self._before = Lock(), 0, 1

    def _begin_again(self) -> None:
        """Forget the other threads of the parent of this process, which may have been solving."""
        if self._users:
            self.set_threads(self._before)
        self._begin()


_found: list[OpenBlas | None] = []  # one, when it has been looked for
_finding = Lock()


def library() -> OpenBlas | None:
    """Return numpy's OpenBLAS where it is the faster one, else None: on AMD's CPUs, where torch has MKL."""
    if not _found:
        with _finding:  # one object for all threads, as it counts them
            if not _found:
                is_faster = torch.backends.mkl.is_available() and cpu_maker() in MAKERS
                _found.append(numpys() if is_faster else None)
    return _found[0]


def numpys() -> OpenBlas | None:
    """Return the OpenBLAS that numpy's wheel brought; None where numpy is another build."""
    folder = Path(numpy.__file__).parents[1] / "numpy.libs"
    for pattern, names in WHEELS:
        for path in sorted(folder.glob(pattern)):
            with suppress(OSError, AttributeError):
                # The one that numpy has loaded: an older numpy may have left another.
                return OpenBlas(ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW), names)
    return None


def eigh(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return ``torch.linalg.eigh`` of X [n, n] by OpenBLAS; None where it does not serve, or not such matrices."""
    if (blas := _serving(x)) is None:
        return None
    n = len(x)
    room = torch.empty(n, n + PADDING, dtype=x.dtype, device="cpu")[:, :n]
    return _solved(blas, room.copy_(x))


def eigh_in_place(x: Tensor) -> Tensor | None:
    """Return the eigenvalues of a contiguous X [n, n], whose rows become the eigenvectors; None as ``eigh``."""
    blas = _serving(x) if x.is_contiguous() else None
    found = None if blas is None else _solved(blas, x)
    if found is None:
        return None
    x.copy_(found[1].mT)
    return found[0]


def _serving(x: Tensor) -> OpenBlas | None:
    """Return the library where it serves the calling thread, and takes X."""
    if x.ndim != 2 or x.device.type != "cpu" or x.dtype != torch.float64 or len(x) < LEAST_SIDE or x.requires_grad:
        return None
    if torch.get_num_threads() > 1 or (blas := library()) is None:
        return None
    least, most = (float(value) for value in x.diagonal().aminmax())
    # Of a Gram matrix no entry is larger than the diagonal's. Not `>`: NaN is left to torch too.
    return blas if SMALLEST <= most <= LARGEST and -least <= most else None


def _solved(blas: OpenBlas, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (λ ascending, V) of X, which is stored by rows, as LAPACK's ``dsyevd`` finds them; X is overwritten."""
    n = len(x)
    vectors = torch.empty(n, n + PADDING, dtype=x.dtype, device="cpu")[:, :n]
    values, beside, tau = torch.empty(3, n, dtype=x.dtype, device="cpu").unbind()
    work = torch.empty(1 + 4 * n + n * n, dtype=x.dtype, device="cpu")
    whole = torch.empty(3 + 5 * n, dtype=torch.int64, device="cpu")
    info = c_int64()

    def solve(function: Any, *arguments: bytes | Tensor | int) -> None:
        letters = sum(isinstance(argument, bytes) for argument in arguments)
        function(*map(_as_fortran, arguments), byref(info), *[1] * letters)
        if info.value:
            raise torch.linalg.LinAlgError(f"LAPACK's eigensolver failed on a matrix of side {n} ({info.value})")

    ld, size = x.stride(0), work.numel()
    # By columns, as LAPACK has it, the lower triangle is the upper one.
    with blas:
        solve(blas.dsytrd, b"U", n, x, ld, values, beside, tau, work, size)
        solve(blas.dstedc, b"I", n, values, beside, vectors, vectors.stride(0), work, size, whole, whole.numel())
        solve(blas.dormtr, b"L", b"U", b"N", n, n, x, ld, tau, vectors, vectors.stride(0), work, size)
    return values, vectors.mT


def _as_fortran(argument: bytes | int | Tensor) -> Any:
    """Return what a function in Fortran is given: all by address, but for letters, which ctypes turns into theirs."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return byref(c_int64(argument)) if isinstance(argument, int) else argument
