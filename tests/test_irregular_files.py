"""Files that are not what they seem: FIFOs, sockets and devices, shards named like other files, endless headers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import entry, make_base, raw_file, save_folder
from isomerge_fast.checkpoint.layout import open_checkpoint
from isomerge_fast.checkpoint.lora.adapter import open_adapter
from isomerge_fast.errors import InputError
from isomerge_fast.parsing.regular_files import IrregularFileError, open_regular
from openings import open_all


@pytest.fixture
def impatient() -> Iterator[None]:
    """Whoever waits for a FIFO is interrupted after a while."""

    def interrupt(number: int, frame: object) -> None:
        raise TimeoutError("something is waited for")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_link_to_fifo(path: Path) -> None:
    put_fifo(path.with_name("f"))
    path.symlink_to("f")


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:  # of a relative path: such names are short
        before = Path.cwd()
        os.chdir(path.parent)
        try:
            listening.bind(path.name)
        finally:
            os.chdir(before)


IRREGULAR: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (put_fifo, "a FIFO, not a regular file"),
    "link-to-fifo": (put_link_to_fifo, "a FIFO, not a regular file"),
    "socket": (put_socket, "a socket, not a regular file"),
    "terminal": (lambda path: path.symlink_to("/dev/tty"), "a device or a terminal, not a regular file|out of its"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device or a terminal, not a regular file|out of its"),
    "folder": (lambda path: path.symlink_to("."), "a folder, not a regular file|out of its"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "cannot be read"),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("put", "message"), IRREGULAR.values(), ids=IRREGULAR)
def test_only_regular_files_are_opened(tmp_path: Path, put: Callable[[Path], None], message: str) -> None:
    """Whatever we open of somebody's folder: never waited for, never passed over."""
    good = save_folder(tmp_path / "good", make_base(), shards=2, config={})
    (good / "tokenizer.json").write_text("{}")
    for name in sorted(path.name for path in good.iterdir()):
        folder = tmp_path / f"without-{name}"
        shutil.copytree(good, folder)
        (folder / name).unlink()
        put(folder / name)
        with pytest.raises(InputError, match=message) as caught:
            open_all(folder)
        assert f"{folder / name}: " in str(caught.value)
    single = save_folder(tmp_path / "single", make_base())
    (single / "model.safetensors").rename(single / "other.safetensors")
    put(single / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: "):  # not the other one in its place
        open_checkpoint(single)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    put(adapter / "adapter_config.json")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"adapter_config\.json: "):
        open_adapter(adapter, open_checkpoint(good))


@pytest.mark.usefixtures("impatient")
def test_what_becomes_a_fifo_meanwhile_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo")
    regular, before = os.stat(tmp_path / "file"), len(os.listdir("/dev/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_, **__: regular)
        with pytest.raises(IrregularFileError, match="FIFO"):
            open_regular(tmp_path / "fifo")
    assert len(os.listdir("/dev/fd")) == before
    descriptor, _ = open_regular(tmp_path / "file")
    assert os.get_blocking(descriptor)
    os.close(descriptor)


BAD_SHARDS = {
    "manifest": "manifest.json",
    "report": "report.json",
    "card": "README.md",
    "config": "config.json",
    "index": "model.safetensors.index.json",
    "adapter": "adapter_config.json",
    "tokenizer": "tokenizer.json",
    "delta": "delta",
    "scaling": "scaling-0.5",
    "journal": "journal-1.jsonl",
    "pickle": "pytorch_model.bin",
    "trailing-dot": "a.safetensors.",
    "trailing-space": "a.safetensors ",
    "upper-case": "a.SAFETENSORS",
    "too-long": "a" * 250 + ".safetensors",
    "line-feed": "a\nb.safetensors",
    "right-to-left": "a\u202eb.safetensors",
    "escape": "a\x9bb.safetensors",
    "backslash": "a\\b.safetensors",
    "same-but-for-case": "MODEL-1.safetensors",
    "same-but-for-form": "mode\u0301l-1.safetensors",
}


@pytest.mark.parametrize("shard", BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_shards_have_names_of_their_own(tmp_path: Path, shard: str) -> None:
    """The output's are called like the base's; nothing else of an output ends in .safetensors."""
    twin = "mod\u00e9l-1.safetensors" if "\u0301" in shard else "model-1.safetensors"
    for name in (twin, shard):
        if len(name) < 255:
            save_file({"a" if name == twin else "b": torch.ones(2)}, tmp_path / name)
    index = {"weight_map": {"a": twin, "b": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="shard") as caught:
        open_checkpoint(tmp_path)
    assert "refused" in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_the_only_file_of_a_folder_has_a_name_too(tmp_path: Path) -> None:
    save_file(make_base(), tmp_path / "a\u202eb.safetensors")
    with pytest.raises(InputError, match="not a plain file name"):
        open_checkpoint(tmp_path)


def test_an_index_of_a_stranger_is_read_in_bounded_memory(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b'{"weight_map":[' + b"[]," * 2_000_000 + b"[]]}")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="more than 1000000 values; refused"):
            open_checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    os.truncate(index, 99_000_000)
    with pytest.raises(InputError, match="99000000 bytes; refused above 32000000"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        {"a" * 5_000_000: entry()},
        {"w": entry("F" * 5_000_000)},
        {"w": entry(shape=[1] * 500_000)},
        {"w": {**entry(), "dtype": 10**4_000}},
    ],
    ids=["name", "dtype", "shape", "number"],
)
def test_messages_about_a_header_are_short(tmp_path: Path, header: object) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw_file(header))
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
