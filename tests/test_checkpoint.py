"""Files: headers checked strictly, layouts as people have them, and bytes written as safetensors writes them."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file

from checkpoints import entry, make_base, raw_file, save_folder, write_tensor
from isomerge_fast.checkpoint.io.reader import Reader, files_of, whole
from isomerge_fast.checkpoint.io.writer import OutputTensor, ShardWriter, create_shard
from isomerge_fast.checkpoint.layout import DTYPES, FileIdentity, open_checkpoint, read_header
from isomerge_fast.checkpoint.output.json_files import LazyMapping, json_blocks, to_json
from isomerge_fast.checkpoint.output.manifest import describe_inputs
from isomerge_fast.errors import InputChangedError, InputError, ResourceError


def every_dtype() -> dict[str, torch.Tensor]:
    tensors = {}
    for index, (name, dtype) in enumerate(DTYPES.items()):
        for prefix in ("b.", "Z.", "é."):
            values = torch.arange(15).remainder(2 + index).reshape(3, 5)
            tensors[prefix + name] = values.to(dtype).contiguous()
    return {**tensors, "scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4, dtype=torch.float16)}


def write_all(path: Path, tensors: dict[str, torch.Tensor], names: list[str]) -> None:
    described = [OutputTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    create_shard(path, described, resume=False)
    writer = ShardWriter(path, described)
    for name in names:
        write_tensor(writer, name, tensors[name])
    writer.close(validate=True)


def test_writer_writes_the_bytes_of_safetensors(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    for order in (list(tensors), sorted(tensors, reverse=True)):
        write_all(tmp_path / "ours.safetensors", tensors, order)
        assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_reader_reads_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    with Reader(files_of(checkpoint)) as reader:
        for name, stored in checkpoint.tensors.items():
            value = reader.read(whole(stored))
            assert value.dtype == expected[name].dtype
            assert value.shape == expected[name].shape
            assert bytes(value.contiguous().reshape(-1).view(torch.uint8).numpy()) == bytes(
                expected[name].reshape(-1).view(torch.uint8).numpy()
            )


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_files_have_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_all(tmp_path / "a.safetensors", {"w": torch.ones(2)}, ["w"])
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


W = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
MALFORMED = {
    "empty-file": (b"", "too short"),
    "short": (b"\1\2\3", "too short"),
    "huge-header": (struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors file"),
    "truncated-header": (struct.pack("<Q", 100) + b"{}", "truncated"),
    "not-json": (raw_file(None, text=b"{nope"), "not JSON"),
    "not-utf8": (raw_file(None, text=b'{"\xff": 1}'), "not UTF-8"),
    "nan-literal": (raw_file(None, text=b'{"w": NaN}'), "NaN"),
    "list": (raw_file([]), "not a JSON object"),
    "deep": (raw_file(None, text=b"[" * 100_000), "nested too deeply|not JSON"),
    "duplicate-key": (raw_file(None, text=f'{{"w":{W},"w":{W}}}'.encode()), "'w' occurs twice"),
    "control-character": (raw_file({"a\nb": entry()}), "control characters"),
    "nul": (raw_file({"a\0": entry()}), "control characters"),
    "missing-field": (raw_file({"w": {"dtype": "F32", "shape": [2]}}), "'w'.*needs dtype"),
    "dtype": (raw_file({"w": entry("F33")}), "'w'.*F33"),
    "negative-size": (raw_file({"w": entry(shape=[-2])}), "'w'.*shape"),
    "float-size": (raw_file({"w": entry(shape=[2.0])}), "'w'.*shape"),
    "bool-size": (raw_file({"w": entry(shape=[True, 2])}), "'w'.*shape"),
    "negative-offset": (raw_file({"w": entry(offsets=[-8, 0])}), "'w'.*data_offsets"),
    "wrong-span": (raw_file({"w": entry(offsets=[0, 4])}), "'w'.*takes 8 bytes"),
    "overlap": (raw_file({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12), "overlaps"),
    "hole": (raw_file({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20), "hole"),
    "truncated": (raw_file({"w": entry()}, b"\0" * 7), "truncated"),
    "trailing": (raw_file({"w": entry()}, b"\0" * 9), "trailing bytes"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_absurd_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = {f"t{index}": entry(shape=[0], offsets=[0, 0]) for index in range(260_000)}
    path.write_bytes(raw_file(header, b""))
    with pytest.raises(InputError, match=r"260000 tensors|bytes; refused"):
        read_header(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 10_000), mode=st.booleans())
def test_a_damaged_header_is_an_error_or_the_same_layout(
    tmp_path: Path, position: int, value: int, cut: int, mode: bool
) -> None:
    """One byte changed, or the file cut short: never another exception, never tensors that leave the file."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.int64)}, path)
    content = bytearray(path.read_bytes())
    if mode:
        content[position % len(content)] = value
    else:
        del content[cut % len(content) :]
    path.write_bytes(bytes(content))
    try:
        tensors, identity = read_header(path)
    except InputError:
        return
    assert identity.size == len(content)
    assert sum(tensor.bytes for tensor in tensors.values()) == 88
    assert all(tensor.end <= len(content) for tensor in tensors.values())


class TestLayouts:
    def test_sharded(self, tmp_path: Path) -> None:
        tensors = make_base()
        checkpoint = open_checkpoint(save_folder(tmp_path, tensors, shards=3))
        assert checkpoint.tensors.keys() == tensors.keys()
        assert len(checkpoint.files) == 3

    def test_bare_file_and_other_name(self, tmp_path: Path) -> None:
        save_file(make_base(), tmp_path / "weights.safetensors")
        assert open_checkpoint(tmp_path / "weights.safetensors").tensors == open_checkpoint(tmp_path).tensors

    def test_hub_cache(self, tmp_path: Path) -> None:
        """Snapshots are links into ``blobs/``, named by hashes."""
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
        blobs.mkdir()
        snapshot.mkdir(parents=True)
        real = save_folder(tmp_path / "real", make_base(), shards=2, config={"model_type": "x"})
        for index, file in enumerate(sorted(real.iterdir())):
            file.rename(blobs / f"{index:040x}")
            (snapshot / file.name).symlink_to(f"../../blobs/{index:040x}")
        checkpoint = open_checkpoint(snapshot)
        assert checkpoint.tensors.keys() == make_base().keys()
        assert checkpoint.config == {"model_type": "x"}

    @pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\0b", "", ".."])
    def test_index_cannot_leave_its_folder(self, tmp_path: Path, shard: str) -> None:
        save_file(make_base(), tmp_path / "x.safetensors")
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
        with pytest.raises(InputError, match="not a plain file name"):
            open_checkpoint(folder)

    def test_index_that_does_not_hold(self, tmp_path: Path) -> None:
        save_folder(tmp_path, make_base(), shards=2)
        index = tmp_path / "model.safetensors.index.json"
        good = json.loads(index.read_text())
        for change, message in (
            ({"nowhere": "model-00001-of-00002.safetensors"}, "'nowhere'.*not"),
            ({"conv.weight": "model-00009-of-00002.safetensors"}, "model-00009-of-00002.safetensors' is missing"),
        ):
            index.write_text(json.dumps({"weight_map": {**good["weight_map"], **change}}))
            with pytest.raises(InputError, match=message):
                open_checkpoint(tmp_path)
        del good["weight_map"]["conv.weight"]
        index.write_text(json.dumps(good))
        with pytest.raises(InputError, match=r"does not list tensor 'conv.weight'"):
            open_checkpoint(tmp_path)

    def test_stale_files_are_not_guessed_about(self, tmp_path: Path) -> None:
        save_folder(tmp_path, make_base(), shards=2)
        save_file(make_base(), tmp_path / "model.safetensors")
        with pytest.raises(InputError, match="remove the one that is stale"):
            open_checkpoint(tmp_path)

    def test_pickles_are_not_opened(self, tmp_path: Path) -> None:
        torch.save(make_base(), tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match="never opened"):
            open_checkpoint(tmp_path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no such checkpoint"):
            open_checkpoint(tmp_path / "nope")
        with pytest.raises(InputError, match=r"no \.safetensors file"):
            open_checkpoint(tmp_path)


def test_a_changed_input_is_noticed(tmp_path: Path) -> None:
    save_folder(tmp_path, make_base())
    checkpoint = open_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    with Reader(files_of(checkpoint)) as reader:
        reader.read(whole(checkpoint.tensors["conv.weight"]))
        os.utime(file, ns=(1, 1))
        with pytest.raises(InputError, match="changed during the merge"):
            reader.check_unchanged()
    with Reader(files_of(checkpoint)) as reader, pytest.raises(InputError, match="changed since the merge was planned"):
        reader.read(whole(checkpoint.tensors["conv.weight"]))


def swap(file: Path, content: bytes) -> None:
    """Puts another file in the place of one, with the same size and modification time."""
    status = file.stat()
    assert len(content) == status.st_size
    other = file.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(file)


def reordered(content: bytes) -> bytes:
    """The same tensors ``a`` and ``z``, of equal size, in the other order in the file."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header["a"]["data_offsets"], header["z"]["data_offsets"] = header["z"]["data_offsets"], header["a"]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    return content[:8] + text + data[len(data) // 2 :] + data[: len(data) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


SWAPS: dict[str, Callable[[bytes], bytes]] = {"header": reordered, "weights": flipped, "nothing": bytes}


@pytest.mark.parametrize("change", SWAPS.values(), ids=SWAPS)
def test_a_swapped_input_is_noticed(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    """Of the same size and time, whatever in it differs: before anything is read, and at the end."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64, 64), "z": torch.ones(64, 64)}, file)
    checkpoint = open_checkpoint(tmp_path)
    with Reader(files_of(checkpoint)) as reader:
        reader.read(whole(checkpoint.tensors["a"]))
        swap(file, change(file.read_bytes()))
        with pytest.raises(InputChangedError, match=r"model\.safetensors: changed during the merge"):
            reader.check_unchanged()
    with Reader(files_of(checkpoint)) as reader, pytest.raises(InputChangedError, match="changed since the merge was"):
        reader.read(whole(checkpoint.tensors["a"]))


def test_what_the_kernel_says_of_an_input_stays_here(tmp_path: Path) -> None:
    """Another machine sees other inodes and times of change, and a copy has others: size, time and header count."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64, 64), "z": torch.ones(64, 64)}, file)
    checkpoint = open_checkpoint(tmp_path)
    before = describe_inputs([checkpoint])
    assert before[0]["files"]["model.safetensors"].keys() == {"size", "mtime_ns", "header_sha256"}
    file.chmod(0o640)
    swap(file, file.read_bytes())
    assert describe_inputs([open_checkpoint(tmp_path)]) == before
    travelled = pickle.loads(pickle.dumps(files_of(checkpoint)))
    assert travelled == files_of(checkpoint)
    with Reader(travelled) as reader:
        assert torch.equal(reader.read(whole(checkpoint.tensors["z"])), torch.ones(64, 64))
        reader.check_unchanged()
    swap(file, reordered(file.read_bytes()))
    with Reader(travelled) as reader, pytest.raises(InputChangedError, match="changed since the merge was planned"):
        reader.read(whole(checkpoint.tensors["a"]))


def test_inodes_count_on_disks_only(tmp_path: Path) -> None:
    """FUSE numbers a file anew when it has forgotten it: that is no change. Its ctime counts."""
    (tmp_path / "x").write_bytes(b"x")
    status = (tmp_path / "x").stat()

    def seen(device: int, inode: int, ctime_ns: int) -> os.stat_result:
        values = dict(zip(("st_mode", "st_ino", "st_dev"), status[:3], strict=True))
        values |= {"st_ino": inode, "st_dev": device}
        return os.stat_result(
            (values["st_mode"], inode, device, *status[3:]),
            {"st_size": status.st_size, "st_mtime_ns": status.st_mtime_ns, "st_ctime_ns": ctime_ns},
        )

    disk, fuse = os.makedev(8, 1), os.makedev(0, 50)
    assert FileIdentity.of(seen(disk, 1, 5), "").is_of(seen(disk, 1, 5))
    assert not FileIdentity.of(seen(disk, 1, 5), "").is_of(seen(disk, 2, 5))
    assert not FileIdentity.of(seen(disk, 1, 5), "").is_of(seen(disk, 1, 6))
    assert FileIdentity.of(seen(fuse, 1, 5), "").is_of(seen(fuse, 2, 5))
    assert not FileIdentity.of(seen(fuse, 1, 5), "").is_of(seen(fuse, 1, 6))


def test_a_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="/dev/full"):
        create_shard(Path("/dev/full"), [OutputTensor("w", torch.float32, (2,))], resume=False)


def test_json_made_part_by_part_is_the_json_made_at_once() -> None:
    plain: dict[str, Any] = {
        "outputs": {"": {"tensors": {"b": {"shape": [2, 3], "é\n": 1e-9}, "a": {}}}, "x": {"tensors": {}}},
        "reports": [{"z": [1.5, None], "a": 'quote " and\nline'}, {}, [], "text", [[1], {"k": []}]],
        "nothing": [[], {}, None, True],
        "tuple": (1, "2"),
        "many": {str(number): {"n": number} for number in range(300)},
    }
    tensors = plain["outputs"][""]["tensors"]
    made = {
        **plain,
        "outputs": {"": {"tensors": LazyMapping(tensors, tensors.__getitem__)}, "x": {"tensors": LazyMapping((), str)}},
    }
    for indent in (1, 2):
        blocks = list(json_blocks(made, indent))
        assert b"".join(blocks) == to_json(plain, indent)
        assert len(blocks) > 3
    assert b"".join(json_blocks({})) == to_json({})
    for value in (float("nan"), [float("inf")]):  # which JSON has not
        with pytest.raises(ValueError, match="JSON"):
            list(json_blocks({"a": value}))


def test_checkpoints_of_one_layout_share_what_they_can(tmp_path: Path) -> None:
    tensors = {f"layers.{index}.weight": torch.zeros(3, 5) for index in range(3)}
    one, other = (open_checkpoint(save_folder(tmp_path / name, tensors)).tensors for name in "ab")
    for name, stored in one.items():
        assert stored.name is name is other[name].name
        assert stored.dtype is other[name].dtype
        assert stored.shape is one["layers.0.weight"].shape
        assert not hasattr(stored, "__dict__")
        assert (stored.bytes, stored.end) == (60, stored.start + 60)
