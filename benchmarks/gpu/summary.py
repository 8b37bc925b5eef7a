"""Sum up the rows in at most ``MAX_LINES`` lines, the most important last: of a long output the end is seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from benchmarks.gpu.schedule import CALLS, STAGES
from benchmarks.gpu.shapes import NAMES
from benchmarks.harness.markdown import table
from benchmarks.harness.readings import Row
from benchmarks.shapes import dimensions, llama

MAX_LINES, LINE, MAX_FAILURES = 130, 220, 12
# Of the end of a long output no more may be seen.
MAX_CHARACTERS = 11_000
# Who does the same, by what is said and what their rows are called. FusionBench takes torch's default driver.
BASELINES = {"FusionBench": "fusion-bench {}", "published by default": "{}, default", "published by gesvd": "{}, gesvd"}
# How often a layer of Llama-3-8B has a matrix of each shape.
LAYER = Counter(
    dimensions(shape) for name, shape in llama(4096, 14_336, 1, kv=1024).items() if "layers" in name and len(shape) == 2
)
VIT = "ViT-B/32"
LAYERS, CHECKPOINT_BYTES, EXPERTS, DISK_GB_PER_S = 32, 16.06e9, 8, 2.0


class Readings:
    """Find rows by stage and name."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def of(self, stage: str) -> list[Row]:
        return [row for row in self._rows if row["stage"] == stage]

    def timed(self, stage: str) -> list[Row]:
        """Return the rows of a stage that have a time."""
        return [row for row in self.of(stage) if "seconds" in row]

    def row(self, stage: str, name: str) -> Row:
        """Return the row of that name, an empty one where there is none."""
        return next((row for row in self.of(stage) if row["name"] == name), {})

    def baselines(self, name: str) -> dict[str, Row]:
        """Return the rows of those who do the same, as far as they were timed."""
        rows = {row["name"]: row for row in self.timed("published")}
        labels = {label: form.format(name) for label, form in BASELINES.items()}
        return {label: rows[own] for label, own in labels.items() if own in rows}


def _correctness(readings: Readings) -> Iterator[str]:
    for stages in CALLS.values():
        found = {stage.name: readings.of(stage.name) for stage in stages}
        failures = {name: sum("failed" in row for row in rows) for name, rows in found.items()}
        if any(found.values()):
            yield ", ".join(
                f"{name} {len(rows)} ({f'{failures[name]} FAILED' if failures[name] else 0})"
                for name, rows in found.items()
                if rows
            )
    failed = [row for name in STAGES for row in readings.of(name) if "failed" in row]
    yield from (f"FAILED {row['stage']} {row['name']}: {row['failed']}" for row in failed[:MAX_FAILURES])
    if len(failed) > MAX_FAILURES:
        yield f"and {len(failed) - MAX_FAILURES} more"
    if cut := [name for name in STAGES if any("cut" in row for row in readings.of(name))]:
        yield f"CUT by their time, what came later is missing: {', '.join(cut)}"


def _primitives(readings: Readings) -> Iterator[str]:
    for row in readings.of("ceilings"):
        if not row["name"].startswith("matmul"):
            yield f"{row['name']}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
    products = [row for row in readings.of("ceilings") if "tflop_per_s" in row]
    yield from _lines((*row["name"].rsplit(" ", 1), f"{row['tflop_per_s']:.4g} TFLOP/s") for row in products)
    solved = [row for stage in ("primitives", "published") for row in readings.of(stage) if "error" in row]
    yield from _lines(
        (*row["name"].rsplit(", ", 1), f"{1e3 * row['seconds']:.4g} ({row['error']:.0e})") for row in solved
    )


def _lines(contenders: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield one line for everything of one name, from (name, contender, value)."""
    groups: dict[str, list[str]] = {}
    for name, contender, value in contenders:
        groups.setdefault(name, []).append(f"{contender} {value}")
    yield from (f"{name}: {', '.join(found)}" for name, found in groups.items())


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}" if seconds < 10 else f"{1e3 * seconds:.0f}"


def methods(readings: Readings) -> str:
    """Return a table with a row per method: our time and GPU use, and each baseline's time (ratio; distance)."""
    rows = [row for row in readings.timed("methods") if "matrices" not in row]
    theirs = {row["name"]: readings.baselines(row["name"]) for row in rows}
    labels = [label for label in BASELINES if any(label in found for found in theirs.values())]

    def compared(ours: Row, theirs: Row) -> str:
        how = f"estimated: {theirs['estimated']}" if "estimated" in theirs else f"{theirs['distance']:.0e}"
        return f"{milliseconds(theirs['seconds'])} ({theirs['seconds'] / ours['seconds']:.3g} ×; {how})"

    def cells(row: Row) -> Iterator[str]:
        name = row["name"]
        yield name
        yield milliseconds(row["seconds"]) + ("" if row["certified"] else " not certified")
        busy = readings.row("methods", f"{name}, profile").get("busy")
        yield "" if busy is None else f"{busy:.0%}"
        yield from (compared(row, theirs[name][label]) if label in theirs[name] else "" for label in labels)

    head = ["8 tasks", "ours, ms", "GPU busy", *(f"{label}, ms (ratio; distance)" for label in labels)]
    return table(head, [list(cells(row)) for row in rows])


def kernels(title: str, rows: Sequence[Row], key: str, shown: Callable[[Row], str]) -> str:
    """Return a table with a line per form and a column per shape: the configuration in use, and any faster one.

    ``rows`` of one form and shape differ in their configuration; the one in use comes first, the best has most of
    ``key``.
    """
    cells: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        form, shape, _ = row["name"].split(", ")
        cells.setdefault(form, {}).setdefault(shape, []).append(row)

    def cell(found: Sequence[Row]) -> str:
        best = max(found, key=lambda row: row[key])
        other = "" if best is found[0] else f" ({shown(best)} by {best['name'].rsplit(', ')[-1]})"
        return shown(found[0]) + other

    shapes = list(dict.fromkeys(shape for found in cells.values() for shape in found))
    lines = [
        (form, *(cell(found[shape]) if shape in found else "" for shape in shapes)) for form, found in cells.items()
    ]
    return table((title, *shapes), lines)


def bandwidths(readings: Readings) -> str:
    """Return a table of bandwidths as shares of a copy's, with the least time of a call, the host included."""
    rows = [row for row in readings.of("bandwidths") if "of_copy" in row]
    hosts: dict[str, float] = {}
    for row in rows:
        form = row["name"].split(", ")[0]
        hosts[form] = min(hosts.get(form, row["host_seconds"]), row["host_seconds"])
    title = "share of the copy / of a copy as large"
    shares = kernels(title, rows, "of_copy", lambda row: f"{row['of_copy']:.2f} / {row['of_copy_as_large']:.2f}")
    calls = ", ".join(f"{form} {1e6 * host:.0f}" for form, host in hosts.items())
    return shares and f"{shares}\n\nA call with the host, µs: {calls}."


def products(readings: Readings) -> str:
    """Return a table of speeds relative to torch.matmul, with each form's largest error."""
    rows = [row for row in readings.of("products") if "ratio" in row]
    worst: dict[str, tuple[float, float]] = {}
    for row in rows:
        form = row["name"].split(", ")[0]
        ours, theirs = worst.get(form, (0.0, 0.0))
        worst[form] = max(ours, row["error"]), max(theirs, row["torch_error"])
    title = "`symmetric_matmul`, times as fast as `torch.matmul`, TFLOP/s"
    text = kernels(title, rows, "ratio", lambda row: f"{row['ratio']:.2f}, {row['tflop_per_s']:.3g}")
    errors = "; ".join(f"{form} {ours:.0e} / {theirs:.0e}" for form, (ours, theirs) in worst.items())
    return text and f"{text}\n\nLargest errors, ours / torch's: {errors}."


def stacks(readings: Readings) -> str:
    """Return a table of matrices that were merged at once, beside the same ones one after the other."""

    def cells(row: Row) -> Iterator[str]:
        count, alone, profile = row["matrices"], row["one_by_one"], readings.row("methods", f"{row['name']}, profile")
        yield row["name"]
        yield milliseconds(row["seconds"]) + ("" if row["certified"] else " not certified")
        yield milliseconds(row["seconds"] / count)
        yield "" if alone is None else f"{milliseconds(alone)} ({alone / row['seconds']:.3g} ×)"
        yield f"{profile['busy']:.0%}" if profile else ""
        yield f"{profile['launches'] / count:.0f}" if profile else ""
        yield str(row["escalations"])

    head = ("8 tasks, at once", "ms", "ms a matrix", "one by one", "GPU busy", "launches a matrix", "solved again")
    return table(head, [list(cells(row)) for row in readings.timed("methods") if "matrices" in row])


def merges(readings: Readings) -> str:
    """Return a table of streamed merges for each model, of the small one with what the merging thread waits for."""
    head = ("s", "GB/s read", "peak GiB of the GPU", "not certified")
    rows = readings.timed("merge")
    small = [row for row in rows if VIT in row["name"]]
    phases = ("read", "compute", "write")
    tables = [
        table(
            ("2 layers of Llama-3-8B, 8 experts, streamed", *head), [_merge(row) for row in rows if row not in small]
        ),
        table(
            (f"12 layers of {VIT}, 8 experts, streamed", *head, *(f"{phase}, s" for phase in phases)),
            [[*_merge(row), *(f"{row['phases'][phase]:.2f}" for phase in phases)] for row in small],
        ),
    ]
    return "\n\n".join(filter(None, tables))


def _merge(row: Row) -> list[str]:
    peak = f"{row['peak_vram_bytes'] / 2**30:.2f}" if "peak_vram_bytes" in row else ""
    name = row["name"].replace(f", {VIT}", "")
    return [name, f"{row['seconds']:.2f}", f"{row['read_gb_per_s']:.2f}", peak, str(row["uncertified"])]


def threads(readings: Readings) -> str:
    rows = readings.timed("threads")
    lines = [(row["name"], milliseconds(row["seconds"]), f"{row['speedup']:.2f}") for row in rows]
    return table(("on this machine's CPU", "ms", "times as fast as by one thread"), lines)


def _profiles(readings: Readings) -> Iterator[str]:
    for row in readings.of("methods"):
        if "busy" in row:
            name, counts = row["name"].removesuffix(", profile"), f"{row['launches']} launches, {row['waits']} waits"
            yield f"{name:22} {row['device_ms']:.1f} ms of the device; {counts}"


def outlook(readings: Readings) -> Iterator[str]:
    """Yield what all layers of Llama-3-8B would take: each of its shapes as often as it is there, and the disk."""
    for method in NAMES:
        ours = [_of_a_matrix(readings, method, shape) for shape in LAYER]
        line = f"{method:8} arithmetic {_whole(ours)} s"
        rows = [readings.baselines(f"{method} {shape}") for shape in LAYER]
        for label in BASELINES:
            found = [row.get(label, {}) for row in rows]
            if any(found):
                line += f"; {label} {_whole(found)} s"
                line += " (in part estimated)" if any("estimated" in row for row in found) else ""
        yield line
        if warm := readings.row("merge", f"{method}, again").get("seconds"):
            yield f"{method:8} {LAYERS} layers as the two merged above: {LAYERS / 2 * warm:.0f} s"
    read, written = (EXPERTS + 1) * CHECKPOINT_BYTES, CHECKPOINT_BYTES
    rates = {f"{DISK_GB_PER_S:g} GB/s": DISK_GB_PER_S}
    for name in ("task-arithmetic", "task-arithmetic, again"):
        if measured := readings.row("merge", name).get("read_gb_per_s"):
            rates["the rate of task-arithmetic above"] = measured
    for name, rate in rates.items():
        yield f"disk     {read / 1e9:.0f} + {written / 1e9:.0f} GB: {(read + written) / rate / 1e9:.0f} s at {name}"


def _of_a_matrix(readings: Readings, method: str, shape: str) -> Row:
    """Return the seconds of one matrix: its share of a stack, where a merge has stacks of them."""
    for row in readings.of("methods"):
        if "matrices" in row and row["name"].startswith(f"{method} ") and row["name"].endswith(f" x {shape}, stack"):
            return {"seconds": row["seconds"] / row["matrices"]}
    return readings.row("methods", f"{method} {shape}")


def _whole(rows: Sequence[Row]) -> str:
    """Return the seconds of all layers, from one row for each shape."""
    if not all("seconds" in row for row in rows):
        return "?"
    return f"{LAYERS * sum(count * row['seconds'] for count, row in zip(LAYER.values(), rows, strict=True)):.1f}"


SECTIONS: tuple[tuple[str, Callable[[Readings], str | Iterable[str]]], ...] = (
    ("correctness: rows (failed)", _correctness),
    ("ceilings, primitives: ms (relative error)", _primitives),
    ("CPU, by threads", threads),
    ("bandwidths: the configuration in use (a better one)", bandwidths),
    ("products: the configuration in use (a better one)", products),
    ("profiles", _profiles),
    ("methods", methods),
    ("stacks", stacks),
    ("streamed merge", merges),
    ("Llama-3-8B x 8 experts by these readings", outlook),
    ("correctness, once more", _correctness),
)


def summary(rows: Sequence[Row]) -> list[str]:
    readings, last = Readings(rows), []
    for title, section in SECTIONS:
        found = section(readings)
        last += [f"== {title}", *(filter(None, found.split("\n")) if isinstance(found, str) else found)]
    last = [line[:LINE].replace("\n", " ") for line in last[-MAX_LINES:]]
    while sum(len(line) + 1 for line in last) > MAX_CHARACTERS:
        del last[0]
    return last
