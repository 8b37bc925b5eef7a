"""Count what a call computes and holds: floating-point operations by dtype, peak memory."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isomerge_fast import ops
from isomerge_fast.execution.malloc import trim_heap
from isomerge_fast.linalg import openblas

aten = torch.ops.aten


def _product(a: Tensor, b: Tensor, *_: Any) -> float:
    return 2.0 * a.numel() * b.shape[-1]


def _of_matrix(formula: Callable[[int, int], float]) -> Callable[..., float]:
    """Return a count for [..., M, N] from one of the long and the short side."""

    def count(x: Tensor, *_: Any) -> float:
        rows, columns = x.shape[-2:]
        members = math.prod(x.shape[:-2])
        return members * formula(max(rows, columns), min(rows, columns))

    return count


# By convention, whatever the library's algorithm does (Golub and Van Loan, "Matrix Computations"): thin SVD with both
# sides, symmetric eigenproblem with vectors, thin QR with Q, Cholesky, triangular systems. Passes over elements are
# counted as bytes, not here.
COUNTS: dict[Any, Callable[..., float]] = {
    aten.mm: _product,
    aten.bmm: _product,
    aten.addmm: lambda c, a, b, *_: _product(a, b),
    aten.baddbmm: lambda c, a, b, *_: _product(a, b),
    aten.mv: lambda a, x: 2.0 * a.numel(),
    aten.dot: lambda a, b: 2.0 * a.numel(),
    aten._linalg_svd: _of_matrix(lambda m, n: 6.0 * m * n**2 + 20.0 * n**3),
    aten._linalg_eigh: _of_matrix(lambda m, n: 9.0 * n**3),
    aten.linalg_qr: _of_matrix(lambda m, n: 4.0 * m * n**2 - 4.0 * n**3 / 3.0),
    aten.linalg_cholesky_ex: _of_matrix(lambda m, n: n**3 / 3.0),
    aten.linalg_solve_triangular: lambda a, b, *_: 1.0 * a.shape[-1] * b.numel(),
    aten.triangular_solve: lambda b, a, *_: 1.0 * a.shape[-1] * b.numel(),
    aten.geqrf: _of_matrix(lambda m, n: 2.0 * m * n**2 - 2.0 * n**3 / 3.0),
    aten.linalg_householder_product: _of_matrix(lambda m, n: 2.0 * m * n**2 - 2.0 * n**3 / 3.0),
}


class CountFlops(TorchDispatchMode):
    """Add up the operations that torch is asked for while this is entered, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = COUNTS.get(function._overloadpacket)
        if count is not None:
            self.by_dtype[args[0].dtype] += count(*args)  # type: ignore[assignment]  # flops are floats
        return function(*args, **(kwargs or {}))


def count_flops(function: Callable[[], Any]) -> dict[str, float]:
    """Return the operations of a call by dtype; what torch is not asked for counts as the torch that it stands for."""
    with (
        CountFlops() as counted,
        mock.patch.object(ops, "_has_kernels", return_value=False),
        mock.patch.object(openblas, "_serving", return_value=None),
    ):
        function()
    return {str(dtype).removeprefix("torch."): count for dtype, count in counted.by_dtype.items()}


@dataclass
class Peak:
    """Hold the peak of memory beyond what was in use before; None where the system does not tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of memory above what was in use before: allocated on the GPU, or resident in this process.

    The resident memory's high-water mark can be reset on Linux only.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.bytes = max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")
