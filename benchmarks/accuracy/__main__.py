"""Measure how good merged networks are on real tasks, over seeds, numbers of tasks and strengths of the base.

    python -m benchmarks.accuracy [--seeds 5] [--quick] [--processes 2] [--common-fraction F …]
                                  [--out benchmarks/results/accuracy.json]

The demo's residual network on 8 and on 16 views of handwritten digits, and a small vision transformer on 8, each from
bases of three strengths; all trained here, on the CPU. Per setting and method: test accuracy, accuracy as a share of
the experts', and the paper's two measures of a merge, subspace alignment and accuracy improvement, and how they
correlate (``alignment``). α is chosen by validation accuracy alone; the test digits are looked at once per
row, after that.

A table is printed, JSON and a picture beside it are written anew, after every setting: a run that is cut short leaves
what it had. --quick is one seed, one strength and short training, to see that everything runs: its figures mean little.
--common-fraction adds rows of Iso-CTS with other fractions than the paper's 0.8; correlations and picture ignore them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.settings import full_settings, quick_settings
from benchmarks.accuracy.study import run_study

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="5 when left out, 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="one strength, short training: under a minute")
    parser.add_argument("--common-fraction", type=float, nargs="*", default=[], help="more rows of Iso-CTS")
    parser.add_argument("--processes", type=int, default=2, help="seeds trained at once, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy.json")
    options = parser.parse_args(given)
    n_seeds = options.seeds if options.seeds is not None else 1 if options.quick else 5
    if n_seeds < 1 or options.processes < 1:
        parser.error("--seeds and --processes are 1 or more")
    settings = quick_settings() if options.quick else full_settings()
    started = time.perf_counter()
    command = shlex.join(["python", "-m", "benchmarks.accuracy", *given])
    run_study(
        settings,
        range(n_seeds),
        options.out,
        common_fractions=options.common_fraction,
        command=command,
        processes=options.processes,
    )
    print("Accuracy: mean over the tasks, ± standard deviation over seeds. Normalised: share of the expert's accuracy.")
    print("α is chosen on validation digits, one a seed; the mean is the plain average, α = 1.")
    print("SAR: subspace alignment ratio; chance: that of random updates; k/r: share of directions its basis keeps.")
    print("NAI: share of the experts' gain over the base.")
    print(f"{time.perf_counter() - started:.0f} s. {options.out}, {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
