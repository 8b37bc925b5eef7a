"""LoRA adapters merged in factor space, beside the dense default on the same deltas.

    python -m benchmarks.adapters [--folder DIR] [--adapters 8] [--rank 16] [--rounds 5] [--small] [--out JSON]
    python -m benchmarks.adapters --table JSON --write PAGE     its table into a page, between the marks there

On a base of the shapes of Llama-3.2-1B (random weights), with adapters of all seven projections:

``solve``   one matrix of each shape, the factors at hand, against the dense default with all Δ_t at hand in float32;
            the error between the two, relative to the merged Δ; and what that makes for the whole model.
``merge``   ``isomerge run`` of the adapters, full checkpoint out and adapter out, as whole processes, with peak memory.
``forward`` the merged adapter as PEFT loads it, against the merged checkpoint: logits in float32, relative to what the
            merge changes of them. At the full rank, and at half of it.

Needs 16 GB in --folder, 14 GB of memory and the extras peft and test. The dense default is timed once a shape where it
takes more than two seconds, else ``--rounds`` times; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import isomerge_fast as imf
from benchmarks.harness.checkpoints import llama_shapes, make_adapter, make_checkpoint
from benchmarks.harness.processes import merged
from isomerge_fast.bench.ceilings import device_name
from isomerge_fast.cli.render import brief, size
from isomerge_fast.methods import IsoC, IsoCTS, Method, as_deltas
from isomerge_fast.methods.factors import Factors, merge_factors

LLAMA_1B = llama_shapes(2048, 8192, 16, 128_256, kv=512, tied=True)
SMALL = llama_shapes(128, 384, 2, 512, kv=64, tied=True)
LONG_SECONDS = 2.0
MARKS = ("<!-- adapter figures -->", "<!-- end of adapter figures -->")


def seconds_of(action: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    """(the result, the median of so many calls, or the first where it is long)."""
    times: list[float] = []
    result = None
    while len(times) < rounds and (not times or times[0] < LONG_SECONDS):
        started = time.perf_counter()
        result = action()
        times.append(time.perf_counter() - started)
    return result, statistics.median(times)


def solve(method: Method, shape: tuple[int, int], adapters: int, rank: int, rounds: int) -> dict[str, Any]:
    """Of one matrix, what is read from the adapters at hand in either form."""
    generator = torch.Generator().manual_seed(sum(shape))
    factors = [
        Factors(
            0.02 * torch.randn(shape[0], rank, generator=generator),
            torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5,
        )
        for _ in range(adapters)
    ]
    deltas = as_deltas([factor.left @ factor.right for factor in factors])

    def by_factors() -> tuple[Tensor, Tensor]:
        merged, _ = merge_factors(method, factors, shape)
        return merged.left, merged.right

    by_factors()
    (left, right), ours = seconds_of(by_factors, 4 * rounds)
    (value, _), theirs = seconds_of(lambda: method.merge(deltas), rounds)
    error = torch.linalg.vector_norm(left @ right - value.double()) / torch.linalg.vector_norm(value)
    return {"seconds": ours, "dense_seconds": theirs, "ratio": theirs / ours, "error": float(error)}


def solves(shapes: dict[str, tuple[int, ...]], adapters: int, rank: int, rounds: int) -> Iterator[dict[str, Any]]:
    counts = Counter(shape for name, shape in shapes.items() if "_proj" in name)
    methods: tuple[Method, ...] = (IsoC(), IsoCTS())
    for method in methods:
        ours = theirs = 0.0
        for (rows, columns), count in counts.items():
            found = solve(method, (rows, columns), adapters, rank, rounds)
            ours, theirs = ours + count * found["seconds"], theirs + count * found["dense_seconds"]
            yield {"row": f"solve/{method.name}/{rows}x{columns}", **found}
        model = {"seconds": ours, "dense_seconds": theirs, "ratio": theirs / ours}
        yield {"row": f"solve/{method.name}/model", **model}


def merges(models: list[Path], root: Path, ranks: list[int]) -> Iterator[dict[str, Any]]:
    options = {"checkpoint": ("--dtype", "float32")}
    options |= {f"adapter-{rank}": ("--adapter-rank", str(rank)) for rank in ranks}
    for name, more in options.items():
        found = merged(models, root / name, *more)
        tensors = found["report"]["tensors"]
        lost = [tensor["truncation"] for tensor in tensors if "truncation" in tensor]
        yield {
            "row": f"merge/{name}",
            "seconds": found["seconds"],
            "peak_bytes": found["peak_bytes"],
            "tensor_seconds": sum(tensor["seconds"] for tensor in tensors),
            "uncertified": sum(not tensor.get("certified", True) for tensor in tensors),
            **({"truncation": max(lost)} if lost else {}),
        }


def forwards(base: Path, root: Path, ranks: list[int]) -> Iterator[dict[str, Any]]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model(torch.arange(2, 34)[None]).logits.double()

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    merged, origin = logits(load(root / "checkpoint")), logits(load(base))
    moved = torch.linalg.vector_norm(merged - origin)
    for rank in ranks:
        found = logits(PeftModel.from_pretrained(load(base), str(root / f"adapter-{rank}")))
        yield {
            "row": f"forward/adapter-{rank}",
            "error": float(torch.linalg.vector_norm(found - merged) / moved),
            "moved": float(moved / torch.linalg.vector_norm(origin)),
        }


def markdown(result: dict[str, Any]) -> str:
    """The figures as people read them."""
    rows = {row["row"]: row for row in result["rows"]}
    lines = ["| | in factor space | dense default | times as fast | error between the two |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if name.startswith("solve/"):
            _, method, shape = name.split("/")
            what = "all projections of the model" if shape == "model" else shape
            figures = [brief(row["seconds"]), brief(row["dense_seconds"]), f"{row['ratio']:.0f}"]
            figures.append(f"{row['error']:.1e}" if "error" in row else "")
            lines.append(f"| {method}, {what} | {' | '.join(figures)} |")
    heads = ["", "seconds", "peak memory", "left out of Δ", "logits off, of what the merge changes of them"]
    lines += ["", f"| {' | '.join(heads)} |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if name.startswith("merge/"):
            kind = name.removeprefix("merge/")
            off = rows.get(f"forward/{kind}", {}).get("error")
            lost = f"{row['truncation']:.1e}" if "truncation" in row else ""
            figures = [f"{row['seconds']:.1f}", size(row["peak_bytes"]), lost, "" if off is None else f"{off:.1e}"]
            lines.append(f"| {kind} out | {' | '.join(figures)} |")
    return "\n".join(lines)


def write_table(path: Path, result: dict[str, Any]) -> None:
    begin, end = MARKS
    text = path.read_text()
    start = text.index(begin) + len(begin)
    path.write_text(f"{text[:start]}\n{markdown(result)}\n{text[text.index(end) :]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for checkpoints and outputs; a temporary one when left out")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="a result file; nothing is measured")
    parser.add_argument("--write", type=Path, help="with --table: a page with marks")
    given = parser.parse_args()
    if given.table:
        result = json.loads(given.table.read_text())
        print(markdown(result))
        if given.write:
            write_table(given.write, result)
        return
    shapes = SMALL if given.small else LLAMA_1B
    full = min(given.adapters * given.rank, min(min(shape) for name, shape in shapes.items() if "_proj" in name))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = given.folder or Path(temporary)
        base = make_checkpoint(root / "base", shapes, 0)
        experts = [
            make_adapter(root / f"adapter-of-task-{seed}", base, shapes, given.rank, seed)
            for seed in range(given.adapters)
        ]
        ranks = [full, full // 2]
        makers = (
            solves(shapes, given.adapters, given.rank, given.rounds),
            merges([base, *experts], root, ranks),
            forwards(base, root, ranks),
        )
        for row in (row for maker in makers for row in maker):
            rows.append(row)
            words = (f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
            print(", ".join(words), flush=True)
    if given.out:
        result = {
            "device": device_name(torch.device("cpu")),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "isomerge_fast": imf.__version__,
            "adapters": given.adapters,
            "rank": given.rank,
            "rows": rows,
        }
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
