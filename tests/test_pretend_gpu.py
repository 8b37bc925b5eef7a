"""The way of a GPU, without one: right results, nothing on two devices, and how often the host launches and waits."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from pretend_gpu import CUDA, PretendGpu, PretendTensor, pretend_gpu
from torch import Tensor

from isomerge_fast.bench.problems import deltas_like_fine_tuning
from isomerge_fast.methods import METHODS, MergeStats, TensorDeltas

TASKS = 8
# Launches of torch's operations and of ours, reads of the device and uploads of one merge of 8 tasks, at most.
BARS: dict[tuple[str, tuple[int, int]], tuple[int, int, int]] = {
    ("iso-c", (768, 768)): (280, 3, 3),
    ("iso-cts", (768, 768)): (1000, 9, 3),
    ("iso-c", (3072, 768)): (260, 3, 3),
    ("iso-cts", (3072, 768)): (1910, 22, 4),
    ("iso-c", (1024, 2048)): (250, 3, 3),
    ("iso-cts", (1024, 2048)): (960, 9, 3),
}


@lru_cache(maxsize=1)
def deltas_of(shape: tuple[int, int]) -> list[Tensor]:
    return deltas_like_fine_tuning(*shape, TASKS, "decay")


def merge(gpu: PretendGpu, name: str, deltas: list[Tensor]) -> tuple[Tensor, MergeStats]:
    there: list[Tensor] = [gpu.upload(delta) for delta in deltas]
    gpu.reset()
    value, stats = METHODS[name]().merge(TensorDeltas(there))
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
    expected, _ = METHODS[name]().merge(TensorDeltas(deltas))
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
    expected, _ = METHODS["iso-c"]().merge(TensorDeltas(deltas))
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
