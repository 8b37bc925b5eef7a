"""Which releases of the peers these modules were written for; another one is refused before anything is done."""

from __future__ import annotations

import re
from importlib import metadata

from ..errors import MissingPackageError

# Exact where what is inside is relied on: mergekit's extension API changed from 0.1.4 to 0.1.5. The extras of setup.py
# say the same.
MERGEKIT, FUSION_BENCH = "0.1.5", "0.2.33"
# The first release with ``ray symmetric-run``, by which a scheduler's job starts a cluster.
RAY = "2.49"


def require(package: str, version: str, extra: str) -> None:
    """Raises MissingPackageError where ``package`` is absent or of another version."""
    install = f"pip install 'isomerge-fast[{extra}]'"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise MissingPackageError(f"{package} is not installed: {install}") from None
    if found != version:
        raise MissingPackageError(f"{package} {found} is installed; this works with {version} only: {install}")


def require_at_least(package: str, version: str, extra: str) -> None:
    """Raises MissingPackageError where ``package`` is absent or older."""
    install = f"pip install -U 'isomerge-fast[{extra}]'"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise MissingPackageError(f"{package} is not installed: {install}") from None
    if _numbers(found) < _numbers(version):
        raise MissingPackageError(f"{package} {found} is installed; this needs {version} or newer: {install}")


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of each part: 0.21.2 -> (0, 21, 2)."""
    parts = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def is_ray_address(text: str) -> bool:
    """``host:port`` of a cluster's head, ``auto``, or ``local``."""
    return re.fullmatch(r"auto|local|(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):\d{1,5}", text) is not None
