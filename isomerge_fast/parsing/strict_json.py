"""Read JSON that strangers wrote, strictly: headers, indexes, settings, manifests."""

from __future__ import annotations

import json
from typing import Any

from ..errors import InputError, shown
from .file_formats import PULL, is_pointer

MAX_INDEXED = 1_000_000  # names in an index
MAX_CONFIG_DEPTH = 100  # settings are copied and written by recursion


def parse_json(data: bytes, what: str, *, most_values: int, as_python: bool = False) -> Any:
    """Return the value of a JSON text; refuse duplicate keys, NaN literals and broken escapes.

    Texts of more than ``most_values`` are refused before they are parsed. (Parsed, ``[[],[],…`` takes 25 times its own
    bytes.) With ``as_python`` the literals NaN, Infinity and -Infinity are read too, as Python's json does.
    """
    # Every value but a container's first follows a comma. Those in texts count too, and texts have few.
    if data.count(b",") + data.count(b"[") + data.count(b"{") > most_values:
        raise InputError(f"{what}: more than {most_values} values; refused")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                raise InputError(f"{what}: key {shown(key)} occurs twice")
            result[key] = value
        return result

    def constant(literal: str) -> float:
        if not as_python:
            raise InputError(f"{what}: {literal} is not JSON")
        return float(literal)

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text, and not to be written
        return value
    except UnicodeEncodeError as error:
        raise InputError(f"{what}: half of a surrogate pair ({error.object[error.start]!r})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise InputError(f"{what}: nested too deeply") from error
    except InputError:
        raise
    except ValueError as error:
        if is_pointer(data):
            raise InputError(f"{what}: a Git LFS pointer, not the file itself; {PULL}") from error
        raise InputError(f"{what}: not JSON ({error})") from error


def parse_settings(
    data: bytes, what: str, *, most_values: int = MAX_INDEXED, as_python: bool = False
) -> dict[str, Any]:
    """Return a JSON object, nested no deeper than it can be copied. The arguments are those of ``parse_json``."""
    settings = parse_json(data, what, most_values=most_values, as_python=as_python)
    if not isinstance(settings, dict):
        raise InputError(f"{what}: not a JSON object")
    level: list[Any] = [settings]
    for _ in range(MAX_CONFIG_DEPTH):
        containers = (node for node in level if isinstance(node, dict | list))
        level = [child for node in containers for child in (node.values() if isinstance(node, dict) else node)]
    if level:
        raise InputError(f"{what}: nested too deeply")
    return settings
