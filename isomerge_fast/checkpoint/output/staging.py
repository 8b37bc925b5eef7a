"""Build an output beside its place, and put it there by one rename, after everything is on disk.

Beside the target ``DIR`` lies ``.DIR.isomerge/`` while a merge runs. In it are ``lock`` and one folder of each run,
``run-<random>/``, with ``journal*.jsonl``, ``new/`` (the output under construction) and, for a moment, ``old/`` (what
it replaces). A kill at any point leaves ``DIR`` absent, as it was, or complete.

Nothing depends on the lock being kept. A run builds in a folder whose name no other run knows; one that resumes it, or
discards it, renames that folder first. So a run that was given up and lives on, where locks do nothing (NFS without a
lock daemon) or are each machine's own (Lustre with ``localflock``), finds its folder gone and ends with an error.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from ...errors import ConfigError, InputError, ResourceError, VerificationError
from ..io.writer import rename, sync_folder
from .manifest import MANIFEST_FILE, list_output, read_manifest

LOCK_FILE, NEW, OLD = "lock", "new", "old"
_RUN, _TRASH = "run-", "trash-"
_NONE = -1  # in the place of a descriptor


def staging_folder(out: Path) -> Path:
    """Return the folder beside the output in which its runs lie; where ``out`` is a link, beside its target."""
    target = Path(os.path.realpath(out))
    return target.parent / f".{target.name}.isomerge"


def run_folders(out: Path) -> list[Path]:
    """Return the folders of runs that are at work on this output or were interrupted, the latest first."""
    root = staging_folder(out)
    if root.is_symlink() or not root.is_dir():
        return []
    found: list[tuple[int, Path]] = []
    for entry in _entries(root, _RUN):
        with suppress(OSError):  # taken over at this moment
            found.append((entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)))
    return [path for _, path in sorted(found, reverse=True)]


def staged_bytes(out: Path) -> int:
    """Return the bytes on disk of unfinished outputs: the same merge overwrites them, another merge discards them."""
    total = 0
    for run in run_folders(out):
        for folder, _, names in os.walk(run / NEW):
            for name in names:
                with suppress(OSError):  # another run may be about to move it
                    total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


class Staging:
    """Hold the work folder of one run and the output's lock, as a context manager.

    It raises ConfigError where another merge is at work there, or an unfinished one lies there and is neither to be
    resumed nor to be discarded; where the output is there and is not to be replaced, or holds what no merge has put
    there.
    """

    def __init__(self, out: Path, *, resume: bool, overwrite: bool) -> None:
        self.out = Path(os.path.realpath(out))
        self.root = staging_folder(out)
        self.folder = self.root / f"{_RUN}{secrets.token_hex(8)}"  # of this run alone, with its journals
        self.new = self.folder / NEW  # the output under construction
        self._old = self.folder / OLD
        self.notes: list[str] = []  # for the user
        self._resume, self._overwrite = resume, overwrite
        self._root = self._lock = _NONE
        self._identity: tuple[int, int] | None = None

    def __enter__(self) -> Staging:
        try:
            self._enter_root()
            self._prepare()
        except BaseException as error:
            if self._lock != _NONE and not self.new.exists() and not self._old.exists():
                self.discard()
            self._release()
            if isinstance(error, OSError):
                raise ResourceError(f"{self.out.parent}: cannot be written to ({error.strerror})") from error
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._release()

    @property
    def is_committed(self) -> bool:
        """Return whether the output is there already and nothing is unfinished."""
        return (self.out / MANIFEST_FILE).is_file() and not self.new.exists()

    def start(self, keep: Collection[str]) -> None:
        """Make the folder in which the output is built; remove all files from it but those of ``keep``."""
        if not self.new.exists():
            # By a rename: where folders cannot be renamed, the error comes before the work.
            fresh = self.folder / "fresh"
            fresh.mkdir(exist_ok=True)
            rename(fresh, self.new)
        for path in sorted(self.new.rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # not empty
                    path.rmdir()
            elif path.relative_to(self.new).as_posix() not in keep:
                path.unlink()

    def discard(self) -> None:
        """Remove what this run staged, and what it replaced.

        The lock goes last, so that no other run comes in between, and only where no other run's folder is left.
        """
        with suppress(OSError, ConfigError):
            self._check_replaced(self.folder.name)
            self._delete(self.folder.name)
        with suppress(OSError):
            if not _entries(self._root, _RUN):
                os.unlink(LOCK_FILE, dir_fd=self._root)
                self.root.rmdir()

    def commit(self) -> None:
        """Put ``new/`` in the place of the output. Its files are on disk already.

        It raises ConfigError where another run has taken this one's folder, or the output holds by now what no merge
        wrote.
        """
        for folder, _, _ in os.walk(self.new, topdown=False):
            sync_folder(Path(folder))
        sync_folder(self.folder)
        self.check_mine()
        if self.out.exists():
            check_replaceable(self.out)
            rename(self.out, self._old)
        try:
            if self._old.exists():
                check_replaceable(self._old)  # what came into it at the last moment
                self._sync_both()
            rename(self.new, self.out)
        except (OSError, ResourceError, ConfigError):
            if self._old.exists():
                with suppress(OSError):  # else the next run does it
                    os.rename(self._old, self.out)
            raise
        self._sync_both()
        self.discard()

    def check_mine(self) -> None:
        """Raise ConfigError where another run has taken this one's folder, to resume it or to discard it."""
        if not self._is_mine():
            raise ConfigError(f"{self.out}: another merge into it has taken the place of this one")

    def _is_mine(self) -> bool:
        with suppress(OSError):
            held = _identity(os.fstat(self._root))
            return _identity(os.lstat(self.root)) == held and _identity(os.lstat(self.folder)) == self._identity
        return False

    def _sync_both(self) -> None:
        """Make renames between this run's folder and the output's parent durable."""
        sync_folder(self.out.parent)
        sync_folder(self.folder)

    def _delete(self, inside: str) -> None:
        """Remove a folder inside the root, under another name: a half removed one must not be taken for a run."""
        trash = f"{_TRASH}{secrets.token_hex(8)}"
        self._rename(inside, trash)
        shutil.rmtree(trash, ignore_errors=True, dir_fd=self._root)

    def _rename(self, source: str, target: str) -> None:
        """Rename inside the root that is open, wherever its path leads by now."""
        os.rename(source, target, src_dir_fd=self._root, dst_dir_fd=self._root)

    def _check_replaced(self, run: str) -> None:
        """Raise ConfigError where a run's ``old``, which is removed with its folder, holds what no merge wrote."""
        if (self.root / run / OLD).exists():
            check_replaceable(self.root / run / OLD)

    def _enter_root(self) -> None:
        """Open the folder of runs, make this run's folder in it, and take the lock."""
        missing = [folder for folder in (self.out.parent, *self.out.parent.parents) if not folder.exists()]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)
        while True:
            # Another run that ends may remove the folder or the lock between any two of these.
            with suppress(FileNotFoundError):
                self._open_root()
                self._make_folder()
                if self._take_lock():
                    return
            self._release()

    def _open_root(self) -> None:
        with suppress(FileExistsError):
            self.root.mkdir(mode=0o700)
        try:
            self._root = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise ConfigError(f"{self.root}: a link or a file, not the folder of a merge; remove it") from error
            raise

    def _make_folder(self) -> None:
        with suppress(FileExistsError):  # made at the last try
            os.mkdir(self.folder.name, dir_fd=self._root)
        root, made = os.fstat(self._root), os.stat(self.folder.name, dir_fd=self._root)
        if root.st_uid != made.st_uid:
            os.rmdir(self.folder.name, dir_fd=self._root)
            raise ConfigError(f"{self.root}: belongs to another user (uid {root.st_uid}); refused")
        with suppress(OSError):  # file systems without modes
            os.fchmod(self._root, 0o700)
        self._identity = _identity(made)

    def _take_lock(self) -> bool:
        """Return whether the lock was taken; False where another run has removed its folder."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._lock = os.open(LOCK_FILE, flags, 0o600, dir_fd=self._root)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(f"{self.out}: another merge is writing it at this moment") from error
            raise ResourceError(f"{self.root}: cannot be locked ({error.strerror})") from error
        there = os.stat(LOCK_FILE, dir_fd=self._root, follow_symlinks=False)
        if _identity(os.fstat(self._lock)) != _identity(there) or not self._is_mine():
            return False
        if not self._locks_hold():
            self.notes.append(
                "locks do nothing on the file system of the output: a second merge into it is not refused, but takes "
                "the place of the first, which then fails"
            )
        return True

    def _locks_hold(self) -> bool:
        """Return whether a lock that is held is refused to another descriptor."""
        other = os.open(LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(other)
        return False

    def _prepare(self) -> None:
        """Clear away what interrupted runs left, and take over the run that is to be resumed."""
        runs = [path for path in run_folders(self.out) if path != self.folder]
        for run in runs:
            if (run / OLD).exists() and not self.out.exists():
                os.rename(run / OLD, self.out)  # killed between the two renames of a commit
            self._check_replaced(run.name)
        unfinished = [run for run in runs if (run / NEW).exists()]
        if unfinished and not self._resume and not self._overwrite:
            raise ConfigError(
                f"{self.out}: an unfinished merge lies in {unfinished[0]}; "
                "continue it with --resume or discard it with --overwrite"
            )
        self._check_target(bool(unfinished))
        resumed = unfinished if self._resume else []
        for run in runs:
            if run not in resumed:
                self._delete(run.name)
        for entry in _entries(self._root, _TRASH):
            shutil.rmtree(entry.name, ignore_errors=True, dir_fd=self._root)
        if resumed:
            self._adopt(resumed[0])

    def _adopt(self, run: Path) -> None:
        """Take over another run's folder, under this run's name."""
        os.rmdir(self.folder.name, dir_fd=self._root)
        self._rename(run.name, self.folder.name)
        self._identity = _identity(os.lstat(self.folder))
        if self._old.exists():  # of a commit that could not put it back
            self._delete(f"{self.folder.name}/{OLD}")

    def _check_target(self, is_unfinished: bool) -> None:
        if not os.path.lexists(self.out):  # a link that leads to itself is there, and leads nowhere
            return
        if not self.out.is_dir():
            raise ConfigError(f"{self.out}: exists and is not a folder")
        if os.path.ismount(self.out):
            raise ConfigError(f"{self.out}: is a mount point and cannot be renamed to; give a folder inside it")
        is_finished = (self.out / MANIFEST_FILE).is_file() and not is_unfinished
        if not os.listdir(self.out) or (self._resume and is_finished):
            return
        if not self._overwrite:
            raise ConfigError(f"{self.out}: not empty; --overwrite replaces it, where it is the output of a merge")
        check_replaceable(self.out)

    def _release(self) -> None:
        for descriptor in (self._lock, self._root):
            with suppress(OSError):  # none, too
                os.close(descriptor)
        self._lock = self._root = _NONE


def check_replaceable(folder: Path) -> None:
    """Raise ConfigError where a folder holds anything but the output of a merge, so that it must not be deleted.

    Its manifest has to be readable, and to list every file.
    """
    if not os.listdir(folder):
        return
    try:
        _, unknown = list_output(folder, read_manifest(folder))
    except (InputError, VerificationError) as error:
        raise ConfigError(
            f"{folder}: not the output of a merge, or its {MANIFEST_FILE} cannot be read, so it is not replaced even "
            "with --overwrite; move it away, or remove it"
        ) from error
    if unknown:
        raise ConfigError(
            f"{folder}: holds {unknown[0]}, which the merge that --overwrite would replace has not written; "
            "move it away"
        )


def _entries(folder: Path | int, prefix: str) -> list[os.DirEntry[str]]:
    """Return the sub-folders, links excluded, whose names begin with ``prefix``."""
    with os.scandir(folder) as found:
        return [entry for entry in found if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False)]


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
