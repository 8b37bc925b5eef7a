"""Check a config's shell patterns against tensor names: a pattern that matches nothing is a mistake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache

from ..config import MergeConfig
from ..errors import MAX_PROBLEMS, ConfigError, first_of, shown
from ..parsing.shell_patterns import first_match, globs_of

# Names that differ only in their numbers are one kind. So many kinds, and so many words of a pattern, are looked at
# for the nearest name; real models have some hundred kinds.
MAX_KINDS, MAX_WORDS = 2_000, 12
_WORD_CHARACTERS = 60


def rules_of(config: MergeConfig) -> list[tuple[str, list[str]]]:
    """Return every list of patterns: where it stands, and the patterns in the order in which they are tried."""
    found = [("overrides", [override.match for override in config.overrides]), ("exclude", list(config.exclude))]
    for expert, entry in zip(config.experts, config.weights or [], strict=False):
        if isinstance(entry, list):
            found.append((f"weights of {expert}", [rule.match for rule in entry]))
    return found


def require_matches(
    rules: Iterable[tuple[str, Iterable[str]]], names: Collection[str], left_out: Collection[str] = ()
) -> None:
    """Raise ConfigError for patterns that match none of ``names``, with the names nearest to them. ``*`` always does.

    ``rules`` are pairs of where patterns stand and the patterns. A pattern for ``left_out``, names that would be taken
    with another ``on_extra``, is no mistake.
    """
    places: dict[str, list[str]] = {}
    for where, patterns in rules:
        for pattern in patterns:
            if pattern != "*" and where not in places.setdefault(pattern, []):
                places[pattern].append(where)
    known = {*names, *left_out} if places else ()
    missed = [pattern for pattern in places if first_match(pattern, known) is None]
    kinds = _kinds_of(names) if missed else []
    problems = [
        f"{' and '.join(places[pattern])}: {shown(pattern)} matches no tensor"
        + (f" ({_nearest_name(pattern, kinds)}{_mended(pattern, kinds)})" if index < MAX_PROBLEMS else "")
        for index, pattern in enumerate(missed)
    ]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} patterns match no tensor:", first_of(problems))


def idle_patterns(config: MergeConfig, merged: Collection[str], copied: Collection[str]) -> Iterator[str]:
    """Yield the patterns that match something but change nothing, and why.

    ``merged`` are the tensors that a method merges, ``copied`` all others, those that are left out too.
    """
    places: dict[str, list[str]] = {}
    overrides = [override.match for override in config.overrides]
    for where, patterns in rules_of(config):
        before = overrides if where == "exclude" else []
        tried = globs_of((*before, *patterns))
        taking = {tried.first(name) for name in merged} if patterns else set()
        for place, pattern in enumerate(patterns, len(before)):
            if pattern != "*" and place not in taking:
                places.setdefault(f"{shown(pattern)} {_why_idle(pattern, merged, copied)}", []).append(where)
    for what, where in places.items():
        yield f"{' and '.join(where)}: {what}"


def _why_idle(pattern: str, merged: Collection[str], copied: Collection[str]) -> str:
    taken = first_match(pattern, merged)
    if taken is None:
        return f"matches only tensors that are not merged, such as {first_match(pattern, copied)!r}"
    return f"changes nothing: what is tried before it takes all that it matches, such as {taken!r}"


def _kinds_of(names: Iterable[str]) -> list[str]:
    """Return the first name of every kind."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), name)
        if len(kinds) == MAX_KINDS:
            break
    return list(kinds.values())


_REGULAR = re.compile(r"^\^|^\.[*+]|\$$|\\[.dw]|[)\]][*+]")


def _mended(pattern: str, names: Sequence[str]) -> str:
    """Return ``; '*mlp*' would match`` where a small change makes the pattern match; else nothing.

    The pattern may be a regular expression, a part of a name, of another case, or have spaces or quotes about it.
    """
    glob = pattern[: MAX_WORDS * _WORD_CHARACTERS].strip(" \t\"'")
    if _REGULAR.search(glob) and first_match(glob, names) is None:
        glob = re.sub(r"\\[dw][+*]?|\[0-9\][+*]|\.[*+]", "*", glob.strip("^$")).replace("\\.", ".")
    tried = [each for start in (glob, glob.lower()) for each in (start, f"{start}*", f"*{start}", f"*{start}*")]
    tried = [re.sub(r"\*+", "*", each) for each in tried if each.strip("*.")]
    found = next((each for each in tried if first_match(each, names) is not None), None)
    return "" if found is None else f"; {shown(found)} would match"


def _nearest_name(pattern: str, names: Sequence[str]) -> str:
    """Return ``nearest: 'x'``, the name whose words are most like those of the pattern, wildcards aside."""
    if not names:
        return "there is none"
    literal = re.sub(r"\[(.)\]", r"\1", pattern[: MAX_WORDS * _WORD_CHARACTERS])  # as ``glob.escape`` writes it
    words = [word[:_WORD_CHARACTERS] for word in re.findall(r"[^.*?\[\]/\s]+", literal)][:MAX_WORDS]

    @cache
    def likeness(word: str, other: str) -> float:
        if word == other:
            return 1.0
        if word.isdecimal() or other.isdecimal():
            return 0.9 if word.isdecimal() and other.isdecimal() else 0.0
        part = 0.9 if min(len(word), len(other)) > 2 and (word in other or other in word) else 0.0
        return max(part, difflib.SequenceMatcher(None, word, other).ratio())

    def score(name: str) -> tuple[float, int]:
        others = [part[:_WORD_CHARACTERS].lower() for part in name.split(".")][: 2 * MAX_WORDS]
        return sum(len(word) * max(likeness(word.lower(), part) for part in others) for word in words), -len(name)

    return f"nearest: {max(names, key=score)!r}"
