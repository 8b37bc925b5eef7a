"""The tool that compares what two versions merge: it misses no changed byte, and takes for the same what is close."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def recorder() -> Any:
    return import_module("record_outputs")


def save(recorder: Any, path: Path, value: Tensor) -> Path:
    """A recording of one merge of files and of one in memory."""
    found = {"files/a": {"w": "00ff", "report.json": {"tensors": [{"rank": 3}]}}}
    found["memory/a"] = {"delta": recorder.fingerprint(value)}
    path.write_text(json.dumps(found))
    torch.save({"memory/a: delta": value}, recorder.tensors_of(path))
    return path


def test_every_difference_is_found(recorder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    before, same = (save(recorder, tmp_path / name, value) for name in ("before", "same"))
    assert recorder.compare(before, same, None) == 0
    for old, new in (("00ff", "00fe"), ('"rank": 3', '"rank": 3.0'), ("files/a", "files/b")):
        changed = tmp_path / "changed"
        changed.write_text(before.read_text().replace(old, new))
        assert recorder.compare(before, changed, None) == 1
    assert "files/a: : only in the first recording" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "factor", "code"),
    [(torch.float32, 1 + 3e-7, 0), (torch.float32, 1 + 3e-6, 1), (torch.bfloat16, 1 + 1e-6, 0), (torch.bfloat16, 2, 1)],
)
def test_what_is_close_is_counted(
    recorder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype, factor: float, code: int
) -> None:
    value = torch.randn(300, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, after = (save(recorder, tmp_path / str(by), (value * by).to(dtype)) for by in (1.0, factor))
    assert recorder.compare(before, after, None) == 1
    assert recorder.compare(before, after, "memory/") == code
    assert f"of memory/: {1 - code} tensors differ by no more" in capsys.readouterr().out
