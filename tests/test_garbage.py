"""Garbage collection while a merge is planned and runs: of what it makes, and not of all that was there before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import isomerge_fast as imf
from checkpoints import save_folder
from isomerge_fast.planning.garbage import older_objects_left_alone


class Ring:
    """Hold itself, so that it ends by garbage collection alone."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    assert not gc.get_freeze_count()
    yield
    gc.unfreeze()


def test_what_is_made_is_collected_and_what_was_there_is_later() -> None:
    gc.collect()
    before = weakref.ref(Ring())
    with older_objects_left_alone():
        made = weakref.ref(Ring())
        with older_objects_left_alone():
            gc.collect()
        assert made() is None
        gc.collect()
        assert before() is not None
    gc.collect()
    assert before() is None
    assert not gc.get_freeze_count()


def test_what_a_program_has_frozen_stays_so() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with pytest.raises(KeyError), older_objects_left_alone():
        raise KeyError
    assert 0 < gc.get_freeze_count() <= count


@pytest.mark.parametrize("is_sound", [True, False])
def test_a_merge_puts_back_how_it_was(tmp_path: Path, is_sound: bool) -> None:
    base, expert = [save_folder(tmp_path / name, {"w": torch.ones(3) * index}) for index, name in enumerate("ab")]
    seen: list[int] = []
    merge = {"base": base, "experts": [expert if is_sound else tmp_path / "missing"], "out": tmp_path / "out"}
    try:
        imf.merge({**merge, "method": "mean"}, observer=lambda _: seen.append(gc.get_freeze_count()))
    except imf.InputError:
        assert not is_sound
    assert all(seen)
    assert bool(seen) == is_sound
    assert not gc.get_freeze_count()
