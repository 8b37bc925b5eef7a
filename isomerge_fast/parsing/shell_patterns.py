"""Match shell patterns of tensor names as ``fnmatch.fnmatchcase`` does, many patterns on many names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection
from functools import lru_cache

_WILDCARD = re.compile(r"[*?\[]")
# Lists of patterns that stay compiled: a merge has one for each expert, and two more.
MAX_LISTS = 4_096


class Globs:
    """Try patterns in their order."""

    def __init__(self, patterns: Collection[str]) -> None:
        self._names: dict[str, int] = {}
        self._others: list[tuple[int, Callable[[str], object]]] = []
        for index, pattern in enumerate(patterns):
            if _WILDCARD.search(pattern):
                self._others.append((index, _matcher(pattern)))
            else:
                self._names.setdefault(pattern, index)

    def first(self, name: str) -> int | None:
        """Return the index of the first pattern that matches a name."""
        place = self._names.get(name)
        for index, matches in self._others:
            if place is not None and place < index:
                break
            if matches(name):
                return index
        return place


# Patterns are compiled when they are first asked for.
globs_of = lru_cache(MAX_LISTS)(Globs)


def first_match(pattern: str, names: Collection[str]) -> str | None:
    """Return the first name that a pattern matches."""
    if not _WILDCARD.search(pattern):
        return pattern if pattern in names else None
    return next(filter(_matcher(pattern), names), None)


def _matcher(pattern: str) -> Callable[[str], object]:
    return re.compile(fnmatch.translate(pattern)).match
