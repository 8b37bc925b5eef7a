"""One process of a stage: ``python -m benchmarks.gpu.child NAME MODULE:FUNCTION …``, started by ``runner``."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import threading
from pathlib import Path

from benchmarks.harness.readings import Rows


def end_with_parent() -> None:
    """Kill this session when standard input ends, as it does when the process that holds its other end is gone."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("function")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--share", type=int, default=0)
    parser.add_argument("--shares", type=int, default=1)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    threading.Thread(target=end_with_parent, daemon=True).start()
    module, _, function = options.function.partition(":")
    circumstances = {key: getattr(options, key) for key in ("device", "small", "seconds", "share", "shares")}
    rows = Rows(options.name, options.file, **circumstances)  # first: its seconds are the process's, imports included
    getattr(importlib.import_module(module), function)(rows)


if __name__ == "__main__":
    main()
