"""Count what a GPU is asked to do, of matrices that no CPU multiplies in passing: walk the code with shapes alone.

A walk holds tensors of torch's device ``meta``, which have shapes and no numbers. What a merge reads of its GPU, and
decides its next step by, it is told from another merge, of a problem of the same kind that was computed: the n-th read
of a line of code answers the n-th read of that line. A walk that reads what the other never read is an error.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

import isomerge_fast
from isomerge_fast.linalg.certificate import fixed_draw
from isomerge_kernels import reference
from isomerge_kernels.devices import DeviceTraits
from isomerge_kernels.protocol import TaskSum
from pretend_gpu import PretendGpu, PretendTensor, pretend_gpu

# Where the first of two factors stands among an operation's operands.
PRODUCTS = {"aten.mm": 0, "aten.bmm": 0, "aten.addmm": 1, "aten.baddbmm": 1}
EIGENPROBLEMS = ("aten._linalg_eigh", "XsyevBatched", "aten._linalg_svd")
FACTORISATIONS = ("aten.linalg_cholesky_ex", "aten.linalg_qr", "aten.linalg_inv_ex")
SOLVES = ("aten.linalg_solve_triangular",)
PACKAGE = str(Path(isomerge_fast.__file__).parent)

Site = tuple[str, int]
Answers = dict[Site, list[Any]]


@dataclass(frozen=True)
class Work:
    """Describe one launch.

    Attributes:
        kind: ``product``, ``symmetric`` (a product that is made by half), ``eigenproblem``, ``factorisation``,
            ``solve``, or ``pass`` for what only goes through its operands.
        shape: of the first factor, or of what is solved.
        flops: of a whole product, symmetric ones too, and of a triangular solve; 0 of all else.
        moved_bytes: of operands and results, each once.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    flops: float
    moved_bytes: int

    @property
    def members(self) -> int:
        """Return how many matrices of a stack it is of."""
        return math.prod(self.shape[:-2])


@dataclass
class CountedGpu(PretendGpu):
    """Keep every launch, and what was read.

    Attributes:
        told: what reads are answered with, on a walk; None where everything is computed.
        read: what was read where everything is computed, by the line that read it, for a walk to be told.
    """

    told: Answers | None = None
    work: list[Work] = field(default_factory=list)
    read: Answers = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        if self.told is not None:
            self.place, self.told = "meta", {site: list(found) for site, found in self.told.items()}

    def reset(self) -> None:
        super().reset()
        self.work.clear()

    def upload(self, tensor: Tensor) -> PretendTensor:
        self.uploads += 1
        with _disable_current_modes():
            held = tensor.detach().to(self.place, copy=True)
        return PretendTensor(held, self)

    def compute(
        self, name: str, call: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], *, is_read: bool
    ) -> Any:
        if is_read:
            return self._answer(lambda: call(*args, **options))
        return call(*args, **options)

    def note(self, name: str, operands: Sequence[Any], result: Any) -> None:
        given = [leaf for leaf in tree_leaves(list(operands)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name == "symmetric_matmul":  # whose result has the first factor's rows
            made = [given[0]]
        factors = (given or made)[PRODUCTS.get(name, 0) :]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        kind, flops = _kind_and_flops(name, factors)
        self.work.append(Work(kind, name, tuple(factors[0].shape), factors[0].dtype, flops, moved))

    def on_host(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.told is not None and function is reference.task_sum:
            function = _shapes_of_sum
        return super().on_host(function, *args, **kwargs)

    def _answer(self, compute: Callable[[], Any]) -> Any:
        site = _site()
        if self.told is None:
            self.read[site].append(compute())
            return self.read[site][-1]
        if not self.told.get(site):
            raise LookupError(f"line {site[1]} of {site[0]} reads what no merge that was computed has read")
        return self.told[site].pop(0)


@contextmanager
def counted_gpu(traits: DeviceTraits, told: Answers | None = None) -> Iterator[CountedGpu]:
    """Pretend that there is a GPU, and keep what it is asked to do; of a walk where ``told`` answers its reads."""
    fixed_draw.cache_clear()  # which has tensors of the GPU that was pretended before
    try:
        gpu = CountedGpu(traits, told=told)
        with pretend_gpu(gpu=gpu):
            yield gpu
    finally:
        fixed_draw.cache_clear()


def _kind_and_flops(name: str, operands: Sequence[Tensor]) -> tuple[str, float]:
    x = operands[0]
    if name in PRODUCTS:
        return "product", 2.0 * x.numel() * operands[1].shape[-1]
    if name == "symmetric_matmul":
        return "symmetric", 2.0 * x.numel() * x.shape[-2]
    if name in SOLVES:
        return "solve", float(x.shape[-1] * operands[1].numel())
    return "eigenproblem" if name in EIGENPROBLEMS else "factorisation" if name in FACTORISATIONS else "pass", 0.0


def _site() -> Site:
    """Return the line of isomerge_fast that is being run, by its function's name."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    assert frame is not None
    return frame.f_code.co_qualname, frame.f_lineno


def _shapes_of_sum(
    experts: Sequence[Tensor],
    base: Tensor | None,
    weights: Sequence[float],
    out: Tensor,
    batch_dims: int = 0,
    largest: bool = True,
) -> TaskSum:
    seen = experts[0].new_empty(len(experts), *out.shape[:batch_dims], dtype=torch.float64)
    return TaskSum(out, seen, seen.clone() if largest else None, seen.long())
