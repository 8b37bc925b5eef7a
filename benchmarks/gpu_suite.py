"""Everything that only a GPU can prove, in one command and under eight minutes:

    python -m benchmarks.gpu_suite [--minutes 8] [--out benchmarks/results/<device>.json]

In this order: the environment; a smoke test of every kernel; every kernel, solver and method against float64; what this
device can do at most; the kernels as shares of that, in every configuration they are compiled in; solvers and methods
against plain ``torch.linalg.svd`` code on shapes of Llama-3-8B and of vision transformers; a streamed merge of a
multi-billion-parameter model from memory-backed files under a ceiling for GPU memory.

Needs torch, Triton, numpy and safetensors, for the streamed merge xxhash too, and nothing installed: it runs from a
checkout. A line is printed, and the file written anew, after every row: a run that is cut short leaves what it had.
Rows that no time is left for are listed as skipped. Exit code 1 where a row failed.

``--small`` goes through all of it in small sizes, on a CPU too (kernels interpreted); its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help="benchmarks/results/<device>.json when left out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", help="stages by name")
    parser.add_argument("--small", action="store_true", help="small sizes, to see that everything runs")
    options = parser.parse_args()
    if not options.device.startswith("cuda"):
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]  # a checkout, nothing installed

    import torch

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure (--device cpu --small is a dry run)", file=sys.stderr)
        return 2

    from benchmarks.gpu_stages import STAGES
    from benchmarks.suite import Suite
    from isomerge_fast.bench.ceilings import device_name

    default = ROOT / "benchmarks" / "results" / f"{device_name(device)}.json"
    suite = Suite(options.out or default, options.minutes, device, small=options.small)
    for stage in STAGES:
        if options.only and stage.__name__ not in options.only:
            continue
        try:
            stage(suite)
        except Exception as error:  # outside of a row: the stages after it still have their turn
            suite.note(stage.__name__, "stage", failed=f"{type(error).__name__}: {error}"[:500])
    failed = sum("failed" in row for row in suite.rows)
    skipped = sum("skipped" in row for row in suite.rows)
    print(f"{len(suite.rows)} rows, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
