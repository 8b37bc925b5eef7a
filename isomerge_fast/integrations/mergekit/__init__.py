"""Register Iso-C and Iso-CTS in mergekit, and run mergekit's own command line with them registered.

mergekit is imported inside functions here, so that its absence or another release is a message and not a traceback.
What is built on its classes is in ``methods``.
"""

from __future__ import annotations

import os
import sys

from ...errors import IsomergeError
from ..peers import MERGEKIT, require


def register_all() -> None:
    """Add ``iso_c`` and ``iso_cts`` to mergekit's registry; a second call changes nothing.

    It raises MissingPackageError where mergekit is absent, or another release than the one this was written for, and
    ValueError where somebody else has registered one of these names.
    """
    require("mergekit", MERGEKIT, "mergekit")
    from mergekit.merge_methods import register, registered_methods

    from .methods import METHODS

    for method in METHODS:
        if not any(known is method for known in registered_methods()):
            register(method)


def main() -> None:
    """Run ``isomerge-mergekit-yaml``: ``mergekit-yaml`` with the same arguments and two more methods."""
    # Before torch is loaded, as under ``isomerge``: see ``cli.main``.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        register_all()
        from mergekit.scripts.run_yaml import main as mergekit_yaml

        mergekit_yaml()
    except IsomergeError as error:
        print(f"isomerge-mergekit-yaml: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
