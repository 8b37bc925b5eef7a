"""Files beside the weights: which are copied, links among them, and what cannot be read."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from checkpoints import make_base, save_folder
from isomerge_fast.checkpoint.io.checksum import Checksum
from isomerge_fast.checkpoint.layout import open_checkpoint
from isomerge_fast.checkpoint.lora.adapter import open_adapter
from isomerge_fast.checkpoint.output.companions import copy_companions
from isomerge_fast.checkpoint.output.model_config import config_with_dtype
from isomerge_fast.errors import InputError, ResourceError
from openings import companion_files, open_all


def test_companions(tmp_path: Path) -> None:
    wanted = ["1_Pooling/config.json", "chat_template.jinja", "generation_config.json", "merges.txt", "modeling_x.py"]
    wanted += ["preprocessor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "vocab.txt"]
    unwanted = [
        "README.md",
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "pytorch_model.bin",
        "trainer_state.json",
    ]
    unwanted += ["checkpoint-1/config.json", ".git/config", "model.safetensors.index.json", "runs/train.py"]
    (tmp_path / "LICENSES").mkdir()
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert companion_files(tmp_path) == sorted(wanted)


def test_weights_are_no_companions(tmp_path: Path) -> None:
    for name in ("LICENSE.safetensors", "NOTICE-1.safetensors", "tokenizer.safetensors.index.json", "LICENSE.md"):
        (tmp_path / name).write_text("{}")
    assert companion_files(tmp_path) == ["LICENSE.md"]


class TestLinksOfCompanions:
    def refused(self, folder: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            companion_files(folder)
        assert str(folder) in str(caught.value)

    @pytest.mark.parametrize("target", ["/etc/shadow", "/proc/self/environ", "../secret", "../base-2/secret"])
    @pytest.mark.parametrize("name", ["tokenizer_a.json", "1_Pooling/config.json"])
    def test_out_of_the_folder(self, tmp_path: Path, target: str, name: str) -> None:
        folder = tmp_path / "base"
        (folder / name).parent.mkdir(parents=True)
        (tmp_path / "base-2").mkdir()
        for secret in ("secret", "base-2/secret"):
            (tmp_path / secret).write_text("hf_SECRET")
        up = "../" if "/" in name and target.startswith("..") else ""
        (folder / name).symlink_to(up + target)
        self.refused(folder, r"leads out of its folder, to .*put a copy in its place")

    def test_a_folder_that_is_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/config.json").write_text("{}")
        (tmp_path / "base").mkdir()
        (tmp_path / "base/1_Pooling").symlink_to("../elsewhere")
        self.refused(tmp_path / "base", "leads out of its folder")

    def test_config_and_adapter_settings(self, tmp_path: Path) -> None:
        """They are copied as well, if only what is JSON of them. Weights may lie anywhere, and their index."""
        save_folder(tmp_path / "store", make_base(), shards=2, config={"token": "hf_SECRET"})
        folder = tmp_path / "base"
        folder.mkdir()
        for file in (tmp_path / "store").iterdir():
            if file.name != "config.json":
                (folder / file.name).symlink_to(file)
        assert open_checkpoint(folder).tensors.keys() == make_base().keys()
        for name in ("config.json", "adapter_config.json"):
            (folder / name).symlink_to(tmp_path / "store/config.json")
        with pytest.raises(InputError, match=r"base/config\.json: leads out of its folder"):
            open_checkpoint(folder)
        (folder / "adapter_model.safetensors").touch()
        for file in folder.glob("model*"):
            file.unlink()
        with pytest.raises(InputError, match=r"adapter_config\.json: leads out of its folder"):
            open_adapter(folder, open_checkpoint(tmp_path / "store"))

    def test_inside_the_folder_and_into_its_blobs(self, tmp_path: Path) -> None:
        """Also when the cache is reached by a link, and from a folder inside the snapshot (diffusers)."""
        repository = tmp_path / "hub/models--org--name"
        snapshot = repository / "snapshots/0123abc"
        (repository / "blobs").mkdir(parents=True)
        (repository / "blobs/cafe").write_text("{}")
        (snapshot / "unet").mkdir(parents=True)
        (snapshot / "tokenizer.json").symlink_to("../../blobs/cafe")
        (snapshot / "vocab.json").symlink_to("tokenizer.json")
        (snapshot / "unet/tokenizer.json").symlink_to("../../../blobs/cafe")
        (tmp_path / "cache").symlink_to("hub")
        for folder in (snapshot, tmp_path / "cache/models--org--name/snapshots/0123abc"):
            assert companion_files(folder) == ["tokenizer.json", "unet/tokenizer.json", "vocab.json"]
            assert companion_files(folder / "unet") == ["tokenizer.json"]
            (tmp_path / "out").mkdir(exist_ok=True)
            copy_companions(folder, tmp_path / "out", ["vocab.json"])
            assert (tmp_path / "out/vocab.json").read_text() == "{}"
        other = tmp_path / "hub/models--me--private/blobs"
        other.mkdir(parents=True)
        (other / "beef").write_text("hf_SECRET")
        (snapshot / "merges.txt").symlink_to("../../../models--me--private/blobs/beef")
        self.refused(snapshot, r"merges\.txt: leads out of its folder")

    def test_a_link_put_in_later(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between the check and the opening, and between the plan and the copying."""
        base, out = tmp_path / "base", tmp_path / "out"
        for folder in (base, out):
            folder.mkdir()
        (tmp_path / "secret").write_text("hf_SECRET")
        (base / "tokenizer.json").write_text("{}")
        names = companion_files(base)
        (base / "tokenizer.json").unlink()
        (base / "tokenizer.json").symlink_to("../secret")
        with pytest.raises(InputError, match="leads out of its folder"):
            copy_companions(base, out, names)
        real = os.path.realpath
        monkeypatch.setattr(os.path, "realpath", lambda path, **_: path if "tokenizer" in str(path) else real(path))
        with pytest.raises(ResourceError, match=r"tokenizer\.json: cannot be read"):
            copy_companions(base, out, names)
        assert not any(path.read_text() for path in out.iterdir())


class TestWhatCannotBeRead:
    """Root reads everything, so that the kernel's answer is made up."""

    def deny(self, monkeypatch: pytest.MonkeyPatch, function: str, denied: Path) -> None:
        real = getattr(os, function)

        def asked(path: object, *arguments: object, **options: object) -> object:
            if str(path) == str(denied) or (options.get("dir_fd") is not None and str(path) == denied.name):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(os, function, asked)

    def test_a_folder_that_cannot_be_listed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its tokenizer is there, and would be missing from the output."""
        save_folder(tmp_path, make_base(), config={})
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling/config.json").write_text("{}")
        self.deny(monkeypatch, "scandir", tmp_path / "1_Pooling")
        with pytest.raises(InputError, match=r"1_Pooling: cannot be listed \(Permission denied\)"):
            companion_files(tmp_path)
        self.deny(monkeypatch, "scandir", tmp_path)
        for opened in (open_checkpoint, companion_files):
            with pytest.raises(InputError, match=r"cannot be listed \(Permission denied\)"):
                opened(tmp_path)

    @pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
    def test_a_file_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        save_folder(tmp_path, make_base(), config={})
        (tmp_path / "tokenizer.json").write_text("{}")
        self.deny(monkeypatch, "open", tmp_path / name)
        with pytest.raises(InputError, match=rf"{name}: cannot be read \(Permission denied\)"):
            open_all(tmp_path)

    def test_a_path_that_cannot_be_asked_for(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be opened"):
            open_checkpoint(tmp_path / ("a" * 300))


def test_companions_that_case_alone_tells_apart(tmp_path: Path) -> None:
    for name in ("LICENSE.md", "LICENSE.MD"):
        (tmp_path / name).write_text(name)
    with pytest.raises(InputError, match=r"'LICENSE\.MD' and 'LICENSE\.md' are one file"):
        companion_files(tmp_path)


def test_companions_are_copied_in_blocks(tmp_path: Path) -> None:
    """A tokenizer of 64 MB takes no memory of its size; modes follow the umask, whatever the original has."""
    base, out = tmp_path / "base", tmp_path / "out"
    (base / "1_Pooling").mkdir(parents=True)
    out.mkdir()
    (base / "1_Pooling/config.json").write_text('{"x": 1}')
    with open(base / "tokenizer.json", "wb") as file:
        file.write(b"head")
        file.truncate(64_000_000)
    (base / "tokenizer.json").chmod(0o600)
    before = os.umask(0o022)
    tracemalloc.start()
    try:
        checksums = copy_companions(base, out, companion_files(base))
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
        os.umask(before)
    assert checksums.keys() == {"1_Pooling/config.json", "tokenizer.json"}
    for name, checksum in checksums.items():
        content = (base / name).read_bytes()
        assert (out / name).read_bytes() == content
        whole_file = Checksum()
        whole_file.update(content)
        assert (checksum.bytes, checksum.text) == (len(content), whole_file.text)
        assert (out / name).stat().st_mode & 0o777 == 0o644


def test_config_dtype() -> None:
    config = {
        "torch_dtype": "float32",
        "text_config": {"dtype": None, "x": 1},
        "vision_config": {"torch_dtype": "float16"},
    }
    changed = config_with_dtype(config, "bfloat16")
    assert changed == {
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "x": 1},
        "vision_config": {"torch_dtype": "bfloat16"},
    }
    assert config_with_dtype(config, None) == config
    assert config_with_dtype({"model_type": "x"}, "float16") == {"model_type": "x", "dtype": "float16"}
