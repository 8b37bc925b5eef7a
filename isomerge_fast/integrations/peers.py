"""Refuse releases of other packages that these modules were not written for, before anything is done."""

from __future__ import annotations

import re
from importlib import metadata

from ..errors import MissingPackageError

# Exact where what is inside is relied on: mergekit's extension API changed from 0.1.4 to 0.1.5. The extras of setup.py
# say the same.
MERGEKIT, FUSION_BENCH = "0.1.5", "0.2.33"
# The first release with ``ray symmetric-run``, by which a scheduler's job starts a cluster.
RAY = "2.49"


def require(package: str, version: str, extra: str, *, or_newer: bool = False) -> None:
    """Raise MissingPackageError where ``package`` is absent or of another version, or older than ``version``."""
    install = f"pip install {'-U ' if or_newer else ''}'isomerge-fast[{extra}]'"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise MissingPackageError(f"{package} is not installed: {install}") from None
    if or_newer and _numbers(found) < _numbers(version):
        raise MissingPackageError(f"{package} {found} is installed; this needs {version} or newer: {install}")
    if not or_newer and found != version:
        raise MissingPackageError(f"{package} {found} is installed; this works with {version} only: {install}")


def _numbers(version: str) -> list[int]:
    """Return the numbers that a version begins with: 0.21.2rc1 -> [0, 21, 2]."""
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in match[0].split(".")] if match else []


def is_ray_address(text: str) -> bool:
    """Return whether a text is ``host:port`` of a cluster's head, ``auto``, or ``local``."""
    return re.fullmatch(r"auto|local|(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):\d{1,5}", text) is not None
