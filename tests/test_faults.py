"""What may happen to a merge: kills, full and failing disks, other runs, changed inputs. The output is absent, as it
was, or complete; never plausible and wrong.

``fault_driver.py`` and ``fault_fuzz.py`` do more of the same (``make faults``).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import isomerge_fast as imf
from checkpoints import listing, load_folder, make_base, make_expert, make_family, save_folder
from fault_driver import difference, make_families, state_of
from fault_fuzz import fuzz
from fault_runs import CHANGES, KINDS, Fault, Outcome, WarmProcess, build_shim, compiler
from isomerge_fast.checkpoint.io.reader import Reader, files_of, whole
from isomerge_fast.checkpoint.io.writer import ShardWriter
from isomerge_fast.checkpoint.layout import open_checkpoint
from isomerge_fast.checkpoint.output.staging import run_folders
from isomerge_fast.config import MergeConfig
from isomerge_fast.execution.verify import verify
from isomerge_fast.methods import as_deltas
from isomerge_fast.planning.planner import make_plan
from isomerge_fast.planning.resources import check_resources

SUPPORT = Path(__file__).resolve().parent / "support"
KILL_POINTS, FUZZED_INPUTS = 200, 500
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
Family = tuple[Path, list[Path]]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or compiler() is None:
        pytest.skip(
            "the shim that kills and fails calls is C for Linux, and there is no compiler here (apt install gcc)"
        )
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def warm(shim: Path) -> Iterator[WarmProcess]:
    with WarmProcess(shim) as process:
        yield process


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return make_families(tmp_path_factory.mktemp("families"))


def config_of(family: Family, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "base": str(family[0]),
        "experts": [str(expert) for expert in family[1]],
        "out": str(out),
        "method": "iso-c",
        **changes,
    }


def expect_same(found: Path, expected: Path) -> None:
    assert state_of(found) == state_of(expected), difference(state_of(found), state_of(expected))


def positions(count: int) -> list[int]:
    """The first of so many calls, one in the middle, and the last."""
    return sorted({1, (count + 1) // 2, count} - {0})


def the_rename_that_commits(log: list[str]) -> int:
    """Its number among the renames."""
    renames = [line for line in log if line.startswith("rename ")]
    (nth,) = [index for index, line in enumerate(renames, 1) if line.split(" ")[1].endswith("/new")]
    return nth


class Point:
    """A folder for one output, and the merge that is to be harmed there."""

    def __init__(self, folder: Path, warm: WarmProcess, family: Family, **changes: Any) -> None:
        self.folder, self.out, self._warm = folder / "point", folder / "point/out", warm
        self.folder.mkdir(parents=True)
        self._config = config_of(family, self.out, **changes)
        self.whole = folder / "unharmed/out"
        self.whole.parent.mkdir()
        self._config_of_whole = {**self._config, "out": str(self.whole)}
        self.unharmed = warm.run(self._config_of_whole, Fault(str(folder / "unharmed")), log=True)
        assert self.unharmed.status == "done"

    def run(
        self, mode: str = "count", nth: int = 0, *, kinds: int = CHANGES, error: int = 0, **options: Any
    ) -> Outcome:
        return self._warm.run(self._config, Fault(str(self.folder), mode, nth, kinds, error), **options)

    def resume(self, **options: Any) -> None:
        """To the bytes of the unharmed run, and nothing beside them."""
        outcome = self.run(resume=True, **options)
        assert outcome.status == "done", outcome.message
        expect_same(self.out, self.whole)
        assert os.listdir(self.folder) == ["out"]

    def reset(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is such a thing: syncing costs nothing there."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def point(memory: Path, warm: WarmProcess, families: dict[str, Family]) -> Point:
    return Point(memory, warm, families["sharded"], scaling=[0.5, 1.0])


# --- SIGKILL at any moment, power cut after exit 0 --------------------------------------------------------------------


def test_sigkill_at_any_moment_then_resume_ends_in_the_same_bytes(shim: Path) -> None:
    """Kills, errors and short writes at random calls of eight kinds of merge."""
    folder = MEMORY or tempfile.gettempdir()
    command = [sys.executable, str(SUPPORT / "fault_driver.py"), "--points", str(KILL_POINTS), "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": ""}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 wrong outputs" in done.stdout


def test_all_is_synced_before_the_rename_that_commits_and_that_is_synced_after_it(point: Point) -> None:
    """For power cuts: no byte and no entry of a folder is only in memory when the output gets its name."""
    calls = [line.rsplit(" ", 1)[0].split(" ", 1) for line in point.unharmed.log]
    root = str(point.whole.parent)
    commit, staged = next(
        (index, path) for index, (name, path) in enumerate(calls) if name == "rename" and path.endswith("/new")
    )
    unsynced = set()
    for name, path in calls[:commit]:
        if name == "sync":
            unsynced.discard(path)
        else:
            unsynced |= {path} if name in ("write", "truncate") else set()
            unsynced |= {str(Path(path).parent)} if name in ("open", "mkdir", "rename", "unlink") else set()
    assert {path for path in unsynced if path.startswith(staged)} == set()
    assert {path for name, path in calls if name == "write"} >= {f"{staged}/scaling-1/1_Pooling/config.json"}
    after = [(name, path) for name, path in calls[commit + 1 :]]
    assert after.index(("sync", root)) < min(index for index, (name, _) in enumerate(after) if name == "unlink")


def test_a_staged_output_without_its_journal_is_not_trusted(point: Point) -> None:
    """A shard of the right size and name, and one that does not belong: neither gets into the output."""
    staged = point.folder / ".out.isomerge/run-0/new/scaling-1"
    staged.mkdir(parents=True)
    for name in ("model-00001-of-00003.safetensors", "model-00007-of-00009.safetensors"):
        (staged / name).write_bytes(bytes(6000))
    (point.folder / ".out.isomerge/run-0/journal.jsonl").write_bytes(b'{"fingerprint": "of a line that was torn')
    point.resume()


def test_a_journal_line_that_is_damaged_is_not_believed(point: Point) -> None:
    """One digit of a report in it, which no checksum of tensors tells of."""
    nth = the_rename_that_commits(point.unharmed.log)
    assert point.run("kill-before", nth, kinds=KINDS["rename"]).status == "killed"
    assert not point.out.exists()
    journal = run_folders(point.out)[0] / "journal-1.jsonl"
    content = journal.read_bytes()
    at = content.index(b'"read_bytes": ') + len(b'"read_bytes": ')
    journal.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    point.resume()


def test_half_of_a_replaced_output_is_never_put_back(point: Point) -> None:
    """Killed while the old output is deleted; then the new one is removed by its owner, and the merge run anew."""
    assert point.run().status == "done"
    assert point.run("kill-after", 3, kinds=KINDS["unlink"], overwrite=True).status == "killed"
    assert len(list((point.folder / ".out.isomerge").rglob("*"))) > 2
    shutil.rmtree(point.out)
    outcome = point.run()
    assert outcome.status == "done", outcome.message
    expect_same(point.out, point.whole)
    assert os.listdir(point.folder) == ["out"]


def test_resume_with_overwrite_replaces_another_finished_merge(tmp_path: Path) -> None:
    """What a script that always says both does after a kill before the first byte was staged."""
    family = make_family(tmp_path)
    imf.merge(config_of(family, tmp_path / "out", scaling=0.5))
    config = config_of(family, tmp_path / "out")
    with pytest.raises(imf.ConfigError, match="holds another merge; --overwrite replaces it"):
        imf.merge(config, resume=True)
    imf.merge(config, resume=True, overwrite=True)
    imf.merge({**config, "out": str(tmp_path / "other")})
    expect_same(tmp_path / "out", tmp_path / "other")
    report = imf.merge(config, resume=True, overwrite=True)  # finished: left as it is
    assert report.to_dict().items() <= json.loads((tmp_path / "out/report.json").read_text()).items()
    (tmp_path / "out/manifest.json").write_text("{")
    with pytest.raises(imf.VerificationError, match=r"manifest\.json"):
        imf.merge(config, resume=True)
    with pytest.raises(imf.ConfigError, match=r"manifest\.json cannot be read, so it is not replaced"):
        imf.merge(config, resume=True, overwrite=True)


def test_a_linked_output_folder_is_replaced_where_it_is(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/merged")
    imf.merge(config_of(family, tmp_path / "out"))
    assert (tmp_path / "out").is_symlink()
    assert verify(tmp_path / "disk/merged").tensors == len(make_base())


# --- no space, I/O error, quota ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
def test_no_space_io_error_or_quota_at_every_stage(point: Point, error: int) -> None:
    """The first, a middle and the last call of every kind fail, and all of that kind after it."""
    for kind in ("mkdir", "open", "lock", "truncate", "write", "sync", "rename", "close", "unlink"):
        count = sum(line.split(" ")[0] == kind for line in point.unharmed.log)
        assert count, kind
        for nth in positions(count):
            outcome = point.run("fail-on", nth, kinds=KINDS[kind], error=error)
            # What was there already need not be made; what was replaced, or locked, need not go away; a second lock
            # that is refused is as it should be.
            tolerated = kind in ("mkdir", "unlink") or (kind, nth) in (("close", count), ("rename", count), ("lock", 2))
            assert outcome.status == "ResourceError" or (tolerated and outcome.status == "done"), (kind, nth, outcome)
            assert outcome.status == "done" or str(point.folder) in outcome.message
            assert not point.out.exists() or state_of(point.out) == state_of(point.whole), (kind, nth)
            point.resume()
            point.reset()


def test_a_failed_copy_of_a_companion_names_the_copy(point: Point) -> None:
    writes = [line for line in point.unharmed.log if line.startswith("write ")]
    nth = next(index for index, line in enumerate(writes, 1) if "tokenizer.json" in line)
    outcome = point.run("fail", nth, kinds=KINDS["write"], error=errno.ENOSPC)
    assert outcome.status == "ResourceError"
    assert f"{run_folders(point.out)[0]}/new/scaling-0.5/tokenizer.json: no space left" in outcome.message
    point.resume()


def test_short_writes_are_completed(memory: Path, warm: WarmProcess, families: dict[str, Family]) -> None:
    """Every write cut to half, one a run; those past the page cache too."""
    for name in ("one-file", "large"):
        point = Point(memory / name, warm, families[name], method="mean")
        for nth in range(1, 1 + sum(line.startswith("write ") for line in point.unharmed.log)):
            outcome = point.run("short", nth, kinds=KINDS["write"])
            assert outcome.status == "done", outcome.message
            expect_same(point.out, point.whole)
            point.reset()


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_a_read_that_fails_keeps_what_is_staged(point: Point, families: dict[str, Family], error: int) -> None:
    """A disk's or a server's error may pass. In a header it is found before anything is staged."""
    inputs = str(families["sharded"][0].parent)
    config = point._config
    calls = point._warm.run(config, Fault(inputs, kinds=KINDS["read"])).calls
    point.reset()
    seen = set()
    for nth in range(2, calls, 5):
        outcome = point._warm.run(config, Fault(inputs, "fail", nth, KINDS["read"], error))
        seen.add(outcome.status)
        assert inputs in outcome.message
        staged = point.folder.joinpath(".out.isomerge").exists()
        # Of a weight, or of what is copied as it is; of a header.
        assert outcome.status in (("UnreadableError", "ResourceError") if staged else ("InputError",))
        point.resume()
        point.reset()
    assert seen == {"UnreadableError", "ResourceError", "InputError"}


def test_a_read_that_fails_is_no_fault_of_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(save_folder(tmp_path, make_base()))
    stored = checkpoint.tensors["conv.weight"]

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with (
        Reader(files_of(checkpoint)) as reader,
        pytest.raises(imf.ResourceError, match=r"conv\.weight.*cannot be read"),
    ):
        reader.read(whole(stored))
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with (
        Reader(files_of(checkpoint)) as reader,
        pytest.raises(imf.InputError, match=r"ends inside tensor 'conv\.weight'"),
    ):
        reader.read(whole(stored))
    stored.file.unlink()
    with Reader(files_of(checkpoint)) as reader, pytest.raises(imf.InputError, match="gone"):
        reader.read(whole(stored))


def test_the_old_output_is_put_back_when_the_new_one_cannot_be_renamed(point: Point) -> None:
    shutil.copytree(point.whole, point.out)
    (point.out / "scaling-1/config.json").write_text("of the old one")
    before = listing(point.out)
    log = point.run(overwrite=True, log=True).log
    shutil.rmtree(point.out)
    shutil.copytree(point.whole, point.out)
    (point.out / "scaling-1/config.json").write_text("of the old one")
    nth = the_rename_that_commits(log)
    outcome = point.run("fail", nth, kinds=KINDS["rename"], error=errno.EIO, overwrite=True)
    assert outcome.status == "ResourceError"
    assert listing(point.out) == before
    point.resume(overwrite=True)


def test_every_shard_is_closed_when_closing_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make_family(tmp_path, shards=3)
    real, closed = ShardWriter.close, []

    def close(writer: ShardWriter, *, validate: bool) -> None:
        real(writer, validate=validate)
        closed.append(writer.path.name)
        raise imf.ResourceError(f"{writer.path}: cannot be written")

    monkeypatch.setattr(ShardWriter, "close", close)
    with pytest.raises(imf.ResourceError):
        imf.merge(config_of(family, tmp_path / "out"))
    assert len(closed) == 3


def test_preflight_counts_what_is_staged(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that an unfinished merge has filled holds the rest of it."""
    nth = the_rename_that_commits(point.unharmed.log)
    assert point.run("kill-before", nth, kinds=KINDS["rename"]).status == "killed"
    assert not point.out.exists()
    config = MergeConfig(**{**point._config, "scaling": [0.5, 1.0]})
    usage = shutil.disk_usage(point.folder)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_resources(make_plan(config), max_ram=None, max_vram=None, device=torch.device("cpu"))
    shutil.rmtree(point.folder / ".out.isomerge")
    with pytest.raises(imf.ResourceError, match="100 bytes are free"):
        check_resources(make_plan(config), max_ram=None, max_vram=None, device=torch.device("cpu"))


def test_more_shards_than_files_may_be_open(tmp_path: Path, warm: WarmProcess) -> None:
    """30 shards of 5 checkpoints and an output, under a soft limit that is lower."""
    tensors = {f"layers.{index}.weight": torch.randn(4, 4) for index in range(30)}
    base = save_folder(tmp_path / "base", tensors, shards=30)
    experts = [save_folder(tmp_path / f"e{index}", make_expert(tensors, index), shards=30) for index in range(4)]
    config = config_of((base, experts), tmp_path / "out")
    outcome = warm.run(config, Fault(str(tmp_path)), open_files=64)
    assert outcome.status == "done", outcome.message


# --- two runs into one folder -----------------------------------------------------------------------------------------

WAITING = """
import sys, isomerge_fast as imf
def observer(progress):
    if progress.done_tensors:
        print("merging", flush=True)
        sys.stdin.read()
imf.merge({config!r}, observer=observer)
"""


def test_two_runs_into_one_folder_and_the_lock_of_a_dead_one(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    config = config_of(family, tmp_path / "out")
    first = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(config=config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdin is not None
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "merging\n"
        before = {}
        while before != (before := listing(tmp_path)):  # the thread that writes may have something left
            time.sleep(0.3)
        for resume, overwrite in ((False, False), (True, False), (False, True)):
            with pytest.raises(imf.ConfigError, match=r"out: another merge is writing it at this moment"):
                imf.merge(config, resume=resume, overwrite=overwrite)
        assert listing(tmp_path) == before
    finally:
        first.kill()
        first.wait()
        first.stdin.close()
        first.stdout.close()
    assert (tmp_path / ".out.isomerge/lock").exists()
    imf.merge(config, resume=True)
    imf.merge({**config, "out": str(tmp_path / "other")})
    expect_same(tmp_path / "out", tmp_path / "other")


# --- an input changes -------------------------------------------------------------------------------------------------


def test_an_input_that_changed_before_a_resume_is_named(tmp_path: Path, warm: WarmProcess) -> None:
    family = make_family(tmp_path, shards=2)
    point = Point(tmp_path, warm, family)
    assert point.run("kill-after", 20).status == "killed"
    shard = family[1][1] / "model-00002-of-00002.safetensors"
    os.utime(shard, ns=(1, 1))
    before = listing(run_folders(point.out)[0])
    outcome = point.run(resume=True)
    assert outcome.status == "ConfigError"
    assert f"({shard} has changed)" in outcome.message
    assert listing(run_folders(point.out)[0]) == before
    assert point.run(resume=True, overwrite=True).status == "done"
    assert os.listdir(point.folder) == ["out"]


def test_an_input_that_is_cut_short_during_the_run_is_named(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    file = family[1][0] / "model.safetensors"

    def observer(progress: Any) -> None:
        if progress.tensor == "layers.0.down.weight":
            os.truncate(file, 2000)

    with pytest.raises(imf.InputError, match=r"expert0.model\.safetensors: (ends inside|changed)"):
        imf.merge(config_of(family, tmp_path / "out"), observer=observer)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.isomerge").exists()


# --- malformed inputs -------------------------------------------------------------------------------------------------


def test_damaged_headers_and_indexes_are_errors_that_name_the_file_or_valid_plans() -> None:
    tally = fuzz(FUZZED_INPUTS, seed=0)
    assert tally.wrong == []
    assert tally.plans > FUZZED_INPUTS / 20
    assert tally.errors["InputError"] > FUZZED_INPUTS / 2


W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": ["F32"]}, r"'w': dtype \['F32'\] is not supported"),
        ({"dtype": {}}, "'w': dtype {} is not supported"),
        ({"dtype": 4}, "'w': dtype 4 is not supported"),
        ({"shape": [1] * 64 + [2]}, "'w': 65 dimensions"),
    ],
    ids=["list", "dict", "number", "dimensions"],
)
def test_dtypes_and_shapes_of_other_kinds_are_refused_by_name(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    text = json.dumps({"w": {**W, **change}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(imf.InputError, match=rf"model\.safetensors.*{message}"):
        make_plan(MergeConfig(str(tmp_path), [str(tmp_path)]))


@pytest.mark.parametrize("shard", ["x" * 300, "\ud800.safetensors"], ids=["long", "half-a-surrogate"])
def test_shard_names_that_no_file_can_have(tmp_path: Path, shard: str) -> None:
    save_folder(tmp_path, make_base(), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(imf.InputError, match=r"index\.json"):
        make_plan(MergeConfig(str(tmp_path), [str(tmp_path)]))


@pytest.mark.parametrize("value", ['"\\ud800"', "[" * 300 + "]" * 300], ids=["half-a-surrogate", "deep"])
def test_a_configuration_that_could_not_be_written_again(tmp_path: Path, value: str) -> None:
    """Said before the merge, and not when the output's is written."""
    save_folder(tmp_path, make_base())
    (tmp_path / "config.json").write_text(f'{{"a": {value}}}')
    with pytest.raises(imf.InputError, match=r"config\.json"):
        make_plan(MergeConfig(str(tmp_path), [str(tmp_path)]))


def test_an_expert_that_lacks_what_the_base_ties_is_told_of_with_the_reason(tmp_path: Path) -> None:
    base, experts = make_family(tmp_path)
    head = {"lm_head.weight": torch.ones(48, 16)}
    save_folder(base, {**make_base(), **head})
    save_folder(experts[0], {**load_folder(experts[0]), **head})
    save_folder(experts[2], {**load_folder(experts[2]), **head})
    (experts[1] / "config.json").write_text('{"tie_word_embeddings": true}')
    with pytest.raises(imf.InputError, match=r"expert1: tensor 'lm_head\.weight'.*the expert ties its word embeddings"):
        imf.merge(config_of((base, experts), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- solvers that give up ---------------------------------------------------------------------------------------------


def give_up(*_: object, **__: object) -> None:
    raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge\nmore of it")


@pytest.mark.parametrize("shape", [(6, 9), (70, 90), (140, 150)], ids=str)  # small matrices have a form of their own
def test_after_a_solver_that_gives_up_comes_the_next(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [torch.randn(shape) for _ in range(3)]
    expected, _ = imf.IsoC().merge(as_deltas(deltas))
    monkeypatch.setattr(torch.linalg, "eigh", give_up)
    value, stats = imf.IsoC().merge(as_deltas(deltas))
    assert torch.allclose(value, expected, atol=1e-5)
    assert stats.algorithm == "iso-c/svd-fp64"
    assert stats.escalations[0] == "gram-eigh-fp64: linalg.eigh: The algorithm failed to converge"


def test_where_every_solver_gives_up_the_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make_family(tmp_path)
    monkeypatch.setattr(torch.linalg, "eigh", give_up)
    monkeypatch.setattr(torch.linalg, "svd", give_up)
    with pytest.raises(imf.InputError, match=r"'embed_tokens\.weight'.*no solver.*failed to converge; svd"):
        imf.merge(config_of(family, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.isomerge").exists()


# --- the same bytes, modes, file systems ------------------------------------------------------------------------------


def test_the_same_bytes_whatever_the_hash_seed_and_the_order_of_reads(tmp_path: Path) -> None:
    """And whatever the number of threads, as each tensor is computed by one of them."""
    tensors = {**make_base(), "large.weight": torch.randn(700, 500)}
    base = save_folder(tmp_path / "base", tensors, shards=2)
    family = (base, [save_folder(tmp_path / f"e{index}", make_expert(tensors, index)) for index in range(2)])
    code = """if True:
        import sys, json, torch, isomerge_fast as imf
        torch.set_num_threads(int(sys.argv[3]))
        for config in json.loads(sys.argv[1]):
            imf.merge(config, io=sys.argv[2])
    """
    runs = []
    for seed, threads, io in (("0", "1", "auto"), ("4711", "2", "buffered"), ("1", "5", "auto")):
        spectral = config_of(family, tmp_path / seed / "spectral", method="iso-cts", scaling=[0.5, 1.0])
        linear = config_of(family, tmp_path / seed / "linear", method="task-arithmetic", dtype="bfloat16")
        command = [sys.executable, "-c", code, json.dumps([spectral, linear]), io, threads]
        runs.append(subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": seed}))
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    for seed in ("4711", "1"):
        expect_same(tmp_path / seed / "spectral", tmp_path / "0/spectral")
        expect_same(tmp_path / seed / "linear", tmp_path / "0/linear")


def test_resume_goes_on_with_any_number_of_threads(tmp_path: Path, warm: WarmProcess) -> None:
    """Each tensor is computed by one of them."""
    tensors = {"a.weight": torch.randn(8, 8), "b.weight": torch.randn(700, 500), "c.weight": torch.randn(500, 500)}
    base = save_folder(tmp_path / "base", tensors)
    family = (base, [save_folder(tmp_path / "expert", make_expert(tensors, 0))])
    point = Point(tmp_path, warm, family)
    journal_lines = [index for index, line in enumerate(point.unharmed.log, 1) if "journal-1.jsonl " in line]
    assert point.run("kill-after", journal_lines[1]).status == "killed"
    point.resume(threads=2)
    assert point.run(overwrite=True, threads=3).status == "done"
    assert state_of(point.out) == state_of(point.whole)


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_files_and_folders_of_the_output_have_the_mode_of_the_umask(point: Point, umask: int) -> None:
    assert point.run(umask=umask).status == "done"
    paths = [point.out, *point.out.rglob("*")]
    assert len(paths) > 20
    for path in paths:
        mode = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == mode & ~umask, path


def test_read_only_inputs_are_enough(tmp_path: Path, warm: WarmProcess) -> None:
    """Nothing below them is opened for writing, locked, made or changed (root, whom no mode stops, tries it too)."""
    inputs = tmp_path / "inputs"
    family = make_family(inputs)
    for path in sorted(inputs.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    outcome = warm.run(config_of(family, tmp_path / "out"), Fault(str(inputs)), log=True)
    for path in inputs.rglob("*"):
        path.chmod(0o755)
    assert (outcome.status, outcome.log) == ("done", [])


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
@pytest.mark.parametrize("nth", [1, 2], ids=["files", "folders"])
def test_a_file_system_without_rename_is_told_of_before_the_work(point: Point, error: int, nth: int) -> None:
    outcome = point.run("fail-on", nth, kinds=KINDS["rename"], error=error, log=True)
    assert outcome.status == "ResourceError"
    assert "an output needs a file system that renames files and folders" in outcome.message
    assert not point.out.exists()
    assert not any(path.suffix == ".safetensors" for path in point.folder.rglob("*"))
    point.resume()


def test_a_file_system_without_truncate_is_told_of_before_the_work(point: Point) -> None:
    outcome = point.run("fail-on", 1, kinds=KINDS["truncate"], error=errno.EOPNOTSUPP)
    assert outcome.status == "ResourceError"
    assert ".safetensors: cannot be written (Operation not supported)" in outcome.message
    point.resume()
