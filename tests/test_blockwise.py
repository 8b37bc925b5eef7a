"""Compare the products of ``linalg.blockwise`` with numpy in float64: one block and many, wide and tall, batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from isomerge_fast.linalg import blockwise

SINGLE, DOUBLE = torch.float32, torch.float64
SHAPES = {"wide": (6, 31), "tall": (31, 6), "square": (7, 7), "batched": (2, 3, 5, 17), "batched-tall": (4, 17, 5)}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
each_dtype = pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["fp32", "fp64"])


@pytest.fixture(params=[1 << 20, 40, 1], ids=["one-block", "blocks", "one-row-a-block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Set how many elements a block of the long side holds."""
    monkeypatch.setattr(blockwise, "block_elements", lambda device: request.param)
    return request.param


def random(*shape: int, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def short_first(x: Tensor) -> np.ndarray:
    """Return X in numpy's float64 with its short side first: X when wide, Xᵀ when tall."""
    exact = x.double().numpy()
    return exact if x.shape[-2] <= x.shape[-1] else np.swapaxes(exact, -1, -2)


def transposed(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


def assert_near(found: Tensor, exact: np.ndarray, dtype: torch.dtype) -> None:
    """Compare to a few roundings of the dtype that a product was computed in."""
    assert tuple(found.shape) == exact.shape
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(found.double().numpy(), exact, rtol=0, atol=40 * eps * max(1.0, np.abs(exact).max()))


@each_shape
@each_dtype
@pytest.mark.parametrize("whole", [False, True])
def test_long_blocks(block: int, shape: tuple[int, ...], dtype: torch.dtype, whole: bool) -> None:
    """They follow each other, hold no more than they may, and together are X; one block where nothing is converted."""
    x = random(*shape)
    found = list(blockwise.long_side_blocks(x, dtype, whole=whole))
    length, rows = max(shape[-2:]), min(shape[-2:])
    assert [part.start for part, _ in found] == [0, *(part.stop for part, _ in found[:-1])]
    assert found[-1][0].stop == length
    assert all(part.dtype == dtype for _, part in found)
    assert len(found) == 1 or not (whole and dtype == DOUBLE)
    if not (whole and dtype == DOUBLE):
        columns = max(1, block // (rows * int(np.prod(shape[:-2]))))
        assert [part.shape[-1] for _, part in found] == [min(columns, length - i) for i in range(0, length, columns)]
    together = torch.cat([part for _, part in found], dim=-1)
    assert np.array_equal(together.double().numpy(), short_first(x.to(dtype)))


@each_shape
@each_dtype
@pytest.mark.parametrize("of", [SINGLE, DOUBLE], ids=["of-fp32", "of-fp64"])
def test_short_gram(block: int, shape: tuple[int, ...], dtype: torch.dtype, of: torch.dtype) -> None:
    """X Xᵀ or Xᵀ X; and X Yᵀ or Xᵀ Y, also where one Y serves a whole batch."""
    x, y = random(*shape, dtype=of), random(*shape, dtype=of, seed=1)
    a, b = short_first(x), short_first(y)
    gram = blockwise.short_side_gram(x, dtype=dtype)
    assert gram.dtype == dtype
    assert_near(gram, a @ transposed(a), dtype)
    assert_near(blockwise.short_side_gram(x, y, dtype=dtype), a @ transposed(b), dtype)
    one = random(*shape[-2:], dtype=of, seed=2)
    assert_near(blockwise.short_side_gram(x, one, dtype=dtype), a @ transposed(short_first(one)), dtype)
    assert blockwise.short_side_gram(x).dtype == DOUBLE


@each_shape
@each_dtype
@pytest.mark.parametrize("where", ["out", "in-place", "narrow-out"])
def test_short_multiply(block: int, shape: tuple[int, ...], dtype: torch.dtype, where: str) -> None:
    """A X or X A for symmetric A, into a tensor of either dtype or into X itself."""
    x, short = random(*shape, dtype=dtype), min(shape[-2:])
    a = random(*shape[:-2], short, short, seed=1)
    a = (a + a.mT).to(dtype)
    exact = a.double().numpy() @ short_first(x)
    exact = exact if shape[-2] <= shape[-1] else transposed(exact)
    out = x if where == "in-place" else torch.full(shape, torch.nan, dtype=SINGLE if where == "narrow-out" else dtype)
    before = x.clone()
    assert blockwise.multiply_short_side(a, x, out) is out
    assert_near(out, exact, out.dtype)
    assert where == "in-place" or torch.equal(x, before)


@each_dtype
@pytest.mark.parametrize("shape", [(6, 31), (2, 3, 5, 17)], ids=["matrix", "batched"])
def test_short_project(block: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Aᵀ X in the dtype of A, of one A for a batch of X as well."""
    x = random(*shape, dtype=SINGLE)
    for a in (random(*shape[:-1], 3, dtype=dtype, seed=1), random(shape[-2], 3, dtype=dtype, seed=2)):
        found = blockwise.project_short_side(a, x)
        assert found.dtype == dtype
        assert_near(found, transposed(a.double().numpy()) @ x.double().numpy(), dtype)


@each_shape
@each_dtype
@pytest.mark.parametrize("result", [SINGLE, DOUBLE], ids=["to-fp32", "to-fp64"])
def test_long_product(block: int, shape: tuple[int, ...], dtype: torch.dtype, result: torch.dtype) -> None:
    """Xᵀ A or X A, computed in the dtype of A, returned in another."""
    x, short = random(*shape, dtype=SINGLE), min(shape[-2:])
    for a in (random(*shape[:-2], short, 4, dtype=dtype, seed=1), random(short, 4, dtype=dtype, seed=2)):
        found = blockwise.to_long_side(x, a, result)
        assert found.dtype == result
        exact = transposed(short_first(x)) @ a.double().numpy()
        assert_near(found, exact, SINGLE if SINGLE in (dtype, result) else DOUBLE)


@each_shape
@each_dtype
def test_short_product(block: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """X Z or Xᵀ Z in the dtype of Z, summed over all blocks."""
    x, long = random(*shape, dtype=SINGLE), max(shape[-2:])
    for z in (random(*shape[:-2], long, 4, dtype=dtype, seed=1), random(long, 4, dtype=dtype, seed=2)):
        found = blockwise.to_short_side(x, z)
        assert found.dtype == dtype
        assert_near(found, short_first(x) @ z.double().numpy(), dtype)


def test_a_side_of_length_zero(block: int) -> None:
    empty = torch.zeros(0, 5)
    assert all(part.shape[-2] == 0 for _, part in blockwise.long_side_blocks(empty, DOUBLE))
    assert blockwise.short_side_gram(empty).shape == (0, 0)
    assert not blockwise.to_long_side(empty, torch.zeros(0, 2), SINGLE).any()
    assert blockwise.to_short_side(empty, torch.zeros(5, 2)).shape == (0, 2)
