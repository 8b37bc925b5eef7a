"""All benchmarks in one command: several passes, a table, a result file, pictures.

    python -m benchmarks.run [--level short] [--passes 3] [--device cpu] [--only methods,polar] [--out FILE]

Each pass is a process of its own (``pytest benchmarks --benchmark-json``) that measures every contender of every row,
those of a row right after each other. A ratio is the median over the passes of (seconds of the baseline / seconds of
ours); its spread is what another run on the same machine stays within (``results.Results.ratio``).

    python -m benchmarks.run --table FILE                         the tables of a result file once more
    python -m benchmarks.run --table FILE --write README.md …     into these files, between their marks; and pictures
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness.pictures import draw
from benchmarks.harness.results import Results, gather, machine_label
from benchmarks.harness.rows import LEVELS
from benchmarks.harness.scratch import VARIABLE
from benchmarks.harness.table import markdown, print_results, summary

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKS = {
    ("<!-- benchmark tables -->", "<!-- end of benchmark tables -->"): markdown,
    ("<!-- benchmark summary -->", "<!-- end of benchmark summary -->"): summary,
}


def one_pass(
    number: int, file: Path, *, level: str, device: str, only: str | None, plugins: list[str]
) -> tuple[int, list[str]]:
    """(exit code, reasons why something was skipped) of one process over all rows; ``file``'s folder is shared by all
    passes.
    """
    names = only.split(",") if only else ["kernels", "polar", "subspace", "methods", "merge", "io"]
    files = [str(ROOT / "benchmarks" / f"bench_{name}.py") for name in names]
    command = [str(Path(sys.executable).parent / "pytest"), *files, "--rootdir", str(ROOT), "-q", "-rs"]
    command += ["--level", level, "--device", device, f"--benchmark-json={file}", "--benchmark-quiet"]
    command += ["--later-pass"] if number else []
    for plugin in plugins:
        command += ["-p", plugin]
    environment = {VARIABLE: str(file.parent), **os.environ}
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if outcome.returncode:
        print(outcome.stdout[-6000:], outcome.stderr[-2000:], sep="\n", file=sys.stderr)
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", outcome.stdout, flags=re.MULTILINE)
    return outcome.returncode, sorted(set(reasons))


def run(
    *, level: str, passes: int, device: str, minutes: float, only: str | None = None, plugins: list[str] | None = None
) -> Results:
    """All passes that fit into ``minutes``, the first in any case.

    Raises:
        RuntimeError: a pass failed, because a result was not as exact as it must be, or for another reason; what pytest
            said is on standard error.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="isomerge-bench-") as folder:
        files, skipped = [], []
        took = 0.0
        for number in range(passes):
            elapsed = time.monotonic() - started
            # The first pass also makes the inputs, judges, and has the rows that are measured once.
            if elapsed + (0.6 if number == 1 else 1.0) * took > 60 * minutes:
                print(f"{number} of {passes} passes: another would take more than {minutes:g} minutes", flush=True)
                break
            file = Path(folder) / f"pass-{number}.json"
            options = {"level": level, "device": device, "only": only, "plugins": plugins or []}
            code, reasons = one_pass(number, file, **options)
            if code:
                raise RuntimeError(f"pass {number + 1} failed (pytest exited with {code})")
            files.append(file)
            skipped = skipped or reasons
            count = len(json.loads(file.read_text())["benchmarks"])
            took = time.monotonic() - started - elapsed
            print(f"pass {number + 1} of {passes}: {count} measured, {took:.0f} s", flush=True)
        return gather(files, level=level, seconds=time.monotonic() - started, skipped=skipped)


def write_tables(path: Path, results: Results) -> None:
    """All tables, and the summary, into a Markdown file, each between its marks where it has them.

    Raises:
        ValueError: it has neither.
    """
    text, found = path.read_text(), False
    for (begin, end), make in MARKS.items():
        if begin in text:
            start = text.index(begin) + len(begin)
            text, found = f"{text[:start]}\n{make(results)}\n{text[text.index(end) :]}", True
    if not found:
        raise ValueError(f"{path}: has no marks such as {next(iter(MARKS))[0]}")
    path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=LEVELS, default="short")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=9.8, help="no pass is begun that would not end by then")
    parser.add_argument("--only", help="suites, by comma: kernels, polar, subspace, methods, merge, io")
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
    try:
        results = run(
            level=options.level,
            passes=options.passes,
            device=options.device,
            minutes=options.minutes,
            only=options.only,
        )
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
