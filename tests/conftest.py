"""Before torch and Triton are loaded: how threads wait, whether kernels are interpreted, where `benchmarks` is."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Threads that wait sleep, here and in every process that a test starts: Iso-C with two threads beside other processes
# took 19 s of processor time so, and 95 s with the command line's own spin count.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# One thread: matrices are small, and `make test` has a process on every core. Threads that share a core wait for each
# other at the end of every product: 143 cases of test_methods.py took 3.7 s of processor time with one, 75 s with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU Triton's kernels are interpreted, which it decides when they are defined.
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `benchmarks` is not installed. By its own place and not by way of sys.path: with the checkout on that, there would be
# a namespace package named `kernels`, for which transformers looks.
_BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
_spec = importlib.util.spec_from_file_location(
    "benchmarks", _BENCHMARKS / "__init__.py", submodule_search_locations=[str(_BENCHMARKS)]
)
assert _spec is not None
sys.modules["benchmarks"] = importlib.util.module_from_spec(_spec)

# What takes longest, first: with `--dist loadfile --no-loadscope-reorder` (make test) a worker takes the next file when
# it is done, and what comes last decides how long one waits for the other. Seconds of processor time, roughly.
LONGEST = {
    "test_numerics.py": 150,
    "test_compile.py": 130,
    "test_memory.py": 95,
    "test_faults.py": 85,
    "test_kernels.py": 70,
    "test_pretend_gpu.py": 54,
    "test_minilm.py": 53,
    "test_gpu_suite.py": 33,
    "test_doors.py": 32,
    "test_models.py": 32,
    "test_solvers.py": 28,
    "test_rowwise.py": 25,
    "test_methods.py": 21,
    "test_benchmarks.py": 20,
    "test_scale.py": 19,
    "test_cost.py": 18,
    "test_accuracy.py": 17,
    "test_streaming.py": 15,
    "test_cli.py": 13,
    "test_randomized.py": 13,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first; the others stay in their order, and so do the tests of a file."""
    items.sort(key=lambda item: -LONGEST.get(item.path.name, 0))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Merge with two threads at least, as on any machine with two cores: one cannot get in its own way."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)
