"""Print plain lines and tables for a person, and show progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress as Bar, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..errors import visible
from ..execution.report import Observer, Progress

# Wide enough for a line a tensor when the output goes to a file or a pipe.
_PIPE_WIDTH = 160
# The head of a column, and its cells: a format of the row's keys, or a function of the row.
Column = tuple[str, str | Callable[[Any], object]]


class Screen(Console):
    """Print lines and tables of plain text: markup and control characters in a name are shown, never obeyed."""

    def __init__(self) -> None:
        width = None if sys.stdout.isatty() else _PIPE_WIDTH
        super().__init__(width=width, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def print_table(self, rows: Iterable[Any], *columns: Column) -> None:
        """Print a table with one line for each row.

        A column is (head, cell): the cell is a format string for ``format_map(row)``, or a function of the row. A head
        that begins with ``>`` aligns its column to the right.
        """
        table = Table(box=None, pad_edge=False, header_style="bold")
        for head, _ in columns:
            table.add_column(head.lstrip(">"), justify="right" if head.startswith(">") else "left", overflow="fold")
        for row in rows:
            table.add_row(*(cell.format_map(row) if isinstance(cell, str) else str(cell(row)) for _, cell in columns))
        self.print(table)


def size(count: float) -> str:
    """Return a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def brief(seconds: float) -> str:
    """Return a time as ``duration`` does, below a second with three digits, as single tensors need."""
    if seconds >= 1:
        return duration(seconds)
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


@contextmanager
def watched(*, enabled: bool) -> Iterator[Observer | None]:
    """Yield an observer that draws a progress line on standard error, or None where no person watches."""
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    columns = (
        TextColumn("{task.fields[phase]:<8}"),
        BarColumn(),
        TextColumn("{task.fields[tensors]} tensors, {task.fields[bytes]}, {task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task: TaskID | None = None

        def observer(progress: Progress) -> None:
            nonlocal task
            elapsed = sum(progress.seconds.values())
            fields: dict[str, Any] = {
                "phase": progress.phase or "start",
                "tensors": f"{progress.done_tensors}/{progress.total_tensors}",
                "bytes": f"{size(progress.done_bytes)}/{size(progress.total_bytes)}",
                "rate": f"{progress.done_bytes / max(elapsed, 1e-3) / 1e9:.2f} GB/s",
            }
            if task is None:
                task = bar.add_task("merge", total=progress.total_bytes, **fields)
            bar.update(task, completed=progress.done_bytes, **fields)

        yield observer
