"""The way of a GPU, without one: right results, nothing on two devices, and how often the host launches and waits."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from isomerge_fast.bench.problems import Kind, deltas_like_fine_tuning
from isomerge_fast.linalg import subspace_chebyshev
from isomerge_fast.linalg.gram_eigh import GramFactorization
from isomerge_fast.methods import METHODS, IsoC, IsoCTS, MemoryDeltas, MergeStats
from pretend_gpu import CUDA, PretendGpu, PretendTensor, pretend_gpu

TASKS = 8
# Launches of torch's operations and of ours, reads of the device and uploads of one merge of 8 tasks, at most.
BARS: dict[tuple[str, tuple[int, int]], tuple[int, int, int]] = {
    ("iso-c", (768, 768)): (280, 3, 3),
    ("iso-cts", (768, 768)): (1000, 9, 3),
    ("iso-c", (3072, 768)): (260, 3, 3),
    ("iso-cts", (3072, 768)): (1410, 12, 4),
    ("iso-c", (1024, 2048)): (250, 3, 3),
    ("iso-cts", (1024, 2048)): (960, 9, 3),
}


@lru_cache(maxsize=1)
def deltas_of(shape: tuple[int, int]) -> list[Tensor]:
    return deltas_like_fine_tuning(*shape, TASKS, "decay")


def merge(gpu: PretendGpu, name: str, deltas: list[Tensor]) -> tuple[Tensor, MergeStats]:
    there: list[Tensor] = [gpu.upload(delta) for delta in deltas]
    gpu.reset()
    value, stats = METHODS[name]().merge(MemoryDeltas(there))
    assert isinstance(value, PretendTensor)
    return value.held, stats


@pytest.mark.parametrize(("name", "shape"), BARS, ids=str)
def test_a_merge_on_a_gpu_launches_and_waits_no_more_than(name: str, shape: tuple[int, int]) -> None:
    deltas = deltas_of(shape)
    with pretend_gpu() as gpu:
        value, stats = merge(gpu, name, deltas)
        launches, reads, uploads = BARS[name, shape]
        assert gpu.launch_count <= launches, gpu.launches.most_common(10)
        assert gpu.read_count <= reads, gpu.reads
        assert gpu.uploads <= uploads
        assert not stats.missed()
    expected, _ = METHODS[name]().merge(MemoryDeltas(deltas))
    assert torch.linalg.vector_norm(value - expected) <= 1e-5 * torch.linalg.vector_norm(expected)


def test_what_a_narrow_iteration_is_sure_to_miss_it_does_not_begin() -> None:
    """And the next iteration is taken, no eigensolver. A sum with κ = 1e6, whose small directions bf16x3 loses."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(300, 300, generator=generator))[0] for _ in range(2))
    delta = (u * torch.logspace(0, -6, 300)) @ v.mT
    with pretend_gpu() as gpu:
        value, stats = IsoC(precision="fast").merge(MemoryDeltas([gpu.upload(delta)]))
        assert stats.algorithm == "iso-c/polar-express-fp64"
        assert len(stats.escalations) == 1
        assert "rounding would leave" in stats.escalations[0]
        assert gpu.launches["aten._linalg_eigh"] == 0
        begun = gpu.launch_count
        gpu.reset()
        METHODS["iso-c"]().merge(MemoryDeltas([gpu.upload(delta)]))
        # Bounds twice; the iteration, which is more, once.
        assert begun < 1.8 * gpu.launch_count
    assert isinstance(value, PretendTensor)
    expected, _ = IsoC(precision="reference").merge(MemoryDeltas([delta]))
    assert torch.linalg.vector_norm(value.held - expected) <= 1e-5 * torch.linalg.vector_norm(expected)


def test_directions_that_tasks_share_do_not_stop_the_search_of_a_tall_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the parts are searched in float64. In float32 what the tasks share, a hundred times as large as what is
    left of each, cancels and leaves rounding; then every task takes an eigensolver.
    """
    deltas = deltas_of((1536, 768))
    generator = torch.Generator().manual_seed(0)
    shared = 0.2 * torch.randn(1536, 16, generator=generator) @ torch.randn(16, 768, generator=generator)
    monkeypatch.setattr(GramFactorization, "residual", lambda *_, **__: pytest.fail("all directions are computed"))
    with pretend_gpu() as gpu:
        _, stats = merge(gpu, "iso-cts", [delta + shared for delta in deltas])
    assert not stats.missed()


@pytest.mark.parametrize("kind", ["decay", "noise"])
def test_parts_of_wide_matrices_are_searched_for_where_an_eigensolver_would_take_longer(
    monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(subspace_chebyshev, "SMALLEST_WIDE_PART", 90)
    deltas = deltas_like_fine_tuning(480, 540, TASKS, kind)
    eigensolver = GramFactorization._top_of_projected
    monkeypatch.setattr(GramFactorization, "_top_of_projected", lambda *_: pytest.fail("all directions are computed"))
    expected, _ = IsoCTS(precision="reference").merge(MemoryDeltas(deltas))
    for precision, promise in (("default", 1e-5), ("fast", 1e-2)):
        with pretend_gpu() as gpu:
            there: list[Tensor] = [gpu.upload(delta) for delta in deltas]
            value, stats = IsoCTS(precision=precision).merge(MemoryDeltas(there))
        assert isinstance(value, PretendTensor)
        assert not stats.missed()
        assert torch.linalg.vector_norm(value.held - expected) <= promise * torch.linalg.vector_norm(expected)
    # Where there are fewer directions than wanted.
    monkeypatch.setattr(GramFactorization, "_top_of_projected", eigensolver)
    low = [delta[:, :6] @ delta[:6] for delta in deltas]
    with pretend_gpu() as gpu:
        value, stats = merge(gpu, "iso-cts", low)
    assert not stats.missed()
    expected, _ = METHODS["iso-cts"]().merge(MemoryDeltas(low))
    assert torch.linalg.vector_norm(value - expected) <= 1e-5 * torch.linalg.vector_norm(expected)


def test_of_a_batch_on_a_gpu_what_missed_is_solved_again() -> None:
    """One of three matrices whose sum spans nine orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(3, 60, 40, generator=generator) for _ in range(3)]
    for delta in deltas:
        delta[1] *= torch.logspace(0, -9, 40)
    with pretend_gpu() as gpu:
        value, stats = merge(gpu, "iso-c", deltas)
        assert len(stats.escalations) > 0
        before = gpu.read_count
        assert stats.to_dict()["algorithm"] == stats.algorithm
        assert gpu.read_count == before  # all of the evidence is there already
    expected, _ = METHODS["iso-c"]().merge(MemoryDeltas(deltas))
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_what_a_gpu_refuses_is_refused_and_what_it_does_is_counted() -> None:
    with pretend_gpu() as gpu:
        there = torch.ones(3, device=CUDA)
        gpu.reset()
        with pytest.raises(RuntimeError, match="on the same device"):
            torch.add(there, torch.ones(3))
        assert (there + torch.ones(())).device == CUDA  # a number
        assert gpu.launch_count == 1
        assert there[1:].sum().item() == 2.0
        assert (gpu.launch_count, gpu.read_count) == (2, 1)
        assert there[there > 0].shape == (3,)  # counts before it goes on
        assert (there.tolist(), bool((there > 0).all())) == ([1.0] * 3, True)
        assert gpu.read_count == 4
        moved = torch.zeros(3).to(CUDA)
        moved[1:] = there[:2]
        assert isinstance(moved, PretendTensor)
        assert moved.held.tolist() == [0.0, 1.0, 1.0]
        assert gpu.uploads == 1
    assert not torch.cuda.is_available()
