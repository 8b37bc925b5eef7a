"""Methods written on the base classes: what they get from them, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import isomerge_fast as imf
from allocation import peak_bytes
from isomerge_fast import methods
from isomerge_fast.errors import ConfigError
from isomerge_fast.methods import (
    DeltaSource,
    Elementwise,
    Mean,
    MemoryDeltas,
    MergeStats,
    Method,
    NotFiniteError,
    TensorSpec,
)
from isomerge_fast.methods.factors import Factors, merge_factors

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Median(Elementwise):
    """The median of an odd number of deltas, the mean of the two in the middle of an even one."""

    name: ClassVar[str] = "median"

    def combine(self, deltas: Tensor) -> Tensor:
        half = (len(deltas) - 1) // 2
        return deltas.sort(0).values[half : len(deltas) - half].mean(0)


@dataclass(frozen=True)
class First(Method):
    """The first delta: no more than a method has to state."""

    threshold: float = 0.5

    name: ClassVar[str] = "first"

    def merge(self, deltas: DeltaSource) -> tuple[Tensor, MergeStats]:
        return deltas.delta(0), MergeStats(self.name)


def draw(*shape: int, tasks: int = 5) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(task)) for task in range(tasks)]


@pytest.mark.parametrize("tasks", [1, 4, 5])
@pytest.mark.parametrize("shape", [(48, 80), (7,), (2, 3, 5), (0, 4)], ids=str)
def test_a_method_of_single_elements_is_its_formula(shape: tuple[int, ...], tasks: int) -> None:
    deltas = draw(*shape, tasks=tasks)
    value, stats = Median().merge(MemoryDeltas(deltas))
    assert np.array_equal(value.double().numpy(), np.median(np.stack([x.double().numpy() for x in deltas]), 0)) or (
        np.abs(value.double().numpy() - np.median(np.stack([x.double().numpy() for x in deltas]), 0)).max() < 1e-7
    )
    assert stats.values["delta_norms"].tolist() == pytest.approx([float(x.norm()) for x in deltas])


def test_any_cut_of_a_tensor_gives_the_same_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = draw(1, 9, 40)[0][0], [x[0] for x in draw(1, 9, 40)]
    weights = [1.0, 0.5, 2.0, -1.0, 0.0]
    whole, stats = Median().merge(MemoryDeltas(experts, base, weights=weights))
    cut = MemoryDeltas(experts, base, weights=weights, block_rows=2)
    monkeypatch.setattr("isomerge_fast.methods.elementwise.STACKED_ELEMENTS", 5 * 40)
    pieces, of_pieces = Median().merge(cut)
    rowwise = Median().rowwise(cut)
    rows = torch.cat([rowwise.rows(block) for block in cut.blocks()])
    assert torch.equal(whole, pieces)
    assert torch.equal(whole, rows)
    for found in (of_pieces, rowwise.stats()):
        assert found.values["delta_norms"].tolist() == pytest.approx(stats.values["delta_norms"].tolist())
    expected = np.median(np.stack([w * (x - base).numpy() for w, x in zip(weights, experts, strict=True)]), 0)
    np.testing.assert_allclose(whole.numpy(), expected, rtol=1e-6)


def test_nan_is_found_under_a_median_that_does_not_show_it() -> None:
    deltas = draw(6, 8)
    deltas[3][2, 5] = torch.inf
    with pytest.raises(NotFiniteError) as caught:
        Median().merge(MemoryDeltas(deltas))
    assert caught.value.tasks == [3]
    assert bool(Median().combine(torch.stack(deltas)).isfinite().all())


@dataclass(frozen=True)
class Quantile(Elementwise):
    """As in docs/new-method.md: of torch's ways to a median the one that takes most memory."""

    name: ClassVar[str] = "quantile"

    def combine(self, deltas: Tensor) -> Tensor:
        return deltas.quantile(0.5, dim=0)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", [(1024, 700), (90, 100)], ids=str)
@pytest.mark.parametrize("method", [Median(), Quantile()], ids=lambda method: method.name)
def test_a_method_of_single_elements_keeps_to_its_memory(method: Method, shape: tuple[int, ...]) -> None:
    base, experts = torch.zeros(shape), draw(*shape)
    spec = TensorSpec("w", shape, torch.float32)
    peak, _ = peak_bytes(lambda: method.merge(MemoryDeltas(experts, base)))
    assert peak <= method.workspace_bytes(spec, 5, CPU) <= 2.5 * peak
    rowwise = method.rowwise(MemoryDeltas(experts, base))
    (block,) = MemoryDeltas(experts, base).blocks()
    peak, _ = peak_bytes(lambda: rowwise.rows(block))
    promised = method.rowwise_bytes(spec, 5, spec.elements, CPU)
    assert promised is not None
    assert peak <= promised <= 2.5 * peak


@pytest.mark.parametrize("method", [Mean(), Median()], ids=lambda method: method.name)
def test_many_blocks_keep_to_the_memory_of_one(method: Method) -> None:
    base, experts = torch.zeros(4096, 700), draw(4096, 700)
    spec = TensorSpec("w", (4096, 700), torch.float32)
    peak, _ = peak_bytes(lambda: method.merge(MemoryDeltas(experts, base, block_rows=1024)))
    assert peak <= 1.1 * method.workspace_bytes(spec, 5, CPU)


def test_deltas_of_parameters() -> None:
    """Outside ``no_grad``, as a training loop has them."""
    base, expert = (torch.nn.Parameter(torch.randn(5, 3)) for _ in range(2))
    assert torch.equal(MemoryDeltas([expert], base).delta(0), expert - base)


def test_the_defaults_of_a_method() -> None:
    spec = TensorSpec("w", (64, 96), torch.float32)
    for method, takes_vectors in ((First(), False), (Median(), True)):
        assert method.accepts(spec)
        assert method.accepts(TensorSpec("b", (64,), torch.float32)) is takes_vectors
        assert method.within(1) is method.exact() is method
        assert method.ceiling is None
        assert method.explain(spec, 2, CPU)
        assert method.flops(spec, 2) > 0
        assert method.workspace_bytes(spec, 2, CPU) > spec.bytes
        method.check(spec, 2)
    assert First().rowwise_bytes(spec, 2, 100, CPU) is None
    assert First(threshold="0.25").threshold == 0.25  # type: ignore[arg-type]  # of a text its number
    with pytest.raises(ConfigError, match="'threshold' of method 'first' is 'low'; expected a number"):
        First(threshold="low")  # type: ignore[arg-type]


def test_a_method_of_ones_own_merges_state_dicts() -> None:
    base = {"w": torch.zeros(3, 4), "b": torch.zeros(4)}
    experts = [{"w": x, "b": x[0]} for x in draw(3, 4)]
    merged = imf.merge_state_dicts(base, experts, Median())
    assert torch.equal(merged["w"], torch.stack([x["w"] for x in experts]).median(0).values)
    assert torch.equal(merged["b"], merged["w"][0])
    assert torch.equal(imf.merge_state_dicts(base, experts, First())["w"], experts[0]["w"])


def test_factors_go_only_where_coordinates_do_not_matter() -> None:
    pair = Factors(torch.ones(6, 2), torch.ones(2, 5))
    with pytest.raises(
        ConfigError, match=r"method 'median' takes no adapters.*merge every adapter into its base first"
    ):
        merge_factors(Median(), [pair, None], (6, 5))


@pytest.mark.parametrize("given", [object(), "svd", Median(), imf.IsoC])
def test_an_option_that_takes_a_solver_takes_nothing_else(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"option 'solver' of method 'iso-c' is .* set in Python: a PolarSolver"):
        imf.iso_c(draw(4, 5), solver=given)


def test_hooks_and_names_of_before_still_work_and_warn() -> None:
    """For one release."""
    with pytest.warns(DeprecationWarning, match="method hook row_map_bytes is now rowwise_bytes"):

        @dataclass(frozen=True)
        class Old(Elementwise):
            name: ClassVar[str] = "old"

            def row_map_bytes(self, *_: Any) -> int:
                return 7

    assert Old.rowwise_bytes is Old.row_map_bytes
    with pytest.warns(DeprecationWarning, match="RowMap is now RowwiseMerge"):
        assert methods.RowMap is methods.RowwiseMerge  # type: ignore[attr-defined]  # kept for those who have it
