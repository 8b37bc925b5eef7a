"""Compare and show values of JSON settings."""

from __future__ import annotations

import hashlib
import json
from typing import Any

VALUE_CHARACTERS = 80
KEY_CHARACTERS = 200  # longer ones are no setting's


def is_off(value: Any) -> bool:
    """Return whether a setting is off: null, false, zero or empty."""
    return value is None or value is False or value == 0 or value in ("", [], {})


def same(one: Any, other: Any) -> bool:
    """Return whether two values mean the same: 1 is 1.0 and "1", and a list of one token is that token."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    for left, right in ((one, other), (other, one)):
        if isinstance(left, list) and not isinstance(right, list | dict):
            return len(left) == 1 and same(left[0], right)
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, str) != isinstance(other, str):
        text, number = (one, other) if isinstance(one, str) else (other, one)
        try:
            return isinstance(number, int | float) and float(text) == number
        except ValueError:
            return False
    return one == other or (one != one and other != other)  # NaN


def brief(value: Any) -> str:
    """Return a value as JSON, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= VALUE_CHARACTERS else text[: VALUE_CHARACTERS - 1] + "…"


def brief_key(key: str) -> str:
    """Return a key; if it is longer than real ones, its beginning and a hash that tells it from others."""
    if len(key) <= KEY_CHARACTERS:
        return key
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{key[:VALUE_CHARACTERS]}… ({len(key)} characters, {digest})"
