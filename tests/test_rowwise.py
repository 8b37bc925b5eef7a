"""Merges by rows, of tensors that are never held: against the oracle, against ``merge``, and through the engine."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import isomerge_fast as imf
import oracle
from allocation import peak_bytes
from cases import Case
from checkpoints import load_folder, save_folder
from isomerge_fast.methods import MergeStats, NotFiniteError, TensorSpec, as_deltas, make_method
from isomerge_fast.methods.rowwise.passes import product_rounding
from isomerge_fast.planning.budget import PROCESS_BYTES
from pretend_gpu import pretend_gpu
from row_sources import Rows, by_rows, rows_of

BOUND = 1e-5  # relative Frobenius error, the promise of precision "default"
SPECTRAL = ["iso-c", "iso-cts"]


def merged(name: str, deltas: list[Tensor], block_rows: int = 100, **options: Any) -> Tensor:
    value, stats = by_rows(make_method(name, options), rows_of(deltas, block_rows))
    assert not stats.missed(), stats.to_dict()
    return value


def expected(name: str, deltas: list[Tensor]) -> np.ndarray:
    return getattr(oracle, name.replace("-", "_"))(numpy(deltas))


def numpy(deltas: list[Tensor]) -> list[np.ndarray]:
    return [delta.double().numpy() for delta in deltas]


def noise(rows: int, columns: int, tasks: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator) for _ in range(tasks)]


def low_rank(rows: int, columns: int, tasks: int, rank: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
        for _ in range(tasks)
    ]


@pytest.mark.parametrize("tasks", [1, 2, 4, 8])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6], ids="{:.0e}".format)
@pytest.mark.parametrize("shape", [(512, 64), (130, 65), (400, 15)], ids=str)
@pytest.mark.parametrize("name", SPECTRAL)
def test_equals_oracle(name: str, shape: tuple[int, int], condition: float, tasks: int) -> None:
    deltas = Case(tasks, *shape, condition, tasks).deltas()
    assert oracle.relative_error(merged(name, deltas).numpy(), expected(name, deltas)) <= BOUND


@pytest.mark.parametrize("name", SPECTRAL)
def test_long_noise_equals_oracle(name: str) -> None:
    """More than one chunk of rows, of which the last one is short; products in float32."""
    deltas = noise(10_007, 96, 4)
    assert oracle.relative_error(merged(name, deltas, 1000).numpy(), expected(name, deltas)) <= BOUND


@pytest.mark.parametrize("name", SPECTRAL)
def test_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "isomerge_fast.methods.rowwise.passes.CHUNK_ELEMENTS", 3000
    )  # several chunks, none of whole blocks
    deltas = Case(0, 700, 40, 1e3, 3).deltas()
    values = [merged(name, deltas, block_rows) for block_rows in (1, 64, 97, 700)]
    for value in values[1:]:
        assert oracle.relative_error(value.numpy(), values[0].double().numpy()) <= 1e-6


@pytest.mark.parametrize("name", [*SPECTRAL, "mean", "task-arithmetic"])
def test_experts_that_are_deltas_have_no_base_taken_off(name: str) -> None:
    deltas, base = noise(300, 40, 4), noise(300, 40, 1, seed=9)[0]
    value, stats = by_rows(make_method(name), Rows(deltas, base, 64, are_deltas=True))
    assert not stats.missed()
    assert torch.equal(value, by_rows(make_method(name), rows_of(deltas, 64))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPECTRAL)
def test_experts_in_their_own_precision(name: str, dtype: torch.dtype) -> None:
    base = noise(300, 40, 1, seed=9)[0].to(dtype)
    experts = [(base + 0.1 * delta).to(dtype) for delta in noise(300, 40, 4)]
    deltas = [expert.float() - base.float() for expert in experts]
    value, stats = by_rows(make_method(name), Rows(experts, base, 64))
    assert value.dtype == torch.float32
    assert not stats.missed()
    assert oracle.relative_error(value.numpy(), expected(name, deltas)) <= BOUND


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("name", SPECTRAL)
def test_single_column(name: str, tasks: int) -> None:
    deltas = noise(90, 1, tasks)
    assert oracle.relative_error(merged(name, deltas).numpy(), torch.stack(deltas).sum(0).double().numpy()) <= BOUND


@pytest.mark.parametrize("kind", ["low-rank", "repeated", "zero-task", "zero-sum", "all-zero", "one-deficient"])
@pytest.mark.parametrize("name", SPECTRAL)
def test_deficient_input_is_merged_as_by_merge(name: str, kind: str) -> None:
    deltas = low_rank(200, 40, 3) if kind == "low-rank" else noise(200, 40, 3)
    if kind == "repeated":
        deltas = [deltas[0]] * 3
    elif kind == "zero-task":
        deltas.append(torch.zeros(200, 40))
    elif kind == "zero-sum":
        deltas = [deltas[0], -deltas[0]]
    elif kind == "all-zero":
        deltas = [torch.zeros(200, 40)] * 3
    elif kind == "one-deficient":
        deltas = [deltas[0], low_rank(200, 40, 1, rank=1)[0], deltas[2]]
    method = make_method(name)
    value, stats = by_rows(method, rows_of(deltas))
    reference, reference_stats = method.merge(as_deltas(deltas))
    assert not stats.missed(), stats.to_dict()
    assert torch.isfinite(value).all()
    assert oracle.relative_error(value.numpy(), reference.double().numpy()) <= BOUND
    same_evidence(stats, reference_stats, gap=kind in ("zero-task", "one-deficient"))
    if kind.startswith(("zero-sum", "all")):
        assert not value.any()


@pytest.mark.parametrize("name", SPECTRAL)
def test_min_dim_policy_divides_by_min_dim(name: str) -> None:
    deltas = low_rank(200, 40, 2)
    value, by_min_dim = merged(name, deltas), merged(name, deltas, rank_policy="min-dim")
    reference, _ = make_method(name, {"rank_policy": "min-dim"}).merge(as_deltas(deltas))
    assert oracle.relative_error(by_min_dim.numpy(), reference.double().numpy()) <= BOUND
    assert by_min_dim.norm() < 0.5 * value.norm()


def same_evidence(stats: MergeStats, reference: MergeStats, *, gap: bool = True) -> None:
    """The same keys; values that describe the input are the same numbers, but for a ``gap`` in what is noise."""
    found, wanted = stats.to_dict(), reference.to_dict()
    assert found.keys() - {"delta_largest"} == wanted.keys() - {"sum_rounding", "escalations"}
    assert found["algorithm"].endswith("/by-rows")
    for key in ("sigma_mean", "rank", "min_dim", "k", "s", "gap", "delta_norms"):
        if key in wanted and (gap or key != "gap"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-12), key


@pytest.mark.parametrize("name", SPECTRAL)
def test_evidence_is_that_of_merge(name: str) -> None:
    deltas = Case(0, 512, 64, 1e2, 4).deltas()
    _, stats = by_rows(make_method(name), rows_of(deltas))
    _, reference = make_method(name).merge(as_deltas(deltas))
    same_evidence(stats, reference)
    assert stats.to_dict()["delta_largest"] == pytest.approx([delta.abs().max().item() for delta in deltas])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [*SPECTRAL, "mean"])
def test_not_finite_is_refused_after_one_pass(name: str, bad: float) -> None:
    deltas = noise(300, 20, 3)
    deltas[1][250, 3] = bad
    source = rows_of(deltas)
    with pytest.raises(NotFiniteError) as caught:
        by_rows(make_method(name), source)
    assert caught.value.tasks == [1]
    assert source.walks == 1


@pytest.mark.parametrize(
    ("name", "options", "condition", "walks"),
    [
        ("iso-c", {}, 1e1, 2),
        ("iso-c", {}, 1e6, 3),  # the small directions again
        ("iso-cts", {}, 1e1, 4),  # S; the tasks; K; the rows
        ("iso-cts", {"memory_bytes": 1}, 1e1, 5),  # one task at a time
        ("iso-cts", {}, 1e6, 7),  # the small directions of S and of every task again
    ],
)
def test_passes(name: str, options: dict[str, Any], condition: float, walks: int) -> None:
    deltas = Case(0, 512, 64, condition, 2).deltas()
    source = rows_of(deltas)
    value, stats = by_rows(make_method(name, options), source)
    assert source.walks == walks
    assert not stats.missed()
    assert oracle.relative_error(value.numpy(), expected(name, deltas)) <= 1e-6


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("off", ["scaled", "rotated"])
def test_a_wrong_map_misses_its_certificate(name: str, off: str) -> None:
    source = rows_of(Case(0, 512, 64, 1e1, 2).deltas())
    rowwise: Any = make_method(name).rowwise(source)
    if off == "scaled":
        rowwise._a = rowwise._a * (1.0 + 1e-3)
    else:
        rotation = torch.eye(64).roll(1, 0)
        rowwise._a = rowwise._a @ rotation.to(rowwise._a)
    for block in source.blocks():
        rowwise.rows(block)
    assert rowwise.stats().missed()
    assert rowwise.stats().to_dict()["certified"] is False


@pytest.mark.parametrize("name", SPECTRAL)
def test_what_is_not_on_offer(name: str) -> None:
    def promised(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> int | None:
        return make_method(name, options).rowwise_bytes(TensorSpec("w", shape, dtype), 2, 1000, torch.device("cpu"))

    assert promised((200, 100))
    assert promised((200, 100), precision="fast")
    assert promised((199, 100)) is None
    assert promised((100, 200)) is None
    assert promised((2, 200, 100)) is None
    assert promised((200, 100), torch.float64) is None
    assert promised((200, 100), precision="reference") is None


class TestLinear:
    @pytest.mark.parametrize("shape", [(10_000,), (500, 20), (10, 3, 4)], ids=str)
    @pytest.mark.parametrize("name", ["mean", "task-arithmetic"])
    def test_is_merge(self, name: str, shape: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        deltas = [torch.randn(shape, generator=generator) for _ in range(3)]
        value, stats = by_rows(make_method(name), rows_of(deltas, 7))
        reference, reference_stats = make_method(name).merge(as_deltas(deltas))
        assert torch.equal(value, reference)
        found, wanted = stats.to_dict(), reference_stats.to_dict()
        assert found["algorithm"] == wanted["algorithm"] == name
        assert found["delta_norms"] == pytest.approx(wanted["delta_norms"], rel=1e-6)
        assert found["delta_largest"] == pytest.approx([delta.abs().max().item() for delta in deltas])

    def test_statistics_depend_on_neither_order_nor_threads(self) -> None:
        # Of many sizes, so that float64 sums of them depend on the order.
        scales = torch.logspace(-6.0, 6.0, 5000)[:, None]
        source = rows_of([scales * delta for delta in noise(5000, 3, 2)], 7)
        blocks = list(source.blocks())
        rowwise = make_method("mean").rowwise(source)
        wanted = [rowwise.rows(block) for block in blocks]
        evidence = rowwise.stats().to_dict()
        random.Random(0).shuffle(blocks)
        for threads in (1, 4):
            again = make_method("mean").rowwise(source)
            with ThreadPoolExecutor(threads) as pool:
                values = dict(zip((block.rows.start for block in blocks), pool.map(again.rows, blocks), strict=True))
            assert again.stats().to_dict() == evidence
            assert torch.equal(torch.cat([values[start] for start in sorted(values)]), torch.cat(wanted))


def peak_and_promise(name: str, shape: tuple[int, int], tasks: int, block_rows: int, **options: Any) -> tuple[int, int]:
    # Ill-conditioned, so that nothing is left out.
    scales = torch.logspace(0.0, -6.0, shape[1])
    source = rows_of([delta * scales for delta in noise(*shape, tasks)], block_rows)
    method = make_method(name, options)
    blocks = list(source.blocks())

    def merge_and_forget() -> None:
        rowwise = method.rowwise(source)
        for block in blocks:
            rowwise.rows(block)
        rowwise.stats()

    spec, elements = TensorSpec("w", shape, torch.float32), block_rows * shape[1]
    promised = method.rowwise_bytes(spec, tasks, elements, torch.device("cpu"))
    assert promised is not None
    return peak_bytes(merge_and_forget)[0], promised


@pytest.mark.parametrize("common_fraction", [0.0, 0.3, 0.95, 1.0])
def test_common_fraction_equals_oracle(common_fraction: float) -> None:
    deltas = Case(0, 200, 64, 1e1, 4).deltas()
    value = merged("iso-cts", deltas, common_fraction=common_fraction)
    assert oracle.relative_error(value.numpy(), oracle.iso_cts(numpy(deltas), common_fraction)) <= BOUND


@pytest.mark.parametrize("name", SPECTRAL)
def test_deficient_input_beyond_what_a_gram_matrix_resolves(name: str) -> None:
    """Experts of low rank in many dimensions: rounding of SᵀS lies above the tolerance of the data."""
    deltas = low_rank(900, 400, 3)
    method = make_method(name)
    value, stats = by_rows(method, rows_of(deltas))
    reference, reference_stats = method.merge(as_deltas(deltas))
    assert not stats.missed(), stats.to_dict()
    assert stats.to_dict()["rank"] == reference_stats.to_dict()["rank"]
    assert oracle.relative_error(value.numpy(), reference.double().numpy()) <= BOUND


@pytest.mark.parametrize("name", SPECTRAL)
def test_the_callers_settings_change_nothing(name: str) -> None:
    source = rows_of(noise(300, 40, 2))
    wanted, _ = by_rows(make_method(name), source)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = by_rows(make_method(name), source)
    assert torch.equal(value, wanted)


@pytest.mark.parametrize("name", SPECTRAL)
def test_every_tensor_is_made_on_the_device_of_the_source(name: str) -> None:
    """What forgets to name its device lands on the default one, here a device without data: as on a GPU, it fails."""
    for deltas in (Case(0, 200, 40, 1e6, 2).deltas(), low_rank(200, 40, 2), [torch.zeros(200, 40)] * 2):
        source = rows_of(deltas)
        with torch.device("meta"):
            value, stats = by_rows(make_method(name), source)
            assert value.device.type == "cpu"
            stats.to_dict()


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("options", [{}, {"common_fraction": 0.1}, {"memory_bytes": 1}], ids=str)
@pytest.mark.parametrize(
    ("shape", "block_rows"), [((1400, 700), 64), ((30_000, 100), 8192), ((1500, 300), 40)], ids=str
)
@pytest.mark.parametrize("name", SPECTRAL)
def test_peak_is_as_promised(name: str, shape: tuple[int, int], block_rows: int, options: dict[str, Any]) -> None:
    if name == "iso-c" and options:
        pytest.skip("no such option")
    peak, promised = peak_and_promise(name, shape, 3, block_rows, **options)
    assert peak <= promised <= 1.5 * peak, (peak, promised)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECTRAL)
def test_engine_takes_the_route_under_a_ceiling(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """23 MB a copy in float32, beside each of which there is no room for another."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(60_000, 96, generator=generator).to(dtype)
    folders = [save_folder(tmp_path / "base", {"embed.weight": base})]
    for task in range(3):
        expert = base + (0.1 * torch.randn(base.shape, generator=generator)).to(dtype)
        folders.append(save_folder(tmp_path / f"expert{task}", {"embed.weight": expert}))
    config = {"base": folders[0], "experts": folders[1:], "method": name, "scaling": 0.7}
    ceiling = PROCESS_BYTES + 56_000_000
    report = imf.merge({**config, "out": tmp_path / "low"}, max_ram=ceiling, device="cpu")
    assert report.tensors[0]["route"] == "by-rows"
    assert report.tensors[0]["algorithm"] == f"{name}/by-rows"
    assert report.tensors[0]["certified"]
    imf.merge({**config, "out": tmp_path / "free"}, device="cpu")
    low, free = (load_folder(tmp_path / out)["embed.weight"].float() for out in ("low", "free"))
    moved = (free - base.float()).norm()
    # One in a few thousand roundings to bfloat16 falls to the other side.
    assert (low - free).norm() <= (1e-5 if dtype == torch.float32 else 2e-3) * moved


def test_all_roundings_of_products_are_read_at_once() -> None:
    products = [(torch.tensor(2.0).double(), delta.double()) for delta in noise(30, 20, 8)]
    with pretend_gpu() as gpu:
        there = [(gpu.upload(norm), gpu.upload(a)) for norm, a in products]
        gpu.reset()
        assert product_rounding(20, *there) == product_rounding(20, *products)
        assert gpu.read_count == 1
