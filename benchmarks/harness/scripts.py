"""Run stages in this process: what takes too long for ``make bench``, and needs more disk."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import machine
from benchmarks.harness.readings import Rows, read_rows, short

# Given a folder for checkpoints and outputs, and whether small sizes will do; yields rows: (name, values).
Stage = Callable[[Path, bool], Iterator[tuple[str, dict[str, Any]]]]


def parser(description: str | None, stages: Mapping[str, Stage], default: str) -> argparse.ArgumentParser:
    """Return the options that all such scripts have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--folder", type=Path, help="for checkpoints and outputs; a temporary one when left out")
    made.add_argument("--rows", default=default, help=f"stages, by comma: {', '.join(stages)}")
    made.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    made.add_argument("--out", type=Path, help="a JSON file of the rows")
    return made


def run(stages: Mapping[str, Stage], options: argparse.Namespace) -> None:
    """Run the stages that are asked for; print their rows as they come, and write them into ``--out``."""
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        file = options.out or Path(temporary) / "rows.json"
        rows = Rows("machine", file, device="cpu", small=options.small, seconds=float("inf"))
        rows.note("machine", **machine(torch.device("cpu")))
        for rows.stage in options.rows.split(","):
            for name, values in stages[rows.stage](root, options.small):
                rows.note(name, **values)
                print(short(read_rows(file)[-1]), flush=True)
