"""Write and read the JSON files of an output: canonical text, made part by part, that may end in its own checksum.

Of a model's tensors, neither the values nor the text are ever held in whole.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

from ...errors import InputError, VerificationError
from ..io.checksum import Checksum
from ..io.direct_io import disk_blocks
from ..io.writer import write_blocks_durably
from ..layout import parse_settings

PARTS_A_BLOCK = 100  # a block has 5 to 50 kB
_DIGEST = re.compile(rb',\n "digest": "([0-9a-f]{32})"\n}\n\Z')
_MOST_DIGEST_BYTES = 64
_END = b"\n}\n"
MOST_VALUES = 10_000_000  # a report of 45,000 tensors of eight experts has 900,000
# On one line; ``json.dumps`` would make one every time, which takes longer than the JSON of a tensor. To look for
# values that are parts of themselves, which none are, takes a tenth of the time.
_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, check_circular=False)


def to_json(value: Any, indent: int | None = 1) -> bytes:
    """Return ``value`` as JSON, the same bytes every time; raise ValueError for NaN and Infinity."""
    text = _ENCODER.encode(value) if indent is None else _text(value, indent, "\n")
    return f"{text}\n".encode()


class LazyMapping(Mapping[str, Any]):
    """Make the values of a mapping when they are asked for, and keep none."""

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

    Mappings, lazy ones too, are walked value by value and lists item by item. (The values of lazy ones, and items, are
    plain and made as a whole, which is faster.)
    """
    parts: list[str] = []
    for part in _parts(value, indent, "\n"):
        parts.append(part)
        if len(parts) == PARTS_A_BLOCK:
            yield "".join(parts).encode()
            parts.clear()
    yield ("".join(parts) + "\n").encode()


def _parts(value: Any, indent: int, line: str) -> Iterator[str]:
    """Yield one value as text. ``line`` is a line's end with the indentation of the next line."""
    inner = line + " " * indent
    if isinstance(value, Mapping) and value:
        opening = "{"
        for key in sorted(value):
            beginning, opening = f"{opening}{inner}{encode_basestring(key)}: ", ","
            item = value[key]
            if isinstance(value, LazyMapping) or not isinstance(item, Mapping | list | tuple):
                yield beginning + _text(item, indent, inner)
            else:
                yield beginning
                yield from _parts(item, indent, inner)
        yield line + "}"
    elif isinstance(value, list | tuple) and value:
        opening = "["
        for item in value:
            yield opening + inner + _text(item, indent, inner)
            opening = ","
        yield line + "]"
    else:
        yield _text({} if isinstance(value, Mapping) else value, indent, line)


def _text(value: Any, indent: int, line: str) -> str:
    """Return a plain value as ``json.dumps`` has it, which takes 13 us for a tensor's report, and this 8."""
    kind = type(value)
    if kind is str:
        return encode_basestring(value)
    if kind is int or (kind is float and math.isfinite(value)):
        return repr(value)
    if isinstance(value, dict | list | tuple) and value:
        inner = line + " " * indent
        if isinstance(value, dict):
            items = [f"{encode_basestring(key)}: {_text(value[key], indent, inner)}" for key in sorted(value)]
            return f"{{{inner}{f',{inner}'.join(items)}{line}}}"
        if {*map(type, value)} == {float} and all(map(math.isfinite, value)):
            items = [*map(repr, value)]
        else:
            items = [_text(item, indent, inner) for item in value]
        return f"[{inner}{f',{inner}'.join(items)}{line}]"
    return _ENCODER.encode(value)


def write_with_digest(path: Path, text: Iterable[bytes]) -> str:
    """Write an object's indented JSON durably, with its checksum added as the last key, ``digest``; return that."""
    running = Checksum()
    write_blocks_durably(path, _with_digest(text, running))
    return running.text


def _with_digest(text: Iterable[bytes], running: Checksum) -> Iterator[bytes]:
    held = b""
    for block in text:
        whole = held + block
        held = whole[-len(_END) :]
        running.update(whole[: -len(_END)])
        yield whole[: -len(_END)]
    assert held == _END
    yield f',\n "digest": "{running.text}"\n}}\n'.encode()


def read_with_digest(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return an object as it is on the disk, and what is wrong with its digest, if anything."""
    try:
        data = b"".join(map(bytes, disk_blocks(path)))
        value = parse_settings(data, str(path), most_values=MOST_VALUES)
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read ({error.strerror})") from error
    except InputError as error:
        raise VerificationError(str(error)) from error
    digest = _DIGEST.search(data, max(0, len(data) - _MOST_DIGEST_BYTES))
    if digest is None:
        return value, f"{path}: was changed after the merge wrote it (it does not end in a digest)"
    if Checksum([memoryview(data)[: digest.start()]]).text != digest[1].decode():
        return value, f"{path}: was changed after the merge wrote it (its digest is of another text)"
    return value, None
