"""What ``isomerge plan --ray`` predicts, and how several workers are told of. No Ray is needed for either."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import make_family
from command_lines import flags, invoke
from isomerge_fast.bench.outlook import SAMPLE_BYTES, measure_rates, predict, read_rate
from isomerge_fast.cli.render import print_report
from isomerge_fast.config import MergeConfig
from isomerge_fast.execution.report import Report
from isomerge_fast.planning.cost import Rates, cost_of
from isomerge_fast.planning.plan import Plan
from isomerge_fast.planning.planner import make_plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return make_family(tmp_path_factory.mktemp("family"), shards=3)


@pytest.fixture(scope="module")
def plan(family: tuple[Path, list[Path]]) -> Plan:
    return make_plan(MergeConfig(str(family[0]), [str(path) for path in family[1]], method="iso-c"))


def test_one_worker_takes_what_the_plan_adds_up_to(plan: Plan) -> None:
    rates = Rates(flops_per_second=1e3, read_bytes_per_second=2e6, write_bytes_per_second=1e6)
    (row,) = predict(plan, rates, [1])["rows"]
    load = cost_of(plan.tensors)
    assert (load.read_bytes, load.write_bytes) == (plan.read_bytes, plan.write_bytes)
    assert row["seconds"] == pytest.approx(load.flops / 1e3, rel=1e-3)
    assert row["wall"] == "compute"
    assert row["shared"]["seconds"] == pytest.approx(row["seconds"])


def test_storage_that_is_shared_is_the_wall_of_many(plan: Plan) -> None:
    """All workers together move what one of them can: more of them bring nothing."""
    rates = Rates(flops_per_second=1e15, read_bytes_per_second=1e6, write_bytes_per_second=1e6)
    rows = {row["workers"]: row for row in predict(plan, rates, [1, 3])["rows"]}
    moved = plan.read_bytes + plan.write_bytes
    assert rows[1]["seconds"] == pytest.approx(moved / 1e6)
    assert rows[3]["shared"]["seconds"] == pytest.approx(moved / 1e6)
    assert rows[3]["shared"]["wall"] == "storage"
    assert rows[3]["seconds"] < 0.6 * rows[1]["seconds"]
    given = Rates(1e15, 1e6, 1e6, storage_bytes_per_second=5e5)
    found = predict(plan, given, [3])
    assert found["rates"]["storage_bytes_per_second"] == 5e5
    assert "shared" not in found["rows"][0]
    assert found["rows"][0]["seconds"] == pytest.approx(moved / 5e5)


def test_what_is_given_is_not_measured(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> float:
        raise AssertionError("measured")

    threads = torch.get_num_threads()
    measured = measure_rates(plan, CPU, threads + 1, worker_bytes=3.0)
    assert measured.flops_per_second > 1e8
    assert torch.get_num_threads() == threads
    assert (measured.read_bytes_per_second, measured.write_bytes_per_second) == (3.0, 3.0)
    assert measured.storage_bytes_per_second == float("inf")
    assert measure_rates(plan, CPU, 1, flops=5.0).read_bytes_per_second == pytest.approx(read_rate(plan), rel=100)
    monkeypatch.setattr("isomerge_fast.bench.outlook.read_rate", never)
    monkeypatch.setattr("isomerge_fast.bench.outlook.matmul_rate", never)
    given = measure_rates(plan, CPU, 1, flops=5.0, worker_bytes=7.0, storage_bytes=9.0)
    assert given == Rates(5.0, 7.0, 7.0, 9.0)


def test_the_rate_is_that_of_reading_the_inputs(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of theirs, no further than asked for, in as many seconds as a clock says."""
    size = sum(path.stat().st_size for part in (plan.base, *plan.experts) for path in part.files)
    assert size < SAMPLE_BYTES
    ticks = iter([0.0, *[1.0] * 50, 4.0])
    monkeypatch.setattr("isomerge_fast.bench.outlook.SAMPLE_SECONDS", 2.0)
    files = len({stored.file for tensor in plan.tensors for stored in tensor.inputs})
    ticks = iter([0.0, *[1.0] * files, 4.0])
    monkeypatch.setattr("isomerge_fast.bench.outlook.time.perf_counter", lambda: next(ticks))
    assert read_rate(plan) == size / 4.0


# --- the command line -------------------------------------------------------------------------------------------------

RATES = ("--flops", "1e6", "--worker-rate", "1MB")


def test_a_plan_predicts_many_workers(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    code, output, _ = invoke("plan", *flags(family, "--method", "iso-c", "--ray", *RATES, "--format", "json"))
    assert code == 0
    found = json.loads(output)["outlook"]
    assert [row["workers"] for row in found["rows"]] == [1, 2, 4, 8, 16, 32, 64]
    assert found["rates"]["flops_per_second"] == 1e6
    many = ("--workers", 3, "--workers", 5, "--storage-rate", "2MB")
    code, output, _ = invoke("plan", *flags(family, "--ray", *RATES, *many, "--format", "json"))
    assert [row["workers"] for row in json.loads(output)["outlook"]["rows"]] == [3, 5]
    code, output, _ = invoke("plan", *flags(family, "--method", "iso-c", "--ray", *RATES))
    assert code == 0
    assert "workers of 0.001 GFLOP/s that move 1.0 MB/s each" in output
    assert re.search(r"\n +64 .*largest unit", output)
    assert list(tmp_path.iterdir()) == []


def test_the_address_may_be_left_out_before_other_words(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """`--ray merge.yml` takes the file for what it is."""
    file = tmp_path / "merge.yml"
    file.write_text(f"base: {family[0]}\nexperts: [{family[1][0]}]\n")
    for words in (["--ray", file, *RATES], [file, *RATES, "--ray"], [file, "--ray", "--flops", "1e6", *RATES[2:]]):
        code, output, _ = invoke("plan", *words, "--format", "json")
        assert code == 0
        assert len(json.loads(output)["outlook"]["rows"]) == 7


@pytest.mark.parametrize("option", ["--workers 2", "--flops 1e9", "--worker-rate 1GB", "--storage-rate 1GB"])
def test_options_of_the_prediction_need_it(family: tuple[Path, list[Path]], option: str) -> None:
    code, _, error = invoke("plan", *flags(family, *option.split()))
    assert code == 2
    assert f"{option.split()[0]} is for a plan with --ray" in error


@pytest.mark.parametrize(
    ("option", "message"),
    [("--flops 0", "--flops"), ("--flops -1", "--flops"), ("--worker-rate 0", "--worker-rate"), ("--workers 0", "")],
)
def test_rates_are_above_zero(family: tuple[Path, list[Path]], option: str, message: str) -> None:
    result = invoke("plan", *flags(family, "--ray", *option.split()))
    assert result[0] == 2
    assert message in result[2]


def test_several_workers_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    def worker(pid: int, seconds: float) -> dict[str, Any]:
        counts = {"units": 3, "tensors": 40, "read_bytes": 5_000_000, "write_bytes": 1_000_000}
        return {"host": "machine", "pid": pid, "seconds": seconds, **counts}

    tensor = {"name": "w", "action": "mean", "algorithm": "mean", "read_bytes": 10, "write_bytes": 2, "seconds": 1.0}
    phases = {"read": 5.0, "compute": 10.0, "write": 5.0, "total": 12.5}
    one = Report("0", "mean", [1.0], ["out"], "cpu", [tensor], phases, workers=[worker(7, 10.0)])
    print_report(one)
    assert "worker" not in capsys.readouterr().out
    several = Report("0", "mean", [1.0], ["out"], "cpu", [tensor], phases, workers=[worker(7, 10.0), worker(8, 5.0)])
    assert several.balance == 0.75
    print_report(several)
    output = capsys.readouterr().out
    assert re.search(r"machine 7 +3 +40 +5\.0 MB +1\.0 MB +10\.0 s +80 %", output)
    assert re.search(r"machine 8 .* 40 %", output)
    assert "2 workers, evenly busy to 75 %" in output
    assert "computing 10.0 s (50 %)" in output
    assert Report("0", "mean", [1.0], ["out"], "cpu").balance == 1.0
