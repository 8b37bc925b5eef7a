"""Before torch and Triton are loaded: how their threads wait, and whether kernels are interpreted."""

import os

# Waiting threads give way soon, as under the command line (see ``cli.main``).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Without a GPU Triton's kernels are interpreted, which it decides when they are defined.
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
