"""Merges that are interrupted, in one process: resumed to the same bytes, with the inputs they began with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import isomerge_fast as imf
from checkpoints import config_of, listing, load_folder, make_base, make_family
from isomerge_fast.checkpoint.output.staging import run_folders
from isomerge_fast.errors import InputChangedError
from isomerge_fast.execution import engine
from isomerge_fast.execution.report import PHASES, Progress
from isomerge_fast.execution.verify import verify
from isomerge_fast.execution.worker import merge_item
from isomerge_fast.planning import schedule
from isomerge_fast.planning.planner import make_plan

# --- interrupted ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing in the package may catch it."""


@pytest.mark.parametrize("after", range(0, 20, 2))
@pytest.mark.parametrize("shards", [1, 3])
def test_resume_is_byte_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, shards: int) -> None:
    """Stopped at the n-th positioned write; a torn tensor is in the file; --resume ends in the same bytes."""
    family = make_family(tmp_path, shards=shards)
    config = config_of(family, tmp_path / "whole", scaling=[0.5, 1.0])
    imf.merge(config)
    expected = listing(tmp_path / "whole")

    real_pwrite, count = os.pwrite, 0

    def torn(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal count
        count += 1
        if count > after:
            real_pwrite(descriptor, data[: len(data) // 2], offset)
            raise Killed
        return real_pwrite(descriptor, data, offset)

    config["out"] = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", torn)
        with pytest.raises(Killed):
            imf.merge(config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(imf.ConfigError, match="unfinished merge"):
        imf.merge(config)
    journal = (run_folders(tmp_path / "out")[0] / "journal.jsonl").read_bytes()
    with pytest.raises(imf.ConfigError, match="other inputs, options, devices or versions"):
        imf.merge({**config, "scaling": [0.5, 2.0]}, resume=True)
    assert (run_folders(tmp_path / "out")[0] / "journal.jsonl").read_bytes() == journal
    imf.merge(config, resume=True)
    resumed = listing(tmp_path / "out")
    assert {name: data for name, data in resumed.items() if name != "report.json"} == {
        name: data for name, data in expected.items() if name != "report.json"
    }
    assert not (tmp_path / ".out.isomerge").exists()
    imf.merge(config, resume=True)  # finished already: left as it is
    assert listing(tmp_path / "out") == resumed


def test_a_resume_that_keeps_its_threads_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At once and in the report; not where no other number was asked for, or where every tensor is one core's."""
    config = config_of(make_family(tmp_path), tmp_path / "out")
    alike = {**config, "out": str(tmp_path / "alike")}

    def stopped(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(engine, "merge_item", stopped)
        for threads, resume in ((1, False), (2, True), (1, True)):
            with pytest.raises(Killed):
                imf.merge(alike, threads=threads, resume=resume)
        assert not caplog.messages
        patch.setattr(schedule, "cores_of", lambda flops, share, cores: cores)
        patch.setattr(schedule, "LEAST_OPERATIONS", 0.0)
        with pytest.raises(Killed):
            imf.merge(config, threads=1)
        for again in (None, 1):
            with pytest.raises(Killed):
                imf.merge(config, threads=again, resume=True)
        assert not caplog.messages
        said = (
            "4 tensor(s) are computed by as many cores as when the merge began, and not by as many as threads and "
            "memory suggest now: their last digits depend on it (--overwrite instead of --resume begins anew)"
        )
        with pytest.raises(Killed):
            imf.merge(config, threads=2, resume=True)
        assert caplog.messages == [f"{tmp_path / 'out'}: {said}"]
        patch.setattr(engine, "merge_item", merge_item)
        report = imf.merge(config, threads=2, resume=True)
    assert said in report.notes


def test_resume_does_not_trust_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte lost after it was journaled (a power cut without fsync) is written again."""
    family = make_family(tmp_path)
    config = config_of(family, tmp_path / "out")
    monkeypatch.setattr(engine, "write_metadata", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        imf.merge(config)
    monkeypatch.undo()
    staged = run_folders(tmp_path / "out")[0] / "new/model.safetensors"
    content = bytearray(staged.read_bytes())
    content[-300:-200] = bytes(100)
    staged.write_bytes(bytes(content))
    imf.merge(config, resume=True)
    assert verify(tmp_path / "out").tensors == len(make_base())


@pytest.mark.parametrize("step", [1, 2])
def test_killed_inside_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Between the renames that replace an old output: it is put back, or the new one is complete."""
    family = make_family(tmp_path)
    config = config_of(family, tmp_path / "out")
    imf.merge({**config, "scaling": 0.5})
    old = listing(tmp_path / "out")
    real_rename, count = os.rename, 0

    def rename(source: Any, target: Any, **options: Any) -> None:
        nonlocal count
        real_rename(source, target, **options)
        count += tmp_path / "out" in (source, target)
        if count == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(Killed):
            imf.merge(config, overwrite=True)
    if step == 1:
        with pytest.raises(imf.ConfigError, match="unfinished"):
            imf.merge(config)
        assert listing(tmp_path / "out") == old
        imf.merge(config, resume=True, overwrite=True)
    else:
        imf.merge(config, resume=True)
    merged = load_folder(tmp_path / "out")
    imf.merge({**config, "out": tmp_path / "other"})
    assert (tmp_path / "other/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert merged.keys() == make_base().keys()
    assert not (tmp_path / ".out.isomerge").exists()


def test_an_input_that_changes_under_way_stops_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make_family(tmp_path)

    def observer(progress) -> None:
        if progress.tensor == "layers.1.up.weight":
            os.utime(family[1][0] / "model.safetensors", ns=(1, 1))

    with pytest.raises(imf.InputError, match=r"expert0.*changed during the merge"):
        imf.merge(config_of(family, tmp_path / "out"), observer=observer)
    assert not (tmp_path / "out").exists()


def test_an_input_swapped_after_the_plan_stops_the_merge(tmp_path: Path) -> None:
    """By a file of the same size, time and header, which differs in one weight."""
    family = make_family(tmp_path)
    plan = make_plan(imf.MergeConfig(str(family[0]), [str(path) for path in family[1]], out=str(tmp_path / "out")))
    file = family[1][0] / "model.safetensors"
    content, status = file.read_bytes(), file.stat()
    file.write_bytes(content[:-4] + b"\0\0\0\0")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InputChangedError, match=r"expert0.*changed since the merge was planned"):
        engine.run(plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "expert0", "expert1", "expert2"]


def test_a_resume_knows_its_inputs_by_what_may_be_copied(tmp_path: Path) -> None:
    """Copied with their times, and of another mode, the inputs are the same: the finished merge is left as it is."""
    family = make_family(tmp_path)
    imf.merge(config_of(family, tmp_path / "out", method="mean"))
    before = listing(tmp_path / "out")
    for folder in (family[0], *family[1]):
        shutil.copytree(folder, tmp_path / "copy")
        shutil.rmtree(folder)
        (tmp_path / "copy").rename(folder)
        (folder / "model.safetensors").chmod(0o600)
    imf.merge(config_of(family, tmp_path / "out", method="mean"), resume=True)
    assert listing(tmp_path / "out") == before


def test_what_of_a_base_reaches_the_output(tmp_path: Path) -> None:
    """Copied code is told of; nothing is written when a link leads out of the base."""
    family = make_family(tmp_path, tasks=1)
    (family[0] / "modeling_x.py").write_text("import os\n")
    (family[0] / "tokenizer.json").write_text("{}")
    report = imf.merge(config_of(family, tmp_path / "out", method="mean"))
    (note,) = [note for note in report.notes if "trust_remote_code" in note]
    assert note.endswith("modeling_x.py")
    assert f"code is copied from {family[0]}" in note
    assert (tmp_path / "out/modeling_x.py").read_text() == "import os\n"
    (tmp_path / "secret").write_text("hf_SECRET")
    (family[0] / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(imf.InputError, match=r"tokenizer_config\.json: leads out of its folder"):
        imf.merge(config_of(family, tmp_path / "other", method="mean"))
    assert not list(tmp_path.glob("*other*"))


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    phases: set[str] = set()
    last = Progress(0, 0)

    def observer(progress) -> None:
        nonlocal last
        phases.add(progress.phase)
        last = progress

    imf.merge(config_of(family, tmp_path / "out"), observer=observer)
    assert phases >= {"read", "compute", "write"}
    assert last.done_tensors == last.total_tensors
    assert last.done_bytes == last.total_bytes


def test_phases_leave_no_time_unnamed(tmp_path: Path) -> None:
    seconds = imf.merge(config_of(make_family(tmp_path), tmp_path / "out")).seconds
    named = sum(seconds[phase] for phase in PHASES)
    assert seconds.keys() == {*PHASES, "total"}
    assert named == pytest.approx(seconds["total"], rel=0.02, abs=2e-3)
