"""Export the solvers that ``solver=`` takes and the protocols of a solver; both stand on tensors alone."""

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
    "Subspace",
]
