"""Measure how good merged networks are on real tasks, over seeds, numbers of tasks and strengths of the base.

    python -m benchmarks.accuracy [--seeds 5] [--quick] [--processes 2] [--common-fraction F …]
                                  [--out benchmarks/results/accuracy.json]

docs/accuracy.md says what is trained, compared and measured. A table is printed, JSON and a picture beside it are
written anew, after every setting: a run that is cut short leaves what it had. The figures of --quick mean little.
Correlations and picture ignore the rows of --common-fraction.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from benchmarks.accuracy.settings import full_settings, quick_settings
from benchmarks.accuracy.study import run_study

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="5 when left out, 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="one strength, short training: under a minute")
    fractions = "rows of Iso-CTS with other fractions than the paper's 0.8"
    parser.add_argument("--common-fraction", type=float, nargs="*", default=[], help=fractions)
    parser.add_argument("--processes", type=int, default=2, help="seeds trained at once, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy.json")
    options = parser.parse_args()
    n_seeds = options.seeds if options.seeds is not None else 1 if options.quick else 5
    if n_seeds < 1 or options.processes < 1:
        parser.error("--seeds and --processes are 1 or more")
    started = time.perf_counter()
    run_study(
        quick_settings() if options.quick else full_settings(),
        range(n_seeds),
        options.out,
        common_fractions=options.common_fraction,
        command=shlex.join(["python", "-m", "benchmarks.accuracy", *sys.argv[1:]]),
        processes=options.processes,
    )
    print("Accuracy: mean over the tasks, ± standard deviation over seeds. Normalised: share of the expert's accuracy.")
    print("α is chosen on validation digits, one a seed; the mean is the plain average, α = 1.")
    print("SAR: subspace alignment ratio; chance: that of random updates; k/r: share of directions its basis keeps.")
    print("NAI: share of the experts' gain over the base.")
    print(f"{time.perf_counter() - started:.0f} s. {options.out}, {options.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
