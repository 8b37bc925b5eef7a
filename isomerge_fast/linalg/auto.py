"""Which solver a matrix gets, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError, nearest
from .gram_eigh import GramEigh
from .protocol import Solver
from .svd import FullSvd

PRECISIONS = ("default", "reference")


@dataclass(frozen=True)
class Choice:
    """A solver and the reason for it, as ``isomerge plan`` prints it."""

    solver: Solver
    reason: str


def choose(precision: str, dtype: torch.dtype) -> Choice:
    """The solver for matrices of ``dtype`` (the dtype they are computed in) at ``precision``.

    - ``"default"``: relative Frobenius error of the merged delta ≤ 1e-5 on full-rank fp32 input (held by tests);
    - ``"reference"``: full float64 SVDs, the slow judge.

    Raises:
        ConfigError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is unknown{nearest(precision, PRECISIONS)}")
    if precision == "reference":
        return Choice(FullSvd(), "precision is 'reference'")
    if dtype == torch.float64:
        return Choice(FullSvd(), "float64 input, beyond a Gram matrix")
    return Choice(GramEigh(), "resolves float32 input")
