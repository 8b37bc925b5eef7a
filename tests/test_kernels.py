"""The Triton kernels against float64 and against plain torch: interpreted here, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import CHECKS, Check

from isomerge_fast import errors, ops
from isomerge_fast.linalg.polar_express import PolarExpress
from isomerge_fast.linalg.polar_gram import GramNewtonSchulz
from isomerge_fast.methods import METHODS, TensorDeltas
from isomerge_kernels import launchers, reference, symmetric_matmul

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_kernel(check: Check) -> None:
    check(DEVICE)


@pytest.fixture
def through_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``ops`` takes the kernels for tensors of any device and side; the names of those called."""
    called: list[str] = []

    class Recorded:
        def __getattr__(self, name: str) -> object:
            called.append(name)
            return getattr(launchers, name)

    monkeypatch.setattr(ops, "_has_kernels", lambda tensor: True)
    monkeypatch.setattr(ops, "is_for_kernel", lambda a: True)
    monkeypatch.setattr(ops, "gpu_kernels", Recorded)
    return called


@pytest.mark.parametrize("solver", [PolarExpress(), GramNewtonSchulz(), PolarExpress(torch.float32)], ids=repr)
def test_solvers_stand_on_the_kernels(through_kernels: list[str], solver: PolarExpress) -> None:
    x = torch.randn(90, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q, stats = solver.polar(x)
    assert "symmetric_matmul" in through_kernels
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    assert (q - u @ vt).abs().max() <= (1e-5 if solver.dtype == torch.float32 else 1e-12)
    assert stats.orthogonality <= 1e-5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (2, 48, 80)], ids=str)
def test_methods_through_the_kernels(through_kernels: list[str], name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = TensorDeltas([torch.randn(shape, generator=generator).to(DEVICE) for _ in range(3)])
    value, stats = METHODS[name]().merge(deltas)
    assert "task_sum" in through_kernels
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(ops, "_has_kernels", lambda tensor: False)
        expected, _ = METHODS[name]().merge(TensorDeltas([delta.double() for delta in deltas.tensors]))
    assert torch.linalg.vector_norm(value.double() - expected) <= 1e-5 * torch.linalg.vector_norm(expected)
    assert not stats.missed()


def test_gpu_without_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_has_kernels", lambda tensor: True)
    monkeypatch.setitem(__import__("sys").modules, "isomerge_kernels.launchers", None)
    monkeypatch.delattr("isomerge_kernels.launchers", raising=False)
    ops.gpu_kernels.cache_clear()
    with pytest.raises(errors.MissingPackageError, match=r"isomerge-fast\[cuda\]"):
        ops.task_sum([torch.ones(3)])
    ops.gpu_kernels.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": [torch.ones(3, 4), torch.ones(4, 3)]}, r"experts\[1\] has shape \[4, 3\], expected \[3, 4\]"),
        ({"experts": [torch.ones(3, dtype=torch.int32)]}, r"experts\[0\] is torch.int32"),
        ({"experts": [torch.ones(3)], "weights": [1.0, 2.0]}, "weights: expected 1, one a task, got 2"),
        ({"experts": [torch.ones(3)], "weights": [float("nan")]}, "weights: expected finite"),
        ({"experts": [torch.ones(3)], "out": torch.ones(4)}, r"out is \[4\] on cpu, expected \[3\]"),
        ({"experts": [torch.ones(4, 3)], "out": torch.ones(3, 4).mT}, "expected a contiguous tensor"),
    ],
)
@pytest.mark.parametrize("task_sum", [reference.task_sum, launchers.task_sum], ids=["reference", "kernel"])
def test_task_sum_refuses(task_sum, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_sum(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": torch.ones(4)}, r"delta\[0\] has shape \[4\], expected \[3\]"),
        ({"delta": torch.ones(3, dtype=torch.bfloat16)}, "delta is torch.bfloat16; expected float32 or float64"),
        ({"dtype": torch.int8}, "dtype torch.int8"),
        ({"scale": torch.ones(2)}, r"scale is \[2\]: expected the first dimensions of base, \[3\]"),
        ({"seed": 1, "dtype": torch.float16}, "stochastic rounding is to bfloat16, not to torch.float16"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"seed": 1, "first": 12}, "first is 12; expected a multiple of 8"),
    ],
)
@pytest.mark.parametrize("apply_delta", [reference.apply_delta, launchers.apply_delta], ids=["reference", "kernel"])
def test_apply_delta_refuses(apply_delta, arguments: dict, message: str) -> None:
    valid = {"base": torch.ones(3), "delta": torch.ones(3), "scalings": [1.0], "dtype": torch.bfloat16}
    with pytest.raises(ValueError, match=message):
        apply_delta(**(valid | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "tf32"}, r"precision 'tf32' is unknown \(known: ieee, tf32x3, bf16x3\)"),
        ({"b": torch.ones(3, 4)}, r"a is \[3, 4\] and b \[3, 4\]: expected \[..., n, k\] and \[..., k, n\]"),
        ({"c": torch.ones(4, 4)}, r"c is \[4, 4\], expected \[3, 3\]"),
        ({"out": torch.ones(3, 6)[:, ::2]}, "out has strides .* expected rows side by side"),
        (
            {"b": torch.ones(2, 5, 4, 3), "out": torch.ones(5, 2, 3, 3).transpose(0, 1)},
            "out has strides .* expected a contiguous tensor for several batch dimensions",
        ),
    ],
)
def test_symmetric_matmul_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        symmetric_matmul.symmetric_matmul(torch.ones(3, 4), **arguments)


def test_random_bits_are_philox() -> None:
    # Known answers of Random123 (Salmon et al., 2011), kat_vectors, philox4x32 with 10 rounds.
    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
        assert tuple(int(word) for word in reference.philox4x32((c0, c1, c2, c3), key)) == expected
    # Blocks of a tensor take the bits of their place.
    whole = reference.random_bits(5, 0, 1000, 2)
    assert torch.equal(reference.random_bits(5, 333, 200, 2), whole[333:533])
    assert not torch.equal(reference.random_bits(5, 0, 1000, 1), whole)
    assert not torch.equal(reference.random_bits(6, 0, 1000, 2), whole)
