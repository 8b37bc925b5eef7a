"""What ``verify``, ``apply``, ``report`` and ``--resume`` say of outputs, kept deltas and inputs that were changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import isomerge_fast as imf
from checkpoints import listing, save_folder
from isomerge_fast.checkpoint.layout import read_header
from isomerge_fast.checkpoint.output.json_files import read_with_digest, to_json, write_with_digest
from isomerge_fast.checkpoint.output.manifest import FORMAT, MANIFEST_FILE, REPORT_FILE
from isomerge_fast.cli.commands import app
from isomerge_fast.execution.report import Progress
from isomerge_fast.execution.verify import verify

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


class Merged:
    """A merge of two experts, and a copy of its output for each test to change."""

    def __init__(self, root: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        base = {
            "a.weight": torch.randn(12, 8, generator=generator).bfloat16(),
            "b.weight": torch.randn(8, 12, generator=generator).bfloat16(),
            "n.bias": torch.randn(8, generator=generator).bfloat16(),
            "ids": torch.arange(5),
        }
        config = {"model_type": "test", "dtype": "bfloat16", "rope_theta": 10000.0}
        self.root = root
        self.base = save_folder(root / "base", base, shards=2, config=config)
        (self.base / "tokenizer.json").write_text('{"vocab": {"a": 0}}')
        (self.base / "1_Pooling").mkdir()
        (self.base / "1_Pooling/config.json").write_text("{}")
        self.experts = []
        for task in range(2):
            moved = {
                name: (value + 0.1 * torch.randn(value.shape, generator=generator)).bfloat16()
                if value.is_floating_point()
                else value
                for name, value in base.items()
            }
            self.experts.append(save_folder(root / f"expert{task}", moved, shards=2, config=config))
        self.config = {"base": self.base, "experts": self.experts, "method": "iso-c", "save_delta": True}
        self.clean = root / "clean"
        imf.merge({**self.config, "out": self.clean})
        self.out = root / "out"

    def copied(self) -> Path:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.clean, self.out)
        return self.out


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return Merged(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def out(merged: Merged) -> Path:
    return merged.copied()


def problems_of(folder: Path, **options: Any) -> list[str]:
    with pytest.raises(imf.VerificationError) as caught:
        verify(folder, **options)
    return caught.value.problems


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another header over the same tensors' bytes."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def edit(file: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool) -> None:
    """A manifest or report with other values, by somebody who mends its digest, or who does not."""
    value = json.loads(file.read_bytes())
    change(value)
    if sealed:
        value.pop("digest", None)
        write_with_digest(file, [to_json(value)])
    else:
        file.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def flip(file: Path, position: int, bit: int = 6) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(whole: Any) -> None:
        for key in path[:-1]:
            whole = whole[key]
        whole[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(whole: Any) -> None:
        for key in path[:-1]:
            whole = whole[key]
        del whole[path[-1]]

    return change


# --- files of the output ----------------------------------------------------------------------------------------------


def test_the_manifest_lists_every_file_and_is_the_same_for_the_same_merge(merged: Merged) -> None:
    manifest = json.loads((merged.clean / MANIFEST_FILE).read_bytes())
    files = listing(merged.clean)
    assert {*manifest["files"], *manifest["shards"], MANIFEST_FILE, REPORT_FILE} == files.keys()
    assert {"config.json", "tokenizer.json", "1_Pooling/config.json", "README.md", INDEX} <= manifest["files"].keys()
    assert {*SHARDS, *(f"delta/{shard}" for shard in SHARDS)} == manifest["shards"].keys()
    for name, entry in {**manifest["files"], **manifest["shards"]}.items():
        assert entry["bytes"] == len(files[name]), name
    for folder in ("", "delta"):
        for shard in SHARDS:
            for name, value in load_file(merged.clean / folder / shard).items():
                entry = manifest["outputs"][folder]["tensors"][name]
                assert (entry["file"], entry["shape"]) == (shard, list(value.shape))
    imf.merge({**merged.config, "out": merged.root / "again"})
    assert (merged.root / "again" / MANIFEST_FILE).read_bytes() == files[MANIFEST_FILE]
    found = verify(merged.clean, samples=10)
    assert (found.files, found.inputs_changed, found.remarks) == (len(files), [], [])
    assert len(found.recomputed) == 6


A = "a.weight"
CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "shape": (
        lambda out: rewrite_header(out / SHARDS[0], put([8, 12], A, "shape")),
        [r"00001.*'a\.weight' is BF16\[8, 12\], and was written as BF16\[12, 8\]"],
    ),
    "dtype": (
        lambda out: rewrite_header(out / SHARDS[0], put("F16", A, "dtype")),
        [r"00001.*'a\.weight' is F16\[12, 8\], and was written as BF16\[12, 8\]"],
    ),
    "metadata": (
        lambda out: rewrite_header(out / SHARDS[0], put({"format": "tf"}, "__metadata__")),
        [r"00001.*its header is not what was written"],
    ),
    "longer header": (
        lambda out: rewrite_header(out / SHARDS[0], put({"format": "pt", "x": "y" * 64}, "__metadata__")),
        [r"00001.*its header is not what was written"],
    ),
    "tensor renamed": (
        lambda out: rewrite_header(out / SHARDS[0], lambda header: header.update({"z.weight": header.pop(A)})),
        [r"'a\.weight' is missing", r"'z\.weight' was added"],
    ),
    "bytes of a tensor": (lambda out: flip(out / SHARDS[1], -3), [r"00002.*'\S+' is not what was written"]),
    "bytes of the delta": (lambda out: flip(out / "delta" / SHARDS[0], -3), [r"delta/.*is not what was written"]),
    "no header": (lambda out: flip(out / SHARDS[1], 7), [r"00002.*not a safetensors file"]),
    "shard missing": (lambda out: (out / SHARDS[1]).unlink(), [r"00002.*is missing, and with it 2 tensor"]),
    "shard cut short": (lambda out: os.truncate(out / SHARDS[1], 200), [r"00002"]),
    "config": (
        lambda out: (out / "config.json").write_text((out / "config.json").read_text().replace("10000", "10001")),
        [r"/config\.json: is not what was written \(checksum differs\)"],
    ),
    "tokenizer longer": (
        lambda out: (out / "tokenizer.json").write_text("{}" * 20),
        [r"tokenizer\.json: has 40 bytes, and was written with 19"],
    ),
    "tokenizer missing": (lambda out: (out / "tokenizer.json").unlink(), [r"tokenizer\.json: is missing"]),
    "in a sub-folder": (
        lambda out: (out / "1_Pooling/config.json").write_text("[]"),
        [r"1_Pooling/config\.json: is not what was written"],
    ),
    "sub-folder missing": (lambda out: shutil.rmtree(out / "1_Pooling"), [r"1_Pooling/config\.json: is missing"]),
    "card": (lambda out: flip(out / "README.md", 5), [r"README\.md: is not what was written"]),
    "index": (
        lambda out: (out / INDEX).write_text((out / INDEX).read_text().replace("00001-of", "00002-of", 1)),
        [r"index\.json: is not what was written"],
    ),
    "report": (lambda out: (out / REPORT_FILE).write_text("{}"), [r"report\.json: was changed"]),
    "report missing": (lambda out: (out / REPORT_FILE).unlink(), [r"report\.json: is missing"]),
    "report's seconds": (
        lambda out: edit(out / REPORT_FILE, put(1.0, "seconds", "total"), sealed=False),
        [r"report\.json: was changed"],
    ),
    "another merge's report": (
        lambda out: edit(out / REPORT_FILE, put("0" * 32, "manifest"), sealed=True),
        [r"report\.json: is the report of another merge"],
    ),
    "pickle added": (lambda out: (out / "pytorch_model.bin").write_bytes(b"x"), [r"pytorch_model\.bin: was added"]),
    "code added": (lambda out: (out / "modeling_x.py").write_text("import os"), [r"modeling_x\.py: was added"]),
    "deep inside": (lambda out: (out / "delta/x.json").write_text("{}"), [r"delta/x\.json: was added"]),
    "folder added": (
        lambda out: (out / ".git/objects").mkdir(parents=True) or (out / ".git/x").write_text(""),
        [r"/\.git: was added"],
    ),
    "link added": (lambda out: (out / "tokenizer.model").symlink_to("/etc/hostname"), [r"tokenizer\.model: was added"]),
    "dangling link": (lambda out: (out / "x.safetensors").symlink_to("nowhere"), [r"x\.safetensors: was added"]),
    "link to a folder": (lambda out: (out / "more").symlink_to(out), [r"/more: was added"]),
    "FIFO added": (lambda out: os.mkfifo(out / "x.safetensors"), [r"x\.safetensors: was added"]),
    "FIFO instead": (
        lambda out: ((out / "config.json").unlink(), os.mkfifo(out / "config.json")),
        [r"/config\.json: cannot be read \(not a regular file\)"],
    ),
    "FIFO instead of weights": (
        lambda out: ((out / SHARDS[0]).unlink(), os.mkfifo(out / SHARDS[0])),
        [r"00001.*cannot be read \(not a regular file\)"],
    ),
    "folder instead": (
        lambda out: ((out / "config.json").unlink(), (out / "config.json").mkdir()),
        [r"/config\.json: cannot be read"],
    ),
    "manifest's white space": (
        lambda out: (out / MANIFEST_FILE).write_bytes((out / MANIFEST_FILE).read_bytes() + b"\n"),
        [r"manifest\.json: was changed"],
    ),
    "no outputs, and no digest": (
        lambda out: edit(out / MANIFEST_FILE, put("x", "description", "device"), sealed=False),
        [r"manifest\.json: was changed"],
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_of_a_file_is_found(out: Path, what: str) -> None:
    change, expected = CHANGES[what]
    change(out)
    found = problems_of(out, samples=0)
    assert len(found) == len(expected), found
    for line, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, line), line
        assert str(out) in line


def test_names_that_are_no_text_are_told_apart(tmp_path: Path) -> None:
    """A byte that is not UTF-8, and the characters by which it is written."""
    out = small_output(tmp_path, names=[rb"LICENSE\xff"])
    assert verify(out).recomputed
    (out / "LICENSE\\xff").write_text("x")
    with open(os.fsencode(out) + b"/LICENSE\xff", "w"):
        pass
    found = problems_of(out)
    assert [line.replace(str(out), "") for line in found] == [
        "/LICENSE\\xff: was added",
        "/LICENSE\\\\xff: has 1 bytes, and was written with 4",
    ]


def test_all_problems_are_told_of_together(out: Path) -> None:
    """On the command line, as one message and as JSON; with a sample as without."""
    rewrite_header(out / SHARDS[0], put([8, 12], A, "shape"))
    flip(out / "delta" / SHARDS[1], -1)
    (out / "tokenizer.json").unlink()
    (out / "modeling_x.py").write_text("")
    for arguments in (["--samples", "0"], [], ["--seed", "5"]):
        result = CliRunner().invoke(app, ["verify", str(out), *arguments])
        assert result.exit_code == 5
        assert "every checksum is right" not in result.output
        assert "4 problem(s)" in result.stderr
        for name in ("00001", "delta/model-00002", "tokenizer.json", "modeling_x.py"):
            assert name in result.stderr
    error = json.loads(CliRunner().invoke(app, ["verify", str(out), "--format", "json"]).stdout)["error"]
    assert (error["exit_code"], len(error["problems"])) == (5, 4)
    for index in range(100):
        (out / f"{index}.py").write_text("")
    assert problems_of(out)[-1] == "… and 84 more"


def test_a_pattern_that_matches_nothing_of_an_older_merge_is_its_own(
    merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier releases took such a pattern, and what they wrote is recomputed all the same."""
    monkeypatch.setattr("isomerge_fast.planning.planner.require_matches", lambda *_: None)
    imf.merge({**merged.config, "exclude": ["*nothing*"], "out": tmp_path / "out"})
    monkeypatch.undo()
    result = verify(tmp_path / "out")
    assert result.recomputed
    assert (result.inputs_changed, result.remarks) == ([], [])


def test_what_the_page_cache_holds_is_not_believed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every file the pages are dropped before it is read, since one whose writing failed looks as if it were not."""
    dropped = set()
    real = os.posix_fadvise

    def fadvise(descriptor: int, start: int, size: int, advice: int) -> None:
        assert (start, size, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        dropped.add(os.fstat(descriptor).st_ino)
        real(descriptor, start, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    verify(out, samples=0)
    assert dropped == {path.stat().st_ino for path in out.rglob("*") if path.is_file()}


def flipped(out: Path, bits: Callable[[int], Iterator[int]]) -> Iterator[tuple[Path, int, int, list[str]]]:
    """Every third byte of every file with one of its bits flipped, and what ``verify`` says to that."""
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for position in range(0, len(content), 3):
            for bit in bits(position):
                changed = bytearray(content)
                changed[position] ^= 1 << bit
                path.write_bytes(changed)
                try:
                    verify(out, samples=0)
                    found = []
                except imf.VerificationError as error:
                    found = error.problems or [str(error)]
                yield path, position, bit, found
        path.write_bytes(content)


def small_output(root: Path, names: Sequence[bytes] = (b"vocab.txt",)) -> Path:
    """Of one small tensor, and with a file of each kind. ``names``: of the base's companions."""
    base = {"w": torch.arange(6.0).reshape(2, 3)}
    inputs = [save_folder(root / name, {"w": base["w"] + index}, config={}) for index, name in enumerate("be")]
    for name in names:
        with open(os.fsencode(inputs[0]) + b"/" + name, "w") as file:
            file.write("a\nb\n")
    imf.merge({"base": inputs[0], "experts": inputs[1:], "method": "mean", "out": root / "out"})
    return root / "out"


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that was flipped need not go to the disk and back: thousands of times that is most of a minute."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)


@pytest.mark.usefixtures("cached")
def test_flipped_bits_of_every_file_are_found(tmp_path: Path) -> None:
    """Of every third byte one bit: in turn, so that every one of the eight is."""
    count = 0
    for path, position, bit, found in flipped(small_output(tmp_path), lambda position: iter([position // 3 % 8])):
        assert found, (path, position, bit)
        assert any(path.name in line for line in found), (path, position, bit, found)
        count += 1
    assert count > 1000


@pytest.mark.long
@pytest.mark.usefixtures("cached")
def test_every_flipped_bit_of_every_file_is_found(tmp_path: Path) -> None:
    count = 0
    for path, position, bit, found in flipped(small_output(tmp_path), lambda _: iter(range(8))):
        assert any(path.name in line for line in found), (path, position, bit, found)
        count += 1
    print(f"{count} bits flipped, all found")


# --- edited manifests and reports -------------------------------------------------------------------------------------


def test_a_manifest_of_the_format_before_is_said_to_be_one(out: Path) -> None:
    edit(out / MANIFEST_FILE, put(FORMAT - 1, "format"), sealed=False)
    for arguments in (["verify", str(out)], ["apply", str(out), "--scaling", "1", "--out", str(out / "x")]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 5
        assert f"of format {FORMAT - 1}, and this version reads {FORMAT}" in result.stderr


INPUT = ("description", "inputs", 0)
TENSOR = ("outputs", "", "tensors", A)
MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no outputs": drop("outputs"),
    "outputs {}": put({}, "outputs"),
    "outputs a list": put([], "outputs"),
    "outputs null": put(None, "outputs"),
    "another output": put({"scaling": 1.0, "tensors": {}}, "outputs", "../clean"),
    "output of a path": lambda manifest: manifest["outputs"].update({"../clean": manifest["outputs"].pop("")}),
    "absolute output": lambda manifest: manifest["outputs"].update({"/tmp": manifest["outputs"].pop("")}),
    "output with NUL": lambda manifest: manifest["outputs"].update({"a\0": manifest["outputs"].pop("")}),
    "no tensors": put({}, "outputs", "", "tensors"),
    "tensor null": put(None, *TENSOR),
    "file a number": put(5, *TENSOR, "file"),
    "file elsewhere": put("../clean/model.safetensors", *TENSOR, "file"),
    "no checksum": drop(*TENSOR, "checksum"),
    "checksum null": put(None, *TENSOR, "checksum"),
    "shape a string": put("8x8", *TENSOR, "shape"),
    "shape of booleans": put([True], *TENSOR, "shape"),
    "scaling a string": put("x", "outputs", "", "scaling"),
    "scaling too large": put(10**400, "outputs", "", "scaling"),
    "another scaling": put(2.0, "outputs", "", "scaling"),
    "scaling null": put(None, "outputs", "", "scaling"),
    "no files": drop("files"),
    "file null": put(None, "files", "config.json"),
    "bytes a string": put("5", "files", "config.json", "bytes"),
    "no shards": put({}, "shards"),
    "a shard more": put({"bytes": 1, "header_sha256": "x"}, "shards", "../x.safetensors"),
    "no description": drop("description"),
    "description a list": put([], "description"),
    "no config": drop("description", "config"),
    "unknown key": put(1, "description", "config", "zzz"),
    "unknown method": put("zzz", "description", "config", "method"),
    "config's scaling": put("x", "description", "config", "scaling"),
    "overrides": put([{"zz": 1}], "description", "config", "overrides"),
    "weights": put([[{"zz": 1}]], "description", "config", "weights"),
    "weights a number": put(5, "description", "config", "weights"),
    "too many weights": put([1.0] * 9, "description", "config", "weights"),
    "unknown option": put({"zz": 1}, "description", "config", "options"),
    "exclude a number": put(5, "description", "config", "exclude"),
    "stochastic a string": put("x", "description", "config", "stochastic_rounding"),
    "adapter rank": put(4, "description", "config", "adapter_rank"),
    "dtype": put("int7", "description", "config", "dtype"),
    "no inputs": put([], "description", "inputs"),
    "inputs a string": put("abc", "description", "inputs"),
    "path a number": put(5, *INPUT, "path"),
    "path with NUL": put("a\0b", *INPUT, "path"),
    "input files a list": put([], *INPUT, "files"),
    "input file null": put({"model.safetensors": None}, *INPUT, "files"),
    "format a string": put("3", "format"),
    "format true": put(True, "format"),
    "format of tomorrow": put(99, "format"),
}
TEXTS = {
    "empty": b"",
    "NaN": b'{"format": NaN}',
    "infinite": b'{"format": 1e999}',
    "list": b"[]",
    "number": b"5",
    "no key": b"{}",
    "nested": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "deep": b'{"a":' * 300 + b"1" + b"}" * 300,
    "not UTF-8": b"\xff",
    "twice": b'{"format": 3, "format": 3}',
}


def others_of(merged: Merged) -> list[Callable[[], object]]:
    """What reads a manifest beside ``verify``."""
    return [
        lambda: imf.apply(merged.out, 0.5, merged.root / "applied"),
        lambda: imf.merge({**merged.config, "out": merged.out}, resume=True),
    ]


@pytest.mark.parametrize("what", MANIFESTS)
def test_an_edited_manifest_is_one_message(merged: Merged, out: Path, what: str) -> None:
    """By somebody who knows of the digest: others may go on where it does not concern them, as the next test shows."""
    edit(out / MANIFEST_FILE, MANIFESTS[what], sealed=True)
    with pytest.raises(imf.VerificationError, match=re.escape(MANIFEST_FILE)):
        verify(out, samples=2)
    for attempt in others_of(merged):
        with suppress(imf.IsomergeError):
            attempt()
        shutil.rmtree(merged.root / "applied", ignore_errors=True)


def test_an_edited_manifest_is_refused_by_its_digest(merged: Merged, out: Path) -> None:
    edit(out / MANIFEST_FILE, put("elsewhere", "description", "device"), sealed=False)
    before = listing(out)
    for attempt in others_of(merged):
        with pytest.raises(imf.VerificationError, match=r"manifest\.json: was changed after the merge wrote it"):
            attempt()
    assert listing(out) == before
    assert not list(merged.root.glob("*applied*"))


@pytest.mark.parametrize("what", TEXTS)
def test_what_is_no_manifest_or_report_is_one_message(merged: Merged, out: Path, what: str) -> None:
    (out / MANIFEST_FILE).write_bytes(TEXTS[what])
    for attempt in (lambda: verify(out), *others_of(merged)):
        with pytest.raises(imf.VerificationError, match=r"manifest\.json"):
            attempt()
    merged.copied()
    (out / REPORT_FILE).write_bytes(TEXTS[what])
    for arguments in (["report", str(out)], ["verify", str(out)]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 5, result.output
        assert "report.json" in result.stderr
    with pytest.raises(imf.VerificationError, match=r"report\.json"):
        imf.merge({**merged.config, "out": out}, resume=True)


FIRST = ("tensors", 0)
REPORTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no version": drop("version"),
    "tensors a number": put(5, "tensors"),
    "tensor without name": drop(*FIRST, "name"),
    "name a number": put(5, *FIRST, "name"),
    "no algorithm": drop(*FIRST, "algorithm"),
    "seconds a string": put("x", *FIRST, "seconds"),
    "bytes beyond counting": put(10**30, *FIRST, "read_bytes"),
    "certified a string": put("yes", *FIRST, "certified"),
    "remarks a list": put([1], *FIRST, "remarks"),
    "truncation null": put(None, *FIRST, "truncation"),
    "io of something else": put({"x": 1}, "io"),
    "workers of nothing": put([{}, {}], "workers"),
    "another phase": put({"zzz": 1.0}, "seconds"),
    "notes of numbers": put([5], "notes"),
    "outputs null": put([None], "outputs"),
    "device a list": put([], "device"),
    "scaling an object": put({}, "scaling"),
}


@pytest.mark.parametrize("what", REPORTS)
def test_an_edited_report_is_one_message(merged: Merged, out: Path, what: str) -> None:
    for sealed in (False, True):
        merged.copied()
        edit(out / REPORT_FILE, REPORTS[what], sealed=sealed)
        for arguments in (["report", str(out)], ["report", str(out), "--format", "json"], ["verify", str(out)]):
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 5, result.output
            assert "report.json" in result.output
            assert str(out) in result.output


def test_a_finished_merge_is_still_left_as_it_is(merged: Merged, out: Path) -> None:
    before = listing(out)
    report = imf.merge({**merged.config, "out": out}, resume=True)
    assert report.to_dict().items() <= json.loads(before[REPORT_FILE]).items()
    assert listing(out) == before
    (out / REPORT_FILE).unlink()
    with pytest.raises(imf.VerificationError, match=r"no report\.json"):
        imf.merge({**merged.config, "out": out}, resume=True)
    imf.merge({**merged.config, "out": out}, resume=True, overwrite=True)
    verify(out)


# --- inputs that changed since ----------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Merged:
    """Whose inputs may be changed."""
    return Merged(tmp_path)


def test_inputs_that_changed_since_are_named(own: Merged) -> None:
    weights = own.experts[0] / SHARDS[0]
    content, status = weights.read_bytes(), weights.stat()
    times = (status.st_atime_ns, status.st_mtime_ns)

    os.utime(weights, ns=(1, 1))  # copied, or written again with the same bytes
    found = verify(own.clean, samples=10)
    assert found.inputs_changed == [f"{weights}: was written again (another modification time)"]
    assert len(found.recomputed) == 6
    printed = CliRunner().invoke(app, ["verify", str(own.clean)])
    assert printed.exit_code == 0
    assert f"an input has changed since the merge: {weights}" in printed.stdout

    flip(weights, -3)
    (line,) = [line for line in problems_of(own.clean, samples=10) if "either" in line]
    assert line.endswith(f"an input has changed since: {weights}")

    os.utime(weights, ns=times)
    (line,) = [line for line in problems_of(own.clean, samples=10) if "either" in line]
    assert str(weights) in line
    assert "of the size, header and modification time that they had" in line
    assert verify(own.clean, samples=0).inputs_changed == []  # it is not looked at

    weights.write_bytes(content)
    rewrite_header(weights, put({"format": "pt", "by": "another tool"}, "__metadata__"))
    found = verify(own.clean)
    assert found.inputs_changed == [f"{weights}: is not the file that was merged; not recomputed"]
    assert found.recomputed == []

    weights.write_bytes(b"short")
    assert re.search(rf"{weights}: .*too short.*not recomputed", verify(own.clean).inputs_changed[0])

    shutil.rmtree(own.experts[0])
    found = verify(own.clean)
    assert (found.inputs_changed, found.remarks) == ([], [f"not recomputed: {own.experts[0]}: no longer there"])


def test_a_sampled_tensor_of_another_shape_is_a_finding(merged: Merged, out: Path) -> None:
    """In a manifest and a header that agree with each other."""
    rewrite_header(out / SHARDS[0], put([8, 12], A, "shape"))
    digest = read_header(out / SHARDS[0])[1].header_sha256

    def agree(manifest: dict[str, Any]) -> None:
        put([8, 12], *TENSOR, "shape")(manifest)
        put(digest, "shards", SHARDS[0], "header_sha256")(manifest)

    edit(out / MANIFEST_FILE, agree, sealed=True)
    own_digest = json.loads((out / MANIFEST_FILE).read_bytes())["digest"]
    edit(out / REPORT_FILE, put(own_digest, "manifest"), sealed=True)
    found = problems_of(out, samples=10)
    assert re.search(r"'a\.weight' is not of the shape and dtype that its inputs give", found[0])


# --- apply ------------------------------------------------------------------------------------------------------------


def test_apply_compares_every_byte_that_it_reads(own: Merged) -> None:
    """Of Δ and of the base, tensors that are copied among them; nothing is left where one differs."""
    applied = own.root / "applied"

    def refused(pattern: str, **options: Any) -> None:
        with pytest.raises(imf.InputError, match=pattern):
            imf.apply(own.out, 1.0, applied, **options)
        assert not [path.name for path in own.root.iterdir() if "applied" in path.name]

    for shard in SHARDS:
        for name, value in load_file(own.clean / "delta" / shard).items():
            own.copied()
            file = own.out / "delta" / shard
            flip(file, file.read_bytes().index(value.numpy().tobytes()) + 5)
            refused(rf"delta/{shard}: tensor '{re.escape(name)}' is not what it was")
    own.copied()
    rewrite_header(own.out / "delta" / SHARDS[0], put({"format": "pt", "x": "y"}, "__metadata__"))
    refused(rf"delta/{SHARDS[0]}: not the delta that the merge kept")
    own.copied()
    refused(r"expert0/\S+: tensor '\S+' is not what it was", base=own.experts[0])

    for shard in SHARDS:
        for name, value in load_file(own.base / shard).items():
            moved = shutil.copytree(own.base, own.root / "moved")
            data = value.view(torch.uint8).numpy().tobytes()
            flip(moved / shard, (moved / shard).read_bytes().index(data) + 1, bit=0)
            refused(rf"moved/{shard}: tensor '{re.escape(name)}' is not what it was", base=moved)
            shutil.rmtree(moved)
    moved = shutil.copytree(own.base, own.root / "moved")
    imf.apply(own.out, 1.0, applied, base=moved)
    for shard in SHARDS:
        assert (applied / shard).read_bytes() == (own.clean / shard).read_bytes()
    assert verify(applied, samples=10).recomputed
    shutil.rmtree(applied)

    (own.base / SHARDS[0]).write_bytes((own.experts[1] / SHARDS[0]).read_bytes())
    refused(r"base/\S+: tensor '\S+' is not what it was")


def test_what_resumes_keeps_the_checksums_of_the_base(own: Merged) -> None:
    """Those of tensors that were finished before are in the journal."""

    def interrupt(progress: Progress) -> None:
        if progress.done_tensors == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imf.merge({**own.config, "out": own.out}, observer=interrupt)
    imf.merge({**own.config, "out": own.out}, resume=True)
    assert (own.out / MANIFEST_FILE).read_bytes() == (own.clean / MANIFEST_FILE).read_bytes()
    imf.apply(own.out, 1.0, own.root / "applied")


def test_a_report_of_tens_of_thousands_of_tensors_is_read(tmp_path: Path) -> None:
    """More values than a stranger's settings may have."""
    count = 1_000_100
    write_with_digest(tmp_path / REPORT_FILE, [b'{\n "numbers": [', b"0, " * (count - 1), b"0]\n}\n"])
    value, flaw = read_with_digest(tmp_path / REPORT_FILE)
    assert flaw is None
    assert len(value["numbers"]) == count
