"""A stage for tests/test_gpu_suite.py whose module takes its time."""

import time
from typing import Any

SECONDS = 0.5
time.sleep(SECONDS)


def tells(rows: Any) -> None:
    rows.note("left", seconds=rows.seconds_left)
