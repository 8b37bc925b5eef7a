"""``isomerge bench``: judged before timed, every tensor estimated once, nothing scaled in silence or left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import isomerge_fast as imf
from checkpoints import make_family, save_folder
from isomerge_fast.bench import ceilings, estimate, samples, short
from isomerge_fast.bench.ceilings import Ceilings
from isomerge_fast.bench.estimate import estimate_merge, group_plans
from isomerge_fast.bench.problems import deltas_like_fine_tuning
from isomerge_fast.bench.samples import method_at, sizes_of
from isomerge_fast.bench.short import Shape, measure_short
from isomerge_fast.cli.commands import app
from isomerge_fast.errors import VerificationError
from isomerge_fast.execution.engine import run
from isomerge_fast.execution.threads import OneCore
from isomerge_fast.linalg import auto
from isomerge_fast.methods import registry
from isomerge_fast.planning.plan import Plan
from isomerge_fast.planning.planner import make_plan
from pretend_gpu import CUDA, pretend_gpu
from stacked_methods import PLACES, InStacks

CPU = torch.device("cpu")
TINY = (Shape(48, 48, "square"), Shape(40, 80, "wide"), Shape(80, 40, "tall"), Shape(48, 48, "GPU", on_cpu=False))
PROMISED = 1e-5


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let shapes be small, ceilings known, and the disk be measured with files of 4 MiB: not what is tested here."""
    for name in ("SMALL_FILE_BYTES", "LARGE_FILE_BYTES"):
        monkeypatch.setattr(ceilings, name, 1 << 22)
    monkeypatch.setattr(short, "SHAPES", TINY)
    monkeypatch.setattr(short, "measure_ceilings", lambda device: Ceilings(1e10, 1e11, 5e10))


@pytest.fixture
def wide_family(tmp_path: Path) -> list[object]:
    """Options for three experts of a few matrices of two shapes, a vector, an integer and an empty tensor."""
    generator = torch.Generator().manual_seed(0)
    base: dict[str, torch.Tensor] = {f"{n}.up.weight": torch.randn(64, 128, generator=generator) for n in range(3)}
    base |= {"down.weight": torch.randn(128, 64, generator=generator), "text_projection": torch.ones(64, 128)}
    base |= {"norm": torch.ones(64), "scale": torch.ones(()), "ids": torch.arange(8), "empty": torch.zeros(0, 4)}
    base = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    folders = [save_folder(tmp_path / "in" / name, base) for name in ("base", "a", "b", "c")]
    return ["--base", folders[0], *(part for folder in folders[1:] for part in ("--expert", folder))]


def plan_of(options: list[object], **changes: Any) -> Plan:
    config = imf.MergeConfig(str(options[1]), [str(path) for path in options[3::2]], **changes)
    return make_plan(config)


def ticking(seconds: Callable[[Any], float]) -> Callable[[Callable[[], Any], torch.device], tuple[Any, float]]:
    """A timer that runs what it is given and answers ``seconds`` of it, whatever the machine does meanwhile."""
    return lambda function, device: (function(), seconds(function))


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_short_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every shape by both methods, ours at half the published seconds, each round a pair of its own."""
    turns: list[str] = []

    def timer(function: Any, device: torch.device) -> tuple[Any, float]:
        turns.append(function.__name__)
        return function(), 0.001 if function.__name__ == "run_ours" else 0.002 + 0.001 * (len(turns) <= 12)

    monkeypatch.setattr(short, "timed", timer)
    found = measure_short(CPU, tasks=3, folder=tmp_path)
    shapes = [(row["rows"], row["columns"]) for row in found["rows"]]
    assert shapes == [(48, 48), (48, 48), (40, 80), (40, 80), (80, 40), (80, 40)]
    assert [row["method"] for row in found["rows"]] == ["iso-c", "iso-cts"] * 3
    assert turns == ["run_ours", "run_published"] * (6 * short.ROUNDS)
    for row in found["rows"]:
        assert row["tasks"] == 3
        assert row["rounds"] == short.ROUNDS
        assert (row["seconds"], row["published_seconds"]) == (0.001, 0.002)
        assert row["ratio"] == pytest.approx(2)
        assert row["ratio_range"] == pytest.approx((2, 3))  # the first round's
        assert 0 < row["error"] <= row["bound"] == PROMISED
        assert 0 < row["published_error"] < 1e-2
    assert found["skipped"] == []
    assert found["disk"]["read_bytes_per_second"] > 0
    assert found["disk"]["write_bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
def test_wrong_arithmetic_is_never_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    """Even of the last method of the last shape: nothing has been timed when it is judged."""
    kind = {"iso-c": imf.IsoC, "iso-cts": imf.IsoCTS}[method]
    real = kind.merge

    def wrong(self: Any, deltas: Any) -> Any:
        value, stats = real(self, deltas)
        last = self.precision != "reference" and tuple(deltas.shape) == (80, 40)
        return value * (1.001 if last else 1.0), stats

    def timer(function: Any, device: torch.device) -> Any:
        raise AssertionError("timed before all was judged")

    monkeypatch.setattr(kind, "merge", wrong)
    monkeypatch.setattr(short, "timed", timer)
    with pytest.raises(VerificationError, match=rf"^{method} of 3 deltas 80 x 40 on cpu: error 1\.0e-03 .* 1e-05"):
        measure_short(CPU, tasks=3, folder=tmp_path)


def test_short_form_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first shape is measured whatever it takes, once; the others are named."""
    monkeypatch.setattr(short, "timed", ticking(lambda function: 0.001))
    found = measure_short(CPU, tasks=3, folder=tmp_path, budget_seconds=0)
    assert [(row["method"], row["rounds"]) for row in found["rows"]] == [("iso-c", 1)]
    assert len(found["skipped"]) == 5
    assert found["skipped"][0].startswith("iso-cts of 48 x 48 (square)")


def covered(found: dict[str, Any]) -> list[str]:
    return sorted(name for group in found["groups"] for name in group["tensors"])


@pytest.mark.parametrize("method", ["iso-c", "iso-cts", "mean", "task-arithmetic"])
def test_estimate_covers_the_plan_once(
    monkeypatch: pytest.MonkeyPatch, wide_family: list[object], tmp_path: Path, method: str
) -> None:
    monkeypatch.setattr(estimate, "timed", ticking(lambda function: 0.25))
    plan = plan_of(wide_family, method=method, scaling=[0.5, 1.0], save_delta=True)
    found = estimate_merge(plan, CPU, folder=tmp_path, budget_seconds=1000)
    assert covered(found) == sorted(tensor.name for tensor in plan.tensors)
    assert all(group["count"] == len(group["tensors"]) for group in found["groups"])
    by_name = {name: group for group in found["groups"] for name in group["tensors"]}
    for tensor in plan.tensors:
        group = by_name[tensor.name]
        assert (group["action"], group["route"], tuple(group["shape"])) == (
            tensor.action,
            tensor.route.name,
            tensor.base.shape,
        )
        assert group["timed"] == "measured"
        assert group["seconds_each"] == 0.25
    assert by_name["0.up.weight"] is by_name["2.up.weight"]
    assert by_name["0.up.weight"]["seconds"] == (
        0.75 if method.startswith("iso") else 1.0
    )  # text_projection is averaged
    assert by_name["ids"]["algorithm"] == "copy"
    assert method in by_name["down.weight"]["algorithm"]
    assert (found["read_bytes"], found["write_bytes"]) == (plan.read_bytes, plan.write_bytes)
    assert found["read_again_bytes"] == 0
    assert found["compute_seconds"] == 0.25 * len(plan.tensors)
    assert found["read_seconds"] == pytest.approx(plan.read_bytes / found["disk"]["read_bytes_per_second"])
    assert found["write_seconds"] == pytest.approx(plan.write_bytes / found["disk"]["write_bytes_per_second"])
    assert found["wall"] == "compute"
    assert found["total_seconds"] == found["compute_seconds"]
    assert found["peak_ram_bytes"] == plan.peak_ram_bytes


def test_the_disk_can_be_the_wall(monkeypatch: pytest.MonkeyPatch, wide_family: list[object], tmp_path: Path) -> None:
    monkeypatch.setattr(estimate, "timed", ticking(lambda function: 0.25))
    monkeypatch.setattr(
        estimate, "measure_disk", lambda _: {"read_bytes_per_second": 1e3, "write_bytes_per_second": 1e4}
    )
    plan = plan_of(wide_family, method="mean")
    found = estimate_merge(plan, CPU, folder=tmp_path)
    assert found["wall"] == "disk"
    assert found["total_seconds"] == pytest.approx(plan.read_bytes / 1e3 + plan.write_bytes / 1e4)


def test_what_exceeds_its_share_is_scaled_and_says_so(
    monkeypatch: pytest.MonkeyPatch, wide_family: list[object], tmp_path: Path
) -> None:
    """With no time at all every matrix is timed at the smallest size, and multiplied by the ratio of operations."""
    monkeypatch.setattr(samples, "SMALLEST_SIDE", 16)
    monkeypatch.setattr(samples, "SMALLEST_ELEMENTS", 32)
    monkeypatch.setattr(auto, "SMALL_SIDE", 0)  # what is below it has another form than what is above
    monkeypatch.setattr(estimate, "timed", ticking(lambda function: 0.25))
    plan = plan_of(wide_family, method="iso-cts")
    (up, *_) = [tensor for tensor in plan.tensors if tensor.name == "0.up.weight"]
    large = estimate_merge(plan, CPU, folder=tmp_path, budget_seconds=1000)
    assert {group["timed"] for group in large["groups"]} == {"measured"}
    none = {
        group["tensors"][0]: group for group in estimate_merge(plan, CPU, folder=tmp_path, budget_seconds=0)["groups"]
    }
    assert none["0.up.weight"]["timed"] == "scaled from 16 x 32"
    assert none["down.weight"]["timed"] == "scaled from 32 x 16"
    assert none["text_projection"]["timed"] == "scaled from 4 x 8"
    assert none["norm"]["timed"] == "scaled from 32"
    assert none["ids"]["timed"] == "measured"
    assert up.method is not None
    small = up.method.flops(replace(up.spec, shape=(16, 32)), 3)
    assert none["0.up.weight"]["seconds_each"] == pytest.approx(0.25 * up.flops / small)
    assert none["0.up.weight"]["seconds"] == pytest.approx(3 * none["0.up.weight"]["seconds_each"])
    assert none["text_projection"]["seconds_each"] == pytest.approx(0.25 * 64 * 128 / (4 * 8))  # elements
    # Every call has taken its time out of the budget: of 8 groups each has its share, but for the smallest sizes.
    some = estimate_merge(plan, CPU, folder=tmp_path, budget_seconds=10)
    assert {"measured"} < {group["timed"] for group in some["groups"]}
    assert some["timing_seconds"] <= 10
    assert covered(some) == sorted(tensor.name for tensor in plan.tensors)


def test_no_size_takes_another_solver(wide_family: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """9 tasks at r = 32 have one direction each, at r = 16 none: that is Iso-C, which says nothing of Iso-CTS. And a
    ceiling is one for the whole: a quarter of the elements has a quarter of the memory, and so the same solver.
    """
    monkeypatch.setattr(samples, "SMALLEST_SIDE", 4)
    monkeypatch.setattr(auto, "SMALL_SIDE", 0)
    options = [*wide_family, *(["--expert", wide_family[3]] * 6)]
    groups = group_plans(plan_of(options, method="iso-cts"))
    (up,) = [members[0] for members in groups if members[0].name == "0.up.weight"]
    assert [size.shape for size in sizes_of(up, CPU)] == [(32, 64), (64, 128)]
    bounded = replace(up, route=replace(up.route, method=imf.IsoC(memory_bytes=4000)))
    assert method_at(bounded, (32, 64)) == imf.IsoC(memory_bytes=1000)
    assert method_at(up, (32, 64)) == up.method


@pytest.mark.parametrize(("count", "at_once"), [(3, 3), (7, PLACES)])
def test_a_stack_is_timed_and_shared_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, at_once: int
) -> None:
    """As it is planned for a GPU, timed here on a CPU."""
    monkeypatch.setitem(registry.METHODS, InStacks.name, InStacks)
    monkeypatch.setattr(InStacks, "seen", [])
    monkeypatch.setattr(estimate, "timed", ticking(lambda _: 6.0))
    base = {f"{index}.weight": torch.randn(64, 48) for index in range(count)}
    options = ["--base", *(save_folder(tmp_path / name, base) for name in "abc")]
    config = imf.MergeConfig(str(options[1]), [str(path) for path in options[2:]], method=InStacks.name)
    with pretend_gpu():
        plan = make_plan(config, CUDA)
    (members,) = group_plans(plan)
    timing = estimate._time(members, plan, CPU, OneCore(), 0.0)
    assert {*InStacks.seen} == {at_once}
    assert timing.seconds == 6.0 / at_once
    assert timing.passed_bytes == 0


@pytest.mark.parametrize("method", ["iso-c", "iso-cts"])
def test_later_passes_are_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    """As many bytes as the engine reads of the same plan under a ceiling."""
    monkeypatch.setattr(estimate, "timed", ticking(lambda function: 0.25))
    weight = 0.02 * torch.randn(40_000, 64, generator=torch.Generator().manual_seed(0))
    copies = {"base": weight}
    copies |= {str(task): weight + delta for task, delta in enumerate(deltas_like_fine_tuning(40_000, 64, 2, seed=1))}
    folders = [save_folder(tmp_path / name, {"long.weight": copy.bfloat16()}) for name, copy in copies.items()]
    base, *experts = map(str, folders)
    plan = make_plan(imf.MergeConfig(base, experts, method, out=str(tmp_path / "out")), max_ram=1 << 20)
    (tensor,) = plan.tensors
    assert tensor.route.name == "by-rows"
    report = run(plan)
    found = estimate_merge(plan, CPU, folder=tmp_path, budget_seconds=1000)
    assert found["groups"][0]["algorithm"] == report.tensors[0]["algorithm"] == f"{method}/by-rows"
    assert found["read_bytes"] + found["read_again_bytes"] == report.tensors[0]["read_bytes"]
    assert found["read_again_bytes"] >= found["read_bytes"]
    assert any("read again from the disk" in note for note in found["notes"])


class TestCommandLine:
    def test_short_form(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        code, stdout, stderr = invoke("--tasks", 3, "--device", "cpu", "--format", "json")
        assert code == 0, stderr
        found = json.loads(stdout)
        assert len(found["rows"]) == 6
        assert found["tasks"] == 3
        assert found["ceilings"]["float64_flops_per_second"] == 5e10
        assert list(tmp_path.iterdir()) == []
        code, stdout, _ = invoke("--device", "cpu")
        assert code == 0
        assert "80 x 40" in stdout
        assert "8 deltas in float32" in stdout

    def test_wrong_arithmetic(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(short, "TOLERANCES", {"default": 1e-12})
        code, _, stderr = invoke("--device", "cpu", "--folder", tmp_path)
        assert code == 5
        assert stderr.startswith("isomerge: iso-c of 8 deltas 48 x 48")

    def test_estimate(self, wide_family: list[object], tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        before = sorted(tmp_path.rglob("*"))
        options = [*wide_family, "--method", "iso-c", "--out", tmp_path / "out", "--folder", tmp_path / "folder"]
        code, stdout, stderr = invoke(*options, "--format", "json")
        assert code == 0, stderr
        found = json.loads(stdout)
        assert sum(group["count"] for group in found["groups"]) == 9
        assert {group["timed"] for group in found["groups"]} == {"measured"}
        assert found["method"] == "iso-c"
        assert found["experts"] == 3
        assert found["total_seconds"] > 0
        code, stdout, _ = invoke(*options)
        assert code == 0
        assert "iso-c of 3 experts, 1 scaling(s), would take about" in stdout
        assert sorted(tmp_path.rglob("*")) == before

    def test_errors_are_those_of_plan(self, tmp_path: Path) -> None:
        family = make_family(tmp_path)
        options = ["--base", family[0], "--expert", family[1][0]]
        assert invoke("--base", family[0])[0] == 2  # no expert
        assert invoke("--method", "mean")[0] == 2  # nor base
        assert invoke("--max-ram", "1GiB")[0] == 2
        assert invoke(*options, "--method", "iso-ctx")[0] == 2
        assert invoke(*options, "--tasks", 3)[0] == 2
        assert invoke(*options, "--folder", tmp_path / "missing")[0] == 2
        assert invoke("--folder", tmp_path / "missing")[0] == 2
        assert invoke(*options, "--max-ram", "1MiB")[0] == 4
        (family[1][0] / "model.safetensors").write_bytes(b"short")
        code, stdout, _ = invoke(*options, "--format", "json")
        assert code == 3
        assert json.loads(stdout)["error"]["kind"] == "input"

    def test_a_full_disk(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def full(folder: Path, size_bytes: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(ceilings, "disk_rates", full)
        code, _, stderr = invoke("--folder", tmp_path, "--device", "cpu")
        assert code == 4
        assert "No space left on device" in stderr
