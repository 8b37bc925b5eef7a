"""Runs a method's solvers in order of cost until the certificate holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..linalg.auto import Choice
from ..linalg.protocol import PolarSolver
from .protocol import Deltas, MergeStats, TensorDeltas

S = TypeVar("S", bound=PolarSolver, covariant=True)


def merge_certified(
    attempt: Callable[[Deltas, Choice[S]], tuple[Tensor, MergeStats]], deltas: Deltas, ladder: Sequence[Choice[S]]
) -> tuple[Tensor, MergeStats]:
    """``attempt`` with the first solver of ``ladder``, again with the next where a check misses its limit.

    All checks of all matrices are read from the device at once, after the attempt. Of a batch in memory only the
    matrices that missed are solved again. What was given up, and why, is in ``MergeStats.escalations``; what the last
    solver could not meet, in ``MergeStats.missed``.
    """
    with exact_products(deltas.device):
        return _climb(attempt, deltas, ladder)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrices are multiplied in their own dtype, whatever autocast and TF32 settings the program around us has.

    torch keeps two sets of TF32 settings, and cuBLAS products fail where they disagree: so both are set by the old
    function, which writes both, and put back one after the other.
    """
    backends: Any = torch.backends  # whose types do not tell of these settings
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    general = backends.fp32_precision
    before = [setting.fp32_precision for setting in settings]
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the new settings are in use, at another value than the old default
        old = "highest"
    is_exact = old == "highest" and all(precision in ("none", "ieee") for precision in before)
    with torch.autocast(device.type, enabled=False):
        if is_exact:
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(old)
            for setting, precision in zip(settings, before, strict=True):
                # A setting that only repeats the general one goes on following it.
                setting.fp32_precision = "none" if precision == general else precision


def _climb(
    attempt: Callable[[Deltas, Choice[S]], tuple[Tensor, MergeStats]], deltas: Deltas, ladder: Sequence[Choice[S]]
) -> tuple[Tensor, MergeStats]:
    value, stats = attempt(deltas, ladder[0])
    for choice in ladder[1:]:
        missed = stats.missed()
        if not missed:
            break
        rows = torch.stack(list(missed.values())).any(0)
        remark = f"{stats.algorithm}: {stats.describe(missed)}"
        if rows.ndim == 0 or bool(rows.all()) or not isinstance(deltas, TensorDeltas):
            value, again = attempt(deltas, choice)
            stats = again.after(stats, remark)
        else:
            # Matrices of a batch, with the batch's dimensions made one.
            rows = rows.to(deltas.device)
            part, again = attempt(TensorDeltas([tensor[rows] for tensor in deltas.tensors]), choice)
            value[rows] = part.to(value.dtype)
            stats = stats.replaced(rows, again).after(stats, remark)
    return value, stats
