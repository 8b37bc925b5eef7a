"""Merging methods, each standing on tensors alone; ``METHODS`` is the registry."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..errors import ConfigError, nearest, shown
from .iso_c import IsoC
from .iso_cts import IsoCTS
from .linear import Mean, TaskArithmetic
from .protocol import (
    Deltas,
    MergeStats,
    Method,
    NotFiniteError,
    OutOfRangeError,
    RowBlock,
    RowMap,
    RowSource,
    TensorDeltas,
    TensorSpec,
    as_deltas,
)

METHODS: dict[str, type] = {method.name: method for method in (IsoC, IsoCTS, Mean, TaskArithmetic)}

_PLAIN = (str, bytes, int, float, list, tuple, dict, set)

__all__ = [
    "METHODS",
    "Deltas",
    "IsoC",
    "IsoCTS",
    "Mean",
    "MergeStats",
    "Method",
    "NotFiniteError",
    "OutOfRangeError",
    "RowBlock",
    "RowMap",
    "RowSource",
    "TaskArithmetic",
    "TensorDeltas",
    "TensorSpec",
    "as_deltas",
    "make_method",
    "method_for",
]


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method ``name`` with ``options`` as its fields.

    Raises:
        ConfigError: unknown method, unknown option, option of another type, or a value out of range.
    """
    if name not in METHODS:
        raise ConfigError(f"method {shown(name)} is unknown{nearest(name, METHODS)}")
    known = {field.name: field for field in fields(METHODS[name])}
    for key, value in (options or {}).items():
        if key not in known:
            hint = nearest(key, known) if known else " (it has none)"
            raise ConfigError(f"option {shown(key)} of method {name!r} is unknown{hint}")
        default = known[key].default
        wanted = (float, int) if isinstance(default, float) else type(default)
        if default is None:
            # Set by the plan, or by who has a solver at hand; no word or number stands for one.
            wanted = (int, type(None)) if known[key].type == "int | None" else object
            if wanted is object and isinstance(value, _PLAIN):
                raise ConfigError(
                    f"option {key!r} of method {name!r} is {shown(value)}; it is an object, set in Python"
                )
        if not isinstance(value, wanted) or isinstance(value, bool):
            kind = "whole number" if default is None else type(default).__name__
            raise ConfigError(f"option {key!r} of method {name!r} is {shown(value)}; expected a {kind}")
    return METHODS[name](**(options or {}))


def method_for(method: Method, spec: TensorSpec, exclude: Sequence[str] = ()) -> Method:
    """``method``, or the mean where it takes no such tensor or a pattern of ``exclude`` or its own has the name."""
    excluded = any(fnmatch.fnmatchcase(spec.name, pattern) for pattern in (*exclude, *method.default_exclude))
    return method if method.accepts(spec) and not excluded else Mean()
