"""What every kernel has to get right, as functions of a device: run by the tests (interpreted, where there is no GPU)
and by ``benchmarks/gpu`` on a GPU. Each returns its errors beside torch's own in the same dtype.

Outputs are filled with NaN first, so that what a kernel leaves out shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor

from isomerge_fast import ops
from isomerge_kernels import apply_delta, reference, symmetric_matmul, task_sum

Check = Callable[[torch.device], dict[str, float]]

SHAPES: dict[str, tuple[int, ...]] = {
    "square": (64, 64),
    "wide": (16, 3000),
    "tall": (3000, 16),
    "odd": (63, 501),
    "row": (1, 700),
    "vector": (1077,),
    "scalar": (),
    "batch": (3, 40, 70),
    "convolution": (8, 3, 5, 5),
    "empty": (0, 4),
}
SUM_DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16-fp64": (torch.bfloat16, torch.bfloat16, torch.float64),
    "fp16": (torch.float16, torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64, torch.float64),
    "mixed": (torch.bfloat16, torch.float32, torch.float32),
}
# 2 x torch's own error, which may be 0 by luck: two roundings of the result are granted to both.
FACTOR, ROUNDINGS = 2.0, 2.0
# What an error along the result may be beside what roundings leave of it by chance, in ε of the dtype computed in.
BIAS_ROUNDINGS = 4.0


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def error(value: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error."""
    scale = torch.linalg.vector_norm(exact).item()
    return torch.linalg.vector_norm(value.double() - exact).item() / (scale or 1.0)


def bias(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """(|⟨X − E, E⟩| / ⟨E, E⟩, 1 / √n): how much of E the error is a multiple of, and what is left of errors of that
    size that know nothing of each other, where n = ⟨E, E⟩² / Σ E⁴ counts the entries that matter."""
    scale = torch.linalg.vector_norm(exact)
    if scale == 0:
        return 0.0, 1.0
    unit = exact / scale
    along = ((value.double() - exact) / scale * unit).sum().abs().item()
    return along, torch.linalg.vector_norm(unit.square()).item()


def middle_of_what_was_cut_off(value: Tensor) -> Tensor:
    """bfloat16 values as float32, half a unit in their last place further from zero."""
    return (value.float().view(torch.int32) | 0x8000).view(torch.float32)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """A B rounded to float64. Of float64 summed in long double: torch's own product would be exact by definition."""
    if a.dtype != torch.float64:
        return a.double() @ b.double()
    wide = [factor.cpu().numpy().astype(numpy.longdouble) for factor in (a, b)]
    return torch.from_numpy((wide[0] @ wide[1]).astype(numpy.float64)).to(a.device)


def exact_gram(a: Tensor) -> Tensor:
    return exact_product(a, a.mT)


def compare(ours: Tensor, torchs: Tensor, exact: Tensor, eps: float | None = None) -> dict[str, float]:
    """Both errors; asserts that ours is no worse than ``FACTOR`` times torch's, and no multiple of the result.

    The second sees a wrong factor far below the rounding of the result: in bfloat16, 1e-3 in some 500 entries.
    """
    computed = torch.finfo(torch.float64 if ours.dtype == torch.float64 else torch.float32).eps if eps is None else eps
    eps = torch.finfo(ours.dtype).eps if eps is None else eps
    along, chance = bias(ours, exact)
    if ours.dtype == torch.bfloat16 and ours.device.type == "cpu":  # the interpreter cuts off where a GPU rounds
        along = min(along, bias(middle_of_what_was_cut_off(ours), exact)[0])
    found = {"error": error(ours, exact), "torch_error": error(torchs, exact), "bias": along}
    assert found["error"] <= FACTOR * found["torch_error"] + ROUNDINGS * eps, found
    assert along <= FACTOR * max(found["torch_error"], eps / 2) * chance + BIAS_ROUNDINGS * computed, found
    return found


def check_statistics(found: task_sum.TaskSum, deltas: list[Tensor], batch_dims: int = 0) -> None:
    """Asserts what was seen of every Δ_t, given in float64 and finite."""
    stack = torch.stack(deltas)
    members = stack.reshape(*stack.shape[: 1 + batch_dims], -1) if stack.numel() else stack.new_zeros(len(deltas), 1)
    assert found.largest is not None
    torch.testing.assert_close(found.squares, members.square().sum(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.largest, members.abs().amax(-1), rtol=1e-6, atol=0)
    assert torch.equal(found.nonfinite, torch.zeros_like(found.nonfinite))
    assert found.nonfinite.shape == found.squares.shape


def through(backend: ModuleType, operation: str, *arguments: Any, **options: Any) -> Any:
    """Return an operation of ``ops``, which checks and allocates, by one of its backends."""
    with mock.patch.object(ops, "_backend", return_value=backend):
        return getattr(ops, operation)(*arguments, **options)


def sum_checks() -> Iterator[tuple[str, Check]]:
    def check(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> dict[str, float]:
        expert, base, total = dtypes
        experts = [random(shape, expert, device, seed) for seed in range(3)]
        experts.append(random(shape, base, device, 3))
        origin, weights, batch_dims = random(shape, base, device, 9), [1.0, 0.5, -2.0, 3.0], max(0, len(shape) - 2)
        out = poisoned(shape, total, device)
        ours = through(task_sum, "task_sum", experts, origin, weights=weights, out=out, batch_dims=batch_dims)
        assert ours.total is out
        deltas = [value.double() - origin.double() for value in experts]
        exact = torch.zeros(shape, dtype=torch.float64, device=device)
        for weight, delta in zip(weights, deltas, strict=True):
            exact += weight * delta
        torchs = through(reference, "task_sum", experts, origin, weights=weights, dtype=total, batch_dims=batch_dims)
        found = compare(ours.total, torchs.total, exact)
        check_statistics(ours, deltas, batch_dims)
        # Without a base the tensors are the deltas.
        bare = through(task_sum, "task_sum", experts, dtype=total, batch_dims=batch_dims)
        compare(
            bare.total,
            through(reference, "task_sum", experts, dtype=total).total,
            torch.stack([*map(Tensor.double, experts)]).sum(0),
        )
        return found

    for shape_name, shape in SHAPES.items():
        for dtype_name, dtypes in SUM_DTYPES.items():
            if shape_name in ("odd", "batch", "scalar", "empty") or dtype_name in ("bf16", "fp32"):
                yield f"{shape_name}-{dtype_name}", bind(check, shape, dtypes)

    def strided(device: torch.device) -> dict[str, float]:
        experts = [random((60, 40), torch.float32, device, seed).mT for seed in range(2)]
        experts.append(random((40, 64), torch.float32, device, 2)[:, 3:63])  # rows at a distance, not aligned
        base = random((40, 60), torch.float32, device, 3)
        deltas = [value.double() - base.double() for value in experts]
        rows_only = through(task_sum, "task_sum", experts[2:], base)
        compare(rows_only.total, experts[2] - base, deltas[2])
        check_statistics(rows_only, deltas[2:])
        ours = through(task_sum, "task_sum", experts, base)
        check_statistics(ours, deltas)
        return compare(ours.total, through(reference, "task_sum", experts, base).total, torch.stack(deltas).sum(0))

    def far_apart(device: torch.device) -> dict[str, float]:
        # Side by side in one tensor, which takes real memory on a GPU.
        *experts, base = beyond_int32((3, 3 * 512), torch.bfloat16, device, 0).split(512, 1)
        deltas = [value.double() - base.double() for value in experts]
        exact = torch.stack(deltas).sum(0)
        ours = through(task_sum, "task_sum", experts, base)
        check_statistics(ours, deltas)
        return compare(ours.total, exact.float(), exact)

    def not_finite(device: torch.device) -> dict[str, float]:
        experts = [random((3, 50, 70), torch.bfloat16, device, seed) for seed in range(3)]
        base = torch.zeros_like(experts[0])
        experts[1][2, 7, 11] = torch.nan
        experts[1][2, 8, 11] = -torch.inf
        experts[2][0, 0, 0] = torch.inf
        ours = through(task_sum, "task_sum", experts, base, batch_dims=1)
        theirs = through(reference, "task_sum", experts, base, batch_dims=1)
        assert ours.nonfinite.tolist() == theirs.nonfinite.tolist() == [[0, 0, 0], [0, 0, 2], [1, 0, 0]]
        assert ours.largest is not None
        assert theirs.largest is not None
        torch.testing.assert_close(ours.largest, theirs.largest, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(ours.squares, theirs.squares, rtol=1e-5, atol=0, equal_nan=True)
        exact = torch.stack([value.double() - base.double() for value in experts]).sum(0)
        finite = exact.isfinite()
        torch.testing.assert_close(ours.total[~finite].double(), exact[~finite], rtol=0, atol=0, equal_nan=True)
        without = through(reference, "task_sum", experts, base, batch_dims=1, largest=False)
        assert without.largest is None
        assert torch.equal(without.nonfinite, theirs.nonfinite)
        return compare(ours.total[finite], theirs.total[finite], exact[finite])

    def configurations(device: torch.device) -> dict[str, float]:
        experts = [random((63, 501), torch.bfloat16, device, seed) for seed in range(9)]
        sums = [
            task_sum.task_sum(experts, experts[0], [1.0] * 9, poisoned((63, 501), torch.float32, device), config=config)
            for config in task_sum.CONFIGS[torch.float32]
        ]
        assert all(torch.equal(each.total, sums[0].total) for each in sums)  # element by element the same order
        deltas = [value.double() - experts[0].double() for value in experts]
        for each in sums:
            check_statistics(each, deltas)
        return compare(
            sums[0].total, through(reference, "task_sum", experts, experts[0]).total, torch.stack(deltas).sum(0)
        )

    def sizes(device: torch.device) -> dict[str, float]:
        """Norms of all that the dtypes hold, in both forms, also where one block is large and all others are not."""
        x = random((2, 2048), torch.float64, device, 0)
        for dtype, scale in (
            *((torch.float32, scale) for scale in (1e-30, 1e-22, 1e-14, 1e-13, 1e-12, 1e7, 1e17, 1e18, 1e19, 7e37)),
            *((torch.bfloat16, 7e37), (torch.float64, 1e-120), (torch.float64, 1e120)),
        ):
            delta = x.to(dtype)
            rows = slice(1 if scale > 1 else 0, 2)
            delta[rows] = (x[rows] * scale).to(dtype)
            exact = torch.linalg.vector_norm(delta.double())[None]
            for form in (task_sum, reference):
                found = through(form, "task_sum", [delta], torch.zeros_like(delta), dtype=torch.float64)
                torch.testing.assert_close(found.squares.sqrt(), exact, rtol=1e-5, atol=0)
                assert found.largest is not None
                assert torch.equal(found.largest, delta.double().abs().amax()[None])
                assert torch.equal(found.total.double(), delta.double())
                assert not found.nonfinite.any()
        for form in (task_sum, reference):
            for dtype, scale in ((torch.float32, 1e-44), (torch.float64, 1e-200)):
                assert bool((through(form, "task_sum", [(x * scale).to(dtype)]).squares > 0).all())  # not zero
            found = through(form, "task_sum", [x * 1e200])  # not a count of what is not finite
            assert found.squares.isinf().all()
            assert not found.nonfinite.any()
            assert not through(form, "task_sum", [x * 0.0]).squares.any()
            unchanged = torch.zeros(2, 2048, device=device)
            unchanged[1, 5] = torch.nan
            assert through(form, "task_sum", [unchanged]).nonfinite.tolist() == [
                1
            ]  # however little else there is to see
        return {}

    yield from (("strided", strided), ("far-apart", far_apart), ("not-finite", not_finite), ("sizes", sizes))
    yield "configurations", configurations


def apply_checks() -> Iterator[tuple[str, Check]]:
    scalings = [0.3, 1.0, -2.5]

    def check(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> dict[str, float]:
        base_dtype, delta_dtype, out_dtype = dtypes
        base, delta = random(shape, base_dtype, device, 0), random(shape, delta_dtype, device, 1)
        ours = through(apply_delta, "apply_delta", base, delta, scalings=scalings, dtype=out_dtype)
        theirs = through(reference, "apply_delta", base, delta, scalings=scalings, dtype=out_dtype)
        found = {}
        for scaling, value, expected in zip(scalings, ours, theirs, strict=True):
            assert value.dtype == out_dtype
            found = compare(value, expected, base.double() + scaling * delta.double())
        return found

    for shape_name, shape in SHAPES.items():
        yield f"{shape_name}-bf16", bind(check, shape, (torch.bfloat16, torch.float32, torch.bfloat16))
    for name, dtypes in {
        "fp16": (torch.float16, torch.float32, torch.float16),
        "fp32": (torch.float32, torch.float32, torch.float32),
        "fp64-to-bf16": (torch.bfloat16, torch.float64, torch.bfloat16),
        "fp64": (torch.float64, torch.float64, torch.float64),
    }.items():
        yield f"batch-{name}", bind(check, SHAPES["batch"], dtypes)

    def far_apart(device: torch.device) -> dict[str, float]:
        base, delta = beyond_int32((3, 64), torch.bfloat16, device, 0), random((64, 3), torch.float32, device, 1).mT
        (ours,) = through(apply_delta, "apply_delta", base, delta, scalings=[0.7], dtype=torch.float32)
        return compare(ours, base.float() + 0.7 * delta, base.double() + 0.7 * delta.double())

    def strided(device: torch.device) -> dict[str, float]:
        # A line a row.
        base, delta = (
            random((3, 40, 64), torch.float32, device, 0)[..., 3:63],
            random((3, 40, 60), torch.float32, device, 1),
        )
        (ours,) = through(apply_delta, "apply_delta", base, delta, scalings=[0.7], dtype=torch.float32)
        return compare(ours, base + 0.7 * delta, base.double() + 0.7 * delta.double())

    def stochastic(device: torch.device) -> dict[str, float]:
        """The very bits of the reference, whatever the device, and a mean that is the value."""
        for shape in ((63, 501), (4096,), (3, 40, 70)):
            base, delta = random(shape, torch.float32, device, 0), random(shape, torch.float32, device, 1)
            for seed in (1, 2**62 + 7):
                options = {"scalings": scalings, "dtype": torch.bfloat16, "seed": seed}
                ours = through(apply_delta, "apply_delta", base, delta, **options)
                theirs = through(reference, "apply_delta", base.cpu(), delta.cpu(), **options)
                for value, expected in zip(ours, theirs, strict=True):
                    # Where two ways to compute θ₀ + αΔ differ in the last place of float32, rounding may differ too.
                    assert (value.cpu() != expected).double().mean().item() <= 2e-4
        # What is made in pieces has the bits of the whole.
        base, delta = random((64, 500), torch.float32, device, 0), random((64, 500), torch.float32, device, 1)
        pieces = {"scalings": [0.7], "dtype": torch.bfloat16, "seed": 5}
        (whole,) = through(apply_delta, "apply_delta", base, delta, **pieces)
        for backend in (apply_delta, reference):
            lower, upper = (
                through(backend, "apply_delta", base[rows], delta[rows], first=500 * rows.start, **pieces)[0]
                for rows in (slice(0, 24), slice(24, 64))
            )
            assert (torch.cat([lower, upper]) != whole).double().mean().item() <= 2e-4
        value = torch.full((1 << 16,), 1.0 + 2.0**-9, device=device)  # a quarter of the way from 1 to its neighbour
        (rounded,) = through(
            apply_delta, "apply_delta", value, torch.zeros_like(value), scalings=[1.0], dtype=torch.bfloat16, seed=3
        )
        up = (rounded > 1.0).double().mean().item()
        assert abs(up - 0.25) <= 6 * math.sqrt(0.25 * 0.75 / len(value)), up
        extreme = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45], device=device)
        extreme.view(torch.int32)[0] = 0x7FFFFFFF  # the NaN that one more would make -0
        (kept,) = through(
            apply_delta, "apply_delta", extreme, torch.zeros_like(extreme), scalings=[1.0], dtype=torch.bfloat16, seed=3
        )
        torch.testing.assert_close(kept[:5].float(), extreme[:5], rtol=0, atol=0, equal_nan=True)
        return {"up": up}

    yield from (("far-apart", far_apart), ("strided", strided), ("stochastic", stochastic))


def product_checks() -> Iterator[tuple[str, Check]]:
    sides = {
        "square": (128, 128),
        "wide": (64, 500),
        "tall": (200, 40),
        "odd": (63, 501),
        "row": (1, 70),
        "empty": (0, 4),
    }

    def check(
        n: int, k: int, dtype: torch.dtype, precision: str, config: symmetric_matmul.TileConfig, device: torch.device
    ) -> dict[str, float]:
        if device.type == "cpu" and dtype == torch.bfloat16:  # which the interpreter multiplies wrongly
            dtype = torch.float32
        a, c = random((2, n, k), dtype, device, 0), random((2, n, n), dtype, device, 1)
        c = c + c.mT
        alpha, beta, gamma = 0.7, -0.3, 2.0
        identity = torch.eye(n, dtype=torch.float64, device=device)
        exact = alpha * exact_gram(a) + beta * c.double() + gamma * identity
        torchs = alpha * a @ a.mT + beta * c + gamma * identity.to(dtype)
        # bf16x3 keeps 16 bits of every factor.
        eps = 2.0**-16 if precision == "bf16x3" and dtype == torch.float32 else None
        out = poisoned((2, n, n), dtype, device)
        options = {"precision": precision if device.type == "cuda" else "ieee", "config": config}
        ours = symmetric_matmul.symmetric_matmul(a, c=c, alpha=alpha, beta=beta, gamma=gamma, out=out, **options)
        assert ours is out
        found = compare(ours, torchs, exact, eps)
        assert torch.equal(ours, ours.mT)  # exactly symmetric
        # Aᵀ A of the transpose, no C, one matrix; then with C overwritten.
        other = symmetric_matmul.symmetric_matmul(a[0].mT.contiguous().mT, **options)
        compare(other, a[0] @ a[0].mT, exact_gram(a[0]), eps)
        nested = symmetric_matmul.symmetric_matmul(a[:, None].expand(2, 3, n, k), **options)  # two batch dimensions
        assert nested.shape == (2, 3, n, n)
        assert torch.equal(nested[1, 2], symmetric_matmul.symmetric_matmul(a[1], **options))
        both = c.clone()
        symmetric_matmul.symmetric_matmul(a, c=both, alpha=alpha, beta=beta, gamma=gamma, out=both, **options)
        assert torch.equal(both, ours)
        return found

    for key, configs in symmetric_matmul.CONFIGS.items():
        dtype = {"fp64": torch.float64, "half": torch.bfloat16}.get(key, torch.float32)
        for config in configs:
            for name, (n, k) in sides.items():
                if name in ("odd", "row") or config == configs[0]:
                    precision = key if dtype == torch.float32 else "ieee"
                    yield f"{key}-{config.block}x{config.block_k}-{name}", bind(check, n, k, dtype, precision, config)

    def polynomial(device: torch.device) -> dict[str, float]:
        """A B of two polynomials of one symmetric matrix, and more tiles than a group has."""
        n = 260
        x = random((n, n), torch.float64, device, 0)
        gram = x @ x.mT / n
        config = symmetric_matmul.TileConfig(32, 32, 4, 2)
        assert n > config.block * symmetric_matmul.GROUP
        square = symmetric_matmul.symmetric_matmul(gram, gram, config=config)
        ours = symmetric_matmul.symmetric_matmul(square, gram, c=gram, alpha=0.5, beta=-1.0, gamma=3.0, config=config)
        eye = torch.eye(n, dtype=torch.float64, device=device)
        torchs = 0.5 * (gram @ gram) @ gram - gram + 3.0 * eye
        exact = 0.5 * exact_product(exact_product(gram, gram), gram) - gram + 3.0 * eye
        return compare(ours, torchs, exact)

    def far_apart(device: torch.device) -> dict[str, float]:
        a = beyond_int32((3, 64), torch.float32, device, 0)
        ours = symmetric_matmul.symmetric_matmul(a)
        return compare(ours, a @ a.mT, a.double() @ a.double().mT)

    yield from (("polynomial", polynomial), ("far-apart", far_apart))


def beyond_int32(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """A matrix whose last row begins more than 2^31 elements after its first; a CPU touches next to none of that
    memory, but a GPU has to have all of it (``LARGE``)."""
    rows, columns = shape
    distance = 2**31 // (rows - 1) + 64
    x = torch.empty(distance * (rows - 1) + columns, dtype=dtype, device=device).as_strided(shape, (distance, 1))
    return x.copy_(random(shape, dtype, device, seed))


def bind(check: Callable[..., dict[str, float]], *arguments: Any) -> Check:
    return lambda device: check(*arguments, device)


CHECKS: dict[str, Check] = {
    **{f"task_sum-{name}": check for name, check in sum_checks()},
    **{f"apply_delta-{name}": check for name, check in apply_checks()},
    **{f"symmetric_matmul-{name}": check for name, check in product_checks()},
}

# Checks that allocate gigabytes on a GPU, and how many bytes: last, and in a process of their own.
LARGE: dict[str, int] = {
    "task_sum-far-apart": 2**31 * torch.bfloat16.itemsize,
    "apply_delta-far-apart": 2**31 * torch.bfloat16.itemsize,
    "symmetric_matmul-far-apart": 2**31 * torch.float32.itemsize,
}
