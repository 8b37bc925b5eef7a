"""Define the errors that a user can act on, by their exit codes, and the functions that word their messages.

Every message names the file, tensor and shapes it is about; control characters in these are shown, not obeyed.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Sequence

# Problems in one message.
MAX_PROBLEMS = 20
# Names in one sentence, beside the number of the others.
MAX_LISTED = 6
# Notes, and characters of a note: some notes are made for every expert.
MAX_REMARKS, MAX_CHARACTERS = 500, 12_000


def visible(text: str, keep: str = "") -> str:
    """Return ``text`` with all that a terminal would obey or hide escaped as by ``repr``, but not those of ``keep``.

    These are escapes, line ends, controls, changes of direction and halves of surrogate pairs.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class IsomergeError(Exception):
    """Report an error that a user can mend; ``exit_code`` is what the command line returns.

    The message is one line, and one more for each of ``problems``: names from files cannot begin another line.
    """

    exit_code = 1
    kind = "error"

    def __init__(self, message: object = "", problems: Iterable[str] = ()) -> None:
        self.message, self.problems = str(message), list(problems)
        super().__init__(self.message, self.problems)

    def __str__(self) -> str:
        return "\n".join([visible(self.message), *(f"  - {visible(problem)}" for problem in self.problems)])


class ConfigError(IsomergeError, ValueError):
    """Report an option, a YAML key or a combination of them that cannot be honoured."""

    exit_code = 2
    kind = "config"


class InputError(IsomergeError, ValueError):
    """Report checkpoints that cannot be read, or that do not fit each other; ``problems`` lists them all."""

    exit_code = 3
    kind = "input"


class InputChangedError(InputError):
    """Report a file that is gone, changed or shorter since the merge was planned."""


class ResourceError(IsomergeError):
    """Report a lack of disk or memory, or a ceiling that is too low for this merge."""

    exit_code = 4
    kind = "resource"


class LostWritesError(ResourceError):
    """Report that writing back to the disk failed after the writes themselves had succeeded.

    Nothing that was written to the output under construction can be trusted, in memory or on the disk.
    """


class UnreadableError(ResourceError):
    """Report a file that cannot be read at this moment, or by this machine."""


class MissingPackageError(IsomergeError, ImportError):
    """Report a package that is not installed and needed on this machine; the message says what to install."""

    exit_code = 4
    kind = "resource"


class VerificationError(IsomergeError):
    """Report a finished output whose bytes or values are not what its manifest says."""

    exit_code = 5
    kind = "verification"


def first_of(problems: Sequence[str]) -> list[str]:
    """Return as many problems as one message holds, and a line with the number of the others."""
    more = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], *([f"… and {more} more"] if more > 0 else [])]


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence: as many as it has room for, and the number of the others."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def joined(words: Sequence[str], last: str) -> str:
    """Return words as a list in a sentence, with ``last``, which is "and" or "or", before the last word."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def bounded(remarks: Iterable[str]) -> Iterator[str]:
    """Yield remarks, which quote strangers' files, but no more and no longer ones than somebody reads."""
    remarks = list(remarks)
    for remark in remarks[:MAX_REMARKS]:
        yield shortened(remark, MAX_CHARACTERS)
    if len(remarks) > MAX_REMARKS:
        yield f"… and {len(remarks) - MAX_REMARKS} more"


# Our words, by other tools' names for them.
_OTHER_NAMES = {
    **dict.fromkeys(("alpha", "coefficient", "lambda", "scalingcoef", "scalingfactor"), "scaling"),
    **dict.fromkeys(("checkpoints", "finetuned", "models"), "experts"),
    **dict.fromkeys(("average", "linear"), "mean"),
    **dict.fromkeys(("check", "test", "validate"), "verify"),
    "gpu": "cuda",
    "merge": "run",
    "show": "report",
}


def nearest(word: object, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)``, or the list of known words. ``Iso_CTS`` is near to ``iso-cts``."""
    known = sorted(known)
    folded = {_folded(name): name for name in known}
    start = _folded(word[:SHOWN_CHARACTERS]) if isinstance(word, str) else ""
    start = other if (other := _OTHER_NAMES.get(start)) in folded else start
    close = difflib.get_close_matches(start, folded, n=1)
    return f" (did you mean {folded[close[0]]!r}?)" if close else f" (known: {', '.join(known)})"


def _folded(word: str) -> str:
    """Return a word without upper case, hyphens and underscores, which people mix up in names."""
    return word.casefold().replace("-", "").replace("_", "")


# A value in a message is cut to so many: a file may hold one of a megabyte, or a short text that unfolds to it.
SHOWN_CHARACTERS = 80
_SHORT = reprlib.Repr()
# Repr cuts out the middle; ``shown`` cuts off the end too, since a list of cut texts is long as well.
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 3 * SHOWN_CHARACTERS


def shown(value: object) -> str:
    """Return a value as Python writes it, cut to a readable length."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # of a number with thousands of digits, which Python does not write out
        text = "a number of thousands of digits"
    return shortened(text, SHOWN_CHARACTERS)


def shortened(text: str, most: int) -> str:
    """Return a text with its end cut off where it has more than ``most`` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"
