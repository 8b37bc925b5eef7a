"""Run all benchmarks: several passes, a table, a result file, pictures.

    python -m benchmarks.run [--level short] [--passes 3] [--device cpu] [--only methods,polar] [--out FILE]

    python -m benchmarks.run --table FILE                         the tables of a result file once more
    python -m benchmarks.run --table FILE --write README.md …     into these files, between their marks; and pictures

Each pass is a process of its own (``pytest benchmarks``); docs/benchmarks.md, "How it is measured".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.markdown import write_between
from benchmarks.harness.pictures import draw
from benchmarks.harness.results import Results, gather, machine_label
from benchmarks.harness.rows import LEVELS, SCRATCH_VARIABLE, SUITES
from benchmarks.harness.table import markdown, print_results, summary

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKS = {
    ("<!-- benchmark tables -->", "<!-- end of benchmark tables -->"): markdown,
    ("<!-- benchmark summary -->", "<!-- end of benchmark summary -->"): summary,
}


def run(
    *, level: str, passes: int, device: str, minutes: float, only: str | None = None, plugins: Sequence[str] = ()
) -> Results:
    """Return the results of all passes that fit into ``minutes``, the first in any case.

    Where a pass fails, as for a result that is not as exact as it must be, what it said goes to standard error, and
    RuntimeError is raised.
    """
    started = time.monotonic()
    # The script and not ``python -m pytest``, which would put the checkout on sys.path, and with it a namespace package
    # named ``kernels``.
    command = [str(Path(sys.executable).parent / "pytest"), str(ROOT / "benchmarks"), "--rootdir", str(ROOT), "-q"]
    command += ["--benchmark-quiet", "--level", level, "--device", device, "--suites", only or SUITES]
    command += [word for plugin in plugins for word in ("-p", plugin)]
    with tempfile.TemporaryDirectory(prefix="isomerge-bench-") as folder:
        environment = {SCRATCH_VARIABLE: folder, **os.environ}
        files, took = [], 0.0
        for number in range(passes):
            elapsed = time.monotonic() - started
            # The first pass also makes the inputs, judges, and has the rows that are measured once.
            if elapsed + (0.6 if number == 1 else 1.0) * took > 60 * minutes:
                print(f"{number} of {passes} passes: another would take more than {minutes:g} minutes", flush=True)
                break
            files.append(Path(folder) / f"pass-{number}.json")
            words = ["--benchmark-json", str(files[-1]), *(["--later-pass"] if number else [])]
            outcome = subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
            if outcome.returncode:
                print(outcome.stdout[-6000:], outcome.stderr[-2000:], sep="\n", file=sys.stderr)
                raise RuntimeError(f"pass {number + 1} failed (exit code {outcome.returncode})")
            took = time.monotonic() - started - elapsed
            count = len(json.loads(files[-1].read_text())["benchmarks"])
            print(f"pass {number + 1} of {passes}: {count} measured, {took:.0f} s", flush=True)
        return gather(files, level=level, seconds=time.monotonic() - started)


def write_tables(path: Path, results: Results) -> None:
    """Write all tables, and the summary, into a Markdown file, each between its marks where it has them.

    Raises:
        ValueError: it has neither.
    """
    text = path.read_text(encoding="utf-8")
    found = [marks for marks in MARKS if marks[0] in text] or list(MARKS)[:1]
    for marks in found:
        write_between(path, marks, MARKS[marks](results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=LEVELS, default="short")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=9.8, help="no pass is begun that would not end by then")
    parser.add_argument("--only", help=f"suites, by comma: {SUITES.replace(',', ', ')}")
    parser.add_argument("--out", type=Path, help="benchmarks/results/<machine>.json when left out")
    parser.add_argument("--table", type=Path, help="print a result file; nothing is measured")
    parser.add_argument(
        "--write", type=Path, nargs="*", default=[], help="with --table: files with marks; and pictures"
    )
    options = parser.parse_args()
    if options.table:
        results = Results.load(options.table)
        print_results(results)
        for path in options.write:
            write_tables(path, results)
        if options.write:
            draw(results, options.table.parent, options.table.stem)
        return 0
    settings = {key: getattr(options, key) for key in ("level", "passes", "device", "minutes", "only")}
    try:
        results = run(**settings)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    out = options.out or RESULTS / f"{machine_label(results.machine)}.json"
    results.save(out)
    print_results(results)
    for path in (out, *draw(results, out.parent, out.stem)):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
