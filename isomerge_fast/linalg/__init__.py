"""Export the solvers that ``solver=`` takes and the protocols of a solver; both stand on tensors alone."""

import warnings
from typing import Any

from .filtered import SpectralFilter
from .gram_eigh import GramEigh
from .polar_express import PolarExpress
from .polar_gram import GramNewtonSchulz
from .protocol import Factorization, PolarSolver, PolarStats, Solver, Subspace
from .subspace_chebyshev import ChebyshevSubspace
from .svd import FullSvd

__all__ = [
    "ChebyshevSubspace",
    "Factorization",
    "FullSvd",
    "GramEigh",
    "GramNewtonSchulz",
    "PolarExpress",
    "PolarSolver",
    "PolarStats",
    "Solver",
    "SpectralFilter",
    "Subspace",
]


def __getattr__(name: str) -> Any:
    if name == "Qdwh":  # for one release more
        warnings.warn("linalg.Qdwh is deprecated: it gives PolarExpress", DeprecationWarning, stacklevel=2)
        return PolarExpress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
