"""The Triton kernels against float64 and against plain torch: interpreted here, compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isomerge_fast import errors, ops
from isomerge_fast.linalg.polar_express import PolarExpress
from isomerge_fast.linalg.polar_gram import GramNewtonSchulz
from isomerge_fast.methods import METHODS, MemoryDeltas
from isomerge_kernels import apply_delta, launchers, reference, symmetric_matmul, task_sum
from isomerge_kernels.devices import DeviceTraits
from kernel_checks import CHECKS, LARGE, Check, through

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_kernel(check: Check) -> None:
    check(DEVICE)


# What a check cannot see of results that are off by a factor.
BLIND = {
    "task_sum-empty": {"total", "total × 1.5", "squares", "largest", "nonfinite"},  # which no kernel is called for
    "apply_delta-empty": {"out", "out × 1.5"},
    **{name: {"out", "out × 1.5"} for name in CHECKS if name.startswith("symmetric_matmul-") and "-empty" in name},
    "apply_delta-scalar": {"out"},  # one bfloat16, whose rounding is larger
}


def mutate(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Put torch's own results in place of the kernels', of which ``what`` is off: by a factor 1.001, a count by 1."""
    factor = {"nothing": 1.0, "total × 1.5": 1.5, "out × 1.5": 1.5}.get(what, 1.001)
    field = what.removesuffix(" × 1.5")

    def sums(
        experts: list[Tensor],
        base: Tensor | None,
        weights: list[float],
        out: Tensor,
        *options: Any,
        config: object = None,
    ) -> task_sum.TaskSum:
        found = reference.task_sum(experts, base, weights, out, *options)
        wide = None if base is None else base.double()
        exact = reference.task_sum([*map(Tensor.double, experts)], wide, weights, out.double(), *options)
        found = found._replace(squares=exact.squares, largest=exact.largest)
        if field in found._fields:
            value = getattr(found, field)
            value.add_(1) if field == "nonfinite" else value.mul_(factor)
        return found

    def outputs(base: Tensor, delta: Tensor, *options: Any) -> list[Tensor]:
        wide = torch.promote_types(base.dtype, delta.dtype)  # the factor comes before the rounding
        return reference.apply_delta(base.to(wide) * factor, delta * factor, *options)

    def product(a: Tensor, b: Tensor | None = None, **options: Any) -> Tensor:
        # Copies are aligned alike: the same bits wherever a matrix stands.
        b = a.mT if b is None else b
        found = torch.stack([copied(x) @ copied(y) for x, y in zip(members(a), members(b), strict=True)])
        found = found.reshape(*a.shape[:-1], a.shape[-2]).mul_(options.get("alpha", 1.0))
        if options.get("c") is not None:
            found += options.get("beta", 1.0) * options["c"]
        found.diagonal(dim1=-2, dim2=-1).add_(options.get("gamma", 0.0))
        found = (found.tril() + found.tril(-1).mT).mul_(factor)
        return found if options.get("out") is None else options["out"].copy_(found)

    def copied(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    def members(x: Tensor) -> Tensor:
        return x.reshape(x.shape[:-2].numel(), *x.shape[-2:]).contiguous()

    monkeypatch.setattr(task_sum, "task_sum", sums)
    monkeypatch.setattr(apply_delta, "apply_delta", outputs)
    monkeypatch.setattr(symmetric_matmul, "symmetric_matmul", product)


@pytest.mark.parametrize("name", CHECKS)
def test_checks_see_what_is_wrong(name: str) -> None:
    sums = ("total", "total × 1.5", "squares", "largest", "nonfinite")
    blind = {what for start, whats in BLIND.items() if name.startswith(start) for what in whats}
    cpu = torch.device("cpu")
    for what in ("nothing", *(sums if name.startswith("task_sum") else ("out", "out × 1.5"))):
        with pytest.MonkeyPatch.context() as patched:
            mutate(patched, what)
            if what == "nothing" or what in blind:
                CHECKS[name](cpu)
            else:
                with pytest.raises(AssertionError):
                    CHECKS[name](cpu)


def test_large_checks_are_those_far_apart() -> None:
    assert set(LARGE) == {name for name in CHECKS if name.endswith("far-apart")}


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
    deltas = [torch.randn(shape, generator=generator).to(DEVICE) for _ in range(3)]
    value, stats = METHODS[name]().merge(MemoryDeltas(deltas))
    assert "task_sum" in through_kernels
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(ops, "_has_kernels", lambda tensor: False)
        expected, _ = METHODS[name]().merge(MemoryDeltas([delta.double() for delta in deltas]))
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
def test_task_sum_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.task_sum(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": torch.ones(4)}, r"delta\[0\] has shape \[4\], expected \[3\]"),
        ({"delta": torch.ones(3, dtype=torch.bfloat16)}, "delta is torch.bfloat16; expected float32 or float64"),
        ({"dtype": torch.int8}, "dtype torch.int8"),
        ({"seed": 1, "dtype": torch.float16}, "stochastic rounding is to bfloat16, not to torch.float16"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"seed": 1, "first": 12}, "first is 12; expected a multiple of 8"),
    ],
)
def test_apply_delta_refuses(arguments: dict, message: str) -> None:
    valid = {"base": torch.ones(3), "delta": torch.ones(3), "scalings": [1.0], "dtype": torch.bfloat16}
    with pytest.raises(ValueError, match=message):
        ops.apply_delta(**(valid | arguments))


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


def test_symmetric_matmul_of_members_in_common() -> None:
    """One factor for all members of the other."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    scales = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[:, None, None]
    expected = scales * (a @ a.mT)
    for left, right in ((a, scales * a.mT), (a[None], scales * a.mT), (scales * a, a.mT), (scales * a, a.mT[None])):
        torch.testing.assert_close(symmetric_matmul.symmetric_matmul(left, right), expected)
    twice = symmetric_matmul.symmetric_matmul(a, (scales * a.mT).expand(2, 3, 7, 20))
    torch.testing.assert_close(twice, expected.expand(2, 3, 20, 20))


def test_small_tiles_until_large_ones_fill_a_gpu() -> None:
    large, small = symmetric_matmul.CONFIGS["tf32x3"]
    for capability, side, expected in (
        ((9, 0), 4096, large),
        ((9, 0), 3072, small),
        ((8, 0), 4096, small),  # where large ones spill
        (None, 4096, large),
    ):
        assert symmetric_matmul.default_config("tf32x3", capability, side * side) == expected
    assert symmetric_matmul.default_config("fp64", (9, 0), 1) == symmetric_matmul.CONFIGS["fp64"][0]


def test_one_matrix_is_launched_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No view is made of it, and registers are limited where NVIDIA's compiler knows the option."""
    launches: list[tuple[tuple, dict]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, int]) -> object:
            return lambda *arguments, **options: launches.append((arguments, options))

    monkeypatch.setattr(symmetric_matmul, "symmetric_matmul_kernel", Recorded())
    a, out = torch.ones(128, 64, dtype=torch.float64), torch.empty(128, 128, dtype=torch.float64)
    for capability in ((9, 0), None):
        traits = DeviceTraits(True, capability)
        monkeypatch.setattr(symmetric_matmul, "traits_of", lambda device, traits=traits: traits)
        symmetric_matmul.symmetric_matmul(a, out=out)
        (left, _, _, target, *numbers), options = launches.pop()
        assert left is a
        assert target is out
        assert numbers[:6] == [128, 64, 2, 0, 64, 1]
        assert options.get("maxnreg", 0) == (symmetric_matmul.CONFIGS["fp64"][0].max_registers if capability else 0)


class Launched:
    """In place of a kernel: nothing is run."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*_: object, **__: object) -> None:
            self.count += 1

        return launch


class Operations(TorchDispatchMode):
    """The names of torch's operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


def test_a_call_costs_the_host_two_launches_and_next_to_nothing_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices wait for the host: what torch does around the kernels takes longer than they do."""
    kernels = {name: Launched() for name in ("task_sum_kernel", "add_up_kernel")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(task_sum, name, kernel)
    experts = [torch.ones(2, 3, 4, dtype=torch.bfloat16) for _ in range(8)]
    with Operations() as found:
        task_sum.task_sum(experts, experts[0], [1.0] * 8, torch.empty(2, 3, 4), batch_dims=1)
    assert [kernel.count for kernel in kernels.values()] == [1, 1]
    assert set(found.names) == {"empty"}  # and on a GPU the table goes up
    assert len(found.names) == 5
    monkeypatch.setattr(apply_delta, "apply_delta_kernel", Launched())
    delta = torch.ones(2, 3, 4)
    with Operations() as found:
        apply_delta.apply_delta(experts[0], delta, scalings=[1.0, 2.0], dtype=torch.bfloat16)
    assert set(found.names) == {"empty", "select", "lift_fresh", "unbind"}  # the outputs, and α on a CPU


@pytest.mark.parametrize("batch_dims", [1, 2])
def test_members_that_are_parts_of_rows(batch_dims: int) -> None:
    """Rows at a distance, of which each holds several members of the batch."""
    wide = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    delta = wide[:, 1:6]
    found = through(task_sum, "task_sum", [delta], batch_dims=batch_dims)
    assert found.squares.shape == (1, *delta.shape[:batch_dims])
    torch.testing.assert_close(
        found.squares.flatten(), delta.double().square().reshape(-1, 5 if batch_dims == 1 else 1).sum(-1)
    )


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
    # Element e: half e mod 2 of word (e mod 8) // 2, of the counter of e // 8 in two words and of two zeros.
    seed, group = 2**62 + 7, 2**33 + 3
    counter = (torch.tensor([3]), torch.tensor([2]), torch.tensor([0]), torch.tensor([0]))
    words = [int(word) for word in reference.philox4x32(counter, (7, 2**30))]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert reference.random_bits(seed, 8 * group, 8).tolist() == halves
    # Blocks of a tensor take the bits of their place.
    whole = reference.random_bits(5, 0, 1000)
    assert torch.equal(reference.random_bits(5, 333, 200), whole[333:533])
    assert not torch.equal(reference.random_bits(6, 0, 1000), whole)
