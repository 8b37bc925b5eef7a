"""What may go wrong, by the exit code it ends with. Every message names the file, tensor and shapes it is about, and
whatever stands in these is shown, not obeyed.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Sequence

# So many problems are told of in one message.
MAX_PROBLEMS = 20
# So many names stand in one sentence, beside how many more there are.
MAX_LISTED = 6
# Of what is worth knowing and no error, whatever the files are: some notes there are for each expert.
MAX_REMARKS, MAX_CHARACTERS = 500, 12_000


def visible(text: str, keep: str = "") -> str:
    """Return ``text`` with all that a terminal would obey or hide (escapes, line ends, controls, changes of direction,
    halves of surrogate pairs) written as ``repr`` writes it, but for the characters of ``keep``.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class IsomergeError(Exception):
    """Base of the errors a user can mend; ``exit_code`` is what the command line returns.

    The message is one line, and one more for each of ``problems``: names from files cannot begin another.
    """

    exit_code = 1
    kind = "error"

    def __init__(self, message: object = "", problems: Iterable[str] = ()) -> None:
        self.message, self.problems = str(message), list(problems)
        super().__init__(self.message, self.problems)

    def __str__(self) -> str:
        return "\n".join([visible(self.message), *(f"  - {visible(problem)}" for problem in self.problems)])


class ConfigError(IsomergeError, ValueError):
    """An option, a YAML key or a combination of them that cannot be honoured."""

    exit_code = 2
    kind = "config"


class InputError(IsomergeError, ValueError):
    """A checkpoint that cannot be read, or checkpoints that do not fit each other; ``problems`` lists all of it."""

    exit_code = 3
    kind = "input"


class InputChangedError(InputError):
    """A file that is not what it was when the merge was planned: gone, changed, or shorter."""


class ResourceError(IsomergeError):
    """Out of disk or memory, or a ceiling that is too low for this merge."""

    exit_code = 4
    kind = "resource"


class LostWritesError(ResourceError):
    """Writing back to the disk failed after the writes themselves had succeeded: nothing that was written to the output
    under construction is to be believed, in memory or on the disk.
    """


class UnreadableError(ResourceError):
    """A file that cannot be read at this moment, or by this machine."""


class MissingPackageError(IsomergeError, ImportError):
    """A package that this machine needs is not installed; the message says what to install."""

    exit_code = 4
    kind = "resource"


class VerificationError(IsomergeError):
    """A finished output whose bytes or values are not what its manifest says."""

    exit_code = 5
    kind = "verification"


def first_of(problems: Sequence[str]) -> list[str]:
    """Return as many problems as one message tells of, and how many there are beside them."""
    more = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], *([f"… and {more} more"] if more > 0 else [])]


def listed(names: Sequence[str]) -> str:
    """Return names one after the other, as many as one sentence has room for, and how many there are beside them."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def bounded(remarks: Iterable[str]) -> Iterator[str]:
    """Yield remarks, which hold what strangers' files say, as many and as long as somebody reads."""
    remarks = list(remarks)
    for remark in remarks[:MAX_REMARKS]:
        yield remark if len(remark) <= MAX_CHARACTERS else f"{remark[: MAX_CHARACTERS - 1]}…"
    if len(remarks) > MAX_REMARKS:
        yield f"… and {len(remarks) - MAX_REMARKS} more"


# What others call it.
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
    """`` (did you mean 'x'?)``, or the list of what is known. ``Iso_CTS`` is near to ``iso-cts``."""
    known = sorted(known)
    folded = {_folded(name): name for name in known}
    start = _folded(word[:SHOWN_CHARACTERS]) if isinstance(word, str) else ""
    start = other if (other := _OTHER_NAMES.get(start)) in folded else start
    close = difflib.get_close_matches(start, folded, n=1)
    return f" (did you mean {folded[close[0]]!r}?)" if close else f" (known: {', '.join(known)})"


def _folded(word: str) -> str:
    """Return a word without what people mix up in names: upper case, hyphens and underscores."""
    return word.casefold().replace("-", "").replace("_", "")


# Of a value that a file holds, in a message: such a value may be a megabyte long, or a short text that unfolds to it.
SHOWN_CHARACTERS = 80
_SHORT = reprlib.Repr()
# It cuts out the middle, and what is left is cut at its end: a list of cut texts is long as well.
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 3 * SHOWN_CHARACTERS


def shown(value: object) -> str:
    """Return a value as Python writes it, cut to a readable length."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # of a number with thousands of digits, which Python does not write out
        text = "a number of thousands of digits"
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
