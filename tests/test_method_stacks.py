"""Stacks of matrices of one shape, by the methods: the same bytes in any company, and what is not regular alone.

On a pretended GPU, with the arithmetic of a CPU; whether a GPU's libraries keep the bytes, ``benchmarks.gpu`` sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import isomerge_fast as imf
import oracle
from allocation import peak_bytes
from cases import Case
from isomerge_fast.errors import InputError
from isomerge_fast.linalg import auto
from isomerge_fast.linalg.auto import STACK_SIDE, TOLERANCES, stack_places
from isomerge_fast.linalg.gram_eigh import GramEigh
from isomerge_fast.linalg.spectrum import _start_block
from isomerge_fast.methods import MemoryDeltas, MergeStats, TensorSpec, make_method
from isomerge_kernels import devices
from isomerge_kernels.devices import DeviceTraits
from pretend_gpu import CUDA, H100, RTX5090, PretendGpu, pretend_gpu

METHODS = ("iso-c", "iso-cts")
ORACLES = {"iso-c": oracle.iso_c, "iso-cts": oracle.iso_cts}
CPU = torch.device("cpu")
DOUBLE = torch.float64
SHAPES = {"square": (80, 80), "wide": (64, 150), "tall": (150, 64), "searched": (300, 136), "tiny": (7, 20)}
PLACES = 8


@pytest.fixture(autouse=True)
def _few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks of eight, so that forty-eight are six of them."""
    monkeypatch.setattr(auto, "LARGEST_STACK", PLACES)


def matrices(shape: tuple[int, int], count: int, tasks: int = 3) -> list[list[Tensor]]:
    """Return the deltas of so many matrices."""
    return [Case(seed, *shape, 30.0, tasks).deltas() for seed in range(count)]


def merge_on(gpu: PretendGpu, name: str, given: Sequence[Sequence[Tensor]], **options: object) -> list:
    method = make_method(name, options)
    sources = [MemoryDeltas([gpu.upload(delta) for delta in deltas]) for deltas in given]
    results = [each for at in range(0, len(sources), PLACES) for each in method.merge_stack(sources[at : at + PLACES])]
    return [(value.cpu(), stats) for value, stats in results]


def error_of(value: Tensor, deltas: Sequence[Tensor], name: str) -> float:
    return oracle.relative_error(value.double().numpy(), ORACLES[name]([delta.double().numpy() for delta in deltas]))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_one_seven_and_all_have_the_same_bytes(shape: tuple[int, int], name: str) -> None:
    is_model = shape == SHAPES["square"]
    count = 48 if is_model else 9
    given = matrices(shape, count)
    with pretend_gpu() as gpu:
        every = merge_on(gpu, name, given)
        for chosen in ([count - 1], list(range(2, 9)), *([[0], [8, 3, 0]] if is_model else [])):
            for place, (value, stats) in zip(chosen, merge_on(gpu, name, [given[i] for i in chosen]), strict=True):
                assert torch.equal(value, every[place][0])
                assert stats.algorithm == every[place][1].algorithm
                assert torch.equal(stats.values["sigma_mean"], every[place][1].values["sigma_mean"])
    for place in (0, count // 2, count - 1):
        value, stats = every[place]
        assert not stats.missed()
        assert not stats.escalations
        assert stats.values["rank"].shape == ()
        assert stats.values["delta_norms"].tolist() == pytest.approx([float(d.double().norm()) for d in given[place]])
        assert error_of(value, given[place], name) <= 1e-6


@pytest.mark.parametrize("tasks", [1, 2, 8, 20])
def test_numbers_of_tasks(tasks: int) -> None:
    given = matrices((120, 130), 2, tasks)
    with pretend_gpu() as gpu:
        for (value, stats), deltas in zip(merge_on(gpu, "iso-cts", given), given, strict=True):
            assert stats.algorithm == "iso-cts/spectral-filter-fp64"
            assert not stats.missed()
            assert error_of(value, deltas, "iso-cts") <= 1e-6


def irregular(shape: tuple[int, int]) -> dict[str, list[Tensor]]:
    """Return deltas that take a closer look: what a stack is not for."""
    first, second, third = matrices(shape, 3)
    # One direction so small that a float64 Gram matrix hides it, and the input's own rounding does not.
    steep = [delta.clone() for delta in third]
    for delta in steep:
        delta[0] = 0.0
        delta[:, 0] = 0.0
        delta[1:] *= 1e-9
        delta[0, 0] = 1.0
    return {
        "deficient": [delta[:, :9] @ delta[:9, : delta.shape[1]] for delta in first],
        "cancelling": [second[0], -second[0], torch.zeros_like(second[0])],
        "one task": [first[0], torch.zeros_like(first[0]), torch.zeros_like(first[0])],
        "zero": [torch.zeros_like(delta) for delta in first],
        "steep": steep,
    }


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [SHAPES["square"], SHAPES["wide"], SHAPES["tall"]], ids=str)
@pytest.mark.parametrize("kind", irregular((16, 16)))
def test_what_is_not_regular_is_merged_alone_and_harms_no_neighbour(
    kind: str, shape: tuple[int, int], name: str
) -> None:
    odd, given = irregular(shape)[kind], matrices(shape, 3)
    with pretend_gpu() as gpu:
        plain = merge_on(gpu, name, given)
        mixed = merge_on(gpu, name, [given[0], odd, given[1], given[2]])
        alone, stats = make_method(name).merge(MemoryDeltas([gpu.upload(delta) for delta in odd]))
    for (value, _), place in zip(plain, (0, 2, 3), strict=True):
        assert torch.equal(mixed[place][0], value)
        assert not mixed[place][1].escalations
    value, found = mixed[1]
    assert found.missed().keys() == stats.missed().keys()
    if found.escalations:
        assert torch.equal(value, alone.cpu())
        assert found.escalations[1:] == stats.escalations
        assert "spectral-filter" in found.escalations[0] or name == "iso-c"
    else:
        assert oracle.relative_error(value.numpy(), alone.cpu().numpy()) <= 1e-6
    if (kind, name) in {("deficient", "iso-cts"), ("deficient", "iso-c"), ("cancelling", "iso-cts")}:
        assert found.escalations


def hidden_from_power_iterations(rows: int, columns: int) -> list[Tensor]:
    """Return deltas whose largest direction, 1.3 times all others, is orthogonal to what such iterations begin with."""
    generator = torch.Generator().manual_seed(3)
    start = _start_block(rows, CPU)
    basis = torch.linalg.qr(torch.cat([start, torch.randn(rows, rows - 8, generator=generator, dtype=DOUBLE)], 1))[0]
    right = torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=DOUBLE))[0]
    sigma = torch.linspace(1.0, 0.9, rows, dtype=DOUBLE)
    sigma[-1] = 1.3
    own = 0.05 * torch.randn(3, rows, columns, generator=generator, dtype=DOUBLE) / columns**0.5
    return [((basis * sigma) @ right.mT / 3 + part - own.mean(0)).float() for part in own]


@pytest.mark.parametrize("is_tall", [False, True], ids=["wide", "tall"])
def test_a_member_that_overflows_harms_no_neighbour(is_tall: bool) -> None:
    """Its σ₁ is taken for less than it is, and the polar iteration ends in NaN."""
    given = matrices((80, 64) if is_tall else (64, 80), 2)
    with pretend_gpu() as gpu:
        plain = merge_on(gpu, "iso-cts", given)
        odd = [delta.mT if is_tall else delta for delta in hidden_from_power_iterations(64, 80)]
        mixed = merge_on(gpu, "iso-cts", [given[0], odd, given[1]])
    assert mixed[1][1].escalations
    assert error_of(mixed[1][0], odd, "iso-cts") <= 1e-6
    for place, (value, _) in zip((0, 2), plain, strict=True):
        assert not mixed[place][1].escalations
        assert torch.equal(mixed[place][0], value)


def test_a_singular_factor_that_comes_through_is_none() -> None:
    """Eight times the same: [U_1 … U_8] is singular, and rounding lets its Cholesky factor exist."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        delta = torch.randn(33, 120, generator=generator)
        with pretend_gpu() as gpu:
            ((value, stats),) = merge_on(gpu, "iso-cts", [[delta] * 8])
        assert stats.escalations
        expected, _ = make_method("iso-cts").merge(MemoryDeltas([delta] * 8))
        assert oracle.relative_error(value.numpy(), expected.numpy()) <= 1e-5


@pytest.mark.parametrize("traits", [H100, RTX5090], ids=["h100", "rtx"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("shape", [SHAPES["wide"], SHAPES["tall"]], ids=["wide", "tall"])
def test_a_batch_with_more_directions_of_tasks_than_common_ones(
    shape: tuple[int, int], fraction: float, traits: DeviceTraits
) -> None:
    given = matrices(shape, 3)
    batch = [torch.stack([deltas[task] for deltas in given]) for task in range(3)]
    with pretend_gpu(traits) as gpu:
        value = imf.iso_cts([gpu.upload(delta) for delta in batch], common_fraction=fraction).cpu()
    for member, deltas in enumerate(given):
        judge = oracle.iso_cts([delta.double().numpy() for delta in deltas], fraction)
        assert oracle.relative_error(value[member].numpy(), judge) <= 1e-5


def test_below_the_steps_that_all_get_a_matrix_is_merged_alone() -> None:
    """κ of a long sum is 25 to 1000, and this one's 1e5."""
    given = [*matrices(SHAPES["wide"], 2), Case(5, *SHAPES["wide"], 1e5, 3).deltas()]
    with pretend_gpu() as gpu:
        for name in METHODS:
            results = merge_on(gpu, name, given)
            assert [bool(stats.escalations) for _, stats in results] == [False, False, True]
            assert "orthogonality" in results[2][1].escalations[0]
            assert not results[2][1].missed()
            assert error_of(results[2][0], given[2], name) <= 1e-6


def test_damage_is_an_error_of_the_stack() -> None:
    given = matrices(SHAPES["square"], 3)
    given[1][2][3, 4] = torch.nan
    with pretend_gpu() as gpu, pytest.raises(InputError, match=r"deltas\[2\] holds NaN or Inf"):
        merge_on(gpu, "iso-c", given)


def test_a_solver_that_fails_leaves_every_matrix_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    given = matrices(SHAPES["square"], 2)

    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("the filter broke\nat line 7")

    monkeypatch.setattr("isomerge_fast.linalg.filtered.bottom_block", fail)
    with pretend_gpu() as gpu:
        for (value, stats), deltas in zip(merge_on(gpu, "iso-cts", given), given, strict=True):
            assert stats.escalations == ("stack: the filter broke",)
            assert not stats.missed()
            assert error_of(value, deltas, "iso-cts") <= 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_in_memory_is_stacks(name: str) -> None:
    """[T, 2, 5, M, N]: two stacks of its ten matrices; the evidence has the batch's dimensions."""
    given = matrices(SHAPES["wide"], 10)
    batch = [torch.stack([given[i][task] for i in range(10)]).unflatten(0, (2, 5)) for task in range(3)]
    function = imf.iso_c if name == "iso-c" else imf.iso_cts
    with pretend_gpu() as gpu:
        uploaded = [gpu.upload(delta) for delta in batch]
        value, stats = make_method(name).merge(MemoryDeltas(uploaded))
        value, single = value.cpu(), merge_on(gpu, name, given)
        assert torch.equal(function([delta.flatten(0, 1) for delta in uploaded]).cpu(), value.flatten(0, 1))
        before = gpu.launch_count
        merge_on(gpu, name, given[:1])
        of_a_stack = gpu.launch_count - before
        before = gpu.launch_count
        merge_on(gpu, name, given[:PLACES])
        # What it is for: a launch for all, but for sums and what is put together.
        assert gpu.launch_count - before <= 1.3 * of_a_stack
    assert value.shape == (2, 5, *SHAPES["wide"])
    assert torch.equal(value.flatten(0, 1), torch.stack([each for each, _ in single]))
    assert stats.values["rank"].shape == stats.checks["orthogonality"].value.shape == (2, 5)
    norms = [float(delta.double().norm()) for delta in batch]
    assert stats.values["delta_norms"].tolist() == pytest.approx(norms)
    assert not stats.missed()


def test_one_read_for_a_stack_and_few_beside() -> None:
    """NaN and sizes, task parts, the evidence; and flags of torch's eigensolver, of which cuSOLVER's has none."""
    given = matrices(SHAPES["square"], PLACES)
    with pretend_gpu() as gpu:
        merge_on(gpu, "iso-cts", given)  # fixed draws are made
        for name, most in (("iso-c", 2), ("iso-cts", 5)):
            sources = [MemoryDeltas([gpu.upload(delta) for delta in deltas]) for deltas in given]
            gpu.reset()
            make_method(name).merge_stack(sources)
            assert gpu.read_count <= most


@pytest.fixture
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices.KNOWN, CUDA, H100)


@pytest.mark.usefixtures("_known")
def test_which_matrices_have_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "LARGEST_STACK", 64)
    single = torch.float32
    found = {shape: stack_places(shape, single, CUDA) for shape in [(768, 768), (3072, 768), (1024, 4096), (8, 8)]}
    assert found == {(768, 768): 32, (3072, 768): 8, (1024, 4096): 8, (8, 8): 64}
    assert stack_places((STACK_SIDE + 1, STACK_SIDE + 1), single, CUDA) == 1
    assert stack_places((512, 32768), single, CUDA) == 1  # an embedding
    assert stack_places((768, 768), torch.float64, CUDA) == 1
    assert stack_places((768, 768), single, CPU) == 1
    spec = TensorSpec("x", (768, 768), single)
    assert make_method("iso-cts").stack_size(spec, 8, CUDA) == 32
    for options in ({"precision": "reference"}, {"solver": GramEigh()}, {"common_fraction": 0.3}):
        assert make_method("iso-cts", options).stack_size(spec, 8, CUDA) == 1
    assert make_method("iso-cts").stack_size(TensorSpec("x", (16, 16), single), 8, CUDA) == 1  # s = 0
    monkeypatch.setitem(devices.KNOWN, CUDA, RTX5090)
    assert stack_places((768, 768), single, CUDA) == 1


@pytest.mark.parametrize("options", [{"precision": "reference"}, {"solver": GramEigh()}], ids=["reference", "given"])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_stacks(options: dict[str, object], name: str) -> None:
    """With a member of low rank."""
    given = [*matrices(SHAPES["wide"], 2), irregular(SHAPES["wide"])["deficient"]]
    batch = [torch.stack([deltas[task] for deltas in given]) for task in range(3)]
    with pretend_gpu() as gpu:
        value, stats = make_method(name, options).merge(MemoryDeltas([gpu.upload(delta) for delta in batch]))
        value = value.cpu()
    assert not stats.missed()
    for member, deltas in enumerate(given):
        alone, _ = make_method(name, options).merge(MemoryDeltas(deltas))
        torch.testing.assert_close(value[member], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(260, 260), (150, 500), (500, 150), (1024, 132), (1500, 64)], ids=str)
def test_a_stack_keeps_to_what_it_says_it_needs(shape: tuple[int, int], name: str) -> None:
    spec, method = TensorSpec("x", shape, torch.float32), make_method(name)
    with pretend_gpu() as gpu:
        sources = [
            MemoryDeltas([gpu.upload(delta) for delta in Case(seed, *shape, 10.0, 4).deltas()])
            for seed in range(PLACES)
        ]
        method.merge_stack(sources)
        promised = method.stack_bytes(spec, 4, CUDA)
        peak, results = peak_bytes(lambda: method.merge_stack(sources))
    assert not any(stats.escalations for _, stats in results)
    assert peak <= promised <= 5 * peak


def test_the_fast_tier_has_the_same_stacks() -> None:
    given = matrices(SHAPES["square"], 2)
    with pretend_gpu() as gpu:
        for (value, stats), deltas in zip(merge_on(gpu, "iso-cts", given, precision="fast"), given, strict=True):
            assert isinstance(stats, MergeStats)
            assert error_of(value, deltas, "iso-cts") <= TOLERANCES["default"]
