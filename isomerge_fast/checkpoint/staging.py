"""Where an output is built, and how it becomes the output: one rename, after everything is on disk.

Beside the target ``DIR`` lies ``.DIR.isomerge/`` while a merge runs: ``lock``, ``journal.jsonl``, ``new/`` (the output
under construction) and, for a moment, ``old/`` (what it replaces). A kill at any point leaves ``DIR`` absent, as it
was, or complete.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from ..errors import ConfigError, ResourceError
from .manifest import MANIFEST_FILE
from .writer import sync_folder


class Staging:
    """The work folder of one output; a context manager that holds its lock."""

    def __init__(self, out: Path, *, resume: bool, overwrite: bool) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = self.out.parent / f".{self.out.name}.isomerge"
        self.new = self.folder / "new"
        self.journal_path = self.folder / "journal.jsonl"
        self._old = self.folder / "old"
        self._resume, self._overwrite = resume, overwrite
        self._lock: int | None = None

    def __enter__(self) -> Staging:
        try:
            self._take_lock()
            self._prepare()
        except OSError as error:
            self._release()
            raise ResourceError(f"{self.out.parent}: cannot be written to ({error.strerror})") from error
        except BaseException:
            self._release()
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

    def start(self) -> None:
        """Makes the folder in which the output is built."""
        self.new.mkdir(exist_ok=True)

    def discard(self) -> None:
        """Removes what was staged."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def commit(self) -> None:
        """Puts ``new/`` in the place of the output. Its files are on disk already."""
        sync_folder(self.new)
        sync_folder(self.folder)
        if self.out.exists():
            os.rename(self.out, self._old)
        os.rename(self.new, self.out)
        sync_folder(self.out.parent)
        self.discard()
        sync_folder(self.out.parent)

    def _take_lock(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
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
        if self._old.exists():
            shutil.rmtree(self._old)
        if self.new.exists() and not self._resume:
            if not self._overwrite:
                raise ConfigError(
                    f"{self.out}: an unfinished merge lies in {self.folder}; "
                    "continue it with --resume or discard it with --overwrite"
                )
            shutil.rmtree(self.new)
            self.journal_path.unlink(missing_ok=True)
        self._check_target()

    def _check_target(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            self._leave_no_trace()
            raise ConfigError(f"{self.out}: exists and is not a folder")
        if os.path.ismount(self.out):
            self._leave_no_trace()
            raise ConfigError(f"{self.out}: is a mount point and cannot be renamed to; give a folder inside it")
        names = os.listdir(self.out)
        if not names or (self._resume and self.is_committed):
            return
        if not self._overwrite:
            self._leave_no_trace()
            raise ConfigError(f"{self.out}: not empty; --overwrite replaces it")
        if MANIFEST_FILE not in names and not any(name.endswith(".safetensors") for name in names):
            self._leave_no_trace()
            raise ConfigError(f"{self.out}: not empty and not a checkpoint; refused even with --overwrite")

    def _leave_no_trace(self) -> None:
        if not self.new.exists():
            self.discard()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
