"""Read the values that people give for settings, in YAML, on a command line and in Python alike.

A reader takes a value and its name in messages (``m.yml: scaling``), and returns the value that is meant: texts that
YAML or a shell makes of numbers (``8e-1``) and numpy's scalars are numbers too. Any other value raises a ConfigError
with the key, the value and what is expected.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set, ValuesView
from contextlib import suppress
from typing import Any, NoReturn

from ..errors import ConfigError, nearest, shown

_YES = ("true", "yes", "on")
_NO_FLAG = ", not true or false"
Reader = Callable[[Any, str], Any]

LARGEST_WHOLE = 2**63 - 1
DTYPES = ("float64", "float32", "float16", "bfloat16")
# By their other names.
_DTYPES_MEANT = {
    **dict.fromkeys(("bf16", "bfloat"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half", "float-16"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "single"), "float32"),
    **dict.fromkeys(("fp64", "f64", "double"), "float64"),
}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def refuse(value: Any, what: str, expected: str) -> NoReturn:
    """Raise the ConfigError of a value that is not what is expected."""
    raise ConfigError(f"{what} is {shown(value)}; expected {expected}")


def number(value: Any, what: str, least: float = -math.inf) -> float:
    """Return a finite number, ``least`` or more; a text may hold it, as YAML reads 1e-3 as one."""
    plain = _plain_number(value)
    if plain is None:
        refuse(value, what, "a number" + _NO_FLAG * isinstance(value, bool))
    try:
        found = float(plain)
    except ValueError:
        refuse(value, what, "a number")
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        refuse(value, what, "a finite number")
    if found < least:
        refuse(value, what, f"a number, {least:g} or more")
    return found


def whole_number(value: Any, what: str, least: int = -LARGEST_WHOLE, most: int = LARGEST_WHOLE) -> int:
    """Return a whole number of 63 bits, from ``least`` to ``most``; 1e3 is one."""
    try:
        found = _whole(_plain_number(value))
    except ValueError:
        found = None
    if found is None or not least <= found <= most:
        low = f", {least} or more" if least >= 0 else ""
        high = f", {most} at most" if found is not None and found > most else ""
        refuse(value, what, f"a whole number{low}{high}" + _NO_FLAG * isinstance(value, bool))
    return found


def _whole(plain: int | float | str | None) -> int | None:
    if isinstance(plain, str):
        try:
            return int(plain)
        except ValueError:
            plain = float(plain)
    if isinstance(plain, float):
        return int(plain) if plain.is_integer() else None
    return plain


def _plain_number(value: Any) -> int | float | str | None:
    """Return a value that Python may read as a number, and None for others; numpy's scalars and tensors give theirs."""
    value = _plain_scalar(value)
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def _plain_scalar(value: Any) -> Any:
    """Return the number in a numpy scalar or a tensor, None where that holds several, and other values as they are."""
    if isinstance(value, str | int | float) or not callable(item := getattr(value, "item", None)):
        return value
    try:
        return item()
    except Exception:  # several numbers, or none
        return None


def flag(value: Any, what: str) -> bool:
    """Return true or false; quoted too, and 1 or 0."""
    plain = _plain_scalar(value)
    if isinstance(plain, int) and plain in (0, 1):
        return bool(plain)
    word = plain.lower() if isinstance(plain, str) else ""
    if word in (*_YES, "false", "no", "off"):
        return word in _YES
    refuse(value, what, "true or false")


def word(value: Any, what: str) -> str:
    """Return a text."""
    if not isinstance(value, str):
        refuse(value, what, "a word")
    return value


def pattern(value: Any, what: str) -> str:
    """Return a shell pattern of names: an empty one matches nothing."""
    if not isinstance(value, str) or not value:
        refuse(value, what, "a pattern of tensor names, such as '*lm_head*'")
    return value


def path_text(value: Any, what: str, kind: str = "a path") -> str:
    """Return a path as text."""
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(found, str):
        refuse(value, what, kind)
    return found


def size(value: Any, what: str) -> int:
    """Return the bytes of ``8GiB``, ``600 MB`` or a plain number."""
    plain = _plain_number(value)
    text = str(int(plain)) if isinstance(plain, int | float) and 0 <= plain <= 2**63 else plain
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{what} {shown(value)} is not a size such as 8GiB or 600MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def dtype_name(value: Any, what: str) -> str:
    """Return the name of a dtype that outputs may have, given as torch's or numpy's dtype or by its name."""
    name = str(value) if "dtype" in type(value).__name__.lower() else value  # torch's and numpy's
    name = name.removeprefix("torch.") if isinstance(name, str) else name
    if not isinstance(name, str) or name not in DTYPES:
        meant = _DTYPES_MEANT.get(name.lower()) if isinstance(name, str) else None
        hint = f" (did you mean {meant!r}?)" if meant else nearest(name, DTYPES)
        raise ConfigError(f"{what} {shown(value)} is unknown{hint}")
    return name


def list_of(read: Reader, expected: str) -> Reader:
    """Return the reader of a list."""
    return lambda value, what: [
        read(item, f"{what}[{index}]") for index, item in enumerate(listed(value, what, expected))
    ]


def listed(value: Any, what: str, expected: str) -> Iterable[Any]:
    """Return the values of a list, whatever kind of list it is."""
    if not is_list(value):
        refuse(value, what, expected)
    with suppress(Exception):  # no array, or one without numbers
        return value.tolist()
    return value


def is_list(value: Any) -> bool:
    """Return whether a value lists others: a list, a tuple, an iterator or an array, but no text or mapping."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        return False
    shape = getattr(value, "shape", None)
    return isinstance(value, Sequence | Set | Iterator | ValuesView) or (isinstance(shape, tuple) and len(shape) > 0)
