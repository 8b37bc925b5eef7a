"""Record what merges give, byte for byte, and compare two recordings, so that a change of the code shows what it moved.

    python tests/support/record_outputs.py record OUT.json [--only SUBSTRING]
    python tests/support/record_outputs.py compare A.json B.json [--close memory/]

Everything goes through public names and the command line, so the same file runs with any version: ``python`` decides
which package is recorded. Beside OUT.json lies OUT.json.pt with the tensors of the cases in memory, by which
``compare --close`` tells how far apart they are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import isomerge_fast as imf
from recorded_cases import EXPECTED_ROUTES, Cases, cases
from recorded_texts import fingerprint

# Relative difference of tensors, ‖A − B‖/‖A‖, up to which ``--close`` takes them for the same.
CLOSE = 1e-6
# Of a narrower dtype, numbers that were rounded to the neighbour: up to this share of a tensor.
ROUNDED_SHARE = 0.01
SHOWN_CHARACTERS = 160


def main() -> int:
    """Run one of the two commands; return the exit code."""
    parser = argparse.ArgumentParser(description="Record what merges give, and compare two recordings.")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--only", default="", help="cases whose name holds this")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--close", default=None, metavar="PREFIX", help="cases whose tensors may differ by 1e-6")
    given = parser.parse_args()
    if given.command == "compare":
        return compare(given.before, given.after, given.close)
    if os.environ.get("OMP_NUM_THREADS") != "1":  # is read when torch is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    return record(given.out.absolute(), given.only)


# --------------------------------------------------------------------------------------------------------------- record


def record(out: Path, only: str) -> int:
    """Write a recording; return 1 where a case failed or a route was not met."""
    print(f"recording {Path(imf.__file__).parent} with torch {torch.__version__}", flush=True)
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="recording-") as work:
        os.chdir(work)
        found, tensors, failed = _run(cases(Path(work)), only)
        os.chdir(out.parent)
    if not only:
        failed += _missing_routes(found)
    out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    torch.save(tensors, tensors_of(out))
    kinds = Counter(name.split("/")[0] for name in found)
    print(f"{len(found)} cases ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})")
    print(f"routes: {json.dumps(_routes(found), sort_keys=True)}")
    print(f"algorithms: {json.dumps(_algorithms(found), sort_keys=True)}")
    print(f"{time.perf_counter() - started:.0f} s")
    for line in failed:
        print(f"FAILED {line}")
    return int(bool(failed))


def _run(planned: Cases, only: str) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Return what was recorded, tensors by case and item, and what failed."""
    found: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    failed: list[str] = []
    spent: dict[str, float] = {}
    for name, action in planned:
        if only not in name:
            continue
        started = time.perf_counter()
        if name in found:
            failed.append(f"{name}: is there twice")
        try:
            result = action()
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
            result = {"failed": type(error).__name__}
        own = {item: value for item, value in result.items() if isinstance(value, Tensor)}
        tensors |= {f"{name}: {item}": value for item, value in own.items()}
        found[name] = {**result, **{item: fingerprint(value) for item, value in own.items()}}
        seconds = time.perf_counter() - started
        kind = name.split("/")[0]
        spent[kind] = spent.get(kind, 0.0) + seconds
        if seconds > 3:
            print(f"  {name}: {seconds:.1f} s", flush=True)
    print("seconds: " + ", ".join(f"{kind} {seconds:.0f}" for kind, seconds in spent.items()))
    return found, tensors, failed


def _reports(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the entries of all tensors in all reports of merges of files."""
    for case in found.values():
        for item, value in case.items():
            if item.endswith("report.json") and isinstance(value, dict):
                yield from value["tensors"]


def _routes(found: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return how many tensors went by which route, by method."""
    routes: dict[str, Counter[str]] = {}
    for tensor in _reports(found):
        routes.setdefault(tensor["action"], Counter())[tensor["route"]] += 1
    return {method: dict(counts) for method, counts in routes.items()}


def _algorithms(found: dict[str, Any]) -> dict[str, int]:
    """Return how many tensors were merged by which algorithm."""
    return dict(Counter(tensor["algorithm"] for tensor in _reports(found)))


def _missing_routes(found: dict[str, Any]) -> list[str]:
    """Return what should have been met and was not."""
    met = _routes(found)
    return [
        f"no tensor of {method} went by {route}"
        for method, routes in EXPECTED_ROUTES.items()
        for route in routes
        if route not in met.get(method, {})
    ]


def tensors_of(path: Path) -> Path:
    """Return where the tensors of a recording lie."""
    return path.with_name(path.name + ".pt")


# -------------------------------------------------------------------------------------------------------------- compare


def compare(before: Path, after: Path, close: str | None) -> int:
    """Print every difference of two recordings; return 1 where there is one that is not close enough."""
    left, right = (json.loads(path.read_text()) for path in (before, after))
    differences = [(name, line) for name in sorted({*left, *right}) for line in _case_differences(name, left, right)]
    accepted = 0
    if close is not None:
        tensors = [torch.load(tensors_of(path)) for path in (before, after)]
        differences, accepted = _without_close(differences, close, *tensors)
    for name, (item, line) in differences:
        print(f"{name}: {item}: {line}")
    cases_differ = len({name for name, _ in differences})
    print(f"{len({*left, *right})} cases, {cases_differ} of them differ, {len(differences)} differences")
    if close is not None:
        print(f"of {close}: {accepted} tensors differ by no more than {CLOSE:g} of their norm, or in the last place")
    return int(bool(differences))


def _case_differences(name: str, left: dict[str, Any], right: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (item, what differs) of one case."""
    if name not in left or name not in right:
        yield "", f"only in the {'second' if name in right else 'first'} recording"
        return
    for item in sorted({*left[name], *right[name]}):
        for line in _value_differences(left[name].get(item), right[name].get(item)):
            yield item, line


def _value_differences(left: Any, right: Any, place: str = "") -> Iterator[str]:
    """Yield what differs in two values of JSON, with the place in them."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted({*left, *right}):
            yield from _value_differences(left.get(key), right.get(key), f"{place}.{key}")
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for index, pair in enumerate(zip(left, right, strict=True)):
            yield from _value_differences(*pair, f"{place}[{index}]")
    elif left != right or type(left) is not type(right):
        yield f"{place} {_shown(left)} -> {_shown(right)}".strip()


def _shown(value: Any) -> str:
    """Return a value as text of readable length."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}… ({len(text)} characters)"


def _without_close(
    differences: list[tuple[str, tuple[str, str]]], prefix: str, left: dict[str, Tensor], right: dict[str, Tensor]
) -> tuple[list[tuple[str, tuple[str, str]]], int]:
    """Return the differences that are left, and how many tensors differ by little."""
    kept = []
    accepted: set[str] = set()
    for name, (item, line) in differences:
        key = f"{name}: {item}"
        if name.startswith(prefix) and key in left and key in right:
            distance = _distance(left[key], right[key])
            if distance is None:
                accepted.add(key)
                continue
            line = f"{line} ({distance})"
        kept.append((name, (item, line)))
    return kept, len(accepted)


def _distance(left: Tensor, right: Tensor) -> str | None:
    """Return how far apart two tensors are; None where that is close enough."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return "another dtype or shape"
    if not left.is_floating_point():
        return "not of floats"
    difference = torch.linalg.vector_norm(left.double() - right.double())
    size = torch.linalg.vector_norm(left.double())
    relative = float(difference / size) if size else float(difference)
    if relative <= CLOSE:
        return None
    if left.dtype in (torch.bfloat16, torch.float16):
        steps = (left.view(torch.int16).int() - right.view(torch.int16).int()).abs()
        share = float((steps != 0).double().mean())
        if int(steps.max()) <= 1 and share <= max(ROUNDED_SHARE, 1 / left.numel()):
            return None
        return f"relative {relative:.2e}, {share:.2%} of the numbers, up to {int(steps.max())} steps"
    return f"relative {relative:.2e}"


if __name__ == "__main__":
    sys.exit(main())
