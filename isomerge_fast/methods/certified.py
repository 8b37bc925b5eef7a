"""Run a method's solvers in order until a certificate holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from ..linalg.auto import Candidate
from ..linalg.protocol import PolarSolver
from .source import DeltaSource
from .stats import MergeStats, require_kept

S = TypeVar("S", bound=PolarSolver, covariant=True)
Result = tuple[Tensor, MergeStats]


class UnsolvedError(InputError):
    """Report matrices on which every solver gave up."""


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Multiply matrices in their own dtype, whatever autocast and TF32 settings the surrounding program has."""
    is_on = torch.is_autocast_enabled(device.type)
    autocast = torch.autocast(device.type, enabled=False) if is_on else nullcontext()
    with autocast, _EXACT:
        yield


class _ExactSettings:
    """Hold the process's TF32 settings at exact products while any thread wants that.

    torch keeps two sets of them, and cuBLAS products fail where they disagree. The old function sets both; they are put
    back one after the other.
    """

    def __init__(self) -> None:
        self._lock, self._users = Lock(), 0
        self._put_back: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._put_back = _set_exact()
            self._users += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._put_back()


_EXACT = _ExactSettings()


def _set_exact() -> Callable[[], None]:
    """Set exact products; return what puts the settings back."""
    backends: Any = torch.backends  # whose types do not tell of these settings
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the new settings are in use, at another value than the old default
        old = "highest"
    if old == "highest" and all(precision in ("none", "ieee") for precision in before):
        return lambda: None
    general = backends.fp32_precision
    torch.set_float32_matmul_precision("highest")

    def put_back() -> None:
        torch.set_float32_matmul_precision(old)
        for setting, precision in zip(settings, before, strict=True):
            # A setting that only repeats the general one goes on following it.
            setting.fp32_precision = "none" if precision == general else precision

    return put_back


def run_with_fallback(
    attempt: Callable[[DeltaSource, Candidate[S]], Result], deltas: DeltaSource, candidates: Sequence[Candidate[S]]
) -> Result:
    """Return ``attempt`` with the first solver of ``candidates``, and with the next where a check misses its limit.

    All checks of all matrices are read from the device at once, after the attempt. Of a batch in memory only the
    matrices that missed are solved again. ``MergeStats.escalations`` names the solvers that were given up and why;
    ``MergeStats.missed`` the checks that the last one misses. A solver that fails, as LAPACK may, is followed by the
    next one too; where all of them failed, UnsolvedError is raised.
    """
    done: Result | None = None
    failures: list[str] = []  # of solvers before the first that gave a result
    with exact_products(deltas.device):
        for candidate in candidates:
            missed = {} if done is None else done[1].missed()
            if done is not None and not missed:
                break
            try:
                done = _next(attempt, deltas, candidate, done, missed)
            except torch.linalg.LinAlgError as error:
                first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
                failure = f"{candidate.solver.name}: {first_line}"
                if done is None:
                    failures.append(failure)
                else:
                    done = done[0], done[1].after(done[1], failure)
    if done is None:
        raise UnsolvedError(f"no solver gave a result for matrices {list(deltas.shape)}: {'; '.join(failures)}")
    value, stats = done
    if failures:
        stats = replace(stats, escalations=(*failures, *stats.escalations))
    require_kept(stats)
    return value, stats


def _next(
    attempt: Callable[[DeltaSource, Candidate[S]], Result],
    deltas: DeltaSource,
    candidate: Candidate[S],
    before: Result | None,
    missed: dict[str, Tensor],
) -> Result:
    """Run the next solver on the matrices that ``missed`` a check; return the result ``before`` with these replaced."""
    rows = torch.stack(list(missed.values())).any(0) if missed else None
    if before is None or rows is None or rows.ndim == 0 or bool(rows.all()):
        value, stats = attempt(deltas, candidate)
        stats = stats.read()
    else:  # matrices of a batch, with the batch's dimensions made one
        rows, value = rows.to(deltas.device), before[0]
        part, again = attempt(deltas.members(rows), candidate)
        value[rows] = part.to(value.dtype)
        stats = before[1].replaced(rows, again.read())
    if before is None:
        return value, stats
    return value, stats.after(before[1], f"{before[1].algorithm}: {before[1].describe(missed)}")
