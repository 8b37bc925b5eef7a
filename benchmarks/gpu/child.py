"""Run one process of a stage: ``python -m benchmarks.gpu.child MODULE:FUNCTION FILE SETTINGS``, as ``runner`` does."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

from benchmarks.harness.readings import Rows


def end_with_parent() -> None:
    """Kill this session when standard input ends, as it does when the process that holds its other end is gone."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run the function that the command line names, with what JSON says of its ``Rows``."""
    function, file, settings = sys.argv[1:]
    threading.Thread(target=end_with_parent, daemon=True).start()
    rows = Rows(file=Path(file), **json.loads(settings))  # first: its seconds are the process's, imports included
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(rows)


if __name__ == "__main__":
    main()
