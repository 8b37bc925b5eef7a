"""Find out how many CPUs and how much memory this process may use: a container is often allowed less than there is.

What is missing, unreadable or not understood limits nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def usable_cpus(root: Path = _ROOT) -> int:
    """Return how many threads can compute at once: the lesser of affinity and CPU quota.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    return _cpus(root)[0]


def describe_cpus(root: Path = _ROOT) -> str:
    """Return ``usable_cpus`` and what bounds them, in words: ``1 (CPU quota of the control group: 1.5)``.

    Where ``OMP_NUM_THREADS``, which torch goes by, asks for less, that is told of.
    """
    count, why = _cpus(root)
    asked = re.match(r"\s*(\d+)\s*(,|$)", os.environ.get("OMP_NUM_THREADS", ""), re.ASCII)
    if asked and 0 < int(asked[1]) < count:
        count, why = int(asked[1]), "OMP_NUM_THREADS"
    return f"{count} ({why})"


def memory_bytes(root: Path = _ROOT) -> int:
    """Return the bytes of memory that this process may fill: the machine's, or a lower limit of its control group.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    return min([_physical_bytes(), *_limits_of_memory(root)])


def describe_memory(root: Path = _ROOT) -> str:
    """Return ``memory_bytes`` in words, with the machine's memory where a control group has less."""
    usable, physical = memory_bytes(root), _physical_bytes()
    of = f" (limit of the control group; the machine has {_gib(physical)})" if usable < physical else ""
    return _gib(usable) + of


def cpu_maker(root: Path = _ROOT) -> str:
    """Return what the CPU calls its maker, ``AuthenticAMD`` for one; empty where the system does not tell."""
    lines = (line.partition(":") for line in _lines(root / "proc/cpuinfo"))
    return next((value.strip() for key, _, value in lines if key.strip() == "vendor_id"), "")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _cpus(root: Path) -> tuple[int, str]:
    there = os.cpu_count() or 1
    count, why = there, "all that there are"
    if hasattr(os, "sched_getaffinity") and (allowed := len(os.sched_getaffinity(0))) < there:
        count, why = allowed, "affinity"
    quota = min(_quotas(root), default=float("inf"))
    # Rounded down, so that computing alone never uses up the quota: all threads of a group that has stand still until
    # the period ends, up to 0.1 s, those too that read and write files beside the computing ones.
    if quota < count:
        count, why = max(1, int(quota)), f"CPU quota of the control group: {quota:g}"
    return count, why


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quotas, in CPUs, of this process's control groups and of all groups around them."""
    for folder in _groups(root, "cpu"):
        pairs = [
            _words(folder / "cpu.max"),
            _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"),
        ]
        for pair in pairs:
            match [_number(word) for word in pair]:
                case [int(quota), int(period)]:
                    yield quota / period


def _limits_of_memory(root: Path) -> Iterator[int]:
    """Yield the limits, in bytes, of this process's control groups and of all groups around them."""
    for folder in _groups(root, "memory"):
        for file in ("memory.max", "memory.limit_in_bytes"):
            match [_number(word) for word in _words(folder / file)]:
                case [int(limit)]:
                    yield limit


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, of version 2 and of a version 1 ``controller``.

    Each is followed by those around it, up to where its hierarchy is mounted: the tightest limit counts.
    """
    paths: dict[str, str] = {}  # of this process's group, by controller; version 2 has no name
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/"):
            paths |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        match before.split(" "), after.split(" "):
            # Version 1 mounts each controller by itself; where it is another one, no file has the name looked for.
            case [_, _, _, top, point, *_], ["cgroup" | "cgroup2" as kind, *_]:
                if path := paths.get(controller if kind == "cgroup" else ""):
                    yield from _upwards(root / _unescaped(point).lstrip("/"), _unescaped(top), path)


def _upwards(mount: Path, top: str, path: str) -> Iterator[Path]:
    """Yield the folder of the group at ``path`` of a hierarchy whose group ``top`` is at ``mount``, and those around.

    A container may see a path that is not below ``top``; what is mounted is its own group then.
    """
    below, above = path.strip("/").split("/"), top.strip("/").split("/")
    if above != [""]:
        below = below[len(above) :] if below[: len(above)] == above else []
    if ".." in below:  # a group outside of what this process sees
        below = []
    for length in range(len(below), -1, -1):
        yield mount.joinpath(*below[:length])


def _unescaped(text: str) -> str:
    """Return a path of ``mountinfo``, where a space is written ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)


def _number(word: str) -> int | None:
    """Return a positive whole number, and None for all else: ``max`` and ``-1`` mean that there is no limit."""
    return int(word) if re.fullmatch("[0-9]{1,30}", word) and int(word) else None


def _words(path: Path) -> list[str]:
    return [word for line in _lines(path)[:1] for word in line.split()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError:
        return []
