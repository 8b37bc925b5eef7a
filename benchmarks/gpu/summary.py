"""Sum up the rows in at most ``MAX_LINES`` lines, the most important last: of a long output the end is seen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.gpu.schedule import CALLS, STAGES
from benchmarks.harness.readings import Row
from benchmarks.shapes import dimensions, llama

MAX_LINES, LINE, MAX_FAILURES = 100, 180, 12
# Of the end of a long output no more may be seen.
MAX_CHARACTERS = 11_000
# Who does the same, by what is said and what their rows are called. FusionBench takes torch's default driver.
BASELINES = {"FusionBench": "fusion-bench {}", "published by default": "{}, default", "published by gesvd": "{}, gesvd"}
METHODS = ("iso-c", "iso-cts")
# How often a layer of Llama-3-8B has a matrix of each shape.
LAYER = Counter(
    dimensions(shape) for name, shape in llama(4096, 14_336, 1, kv=1024).items() if "layers" in name and len(shape) == 2
)
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


def best_and_used(readings: Readings, stage: str, key: str) -> Iterator[tuple[str, str, Row, Row, str]]:
    """Yield (form, shape, row of the configuration in use, row and name of the best) where rows differ in their
    configuration; the one in use comes first.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in readings.of(stage):
        if key in row:
            form, shape, _ = row["name"].split(", ")
            groups.setdefault((form, shape), []).append(row)
    for (form, shape), rows in groups.items():
        best = max(rows, key=lambda row: row[key])
        yield form, shape, rows[0], best, best["name"].rsplit(", ")[-1]


def _bandwidths(readings: Readings) -> Iterator[str]:
    def shown(used: Row, best: Row, config: str) -> str:
        as_large = f" / {best['of_copy_as_large']:.2f}" if "of_copy_as_large" in best else ""
        return f"{best['of_copy']:.2f}{as_large} by {config}" + ("" if best is used else f" ({used['of_copy']:.2f})")

    found = best_and_used(readings, "bandwidths", "of_copy")
    yield from _lines((form, f"{shape}:", shown(used, best, name)) for form, shape, used, best, name in found)
    hosts: dict[str, float] = {}
    for row in readings.of("bandwidths"):
        if "host_seconds" in row:
            form = row["name"].split(", ")[0]
            hosts[form] = min(hosts.get(form, math.inf), row["host_seconds"])
    if hosts:
        yield "a call with the host, us: " + ", ".join(f"{form} {1e6 * host:.0f}" for form, host in hosts.items())


def _products(readings: Readings) -> Iterator[str]:
    worst: dict[str, tuple[float, float]] = {}
    for row in readings.of("products"):
        if "error" in row:
            form = row["name"].split(", ")[0]
            ours, theirs = worst.get(form, (0.0, 0.0))
            worst[form] = max(ours, row["error"]), max(theirs, row["torch_error"])
    for line in _lines(
        (form, f"{side}:", f"{best['ratio']:.2f} {best['tflop_per_s']:.3g} by {config}")
        for form, side, _, best, config in best_and_used(readings, "products", "ratio")
    ):
        form, _, shown = line.partition(":")
        yield f"{form} ({worst[form][0]:.0e} / {worst[form][1]:.0e}):{shown}"


def _threads(readings: Readings) -> Iterator[str]:
    rows = readings.timed("threads")
    yield from _lines((*row["name"].rsplit(", ", 1), f"{1e3 * row['seconds']:.0f} ms") for row in rows)


def _methods(readings: Readings) -> Iterator[str]:
    for row in readings.timed("methods"):
        line = f"{row['name']:34} {1e3 * row['seconds']:9.2f}{'' if row['certified'] else ' NOT CERTIFIED'}"
        for label, theirs in readings.baselines(row["name"]).items():
            how = "estimated" if "estimated" in theirs else f"{theirs['distance']:.0e}"
            line += f"; {label} {1e3 * theirs['seconds']:.0f}, {theirs['seconds'] / row['seconds']:.1f} x ({how})"
        yield line


def _profiles(readings: Readings) -> Iterator[str]:
    for row in readings.of("methods"):
        if "busy" in row:
            name, counts = row["name"].removesuffix(", profile"), f"{row['launches']} launches, {row['waits']} waits"
            yield f"{name:22} {row['device_ms']:.1f} ms of the device, busy {row['busy']:.0%}; {counts}"


def vram(row: Row) -> str:
    """Return the peak of the GPU's memory in GiB."""
    return f"{row['peak_vram_bytes'] / 2**30:.2f}" if "peak_vram_bytes" in row else ""


def _merges(readings: Readings) -> Iterator[str]:
    for row in readings.timed("merge"):
        peak = f", {vram(row)} GiB" if vram(row) else ""
        rate = f"{row['read_gb_per_s']:.2f} GB/s read"
        yield f"{row['name']:22} {row['seconds']:.2f} s, {rate}{peak}, {row['uncertified']} not certified"


def outlook(readings: Readings) -> Iterator[str]:
    """Yield what all layers of Llama-3-8B would take: each of its shapes as often as it is there, and the disk."""
    for method in METHODS:
        ours = [readings.row("methods", f"{method} {shape}") for shape in LAYER]
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


def _whole(rows: Sequence[Row]) -> str:
    """Return the seconds of all layers, from one row for each shape."""
    if not all("seconds" in row for row in rows):
        return "?"
    return f"{LAYERS * sum(count * row['seconds'] for count, row in zip(LAYER.values(), rows, strict=True)):.1f}"


SECTIONS = (
    ("correctness: rows (failed)", _correctness),
    ("ceilings, primitives: ms (relative error)", _primitives),
    ("CPU, by threads", _threads),
    ("share of the copy / of a copy as large: the best configuration (the one in use)", _bandwidths),
    ("symmetric_matmul: speed over torch.matmul, TFLOP/s; errors ours / torch's", _products),
    ("profiles", _profiles),
    ("methods: ours ms; theirs ms, ratio (distance of the two)", _methods),
    ("streamed merge, 2 layers of Llama-3-8B, 8 experts", _merges),
    ("Llama-3-8B x 8 experts by these readings", outlook),
)


def summary(rows: Sequence[Row]) -> list[str]:
    readings = Readings(rows)
    lines = [line for title, section in SECTIONS for line in (f"== {title}", *section(readings))]
    last = [line[:LINE].replace("\n", " ") for line in (*lines, "== correctness, once more", *_correctness(readings))]
    last = last[-MAX_LINES:]
    while sum(len(line) + 1 for line in last) > MAX_CHARACTERS:
        del last[0]
    return last
