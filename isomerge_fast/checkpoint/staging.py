"""Where an output is built, and how it becomes the output: one rename, after everything is on disk.

Beside the target ``DIR`` lies ``.DIR.isomerge/`` while a merge runs: ``lock``, ``journal*.jsonl``, ``new/`` (the output
under construction) and, for a moment, ``old/`` (what it replaces). A kill at any point leaves ``DIR`` absent, as it
was, or complete.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ..errors import ConfigError, ResourceError
from .manifest import MANIFEST_FILE
from .writer import rename, sync_folder


def staging_folder(out: Path) -> Path:
    """Beside the output. A link stays one: what it leads to is replaced, on the disk where that is."""
    target = Path(os.path.realpath(out))
    return target.parent / f".{target.name}.isomerge"


def staged_bytes(out: Path) -> int:
    """Bytes on disk of an unfinished output, which the same merge writes over and another one discards."""
    total = 0
    for folder, _, names in os.walk(staging_folder(out) / "new"):
        for name in names:
            with suppress(OSError):  # another run may be about to move it
                total += os.stat(os.path.join(folder, name)).st_blocks * 512
    return total


class Staging:
    """The work folder of one output; a context manager that holds its lock."""

    def __init__(self, out: Path, *, resume: bool, overwrite: bool) -> None:
        self.out = Path(os.path.realpath(out))
        self.folder = staging_folder(out)
        self.new = self.folder / "new"
        self._old = self.folder / "old"
        # Being made, and being deleted: never taken for the output.
        self._fresh, self._trash = self.folder / "fresh", self.folder / "trash"
        self._resume, self._overwrite = resume, overwrite
        self._lock: int | None = None

    def __enter__(self) -> Staging:
        try:
            self._take_lock()
            self._prepare()
        except BaseException as error:
            if self._lock is not None and not self.new.exists() and not self._old.exists():
                self.discard()
            self._release()
            if isinstance(error, OSError):
                raise ResourceError(f"{self.out.parent}: cannot be written to ({error.strerror})") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    @property
    def is_committed(self) -> bool:
        """Whether the output is there already and nothing is unfinished."""
        return (self.out / MANIFEST_FILE).is_file() and not self.new.exists()

    def start(self, keep: Collection[str]) -> None:
        """Makes the folder in which the output is built.

        Args:
            keep: files in it that are gone on with; all others are removed.
        """
        if not self.new.exists():
            # By a rename, so that it is said before the work where folders cannot be renamed.
            self._fresh.mkdir(exist_ok=True)
            rename(self._fresh, self.new)
        for path in sorted(self.new.rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_dir():
                with suppress(OSError):  # not empty
                    path.rmdir()
            elif path.relative_to(self.new).as_posix() not in keep:
                path.unlink()

    def discard(self) -> None:
        """Removes what was staged, and what was replaced. The lock goes last, lest another run come in between."""
        with suppress(OSError):
            self._delete_old()
        for folder in (self._trash, self.new, self._fresh):
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            self._delete_journals()
            (self.folder / "lock").unlink()
            self.folder.rmdir()

    def commit(self) -> None:
        """Puts ``new/`` in the place of the output. Its files are on disk already."""
        for folder, _, _ in os.walk(self.new, topdown=False):
            sync_folder(Path(folder))
        sync_folder(self.folder)
        if self.out.exists():
            rename(self.out, self._old)
        try:
            if self._old.exists():
                self._sync_both()
            rename(self.new, self.out)
        except (OSError, ResourceError):
            if self._old.exists():
                with suppress(OSError):  # else the next run does it
                    os.rename(self._old, self.out)
            raise
        self._sync_both()
        self.discard()

    def _sync_both(self) -> None:
        """Makes renames between the work folder and its parent durable."""
        sync_folder(self.out.parent)
        sync_folder(self.folder)

    def _delete_old(self) -> None:
        """Under another name, since ``old`` is put back where the output is missing, and half of it would be then."""
        shutil.rmtree(self._trash, ignore_errors=True)
        if self._old.exists():
            os.rename(self._old, self._trash)
            shutil.rmtree(self._trash, ignore_errors=True)

    def _delete_journals(self) -> None:
        for path in self.folder.glob("journal*"):
            path.unlink(missing_ok=True)

    def _take_lock(self) -> None:
        missing = [folder for folder in (self.out.parent, *self.out.parent.parents) if not folder.exists()]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)
        while True:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / "lock"
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # the folder went with another run's commit
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                same = os.fstat(descriptor).st_ino == os.stat(path).st_ino
            except OSError as error:
                os.close(descriptor)
                if error.errno == errno.ENOENT:
                    continue
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise ConfigError(f"{self.out}: another merge is writing it at this moment") from error
                raise
            if same:
                self._lock = descriptor
                return
            os.close(descriptor)

    def _prepare(self) -> None:
        if self._old.exists() and not self.out.exists():
            os.rename(self._old, self.out)  # killed between the two renames of a commit: what was there is put back
        self._delete_old()
        if self.new.exists() and not self._resume:
            if not self._overwrite:
                raise ConfigError(
                    f"{self.out}: an unfinished merge lies in {self.folder}; "
                    "continue it with --resume or discard it with --overwrite"
                )
            shutil.rmtree(self.new)
            self._delete_journals()
        self._check_target()

    def _check_target(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise ConfigError(f"{self.out}: exists and is not a folder")
        if os.path.ismount(self.out):
            raise ConfigError(f"{self.out}: is a mount point and cannot be renamed to; give a folder inside it")
        names = os.listdir(self.out)
        if not names or (self._resume and self.is_committed):
            return
        if not self._overwrite:
            raise ConfigError(f"{self.out}: not empty; --overwrite replaces it")
        if MANIFEST_FILE not in names and not any(name.endswith(".safetensors") for name in names):
            raise ConfigError(f"{self.out}: not empty and not a checkpoint; refused even with --overwrite")

    def _release(self) -> None:
        if self._lock is not None:
            with suppress(OSError):
                os.close(self._lock)
            self._lock = None
