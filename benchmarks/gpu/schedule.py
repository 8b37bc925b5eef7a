"""List what is measured, in which order, and how long each part of it may take at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Name a function that makes rows, and what it may take."""

    name: str
    function: str  # ``module:function``, called with a ``readings.Rows``
    seconds: float  # after which its processes are killed
    processes: int = 1  # run at once, of which each takes its share


CALL_SECONDS = {"a": 420.0, "b": 200.0}
# Asked for before anything else, and before the call's time begins: what is loaded for the first time comes slowly.
DEVICE = Stage("device", "benchmarks.gpu.environment:device", 90)
CALLS: dict[str, tuple[Stage, ...]] = {
    "a": (
        Stage("environment", "benchmarks.gpu.environment:environment", 15),
        # The last process has the checks of far-apart rows for itself: they are the likeliest to end it.
        Stage("kernels", "benchmarks.gpu.right:kernels", 50, processes=13),
        Stage("right", "benchmarks.gpu.right:solvers_and_methods", 50),
        Stage("ceilings", "benchmarks.gpu.rates:ceilings", 15),
        Stage("primitives", "benchmarks.gpu.primitives:primitives", 45),
        Stage("methods", "benchmarks.gpu.methods:methods", 85),
        Stage("bandwidths", "benchmarks.gpu.rates:bandwidths", 30),
        Stage("products", "benchmarks.gpu.rates:products", 40),
        Stage("published", "benchmarks.gpu.baselines:baselines", 90),
    ),
    "b": (
        Stage("merge", "benchmarks.gpu.merge:streamed_merge", 90),
        Stage("threads", "benchmarks.gpu.methods:cpu_threads", 25),
        Stage("memcheck", "benchmarks.gpu.right:memcheck", 85),
    ),
}
STAGES = tuple(stage.name for stages in CALLS.values() for stage in stages)
