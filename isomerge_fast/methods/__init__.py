"""Merging methods, each standing on tensors alone; ``METHODS`` is the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..errors import ConfigError, nearest, shown
from ..globs import globs_of
from ..values import refuse
from .base import Method, RowMap, read_option
from .elementwise import Elementwise
from .iso_c import IsoC
from .iso_cts import IsoCTS
from .linear import Linear, Mean, TaskArithmetic
from .source import DeltaSource, MemoryDeltas, RowBlock, TensorSpec, as_deltas
from .spectral import Spectral
from .stats import MergeStats, NotFiniteError, OutOfRangeError

METHODS: dict[str, type[Method]] = {method.name: method for method in (IsoC, IsoCTS, Mean, TaskArithmetic)}

__all__ = [
    "METHODS",
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
    "RowMap",
    "Spectral",
    "TaskArithmetic",
    "TensorSpec",
    "as_deltas",
    "given_method",
    "make_method",
    "method_for",
]


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method ``name`` with ``options`` as its fields.

    Raises:
        ConfigError: unknown method, unknown option, option of another type, or a value out of range.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(f"method {shown(name)} is unknown{nearest(name, METHODS)}")
    if not isinstance(options, Mapping | None):
        refuse(options, "options", "names with values, such as {common_fraction: 0.8}")
    known = {field.name: field for field in fields(METHODS[name])}
    read = {}
    for key, value in (options or {}).items():
        if key not in known:
            hint = nearest(key, known) if known else " (it has none)"
            raise ConfigError(f"option {shown(key)} of method {name!r} is unknown{hint}")
        read[key] = read_option(name, known[key], value)
    return METHODS[name](**read)


def given_method(method: str | Method, options: Mapping[str, Any]) -> Method:
    """The method that a caller names, with its options, or has made already.

    Raises:
        ConfigError: as ``make_method``; options beside a method that is made, or no method at all.
    """
    if isinstance(method, str):
        return make_method(method, options)
    if not isinstance(method, Method):
        refuse(method, "method", f"a name ({', '.join(METHODS)}) or a method object, such as IsoC()")
    if options:
        raise ConfigError(f"option {shown(next(iter(options)))}: options belong to a method given by name")
    return method


def method_for(method: Method, spec: TensorSpec, exclude: Sequence[str] = ()) -> Method:
    """``method``, or the mean where it takes no such tensor or a pattern of ``exclude`` or its own has the name."""
    place = globs_of((*exclude, *method.default_exclude)).first(spec.name)
    return method if method.accepts(spec) and place is None else Mean()
