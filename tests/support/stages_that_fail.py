"""Stages for tests/test_gpu_suite.py: what may become of the processes that ``make gpu`` runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def works(rows: Any) -> None:
    rows.note("first", value=rows.share)
    rows.attempt("wrong", lambda: 1 // 0) if rows.shares == 2 else None


def aborts(rows: Any) -> None:
    rows.note("before", value=1)
    print("why it aborts", flush=True)
    os.abort()


def hangs(rows: Any) -> None:
    rows.note("before", pid=os.getpid())
    time.sleep(60)


def leaves_a_process(rows: Any) -> None:
    """The process holds the standard output and input of its parent, which ends before it."""
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    rows.note("left", pid=left.pid)


def waits_for_a_file(rows: Any) -> None:
    """It and a process of its own, until they are killed."""
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(os.environ["ISOMERGE_TEST_FILE"]).write_text(f"{os.getpid()} {left.pid}")
    rows.note("waiting")
    time.sleep(60)
