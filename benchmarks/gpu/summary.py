"""What the rows say in at most ``MAX_LINES`` lines, the most important last: of a long output the end is seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.gpu.schedule import CALLS
from benchmarks.harness.readings import Row

MAX_LINES, LINE, MAX_FAILURES = 100, 180, 12
# Of the end of a long output no more may be seen.
MAX_CHARACTERS = 11_000
# Who does the same, by what is said and what their rows are called. FusionBench takes torch's default driver.
BASELINES = {"FusionBench": "fusion-bench {}", "published by default": "{}, default", "published by gesvd": "{}, gesvd"}
METHODS = ("iso-c", "iso-cts")
# Of one layer of Llama-3-8B, how often: q and o, k and v, gate and up, down. (``shapes`` needs torch.)
LAYER = {"4096 x 4096": 2, "1024 x 4096": 2, "14336 x 4096": 2, "4096 x 14336": 1}
LAYERS, CHECKPOINT_BYTES, EXPERTS, DISK_GB_PER_S = 32, 16.06e9, 8, 2.0


class Readings:
    """Rows by stage and name."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def of(self, stage: str) -> list[Row]:
        return [row for row in self._rows if row["stage"] == stage]

    def row(self, stage: str, name: str) -> Row:
        """The row of that name, an empty one where there is none."""
        return next((row for row in self.of(stage) if row["name"] == name), {})

    def get(self, stage: str, name: str, key: str = "seconds") -> float | None:
        return self.row(stage, name).get(key)

    def baselines(self, name: str) -> dict[str, Row]:
        """Rows of those who do the same, as far as they were timed."""
        rows = {row["name"]: row for row in self.of("published") if "seconds" in row}
        labels = {label: form.format(name) for label, form in BASELINES.items()}
        return {label: rows[own] for label, own in labels.items() if own in rows}


def _correctness(readings: Readings) -> Iterator[str]:
    for stages in CALLS.values():
        counted = {stage.name: rows for stage in stages if (rows := readings.of(stage.name))}
        counts = ((name, len(rows), sum("failed" in row for row in rows)) for name, rows in counted.items())
        if counted:
            yield ", ".join(f"{name} {rows} ({f'{failed} FAILED' if failed else 0})" for name, rows, failed in counts)
    names = [stage.name for stages in CALLS.values() for stage in stages]
    failed = [row for name in names for row in readings.of(name) if "failed" in row]
    yield from (f"FAILED {row['stage']} {row['name']}: {row['failed']}" for row in failed[:MAX_FAILURES])
    if len(failed) > MAX_FAILURES:
        yield f"and {len(failed) - MAX_FAILURES} more"
    cut = dict.fromkeys(row["stage"] for name in names for row in readings.of(name) if "cut" in row)
    if cut:
        yield f"CUT by their time, what came later is missing: {', '.join(cut)}"


def _primitives(readings: Readings) -> Iterator[str]:
    for row in readings.of("ceilings"):
        if not row["name"].startswith("matmul"):
            yield f"{row['name']}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
    products = [row for row in readings.of("ceilings") if "tflop_per_s" in row]
    yield from _lines((*row["name"].rsplit(" ", 1), f"{row['tflop_per_s']:.4g} TFLOP/s") for row in products)
    solved = [row for row in readings.of("primitives") if "error" in row]
    solved += [row for row in readings.of("published") if "error" in row]
    times = [f"{1e3 * row['seconds']:.4g} ({row['error']:.0e})" for row in solved]
    yield from _lines((*row["name"].rsplit(", ", 1), each) for row, each in zip(solved, times, strict=True))


def _lines(contenders: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """One line for everything of one name, from (name, contender, value)."""
    groups: dict[str, list[str]] = {}
    for name, contender, value in contenders:
        groups.setdefault(name, []).append(f"{contender} {value}")
    yield from (f"{name}: {', '.join(found)}" for name, found in groups.items())


def configurations(readings: Readings, stage: str, key: str) -> Iterator[tuple[str, str, list[Row]]]:
    """Yield (form, shape, rows) where rows differ in their configuration, the one in use first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in readings.of(stage):
        if key in row:
            form, shape, _ = row["name"].split(", ")
            groups.setdefault((form, shape), []).append(row)
    yield from ((form, shape, rows) for (form, shape), rows in groups.items())


def _bandwidths(readings: Readings) -> Iterator[str]:
    def shown(rows: list[Row]) -> str:
        first, best = rows[0], max(rows, key=lambda row: row["of_copy"])
        as_large = f" / {best['of_copy_as_large']:.2f}" if "of_copy_as_large" in best else ""
        value = f"{best['of_copy']:.2f}{as_large} by {best['name'].rsplit(', ')[-1]}"
        return value if best is first else f"{value} ({first['of_copy']:.2f})"

    found = [*configurations(readings, "bandwidths", "of_copy")]
    yield from _lines((form, f"{shape}:", shown(rows)) for form, shape, rows in found)
    hosts: dict[str, float] = {}
    for form, _, rows in found:
        hosts[form] = min([hosts.get(form, math.inf), *(row.get("host_seconds", math.inf) for row in rows)])
    if hosts:
        yield "a call with the host, us: " + ", ".join(f"{form} {1e6 * host:.0f}" for form, host in hosts.items())


def _products(readings: Readings) -> Iterator[str]:
    worst: dict[str, list[float]] = {}
    for row in readings.of("products"):
        if "error" in row:
            errors = worst.setdefault(row["name"].split(", ")[0], [0.0, 0.0])
            errors[:] = max(errors[0], row["error"]), max(errors[1], row["torch_error"])

    def shown(rows: list[Row]) -> str:
        best = max(rows, key=lambda row: row["ratio"])
        return f"{best['ratio']:.2f} {best['tflop_per_s']:.3g} by {best['name'].rsplit(', ')[-1]}"

    found = configurations(readings, "products", "ratio")
    for line in _lines((form, f"{side}:", shown(rows)) for form, side, rows in found):
        form = line.partition(":")[0]
        yield f"{form} ({worst[form][0]:.0e} / {worst[form][1]:.0e}){line.removeprefix(form)}"


def _threads(readings: Readings) -> Iterator[str]:
    rows = (row for row in readings.of("threads") if "seconds" in row)
    yield from _lines((*row["name"].rsplit(", ", 1), f"{1e3 * row['seconds']:.0f} ms") for row in rows)


def _methods(readings: Readings) -> Iterator[str]:
    for row in readings.of("methods"):
        if "seconds" not in row:
            continue
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


def _merges(readings: Readings) -> Iterator[str]:
    for row in readings.of("merge"):
        if "seconds" in row:
            vram = f", {row['peak_vram_bytes'] / 2**30:.2f} GiB" if "peak_vram_bytes" in row else ""
            rate = f"{row['read_gb_per_s']:.2f} GB/s read"
            yield f"{row['name']:22} {row['seconds']:.2f} s, {rate}{vram}, {row['uncertified']} not certified"


def outlook(readings: Readings) -> Iterator[str]:
    """Yield what all layers of Llama-3-8B would take: each of its shapes as often as it is there, and the disk."""
    for method in METHODS:
        ours = [readings.get("methods", f"{method} {shape}") for shape in LAYER]
        line = f"{method:8} arithmetic {_whole(ours)} s"
        rows = [readings.baselines(f"{method} {shape}") for shape in LAYER]
        for label in BASELINES:
            found = [row.get(label, {}) for row in rows]
            if any(found):
                line += f"; {label} {_whole([row.get('seconds') for row in found])} s"
                line += " (in part estimated)" if any("estimated" in row for row in found) else ""
        yield line
        if warm := readings.get("merge", f"{method}, again"):
            yield f"{method:8} {LAYERS} layers as the two merged above: {LAYERS / 2 * warm:.0f} s"
    read, written = (EXPERTS + 1) * CHECKPOINT_BYTES, CHECKPOINT_BYTES
    rates = {f"{DISK_GB_PER_S:g} GB/s": DISK_GB_PER_S}
    for name in ("task-arithmetic", "task-arithmetic, again"):
        if measured := readings.get("merge", name, "read_gb_per_s"):
            rates["the rate of task-arithmetic above"] = measured
    for name, rate in rates.items():
        yield f"disk     {read / 1e9:.0f} + {written / 1e9:.0f} GB: {(read + written) / rate / 1e9:.0f} s at {name}"


def _whole(seconds: Sequence[float | None]) -> str:
    """All layers, from one time a shape."""
    known = [each for each in seconds if each is not None]
    if len(known) < len(LAYER):
        return "?"
    return f"{LAYERS * sum(count * each for count, each in zip(LAYER.values(), known, strict=True)):.1f}"


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
    """Return the lines."""
    readings = Readings(rows)
    lines = [line for title, section in SECTIONS for line in (f"== {title}", *section(readings))]
    last = [line[:LINE].replace("\n", " ") for line in (*lines, "== correctness, once more", *_correctness(readings))]
    last = last[-MAX_LINES:]
    while sum(len(line) + 1 for line in last) > MAX_CHARACTERS:
        del last[0]
    return last
