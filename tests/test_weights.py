"""Weights of experts: w_t multiplies Δ_t, whatever the method, the route and the form of the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import isomerge_fast as imf
import oracle
from checkpoints import load_folder, make_family, save_folder
from isomerge_fast.config import load_config
from isomerge_fast.execution.verify import verify
from isomerge_fast.methods import RowBlock
from isomerge_fast.planning.budget import PROCESS_BYTES
from isomerge_fast.planning.planner import make_plan

MB = 10**6
RULES: list[Any] = [0.5, [{"match": "layers.0.*", "weight": -1.5}, {"match": "*up*", "weight": 0.25}], 2]
# Those that a tall matrix may go.
ROUTES = {
    "iso-c": {"resident", "by-rows"},
    "iso-cts": {"resident", "streamed", "by-rows"},
    "mean": {"by-rows"},
    "task-arithmetic": {"by-rows"},
}
METHODS = list(ROUTES)


def weights_by_name(name: str) -> list[float]:
    """What ``RULES`` say."""
    second = -1.5 if name.startswith("layers.0.") else 0.25 if "up" in name else 1.0
    return [0.5, second, 2.0]


def expected(base: np.ndarray, experts: list[np.ndarray], weights: list[float], method: str, name: str) -> np.ndarray:
    moved = [base + weight * (expert - base) for weight, expert in zip(weights, experts, strict=True)]
    return oracle.merge_tensor(name, base, moved, method=method, scaling=0.7)


@pytest.mark.parametrize("are_deltas", [False, True], ids=["checkpoints", "deltas"])
@pytest.mark.parametrize("normalize", [False, True], ids=["as-given", "normalized"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_multiply_the_deltas(tmp_path: Path, method: str, normalize: bool, are_deltas: bool) -> None:
    base_folder, folders = make_family(tmp_path)
    base, experts = load_folder(base_folder), [load_folder(folder) for folder in folders]
    if are_deltas:
        folders = [
            save_folder(
                tmp_path / f"delta{task}",
                {name: value - base[name] for name, value in expert.items() if value.is_floating_point()},
            )
            for task, expert in enumerate(experts)
        ]
    out = tmp_path / "out"
    config = {"base": base_folder, "experts": folders, "method": method, "scaling": 0.7, "weights": RULES, "out": out}
    imf.merge({**config, "normalize_weights": normalize, "experts_are_deltas": are_deltas})
    merged = load_folder(out)
    for name, tensor in base.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        weights = weights_by_name(name)
        if normalize:
            weights = [weight / sum(weights) for weight in weights]
        arrays = [expert[name].double().numpy() for expert in experts]
        judge = expected(tensor.double().numpy(), arrays, weights, method, name)
        moved = np.linalg.norm(judge - tensor.double().numpy())
        allowed = 2e-7 * np.linalg.norm(judge) + 1e-5 * moved
        assert np.linalg.norm(merged[name].double().numpy() - judge) <= allowed, name
    assert len(verify(out, samples=8).recomputed) == 7


@pytest.mark.parametrize("are_deltas", [False, True], ids=["checkpoints", "deltas"])
@pytest.mark.parametrize("method", METHODS)
def test_every_route_weighs_alike(tmp_path: Path, method: str, are_deltas: bool) -> None:
    """Tall enough that under a ceiling the copies are read part by part, and Iso-C goes by rows."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(9000, 64, generator=generator)}
    deltas = [0.1 * torch.randn(9000, 64, generator=generator) for _ in range(3)]
    folders = [
        save_folder(tmp_path / str(task), {"w": delta if are_deltas else base["w"] + delta})
        for task, delta in enumerate(deltas)
    ]
    family: dict[str, Any] = {"base": save_folder(tmp_path / "base", base), "experts": folders, "method": method}
    family["experts_are_deltas"] = are_deltas
    weights = [0.5, 1.5, -1.0]
    config = load_config({**family, "weights": weights})
    possible = range(PROCESS_BYTES, PROCESS_BYTES + 60 * MB, MB)
    ceilings = {make_plan(config, max_ram=size).tensors[0].route.name: size for size in possible}
    routes, results = set(), []
    for route, ceiling in {**ceilings, "unlimited": None}.items():
        if ceiling is not None and make_plan(config, max_ram=ceiling).peak_ram_bytes > ceiling:
            continue
        out = tmp_path / f"out-{route}"
        report = imf.merge({**family, "weights": weights, "out": out}, max_ram=ceiling)
        routes.add(report.tensors[0]["route"])
        results.append(load_folder(out)["w"].double().numpy())
        # What the report says of every task is of its weighted delta.
        norms = [abs(weight) * 0.1 * (9000 * 64) ** 0.5 for weight in weights]
        assert report.tensors[0]["delta_norms"] == pytest.approx(norms, rel=0.02)
    assert routes == ROUTES[method]
    origin = base["w"].double().numpy()
    moved = [origin + weight * delta.double().numpy() for weight, delta in zip(weights, deltas, strict=True)]
    judge = oracle.merge_tensor("w", origin, moved, method=method, scaling=1.0)
    for found in results:
        assert np.linalg.norm(found - judge) <= 2e-7 * np.linalg.norm(judge)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too-few": ({"weights": [1.0]}, "weights has 1 entries for 3 experts"),
    "not-finite": ({"weights": [1.0, 2.0, float("inf")]}, r"weights\[2\] is inf; expected a finite number"),
    "rule-not-finite": (
        {"weights": [1.0, 1.0, [{"match": "*", "weight": float("nan")}]]},
        r"weights\[2\]\[0\].weight is nan",
    ),
    "unknown-key": (
        {"weights": [1.0, [{"mach": "*", "weight": 1.0}], 1.0]},
        r"weights\[1\]\[0\]: unknown key 'mach' \(did you mean 'match'",
    ),
    "no-number": ({"weights": ["much", 1.0, 1.0]}, "weights"),
    "cancel": ({"weights": [1.0, -1.0, 0.0], "normalize_weights": True}, "normalize_weights: .*'conv.weight'.* 0"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_weights_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    base, experts = make_family(tmp_path)
    with pytest.raises(imf.ConfigError, match=message):
        imf.merge({"base": base, "experts": experts, "out": tmp_path / "out", **changes})
    assert not (tmp_path / "out").exists()


def test_the_card_says_them(tmp_path: Path) -> None:
    base, experts = make_family(tmp_path)
    imf.merge({"base": base, "experts": experts, "weights": RULES, "out": tmp_path / "out"})
    recipe = (tmp_path / "out" / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "again.yml"
    path.write_text(recipe.replace("out: merged", f"out: {tmp_path / 'again'}"))
    imf.merge(path)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_a_block_leaves_its_experts_as_they_are() -> None:
    experts = [torch.ones(4, 3), torch.full((4, 3), 2.0)]
    block = RowBlock(slice(0, 4), experts, torch.zeros(4, 3), are_deltas=True, weights=[2.0, -3.0])
    for _ in range(2):
        assert torch.equal(block.delta(1, torch.float32), torch.full((4, 3), -6.0))
        assert torch.equal(block.sum(torch.float64).total, torch.full((4, 3), -4.0, dtype=torch.float64))
