"""The benchmarks themselves: what they find, what they catch, and that their arithmetic is right."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import oracle
from forks import ONE_THREAD, Forks

pytest.importorskip("matplotlib")

from benchmarks import adapters, bench_io, bench_merge, shapes
from benchmarks.compare import (
    FASTER,
    LESS_EXACT,
    MISSING,
    MORE_EXACT,
    NEW,
    SAME,
    SLOWER,
    compare,
    main as compare_main,
    outside,
)
from benchmarks.harness.counting import count_flops, peak_memory
from benchmarks.harness.markdown import write_between
from benchmarks.harness.pictures import draw
from benchmarks.harness.results import Measured, ResultRow, Results, growth, machine_label
from benchmarks.harness.rows import OURS, Problem, Row, absence, is_wanted
from benchmarks.harness.table import markdown, print_results
from benchmarks.run import MARKS, run, write_tables
from isomerge_fast.bench import published

ROOT = Path(__file__).resolve().parents[1]

# --- whole runs, in small -------------------------------------------------------------------------------------------


# What a pass loads, and what the first count of operations loads.
WARM = f"""
import sys
import numpy, pytest, pytest_benchmark.plugin, scipy.linalg, torch
import isomerge_fast.api, isomerge_fast.methods
sys.path.insert(1, {str(ROOT)!r})
from benchmarks.harness.counting import count_flops
count_flops(lambda: torch.ones(2, 2) @ torch.ones(2, 2))
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Give the passes one thread: beside another process, two that wait for each other take a hundred times as long
    now and then.
    """
    with Forks(WARM) as forks:
        yield forks


def tiny_run(forks: Forks, passes: int = 1, **variables: str) -> Results:
    """Run the smallest rows of the methods, with the plugin that spoils Iso-C as ``variables`` ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.run.subprocess", SimpleNamespace(run=forks.run))
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)  # with which pytest-benchmark times nothing
        for name, value in {**ONE_THREAD, "PYTHONPATH": str(ROOT / "tests" / "support"), **variables}.items():
            patch.setenv(name, value)
        return run(level="tiny", passes=passes, device="cpu", minutes=5, only="methods", plugins=["slowed_solver"])


@pytest.fixture(scope="module")
def results(forks: Forks) -> Results:
    return tiny_run(forks, passes=2)


@pytest.fixture(scope="module")
def spoilt(forks: Forks) -> Results:
    """Run with an Iso-C that takes 0.1 s longer and is off by 5e-6, within what it promises."""
    return tiny_run(forks, ISOMERGE_TEST_SLEEP="0.1", ISOMERGE_TEST_ERROR="5e-6")


def with_figures(results: Results, other: Results, *figures: str) -> Results:
    """Return ``results`` with these figures of every contender from another run."""
    rows = []
    for row, theirs in zip(results.rows, other.rows, strict=True):
        assert row.contenders.keys() == theirs.contenders.keys()
        contenders = {
            name: dataclasses.replace(measured, **{key: getattr(theirs.contenders[name], key) for key in figures})
            for name, measured in row.contenders.items()
        }
        rows.append(dataclasses.replace(row, contenders=contenders))
    return dataclasses.replace(results, rows=tuple(rows))


def test_every_row_has_time_ratio_error_rate_and_memory(results: Results) -> None:
    assert results.passes == 2
    assert {row.suite for row in results.rows} == {"methods"}
    for row in results.rows:
        ours = row.ours
        assert ours is not None
        assert ours.error is not None
        assert ours.bar is not None
        assert 0 < ours.error <= ours.bar
        assert len(ours.seconds) == 2
        assert ours.peak_bytes is not None
        assert ours.roofline is not None
        assert 0 < ours.roofline < 1
        assert sum(ours.flops.values()) > 0
        assert {"torch", "numpy-fp32", "numpy-fp64"} <= set(row.baselines)
        for baseline in row.baselines:
            ratio = results.ratio(row, baseline)
            assert ratio.low < ratio.value < ratio.high
        # numpy in float64 is the judge; in float32 it is a few roundings off.
        assert row.contenders["numpy-fp64"].error == 0
        assert 1e-8 < (row.contenders["numpy-fp32"].error or 0) < 1e-4
    assert any(curve.contender == OURS and len(curve.points) == 3 for curve in growth(results))


def test_a_run_says_who_is_absent(results: Results) -> None:
    """FusionBench takes part where it is installed."""
    reason = absence("fusion-bench")
    assert list(results.skipped) == ([] if reason is None else [reason])
    assert any("fusion-bench" in row.contenders for row in results.rows) == (reason is None)


def test_tables_and_pictures(results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_results(results)
    printed = capsys.readouterr().out
    text = markdown(results)
    for row in results.rows:
        assert row.name in printed
        assert row.name in text
    assert str(results.machine["device"]) in printed
    pictures = draw(results, tmp_path, "here")
    assert [path.name for path in pictures] == ["here-speedups.png", "here-growth.png", "here-error-against-time.png"]
    assert all(path.stat().st_size > 5000 for path in pictures)
    page = tmp_path / "page.md"
    marked = [f"{begin}\n{{}}\n{end}\n" for begin, end in MARKS]
    page.write_text("before\n" + "".join(part.format("old") for part in marked) + "after\n")
    write_tables(page, results)
    made = [make(results) for make in MARKS.values()]
    expected = "".join(part.format(text) for part, text in zip(marked, made, strict=True))
    assert page.read_text() == f"before\n{expected}after\n"
    page.write_text("nothing to fill in\n")
    with pytest.raises(ValueError, match=r"page\.md"):
        write_tables(page, results)


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_documented_tables_are_those_of_a_result_file(name: str, tmp_path: Path) -> None:
    """`python -m benchmarks.run --table FILE --write …` wrote them; which file, the page says."""
    text = (ROOT / name).read_text(encoding="utf-8")
    file = re.search(r"benchmarks/results/[\w-]+-threads\.json", text)
    assert file is not None
    page = tmp_path / "page.md"
    page.write_text(text)
    write_tables(page, Results.load(ROOT / file[0]))
    assert page.read_text() == text


def test_the_figures_of_adapters_are_those_of_a_result_file(tmp_path: Path) -> None:
    """`python -m benchmarks.adapters --table FILE --write docs/peft.md` wrote them."""
    text = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    file = re.search(r"benchmarks/results/adapters-[\w-]+-threads\.json", text)
    assert file is not None
    page = tmp_path / "page.md"
    page.write_text(text)
    write_between(page, adapters.MARKS, adapters.markdown(json.loads((ROOT / file[0]).read_text())["rows"]))
    assert page.read_text() == text


def test_a_file_is_what_was_saved(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == results
    (tmp_path / "other.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"other\.json"):
        Results.load(tmp_path / "other.json")


def compared(
    old: Results, new: Results, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Return exit code and output of ``python -m benchmarks.compare``."""
    old.save(folder / "old.json")
    new.save(folder / "new.json")
    monkeypatch.setattr(sys, "argv", ["compare", str(folder / "old.json"), str(folder / "new.json"), "--all"])
    code, told = compare_main(), capsys.readouterr()
    return code, told.out + told.err


def test_a_slowed_solver_is_caught(
    results: Results,
    spoilt: Results,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slowed = with_figures(spoilt, results, "error")
    verdicts = {(d.row, d.figure): d.verdict for d in compare(results, slowed)}
    iso_c = [row.name for row in results.rows if row.name.startswith("iso-c ")]
    assert iso_c
    for name in iso_c:
        assert verdicts[name, "torch / ours"] == SLOWER, name
    code, said = compared(results, slowed, tmp_path, monkeypatch, capsys)
    assert code == 1
    assert "slower" in said


def test_a_perturbed_solver_is_caught(
    results: Results,
    spoilt: Results,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By 5e-6, within what it promises: nothing else would notice."""
    perturbed = with_figures(results, spoilt, "error")
    found = [d for d in compare(results, perturbed) if d.figure == "error" and d.row.startswith("iso-c ")]
    assert found
    assert {d.verdict for d in found} == {LESS_EXACT}
    code, said = compared(results, perturbed, tmp_path, monkeypatch, capsys)
    assert code == 1
    assert "less exact" in said


def test_a_wrong_solver_is_not_timed(forks: Forks, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="pass 1 failed"):
        tiny_run(forks, ISOMERGE_TEST_ERROR="1e-3")
    assert "off by 1.00e-03, at most 1e-05 is right" in capfd.readouterr().err


def test_nothing_changed_is_no_change(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {difference.verdict for difference in compare(results, results)} == {SAME}
    assert compared(results, results, tmp_path, monkeypatch, capsys)[0] == 0


def test_compare_refuses_other_files(results: Results, tmp_path: Path) -> None:
    """In a process of its own, as people compare."""
    results.save(tmp_path / "old.json")
    (tmp_path / "new.json").write_text("{}")
    command = [sys.executable, "-m", "benchmarks.compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 2
    assert "new.json" in outcome.stderr


def test_an_absent_peer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.rows.find_spec", lambda _: None)
    for module in ("fusion_bench", "mergekit"):  # other tests may have imported them
        monkeypatch.delitem(sys.modules, module, raising=False)
    absence.cache_clear()
    try:
        assert absence("fusion-bench") == "fusion-bench is not installed: pip install 'isomerge-fast[fusion-bench]'"
        assert absence("mergekit-fp32") == "mergekit-fp32 is not installed: pip install 'isomerge-fast[mergekit]'"
    finally:
        absence.cache_clear()


@pytest.mark.parametrize("make", [bench_io.reading, bench_io.writing])
def test_a_disk_without_direct_io_is_said(
    make: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a tmpfs, which many systems have under /tmp: the rest of the row is measured all the same."""
    monkeypatch.setattr(bench_io, "scratch", lambda: tmp_path)
    monkeypatch.setattr(bench_io, "open_direct", lambda *_: None)
    arguments = ("tiny", True) if make is bench_io.reading else ("tiny",)
    problem = make(*arguments, torch.device("cpu"))
    assert list(problem.absent) == ["disk-direct"]
    assert "TMPDIR" in problem.absent["disk-direct"]
    assert problem.error is not None
    assert problem.error(problem.calls[OURS]()) == 0


# --- arithmetic -----------------------------------------------------------------------------------------------------


def results_of(*rows: ResultRow) -> Results:
    return Results({"device": "A (R) CPU @ 2", "threads": 4, "versions": {}}, "short", 3, 1.0, rows)


def result_row(
    ours: tuple[float, ...], torch: tuple[float, ...] | None, *, error: float = 1e-7, name: str = "x"
) -> ResultRow:
    contenders = {OURS: Measured(ours, error, 1e-5, 0, {}, tuple(0.1 for _ in ours))}
    if torch is not None:
        contenders["torch"] = Measured(torch, 1e-5)
    return ResultRow("methods", name, 1.0, None, contenders)


def test_a_ratio_is_the_median_of_passes_not_the_ratio_of_medians() -> None:
    row = result_row((1.0, 2.0, 4.0), (3.0, 8.0, 8.0))
    assert results_of(row).ratio(row, "torch").value == pytest.approx(3.0)  # 3, 4, 2; of medians it is 4


def test_the_spread_of_one_row_is_drawn_towards_that_of_all() -> None:
    quiet = result_row((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), name="quiet")
    noisy = result_row((1.0, 1.0, 1.0), (2.0, 2.2, 1.8), name="noisy")
    both = results_of(quiet, noisy)
    narrow, wide = both.ratio(quiet, "torch"), both.ratio(noisy, "torch")
    assert 1.0 < narrow.high / narrow.value < wide.high / wide.value
    one = results_of(result_row((1.0,), (2.0,)))
    assert one.ratio(one.rows[0], "torch").high == pytest.approx(2.0 * math.exp(3 * 0.05))


def test_verdicts() -> None:
    old = results_of(result_row((1.0, 1.01, 0.99), (2.0, 2.0, 2.0)), result_row((1.0,) * 3, None, name="alone"))

    def verdict(new: Results, row: str, figure: str) -> str:
        return next(d.verdict for d in compare(old, new) if (d.row, d.figure) == (row, figure))

    def changed(ours: float, error: float) -> Results:
        first = result_row((ours, ours * 1.01, ours * 0.99), (2.0, 2.0, 2.0), error=error)
        return results_of(first, result_row((ours,) * 3, None, name="alone"))

    assert verdict(changed(1.02, 1e-7), "x", "torch / ours") == SAME
    assert verdict(changed(1.5, 1e-7), "x", "torch / ours") == SLOWER
    assert verdict(changed(0.5, 1e-7), "x", "torch / ours") == FASTER
    assert verdict(changed(1.0, 2e-7), "x", "error") == SAME
    assert verdict(changed(1.0, 5e-7), "x", "error") == LESS_EXACT
    assert verdict(changed(1.0, 2e-8), "x", "error") == MORE_EXACT
    # Without a baseline the share of the roofline tells.
    assert verdict(changed(1.5, 1e-7), "alone", "of roofline") == SLOWER
    lost = results_of(old.rows[0], dataclasses.replace(old.rows[1], name="another"))
    assert verdict(lost, "alone", "row") == MISSING
    assert verdict(lost, "another", "row") == NEW
    assert outside(old, changed(1.0, 1e-7)) == []
    assert len(outside(old, changed(1.5, 1e-7))) == 1


def test_growth_fits_the_exponent() -> None:
    rows = []
    for x in (256.0, 512.0, 1024.0):
        row = result_row((1e-9 * x**2.5,) * 3, (1e-8 * x**3,) * 3, name=f"r {x}")
        rows.append(dataclasses.replace(row, curve=("c", "r", x)))
    exponents = {found.contender: found.exponent for found in growth(results_of(*rows))}
    assert exponents == {OURS: pytest.approx(2.5), "torch": pytest.approx(3.0)}
    assert growth(results_of(*rows[:2])) == []


def test_machine_label() -> None:
    assert machine_label({"device": "Intel(R) Xeon(R) Processor", "threads": 2}) == "intel-xeon-processor-2-threads"


def test_flops_are_counted_by_dtype() -> None:
    a = torch.randn(30, 20)
    counted = count_flops(lambda: (a @ a.mT, torch.linalg.eigh(a.double().mT @ a.double()), torch.linalg.svd(a)))
    assert counted["float32"] == 2 * 30 * 20 * 30 + 6 * 30 * 20**2 + 20 * 20**3
    assert counted["float64"] == 2 * 20 * 30 * 20 + 9 * 20**3


def test_peak_memory_sees_what_is_freed_again() -> None:
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(1 << 24)  # 64 MiB
    assert peak.bytes is not None
    assert 60 << 20 < peak.bytes < 100 << 20


def test_levels() -> None:
    def row(level: str, **more: bool) -> Row:
        return Row("r", (OURS,), lambda device: pytest.fail("not made"), level, **more)  # type: ignore[arg-type]

    def wanted(row: Row, level: str, later: bool = False, on_gpu: bool = False) -> bool:
        return is_wanted(row, level, later_pass=later, on_gpu=on_gpu)

    assert wanted(row("short"), "short")
    assert wanted(row("short"), "full")
    assert not wanted(row("full"), "short")
    assert not wanted(row("tiny"), "full")
    assert wanted(row("short", once=True), "short")
    assert not wanted(row("short", once=True), "short", later=True)
    assert not wanted(row("full", gpu_only=True), "full")
    assert wanted(row("full", gpu_only=True), "full", on_gpu=True)


# --- baselines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("tasks", [1, 3, 5])
def test_references_are_the_published_algorithm(shape: tuple[int, int], tasks: int) -> None:
    random = np.random.default_rng(tasks)
    deltas = [random.standard_normal(shape) for _ in range(tasks)]
    tensors = [torch.from_numpy(delta) for delta in deltas]
    for by_numpy, by_torch, expected in (
        (published.iso_c(deltas), published.iso_c(tensors), oracle.iso_c(deltas)),
        (published.iso_cts(deltas), published.iso_cts(tensors), oracle.iso_cts(deltas)),
    ):
        assert oracle.relative_error(by_numpy, expected) < 1e-11
        assert oracle.relative_error(by_torch.numpy(), expected) < 1e-11
    assert published.iso_c([delta.astype(np.float32) for delta in deltas]).dtype == np.float32


def test_plain_merge_treats_tensors_as_a_merge_does() -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = [{"w": torch.randn(12, 20, generator=generator), "b": torch.randn(7, generator=generator)} for _ in "abc"]
    merged = bench_merge.combine("iso-c", deltas)
    assert oracle.relative_error(merged["w"].numpy(), oracle.iso_c([d["w"].numpy() for d in deltas])) < 1e-5
    torch.testing.assert_close(merged["b"], torch.stack([d["b"] for d in deltas]).mean(0))


@pytest.mark.parametrize(
    ("model", "billions"),
    # As their makers state them: CLIP's vision towers in full, the others with embeddings.
    [
        ("vit-b/32", 0.0878),
        ("vit-l/14", 0.304),
        ("llama-3.2-1b", 1.236),
        ("llama-3-8b", 8.03),
        ("llama-3-70b", 70.6),
        ("qwen3-30b-a3b", 30.5),
    ],
)
def test_shapes_add_up_to_the_models(model: str, billions: float) -> None:
    assert sum(map(math.prod, shapes.MODELS[model]().values())) / 1e9 == pytest.approx(billions, rel=0.04)


@pytest.mark.parametrize(
    ("label", "shape"),
    [
        ("ViT-B/32 fc1", (3072, 768)),
        ("Llama-3.2-1B k_proj", (512, 2048)),
        ("Llama-3-8B down_proj", (4096, 14_336)),
        ("Qwen3-30B-A3B experts.gate_proj", (768, 2048)),
    ],
)
def test_a_label_names_a_matrix(label: str, shape: tuple[int, int]) -> None:
    assert shapes.shape_of(label) == shape
