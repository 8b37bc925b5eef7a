"""Dense linear algebra, standing on tensors alone: the solvers that ``solver=`` takes, and what others build on."""

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
