"""Merges in several units: the same bytes however they are divided, and nobody writes what is another's."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import isomerge_fast as imf
from adapters import make_adapters
from checkpoints import listing, make_base, make_expert, make_family, save_folder, write_tensor
from executors import InTurn, runs_of
from isomerge_fast.checkpoint.io import writer as writing
from isomerge_fast.checkpoint.io.writer import OutputTensor, ShardWriter, create_shard
from isomerge_fast.checkpoint.output.journal import Entries, ItemJournal, ItemProgress, Journal, item_journal
from isomerge_fast.checkpoint.output.staging import run_folders
from isomerge_fast.config import load_config
from isomerge_fast.execution.engine import run
from isomerge_fast.execution.report import Observer
from isomerge_fast.execution.work_item import MergeSettings, WorkItem, WorkResult
from isomerge_fast.execution.worker import merge_item
from isomerge_fast.planning.plan import Plan
from isomerge_fast.planning.planner import make_plan

CASES = {
    "iso-c": {"method": "iso-c"},
    "rounded": {"method": "iso-cts", "dtype": "bfloat16", "stochastic_rounding": 3},
    "scalings": {"method": "task-arithmetic", "scaling": [0.5, 1.0]},
    "with-delta": {"method": "iso-c", "save_delta": True},
}


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All but the report, which tells of times and processes."""
    return {name: content for name, content in listing(folder).items() if name != "report.json"}


def config_of(family: tuple[Path, list[Path]], out: Path, **changes: Any) -> dict[str, Any]:
    return {"base": str(family[0]), "experts": [str(path) for path in family[1]], "out": str(out), **changes}


def merge_in(config: dict[str, Any], count: int, **options: Any) -> imf.Report:
    return run(make_plan(load_config(config)), device="cpu", executor=InTurn(count).merge, **options)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_units_make_the_bytes_of_one_process(tmp_path: Path, case: str, shards: int) -> None:
    family = make_family(tmp_path, shards=shards)
    whole = imf.merge(config_of(family, tmp_path / "whole", **CASES[case]))
    report = merge_in(config_of(family, tmp_path / "parts", **CASES[case]), 4)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert [entry["name"] for entry in report.tensors] == [entry["name"] for entry in whole.tensors]
    (worker,) = report.workers
    assert worker["pid"] == os.getpid()
    assert worker["units"] == len(runs_of(make_plan(load_config(config_of(family, tmp_path / "x"))), 4)) > shards
    assert (worker["tensors"], worker["read_bytes"]) == (len(report.tensors), report.read_bytes)
    assert imf.Report.from_dict(json.loads((tmp_path / "parts/report.json").read_text())) == report


@pytest.mark.parametrize("rank", [None, 2], ids=["checkpoint", "adapter"])
def test_units_of_adapters_make_the_bytes_of_one_process(tmp_path: Path, rank: int | None) -> None:
    base, adapters = make_adapters(tmp_path)
    changes = {"method": "iso-c"} if rank is None else {"method": "iso-c", "adapter_rank": rank}
    imf.merge(config_of((base, adapters), tmp_path / "whole", **changes))
    merge_in(config_of((base, adapters), tmp_path / "parts", **changes), 3)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_a_unit_travels_without_the_rest_of_the_plan(tmp_path: Path) -> None:
    """As it does to other processes: no tensors, and of the inputs only the files it reads."""
    family = make_family(tmp_path, shards=3)
    plan = make_plan(load_config(config_of(family, tmp_path / "out")))
    units = [WorkItem.of(plan, number, tensors, Entries()) for number, tensors in enumerate(runs_of(plan, 2))]
    for unit in units:
        travelled = pickle.loads(pickle.dumps(unit))
        assert travelled == unit
        (shard,) = {tensor.shard for tensor in unit.tensors}
        assert {path.name for path in unit.files} == {shard}
        read = {stored.file for tensor in unit.tensors for stored in tensor.inputs}
        assert unit.files.keys() == read
        assert set(unit.folders[""]) == {shard}
        assert len(pickle.dumps(unit)) < 20_000
    assert sorted(tensor.name for unit in units for tensor in unit.tensors) == sorted(make_base())


# --- an unfinished merge goes on, however it is divided ---------------------------------------------------------------


class Stopped(Exception):
    pass


class StopsAfter:
    """An executor that is killed after so many units, or inside the unit after them."""

    def __init__(self, count: int, units: int, *, inside: bool) -> None:
        self._count, self._units, self._inside = count, units, inside

    def merge(
        self, plan: Plan, settings: MergeSettings, journal_entries: Entries, observer: Observer | None
    ) -> list[WorkResult]:
        for number, tensors in enumerate(runs_of(plan, self._count), 1):
            unit = WorkItem.of(plan, number, tensors, journal_entries)
            if number > self._units:
                if self._inside:  # a part of it is done, as its journal tells
                    merge_item(settings, replace(unit, tensors=unit.tensors[:1]), observer)
                raise Stopped
            merge_item(settings, unit, observer)
        raise AssertionError("not that many units")


@pytest.mark.parametrize("again", [0, 1, 5], ids=["one process", "a unit a file", "more units"])
@pytest.mark.parametrize("inside", [False, True], ids=["between units", "inside a unit"])
def test_what_units_have_done_is_gone_on_with(tmp_path: Path, again: int, inside: bool) -> None:
    family = make_family(tmp_path, shards=2)
    imf.merge(config_of(family, tmp_path / "whole", method="iso-c"))
    config = config_of(family, tmp_path / "out", method="iso-c")
    plan = make_plan(load_config(config))
    with pytest.raises(Stopped):
        run(plan, device="cpu", executor=StopsAfter(3, 2, inside=inside).merge)
    done = {tensor.name for run_ in runs_of(plan, 3)[:2] for tensor in run_}
    if inside:
        done.add(runs_of(plan, 3)[2][0].name)
    stamps = _journaled(run_folders(tmp_path / "out")[0])
    assert stamps.keys() == done
    report = imf.merge(config, resume=True) if not again else merge_in(config, again, resume=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    kept = {entry["name"]: entry["seconds"] for entry in report.tensors}
    assert all(kept[name] == entry["report"]["seconds"] for name, entry in stamps.items())
    assert not (tmp_path / ".out.isomerge").exists()


def _journaled(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in folder.glob("journal-*.jsonl"):
        follower = ItemProgress(folder, int(path.stem.removeprefix("journal-")))
        follower.update()
        found |= follower.finished
    return found


def test_a_second_attempt_at_a_unit_merges_what_is_left(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    config = config_of(family, tmp_path / "out", method="iso-c")
    attempts: list[list[str]] = []

    class Twice:
        def merge(
            self, plan: Plan, settings: MergeSettings, journal_entries: Entries, observer: Observer | None
        ) -> list[WorkResult]:
            unit = WorkItem.of(plan, 1, plan.tensors, journal_entries)
            merge_item(settings, replace(unit, tensors=unit.tensors[:4]))
            before = item_journal(settings.folder, 1).read_bytes()
            result = merge_item(settings, unit)
            after = item_journal(settings.folder, 1).read_bytes()
            attempts.append([line.decode() for line in after.splitlines() if line not in before.splitlines()])
            return [result]

    run(make_plan(load_config(config)), device="cpu", executor=Twice().merge)
    assert len(attempts[0]) == len(make_base()) - 4
    imf.merge(config_of(family, tmp_path / "whole", method="iso-c"))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_unit_of_a_merge_that_was_given_up_writes_nothing(tmp_path: Path) -> None:
    """Its process comes late, and another merge is under construction in the same place."""
    family = make_family(tmp_path)
    late: list[tuple[MergeSettings, WorkItem]] = []

    class Late(InTurn):
        def merge(
            self, plan: Plan, settings: MergeSettings, journal_entries: Entries, observer: Observer | None
        ) -> list[WorkResult]:
            if not late:
                late.append((settings, WorkItem.of(plan, 1, plan.tensors, journal_entries)))
                raise Stopped
            staged = listing(settings.folder / "new")
            with pytest.raises(imf.ResourceError, match="cannot be written"):
                merge_item(*late[0])
            assert listing(settings.folder / "new") == staged
            return super().merge(plan, settings, journal_entries, observer)

    executor = Late(2)
    for scaling, overwrite in ((0.5, False), (1.0, True)):
        config = config_of(family, tmp_path / "out", method="iso-c", scaling=scaling)
        plan = make_plan(load_config(config))
        if not overwrite:
            with pytest.raises(Stopped):
                run(plan, device="cpu", executor=executor.merge)
        else:
            run(plan, device="cpu", executor=executor.merge, overwrite=True)
    imf.merge(config_of(family, tmp_path / "whole", method="iso-c", scaling=1.0))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    with pytest.raises(imf.ResourceError, match="cannot be written"):  # and after its commit
        merge_item(*late[0])
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert not (tmp_path / ".out.isomerge").exists()


# --- journals ---------------------------------------------------------------------------------------------------------


def entry(name: str) -> dict[str, Any]:
    return {"name": name, "checksum": {"": {name: "xxh"}}, "report": {}, "process": {"host": "here", "pid": 1}}


def test_journals_of_units_are_gathered_and_those_of_other_merges_are_not(tmp_path: Path) -> None:
    Journal(tmp_path, "key", [], cores={"a": 2}, resume=False)
    for unit in (1, 2):
        journal = ItemJournal(tmp_path, "key", {"a": 2}, unit, {})
        journal.add(entry(f"of unit {unit}"))
        journal.close()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Journal(elsewhere, "yek", [], cores={"a": 2}, resume=False)
    journal = ItemJournal(elsewhere, "yek", {"a": 2}, 3, {})
    journal.add(entry("of another merge"))
    journal.close()
    item_journal(elsewhere, 3).rename(item_journal(tmp_path, 3))
    shutil.rmtree(elsewhere)
    (tmp_path / "journal-4.jsonl").write_bytes(item_journal(tmp_path, 1).read_bytes()[:-20])  # torn
    again = Journal(tmp_path, "key", [], cores={}, resume=True)
    assert again.cores == {"a": 2}
    assert again.finished.keys() == {"of unit 1", "of unit 2"}
    assert sorted(os.listdir(tmp_path)) == ["journal.jsonl"]
    assert Journal(tmp_path, "key", [], cores={}, resume=True).finished == again.finished


def test_journal_entries_are_read_as_they_were_added() -> None:
    held, others = Entries([entry("a"), entry("é")]), Entries([{**entry("é"), "more": [1.5, None]}])
    assert held == {"a": entry("a"), "é": entry("é")}
    held |= others
    assert (held["é"], held.get("b"), "b" in held, len(held)) == ({**entry("é"), "more": [1.5, None]}, None, False, 2)
    assert held.of(["b", "é"]) == others
    assert pickle.loads(pickle.dumps(held)) == held


def test_checksums_are_found_without_the_rest_of_an_entry() -> None:
    name = 'a "checksum": {"'
    known = {"name": name, "checksum": {"": {name: "1f"}}, "report": {"checksum": 0, "base_checksum": 1}}
    held = Entries([known, {**known, "name": "b", "base_checksum": "2e"}])
    assert held.checksums(name) == held.checksums("b") == {"": {name: "1f"}}
    assert held.base_checksum("b") == "2e"


@pytest.mark.parametrize(("key", "cores"), [("other", {"a": 2}), ("key", {})], ids=["another merge", "other cores"])
def test_a_unit_that_is_not_of_this_merge_is_refused(tmp_path: Path, key: str, cores: dict[str, int]) -> None:
    """Other cores: other last digits."""
    Journal(tmp_path, "key", [], cores={"a": 2}, resume=False)
    with pytest.raises(imf.ConfigError, match="another merge has taken the place"):
        ItemJournal(tmp_path, key, cores, 1, {})
    assert os.listdir(tmp_path) == ["journal.jsonl"]


def test_a_journal_is_followed_while_it_grows(tmp_path: Path) -> None:
    Journal(tmp_path, "key", [], cores={}, resume=False)
    follower = ItemProgress(tmp_path, 7)
    follower.update()
    assert not follower.about
    journal = ItemJournal(tmp_path, "key", {}, 7, {"pid": 5})
    follower.update()
    assert follower.about["pid"] == 5
    journal.add(entry("a"))
    follower.update()
    assert follower.finished.keys() == {"a"}
    path = item_journal(tmp_path, 7)
    whole = path.read_bytes()
    journal.add(entry("b"))
    line = path.read_bytes()[len(whole) :]
    journal.close()
    path.write_bytes(whole + line[:-7])  # written by halves
    follower.update()
    assert follower.finished.keys() == {"a"}
    path.write_bytes(whole + line)
    follower.update()
    assert follower.finished.keys() == {"a", "b"}
    ItemJournal(tmp_path, "key", {}, 7, {"pid": 6}).close()  # a second attempt
    follower.update()
    assert follower.about["pid"] == 6
    assert follower.finished.keys() == {"a", "b"}


# --- several processes and one file -----------------------------------------------------------------------------------

SHAPES = {"a": (700_000,), "b": (33,), "c": (0,), "d": (900_001,), "e": (5,)}


def made(names: Iterator[str] | list[str] | None = None) -> dict[str, torch.Tensor]:
    tensors = {
        name: torch.arange(size[0]).add(index).remainder(251).bfloat16()
        for index, (name, size) in enumerate(SHAPES.items())
    }
    return {name: tensors[name] for name in names} if names is not None else tensors


def described() -> list[OutputTensor]:
    return [OutputTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in made().items()]


@contextmanager
def another_process(path: Path, names: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Holds a writer of some of the file's tensors; writes them when it is told to, and ends."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1], sys.argv[1] + '/support'\n"
        "from pathlib import Path; import test_units as t\n"
        "names = sys.argv[3].split(',')\n"
        "writer = t.ShardWriter(Path(sys.argv[2]), t.described(), names=names)\n"
        "print('open', flush=True); sys.stdin.readline()\n"
        "for name, value in t.made(names).items(): t.write_tensor(writer, name, value)\n"
        "writer.close(validate=True)\n"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(path), ",".join(names)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    """Tensors beside each other, within the same pages."""
    save_file(made(), tmp_path / "theirs", metadata={"format": "pt"})
    create_shard(tmp_path / "ours", described(), resume=False)
    with another_process(tmp_path / "ours", ["a", "d"]) as process:
        writer = ShardWriter(tmp_path / "ours", described(), names=["b", "c", "e"])
        for name, value in made(["b", "c", "e"]).items():
            write_tensor(writer, name, value)
        process.communicate("go\n")
        assert process.returncode == 0
        writer.close(validate=True)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_bytes_that_another_process_writes_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_shard(tmp_path / "file", described(), resume=False)
    with another_process(tmp_path / "file", ["d"]) as process:
        monkeypatch.setattr(writing, "LOCK_SECONDS", 0.2)
        ShardWriter(tmp_path / "file", described(), names=["a", "b", "e"]).close(validate=False)
        with pytest.raises(imf.ResourceError, match=r"file: another process is writing the same tensors"):
            ShardWriter(tmp_path / "file", described(), names=["e", "d"])
        monkeypatch.setattr(writing, "LOCK_SECONDS", 30)
        monkeypatch.setattr(writing.time, "sleep", lambda _: process.kill())  # while it waits
        ShardWriter(tmp_path / "file", described()).close(validate=False)


def test_units_lock_what_they_write_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make_family(tmp_path)
    held: list[tuple[int, int]] = []
    lock = fcntl.lockf

    def watched(descriptor: int, command: int, length: int, start: int) -> None:
        held.append((start, start + length))
        lock(descriptor, command, length, start)

    monkeypatch.setattr(fcntl, "lockf", watched)
    merge_in(config_of(family, tmp_path / "out", method="mean"), 4)
    path = tmp_path / "out/model.safetensors"
    first = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert len(held) >= 4
    ends = [first, *(end for _, end in sorted(held))]
    assert [start for start, _ in sorted(held)] == ends[:-1]  # side by side
    assert ends[-1] == path.stat().st_size


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_shard(tmp_path / "file", described(), resume=False)
    before = set(os.listdir("/dev/fd"))

    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(imf.ResourceError, match=r"file: cannot be locked \(No locks available\); .* byte-range locks"):
        ShardWriter(tmp_path / "file", described())
    assert set(os.listdir("/dev/fd")) == before


def test_a_file_made_again_keeps_its_bytes_only_to_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    create_shard(path, described(), resume=False)
    writer = ShardWriter(path, described())
    for name, value in made().items():
        write_tensor(writer, name, value)
    writer.close(validate=True)
    content = path.read_bytes()
    create_shard(path, described(), resume=True)
    assert path.read_bytes() == content
    create_shard(path, described(), resume=False)
    first = 8 + int.from_bytes(content[:8], "little")
    assert path.read_bytes() == content[:first] + bytes(len(content) - first)


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_are_those_asked_for_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    base = {"a.weight": torch.randn(8, 8)}
    family = (save_folder(tmp_path / "base", base), [save_folder(tmp_path / "expert", make_expert(base, 0))])
    config = config_of(family, tmp_path / "out", method="iso-c")

    def watch(_: Any) -> None:
        seen.append(sum(thread.name.startswith("isomerge-compute") for thread in threading.enumerate()))

    imf.merge(config, threads=before + 1, observer=watch)
    assert before + 1 in seen
    assert torch.get_num_threads() == before
    with pytest.raises(imf.ConfigError, match="threads is 0; expected a whole number, 1 or more"):
        imf.merge({**config, "out": str(tmp_path / "other")}, threads=0)
    assert not (tmp_path / "other").exists()
