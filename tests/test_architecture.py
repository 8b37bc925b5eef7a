"""docs/architecture.md: the files that it names are there, and no walk comes by one twice."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FOLDERS = ("isomerge_fast", "kernels")
TITLES = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
WALKS = dict(zip(TITLES, re.split(r"^## .*$", TEXT, flags=re.MULTILINE)[1:], strict=True))


def files_of(text: str) -> list[str]:
    return re.findall(r"`([\w/]+\.py)", text)


def test_there_are_three_walks_in_under_60_lines() -> None:
    assert len(WALKS) == 3
    assert len(TEXT.splitlines()) < 60


@pytest.mark.parametrize("walk", WALKS)
def test_no_file_is_visited_twice(walk: str) -> None:
    seen = files_of(WALKS[walk])
    assert len(seen) >= 6
    assert sorted(seen) == sorted(set(seen))


def test_every_file_is_there() -> None:
    missing = [file for file in files_of(TEXT) if not any((ROOT / folder / file).is_file() for folder in FOLDERS)]
    assert missing == []


@pytest.mark.parametrize("name", re.findall(r"`([A-Z]\w+)[`(]", TEXT))
def test_every_class_is_there(name: str) -> None:
    sources = [*ROOT.glob("isomerge_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    assert any(f"class {name}" in source.read_text(encoding="utf-8") for source in sources)
