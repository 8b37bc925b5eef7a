"""Drivers that die, and machines that are not alike, do not answer or are lost."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import isomerge_fast as imf
import peers
from isomerge_fast.execution.work_item import WorkResult
from ray_faults import Machine

peers.need("ray", "ray")

from isomerge_fast.integrations.ray import cluster, executor, session, worker  # noqa: E402  # after that line
from ray_site import (  # noqa: E402  # likewise
    HOST,
    PATIENCE_SECONDS,
    Family,
    Merge,
    Site,
    command,
    in_units,
    is_gone,
    killed_when_held,
    wait_for,
    write_config,
)

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

# --- a driver that dies -----------------------------------------------------------------------------------------------


def copied(merge: Merge, name: str) -> Merge:
    """The unfinished merge, elsewhere."""
    other = Merge(merge.folder.parent / name, (Path(), []))
    other.config = {**merge.config, "out": str(other.out)}
    shutil.copytree(merge.staging, other.staging)
    return other


def test_a_driver_killed_on_a_cluster(
    connected: Site, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed by one process, and over Ray with other units for another number of workers."""
    merge = Merge(tmp_path, families["sharded"], save_delta=True)
    line = command("run", write_config(merge), "--ray", connected.address, "--threads", 1, "--device", "cpu")
    killed_when_held(merge, connected.head, line, 2)
    locally = copied(merge, "locally")
    locally.resume_locally()
    connected.second()
    in_units(monkeypatch, 2)
    report = merge.over_ray(resume=True)
    merge.expect_done()
    before = sum(worker["tensors"] for worker in report.workers if not worker["units"])
    assert before >= 4  # by the workers of the driver that was killed
    assert sum(worker["tensors"] for worker in report.workers) == len(report.tensors)


def test_a_merge_without_ray_goes_on_over_ray(connected: Site, families: dict[str, Family], tmp_path: Path) -> None:
    merge = Merge(tmp_path, families["eight"])
    line = command("run", write_config(merge), "--threads", 1, "--device", "cpu")
    killed_when_held(merge, connected.head, line, 1, env=connected.head.environment)
    with pytest.raises(imf.ConfigError, match="an unfinished merge lies in"):
        merge.over_ray()
    report = merge.over_ray(resume=True)
    merge.expect_done()
    assert sorted(worker["tensors"] for worker in report.workers) == [2, 6]


# --- machines that are not alike --------------------------------------------------------------------------------------


@pytest.fixture
def second(site: Site) -> Iterator[Machine]:
    """Another machine. This process is connected anew, so that it has new processes there."""
    machine = site.second()
    site.disconnect()
    yield machine
    machine.pretend(None)
    machine.clear()
    site.disconnect()


@pytest.mark.parametrize(("version", "said"), [("0.0.1", "0.0.1"), ("", "not installed")], ids=["other", "absent"])
def test_a_machine_with_another_version_or_without_it(
    site: Site, second: Machine, families: dict[str, Family], tmp_path: Path, version: str, said: str
) -> None:
    second.pretend(version)
    site.connect()
    merge = Merge(tmp_path, families["one-file"])
    with pytest.raises(imf.ConfigError) as raised:
        merge.over_ray()
    first, *problems = str(raised.value).splitlines()
    assert first == "every machine of the Ray cluster needs the versions of this one:"
    assert re.fullmatch(
        rf"  - {HOST} \(.*\): isomerge-fast {re.escape(said)}; here it is {imf.__version__}", problems[0]
    )
    assert all("torch" in problem for problem in problems[1:])
    merge.expect_nothing()


def test_a_machine_that_does_not_see_the_files(
    site: Site, second: Machine, families: dict[str, Family], tmp_path: Path
) -> None:
    site.connect()
    merge = Merge(tmp_path, families["one-file"])
    expert = families["one-file"][1][1] / "model.safetensors"
    second.give("stat", str(merge.folder), "ENOENT")
    second.give("stat", str(expert), "ENOENT")
    with pytest.raises(imf.ResourceError) as raised:
        merge.over_ray()
    first, *problems = str(raised.value).splitlines()
    assert first.startswith("every machine of the Ray cluster has to see the inputs and the output's folder")
    assert len(problems) == 2
    assert re.fullmatch(
        rf"  - {HOST} \(.*\): {re.escape(str(merge.folder))}: not the folder that the driver sees", problems[0]
    )
    assert re.fullmatch(rf"  - {HOST} \(.*\): {re.escape(str(expert))}: No such file or directory", problems[1])
    merge.expect_nothing()


def test_what_a_machine_says_of_other_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    ask, stamp = worker.files_question(), (1, file.stat().st_mtime_ns)
    assert ask(str(file), str(tmp_path), {str(file): stamp}) == []
    for other in ((2, stamp[1]), (1, stamp[1] + 1)):
        assert ask(str(file), str(tmp_path), {str(file): other}) == [f"{file}: another file than the driver sees"]


def test_a_machine_that_does_not_answer(
    site: Site, second: Machine, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.connect()
    merge = Merge(tmp_path, families["one-file"])
    with session.ray_executor(None, device="cpu", threads=1):
        pass  # has processes there
    second.give("stat", str(merge.folder), "hold")
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 1.0)
    with pytest.raises(imf.ResourceError, match=rf"{HOST} \(.*\) of the Ray cluster does not answer \("):
        merge.over_ray()
    merge.expect_nothing()


def test_a_machine_that_was_lost_just_before(connected: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes it for alive until it has found out; from then on it need not answer."""
    real = cluster.machines
    about = {"NodeID": "ab" * 28, "NodeManagerHostname": "lost", "NodeManagerAddress": "there", "Resources": {}}
    lost = cluster.Machine(about)
    here = [machine.id for machine in real()]
    lists = [[*real(), lost]]
    monkeypatch.setattr(cluster, "machines", lambda: lists.pop() if lists else real())
    assert [machine.id for machine, _ in cluster.ask_all(worker.versions_question())] == here
    monkeypatch.setattr(cluster, "machines", lambda: [*real(), lost])
    with pytest.raises(imf.ResourceError, match=r"lost \(there\) of the Ray cluster does not answer \("):
        cluster.ask_all(worker.versions_question())


def test_a_machine_that_is_lost(
    site: Site,
    second: Machine,
    families: dict[str, Family],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    results: list[WorkResult],
) -> None:
    """Both machines merge; what the lost one had to do is done by the other."""
    site.connect()
    merge = Merge(tmp_path, families["eight"])
    in_units(monkeypatch, 3)
    orders = [merge.order(machine, "pwrite", "/new/", "hold", lines=1) for machine in (site.head, second)]
    running = merge.started()
    wait_for(lambda: [len(set(given.obeyed)) for given in orders] == [2, 1], "both machines are at work", running)
    (lost,) = set(orders[1].obeyed)
    site.kill_second()
    wait_for(lambda: is_gone(lost), "what ran on the lost machine is gone")
    for given in orders:
        given.take_back()
    report = running.result(PATIENCE_SECONDS)
    merge.expect_done()
    assert {worker["pid"]: worker["tensors"] for worker in report.workers}[lost] == 1
    assert lost not in {result.process["pid"] for result in results}


def test_no_machine_is_left_that_is_large_enough(
    connected: Site, families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor comes one within the time that is waited for it; what still runs is ended."""
    merge = Merge(tmp_path, families["eight"])
    monkeypatch.setattr(executor, "PATIENCE_SECONDS", 1.0)
    given = merge.order(connected.head, "pwrite", "/new/", "hold", lines=1)
    running = merge.started()
    wait_for(lambda: given.obeyed, "the worker is held", running)
    monkeypatch.setattr(executor.RayExecutor, "workers", lambda executor, plan, threads: 0)
    with pytest.raises(imf.ResourceError, match=r"no machine .* has 1 CPU\(s\).*; --resume continues"):
        running.result(PATIENCE_SECONDS)
    monkeypatch.undo()
    merge.resume_locally()
