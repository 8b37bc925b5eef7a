"""Print what the verbs have found, for a person. No arithmetic here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from ..checkpoint.layout import DTYPE_NAMES
from ..checkpoint.output.manifest import REPORT_FILE
from ..execution.report import Report
from ..execution.verify import Verification
from ..planning.plan import Plan, TensorPlan
from .screen import Column, Screen, brief, duration, size

# How many reasons are shown, and how many names for each, of the files that are left behind.
LEFT_BEHIND_SHOWN = 20
# Of the tensors that several cores compute, so many are named.
CORES_SHOWN = 3


def group_tensors(tensors: tuple[TensorPlan, ...]) -> list[tuple[str, list[TensorPlan]]]:
    """Group the tensors whose names differ only in their numbers: ``layers.{0..31}.mlp.up_proj.weight``."""
    groups: dict[tuple[Any, ...], list[TensorPlan]] = {}
    for plan in tensors:
        kind = plan.base.shape, plan.base.dtype, plan.out_dtype, plan.action, plan.route.name, plan.reason
        groups.setdefault((re.sub(r"\d+", "#", plan.name), *kind), []).append(plan)
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
    """Print a plan, and the estimates of ``found``."""

    def dtypes(tensor: TensorPlan) -> str:
        return " → ".join(dict.fromkeys(DTYPE_NAMES[dtype] for dtype in (tensor.base.dtype, tensor.out_dtype)))

    screen = Screen()
    screen.print_table(
        [{"name": name, "count": len(members), "plan": members[0]} for name, members in group_tensors(plan.tensors)],
        ("tensor", "{name}"),
        (">count", "{count}"),
        ("shape", lambda row: list(row["plan"].base.shape)),
        ("dtype", lambda row: dtypes(row["plan"])),
        ("becomes", "{plan.action}"),
        ("route", "{plan.route.name}"),
        ("why", "{plan.reason}"),
    )
    screen.print()
    parts = ", ".join(f"{key} ≈ {duration(value)}" for key, value in found["estimated_seconds"].items())
    screen.print(
        f"{plan.config.method} of {len(plan.experts)} experts, "
        f"scaling {', '.join(f'{value:g}' for value in plan.config.scalings)}"
    )
    more = plan.passed_bytes - plan.read_bytes
    again = f" and {size(more)} in further passes" if more else ""
    screen.print(
        f"read {size(plan.read_bytes)}{again}, write {size(plan.write_bytes)} "
        f"in {sum(map(len, plan.folders.values()))} file(s)"
    )
    held = f", {size(plan.metadata_bytes)} for names and places" if plan.metadata_bytes else ""
    screen.print(
        f"peak memory ≈ {size(plan.peak_ram_bytes)} on a CPU: {size(plan.together_bytes)} for tensors merged at once "
        f"({size(plan.peak_work_bytes)} for the largest), {size(plan.budget.read_pool)} for their copies and reading "
        f"ahead{held}"
    )
    _print_cores(screen, plan, found["at_once"])
    screen.print(f"estimated on this CPU, bytes at 1 GB/s: {parts}")
    if "outlook" in found:
        _print_outlook(screen, found["outlook"], found.get("cluster_workers"))
    _print_left_behind(screen, [left.to_dict() for left in plan.left_behind])
    _print_notes(screen, plan.notes)


def _print_cores(screen: Screen, plan: Plan, at_once: int) -> None:
    """Print how many matrices are computed at once, and which by several cores."""
    text = f"by {plan.cores} CPU core(s): up to {at_once} matrices at once, a core each" if at_once else ""
    several = [tensor for tensor in plan.tensors if tensor.cores > 1]
    if several:
        first = ", ".join(f"{tensor.name} by {tensor.cores}" for tensor in several[:CORES_SHOWN])
        more = f" and {len(several) - CORES_SHOWN} more" if len(several) > CORES_SHOWN else ""
        text += (
            f"; but {first}{more}, where there is no memory for as many as cores, or one takes longer than its share: "
            "their last digits depend on the number of cores"
        )
    if text:
        screen.print(text)


def _print_left_behind(screen: Screen, left_behind: list[dict[str, Any]]) -> None:
    """Print a line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for left in left_behind:
        held = f"{left['files']} file(s), {size(left['bytes'])}" if left["name"].endswith("/") else size(left["bytes"])
        by_reason.setdefault(left["why"], []).append(f"{left['name']} ({held})")
    reasons = [*by_reason.items()]
    for why, names in reasons[:LEFT_BEHIND_SHOWN]:
        more = len(names) - LEFT_BEHIND_SHOWN
        rest = f" and {more} more" if more > 0 else ""
        screen.print(f"left behind: {', '.join(names[:LEFT_BEHIND_SHOWN])}{rest}: {why}")
    if others := sum(len(names) for _, names in reasons[LEFT_BEHIND_SHOWN:]):
        screen.print(f"left behind: {others} more, for other reasons")


def _print_outlook(screen: Screen, outlook: dict[str, Any], cluster_workers: int | None) -> None:
    """Print the least wall times of several numbers of workers."""
    rates = outlook["rates"]
    each, together = rates["read_bytes_per_second"], rates["storage_bytes_per_second"]
    storage = f"{size(together)}/s together" if together else "the storage has no limit"
    columns: list[Column] = [
        (">workers", lambda row: f"{row['workers']}{' (this cluster)' if row['workers'] == cluster_workers else ''}"),
        (f">{storage}", lambda row: duration(row["seconds"])),
        (">speed-up", "{speedup:.1f}×"),
        ("the wall", "{wall}"),
    ]
    if not together:
        columns += [
            (f">{size(each)}/s together", lambda row: duration(row["shared"]["seconds"])),
            (">speed-up", "{shared[speedup]:.1f}×"),
            ("the wall", "{shared[wall]}"),
        ]
    screen.print()
    screen.print(
        f"predicted at best, starting up aside, for workers of {rates['flops_per_second'] / 1e9:.4g} GFLOP/s that move "
        f"{size(each)}/s each:"
    )
    screen.print_table(outlook["rows"], *columns)
    if cluster_workers == 0:
        screen.print("this cluster has no machine that is large enough for one worker")


def print_report(report: Report, *, every_tensor: bool = False) -> None:
    """Print what a merge did, on request tensor by tensor."""
    screen = Screen()
    if every_tensor:
        _print_tensors(screen, report.tensors)
    counts = ", ".join(f"{count} {action}" for action, count in report.counts().items())
    screen.print(f"{report.method}: {len(report.tensors)} tensors ({counts}) on {report.device}")
    judged = [entry for entry in report.tensors if "certified" in entry]
    if judged:
        escalated = sum(bool(entry.get("escalations")) for entry in judged)
        certified = sum(entry["certified"] for entry in judged)
        screen.print(f"certified: {certified} of {len(judged)}; {escalated} took another solver than the first")
    _print_times(screen, report)
    if len(report.workers) > 1:
        _print_workers(screen, report)
    if report.io:
        screen.print(f"files: read {report.io['read']}, written {report.io['write']}")
    for entry in report.tensors:
        if remark := entry.get("remarks"):
            screen.print(f"note: {entry['name']}: {remark}")
    _print_ranks(screen, report)
    _print_left_behind(screen, report.left_behind)
    _print_notes(screen, report.notes)
    for folder in report.outputs:
        screen.print(f"written: {folder}")
    # The last line, if any: the merge has ended well all the same.
    missed = [entry for entry in judged if not entry["certified"]]
    if missed:
        first = repr(missed[0]["name"])
        if reason := missed[0].get("not_certified"):
            first += f": {reason}"
        screen.print(f"NOT CERTIFIED: {len(missed)} of {len(judged)} tensors (first: {first}); see {REPORT_FILE}")


def _print_tensors(screen: Screen, tensors: list[dict[str, Any]]) -> None:

    def number(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda entry: f"{value:.3g}" if isinstance(value := entry.get(key), int | float) else ""

    figures = {"sigma_mean": ">σ̄", "rank": ">rank", "gap": ">gap", "orthogonality": ">‖QᵀQ−I‖"}
    if any("truncation" in entry for entry in tensors):
        figures["truncation"] = ">left out"
    screen.print_table(
        tensors,
        ("tensor", "{name}"),
        ("algorithm", "{algorithm}"),
        *((head, number(key)) for key, head in figures.items()),
        (">seconds", "{seconds:.3f}"),
        (">read", lambda entry: size(entry["read_bytes"])),
    )
    screen.print()


def _print_times(screen: Screen, report: Report) -> None:
    """Print the bytes moved, and the share of each phase of the time."""
    moved, total = report.read_bytes + report.write_bytes, report.seconds.get("total", 0.0)
    labels = {
        "prepare": "preparing",
        "read": "waiting for reads",
        "compute": "computing",
        "write": "waiting for writes",
    }
    phases = {key: value for key, value in report.seconds.items() if key != "total"}
    whole = max(sum(phases.values()) if len(report.workers) > 1 else total, 1e-9)
    shares = ", ".join(
        f"{labels[key]} {duration(value)} ({100 * value / whole:.0f} %)" for key, value in phases.items()
    )
    screen.print(f"{size(moved)} in {duration(total)} ({moved / max(total, 1e-9) / 1e9:.2f} GB/s): {shares}")


def _print_workers(screen: Screen, report: Report) -> None:
    """Print what each process did."""
    total = max(report.seconds.get("total", 0.0), 1e-9)
    screen.print_table(
        report.workers,
        ("worker", "{host} {pid}"),
        (">units", "{units}"),
        (">tensors", "{tensors}"),
        (">read", lambda worker: size(worker["read_bytes"])),
        (">written", lambda worker: size(worker["write_bytes"])),
        (">busy", lambda worker: duration(worker["seconds"])),
        (">of the time", lambda worker: f"{100 * worker['seconds'] / total:.0f} %"),
    )
    screen.print(
        f"{len(report.workers)} workers, evenly busy to {100 * report.balance:.0f} % (their mean over the busiest); "
        "phases are summed over them"
    )


def _print_ranks(screen: Screen, report: Report) -> None:
    """Print which sums are of low rank, and how much an adapter's rank leaves out."""
    ranked = [entry for entry in report.tensors if isinstance(entry.get("rank"), int)]
    deficient = [entry for entry in ranked if entry["rank"] < entry.get("min_dim", 0)]
    if deficient:
        first = deficient[0]
        others = f" and {len(deficient) - 1} other tensor(s)" if len(deficient) > 1 else ""
        name = f"{first['name']} (rank {first['rank']} of {first['min_dim']})"
        screen.print(f"note: {name}{others}: the sum is of low rank, and the result is kept in its range")
    lost = [entry["truncation"] for entry in report.tensors if "truncation" in entry]
    if lost:
        screen.print(f"the adapter's rank leaves out {100 * max(lost):.2g} % of a merged delta at most")


def _print_notes(screen: Screen, notes: Iterable[str]) -> None:
    for note in notes:
        screen.print(f"note: {note}")


def print_verification(result: Verification) -> None:
    """Print that an output is right, and the errors of the tensors that are recomputed."""
    screen = Screen()
    screen.print(
        f"{result.folder}: {result.files} files, {result.tensors} tensors, {size(result.bytes)}: "
        "every checksum is right"
    )
    if result.recomputed:
        screen.print_table(
            result.recomputed,
            ("recomputed in float64", "{name}"),
            (">scaling", lambda entry: "delta" if entry["scaling"] is None else f"{entry['scaling']:g}"),
            (">error", "{error:.1e}"),
            (">allowed", "{allowed:.1e}"),
        )
    for change in result.inputs_changed:
        screen.print(f"an input has changed since the merge: {change}")
    _print_notes(screen, result.remarks)


def print_doctor(findings: dict[str, Any]) -> None:
    """Print what ``examine`` has found."""
    rows = [*findings["versions"].items(), *findings["machine"].items()]
    for check in findings["checks"]:
        verdict = f"{'ok' if check['ok'] else 'WRONG'}: error {check['error']:.1e} against float64"
        rows.append((f"{check['method']} on {check['device']}", verdict))
    Screen().print_table(rows, ("what", lambda row: row[0]), ("found", lambda row: row[1]))


def print_bench(found: dict[str, Any]) -> None:
    """Print what ``measure_short`` has found."""
    screen = Screen()
    ceilings = found["ceilings"]
    _print_machine(screen, found)
    screen.print(
        f"at most: copies {ceilings['copy_bytes_per_second'] / 1e9:.1f} GB/s, products "
        f"{ceilings['float32_flops_per_second'] / 1e9:.0f} GFLOP/s in float32, "
        f"{ceilings['float64_flops_per_second'] / 1e9:.0f} in float64"
    )
    screen.print()
    screen.print_table(
        found["rows"],
        ("shape", "{rows} x {columns}"),
        ("of", "{model}"),
        ("method", "{method}"),
        (">ours", lambda row: brief(row["seconds"])),
        (">published", lambda row: brief(row["published_seconds"])),
        (">ratio", "{ratio:.1f}×"),
        (">from … to", "{ratio_range[0]:.1f} … {ratio_range[1]:.1f}"),
        (">rounds", "{rounds}"),
        (">error of ours", "{error:.0e}"),
        (">of published", "{published_error:.0e}"),
        (">promised", "{bound:.0e}"),
    )
    screen.print()
    screen.print(
        f"{found['tasks']} deltas in float32, precision {found['precision']}; published: plain torch.linalg.svd in "
        "float32, in turn with ours; errors against float64 full SVDs"
    )
    for left_out in found["skipped"]:
        screen.print(f"no time for {left_out}")


def print_estimate(found: dict[str, Any]) -> None:
    """Print what ``estimate_merge`` has found."""
    screen = Screen()
    _print_machine(screen, found)
    screen.print()
    screen.print_table(
        found["groups"],
        ("shape", "{shape}"),
        ("dtype", "{dtype}"),
        ("becomes", "{action}"),
        ("route", "{route}"),
        ("algorithm", "{algorithm}"),
        (">count", "{count}"),
        (">each", lambda group: brief(group["seconds_each"])),
        (">in all", lambda group: brief(group["seconds"])),
        ("timed", "{timed}"),
    )
    screen.print()
    again = f", {size(found['read_again_bytes'])} of it again" if found["read_again_bytes"] else ""
    screen.print(
        f"compute {duration(found['compute_seconds'])}; "
        f"read {size(found['read_bytes'] + found['read_again_bytes'])}{again}: {duration(found['read_seconds'])}; "
        f"write {size(found['write_bytes'])}: {duration(found['write_seconds'])}"
    )
    where = "the arithmetic" if found["wall"] == "compute" else "the disk"
    screen.print(
        f"{found['method']} of {found['experts']} experts, {found['scalings']} scaling(s), would take about "
        f"{duration(found['total_seconds'])}, starting up aside; the wall is {where}"
    )
    vram = f", of GPU memory {size(found['peak_vram_bytes'])}" if found["peak_vram_bytes"] else ""
    screen.print(f"peak memory ≈ {size(found['peak_ram_bytes'])}{vram}")
    _print_notes(screen, found["notes"])


def _print_machine(screen: Screen, found: dict[str, Any]) -> None:
    machine, disk = found["machine"], found["disk"]
    screen.print(f"{machine['device']}, {machine['threads']} CPU thread(s), torch {machine['torch']}")
    screen.print(
        f"disk under {disk['folder']}: reads {disk['read_bytes_per_second'] / 1e9:.2f} GB/s, "
        f"writes {disk['write_bytes_per_second'] / 1e9:.2f} GB/s"
    )
