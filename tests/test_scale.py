"""Plans of models with billions of parameters, from checkpoints of which only the headers exist."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import shapes as model_shapes
from benchmarks.harness.checkpoints import save_headers
from benchmarks.shapes import qwen3_moe
from isomerge_fast.config import MergeConfig
from isomerge_fast.errors import ResourceError
from isomerge_fast.planning.budget import PROCESS_BYTES
from isomerge_fast.planning.cost import estimate_seconds
from isomerge_fast.planning.planner import METADATA_IN_BASELINE_BYTES, make_plan
from isomerge_fast.planning.resources import check_resources
from isomerge_kernels import devices
from planned_models import config_of, glm4_moe
from pretend_gpu import H100

# Experts merged, billions of parameters: as published; of GLM-4.5 as stored, with its layer for multi-token prediction.
MODELS: dict[str, tuple[int, float]] = {
    "llama-3-8b": (4, 8.03),
    "llama-3-70b": (8, 70.55),
    "qwen3-30b-a3b": (2, 30.53),
    "glm-4.5": (2, 358.34),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_plan_of_headers_alone_has_the_right_totals(tmp_path: Path, model: str) -> None:
    shapes, (tasks, billions) = (model_shapes.MODELS | {"glm-4.5": glm4_moe})[model](), MODELS[model]
    elements = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert sum(elements.values()) / 1e9 == pytest.approx(billions, abs=0.005)
    config = config_of(tmp_path, shapes, tasks, method="iso-c", out=None)
    started = time.process_time()
    plan = make_plan(config)
    seconds = estimate_seconds(plan)
    took = time.process_time() - started
    print(f"{model}: {len(shapes)} tensors x {tasks + 1} checkpoints planned in {took:.1f} s; {seconds}")
    assert took < 30
    assert [tensor.name for tensor in plan.tensors if tensor.action == "iso-c"] == [
        tensor.name for tensor in plan.tensors if len(shapes[tensor.name]) == 2
    ]
    assert plan.write_bytes == 2 * sum(elements.values())
    assert plan.read_bytes == (tasks + 1) * plan.write_bytes
    assert seconds["read"] == plan.passed_bytes / 1e9
    # Products of an iteration, at least: 2 M N r a matrix and step.
    matrices = [(shape, elements[name]) for name, shape in shapes.items() if len(shape) == 2]
    assert sum(tensor.flops for tensor in plan.tensors) > sum(2 * count * min(shape) for shape, count in matrices)
    # The table stands or falls by itself: what is promised is the largest tensor beside what is read ahead.
    largest = max(plan.tensors, key=lambda tensor: tensor.route.work_bytes)
    assert plan.peak_ram_bytes - plan.host_buffer_bytes == largest.route.work_bytes
    assert largest.name in ("model.embed_tokens.weight", "lm_head.weight")


def calls_of_a_plan(config: MergeConfig) -> int:
    """Python functions entered and left: what does not depend on the machine."""
    count = 0

    def count_calls(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += 1

    sys.setprofile(count_calls)
    try:
        make_plan(config)
    finally:
        sys.setprofile(None)
    return count


def test_planning_grows_no_faster_than_the_number_of_tensors(tmp_path: Path) -> None:
    counts = []
    for experts in (8, 16):
        root = tmp_path / str(experts)
        root.mkdir()
        counts.append(calls_of_a_plan(config_of(root, qwen3_moe(experts=experts), 2, method="iso-cts")))
    assert counts[1] <= 2.1 * counts[0]


@pytest.mark.parametrize("method", ["mean", "iso-c", "iso-cts"])
@pytest.mark.parametrize("ceiling", ["max_ram", "max_vram"])
def test_a_ceiling_that_is_too_low_is_refused_with_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, ceiling: str
) -> None:
    monkeypatch.setitem(devices.KNOWN, torch.device("cuda"), H100)  # which decides between solvers
    config = config_of(tmp_path, model_shapes.MODELS["llama-3-8b"](), 2, method=method)
    device = torch.device("cuda" if ceiling == "max_vram" else "cpu")
    limits: dict[str, Any] = {"max_ram": None, "max_vram": None, ceiling: 5_000_000}
    with pytest.raises(ResourceError, match="the smallest that would do is") as refused:
        check_resources(make_plan(config, device, **limits), device=device, **limits)
    assert re.search("tensor '(model|lm_head)", str(refused.value))
    found = re.search(r"that would do is (\d+)", str(refused.value))
    assert found
    limits[ceiling] = int(found[1])
    plan = make_plan(config, device, **limits)
    check_resources(plan, device=device, **limits)
    # And what it names is the smallest.
    limits[ceiling] = int(found[1]) - 1_000_000
    with pytest.raises(ResourceError):
        check_resources(make_plan(config, device, **limits), device=device, **limits)


def test_what_is_held_of_many_tensors_counts_under_a_ceiling(tmp_path: Path) -> None:
    """4,000 of two experts, 14 MB in all: nothing to the weights, which are 64 kB a checkpoint."""
    shapes: model_shapes.Shapes = {f"experts.{index}.weight": (8,) for index in range(4_000)}
    config = config_of(tmp_path, shapes, 2, method="mean")
    plan = make_plan(config)
    assert 3_000 * len(shapes) < plan.metadata_bytes + METADATA_IN_BASELINE_BYTES < 4_000 * len(shapes)
    limits: dict[str, Any] = {"max_ram": PROCESS_BYTES + plan.metadata_bytes, "max_vram": None}
    with pytest.raises(
        ResourceError, match=f"held of 4000 tensors beside their bytes {plan.metadata_bytes}"
    ) as refused:
        check_resources(make_plan(config, **limits), device=torch.device("cpu"), **limits)
    found = re.search(r"that would do is (\d+)", str(refused.value))
    assert found
    limits["max_ram"] = int(found[1])
    check_resources(make_plan(config, **limits), device=torch.device("cpu"), **limits)


def test_the_command_line_plans_without_a_weight(tmp_path: Path) -> None:
    base, expert = (save_headers(tmp_path / name, model_shapes.MODELS["llama-3-8b"]()) for name in ("base", "expert"))
    command = [sys.executable, "-m", "isomerge_fast.cli", "plan", "--base", str(base), "--expert", str(expert)]
    human = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "model.layers.{0..31}.mlp.down_proj.weight" in human
    refused = subprocess.run([*command, "--max-ram", "500MB"], capture_output=True, text=True)
    assert refused.returncode == 4
    assert "the smallest that would do is" in refused.stderr
