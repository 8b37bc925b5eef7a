"""Time LoRA adapters merged in factor space, beside the dense default on the same deltas.

    python -m benchmarks.adapters [--folder DIR] [--rows solve,merge,forward] [--small] [--out JSON]
    python -m benchmarks.adapters --table JSON --write PAGE     its table into a page, between the marks there

``solve``   one matrix of each shape, the factors at hand, against the dense default with all Δ_t at hand in float32;
            the error between the two, relative to the merged Δ; and what that makes for the whole model.
``merge``   ``isomerge run`` of the adapters, full checkpoint out and adapter out, as whole processes, with peak memory.
``forward`` the merged adapter as PEFT loads it, against the merged checkpoint: logits in float32, relative to what the
            merge changes of them. At the full rank, and at half of it. It loads what ``merge`` wrote.

Needs 16 GB in --folder, 14 GB of memory and the extras peft and test. What takes more than two seconds is timed once,
all else up to ten times; medians.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import scripts
from benchmarks.harness.checkpoints import make_adapter, make_checkpoint
from benchmarks.harness.markdown import table, write_between
from benchmarks.harness.processes import merged
from benchmarks.shapes import MODELS, Shapes, llama
from isomerge_fast.bench.ceilings import result_and_seconds
from isomerge_fast.bench.problems import relative_error
from isomerge_fast.cli.render import brief, size
from isomerge_fast.methods import IsoC, IsoCTS, Method, as_deltas
from isomerge_fast.methods.factors import Factors, merge_factors

ADAPTERS, RANK = 8, 16
SMALL = llama(128, 384, 2, 512, kv=64, tied=True)
LONG_SECONDS = 2.0
MARKS = ("<!-- adapter figures -->", "<!-- end of adapter figures -->")
CPU = torch.device("cpu")


def shapes_of(small: bool) -> Shapes:
    return SMALL if small else MODELS["llama-3.2-1b"]()


def ranks_of(small: bool) -> tuple[int, int]:
    """Return the rank that holds all of the merged Δ, and half of it."""
    shortest = min(min(shape) for name, shape in shapes_of(small).items() if "_proj" in name)
    full = min(ADAPTERS * RANK, shortest)
    return full, full // 2


def solve_one(method: Method, shape: tuple[int, ...]) -> dict[str, float]:
    """Time one matrix, with what is read from the adapters at hand in either form."""
    generator = torch.Generator().manual_seed(sum(shape))
    factors = [
        Factors(
            0.02 * torch.randn(shape[0], RANK, generator=generator),
            torch.randn(RANK, shape[1], generator=generator) / shape[1] ** 0.5,
        )
        for _ in range(ADAPTERS)
    ]
    deltas = as_deltas([factor.left @ factor.right for factor in factors])
    by_factors = partial(merge_factors, method, factors, (shape[0], shape[1]))
    by_factors()
    (merged, _), ours = result_and_seconds(by_factors, CPU, LONG_SECONDS)
    (value, _), theirs = result_and_seconds(partial(method.merge, deltas), CPU, LONG_SECONDS)
    error = relative_error(merged.left @ merged.right, value.double())
    return {"seconds": ours, "dense_seconds": theirs, "ratio": theirs / ours, "error": error}


def solve(root: Path, small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Time one matrix of each shape, and add them up for the model."""
    counts = Counter(shape for name, shape in shapes_of(small).items() if "_proj" in name)
    methods: Sequence[Method] = (IsoC(), IsoCTS())
    for method in methods:
        ours = theirs = 0.0
        for shape, count in counts.items():
            found = solve_one(method, shape)
            ours, theirs = ours + count * found["seconds"], theirs + count * found["dense_seconds"]
            yield f"{method.name}/{shape[0]}x{shape[1]}", found
        yield f"{method.name}/model", {"seconds": ours, "dense_seconds": theirs, "ratio": theirs / ours}


def merge(root: Path, small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Merge adapters to a checkpoint, and to adapters of the ranks of ``ranks_of``; yield (name, values of its row)."""
    shapes = shapes_of(small)
    base = make_checkpoint(root / "base", shapes, 0)
    experts = [make_adapter(root / f"adapter-of-task-{seed}", base, shapes, RANK, seed) for seed in range(ADAPTERS)]
    options = {"checkpoint": ("--dtype", "float32")}
    options |= {f"adapter-{rank}": ("--adapter-rank", str(rank)) for rank in ranks_of(small)}
    for name, more in options.items():
        found = merged([base, *experts], root / name, *more)
        tensors = found["report"]["tensors"]
        lost = [tensor["truncation"] for tensor in tensors if "truncation" in tensor]
        values = {key: found[key] for key in ("seconds", "peak_bytes")}
        values["tensor_seconds"] = sum(tensor["seconds"] for tensor in tensors)
        values["uncertified"] = sum(not tensor.get("certified", True) for tensor in tensors)
        yield name, values | ({"truncation": max(lost)} if lost else {})


def forward(root: Path, small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compare the logits of the merged adapters to those of the merged checkpoint."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model(torch.arange(2, 34)[None]).logits.double()

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32).eval()

    merged, base = logits(load("checkpoint")), logits(load("base"))
    moved = torch.linalg.vector_norm(merged - base)
    for rank in ranks_of(small):
        found = logits(PeftModel.from_pretrained(load("base"), str(root / f"adapter-{rank}")))
        error = float(torch.linalg.vector_norm(found - merged) / moved)
        yield f"adapter-{rank}", {"error": error, "moved": float(moved / torch.linalg.vector_norm(base))}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the two tables of docs/peft.md."""
    by_stage: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_stage.setdefault(row["stage"], {})[row["name"]] = row

    def solved(name: str, row: Mapping[str, Any]) -> list[str]:
        label = name.replace("/", ", ").replace("model", "all projections of the model")
        error = f"{row['error']:.1e}" if "error" in row else ""
        return [label, brief(row["seconds"]), brief(row["dense_seconds"]), f"{row['ratio']:.0f}", error]

    def written(name: str, row: Mapping[str, Any]) -> list[str]:
        lost = f"{row['truncation']:.1e}" if "truncation" in row else ""
        off = by_stage.get("forward", {}).get(name)
        figures = [f"{row['seconds']:.1f}", size(row["peak_bytes"]), lost, f"{off['error']:.1e}" if off else ""]
        return [f"{name} out", *figures]

    head = ("", "in factor space", "dense default", "times as fast", "error between the two")
    first = table(head, [solved(*item) for item in by_stage.get("solve", {}).items()])
    head = ("", "seconds", "peak memory", "left out of Δ", "logits off, of what the merge changes of them")
    second = table(head, [written(*item) for item in by_stage.get("merge", {}).items()])
    return f"{first}\n\n{second}"


STAGES: dict[str, scripts.Stage] = {"solve": solve, "merge": merge, "forward": forward}


def main() -> None:
    parser = scripts.parser(__doc__, STAGES, "solve,merge,forward")
    parser.add_argument("--table", type=Path, help="a result file; nothing is measured")
    parser.add_argument("--write", type=Path, help="with --table: a page with marks")
    options = parser.parse_args()
    if not options.table:
        scripts.run(STAGES, options)
        return
    text = markdown(json.loads(options.table.read_text())["rows"])
    print(text)
    if options.write:
        write_between(options.write, MARKS, text)


if __name__ == "__main__":
    main()
