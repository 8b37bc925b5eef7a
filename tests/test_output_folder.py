"""The folder of the output: what is in it, replaced, linked or locked, and which folders are no place for one."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import isomerge_fast as imf
from checkpoints import config_of, damage_nan, listing, make_base, make_family, save_folder
from isomerge_fast.execution import engine
from isomerge_fast.execution.verify import verify


class TestOutputFolder:
    def test_not_empty(self, tmp_path: Path) -> None:
        family = make_family(tmp_path)
        out = tmp_path / "out"
        save_folder(out, {"old": torch.ones(3)}, shards=1)
        before = listing(tmp_path)
        with pytest.raises(imf.ConfigError, match="not empty"):
            imf.merge(config_of(family, out))
        assert listing(tmp_path) == before
        with pytest.raises(imf.ConfigError, match="not the output of a merge"):  # a checkpoint of somebody's
            imf.merge(config_of(family, out), overwrite=True)
        assert listing(tmp_path) == before

    @pytest.mark.parametrize("target", ["out", "other"], ids=["to-itself", "to-each-other"])
    def test_links_in_a_circle_are_refused_before_the_work(self, tmp_path: Path, target: str) -> None:
        family = make_family(tmp_path)
        (tmp_path / "out").symlink_to(target)
        if target == "other":
            (tmp_path / "other").symlink_to("out")
        with pytest.raises(imf.ConfigError, match="exists and is not a folder"):
            imf.merge(config_of(family, tmp_path / "out"))
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".isomerge")]

    def test_an_input_in_a_deep_folder(self, tmp_path: Path) -> None:
        """Whose parents are all looked at."""
        deep = tmp_path.joinpath(*["d"] * 800)
        base = make_base()
        save_folder(tmp_path / "base", base)
        save_folder(deep, base)
        imf.merge(config_of((tmp_path / "base", [deep]), tmp_path / "out", method="mean"))
        with pytest.raises(imf.ConfigError, match="is or contains the input"):
            imf.merge(config_of((tmp_path / "base", [deep]), tmp_path / "d", method="mean"))

    @pytest.mark.parametrize("added", ["thesis.tex", ".git/HEAD", "data", "model-old.safetensors", "1_Pooling/x"])
    def test_overwrite_takes_only_what_a_merge_has_written(self, tmp_path: Path, added: str) -> None:
        """A file, a folder, a link to one, a stale shard: none of them is in the manifest."""
        family = make_family(tmp_path)
        out = tmp_path / "out"
        imf.merge(config_of(family, out))
        (out / added).parent.mkdir(exist_ok=True)
        if added == "data":
            (tmp_path / "elsewhere").mkdir()
            (out / added).symlink_to(tmp_path / "elsewhere")
        else:
            (out / added).write_text("years of work")
        before = listing(tmp_path)
        with pytest.raises(imf.ConfigError, match=f"holds {re.escape(added.partition('/')[0])}, which the merge"):
            imf.merge(config_of(family, out, scaling=0.5), overwrite=True)
        assert listing(tmp_path) == before
        assert not (tmp_path / ".out.isomerge").exists()

    @pytest.mark.parametrize("moment", ["before the rename", "after it"])
    def test_what_comes_into_the_output_while_it_is_replaced_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        family = make_family(tmp_path)
        config = config_of(family, tmp_path / "out")
        imf.merge({**config, "scaling": 0.5})
        old = listing(tmp_path / "out")
        real, real_rename = engine.write_metadata, os.rename

        def add(folder: Path) -> None:
            (folder / "thesis.tex").write_text("years of work")

        def finish(*given: Any) -> None:
            real(*given)
            if moment == "before the rename":
                add(tmp_path / "out")

        def rename(source: Any, target: Any, **options: Any) -> None:
            real_rename(source, target, **options)
            if moment == "after it" and source == tmp_path / "out":
                add(target)

        monkeypatch.setattr(engine, "write_metadata", finish)
        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(imf.ConfigError, match=r"holds thesis\.tex"):
            imf.merge(config, overwrite=True)
        monkeypatch.undo()
        assert (tmp_path / "out/thesis.tex").read_text() == "years of work"
        (tmp_path / "out/thesis.tex").rename(tmp_path / "thesis.tex")
        assert listing(tmp_path / "out") == old
        imf.merge(config, resume=True, overwrite=True)  # nothing of the work is lost
        assert verify(tmp_path / "out").tensors == len(make_base())

    def test_overwrite_leaves_no_stale_shard(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        imf.merge(config_of(make_family(tmp_path / "sharded", shards=3), out))
        imf.merge(config_of(make_family(tmp_path / "single"), out), overwrite=True)
        assert sorted(path.name for path in out.glob("model*")) == ["model.safetensors"]

    def test_overwrite_keeps_the_old_until_the_commit(self, tmp_path: Path) -> None:
        family = make_family(tmp_path)
        imf.merge(config_of(family, tmp_path / "out"))
        before = listing(tmp_path / "out")
        damage_nan(family)
        with pytest.raises(imf.InputError):
            imf.merge(config_of(family, tmp_path / "out"), overwrite=True)
        assert listing(tmp_path / "out") == before

    def test_not_a_merge(self, tmp_path: Path) -> None:
        """--overwrite on a folder of other things (a home folder, say) is refused."""
        family = make_family(tmp_path)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("x")
        with pytest.raises(imf.ConfigError, match="not the output of a merge"):
            imf.merge(config_of(family, tmp_path / "out"), overwrite=True)
        assert (tmp_path / "out" / "thesis.tex").exists()

    @pytest.mark.parametrize("which", ["base", "expert0", ".", "link"])
    def test_is_or_holds_an_input(self, tmp_path: Path, which: str) -> None:
        family = make_family(tmp_path)
        (tmp_path / "link").symlink_to(family[0])
        before = listing(tmp_path)
        with pytest.raises(imf.ConfigError, match="is or contains the input"):
            imf.merge(config_of(family, tmp_path / which), overwrite=True)
        assert listing(tmp_path) == before

    @pytest.mark.parametrize("place", ["out", ".out.isomerge/run-0/new"])
    def test_shards_of_an_input_that_are_links_into_the_output(self, tmp_path: Path, place: str) -> None:
        """Into what is replaced, or into where it is built; by a folder of links, or by the folder itself."""
        (base, experts) = make_family(tmp_path)
        (tmp_path / place).mkdir(parents=True)
        shutil.move(base / "model.safetensors", tmp_path / place / "model.safetensors")
        (base / "model.safetensors").symlink_to(tmp_path / place / "model.safetensors")
        before = listing(tmp_path)
        for given in (base, tmp_path / place):
            for resume, overwrite in ((False, False), (True, False), (False, True)):
                config = config_of((given, experts), tmp_path / "out")
                with pytest.raises(imf.ConfigError, match="is or contains the input"):
                    imf.merge(config, resume=resume, overwrite=overwrite)
        assert listing(tmp_path) == before

    def test_empty_folder_and_missing_parents_are_fine(self, tmp_path: Path) -> None:
        family = make_family(tmp_path)
        (tmp_path / "empty").mkdir()
        imf.merge(config_of(family, tmp_path / "empty"))
        imf.merge(config_of(family, tmp_path / "a" / "b" / "c"))
        assert listing(tmp_path / "empty")["model.safetensors"] == listing(tmp_path / "a/b/c")["model.safetensors"]

    def test_mount_point(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing can be renamed onto one: said before the work, not after."""
        family = make_family(tmp_path)
        (tmp_path / "out").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "out"))
        with pytest.raises(imf.ConfigError, match="mount point"):
            imf.merge(config_of(family, tmp_path / "out"))
        assert not (tmp_path / ".out.isomerge").exists()

    def test_locked_by_another_run(self, tmp_path: Path) -> None:
        family = make_family(tmp_path)
        from isomerge_fast.checkpoint.output.staging import Staging

        with (
            Staging(tmp_path / "out", resume=False, overwrite=False),
            pytest.raises(imf.ConfigError, match="another merge is writing"),
        ):
            imf.merge(config_of(family, tmp_path / "out"))
        imf.merge(config_of(family, tmp_path / "out"))  # the lock went with its holder

    def test_too_large_for_the_disk_or_the_ceiling(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        family = make_family(tmp_path)
        with pytest.raises(imf.ResourceError, match=r"max_ram is 1000000 bytes; the smallest that would do is \d+"):
            imf.merge(config_of(family, tmp_path / "out"), max_ram=1_000_000)
        usage = shutil.disk_usage(tmp_path)._replace(free=100)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(imf.ResourceError, match=r"100 bytes are free, the output takes \d+"):
            imf.merge(config_of(family, tmp_path / "out"))
        assert not (tmp_path / "out").exists()
