"""Define what runs on the machines of a Ray cluster: the task of a work item, planning, and questions to a machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, chdir, nullcontext

import torch

from ... import __version__
from ...config import MergeConfig
from ...errors import ConfigError, IsomergeError, ResourceError
from ...execution.work_item import MergeSettings, WorkItem, WorkResult
from ...execution.worker import merge_item
from ...planning.plan import Plan
from ...planning.planner import make_plan


def plan_on_gpu(config: MergeConfig, max_ram: int | None, max_vram: int | None, folder: str) -> Plan:
    """Plan on a machine that has a GPU, for a driver that has none."""
    with _in_folder(folder):
        return make_plan(config, torch.device("cuda"), max_ram=max_ram, max_vram=max_vram)


def merge_there(settings: MergeSettings, item: WorkItem, version: str, folder: str) -> WorkResult:
    """Merge a work item on this machine; errors have the machine's name as their attribute ``host``.

    ``version`` of this package and the working ``folder`` are the driver's.
    """
    try:
        if version != __version__:  # of a machine that has joined since
            raise ConfigError(f"isomerge-fast {__version__} is installed there; the driver has {version}")
        with _in_folder(folder):
            return merge_item(settings, item)
    except IsomergeError as error:
        failure = error
    except OSError as error:  # as in ``engine.run``
        failure = ResourceError(f"{error.filename or settings.folder}: {error.strerror}; --resume continues")
    except MemoryError as error:
        failure = ResourceError(f"out of memory ({error}); --resume continues")
    failure.host = socket.gethostname()  # type: ignore[union-attr]  # travels with it
    raise failure


def _in_folder(folder: str) -> AbstractContextManager[None]:
    """Change into the driver's folder, where relative paths mean what they mean there; absolute ones need none."""
    return chdir(folder) if os.path.isdir(folder) else nullcontext()


# Questions are functions inside functions, which travel by value: the machine that is asked may lack this package.


def versions_question() -> Callable[[], dict[str, str]]:
    """Return a function that, run on a machine, returns its versions of this package and of torch."""

    def versions() -> dict[str, str]:
        from importlib import metadata

        found = {}
        try:
            import isomerge_fast

            found["isomerge-fast"] = isomerge_fast.__version__
            found["torch"] = metadata.version("torch")
        except (ImportError, metadata.PackageNotFoundError):
            pass
        return found

    return versions


def files_question() -> Callable[[str, str, dict[str, tuple[int, int]]], list[str]]:
    """Return a function that lists, in words, what a machine sees otherwise than the driver: a folder and files.

    Its arguments: a file that the driver made in the folder; the folder; (size, mtime_ns) of every file by path.
    """

    def problems(token: str, folder: str, files: dict[str, tuple[int, int]]) -> list[str]:
        import os

        found = []
        if not os.path.exists(token):
            found.append(f"{folder}: not the folder that the driver sees")
        elif not os.access(folder, os.W_OK):
            found.append(f"{folder}: not writable")
        for path, stamp in files.items():
            try:
                status = os.stat(path)
            except OSError as error:
                found.append(f"{path}: {error.strerror}")
                continue
            if (status.st_size, status.st_mtime_ns) != tuple(stamp):
                found.append(f"{path}: another file than the driver sees")
            elif not os.access(path, os.R_OK):
                found.append(f"{path}: not readable")
        return found

    return problems
