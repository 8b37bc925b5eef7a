"""How results look to a person: tables and progress. No arithmetic here."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from ..checkpoint.layout import DTYPE_NAMES
from ..checkpoint.output.manifest import REPORT_FILE
from ..errors import visible
from ..execution.report import Observer, Progress, Report
from ..execution.verify import Verification
from ..planning.plan import Plan, TensorPlan

# Names a reason, of what is left behind.
LEFT_BEHIND_SHOWN = 20
# Wide enough for a line a tensor when the output goes to a file or a pipe.
_PIPE_WIDTH = 160


class _Console(Console):
    """Prints lines and tables of plain text: whatever stands in a name is shown, and neither markup nor obeyed."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


def console() -> Console:
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return _Console(width=width, soft_wrap=True, highlight=False, markup=False, emoji=False)


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return table


@contextmanager
def watched(*, enabled: bool) -> Iterator[Observer | None]:
    """An observer that draws a progress line on standard error, where a person watches; else None."""
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    columns = (
        TextColumn("{task.fields[phase]:<8}"),
        BarColumn(),
        TextColumn("{task.fields[tensors]} tensors, {task.fields[bytes]}, {task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task: TaskID | None = None

        def observer(progress: Progress) -> None:
            nonlocal task
            elapsed = sum(progress.seconds.values())
            fields: dict[str, Any] = {
                "phase": progress.phase or "start",
                "tensors": f"{progress.done_tensors}/{progress.total_tensors}",
                "bytes": f"{size(progress.done_bytes)}/{size(progress.total_bytes)}",
                "rate": f"{progress.done_bytes / max(elapsed, 1e-3) / 1e9:.2f} GB/s",
            }
            if task is None:
                task = bar.add_task("merge", total=progress.total_bytes, **fields)
            bar.update(task, completed=progress.done_bytes, **fields)

        yield observer


def group_tensors(tensors: tuple[TensorPlan, ...]) -> list[tuple[str, list[TensorPlan]]]:
    """Tensors that differ only in the numbers of their names, as one line: ``layers.{0..31}.mlp.up_proj.weight``."""
    groups: dict[tuple[Any, ...], list[TensorPlan]] = {}
    for plan in tensors:
        key = (
            re.sub(r"\d+", "#", plan.name),
            plan.base.shape,
            plan.base.dtype,
            plan.out_dtype,
            plan.action,
            plan.route.name,
            plan.reason,
        )
        groups.setdefault(key, []).append(plan)
    result = []
    for members in groups.values():
        numbers = [re.findall(r"\d+", plan.name) for plan in members]
        pieces = iter(zip(*numbers, strict=True))

        def spread(match: re.Match[str], pieces: Any = pieces) -> str:
            values = sorted({int(value) for value in next(pieces)})
            return match[0] if len(values) == 1 else f"{{{values[0]}..{values[-1]}}}"

        result.append((re.sub(r"\d+", spread, members[0].name), members))
    return result


def print_plan(plan: Plan, found: dict[str, Any]) -> None:
    """``found``: what was estimated beside it."""
    out = console()
    table = _table("tensor", ">count", "shape", "dtype", "becomes", "route", "why")
    for name, members in group_tensors(plan.tensors):
        first = members[0]
        dtypes = dict.fromkeys((first.base.dtype, first.out_dtype))
        table.add_row(
            name,
            str(len(members)),
            str(list(first.base.shape)),
            " → ".join(DTYPE_NAMES[dtype] for dtype in dtypes),
            first.action,
            first.route.name,
            first.reason,
        )
    out.print(table)
    out.print()
    parts = ", ".join(f"{key} ≈ {duration(value)}" for key, value in found["estimated_seconds"].items())
    out.print(
        f"{plan.config.method} of {len(plan.experts)} experts, "
        f"scaling {', '.join(f'{value:g}' for value in plan.config.scalings)}"
    )
    more = plan.passed_bytes - plan.read_bytes
    again = f" and {size(more)} in further passes" if more else ""
    out.print(
        f"read {size(plan.read_bytes)}{again}, write {size(plan.write_bytes)} "
        f"in {sum(map(len, plan.folders.values()))} file(s)"
    )
    held = f", {size(plan.metadata_bytes)} for names and places" if plan.metadata_bytes else ""
    out.print(
        f"peak memory ≈ {size(plan.peak_ram_bytes)} on a CPU: {size(plan.peak_work_bytes)} for the largest tensor, "
        f"{size(plan.budget.read_ahead)} for reading ahead{held}"
    )
    out.print(f"estimated on this CPU, bytes at 1 GB/s: {parts}")
    if "outlook" in found:
        _print_outlook(out, found["outlook"], found.get("cluster_workers"))
    _print_left_behind(out, [left.to_dict() for left in plan.left_behind])
    _print_notes(out, plan.notes)


def _print_left_behind(out: Console, left_behind: list[dict[str, Any]]) -> None:
    """A line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for left in left_behind:
        held = f"{left['files']} file(s), {size(left['bytes'])}" if left["name"].endswith("/") else size(left["bytes"])
        by_reason.setdefault(left["why"], []).append(f"{left['name']} ({held})")
    reasons = [*by_reason.items()]
    for why, names in reasons[:LEFT_BEHIND_SHOWN]:
        more = len(names) - LEFT_BEHIND_SHOWN
        rest = f" and {more} more" if more > 0 else ""
        out.print(f"left behind: {', '.join(names[:LEFT_BEHIND_SHOWN])}{rest}: {why}")
    if others := sum(len(names) for _, names in reasons[LEFT_BEHIND_SHOWN:]):
        out.print(f"left behind: {others} more, for other reasons")


def _print_outlook(out: Console, outlook: dict[str, Any], cluster_workers: int | None) -> None:
    """Predicted wall times over workers."""
    rates, rows = outlook["rates"], outlook["rows"]
    each, together = rates["read_bytes_per_second"], rates["storage_bytes_per_second"]
    storage = f"{size(together)}/s together" if together else "the storage has no limit"
    columns = [">workers", f">{storage}", ">speed-up", "the wall"]
    if not together:
        columns += [f">{size(each)}/s together", ">speed-up", "the wall"]
    table = _table(*columns)
    for row in rows:
        mark = " (this cluster)" if row["workers"] == cluster_workers else ""
        cells = [cell for one in (row, row.get("shared")) if one for cell in _outlook_cells(one)]
        table.add_row(f"{row['workers']}{mark}", *cells)
    out.print()
    out.print(
        f"predicted, starting up aside, for workers of {rates['flops_per_second'] / 1e9:.4g} GFLOP/s that move "
        f"{size(each)}/s each:"
    )
    out.print(table)
    if cluster_workers == 0:
        out.print("this cluster has no machine that is large enough for one worker")


def _outlook_cells(row: dict[str, Any]) -> tuple[str, str, str]:
    return duration(row["seconds"]), f"{row['speedup']:.1f}×", row["wall"]


def print_report(report: Report, *, every_tensor: bool = False) -> None:
    out = console()
    if every_tensor:
        columns = {"sigma_mean": ">σ̄", "rank": ">rank", "gap": ">gap", "orthogonality": ">‖QᵀQ−I‖"}
        if any("truncation" in entry for entry in report.tensors):
            columns["truncation"] = ">left out"
        table = _table("tensor", "algorithm", *columns.values(), ">seconds", ">read")
        for entry in report.tensors:
            numbers = [_number(entry.get(key)) for key in columns]
            table.add_row(
                entry["name"],
                entry["algorithm"],
                *numbers,
                f"{entry['seconds']:.3f}",
                size(entry["read_bytes"]),
            )
        out.print(table)
        out.print()
    counts = ", ".join(f"{count} {action}" for action, count in report.counts().items())
    out.print(f"{report.method}: {len(report.tensors)} tensors ({counts}) on {report.device}")
    judged = [entry for entry in report.tensors if "certified" in entry]
    if judged:
        escalated = sum(bool(entry.get("escalations")) for entry in judged)
        certified = sum(entry["certified"] for entry in judged)
        out.print(f"certified: {certified} of {len(judged)}; {escalated} took another solver than the first")
    moved = report.read_bytes + report.write_bytes
    total = report.seconds.get("total", 0.0)
    phases = {key: value for key, value in report.seconds.items() if key != "total"}
    labels = {
        "prepare": "preparing",
        "read": "waiting for reads",
        "compute": "computing",
        "write": "waiting for writes",
    }
    whole = max(sum(phases.values()) if len(report.workers) > 1 else total, 1e-9)
    shares = ", ".join(
        f"{labels[key]} {duration(value)} ({100 * value / whole:.0f} %)" for key, value in phases.items()
    )
    out.print(f"{size(moved)} in {duration(total)} ({moved / max(total, 1e-9) / 1e9:.2f} GB/s): {shares}")
    if len(report.workers) > 1:
        _print_workers(out, report)
    if report.io:
        out.print(f"files: read {report.io['read']}, written {report.io['write']}")
    for entry in report.tensors:
        if remark := entry.get("remarks"):
            out.print(f"note: {entry['name']}: {remark}")
    _print_ranks(out, report)
    _print_left_behind(out, report.left_behind)
    _print_notes(out, report.notes)
    for folder in report.outputs:
        out.print(f"written: {folder}")
    _print_uncertified(out, judged)


def _print_uncertified(out: Console, judged: list[dict[str, Any]]) -> None:
    """The last line, where there is one of these: the merge has ended well all the same."""
    missed = [entry for entry in judged if not entry["certified"]]
    if missed:
        first = repr(missed[0]["name"])
        if reason := missed[0].get("not_certified"):
            first += f": {reason}"
        out.print(f"NOT CERTIFIED: {len(missed)} of {len(judged)} tensors (first: {first}); see {REPORT_FILE}")


def _print_workers(out: Console, report: Report) -> None:
    """What each process did."""
    table = _table("worker", ">units", ">tensors", ">read", ">written", ">busy", ">of the time")
    total = max(report.seconds.get("total", 0.0), 1e-9)
    for worker in report.workers:
        table.add_row(
            f"{worker['host']} {worker['pid']}",
            str(worker["units"]),
            str(worker["tensors"]),
            size(worker["read_bytes"]),
            size(worker["write_bytes"]),
            duration(worker["seconds"]),
            f"{100 * worker['seconds'] / total:.0f} %",
        )
    out.print(table)
    out.print(
        f"{len(report.workers)} workers, evenly busy to {100 * report.balance:.0f} % (their mean over the busiest); "
        "phases are summed over them"
    )


def _print_ranks(out: Console, report: Report) -> None:
    """Sums of low rank, and what an adapter's rank leaves out."""
    deficient = [
        entry
        for entry in report.tensors
        if isinstance(entry.get("rank"), int) and entry["rank"] < entry.get("min_dim", 0)
    ]
    if deficient:
        first = deficient[0]
        others = f" and {len(deficient) - 1} other tensor(s)" if len(deficient) > 1 else ""
        name = f"{first['name']} (rank {first['rank']} of {first['min_dim']})"
        out.print(f"note: {name}{others}: the sum is of low rank, and the result is kept in its range")
    lost = [entry["truncation"] for entry in report.tensors if "truncation" in entry]
    if lost:
        out.print(f"the adapter's rank leaves out {100 * max(lost):.2g} % of a merged delta at most")


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""


def _print_notes(out: Console, notes: Any) -> None:
    for note in notes:
        out.print(f"note: {note}")


def print_verification(result: Verification) -> None:
    out = console()
    out.print(
        f"{result.folder}: {result.files} files, {result.tensors} tensors, {size(result.bytes)}: "
        "every checksum is right"
    )
    if result.recomputed:
        table = _table("recomputed in float64", ">scaling", ">error", ">allowed")
        for entry in result.recomputed:
            scaling = "delta" if entry["scaling"] is None else f"{entry['scaling']:g}"
            table.add_row(entry["name"], scaling, f"{entry['error']:.1e}", f"{entry['allowed']:.1e}")
        out.print(table)
    for change in result.inputs_changed:
        out.print(f"an input has changed since the merge: {change}")
    _print_notes(out, result.remarks)


def print_doctor(findings: dict[str, Any]) -> None:
    out = console()
    table = _table("what", "found")
    for key, value in findings["versions"].items():
        table.add_row(key, value)
    for key, value in findings["machine"].items():
        table.add_row(key, str(value))
    for check in findings["checks"]:
        verdict = "ok" if check["ok"] else "WRONG"
        table.add_row(
            f"{check['method']} on {check['device']}", f"{verdict}: error {check['error']:.1e} against float64"
        )
    out.print(table)


def print_bench(found: dict[str, Any]) -> None:
    """Of ``ShortBench.to_dict()``."""
    out = console()
    ceilings = found["ceilings"]
    _print_machine(out, found)
    out.print(
        f"at most: copies {ceilings['copy_bytes_per_second'] / 1e9:.1f} GB/s, products "
        f"{ceilings['float32_flops_per_second'] / 1e9:.0f} GFLOP/s in float32, "
        f"{ceilings['float64_flops_per_second'] / 1e9:.0f} in float64"
    )
    out.print()
    columns = ("shape", "of", "method", ">ours", ">published", ">ratio", ">from … to", ">rounds")
    table = _table(*columns, ">error of ours", ">of published", ">promised")
    for row in found["rows"]:
        low, high = row["ratio_range"]
        table.add_row(
            f"{row['rows']} x {row['columns']}",
            row["model"],
            row["method"],
            brief(row["seconds"]),
            brief(row["published_seconds"]),
            f"{row['ratio']:.1f}×",
            f"{low:.1f} … {high:.1f}",
            str(row["rounds"]),
            f"{row['error']:.0e}",
            f"{row['published_error']:.0e}",
            f"{row['bound']:.0e}",
        )
    out.print(table)
    out.print()
    out.print(
        f"{found['tasks']} deltas in float32, precision {found['precision']}; published: plain torch.linalg.svd in "
        "float32, in turn with ours; errors against float64 full SVDs"
    )
    for left_out in found["skipped"]:
        out.print(f"no time for {left_out}")


def print_estimate(found: dict[str, Any]) -> None:
    """Of ``Estimate.to_dict()``."""
    out = console()
    _print_machine(out, found)
    out.print()
    columns = ("shape", "dtype", "becomes", "route", "algorithm", ">count", ">each", ">in all")
    table = _table(*columns, "timed")
    for group in found["groups"]:
        table.add_row(
            str(list(group["shape"])),
            group["dtype"],
            group["action"],
            group["route"],
            group["algorithm"],
            str(group["count"]),
            brief(group["seconds_each"]),
            brief(group["seconds"]),
            group["timed"],
        )
    out.print(table)
    out.print()
    again = f", {size(found['read_again_bytes'])} of it again" if found["read_again_bytes"] else ""
    out.print(
        f"compute {duration(found['compute_seconds'])}; "
        f"read {size(found['read_bytes'] + found['read_again_bytes'])}{again}: {duration(found['read_seconds'])}; "
        f"write {size(found['write_bytes'])}: {duration(found['write_seconds'])}"
    )
    where = "the arithmetic" if found["wall"] == "compute" else "the disk"
    out.print(
        f"{found['method']} of {found['experts']} experts, {found['scalings']} scaling(s), would take about "
        f"{duration(found['total_seconds'])}, starting up aside; the wall is {where}"
    )
    vram = f", of GPU memory {size(found['peak_vram_bytes'])}" if found["peak_vram_bytes"] else ""
    out.print(f"peak memory ≈ {size(found['peak_ram_bytes'])}{vram}")
    _print_notes(out, found["notes"])


def _print_machine(out: Console, found: dict[str, Any]) -> None:
    machine, disk = found["machine"], found["disk"]
    out.print(f"{machine['device']}, {machine['threads']} CPU thread(s), torch {machine['torch']}")
    out.print(
        f"disk under {disk['folder']}: reads {disk['read_bytes_per_second'] / 1e9:.2f} GB/s, "
        f"writes {disk['write_bytes_per_second'] / 1e9:.2f} GB/s"
    )


def brief(seconds: float) -> str:
    """With three digits below a second, where tensors are."""
    if seconds >= 1:
        return duration(seconds)
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
