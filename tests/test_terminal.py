"""What comes out at the terminal: names that are shown and not obeyed, streams that fail, and signals."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import isomerge_fast as imf
from checkpoints import listing, make_family, save_folder
from isomerge_fast.cli import application
from isomerge_fast.cli.render import print_report
from isomerge_fast.cli.terminal import stoppable
from isomerge_fast.errors import InputError, IsomergeError, ResourceError, VerificationError, visible
from isomerge_fast.execution import engine
from isomerge_fast.execution.report import Report

FORGED = "every checksum is right"
# Clears the screen, begins a line of ours, runs from right to left, hides; and markup of rich's and of Markdown.
HOSTILE = f"\x1b[2J\n{FORGED}\r\x7f\x9b31m\u202e\u2066\u200b\u2028\u061c`[bold]red[/]:smile:"
SHOWN = r"\x1b[2J\n" + FORGED + r"\r\x7f\x9b31m\u202e\u2066\u200b\u2028\u061c`[bold]red[/]:smile:"
ORDINARY = "é中文α🙂[/]"
# All that a header lets a tensor's name be.
NAMES = [f"a.{ORDINARY}.weight", "b.\x9b31m\u202e\u2028\u200b[bold]x[/bold]:smile:.weight"]


@dataclass(frozen=True)
class Ended:
    """How a command line ended; what came out is text where the stream did not fail."""

    code: int
    out: str
    err: str


Isomerge = Callable[..., Ended]


def raw(kind: str) -> io.RawIOBase | io.BytesIO:
    """Where a stream leads: ``whole``, ``full``, or to a ``pipe`` that nobody reads."""
    if kind == "full":
        return open("/dev/full", "wb", buffering=0)
    if kind == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
        return open(writing, "wb", buffering=0)
    return io.BytesIO()


@pytest.fixture
def isomerge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Isomerge]:
    """The entry point in this process, with streams that it has not seen before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def call(*arguments: object, stdout: str = "whole", stderr: str = "whole", encoding: str = "utf-8") -> Ended:
        ends = [raw(stdout), raw(stderr)]
        buffers = [end if isinstance(end, io.BytesIO) else io.BufferedWriter(end) for end in ends]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["isomerge", *map(str, arguments)])
            for name, buffer in zip(("stdout", "stderr"), buffers, strict=True):
                patch.setattr(sys, name, io.TextIOWrapper(buffer, encoding=encoding))
            with pytest.raises(SystemExit) as ended:
                application.main()
            sys.stdout.flush()
            sys.stderr.flush()
            texts = [end.getvalue().decode(encoding) if isinstance(end, io.BytesIO) else "" for end in ends]
        return Ended(int(ended.value.code or 0), *texts)

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base, experts = make_family(tmp_path_factory.mktemp("family"), tasks=1)
    return base, experts[0]


@pytest.fixture(scope="module")
def merged(family: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    imf.merge({"base": family[0], "experts": [family[1]], "out": out})
    return out


def run_of(family: tuple[Path, Path], out: Path) -> list[object]:
    return ["run", "--base", family[0], "--expert", family[1], "--out", out]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in listing(folder).items() if name.endswith(".safetensors")}


def is_harmless(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


class TestNames:
    @pytest.mark.parametrize(
        ("text", "shown"), [(HOSTILE, SHOWN), (ORDINARY, ORDINARY), ("\udcff\udcc3", r"\udcff\udcc3"), ("", "")]
    )
    def test_are_shown(self, text: str, shown: str) -> None:
        assert visible(text) == shown
        assert visible("a\nb\tc", keep="\n") == "a\nb\\tc"

    @pytest.mark.parametrize("kind", [IsomergeError, InputError, ResourceError, VerificationError])
    def test_begin_no_line_of_an_error(self, kind: type[IsomergeError]) -> None:
        error = kind(f"{HOSTILE}: is wrong", [f"tensor {HOSTILE}", ORDINARY])
        expected = f"{SHOWN}: is wrong\n  - tensor {SHOWN}\n  - {ORDINARY}"
        assert str(error) == expected
        travelled = pickle.loads(pickle.dumps(error))  # as from a worker of Ray's
        assert (str(travelled), travelled.problems) == (expected, error.problems)

    def test_come_out_of_no_verb_as_they_are(self, isomerge: Isomerge, tmp_path: Path) -> None:
        """Of folders, files and tensors; in what people read and in JSON."""
        import torch

        home = tmp_path / f"{HOSTILE}{ORDINARY}"
        folders = [
            save_folder(home / name, {tensor: torch.full((4, 6), value) for tensor in NAMES})
            for name, value in (("base", 1.0), ("expert", 2.0))
        ]
        out = home / "out"
        options = ["--base", folders[0], "--expert", folders[1], "--out", out]
        answers = [isomerge(verb, *options) for verb in ("plan", "run")]
        answers += [isomerge(verb, out) for verb in ("verify", "report")]
        plain = [isomerge("plan", *options, "--format", "json"), isomerge("verify", out, "--format", "json")]
        wrong = [isomerge("verify", home), isomerge("run", *options), isomerge("run", home / "none.yml")]
        (home / "bad.yml").write_text(f"base: [\n{FORGED}")
        wrong += [isomerge("run", home / "bad.yml"), isomerge("run", HOSTILE), isomerge("verify", home, HOSTILE)]
        wrong += [isomerge(HOSTILE), isomerge(f"--{HOSTILE}"), isomerge("doctor", "--format", HOSTILE)]
        assert [ended.code for ended in (*answers, *plain)] == [0] * 6
        assert all(ended.code in (2, 3) for ended in wrong)
        for ended in (*answers, *plain, *wrong):
            assert is_harmless(ended.out + ended.err)
            assert not any(line.startswith(FORGED) for line in (ended.out + ended.err).splitlines())
        for ended in answers:
            assert ORDINARY in ended.out
        assert r"b.\x9b31m\u202e\u2028\u200b[bold]x[/bold]:smile:.weight" in answers[0].out
        assert f"{SHOWN}{ORDINARY}/out" in answers[1].out.replace("\n", "")
        assert [tensor["name"] for tensor in json.loads(plain[0].out)["tensors"]] == NAMES
        assert json.loads(plain[1].out)["folder"] == str(out)
        assert all(ended.err.count("\n") == 1 for ended in wrong[:4])
        # The card, which is Markdown, and in it the recipe, which is YAML.
        card = (out / "README.md").read_text()
        assert is_harmless(card)
        assert f"- Base: `` {SHOWN}{ORDINARY}/base ``" in card.replace(visible(str(tmp_path)) + "/", "")
        assert yaml.safe_load(card.split("```")[-2].removeprefix("yaml"))["base"] == str(folders[0])

    def test_come_out_of_a_traceback_as_escapes(self, isomerge: Isomerge, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise LookupError(HOSTILE)

        monkeypatch.setattr("isomerge_fast.execution.verify.verify", fail)
        ended = isomerge("verify", "x")
        assert (ended.code, ended.out) == (1, "")
        assert "Traceback" in ended.err
        assert is_harmless(ended.err)

    def test_that_are_not_text_are_refused_before_the_work(
        self,
        isomerge: Isomerge,
        family: tuple[Path, Path],
        merged: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """JSON cannot record them. What only reads takes them."""
        folder = tmp_path / os.fsdecode(b"x\xff")
        folder.mkdir()
        (folder / "in").symlink_to(family[0])
        monkeypatch.chdir(tmp_path)  # messages cut long paths
        here = Path(folder.name)
        for pair, out in ((family, here), ((here / "in", family[1]), Path("out"))):
            ended = isomerge(*run_of(pair, out))
            assert (ended.code, ended.out) == (2, "")
            assert r"x\udcff" in ended.err
            assert re.search("cannot be written down|manifest.json cannot record it; rename it", ended.err)
            assert ended.err.count("\n") == 1
        assert os.listdir(tmp_path) == [folder.name]
        (folder / "merged").symlink_to(merged)
        assert isomerge("verify", folder / "merged").code == 0
        ended = isomerge("verify", folder / "merged", "--format", "json")
        assert json.loads(ended.out)["folder"] == str(folder / "merged")


def test_the_last_line_says_what_is_not_certified(capsys: pytest.CaptureFixture[str]) -> None:
    def entry(name: str, **more: object) -> dict[str, object]:
        times = {"seconds": 0.0, "read_bytes": 0, "write_bytes": 0}
        return {"name": name, "action": "iso-c", "algorithm": "iso-c/x", **times, **more}

    tensors = [entry("copied"), entry("good", certified=True), entry("good too", certified=True)]
    print_report(Report("1", "iso-c", [1.0], ["out"], "cpu", tensors))
    assert "NOT CERTIFIED" not in capsys.readouterr().out
    tensors += [entry("a\nb", certified=False, not_certified="no gap\x1b"), entry("c", certified=False)]
    print_report(Report("1", "iso-c", [1.0], ["out"], "cpu", tensors))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == r"NOT CERTIFIED: 2 of 4 tensors (first: 'a\nb': no gap\x1b); see report.json"
    print_report(Report("1", "iso-c", [1.0], ["out"], "cpu", tensors[-1:]))
    assert capsys.readouterr().out.splitlines()[-1] == "NOT CERTIFIED: 1 of 1 tensors (first: 'c'); see report.json"


class TestStreams:
    @pytest.mark.parametrize(("kind", "reason"), [("full", "No space left on device"), ("pipe", "Broken pipe")])
    def test_a_merge_stands_though_its_report_cannot_be_printed(
        self, isomerge: Isomerge, family: tuple[Path, Path], merged: Path, tmp_path: Path, kind: str, reason: str
    ) -> None:
        for name, more in (("a", ()), ("b", ("--format", "json"))):
            ended = isomerge(*run_of(family, tmp_path / name), *more, stdout=kind)
            assert ended.code == 0
            assert ended.err == (
                f"isomerge: the merge is finished and written; only its report could not be printed ({reason})\n"
            )
            assert weights(tmp_path / name) == weights(merged)
        assert isomerge(*run_of(family, tmp_path / "c"), stdout=kind, stderr=kind).code == 0
        assert isomerge("verify", tmp_path / "c").code == 0

    def test_an_answer_that_cannot_be_printed_is_none(self, isomerge: Isomerge, merged: Path) -> None:
        for verb in ("verify", "report"):
            for more in ((), ("--format", "json")):
                full, pipe = (isomerge(verb, merged, *more, stdout=kind) for kind in ("full", "pipe"))
                lost = "isomerge: standard output cannot be written to (No space left on device)\n"
                assert (full.code, full.err) == (4, lost)
                assert (pipe.code, pipe.err) == (141, "")  # quietly, as what SIGPIPE ends

    def test_an_error_keeps_its_code(self, isomerge: Isomerge, tmp_path: Path) -> None:
        assert isomerge("verify", tmp_path, stderr="full").code == 3
        ended = isomerge("verify", tmp_path, "--format", "json", stdout="full")
        assert ended.code == 3
        assert "no manifest.json" in ended.err

    def test_what_cannot_be_encoded_is_escaped(
        self, isomerge: Isomerge, family: tuple[Path, Path], merged: Path, tmp_path: Path
    ) -> None:
        for encoding in ("ascii", "latin-1"):
            ended = isomerge(*run_of(family, tmp_path / f"中{encoding}"), encoding=encoding)
            assert (ended.code, ended.err) == (0, "")
            assert r"\u4e2d" in ended.out
            assert r"\u03c3\u0304" in isomerge("report", merged, encoding=encoding).out
        found = isomerge("report", tmp_path / "中ascii", "--format", "json", encoding="ascii").out
        assert json.loads(found)["outputs"] == [str(tmp_path / "中ascii")]

    def test_nothing_is_left_for_the_interpreter_to_fail_on(
        self, family: tuple[Path, Path], merged: Path, tmp_path: Path
    ) -> None:
        """No word, nor code, of Python's at the end; and no file that is opened takes a closed stream's place."""
        script = Path(sys.executable).parent / "isomerge"

        def shell(line: str) -> tuple[int, str]:
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
            return done.returncode, done.stderr

        lost = "isomerge: standard output cannot be written to"
        assert shell(f"{script} --version >/dev/full") == (4, f"{lost} (No space left on device)\n")
        assert shell(f"{script} --version >&-") == (4, f"{lost} (Bad file descriptor)\n")
        assert shell(f"{script} --version >/dev/full 2>/dev/full") == (4, "")
        assert shell(f"{script} --help | true; exit ${{PIPESTATUS[0]}}") == (141, "")
        assert shell(f"{script} --bogus 2>&-") == (2, "")
        assert shell(f"{script} --version 2>/dev/full") == (0, "")
        command = " ".join(f"'{part}'" for part in run_of(family, tmp_path / "out"))
        assert shell(f"{script} {command} <&- >&- 2>&-") == (0, "")
        assert weights(tmp_path / "out") == weights(merged)


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_merge_that_is_asked_to_end_can_be_gone_on_with(
        self,
        isomerge: Isomerge,
        family: tuple[Path, Path],
        merged: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        number: signal.Signals,
    ) -> None:
        arguments = run_of(family, tmp_path / "out")
        with monkeypatch.context() as patch:
            patch.setattr(engine, "write_metadata", lambda *_: os.kill(os.getpid(), number))
            ended = isomerge(*arguments)
        assert (ended.code, ended.out) == (128 + number, "")
        assert ended.err == "isomerge: interrupted; --resume continues\n"
        assert not (tmp_path / "out").exists()
        assert isomerge(*arguments, "--resume").code == 0
        assert weights(tmp_path / "out") == weights(merged)

    def test_the_second_one_ends_it_at_once(self) -> None:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.dup2(writing, 2)
            try:
                with stoppable("left"):
                    try:
                        os.kill(os.getpid(), signal.SIGINT)
                    finally:
                        os.kill(os.getpid(), signal.SIGTERM)  # while it cleans up
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading, "rb") as said:
            assert said.read() == b"left\n"
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143

    def test_what_was_ignored_stays_so(self, isomerge: Isomerge, monkeypatch: pytest.MonkeyPatch) -> None:
        """Under nohup a terminal that goes away ends nothing."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stoppable("left"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
