"""Export the merging methods and what they are made of; ``registry`` has the methods by name."""

import warnings
from typing import Any

from .base import Method, RowwiseMerge
from .elementwise import Elementwise
from .iso_c import IsoC
from .iso_cts import IsoCTS
from .linear import Linear, Mean, TaskArithmetic
from .registry import METHODS, given_method, make_method, method_class, method_for, origins_of, register_method
from .source import DeltaSource, MemoryDeltas, RowBlock, TensorSpec, as_deltas
from .spectral import SingularValues, Spectral
from .stats import Check, MergeStats, NotFiniteError, OutOfRangeError

__all__ = [
    "METHODS",
    "Check",
    "DeltaSource",
    "Elementwise",
    "IsoC",
    "IsoCTS",
    "Linear",
    "Mean",
    "MemoryDeltas",
    "MergeStats",
    "Method",
    "NotFiniteError",
    "OutOfRangeError",
    "RowBlock",
    "RowwiseMerge",
    "SingularValues",
    "Spectral",
    "TaskArithmetic",
    "TensorSpec",
    "as_deltas",
    "given_method",
    "make_method",
    "method_class",
    "method_for",
    "origins_of",
    "register_method",
]


def __getattr__(name: str) -> Any:
    if name == "RowMap":  # as it was called before, for one release more
        warnings.warn("isomerge_fast.methods.RowMap is now RowwiseMerge", DeprecationWarning, stacklevel=2)
        return RowwiseMerge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
