"""Time what takes microseconds, or half a minute."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from isomerge_fast.bench.ceilings import median_seconds, timed

ROUNDS = 10

Result = TypeVar("Result")


def result_and_seconds(call: Callable[[], Result], device: torch.device, budget_seconds: float) -> tuple[Result, float]:
    """Return what a call gives and its seconds: of this very call where it takes all the budget, else the median."""
    result, seconds = timed(call, device)
    if seconds < budget_seconds:
        seconds = median_seconds(call, device, budget_seconds=budget_seconds, rounds=ROUNDS)
    return result, seconds
