"""Hold rows of readings: those of one process, on disk as they are made, and those of many in one file."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_whole(file: Path, text: str) -> None:
    """Replace a file at once, so that a reader finds the old text or the new one and never a part."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


def read_rows(file: Path) -> list[Row]:
    """Return the list ``rows`` of a JSON file; an empty one where the file does not exist."""
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []


class Rows:
    """Collect the rows of a stage, and tell it how it is to run.

    ``stage`` is that of the next rows; sizes of a ``small`` run need only show that everything runs; this process does
    part number ``share`` of ``shares`` of the stage.
    """

    def __init__(
        self, stage: str, file: Path, *, device: str, small: bool, seconds: float, share: int = 0, shares: int = 1
    ) -> None:
        self.device, self.small, self.share, self.shares = device, small, share, shares
        self.stage, self._file, self._end = stage, file, time.monotonic() + seconds
        self._rows: list[Row] = []

    @property
    def seconds_left(self) -> float:
        """Return the seconds until the stage is killed."""
        return self._end - time.monotonic()

    def note(self, name: str, /, **values: Any) -> None:
        """Add a row; raise ValueError for values named as the row's own, TypeError for what JSON does not have."""
        row: Row = {"stage": self.stage, "name": name}
        if taken := row.keys() & values.keys():
            raise ValueError(f"a row has a {' and a '.join(sorted(taken))} of its own: these values need other names")
        json.dumps(values)  # or this row, and with it every later one, could not be written
        self._rows.append(row | values)
        write_whole(self._file, json.dumps({"rows": self._rows}))

    def attempt(self, name: str, function: Callable[[], dict[str, Any]], /) -> dict[str, Any]:
        """Add the row that a function makes and return its values; after an error add that, and return none."""
        try:
            found = function()
            if _cuda_in_use():
                sys.modules["torch"].cuda.synchronize()  # what went wrong goes wrong in its own row
            self.note(name, **found)
            return found
        except Exception as error:  # every row is to be tried
            self.note(name, failed=f"{type(error).__name__}: {error}"[:500])
            return {}
        finally:
            if _cuda_in_use():
                sys.modules["torch"].cuda.empty_cache()


def _cuda_in_use() -> bool:
    torch = sys.modules.get("torch")  # a stage may do without
    return torch is not None and torch.cuda.is_initialized()


class Results:
    """Keep the rows of all stages of one device in ``FOLDER/NAME.json``, written anew whenever there are more.

    ``FOLDER/NAME.txt`` holds what was printed beside them. Names have letters, digits and ``-`` only.
    """

    def __init__(self, folder: Path, device: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
        self.device, self._file, self._text = device, folder / f"{name}.json", folder / f"{name}.txt"
        self.rows = read_rows(self._file)

    def begin(self, stage: str) -> None:
        """Drop a stage's rows before it runs again; the file changes when the next row is added."""
        self.rows = [row for row in self.rows if row["stage"] != stage]

    def add(self, row: Row) -> None:
        """Keep a row, and print it."""
        self.rows.append(row)
        body = ",\n".join(map(json.dumps, self.rows))
        write_whole(self._file, f'{{"device": {json.dumps(self.device)}, "rows": [\n{body}\n]}}\n')
        self.say(short(row))

    def say(self, line: str) -> None:
        """Print a line, and keep it."""
        print(line, flush=True)
        with self._text.open("a", encoding="utf-8") as text:
            text.write(f"{line}\n")


def short(row: Row) -> str:
    """Return a row as one line."""
    shown = " ".join(f"{key}={_short(value)}" for key, value in row.items() if key not in ("stage", "name"))
    return f"{row['stage']:11} {row['name']:44} {shown}"[:180].rstrip().replace("\n", " ")


def _short(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"({len(value)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
