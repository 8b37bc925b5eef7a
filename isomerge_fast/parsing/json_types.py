"""Check parsed JSON against Python's own types, so that one TypedDict serves this check, the code and type checkers."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NotRequired, get_args, get_origin, is_typeddict

# JSON has no bounds; numbers that are counted and compared do.
_BOUNDS = {int: 2**63, float: sys.float_info.max}


def check(value: Any, kind: Any, what: str) -> None:
    """Raise ValueError, naming the place, where a value is not of a type.

    ``kind`` is a TypedDict (its other keys are ignored), a dataclass (other keys are refused), list[…], dict[str, …], a
    union, Any or a scalar; or one of these, Annotated with functions (value, what) that raise ValueError too. A bool is
    no number, and a float may be written as an int. ``what`` names the value in messages.
    """
    if kind is Any:
        return
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if outer is Annotated:
        check(value, inner[0], what)
        for checks in inner[1:]:
            checks(value, what)
    elif outer in (UnionType, typing.Union):
        _check_union(value, inner, what)
    elif outer is list:
        _expect(isinstance(value, list), value, "a list", what)
        for index, item in enumerate(value):
            check(item, inner[0], f"{what}[{index}]")
    elif outer is dict:
        _expect(isinstance(value, dict), value, "an object", what)
        for key, item in value.items():
            check(item, inner[1], f"{what}[{key!r}]")
    elif is_typeddict(kind) or dataclasses.is_dataclass(kind):
        _check_keys(value, kind, what)
    else:
        _expect(type(value) is kind or (type(value), kind) == (int, float), value, kind, what)
        if kind in _BOUNDS:
            _expect(abs(value) <= _BOUNDS[kind], value, "within bounds", what)


def _check_union(value: Any, kinds: tuple[Any, ...], what: str) -> None:
    complaints = []
    for kind in kinds:
        try:
            check(value, kind, what)
            return
        except ValueError as error:
            complaints.append(str(error))
    # A complaint about a place inside the value is from the alternative that was meant.
    raise ValueError(next((text for text in complaints if not text.startswith(f"{what} is")), complaints[0]))


def _check_keys(value: Any, kind: Any, what: str) -> None:
    _expect(isinstance(value, dict), value, "an object", what)
    known = _keys(kind)
    for key, (inner, is_required) in known.items():
        if key in value:
            check(value[key], inner, f"{what}.{key}")
        elif is_required:
            raise ValueError(f"{what} has no {key!r}")
    for key in () if is_typeddict(kind) else value:
        if key not in known:
            raise ValueError(f"{what} has an unknown key {key!r}")


@cache
def _keys(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Return the type of each key's value, and whether the key is required."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        return {
            key: (get_args(hint)[0], False) if get_origin(hint) is NotRequired else (hint, True)
            for key, hint in hints.items()
        }
    missing = dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(kind)
    }


def _expect(holds: bool, value: Any, wanted: Any, what: str) -> None:
    """Raise ValueError unless ``holds``. ``wanted`` is a type, or words."""
    if not holds:
        shown = json.dumps(value) if isinstance(value, str | int | float | NoneType) else _name(type(value))
        raise ValueError(f"{what} is {shown[:60]}, not {wanted if isinstance(wanted, str) else _name(wanted)}")


def _name(kind: Any) -> str:
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false", NoneType: "null"}
    return {**names, dict: "an object", list: "a list"}.get(kind, str(kind))
