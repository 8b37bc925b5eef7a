"""Canonical JSON made part by part: of a model's tensors, neither values nor text are ever held in whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

# Of a block: 5 to 50 kB.
PARTS_A_BLOCK = 100


class Made(Mapping[str, Any]):
    """A mapping whose values are made when they are asked for, and kept nowhere."""

    def __init__(self, keys: Collection[str], make: Callable[[str], Any]) -> None:
        self._keys, self._make = keys, make

    def __getitem__(self, key: str) -> Any:
        return self._make(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def json_blocks(value: Any, indent: int = 1) -> Iterator[bytes]:
    """Yield the bytes of ``to_json(value, indent)``, block by block.

    Mappings, ``Made`` ones too, are walked value by value and lists item by item. (Items are plain, and written as a
    whole, which is twice as fast.)
    """
    parts: list[str] = []
    for part in _parts(value, indent, "\n"):
        parts.append(part)
        if len(parts) == PARTS_A_BLOCK:
            yield "".join(parts).encode()
            parts.clear()
    yield ("".join(parts) + "\n").encode()


def _parts(value: Any, indent: int, line: str) -> Iterator[str]:
    """Yield one value as text. ``line``: a line's end, and by how much the next one is indented."""
    inner = line + " " * indent
    if isinstance(value, Mapping) and value:
        opening = "{"
        for key in sorted(value):
            yield f"{opening}{inner}{json.dumps(key, ensure_ascii=False)}: "
            yield from _parts(value[key], indent, inner)
            opening = ","
        yield line + "}"
    elif isinstance(value, list | tuple) and value:
        opening = "["
        for item in value:
            # Every line's end is one of the layout: within strings they are escaped.
            text = json.dumps(item, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)
            yield opening + inner + text.replace("\n", inner)
            opening = ","
        yield line + "]"
    else:
        yield json.dumps({} if isinstance(value, Mapping) else value, ensure_ascii=False, allow_nan=False)
