"""The folder beside the output: who it belongs to, whose run is whose, and what of a disk is believed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import isomerge_fast as imf
from checkpoints import config_of, listing, make_base, make_family
from isomerge_fast.checkpoint.io import writer as writing
from isomerge_fast.checkpoint.output.journal import Entries
from isomerge_fast.checkpoint.output.staging import Staging, run_folders, staging_folder
from isomerge_fast.config import load_config
from isomerge_fast.execution import engine
from isomerge_fast.execution.engine import merge_here
from isomerge_fast.execution.report import Observer
from isomerge_fast.execution.verify import verify
from isomerge_fast.execution.work_item import MergeSettings, WorkResult
from isomerge_fast.planning.plan import Plan
from isomerge_fast.planning.planner import make_plan

SUPPORT = Path(__file__).resolve().parent / "support"


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As over NFS without a lock daemon: whoever asks gets them."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(fcntl, "lockf", lambda *_: None)


def bytes_of(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in listing(out).items() if name != "report.json"}


# --- somebody else's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_a_link_in_the_place_of_the_staging_folder_is_not_followed(tmp_path: Path, options: dict[str, Any]) -> None:
    """Made beforehand in a folder that all may write to."""
    family = make_family(tmp_path)
    victim = tmp_path / "victim"
    (victim / "run-0/new").mkdir(parents=True)
    for name in ("journal.jsonl", "lock", "run-0/new/letter"):
        (victim / name).write_text("dear diary")
    (tmp_path / ".out.isomerge").symlink_to(victim)
    before = listing(victim)
    with pytest.raises(imf.ConfigError, match=r"\.out\.isomerge: a link or a file, not the folder of a merge"):
        imf.merge(config_of(family, tmp_path / "out"), **options)
    assert listing(victim) == before
    assert not (tmp_path / "out").exists()


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    (tmp_path / ".out.isomerge").mkdir()
    (tmp_path / ".out.isomerge/lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(imf.ResourceError):
        imf.merge(config_of(family, tmp_path / "out"), overwrite=True)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a folder of another user")
def test_the_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """Who made it could change what is in it at any time."""
    family = make_family(tmp_path)
    theirs = tmp_path / ".out.isomerge"
    (theirs / "run-0/new").mkdir(parents=True)
    (theirs / "run-0/new/letter").write_text("x")
    os.chown(theirs, 12345, 12345)
    before = listing(theirs)
    for resume, overwrite in ((False, False), (True, False), (False, True)):
        with pytest.raises(imf.ConfigError, match=r"belongs to another user \(uid 12345\)"):
            imf.merge(config_of(family, tmp_path / "out"), resume=resume, overwrite=overwrite)
    assert listing(theirs) == before
    assert os.listdir(theirs) == ["run-0"]


def test_nobody_else_can_write_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make_family(tmp_path)
    staging_folder(tmp_path / "out").mkdir(mode=0o777)
    modes = []
    real = engine.write_metadata

    def look(*given: Any) -> None:
        modes.append(staging_folder(tmp_path / "out").stat().st_mode & 0o777)
        real(*given)

    monkeypatch.setattr(engine, "write_metadata", look)
    imf.merge(config_of(family, tmp_path / "out"))
    assert modes == [0o700]


# --- locks that do nothing ------------------------------------------------------------------------------------------


def test_that_locks_do_nothing_is_noticed(tmp_path: Path, no_locks: None) -> None:
    family = make_family(tmp_path)
    report = imf.merge(config_of(family, tmp_path / "out"))
    assert any("locks do nothing" in note for note in report.notes)


def test_that_locks_hold_is_no_note(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", resume=False, overwrite=False) as staging:
        assert staging.notes == []


class Between:
    """Does something before, or after, all tensors are merged."""

    def __init__(self, action: Callable[[], None], *, after: bool) -> None:
        self._action, self._after = action, after

    def merge(
        self, plan: Plan, settings: MergeSettings, journal_entries: Entries, observer: Observer | None
    ) -> list[WorkResult]:
        if not self._after:
            self._action()
        results = merge_here(plan, settings, journal_entries, observer)
        if self._after:
            self._action()
        return results


@pytest.mark.parametrize("after", [False, True], ids=["before the work", "before the commit"])
@pytest.mark.parametrize(
    ("scaling", "options"),
    [(1.0, {"resume": True}), (1.0, {"overwrite": True}), (0.5, {"overwrite": True})],
    ids=["resumed by another run", "discarded by the same merge", "discarded by another one"],
)
def test_a_run_whose_folder_was_taken_ends_with_an_error(
    tmp_path: Path, no_locks: None, scaling: float, options: dict[str, Any], after: bool
) -> None:
    family = make_family(tmp_path, shards=2)
    imf.merge(config_of(family, tmp_path / "whole", scaling=scaling))
    other = config_of(family, tmp_path / "out", scaling=scaling)
    executor = Between(lambda: imf.merge(other, **options) and None, after=after)
    with pytest.raises(imf.ConfigError, match="another merge into it has taken the place of this one"):
        engine.run(make_plan(load_config(config_of(family, tmp_path / "out"))), device="cpu", executor=executor.merge)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert not staging_folder(tmp_path / "out").exists()


def test_a_second_run_is_refused_where_locks_do_nothing(tmp_path: Path, no_locks: None) -> None:
    """What the first has staged looks like an unfinished merge, and nobody said what is to become of it."""
    family = make_family(tmp_path)
    config = config_of(family, tmp_path / "out")

    def again() -> None:
        with pytest.raises(imf.ConfigError, match="an unfinished merge lies in"):
            imf.merge(config)

    engine.run(make_plan(load_config(config)), device="cpu", executor=Between(again, after=True).merge)
    assert verify(tmp_path / "out").tensors == len(make_base())


def test_pairs_of_merges_where_locks_do_nothing() -> None:
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
    command = [sys.executable, str(SUPPORT / "fault_pairs.py"), "--pairs", "6", "--seed", "3", "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 pairs, 0 wrong outputs" in done.stdout


# --- disks that lost what they were given ---------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False], ids=["past the cache", "no direct I/O here"])
def test_claims_are_believed_of_the_disk_and_not_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """Writing back failed for some pages: in the cache they are what was written, on the disk what was there before.

    The disk is another file here, which stands for it wherever its bytes are asked for.
    """
    family = make_family(tmp_path)
    config = config_of(family, tmp_path / "out", method="iso-c")
    imf.merge({**config, "out": tmp_path / "whole"})

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_metadata", stop)
        with pytest.raises(Stop):
            imf.merge(config)
    shard = run_folders(tmp_path / "out")[0] / "new/model.safetensors"
    lost = bytearray(shard.read_bytes())
    lost[-2000:-1000] = bytes(1000)
    if direct:
        (tmp_path / "disk").write_bytes(bytes(lost))
        monkeypatch.setattr(writing, "open_direct", lambda path, flags: os.open(tmp_path / "disk", os.O_RDONLY))
    else:  # dropping the cache has the file read anew
        monkeypatch.setattr(writing, "open_direct", lambda path, flags: None)
        real = writing.drop_cache

        def drop(descriptor: int) -> None:
            real(descriptor)
            os.pwrite(descriptor, bytes(lost), 0)

        monkeypatch.setattr(writing, "drop_cache", drop)
    computed: list[str] = []
    real_part = writing.ShardWriter.write_part

    def write_part(writer: writing.ShardWriter, name: str, value: Any, first: int) -> None:
        computed.append(name)
        real_part(writer, name, value, first)

    monkeypatch.setattr(writing.ShardWriter, "write_part", write_part)
    imf.merge(config, resume=True)
    assert 0 < len(set(computed)) < len(make_base())
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["in the run", "before the resume"])
def test_after_lost_writes_a_merge_begins_with_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Of the blocks of a file the file system may have kept a wrong record, which only mounting it again shows."""
    family = make_family(tmp_path)
    config = config_of(family, tmp_path / "out", method="mean")
    imf.merge({**config, "out": tmp_path / "whole"})
    failing = moment == "in the run"
    real = os.fsync

    def fsync(descriptor: int) -> None:
        is_made = os.fstat(descriptor).st_blocks > 8
        if failing and is_made and os.readlink(f"/proc/self/fd/{descriptor}").endswith("/new/model.safetensors"):
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        if failing:
            with pytest.raises(imf.ResourceError, match=r"model\.safetensors: cannot be written"):
                imf.merge(config)
        else:
            patch.setattr(engine, "write_metadata", stop)
            with pytest.raises(KeyboardInterrupt):
                imf.merge(config)
            failing = True
            with pytest.raises(imf.ResourceError, match=r"model\.safetensors: cannot be written"):
                imf.merge(config, resume=True)
    shard = run_folders(tmp_path / "out")[0] / "new/model.safetensors"
    before = shard.stat().st_ino
    kept = os.open(shard, os.O_RDONLY)  # so that its number is not given to another file
    imf.merge(config, resume=True)
    assert (tmp_path / "out/model.safetensors").stat().st_ino != before
    os.close(kept)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_nothing_is_left_of_a_run_that_never_began(tmp_path: Path) -> None:
    """Killed between making its folder and making the first file: it is no unfinished merge."""
    family = make_family(tmp_path)
    for name in ("run-0", "trash-1/new"):
        (staging_folder(tmp_path / "out") / name).mkdir(parents=True)
    imf.merge(config_of(family, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]
    shutil.rmtree(tmp_path / "out")
