"""A disk that fails to write for a while: merges on it fail, are resumed, and are compared after the cache is dropped.

The disk is an ext4 image on a loop device; the memory that holds the image is full, so that what the file system
writes back fails with EIO. Then there is room again, and the merge is resumed. What it then reads of its own files
from the page cache was never written. At last the file system is unmounted and mounted again. Needs root.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fault_driver import State, difference, state_of
from fault_runs import ENVIRONMENT, Fork, Outcome, merged, warm_up

MEMORY_BYTES, IMAGE_BYTES = 24 << 20, 48 << 20
FORMAT = ["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,nodiscard", "-O", "^has_journal", "-e", "continue"]


def _do(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


class FailingDisk:
    """A file system in ``folder``, a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._memory = folder / "disk", folder / "memory"
        self._image, self._filler = self._memory / "image", self._memory / "filler"

    def __enter__(self) -> FailingDisk:
        for path in (self.folder, self._memory):
            path.mkdir(parents=True, exist_ok=True)
        _do("mount", "-t", "tmpfs", "-o", f"size={MEMORY_BYTES}", "tmpfs", self._memory)
        with open(self._image, "wb") as file:
            file.truncate(IMAGE_BYTES)
        _do(*FORMAT, self._image)
        self._mount()
        return self

    def __exit__(self, *_: object) -> None:
        for path in (self.folder, self._memory):
            subprocess.run(["umount", str(path)], capture_output=True)

    @contextmanager
    def failing(self, spare: int) -> Iterator[None]:
        """While this lasts only ``spare`` more bytes can be written."""
        os.sync()
        left = os.statvfs(self._memory).f_bavail * os.statvfs(self._memory).f_frsize - spare
        self._filler.write_bytes(bytes(max(0, left)))
        try:
            yield
        finally:
            self._filler.unlink()

    def drop_caches(self) -> None:
        """Unmount and mount again."""
        _do("umount", self.folder)
        self._mount()

    def _mount(self) -> None:
        _do("mount", "-o", "loop,errors=continue", self._image, self.folder)


class Driver:
    """Tries rounds below ``root``; what is wrong goes into ``wrong``."""

    def __init__(self, root: Path) -> None:
        import torch

        from checkpoints import make_base, make_expert, save_folder

        self._root = root
        torch.manual_seed(0)
        large = torch.randn(1200, 1000)
        base = {f"layers.{index}.weight": torch.randn(256, 192) for index in range(16)} | make_base()
        self._configs: list[dict[str, Any]] = []
        for name, tensors in {"small": base, "large": {**base, "large.weight": large}}.items():
            config = {
                "base": str(save_folder(root / name / "base", tensors, shards=3, config={"model_type": "test"})),
                "experts": [str(save_folder(root / name / "expert", make_expert(tensors, 0), shards=3))],
                "method": "mean",
            }
            self._configs += [config, {**config, "method": "iso-c", "save_delta": True}]
        self._expected: list[State] = []
        for number, config in enumerate(self._configs):
            assert self._merge(config, root / f"whole-{number}/out").status == "done"
            self._expected.append(state_of(root / f"whole-{number}/out"))
        self.ended: Counter[str] = Counter()
        self.wrong: list[str] = []

    def _merge(self, config: dict[str, Any], out: Path, **options: Any) -> Outcome:
        return Fork(lambda: merged({**config, "out": str(out)}, **options)).wait()

    def try_round(self, chance: random.Random) -> None:
        """One merge that fails, is resumed, and is looked at on the disk."""
        number = chance.randrange(len(self._configs))
        config, expected = self._configs[number], self._expected[number]
        with FailingDisk(self._root / "mounts") as disk:
            out = disk.folder / "out"
            (disk.folder / "warm").mkdir()
            size = sum(map(len, (expected or {}).values()))
            with disk.failing(chance.randrange(size * 5 // 4)):
                first = self._merge(config, out, units=chance.randrange(3))
                if chance.random() < 0.3:  # and once more, while it lasts
                    self._merge(config, out, resume=True)
            second = self._merge(config, out, resume=True, units=chance.randrange(3))
            told = f"{first.status}, resumed: {second.status}"
            if second.status == "ResourceError":  # it was told of the writes that had failed, and begins anew now
                second = self._merge(config, out, resume=True)
                told += f", once more: {second.status}"
            disk.drop_caches()
            self.ended[told] += 1
            found = state_of(out)
            if second.status == "done" and found != expected:
                self.wrong.append(f"{told}: other bytes on the disk: {difference(found, expected)}")
            if second.status != "done" or first.status == "crash":
                self.wrong.append(f"{told}: {first.message[-800:]} {second.message[-800:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    if not can_mount():
        print("not tried: loop devices cannot be mounted here (root, mkfs.ext4)")
        return 0
    warm_up()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="isomerge-disk-") as made:
        driver, chance = Driver(Path(made)), random.Random(arguments.seed)
        for _ in range(arguments.rounds):
            driver.try_round(chance)
    for line in driver.wrong[:20]:
        print(line)
    for told, count in sorted(driver.ended.items()):
        print(f"{count:5d}  {told}")
    print(f"{arguments.rounds} rounds, {len(driver.wrong)} wrong outputs, {time.monotonic() - started:.0f} s")
    return 1 if driver.wrong else 0


def can_mount() -> bool:
    """Return whether this machine lets us have such a disk."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        return False
    with tempfile.TemporaryDirectory(prefix="isomerge-disk-") as made:
        try:
            with FailingDisk(Path(made)):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


if __name__ == "__main__":
    sys.exit(main())
