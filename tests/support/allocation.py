"""Peak of what torch allocates inside a call, LAPACK's work arrays included; unlike RSS, exact and repeatable."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def peak_bytes(function: Callable[[], Result]) -> tuple[int, Result]:
    """(largest number of bytes allocated at once beyond what was allocated before, the function's result)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # type: ignore[attr-defined]  # missing from the stubs of torch 2.13
        peak = max(peak, live)
    return peak, result
