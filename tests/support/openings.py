"""What a merge opens of a folder, and why it refuses to."""

from __future__ import annotations

from pathlib import Path

import pytest

import isomerge_fast as imf
from isomerge_fast.checkpoint.layout import open_checkpoint
from isomerge_fast.checkpoint.output.companions import sort_folder
from isomerge_fast.config import load_config
from isomerge_fast.planning.planner import make_plan


def companion_files(folder: Path) -> list[str]:
    """Return the names of the files that a merge copies from a base."""
    return list(sort_folder(folder).companions)


def open_all(folder: Path) -> None:
    """Open a folder as a plan opens a base."""
    open_checkpoint(folder)
    companion_files(folder)


def problems(base: Path, *experts: Path, **changes: object) -> list[str]:
    """Return the problems for which a plan is refused."""
    with pytest.raises(imf.InputError) as caught:
        make_plan(load_config({"base": base, "experts": list(experts), "method": "mean", **changes}))
    assert caught.value.exit_code == 3
    return caught.value.problems
