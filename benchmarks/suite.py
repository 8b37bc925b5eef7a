"""A list of measured rows against the clock, on disk after every one of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isomerge_fast.bench.ceilings import device_name


class Suite:
    """Rows of results, written after each; the clock that decides what there is still time for."""

    def __init__(self, out: Path, minutes: float, device: torch.device, *, small: bool) -> None:
        self.device, self.small, self._out = device, small, out
        self._end = time.monotonic() + 60 * minutes
        self.rows: list[dict[str, Any]] = []

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def note(self, stage: str, name: str, **values: Any) -> None:
        self.rows.append({"stage": stage, "name": name, **values})
        shown = "  ".join(f"{key} {_short(value)}" for key, value in values.items())
        print(f"{stage:12} {name:52} {shown}", flush=True)
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps({"device": device_name(self.device), "rows": self.rows}, indent=1) + "\n")

    def attempt(self, stage: str, name: str, function: Callable[[], dict[str, Any]], *, needs: float = 5.0) -> None:
        """A row, or why there is none: an error, or less than ``needs`` seconds left."""
        if self.seconds_left < needs and not self.small:
            self.note(stage, name, skipped=f"{self.seconds_left:.0f} s left, {needs:.0f} needed")
            return
        try:
            values = function()
        except Exception as error:  # every row is to be tried
            self.note(stage, name, failed=f"{type(error).__name__}: {error}"[:500])
        else:
            self.note(stage, name, **values)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def value(self, name: str, key: str) -> float:
        """Of a row that was measured before; NaN where it is missing."""
        return next((row[key] for row in self.rows if row["name"] == name and key in row), float("nan"))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
