"""What to expect of a merge by 1 to 256 workers: planned from headers, divided, and simulated. Nothing is measured.

python -m benchmarks.simulate_cluster [--model llama-3-70b …] [--tasks 8] [--method iso-c] [--workers 1,2,4]
                                      [--flops 1e13] [--worker-rate 2e9] [--storage 1e10 …]
python -m benchmarks.simulate_cluster --write docs/scaling.md     and into this file, between its marks
"""

from __future__ import annotations

import argparse
import math
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.headers import config_of
from benchmarks.shapes import MODELS
from isomerge_fast.planning.cost import Rates, TensorCost, cost_of
from isomerge_fast.planning.forecast import Forecast, forecast, item_costs
from isomerge_fast.planning.plan import Plan
from isomerge_fast.planning.planner import make_plan

DOCUMENTED = ("llama-3-70b", "glm-4.5")
TASKS, METHOD = 8, "iso-c"
RATES = Rates(1e13, 2e9, 2e9)
# The memory of a worker, which decides what is held and what is read again.
MAX_RAM = 64 << 30
STORAGES = (1e10, 4e10)
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MARKS = ("<!-- simulation -->", "<!-- /simulation -->")


def plan_of_headers(model: str, tasks: int, method: str) -> Plan:
    """Of a merge of checkpoints that have no data; they are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return make_plan(config_of(Path(folder), MODELS[model](), tasks, method=method, out=None), max_ram=MAX_RAM)


def assumptions(rates: Rates = RATES, tasks: int = TASKS, method: str = METHOD) -> str:
    """The head of the page."""
    return _wrapped(
        f"{tasks} experts, {method}, bf16. Assumed, not measured: a worker computes {rates.flops_per_second / 1e12:g} "
        f"TFLOP/s in {MAX_RAM >> 30} GiB and reads or writes {_size(rates.read_bytes_per_second)}/s; starting it "
        "takes no time."
    )


def section(
    model: str,
    plan: Plan,
    *,
    rates: Rates = RATES,
    storages: Sequence[float] = STORAGES,
    workers: Sequence[int] = WORKERS,
) -> str:
    """A model in words and two tables: storage that is not the wall, and storage that may be."""
    alone = item_costs(plan, 1, rates)
    rows = []
    for count in workers:
        units = item_costs(plan, count, rates)
        limits = (math.inf, *storages)
        limited = [replace(rates, storage_bytes_per_second=limit) for limit in limits]
        rows.append([forecast(units, count, each, alone=alone) for each in limited])
    words = _wrapped(f"**{model}.** {_in_words(plan, rates, storages)}")
    parts = [words, _table(_FREE, [_free(row[0]) for row in rows])]
    if storages:
        names = [f"{_size(limit)}/s: seconds | speed-up | wall" for limit in storages]
        cells = [[str(row[0].workers), *(cell for found in row[1:] for cell in _shared(found))] for row in rows]
        parts.append(_table(" | ".join(["workers", *names]), cells))
    return "\n\n".join(parts)


_FREE = "workers | units | seconds | speed-up | efficiency | wall"


def _free(found: Forecast) -> list[str]:
    figures = [f"{found.seconds:.4g}", f"{found.speedup:.3g}", f"{found.speedup / found.workers:.0%}"]
    return [str(found.workers), str(found.units), *figures, found.wall]


def _shared(found: Forecast) -> list[str]:
    return [f"{found.seconds:.4g}", f"{found.speedup:.3g}", found.wall]


def _table(head: str, rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([f"| {head} |", "|---" * (head.count("|") + 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def _in_words(plan: Plan, rates: Rates, storages: Sequence[float]) -> str:
    """The sums, and from how many workers on which wall is reached: total / wall, as ``forecast`` bounds it."""
    total = cost_of(plan.tensors)
    moved = total.read_bytes + total.write_bytes
    each = {tensor.name: cost_of([tensor]).seconds(rates) for tensor in plan.tensors}
    largest = max(each, key=each.__getitem__)
    parameters = sum(math.prod(tensor.base.shape) for tensor in plan.tensors)
    walls = [f"storage of {_size(limit)}/s (Σ b / S = {moved / limit:.4g} s)" for limit in storages]
    counts = [_reached(total, rates, moved / limit) for limit in storages]
    reached = [f"{wall} from {count} workers on" for wall, count in zip(walls, counts, strict=True)]
    reached.append(
        f"the largest tensor, `{largest}` ({each[largest]:.3g} s), from {_reached(total, rates, each[largest])} on"
    )
    return (
        f"{parameters / 1e9:.2f} billion parameters in {len(plan.tensors):,} tensors; {_size(moved)} to be moved. "
        f"One worker computes for {total.compute_seconds(rates):.4g} s and moves bytes for "
        f"{total.transfer_seconds(rates):.4g} s. The wall is {'; '.join(reached)}."
    )


def _reached(total: TensorCost, rates: Rates, wall_seconds: float) -> int:
    """The least number of workers who would be done sooner than a wall lets them, were the work divided evenly."""
    return math.floor(total.seconds(rates) / wall_seconds) + 1


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _size(count: float) -> str:
    return f"{count / 1e12:.3g} TB" if count >= 1e12 else f"{count / 1e9:.3g} GB"


def page(sections: Sequence[str], head: str) -> str:
    """What stands between the marks."""
    return "\n\n".join([head, *sections])


def write(path: Path, text: str) -> None:
    """Into a Markdown file, between its marks."""
    begin, end = MARKS
    old = path.read_text(encoding="utf-8")
    start = old.index(begin) + len(begin)
    path.write_text(f"{old[:start]}\n{text}\n{old[old.index(end) :]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=DOCUMENTED)
    parser.add_argument("--tasks", type=int, default=TASKS, help="experts")
    parser.add_argument("--method", default=METHOD)
    parser.add_argument("--flops", type=float, default=RATES.flops_per_second, help="operations a second of a worker")
    parser.add_argument(
        "--worker-rate", type=float, default=RATES.read_bytes_per_second, help="bytes a second that one reads or writes"
    )
    parser.add_argument("--storage", type=float, nargs="*", default=STORAGES, help="bytes a second of all together")
    parser.add_argument("--workers", type=lambda text: [int(part) for part in text.split(",")], default=WORKERS)
    parser.add_argument("--write", type=Path, help="a page with marks")
    given = parser.parse_args()
    rates = Rates(given.flops, given.worker_rate, given.worker_rate)
    sections = [
        section(
            model,
            plan_of_headers(model, given.tasks, given.method),
            rates=rates,
            storages=given.storage,
            workers=given.workers,
        )
        for model in given.model
    ]
    text = page(sections, assumptions(rates, given.tasks, given.method))
    print(text)
    if given.write:
        write(given.write, text)


if __name__ == "__main__":
    main()
