"""Kernels' operations in plain torch against float64, over the shapes a checkpoint has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from isomerge_fast import ops
from isomerge_kernels.devices import DeviceTraits
from pretend_gpu import A100, H100, RTX5090, PretendTensor, pretend_gpu

SHAPES = {
    "square": (64, 64),
    "wide": (32, 3000),
    "tall": (3000, 32),
    "odd": (63, 501),
    "row": (1, 70),
    "vector": (77,),
    "scalar": (),
    "convolution": (8, 3, 5, 5),
    "empty": (0, 4),
    "many-blocks": (1030, 1030),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tensors(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, *experts = tensors(shape, dtype, 4)
    compute = ops.compute_dtype(dtype)
    assert compute == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(compute).eps
    exact = [expert.double() - base.double() for expert in experts]

    for expert, delta in zip(experts, exact, strict=True):
        value = ops.subtract(expert, base, dtype=compute)
        assert value.dtype == compute
        assert (value.double() - delta).abs().le(eps * delta.abs()).all()

    total, squares, largest, nonfinite = ops.task_sum(experts, base, weights=[0.5] * 3, dtype=compute)
    size = 0.5 * sum((delta.abs() for delta in exact), torch.zeros(shape, dtype=torch.float64))
    assert (total.double() - 0.5 * sum(exact)).abs().le(4 * eps * size).all()
    assert squares.tolist() == pytest.approx([delta.square().sum().item() for delta in exact], rel=1e-5)
    assert largest is not None
    if total.numel():
        assert largest.tolist() == pytest.approx([delta.abs().max().item() for delta in exact], rel=1e-6)
    assert not nonfinite.any()

    for out_dtype in DTYPES:
        (value,) = ops.apply_delta(base, total, scalings=[1.5], dtype=out_dtype)
        assert value.dtype == out_dtype
        expected = base.double() + 1.5 * total.double()
        allowed = torch.finfo(out_dtype).eps * expected.abs() + 4 * eps * (base.double().abs() + total.double().abs())
        tiny = torch.finfo(out_dtype).smallest_normal * torch.finfo(out_dtype).eps  # half a subnormal of float16
        assert (value.double() - expected).abs().le(allowed + tiny).all()


def test_inputs_are_not_modified_and_may_be_strided() -> None:
    base, expert = tensors((40, 60), torch.bfloat16, 2)
    before = base.clone(), expert.clone()
    value = ops.subtract(expert.mT, base.mT, dtype=torch.float32)
    assert torch.equal(value.mT, ops.subtract(expert, base, dtype=torch.float32))
    (merged,) = ops.apply_delta(base.mT, value, scalings=[1.0], dtype=torch.bfloat16)
    assert torch.equal(merged, expert.mT)  # bf16 differences are exact in fp32
    assert torch.equal(base, before[0])
    assert torch.equal(expert, before[1])


@pytest.mark.parametrize("shape", [(), (5,), (700, 800)], ids=str)
def test_count_nonfinite(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.bfloat16)
    assert ops.count_nonfinite(x) == 0
    flat = x.reshape(-1)
    places = np.unique([0, flat.numel() - 1])
    for place, value in zip(places, (float("nan"), float("-inf")), strict=False):
        flat[int(place)] = value
    assert ops.count_nonfinite(flat.reshape(shape)) == len(places)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_products_of_bf16_parts(batch: tuple[int, ...]) -> None:
    """To 2⁻¹⁶ of float64, relative to what is added up: nearer than tf32, and never bf16 alone."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(*batch, 40, 70, generator=generator)
    c = torch.randn(*batch, 40, 40, generator=generator)
    b, c = a.mT, c + c.mT
    exact, size = a.double() @ b.double(), a.abs().double() @ b.abs().double()
    for product in (ops.mm(a, b, precision="bf16x3"), ops.sym_mm(a, precision="bf16x3")):
        assert product.dtype == torch.float32
        assert (product - exact).abs().le(2**-16 * size).all()
        assert (product - exact).abs().max() > 1e-7 * size.max()
    for product in (
        ops.mm_add(c, a, b, alpha=0.5, beta=-2.0, precision="bf16x3"),
        ops.sym_mm_add(c, a, alpha=0.5, beta=-2.0, precision="bf16x3"),
        ops.sym_mm_add(c, a, alpha=0.5, beta=-2.0, out=c.clone(), precision="bf16x3"),
    ):
        assert (product - (0.5 * exact - 2.0 * c)).abs().le(2**-16 * (size + c.abs())).all()


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_products_with_few_columns(batch: tuple[int, ...]) -> None:
    """On a CPU with the columns one after the other, however the operands lie; on a GPU as any product."""
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int, columns: int) -> list[torch.Tensor]:
        x = torch.randn(*batch, rows, columns, generator=generator, dtype=torch.float64)
        return [x, x.mT.contiguous().mT]

    for a, b, c in zip(drawn(40, 30), drawn(30, 3), drawn(40, 3), strict=True):
        for product, expected in (
            (ops.thin_mm(a, b), a @ b),
            (ops.thin_mm(a, b, c=c, alpha=0.5, beta=-2.0), 0.5 * (a @ b) - 2.0 * c),
        ):
            torch.testing.assert_close(product, expected, rtol=1e-13, atol=1e-13)
            assert product.mT.is_contiguous()
        with pretend_gpu(H100) as gpu:
            assert ops.thin_mm(gpu.upload(a), gpu.upload(b)).is_contiguous()


def test_products_of_bf16_parts_of_batches_on_a_gpu() -> None:
    """Whose library takes no batch beside a single matrix."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 20, 30, generator=generator), torch.randn(3, 30, 10, generator=generator)
    for left, right in ((a, b), (a, b[0]), (a[0], b), (a[:1], b), (a[0], b[0])):
        with pretend_gpu() as gpu:
            found = ops.mm(gpu.upload(left), gpu.upload(right), precision="bf16x3")
            assert isinstance(found, PretendTensor)
        torch.testing.assert_close(found.held, left @ right, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "dtype", "traits", "expected"),
    [
        ((1280, 4096), torch.float64, H100, True),
        ((1279, 4096), torch.float64, H100, False),
        ((8, 816, 100), torch.float64, H100, True),  # entries of all members count
        ((2, 816, 100), torch.float64, H100, False),
        ((64, 767, 100), torch.float64, H100, False),  # but many small ones do not make large tiles
        ((4096, 4096), torch.float64, A100, True),
        ((4096, 4096), torch.float64, RTX5090, False),  # which has no tensor cores for it
        ((4096, 4096), torch.float32, RTX5090, True),
        ((1280, 64), torch.float32, H100, True),
        ((1279, 64), torch.float32, H100, False),
        ((8192, 64), torch.bfloat16, H100, False),
        ((8192, 64), torch.float16, H100, False),
    ],
    ids=str,
)
def test_which_symmetric_products_the_kernel_takes(
    shape: tuple[int, ...], dtype: torch.dtype, traits: DeviceTraits, expected: bool
) -> None:
    with pretend_gpu(traits) as gpu:
        there = gpu.upload(torch.zeros(1, dtype=dtype).expand(shape))
        assert ops.is_for_kernel(there) is expected
    assert not ops.is_for_kernel(torch.zeros(1, dtype=dtype).expand(shape))


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_library_of_a_gpu_adds_in_place(batch: tuple[int, ...], gamma: float) -> None:
    """One launch, and one for the diagonal where there is something to add to it."""
    generator = torch.Generator().manual_seed(0)
    a, c = torch.randn(*batch, 20, 30, generator=generator), torch.randn(*batch, 20, 20, generator=generator)
    c = c + c.mT
    expected = ops.sym_mm_add(c, a, alpha=0.5, beta=-2.0, gamma=gamma)
    with pretend_gpu() as gpu:
        there = gpu.upload(c), gpu.upload(a)
        gpu.reset()
        found = ops.sym_mm_add(*there, alpha=0.5, beta=-2.0, gamma=gamma, out=there[0])
        assert found is there[0]
        assert isinstance(found, PretendTensor)
        assert gpu.launch_count == 1 + bool(gamma)
    torch.testing.assert_close(found.held, expected)


@pytest.mark.parametrize("scalings", [[0.0], [0.0, 2.0]], ids=str)
def test_scalings_may_be_an_array(scalings: list[float]) -> None:
    """Of one α that is 0, too: it is not the same as none."""
    base, delta = torch.full((3, 2), 5.0), torch.ones(3, 2)
    given: Any = np.array(scalings)
    found = ops.apply_delta(base, delta, scalings=given, dtype=torch.float32)
    assert [value.unique().item() for value in found] == [5.0 + scaling for scaling in scalings]
