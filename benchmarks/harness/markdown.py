"""Write tables in Markdown, and put them between the marks of a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table; nothing where it has no lines."""
    found = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *found]) if found else ""


def write_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks of a page; raise ValueError where it does not have them."""
    begin, end = marks
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page}: has no marks such as {begin}")
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
