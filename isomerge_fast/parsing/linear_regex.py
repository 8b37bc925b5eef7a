"""Match names with regular expressions that a file brings, in time linear in name and expression.

Python's own matcher tries one way after the other: ``(a+)+b`` takes it hours for a name of forty letters. Whether a
name matches at all, the only question here, follows from the set of places in the expression that are reached after
each character (K. Thompson, "Regular expression search algorithm", CACM 11, 1968).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from functools import reduce

MAX_CHARACTERS, MAX_PLACES, MAX_DEPTH = 1_000, 5_000, 20

_PLAIN = re.compile(r"[\w.-]*")
_REPEAT = re.compile(r"(?P<sign>[*+?])|\{(?P<least>\d{1,4})(?P<comma>,(?P<most>\d{1,4})?)?\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
_ESCAPE = re.compile(r"\\(?:[dDwWsS]|[^\w])")

# Lays out a part of an expression: given the place that follows it, returns the place at which it begins.
_Part = Callable[[int], int]


class PatternError(ValueError):
    """Refuse an expression; the message continues a sentence that begins with it."""


def is_plain_name(pattern: str) -> bool:
    """Return whether a pattern is a name: its dots are dots, and it has no other special characters."""
    return _PLAIN.fullmatch(pattern) is not None


class NamePattern:
    """Match names from the start or from behind a dot, up to the end: ``(.*\\.)?(pattern)$``.

    An expression may have characters, classes, groups, alternatives, repetitions, ``^`` and ``$``, but nothing that
    looks around or back. Others, and absurdly large ones, are refused by a PatternError.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_CHARACTERS:
            raise PatternError(f"has {len(pattern)} characters; refused above {MAX_CHARACTERS}")
        self._pattern, self._position = pattern, 0
        whole = self._alternatives(0)
        if self._position < len(pattern):
            raise PatternError("is no regular expression (a closing parenthesis too many)")
        # By place: the test of its character and the next place, or the places that it reaches without a character,
        # each with the anchor that has to hold.
        self._characters: dict[int, tuple[re.Pattern[str], int]] = {}
        self._free: dict[int, list[tuple[int, str]]] = {}
        self._places = 1  # 0 is the end
        begin = whole(0)
        self._behind_a_dot = self._spread([begin], "")
        # Sets of places that were reached, numbered, and the number that each character leads to from each.
        self._numbers: dict[frozenset[int], int] = {}
        self._sets: list[frozenset[int]] = []
        self._steps: list[dict[str, int]] = []
        self._first = self._number(self._spread([begin], "^"))

    def matches(self, name: str) -> bool:
        """Return whether the name matches."""
        number = self._first
        for character in name:
            steps = self._steps[number]
            if character not in steps:
                steps[character] = self._step(number, character)
            number = steps[character]
        return 0 in self._spread(self._sets[number], "$" if name else "^$")

    def _step(self, number: int, character: str) -> int:
        tests = (self._characters[place] for place in self._sets[number] if place in self._characters)
        reached = [after for test, after in tests if test.fullmatch(character)]
        return self._number(self._spread(reached, "") | (self._behind_a_dot if character == "." else frozenset()))

    def _number(self, places: frozenset[int]) -> int:
        if places not in self._numbers:
            self._numbers[places] = len(self._sets)
            self._sets.append(places)
            self._steps.append({})
        return self._numbers[places]

    def _spread(self, places: Iterable[int], passable: str) -> frozenset[int]:
        """Return these places and all that they reach without a character, where the anchors in ``passable`` hold."""
        found, waiting = set(places), list(places)
        while waiting:
            for place, anchor in self._free.get(waiting.pop(), ()):
                if place not in found and (not anchor or anchor in passable):
                    found.add(place)
                    waiting.append(place)
        return frozenset(found)

    def _new_place(self) -> int:
        if self._places >= MAX_PLACES:
            raise PatternError("repeats more than is matched")
        self._places += 1
        return self._places - 1

    def _fork(self, *ways: tuple[int, str]) -> int:
        """Return a new place that leads to others without a character."""
        place = self._new_place()
        self._free[place] = [*ways]
        return place

    def _alternatives(self, depth: int) -> _Part:
        if depth > MAX_DEPTH:
            raise PatternError("is nested too deeply")
        parts = [self._sequence(depth)]
        while self._take("|"):
            parts.append(self._sequence(depth))
        return lambda after: self._fork(*((part(after), "") for part in parts))

    def _sequence(self, depth: int) -> _Part:
        parts: list[_Part] = []
        while self._position < len(self._pattern) and self._pattern[self._position] not in "|)":
            parts.append(self._repeated(self._one(depth)))
        return lambda after: reduce(lambda following, part: part(following), reversed(parts), after)

    def _one(self, depth: int) -> _Part:
        if self._take("("):
            if self._pattern.startswith("?", self._position) and not self._take("?:"):
                raise PatternError("has a group that begins with (?, which is not matched")
            inside = self._alternatives(depth + 1)
            if not self._take(")"):
                raise PatternError("is no regular expression (a parenthesis is not closed)")
            return inside
        for sign in "^$":
            if self._take(sign):
                if _REPEAT.match(self._pattern, self._position):
                    raise PatternError("is no regular expression (an anchor is repeated)")
                return lambda after: self._fork((after, sign))
        character = self._pattern[self._position]
        special = {"[": _CLASS, "\\": _ESCAPE}.get(character)
        match = special.match(self._pattern, self._position) if special else None
        if (special and match is None) or character in "*+?{":
            raise PatternError(
                f"is no regular expression that is matched (at {self._pattern[self._position :][:10]!r})"
            )
        text = match[0] if match else character if character == "." else re.escape(character)
        self._position += len(match[0]) if match else 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sets that may mean more in a future Python
                test = re.compile(text)
        except re.error as error:
            raise PatternError(f"is no regular expression ({error})") from error

        def lay_out(after: int) -> int:
            place = self._new_place()
            self._characters[place] = test, after
            return place

        return lay_out

    def _repeated(self, part: _Part) -> _Part:
        match = _REPEAT.match(self._pattern, self._position)
        if match is None:
            return part
        self._position = match.end()
        if self._take("+"):
            raise PatternError("has a possessive repetition, which is not matched")
        self._take("?")  # as few as possible: no other names match
        if _REPEAT.match(self._pattern, self._position):
            raise PatternError("is no regular expression (a repetition of a repetition)")
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(match["sign"], (0, None))
        if not match["sign"]:
            least = int(match["least"])
            most = least if match["comma"] is None else int(match["most"]) if match["most"] else None
        if most is not None and most < least:
            raise PatternError("is no regular expression (a repetition of fewer than its least)")

        def lay_out(after: int) -> int:
            end = after
            if most is None:
                after = self._fork((end, ""))
                self._free[after].append((part(after), ""))
            for _ in range((most or least) - least):
                after = self._fork((end, ""), (part(after), ""))
            for _ in range(least):
                after = part(after)
            return after

        return lay_out

    def _take(self, text: str) -> bool:
        """Return whether ``text`` comes next, and pass it if so."""
        found = self._pattern.startswith(text, self._position)
        self._position += len(text) if found else 0
        return found
