"""Before torch and Triton are loaded: how threads wait, whether kernels are interpreted, where `benchmarks` is."""

import importlib.util
import os
import sys
from pathlib import Path

# Waiting threads give way soon, as under the command line (see ``cli.main``).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
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
