"""Match names with regular expressions that a file brings, in time linear in name and expression.

Python's own matcher tries one way after the other: ``(a+)+b`` takes it hours for a name of forty letters. Whether a
name matches at all, the only question here, follows from the set of places in the expression that are reached after
each character (K. Thompson, "Regular expression search algorithm", CACM 11, 1968).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

MAX_CHARACTERS, MAX_PLACES, MAX_DEPTH = 1_000, 5_000, 20

_PLAIN = re.compile(r"[\w.-]*")
_REPEAT = re.compile(r"(?P<sign>[*+?])|\{(?P<least>\d{1,4})(?P<comma>,(?P<most>\d{1,4})?)?\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
_ESCAPE = re.compile(r"\\(?:[dDwWsS]|[^\w])")


class PatternError(ValueError):
    """Refuse an expression; the message continues a sentence that begins with it."""


def is_plain_name(pattern: str) -> bool:
    """Return whether a pattern is a name: its dots are dots, and it has no other special characters."""
    return _PLAIN.fullmatch(pattern) is not None


class NamePattern:
    """Match names from the start or from behind a dot, up to the end: ``(.*\\.)?(pattern)$``.

    An expression may have characters, classes, groups, alternatives, repetitions, ``^`` and ``$``, but nothing that
    looks around or back.

    Raises:
        PatternError: no regular expression, one that has more than that, or an absurdly large one.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_CHARACTERS:
            raise PatternError(f"has {len(pattern)} characters; refused above {MAX_CHARACTERS}")
        parser = _Parser(pattern)
        tree = parser.alternatives(0)
        if parser.position < len(pattern):
            raise PatternError("is no regular expression (a closing parenthesis too many)")
        # By place: the test of its character and the next place, or the places that it reaches without a character,
        # each with the anchor that has to hold.
        self._characters: dict[int, tuple[re.Pattern[str], int]] = {}
        self._free: dict[int, list[tuple[int, str]]] = {}
        self._places = 1  # 0 is the end
        begin = self._build(tree, 0)
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

    def _build(self, node: tuple[Any, ...], after: int) -> int:
        """Return the place at which ``node`` begins, when ``after`` follows it."""
        kind, *content = node
        if kind == "sequence":
            for child in reversed(content):
                after = self._build(child, after)
            return after
        if kind == "repeat":
            child, least, most = content
            if most is None:
                loop = self._new_place()
                self._free[loop] = [(after, ""), (self._build(child, loop), "")]
                after = loop
            else:
                end = after
                for _ in range(most - least):
                    optional = self._new_place()
                    self._free[optional] = [(end, ""), (self._build(child, after), "")]
                    after = optional
            for _ in range(least):
                after = self._build(child, after)
            return after
        place = self._new_place()
        if kind == "character":
            self._characters[place] = (content[0], after)
        elif kind == "anchor":
            self._free[place] = [(after, content[0])]
        else:
            self._free[place] = [(self._build(child, after), "") for child in content]
        return place


class _Parser:
    """Parse an expression into a tree.

    Its nodes are ("alternatives", …), ("sequence", …), ("repeat", child, least, most or None), ("character", test) and
    ("anchor", sign).
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.position = 0

    def alternatives(self, depth: int) -> tuple[Any, ...]:
        if depth > MAX_DEPTH:
            raise PatternError("is nested too deeply")
        found = [self._sequence(depth)]
        while self._take("|"):
            found.append(self._sequence(depth))
        return ("alternatives", *found)

    def _sequence(self, depth: int) -> tuple[Any, ...]:
        found: list[tuple[Any, ...]] = []
        while self.position < len(self._pattern) and self._pattern[self.position] not in "|)":
            found.append(self._repeated(self._one(depth)))
        return ("sequence", *found)

    def _one(self, depth: int) -> tuple[Any, ...]:
        if self._take("("):
            if self._pattern.startswith("?", self.position) and not self._take("?:"):
                raise PatternError("has a group that begins with (?, which is not matched")
            inside = self.alternatives(depth + 1)
            if not self._take(")"):
                raise PatternError("is no regular expression (a parenthesis is not closed)")
            return inside
        for sign in "^$":
            if self._take(sign):
                return ("anchor", sign)
        character = self._pattern[self.position]
        special = {"[": _CLASS, "\\": _ESCAPE}.get(character)
        match = special.match(self._pattern, self.position) if special else None
        if (special and match is None) or character in "*+?{":
            raise PatternError(f"is no regular expression that is matched (at {self._pattern[self.position :][:10]!r})")
        text = match[0] if match else character if character == "." else re.escape(character)
        self.position += len(match[0]) if match else 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sets that may mean more in a future Python
                return ("character", re.compile(text))
        except re.error as error:
            raise PatternError(f"is no regular expression ({error})") from error

    def _repeated(self, node: tuple[Any, ...]) -> tuple[Any, ...]:
        match = _REPEAT.match(self._pattern, self.position)
        if match is None:
            return node
        if node[0] == "anchor":
            raise PatternError("is no regular expression (an anchor is repeated)")
        self.position = match.end()
        if self._take("+"):
            raise PatternError("has a possessive repetition, which is not matched")
        self._take("?")  # as few as possible: no other names match
        if _REPEAT.match(self._pattern, self.position):
            raise PatternError("is no regular expression (a repetition of a repetition)")
        if match["sign"]:
            return ("repeat", node, *{"*": (0, None), "+": (1, None), "?": (0, 1)}[match["sign"]])
        least = int(match["least"])
        most = least if match["comma"] is None else int(match["most"]) if match["most"] else None
        if most is not None and most < least:
            raise PatternError("is no regular expression (a repetition of fewer than its least)")
        return ("repeat", node, least, most)

    def _take(self, text: str) -> bool:
        """Return whether ``text`` comes next, and pass it if so."""
        found = self._pattern.startswith(text, self.position)
        self.position += len(text) if found else 0
        return found
