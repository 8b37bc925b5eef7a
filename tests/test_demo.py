"""The demo in small: three tasks, a few dozen steps. The figures of its full size are not asserted anywhere."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import oracle

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from isomerge_fast.demo import DemoResult, run_demo
from isomerge_fast.demo.model import DigitsNetwork, accuracies, initial, load_state
from isomerge_fast.demo.picture import singular_values
from isomerge_fast.demo.run import METHODS, PICTURED_LAYERS
from isomerge_fast.demo.tasks import TRANSFORMS, TaskSuite, load_tasks
from isomerge_fast.errors import ConfigError
from isomerge_fast.linalg.auto import TOLERANCES
from isomerge_fast.methods import as_deltas, make_method

N_TASKS = 3


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, told: list[str]) -> DemoResult:
    out = tmp_path_factory.mktemp("demo")
    return run_demo(out, n_tasks=N_TASKS, base_steps=25, expert_steps=60, say=told.append)


@pytest.fixture(scope="module")
def suite(result: DemoResult) -> TaskSuite:
    return load_tasks(N_TASKS, DigitsNetwork.load(result.out / "base").config["width"], result.seed)  # type: ignore[arg-type]


def test_table_is_complete(result: DemoResult, told: list[str]) -> None:
    assert [row.method or row.name for row in result.rows] == ["base", "experts", *METHODS]
    for row in result.rows:
        assert 0 < row.test <= 1
        assert 0 < row.validation <= 1
        assert set(row.test_by_task) == set(result.tasks)
        assert row.name in result.table()
    for method, (_, scalings) in METHODS.items():
        row = result.row(method)
        assert tuple(scaling for scaling, _ in row.validation_by_scaling) == scalings
        assert row.validation == max(validation for _, validation in row.validation_by_scaling)
    assert result.row("experts").normalised == 1
    assert result.table() in told


def test_merges_beat_the_base(result: DemoResult) -> None:
    base = result.row("base").test
    assert result.row("experts").test > base
    for method in METHODS:
        assert result.row(method).test > base, method


def test_folders_are_checkpoints_that_score_as_reported(result: DemoResult, suite: TaskSuite) -> None:
    heads = load_file(result.out / "heads.safetensors")
    for task, name in enumerate(result.tasks):
        assert torch.equal(heads[name], suite.heads[task])
        expert = DigitsNetwork.load(result.out / "experts" / name)
        score = accuracies(expert, suite.test, suite.heads)
        assert score[task] == pytest.approx(result.row("experts").test_by_task[name])
    for name in ("base", *METHODS):
        row = result.row(name)
        score = accuracies(DigitsNetwork.load(result.out / row.folder), suite.test, suite.heads)
        assert score == pytest.approx(tuple(row.test_by_task.values()))


def test_files_hold_the_formulas(result: DemoResult) -> None:
    """The mean is the experts' mean, the sum their sum, and Iso-C levels its singular values at their mean."""
    base = load_state(result.out / "base")
    experts = [load_state(result.out / "experts" / name) for name in result.tasks]
    merged = {name: load_state(result.out / result.row(name).folder) for name in METHODS}
    for name in base:
        torch.testing.assert_close(merged["mean"][name], torch.stack([e[name] for e in experts]).mean(0))
    for layer in PICTURED_LAYERS:
        total = sum((expert[layer].double() - base[layer].double() for expert in experts), torch.zeros(()))
        before = singular_values(base[layer], merged["task-arithmetic"][layer], _scaling(result, "task-arithmetic"))
        torch.testing.assert_close(before, torch.linalg.svdvals(total), rtol=1e-4, atol=1e-4)
        after = singular_values(base[layer], merged["iso-c"][layer], _scaling(result, "iso-c"))
        torch.testing.assert_close(after, before.mean().expand_as(after), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
def test_tiers_keep_their_promises_on_the_experts(result: DemoResult, method: str) -> None:
    """Real deltas, of every matrix of the demo's network."""
    base = load_state(result.out / "base")
    experts = [load_state(result.out / "experts" / name) for name in result.tasks]
    for name in (name for name, tensor in base.items() if tensor.ndim == 2):
        deltas = [expert[name] - base[name] for expert in experts]
        exact = [delta.double().numpy() for delta in deltas]
        judge = {"iso-c": oracle.iso_c, "iso-cts": oracle.iso_cts}[method](exact)
        for precision, promise in TOLERANCES.items():
            value, stats = make_method(method, {"precision": precision}).merge(as_deltas(deltas))
            assert oracle.relative_error(value.numpy(), judge) <= promise, (name, precision, stats.to_dict())
            assert stats.to_dict()["certified"], (name, precision, stats.to_dict())


def _scaling(result: DemoResult, method: str) -> float:
    scaling = result.row(method).scaling
    assert scaling is not None
    return scaling


def test_picture_and_json(result: DemoResult) -> None:
    png = result.picture.read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert 20_000 < len(png) < 1_000_000
    assert (
        min(int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) > 400
    )  # pixels: IHDR's width, height
    written = json.loads((result.out / "demo.json").read_text())
    assert written == result.to_dict()


def test_same_seed_same_weights(result: DemoResult, tmp_path: Path) -> None:
    """Training repeats to the byte, and leaves the caller's random numbers alone."""
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    again = run_demo(tmp_path, n_tasks=N_TASKS, base_steps=25, expert_steps=60, say=lambda _: None)
    assert torch.equal(torch.get_rng_state(), state)
    for folder in ("base", *(f"experts/{name}" for name in result.tasks)):
        ours, theirs = (root / folder / "model.safetensors" for root in (again.out, result.out))
        assert ours.read_bytes() == theirs.read_bytes(), folder
    assert [row.test for row in again.rows] == [row.test for row in result.rows]


def test_seed_changes_the_start() -> None:
    first, second = (initial(lambda: DigitsNetwork(16, 1), seed).stem.weight for seed in (0, 1))
    assert not torch.equal(first, second)


def test_tasks(suite: TaskSuite) -> None:
    assert len(suite.train.labels) + len(suite.validation.labels) + len(suite.test.labels) == 1797
    gram = suite.heads @ suite.heads.mT
    torch.testing.assert_close(gram, torch.eye(10).expand_as(gram), rtol=0, atol=1e-5)
    image = torch.rand(1, 8, 8)
    views = [transform(image) for transform in TRANSFORMS.values()]
    assert all(view.shape == image.shape for view in views)
    assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


@pytest.mark.parametrize("n_tasks", [1, len(TRANSFORMS) + 1])
def test_number_of_tasks_out_of_range(n_tasks: int) -> None:
    with pytest.raises(ConfigError, match=rf"n_tasks.*{n_tasks}"):
        load_tasks(n_tasks, 16, 0)


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_missing_extra_is_named_before_any_work(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'isomerge-fast[demo]'")):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()
